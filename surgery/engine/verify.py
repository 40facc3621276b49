"""The proof by example: hooked sites run, gradients come to what is trained, the start is the base.

No silent nothing: models read weights without calling modules, skip and detach, and torch fuses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .. import _rng
from .._inputs import call, copied, tensors_in
from .._preserve import preserved
from .._text import first_few
from ..errors import GraftError, SurgeryError
from .answers import apart, without_numbers
from .count_proof import check_counting
from .gradients import Reached, carrying, moved, overwritten, reached
from .hooked_weights import HookedWeight
from .hooks import HookedSite
from .operation import Operation
from .reading import Reading, why_idle
from .token_errors import ours

Run: TypeAlias = Callable[[], Any]


class TrainTarget(NamedTuple):
    """What one rule trains at one place, a part or a module: tensors by name.

    optional  it need not be there, so it need not be of use either: a note instead of an error
    inserted  it makes tokens that are put among others; `spared`, by an optional rule
    """

    rule: str
    tensors: list[tuple[str, Tensor]]
    optional: bool = False
    inserted: bool = False
    spared: bool = False

    @property
    def trained(self) -> dict[str, Tensor]:
        """Those that ask for a gradient."""
        return {name: tensor for name, tensor in self.tensors if tensor.requires_grad}

    def is_missed(self, reached: set[int]) -> bool:
        """Whether it asks for a gradient, and none comes to any of its tensors."""
        asking = self.trained.values()
        return bool(asking) and not any(id(tensor) in reached for tensor in asking)


def verify(
    model: nn.Module, operation: Operation, example: Any, targets: Iterable[TrainTarget]
) -> None:
    """Raise GraftError unless the operation does to the model what its rules say.

    Runs the model on copies of the example, in eval mode, each time with the same random numbers:
    without gradients, with them, and, where all parts say that they start at zero, without parts.
    Errors of the model itself pass through, but for those that come of tokens put in.
    """
    run = _runner(model, example)
    operation.watcher.resting = True
    try:
        with preserved(model, modes=True, kept=True), torch.compiler.set_stance("force_eager"):
            model.eval()
            with torch.no_grad():
                answer, _, _ = _proved(operation, run)
                _check_numbers(operation, run, answer)
            _check_rows(operation, example)
            with torch.enable_grad():
                after, reading, spared = _proved(operation, run)
                theirs = _without(spared, targets)
                notes = _check_gradients(model, run, after, reading, theirs)
            notes += _read_besides(operation, reading)
            operation.record["notes"] += [*_unreached(spared), *notes]
            with torch.no_grad():
                _check_start(operation, run, answer)
                check_counting(operation.hooked_sites, run, answer)
            _check_training(model, operation, run)
    finally:
        operation.watcher.resting = False
        operation.passes.forget()
        operation.streams.forget()


def _runner(model: nn.Module, example: Any) -> Run:
    """Calls the model on a copy of the example, each time with the same random numbers."""
    restore = _rng.remember()

    def run() -> Any:
        given = copied(example)
        restore()
        return call(model, given)

    return run


def _proved(operation: Operation, run: Run) -> tuple[Any, Reading, list[HookedSite]]:
    """The answer of a forward, what it read, and the sites that did not run and need not.

    Raises GraftError where others did not run.
    """
    for hooked in operation.hooked_sites:
        hooked.unsee()
    answer, reading = _answer(operation, run)
    operation.watcher.note(reading)
    idle = [hooked for hooked in operation.hooked_sites if not hooked.ran]
    read = [hooked for hooked in idle if reading.instead_of(hooked, operation.model[0])]
    spared = operation.watcher.spared(idle, read)
    operation.prove(lambda _: why_idle(read, "With this example"), spared)
    return answer, reading, spared


def _answer(operation: Operation, run: Run) -> tuple[Any, Reading]:
    """The answer of a forward, and what it read. Tells a model's error of what surgery makes it."""
    reading = Reading(operation.hooked_sites, sys._getframe())
    try:
        with reading:
            return run(), reading
    except SurgeryError:
        raise
    except Exception as error:
        if told := ours(error, operation, run):
            raise told from error
        raise


def _read_besides(operation: Operation, reading: Reading) -> list[str]:
    """A note of layers that are called, and whose weight is read elsewhere too."""
    called = [h for h in operation.hooked_sites if not isinstance(h, HookedWeight) and h.ran]
    paths = first_few([h.path for h in called if reading.besides_its_own(h)])
    told = f"the model also reads the weight of {paths} without a call: parts act on calls alone"
    return [told] if paths else []


def _unreached(spared: list[HookedSite]) -> list[str]:
    paths = first_few(hooked.path for hooked in spared)
    return [f"the example does not reach {paths}"] if spared else []


