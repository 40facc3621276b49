"""torch.compile and torch.export: the answers and gradients of eager mode, or a clear refusal."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

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
from tests.models import images, tiny_vit

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


def forwards(model: torch.nn.Module, times: int = 3) -> int:
    """How often it is compiled for so many forwards, of one kind."""
    counter = CompileCounter()
    run = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(times):
        run(images()).sum().backward()
    return counter.frame_count


# what leaves something behind in each forward: gates, a map of patches, tokens, what is heard
LEAVING = ["adapterx_ffn", "molora", "adapterx", "convpass", "scalearn", "meft"]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_second_forward_compiles_nothing(name: str, train: bool) -> None:
    model = surgery.apply(tiny_vit(depth=2), name)
    assert forwards(model.train(train)) == 1
    model(images())  # what an eager forward leaves is another matter
    torch.compiler.reset()
    assert forwards(model) == 1


@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_batch_of_another_size_compiles_nothing(name: str) -> None:
    model = surgery.apply(tiny_vit(depth=2), name).eval()
    laws.stir(model)
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    run(images(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in (images(3), images(8)):
            assert_close({"y": run(x)}, {"y": model(x)}, 1e-5)


def test_the_first_program_that_compiles_compiles_once() -> None:
    program = """
        import torch, surgery
        from surgery import at, moa, parallel
        from torch import nn
        from torch._dynamo.testing import CompileCounter
        rule = at("0", parallel(moa(heads=2, rank=2)))
        model = surgery.apply(nn.Sequential(nn.Linear(4, 4)), rule)
        counter = CompileCounter()
        run = torch.compile(model, backend=counter)
        for _ in range(2):
            run(torch.ones(2, 4))
        print(counter.frame_count)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


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


@pytest.mark.slow
@BOTH_KINDS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_once(train: bool, top_k: int | None) -> None:
    model, x = operated(top_k=top_k, dtype=torch.float32).train(train), images()
    run = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            y = run(x)
            (y.square().sum() + surgery.balance_loss(model)).backward()
    assert_close({"y": y}, {"y": model(x)}, 1e-5)


@pytest.mark.slow
@BOTH_KINDS
@pytest.mark.usefixtures("fresh_compiler")
def test_aot_inductor(top_k: int | None, tmp_path: Path) -> None:
    model = operated(top_k=top_k, dtype=torch.float32).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "x.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for x in (images(1), images(5)):
            assert_close({"y": run(x)}, {"y": model(x)}, 1e-5)


@BOTH_KINDS
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_jit_trace(top_k: int | None) -> None:
    model = operated(top_k=top_k).eval()
    traced = torch.jit.trace(model, (inputs(),))
    for x in (inputs(), inputs().flip(0)[:1]):
        assert_close({"y": traced(x)}, {"y": model(x)})


@BOTH_KINDS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_export(strict: bool, top_k: int | None) -> None:
    model, x = operated(top_k=top_k).eval(), inputs()
    want = model(x)
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert_close({"y": exported(x)}, {"y": want})
    other = torch.flip(x, (0,))
    assert_close({"y": exported(other)}, {"y": model(other)})


@pytest.mark.parametrize("name", LEAVING)
def test_export_for_batches_of_any_size(name: str) -> None:
    model = surgery.apply(tiny_vit(depth=2), name).eval()
    laws.stir(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    for x in (images(1), images(5), images(7)):  # as many as the tokens, too
        assert_close({"y": exported(x)}, {"y": model(x)}, 1e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_export_leaves_nothing_in_the_model(strict: bool) -> None:
    model = operated().eval()
    torch.export.export(model, (inputs(),), strict=strict)
    raised(surgery.GraftError, lambda: surgery.balance_loss(model))
    model(inputs())
    assert type(surgery.balance_loss(model)) is torch.Tensor
