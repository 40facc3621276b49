"""The suite on a model and rules of one's own: `check` as a call, `specify` as pytest ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, HypothesisException
from torch import nn

from .._preserve import preserved
from .._table import Table
from ..errors import RuleError, nearest_names
from ..rules.rule import Rules
from . import function, lifecycle, matching, parameters, routing, weights
from .case import Case, Property
from .laws import Absent, Broken, Draw, applies, law

if TYPE_CHECKING:
    import pytest

GROUPS: dict[str, tuple[Property, ...]] = {
    "matching": matching.LAWS,
    "function": function.LAWS,
    "parameters": parameters.LAWS,
    "weights": weights.LAWS,
    "routing": routing.LAWS,
    "life": lifecycle.LAWS,
}
ONCE = (function.it_compiles_whole,)  # seconds an example, and one tells nearly all
PROPERTIES: dict[str, Property] = {p.__name__: p for laws in GROUPS.values() for p in laws}


@contextmanager
def plain_path() -> Iterator[None]:
    """With gradients, and without the fused kernels of nn.TransformerEncoder.

    (They are not taken where parts are.) Modes and random numbers are the caller's again after it.
    """
    with preserved(), torch.inference_mode(False), torch.enable_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        yield


TROUBLE = "S does not run: see it_runs"


class Verdict(NamedTuple):
    """What came of one property: "holds", "broken", "expected" (to fail, and did) or "absent"."""

    name: str
    group: str
    outcome: str
    examples: int
    seconds: float
    told: str = ""


class Report:
    """What came of all properties. Prints as a table; `raise_broken()` raises if one is broken."""

    def __init__(self, about: str, verdicts: list[Verdict]) -> None:
        self.about, self.verdicts = about, verdicts

    @property
    def broken(self) -> list[Verdict]:
        """The properties that do not hold, and were not expected to fail."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "broken"]

    def raise_broken(self) -> Report:
        """Itself where all is well. Raises Broken, with every message, if a property is broken."""
        if self.broken:
            raise Broken("\n\n".join(verdict.told for verdict in self.broken))
        return self

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = [
            (v.group, v.name, v.outcome, v.examples, f"{v.seconds:.2f}", _short(v))
            for v in self.verdicts
        ]
        words = {"holds": "hold", "broken": "broken", "expected": "expected", "absent": "absent"}
        count = {word: sum(v.outcome == o for v in self.verdicts) for o, word in words.items()}
        some = ", ".join(f"{n} {word}" for word, n in count.items() if n)
        total = sum(v.examples for v in self.verdicts)
        seconds = sum(v.seconds for v in self.verdicts)
        notes = [f"{some}; {total} examples in {seconds:.1f} s"]
        notes += [f"\n{v.told}" for v in self.broken]
        columns = ("group", "property", "outcome", "examples", "s", "")
        return str(Table(self.about, columns, rows, notes))

    def __repr__(self) -> str:
        return f"<report: {len(self.broken)} of {len(self.verdicts)} properties are broken>"


def _short(verdict: Verdict) -> str:
    return "" if verdict.outcome == "broken" else verdict.told


def check(
    model: nn.Module | Callable[[], nn.Module],
    rules: Rules,
    inputs: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    examples: int = 5,
    only: Iterable[str] = (),
) -> Report:
    """Try every property of the suite on a model, rules and inputs; returns a report.

    model              a module, which is copied, or a function that builds one
    rules              as `apply` takes them
    inputs             a tensor, a tuple or a dict for one forward, or a function that gives one;
                       with two samples or more, so that mixing them can be seen
    expected_failures  {name of a property: why it need not hold here}
    examples           how many to try of each property
    only               names of properties, or of groups; none: all

    Models are tried in float64 (in their own dtype where they do not run in it), in eval mode, on
    copies. Raises RuleError on a property that does not exist, and what `apply` raises where the
    rules do not fit the model.

    >>> from surgery import adapter, at, parallel
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> rules = at("0", parallel(adapter(rank=2)))
    >>> report = check(model, rules, torch.randn(2, 8), only=["revert_is_exact"])
    >>> report.raise_broken().verdicts[0].outcome
    'holds'
    """
    excused = _excused(expected_failures)
    chosen = _chosen([only] if isinstance(only, str) else [*only]) or PROPERTIES
    if examples < 1:
        raise RuleError(f"examples={examples}", "nothing would be tried.", "Give 1 or more.")
    case = _case(model, rules, inputs)
    verdicts = [judged(name, case, examples, excused.get(name)) for name in chosen]
    return Report(f"{case!r}", verdicts)


