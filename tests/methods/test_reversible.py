"""MEFT: the two streams, their inverse, their gradients, and what is kept of a forward."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery import GraftError, OperationError, RuleError, at, ffn, replace
from surgery.methods.reversible import meft
from surgery.parts import reversible_streams as file
from surgery.parts.reversible_streams import Reversible, SmallAdapter, reversible
from tests.methods.reference import (
    INPUTS,
    agrees,
    close,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.models import hf_vit, images, tiny_vit, torchvision_vit

VARIANTS = pytest.mark.parametrize("variant", [1, 2, 3])
LAM = {1: 0.1, 2: 1.0, 3: 0.1}
BETA = {1: 1.0, 2: 0.1, 3: 0.1}
X = INPUTS["vit"]


def small(part: Any, x: Tensor) -> Tensor:
    hidden = nn.functional.gelu(x @ part.down.weight.T + part.down.bias)
    return hidden @ part.up.weight.T + part.up.bias


def halves(block: Any, beside: dict[str, Any], own: Any, variant: int) -> tuple[Any, Any]:
    def attention(x: Tensor) -> Tensor:
        z = block.norm1(x)
        return x + block.attn(z) + (small(beside["attn"], z) if variant == 3 else 0)

    def network(x: Tensor) -> Tensor:
        z = block.norm2(x)
        return x + block.mlp(z) + small(beside["mlp"], z)

    def layer(x: Tensor) -> Tensor:
        return network(attention(x))

    if variant == 3:
        return attention, network
    return (layer, lambda x: small(own, x)) if variant == 1 else (lambda x: small(own, x), layer)


def rewrite(variant: int) -> Any:
    def write(plain: Any, held: dict[str, Any]) -> None:
        streams = held["blocks/replace"]

        def forward(x: Tensor) -> Tensor:
            x1 = x2 = x
            for k, block in enumerate(plain.blocks):
                beside = {name: held.get(f"blocks/{k}/{name}/parallel") for name in ("attn", "mlp")}
                own = streams.adapters[k] if variant != 3 else None
                f, g = halves(block, beside, own, variant)
                y1 = LAM[variant] * x1 + f(x2)
                y2 = BETA[variant] * x2 + g(y1)
                x1, x2 = (y1, y2) if variant == 3 else (y2, y1)
            return (x1 + x2) / 2

        plain.blocks.forward = forward

    return write


@VARIANTS
def test_meft_is_two_streams(variant: int) -> None:
    agrees("vit", meft(variant), rewrite(variant))


@pytest.mark.parametrize("variant", [1, 2])
def test_each_stage_of_a_swin_has_streams_of_its_own(variant: int) -> None:
    def write(plain: Any, held: dict[str, Any]) -> None:
        for i, stage in enumerate(plain.layers):
            for j, block in enumerate(stage.blocks):

                def mlp(x: Tensor, m: Any = block.mlp, key: str = f"layers/{i}/blocks/{j}") -> Any:
                    return type(m).forward(m, x) + small(held[f"{key}/mlp/parallel"], x)

                block.mlp.forward = mlp

            def forward(x: Tensor, blocks: Any = stage.blocks, i: int = i) -> Tensor:
                x1 = x2 = x
                for k, block in enumerate(blocks):
                    own = held[f"layers/{i}/blocks/replace"].adapters[k]
                    two = [block, lambda y, own=own: small(own, y)]
                    f, g = two if variant == 1 else two[::-1]
                    y1 = LAM[variant] * x1 + f(x2)
                    x1, x2 = BETA[variant] * x2 + g(y1), y1
                return (x1 + x2) / 2

            stage.blocks.forward = forward

    agrees("swin", meft(variant), write)
    trains_and_comes_off("swin", meft(variant))


@VARIANTS
def test_every_part_is_trained_and_comes_off(variant: int) -> None:
    trains_and_comes_off("vit", meft(variant))


@VARIANTS
def test_the_start_is_near_the_base_and_not_the_base(variant: int) -> None:
    assert not starts_as_the_base("vit", meft(variant))
    model = surgery.apply(tiny_vit(), meft(variant, rank=64))
    own = [m for m in model.modules() if isinstance(m, SmallAdapter)]
    assert len(own) == 6
    for each in own:
        for linear in (each.down, each.up):
            assert 0.018 < linear.weight.std() < 0.022
            assert not linear.bias.any()


@VARIANTS
def test_two_adapters_a_block_are_counted_and_do_not_merge(variant: int) -> None:
    model = vit_b()
    assert surgery.plan(model, meft(variant)).trainable == 313_536
    with pytest.raises(OperationError, match=r"can be folded|not linear"):
        surgery.merge(stirred("vit", meft(variant)))


# the way back ----------------------------------------------------------------------------------


def gradients(model: Any, x: Tensor, monkeypatch: Any, plain: bool) -> list[Tensor]:
    """Of the input and of all that is trained; `plain`: as autograd keeps every activation."""
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(file, "_is_traced", lambda: True)
        torch.manual_seed(0)
        x = x.detach().requires_grad_(x.requires_grad)
        loss = model(x).square().sum()
    wanted = [*surgery.parameters(model), *([x] if x.requires_grad else [])]
    return list(torch.autograd.grad(loss, wanted))


def error(have: list[Tensor], want: list[Tensor]) -> float:
    pairs = zip(have, want, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@VARIANTS
@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("asked", [True, False])
def test_gradients_are_those_of_the_plain_forward(
    variant: int, keep: int, asked: bool, monkeypatch: Any
) -> None:
    model = stirred("vit", meft(variant, keep=keep))
    x = X.clone().requires_grad_(asked)
    have, want = (gradients(model, x, monkeypatch, plain) for plain in (False, True))
    assert error(have, want) < (1e-13 if keep == 1 else 1e-10)


@VARIANTS
def test_dropout_and_drop_path_fall_alike_on_the_way_back(variant: int, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = tiny_vit(proj_drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.5, init_values=0.5)
    surgery.apply(model.double(), meft(variant)).train()
    have, want = (gradients(model, X, monkeypatch, plain) for plain in (False, True))
    assert error(have, want) < 1e-10
    model(X).sum().backward()
    torch.manual_seed(1)
    loss = model(X).sum()
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_other_parts_and_unfrozen_weights_inside_blocks_get_their_gradient(
    monkeypatch: Any,
) -> None:
    rules = [
        *meft(),
        at(surgery.qkv, surgery.parallel(surgery.adapter(rank=2))),
        at(ffn, surgery.parallel(surgery.shared(surgery.moa(rank=4, heads=3)))),
        at(surgery.norm, surgery.unfreeze),
    ]
    model = stirred("vit", rules)
    have, want = (gradients(model, X, monkeypatch, plain) for plain in (False, True))
    assert error(have, want) < 1e-10

    def with_balance() -> list[Tensor]:
        loss = model(X).square().sum() + surgery.balance_loss(model)
        return list(torch.autograd.grad(loss, surgery.parameters(model)))

    have = with_balance()
    monkeypatch.setattr(file, "_is_traced", lambda: True)
    assert error(have, with_balance()) < 1e-10


def test_a_graph_may_be_gone_through_twice() -> None:
    model = stirred("vit", meft())
    loss = model(X).square().sum()
    wanted = surgery.parameters(model)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert error(list(torch.autograd.grad(loss, wanted)), list(first)) < 1e-12


def test_autocast_is_the_same_on_the_way_back(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = surgery.apply(tiny_vit(), meft(keep=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images()).float().square().sum()
    have = list(torch.autograd.grad(loss, surgery.parameters(model)))
    monkeypatch.setattr(file, "_is_traced", lambda: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images()).float().square().sum()
    assert error(have, list(torch.autograd.grad(loss, surgery.parameters(model)))) < 0.05


class Living(TorchDispatchMode):
    """Bytes of all the memory that was taken since and is still held, by autograd too."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.weights = weights  # where they lie: views of them take none

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self.weights:
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self.made.setdefault(ref.cdata, (ref, storage.nbytes()))
        return out

    @property
    def held(self) -> int:
        gc.collect()
        return sum(size for ref, size in self.made.values() if not ref.expired())


