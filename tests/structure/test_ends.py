"""What stands behind the last block: heads of any kind, those alone that run last."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import surgery
from surgery.structure.anatomy import roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.module_tree import Tree

WORDS = torch.randint(0, 40, (2, 6))


def heads(model: nn.Module, example: Tensor | None = None) -> list[str]:
    tree = Tree(model.eval())
    attach_dataflow(tree, example)
    return [site.path for site in roles_of(tree)["head"]]


class Block(nn.TransformerEncoderLayer):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width, 2, 2 * width, 0.0, batch_first=True)


class Stage(nn.Module):
    """Attention over a map, between two 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, 16, 1)
        self.blocks = nn.ModuleList([Block()])
        self.outer = nn.Conv2d(16, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        tokens = y.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return x + self.outer(tokens.transpose(1, 2).reshape(y.shape))


class UNet(nn.Module):
    def __init__(self, first: bool, out: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        if first:
            self.out = out(8, 3, 3, padding=1)
        self.inside = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = Stage(8), Stage(8)
        self.between = nn.Conv2d(8, 8, 3, padding=1)
        if not first:
            self.out = out(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(self.inside(x)))
        return self.out(self.between(y))


@pytest.mark.parametrize("out", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_that_runs_last_is_the_head_and_what_feeds_it_is_none(out) -> None:
    picture = torch.randn(1, 3, 4, 4)
    assert heads(UNet(False, out), picture) == ["out"]
    assert heads(UNet(False, out)) == ["out"]
    assert heads(UNet(True, out), picture) == ["out"]


class Speaking(nn.Module):
    """A transformer of words whose last layer is of some kind."""

    def __init__(self, last: nn.Module | None, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.transform = nn.Linear(16, width)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        x = self.transform(x)
        return functional.linear(x, self.words.weight) if self.last is None else self.last(x)


class Cosine(nn.Module):
    """Classes as directions."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(5, 24))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) @ functional.normalize(self.directions, dim=-1).t()


def test_a_module_with_a_matrix_of_its_own_is_the_head() -> None:
    assert heads(Speaking(Cosine()), WORDS) == ["last"]


def test_what_feeds_a_word_table_is_no_head_and_the_table_is_none() -> None:
    """A wrong head would be trained in silence; none is told."""
    assert heads(Speaking(None, 16), WORDS) == []
    with pytest.raises(surgery.MatchError, match="matched no module of Speaking"):
        surgery.apply(Speaking(None, 16), "linear_probe", example=WORDS)


def test_projections_one_behind_another_are_of_the_head_as_before() -> None:
    assert heads(Speaking(nn.Linear(24, 5)), WORDS) == ["transform", "last"]


class Smoothed(Speaking):
    """A convolution over positions between the last block and the head."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(24, 5))
        self.smooth = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        x = self.smooth(x.transpose(1, 2)).transpose(1, 2)
        return self.last(self.transform(x))


def test_a_convolution_that_feeds_a_projection_is_no_head() -> None:
    assert heads(Smoothed(), WORDS) == ["transform", "last"]


class Scan(nn.Module):
    """A layer that is neither attention nor a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.one = nn.Linear(16, 16)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(self.one(self.norm(x)).cumsum(1))


class Scans(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.layers = nn.ModuleList([Scan(), Scan()])
        self.last = nn.Linear(16, 40, bias=False) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@pytest.mark.parametrize("example", [None, WORDS])
def test_a_model_without_known_blocks_has_a_head_behind_what_repeats(example) -> None:
    assert heads(Scans(True), example) == ["last"]
    assert heads(Scans(False), example) == []


class Between(nn.Module):
    """Three layers, the last of which to run is registered before another (SAM's)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.inner = nn.Linear(16, 16), nn.Linear(16, 5), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(self.first(x).relu()).relu())


class Judging(nn.Module):
    """Its head speaks after every block, and what it says weighs what the next is given.

    (Mask2Former.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.score, self.head = nn.Linear(16, 7), Between()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(x)
        for block in self.blocks:
            x = block(x * self.head(x).amax(-1, keepdim=True).sigmoid())
        return self.head(x), self.score(x)


def test_a_head_that_speaks_before_blocks_too_gives_what_its_last_layer_to_run_does() -> None:
    assert heads(Judging(), WORDS) == ["score", "head"]


class Asking(Speaking):
    """Learned queries score every token at the end (GroundingDINO's weigh what it has read)."""

    def __init__(self) -> None:
        super().__init__(None)
        self.queries = nn.Embedding(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        for block in self.blocks:
            x = block(x)
        return self.queries.weight @ x.transpose(1, 2)


def test_a_table_of_queries_is_no_head() -> None:
    assert heads(Asking(), WORDS) == []


class Turns(nn.Module):
    """Attentions in turn with convolutions, in one list, and perhaps a head behind."""

    def __init__(self, headed: bool) -> None:
        super().__init__()
        attns = [nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)]
        convs = [nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.GELU(), nn.Conv1d(32, 16, 1))
                 for _ in range(2)]  # fmt: skip
        self.steps = nn.Module()
        self.steps.all = nn.ModuleList([attns[0], convs[0], attns[1], convs[1]])
        self.last = nn.Linear(16, 5) if headed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps.all):
            x = x + (step(x.mT).mT if i % 2 else step(x, x, x)[0])
        answer: Tensor = self.last(x)
        return answer


@pytest.mark.parametrize("headed", [True, False])
def test_what_takes_turns_with_attentions_is_no_head(headed: bool) -> None:
    assert heads(Turns(headed), torch.randn(2, 6, 16)) == ["last"] * headed
