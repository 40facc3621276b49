"""Models as authors write them, each in a file that says what is right; under random names too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import surgery
from surgery.structure.anatomy import roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.module_tree import Tree
from tests.structure.renaming import originals, renamed

HERE = Path(__file__).parent / "idioms"


class Idiom(NamedTuple):
    """make    a model of the file
    example
    right   the sites of some roles, in the words of the file; numbers in braces are several
    blind   those that modules alone show, where not all of them do
    """

    make: Callable[[ModuleType], nn.Module]
    example: Any
    right: dict[str, str]
    blind: tuple[str, ...] | None = None


def _tokens(width: int, samples: int = 2) -> Any:
    return torch.randn(samples, 6, width)


IDIOMS = {
    "01_alternating_layers": Idiom(
        lambda file: file.M(),
        _tokens(8),
        {
            "ffn": "layers.{1,3}.1.ff",
            "attn": "layers.{0,2}.1",
            "block": "layers.(0 to 1) layers.(2 to 3)",
            "qkv": "layers.{0,2}.1.to_q layers.{0,2}.1.to_k layers.{0,2}.1.to_v",
            "proj": "layers.{0,2}.1.to_out",
            "head": "head",
            "embed": "inp",
        },
    ),
    "02_out_proj_registered_first": Idiom(
        lambda file: file.M(),
        _tokens(8),
        {
            "attn": "{1,2}.attn",
            "qkv": "{1,2}.attn.to_q {1,2}.attn.to_k {1,2}.attn.to_v",
            "proj": "{1,2}.attn.out_proj",
        },
        blind=("attn",),
    ),
    "04 on maps": Idiom(
        lambda file: file.M(True),
        torch.randn(2, 32, 4, 4),
        {
            "norm": "layers.{0,1}.0.norm layers.{0,1}.1.0",
            "ffn": "layers.{0,1}.1.(1 to 3)",
            "attn": "layers.{0,1}.0",
            "qkv": "layers.{0,1}.0.qkv",
            "proj": "layers.{0,1}.0.out",
            "block": "layers.{0,1}",
        },
    ),
    "04 on tokens": Idiom(
        lambda file: file.M(False),
        _tokens(32),
        {"norm": "layers.{0,1}.0.norm layers.{0,1}.1.0", "ffn": "layers.{0,1}.1.(1 to 3)"},
    ),
    "06 once for all": Idiom(
        lambda file: file.M(False),
        (_tokens(8), torch.randn(2, 16)),
        {
            "head": "out",
            "embed": "inp adaln_single",
            "attn": "blocks.{0,1}.attn",
            "qkv": "blocks.{0,1}.attn.qkv",
            "proj": "blocks.{0,1}.attn.out",
        },
        blind=("attn", "qkv", "proj"),
    ),
    "06 in every block": Idiom(
        lambda file: file.M(True),
        (_tokens(8), torch.randn(2, 16)),
        {
            "head": "out",
            "attn": "blocks.{0,1}.attn",
            "qkv": "blocks.{0,1}.attn.qkv",
            "proj": "blocks.{0,1}.attn.out",
            "block": "blocks.{0,1}",
        },
        blind=("head", "block"),
    ),
    "07_head_registered_first": Idiom(
        lambda file: file.M(),
        torch.randint(0, 50, (2, 6)),
        {"head": "lm_head", "embed": "wte", "attn": "h.{0,1}.self_attn"},
        blind=("attn",),
    ),
    "08_conv_module_is_attention": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {"attn": "{0,1}.self_attn", "qkv": "{0,1}.self_attn.qkv", "proj": "{0,1}.self_attn.out"},
        blind=(),
    ),
    "09_attention_without_ffn": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {
            "attn": "{blocks,single}.{0,1}.attn",
            "qkv": "{blocks,single}.{0,1}.attn.to_q {blocks,single}.{0,1}.attn.to_k "
            "{blocks,single}.{0,1}.attn.to_v",
            "proj": "blocks.{0,1}.attn.out",
            "ffn": "blocks.{0,1}.ff",
            "head": "head",
        },
        blind=("ffn", "head", "proj"),
    ),
    "12_lone_block": Idiom(
        lambda file: file.M(),
        _tokens(12),
        {
            "ffn": "encode.ff.fn layers.0.ff.fn",
            "attn": "encode.attn.fn layers.0.attn.fn",
            "qkv": "encode.attn.fn.to_q encode.attn.fn.to_kv layers.0.attn.fn.to_q "
            "layers.0.attn.fn.to_kv",
            "proj": "encode.attn.fn.to_out layers.0.attn.fn.to_out",
            "head": "head",
        },
    ),
    "13_ffn_is_a_module_list": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {
            "ffn": "blocks.{0,1}.ff",
            "attn": "blocks.{0,1}.attn",
            "qkv": "blocks.{0,1}.attn.qkv",
            "proj": "blocks.{0,1}.attn.out",
        },
    ),
    "14_w1_w2_w3": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {
            "ffn": "blocks.{0,1}.ff",
            "fc1": "blocks.{0,1}.ff.w1 blocks.{0,1}.ff.w3",
            "fc2": "blocks.{0,1}.ff.w2",
            "block": "blocks.{0,1}",
        },
    ),
    "16_attention_of_one_linear": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {"attn": "blocks.{0,1}.attn", "qkv": "blocks.{0,1}.attn.to_qkv", "proj": ""},
    ),
    "17_block_is_a_module_list": Idiom(
        lambda file: file.M(),
        _tokens(8),
        {
            "block": "layers.{0,1}",
            "head": "head",
            "embed": "inp",
            "attn": "layers.{0,1}.0",
            "ffn": "layers.{0,1}.1.(1 to 3)",
        },
        blind=("block", "attn", "ffn"),
    ),
    "18_two_towers": Idiom(
        lambda file: file.M(),
        (_tokens(32), torch.randn(2, 5, 48)),
        {"block": "{visual,text}.{0,1}", "head": "a b"},
    ),
    "20_parametrized": Idiom(
        lambda file: file.M(),
        _tokens(32),
        {"norm": "layers.{0,1}.norm1 layers.{0,1}.norm2", "head": "head"},
        blind=("norm",),
    ),
    "23_reversible": Idiom(
        lambda file: file.M(),
        _tokens(8),
        {"ffn": "blocks.{0,1}.f.(1 to 3) blocks.{0,1}.g.(1 to 3)", "block": "blocks.{0,1}"},
    ),
    "25 flat attention": Idiom(
        lambda file: file.M(file.Block),
        _tokens(32),
        {
            "attn": "layers.{0,1}.(qkv to proj)",
            "qkv": "layers.{0,1}.qkv",
            "proj": "layers.{0,1}.proj",
            "ffn": "layers.{0,1}.mlp",
        },
    ),
    "25 all flat": Idiom(
        lambda file: file.M(file.Flat),
        _tokens(32),
        {
            "attn": "layers.{0,1}.(q to o)",
            "qkv": "layers.{0,1}.q layers.{0,1}.k layers.{0,1}.v",
            "proj": "layers.{0,1}.o",
            "ffn": "layers.{0,1}.(fc1 to fc2)",
        },
    ),
}


def _file(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (path,) = HERE.glob(f"{name[:2]}_*.py")
    shown = ModuleType("show")
    shown.show = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "show", shown)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    return file


def _spelled(text: str) -> Iterator[str]:
    """Each path that a text stands for, its braces filled in."""
    for path in text.replace(" to ", "~").split():
        before, brace, rest = path.partition("{")
        if not brace:
            yield path.replace("~", " to ")
        else:
            inside, _, after = rest.partition("}")
            for one in inside.split(","):
                yield from _spelled((before + one + after).replace("~", " to "))


def _found(model: nn.Module, example: Any) -> dict[str, list[str]]:
    tree = Tree(model)
    attach_dataflow(tree, example)
    return {role: originals(sites) for role, sites in roles_of(tree).items()}


@pytest.mark.parametrize("seed", [None, 0, 1], ids=lambda seed: f"names {seed}")
@pytest.mark.parametrize("told", [True, False], ids=["by a forward", "by modules"])
@pytest.mark.parametrize("name", IDIOMS)
def test_roles_are_where_the_file_says(
    name: str, told: bool, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    idiom = IDIOMS[name]
    model = idiom.make(_file(name, monkeypatch)).eval()
    if seed is not None:
        renamed(model, seed)
    found = _found(model, idiom.example if told else None)
    asked = idiom.right if told or idiom.blind is None else idiom.blind
    for role in asked:
        assert sorted(found[role]) == sorted(_spelled(idiom.right[role])), role


@pytest.mark.parametrize("name", IDIOMS)
def test_widths_of_blocks_are_those_of_the_stream(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Tree(IDIOMS[name].make(_file(name, monkeypatch)).eval())
    attach_dataflow(tree, IDIOMS[name].example)
    width = {"23_reversible": {64}, "18_two_towers": {32, 48}}.get(name, {32})
    blocks = [block for block in roles_of(tree)["block"] if not block.is_span]
    assert {block.width for block in blocks} | {block.out for block in blocks} <= width


@pytest.mark.parametrize("name", IDIOMS)
def test_where_modules_do_not_tell_the_plan_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    idiom = IDIOMS[name]
    rules = [surgery.at(role, surgery.unfreeze, optional=True) for role in ROLES]
    model = idiom.make(_file(name, monkeypatch)).eval()
    alone, told = _found(model, None), _found(model, idiom.example)
    guessed = str(surgery.plan(model, rules))
    corrected = str(surgery.plan(model, rules, example=idiom.example))
    for role in map(str, ROLES):
        assert not alone[role] or role in _notes(guessed, "as the modules suggest")
        if alone[role] != told[role]:
            assert role in _notes(corrected, "other than the modules suggest")


ROLES = (surgery.block, surgery.attn, surgery.qkv, surgery.proj, surgery.head, surgery.embed)


def _notes(text: str, of: str) -> set[str]:
    """The roles that such notes speak of."""
    notes = [line for line in text.splitlines() if of in line]
    words = (line.removeprefix("note: ").partition(":")[0] for line in notes)
    return {word.strip() for each in words for word in each.split(",")}
