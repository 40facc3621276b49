"""Methods against plain PyTorch: what a test writes out by hand, in float64; a ViT and a Swin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import surgery
from surgery.rules.rule import Rules
from tests.models import images, tiny_vit

EPS = torch.finfo(torch.float64).eps
Rewrite = Callable[[nn.Module, dict[str, nn.Module]], object]


def vit() -> nn.Module:
    """timm's ViT: width 24, 3 blocks, 3 heads, 4 patches; always the same values, in eval mode."""
    torch.manual_seed(0)
    return _spread(tiny_vit().double().eval())


def swin() -> nn.Module:
    """timm's Swin: two stages of two blocks, widths 24 and 48, windows of 4 x 4."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=4,
        num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip
    return _spread(model.double().eval())


def _spread(model: nn.Module) -> nn.Module:
    """Values that no term of a formula can hide behind: biases and norms away from 0 and 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


BACKBONES: dict[str, Callable[[], nn.Module]] = {"vit": vit, "swin": swin}
INPUTS = {"vit": images(size=16).double(), "swin": images(size=32).double()}
BOTH = pytest.mark.parametrize("backbone", BACKBONES)


@lru_cache
def vit_b() -> nn.Module:
    """timm's ViT-B/16 without a head, on the meta device: one for all, to plan for and count."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return model


def blocks(model: nn.Module) -> list[Any]:
    """The blocks of either, in order."""
    stages: Any = model.blocks if hasattr(model, "blocks") else [*model.layers]
    return [block for stage in stages for block in getattr(stage, "blocks", [stage])]


def parts(model: nn.Module) -> dict[str, Any]:
    """The parts of an operated model, by key: "blocks/0/attn/qkv/parallel", "shared/..."."""
    additions: Any = model.surgery
    return dict(additions.default.named_children())


def beside(parts: dict[str, Any], end: str) -> list[Any]:
    """The parts beside the sites whose path ends so, block by block."""
    return [part for key, part in parts.items() if key.endswith(f"{end}/parallel")]


def wide(rules: Rules) -> dict[str, Any]:
    """Parts at width 192, where enough numbers are drawn to see how."""
    return parts(surgery.apply(tiny_vit(embed_dim=192), rules))


def uniform(tensor: Tensor, bound: float) -> None:
    """It looks drawn uniformly within +-bound."""
    tensor = tensor.detach()
    assert 0.97 * bound < tensor.abs().max() <= bound
    assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def stirred(backbone: str, rules: Rules) -> nn.Module:
    """The backbone, operated and in eval mode, every trained value (and the base's head) moved."""
    model = surgery.apply(BACKBONES[backbone](), rules).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.3)
    return model


def by_hand(backbone: str, model: nn.Module, rewrite: Rewrite) -> nn.Module:
    """A plain backbone with the base values of `model`, rewritten by hand with its parts."""
    plain = BACKBONES[backbone]()
    base = {k: v for k, v in model.state_dict().items() if not k.startswith("surgery.")}
    plain.load_state_dict(base)
    with torch.no_grad():
        rewrite(plain, parts(model))
    return plain


def agrees(backbone: str, rules: Rules, rewrite: Rewrite, eps: float = 16) -> None:
    """The operated model gives what the one rewritten by hand gives, and not what the base does.

    rewrite(plain, parts) may write other values to weights, or set `module.forward` to a function.
    """
    model = stirred(backbone, rules)
    x = INPUTS[backbone]
    with torch.no_grad():
        have, want = model(x), by_hand(backbone, model, rewrite)(x)
        base = by_hand(backbone, model, lambda plain, parts: None)(x)
    close(have, want, eps)
    assert (base - want).abs().max() > 1e-3, "the parts change nothing: the test would see nothing"


def close(have: Tensor, want: Tensor, eps: float = 16) -> None:
    """Equal to within `eps` units of rounding of the largest number."""
    most = eps * EPS * max(1.0, want.abs().max().item())
    assert (have - want).abs().max().item() <= most, (
        (have - want).abs().max() / EPS,
        want.abs().max(),
    )


def starts_as_the_base(backbone: str, rules: Rules) -> bool:
    """Whether the operated model first gives what the base gives, bit for bit."""
    model = BACKBONES[backbone]()
    with torch.no_grad():
        base = model(INPUTS[backbone])
        return torch.equal(surgery.apply(model, rules).eval()(INPUTS[backbone]), base)


def untrained(backbone: str, rules: Rules, steps: int = 2) -> list[str]:
    """What no gradient has reached in some steps of training: it should be nothing."""
    model = surgery.apply(BACKBONES[backbone](), rules).train()
    chosen = surgery.parameters(model)
    reached: set[int] = set()
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(INPUTS[backbone]).square().sum() + 0.01 * surgery.balance_loss(model)
        loss.backward()
        optimizer.step()
        reached |= {id(p) for p in chosen if p.grad is not None and p.grad.any()}
    return [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached
    ]


def trains_and_comes_off(backbone: str, rules: Rules, steps: int = 2) -> None:
    """Gradients reach all that is trained, and after training revert brings every bit back."""
    assert untrained(backbone, rules, steps) == []
    reverts(backbone, rules)


def reverts(backbone: str, rules: Rules) -> None:
    """After training too, revert brings every bit back."""
    model = BACKBONES[backbone]()
    mark = surgery.fingerprint(model)
    surgery.apply(model, rules)
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(1.0)
    now = surgery.fingerprint(surgery.revert(model))
    assert {key for key in mark if not key.startswith("random") and now[key] != mark[key]} == set()


def merges(backbone: str, rules: Rules, eps: float = 16) -> None:
    """Merged, the base answers within `eps`, with its keys alone; unmerged it is what it was."""
    model = stirred(backbone, rules)
    x, keys = INPUTS[backbone], list(BACKBONES[backbone]().state_dict())
    with torch.no_grad():
        want = model(x)
        have = surgery.merge(model)(x)
        assert list(model.state_dict()) == keys
        close(have, want, eps)
        assert torch.equal(surgery.unmerge(model)(x), want)


def is_stored_once(backbone: str, rules: Rules, shared: dict[str, list[str]], path: Path) -> None:
    """A file holds every shared part once, tensor by tensor, and no more than was added.

    shared  the tensors of each shared part, by its key
    """
    model = stirred(backbone, rules)
    with safe_open(surgery.save(model, path), "pt") as file:
        saved = {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    assert list(saved) == sorted(surgery.state_dict(model))
    assert {key for key in saved if key.startswith("parts.shared/")} == {
        f"parts.{key}.{name}" for key, tensors in shared.items() for name in tensors
    }
    added = surgery.plan(BACKBONES[backbone](), rules).added
    assert sum(n for key, n in saved.items() if key.startswith("parts.")) == added


def is_one_object(
    backbone: str, rules: Rules, shared: dict[str, list[str]], path: Path,
    borrowed: Callable[[Any], list[Any]],
) -> None:  # fmt: skip
    """Who borrows a shared part has that object, in a copy and after loading too.

    borrowed  what a part borrows
    """
    model = stirred(backbone, rules)
    loaded = surgery.load(BACKBONES[backbone](), surgery.save(model, path), rules=rules).eval()
    for other in (model, copy.deepcopy(model), loaded):
        new = parts(other)
        owners = {id(new.pop(key)) for key in shared}
        assert {id(core) for part in new.values() for core in borrowed(part)} == owners
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS[backbone]), model(INPUTS[backbone]))
