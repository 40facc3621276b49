"""Parts that hear others, whatever joins them, and networks that run beside a model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import append, at, block, norm, parallel, part, prepend, replace, side, weight
from surgery.errors import OperationError, RuleError
from tests.models import images, tiny_vit

WIDTH = 6


class Sum(nn.Module):
    """W (x + heard)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, out)

    def forward(self, x: Tensor, heard: Tensor | None = None) -> Tensor:
        answer: Tensor = self.map(x if heard is None else x + heard)
        return answer


class Rung(nn.Module):
    """s = tanh(D y + U s_before), s of a width of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.on = nn.Linear(width, inner), nn.Linear(inner, inner)

    def forward(self, y: Tensor, before: Tensor | None) -> Tensor:
        new: Tensor = self.down(y)
        return torch.tanh(new if before is None else new + self.on(before))


class Back(nn.Module):
    """U s."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(inner, width)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        answer: Tensor = self.up(heard)
        return answer


@part
def summed(site: Any) -> nn.Module:
    return Sum(site.width, site.out)


@part
def rung(site: Any, inner: int = 3) -> nn.Module:
    return Rung(site.width, inner)


@part
def back(site: Any, inner: int = 3) -> nn.Module:
    return Back(inner, site.width)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.blocks:
            x = each(x).relu()
        answer: Tensor = self.last(x)
        return answer


LADDER = [
    at("blocks.*", side(rung())),
    at("last", prepend(back(), residual=True, hears="blocks.*")),
]
X = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def stack(rules: Any = LADDER) -> Any:
    torch.manual_seed(0)
    return surgery.apply(Stack(), rules)


def parts_of(model: Any) -> list[Any]:
    return list(model.surgery.default.children())


def gradients(model: Any) -> dict[str, Tensor]:
    """Copies, but of the first rung's map of what it does not hear."""
    named = model.surgery.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    assert len(found) == 12
    return found


def by_hand(model: Any, x: Tensor) -> Tensor:
    """The ladder, written out."""
    rungs, s = dict(model.surgery.default.named_children()), None
    for i, each in enumerate(model.blocks):
        y = nn.functional.linear(x, each.weight, each.bias)
        s = rungs[f"blocks/{i}/side"](y.detach(), s)
        x = y.relu()
    x = x + rungs["last/prepend"](x, s)
    return nn.functional.linear(x, model.last.weight, model.last.bias)


def test_a_network_beside_is_what_is_written_out() -> None:
    model = stack()
    torch.testing.assert_close(model(X), by_hand(model, X), rtol=0, atol=0)
    model(X).square().sum().backward()
    got = gradients(model)
    model.zero_grad()
    by_hand(model, X).square().sum().backward()
    torch.testing.assert_close(gradients(model), got)


def test_no_gradient_goes_through_the_model() -> None:
    x = X.clone().requires_grad_()
    model = stack([*LADDER[:1], at("last", replace(back(), hears="blocks.*"))])
    model(x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace], ids=lambda e: e.__name__)
def test_every_edit_hears(edit: Any) -> None:
    rules = [at("blocks.0", parallel(summed())), at("blocks.2", edit(summed(), hears="blocks.0"))]
    model = stack(rules)
    first, second = parts_of(model)
    a, b, c = (model.blocks[i] for i in range(3))

    def linear(m: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, m.weight, m.bias)

    heard = first(X)
    x = linear(b, (linear(a, X) + heard).relu()).relu()
    want = {
        parallel: lambda: linear(c, x) + second(x, heard),
        append: lambda: second(linear(c, x), heard),
        prepend: lambda: linear(c, second(x, heard)),
        replace: lambda: second(x, heard),
    }[edit]()
    torch.testing.assert_close(model(X), linear(model.last, want.relu()), rtol=0, atol=0)
    assert "hears=" in repr(rules[1])


