"""What can be seen of a model and of tensors, and how two of them differ, in words and in eps."""

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
    differ = [m for m in marks if before.get(m, "nothing") != after.get(m, "nothing")]
    told = "; ".join(
        _change(m, before.get(m, "nothing"), after.get(m, "nothing")) for m in differ[:4]
    )
    more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
    holds(not differ, f"{when} changed {told}{more}")


def _change(mark: str, was: object, now: object) -> str:
    shown = [repr(value) for value in (was, now)]
    small = all(len(text) <= 60 for text in shown) and not isinstance(was, bytes)
    return f"{mark} (from {shown[0]} to {shown[1]})" if small else mark


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
    want, was = list(answer()), [t.detach().clone() for t in moved]
    generator, far = torch.Generator().manual_seed(0), 0.0
    try:
        for _ in range(3):
            for tensor, value in zip(moved, was, strict=True):
                ulps = torch.randint(-1, 2, value.shape, generator=generator).to(value)
                tensor.detach().copy_(value + ulps * value.abs() * torch.finfo(value.dtype).eps)
            far = max([far, *(gap(a, b) for a, b in zip(answer(), want, strict=True))])
    finally:
        for tensor, value in zip(moved, was, strict=True):
            tensor.detach().copy_(value)
    return max(most, 4 * far)


def used(part: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a part, and of what it was lent, which is no child of it."""
    yield from part.parameters()
    for module in part.modules():
        for lent in vars(module).values():
            if isinstance(lent, nn.Module):
                yield from used(lent)


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
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return float("inf")
    far = (a - b)[finite].abs().max() if finite.any() else a.new_zeros(())
    size = (b[finite] if size is None else size).abs()
    unit = torch.finfo(a.dtype).eps * (size.max() if size.numel() else size.new_zeros(()))
    return (far / unit).item() if unit > 0 else (0.0 if far == 0 else float("inf"))


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
    groups: dict[int, set[str]] = {}
    for path, module in named_modules(model, aliases=True):
        groups.setdefault(id(module), set()).add(path)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                groups.setdefault(id(tensor), set()).add(f"{path}.{name}".strip("."))
    return {frozenset(group) for group in groups.values() if len(group) > 1}


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
