"""NOAH: sizes of parts drawn for training, searched for within a budget, and made a plain model.

    model = surgery.apply(backbone(), noah())                       # train: choose(model, sample())
    best, *_ = evolve(lambda s: accuracy(choose(model, s)), Space(), budget=640_000)
    plain = carry(model, surgery.apply(backbone(), subnet_rules(best.subnet)))

Source: Zhang et al. 2022 (NOAH); the search is that of Chen et al. 2021 (AutoFormer).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .._files import check_folder, write_whole
from ..engine.apply import operated
from ..errors import FileError, OperationError, RuleError, is_integer
from ..parts.adapters import QuickGELU, adapter
from ..parts.elastic import ElasticAdapter, ElasticLora, ElasticPrompt
from ..parts.low_rank import lora
from ..parts.prompts import prompt
from ..rules.edits import append, unfreeze
from ..rules.relations import inside
from ..rules.roles import block, ffn, head, qkv
from ..rules.rule import Rule, at
from ..rules.selector import Selector
from ..state.checkpoint import state_dict
from ..structure.anatomy import roles_of
from ..structure.module_tree import Tree

Model = TypeVar("Model", bound=nn.Module)
KINDS = {ElasticPrompt: "tokens", ElasticLora: "rank", ElasticAdapter: "hidden"}


class Subnet(NamedTuple):
    """The sizes of prompts, LoRA and adapters, one for each block; 0: nothing there."""

    tokens: tuple[int, ...]
    rank: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """What subnets are drawn from: each kind stands in the first of `blocks`, by one of its sizes.

    width   of the model, for `cost`
    depths  how many blocks, counted from the first, a kind may stand in
    tokens, rank, hidden  the sizes of the three kinds (NOAH's VTAB space; also 5, 10, 50, 100)

    Raises RuleError where a size is no integer from 1 up, or a depth is above `blocks`.
    """

    blocks: int = 12
    width: int = 768
    depths: tuple[int, ...] = (3, 6, 9, 12)
    tokens: tuple[int, ...] = (1, 5, 10)
    rank: tuple[int, ...] = (1, 5, 10)
    hidden: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            listed = values if isinstance(values, (tuple, list)) else (values,)
            wrong = [v for v in listed if not is_integer(v)]
            if wrong or not listed or (name == "depths" and max(listed) > self.blocks):
                raise RuleError(
                    f"Space({name}={values!r})",
                    f"these are no sizes for {self.blocks} blocks.",
                    "Give integers from 1 up, and depths of at most the number of blocks.",
                )

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return self.tokens, self.rank, self.hidden

    def row(self, depth: int, sizes: Iterable[int]) -> tuple[int, ...]:
        """The sizes of one kind, one a block: those given in the first `depth` blocks, then 0."""
        return tuple(size if i < depth else 0 for i, size in enumerate(sizes))

    @property
    def least(self) -> Subnet:
        return Subnet(*(self.row(min(self.depths), [min(s)] * self.blocks) for s in self.sizes))


def sample(space: Space, generator: random.Random) -> Subnet:
    """A subnet, each kind in the first k blocks, k drawn of the depths; each size drawn by itself.

    >>> sample(Space(blocks=3, depths=(2,)), random.Random(0)).tokens
    (5, 1, 0)
    """
    draw, blocks = generator.choice, range(space.blocks)
    rows = (space.row(draw(space.depths), [draw(s) for _ in blocks]) for s in space.sizes)
    return Subnet(*rows)


def cost(subnet: Subnet, width: int) -> int:
    """What a subnet trains: tokens d + rank 4 d + (2 d + 1) hidden + d for each block of width d.

    LoRA as on one linear from d to 3 d; an adapter of size 0 has no bias; heads are left out.

    >>> cost(Subnet((10,) * 12, (10,) * 12, (10,) * 12), 768)
    654456
    """
    adapters = sum(2 * width * a + a + width for a in subnet.hidden if a)
    return (sum(subnet.tokens) + 4 * sum(subnet.rank)) * width + adapters


def choose(model: Model, subnet: Subnet) -> Model:
    """Let the first units of each elastic part of a model run, as a subnet says; returns the model.

    Raises OperationError where the model has no elastic parts, and RuleError where the subnet has
    other blocks than the model, or sizes that its parts do not reach.

    >>> from surgery import apply
    >>> from surgery.parts.elastic import elastic_adapter
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    >>> rule = at(ffn, append(elastic_adapter(rank=4), residual=True))
    >>> model = choose(apply(nn.Sequential(layer), rule), Subnet((0,), (0,), (2,)))
    >>> [part.active for part in model.surgery.default.children()]
    [2]
    """
    paths = [site.path for site in roles_of(Tree(model))["block"]]
    elastic = _elastic(model, paths)
    _check_rows(subnet, len(paths))
    for part, kind, i in elastic:
        size = getattr(subnet, kind)[i]
        if not 0 <= size <= part.most:
            raise RuleError(
                f"choose(model, {kind}[{i}]={size})",
                f"the part at {paths[i]} has {part.most} units.",
                "Give 0 to that many, or a larger supernet: noah(tokens=, rank=, hidden=).",
            )
    for part, kind, i in elastic:
        part.active = getattr(subnet, kind)[i]
    return model


def _elastic(model: nn.Module, paths: list[str]) -> list[tuple[Any, str, int]]:
    """Every elastic part, its kind, and the number of the block that it is in."""
    elastic = [
        (action.part, KINDS[type(action.part)], _block_of(hooked.path, paths))
        for operation in operated(model, "choose(model, ...)")
        for hooked in operation.hooked_sites
        for action in hooked.actions
        if type(action.part) in KINDS
    ]
    if not elastic:
        raise OperationError(
            "choose(model, ...)",
            f"this {type(model).__name__} has no part of elastic size.",
            "Operate it by noah(), or by elastic_prompt, elastic_lora and elastic_adapter.",
        )
    return elastic


def _block_of(path: str, blocks: list[str]) -> int:
    around = [i for i, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")]
    if not around:
        raise OperationError(
            "choose(model, ...)",
            f"an elastic part at {path} lies in no block.",
            "Put elastic parts on blocks, or on what is inside of them.",
        )
    return max(around, key=lambda i: len(blocks[i]))


def _check_rows(subnet: Subnet, blocks: int) -> None:
    if {len(row) for row in subnet} != {blocks}:
        raise RuleError(
            f"Subnet of {', '.join(str(len(row)) for row in subnet)} blocks",
            f"sizes are needed for {blocks}.",
            "Give each kind one size a block, 0 where it stands in none: Space(blocks=...).",
        )


def subnet_rules(subnet: Subnet) -> list[Rule]:
    """The rules of a subnet by itself: plain prompts, LoRA and adapters of just those sizes.

    Raises RuleError where the kinds are not given for the same number of blocks.

    >>> subnet_rules(Subnet((5, 0), (0, 0), (0, 0)))
    [at(block[0], insert(prompt(tokens=5, dropout=0.1))), at(head, unfreeze, optional=True)]
    """
    _check_rows(subnet, len(subnet.tokens))
    rules = [rule for i, sizes in enumerate(zip(*subnet, strict=True)) for rule in _rules(i, sizes)]
    return [*rules, at(head, unfreeze, optional=True)]


def _rules(i: int, sizes: tuple[int, ...]) -> list[Rule]:
    tokens, rank, hidden = sizes
    here: Selector = block[i]
    rules = [at(here, prompt(tokens=tokens, dropout=0.1))] if tokens else []
    if rank:
        rules.append(at(qkv & inside(here), lora(rank=rank, dropout=0.1)))
    if hidden:
        bottleneck = adapter(rank=hidden, activation=QuickGELU, dropout=0.1)
        rules.append(at(ffn & inside(here), append(bottleneck, residual=True)))
    return rules


@torch.no_grad()
def carry(supernet: nn.Module, model: Model) -> Model:
    """Fill a model operated by `subnet_rules` with the first units of a supernet; returns it.

    What is trained of the base (heads) comes along. The supernet with this subnet chosen and the
    model then give the same answers, to within rounding.

    Raises OperationError where the supernet does not have what the model needs.

    >>> from surgery import apply
    >>> from surgery.parts.elastic import elastic_adapter
    >>> def layer():
    ...     return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    >>> supernet = apply(layer(), at(ffn, append(elastic_adapter(rank=4), residual=True)))
    >>> model = carry(supernet, apply(layer(), subnet_rules(Subnet((0,), (0,), (2,)))))
    >>> [tuple(p.shape) for p in model.surgery.parameters()]
    [(2, 8), (2,), (8, 2), (8,)]
    """
    source, target = state_dict(supernet), state_dict(model)
    for key, tensor in target.items():
        have = source.get(key)
        dims = have.dim() if have is not None else -1
        if have is None or dims != tensor.dim() or any(map(int.__lt__, have.shape, tensor.shape)):
            raise OperationError(
                "carry(supernet, model)",
                f"the model has {key} {tuple(tensor.shape)}, the supernet "
                + (f"{tuple(have.shape)}." if have is not None else "has nothing of that name."),
                "Operate both alike: the supernet by noah(), the model by subnet_rules(subnet).",
            )
    for key, tensor in target.items():
        tensor.copy_(source[key][tuple(slice(n) for n in tensor.shape)])
    return model


# the search -------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A subnet and what `evaluate` said of it."""

    subnet: Subnet
    score: float


def evolve(
    evaluate: Callable[[Subnet], float],
    space: Space,
    budget: int,
    *,
    population: int = 50,
    top: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    generations: int = 20,
    mutate: float = 0.2,
    depth: float = 0.4,
    seed: int = 0,
    progress: Callable[[int, Subnet, float], object] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> list[Scored]:
    """The best subnets of a space within a budget, best first, found by evolution.

    The first generation is drawn at random; each later one is bred of the `top` best so far: by
    mutation, by crossover, and, where these give too few new ones, drawn again. None is evaluated
    twice, and none over budget; where draws find none within it, the search starts from the
    smallest. The same seed gives the same search.

    evaluate    a subnet's score, higher is better: lambda s: accuracy(choose(model, s))
    space       what subnets are drawn from; budget: the largest `cost` that one may have
    population  subnets evaluated in a generation, at most; of these so many by mutations and by
                crossovers, of the `top` best so far; generations of them; seed of all draws
    mutate      probability that a size is drawn anew; `depth`: that the depth of a kind is
                (NOAH's code redraws depths alone, each kind by the first chance)
    crossovers  each takes prompts, LoRA and adapters of either of two parents
    progress    called with (generation from 1, best subnet, its score) after each generation
    resume      a JSON file, written whole after each generation; if it is there, the search goes
                on from it, to the result that it would have had without a break. `generations`
                may then be another; nothing else

    Raises RuleError where nothing fits the budget or a score is no number, FileError where the
    file is not of this search.

    >>> evolve(lambda s: sum(s.rank), Space(blocks=2, depths=(1, 2)), 80_000)[0].score
    20.0
    """
    settings = {
        "space": asdict(space), "budget": budget, "population": population, "top": top,
        "mutations": mutations, "crossovers": crossovers, "mutate": mutate, "depth": depth,
        "seed": seed,
    }  # fmt: skip
    search = _Search(evaluate, space, budget, random.Random(seed))
    if resume is not None:
        check_folder(Path(resume), f'evolve(resume="{resume}")')
        if Path(resume).exists():
            search.read(Path(resume), settings)
    while search.generation < generations:
        born = search.bred(search.best(top), mutations, crossovers, (mutate, depth))
        search.draw(population - born)
        search.generation += 1
        if resume is not None:
            search.write(Path(resume), settings)
        if progress is not None:
            progress(search.generation, *search.best(1)[0])
    return search.best(top)


class _Search:
    """One evolution: every subnet seen with its score, in order, and the random numbers."""

    def __init__(
        self,
        evaluate: Callable[[Subnet], float],
        space: Space,
        budget: int,
        generator: random.Random,
    ) -> None:
        self.evaluate, self.space, self.budget = evaluate, space, budget
        self.generator, self.generation = generator, 0
        self.seen: dict[Subnet, float] = {}
        if (least := cost(space.least, space.width)) > budget:
            raise RuleError(
                f"evolve(budget={budget})",
                f"the smallest subnet of the space costs {least}.",
                "Give a larger budget, or a space with smaller sizes or depths.",
            )

    def best(self, most: int) -> list[Scored]:
        """The best so far; of equal ones the first."""
        ranked = sorted(self.seen.items(), key=lambda item: -item[1])
        return [Scored(*item) for item in ranked[:most]]

    def bred(
        self, parents: list[Scored], mutants: int, children: int, chances: tuple[float, float]
    ) -> int:
        """Breed a generation of the parents, if there are any; how many were evaluated."""
        if not parents:
            return 0
        born = self.breed(mutants, lambda: self.mutant(parents, *chances))
        return born + self.breed(children, lambda: self.child(parents))

    def draw(self, count: int) -> None:
        """Evaluate new subnets drawn at random; the smallest where none was ever found."""
        self.breed(count, lambda: sample(self.space, self.generator), tries=100)
        if not self.seen:
            self.score(self.space.least)

    def breed(self, count: int, draw: Callable[[], Subnet], tries: int = 10) -> int:
        """Evaluate `count` new subnets within budget, as far as so many draws have them."""
        born = 0
        for _ in range(tries * count):
            if born == count:
                break
            born += self.score(draw())
        return born

    def score(self, subnet: Subnet) -> bool:
        """Evaluate a subnet if it is new and within budget; whether it was."""
        if subnet in self.seen or cost(subnet, self.space.width) > self.budget:
            return False
        value = float(self.evaluate(subnet))
        if value != value:
            raise RuleError(
                "evolve(evaluate)", f"the score of {subnet} is not a number.", "Return a number."
            )
        self.seen[subnet] = value
        return True

    def mutant(self, parents: list[Scored], mutate: float, depth: float) -> Subnet:
        """One of the parents, some of its depths and sizes drawn anew."""
        parent, draw = self.generator.choice(parents).subnet, self.generator
        rows = []
        for row, sizes in zip(parent, self.space.sizes, strict=True):
            was = sum(map(bool, row))
            now = draw.choice(self.space.depths) if draw.random() < depth else was
            drawn = [draw.choice(sizes) if not k or draw.random() < mutate else k for k in row]
            rows.append(self.space.row(now, drawn))
        return Subnet(*rows)

    def child(self, parents: list[Scored]) -> Subnet:
        """Each kind of one of two parents."""
        a, b = (self.generator.choice(parents).subnet for _ in range(2))
        return Subnet(*(self.generator.choice(pair) for pair in zip(a, b, strict=True)))

    def write(self, path: Path, settings: dict[str, Any]) -> None:
        """The whole state as JSON, put in place at once."""
        state = {
            "search": settings,
            "generation": self.generation,
            "seen": list(self.seen.items()),
            "generator": self.generator.getstate(),
        }
        write_whole(path, lambda half: half.write_text(json.dumps(state)))

    def read(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from a file. Raises FileError where it is not of this search."""
        try:
            state = json.loads(path.read_text())
            was, self.generation = dict(state["search"]), state["generation"]
            self.seen = {Subnet(*map(tuple, rows)): score for rows, score in state["seen"]}
            version, numbers, last = state["generator"]
            self.generator.setstate((version, tuple(numbers), last))
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(
                f'evolve(resume="{path}")', f"it holds no search ({error}).", "Give another path."
            ) from error
        now = json.loads(json.dumps(settings))
        if differ := [name for name in now if now[name] != was.get(name)]:
            raise FileError(
                f'evolve(resume="{path}")',
                f"it is of another search: {', '.join(differ)} differ.",
                "Give what that search was started with, or another path.",
            )
