"""What mixes what: samples of a batch, tokens of a sample. S is the operated model, x inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import call, copied, tensors_in
from .._text import first_few
from ..rules.routing import Routed
from .case import SEEDS, Case, actions
from .laws import Broken, Draw, applies, holds
from .snapshot import MODEL, SITE, gap, near, real, rounding, used


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
    for n, told in _mixed(model, x, i, j):
        if n not in excused:
            raise Broken(f"{told}{_suspect(model, x, i, j)}")


def _size(x: Any) -> int:
    """How many samples there are."""
    return next((t.shape[0] for t in tensors_in(x) if t.dim()), 0)


def _batch(case: Case, model: nn.Module) -> Any:
    """Inputs with two samples or more; where there is one, it is doubled."""
    x = case.inputs()
    applies(_size(x), "the inputs hold no tensor")
    if _size(x) < 2:
        x = each(x, lambda t: torch.cat([t, t]))
        try:
            case.outputs(model, x)
        except Exception as error:
            applies(False, f"the inputs hold one sample, and two do not run ({error})")
    return x


def each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with a change of every tensor that holds the samples."""
    size = _size(x)

    def changed(t: Any) -> Any:
        fits = isinstance(t, Tensor) and t.dim() and t.shape[0] == size
        return change(t) if fits else t

    return pytree.tree_map(changed, x)


def another(t: Tensor, j: int) -> Tensor:
    """A tensor in which sample j is another: numbers negated, ids reversed, or else others."""
    t, row = t.clone(), t[j]
    if t.is_floating_point() or t.is_complex():
        t[j] = -1.5 * row
    elif t.dtype != torch.bool:
        ways = [row.flip(-1), row.roll(1, -1)] if row.dim() else []
        ways += [*t.unbind(0), torch.zeros_like(row)]
        t[j] = next((way for way in ways if not torch.equal(way, row)), row)
    return t


def _mixed(model: nn.Module, x: Any, i: int, j: int) -> Iterator[tuple[int, str]]:
    """(number of the output, how its sample i depends on other samples), for each that does."""
    size, whole = _size(x), _run(model, x)
    ways = {f"with sample {j} of the inputs": _run(model, each(x, lambda t: another(t, j)))}
    try:
        ways["where it is alone"] = _run(model, each(x, lambda t: t[i : i + 1]))
    except Exception as error:  # m too may take batches of one size only
        yield -1, f"sample {i} alone raises {type(error).__name__}: {error}"
    for told, other in ways.items():
        for n, (a, b) in enumerate(zip(whole, other, strict=False)):
            if a.dim() and a.shape[0] == size and b.dim():
                far = gap(a[i], b[0] if len(b) == 1 else b[i], size=a)
                if far > MODEL:
                    yield n, f"sample {i} of the output moves by {far:.3g} eps {told}"
    for n, most in _slopes(model, x, i, j):
        if most != 0:
            yield n, f"d S(x)_{i} / d x_{j} reaches {most:.3g}, and not 0"


def _slopes(model: nn.Module, x: Any, i: int, j: int) -> Iterator[tuple[int, float]]:
    """(number of the output, the largest |d S(x)_i / d x_j|), where the inputs are floating."""
    leaves, size = copied(x), _size(x)
    floating = [
        t for t in tensors_in(leaves) if t.is_floating_point() and len(t.shape) and len(t) == size
    ]
    for t in floating:
        t.requires_grad_()
    with torch.enable_grad():
        outputs = list(map(real, tensors_in(call(model, leaves))))
    for n, y in enumerate(outputs):
        if floating and y.requires_grad and y.dim() and len(y) == size:
            row = y[i].nan_to_num(0, 0, 0).square().sum()
            slopes = torch.autograd.grad(row, floating, retain_graph=True, allow_unused=True)
            yield n, max((s[j].abs().max().item() for s in slopes if s is not None), default=0.0)


def _run(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return [real(t) for t in tensors_in(call(model, copied(x)))]


def _suspect(model: nn.Module, x: Any, i: int, j: int) -> str:
    """The first part whose own answer mixes samples, in words."""
    for hooked, action, given_ in parts_given(model, x):
        if given_.dim() < 2 or given_.shape[0] <= max(i, j):
            continue
        ways = [answer_of(action.part, t) for t in (another(given_, j), given_[i : i + 1])]
        whole = answer_of(action.part, given_)[i]
        if any(gap(w[0] if len(w) == 1 else w[i], whole) > SITE for w in ways):
            return f": {type(action.part).__name__} at {hooked.path} does"
    return ""


def parts_given(model: nn.Module, x: Any) -> list[tuple[Any, Any, Tensor]]:
    """(graft, step, what the part is first given) of every part that maps features."""
    seen: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: Any) -> None:
        found = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if found and found[0].is_floating_point():
            seen.setdefault(id(module), found[0].detach().clone())

    handles = [action.part.register_forward_pre_hook(hook) for _, action in actions(model)]
    try:
        _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (g, s, seen[id(s.part)])
        for g, s in actions(model)
        if id(s.part) in seen and s.place not in ("instead", "into", "among")
    ]


def answer_of(part: nn.Module, x: Tensor) -> Tensor:
    out = part(x)
    tensor: Tensor = out.output if isinstance(out, Routed) else out
    return tensor


def tokens_do_not_mix(case: Case, draw: Draw) -> None:
    """d part(x)_i / d x_j = 0 exactly for tokens i != j, for every part at each of its sites.

    But for parts that declare `mixes_tokens = True`.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    share = draw(st.floats(0, 1, exclude_max=True), "which token")
    for place, part, x in _tokens(model, case):
        i = int(share * x.shape[-2])
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            row = answer_of(part, leaf).select(-2, i)
        if not row.requires_grad:
            continue
        (slope,) = torch.autograd.grad(row.square().sum(), leaf, allow_unused=True)
        reads = torch.zeros(0) if slope is None else slope.abs().amax(-1).flatten(0, -2).amax(0)
        others = [j for j in reads.nonzero().flatten().tolist() if j != i]
        holds(not others, f"{place}: token {i} depends on token {first_few(others)}")


def tokens_have_no_order(case: Case, draw: Draw) -> None:
    """part(Px) ~4 P part(x) for permutations P of tokens, for every part at each of its sites.

    But for parts that declare `mixes_tokens = True`.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    generator = torch.Generator().manual_seed(draw(SEEDS, "seed of the order"))
    for place, part, x in _tokens(model, case):
        order = torch.randperm(x.shape[-2], generator=generator)
        with torch.no_grad():
            moved = answer_of(part, x.index_select(-2, order))
            want = answer_of(part, x).index_select(-2, order)
        most = rounding(lambda: [answer_of(part, x)], used(part), SITE)  # noqa: B023
        near([moved], [want], most, f"{place}: tokens in another order give another answer")


def _tokens(model: nn.Module, case: Case) -> list[tuple[str, nn.Module, Tensor]]:
    """(place in words, part, what it is given) of every part that should keep tokens apart."""
    found = [
        (f"{type(action.part).__name__} at {hooked.path}", action.part, x)
        for hooked, action, x in parts_given(model, case.inputs())
        if x.dim() > 2 and x.shape[-2] > 1 and not getattr(action.part, "mixes_tokens", False)
    ]
    applies(found, "no part here is given tokens that it should keep apart")
    return found
