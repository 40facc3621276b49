"""torch.compile and torch.export: the answers and gradients of eager mode, or a clear refusal."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import surgery
from surgery import at, norm, parallel, prepend, replace
from tests.engine import balanced
from tests.engine.balanced import (
    BOTH_KINDS,
    BOTH_WAYS,
    WAYS,
    assert_close,
    compiled,
    inputs,
    rules,
)
from tests.laws import checks as laws
from tests.laws.checks import raised
from tests.models import tiny_vit

# two blocks: a compiler takes as long as a model is deep
operated = partial(balanced.operated, depth=2)
reference = partial(balanced.reference, depth=2)


@BOTH_KINDS
@BOTH_WAYS
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_whole_graph(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=top_k)
    want = operated(top_k=top_k)(inputs())
    run_compiled = compiled(model)
    assert_close(run(model, run_compiled), reference(top_k))
    assert_close({"y": run_compiled(inputs())}, {"y": want})


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_before_apply_is_refused() -> None:
    wrapped = compiled(tiny_vit())
    told = str(raised(surgery.OperationError, lambda: surgery.apply(wrapped, rules())))
    assert "_orig_mod" in told


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows_disabled_and_revert() -> None:
    model, x = operated().eval(), inputs()
    run, tuned = compiled(model), operated().eval()(x)
    assert_close({"y": run(x)}, {"y": tuned})
    torch.manual_seed(0)
    untouched = tiny_vit(depth=2).double().eval()(x)
    with surgery.disabled(model):
        assert_close({"y": run(x)}, {"y": untouched})
    assert_close({"y": run(x)}, {"y": tuned})
    surgery.revert(model)
    assert_close({"y": run(x)}, {"y": untouched})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, tracing
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_follows_every_edit() -> None:
    model, x = tiny_vit().double().eval(), inputs()
    more = [
        at("blocks.0.attn", prepend(laws.plain)),
        at("blocks.1.mlp", replace(laws.plain)),
        at(surgery.span(norm, "blocks.2.mlp"), parallel(laws.plain), prepend(laws.plain)),
    ]
    surgery.apply(model, more)
    want = model(x)
    assert_close({"y": compiled(model)(x)}, {"y": want})


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance)
    for block in model.blocks:
        block.attn.fused_attn = False  # of which torch 2.11 has no backward in float64
    assert_close(run(model, torch.compile(model, fullgraph=True)), reference())


@BOTH_KINDS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.usefixtures("fresh_compiler")
def test_export(strict: bool, top_k: int | None) -> None:
    model, x = operated(top_k=top_k).eval(), inputs()
    want = model(x)
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert_close({"y": exported(x)}, {"y": want})
    other = torch.flip(x, (0,))
    assert_close({"y": exported(other)}, {"y": model(other)})
