"""The suite as users run it: a call, pytest ids, a command, and no code at all."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import MethodType

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import adapter, append, at, ffn, parallel
from surgery._resolve import inputs_of
from surgery.cli import main
from surgery.spec import GROUPS, PROPERTIES, Absent, Broken, Case, Report, check, specify
from surgery.spec.transformer import Transformer
from surgery.survey import zoo
from tests import models
from tests.laws.test_teeth import LooksAtOtherTokens

ROOT = Path(__file__).resolve().parents[2]
FEW = ["revert_is_exact", "tokens_do_not_mix", "gates_lie_on_the_simplex"]
GOOD = at(ffn, parallel(adapter(rank=8)))
BAD = at(ffn, append(LooksAtOtherTokens))


def outcomes(report: Report) -> dict[str, str]:
    return {verdict.name: verdict.outcome for verdict in report.verdicts}


def test_a_report_says_what_holds_what_not_and_what_is_silent():
    model = Transformer()
    report = check(model, BAD, model.example(), only=FEW)
    assert outcomes(report) == dict(zip(FEW, ["holds", "broken", "absent"], strict=True))
    told = str(report)
    assert "1 hold, 1 broken, 1 absent; " in told
    assert "no part routes" in told
    assert "tokens_do_not_mix is broken: d part(x)_i / d x_j = 0 exactly" in told
    with pytest.raises(Broken, match=r"LooksAtOtherTokens at stages\.0\.0\.mlp: token 0"):
        report.raise_broken()
    good = check(model, GOOD, model.example(), only=FEW)
    assert good.raise_broken() is good


def test_what_is_expected_to_fail_is_no_failure_and_what_then_holds_is_told():
    model = Transformer()
    excused = {"tokens_do_not_mix": "it pools", "revert_is_exact": "it may not"}
    report = check(model, BAD, model.example(), only=FEW, expected_failures=excused)
    assert outcomes(report)["tokens_do_not_mix"] == "expected"
    assert "it pools" in str(report)
    assert "though expected to fail: it may not" in str(report)
    assert not report.broken


def test_names_that_do_not_exist_are_errors():
    model = Transformer()
    with pytest.raises(surgery.RuleError, match="Nearest: revert_is_exact"):
        check(model, GOOD, model.example(), only=["revert_is_bitwise"])
    with pytest.raises(surgery.RuleError, match="tokens_do_not_mix"):
        check(model, GOOD, model.example(), expected_failures={"tokens_mix": "why"}, only=FEW)
    with pytest.raises(surgery.MatchError, match="matched no module"):
        check(model, at("nowhere", parallel(adapter())), model.example())


def test_the_model_and_the_inputs_are_left_alone():
    model = Transformer().float()
    x, before = torch.randn(2, 8, 3), surgery.fingerprint(model)
    check(model, GOOD, x, examples=1)
    assert x.dtype == torch.float32
    after = surgery.fingerprint(model)
    assert {k for k in before if before[k] != after[k]} == set()


def test_a_model_that_does_not_run_in_float64_is_tried_in_its_own_dtype():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x.float())

    case = Case(Stubborn, at("fc", parallel(adapter(rank=8))), torch.randn(2, 8))
    assert case.model().fc.weight.dtype == torch.float32
    assert Case(Transformer().float(), GOOD, torch.randn(2, 8, 3)).model().head.weight.dtype == (
        torch.float64
    )


def test_a_property_that_fails_now_and_then_is_broken_too(monkeypatch):
    calls = []

    def now_and_then(case, draw):
        """x = x."""
        draw(st.integers(), "n")
        calls.append(1)
        if len(calls) == 2:
            raise Broken("once")

    monkeypatch.setitem(PROPERTIES, "revert_is_exact", now_and_then)
    monkeypatch.setitem(GROUPS, "life", (now_and_then,))
    model = Transformer()
    report = check(model, GOOD, model.example(), only=["revert_is_exact"])
    assert "not each time" in report.broken[0].told


SPECIFIED = specify(
    model=lambda: Transformer(depth=1),
    rules=BAD,
    inputs=lambda: Transformer().example(),
    expected_failures={"tokens_do_not_mix": "it looks at other tokens"},
    examples=2,
)


@SPECIFIED
def test_mine(property):
    property()


def test_specify_makes_an_id_of_each_property():
    parameters = SPECIFIED.args[1]
    assert [p.id for p in parameters] == list(PROPERTIES)
    marked = {p.id: [mark.name for mark in p.marks] for p in parameters if p.marks}
    assert marked == {"tokens_do_not_mix": ["xfail"]}


def test_inputs_are_told_or_guessed():
    model = models.tiny_vit()
    model.default_cfg = {"input_size": (3, 16, 16)}
    assert inputs_of("", model).shape == (2, 3, 16, 16)
    assert inputs_of("", Transformer()).shape == (2, 8, 3)
    assert inputs_of("", zoo.tiny("distilbert")[0])["input_ids"].dim() == 2
    with pytest.raises(surgery.RuleError, match="Give --inputs"):
        inputs_of("", nn.Bilinear(2, 3, 4))


MINE = """
from torch import nn
from surgery import append, at, ffn
from surgery.spec.transformer import Transformer as build


