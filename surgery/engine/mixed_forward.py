"""The forward of a model of which each row is another operation's: in one, or one for each.

In one where it is seen that rows stay rows at all places: two samples that change places in a batch
change them there, too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._inputs import tensors_in
from ..errors import GraftError
from .features import declared, input_of
from .hooks import HookedSite
from .kinds import PLAIN, kind_of
from .norm_statistics import is_guarded, is_live
from .operation import Operation
from .rows import CLOSE, Rows, not_of_tokens, takes_statistics, unseen

Values = dict[tuple[nn.Module, str], Tensor]


class Layer:
    """The forward of a layer whose tensors are others for each of the rows."""

    def __init__(
        self, module: nn.Module, rows: Rows, values: Sequence[Values], used: Sequence[Operation]
    ) -> None:
        self.module, self.rows, self.path = module, rows, type(module).__name__
        self.used, self.norms = used, [module] if is_guarded(module) else []
        self.values = [
            {place: value for place, value in each.items() if place[0] is module} for each in values
        ]
        self.names: tuple[str, ...] = ()
        self.base = vars(module).get("forward") or type(module).forward.__get__(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.rows.on:
            return self.base(*args, **kwargs)
        for op in self.used[:1]:
            op.streams.refuse_checkpoints(self.path)  # of all operations
        x, _ = input_of(args, kwargs, self)
        each = [*zip(self.values, (*self.used, None), strict=True)]
        if self.rows.all_act:
            if any(is_live(norm, self.used) and _in_training(self.used) for norm in self.norms):
                raise takes_statistics(self.path)
            *outs, rest = [self._run(x, values, op) for values, op in each]
            return self.rows.chosen(rest, self.path, [*enumerate(outs)])
        pieces, join = self.rows.split(x, self.path)
        return join([self._run(x, *its) for x, its in zip(pieces, each, strict=True)])

    def seen(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook that does nothing: torch's fused layers look for any."""

    def _run(self, x: Tensor, values: Values, op: Operation | None) -> Tensor:
        """What it gives; for no rows, no gradient is asked: they were not there."""
        asks = torch.is_grad_enabled() and bool(x.numel())
        with standing(values, self.norms, op), torch.set_grad_enabled(asks):
            y: Tensor = self.base(x)
        return y


@contextmanager
def standing(values: Values, norms: Iterable[nn.Module], op: Operation | None) -> Iterator[None]:
    """While it lasts tensors are these, and norms count where an operation trains them."""
    was = [(norm, norm.training) for norm in norms]
    try:
        for norm, _ in was:
            norm.training = op is not None and is_live(norm, [op]) and _in_training([op])
        for (module, name), value in values.items():
            vars(module)[name] = value
        yield
    finally:
        for module, name in values:
            vars(module).pop(name, None)
        for norm, training in was:
            norm.training = training


def _in_training(used: Sequence[Operation]) -> bool:
    return any(model.training for op in used for model in op.model)


