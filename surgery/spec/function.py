"""Laws of the function: what S computes. m is the model, S the operated one, x inputs.

a ~k b: max |a - b| <= k eps(dtype) max |b|. Parts are stirred, so that they do something.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..edit import Parallel
from ..example import call, copied
from ..operate import disabled
from ..ops import Routed
from ..pattern import where
from ..proof import tensors
from ..rule import at
from ..tree import Site
from .case import Case, operation, steps, stir, train
from .law import Broken, Draw, given, holds
from .seen import MODEL, SITE, equal, gap, listed, near, snapshot, unchanged

SEEDS = st.integers(0, 99)
FLAGS = st.lists(st.booleans(), min_size=1, max_size=4)  # dealt out in turn


def outputs_keep_their_form(case: Case, draw: Draw) -> None:
    """The structure of S(x), and shape, dtype, device, strides of its tensors, are m(x)'s."""
    model = case.model()
    before = _form(model, case)
    after = _form(case.operated(model, stirred=draw(SEEDS, "seed")), case)
    holds(before == after, f"the answer has another form: {_other(before, after)}")


def _form(model: nn.Module, case: Case) -> list[object]:
    with torch.no_grad():
        answer = call(model, case.inputs())
    leaves, spec = pytree.tree_flatten(answer)
    kinds = [(t.shape, t.dtype, t.device, t.stride()) for t in tensors(answer)]
    return [type(answer), str(spec), len(leaves), *kinds]


def _other(before: list[object], after: list[object]) -> str:
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    return "; ".join(f"{b} instead of {a}" for a, b in pairs[:2]) or f"{len(after)} parts"


def parts_start_as_the_identity(case: Case, draw: Draw) -> None:
    """S(x) = m(x) to the bit at the start, where all parts declare `starts_at_zero`."""
    model = case.operated(seed=draw(SEEDS, "seed"))
    kinds = {type(s.part).__name__ for _, s in steps(model) if not _starts_at_zero(s)}
    given(not kinds, f"{listed(sorted(kinds))} does not say that it starts at zero")
    equal(case.outputs(model), case.outputs(case.twin(model)), "S(x) at the start is not m(x)")


def _starts_at_zero(step: Any) -> bool:
    return step.scale is not None and getattr(step.part, "starts_at_zero", False)


def scale_is_linear(case: Case, draw: Draw) -> None:
    """At a site, S_2s - m ~4 2 (S_s - m) in units of the site's output, and S_0 = m to the bit."""
    scaled = [(r, e, s) for r, s in case.places for e in r.rest if isinstance(e, Parallel)]
    given(scaled, "no rule puts a part beside a site, parallel(part, scale=...)")
    rule, edit, site = draw(st.sampled_from(scaled), "site", lambda each: each[2].path)
    seed = draw(SEEDS, "seed")

    there = where(rule.where) & where(lambda s: s.path == site.path)
    models = [case.operated(rules=[at(there, replace(edit, weight=w))]) for w in (0.0, 0.5, 1.0)]
    stir(models[0], seed)
    parts = operation(models[0]).state_dict()  # parts are seeded by their edit, scale and all
    for model in models:
        operation(model).load_state_dict(parts)
    base = _output(case, site, case.twin(models[0]))
    zero, one, two = (_output(case, site, model) for model in models)
    holds(torch.equal(zero, base), f"{site.path}: with scale=0 the part changes the output")
    far = gap(two - base, 2 * (one - base), size=two)
    holds(far <= SITE, f"{site.path}: twice the scale is {far:.3g} eps from twice the part")


def _output(case: Case, site: Site, model: nn.Module) -> Tensor:
    """What a site first gives in a forward."""
    seen: list[Tensor] = []
    exit = model.get_submodule(site.exit.path)
    exit.register_forward_hook(lambda m, args, y: seen.append(_first(y)))
    case.outputs(model)
    given(seen, f"{site.path} did not run")
    return seen[0]


