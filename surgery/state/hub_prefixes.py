"""Prefixes of adapters (adapter-hub): the keys and values of all layers, in one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..parts.prefixes import Prefix, prefix, prefix_features
from ..rules.edits import attend
from ..rules.part import shared
from .foreign import Held, fail
from .hub_places import MERGE, Hub, Spot
from .reading import FIT

CAUSAL = {"gpt2", "llama", "mistral"}
PLAIN = {
    "wte.weight": "embedding", "control_trans.0.weight": "fc.weight",
    "control_trans.0.bias": "fc.bias",
}  # fmt: skip
FLAT, MADE = {"control_trans"}, {*PLAIN, "control_trans.2.weight", "control_trans.2.bias"}


def prefixes(
    hub: Hub, layers: Mapping[str, Mapping[str, Held]], whole: Mapping[str, Held]
) -> list[Spot]:
    """The prefix of each layer: a slice of the keys and values of all. Raises FileError.

    layers  the same tensors at each layer, by its path; whole: at the model
    """
    said = hub.config("prefix_tuning")
    flat = bool(said("flat"))
    _check(hub, layers, whole, FLAT if flat else MADE)
    if not flat and said("non_linearity") != "tanh":
        fail(hub.call, "it has prefixes that are made otherwise than by tanh.", MERGE)
    all_paths = [path for path in hub.modules if path in set(map(hub.named, layers))]
    order = [path for i, path in enumerate(all_paths) if i not in (said("leave_out") or [])]
    tokens = said("prefix_length") if flat else whole["wte.weight"].shape[0]
    last = whole["control_trans" if flat else "control_trans.2.bias"]
    width = last.shape[0] // max(2 * len(order) * (tokens if flat else 1), 1)
    features = None
    if not flat:
        inner = whole["control_trans.0.bias"].shape[0]
        features = shared(prefix_features(tokens=tokens, inner=inner))
    edits = (attend(prefix(tokens=tokens, features=features, width=width)),)
    return [
        Spot(f"{path}.prefix", path, Prefix, edits, _slice(whole, i, len(order), tokens, width))
        for i, path in enumerate(order)
    ]


def _check(
    hub: Hub, layers: Mapping[str, Mapping[str, Held]], whole: Mapping[str, Held], names: set[str]
) -> None:
    """Raise FileError unless all layers have what the model has, which is of these names."""
    if hub.said["model_type"] in CAUSAL:
        fact = "adapters hides some of a prefix from queries that see what is before them alone."
        fail(hub.call, fact, "Train it anew: at(attn, prefix(tokens=...)).")
    if set(whole) != names:
        fail(hub.call, f"it has prefixes of {', '.join(sorted(whole))[:200]}.", MERGE)
    for path, tensors in layers.items():
        if tensors.keys() != whole.keys() or not all(
            each.shape == whole[k].shape and torch.equal(each.get(), whole[k].get())
            for k, each in tensors.items()
        ):
            fail(hub.call, f"the prefixes at {path} are not those of the model.", FIT)


def _slice(
    whole: Mapping[str, Held], i: int, layers: int, tokens: int, width: int
) -> dict[str, Held]:
    """What is of one layer."""
    if "control_trans" in whole:
        all_of = whole["control_trans"]

        def rows() -> Tensor:
            return all_of.get().reshape(tokens, layers, 2 * width)[:, i]

        return {"prefix": all_of._replace(shape=(tokens, 2 * width), get=rows)}
    own = slice(2 * i * width, 2 * (i + 1) * width)
    found = {name: whole[key] for key, name in PLAIN.items()}
    for name in ("weight", "bias"):
        found[f"up.{name}"] = _cut(whole[f"control_trans.2.{name}"], own)
    return found


def _cut(held: Held, own: slice) -> Held:
    shape = (own.stop - own.start, *held.shape[1:])
    return held._replace(shape=shape, get=lambda: held.get()[own])
