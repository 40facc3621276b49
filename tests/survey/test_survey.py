"""The survey: small models with their relations kept, inputs guessed, and a run that goes on."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from surgery.cli import main
from surgery.structure.ffn_traced import traced_ffns
from surgery.structure.trace import trace
from surgery.survey import Row, chosen, report, rows, zoo
from surgery.survey import run as running
from surgery.survey.dummy_inputs import feed, forward, guesses
from surgery.survey.look import compared, operated, read
from surgery.survey.run import row_of
from surgery.survey.shrink import Shrink, shrunk
from tests import models

transformers = pytest.importorskip("transformers")
quiet = pytest.mark.filterwarnings("ignore")

# shrinking


def test_one_divisor_keeps_the_relations_between_widths():
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008)
    small = shrunk(config, Shrink(by=8))
    assert (small.hidden_size, small.intermediate_size) == (512, 1376)
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    assert small.num_hidden_layers == 4
    assert config.hidden_size == 4096


def test_heads_are_divided_where_their_width_must_stay():
    small = shrunk(transformers.LlamaConfig(), Shrink(by=4, heads=True))
    assert (small.head_dim, small.num_attention_heads, small.hidden_size) == (128, 8, 1024)


def test_towers_are_shrunk_with_the_whole():
    small = shrunk(transformers.CLIPConfig(), Shrink(by=8))
    assert small.text_config.hidden_size == 64
    assert small.vision_config.hidden_size == 96
    assert small.projection_dim == 64


def test_a_setting_that_only_a_whole_model_makes_is_kept():
    small = shrunk(transformers.LlavaConfig(), Shrink(by=8))
    assert small.vision_config.num_attention_heads == 16  # CLIP's own default is 12


def test_tokens_stay_apart_and_inside_the_vocabulary():
    config = transformers.Qwen2VLConfig()
    small = shrunk(config, Shrink())
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    assert len({getattr(small, name) for name in names}) == 4
    assert all(getattr(small, name) < small.text_config.vocab_size for name in names)


def test_every_kind_of_layer_stays():
    kinds = ["linear"] * 9 + ["full"]
    config = transformers.Qwen3NextConfig(
        num_hidden_layers=10, layer_types=[f"{kind}_attention" for kind in kinds]
    )
    assert set(shrunk(config, Shrink(layers=4)).layer_types) == set(config.layer_types)


def test_layer_numbers_move_with_the_layers():
    small = shrunk(transformers.SamVisionConfig(), Shrink(layers=4))
    assert list(small.global_attn_indexes) == [0, 1, 2, 3]


def test_an_image_is_a_whole_grid_of_patches():
    config = transformers.SiglipVisionConfig(image_size=384, patch_size=14)
    assert shrunk(config, Shrink(image=None)).image_size == 384
    assert shrunk(config, Shrink(image=None, grid=2)).image_size == 364
    assert shrunk(config, Shrink(image=None, grid=4)).image_size == 336


def test_widths_that_must_meet_are_made_to():
    config = transformers.Ovis2Config()
    config.hidden_size += 8
    small = shrunk(config, Shrink())
    assert small.hidden_size == small.text_config.hidden_size


def test_a_tower_built_by_name_keeps_its_widths():
    config = transformers.TimmWrapperConfig(architecture="resnet18")
    assert shrunk(config, Shrink()) is config


LACKING = ["dbrx", "moonshine_streaming", "musicgen", "cohere_compass_text", "lfm2_moe"]


@quiet
@pytest.mark.parametrize("name", LACKING)
def test_what_a_default_config_lacks_is_given(name):
    _, model = next(zoo.candidates(name))
    assert isinstance(model, nn.Module)


# feeding


class Picky(nn.Module):
    """Wants ids for a decoder too, and says so by a name."""

    main_input_name = "input_ids"

    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids must be given")
        return input_ids + decoder_input_ids


class Counting(nn.Module):
    """Wants as many image tokens as there are patches."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.Qwen2VLConfig()
        self.config.image_token_id = 7
        self.embed = nn.Embedding(60, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, pixel_values):
        tokens = int((input_ids == self.config.image_token_id).sum())
        if tokens != 16:
            raise ValueError(f"tokens: {tokens}, features: 16")
        return self.embed(input_ids)


class Silent(nn.Module):
    """Hands an optional argument on, under another name, to what cannot do without it."""

    main_input_name = "input_ids"

    def forward(self, input_ids, odd_sizes=None, mask=None, places=None, types=None):
        return self.outer(input_ids, odd_sizes)

    def outer(self, input_ids, odd_sizes):
        return self.inner(input_ids, odd_sizes)

    def inner(self, input_ids, given):
        return self.core(input_ids, given)

    def core(self, input_ids, given):
        return input_ids[:, : given.shape[-1]]


