"""Laws of the function: what S computes. m is the model, S the operated one, x inputs.

a ~k b: max |a - b| <= k eps(dtype) max |b|. Parts are stirred, so that they do something.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import call, tensors_in
from .._preserve import fingerprint
from .._text import first_few
from ..engine.apply import disabled
from ..engine.hooked_weights import HookedWeight
from ..rules.affine import affine
from ..rules.edits import Parallel
from ..rules.routing import Routed
from ..rules.rule import at
from ..rules.selector import where
from ..structure.module_tree import Site
from ..structure.weights import ParameterSite
from . import isolation
from .case import SEEDS, Case, actions, operation, stir, train
from .isolation import map_samples, output_of, part_inputs, with_another
from .laws import Broken, Draw, applies, holds
from .snapshot import MODEL, SITE, equal, gap, near, rounding, unchanged, used


def it_runs(case: Case, draw: Draw) -> None:
    """S(x) and its gradient are defined, stirred or not: no error where m(x) has none."""
    trouble = case.trouble
    holds(trouble is None, f"a forward of S raises {trouble}")


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
    forms = [(t.shape, t.dtype, t.device, t.stride()) for t in tensors_in(answer)]
    return [type(answer), str(spec), len(leaves), *forms]


def _other(before: list[object], after: list[object]) -> str:
    pairs = [(a, b) for a, b in zip(before, after, strict=False) if a != b]
    return "; ".join(f"{b} instead of {a}" for a, b in pairs[:2]) or f"{len(after)} parts"


def parts_start_as_the_identity(case: Case, draw: Draw) -> None:
    """S(x) = m(x) to the bit at the start, where all parts declare `starts_at_zero`."""
    model = case.operated(seed=draw(SEEDS, "seed"))
    kinds = {type(a.part).__name__ for _, a in actions(model) if not a.starts_as_base}
    applies(not kinds, f"{first_few(sorted(kinds))} does not say that it starts at zero")
    equal(case.outputs(model), case.outputs(case.twin(model)), "S(x) at the start is not m(x)")


def scale_is_linear(case: Case, draw: Draw) -> None:
    """At a site, S_2s - m ~4 2 (S_s - m) in units of the site's output, and S_0 = m to the bit."""
    called = [(r, s) for r, s in case.places if not isinstance(s, ParameterSite)]
    scaled = [
        (r, e, s) for r, s in called for e in r.rest if isinstance(e, Parallel) and not e.hears
    ]
    applies(
        scaled, "no rule puts a part that hears no other beside a site, parallel(part, scale=...)"
    )
    rule, edit, site = draw(st.sampled_from(scaled), "site", lambda triple: triple[2].path)
    seed = draw(SEEDS, "seed")

    there = where(rule.where) & where(lambda s: s.path == site.path)
    models = [case.operated(rules=[at(there, replace(edit, weight=w))]) for w in (0.0, 0.5, 1.0)]
    stir(models[0], seed)
    (_, first), *_ = actions(models[0])
    for model in models[1:]:  # parts are seeded by their edit, scale and all: make them the same
        actions(model)[0][1].part.__dict__.update(copy.deepcopy(vars(first.part)))
    base = _output(case, site, case.twin(models[0]))
    zero, one, two = (_output(case, site, model) for model in models)
    holds(torch.equal(zero, base), f"{site.path}: with scale=0 the part changes the output")
    far = gap(two - base, 2 * (one - base), size=two)
    holds(far <= SITE, f"{site.path}: twice the scale is {far:.3g} eps from twice the part")


def _output(case: Case, site: Site, model: nn.Module) -> Tensor:
    """What a site first gives in a forward."""
    outputs: list[Tensor] = []
    exit = model.get_submodule(site.exit.path)
    exit.register_forward_hook(lambda m, args, y: outputs.append(_first(y)))
    case.outputs(model)
    applies(outputs, f"{site.path} did not run")
    return outputs[0]


def _first(value: object) -> Tensor:
    return next(t.detach().clone() for t in pytree.tree_leaves(value) if isinstance(t, Tensor))


