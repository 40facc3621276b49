"""The suite on our own: every named rule set, those added later too, on a set of backbones.

A few examples of each property; pytest tests/test_backbones.py --thorough tries many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from surgery import MatchError, rulesets
from surgery.spec import PROPERTIES, Absent, Case
from surgery.spec.check import Run
from tests import models


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4),
        num_classes=5,
    )  # fmt: skip


def convnext() -> nn.Module:
    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=5)


def pixels() -> dict[str, Any]:
    return {"pixel_values": models.images()}


def ids() -> dict[str, Any]:
    return {"input_ids": models.words_in()}


BACKBONES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "vit": (models.tiny_vit, models.images),
    "swin": (swin, lambda: models.images(size=32)),
    "convnext": (convnext, lambda: models.images(size=32)),
    "hf_vit": (models.hf_vit, pixels),
    "bert": (models.hf_bert, ids),
    "gpt2": (models.hf_gpt2, ids),
    "llama": (models.hf_llama, ids),
    "encoder": (models.encoder, lambda: torch.randn(2, 5, 24)),
}
SETS = [str(row[0]) for row in rulesets().rows]
HEADLESS = {("linear_probe", "encoder")}  # nn.TransformerEncoder has no head to be trained


@lru_cache(maxsize=100)
def case(rules: str, backbone: str) -> Case:
    torch.manual_seed(0)
    build, inputs = BACKBONES[backbone]
    return Case(build(), rules, inputs)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("rules", SETS)
@pytest.mark.parametrize("name", PROPERTIES)
def test_suite(rules: str, backbone: str, name: str, examples: int) -> None:
    if (rules, backbone) in HEADLESS:
        with pytest.raises(MatchError):
            _ = case(rules, backbone).places
        return
    try:
        Run(PROPERTIES[name], case(rules, backbone), examples, thorough=examples > 2)()
    except Absent as absent:
        pytest.skip(str(absent))


def test_a_law_is_silent_on_few_of_them() -> None:
    """Every property says something of some rule set on each backbone, but for merging."""
    for backbone in BACKBONES:
        chosen = case("adapterx_ffn", backbone)
        for name in set(PROPERTIES) - {"merge_is_equivalent", "meta_has_the_same_plan"}:
            if name != "it_compiles_whole":
                Run(PROPERTIES[name], chosen, 1)()
