"""ARC and ARC_att against a ViT and a Swin whose layers are rewritten with the formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import at, attn, ffn, prepend, shared
from surgery.methods.arc_adapters import arc as arc_rules
from surgery.methods.arc_adapters import arc_att
from surgery.parts.arc_adapters import ARC, Projection, arc, projection
from tests.methods.reference import (
    BOTH,
    INPUTS,
    agrees,
    blocks,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    swin,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.models import encoder, hf_vit, images

R = 4
SETS = {"arc": arc_rules(rank=R), "arc_att": arc_att(rank=R)}
EACH = pytest.mark.parametrize("name", SETS)


def before(linear: Any, u: Tensor, c: Tensor, b: Tensor) -> None:
    """y = W (x + x U diag(c) U^T + b) + bias."""
    linear.forward = lambda x: F.linear(x + x @ u @ torch.diag(c) @ u.T + b, *weights(linear))


def weights(linear: Any) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias


def of(parts: dict[str, Any], kind: str, suffix: str) -> list[Any]:
    """The parts of attention or of FFNs, in the order of the blocks."""
    return [p for key, p in parts.items() if "shared/arc/" in key and key.endswith(suffix)]


def rewritten(plain: nn.Module, parts: dict[str, Any]) -> None:
    kinds = [("attn", "attn", lambda b: b.attn.qkv), ("mlp", "mlp", lambda b: b.mlp.fc1)]
    for kind, suffix, layer in kinds:
        found = of(parts, kind, suffix)
        for block, part in zip(blocks(plain), found, strict=bool(found)):
            width = layer(block).in_features
            before(layer(block), parts[f"shared/{kind}/{width}"].weight, part.scale, part.bias)


@BOTH
@EACH
def test_layers_read_a_rescaled_shared_basis(backbone: str, name: str) -> None:
    agrees(backbone, SETS[name], rewritten)


@BOTH
def test_only_attention_starts_as_the_base(backbone: str) -> None:
    assert starts_as_the_base(backbone, SETS["arc_att"])
    assert not starts_as_the_base(backbone, SETS["arc"])


def test_the_start_is_that_of_arc() -> None:
    made = parts(surgery.apply(vit(), arc_rules(rank=100)))
    bound = (6 / (24 + 100)) ** 0.5
    for kind in ("attn", "mlp"):
        assert 0.98 * bound < made[f"shared/{kind}/24"].weight.abs().max() <= bound
    for part in of(made, "attn", "attn"):
        assert not part.scale.any()
        assert not part.bias.any()
        assert part.starts_at_zero
    bound = (6 / 101) ** 0.5
    for part in of(made, "mlp", "mlp"):
        assert 0.95 * bound < part.scale.abs().max() <= bound
        assert not part.bias.any()
        assert part.scale.min() < -0.5 * bound
        assert not part.starts_at_zero
    first, second, _ = of(made, "mlp", "mlp")
    assert not torch.equal(first.scale, second.scale)


@BOTH
@EACH
def test_gradient_comes_to_all_and_all_comes_off(backbone: str, name: str) -> None:
    trains_and_comes_off(backbone, SETS[name])


@BOTH
@EACH
def test_it_merges_into_the_layers(backbone: str, name: str) -> None:
    merges(backbone, SETS[name])


def test_merged_weights_are_those_of_the_formula() -> None:
    model: Any = stirred("vit", SETS["arc"])
    fc1, made = model.blocks[1].mlp.fc1, parts(model)
    u, part = made["shared/mlp/24"].weight, of(made, "mlp", "mlp")[1]
    with torch.no_grad():
        weight = fc1.weight @ (torch.eye(24) + u @ torch.diag(part.scale) @ u.T)
        bias = fc1.bias + fc1.weight @ part.bias
        surgery.merge(model)
        close(fc1.weight, weight)
        close(fc1.bias, bias)


@pytest.mark.parametrize(("rules", "count"), [(arc_rules(), 96_432), (arc_att(), 48_216)])
def test_counts_on_vit_b(rules: Any, count: int) -> None:
    model = vit_b()
    assert surgery.plan(model, rules).trainable == count


def test_counts_without_the_basis() -> None:
    assert sum(p.numel() for p in ARC(Projection(768, 50)).parameters()) == 768 * 50 + 50 + 768


@BOTH
def test_a_basis_is_stored_once_and_used_by_all(backbone: str, tmp_path: Path) -> None:
    model = stirred(backbone, SETS["arc"])
    widths = [24] if backbone == "vit" else [24, 48]
    bases = {f"shared/{kind}/{w}.weight" for kind in ("attn", "mlp") for w in widths}
    surgery.save(model, tmp_path / "arc.safetensors")
    with safe_open(tmp_path / "arc.safetensors", "pt") as file:
        saved = [key.removeprefix("parts.") for key in file.keys()]  # noqa: SIM118
    for keys in (list(vars_of(model)), saved):
        assert {key for key in keys if "/arc/" not in key and not key.startswith("base.")} == bases
        assert not any("basis" in key for key in keys)
    fresh = surgery.apply(swin() if backbone == "swin" else vit(), SETS["arc"], seed=1).eval()
    surgery.load_state_dict(fresh, surgery.state_dict(model))
    for other in (model, copy.deepcopy(model), fresh):
        made = parts(other)
        for key, part in made.items():
            if "/arc/" in key:
                kind = "attn" if key.endswith("attn") else "mlp"
                assert part.basis is made[f"shared/{kind}/{len(part.bias)}"]
    with torch.no_grad():
        assert torch.equal(fresh(INPUTS[backbone]), copy.deepcopy(model)(INPUTS[backbone]))


def vars_of(model: nn.Module) -> dict[str, Tensor]:
    room: Any = model.surgery
    return dict(room.default.state_dict())


def test_separate_projections_share_one_part() -> None:
    model: Any = surgery.apply(hf_vit(), SETS["arc"])
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.normal_(std=0.1)
    made = parts(model)
    assert len(made) == 2 + 3 + 3
    plain: Any = hf_vit()
    base = {k: v for k, v in model.state_dict().items() if "surgery." not in k}
    plain.load_state_dict(base)
    for i, layer in enumerate(plain.vit.layers):
        part, own = of(made, "attn", "attention")[i], layer.attention
        for linear in (own.q_proj, own.k_proj, own.v_proj):
            before(linear, made["shared/attn/24"].weight, part.scale, part.bias)
        part = of(made, "mlp", "mlp")[i]
        before(layer.mlp.fc1, made["shared/mlp/24"].weight, part.scale, part.bias)
    with torch.no_grad():
        want = plain(images()).logits
        assert torch.allclose(model(images()).logits, want, atol=1e-5)
        assert torch.allclose(surgery.merge(model)(images()).logits, want, atol=1e-5)


def test_torch_attention_is_taken_whole_and_does_not_merge() -> None:
    model: Any = surgery.apply(encoder().eval(), SETS["arc"])
    assert [key for key in parts(model) if key.endswith("self_attn")]
    x, part = torch.randn(2, 5, 24), parts(model)["shared/arc/24/by=layers_0_self_attn"]
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.normal_(std=0.1)
        moved = x + part(x)
        want = encoder_attention(model, moved)
        assert torch.allclose(model.layers[0].self_attn(x, x, x)[0], want, atol=1e-6)
    with pytest.raises(surgery.OperationError, match="ARC stands at a MultiheadAttention"):
        surgery.merge(model)


def encoder_attention(model: Any, x: Tensor) -> Tensor:
    """The first attention of an encoder, with no part, on features of one's own."""
    plain = encoder().layers[0].self_attn.eval()
    held = model.layers[0].self_attn
    plain.load_state_dict({k: v for k, v in held.state_dict().items() if "surgery" not in k})
    given: Tensor = plain(x, x, x)[0]
    return given


