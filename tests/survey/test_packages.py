"""Models of any package: what builds them, what a survey says, and the judge of what is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import package_page, truths
from benchmarks import packages as judge
from surgery.cli import main
from surgery.errors import RuleError
from surgery.survey import report, rows
from surgery.survey.builders import builders, built, distribution, provided
from surgery.survey.run import row_of

OWN = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(
            nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width)
        )

    def forward(self, pixel_values, scale=1.0):
        return pixel_values + scale * self.mlp(self.norm(pixel_values))


class Needy(Block):
    def __init__(self, width):
        super().__init__(width)

"""
FUNCTIONS = """
def pair():
    return Block(), (torch.randn(1, 5, 24), 0.5)


def alone():
    return Block()


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 8, 8)


def number():
    return 7


def listed() -> list[str]:
    raise AssertionError("it says that it gives no model")


def of_width(width):
    raise AssertionError("it needs an argument")


def _helper():
    raise AssertionError("it is private")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported; gives the source that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return f"package:{name}"

    return write


# what builds


def test_functions_without_arguments_build(module):
    assert list(builders(module("own_functions", OWN + FUNCTIONS))) == [
        "pair",
        "alone",
        "plain",
        "number",
    ]


def test_classes_build_where_there_are_no_functions(module):
    source = module("own_classes", OWN)
    assert list(builders(source)) == ["Block"]
    model, example = built(source, "Block")
    assert (type(model).__name__, example) == ("Block", None)


def test_what_is_imported_from_elsewhere_builds_nothing(module):
    with pytest.raises(RuleError, match="gives a model without arguments"):
        builders(module("own_nothing", "from torch.nn import Identity\nfrom json import dumps\n"))


def test_what_is_below_a_package_is_its_own():
    assert "resnet18" in builders("package:torchvision.models")
    assert "list_models" not in builders("package:torchvision.models")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_pytorh", "vit_pytorh is not installed.\nDid you mean vit_pytorch"),
        ("nothing.of.the_kind", "nothing.of.the_kind is not installed."),
        ("", "it names no module"),
        ("a/b.py", "it names no module"),
        ("json", "gives a model without arguments"),
    ],
)
def test_a_name_that_cannot_be_is_an_error(name, words, capsys):
    with pytest.raises(RuleError, match=words):
        builders(f"package:{name}")
    assert main(["survey", f"package:{name}"]) == 2
    assert capsys.readouterr().err.startswith(f"surgery survey: package:{name}: ")


def test_a_package_with_builders_that_is_missing_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuleError, match=r"linformer is not installed.\n.*\[survey-packages\]"):
        builders("package:linformer")


def test_a_module_that_fails_says_how(module):
    with pytest.raises(RuleError, match="failed: ZeroDivisionError: division by zero"):
        builders(module("own_failure", "1 / 0\n"))


def test_the_command_refuses_what_is_no_source(capsys):
    with pytest.raises(SystemExit):
        main(["survey", "timn"])
    assert (
        "timn is none of timm, torchvision, transformers, package:NAME" in capsys.readouterr().err
    )


# what a survey says


def test_a_module_of_builders_is_surveyed(module):
    done = {row.name: row for row in rows(module("own_zoo", OWN + FUNCTIONS), workers=1)}
    assert [r.status for r in done.values()] == ["operated", "operated", "refused", "failed"]
    assert done["pair"].run.startswith("identical, 6 gradients, reverted, ")
    assert done["alone"].run == done["pair"].run
    assert "convolutions over positions" in done["plain"].reason
    assert "it gave a int, and no model" in done["number"].reason


def test_a_model_without_inputs_is_fed(module):
    row = row_of(module("own_block", OWN), "Block", True)
    assert (row.status, row.sites, row.widths) == ("operated", 1, (24,))


def test_our_builders_stand_for_a_package():
    row = row_of("package:torch_geometric", "gps", True)
    assert row.status == "operated"
    assert "layers.*.mlp Sequential x2" in row.owners


def test_the_page_has_a_row_for_each_model_of_a_package():
    read = row_of("package:torch_geometric", "gps", False)
    text = report.markdown([read, read._replace(name="other")])
    assert "## package:torch_geometric" in text
    assert "| gps | planned | " in text
    assert "| other | planned | " in text
    assert f"{distribution('package:torch_geometric')} 2." in text


# the truth


@pytest.mark.parametrize("package", provided())
def test_every_builder_tells_what_is_right(package):
    functions = judge.builders(package)
    assert functions
    for name, function in functions.items():
        told = truths.truth(function)
        assert {*truths.ROLES, "prompts"} <= set(told), name
        assert told["prompts"].partition(";")[0] in ("yes", "some", "no"), name
        for role in truths.ROLES:
            assert told[role] == "-" or truths.addresses(told[role]), (name, role)


def model() -> nn.Module:
    """Two blocks of an attention and a network, and a head."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


RIGHT = {"ffn": "0.layers.*.(linear1 to linear2)", "qkv": "-", "proj": "-", "head": "1"}


def test_a_line_that_is_set_in_goes_on_with_the_last():
    def builder() -> None:
        """A model: of two towers.

        ffn: a.* b.(fc1 to fc2)
            c.{d,e}?
        head: -
        """

    told = truths.truth(builder)
    assert truths.addresses(told["ffn"]) == ["a.*", "b.(fc1 to fc2)", "c.{d,e}?"]
    assert truths.addresses(told["head"]) == []


def test_addresses_fit_step_by_step():
    net = model()
    assert truths.fitting(net, "0.layers.*.norm{1,2}")[:2] == [
        "0.layers.0.norm1",
        "0.layers.0.norm2",
    ]
    assert truths.fitting(net, "0.*.norm1") == []
    with pytest.raises(LookupError, match=r"0.blocks.\* fits no module"):
        truths.expected(net, "0.blocks.*")


