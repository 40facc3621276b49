"""NOAH: subnets drawn, chosen, counted and carried over; the search for the best."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import surgery
from surgery.errors import FileError, OperationError, RuleError
from surgery.methods.noah_supernet import noah
from surgery.training.noah import (
    Scored,
    Space,
    Subnet,
    carry,
    choose,
    cost,
    evolve,
    sample,
    subnet_rules,
)
from tests.methods.reference import (
    INPUTS,
    by_hand,
    close,
    merges,
    parts,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.methods.test_noah_supernet import FULL, MIXED, SIZES, SMALL, written

# subnets ---------------------------------------------------------------------------------------


def test_the_supernets_count() -> None:
    assert surgery.plan(vit_b(), noah()).trainable == 654_456
    assert surgery.plan(vit_b(), noah(100, 100, 100)).trainable == 6_461_616


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((0, 8, 0), 294_912), ((0, 0, 8), 156_768), ((0, 0, 64), 1_189_632), ((50, 0, 0), 460_800)],
)
def test_each_kind_counts_as_published(sizes: Any, count: int) -> None:
    subnet = Subnet(*((size,) * 12 for size in sizes))
    assert cost(subnet, 768) == count == surgery.plan(vit_b(), subnet_rules(subnet)).trainable


def test_cost_is_what_the_rules_of_a_subnet_train() -> None:
    for seed in range(3):
        subnet = sample(Space(), random.Random(seed))
        assert surgery.plan(vit_b(), subnet_rules(subnet)).trainable == cost(subnet, 768)


def test_the_published_mean_is_one_of_such_subnets() -> None:
    """360,134.26 over 19 subnets, none of them at hand: their sum has the form of the formula."""
    total = round(360_134.26 * 19)
    assert f"{total / 19:.2f}" == "360134.26"
    forms = []
    for hidden in range(19 * 12, 19 * 12 * 10 + 1):  # all 12 blocks have an adapter, of 1 to 10
        rest, over = divmod(total - hidden, 768)
        if not over:
            forms.append((hidden, rest - 19 * 12 - 2 * hidden))  # prompts + 4 lora
    most = 19 * 12 * (10 + 4 * 10)
    assert [hidden for hidden, units in forms if 0 < units <= most] == [439, 1207, 1975]


def test_a_sample_fills_the_first_blocks_of_each_kind_by_itself() -> None:
    generator, space = random.Random(0), Space()
    drawn = [sample(space, generator) for _ in range(500)]
    depths = [tuple(sum(map(bool, row)) for row in subnet) for subnet in drawn]
    assert {d for each in depths for d in each} == {3, 6, 9, 12}
    assert any(len(set(each)) > 1 for each in depths)
    for subnet, depth in zip(drawn, depths, strict=True):
        for row, d in zip(subnet, depth, strict=True):
            assert len(row) == 12
            assert {*row[:d]} <= {1, 5, 10}
            assert not any(row[d:])
    firsts = [subnet.rank[0] for subnet in drawn]
    assert all(120 < firsts.count(size) < 220 for size in (1, 5, 10))


def test_a_subnet_is_carried_over_to_plain_parts() -> None:
    supernet = choose(stirred("vit", SIZES), MIXED)
    model = carry(supernet, surgery.apply(vit(), subnet_rules(MIXED)).eval())
    with torch.no_grad():
        close(model(INPUTS["vit"]), supernet(INPUTS["vit"]))
        close(model(INPUTS["vit"]), by_hand("vit", supernet, written(MIXED))(INPUTS["vit"]))
    kinds = sorted({type(part).__name__ for part in parts(model).values()})
    assert kinds == ["Adapter", "LoRA", "Prompt"]
    assert torch.equal(model.head.weight, supernet.head.weight)  # type: ignore[attr-defined]
    assert not torch.equal(supernet.head.weight, vit().head.weight)  # type: ignore[attr-defined]


def test_a_found_subnet_is_trained_and_comes_off() -> None:
    trains_and_comes_off("vit", subnet_rules(MIXED))


def test_of_a_subnet_lora_alone_merges() -> None:
    merges("vit", subnet_rules(MIXED._replace(tokens=(0,) * 3, hidden=(0,) * 3)))
    with pytest.raises(OperationError, match="Prompt stands at a Block"):
        surgery.merge(stirred("vit", subnet_rules(MIXED)))


def test_carry_says_what_does_not_fit() -> None:
    model = surgery.apply(vit(), subnet_rules(MIXED))
    with pytest.raises(OperationError, match=r"\(5, 24\), the supernet \(2, 24\)"):
        carry(surgery.apply(vit(), noah(4, 3, 2)), model)
    with pytest.raises(OperationError, match="the supernet has nothing of that name"):
        carry(surgery.apply(vit(), SIZES[:2]), model)


def test_copies_and_files_have_sizes_of_their_own(tmp_path: Path) -> None:
    model = choose(stirred("vit", SIZES), MIXED)
    other = copy.deepcopy(model)
    with torch.no_grad():
        want = model(INPUTS["vit"])
        assert torch.equal(other(INPUTS["vit"]), want)
        choose(other, FULL)
        assert torch.equal(model(INPUTS["vit"]), want)
        path = surgery.save(model, tmp_path / "noah.safetensors")
        loaded = surgery.load(vit(), path, rules=SIZES)
        assert torch.equal(loaded(INPUTS["vit"]), other(INPUTS["vit"]))  # whole, until chosen
        assert torch.equal(choose(loaded, MIXED)(INPUTS["vit"]), want)


def test_choose_says_what_does_not_fit() -> None:
    model = surgery.apply(vit(), SIZES)
    with pytest.raises(RuleError, match=r"rank\[1\]=4\): the part at blocks\.1 has 3 units"):
        choose(model, MIXED._replace(rank=(0, 4, 0)))
    assert parts(model)["blocks/0/insert"].active == 4  # untouched
    with pytest.raises(RuleError, match=r"sizes are needed for 3"):
        choose(model, sample(Space(), random.Random(0)))
    with pytest.raises(OperationError, match="never operated"):
        choose(vit(), MIXED)
    with pytest.raises(OperationError, match="no part of elastic size"):
        choose(surgery.apply(vit(), "adapter"), MIXED)
    with pytest.raises(RuleError, match="sizes are needed for 2"):
        subnet_rules(Subnet((1, 1), (1, 1), (1,)))


@pytest.mark.parametrize(
    "wrong",
    [{"depths": (13,)}, {"rank": (0, 1)}, {"tokens": ()}, {"blocks": 0}, {"hidden": (1.5,)}],
)
def test_a_space_of_wrong_sizes_is_refused(wrong: Any) -> None:
    with pytest.raises(RuleError, match=f"Space\\({next(iter(wrong))}="):
        Space(**wrong)


# evolution -------------------------------------------------------------------------------------


def score(subnet: Subnet) -> float:
    """Of no order that a first draw would hit: sizes far from the budget's edge are best."""
    return -abs(sum(subnet.tokens) - 5) - abs(sum(subnet.rank) - 5) - 0.1 * sum(subnet.hidden)


