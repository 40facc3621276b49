"""A ViT with one shared mixture, and its gradients with the balance loss, in both ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import at, ffn, head, moa, nearest, norm, parallel, shared, unfreeze
from tests.laws import checks as laws
from tests.models import images, tiny_vit

WEIGHT = 1.0  # of the balance loss; large, so that it is seen
Grads = dict[str, Tensor]


def rules(top_k: int | None = 1) -> list[surgery.Rule]:
    """adapterx_ffn without dropout."""
    mixture = shared(moa(rank=4, heads=3, top_k=top_k))
    return [
        at(ffn, parallel(mixture, scale=0.1)),
        at(nearest(norm, before=ffn), unfreeze),
        at(head, unfreeze),
    ]


def operated(
    *,
    balance: Any = None,
    top_k: int | None = 1,
    dtype: torch.dtype = torch.float64,
    depth: int = 3,
) -> nn.Module:
    """A ViT in training mode whose parts have left the identity; always the same one."""
    torch.manual_seed(0)
    model = tiny_vit(depth=depth).to(dtype).train()
    surgery.apply(model, rules(top_k), balance=balance)
    laws.stir(model)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return images().to(dtype)


def gradients(model: nn.Module) -> Grads:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def explicit(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> Grads:
    """Gradients of task loss + WEIGHT * balance_loss(model)."""
    x = inputs(next(model.parameters()).dtype).requires_grad_()
    y = model(x) if run is None else run(x)
    loss = y.square().sum() + WEIGHT * surgery.balance_loss(model)
    loss.backward()
    return gradients(model)


def implicit(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> Grads:
    """Gradients of the task loss alone, for a model that adds the balance loss by itself."""
    x = inputs(next(model.parameters()).dtype).requires_grad_()
    y = model(x) if run is None else run(x)
    y.square().sum().backward()
    return gradients(model)


def reference(top_k: int | None = 1, depth: int = 3) -> Grads:
    return explicit(operated(top_k=top_k, depth=depth))


def assert_close(got: Grads, want: Grads, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for key, b in want.items():
        off = (got[key] - b).abs().max().item()
        assert off <= tolerance * b.abs().max().item() + 1e-300, f"{key}: {off}"


def router(grads: Grads) -> Tensor:
    return next(g for key, g in grads.items() if key.endswith("reduction"))


WAYS: dict[str, tuple[Any, Callable[..., Grads]]] = {
    "balance_loss": (None, explicit),
    "balance=": (WEIGHT, implicit),
    "balance=function": (lambda: WEIGHT, implicit),
}
BOTH_WAYS = pytest.mark.parametrize("way", WAYS)
BOTH_KINDS = pytest.mark.parametrize("top_k", [1, None], ids=["top-1", "dense"])


class Checkpointed(nn.Module):
    """Runs each block of a timm ViT under torch.utils.checkpoint."""

    def __init__(self, vit: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.vit, self.reentrant = vit, reentrant

    def forward(self, x: Tensor) -> Tensor:
        v = self.vit
        x = v.norm_pre(v.patch_drop(v._pos_embed(v.patch_embed(x))))
        for each in v.blocks:
            x = checkpoint(each, x, use_reentrant=self.reentrant)
        return v.forward_head(v.norm(x))


compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
