"""How two snapshots differ, of a model or of tensors, in words and in eps.

A snapshot of a model is its `fingerprint`; one of what it computes is a list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .._preserve import Marks
from ..structure.layers import named_modules
from .laws import Broken, holds

SITE, MODEL = 4, 16  # eps: what rounding may do at one site, and in a whole model


def unchanged(before: Marks, after: Marks, when: str, but: Sequence[str] = ()) -> None:
    """Raise Broken unless two snapshots are equal, leaving out marks that contain a word of `but`.

    Says which marks differ, and from what to what where that can be read.
    """
    marks = [m for m in {**before, **after} if not any(word in m for word in but)]
    changes = {m: (before.get(m, "nothing"), after.get(m, "nothing")) for m in marks}
    changes = {m: (was, now) for m, (was, now) in changes.items() if was != now}
    words = "; ".join(_change(m, *values) for m, values in [*changes.items()][:4])
    more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
    holds(not changes, f"{when} changed {words}{more}")


def _change(mark: str, was: object, now: object) -> str:
    texts = [repr(value) for value in (was, now)]
    readable = all(len(text) <= 60 for text in texts) and not isinstance(was, bytes)
    return f"{mark} (from {texts[0]} to {texts[1]})" if readable else mark


# tensors ---------------------------------------------------------------------------------------


def real(t: Tensor) -> Tensor:
    """A tensor as it is, a complex one as pairs of numbers."""
    return torch.view_as_real(t) if t.is_complex() else t


def rounding(
    answer: Callable[[], Sequence[Tensor]], numbers: Iterable[Tensor], most: float
) -> float:
    """What rounding may do to an answer, in eps: `most`, or more where sums are long.

    Four times as far as the answer moves when each of some numbers moves by a unit of rounding,
    the largest of three draws: another order of the sums in it does about that.
    """
    moved = [t for t in numbers if t.is_floating_point()]
    want, values = list(answer()), [t.detach().clone() for t in moved]
    generator, far = torch.Generator().manual_seed(0), 0.0
    try:
        for _ in range(3):
            for tensor, value in zip(moved, values, strict=True):
                ulps = torch.randint(-1, 2, value.shape, generator=generator).to(value)
                tensor.detach().copy_(value + ulps * value.abs() * torch.finfo(value.dtype).eps)
            far = max([far, *(gap(a, b) for a, b in zip(answer(), want, strict=True))])
    finally:
        for tensor, value in zip(moved, values, strict=True):
            tensor.detach().copy_(value)
    return max(most, 4 * far)


def used(part: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a part, and of what it borrows, which is no child of it."""
    yield from part.parameters()
    for module in part.modules():
        for borrowed in vars(module).values():
            if isinstance(borrowed, nn.Module):
                yield from used(borrowed)


def gap(a: Tensor, b: Tensor, size: Tensor | None = None) -> float:
    """max |a - b| in units of eps(dtype) * max |b| (or |size|); inf where they are not alike.

    >>> gap(torch.tensor([1.0 + 2**-23]), torch.tensor([1.0]))
    1.0
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b) or a.numel() == 0:
        return 0.0
    if not a.is_floating_point():
        return float("inf")
    finite = a.isfinite() & b.isfinite()
    if not _alike_where_not(finite, a, b):
        return float("inf")
    far = _largest((a - b)[finite])
    unit = torch.finfo(a.dtype).eps * _largest(b[finite] if size is None else size)
    return (far / unit).item() if unit > 0 else (0.0 if far == 0 else float("inf"))


def _alike_where_not(finite: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are NaN, inf and -inf in the same places."""
    infinities = a[~finite].nan_to_num(), b[~finite].nan_to_num()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*infinities)


def _largest(t: Tensor) -> Tensor:
    return t.abs().max() if t.numel() else t.new_zeros(())


def equal(a: Sequence[Tensor], b: Sequence[Tensor], what: str) -> None:
    """Raise Broken unless two lists of tensors are equal to the bit."""
    near(a, b, 0, what)


def near(a: Sequence[Tensor], b: Sequence[Tensor], eps: float, what: str) -> None:
    """Raise Broken unless a ~eps b, pair by pair: max |a - b| <= eps * eps(dtype) * max |b|."""
    holds(len(a) == len(b), f"{what}: {len(a)} tensors, not {len(b)}")
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        far = gap(x, y)
        if not far <= eps:
            which = f"{what}, tensor {i}" if len(a) > 1 else what
            raise Broken(f"{which}: {_far(x, y, far)}" + (f", more than {eps:g}" if eps else ""))


def _far(x: Tensor, y: Tensor, far: float) -> str:
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{tuple(x.shape)} {x.dtype}, not {tuple(y.shape)} {y.dtype}"
    if not x.is_floating_point():
        return f"{(x != y).sum().item()} of {x.numel()} values differ"
    gaps = (x - y).abs().nan_to_num(float("inf"))
    at = int(gaps.argmax())
    values = f"{x.flatten()[at].item():.6g} instead of {y.flatten()[at].item():.6g}"
    return f"{values}, {far:.3g} eps apart"


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The groups of paths that lead to one and the same module, parameter or buffer of the base."""
    paths: dict[int, set[str]] = {}
    for path, module in named_modules(model, aliases=True):
        paths.setdefault(id(module), set()).add(path)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                paths.setdefault(id(tensor), set()).add(f"{path}.{name}".strip("."))
    return {frozenset(group) for group in paths.values() if len(group) > 1}


def raised(
    kind: type[BaseException], call: Callable[[], object], when: str = "the call"
) -> BaseException:
    """The error of that kind that `call` raises; Broken where it raises none, or another."""
    try:
        call()
    except kind as error:
        return error
    except Exception as other:
        raise Broken(f"{when}: {type(other).__name__}, not {kind.__name__}: {other}") from other
    raise Broken(f"{when}: no {kind.__name__} was raised")