class Watched:
    """An evaluation that remembers what it saw, and may be interrupted."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[Subnet] = []
        self.stop = stop

    def __call__(self, subnet: Subnet) -> float:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(subnet)
        return score(subnet)


BUDGET = 1500
FEW = {"population": 12, "top": 4, "mutations": 6, "crossovers": 6, "generations": 6}


def test_nothing_is_evaluated_twice_or_over_budget() -> None:
    watched = Watched()
    evolve(watched, SMALL, BUDGET)
    assert len(watched.seen) == len(set(watched.seen)) > 200
    assert max(cost(subnet, 24) for subnet in watched.seen) <= BUDGET
    drawn = [sample(SMALL, random.Random(i)) for i in range(100)]
    assert any(cost(subnet, 24) > BUDGET for subnet in drawn)  # the budget binds


def test_it_finds_the_best_of_a_space_small_enough_to_list() -> None:
    space = Space(blocks=2, width=24, depths=(1, 2), tokens=(1, 2), rank=(1, 2), hidden=(1, 2))
    rows = [(1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    every = [Subnet(a, b, c) for a in rows for b in rows for c in rows]
    found = evolve(score, space, 500)
    best = max(score(s) for s in every if cost(s, 24) <= 500)
    assert found[0].score == best < max(map(score, every))
    price = cost(found[0].subnet, 24)
    assert evolve(score, space, price)[0].score == best
    assert cost(evolve(score, space, price - 1)[0].subnet, 24) < price
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    assert len(found) == 10


def test_the_same_seed_gives_the_same_search() -> None:
    runs = [Watched() for _ in range(3)]
    found = [
        evolve(run, SMALL, BUDGET, seed=seed, **FEW)  # type: ignore[arg-type]
        for run, seed in zip(runs, (0, 0, 1), strict=True)
    ]
    assert runs[0].seen == runs[1].seen != runs[2].seen
    assert found[0] == found[1]


def test_generations_get_better_and_are_told() -> None:
    told: list[tuple[int, Subnet, float]] = []
    found = evolve(score, SMALL, BUDGET, progress=lambda *each: told.append(each), **FEW)  # type: ignore[arg-type]
    assert [generation for generation, _, _ in told] == [1, 2, 3, 4, 5, 6]
    scores = [value for _, _, value in told]
    assert scores == sorted(scores)
    assert scores[0] < scores[-1]
    assert Scored(*told[-1][1:]) == found[0]
    assert all(score(subnet) == value for _, subnet, value in told)


@pytest.mark.parametrize("stop", [0, 5, 12, 30, 71])
def test_an_interrupted_search_ends_as_one_that_was_not(tmp_path: Path, stop: int) -> None:
    whole, first, second = Watched(), Watched(stop), Watched()
    want = evolve(whole, SMALL, BUDGET, resume=tmp_path / "whole.json", **FEW)  # type: ignore[arg-type]
    path = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        evolve(first, SMALL, BUDGET, resume=path, **FEW)  # type: ignore[arg-type]
    assert path.exists() == (stop >= 12)
    assert evolve(second, SMALL, BUDGET, resume=path, **FEW) == want  # type: ignore[arg-type]
    done = stop - stop % 12 if stop % 12 else stop  # whole generations
    assert first.seen == whole.seen[:stop]
    assert second.seen == whole.seen[done:]
    assert json.loads(path.read_text()) == json.loads((tmp_path / "whole.json").read_text())


def test_a_finished_search_is_read_and_may_go_on(tmp_path: Path) -> None:
    path, again = tmp_path / "search.json", Watched()
    settings: dict[str, Any] = {**FEW, "resume": path}
    found = evolve(score, SMALL, BUDGET, **settings)
    assert evolve(again, SMALL, BUDGET, **settings) == found
    assert again.seen == []
    longer = evolve(again, SMALL, BUDGET, **{**settings, "generations": 8})
    assert longer == evolve(score, SMALL, BUDGET, **{**FEW, "generations": 8})  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search.json"
    settings: dict[str, Any] = {**FEW, "resume": path}
    evolve(score, SMALL, BUDGET, **{**settings, "generations": 2})
    was = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            evolve(score, SMALL, BUDGET, **settings)
    assert path.read_text() == was
    assert evolve(score, SMALL, BUDGET, **settings) == evolve(score, SMALL, BUDGET, **FEW)  # type: ignore[arg-type]


def test_a_file_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    evolve(score, SMALL, BUDGET, resume=path, **FEW)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="budget, seed differ"):
        evolve(score, SMALL, 1400, seed=1, resume=path, **FEW)  # type: ignore[arg-type]
    path.write_text("{}")
    with pytest.raises(FileError, match="it holds no search"):
        evolve(score, SMALL, BUDGET, resume=path, **FEW)  # type: ignore[arg-type]


def test_a_tight_budget_starts_from_the_smallest_and_one_too_small_is_told() -> None:
    space = Space(depths=(3, 12))
    least = 3 * (768 + 4 * 768 + 2 * 768 + 1 + 768)
    (only,) = evolve(lambda _: 1.0, space, least, generations=1)
    assert only.subnet == Subnet(*[(1,) * 3 + (0,) * 9] * 3)
    with pytest.raises(RuleError, match=f"the smallest subnet of the space costs {least}"):
        evolve(score, space, least - 1)
    with pytest.raises(RuleError, match="is not a number"):
        evolve(lambda _: float("nan"), SMALL, BUDGET)


def test_a_supernet_is_searched_end_to_end() -> None:
    model = stirred("vit", SIZES)
    target = torch.tensor([1, 3])

    @torch.no_grad()
    def evaluate(subnet: Subnet) -> float:
        return -F.cross_entropy(choose(model, subnet)(INPUTS["vit"]), target).item()

    few: dict[str, Any] = {**FEW, "generations": 2}
    best, *_ = evolve(evaluate, SMALL, BUDGET, **few)
    assert evaluate(best.subnet) == best.score
    plain = carry(model, surgery.apply(vit(), subnet_rules(best.subnet)).eval())
    with torch.no_grad():
        close(plain(INPUTS["vit"]), choose(model, best.subnet)(INPUTS["vit"]))


def test_a_search_that_could_not_be_kept_does_not_begin(tmp_path: Path) -> None:
    seen: list[Subnet] = []
    space = Space(blocks=2, depths=(1, 2))
    with pytest.raises(FileError, match="there is no folder"):
        evolve(lambda s: float(len(seen.append(s) or [])), space, 80_000, resume=tmp_path / "a/b")
    assert seen == []
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"search": [], "generation": 1, "seen": [], "generator": [3, [], null]}')
    with pytest.raises(FileError):
        evolve(lambda s: 0.0, space, 80_000, resume=wrong)
    evolve(lambda s: 0.0, space, 80_000, generations=1, resume=tmp_path / "kept.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "wrong.json"]