def _without(spared: list[HookedSite], targets: Iterable[TrainTarget]) -> list[TrainTarget]:
    """The targets without the parts at sites that need not run."""
    parts = [action.part for hooked in spared for action in hooked.actions]
    theirs = {id(p) for part in parts for p in part.parameters()}
    return [t for t in targets if not t.trained or {id(p) for _, p in t.tensors} - theirs]


def _check_training(model: nn.Module, operation: Operation, run: Run) -> None:
    """In training, too, no weight is read instead of calling what it stands at.

    Layers may be skipped, which are dropped at random; a model may need more than an example (more
    samples, for the norm of a batch), which is a note.
    """
    with preserved(model, modes=True, kept=True), torch.enable_grad():
        model.train()
        try:
            _, reading = _answer(operation, run)
        except Exception as error:
            if _is_ours(error):
                raise
            kind = type(error).__name__
            operation.record["notes"].append(f"not proved in training: {kind} with this example")
            return
        ran = operation.passes.mine().ran
    operation.watcher.note(reading)
    idle = [hooked for hooked in operation.hooked_sites if not hooked.marks <= ran]
    if read := [hooked for hooked in idle if reading.instead_of(hooked, model)]:
        fact, remedy = why_idle(read, "")
        raise operation.watcher.error(read, f"do not run in training{fact}.", remedy)


