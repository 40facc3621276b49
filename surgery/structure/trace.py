"""What feeds what: one forward of a model, recorded as a graph of operations on tensors.

The module tree tells what a model is made of, not in which order it runs. A trace does: it runs
the model once and keeps every operation, the parameters it used and the modules it ran in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .._inputs import call, copied
from .._preserve import preserved
from ..errors import OperationError
from .layers import held_weights


class Value:
    """A tensor at one moment: an operation that writes into a tensor makes a new value of it.

    number      its place in the order in which values were made
    shape       its sizes
    op          the operation that made it; None for parameters, constants and the example
    uses        the operations that read it
    floats      whether its numbers are no whole ones; complex ones (spectra, rotary pairs) count
    weights     the parameters it is made of; None where the example or features went into it
    is_feature  whether it is made of the example, and no index or mask
    """

    __slots__ = ("floats", "number", "op", "shape", "uses", "weights")

    def __init__(self, number: int, tensor: torch.Tensor, weights: Weights | None) -> None:
        self.number, self.shape, self.weights = number, tuple(tensor.shape), weights
        self.floats = tensor.is_floating_point() or tensor.is_complex()
        self.op: Op | None = None
        self.uses: list[Op] = []

    @property
    def is_feature(self) -> bool:
        return self.weights is None and self.floats

    def __repr__(self) -> str:
        return f"<{self.op.name if self.op else 'given'} {list(self.shape)}>"


class Weight:
    """A parameter, with all the modules that hold it (more than one where it is tied)."""

    __slots__ = ("holders", "name", "shape")

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.holders: list[nn.Module] = []

    def owner(self, op: Op) -> nn.Module:
        """The module that holds it, the one that runs before one that does not."""
        running = {id(call.module) for call in op.stack()}
        return next((m for m in self.holders if id(m) in running), self.holders[0])


Weights = frozenset[Weight]


class Call:
    """One call of a module: the call around it, and the values it took and gave."""

    __slots__ = ("inputs", "module", "outer", "outputs")

    def __init__(self, module: nn.Module, outer: Call | None, inputs: list[Value]) -> None:
        self.module, self.outer, self.inputs = module, outer, inputs
        self.outputs: list[Value] = []


class Op:
    """One call of a torch function; `args` and `kwargs` hold values where it was given tensors."""

    __slots__ = ("args", "call", "inputs", "kwargs", "name", "outputs")

    def __init__(self, name: str, call: Call | None, args: Any, kwargs: Any) -> None:
        self.name, self.call, self.args, self.kwargs = name, call, args, kwargs
        self.inputs: list[Value] = list(_pick((args, kwargs), Value))
        self.outputs: list[Value] = []

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.inputs))})"

    def stack(self) -> Iterator[Call]:
        """The calls it ran in, innermost first."""
        call = self.call
        while call is not None:
            yield call
            call = call.outer

    @property
    def features(self) -> list[Value]:
        """The inputs that are features."""
        return [value for value in self.inputs if value.is_feature]

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


def names(text: str) -> frozenset[str]:
    """Names of operations, written with spaces between."""
    return frozenset(text.split())


MOVES = names(  # what leaves features as they are, or puts them elsewhere, or within limits
    "view reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze "
    "unsqueeze contiguous clone to float half bfloat16 double type type_as detach alias data t T "
    "mT H mH expand expand_as repeat tile chunk split tensor_split split_with_sizes unbind narrow "
    "select getitem index_select index_put index_add index_copy masked_scatter scatter scatter_add "
    "setitem gather take_along_dim index copy slice_scatter select_scatter masked_select "
    "masked_fill nan_to_num clamp clip where roll pad flip cat concat concatenate stack hstack "
    "vstack view_as reshape_as cuda cpu as_strided dropout dropout1d dropout2d dropout3d "
    "feature_dropout alpha_dropout feature_alpha_dropout identity pixel_shuffle pixel_unshuffle "
    "repeat_interleave broadcast_to column_stack vsplit hsplit dsplit as_subclass _join"
)
JOINS = names("cat concat concatenate hstack vstack")
SUMS = names("add sub rsub subtract addcmul")
SCALES = names("mul multiply div true_divide divide rmul rdiv")
CONV_OPS = names("conv1d conv2d conv3d")
NORM_AXES = {  # what normalises, with the axis that features lie on
    "layer_norm": -1,
    "rms_norm": -1,
    "batch_norm": 1,
    "group_norm": 1,
    "instance_norm": 1,
}


def is_cheap(op: Op) -> bool:
    """Whether features stay what they are: views, dropout, limits, residual sums, scales."""
    if op.name in MOVES or op.name in SUMS:
        return True
    return op.name in SCALES and len(op.features) == 1


class Trace:
    """One forward of a model. `trace(model, example)` makes it.

    paths    where each module stands, by its id
    ops      all operations on tensors, in the order in which they ran
    calls    all calls of modules, in the order in which they began
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
        self.ops: list[Op] = []
        self.calls: list[Call] = []

    def path(self, module: nn.Module) -> str:
        """Where a module stands, "?" where the model does not hold it."""
        return self.paths.get(id(module), "?")

    def calls_of(self, module: nn.Module | str) -> list[Call]:
        """The calls of one module, itself or its path, in the order in which they began."""
        wanted = self.model.get_submodule(module) if isinstance(module, str) else module
        return self._calls_by_module.get(id(wanted), [])

    @cached_property
    def _calls_by_module(self) -> dict[int, list[Call]]:
        grouped: dict[int, list[Call]] = {}
        for module_call in self.calls:
            grouped.setdefault(id(module_call.module), []).append(module_call)
        return grouped


