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
        self.one = parts[0]
        self.starts_at_zero = getattr(self.one, "starts_at_zero", False)
        held = [dict(part.named_parameters()) for part in parts]
        for name, first in held[0].items():
            path, _, own = name.rpartition(".")
            numbers = torch.stack([each[name].detach() for each in held])
            owner = self.one.get_submodule(path)
            owner._parameters[own] = nn.Parameter(numbers, requires_grad=first.requires_grad)

    def affine(self) -> Affine:
        """The map of each, (experts, out, in); of parts that are linear."""
        map: Affine = self._each(_Map(self.one), "part.")
        return map

    def forward(self, x: Tensor) -> Tensor:
        """(experts, n, width) to (experts, n, out), each expert its own."""
        return self._each(self.one, "", (x,))  # type: ignore[no-any-return]

    def _each(self, module: nn.Module, prefix: str, given: tuple[Tensor, ...] = ()) -> Any:
        own = {prefix + name: p for name, p in self.one.named_parameters()}
        return vmap(lambda own, *x: functional_call(module, own, x))(own, *given)


class _Map(nn.Module):
    """Gives the map of a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self) -> Any:
        return affine(self.part)
