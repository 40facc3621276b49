"""States of one operated model, as `surgery.state_dict` gives them, put together.

A state is a plain dict of tensors; these are plain functions on them, and on a model that runs with
one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .._inputs import call, copied
from ..engine.apply import operated
from ..engine.conditions import UNCUT, check_state
from ..engine.journal import Journal
from ..errors import FileError, OperationError, RuleError, is_number
from ..parts.adapter_sum import Copies
from .checkpoint import load_state_dict, state_dict
from .reading import BASE, PARTS

State = Mapping[str, Tensor]


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of states: sum_i w_i s_i / sum_i w_i; new tensors.

    weights  one number for each state; None: all alike

    Raises FileError where the states do not have the same keys, shapes and dtypes, or differ in
    what has no mean (integers); RuleError where the weights do not fit.
    Sources: Wortsman et al. 2022 (model soups); Gao et al. 2023 (LAE) is a mean of two.

    >>> average([{"parts.a": torch.ones(2)}, {"parts.a": torch.zeros(2)}], [3, 1])
    {'parts.a': tensor([0.7500, 0.7500])}
    """
    shares = _shares(len(states), weights)
    _check_alike(states, "average")
    return {key: _mean(key, [state[key] for state in states], shares) for key in states[0]}


def accumulate(offline: State, online: State, decay: float = 0.9999) -> dict[str, Tensor]:
    """LAE's accumulation: offline <- decay * offline + (1 - decay) * online; a new state.

    What was unfrozen in the base (`base.` keys: the head) is the online's: both share it.

    The training loop calls it after each step, from the second task on; the offline state of the
    first task is a copy of what was trained, `average([state_dict(model)])`. It is also the loop
    that keeps the online parts still in the first epochs of a task (3 of 5 in the released
    configuration), while the head learns: leave them out of the optimiser.

    Raises RuleError where decay is not in [0, 1], FileError where the states are not alike.
    Source: Gao et al. 2023 (LAE).

    >>> accumulate({"parts.a": torch.ones(2)}, {"parts.a": torch.zeros(2)}, decay=0.75)
    {'parts.a': tensor([0.7500, 0.7500])}
    """
    if not (is_number(decay) and 0 <= decay <= 1):
        raise RuleError(
            f"accumulate(decay={decay!r})", "it is no share.", "Give a number from 0 to 1: 0.9999."
        )
    _check_alike([offline, online], "accumulate")
    shares = [decay, 1 - decay]
    return {
        key: tensor.detach().clone()
        if key.startswith(BASE)
        else _mean(key, [offline[key], tensor], shares)
        for key, tensor in online.items()
    }


@contextmanager
def swapped(model: nn.Module, state: State, *, name: str = "default") -> Iterator[nn.Module]:
    """While it lasts, the model runs with another state; after it, or an error, with its own.

    Buffers that a forward changes (running statistics) come back too. Raises what
    `load_state_dict` raises, the model untouched.

    >>> from surgery import apply, at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(2, 1)), at("0", unfreeze))
    >>> zeros = {key: torch.zeros_like(tensor) for key, tensor in state_dict(model).items()}
    >>> with swapped(model, zeros):
    ...     model(torch.ones(1, 2)).item()
    0.0
    >>> model(torch.ones(1, 2)).item() == 0
    False
    """
    check_state(model, "swapped(model, ...)", UNCUT)
    journal = Journal()
    for tensor in state_dict(model, name=name).values():
        journal.keep_numbers(tensor, lent=True)
    for module in model.modules():
        for key in module._buffers:  # a forward may put another there
            journal.keep_value(module, key, lent=True)
    try:
        load_state_dict(model, state, name=name)
        yield model
        journal.undo()
    except BaseException:  # one that came while undoing, too
        journal.undo()
        raise


@torch.no_grad()
def ensemble(
    model: nn.Module, states: Sequence[State], inputs: Any, *, name: str = "default"
) -> Tensor:
    """LAE's ensemble: for each class the largest of the probabilities under each state.

    inputs  of the model, as `apply(example=)` takes them; it answers logits (..., classes), or an
            object that has them as `.logits`. Its mode is left as it is: call model.eval() first

    Returns (..., classes), which need not sum to 1; no gradients. Raises RuleError without states,
    OperationError where the answer is no tensor, and what `load_state_dict` raises; the model
    keeps its own state. Source: Gao et al. 2023 (LAE).

    >>> from surgery import apply, at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(2, 2)), at("0", unfreeze))
    >>> probability = ensemble(model, [state_dict(model)], torch.ones(1, 2))
    >>> round(probability.sum().item(), 5)
    1.0
    """
    _shares(len(states), None)
    answers = [_probabilities(model, state, inputs, name) for state in states]
    return reduce(torch.maximum, answers)


