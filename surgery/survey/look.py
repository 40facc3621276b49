"""What the survey does to one model: roles, plan, operation, forward, backward, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._preserve import fingerprint
from ..engine import apply
from ..engine.planning import plan
from ..errors import SurgeryError
from ..structure.anatomy import instead_of_ffns, roles_of
from ..structure.dataflow import attach_dataflow
from ..structure.ffn_traced import TracedFFN, traced_ffns
from ..structure.module_tree import Site, Tree
from ..structure.path import generalise
from ..structure.trace import Trace, trace
from .dummy_inputs import Inputs, run

RULES = "adapterx_ffn"
IDLE = "not run with these inputs"
ALONE = "sites by the forward alone (example=)"
CLOSE = 1e-6  # between the outputs of the base and of the model just operated


class Row(NamedTuple):
    """What came of one model.

    status   operated: ran for real, and came back. planned: has sites, was not run. refused: an
             error of Surgery's own, the model untouched. failed: anything else
    owners   addresses of the FFNs, with the class that owns each and how many
    layout   where their features lie: last, 1, or both
    run      what the real forward, backward and revert gave; "" where there was none
    reason   why it is not operated; or what a forward shows that the structure does not
    """

    source: str
    name: str
    family: str = ""
    status: str = "failed"
    parameters: int = 0
    sites: int = 0
    owners: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    layout: str = ""
    attention: int = 0
    run: str = ""
    reason: str = ""


def read(row: Row, model: nn.Module, example: Inputs | None = None) -> Row:
    """The row with what anatomy and plan say of the model; nothing is changed, or run unasked."""
    row = row._replace(
        family=row.family or type(model).__module__.rpartition(".")[2],
        parameters=sum(p.numel() for p in model.parameters()),
    )
    tree = Tree(model)
    attach_dataflow(tree, example)
    roles = roles_of(tree)
    found = roles["ffn"]
    row = row._replace(
        sites=len(found),
        owners=_owners(found),
        widths=tuple(sorted({s.width for s in found})),
        layout=" and ".join(sorted({"last" if s.axis == -1 else str(s.axis) for s in found})),
        attention=len(roles["attn"]),
    )
    try:
        plan(model, RULES, example=example)
    except SurgeryError as error:
        why = instead_of_ffns(tree) if not found else _words(error)
        return row._replace(status="refused", reason=why)
    return row._replace(status="planned")


def operated(row: Row, model: nn.Module, inputs: Inputs, example: Inputs | None = None) -> Row:
    """The row with what came of tracing, operating, running and reverting the model for real.

    example  for a model whose sites only a forward shows
    """
    model.eval()
    row = compared(row, model, inputs) if example is None else row._replace(run=ALONE)
    base = _outputs(model, inputs)
    again = _outputs(model, inputs)
    torch.manual_seed(0)
    before = fingerprint(model)  # after the first forward, in which some models fill buffers
    try:
        apply.apply(model, RULES, example=example)
    except SurgeryError as error:
        return row._replace(status="refused", reason=_join(_words(error), row.reason))
    told: list[str] = []
    wrong: list[str] = []
    try:
        told, wrong = _judged(model, inputs, base, again)
    except SurgeryError as error:
        known = row.reason.startswith(IDLE)  # it refuses for this very reason
        words = row.reason if known else _join(_words(error), row.reason)
        return row._replace(status="refused", reason=words)
    finally:
        model.zero_grad(set_to_none=True)
        apply.revert(model)
    torch.manual_seed(0)
    changed = [mark for mark, value in fingerprint(model).items() if before.get(mark) != value]
    wrong += [f"revert left {len(changed)} marks changed: {', '.join(changed[:3])}"] * bool(changed)
    status = "failed" if wrong else "operated"
    return row._replace(
        status=status,
        run=", ".join([*told, "reverted", row.run]),
        reason=_join(*wrong, row.reason),
    )


def compared(row: Row, model: nn.Module, inputs: Inputs) -> Row:
    """The row with what one forward shows, beside the sites that the structure gave.

    Its `run` says whether the forward agrees; its reason gains whatever only one of the two sees.
    """
    torch.manual_seed(1)
    try:
        seen = trace(model.eval(), inputs)
        feeds = [feed for feed in traced_ffns(seen) if feed.kind in ("ffn", "tokens")]
    except Exception as error:
        return row._replace(run="forward not traced", reason=_join(row.reason, _words(error)[:200]))
    found = roles_of(Tree(model))["ffn"]
    unseen = [site for site in found if not any(_covers(site, feed) for feed in feeds)]
    more = [feed for feed in feeds if not any(_covers(site, feed) for site in found)]
    told = [f"{len(found) - len(unseen)} of {len(found)}"] * bool(unseen)
    told += [f"{len(more)} more"] * bool(more)
    verdict = f"forward sees {' and '.join(told)}" if told else "forward agrees"
    idle = [site for site in unseen if not _ran(seen, site)]
    other = [site for site in unseen if site not in idle]
    reasons = (
        _listed(IDLE, [site.path for site in idle]),
        _listed("run, but no feed-forward network to the forward", [site.path for site in other]),
        _listed("to the forward alone", [_span(f) for f in more]),
    )
    return row._replace(run=verdict, reason=_join(row.reason, *reasons))


def _join(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _covers(site: Site, feed: TracedFFN) -> bool:
    return _is_in(feed.entry, site.entry.path) and _is_in(feed.exit, site.exit.path)


def _is_in(path: str, holder: str) -> bool:
    return not holder or f"{path}.".startswith(f"{holder}.")


def _ran(seen: Trace, site: Site) -> bool:
    inside = {id(module) for module in site.entry.module.modules()}
    return any(id(call.module) in inside for call in seen.calls)


def _span(feed: TracedFFN) -> str:
    """Its address, as that of a site would be."""
    owner = f"{feed.owner}." if feed.owner else ""
    if feed.entry == feed.exit:
        return feed.entry
    ends = (end.removeprefix(owner) for end in (feed.entry, feed.exit))
    return f"{owner}({' to '.join(ends)})"


def _listed(what: str, paths: list[str]) -> str:
    """Addresses under one heading, those that differ in a number alone told once."""
    kinds = Counter(generalise(path) for path in paths)
    return f"{what}: {', '.join(f'{kind} x{n}' for kind, n in kinds.items())}" if paths else ""


def _judged(
    model: nn.Module, inputs: Inputs, base: list[Tensor], again: list[Tensor]
) -> tuple[list[str], list[str]]:
    """What is as it should be and what is wrong: identity at the start, gradients."""
    told: list[str] = []
    wrong: list[str] = []
    far = _distance(base, _outputs(model, inputs))
    if far <= max(CLOSE, _distance(base, again)):
        told.append("identical" if far == 0 else f"within {far:.0e}")
    else:
        wrong.append(f"the output differs by {far:.1e} at the start")
    with torch.enable_grad():
        results = [t for t in tensors(run(model, inputs)) if t.requires_grad]
        if not results:
            return told, [*wrong, "no output carries a gradient"]
        loss = torch.stack([t.abs().float().mean() for t in results]).sum()
        torch.autograd.backward(loss + apply.balance_loss(model))
    parts = dict(model.get_submodule("surgery").named_parameters())
    dry = [name for name, p in parts.items() if p.requires_grad and p.grad is None]
    if dry:
        wrong.append(f"{len(dry)} of {len(parts)} parameters got no gradient: {dry[0]}")
    else:
        told.append(f"{len(parts)} gradients")
    return told, wrong


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors(run(model, inputs))]


def tensors(value: Any, seen: int = 0) -> Iterator[Tensor]:
    """Every floating tensor in a model's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif seen < 6 and isinstance(value, dict):
        for each in value.values():
            yield from tensors(each, seen + 1)
    elif seen < 6 and isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each, seen + 1)


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    gaps = [
        (x - y).abs().nan_to_num(0, 0, 0).max().item()
        for x, y in zip(a, b, strict=True)
        if x.numel()
    ]
    return max(gaps, default=0.0)


def _owners(sites: list[Site]) -> tuple[str, ...]:
    counts = Counter(f"{generalise(s.path)} {type(s.module).__name__}" for s in sites)
    return tuple(f"{owner} x{n}" for owner, n in counts.items())


def _words(error: Exception) -> str:
    return " ".join(str(error).split())
