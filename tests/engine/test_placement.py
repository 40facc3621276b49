"""Where features lie and how wide they are, as weights, edits before and calls tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    append,
    at,
    parallel,
    prepend,
)
from tests.laws.checks import Linears, plain

WIDTHS = [(append, (12, 12)), (prepend, (8, 8)), (parallel, (8, 12))]


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize(("edit", "widths"), WIDTHS)
def test_features_are_where_the_weights_say_though_positions_are_as_many(edit, widths, side):
    conv = nn.Conv2d(8, 12, 1)
    model = nn.Sequential(conv)
    part = nn.Linear(*widths)
    surgery.apply(model, at("0", edit(lambda site: part)))
    x = torch.randn(2, 8, 3, side)
    by_hand = {
        append: lambda x: last(part, conv(x)),
        prepend: lambda x: conv(last(part, x)),
        parallel: lambda x: conv(x) + last(part, x),
    }
    got = model(x)
    surgery.revert(model)
    torch.testing.assert_close(got, by_hand[edit](x))


def last(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.movedim(1, -1)).movedim(-1, 1)


def test_what_a_part_of_its_own_raises_is_not_told_as_a_wrong_width():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("of its own")

    model = surgery.apply(nn.Sequential(nn.Linear(8, 8)), at("0", append(lambda site: Fails())))
    with pytest.raises(RuntimeError, match="of its own"):
        model(torch.randn(2, 8))
    model[0].weight, model[0].bias = nn.Parameter(torch.randn(4, 8)), None
    with pytest.raises(surgery.GraftError, match="taken to have 8 features"):
        model(torch.randn(2, 8))


SERIES = [(append, prepend), (append, parallel), (prepend, append), (append, prepend, parallel)]


@pytest.mark.parametrize("edits", SERIES)
def test_the_first_edit_at_a_site_does_not_say_what_the_others_are_given(edits):
    """Found by the suite: after append, a site was taken to be given as much as it gives."""
    linear = nn.Linear(3, 8)
    model = surgery.apply(nn.Sequential(linear), [at("0", edit(plain)) for edit in edits])
    parts, x = dict(model.surgery.default.named_children()), torch.randn(2, 8, 3)
    want = linear.forward
    for edit in edits:
        part, inner = parts[f"0/{edit.__name__}"], want
        want = {
            append: lambda x, f=inner, p=part: p(f(x)),
            prepend: lambda x, f=inner, p=part: f(p(x)),
            parallel: lambda x, f=inner, p=part: f(x) + p(x),
        }[edit]
    torch.testing.assert_close(model(x), want(x))


class Turned(nn.Module):
    """Linear weights, and yet features lie after the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Rows(Turned):
    """Gives the tokens of all samples in a row, as mixtures of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(0, 1)


@pytest.mark.parametrize(("edit", "widths"), WIDTHS)
def test_features_are_where_so_many_are_though_the_weights_say_otherwise(edit, widths):
    turned, part, x = Turned(), nn.Linear(*widths), torch.randn(2, 8, 3, 5)
    model = surgery.apply(nn.Sequential(turned), at("0", edit(lambda site: part)))
    by_hand = {
        append: lambda x: last(part, Turned.forward(turned, x)),
        prepend: lambda x: Turned.forward(turned, last(part, x)),
        parallel: lambda x: Turned.forward(turned, x) + last(part, x),
    }
    torch.testing.assert_close(model(x), by_hand[edit](x))


def test_a_part_beside_what_gives_tokens_in_a_row_gives_them_in_a_row_too():
    rows, part, x = Rows(), nn.Linear(8, 12), torch.randn(2, 5, 8)
    model = surgery.apply(nn.Sequential(rows), at("0", parallel(lambda site: part)))
    torch.testing.assert_close(model(x), Rows.forward(rows, x) + part(x).flatten(0, 1))


def test_what_acts_after_a_module_hooks_nothing_before_it():
    model = surgery.apply(Linears(), at("one", append(plain), parallel(plain)))
    assert len(model.one._forward_hooks) == 1
    assert len(model.one._forward_pre_hooks) == 0
    surgery.revert(model)
    surgery.apply(model, at("one", prepend(plain)))
    assert len(model.one._forward_pre_hooks) == 1


def test_a_part_of_another_width_is_told_and_what_a_forward_would_tell_of_a_span():
    wrong = parallel(lambda site: nn.Linear(site.width, 3))
    for where, spans in (("one", False), (surgery.span("one", "two"), True)):
        model = surgery.apply(Linears(), at(where, wrong))
        with pytest.raises(surgery.GraftError, match=r"returned \(2, 3\)") as told:
            model(torch.randn(2, 8))
        assert ("where to begin" in str(told.value)) is spans
