"""What a backward gives of one answer: which tensors a gradient comes to, and one that is not zero.

Some backwards write gradients themselves: those of reentrant checkpoints, and of functions that run
blocks again on the way back (reversible layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .._inputs import tensors_in


class Reached(NamedTuple):
    """Ids of the tensors that a gradient of the outputs comes to; whether the graph shows all.

    derived  whether all in it has a derivative: torch's kernels for quantised weights have none
    """

    tensors: set[int]
    whole: bool
    derived: bool


def carrying(answer: Any) -> list[Tensor]:
    """The tensors of an answer that carry a gradient."""
    return [tensor for tensor in tensors_in(answer) if tensor.requires_grad]


def reached(outputs: list[Tensor]) -> Reached:
    """What the graph of the outputs shows; functions written in Python may hide a graph inside."""
    found = {id(tensor) for tensor in outputs if tensor.is_leaf}
    todo = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    seen, whole, derived = set(todo), True, True
    while todo:
        node: Any = todo.pop()
        if type(node).__name__ == "AccumulateGrad":
            found.add(id(node.variable))
        whole = whole and not isinstance(node, BackwardCFunction)
        derived = derived and not node.name().endswith("WarnNotImplemented")
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        todo.extend(new)
    return Reached(found, whole, derived)


def gradients(
    model: nn.Module, outputs: list[Tensor], wanted: list[Tensor], whole: bool
) -> list[Tensor | None]:
    """The gradients of all outputs, weighed at random, with respect to some tensors.

    At random, for a sum may be the same whatever is in it (of probabilities, of what is normed).

    whole  the graph shows all; else a whole backward is run, and what it leaves is taken
    """
    seeds = [torch.randn_like(output) for output in outputs]
    if whole:
        return list(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))
    with _without_gradients(model):
        torch.autograd.backward(outputs, seeds)
        return [tensor.grad for tensor in wanted]


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No tensor has a gradient, nor what is called when one comes; all have them again then."""
    leaves = [t for t in (*model.parameters(), *model.buffers()) if t.requires_grad and t.is_leaf]
    with ExitStack() as stack:  # no fault at any line here leaves one without its own
        for leaf in leaves:
            stack.callback(setattr, leaf, "grad", leaf.grad)
            leaf.grad = None
            if called := _called_after(leaf):
                stack.callback(called.update, dict(called))
                called.clear()
        yield


def _called_after(leaf: Any) -> dict[int, Any] | None:
    """What is called when a gradient has come: optimisers may step there."""
    called: dict[int, Any] | None = leaf._post_accumulate_grad_hooks
    return called


def is_zero(gradient: Tensor | None) -> bool:
    """Whether it moves nothing; what cannot be looked at does."""
    if gradient is None:
        return True
    if gradient.is_meta:
        return False
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return not bool(values.count_nonzero())


@contextmanager
def filled(model: nn.Module) -> Iterator[None]:
    """Numbers in place of tensors that are all zero, through which no gradient comes as yet.

    (Layer scale, the last layer of a branch, adaLN-zero, a head that starts at zero; buffers of
    parts that were to be trained before.)
    """
    zeros = [t for t in (*model.parameters(), *model.buffers()) if _is_filled(t)]
    with ExitStack() as stack:  # no fault at any line here leaves a number in
        for p in zeros:
            stack.callback(setattr, p, "data", p.data)
            p.data = torch.randn_like(p.data).mul_(0.1)
        yield


def _is_filled(p: Tensor) -> bool:
    plain = type(p.data) is Tensor and p.is_floating_point() and p.layout == torch.strided
    return plain and not p.is_meta and p.numel() > 0 and not bool(p.count_nonzero())


def overwritten(wanted: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether no output lets a gradient through, for the model writes over what it needs.

    (Sums written in place, `x += ffn(norm(x))`: norms keep what they were given.)
    """
    for output in outputs:
        try:
            torch.autograd.grad(
                output, wanted, torch.ones_like(output), retain_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                return False
        else:
            return False
    return bool(outputs and wanted)


def moved(
    model: nn.Module, wanted: list[Tensor], run: Callable[[], Any], answer: Any
) -> set[int] | None:
    """Ids of the tensors that move the answer: at the start, or with numbers in place of zeros.

    None where a backward cannot tell (it fails, or there are no values, or no derivative).
    """
    still = list(wanted)
    found = set[int]()
    if not reached(carrying(answer)).derived:
        return None
    with suppress(RuntimeError, NotImplementedError, TypeError):
        found |= _moved(model, still, answer)
        still = [tensor for tensor in still if id(tensor) not in found]
        if still:
            with filled(model):
                found |= _moved(model, still, run())
        return found
    return None


def _moved(model: nn.Module, wanted: list[Tensor], answer: Any) -> set[int]:
    outputs = carrying(answer)
    if not (outputs and wanted):
        return set()
    given = gradients(model, outputs, wanted, reached(outputs).whole)
    return {id(t) for t, gradient in zip(wanted, given, strict=True) if not is_zero(gradient)}