def _first(value: object) -> Tensor:
    return next(t.detach().clone() for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def every_part_runs(case: Case, draw: Draw) -> None:
    """In a forward each part runs once for each call of each of its sites, and each is called."""
    model = case.operated(stirred=draw(SEEDS, "seed"))
    given(steps(model), "these rules join no part")
    runs(case, model)


def runs(case: Case, model: nn.Module) -> None:
    """Raise Broken unless every part of S runs in a forward as often as its sites are called."""
    calls: Counter[int] = Counter()
    ends = [graft.entry if s.place == "before" else graft.exit for graft, s in steps(model)]
    watched = {id(m): m for m in [*ends, *(step.part for _, step in steps(model))]}
    hooks = [
        module.register_forward_pre_hook(lambda m, *_: calls.update([id(m)]))
        for module in watched.values()
    ]
    try:
        case.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    want: Counter[int] = Counter()
    for (graft, step), end in zip(steps(model), ends, strict=True):
        holds(calls[id(end)], f"{graft.path} is never called")
        want[id(step.part)] += calls[id(end)]
    for graft, step in steps(model):
        n, times = want[id(step.part)], calls[id(step.part)]
        told = f"{type(step.part).__name__} at {graft.path} runs {times} times, and its sites {n}"
        holds(times == n, told)


def samples_do_not_mix(case: Case, draw: Draw) -> None:
    """d S(x)_i / d x_j = 0 exactly for samples i != j; S(x)_i ~16 itself whatever x_j is."""
    base = case.model()
    x = _batch(case, base)
    i, j = draw(st.sampled_from([(0, 1), (1, 0)]), "samples (i, j)")
    given(not _mixed(base, x, i, j), "the base itself mixes samples")
    model = case.operated(stirred=draw(SEEDS, "seed"))
    told = _mixed(model, x, i, j)
    if told:
        raise Broken(f"{told}{_suspect(case, model, x, i, j)}")


def _batch(case: Case, model: nn.Module) -> Any:
    """Inputs with two samples or more; where there is one, it is doubled."""
    x = case.inputs()
    sizes = {t.shape[0] for t in tensors(x) if t.dim()}
    given(sizes, "the inputs hold no tensor")
    if max(sizes) < 2:
        x = pytree.tree_map(
            lambda t: t.repeat_interleave(2, 0) if isinstance(t, Tensor) and t.dim() else t, x
        )
        try:
            case.outputs(model, x)
        except (RuntimeError, ValueError, IndexError) as error:
            given(False, f"the inputs hold one sample, and two do not run ({error})")
    return x


def _other_sample(x: Any, j: int) -> Any:
    """Inputs in which sample j is another one: its tokens in reverse, its numbers negated."""

    def change(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[0] <= j or t.dtype == torch.bool:
            return t
        t = t.clone()
        t[j] = -1.5 * t[j] if t.is_floating_point() else t[j].flip(-1) if t.dim() > 1 else t[j]
        return t

    return pytree.tree_map(change, x)


def _mixed(model: nn.Module, x: Any, i: int, j: int) -> str:
    """How sample i of the output depends on sample j of the inputs; "" where it does not."""
    ways = [_run(model, x), _run(model, _other_sample(x, j))]
    for a, b in zip(*ways, strict=True):
        if a.dim() and a.shape[0] > max(i, j) and (far := gap(a[i], b[i], size=b)) > MODEL:
            return f"sample {i} of the output moves by {far:.3g} eps with sample {j} of the inputs"
    most = _slope(model, x, i, j)
    return f"d S(x)_{i} / d x_{j} reaches {most:.3g}, and not 0" if most else ""


def _slope(model: nn.Module, x: Any, i: int, j: int) -> float:
    """The largest |d S(x)_i / d x_j|, where the inputs are floating."""
    leaves = copied(x)
    floating = [t for t in tensors(leaves) if t.is_floating_point() and t.dim() and len(t) > j]
    for t in floating:
        t.requires_grad_()
    with torch.enable_grad():
        rows = [t[i] for t in tensors(call(model, leaves)) if t.dim() and t.shape[0] > i]
        total = [row.nan_to_num(0, 0, 0).square().sum() for row in rows if row.requires_grad]
    if not (floating and total):
        return 0.0
    slopes = torch.autograd.grad(total, floating, allow_unused=True)
    return max((s[j].abs().max().item() for s in slopes if s is not None), default=0.0)


def _run(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(call(model, copied(x))))


def _suspect(case: Case, model: nn.Module, x: Any, i: int, j: int) -> str:
    """The first part whose own answer mixes samples, in words."""
    for graft, step, given_ in _parts(model, x):
        other = given_.clone()
        if other.dim() < 2 or other.shape[0] <= max(i, j):
            continue
        other[j] *= -1.5
        a, b = _answer(step.part, given_), _answer(step.part, other)
        if gap(a[i], b[i], size=b) > SITE:
            return f": {type(step.part).__name__} at {graft.path} does"
    return ""


def _parts(model: nn.Module, x: Any) -> list[tuple[Any, Any, Tensor]]:
    """(graft, step, what the part is first given) of every part that takes features."""
    seen: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: Any) -> None:
        found = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        if found and found[0].is_floating_point():
            seen.setdefault(id(module), found[0].detach().clone())

    handles = [step.part.register_forward_pre_hook(hook) for _, step in steps(model)]
    try:
        _run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (g, s, seen[id(s.part)])
        for g, s in steps(model)
        if id(s.part) in seen and s.place != "instead"
    ]


def _answer(part: nn.Module, x: Tensor) -> Tensor:
    out = part(x)
    tensor: Tensor = out.output if isinstance(out, Routed) else out
    return tensor


