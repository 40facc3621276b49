"""What every property is about: a model, rules for it, and the inputs of one forward."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from functools import cached_property
from types import MethodType
from typing import Any, TypeAlias, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import call, copied, tensors_in
from ..engine.apply import parameters
from ..engine.hooks import HookedSite
from ..engine.matching import flatten_rules
from ..engine.operation import Operation, operations
from ..engine.planning import Plan, plan
from ..engine.switch import Balance
from ..engine.tokens import Action
from ..errors import RuleError, SurgeryError
from ..rules.rule import Rule, Rules
from ..rules.selector import Selector
from ..structure.module_tree import Site
from .fault_injection import Line, events
from .laws import Draw
from .snapshot import real

SEEDS = st.integers(0, 99)
FLAGS = st.lists(st.booleans(), min_size=1, max_size=4)  # dealt out in turn
T = TypeVar("T")


class Case:
    """A model m, rules R, and inputs x; S is m operated by R.

    model   a module, or a function that builds one; every property gets a copy of its own
    inputs  a tensor, a tuple or a dict, or a function that gives one
    dtype   of the model and the inputs; where the model does not run in it, its own

    Models are in eval mode. What feeds what (`example=`) is read off a forward on the inputs, and
    rules are applied without the proof that `apply(example=)` makes: here the properties are it.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        rules: Rules,
        inputs: Any,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        built = model() if callable(model) and not isinstance(model, nn.Module) else model
        if not isinstance(built, nn.Module):
            kind = type(built).__name__
            raise RuleError(f"model={kind}", "this is no model.", "Give one, or what builds one.")
        given = inputs() if callable(inputs) and not isinstance(inputs, Tensor) else inputs
        self.rules = flatten_rules(rules)
        self._model, self._inputs = _runs(built, given, dtype)
        self._copy = _copier(self._model)
        self._facts: dict[Callable[[Case, nn.Module], object], Any] = {}

    def under(self, rules: Rules) -> Case:
        """The same m and x under other rules; what is known of m alone is shared."""
        case = copy.copy(self)
        for name, value in vars(Case).items():
            if isinstance(value, cached_property):
                case.__dict__.pop(name, None)
        case.rules = flatten_rules(rules)
        return case

    def of_base(self, fact: Callable[[Case, nn.Module], T]) -> T:
        """A fact about m alone, found once whatever the rules."""
        if fact not in self._facts:
            self._facts[fact] = fact(self, self.model())
        known: T = self._facts[fact]
        return known

    def __repr__(self) -> str:
        return f"<{type(self._model).__name__}, {self.rules!r}>"

    def model(self) -> nn.Module:
        """A fresh copy of m."""
        return self._copy()

    def twin(self, operated: nn.Module) -> nn.Module:
        """A fresh copy of m, frozen where S is: torch rounds attention by the flags of weights."""
        model, flags = self.model(), dict(operated.named_parameters(remove_duplicate=False))
        for name, p in model.named_parameters(remove_duplicate=False):
            p.requires_grad_(flags[name].requires_grad)
        return model

    def inputs(self) -> Any:
        """A fresh copy of x."""
        return copied(self._inputs)

    def plan(self, model: nn.Module, rules: Rules | None = None, **named: Any) -> Plan:
        """The plan for a model, with what a forward on the inputs tells."""
        made = self._plan(model, rules, **named)
        _ = made.parts
        return made

    def _plan(
        self,
        model: nn.Module,
        rules: Rules | None,
        seed: int = 0,
        name: str = "default",
        balance: Balance = None,
    ) -> Plan:
        """The same without sketches of the parts: what `apply` carries out."""
        kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
        example = floats(self.inputs(), kinds[0]) if kinds else self.inputs()
        rules = self.rules if rules is None else rules
        return Plan(model, rules, seed=seed, name=name, balance=balance, example=example)

    @cached_property
    def needs_example(self) -> bool:
        """Whether a forward tells other places for the rules than modules do."""
        told, alone = self.plan(self.model()).record["rows"], None
        with suppress(SurgeryError):
            alone = plan(self.model(), self.rules).record["rows"]
        return told != alone

    def operated(
        self,
        model: nn.Module | None = None,
        rules: Rules | None = None,
        *,
        stirred: int | None = None,
        **named: Any,
    ) -> nn.Module:
        """S: the model (a copy of m) operated; `stirred` is a seed of values for all it trains."""
        model = self.model() if model is None else model
        self._plan(model, rules, **named).apply()
        if stirred is not None:
            stir(model, stirred)
        return model

    def outputs(self, model: nn.Module, inputs: Any = None) -> list[Tensor]:
        """The tensors of a model's answer, without gradients."""
        with torch.no_grad():
            answer = call(model, self.inputs() if inputs is None else inputs)
            return [real(tensor.detach().clone()) for tensor in tensors_in(answer)]

    def loss(self, model: nn.Module, seed: int = 0) -> Tensor:
        """A scalar in which every floating output counts with a weight of its own."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(())
        for tensor in map(real, tensors_in(call(model, self.inputs()))):
            if tensor.is_floating_point() and tensor.requires_grad:
                weight = torch.randn(tensor.shape, generator=generator).to(tensor)
                term = (tensor.nan_to_num(0, 0, 0) * weight).sum()
                total = total + term
        return total if total.requires_grad else total.requires_grad_()

    @cached_property
    def trouble(self) -> str | None:
        """The error of a forward of S and its gradient, in words; None where there is none."""
        for stirred in (None, 0):
            try:
                with torch.enable_grad():
                    self.loss(self.operated(stirred=stirred)).backward()  # type: ignore[no-untyped-call]
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return None

    @cached_property
    def places(self) -> list[tuple[Rule, Site]]:
        """(rule, site) for every place that a rule matches."""
        made = self.plan(self.model())
        return [(rule, site) for rule, sites in made.matches for site in sites]

    @cached_property
    def lines(self) -> list[Line]:
        """Every line of surgery that applying the rules runs, in order, with its caches filled."""
        self.operated()
        return events(self.plan(self.model()).apply)

    @cached_property
    def patterns(self) -> list[Selector]:
        """Where the rules say."""
        return [rule.where for rule in self.rules]


def stir(model: nn.Module, seed: int) -> None:
    """Other values for all that is trained: parts well away from zero, the base hardly moved."""
    generator = torch.Generator().manual_seed(seed)
    own = {id(p) for operation in operations(model) for p in operation.parameters()}
    with torch.no_grad():
        for p in parameters(model):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.add_(noise, alpha=0.2 if id(p) in own else 0.01)


def mark(model: nn.Module, flags: Sequence[bool]) -> None:
    """Training flags and `requires_grad` of both kinds, in turn, and a hook of the user's own."""
    for i, module in enumerate(model.modules()):
        module.training = flags[i % len(flags)]
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(flags[i % len(flags)] and p.is_floating_point())
    model.register_forward_hook(_user_hook)