class Deep(nn.Module):
    """Wants a picture of six dimensions, and then masks, one by one."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values, tile_mask=None, row_mask=None, column_mask=None):
        _, _, _, _, _, width = pixel_values.shape
        for name, mask in (("tile", tile_mask), ("row", row_mask), ("column", column_mask)):
            if mask is None:
                raise ValueError(f"{name}_mask must be given")
        return pixel_values[..., :width]


def test_what_an_error_names_is_given():
    assert set(feed(Picky())) == {"input_ids", "decoder_input_ids"}


def test_what_an_inner_function_lacks_is_given():
    assert set(feed(Silent())) == {"input_ids", "odd_sizes"}


def test_what_got_so_far_is_kept_when_more_is_given():
    inputs = feed(Deep())
    assert inputs["pixel_values"].dim() == 6
    assert set(inputs) == {"pixel_values", "tile_mask", "row_mask", "column_mask"}


def test_whole_means_every_modality_or_none():
    class Blind(nn.Module):
        def forward(self, input_ids, pixel_values=None):
            if pixel_values is not None:
                raise ValueError("no picture will do")
            return input_ids

    assert set(feed(Blind())) == {"input_ids"}
    with pytest.raises(ValueError, match="no picture"):
        feed(Blind(), whole=True)


def test_image_tokens_are_put_in_by_count():
    assert int((feed(Counting())["input_ids"] == 7).sum()) >= 16


def test_what_cannot_be_fed_says_why():
    class Never(nn.Module):
        def forward(self, input_ids):
            raise ValueError("never")

    with pytest.raises(ValueError, match="never"):
        feed(Never())


@pytest.mark.parametrize("name", ["input_ids", "pixel_values", "input_features", "past_values"])
def test_guesses_are_the_same_every_time(name):
    for a, b in zip(guesses(None, name), guesses(None, name), strict=True):
        assert torch.equal(a, b)


# one model


@quiet
@pytest.mark.parametrize("name", ["bert", "vit", "clip", "t5"])
def test_tiny_transformers_are_operated_for_real(name):
    row = row_of("transformers", name, True)
    assert (row.status, row.reason) == ("operated", "")
    assert row.sites >= 4
    assert row.attention >= 4
    assert "identical" in row.run
    assert "reverted, forward agrees" in row.run


@quiet
def test_a_plain_convnet_is_refused_with_its_reason():
    row = row_of("torchvision", "resnet18", True)
    assert (row.status, row.sites) == ("refused", 0)
    assert "convolutions over positions" in row.reason
    assert row.run == "forward agrees"


@quiet
def test_a_timm_model_is_read_on_the_meta_device():
    row = row_of("timm", "vit_tiny_patch16_224", False)
    assert (row.status, row.sites, row.widths, row.layout) == ("planned", 12, (192,), "last")
    assert row.owners == ("blocks.*.mlp Mlp x12",)


def test_a_part_that_never_runs_is_seen():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = models.encoder(), models.encoder()

        def forward(self, x):
            return self.used(x)

    model = Skips()
    row = read(Row("own", "skips"), model)
    width = row.widths[0]
    row = operated(row, model, {"x": torch.randn(1, 5, width)})
    assert row.status == "refused"
    assert row.run == "forward sees 2 of 4"
    assert row.reason.startswith("not run with these inputs: idle.")
    assert not hasattr(model, "surgery")


def test_a_forward_may_draw_random_numbers_of_python():
    class Draws(nn.Sequential):
        def forward(self, input):
            random.random()  # as MusicGen does, to leave layers out
            return super().forward(input)

    model = Draws(Layer(True, False), Layer(True, False))
    row = operated(read(Row("own", "draws"), model), model, {"input": torch.randn(1, 5, D)})
    assert (row.status, row.reason) == ("operated", "")


D, H = 16, 40


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))


class Layer(nn.Module):
    """A block of which a forward may use less, or more, than its structure shows."""

    def __init__(self, used: bool, hidden: bool) -> None:
        super().__init__()
        self.used, self.norm, self.mlp = used, nn.LayerNorm(D), mlp()
        self.raw = nn.Module()
        self.raw.both = nn.Parameter(torch.randn(2, D, H)) if hidden else None

    def forward(self, x):
        if self.used:
            x = x + self.mlp(self.norm(x))
        if self.raw.both is None:
            return x
        up, down = self.raw.both
        return x + (self.norm(x) @ up).relu() @ down.T


@pytest.mark.parametrize(
    ("used", "hidden", "verdict", "reason"),
    [
        (True, False, "forward agrees", ""),
        (False, False, "forward sees 0 of 2", "not run with these inputs: *.mlp x2"),
        (True, True, "forward sees 2 more", "to the forward alone: *.raw x2"),
        (False, True, "forward sees 0 of 2 and 2 more", "not run with these inputs: *.mlp x2; "),
    ],
)
def test_a_forward_is_held_against_the_structure(used, hidden, verdict, reason):
    model = nn.Sequential(Layer(used, hidden), Layer(used, hidden))
    row = compared(read(Row("own", "layers"), model), model, {"input": torch.randn(1, 5, D)})
    assert row.run == verdict
    assert row.reason.startswith(reason)
    assert bool(row.reason) == bool(reason)


def test_a_disagreement_stands_in_the_row_of_an_operated_model():
    model = nn.Sequential(Layer(True, True), Layer(True, True))
    row = read(Row("own", "layers"), model)
    row = operated(row, model, {"input": torch.randn(1, 5, D)})
    assert (row.status, row.reason) == ("operated", "to the forward alone: *.raw x2")
    assert row.run.endswith("reverted, forward sees 2 more")


class Pieces(nn.Module):
    """Experts in one parameter, each run on its own piece of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.Parameter(torch.randn(3, H, D))
        self.downs = nn.Parameter(torch.randn(3, D, H))

    def forward(self, x):
        linear = nn.functional.linear
        taken = torch.cat([linear(p, w) for p, w in zip(x.split(2), self.ups, strict=True)])
        taken = taken.relu()
        outputs = [linear(p, w) for p, w in zip(taken.split(2), self.downs, strict=True)]
        return x + torch.cat(outputs)