class Gate(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.weight = nn.Linear(site.width, site.width)

    def forward(self, x):
        return self.weight(x) + x.mean(-2, keepdim=True)


RULES = [at(ffn, append(Gate))]


def inputs():
    return build().example()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_model_and_rules.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "my_model_and_rules.py"


def test_the_command_prints_the_table_and_says_by_its_status_what_came_of_it(mine, capsys):
    names = ["--only", "copies_are_independent", "tokens_do_not_mix", "--inputs", f"{mine}:inputs"]
    command = ["check", f"{mine}:build", "--rules", f"{mine}:RULES", *names]
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "tokens_do_not_mix is broken" in told
    assert "Gate at stages.0.0.mlp: token 0 depends on token 1" in told
    assert main([*command, "--expect", "tokens_do_not_mix=it pools"]) == 0
    assert "it pools" in capsys.readouterr().out
    assert main([*command, "--only", "tokens_mix"]) == 2
    assert "Nearest: tokens_do_not_mix" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--expect", "tokens_do_not_mix"])
    assert "gives no reason" in capsys.readouterr().err


def test_the_command_on_a_timm_model(capsys):
    names = ["--only", "parts_start_as_the_identity", "--examples", "1"]
    assert main(["check", "timm:test_vit", *names]) == 0
    assert "1 hold; 1 examples" in capsys.readouterr().out


def pytest_run(*options: str) -> str:
    installed = any(e.value == "surgery.pytest_plugin" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "surgery.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", *plugin, "--pyargs", "surgery.spec", "-v", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def test_no_code_is_needed(mine):
    rules = ["--surgery-model", f"{mine}:build", "--surgery-rules", f"{mine}:RULES"]
    told = pytest_run(*rules, "--surgery-examples", "2", "-k", " or ".join(FEW))
    assert re.search(r"test_model\[revert_is_exact\] PASSED", told), told
    assert re.search(r"test_model\[tokens_do_not_mix\] FAILED", told), told
    assert re.search(r"test_model\[gates_lie_on_the_simplex\] SKIPPED", told), told
    assert "d part(x)_i / d x_j = 0 exactly" in told
    assert "1 failed, 1 passed, 1 skipped" in told


def test_without_a_model_nothing_is_run(mine):
    assert "1 skipped" in pytest_run()


class Doubling(nn.Linear):
    """Has a closure, a method that was put in, or nothing of the kind."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, 4)
        self.tied, self.register = self.weight, [self.weight]
        if kind == "closure":
            self.after = lambda y: 2 * y
        elif kind == "method":
            self.after = MethodType(doubled, self)
        elif kind == "tensor":
            self.after = torch.full((), 2.0, dtype=torch.float64).mul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(super().forward(x))


def doubled(self: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


@pytest.mark.parametrize("kind", ["closure", "method", "tensor", "none"])
def test_every_property_gets_a_deep_copy(kind):
    model = Doubling(kind) if kind != "none" else models.tiny_vit()
    x = torch.randn(2, 4) if kind != "none" else models.images()
    case = Case(model, at("", surgery.unfreeze), x)
    one, two = case.model(), case.model()
    alike = copy.deepcopy(case._model)
    assert list(vars(one)) == list(vars(alike))
    assert torch.equal(case.outputs(one)[0], case.outputs(alike)[0])
    assert getattr(one, "tied", None) is getattr(one, "weight", None)
    assert getattr(one, "register", [None])[0] is getattr(one, "weight", None)
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    assert torch.equal(case.outputs(two)[0], case.outputs(alike)[0])
    assert torch.equal(case.outputs(case.model())[0], case.outputs(alike)[0])


def test_under_other_rules_only_what_is_known_of_the_model_is_kept():
    model, asked = Transformer(), []
    case = Case(model, GOOD, model.example())

    def fact(case: Case, model: nn.Module) -> int:
        asked.append(model)
        return len(list(model.modules()))

    other = case.under(at(surgery.head, surgery.unfreeze))
    assert case.of_base(fact) == other.of_base(fact) == len(list(model.modules()))
    assert len(asked) == 1
    assert [rule.where for rule in other.rules] == [surgery.head]
    assert case.places
    assert case.under(at(surgery.attn, parallel(adapter(rank=2)))).places != case.places


def test_absent_and_broken_are_told_apart():
    assert not issubclass(Absent, Broken)
    assert issubclass(Broken, AssertionError)


def test_the_tutorial_holds_and_is_short(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    rules = ROOT / "examples/custom_rules.py"
    assert len(rules.read_text().splitlines()) < 40
    backbone = "examples/custom_backbone.py:Loom"
    assert main(["check", backbone, "--rules", f"{rules}:RULES", "--examples", "1"]) == 0
    assert "parts_start_as_the_identity           holds" in capsys.readouterr().out


def test_the_page_says_how_many_laws_there_are():
    assert f"tries {len(PROPERTIES)} laws on any model" in (ROOT / "README.md").read_text()