def fill(model: nn.Module, states: Sequence[State], *, name: str = "default") -> None:
    """Bring the tensors of parts that were trained before into copies of `combined`, `fusion`.

    states  one for each copy, in order: `state_dict` of a model that was operated by the same
            edits at the same sites with the plain part; what they unfroze in the base is not taken

    All or nothing. Raises OperationError where the model has no combined part, FileError where
    the states are not as many, or their keys, shapes or dtypes are others.

    >>> from surgery import adapter, append, apply, at
    >>> from surgery.parts.adapter_sum import coefficients, combined
    >>> def model():
    ...     return nn.Sequential(nn.Linear(8, 8))
    >>> source = apply(model(), at("0", append(adapter(rank=2), residual=True)))
    >>> both = combined(adapter(rank=2), coefficients(count=2))
    >>> target = apply(model(), at("0", append(both, residual=True)))
    >>> fill(target, [state_dict(source), state_dict(source)])
    """
    places = _copies(model, name)
    if len(places) != len(states):
        raise FileError(
            "fill",
            f"{len(states)} states were given, and the parts combine {len(places)}.",
            f"Give one state for each of the {len(places)} copies.",
        )
    for i, (place, state) in enumerate(zip(places, states, strict=True)):
        parts = {key: tensor for key, tensor in state.items() if key.startswith(PARTS)}
        _check_alike([place, parts], f"fill: state {i}")
    with torch.no_grad():
        for place, state in zip(places, states, strict=True):
            for key, tensor in place.items():
                tensor.copy_(state[key])


def one_domain(state: State, domain: int) -> dict[str, Tensor]:
    """The state of a model with `domains(part)` as that of one with the plain part: one domain's.

    average([one_domain(state, i) for i in range(2)]) merges the domains into one plain part.
    Raises FileError where the state has no such domain.

    >>> one_domain({"parts.a.by_domain.1.weight": torch.ones(1)}, 1)
    {'parts.a.weight': tensor([1.])}
    """
    mark, chosen = ".by_domain.", f".by_domain.{domain}."
    kept = {k: t for k, t in state.items() if mark not in k or chosen in k}
    if not any(chosen in key for key in kept):
        raise FileError(
            f"one_domain(state, {domain!r})",
            "the state has no part of that domain.",
            "Give a state of a model with domains(part), and a number from 0 up.",
        )
    return {key.replace(chosen, ".", 1): tensor for key, tensor in kept.items()}


def _probabilities(model: nn.Module, state: State, inputs: Any, name: str) -> Tensor:
    with swapped(model, state, name=name):
        answer = call(model, copied(inputs))
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, Tensor):
        raise OperationError(
            "ensemble(model, ...)",
            f"the model answers a {type(answer).__name__}, and no logits.",
            "Give a model that answers a tensor (..., classes).",
        )
    return logits.softmax(-1)


def _copies(model: nn.Module, name: str) -> list[dict[str, Tensor]]:
    """For each copy, its tensors by the keys that they have in a state of the plain part."""
    state_dict(model, name=name)  # raises where nothing was done under that name
    done = {operation.name: operation for operation in operated(model, "fill(model)")}
    sums = {k: p for k, p in done[name].named_children() if isinstance(p, Copies)}
    counts = {len(part.copies) for part in sums.values()}
    if len(counts) != 1:
        raise OperationError(
            "fill(model, ...)",
            f"this {type(model).__name__} has "
            + ("combined parts of several counts." if counts else "no combined part."),
            "Operate on it first, with combined(part) or fusion(part) at every site, as scalearn() "
            "and adapter_fusion() do.",
        )
    return [
        {
            f"{PARTS}{key}.{tensor}": value
            for key, part in sums.items()
            for tensor, value in part.copies[i].state_dict().items()
        }
        for i in range(counts.pop())
    ]


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights, of sum 1. Raises RuleError where they do not fit."""
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if not count or len(given) != count or not sum(given) > 0:
        raise RuleError(
            f"{count} states, weights={weights!r}",
            "they have no weighted mean.",
            "Give one state at least, and for each a weight, of sum above 0.",
        )
    return [weight / sum(given) for weight in given]


def _mean(key: str, tensors: list[Tensor], shares: list[float]) -> Tensor:
    first = tensors[0].detach()
    if not (first.is_floating_point() or first.is_complex()):
        if any(not torch.equal(first, other) for other in tensors[1:]):
            raise FileError(
                key, f"the states differ in it, and {first.dtype} has no mean.", "Leave it out."
            )
        return first.clone()
    fine = torch.promote_types(first.dtype, torch.float32)
    terms = (
        share * tensor.detach().to(fine) for share, tensor in zip(shares, tensors, strict=True)
    )
    return reduce(torch.add, terms).to(first.dtype)


def _check_alike(states: Sequence[State], call: str) -> None:
    """Raise FileError unless all states have the keys, shapes and dtypes of the first."""
    first = states[0]
    for i, state in enumerate(states[1:], 1):
        if odd := sorted(set(first) ^ set(state)):
            has = "has no" if odd[0] in first else "has"
            raise FileError(
                call,
                f"the states differ in {len(odd)} keys: number {i} {has} {odd[0]}.",
                "Give states of one rule set on one architecture.",
            )
        for key, tensor in first.items():
            other = state[key]
            if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
                raise FileError(
                    call,
                    f"{key} is {tuple(other.shape)} {other.dtype} in number {i}, and "
                    f"{tuple(tensor.shape)} {tensor.dtype} in the first.",
                    "Give states of one rule set on one architecture, in one dtype.",
                )
