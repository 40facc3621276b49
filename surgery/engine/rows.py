"""One batch of which each row is another operation's: parts meet their own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..rules.affine import factors
from .features import first_tensor, input_of


class Rows:
    """Which rows of a batch of `of` are whose: positions, for each of several.

    tokens_first  whether tokens may lie on the first axis, and samples on the second
    on            whether places act by rows now
    """

    def __init__(self, of: int, each: Sequence[Tensor], rest: Tensor, tokens_first: bool) -> None:
        self.of, self.each, self.rest, self.tokens_first = of, tuple(each), rest, tokens_first
        self.on = False

    def axis(self, x: Tensor, path: str, whole: bool = False) -> int:
        """Where rows lie. Raises GraftError where that is not known.

        whole  whether each is one, and not several (windows, tokens in a row)
        """
        sizes = [*x.shape[:2]]
        if self.tokens_first and len(sizes) == 2 and (whole or x.dim() == 3):
            axes = [axis for axis in (0, 1) if sizes[axis] == self.of]
            if len(axes) == 1:
                return axes[0]
        elif (
            x.dim() and sizes[0] and (sizes[0] == self.of or (not whole and not sizes[0] % self.of))
        ):
            return 0
        raise GraftError(
            f"mixed(model, ...) at {path or 'the model'}",
            f"it is given {tuple(x.shape)}, in which {self.of} rows are not to be told.",
            "Give as many names as there are rows; or run each operation's rows by themselves, "
            "surgery.activate(model, name).",
        )

    def spread(self, index: Tensor, size: int) -> Tensor:
        """Positions where each row is several: windows, tokens in a row."""
        k = size // self.of
        if k == 1:
            return index
        return (index[:, None] * k + torch.arange(k, device=index.device)).flatten()

    def taken(self, x: Tensor, axis: int) -> list[Tensor]:
        """The rows of each, and the rest."""
        size = x.shape[axis]
        return [x.index_select(axis, self.spread(i, size)) for i in (*self.each, self.rest)]

    def joined(self, pieces: Sequence[Tensor], axis: int, size: int) -> Tensor:
        """Rows of each, and the rest, where they were."""
        order = torch.cat([self.spread(i, size) for i in (*self.each, self.rest)])
        return torch.cat([*pieces], axis).index_select(axis, order.argsort())


class Group:
    """Several operations at one place, each for its own rows: the first of them acts for all."""

    def __init__(self, rows: Rows, members: list[Any], whose: list[int]) -> None:
        self.rows, self.members, self.whose = rows, members, whose

    def acts(self, member: Any) -> bool | None:
        """Whether this member acts for all now; None where each acts for itself."""
        return self.members[0] is member if self.rows.on else None

    def entered(self, args: Any, kwargs: Any) -> Any:
        """The arguments with what each makes of its own rows of the input."""
        first = self.members[0]
        x, put = input_of(args, kwargs, first)
        axis = self.rows.axis(x, first.path)
        pieces = self.rows.taken(x, axis)
        for member, k in zip(self.members, self.whose, strict=True):
            given, _ = member._entered((pieces[k],), {})
            pieces[k] = given[0]
        return put(self.rows.joined(pieces, axis, x.shape[axis]))

    def left(self, args: Any, kwargs: Any, output: Any) -> Any:
        """The output with what each makes of its own rows."""
        first = self.members[0]
        y, put = first_tensor(output, first.path)
        x, _ = input_of(args, kwargs, first)
        axis, axis_in = self.rows.axis(y, first.path), self.rows.axis(x, first.path)
        if (low := self._low_rank(x)) is not None and axis == axis_in == 0:
            return put(self._with_products(low, x, y))
        pieces, came = self.rows.taken(y, axis), self.rows.taken(x, axis_in)
        for member, k in zip(self.members, self.whose, strict=True):
            pieces[k] = member._left((came[k],), {}, pieces[k])
        return put(self.rows.joined(pieces, axis, y.shape[axis]))

    def _low_rank(self, x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """The two matrices of each, where each adds the product of such, of one place in a row."""
        if not x.is_floating_point() or x.dim() < 3 or len(self.members) < 2:
            return None
        found = []
        for member in self.members:
            action = member.actions[0]
            if len(member.actions) > 1 or action.place != "beside" or _drops(action.part):
                return None
            if member.remembers or member.axis_in != -1 or member.axis_out != -1:
                return None
            pair = factors(action.part)
            if pair is None:
                return None
            down, up = pair
            found.append((down, up * (action.scale or 1.0) * member.switch.strength))
        return found

    def _with_products(self, low: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
        """All at once: each row by matrices of its own, of the largest rank (Sheng et al. 2023)."""
        rank = max(len(down) for down, _ in low)
        downs = [_padded(down, rank) for down, _ in low]
        ups = [_padded(up.mT, rank) for _, up in low]
        whose = torch.full((self.rows.of,), len(low), device=x.device)
        for position, k in enumerate(self.whose):
            whose[self.rows.each[k]] = position
        if len(self.rows.rest):
            downs.append(torch.zeros_like(downs[0]))
            ups.append(torch.zeros_like(ups[0]))
        whose = whose.repeat_interleave(x.shape[0] // self.rows.of)
        down, up = torch.stack(downs)[whose], torch.stack(ups)[whose]
        hidden = torch.bmm(x.flatten(1, -2), down.mT)
        out: Tensor = torch.baddbmm(y.flatten(1, -2), hidden, up)
        return out.view(y.shape)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    short = rank - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(short, matrix.shape[1])]) if short else matrix


def _drops(part: nn.Module) -> bool:
    return part.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in part.modules())
