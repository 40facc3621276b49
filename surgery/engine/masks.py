"""Masks that a model is given: where they hide tokens, parts that mix tokens are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraftError
from .maps import PatchMap, Probe
from .switch import Switch

HIDDEN = -100.0  # what an additive mask has at most where it hides (Swin's)


class MaskCheck:
    """Hooks on blocks and attentions around parts that mix tokens: a mask is refused."""

    def __init__(
        self, switch: Switch, patches: PatchMap, names: tuple[str, ...], block: bool
    ) -> None:
        self.switch, self.patches, self.names, self.block = switch, patches, names, block

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook. Raises GraftError where some tokens are hidden from others."""
        given = [*zip(self.names, args, strict=False), *(kwargs or {}).items()]
        x = next((value for _, value in given if isinstance(value, Tensor)), None)
        probe = self.patches.probe if self.block else None
        if probe is not None and x is not None and x.dim() == 3:
            return self._probed(probe, x, args, kwargs)
        if not self.switch.is_on():
            return None
        self._check(x, given)
        return None

    def _check(self, x: Tensor | None, given: list[tuple[str, Any]]) -> None:
        if x is not None and x.is_nested:
            raise GraftError(
                f"the graft at {self.patches.path}",
                "it lets tokens hear others, and was given a nested tensor.",
                "Give padded tensors (nn.TransformerEncoder(..., enable_nested_tensor=False)).",
            )
        for name, value in given:
            hides = _hides(name, value) or _hides_by_value(x, value)
            if value is not x and hides and not self._is_window(x):
                raise GraftError(
                    f"the graft at {self.patches.path}",
                    f"it lets tokens hear others, and {name} hides some from others.",
                    "Use parts that take each token alone (adapter, lora), or give the model "
                    "inputs without padding and without a causal mask.",
                )

    def _probed(self, probe: Probe, x: Tensor, args: Any, kwargs: Any) -> Any:
        """Show what came to a block, and put what comes of that in its place."""
        put = self._rows(x, probe.entered(self._rows(x, x)))
        named = {name: put if value is x else value for name, value in (kwargs or {}).items()}
        return tuple(put if value is x else value for value in args), named

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a block."""
        if (probe := self.patches.probe) is not None:
            y = next((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), None)
            if y is not None and y.dim() == 3:
                probe.left(self._rows(y, y))

    def _rows(self, x: Tensor, turned: Tensor) -> Tensor:
        """Tokens samples first, or back, by how x lies."""
        layout = self.patches.layout(x, self.patches.seen(x))
        return turned if layout.axis else turned.transpose(0, 1)

    def _is_window(self, x: Tensor | None) -> bool:
        """Whether a mask is of windows that were cut from a shifted map (Swin)."""
        seen = None if x is None else self.patches.seen(x)
        return seen is not None and x is not None and seen.samples not in x.shape[:2]


def _hides_by_value(x: Tensor | None, value: Any) -> bool:
    """Whether numbers for each token have the lowest there is among them, whatever their name."""
    if x is None or not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return False
    if not (value.is_floating_point() and value.numel()) or value.is_meta or value.dim() < 2:
        return False
    if value.shape[-1] not in x.shape[:-1]:
        return False
    low, high = value.min().item(), value.max().item()
    return bool(low <= torch.finfo(value.dtype).min < high)


def _hides(name: str, value: Any) -> bool:
    """Whether an argument of a block or an attention hides some tokens from others."""
    if "causal" in name:
        return value is True
    if not isinstance(value, Tensor) or not (value.dtype == torch.bool or "mask" in name):
        return False
    if value.is_meta or not value.numel():
        return False
    if torch.compiler.is_compiling():
        return True  # what it hides cannot be looked at
    low, high = value.min().item(), value.max().item()
    if not value.is_floating_point():
        return bool(low != high)
    return bool(low <= HIDDEN < high or (low, high) == (0, 1))