class SizedByData(TorchFunctionMode):
    """Sees whether how many there are of something depends on what it is: tokens of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is Tensor.__getitem__ and any(map(_is_mask, pytree.tree_leaves(args[1:])))
        by_where = func is torch.where and len(args) + len(kwargs or {}) == 1
        self.seen |= func in OF_DATA or by_mask or by_where
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


OF_DATA = {
    torch.nonzero, Tensor.nonzero, torch.argwhere, torch.masked_select, Tensor.masked_select,
    torch.unique, Tensor.unique, torch.bincount, Tensor.bincount, Tensor.tolist,
}  # fmt: skip


class MixedForward:
    """The forward of a model while its rows are mixed."""

    def __init__(
        self,
        model: nn.Module,
        done: list[Operation],
        used: list[Operation],
        rows: Rows,
        values: Sequence[Values],
        layers: Sequence[Layer],
        by_rows: bool,
    ) -> None:
        self.model, self.done, self.rows, self.values = model, done, rows, values
        self.used, self.by_rows = used, by_rows
        sites: list[HookedSite] = [hooked for op in used for hooked in op.hooked_sites]
        ends = [end for site in sites for end in (site.entry, site.exit)]
        self.places = [*dict.fromkeys((*ends, *(layer.module for layer in layers)))]
        shown = done[0].rows_proven.values()
        self.proven = any(all(map(known.get, self.places)) for known in shown)
        self.path, self.names = "", declared(type(model).forward)
        self.base = vars(model).get("forward") or type(model).forward.__get__(model)
        self.__signature__ = inspect.signature(self.base)  # transformers asks what it takes
        self.lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(args, kwargs)
        streams = self.done[0].streams
        with self.lock:  # whose rows a place is given is one for all threads
            self.rows.begin()
            streams.mixes = torch.is_grad_enabled()
            try:
                return self._forward(args, kwargs)
            finally:
                streams.mixes = False

    def _forward(self, args: Any, kwargs: Any) -> Any:
        x, _ = input_of(args, kwargs, self)
        axis = self.rows.axis(x, "", whole=True)
        if not (self.by_rows and self._is_proven(args, kwargs, axis)):
            if self.rows.all_act:
                raise unseen("")
            return self._apart(args, kwargs, axis)
        with self._strengths({*self.used}):
            self.rows.on = True
            try:
                return self.base(*args, **kwargs)
            finally:
                self.rows.on = False

    @contextmanager
    def _strengths(self, active: set[Operation]) -> Iterator[None]:
        was = [operation.strength for operation in self.done]
        try:
            for operation in self.done:
                operation.strength = float(operation in active)
            yield
        finally:
            for operation, strength in zip(self.done, was, strict=True):
                operation.strength = strength

    # whether rows stay rows ----------------------------------------------------------------------

    def _is_proven(self, args: Any, kwargs: Any, axis: int) -> bool:
        """Whether rows are rows at all places, as two forwards of two samples showed or show."""
        if torch.compiler.is_compiling():
            return self.proven
        kind = kind_of(self.model, args, kwargs)
        known = self.done[0].rows_proven.setdefault(kind, {})
        prove = self._see_tokens if self.rows.are_tokens else self._prove
        if not known.keys() >= {*self.places} and not prove(args, kwargs, axis, known):
            return False
        self.proven = all(known[place] for place in self.places)
        return self.proven

    def _other_row(self, args: Any, kwargs: Any, axis: int) -> int | None:
        """The first sample that is not as the first of all."""
        x, _ = input_of(args, kwargs, self)
        differ = (
            i
            for i in range(1, self.rows.of)
            if not torch.equal(x.select(axis, i), x.select(axis, 0))
        )
        return next(differ, None)

    def _prove(self, args: Any, kwargs: Any, axis: int, known: dict[nn.Module, bool]) -> bool:
        """Note of each place whether rows are rows there; False where these rows cannot tell."""
        other = self._other_row(args, kwargs, axis)
        if other is None:
            return False
        order = torch.tensor([0, other], device=self.rows.rest.device)
        two = Rows(torch.tensor([-1, -1]), 0, self.rows.tokens_first, False, order.device)
        with SizedByData() as sizes:
            met = [
                self._met(self._some(args, kwargs, index, axis)) for index in (order, order.flip(0))
            ]
        if not all(t.isfinite().all() for each in met for pair in each.values() for t in pair):
            return False
        for place in self.places:
            a, b = (each.get(place, []) for each in met)
            swapped = 0 < len(a) == len(b) and all(map(_are_swapped, a, b, [two] * len(a)))
            known[place] = swapped and not sizes.seen
        return True

    def _see_tokens(self, args: Any, kwargs: Any, axis: int, known: dict[nn.Module, bool]) -> bool:
        """Raise GraftError where a place is not given, or does not give, the tokens as they lie."""
        met = self._met((args, kwargs))
        for place in self.places:
            there = met.get(place, [])
            if not there or any(t.shape[:2] != self.rows.index.shape for t in there):
                raise not_of_tokens(type(place).__name__, there[0] if there else None)
            known[place] = True
        return True

    def _met(self, given: tuple[Any, Any]) -> dict[nn.Module, list[Tensor]]:
        """What places are given and give in a forward of the base, on some rows."""
        met: dict[nn.Module, list[Tensor]] = {}

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for values in ((args, kwargs), output):
                tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
                met.setdefault(module, []).extend(tensors[:1])

        hooks = [m.register_forward_hook(see, with_kwargs=True) for m in self.places]
        training = [(m, m.training) for m in self.model.modules()]
        try:
            for m, _ in training:
                m.training = False
            with torch.no_grad(), self._strengths(set()):
                self.base(*given[0], **given[1])
        finally:
            for m, mode in training:
                m.training = mode
            for hook in hooks:
                hook.remove()
        return met

    # one for each --------------------------------------------------------------------------------

    def _apart(self, args: Any, kwargs: Any, axis: int) -> Any:
        indices = (*self.rows.each, self.rows.rest)
        runs = [
            (index, self._run(k, self._some(args, kwargs, index, axis)))
            for k, index in enumerate(indices)
            if len(index)
        ]
        leaves, spec = pytree.tree_flatten(runs[0][1])
        each = [pytree.tree_leaves(out) for _, out in runs]
        sizes = [len(index) for index, _ in runs]
        back = torch.cat([index for index, _ in runs]).argsort()
        joined = [_joined([out[i] for out in each], sizes, back, axis) for i in range(len(leaves))]
        return pytree.tree_unflatten(joined, spec)

    def _run(self, k: int, given: tuple[Any, Any]) -> Any:
        """The answer for some rows, where one operation alone, or none, is active."""
        op = self.used[k] if k < len(self.used) else None
        norms = dict.fromkeys(norm for op in self.done for norm in op.norms)
        with self._strengths({*self.used[k : k + 1]}), standing(self.values[k], norms, op):
            return self.base(*given[0], **given[1])

    def _some(self, args: Any, kwargs: Any, index: Tensor, axis: int) -> tuple[Any, Any]:
        """What is given, of some rows. Raises GraftError where that is not to be told."""
        first, _ = input_of(args, kwargs, self)
        objects = [
            leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, PLAIN)
        ]
        if held := [each for each in objects if any(True for _ in tensors_in([each]))]:
            raise _not_of_rows("is given", held[0])

        def some(tensor: Tensor) -> Tensor:
            if tensor is first:
                return tensor.index_select(axis, index)
            return self._of_rows(tensor, index)

        given: tuple[Any, Any] = pytree.tree_map_only(Tensor, some, (args, kwargs))
        return given

    def _of_rows(self, tensor: Tensor, index: Tensor) -> Tensor:
        sizes = [*tensor.shape[:2]]
        if self.rows.of not in sizes:
            return tensor
        if sizes == [self.rows.of] * 2:
            if tensor.dim() == 2 or self.rows.tokens_first:
                raise _not_of_rows("is given", tensor)
            return tensor.index_select(0, index)
        if sizes[0] == self.rows.of:
            return tensor.index_select(0, index)
        return tensor.index_select(1, index) if self.rows.tokens_first else tensor


def _joined(outs: list[Any], sizes: list[int], back: Tensor, axis: int) -> Any:
    """What rows gave, in the order in which they were."""
    if all(out is None for out in outs):
        return None
    for at in dict.fromkeys((axis, 0)):
        if all(
            isinstance(o, Tensor) and o.dim() > at and o.shape[at] == n
            for o, n in zip(outs, sizes, strict=True)
        ):
            return torch.cat(outs, at).index_select(at, back)
    raise _not_of_rows("gives", outs[0])


def _not_of_rows(word: str, value: Any) -> GraftError:
    what = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return GraftError(
        "mixed(model, ...)",
        f"the model {word} {what}, which is not of rows (a loss, a cache, a mask of tokens).",
        "Give and ask for what is of rows: no labels=, use_cache=False.",
    )


def _are_swapped(a: Tensor, b: Tensor, rows: Rows) -> bool:
    """Whether two samples, which have changed places in a batch, have done so in a tensor."""
    if a.shape != b.shape:
        return False
    try:
        axis = rows.axis(a, "")
    except GraftError:
        return False
    half = a.shape[axis] // 2
    swapped = torch.cat([a.narrow(axis, half, half), a.narrow(axis, 0, half)], axis)
    if not a.is_floating_point():
        return torch.equal(swapped, b)
    return bool((swapped - b).abs().max() <= CLOSE * b.abs().max())
