"""A model as a file for engines that know nothing of it, seen to give the model's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter, getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ._files import write_whole
from ._inputs import call, tensors_in
from ._resolve import missing
from .errors import OperationError, SurgeryError

Program = Any  # a torch.export.ExportedProgram: importing that takes a second
Answer = Callable[[Any], Iterable[Tensor]]
OF_WEIGHTS = ("linalg_", "cdist", "kthvalue")  # of weights alone it needs no operator in ONNX
MOST = 2**31  # bytes of an ONNX file


def export(model: nn.Module, inputs: Any, path: Path, to: str, tolerance: float = 1e-4) -> float:
    """Write a model, in eval mode, for batches of any size; how far its answers are off.

    inputs  a tensor, a tuple or a dict of tensors, of two samples or more on the first axis of each
    to      "onnx", which onnxruntime runs here, or "pt2" (torch.export)

    It is compared on all the samples and on the first alone, relative to the largest number of each
    answer. Raises OperationError where the format has not what the model does, and where an answer
    is further off than `tolerance`; nothing is written then.
    """
    model.eval()
    off: list[float] = []

    def write(half: Path) -> None:
        answer = WRITERS[to](_program(model, inputs), inputs, half)
        for given in (inputs, pytree.tree_map(lambda x: x[:1], inputs)):
            off.append(_off(answer(given), tensors_in(call(model, given))))
        if not max(off) <= tolerance:
            raise OperationError(
                f"surgery export --to {to}",
                f"the file's answers are {max(off):.1e} of the largest number off the model's.",
                "Nothing was written: what depends on draws, or on earlier calls, has no file.",
            )

    with torch.no_grad():
        write_whole(path, write)
    return max(off)


def _program(model: nn.Module, inputs: Any) -> Program:
    """What torch.export makes of it, for batches of any size."""
    leaves = pytree.tree_leaves(inputs)
    if not all(isinstance(x, Tensor) and x.dim() and x.shape[0] > 1 for x in leaves):
        told = ", ".join(str(tuple(getattr(x, "shape", [type(x).__name__]))) for x in leaves)
        raise OperationError(
            "surgery export",
            f"its inputs are {told}: which axis is the batch's does not show.",
            "Give --inputs: tensors, each of two samples or more on its first axis.",
        )
    batch = torch.export.Dim("batch", min=1, max=2**16)
    shapes = pytree.tree_map(lambda x: {0: batch}, inputs)
    args, kwargs = inputs, None
    if isinstance(inputs, dict):
        args, kwargs = (), inputs
    elif not isinstance(inputs, tuple):
        args, shapes = (inputs,), (shapes,)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except SurgeryError:
        raise
    except Exception as error:  # of many kinds, by what the model does
        raise OperationError(
            "surgery export",
            f"torch.export does not take it: {type(error).__name__}: {_told(error)}",
            "It may ask what its numbers are, or how many samples it is given: TORCH_LOGS=+dynamic "
            "shows where.",
        ) from error


def _told(error: BaseException) -> str:
    """What it says, in a few lines."""
    return "\n".join(str(error).splitlines()[:4])


def _off(answers: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """How far numbers are from those wanted, relative to the largest of each answer."""
    far = [0.0]
    for a, b in zip(answers, wanted, strict=True):
        difference = a.double() - b.double() if a.shape == b.shape else torch.full((1,), torch.inf)
        far.append(float(difference.abs().max() / b.double().abs().max().clamp(min=1e-30)))
    return float("inf") if any(x != x for x in far) else max(far)


def _pt2(program: Program, inputs: Any, path: Path) -> Answer:
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        run = torch.export.load(file).module()
    return lambda given: tensors_in(call(run, given))


def _onnx(program: Program, inputs: Any, path: Path) -> Answer:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing(error.name or "", "onnx") from error
    size = sum(x.nbytes for x in program.state_dict.values())
    if size >= MOST:
        raise OperationError(
            "surgery export --to onnx",
            f"its weights have {size / 2**30:.1f} GiB, and one file of ONNX holds 2.",
            "Give --to pt2.",
        )
    try:
        made: Any = torch.onnx.export(_worked_out(program, inputs), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise _not_in_onnx(error) from error
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]

    def answer(given: Any) -> Iterable[Tensor]:
        arrays = (x.numpy() for x in pytree.tree_leaves(given))
        told = session.run(None, dict(zip(names, arrays, strict=True)))
        return map(torch.from_numpy, told)

    return answer


WRITERS = {"onnx": _onnx, "pt2": _pt2}


def _not_in_onnx(error: BaseException) -> OperationError:
    while error.__cause__ is not None:
        error = error.__cause__
    return OperationError(
        "surgery export --to onnx",
        f"torch has no ONNX for what the model does: {_told(error)}",
        "Give --merge where its parts are linear, or --to pt2, which has all that torch has.",
    )


def _worked_out(program: Program, inputs: Any) -> Program:
    """The same, but that what ONNX has not, of weights alone, is worked out (LoReFT's QR)."""
    module: Any = program.module()
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node] = attrgetter(node.target)(module)
        elif {*node.all_input_nodes} <= known.keys() and _is_fixed(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    wanted = [node for node in known if _last_of_weights(node)]
    for i, node in enumerate(wanted):
        module.register_buffer(f"worked_out_{i}", known[node])
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(f"worked_out_{i}"))
    if not wanted:
        return program
    module.graph.eliminate_dead_code()
    module.recompile()
    return _program(module, inputs)


def _is_fixed(node: fx.Node) -> bool:
    """Whether it gives the same for the same, and changes nothing."""
    if node.target is getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in node.target.tags
    return not (drawn or node.target._schema.is_mutable)


def _last_of_weights(node: fx.Node) -> bool:
    """Whether it gives a tensor that ONNX could not work out."""
    made = node.args[0] if node.target is getitem else node
    name = getattr(getattr(made, "target", None), "_opname", "")
    return name.startswith(OF_WEIGHTS) and isinstance(node.meta.get("val"), Tensor)
