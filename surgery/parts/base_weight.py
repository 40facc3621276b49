"""The base weight that a part reads: as a matrix (out, in), whoever holds it and however."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..structure.layers import is_turned
from ..structure.memory import own_form
from ..structure.module_tree import Site
from ..structure.weights import BIASES, ParameterSite


@dataclass
class BaseWeight:
    """A weight of the base, read anew at each call: never a copy, and no child of a part.

    rows    those that are meant; None: all
    turned  whether it is kept as (in, out), as GPT-2's Conv1D keeps it

    >>> linear = nn.Linear(3, 2)
    >>> torch.equal(BaseWeight(linear, "weight")(), linear.weight)
    True
    """

    module: nn.Module
    name: str
    rows: slice | None = None
    turned: bool = False

    def __call__(self, beside: Tensor | None = None) -> Tensor:
        """(out, in), or (out,) of a vector; without its gradient.

        beside  a tensor of the part, whose dtype and device it is brought to (a sketch has none)
        """
        weight: Any = self.module._parameters[self.name]
        whole: Tensor = weight.detach()
        whole = whole.t() if self.turned else whole
        whole = whole if self.rows is None else whole[self.rows]
        whole = whole.flatten(1) if whole.dim() > 1 else whole
        return whole if beside is None else whole.to(beside)

    def bias(self, beside: Tensor | None = None) -> Tensor | None:
        """The one that is added to what the weight gives, if there is one; rows and all as it."""
        bias = self.module._parameters.get(BIASES.get(self.name, ""))
        if bias is None:
            return None
        whole = bias.detach() if self.rows is None else bias.detach()[self.rows]
        return whole if beside is None else whole.to(beside)


def base_weight(site: Site, rule: str) -> BaseWeight:
    """The weight at a site: of a linear layer, a convolution, a norm, or a parameter itself.

    Raises RuleError where there is none, or it holds no numbers that could be read (quantised).
    """
    if isinstance(site, ParameterSite):
        return BaseWeight(site.module, site.name, site.rows)
    module = site.module
    weight = None if site.is_span else module._parameters.get("weight")
    if weight is None or own_form(weight) or not weight.is_floating_point():
        kind = type(module).__name__
        form = "" if weight is None else own_form(weight) or str(weight.dtype)
        raise RuleError(
            rule,
            f"it reads the weight of {site.path or 'the model'}, and a {kind} has "
            + (f"one that is a {form}." if form else "none of that name."),
            "Put it on linear layers, qkv | proj | fc1 | fc2, of a base that is not quantised.",
        )
    return BaseWeight(module, "weight", turned=is_turned(module))


def numbers(weight: BaseWeight) -> Tensor:
    """What a part is to start from; without values where it is only sketched."""
    return weight().to("meta") if torch.empty(0).is_meta else weight()


def wide(x: Tensor) -> Tensor:
    """In float32 at least: torch's linear algebra knows no half precision on the CPU."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of a weight, largest first, in its dtype; of no memory, of the same shapes."""
    if weight.is_meta:
        (out, width), k = weight.shape, min(weight.shape)
        return weight.new_empty(out, k), weight.new_empty(k), weight.new_empty(k, width)
    U, S, V = torch.linalg.svd(wide(weight), full_matrices=False)
    return U.to(weight), S.to(weight), V.to(weight)
