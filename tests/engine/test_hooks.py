"""One hooked site: calls and outputs of every form, errors that name the place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import append, at, ffn, parallel, prepend, span, unfreeze
from tests import models
from tests.laws import checks as laws
from tests.laws.checks import Linears, plain, raised

# outputs ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def _shapes_of_output(y: Tensor) -> dict[str, Any]:
    return {
        "tuple": (y, "kept"),
        "list": [y, 3],
        "dict": {"hidden": y, "more": None},
        "nested": ((y,), {"a": 1}),
        "namedtuple": Pair(y, torch.ones(1)),
    }


class Speaking(nn.Module):
    """A linear that answers in some nest of containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(8, 8), kind

    def forward(self, *, hidden: Tensor, mask: Tensor | None = None) -> Any:
        return _shapes_of_output(self.inner(hidden))[self.kind]


class Asking(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = Speaking(kind)

    def forward(self, x: Tensor) -> Any:
        return self.layer(mask=None, hidden=x)


@pytest.mark.parametrize("kind", _shapes_of_output(torch.ones(1)))
def test_keyword_calls_and_nested_outputs_keep_their_form(kind: str) -> None:
    model, x = Asking(kind), torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, at("layer", prepend(plain), append(plain), parallel(plain)))
    parts = [model.surgery.default.get_submodule(f"layer/{w}") for w in ("prepend", "append")]
    beside = model.surgery.default.get_submodule("layer/parallel")
    got, was = model(x), base(x)
    leaf, spec = torch.utils._pytree.tree_flatten(got)
    old, old_spec = torch.utils._pytree.tree_flatten(was)
    assert spec == old_spec
    assert torch.equal(leaf[0], parts[1](base.layer.inner(parts[0](x))) + beside(x))
    assert all(a == b for a, b in zip(leaf[1:], old[1:], strict=True))


def test_a_model_output_of_transformers_keeps_its_class() -> None:
    model = models.hf_vit()
    kind = type(model(models.images()))
    surgery.apply(model, at("", append(plain)))
    out = model(models.images())
    assert type(out) is kind
    assert out.logits.shape == (2, 5)


@dataclass
class Opaque:
    hidden: Tensor


def test_an_output_that_cannot_be_opened_is_refused_by_name() -> None:
    class Wrapping(Linears):
        def forward(self, x: Tensor) -> Any:
            return Opaque(super().forward(x))

    model = surgery.apply(nn.Sequential(Wrapping()), at("0", append(plain)))
    assert "graft at 0" in str(raised(surgery.GraftError, lambda: model(torch.randn(2, 8))))


def test_a_module_called_twice_runs_its_part_twice() -> None:
    class Twice(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x))

    model, x = Twice().double(), torch.randn(2, 8, dtype=torch.float64)
    surgery.apply(model, at("one", prepend(plain), parallel(plain)))
    base, room = copy.deepcopy(model), model.surgery.default
    pre, beside = room.get_submodule("one/prepend"), room.get_submodule("one/parallel")
    surgery.revert(base)

    def once(x: Tensor) -> Tensor:
        return base.one(pre(x)) + beside(x)

    assert torch.equal(model(x), once(once(x)))


def test_user_hooks_fire_once_each_in_their_old_order_before_grafts() -> None:
    laws.user_hooks_come_first()


def test_a_hook_added_after_apply_survives_revert() -> None:
    model, told = Linears(), list[str]()
    surgery.apply(model, at("one", append(plain)))
    model.one.register_forward_hook(lambda *_: told.append("later"))
    surgery.revert(model)
    model(torch.randn(2, 8))
    assert told == ["later"]
    assert len(model.one._forward_hooks) == 1


# calls -----------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """A layer called by name only, in whatever order, that answers with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = KeyedLayer()

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.layer(mask=torch.zeros_like(x), hidden=x)
        return hidden


class KeyedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, *, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(hidden) + mask, mask


def test_the_input_of_a_call_by_name_is_the_first_that_the_module_declares() -> None:
    model, x = Keyed(), torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, at("layer", prepend(plain), parallel(plain), append(plain)), example=x)
    pre, beside, after = map(
        model.surgery.default.get_submodule,
        ("layer/prepend", "layer/parallel", "layer/append"),
    )
    assert torch.equal(model(x), after(base.layer.inner(pre(x)) + beside(x)))


