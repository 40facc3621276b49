"""Laws of isolation: of samples in a batch, of tokens in a sample. S is the operated model.

x are inputs. Belongs to the laws of the function: what a part of S does to one sample or token
must not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import call, copied, tensors_in
from .._text import first_few
from ..engine.hooks import HookedSite
from ..engine.tokens import WRAPPING, Action
from ..rules.routing import Routed
from .case import SEEDS, Case, actions
from .laws import Broken, Draw, applies, holds
from .snapshot import MODEL, SITE, gap, near, real, rounding, used

Given: TypeAlias = tuple[Any, ...]


def samples_do_not_mix(case: Case, draw: Draw) -> None:
    """d S(x)_i / d x_j = 0 exactly for samples i != j; S(x)_i ~16 itself whatever x_j is, or alone.

    Samples lie on the first axis of the first tensor, and of those as long. In eval mode. Outputs
    of which it is not so for m are left out.
    """
    base = case.model()
    x = _batch(case, base)
    i, j = draw(st.sampled_from([(0, 1), (1, 0)]), "samples (i, j)")
    excused = {n for n, _ in _mixed(base, x, i, j)}
    applies(len(excused - {-1}) < len(_run(base, x)), "the base itself mixes samples")
    model = case.operated(stirred=draw(SEEDS, "seed"))
    for n, how in _mixed(model, x, i, j):
        if n not in excused:
            raise Broken(f"{how}{_suspect(model, x, i, j)}")


def _size(x: Any) -> int:
    """How many samples there are."""
    return next((t.shape[0] for t in tensors_in(x) if t.dim()), 0)


def _holds_samples(t: Any, size: int) -> bool:
    return isinstance(t, Tensor) and t.dim() > 0 and len(t) == size


def _batch(case: Case, model: nn.Module) -> Any:
    """Inputs with two samples or more; where there is one, it is doubled."""
    x = case.inputs()
    applies(_size(x), "the inputs hold no tensor")
    if _size(x) < 2:
        x = map_samples(x, lambda t: torch.cat([t, t]))
        try:
            case.outputs(model, x)
        except Exception as error:
            applies(False, f"the inputs hold one sample, and two do not run ({error})")
    return x


def map_samples(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with a change of every tensor that holds the samples."""
    size = _size(x)
    return pytree.tree_map(lambda t: change(t) if _holds_samples(t, size) else t, x)


def with_another(t: Tensor, j: int) -> Tensor:
    """A tensor in which sample j is another: numbers negated, ids reversed, or else others."""
    t, row = t.clone(), t[j]
    if t.is_floating_point() or t.is_complex():
        t[j] = -1.5 * row
    elif t.dtype != torch.bool:
        others = [row.flip(-1), row.roll(1, -1)] if row.dim() else []
        others += [*t.unbind(0), torch.zeros_like(row)]
        t[j] = next((other for other in others if not torch.equal(other, row)), row)
    return t


def _mixed(model: nn.Module, x: Any, i: int, j: int) -> Iterator[tuple[int, str]]:
    """(number of the output, how its sample i depends on other samples), for each that does."""
    size, whole = _size(x), _run(model, x)
    negated = _run(model, map_samples(x, lambda t: with_another(t, j)))
    answers = {f"with sample {j} of the inputs": negated}
    try:
        answers["where it is alone"] = _run(model, map_samples(x, lambda t: t[i : i + 1]))
    except Exception as error:  # m too may take batches of one size only
        yield -1, f"sample {i} alone raises {type(error).__name__}: {error}"
    for when, answer in answers.items():
        for n, (a, b) in enumerate(zip(whole, answer, strict=False)):
            if _holds_samples(a, size) and b.dim():
                far = gap(a[i], b[0] if len(b) == 1 else b[i], size=a)
                if far > MODEL:
                    yield n, f"sample {i} of the output moves by {far:.3g} eps {when}"
    for n, most in _slopes(model, x, i, j):
        if most != 0:
            yield n, f"d S(x)_{i} / d x_{j} reaches {most:.3g}, and not 0"


def _slopes(model: nn.Module, x: Any, i: int, j: int) -> Iterator[tuple[int, float]]:
    """(number of the output, the largest |d S(x)_i / d x_j|), where the inputs are floating."""
    x, size = copied(x), _size(x)
    floating = [t for t in tensors_in(x) if t.is_floating_point() and _holds_samples(t, size)]
    for t in floating:
        t.requires_grad_()
    with torch.enable_grad():
        outputs = list(map(real, tensors_in(call(model, x))))
    for n, y in enumerate(outputs):
        if floating and y.requires_grad and _holds_samples(y, size):
            row = y[i].nan_to_num(0, 0, 0).square().sum()
            slopes = torch.autograd.grad(row, floating, retain_graph=True, allow_unused=True)
            yield n, max((s[j].abs().max().item() for s in slopes if s is not None), default=0.0)