def judged(name: str, case: Case, examples: int, excuse: str | None = None) -> Verdict:
    """What comes of one property."""
    run, start = Run(PROPERTIES[name], case, examples), time.perf_counter()
    try:
        run()
        outcome, told = "holds", f"though expected to fail: {excuse}" if excuse else ""
    except Absent as absent:
        outcome, told = "absent", str(absent)
    except Broken as broken:
        outcome, told = ("expected", excuse) if excuse else ("broken", str(broken))
    except HypothesisException as error:
        outcome, told = "absent", f"no example could be drawn: {error}"
    group = next(group for group, laws in GROUPS.items() if PROPERTIES[name] in laws)
    return Verdict(name, group, outcome, run.examples, time.perf_counter() - start, told)


class Run:
    """One property on one case: call it to try examples, and to shrink the first that fails.

    Raises Broken with the law, the place, the values and the smallest example; Absent where the law
    said nothing for any of the examples.
    """

    def __init__(self, prop: Property, case: Case, examples: int, thorough: bool = False) -> None:
        self.prop, self.case, self.thorough = prop, case, thorough
        self.most = 1 if prop in ONCE else examples
        self.examples, self.spoken = 0, 0
        self.absent: Absent | None = None

    def __call__(self) -> None:
        phases = (Phase.generate, Phase.shrink)
        options = settings(
            max_examples=self.most, deadline=None, database=None, derandomize=not self.thorough,
            suppress_health_check=list(HealthCheck), phases=phases, print_blob=False,
            report_multiple_bugs=False,
        )  # fmt: skip
        try:
            options(given(st.data())(self._one))()
        except Broken as broken:
            broken.__dict__.pop("__notes__", None)  # of hypothesis, in words of its own
            raise
        except FlakyFailure as flaky:  # it fails for an example, and then does not
            first = next((e for e in flaky.exceptions if isinstance(e, Broken)), flaky)
            raise Broken(f"{first}\n  (not each time that this example is tried)") from flaky
        if self.absent and not self.spoken:
            raise self.absent

    def _one(self, data: Any) -> None:
        draw = Draw(data)
        self.examples += 1
        try:
            with plain_path():
                applies(self.prop is function.it_runs or not self.case.trouble, TROUBLE)
                self.prop(self.case, draw)
            self.spoken += 1
        except Absent as absent:
            self.absent = absent
        except HypothesisException:
            raise
        except Exception as error:
            raise Broken(_message(self.prop, error, draw)) from error


def _message(prop: Property, error: Exception, draw: Draw) -> str:
    fact = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
    smallest = f"\n  smallest example: {draw}" if draw.chosen else ""
    return f"{prop.__name__} is broken: {law(prop)}\n  {fact}{smallest}"


def _case(model: Any, rules: Rules, inputs: Any) -> Case:
    """The case; rules that do not fit the model are an error of their own."""
    with plain_path():
        case = Case(model, rules, inputs)
        _ = case.places
    return case


def _excused(expected_failures: Mapping[str, str] | None) -> dict[str, str]:
    if not isinstance(expected_failures, (Mapping, type(None))):
        raise RuleError(
            "expected_failures", "it is no mapping.", 'Give {"name of a property": "why"}.'
        )
    excused = dict(expected_failures or {})
    _chosen([*excused])
    return excused


def _chosen(names: list[str]) -> dict[str, Property]:
    """The properties of these names; the name of a group stands for all in it."""
    names = [n for name in names for n in ([p.__name__ for p in GROUPS.get(name, ())] or [name])]
    for name in names:
        if name not in PROPERTIES:
            near = nearest_names(name, PROPERTIES)
            raise RuleError(
                f'"{name}"', "the suite has no property of this name.",
                f"Nearest: {near}." if near else f"All: {', '.join(PROPERTIES)}.",
            )  # fmt: skip
    return {name: PROPERTIES[name] for name in names}


def specify(
    *,
    model: nn.Module | Callable[[], nn.Module],
    rules: Rules,
    inputs: Any,
    expected_failures: Mapping[str, str] | None = None,
    examples: int = 5,
) -> pytest.MarkDecorator:
    """Make a test function that takes `property` into one pytest id for each property.

    Takes what `check` takes; the model is built once, when the first test runs. Properties that say
    nothing of this model are skipped with the reason, expected failures are xfails.

    >>> import torch
    >>> from surgery import adapter, at, ffn, parallel
    >>> @specify(model=lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    ...          rules=at(ffn, parallel(adapter(rank=2))), inputs=torch.randn(2, 5, 16))
    ... def test_mine(property):
    ...     property()
    """
    import pytest

    excused = _excused(expected_failures)
    held: list[Case] = []

    def case() -> Case:
        if not held:
            held.append(_case(model, rules, inputs))
        return held[0]

    def test(name: str) -> Callable[[], None]:
        def property() -> None:
            try:
                Run(PROPERTIES[name], case(), examples)()
            except Absent as absent:
                pytest.skip(str(absent))

        return property

    def marks(name: str) -> list[Any]:
        return [pytest.mark.xfail(reason=excused[name], raises=Broken)] if name in excused else []

    ids = [pytest.param(test(name), id=name, marks=marks(name)) for name in PROPERTIES]
    return pytest.mark.parametrize("property", ids)
