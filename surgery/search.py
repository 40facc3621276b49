"""NOAH's evolutionary search for the sizes of its parts within a budget.

    model = surgery.apply(backbone(), noah())                       # train: choose(model, sample())
    best, *_ = evolve(lambda s: accuracy(choose(model, s)), Space(), budget=640_000)
    plain = carry(model, surgery.apply(backbone(), subnet_rules(best.subnet)))

Source: Zhang et al. 2022 (NOAH); the search is that of Chen et al. 2021 (AutoFormer).
"""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FileError, RuleError
from .subnet import Space, Subnet, carry, choose, cost, sample, subnet_rules

__all__ = [
    "Scored", "Space", "Subnet", "carry", "choose", "cost", "evolve", "sample", "subnet_rules",
]  # fmt: skip


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
    space       what subnets are drawn from
    budget      the largest `cost` that a subnet may have
    population  subnets evaluated in a generation, at most; of these so many by mutations and by
                crossovers, of the `top` best so far; generations of them; seed of all draws
    mutate      probability that a size is drawn anew; `depth`: that the depth of a kind is
                (NOAH's code redraws depths alone, each kind by the first chance)
    crossovers  each takes prompts, LoRA and adapters of either of two parents
    progress    told (generation, best subnet, its score) after each generation, counted from 1
    resume      a JSON file, written whole after each generation; if it is there, the search goes
                on from it, to the result that it would have had without a break. `generations`
                may then be another; nothing else

    Raises RuleError where nothing fits the budget or a score is no number, FileError where the
    file is not of this search.

    >>> evolve(lambda s: sum(s.rank), Space(blocks=2, depths=(1, 2)), 80_000)[0].score
    20.0
    """
    told = {
        "space": asdict(space), "budget": budget, "population": population, "top": top,
        "mutations": mutations, "crossovers": crossovers, "mutate": mutate, "depth": depth,
        "seed": seed,
    }  # fmt: skip
    search = _Search(evaluate, space, budget, random.Random(seed))
    if resume is not None and not Path(resume).parent.is_dir():
        raise FileError(
            f'evolve(resume="{resume}")', f"there is no folder {Path(resume).parent}.", "Create it."
        )
    if resume is not None and Path(resume).exists():
        search.read(Path(resume), told)
    while search.generation < generations:
        born = search.bred(search.best(top), mutations, crossovers, (mutate, depth))
        search.draw(population - born)
        search.generation += 1
        if resume is not None:
            search.write(Path(resume), told)
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
            self.meet(self.space.least)

    def breed(self, count: int, draw: Callable[[], Subnet], tries: int = 10) -> int:
        """Evaluate `count` new subnets within budget, as far as so many draws have them."""
        born = 0
        for _ in range(tries * count):
            if born == count:
                break
            born += self.meet(draw())
        return born

    def meet(self, subnet: Subnet) -> bool:
        """Evaluate a subnet if it is new and within budget; whether it was."""
        if subnet in self.seen or cost(subnet, self.space.width) > self.budget:
            return False
        score = float(self.evaluate(subnet))
        if score != score:
            raise RuleError(
                "evolve(evaluate)", f"the score of {subnet} is not a number.", "Return a number."
            )
        self.seen[subnet] = score
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

    def write(self, path: Path, told: dict[str, Any]) -> None:
        """The whole state as JSON, put in place at once."""
        state = {
            "search": told,
            "generation": self.generation,
            "seen": list(self.seen.items()),
            "generator": self.generator.getstate(),
        }
        half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            half.write_text(json.dumps(state))
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)

    def read(self, path: Path, told: dict[str, Any]) -> None:
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
        now = json.loads(json.dumps(told))
        if differ := [name for name in now if now[name] != was.get(name)]:
            raise FileError(
                f'evolve(resume="{path}")',
                f"it is of another search: {', '.join(differ)} differ.",
                "Give what that search was started with, or another path.",
            )
