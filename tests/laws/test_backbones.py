"""The suite on our own: every named rule set, those added later too, on a set of backbones.

A few examples of each property; pytest tests/laws/test_backbones.py --thorough tries many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from surgery import SurgeryError, apply, fingerprint, rulesets
from surgery import methods as sets
from surgery.spec import PROPERTIES, Absent, Case
from surgery.spec.laws import Broken
from surgery.spec.suite import Run
from tests import models

# two layers each: a first and a last; windows shifted and not, two widths


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(2, 1), num_heads=(2, 4),
        num_classes=5,
    )  # fmt: skip


def convnext() -> nn.Module:
    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=5)


def pixels() -> dict[str, Any]:
    return {"pixel_values": models.images()}


def ids() -> dict[str, Any]:
    return {"input_ids": models.words_in()}


BACKBONES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "vit": (partial(models.tiny_vit, depth=2), models.images),
    "swin": (swin, lambda: models.images(size=32)),
    "convnext": (convnext, lambda: models.images(size=32)),
    "hf_vit": (partial(models.hf_vit, layers=2), pixels),
    "bert": (partial(models.hf_bert, layers=2), ids),
    "gpt2": (partial(models.hf_gpt2, layers=2), ids),
    "llama": (partial(models.hf_llama, layers=2), ids),
    "encoder": (models.encoder, lambda: torch.randn(2, 5, 24)),
}
SETS = [str(row[0]) for row in rulesets().rows]
SMALL = {
    "kadaptation": {"t": 4},
    "mhr": {"heads": 4},
    "mhr_z": {"heads": 4},
    "language_adapter": {"domains": 1},
    "llama_adapter": {"first": 1},
}  # for such widths, and so few blocks
EVERYWHERE = {
    "adapterx", "adapterx_ffn", "adapter", "adaptformer", "houlsby", "lora", "ssf", "arc",
    "vpt_deep", "bitfit", "linear_probe", "full",
}  # fmt: skip
TOKENS = {
    "adapterx", "adapterx_serial", "vpt_deep", "vpt_shallow", "noah", "llama_adapter", "dapt",
    "daptx", "idpt",
}  # fmt: skip
NO_ROOM = {"swin", "convnext", "gpt2", "llama"}  # windows, maps, masks, rotary positions
NO_PROJECTIONS = {"convnext"}  # no attention
REFUSED = {
    *((rules, backbone) for rules in TOKENS - {"llama_adapter"} for backbone in NO_ROOM),
    *((rules, backbone) for rules in ("lora",) for backbone in NO_PROJECTIONS),
    ("arc", "convnext"),
    ("linear_probe", "encoder"),  # it has no head
    ("bitfit", "llama"),  # it has no bias
    *(
        (rules, backbone) for rules in ("pointgst", "point_peft") for backbone in BACKBONES
    ),  # no cloud
}
EMPTY = {  # nothing is learned of what was trained before, until it is filled in
    ("mhr_z", "gradients_reach_every_part"),
    ("scalearn", "gradients_reach_every_part"),
    ("adapter_fusion", "gradients_reach_every_part"),
    ("dapt", "gradients_reach_every_part"),  # a class token does not read the last prompt
    ("daptx", "gradients_reach_every_part"),
    ("glora", "gradients_reach_every_part"),  # what weighs the biases of a new model, zero
}
SILENT = {  # of mixtures, of what is traced, of models that hide no token
    "merge_is_equivalent",
    "meta_has_the_same_plan",
    "no_other_token_is_heard",
    "weights_are_theirs_outside",
}
TRIED = [
    (rules, backbone)
    for rules in SETS
    for backbone in BACKBONES
    if rules in EVERYWHERE or backbone in ("vit", "swin")
]


@cache
def base(backbone: str) -> Case:
    """A case of this backbone; its rules are another's."""
    torch.manual_seed(0)
    build, inputs = BACKBONES[backbone]
    return Case(build(), "full", inputs)


@lru_cache(maxsize=4)  # the tests come case by case
def case(rules: str, backbone: str) -> Case:
    return base(backbone).under(getattr(sets, rules)(**SMALL.get(rules, {})))


FULL = [t for t in TRIED if t not in REFUSED]


def by_turns() -> list[tuple[str, str, str]]:
    """Each law of each set: a law on every other of its backbones, the next on those between; on
    every third where it has many.

    On all of them of whole Adapter-X, of LoRA, and of sets that are for one backbone alone.
    """
    on = {rules: [b for r, b in FULL if r == rules] for rules in SETS}
    whole = {rules for rules in SETS if len(on[rules]) < 2} | {"adapterx", "adapterx_ffn", "lora"}
    return [
        (rules, backbone, law)
        for rules, backbone in FULL
        for n, law in enumerate(PROPERTIES)
        for turns in [2 if len(on[rules]) < 5 else 3]
        if rules in whole or (SETS.index(rules) + n + on[rules].index(backbone)) % turns == 0
    ]


@pytest.mark.parametrize(("rules", "backbone", "name"), by_turns())
def test_suite(rules: str, backbone: str, name: str, examples: int) -> None:
    run = Run(PROPERTIES[name], case(rules, backbone), examples, thorough=examples > 2)
    if (rules, name) in EMPTY:
        with pytest.raises(Broken, match="no gradient comes to"):
            run()
        return
    try:
        run()
    except Absent as absent:
        if rules == "adapterx_ffn" and name not in SILENT:
            pytest.fail(f"of these rules the law must say something: {absent}")
        pytest.skip(str(absent))


@pytest.mark.parametrize(("rules", "backbone"), [t for t in TRIED if t in REFUSED])
def test_what_a_model_has_no_place_for_is_refused(rules: str, backbone: str) -> None:
    """With a reason, by the rules or by a forward, and the model as it was."""
    build, inputs = BACKBONES[backbone]
    model, example = build(), inputs()
    mark = fingerprint(model)
    with pytest.raises(SurgeryError):
        apply(model, rules, example=example)
    assert fingerprint(model) == mark