def test_attention_and_ffns_may_share_one_basis_and_one_may_own_it() -> None:
    basis = shared(projection(rank=R))
    each = at(attn | ffn, prepend(arc(basis), residual=True))
    assert surgery.plan(vit(), each).trainable == 24 * R + 6 * (R + 24)
    own = at(attn | ffn, prepend(arc(projection(rank=R)), residual=True))
    assert surgery.plan(vit(), own).trainable == 6 * (24 * R + R + 24)
    assert starts_as_the_base("vit", each)


def test_dropout_is_on_the_bottleneck() -> None:
    part = ARC(Projection(24, R), zero=False, dropout=0.5)
    torch.manual_seed(0)
    hidden: list[Tensor] = []
    part.drop.register_forward_hook(lambda module, args, out: hidden.append(out))
    part(torch.randn(200, 24))
    (seen,) = hidden
    assert seen.shape == (200, R)
    assert 0.4 < (seen == 0).double().mean() < 0.6
    made = [p for p in parts(surgery.apply(vit(), arc_rules())).values() if isinstance(p, ARC)]
    assert [p.drop.p for p in made] == [0.1] * 6


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_a_rank_that_is_none_is_told(rank: Any) -> None:
    with pytest.raises(surgery.RuleError, match=rf"projection\(rank={rank!r}\)"):
        surgery.plan(vit(), arc_rules(rank=rank)).trainable  # noqa: B018


def test_a_basis_that_is_none_is_told() -> None:
    with pytest.raises(surgery.RuleError, match="makes a Linear, and no basis"):
        surgery.apply(vit(), at(ffn, prepend(arc(lambda site: nn.Linear(24, 24)))))
    with pytest.raises(surgery.RuleError, match="projection is the word, not yet the part"):
        surgery.apply(vit(), at(ffn, prepend(arc(projection))))  # type: ignore[arg-type]