def test_experts_run_on_pieces_are_one_network():
    ffns = traced_ffns(trace(Pieces(), torch.randn(6, D)))
    assert [(f.width, f.hidden, f.kind) for f in ffns] == [(D, H, "ffn")]


def test_a_residual_of_several_streams_is_one():
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.gate = mlp(), nn.Linear(D, 4)

        def forward(self, x):  # [batch, tokens, 4, D]
            return self.gate(x[:, :, 0])[..., None] * self.mlp(x.mean(2))[:, :, None] + x

    ffns = traced_ffns(trace(Streams(), torch.randn(1, 5, 4, D)))
    assert [(f.owner, f.kind) for f in ffns] == [("mlp", "ffn")]


def test_a_forward_is_repeatable():
    inputs = {"input": torch.ones(1, 4)}
    dropout = nn.Dropout(0.5).train()
    assert torch.equal(forward(dropout, inputs), forward(dropout, inputs))


# many models

OWN = """
import os, time
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def fine():
    return nn.Sequential(*[Block() for _ in range(2)]), {"input": torch.randn(1, 5, 24)}


def crashes():
    os._exit(3)


def hangs():
    time.sleep(600)


def raises():
    raise ValueError("no such thing")


def also_fine():
    return fine()
"""
GROWS = """

def grows():
    from surgery.survey import run
    run.FULL = 0
    return fine()
"""


def test_a_crash_and_a_hang_are_rows_and_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_ones_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    news: list[object] = []
    done = rows("zoo_of_ones_own", seconds=8, workers=2, progress=news.append)
    by_name = {row.name: row for row in done}
    assert list(by_name) == ["fine", "crashes", "hangs", "raises", "also_fine"]
    assert by_name["fine"].status == by_name["also_fine"].status == "operated"
    assert by_name["crashes"].reason == "its process died (exit code 3)"
    assert by_name["hangs"].reason == "it took more than 8 seconds"
    assert by_name["raises"].reason.startswith("ValueError: no such thing")
    assert news[0] == 5
    assert len(news) == 6


def test_a_worker_that_has_grown_is_replaced_without_a_loss(tmp_path, monkeypatch):
    (tmp_path / "zoo_that_grows.py").write_text(OWN + GROWS)
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = running.Worker()
    for _ in range(2):
        assert worker.ask(("zoo_that_grows", "grows", True), 60).status == "operated"
        assert worker.process is None
    assert worker.ask(("zoo_that_grows", "fine", True), 60).status == "operated"
    assert worker.process is not None
    worker.end()