def _user_hook(module: nn.Module, args: Any, output: Any) -> None:
    return None


def operation(model: nn.Module) -> Operation:
    """The last operation on a model."""
    return operations(model)[-1]


def actions(model: nn.Module) -> list[tuple[HookedSite, Action]]:
    """Every part where it is joined."""
    return [
        (hooked, action) for hooked in operation(model).hooked_sites for action in hooked.actions
    ]


def train(case: Case, model: nn.Module, times: int = 3) -> None:
    """A few steps of AdamW on everything that asks for a gradient, in training mode."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=0.01)
    model.train()
    for seed in range(times):
        optimiser.zero_grad()
        case.loss(model, seed).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.eval()


def floats(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating tensors in a dtype."""
    change = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return pytree.tree_map(change, inputs)


def _runs(model: nn.Module, inputs: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A copy of the model, and its inputs, in the dtype if it runs in it."""
    try:
        own = copy.deepcopy(model).eval()
    except Exception as error:
        kind = type(model).__name__
        remedy = "The suite works on copies: give a model that copy.deepcopy can copy."
        raise RuleError(kind, f"it cannot be copied: {error}.", remedy) from error
    try:
        cast, given = copy.deepcopy(own).to(dtype), floats(copied(inputs), dtype)
        with torch.no_grad():
            call(cast, copied(given))
        return cast, given
    except Exception:
        with torch.no_grad():
            call(own, copied(inputs))  # an error of the model itself passes through
        return own, copied(inputs)


class _Pickler(pickle.Pickler):
    """Pickles a model without its tensors, as far as that is what copy.deepcopy does."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 4)  # the protocol of copy.deepcopy
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return len(self.tensors) - 1
        own_way = hasattr(type(value), "__deepcopy__") and not isinstance(value, Enum)
        if own_way or isinstance(value, MethodType):  # pickle looks a method up by its name
            raise pickle.PicklingError(f"deepcopy copies a {type(value).__name__} otherwise")
        return None


class _Unpickler(pickle.Unpickler):
    """Reads such a model with the given tensors."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        return self.tensors[place]


def _copier(model: nn.Module) -> Callable[[], nn.Module]:
    """Makes deep copies of a model; of most models in a fifth of the time that deepcopy takes."""
    file = io.BytesIO()
    pickler = _Pickler(file)

    def unpickled() -> nn.Module:
        file.seek(0)
        model_copy: nn.Module = _Unpickler(file, copy.deepcopy(pickler.tensors)).load()
        return model_copy

    try:
        pickler.dump(model)
        unpickled()
    except Exception:  # it holds a closure, or a class that no module names
        return lambda: copy.deepcopy(model)
    return unpickled


Property: TypeAlias = Callable[[Case, Draw], None]