def tokens_do_not_mix(case: Case, draw: Draw) -> None:
    """d part(x)_i / d x_j = 0 exactly for tokens i != j, and part(Px) ~4 P part(x).

    For parts that do not declare `mixes_tokens = True`.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    found = [
        each
        for each in _parts(model, case.inputs())
        if not getattr(each[1].part, "mixes_tokens", False)
    ]
    found = [each for each in found if each[2].dim() > 2 and each[2].shape[-2] > 1]
    given(found, "no part here is given tokens that it should keep apart")
    graft, step, x = draw(st.sampled_from(found), "part at", lambda each: each[0].path)
    place = f"{type(step.part).__name__} at {graft.path}"
    tokens = x.shape[-2]
    i = draw(st.integers(0, tokens - 1), "token")
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        row = _answer(step.part, leaf).select(-2, i)
        slope = (
            torch.autograd.grad(row.square().sum(), leaf)[0]
            if row.requires_grad
            else torch.zeros_like(x)
        )
    reads = slope.abs().amax(-1).flatten(0, -2).amax(0) > 0
    others = [j for j in reads.nonzero().flatten().tolist() if j != i]
    holds(not others, f"{place}: token {i} depends on token {listed(others)}")
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(i))
    with torch.no_grad():
        a, b = (
            _answer(step.part, x.index_select(-2, order)),
            _answer(step.part, x).index_select(-2, order),
        )
    near([a], [b], SITE, f"{place}: tokens in another order give another answer")


def forward_changes_nothing(case: Case, draw: Draw) -> None:
    """A forward in eval mode leaves the bytes of inputs, parameters and buffers as they were."""
    model = case.operated(stirred=draw(SEEDS, "seed"))
    case.outputs(model)  # the first may fill buffers of the model's own
    x = case.inputs()
    before, given_ = snapshot(model), [t.clone() for t in tensors(x)]
    with torch.no_grad():
        call(model, x)
    unchanged(before, snapshot(model), "a forward", but=("random", "attributes"))
    equal(list(tensors(x)), given_, "a forward wrote to its inputs")


def forward_is_deterministic(case: Case, draw: Draw) -> None:
    """S(x) = S(x) to the bit; the same seed gives the same S to the bit, another seed another."""
    seed = draw(SEEDS, "seed")
    a, b, c = (case.operated(seed=s) for s in (seed, seed, seed + 1))
    given(
        gap_all(case.outputs(case.model()), case.outputs(case.model())) == 0,
        "the base is not deterministic",
    )
    equal(case.outputs(a), case.outputs(a), "two forwards in a row")
    equal(case.outputs(a), case.outputs(b), f"two operations with seed={seed}")
    pairs = [
        (p, q) for p, q in zip(operation(a).parameters(), operation(b).parameters(), strict=True)
    ]
    holds(all(torch.equal(p, q) for p, q in pairs), f"two operations with seed={seed} start apart")
    drawn = [p for p in operation(a).parameters() if p.numel() > 1 and (p != p.flatten()[0]).any()]
    same = [
        torch.equal(p, q)
        for p, q in zip(operation(a).parameters(), operation(c).parameters(), strict=True)
    ]
    holds(not drawn or not all(same), f"seed={seed} and seed={seed + 1} start alike")


def gap_all(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest gap between two lists of tensors."""
    return max((gap(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def disabled_is_the_base(case: Case, draw: Draw) -> None:
    """While disabled(S), S(x) = m(x) to the bit, after training too; then S answers again."""
    model = case.operated()
    want = case.outputs(case.twin(model))
    train(case, model, 1)
    stir(model, draw(SEEDS, "seed"))
    tuned = case.outputs(model)
    with disabled(model):
        equal(case.outputs(model), want, "disabled, the answer is not the base's")
    equal(case.outputs(model), tuned, "after disabled, the answer is not what it was")


def it_compiles_whole(case: Case, draw: Draw) -> None:
    """torch.compile(fullgraph=True, backend="aot_eager")(S)(x) ~16 S(x), where that is so of m.

    (Top-1 mixtures take a form of static shapes then, which rounds otherwise.)
    """
    given(_compiled(case, case.model()) is None, "the base itself does not compile whole")
    told = _compiled(case, case.operated(stirred=draw(SEEDS, "seed")))
    holds(told is None, f"compiled whole: {told}")


def _compiled(case: Case, model: nn.Module) -> str | None:
    """What goes wrong when a model is compiled; None where nothing does."""
    want = case.outputs(model)
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            near(list(tensors(call(compiled, case.inputs()))), want, MODEL, "another answer")
    except Broken as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        torch._dynamo.reset()
    return None


LAWS = (
    outputs_keep_their_form,
    parts_start_as_the_identity,
    scale_is_linear,
    every_part_runs,
    samples_do_not_mix,
    tokens_do_not_mix,
    forward_changes_nothing,
    forward_is_deterministic,
    disabled_is_the_base,
    it_compiles_whole,
)