def test_what_is_found_is_held_against_the_truth():
    net = model()
    sites = truths.found(net, torch.randn(2, 5, 16))
    assert set(truths.compared(net, RIGHT, sites).values()) == {""}


@pytest.mark.parametrize(
    ("role", "told", "words"),
    [
        (
            "ffn",
            "0.layers.*.linear1",
            "too much: *.layers.*.linear1+*.layers.*.linear2 x2; missing: ",
        ),
        ("ffn", "-", "too much: *.layers.*.linear1+*.layers.*.linear2 x2"),
        ("head", "1 0.layers.*.linear1", "missing: *.layers.*.linear1 x2"),
        ("head", "1 0.layers.*.linear1?", ""),
        ("head", "1?", ""),
        ("qkv", "0.layers.*.linear1", "missing: *.layers.*.linear1 x2"),
    ],
)
def test_a_disagreement_is_told(role, told, words):
    net = model()
    sites = truths.found(net, torch.randn(2, 5, 16))
    verdict = truths.compared(net, {**RIGHT, role: told}, sites)[role]
    assert verdict.startswith(words)
    assert bool(verdict) == bool(words)


def test_a_rule_set_that_runs_is_seen_to(monkeypatch):
    def build():
        return model(), torch.randn(2, 5, 16)

    assert judge.tried(build, "adapterx_ffn", RIGHT) == "runs"
    assert judge.tried(build, "lora", RIGHT) == "runs"  # at weights
    assert judge.tried(build, "fact_tt", RIGHT).startswith("refused: at(qkv, ...)")
    assert judge.tried(build, "vpt_deep", RIGHT) == "runs"
    one = nn.Sequential(Layer())
    came = judge.tried(lambda: (one, torch.randn(2, 5, 16)), "adapterx", RIGHT)
    assert came == "runs, without prompts"
    assert not judge._same([torch.ones(3)], [torch.ones(3) + 1e-5])
    monkeypatch.setattr(judge, "_move", lambda net: net.surgery.requires_grad_(False))
    assert "gradient" in judge.tried(build, "adapterx_ffn", RIGHT)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


def test_lora_in_a_wrong_place_is_seen():
    def build():
        return nn.Sequential(Layer(), Layer()), torch.randn(2, 5, 16)

    told = {"ffn": "*.mlp", "qkv": "*.attn.qkv", "proj": "*.attn.out"}
    assert judge._misplaced(build, told) == []
    wrong = judge._misplaced(build, {**told, "qkv": "0.attn.qkv 0.attn.out"})
    assert wrong == ["wrong places: *.attn.qkv x1", "partial, without *.attn.out x1"]


@pytest.mark.parametrize(
    ("rule", "came", "told", "word"),
    [
        ("lora", "runs", {"qkv": "a"}, "runs"),
        ("lora", "refused: why", {"qkv": "a"}, "refused though plain"),
        ("lora", "refused: why", {"qkv": "-"}, "rightly refused"),
        ("lora", "refused: why", {"qkv": "a?"}, "rightly refused"),
        ("lora", "refused: never ran", {"qkv": "a", "refuses": "never ran; b"}, "rightly refused"),
        ("lora", "refused: no gradient", {"qkv": "a", "idle": "b"}, "rightly refused"),
        ("lora", "partial, without a", {"qkv": "a"}, "partial"),
        ("lora", "wrong places: a", {"qkv": "a"}, "wrong"),
        ("vpt_deep", "RuntimeError: sizes", {"prompts": "no; b"}, "wrong"),
        ("vpt_deep", "runs", {"prompts": "no; b"}, "accepted though it cannot be right"),
        ("adapterx", "runs, without prompts", {"prompts": "no; b"}, "runs"),
        ("ssf", "refused: x never ran in", {}, "rightly refused"),
        ("arc", "refused: x never ran in", {"qkv": "a", "ffn": "b"}, "refused though plain"),
        ("vpt_deep", "refused: b", {"prompts": "some; b"}, "rightly refused"),
        ("adapterx", "refused: b", {"prompts": "yes", "ffn": "a"}, "refused though plain"),
        ("adapterx", "refused: b", {"prompts": "yes", "ffn": "-"}, "rightly refused"),
    ],
)
def test_an_outcome_is_one_word(rule, came, told, word):
    assert package_page.outcome({"rules": {rule: came}, "truth": told}, rule) == word


def test_the_page_tells_every_failure_with_its_reason():
    def row(name, ffn, came):
        told = {"ffn": "a", "qkv": "-", "prompts": "no; maps | squares"}
        found = {"with": {"ffn": ffn}, "without": {"ffn": ffn or "missing: b.* x2"}}
        return {"package": "p", "name": name, "truth": told, **found, "rules": {"vpt_deep": came}}

    good, bad = row("good", "", "refused: no"), row("bad", "too much: a_b.* x1", "RuntimeError: 5")
    text = package_page.page([good, bad, {"package": "p", "name": "?", "error": "it died"}])
    assert "2 models of 1 packages:" in text
    assert "- with an example: networks right in 1, all roles in 1" in text
    assert "- without an example: networks right in 0, all roles in 0" in text
    assert "| p.good | right | ffn | not tried |" in text
    assert "### p.bad\n\n- ffn, with an example: too much: a\\_b.\\* x1" in text
    assert "- `vpt_deep`, wrong: RuntimeError: 5 (by the source: no; maps \\| squares)" in text
    assert "### p.?\n\n- it died" in text
    assert "- **maps \\| squares**: p.good" in text