def upstream(values: Iterable[Value], through: Callable[[Op], bool] = is_cheap) -> Iterator[Value]:
    """The values that `values` come from through such operations, the last made first."""
    seen = set(values)
    queue = [(-value.number, value) for value in seen]
    heapify(queue)
    while queue:
        value = heappop(queue)[1]
        yield value
        if value.op is not None and through(value.op):
            for source in value.op.features:
                if source not in seen:
                    seen.add(source)
                    heappush(queue, (-source.number, source))


def trace(model: nn.Module, example: Any) -> Trace:
    """Run one forward of `model` in eval mode, without gradients, and record what feeds what.

    example  inputs: a tensor, a tuple of positional or a dict of keyword arguments

    Works on the meta device too. Training flags, hooks, buffers, gradients and random numbers
    are afterwards as they were. Raises whatever the model raises.

    >>> traced = trace(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16)), torch.zeros(2, 8))
    >>> [op.name for op in traced.ops]
    ['layer_norm', 'linear']
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise OperationError("trace", "a scripted model cannot be traced.", "Trace its source.")
    recorder = _Recorder(model)
    example = copied(example)
    for tensor in _pick(example, torch.Tensor):
        recorder.know(tensor, recorder.value(tensor, None))
    with preserved(model, modes=True, kept=True), recorder.watching(model):
        _run(model, example, recorder)
    return recorder.trace


def _run(model: nn.Module, example: Any, recorder: _Recorder) -> None:
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), recorder:
        call(model, example)


class _Recorder(TorchFunctionMode):
    """Sees every torch function, as written in the model: one linear, one attention, one op."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace(model)
        self.call: Call | None = None
        self.count = 0
        self.weights: dict[int, tuple[torch.Tensor, Value]] = {}
        self.known: dict[int, tuple[weakref.ref[torch.Tensor], Value]] = {}
        self.handles: list[RemovableHandle] = []
        self.writes: dict[int, Value] = {}  # by storage, the last that was written into it
        for module in model.modules():
            for name, parameter in held_weights(module):
                self._know_weight(module, name, parameter)

    def _know_weight(self, module: nn.Module, name: str, parameter: torch.Tensor) -> None:
        if id(parameter) not in self.weights:
            weight = Weight(name, tuple(parameter.shape))
            value = self.value(parameter, frozenset([weight]))
            self.weights[id(parameter)] = (parameter, value)
        for weight in self.weights[id(parameter)][1].weights or ():
            weight.holders.append(module)

    def value(self, tensor: torch.Tensor, weights: Weights | None) -> Value:
        if tensor.is_nested:
            raise self._nested()
        self.count += 1
        return Value(self.count, tensor, weights)

    def _nested(self) -> OperationError:
        """The error of a tensor without one shape (to_nested, torch.nested.nested_tensor)."""
        module = self.call.module if self.call else self.trace.model
        return OperationError(
            "a forward on the example",
            f"{self.trace.path(module) or 'the model'} ({type(module).__name__}) makes or takes "
            "nested tensors, which have no one shape: what feeds what cannot be read off it.",
            "Give no example; or pad instead, with a mask.",
        )

    def know(self, tensor: torch.Tensor, value: Value) -> None:
        self.known[id(tensor)] = (weakref.ref(tensor), value)

    def recall(self, tensor: torch.Tensor) -> Value:
        """The value a tensor now has: a tensor never seen is a constant."""
        if id(tensor) in self.weights:
            return self.weights[id(tensor)][1]
        reference, value = self.known.get(id(tensor), (None, None))
        if value is None or reference is None or reference() is not tensor:
            value = self.value(tensor, frozenset())
            self.know(tensor, value)
        written = self.writes.get(_storage(tensor)) if self.writes else None
        if written is None or written.number <= value.number:
            return value
        self._record("_join", (value, written), {}, [tensor])
        return self.known[id(tensor)][1]

    def knows(self, tensor: torch.Tensor) -> bool:
        reference = self.known.get(id(tensor), (None,))[0]
        return id(tensor) in self.weights or (reference is not None and reference() is tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op_name(func)
        if name in _QUERIES:
            return func(*args, **kwargs)
        tensors = list(_pick((args, kwargs), torch.Tensor))
        values = _swap(args, self.recall), _swap(kwargs, self.recall)
        versions = [_version(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        written = [t for t, was in zip(tensors, versions, strict=True) if _version(t) != was]
        fresh = [t for t in _pick(result, torch.Tensor) if not self.knows(t)]
        if fresh or written:
            self._record(name, *values, [*fresh, *written])
            for tensor in written:
                self.writes[_storage(tensor)] = self.known[id(tensor)][1]
        return result

    def _record(self, name: str, args: Any, kwargs: Any, results: list[torch.Tensor]) -> None:
        op = Op(name, self.call, args, kwargs)
        weights = _made_of(op)
        for tensor in results:
            value = self.value(tensor, weights)
            value.op = op
            op.outputs.append(value)
            self.know(tensor, value)
        for source in op.inputs:
            source.uses.append(op)
        self.trace.ops.append(op)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep the stack of calls, by hooks on every module, which meanwhile runs in eval mode."""
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # kernels that hide what they do
            for module in model.modules():
                module.training = False
                before, after = module.register_forward_pre_hook, module.register_forward_hook
                self.handles.append(before(self._enter, with_kwargs=True, prepend=True))
                self.handles.append(after(self._leave))
            yield
            self._unwatch()
        except BaseException:  # one that came while taking them off, too
            self._unwatch()
            raise

    def _unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [self.recall(tensor) for tensor in _pick((args, kwargs), torch.Tensor)]
        self.call = Call(module, self.call, inputs)
        self.trace.calls.append(self.call)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        while self.call is not None and self.call.module is not module:
            self.call = self.call.outer  # one that left by an exception
        if self.call is None:
            return
        tensors = list(_pick(result, torch.Tensor))
        unseen = [tensor for tensor in tensors if not self.knows(tensor)]
        if unseen:  # a kernel or script that torch functions are not asked about
            self._record("_opaque", tuple(self.call.inputs), {}, unseen)
        self.call.outputs = [self.recall(tensor) for tensor in tensors]
        self.call = self.call.outer


_QUERIES = names("shape size dim stride dtype device numel requires_grad grad_fn is_nested")
_APPLIES = CONV_OPS | names("linear embedding scaled_dot_product_attention")
_LIKE = names("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full")
_DUNDERS = {"imul": "mul", "iadd": "add", "isub": "sub", "itruediv": "div", "radd": "add"}
_NAMES: dict[Any, str] = {}


def op_name(func: Any) -> str:
    """A plain name: `add` for x + y, x += y and x.add_(y)."""
    if func not in _NAMES:
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)
        name = name.strip("_") if name.startswith("__") else name.rstrip("_")
        _NAMES[func] = _DUNDERS.get(name, name)
    return _NAMES[func]


def _made_of(op: Op) -> Weights | None:
    """The parameters a result is made of; None where features or an application went into it.

    An index picks from what it is put to, and only the shape goes into a tensor like another.
    """
    if op.name in _LIKE:
        return frozenset()
    sources = [value for value in op.inputs if value.floats] or op.inputs
    if op.name in _APPLIES or any(value.weights is None for value in sources):
        return None
    return frozenset().union(*(value.weights or () for value in sources))


def _pick(nested: Any, kind: type) -> Iterator[Any]:
    """Everything of a kind in nested lists, tuples and dicts."""
    if isinstance(nested, kind):
        yield nested
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from _pick(item, kind)
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _pick(item, kind)


def _swap(nested: Any, recall: Callable[[torch.Tensor], Value]) -> Any:
    if isinstance(nested, torch.Tensor):
        return recall(nested)
    if isinstance(nested, dict):
        return {key: _swap(item, recall) for key, item in nested.items()}
    if isinstance(nested, (list, tuple)):
        return [_swap(item, recall) for item in nested]
    return nested


def _storage(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)  # a tensor without a storage of its own: sparse, or inside vmap


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