def test_a_run_that_is_lost_keeps_what_was_read(monkeypatch):
    read_rows = [
        Row("timm", "vit", "vit", "planned", 9, 2),
        Row("timm", "res", "res", "refused", 9),
    ]
    lost = [Row("timm", name, reason="it took more than 9 seconds") for name in ("vit", "res")]
    given = iter([read_rows, lost])
    monkeypatch.setattr(running, "_each", lambda *_: [(row.name, row) for row in next(given)])
    done = rows("timm", ["vit", "res"])
    assert [(r.status, r.sites) for r in done] == [("planned", 2), ("refused", 0)]
    assert {r.reason for r in done} == {"not run here: it took more than 9 seconds"}


def test_names_are_chosen_by_patterns():
    assert chosen(["vit_a", "vit_b", "swin", "bert"], "vit_*, bert") == ["vit_a", "vit_b", "bert"]


# the table


def some() -> list[Row]:
    done = Row(
        "timm", "a", "vit", "operated", 9, 2, ("blocks.*.mlp Mlp x2",), (8,), "last", 2, "ok"
    )
    return [
        done,
        done._replace(name="b", status="planned", owners=("blocks.*.mlp Mlp x4",), run=""),
        Row(
            "timm", "c", "resnet", "refused", reason="it has 9 convolutions over positions (conv1)"
        ),
        Row("timm", "d", "vgg", "refused", reason="it has 5 convolutions over positions (stem)"),
        done._replace(source="transformers", name="bert", family="bert"),
        Row("transformers", "odd", "odd", reason="ImportError: natten"),
    ]


def test_alike_timm_models_are_one_row_and_types_are_one_each():
    text = report.markdown(some())
    assert "| vit | sites | 2 | blocks.\\*.mlp Mlp | last | yes | a: ok |" in text
    assert "| bert | operated | 2 |" in text


def test_every_exception_is_told_with_its_reason():
    text = report.markdown(some())
    assert "### timm: no feed-forward network (2)" in text
    assert "- **resnet, vgg**: convolutions over positions" in text
    assert "### transformers: failed (1)" in text
    assert "- **odd**: ImportError: natten" in text


def test_models_refused_for_one_reason_stand_together():
    why = "at(nearest(norm), ...) matched no module of {}. Roles found in it: {}. X shows more."
    text = report.markdown(
        [Row("timm", n, n, "refused", 9, 2, reason=why.format(n * 3, n)) for n in ("a", "b")]
    )
    assert "- **a, b**: at(nearest(norm), ...) matched no module\n" in text


def test_a_long_reason_is_cut_between_words():
    row = Row("timm", "c", "c", "failed", reason="word " * 100)
    line = next(line for line in report.markdown([row]).splitlines() if line.startswith("- **c**"))
    assert line.endswith("word ...")
    assert len(line) < 320


def test_the_page_says_what_made_it_and_how_often_the_forward_agrees():
    ran = [row._replace(run="identical, forward agrees") for row in some()[:2]]
    ran.append(ran[0]._replace(name="e", run="identical, forward sees 1 of 2", reason="odd"))
    text = report.markdown(ran, "surgery survey timm")
    assert "    surgery survey timm\n" in text
    assert f"With torch {torch.__version__.partition('+')[0]}" in text
    assert "3 models, 3 of them with feed-forward networks: 6 sites" in text
    assert "agrees on 2, and sees otherwise on 1." in text
    assert "### timm: operated, but the forward sees otherwise (1)" in text
    assert "read on the meta device" in text
    assert "default config" not in text


def test_a_model_that_could_not_be_built_is_named():
    assert "- **odd**: why" in report.markdown([Row("timm", "odd", reason="why")])


@quiet
def test_a_model_that_the_meta_device_will_not_build_is_built():
    row = row_of("torchvision", "quantized_mobilenet_v2", False)
    assert (row.status, row.sites) == ("refused", 0)


def test_counts_come_first():
    counts = report.summary(some()).rows
    assert counts == [("timm", 4, 2, 1, 1, 2, 0), ("transformers", 2, 1, 1, 0, 0, 1)]


def test_the_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "coverage.md"
    words = ["survey", "timm", "--only", "vit_tiny_patch16_224", "--meta", "--out", str(out)]
    assert main(words) == 0
    assert "timm" in capsys.readouterr().out
    assert "blocks.\\*.mlp Mlp" in out.read_text()
    assert "surgery survey timm --only vit_tiny_patch16_224 --meta" in out.read_text()


def test_the_command_refuses_names_that_nothing_has(capsys):
    assert main(["survey", "timm", "--only", "vit_nothing"]) == 2
    assert "no model of timm has such a name" in capsys.readouterr().err
