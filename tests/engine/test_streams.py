"""What lies between blocks is of the model's own tokens, whatever stays in for several of them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, block, until
from surgery.parts import prompt
from tests.engine.test_tokens import HEARING, Checkpointed
from tests.laws import checks as laws
from tests.methods.test_methods import REFUSED, SETS, rules_of
from tests.models import hf_vit, images, tiny_vit

KEPT = {"daptx", "dapt", "idpt"}  # their tokens are meant to stay, for a head that reads them
STAYING = [at(until(block[0], block), prompt(tokens=2)), *HEARING]


def stirred(model: nn.Module, rules: Any) -> Any:
    laws.stir(surgery.apply(model, rules))
    return model


@pytest.mark.parametrize("name", sorted(set(SETS) - KEPT))
def test_every_set_gives_maps_of_the_patches_between_blocks(name: str) -> None:
    model = stirred(tiny_vit().eval(), rules_of(name))
    want = model(images())
    last, maps = model.forward_intermediates(images())
    assert [tuple(m.shape) for m in maps] == [(2, 24, 2, 2)] * 3
    rows = model.get_intermediate_layers(images(), n=2)
    assert [row.shape[1] for row in rows] == [4, 4]
    if name != "meft":  # two streams run instead of the blocks one by one
        torch.testing.assert_close(model.forward_head(last), want)


@pytest.mark.parametrize("name", sorted({*SETS} - KEPT - {n for n, b in REFUSED if b is hf_vit}))
def test_every_set_gives_hidden_states_of_the_patches(name: str) -> None:
    model = stirred(hf_vit().eval(), rules_of(name))
    out = model(images(), output_hidden_states=True)
    assert {tuple(state.shape) for state in out.hidden_states} == {(2, 5, 24)}


def test_a_hook_behind_a_block_sees_the_models_own_tokens() -> None:
    model, seen = stirred(tiny_vit().eval(), STAYING), []
    for one in model.blocks:
        one.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
    model(images())
    assert seen == [(2, 5, 24)] * 3


def test_what_is_changed_between_blocks_is_not_lost() -> None:
    """A model that adds to the features between blocks, in place or not: tokens come along."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.in_place = tiny_vit(), False

        def forward(self, x: Tensor) -> Tensor:
            vit: Any = self.vit
            x = vit._pos_embed(vit.patch_embed(x))
            for one in vit.blocks:
                x = one(x)
                x = x.add_(0.5) if self.in_place else x + 0.5
            out: Tensor = vit.head(x[:, 0])
            return out

    model = stirred(Adds().eval(), STAYING)
    with torch.no_grad():
        want = model(images())
        model.in_place = True
        torch.testing.assert_close(model(images()), want)
        bare = stirred(tiny_vit().eval(), STAYING)
        assert want.shape == bare(images()).shape


@pytest.mark.parametrize("rules", [STAYING[:1], STAYING], ids=["prompts", "prompts that hear too"])
def test_one_stretch_inside_another_and_two_operations_are_right(rules: Any) -> None:
    once, twice = (tiny_vit().eval() for _ in range(2))
    twice.load_state_dict(once.state_dict())
    stirred(
        once,
        [
            *rules,
            at(
                until(block[1], block),
                prompt(
                    tokens=1,
                ),
            ),
        ],
    )
    surgery.apply(twice, rules)
    laws.stir(surgery.apply(twice, at(until(block[1], block), prompt(tokens=1)), name="again"))
    for model in (once, twice):
        maps = model.forward_intermediates(images(), intermediates_only=True)
        assert [tuple(m.shape) for m in maps] == [(2, 24, 2, 2)] * 3
        kept = model(images())
        torch.testing.assert_close(model.forward_head(model.forward_features(images())), kept)
    surgery.revert(surgery.revert(twice, name="again"))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in twice.blocks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_gradient_of_plain_blocks(reentrant: bool) -> None:
    model, plain = Checkpointed(reentrant).train(), Checkpointed(False).train()
    plain.load_state_dict(model.state_dict())
    plain.reentrant = None  # type: ignore[assignment]
    grads = []
    for each in (model, plain):
        stirred(each, STAYING[:1])
        each(images().requires_grad_()).square().sum().backward()
        grads.append([p.grad for p in surgery.parameters(each)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_of_a_forward_is_kept_for_ever(gradients: bool) -> None:
    model = stirred(tiny_vit().eval(), STAYING)
    streams = model.surgery.default.streams
    for _ in range(3):
        with torch.set_grad_enabled(gradients):
            model(images())
        streams.mine().begin()
        model.surgery.default.passes.mine().begin()
        gc.collect()
        assert len(streams.known) == len(streams.aside) == 0


@pytest.mark.filterwarnings("ignore:.*not seen to run")
@pytest.mark.parametrize("which", [[1], [0, 1, 2]])
@pytest.mark.parametrize("name", ["adapterx", "vpt_shallow"])
def test_blocks_compiled_one_by_one_answer_as_plain_ones(name: str, which: list[int]) -> None:
    torch._dynamo.reset()
    model = stirred(tiny_vit(depth=3), name)
    model.eval()
    other, x = copy.deepcopy(model), images()
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn_like(x))  # leaves nothing
    for i in which:
        model.blocks[i].compile(backend="eager")
    for sample in (x, torch.randn_like(x)):
        assert torch.allclose(model(sample), other(sample), atol=1e-5)
    torch._dynamo.reset()
    for each in model.blocks:
        each.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model as a whole"):
        model(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vpt_shallow", "vpt_deep", "adapterx"])
def test_hooks_that_stood_there_before_see_the_models_own_tokens(name: str) -> None:
    model, seen = tiny_vit(depth=3), list[int]()
    for each in model.blocks:
        each.register_forward_hook(lambda _, args, y: seen.append(y.shape[1]))
    model(images())
    want = list(seen)
    seen.clear()
    surgery.apply(model, name)
    model(images())
    assert seen == want
    surgery.revert(model)
    assert [len(each._forward_hooks) for each in model.blocks] == [1, 1, 1]