def _run(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return [real(t) for t in tensors_in(call(model, copied(x)))]


def _suspect(model: nn.Module, x: Any, i: int, j: int) -> str:
    """The first part whose own answer mixes samples, in words."""
    for hooked, action, given in part_inputs(model, x):
        if given[0].dim() < 2 or given[0].shape[0] <= max(i, j):
            continue
        changed = (_each(given, lambda t: with_another(t, j)), _each(given, lambda t: t[i : i + 1]))
        answers = [output_of(action.part, some) for some in changed]
        want = output_of(action.part, given)[i]
        if any(gap(a[0] if len(a) == 1 else a[i], want) > SITE for a in answers):
            return f": {type(action.part).__name__} at {hooked.path} does"
    return ""


def part_inputs(model: nn.Module, x: Any) -> list[tuple[HookedSite, Action, Given]]:
    """(hooked site, action, what its part is first given) of every part that maps features.

    Which are features alone, or, where it hears another part, what that gave too.
    """
    features: dict[int, Given] = {}

    def hook(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            features.setdefault(id(module), _each(args, lambda t: t.detach().clone()))

    handles = [action.part.register_forward_pre_hook(hook) for _, action in actions(model)]
    try:
        _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (hooked, action, features[id(action.part)])
        for hooked, action in actions(model)
        if id(action.part) in features and action.place not in (*WRAPPING, "into", "among")
    ]


def _each(given: Given, change: Callable[[Tensor], Tensor]) -> Given:
    """All tensors of what a part is given, changed alike."""
    return tuple(change(value) if isinstance(value, Tensor) else value for value in given)


def output_of(part: nn.Module, given: Given) -> Tensor:
    """What a part gives, without its gates where it routes."""
    answer = part(*given)
    output: Tensor = answer.output if isinstance(answer, Routed) else answer
    return output


def tokens_do_not_mix(case: Case, draw: Draw) -> None:
    """d part(x)_i / d x_j = 0 exactly for tokens i != j, for every part at each of its sites.

    But for parts that declare `mixes_tokens = True`.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    share = draw(st.floats(0, 1, exclude_max=True), "which token")
    for place, part, given in _tokens(model, case):
        i = int(share * given[0].shape[-2])
        leaves = _each(given, lambda t: t.clone().requires_grad_())
        with torch.enable_grad():
            row = output_of(part, leaves).select(-2, i)
        if not row.requires_grad:
            continue
        tensors = tensors_in(leaves)
        for slope in torch.autograd.grad(row.square().sum(), [*tensors], allow_unused=True):
            reads = torch.zeros(0) if slope is None else slope.abs().amax(-1).flatten(0, -2).amax(0)
            others = [j for j in reads.nonzero().flatten().tolist() if j != i]
            holds(not others, f"{place}: token {i} depends on token {first_few(others)}")


def tokens_have_no_order(case: Case, draw: Draw) -> None:
    """part(Px) ~4 P part(x) for permutations P of tokens, for every part at each of its sites.

    But for parts that declare `mixes_tokens = True`.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    generator = torch.Generator().manual_seed(draw(SEEDS, "seed of the order"))
    for place, part, given in _tokens(model, case):
        order = torch.randperm(given[0].shape[-2], generator=generator)
        with torch.no_grad():
            moved = output_of(part, _each(given, lambda t: t.index_select(-2, order)))  # noqa: B023
            want = output_of(part, given).index_select(-2, order)
        most = rounding(lambda: [output_of(part, given)], used(part), SITE)  # noqa: B023
        near([moved], [want], most, f"{place}: tokens in another order give another answer")


def _tokens(model: nn.Module, case: Case) -> list[tuple[str, nn.Module, Given]]:
    """(place in words, part, what it is given) of every part that should keep tokens apart."""
    parts = [
        (f"{type(action.part).__name__} at {hooked.path}", action.part, given)
        for hooked, action, given in part_inputs(model, case.inputs())
        if given[0].dim() > 2
        and given[0].shape[-2] > 1
        and not getattr(action.part, "mixes_tokens", False)
    ]
    applies(parts, "no part here is given tokens that it should keep apart")
    return parts


def no_other_token_is_heard(case: Case, draw: Draw) -> None:
    """S(x)_i ~16 itself whatever token x_j is, wherever m(x)_i is itself: for any tokens i, j.

    So a causal model stays causal, and what a mask hides stays hidden. For inputs whose first
    tensor holds tokens: ids (b, n), or features (b, n, d); outputs are those (b, n, ...).
    """
    base, x = case.model(), case.inputs()
    tokens = next(iter(tensors_in(x)), torch.zeros(()))
    ids = not tokens.is_floating_point() and tokens.dtype != torch.bool and tokens.dim() == 2
    applies(ids or (tokens.is_floating_point() and tokens.dim() == 3), "the inputs hold no tokens")
    j = int(draw(st.floats(0, 1, exclude_max=True), "which token") * tokens.shape[1])
    other = _with_another_token(x, tokens, j)
    deaf = _unmoved(base, x, other, tokens, 0)
    applies(any(deaf.values()), f"in the base all tokens hear token {j}")
    model = case.operated(stirred=draw(SEEDS, "seed"))
    still = _unmoved(model, x, other, tokens, MODEL)
    for n, want in deaf.items():
        heard = sorted(want - still.get(n, set()))
        holds(not heard, f"token {first_few(heard)} of the output hears token {j}, not so in m")


def _with_another_token(x: Any, tokens: Tensor, j: int) -> Any:
    """Inputs in which token j of all samples is another: the one before it in number, or -1.5 t."""
    changed = tokens.clone()
    row = tokens[:, j]
    changed[:, j] = -1.5 * row + 1 if tokens.is_floating_point() else (row - 1).clamp(min=0)
    if torch.equal(changed, tokens):
        changed[:, j] = row + 1
    return pytree.tree_map(lambda t: changed if t is tokens else t, x)


def _unmoved(
    model: nn.Module, x: Any, other: Any, tokens: Tensor, most: float
) -> dict[int, set[int]]:
    """By the number of each output that holds tokens, those that are as they were."""
    kept: dict[int, set[int]] = {}
    for n, (a, b) in enumerate(zip(_run(model, x), _run(model, other), strict=True)):
        if a.shape[:2] == tokens.shape[:2] and a.dim() > 2:
            kept[n] = {i for i in range(a.shape[1]) if gap(b[:, i], a[:, i], size=a) <= most}
    return kept
