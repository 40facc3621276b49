"""The parts of all experts of one tensor in one: their parameters stacked, and their maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..rules.affine import Affine, affine


class Stack(nn.Module):
    """One part for each expert: every parameter has a first axis more, (experts, ...).

    It is the first of the parts that it is made of, with the parameters of all.

    >>> stack = Stack([nn.Linear(3, 2, bias=False) for _ in range(4)])
    >>> stack.affine().weight.shape, stack(torch.ones(4, 5, 3)).shape
    (torch.Size([4, 2, 3]), torch.Size([4, 5, 2]))
    """

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.each = _Each(parts[0])
        self.starts_at_zero = getattr(parts[0], "starts_at_zero", False)
        held = [dict(_Each(part).named_parameters()) for part in parts]
        for name, first in held[0].items():
            path, _, own = name.rpartition(".")
            numbers = torch.stack([each[name].detach() for each in held])
            owner = self.each.get_submodule(path)
            owner._parameters[own] = nn.Parameter(numbers, requires_grad=first.requires_grad)

    def affine(self) -> Affine | None:
        """The map of each, (experts, out, in); None of parts that are not linear."""
        maps: dict[str, Tensor] = self._run()
        return Affine(maps["weight"], maps.get("bias")) if maps else None

    def forward(self, x: Tensor) -> Tensor:
        """(experts, n, width) to (experts, n, out), each expert its own."""
        return self._run(x)  # type: ignore[no-any-return]

    def _run(self, *given: Tensor) -> Any:
        own = dict(self.each.named_parameters())
        return vmap(lambda own, *x: functional_call(self.each, own, x))(own, *given)


class _Each(nn.Module):
    """The part of one expert: what it makes of features, or else its map."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor | None = None) -> Any:
        if x is not None:
            return self.part(x)
        map = affine(self.part)
        named = map._asdict() if map else {}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
