"""One batch of which each row is another operation's: parts meet their own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..errors import GraftError
from ..rules.affine import factors
from .features import first_tensor, input_of

Join: TypeAlias = Callable[[Sequence[Tensor]], Tensor]
CLOSE = 1e-3  # of the largest number: what a batch of another size or order may round otherwise


class Rows:
    """Which rows of a batch are whose, or which tokens.

    index         (rows,) or (rows, tokens): whose each is, a number; -1: nobody's
    count         of those that have any
    tokens_first  whether tokens may lie on the first axis, and samples on the second
    is_read       whether compiled code is to read whose they are in each forward: it lets all act
                  on all rows, and chooses
    on            whether places act by rows now
    """

    def __init__(
        self, index: Tensor, count: int, tokens_first: bool, is_read: bool, device: torch.device
    ) -> None:
        self.told, self.index, self.count = index, index.to(device), count
        self.tokens_first = tokens_first
        self.is_read, self.on = is_read, False
        self.seen: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        """Where the rows of each are now, and those of nobody. Raises GraftError."""
        if self.seen is not None and torch.equal(self.seen, self.told):
            return  # (numpy writes into what it shares, and torch does not count that)
        self.seen, index = self.told.clone(), self.told.flatten()
        if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < self.count:
            raise GraftError(
                "mixed(model, names, rows=...)",
                f"rows go from {int(index.min())} to {int(index.max())}, and there are "
                f"{self.count} names.",
                "Give the positions of names, from 0; -1 for a row of the base.",
            )
        *each, rest = [(index == k).nonzero().flatten() for k in (*range(self.count), -1)]
        self.each, self.rest = [i.to(self.index.device) for i in each], rest.to(self.index.device)

    @property
    def of(self) -> int:
        """How many rows there are."""
        return len(self.index)

    @property
    def are_tokens(self) -> bool:
        """Whether each token is somebody's, and not each row."""
        return self.index.dim() == 2

    @property
    def all_act(self) -> bool:
        """Whether all act on all rows, of which each is chosen."""
        return self.is_read and torch.compiler.is_compiling()

    def axis(self, x: Tensor, path: str, whole: bool = False) -> int:
        """Where rows lie. Raises GraftError where that is not known.

        whole  whether each is one, and not several (windows, tokens in a row)
        """
        find = self._axis_of_tokens if self.are_tokens else self._axis
        if (axis := find(x, whole)) is not None:
            return axis
        rows = " x ".join(map(str, self.index.shape))
        what = "tokens" if self.are_tokens else "rows"
        raise GraftError(
            f"mixed(model, ...) at {path or 'the model'}",
            f"it is given {tuple(x.shape)}, in which {rows} {what} are not to be told.",
            "Give as many names as there are rows; or run each operation's rows by themselves, "
            "surgery.activate(model, name).",
        )

    def _axis(self, x: Tensor, whole: bool) -> int | None:
        sizes, n = [*x.shape[:2]], self.index.numel()
        if self.tokens_first and len(sizes) == 2 and (whole or x.dim() == 3):
            axes = [axis for axis in (0, 1) if sizes[axis] == n]
            return axes[0] if len(axes) == 1 else None
        rows = sizes[0] if sizes else 0
        return 0 if rows and (rows == n if whole else not rows % max(n, 1)) else None

    def _axis_of_tokens(self, x: Tensor, whole: bool) -> int | None:
        return 0 if x.shape[:2] == self.index.shape and not self.tokens_first else None

    def split(self, x: Tensor, path: str) -> tuple[list[Tensor], Join]:
        """The rows of each, and the rest; and what joins such, as they were."""
        axis = self.axis(x, path)
        flat = x.flatten(0, 1) if self.are_tokens else x
        indices = [self._spread(i, flat.shape[axis]) for i in (*self.each, self.rest)]
        back = torch.cat(indices).argsort()
        pieces = [flat.index_select(axis, index) for index in indices]
        if not self.are_tokens:
            return pieces, lambda outs: torch.cat([*outs], axis).index_select(axis, back)
        return (
            [piece[None] for piece in pieces],
            lambda outs: (
                torch.cat([*outs], 1)[0]
                .index_select(0, back)
                .view(*self.index.shape, *outs[0].shape[2:])
            ),
        )

    def _spread(self, index: Tensor, size: int) -> Tensor:
        """Positions where each row is several: windows, tokens in a row."""
        k = size // self.index.numel()
        if k == 1:
            return index
        return (index[:, None] * k + torch.arange(k, device=index.device)).flatten()

    def chosen(self, x: Tensor, path: str, others: Sequence[tuple[int, Tensor]]) -> Tensor:
        """x, and in rows of a number another for it."""
        axis = self.axis(x, path)
        whose = self.index
        if not self.are_tokens:
            whose = self.index.repeat_interleave(x.shape[axis] // self.of)
        shape = (1,) * axis + tuple(whose.shape)
        whose = whose.view(shape + (1,) * (x.dim() - len(shape)))
        for k, other in others:
            x = torch.where(whose == k, other, x)
        return x


class Group:
    """Several operations at one place, each for its own rows: the first of them acts for all."""

    def __init__(self, rows: Rows, members: list[Any], whose: list[int]) -> None:
        self.rows, self.members, self.whose = rows, members, whose
        self.seen_apart: set[int] = set()

    def acts(self, member: Any) -> bool | None:
        """Whether this member acts for all now; None where each acts for itself."""
        return self.members[0] is member if self.rows.on else None

    def entered(self, args: Any, kwargs: Any) -> Any:
        """The arguments with what each makes of its own rows of the input."""
        first = self.members[0]
        x, put = input_of(args, kwargs, first)
        return put(self._each(x, lambda member, x: member._entered((x,), {})[0][0]))

    def left(self, args: Any, kwargs: Any, output: Any) -> Any:
        """The output with what each makes of its own rows."""
        first = self.members[0]
        y, put = first_tensor(output, first.path)
        x, _ = input_of(args, kwargs, first)
        if (low := self._low_rank(x)) is not None:
            axis, axis_in = self.rows.axis(y, first.path), self.rows.axis(x, first.path)
            if axis == axis_in == 0 and not self.rows.are_tokens:
                return put(self._with_products(low, x, y))
        return put(self._each(y, lambda member, y, x: member._left((x,), {}, y), x))

    def _each(self, x: Tensor, act: Callable[..., Tensor], *came: Tensor) -> Tensor:
        """What each makes of its own rows; of all, where all act on all, and each is chosen."""
        path, acting = self.members[0].path, [*zip(self.members, self.whose, strict=True)]
        if self.rows.all_act:
            for member in self.members:
                self._check_apart(member)
            return self.rows.chosen(x, path, [(k, act(member, x, *came)) for member, k in acting])
        pieces, join = self.rows.split(x, path)
        given = [pieces, *(self.rows.split(each, path)[0] for each in came)]
        for member, k in acting:
            mine = [each[k] for each in given]
            if not mine[0].numel():
                continue  # it has no rows here
            if self.rows.are_tokens:
                self._see_apart(member, *mine)
            pieces[k] = act(member, *mine)
        return join(pieces)

    def _see_apart(self, member: Any, given: Tensor, came: Tensor | None = None) -> None:
        """Raise GraftError where what parts make of a token depends on the others that are there.

        given  what comes in, or goes out; came: what came in, where it goes out
        """
        for action in member.actions:
            place, part = action.place, action.part
            enters = place == "before" or (place == "beside" and member.remembers)
            if enters is not (came is None) or id(part) in self.seen_apart:
                continue
            x = came if came is not None and place == "beside" else given
            if x.shape[-2] > 1:
                if not _is_by_tokens(part, x):
                    raise GraftError(
                        f"mixed(model, names, rows=...) at {member.path}",
                        f"what {type(part).__name__} makes of a token depends on the others.",
                        "Give whose each row is, (rows,), and one sequence in each.",
                    )
                self.seen_apart.add(id(part))

    def _check_apart(self, member: Any) -> None:
        """Raise GraftError where all cannot act on all: statistics of a batch, tokens unseen."""
        for action in member.actions:
            if self.rows.are_tokens and id(action.part) not in self.seen_apart:
                raise unseen(member.path)
            if any(mixes_rows(m) for m in action.part.modules()):
                raise takes_statistics(member.path)

    def _low_rank(self, x: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """The two matrices of each, where each adds the product of such, of one place in a row."""
        if not x.is_floating_point() or x.dim() < 3 or len(self.members) < 2:
            return None
        found = []
        for member, k in zip(self.members, self.whose, strict=True):
            action = member.actions[0]
            if len(member.actions) > 1 or action.place != "beside" or _drops(action.part):
                return None
            if member.remembers or member.axis_in != -1 or member.axis_out != -1:
                return None
            pair = factors(action.part)
            if pair is None:
                return None
            down, up = pair if self._has_rows(k) else (each.detach() for each in pair)
            found.append((down, up * (action.scale or 1.0) * member.switch.strength))
        return found

    def _has_rows(self, k: int) -> bool:
        """Whether any row is its own: without, no gradient is asked for it."""
        return self.rows.all_act or bool(len(self.rows.each[k]))

    def _with_products(self, low: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Tensor:
        """All at once: each row by matrices of its own, of the largest rank (Sheng et al. 2023)."""
        rank = max(len(down) for down, _ in low)
        downs = [_padded(down, rank) for down, _ in low]
        ups = [_padded(up.mT, rank) for _, up in low]
        downs.append(torch.zeros_like(downs[0]))
        ups.append(torch.zeros_like(ups[0]))
        place = torch.full((self.rows.count + 1,), len(low), device=x.device)  # the last of no row
        place[self.whose] = torch.arange(len(low), device=x.device)
        whose = place[self.rows.index].repeat_interleave(x.shape[0] // self.rows.of)
        down, up = torch.stack(downs)[whose], torch.stack(ups)[whose]
        hidden = torch.bmm(x.flatten(1, -2), down.mT)
        out: Tensor = torch.baddbmm(y.flatten(1, -2), hidden, up)
        return out.view(y.shape)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    short = rank - len(matrix)
    return torch.cat([matrix, matrix.new_zeros(short, matrix.shape[1])]) if short else matrix


def _drops(part: nn.Module) -> bool:
    return part.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in part.modules())


def mixes_rows(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def takes_statistics(path: str) -> GraftError:
    return GraftError(
        f"mixed(model, names, rows=...) at {path}",
        "a norm takes the statistics of a batch, and compiled code lets it act on all rows.",
        "Let it run in eval mode, or do not compile.",
    )


def not_of_tokens(name: str, given: Tensor | None) -> GraftError:
    """The error of a place at which tokens do not lie as in rows."""
    what = f"meets {tuple(given.shape)}" if given is not None else "is not called"
    return GraftError(
        "mixed(model, names, rows=...)",
        f"a {name} {what}, and not the tokens as they lie in rows.",
        "Give whose each row is, (rows,), and one sequence in each.",
    )


def unseen(path: str) -> GraftError:
    return GraftError(
        f"mixed(model, names, rows=...) at {path or 'the model'}",
        "it is not known yet whether rows stay rows, and tokens tokens, here.",
        "Let one forward run that is not compiled, of two rows that differ.",
    )


def _is_by_tokens(part: nn.Module, x: Tensor) -> bool:
    """Whether a part makes of half of the tokens what it makes of these among all."""
    half, modes = x.shape[-2] // 2, [(m, m.training) for m in part.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            whole, *halves = (
                pytree.tree_leaves(part(each))[0]
                for each in (x, x[..., :half, :], x[..., half:, :])
            )
    finally:
        for module, mode in modes:
            module.training = mode
    return bool((whole - torch.cat(halves, -2)).abs().max() <= CLOSE * whole.abs().max())