def every_part_runs(case: Case, draw: Draw) -> None:
    """In a forward each part runs once for each call of each of its sites, and each is called.

    Parts at a weight run by their map, and what computes with it is called.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    applies(actions(model), "these rules join no part")
    runs(case, model)


def runs(case: Case, model: nn.Module) -> None:
    """Raise Broken unless every part of S runs in a forward as often as its sites are called."""
    every = [
        (hooked.path, hooked.entry if action.place == "before" else hooked.exit, action.part)
        for hooked, action in actions(model)
    ]
    at_weights = {h.path for h, _ in actions(model) if isinstance(h, HookedWeight)}
    joined = [(path, end, part) for path, end, part in every if path not in at_weights]
    calls = _calls(case, model, [m for _, end, part in every for m in (end, part)])
    for path, end, _ in every:
        holds(calls[id(end)], f"{path} is never called")
    want: Counter[int] = Counter()
    for _, end, part in joined:
        want[id(part)] += calls[id(end)]
    for path, _, part in joined:
        n, times = want[id(part)], calls[id(part)]
        kind = type(part).__name__
        holds(times == n, f"{kind} at {path} runs {times} times, and its sites {n}")


def _calls(case: Case, model: nn.Module, modules: list[nn.Module]) -> Counter[int]:
    """How often each of some modules runs in a forward, by its id."""
    calls: Counter[int] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda m, *_: calls.update([id(m)]))
        for module in {id(m): m for m in modules}.values()
    ]
    try:
        case.outputs(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def parts_are_what_they_declare(case: Case, draw: Draw) -> None:
    """`starts_at_zero`: part(x) = 0 at the start; `affine()` is W, b: part(x) ~4 Wx + b.

    And a part gives gates if and only if it declares `routes`. For every part at each of its sites.
    """
    fresh, model = case.operated(), case.operated(stirred=draw(SEEDS, "seed"))
    parts = part_inputs(model, case.inputs())
    applies(parts, "no part here is given features")
    for hooked, action, given in part_inputs(fresh, case.inputs()):
        if getattr(action.part, "starts_at_zero", False) and output_of(action.part, given).any():
            raise Broken(f"{type(action.part).__name__} at {hooked.path} does not start at zero")
    for hooked, action, given in parts:
        place, part = f"{type(action.part).__name__} at {hooked.path}", action.part
        gates, says = isinstance(part(*given), Routed), bool(getattr(part, "routes", False))
        holds(gates == says, f"{place} gives {'gates' if gates else 'no gates'}, and routes={says}")
        if map := affine(part):
            x = given[0]
            want = x * map.weight if map.weight.dim() == 1 else x @ map.weight.T
            want = want if map.bias is None else want + map.bias
            numbers = [*used(part), *part.buffers()]
            most = rounding(lambda: [output_of(part, given)], numbers, SITE)  # noqa: B023
            near([output_of(part, given)], [want], most, f"{place} is not what its affine() says")


def forward_changes_nothing(case: Case, draw: Draw) -> None:
    """A forward in eval mode leaves inputs, parameters, buffers, and torch's modes as they were.

    And each part the bytes of what it is given; and all random numbers, if a forward of m does.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    case.outputs(model)  # the first may fill buffers of the model's own
    draws = _draws(case)
    _ = torch.rand(1), random.random(), np.random.rand()  # else one that seeds them is not seen
    x = case.inputs()
    before, x_before = fingerprint(model), [t.clone() for t in tensors_in(x)]
    writers = _writers(model, x)
    but = ("attributes", "random") if draws else ("attributes",)
    unchanged(before, fingerprint(model), "a forward", but=but)
    equal(list(tensors_in(x)), x_before, "a forward wrote to its inputs")
    holds(not writers, f"{first_few(writers)} wrote to what it was given")


def _draws(case: Case) -> bool:
    """Whether a forward of m moves random numbers."""
    base = case.model()
    case.outputs(base)
    before = fingerprint(base)
    case.outputs(base)
    after = fingerprint(base)
    return any(before[mark] != value for mark, value in after.items() if "random" in mark)


def _writers(model: nn.Module, x: Any) -> list[str]:
    """The kinds of parts that write to what they are given, in one forward."""
    kinds: list[str] = []
    given: dict[int, Tensor] = {}

    def enter(part: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            given[id(part)] = args[0].detach().clone()

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        if id(part) in given and not torch.equal(args[0], given.pop(id(part))):
            kinds.append(type(part).__name__)

    hooks = [action.part.register_forward_pre_hook(enter) for _, action in actions(model)]
    hooks += [action.part.register_forward_hook(leave) for _, action in actions(model)]
    call(model, x)
    for hook in hooks:
        hook.remove()
    return kinds


def forward_is_deterministic(case: Case, draw: Draw) -> None:
    """S(x) = S(x) to the bit, whatever came before; S is a function of m, R and the seed."""
    seed = draw(SEEDS, "seed")
    base = case.model()
    applies(gap_all(case.outputs(base), case.outputs(base)) == 0, "the base is not deterministic")
    one, two = (case.operated(seed=seed, stirred=seed) for _ in range(2))
    want = case.outputs(one)
    equal(case.outputs(one), want, "two forwards in a row")
    other = map_samples(case.inputs(), lambda t: with_another(t, 0))
    case.outputs(two, other)
    equal(case.outputs(two), want, "the forward after one on other inputs")
    a, b, c = (operation(case.operated(seed=s)) for s in (seed, seed, seed + 1))
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    holds(all(torch.equal(p, q) for p, q in pairs), f"two operations with seed={seed} start apart")
    elsewhere = operation(case.operated(_other_values(case.model()), seed=seed))
    trios = zip(a.parameters(), c.parameters(), elsewhere.parameters(), strict=True)
    drawn = [torch.equal(p, q) for p, q, moved in trios if _drawn(p) and torch.equal(p, moved)]
    holds(not drawn or not all(drawn), f"seed={seed} and seed={seed + 1} start alike")


def _drawn(p: Tensor) -> bool:
    """Whether it looks drawn: no constant."""
    return p.numel() > 1 and bool((p != p.flatten()[0]).any())


def _other_values(model: nn.Module) -> nn.Module:
    """The model with other weights: what a part then starts otherwise from, it has read there."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.cos_()
    return model


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
    applies(case.of_base(_trouble_compiled) is None, "the base itself does not compile whole")
    trouble = _trouble_compiled(case, case.operated(stirred=draw(SEEDS, "seed")))
    holds(trouble is None, f"compiled whole: {trouble}")


def _trouble_compiled(case: Case, model: nn.Module) -> str | None:
    """What goes wrong when a model is compiled; None where nothing does."""
    want = case.outputs(model)
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            answer = call(compiled, case.inputs())
            near(list(tensors_in(answer)), want, MODEL, "another answer")
    except Broken as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        torch._dynamo.reset()
    return None


LAWS = (
    it_runs,
    outputs_keep_their_form,
    parts_start_as_the_identity,
    scale_is_linear,
    every_part_runs,
    isolation.samples_do_not_mix,
    isolation.tokens_do_not_mix,
    isolation.tokens_have_no_order,
    isolation.no_other_token_is_heard,
    parts_are_what_they_declare,
    forward_changes_nothing,
    forward_is_deterministic,
    disabled_is_the_base,
    it_compiles_whole,
)