def _is_ours(error: Exception) -> bool:
    """Whether an error is raised by a line of this package, and not by the model or by torch."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code is Reading.__torch_function__.__code__:
        return False
    return str(last.tb_frame.f_globals["__name__"]).startswith(__name__.partition(".")[0] + ".")


def _check_numbers(operation: Operation, run: Run, answer: Any) -> None:
    """Raise GraftError where an answer is no number with parts, and is one without.

    (A window of local attention that holds nothing but what was put in and what is masked.)
    """
    if not (lost := without_numbers(answer)):
        return
    with _without_parts(operation):
        base = without_numbers(run())
    if lost > base:
        inserts = any(hooked.inserts for hooked in operation.hooked_sites)
        raise GraftError(
            _rules(operation),
            f"{lost} numbers of the answer are nan with its parts, and {base} without them.",
            "The model is made for its own number of tokens (windows, masks): use a method that "
            "adds none."
            if inserts
            else "Give parts that start smaller, or a model in a dtype in which they do not "
            "overflow.",
        )


def _rules(operation: Operation) -> str:
    """The rules that join something, in words."""
    return ", ".join(row["rule"] for row in operation.record["rows"] if row["keys"])


@contextmanager
def _without_parts(operation: Operation) -> Iterator[None]:
    """Parts are off, and torch takes the paths by which answers came (see Reading)."""
    operation.enabled = False
    try:
        with Reading((), sys._getframe(2)):  # of who entered this
            yield
    finally:
        operation.enabled = True


def _check_rows(operation: Operation, example: Any) -> None:
    """Tokens are put among those of a sample: where the first axis is of tokens, they are not."""
    batch = next((len(t) for t in tensors_in(example) if t.dim()), 0)
    for (_, path, _), tokens in operation.streams.mine().inserted.items():
        if tokens.batch != batch == tokens.total - tokens.new:
            raise GraftError(
                f"insert(...) at {path}",
                f"it is given {tokens.batch} x {batch} where the example has {batch} samples: "
                "tokens come first here, and would be inserted as samples.",
                "Insert into a model that takes samples first (batch_first=True).",
            )


# gradients -------------------------------------------------------------------------------------


def _check_gradients(
    model: nn.Module, run: Run, answer: Any, reading: Reading, targets: list[TrainTarget]
) -> list[str]:
    """A gradient must come to some tensor of every target, and move it; notes where it need not.

    Only some, for the experts of a mixture that got no token, and tokens that models mask with.
    """
    outputs = carrying(answer)
    graph = reached(outputs)
    moving = _moved(model, run, answer, graph, targets) if outputs else set()
    come = graph.tensors | (moving or set())
    missed = [target for target in targets if target.is_missed(come)]
    shown = graph.whole or moving is not None
    if shown and (needed := [target for target in missed if not target.optional]):
        raise _lost(needed, outputs, reading)
    if not (outputs and shown):  # what the graph hides may have come
        return []
    notes = [f"no gradient comes to {first_few(_names(missed))} with this example"]
    zero = [] if moving is None else _zero(targets, moving, missed)
    zeros = [f"the gradient that comes to {first_few(_names(zero))} is zero with this example"]
    return [*(notes if missed else ()), *(zeros if zero else ())]


def _moved(
    model: nn.Module, run: Run, answer: Any, graph: Reached, targets: list[TrainTarget]
) -> set[int] | None:
    """Ids of the tensors that a gradient moves; None where no backward can be run.

    Raises GraftError where it cannot as the model writes over what it needs.
    """
    wanted = _wanted(targets)
    moving = moved(model, wanted, run, answer)
    shown = moving is not None or not (graph.whole and graph.derived)
    if not shown and overwritten(wanted, carrying(run())):
        raise _overwritten(targets)
    return moving


def _wanted(targets: list[TrainTarget]) -> list[Tensor]:
    """Of what is to be trained, each tensor once."""
    return list({id(t): t for target in targets for t in target.trained.values()}.values())


def _zero(
    targets: list[TrainTarget], moving: set[int], missed: list[TrainTarget]
) -> list[TrainTarget]:
    """Those that a gradient of zeros comes to. Raises GraftError where one of them is an error."""
    idle = [target for target in targets if target.is_missed(moving)]
    zero = [target for target in idle if target not in missed]
    if dead := [target for target in zero if _is_dead(target, targets, idle)]:
        raise _moves_nothing(dead)
    return zero


def _is_dead(target: TrainTarget, targets: list[TrainTarget], idle: list[TrainTarget]) -> bool:
    """Whether a target with a gradient of zeros is an error, by what becomes of others.

    Where none of its rule moves anything: experts may get no token, and queries of a single token
    come to nothing. Of tokens any, but for optional ones (DAPT's last are for a head that reads
    them), of which some must.
    """
    if target.inserted:
        others = [each for each in targets if each.inserted]
        return not target.spared or all(each in idle for each in others)
    alike = [each for each in targets if each.trained and each.rule == target.rule]
    return not target.optional and all(each in idle for each in alike)


def _overwritten(targets: list[TrainTarget]) -> GraftError:
    """The error of a backward that finds what it needs changed."""
    return GraftError(
        ", ".join(dict.fromkeys(target.rule for target in targets)),
        "no gradient comes to what they train: the model writes into a tensor that backward needs "
        "(x += ffn(norm(x)), where the norm keeps x).",
        "Let the model make a new tensor there: x = x + ffn(norm(x)).",
    )


def _moves_nothing(targets: list[TrainTarget]) -> GraftError:
    """The error of a gradient that is zero whatever the weights are."""
    tokens = all(target.inserted for target in targets)
    return GraftError(
        ", ".join(dict.fromkeys(target.rule for target in targets)),
        f"the gradient that comes to {first_few(_names(targets))} is zero, also where parameters "
        "that are zero are given numbers: the output does not depend on them.",
        "No other token hears them there, or they are taken out before anything is read. Use a "
        "method that adds no tokens."
        if tokens
        else "Give an example that uses them, or a narrower place: & ~where(...).",
    )


def _lost(targets: list[TrainTarget], outputs: list[Tensor], reading: Reading) -> GraftError:
    """The error of a gradient that never comes."""
    rules, names = ", ".join(dict.fromkeys(t.rule for t in targets)), first_few(_names(targets))
    if reading.cut_off and (outputs or not reading.is_of_checkpoints):
        fact, remedy = reading.why_cut_off()
        return GraftError(rules, f"no gradient comes from the output to {names}: {fact}", remedy)
    if not outputs:
        return GraftError(
            rules,
            f"the output carries no gradient at all, so none would come to {names}.",
            "The model runs under torch.no_grad(), or under reentrant checkpointing with an input "
            "that needs no gradient (use_reentrant=False), or gives no floating numbers.",
        )
    return GraftError(
        rules,
        f"no gradient comes from the output to {names}: they would never be trained.",
        "The model detaches what they make, or does not use it. Give an example that uses it, "
        "or a narrower place: & ~where(...).",
    )


def _names(targets: list[TrainTarget]) -> list[str]:
    """Of what is to be trained there, each once."""
    return list(dict.fromkeys(name for target in targets for name in target.trained))


# the start -------------------------------------------------------------------------------------


def _check_start(operation: Operation, run: Run, answer: Any) -> None:
    """Parts that say that they start by adding nothing must leave the output what it was."""
    actions = [action for hooked in operation.hooked_sites for action in hooked.actions]
    if not actions or not all(action.starts_as_base for action in actions):
        return
    with _without_parts(operation):
        base, again = run(), run()
    differs = apart(answer, base) and not apart(again, base)  # the model itself may differ
    if differs:
        kinds = ", ".join(sorted({type(action.part).__name__ for action in actions}))
        raise GraftError(
            _rules(operation),
            f"its parts ({kinds}) say that they start at zero, and yet they change the output.",
            "Take starts_at_zero off a part that does not; if none does, please report this.",
        )