def test_what_is_aside_of_one_place_is_heard_by_the_next_rule_there() -> None:
    rules = [at("blocks.*", side(rung(WIDTH)), append(summed(), hears="blocks.*"))]
    model = stack(rules)
    parts = dict(model.surgery.default.named_children())
    x, s = X, None
    for i, each in enumerate(model.blocks):
        y = nn.functional.linear(x, each.weight, each.bias)
        s = parts[f"blocks/{i}/side"](y.detach(), s)
        x = parts[f"blocks/{i}/append"](y, s).relu()
    want = nn.functional.linear(x, model.last.weight, model.last.bias)
    torch.testing.assert_close(model(X), want, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_heard_of_one_place_compiles_whole(whole: bool) -> None:
    model = stack([at("blocks.*", side(rung(WIDTH)), append(summed(), hears="blocks.*"))])
    want = model(X)
    torch._dynamo.reset()
    if not whole:
        for each in model.blocks[1:]:
            each.compile(backend="aot_eager")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if whole else model
    torch.testing.assert_close(compiled(X), want)
    torch._dynamo.reset()


def test_copies_and_pickles_go_on_with_their_own() -> None:
    model = stack()
    want = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(X), want, rtol=0, atol=0)
        with torch.no_grad():
            for p in surgery.parameters(twin):
                p.zero_()
        torch.testing.assert_close(twin(X), by_hand(twin, X), rtol=0, atol=0)
    torch.testing.assert_close(model(X), want, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_the_same(whole: bool) -> None:
    model = stack()
    want = model(X)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    if not whole:
        compiled = copy.deepcopy(model)
        for each in compiled.blocks:
            each.compile(backend="aot_eager")
    torch.testing.assert_close(compiled(X), want)
    compiled(X).sum().backward()
    torch._dynamo.reset()


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for each in self.blocks:
            x = checkpoint(lambda x, each=each: each(x).relu(), x, use_reentrant=False)
        answer: Tensor = self.last(x)
        return answer


def test_checkpoints_of_two_forwards_keep_their_own() -> None:
    torch.manual_seed(0)
    model, other = surgery.apply(Checkpointed(), LADDER), -X
    one, _ = model(X), model(other)
    one.square().sum().backward()
    got = gradients(model)
    model.zero_grad()
    by_hand(model, X).square().sum().backward()
    torch.testing.assert_close(gradients(model), got)


def test_merging_refuses_what_hears_or_is_heard() -> None:
    with pytest.raises(OperationError, match="Rung hears another part"):
        surgery.merge(stack())


def test_a_weight_hears_nothing() -> None:
    for edit in (side(rung()), parallel(summed(), hears="blocks.0")):
        with pytest.raises(RuleError, match=r"acts on features|hears features"):
            stack([at("blocks.0", parallel(summed())), at(weight("blocks.1.weight"), edit)])


def test_without_anything_to_hear_it_is_an_error() -> None:
    with pytest.raises(RuleError, match="no rule joins a part"):
        stack([at("last", append(summed(), hears="blocks.*"))])


def test_what_is_left_out_for_hearing_nothing_is_heard_by_nothing() -> None:
    def heard(*rules: Any) -> dict[str, str]:
        plan = surgery.plan(Stack(), [*rules])
        assert len(plan.apply()(X)) == len(X)
        return {p.place.path: source.place.path for p, source in plan.heard_from.items()}

    deaf = at("blocks.0", side(rung(), hears="last"), optional=True)
    assert heard(deaf, at("blocks.1", side(rung()))) == {}
    assert heard(deaf, at("blocks.[1:]", side(rung()))) == {"blocks.2": "blocks.1"}
    after = at("blocks.1", side(rung(), hears="blocks.0"), optional=True)
    assert heard(deaf, after, at("blocks.2", side(rung()))) == {}
    with pytest.raises(RuleError, match="no rule joins a part"):
        heard(deaf, at("last", prepend(back(), hears="blocks.0")))


class Towers(nn.Module):
    """An embedding, and two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(WIDTH, WIDTH), Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        answer: Tensor = self.a(x) + self.b(x)
        return answer


def test_towers_have_networks_of_their_own_and_an_embedding_begins_them() -> None:
    rules = [at("first", side(rung())), at("*.blocks.*", side(rung())),
             at("*.last", prepend(back(), residual=True, hears="*.blocks.*"))]  # fmt: skip
    model: Any = surgery.apply(Towers(), rules, example=X)
    told = {h.path: h.heard.sources for h in model.surgery.default.hooked_sites}
    assert told.pop("first") == {}
    heard = {path: sources[0][0] for path, sources in told.items()}
    assert heard["a.blocks.0"] == heard["b.blocks.0"] == "first"
    assert heard["b.blocks.1"] == "b.blocks.0"
    assert heard["b.last"] == "b.blocks.2"


def test_the_rules_evaluate_back() -> None:
    rules = [
        at(norm, side(surgery.adapter(rank=2), hears=block)),
        at(block, append(summed(), hears="b.*")),
    ]
    for rule in rules:
        again = eval(repr(rule), {**vars(surgery), **vars(surgery.parts), "summed": summed})
        assert again == rule


def sources(model: Any) -> dict[str, list[str]]:
    hooked = model.surgery.default.hooked_sites
    return {h.path: [path for path, _ in h.heard.sources.values()] for h in hooked}


class Nested(nn.Module):
    """Blocks each in a container of its own, perhaps of two streams."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        names = ("t", "v")[:streams]
        self.layers = nn.ModuleList(
            [nn.ModuleDict({name: layer() for name in names}) for _ in range(3)]
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        xs = dict.fromkeys(self.layers[0], x)
        for each in self.layers:
            xs = {name: each[name](y) for name, y in xs.items()}
        answer: Tensor = self.head(sum(xs.values()))  # type: ignore[arg-type]
        return answer


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)


def test_rungs_of_blocks_in_containers_of_their_own_hear_one_another() -> None:
    def heard(streams: int, **named: Any) -> dict[str, str]:
        plan = surgery.plan(Nested(streams), at("layers.*.*", side(rung(16))), **named)
        return {p.place.path: source.place.path for p, source in plan.heard_from.items()}

    x = torch.randn(2, 5, 16)
    alone = {"layers.1.t": "layers.0.t", "layers.2.t": "layers.1.t"}
    assert heard(1) == heard(1, example=x) == alone
    assert heard(2, example=x) == {
        f"layers.{i}.{name}": f"layers.{i - 1}.{name}" for i in (1, 2) for name in "tv"
    }


@pytest.mark.parametrize("rules", ["lst", "dtl"])
def test_files_of_side_networks_need_no_example(rules: str, tmp_path: Path) -> None:
    model = surgery.apply(tiny_vit().eval(), rules, example=images())
    surgery.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    again = surgery.load(tiny_vit().eval(), tmp_path / "a.safetensors")
    assert sources(again) == sources(model)


def test_what_nothing_hears_is_a_note() -> None:
    told = str(surgery.plan(Stack(), LADDER[:1]))
    assert "nothing hears what runs aside at blocks.2" in told
    assert "nothing hears" not in str(surgery.plan(Stack(), LADDER))


def test_a_place_within_a_block_hears_the_block_before() -> None:
    rules = [at(block, side(rung(24))), at("blocks.[1:].mlp", append(summed(), hears=block))]
    model = surgery.apply(tiny_vit(), rules)
    told = {h.path: [path for path, _ in h.heard.sources.values()] for h in
            model.surgery.default.hooked_sites if h.path.endswith("mlp")}  # fmt: skip
    assert told == {"blocks.1.mlp": ["blocks.0"], "blocks.2.mlp": ["blocks.1"]}
    model(images()).sum().backward()