@pytest.mark.parametrize("named", [False, True])
def test_what_comes_before_self_attention_reaches_query_key_and_value(named: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if named:
                return self.attn(value=x, key=x, query=x)[0]
            return self.attn(x, x, x)[0]

    model, x = Attending(), torch.randn(2, 5, 24)
    base = copy.deepcopy(model)
    surgery.apply(model, at("attn", prepend(plain)), example=x)
    y = model.surgery.default.get_submodule("attn/prepend")(x)
    assert torch.allclose(model(x), base(y), atol=1e-6)


class Albert(nn.Module):
    """One block, three times, with an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Linears()
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(self.block(x)))


EDITS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "parallel": lambda base, part, x: base(x) + part(x),
    "append": lambda base, part, x: part(base(x)),
    "prepend": lambda base, part, x: base(part(x)),
    "replace": lambda base, part, x: part(x),
}


@pytest.mark.parametrize("where", ["block", "again", span("block.one", "block.two")], ids=repr)
@pytest.mark.parametrize("word", EDITS)
def test_every_call_of_a_module_is_met_by_every_edit(word: str, where: Any) -> None:
    if word == "replace" and not isinstance(where, str):
        where = "block"
    model, x = Albert().double(), torch.randn(2, 8, dtype=torch.float64)
    base = copy.deepcopy(model.block)
    surgery.apply(model, at(where, getattr(surgery, word)(plain)), example=x)
    (part,) = model.surgery.default.children()
    want = x
    for _ in range(3):
        want = EDITS[word](base, part, want)
    assert torch.allclose(model(x), want, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), want, atol=1e-12)


@pytest.mark.parametrize("word", EDITS)
def test_albert_of_transformers_runs_its_part_in_every_layer(word: str) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        hidden_size=24,
        embedding_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        vocab_size=32,
        max_position_embeddings=16,
    )
    model, calls = AlbertModel(config).eval(), list[int]()
    ids = torch.randint(0, 32, (2, 6))
    where = "**.ffn" if word == "replace" else ffn
    surgery.apply(model, at(where, getattr(surgery, word)(plain)), example={"input_ids": ids})
    (part,) = model.surgery.default.children()
    part.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids)
    assert len(calls) == 3


def _keyed() -> tuple[nn.Module, Any]:
    return Keyed(), [at("layer", prepend(plain), append(plain))]


def _spanned() -> tuple[nn.Module, Any]:
    return Linears(), [at(span("one", "two"), prepend(plain), parallel(plain))]


def _attending() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer), [at("**.self_attn", prepend(plain)), at(ffn, append(plain))]


@pytest.mark.parametrize("build", [_keyed, _spanned, _attending], ids=lambda b: b.__name__)
def test_compiled_in_one_graph_they_answer_alike(build: Any) -> None:
    torch._dynamo.reset()
    (model, rules), x = build(), torch.randn(2, 5, 8)
    surgery.apply(model, rules)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    assert torch.allclose(got, model(x), atol=1e-6)
    torch._dynamo.reset()


def test_what_an_optional_rule_unfreezes_in_vain_is_a_note() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    x = torch.randn(2, 4)
    with pytest.raises(
        surgery.GraftError, match=r"no gradient comes from the output to spare\.weight"
    ):
        surgery.apply(Spare(), at(nn.Linear, unfreeze), example=x)
    model = surgery.apply(Spare(), at(nn.Linear, unfreeze, optional=True), example=x)
    told = "note: no gradient comes to spare.weight, spare.bias with this example"
    assert told in str(surgery.report(model))
    with_all = surgery.apply(Spare(), at("used", unfreeze, optional=True), example=x)
    assert "no gradient" not in str(surgery.report(with_all))


def routed(**named: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    return surgery.apply(model, at("0", parallel(surgery.moa(rank=2, heads=2))), **named)


def test_errors_of_a_graft_name_its_place() -> None:
    model = surgery.apply(Linears(), at("one", parallel(plain)))
    with (
        surgery.disabled(model),
        torch.enable_grad(),
        pytest.raises(surgery.GraftError, match="through one, by enable_grad"),
    ):
        model(torch.randn(2, 8))
    model.one.weight, model.one.bias = nn.Parameter(torch.randn(8, 4)), None
    with pytest.raises(surgery.GraftError, match=r"^Linear at one: it was given"):
        model(torch.randn(2, 4))


def test_a_graft_that_is_unmarked_has_not_run() -> None:
    model = surgery.apply(Linears(), at("one", parallel(plain)))
    model(torch.randn(2, 8))
    (hooked,) = model.surgery.default.hooked_sites
    assert hooked.ran
    hooked.unsee()
    assert not hooked.ran


def test_a_balance_that_is_not_scaled_is_refused_under_float16_autocast_alone() -> None:
    x = torch.randn(4, 8)
    for balance, dtype in (
        (0.1, torch.bfloat16),
        (lambda: 0.1, torch.float16),
        (None, torch.float16),
    ):
        with torch.autocast("cpu", dtype=dtype):
            routed(balance=balance)(x)
    routed(balance=0.1)(x)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(surgery.GraftError, match="scal"),
    ):
        routed(balance=0.1)(x)
