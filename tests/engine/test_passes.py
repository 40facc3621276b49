"""What a forward keeps is that of its thread of execution: of a thread, or of an asyncio task."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, ffn, moa, parallel, shared
from tests.laws import checks as laws
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit

THREADS = 8


def in_threads(calls: list[Callable[[], Any]], meeting: list[nn.Module]) -> list[Any]:
    """What each gives, one thread each; all of them are at each meeting before any goes on."""
    barriers = {id(module): threading.Barrier(len(calls)) for module in meeting}
    met, given = threading.local(), list[Any]([None] * len(calls))

    def meet(module: nn.Module, args: Any) -> None:
        been = met.__dict__.setdefault("been", set())
        if id(module) not in been:
            been.add(id(module))
            barriers[id(module)].wait(timeout=20)

    def run(i: int) -> None:
        try:
            given[i] = calls[i]()
        except Exception as error:
            given[i] = error
            for barrier in barriers.values():
                barrier.abort()

    hooks = [module.register_forward_pre_hook(meet) for module in meeting]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for hook in hooks:
        hook.remove()
    for value in given:
        if isinstance(value, Exception):
            raise value
    return given


def filled(rules: Any, **named: Any) -> nn.Module:
    model = surgery.apply(tiny_vit().eval(), rules, **named)
    laws.stir(model)
    return model


def inputs(count: int) -> list[Tensor]:
    return list(torch.randn(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("seen", [False, True], ids=["first forwards", "later ones"])
@pytest.mark.parametrize("name", SETS)
def test_every_set_serves_from_many_threads(name: str, seen: bool) -> None:
    model: Any = filled(rules_of(name))
    given = inputs(THREADS)
    want = [copy.deepcopy(model)(x).detach() for x in given]
    if seen:
        model(given[0])

    def run(x: Tensor) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with torch.no_grad():
                return [model(x) for _ in range(3)]

        return call

    answers = in_threads([run(x) for x in given], [model.blocks[1].mlp.fc1, model.blocks[2].attn])
    for i in range(THREADS):
        for answer in answers[i]:
            torch.testing.assert_close(answer, want[i], atol=1e-5, rtol=0)
    assert torch.overrides._get_current_function_mode_stack() == []


MIXTURE = at(ffn, parallel(shared(moa(rank=4, heads=3))))


def test_each_thread_has_a_balance_loss_of_its_own() -> None:
    model: Any = filled(MIXTURE)
    given = inputs(THREADS)
    want = [_balanced(model, x) for x in given]
    assert len(set(want)) == THREADS
    calls = [lambda x=x: _balanced(model, x) for x in given]
    assert in_threads(calls, [model.blocks[2].mlp.fc2]) == want


def _balanced(model: nn.Module, x: Tensor) -> float:
    model(x)
    return surgery.balance_loss(model).item()


def test_each_task_has_a_balance_loss_of_its_own() -> None:
    model = filled(MIXTURE)
    given = inputs(4)
    want = [_balanced(model, x) for x in given]

    async def one(x: Tensor) -> float:
        model(x)
        await asyncio.sleep(0.01)
        return surgery.balance_loss(model).item()

    async def all_of_them() -> list[float]:
        return await asyncio.gather(*map(one, given))

    assert asyncio.run(all_of_them()) == want


def test_gates_of_another_thread_are_told_as_such() -> None:
    model = filled(MIXTURE)
    thread = threading.Thread(target=lambda: model(images()))
    thread.start()
    with pytest.raises(surgery.GraftError, match="has not run"):
        surgery.balance_loss(filled(MIXTURE))
    kept = threading.Event(), threading.Event()

    def run() -> None:
        model(images())
        kept[0].set()
        kept[1].wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    kept[0].wait(10)
    with pytest.raises(surgery.GraftError, match="in another"):
        surgery.balance_loss(model)
    kept[1].set()
    thread.join()


def test_a_forward_begins_without_gates_of_an_earlier_one() -> None:
    """A layer that is dropped counts nothing, not what it gave before."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.drop = tiny_vit(), False

        def forward(self, x: Tensor) -> Tensor:
            vit: Any = self.vit
            x = vit._pos_embed(vit.patch_embed(x))
            for i, block in enumerate(vit.blocks):
                if not (self.drop and i == 1):
                    x = block(x)
            out: Tensor = vit.head(x[:, 0])
            return out

    model = surgery.apply(Drops(), MIXTURE)
    model(images())
    assert len(surgery.routing(model)) == 3
    model.drop = True
    model(images())
    assert list(surgery.routing(model)) == ["vit.blocks.0.mlp", "vit.blocks.2.mlp"]
    surgery.balance_loss(model).backward()


@pytest.mark.usefixtures("fresh_compiler")
def test_the_later_gates_count_compiled_or_not() -> None:
    model = filled(MIXTURE)
    run = torch.compile(model, backend="eager")
    first, second = inputs(2)
    want = [_balanced(model, x) for x in (first, second)]
    for call, x in ((model, first), (run, second), (model, first), (run, second), (run, first)):
        call(x)
        assert surgery.balance_loss(model).item() == pytest.approx(want[x is second], abs=1e-6)
