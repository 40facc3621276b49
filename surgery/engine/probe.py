"""What the proof by example finds out of tokens, for parts that mix them.

One place of a forward is changed; where it comes out tells which token is which patch, and whether
the model lets others hear it. Parts are off meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._inputs import call, copied
from .._preserve import preserved
from ..errors import GraftError
from .maps import PatchMap
from .mixing import LAST
from .operation import Operation

NEARLY = 0.95  # of all: in half precision some may be as they were


class Enough(Exception):
    """What was to be seen was seen: the forward need not go on."""


class Mark:
    """Changes one place of a forward, and keeps the tokens that come to a block or leave it.

    spot   (row, column) of a patch that becomes nan, where a convolution is called for the
           `call`-th time
    token  the token before the block that is another
    after  whether the tokens behind the block are kept, or those before it
    """

    def __init__(
        self,
        call: int = 0,
        spot: tuple[int, int] | None = None,
        *,
        token: int | None = None,
        after: bool = False,
    ) -> None:
        self.call, self.spot, self.token, self.after = call, spot, token, after
        self.calls = 0
        self.rows: Tensor | None = None

    def embedded(self, patches: Tensor) -> Tensor | None:
        self.calls += 1
        if self.spot is None or self.calls != self.call:
            return None
        marked = patches.clone()
        marked[:, :, self.spot[0], self.spot[1]] = torch.nan
        return marked

    def entered(self, rows: Tensor) -> Tensor:
        if not self.after:
            self.left(rows)
        return rows if self.token is None else _with_another(rows, self.token)

    def left(self, rows: Tensor) -> None:
        self.rows = rows
        raise Enough


def _with_another(rows: Tensor, token: int) -> Tensor:
    """Tokens of which one is another, also for a norm: neither a multiple nor the same all over."""
    rows = rows.clone()
    slope = torch.linspace(-1, 1, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    rows[:, token] = slope - 1.5 * rows[:, token]
    return rows


def prove_tokens(
    model: nn.Module,
    operation: Operation,
    example: Any,
    maps: list[PatchMap],
) -> None:
    """Raise GraftError where a part would mix tokens that the example shows to be others.

    Where patches are not the last tokens, row by row; or where a block lets no other token hear
    the last, as with a causal mask or padding.
    """
    if not maps:
        return
    operation.enabled = False
    try:
        eager = torch.compiler.set_stance("force_eager")
        with preserved(model, modes=True, kept=True), torch.no_grad(), eager:
            model.eval()
            for patches in maps:
                if _check(model, example, patches):
                    for part in patches.parts:
                        if getattr(part, "note", None) == LAST:
                            del part.note
    finally:
        operation.enabled = True
        for patches in maps:
            patches.begin()
        operation.passes.forget()


def _check(model: nn.Module, example: Any, patches: PatchMap) -> bool:
    """Whether the order of patches was seen to be right."""
    _check_heard(model, example, patches)
    plain = _run(model, example, patches, Mark())
    if not patches.parts or plain.rows is None:
        return False
    seen = patches.seen(plain.rows)
    if seen is None or seen.samples != len(plain.rows):
        return False
    n, grid = plain.rows.shape[1], (seen.rows, seen.columns)
    if grid[0] * grid[1] > n:
        return False
    corners = {(0, grid[1] - 1), (grid[0] - 1, 0), (grid[0] // 2, grid[1] // 2)}
    told = {_is_there(model, example, patches, Mark(plain.calls, c), grid) for c in corners}
    return told == {True}


def _is_there(
    model: nn.Module, example: Any, patches: PatchMap, mark: Mark, grid: tuple[int, int]
) -> bool:
    """Whether a patch is the token that it is taken for. Raises GraftError where it is another."""
    rows = _run(model, example, patches, mark).rows
    if rows is None or mark.spot is None:
        return False
    n, (row, column) = rows.shape[1], mark.spot
    tokens = rows.isnan().any(-1).any(0).nonzero().flatten().tolist()
    if len(tokens) in (0, n):  # nothing came of it, or it is everywhere: that tells nothing
        return False
    if tokens != [n - grid[0] * grid[1] + row * grid[1] + column]:
        raise GraftError(
            f"the graft at {patches.path}",
            f"of {n} tokens the last {grid[0]} x {grid[1]} are not the patches, row by row: patch "
            f"{mark.spot} is token {tokens[0]}.",
            "Use parts that take each token alone (adapter, lora).",
        )
    return True


def _check_heard(model: nn.Module, example: Any, patches: PatchMap) -> None:
    """Raise GraftError where all in a block hear the first token, and none the last, or so.

    Where some hear neither, there are windows, or what attention gives comes to nothing as yet
    (scales that start at 0).
    """
    first, last = (_heard(model, example, patches, token) for token in (0, -1))
    for all_hear, none_hears, which in ((first, last, "last"), (last, first, "first")):
        if all_hear > NEARLY and none_hears == 0:
            raise GraftError(
                f"the graft at {patches.path}",
                f"it lets tokens hear others, and the model lets none hear the {which} with this "
                "example (a causal mask, or padding).",
                "Use parts that take each token alone (adapter, lora); or give an example without "
                "padding.",
            )


def _heard(model: nn.Module, example: Any, patches: PatchMap, token: int) -> float:
    """By which share of the others a token is heard in a block; 0.5 where that is not told."""
    plain, other = (
        _run(model, example, patches, Mark(token=each, after=True)).rows for each in (None, token)
    )
    if plain is None or other is None or plain.shape != other.shape or plain.shape[1] < 2:
        return 0.5
    heard = (plain != other).any(-1).any(0)
    heard[token] = False
    return heard.sum().item() / (len(heard) - 1)


def _run(model: nn.Module, example: Any, patches: PatchMap, mark: Mark) -> Mark:
    patches.probe = mark
    try:
        call(model, copied(example))
    except Enough:
        pass
    except Exception:  # it does not take what is no number: then nothing is told
        mark.rows = None
    finally:
        patches.probe = None
    return mark
