"""The survey: small models with their relations kept, inputs guessed, and a run that goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.cli import main
from surgery.survey import Row, chosen, report, rows
from surgery.survey.feed import feed, run
from surgery.survey.guess import guesses
from surgery.survey.look import operated, read
from surgery.survey.run import look
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


def test_what_an_error_names_is_given():
    assert set(feed(Picky())) == {"input_ids", "decoder_input_ids"}


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
    row = look("transformers", name, True)
    assert (row.status, row.reason) == ("operated", "")
    assert row.sites >= 4
    assert row.attention >= 4
    assert "identical" in row.run
    assert "reverted" in row.run


@quiet
def test_a_plain_convnet_is_refused_with_its_reason():
    row = look("torchvision", "resnet18", True)
    assert (row.status, row.sites) == ("refused", 0)
    assert "spatial convolutions" in row.reason


@quiet
def test_a_timm_model_is_read_on_the_meta_device():
    row = look("timm", "vit_tiny_patch16_224", False)
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
    assert "never ran" in row.reason
    assert not hasattr(model, "surgery")


def test_a_forward_is_repeatable():
    inputs = {"input": torch.ones(1, 4)}
    dropout = nn.Dropout(0.5).train()
    assert torch.equal(run(dropout, inputs), run(dropout, inputs))


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


def test_a_crash_and_a_hang_are_rows_and_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_ones_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[object] = []
    done = rows("zoo_of_ones_own", seconds=8, workers=2, told=seen.append)
    by = {row.name: row for row in done}
    assert list(by) == ["fine", "crashes", "hangs", "raises", "also_fine"]
    assert by["fine"].status == by["also_fine"].status == "operated"
    assert by["crashes"].reason == "its process died (exit code 3)"
    assert by["hangs"].reason == "it took more than 8 seconds"
    assert by["raises"].reason.startswith("ValueError: no such thing")
    assert seen[0] == 5
    assert len(seen) == 6


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
        Row("timm", "c", "resnet", "refused", reason="no pair found"),
        done._replace(source="transformers", name="bert", family="bert"),
        Row("transformers", "odd", "odd", reason="ImportError: natten"),
    ]


def test_alike_timm_models_are_one_row_and_types_are_one_each():
    text = report.markdown(some())
    assert "| vit | sites | 2 | blocks.\\*.mlp Mlp | last | yes | a: ok |" in text
    assert "| bert | operated | 2 |" in text


def test_every_exception_is_told_with_its_reason():
    text = report.markdown(some())
    assert "- **c** (refused): no pair found" in text
    assert "- **odd** (failed): ImportError: natten" in text


def test_counts_come_first():
    counts = report.summary(some()).rows
    assert counts == [("timm", 3, 2, 1, 1, 1, 0), ("transformers", 2, 1, 1, 0, 0, 1)]


def test_the_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "coverage.md"
    words = ["survey", "timm", "--only", "vit_tiny_patch16_224", "--meta", "--out", str(out)]
    assert main(words) == 0
    assert "timm" in capsys.readouterr().out
    assert "blocks.\\*.mlp Mlp" in out.read_text()


def test_the_command_refuses_names_that_nothing_has(capsys):
    assert main(["survey", "timm", "--only", "vit_nothing"]) == 2
    assert "no model of timm has such a name" in capsys.readouterr().err
