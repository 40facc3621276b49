"""What the survey does to one model: roles, plan, operation, forward, backward, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._inputs import tensors_in
from .._preserve import Marks, fingerprint
from ..engine import apply, losses
from ..engine.planning import plan
from ..errors import SurgeryError
from ..structure.anatomy import instead_of_ffns, roles_of
from ..structure.dataflow import attach_dataflow
from ..structure.ffn_traced import TracedFFN, traced_ffns
from ..structure.module_tree import Site, Tree
from ..structure.path import generalise
from ..structure.trace import Trace, trace
from .dummy_inputs import forward, one_line

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


def read(row: Row, model: nn.Module, example: Any = None) -> Row:
    """The row with what anatomy and plan say of the model; nothing is changed, or run unasked."""
    tree = Tree(model)
    attach_dataflow(tree, example)
    roles = roles_of(tree)
    sites = roles["ffn"]
    row = row._replace(
        family=row.family or type(model).__module__.rpartition(".")[2],
        parameters=sum(p.numel() for p in model.parameters()),
        sites=len(sites),
        owners=_owners(sites),
        widths=tuple(sorted({s.width for s in sites})),
        layout=" and ".join(sorted({"last" if s.axis == -1 else str(s.axis) for s in sites})),
        attention=len(roles["attn"]),
    )
    try:
        plan(model, RULES, example=example)
    except SurgeryError as error:
        reason = one_line(error) if sites else instead_of_ffns(tree)
        return row._replace(status="refused", reason=reason)
    return row._replace(status="planned")


def operated(row: Row, model: nn.Module, inputs: Any, example: Any = None) -> Row:
    """The row with what came of tracing, operating, running and reverting the model for real.

    example  for a model whose sites only a forward shows
    """
    model.eval()
    row = compared(row, model, inputs) if example is None else row._replace(run=ALONE)
    base = _outputs(model, inputs)
    again = _outputs(model, inputs)
    torch.manual_seed(0)
    before = _marks(model)  # after the first forward, in which some models fill buffers
    try:
        apply.apply(model, RULES, example=example)
    except SurgeryError as error:
        return row._replace(status="refused", reason=joined(one_line(error), row.reason))
    try:
        right, wrong = _judged(model, inputs, base, again)
    except SurgeryError as error:
        known = row.reason.startswith(IDLE)  # it refuses for this very reason
        reason = row.reason if known else joined(one_line(error), row.reason)
        return row._replace(status="refused", reason=reason)
    finally:
        model.zero_grad(set_to_none=True)
        apply.revert(model)
    changed = [mark for mark, value in _marks(model).items() if before.get(mark) != value]
    wrong += [f"revert left {len(changed)} marks changed: {', '.join(changed[:3])}"] * bool(changed)
    return row._replace(
        status="failed" if wrong else "operated",
        run=", ".join([*right, "reverted", row.run]),
        reason=joined(*wrong, row.reason),
    )


def _marks(model: nn.Module) -> Marks:
    """Its fingerprint, but for random numbers: forwards draw some, of Python too (MusicGen)."""
    return {
        m: value for m, value in fingerprint(model).items() if not m.startswith("random numbers")
    }


def joined(*reasons: str) -> str:
    """Several reasons as one."""
    return "; ".join(filter(None, reasons))


def _judged(
    model: nn.Module, inputs: Any, base: list[Tensor], again: list[Tensor]
) -> tuple[list[str], list[str]]:
    """What is as it should be and what is wrong: identity at the start, gradients."""
    right: list[str] = []
    wrong: list[str] = []
    far = _distance(base, _outputs(model, inputs))
    if far <= max(CLOSE, _distance(base, again)):
        right.append("identical" if far == 0 else f"within {far:.0e}")
    else:
        wrong.append(f"the output differs by {far:.1e} at the start")
    if not _went_back(model, inputs):
        return right, [*wrong, "no output carries a gradient"]
    parts = dict(model.get_submodule("surgery").named_parameters())
    dry = [name for name, p in parts.items() if p.requires_grad and p.grad is None]
    if dry:
        wrong.append(f"{len(dry)} of {len(parts)} parameters got no gradient: {dry[0]}")
    else:
        right.append(f"{len(parts)} gradients")
    return right, wrong


def _went_back(model: nn.Module, inputs: Any) -> bool:
    """Whether a backward from all outputs could be made, and was."""
    with torch.enable_grad():
        outputs = [t for t in tensors_in(forward(model, inputs)) if t.requires_grad]
        if outputs:
            loss = torch.stack([t.abs().float().mean() for t in outputs]).sum()
            torch.autograd.backward(loss + losses.balance_loss(model))
    return bool(outputs)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        outputs = tensors_in(forward(model, inputs))
        return [t.clone() for t in outputs if t.is_floating_point() or t.is_complex()]


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.numel()]
    return max(((x - y).abs().nan_to_num(0, 0, 0).max().item() for x, y in pairs), default=0.0)


def _owners(sites: list[Site]) -> tuple[str, ...]:
    counts = Counter(f"{generalise(s.path)} {type(s.module).__name__}" for s in sites)
    return tuple(f"{owner} x{n}" for owner, n in counts.items())


# what a forward sees, beside what the structure gave --------------------------------------------


def compared(row: Row, model: nn.Module, inputs: Any) -> Row:
    """The row with what one forward shows, beside the sites that the structure gave.

    Its `run` says whether the forward agrees; its reason gains whatever only one of the two sees.
    """
    torch.manual_seed(1)
    try:
        tracing = trace(model.eval(), inputs)
        ffns = [ffn for ffn in traced_ffns(tracing) if ffn.kind in ("ffn", "tokens")]
    except Exception as error:
        reason = joined(row.reason, one_line(error)[:200])
        return row._replace(run="forward not traced", reason=reason)
    sites = roles_of(Tree(model))["ffn"]
    unseen = [site for site in sites if not any(_covers(site, ffn) for ffn in ffns)]
    more = [ffn for ffn in ffns if not any(_covers(site, ffn) for site in sites)]
    return row._replace(
        run=_verdict(len(sites), len(unseen), len(more)),
        reason=joined(row.reason, *_disagreement(tracing, unseen, more)),
    )


def _disagreement(tracing: Trace, unseen: list[Site], more: list[TracedFFN]) -> Iterator[str]:
    """What only the structure sees, idle or run, and what only the forward does."""
    idle = [site.path for site in unseen if not _ran(tracing, site)]
    run = [site.path for site in unseen if site.path not in idle]
    yield _listed(IDLE, idle)
    yield _listed("run, but no feed-forward network to the forward", run)
    yield _listed("to the forward alone", [_address(ffn) for ffn in more])


def _verdict(sites: int, unseen: int, more: int) -> str:
    sees = [f"{sites - unseen} of {sites}"] * bool(unseen) + [f"{more} more"] * bool(more)
    return f"forward sees {' and '.join(sees)}" if sees else "forward agrees"


def _covers(site: Site, ffn: TracedFFN) -> bool:
    return _is_in(ffn.entry, site.entry.path) and _is_in(ffn.exit, site.exit.path)


def _is_in(path: str, holder: str) -> bool:
    return not holder or f"{path}.".startswith(f"{holder}.")


def _ran(tracing: Trace, site: Site) -> bool:
    inside = {id(module) for module in site.entry.module.modules()}
    return any(id(call.module) in inside for call in tracing.calls)


def _address(ffn: TracedFFN) -> str:
    """Its address, as that of a site would be."""
    owner = f"{ffn.owner}." if ffn.owner else ""
    if ffn.entry == ffn.exit:
        return ffn.entry
    ends = (end.removeprefix(owner) for end in (ffn.entry, ffn.exit))
    return f"{owner}({' to '.join(ends)})"


def _listed(what: str, paths: list[str]) -> str:
    """Addresses under one heading, those that differ in a number alone once, with their count."""
    kinds = Counter(generalise(path) for path in paths)
    return f"{what}: {', '.join(f'{kind} x{n}' for kind, n in kinds.items())}" if paths else ""