def kept(depth: int, keep: int, monkeypatch: Any, plain: bool = False) -> int:
    """Bytes that are held between forward and backward."""
    torch.manual_seed(0)
    model = surgery.apply(tiny_vit(depth=depth).double(), meft(keep=keep))
    model(X)  # the first forward is watched
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(file, "_is_traced", lambda: True)
        with Living({p.data_ptr() for p in model.parameters()}) as living:
            out = model(X.repeat(8, 1, 1, 1))
    found = living.held
    assert out.grad_fn is not None
    return found


def test_what_a_forward_keeps_does_not_grow_with_depth(monkeypatch: Any) -> None:
    pair = 16 * 5 * 24 * 8  # one stream in bytes; random states are 5056 bytes for each half
    chance = 2 * 5056
    assert kept(12, 0, monkeypatch) - kept(3, 0, monkeypatch) <= 9 * chance
    assert kept(12, 4, monkeypatch) - kept(3, 4, monkeypatch) <= 2 * 2 * pair + 9 * chance
    plain = kept(12, 0, monkeypatch, True) - kept(3, 0, monkeypatch, True)
    assert plain > 9 * 12 * pair


def test_the_rounding_of_a_deep_inverse_is_told_not_trained_on(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = surgery.apply(tiny_vit(depth=12), meft(3, keep=0)).eval()
    with pytest.raises(GraftError, match=r"(?s)rounding errors grew to .*smaller keep"):
        model(images()).square().sum().backward()
    for variant in (1, 2, 3):  # the default holds in float32
        torch.manual_seed(0)
        model = surgery.apply(tiny_vit(depth=12), meft(variant)).eval()
        have, want = (gradients(model, images(), monkeypatch, plain) for plain in (False, True))
        assert error(have, want) < 2e-3


def test_a_mode_that_changes_on_the_way_back_is_told() -> None:
    model = surgery.apply(tiny_vit(proj_drop_rate=0.3), meft()).train()
    loss = model(images()).sum()
    model.eval()
    with pytest.raises(GraftError, match="kept other tensors"):
        loss.backward()
    model(images()).sum().backward()


def test_without_gradients_nothing_is_taped() -> None:
    model = stirred("vit", meft())
    with torch.no_grad():
        close(model(X), model(X))
    assert torch.equal(model(X).detach(), torch.func.functional_call(model, {}, (X,)).detach())


# structure -------------------------------------------------------------------------------------


def test_the_blocks_are_borrowed_not_owned() -> None:
    model = stirred("vit", meft(variant=2))
    names = [name for name, _ in parts(model)["blocks/replace"].named_parameters()]
    assert all(name.startswith("adapters.") for name in names)
    assert len(names) == 12
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert parts(again)["blocks/replace"].blocks is again.blocks
        assert torch.equal(again(X), model(X))
        again(X).sum().backward()


def test_it_goes_to_file_and_back(tmp_path: Any) -> None:
    model = stirred("vit", meft())
    file = surgery.save(model, tmp_path / "x.safetensors")
    again = surgery.load(vit(), file, rules=meft())
    with torch.no_grad():
        assert torch.equal(again.eval()(X), model(X))


def test_other_blocks_in_a_sequential_do_for_whole_block_variants() -> None:
    model = surgery.apply(torchvision_vit(), meft(), example=images())
    model(images()).sum().backward()
    with pytest.raises(RuleError, match="EncoderBlock, whose attention and FFN"):
        surgery.plan(torchvision_vit(), meft(variant=3))


def test_blocks_that_are_called_one_by_one_are_refused() -> None:
    with pytest.raises(RuleError, match=r"layers? is a ModuleList"):
        surgery.plan(hf_vit(), meft())


def test_a_model_that_goes_round_its_sequential_is_told() -> None:
    model = tiny_vit()
    model.set_grad_checkpointing()
    surgery.apply(model, meft())
    with pytest.raises(GraftError, match="never ran"):
        model(images())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"variant": 4}, "variants 1, 2 and 3"),
        ({"lam": 0.0}, "scaled by 0"),
        ({"beta": 0}, "scaled by 0"),
        ({"beta": float("nan")}, "scaled by 0"),
        ({"rank": 0}, "rank=0"),
        ({"keep": -1}, "keep=-1"),
    ],
)
def test_bad_numbers_are_told(given: Any, reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        surgery.plan(vit(), at("blocks", replace(reversible(**given))))


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "Linear, ReLU"),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 9)), "takes 8 features and gives 9"),
        (nn.Sequential(nn.Conv2d(8, 8, 1)), "not on the last axis"),
        (nn.Linear(8, 8), "is a Linear"),
    ],
)
def test_what_is_no_stretch_of_blocks_is_refused(blocks: nn.Module, reason: str) -> None:
    with pytest.raises(RuleError, match=reason):
        surgery.plan(nn.ModuleDict({"a": blocks}), at("a", replace(reversible())))


def test_the_inverse_is_exact_to_rounding() -> None:
    for variant in (1, 2, 3):
        model = stirred("vit", meft(variant, keep=0))
        streams = parts(model)["blocks/replace"]
        assert isinstance(streams, Reversible)
        tape = file.Tape(streams)
        x = model._pos_embed(model.patch_embed(X)).detach().requires_grad_()
        pair, pairs = (x, x), []
        for k in range(3):
            pairs.append(pair)
            y1 = torch.add(tape.run(k, 0, pair[1]), pair[0], alpha=streams.lam)
            y2 = torch.add(tape.run(k, 1, y1), pair[1], alpha=streams.beta)
            pair = streams.unswapped((y1, y2))
        tape.mark(3, pair)
        for k in (2, 1, 0):
            for have, want in zip(tape.before(k), pairs[k], strict=True):
                assert (have - want).abs().max() < 1e-9 * want.abs().max()
