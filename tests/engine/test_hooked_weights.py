"""Parts at weights that nobody calls: what reads one sees what linear parts make of it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import append, at, lora, parallel, prepend, proj, qkv, scale_shift, shared, weight
from surgery.engine.hooked_weights import HookedWeight
from tests.laws.checks import stir_parts


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


class Convolutions(nn.Module):
    """One with strides, one in groups, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.grouped(torch.relu(self.first(x))))


class Tied(nn.Module):
    """A language model whose table is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))))


class Experts(nn.Module):
    """Four networks in two tensors, all of which run."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 6) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("nd,edh->enh", x, self.up))
        return torch.einsum("enh,ehd->nd", hidden, self.down)


class HeldExperts(nn.Module):
    """The same, in a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.held = nn.Linear(8, 8), nn.Module()
        self.held.up = nn.Parameter(torch.randn(4, 8, 6) * 0.3)
        self.held.down = nn.Parameter(torch.randn(4, 6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("nd,edh->enh", self.embed(x), self.held.up))
        return torch.einsum("enh,ehd->nd", hidden, self.held.down)


def apart() -> nn.Module:
    return nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True).eval()


tokens, image, ids = torch.randn(2, 5, 16), torch.randn(2, 3, 8, 8), torch.arange(10).view(2, 5)
three = (tokens, torch.randn(2, 5, 12), torch.randn(2, 5, 20))
part = lora(rank=2)
own = "{q_proj_weight,k_proj_weight,v_proj_weight}"
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "query, key and value": (encoder, at(qkv, part), tokens),
    "query and value": (encoder, at(qkv, lora(rank=2, rows="q _k v")), tokens),
    "output": (encoder, at(proj, part), tokens),
    "input": (encoder, at(qkv, prepend(part, residual=True)), tokens),
    "both": (encoder, [at(qkv, part), at(proj, append(part, residual=True))], tokens),
    "rows": (encoder, at(weight("**.in_proj_weight", rows=(0, 16)), part), tokens),
    "rows twice": (
        encoder,
        [
            at(weight("**.in_proj_weight", rows=(0, 16)), part),
            at(weight("**.in_proj_weight", rows=(32, 48)), part),
        ],
        tokens,
    ),
    "with bias": (encoder, at(qkv, append(scale_shift())), tokens),
    "apart": (apart, at(weight(own), part), three),
    "of a role, apart": (apart, at(qkv, part), three),
    "convolutions": (Convolutions, at(weight("{first,grouped}.weight"), part), image),
    "a vector": (Convolutions, at(weight("norm.weight"), append(scale_shift(shift=False))), image),
    "tied": (Tied, at(weight("head.weight"), part), ids),
    "experts": (lambda: nn.Sequential(nn.Linear(8, 8), Experts()), at(weight("1.*"), part),
                torch.randn(5, 8)),
    "one for all experts": (
        lambda: nn.Sequential(nn.Linear(8, 8), Experts()),
        at(weight("1.*"), parallel(shared(part))),
        torch.randn(5, 8),
    ),
    "experts that are held": (HeldExperts, at(weight("held.*"), part), torch.randn(5, 8)),
}  # fmt: skip


def answer(model: nn.Module, x: Any) -> Tensor:
    given = model(*x) if isinstance(x, tuple) else model(x)
    out: Tensor = given[0] if isinstance(given, tuple) else given
    return out


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module, Any]]:
    """An operated model whose parts do something, the base, and an input."""
    build, rules, x = CASES[request.param]
    torch.manual_seed(0)
    base = build().eval()
    model = surgery.apply(copy.deepcopy(base), rules, example=x)
    stir_parts(model)
    with sdpa_kernel(SDPBackend.MATH):
        yield model, base, x


def by_hand(model: nn.Module, base: nn.Module) -> nn.Module:
    """The base with every weight as its parts make it."""
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for hooked in model.surgery.default.hooked_sites:
            for name, tensor in hooked.made(hooked._now(hooked.reads[0])).items():
                holder = plain.get_submodule(hooked.path.rpartition(".")[0].split("[")[0])
                at_rows = hooked.rows or slice(None)
                holder._parameters[name][at_rows] = tensor[at_rows]
    return plain


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=16 * torch.finfo(a.dtype).eps * 8)


def test_what_reads_a_weight_sees_it_changed(case: Any) -> None:
    model, base, x = case
    plain = by_hand(model, base)
    assert not torch.allclose(answer(model, x), answer(base, x))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for training in (False, True):
            with mode():
                plain.train(training)
                for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
                    norm.eval()  # as frozen ones stay
                close(answer(model.train(training), x), answer(plain, x))


def test_outside_of_a_forward_it_is_the_weight(case: Any) -> None:
    model, base, x = case
    before = surgery.fingerprint(base)
    answer(model, x).sum().backward()
    assert [k for k in model.state_dict() if "surgery." not in k] == list(base.state_dict())
    for name, p in base.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    for module in model.modules():
        assert not any(isinstance(v, Tensor) for v in vars(module).values())
    assert all(p.grad.abs().sum() > 0 for p in model.surgery.parameters())
    assert surgery.fingerprint(base) == before


def test_merging_writes_what_a_forward_saw(case: Any) -> None:
    model, _, x = case
    with torch.no_grad():
        before = answer(model, x)
        surgery.merge(model)
        close(answer(model, x), before)
        surgery.unmerge(model)
        assert torch.equal(answer(model, x), before)


@pytest.mark.parametrize("name", CASES)
def test_it_is_undone_to_the_bit(name: str) -> None:
    build, rules, x = CASES[name]
    model = build().eval()
    before = surgery.fingerprint(model)
    with surgery._preserve.preserved():
        surgery.apply(model, rules, example=x)
        stir_parts(model)
        answer(model, x)
        surgery.merge(model)
        surgery.revert(model)
    after = surgery.fingerprint(model)
    assert [mark for mark in before if before[mark] != after[mark]] == []


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_compiled_exported_copied_pickled_and_called_functionally(case: Any) -> None:
    model, _, x = case
    want, given = answer(model, x), x if isinstance(x, tuple) else (x,)
    close(answer(torch.compile(model, fullgraph=True, backend="aot_eager"), x), want)
    for strict in (False, True):
        close(answer(torch.export.export(model, given, strict=strict).module(), x), want)
    assert torch.equal(answer(pickle.loads(pickle.dumps(model)), x), want)
    called = torch.func.functional_call(model, dict(model.named_parameters()), given)
    assert torch.equal(called[0] if isinstance(called, tuple) else called, want)
    other = copy.deepcopy(model)
    for p in other.surgery.parameters():
        nn.init.zeros_(p)
    assert torch.equal(answer(model, x), want)


def test_a_file_fills_another_model(case: Any, tmp_path: Path) -> None:
    model, base, x = case
    surgery.save(model, tmp_path / "parts.safetensors")
    other = surgery.load(copy.deepcopy(base), tmp_path / "parts.safetensors", example=x)
    assert torch.equal(answer(other, x), answer(model, x))


def test_disabled_the_base_answers(case: Any) -> None:
    model, base, x = case
    with torch.no_grad(), surgery.disabled(model):
        close(answer(model, x), answer(base, x))


# neighbours ---------------------------------------------------------------------------------------


def test_a_later_operation_acts_on_what_an_earlier_one_made() -> None:
    model = surgery.apply(encoder(), at(qkv, part))
    stir_parts(model)
    one = answer(model, tokens)
    surgery.apply(model, at(qkv, append(scale_shift())), name="second")
    for p in model.surgery.second.parameters():
        nn.init.constant_(p, 0.5)
    both = answer(model, tokens)
    assert not torch.allclose(both, one)
    surgery.merge(model)
    close(answer(model, tokens), both)
    surgery.unmerge(model)
    surgery.revert(model, name="second")
    assert torch.equal(answer(model, tokens), one)


def test_threads_see_the_weight_changed_once() -> None:
    model = surgery.apply(encoder(), at(qkv, part))
    stir_parts(model)
    inputs = [torch.randn(2, 5, 16) for _ in range(8)]
    wrong: list[int] = []
    with torch.no_grad():
        wanted = [model(x) for x in inputs]

    def work() -> None:
        with torch.no_grad():
            for _ in range(25):
                pairs = zip(inputs, wanted, strict=True)
                wrong.extend(
                    i for i, (x, y) in enumerate(pairs) if (model(x) - y).abs().max() > 1e-4
                )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Interrupting(nn.Module):
    """Is interrupted in its forward, if asked to be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.interrupted = nn.Parameter(torch.randn(4, 4)), False

    def forward(self, x: Tensor) -> Tensor:
        if self.interrupted:
            raise KeyboardInterrupt
        return x @ self.weight.t()


def test_an_interrupt_in_a_reader_leaves_nothing_changed_and_nobody_waiting() -> None:
    model = surgery.apply(Interrupting(), at(weight("weight"), part))
    stir_parts(model)
    x = torch.randn(3, 4)
    want = model(x).detach()
    model.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.interrupted = False
    answers: list[Tensor] = []
    thread = threading.Thread(target=lambda: answers.append(model(x).detach()))
    thread.start()
    thread.join(timeout=10)
    assert answers, "another thread waits for one that was interrupted"
    assert torch.equal(answers[0], want)
    assert torch.equal(model(x), want)
    assert "weight" not in vars(model)


def test_an_error_in_a_reader_leaves_the_weight() -> None:
    model = surgery.apply(encoder(), at(qkv, part))
    with pytest.raises(Exception, match=r"expecting embedding dimension|shape"):
        model(torch.randn(2, 5, 15))
    assert not any("in_proj_weight" in vars(module) for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(reentrant: bool) -> None:
    model = surgery.apply(encoder(), at(qkv, part))
    stir_parts(model)

    def gradients(run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        x = tokens.clone().requires_grad_()
        for layer in model.layers:
            x = run(layer, x)
        x.square().sum().backward()
        return [p.grad.clone() for p in model.surgery.parameters() if p.grad is not None]

    kept = gradients(lambda layer, x: layer(x))
    again = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert len(kept) == len(again) == 4
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b)


def test_a_table_that_is_tied_can_be_changed_in_one_place_alone() -> None:
    model = surgery.apply(Tied(), at(weight("head.weight", tied=False), part), example=ids)
    stir_parts(model)
    plain = copy.deepcopy(model)
    surgery.revert(plain)
    seen = model.table(ids)
    assert torch.equal(seen, plain.table(ids))
    assert not torch.allclose(model(ids), plain(ids))
    with pytest.raises(surgery.OperationError, match=r"table\.weight.* are one memory"):
        surgery.merge(model)
    tied = surgery.apply(Tied(), at(weight("head.weight"), part))
    stir_parts(tied)
    assert not torch.allclose(tied.table(ids), tied.table.weight[ids])
    assert tied.head.weight is tied.table.weight


@pytest.mark.parametrize(
    ("edit", "fact"),
    [
        (parallel(surgery.adapter(rank=2)), "Adapter is not linear"),
        (lora(rank=2, dropout=0.1), "a dropout acts on features"),
        (surgery.prompt(tokens=2), "acts on features"),
    ],
)
def test_what_no_weight_can_be_made_by_is_refused(edit: Any, fact: str) -> None:
    model = encoder()
    before = surgery.fingerprint(model)
    with pytest.raises(surgery.RuleError, match=fact):
        surgery.apply(model, at(qkv, edit))
    assert surgery.fingerprint(model) == before


def test_a_bias_needs_one_beside_the_weight() -> None:
    with pytest.raises(surgery.RuleError, match="adds a bias"):
        surgery.apply(Tied(), at(weight("head.weight"), append(scale_shift())))


def test_a_matrix_is_no_part_of_a_vector() -> None:
    with pytest.raises(surgery.RuleError, match="is a vector"):
        surgery.apply(Convolutions(), at(weight("norm.weight"), part))


def test_a_quantised_weight_is_refused() -> None:
    model = Interrupting()
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(surgery.RuleError, match=r"torch\.int8"):
        surgery.apply(model, at(weight("weight"), part))


def test_rows_are_a_pair() -> None:
    for rows in ((3, 2), "q", (1,), (0.0, 2.0)):
        with pytest.raises(surgery.RuleError, match="first and the end"):
            weight("**.weight", rows=rows)  # type: ignore[arg-type]


def test_the_classes_of_weights_are_no_modules() -> None:
    model = encoder()
    plan = surgery.plan(model, at(qkv & surgery.where(nn.Parameter), part))
    assert [site.path for site in plan.sites] == [f"layers.{i}.self_attn.in_proj_weight" for i in
                                                  range(2)]  # fmt: skip
    with pytest.raises(surgery.MatchError):
        surgery.plan(model, at(qkv & surgery.where(nn.MultiheadAttention), part))


def test_a_weight_is_formed_once_for_each_forward_of_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = surgery.apply(encoder(), at(qkv, part))
    formed: list[str] = []
    made = HookedWeight.made

    def counted(self: HookedWeight, now: dict[str, Tensor]) -> dict[str, Tensor]:
        formed.append(self.path)
        return made(self, now)

    monkeypatch.setattr(HookedWeight, "made", counted)
    model(tokens)
    assert formed == [f"layers.{i}.self_attn.in_proj_weight" for i in range(2)]


class ReadTwice(nn.Module):
    """Its table is read by a function too, as a head that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.mix(self.table(ids)), self.table.weight)


@pytest.mark.parametrize("proved", [True, False])
def test_a_weight_that_is_read_elsewhere_too_is_no_silence(proved: bool) -> None:
    model, rule = ReadTwice(), at(weight("table.weight"), part)
    with pytest.raises(surgery.GraftError, match=r"reads table\.weight elsewhere too"):
        surgery.apply(model, rule, example=ids if proved else None)(ids)
    alone = at(weight("table.weight", tied=False), part)
    surgery.apply(ReadTwice(), alone, example=ids)


def test_hooks_of_others_at_a_reader_are_not_between_it_and_its_parts(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = encoder()
    model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    surgery.merge(surgery.apply(model, at(qkv, part)))
    assert not recwarn


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(surgery.RuleError, match="beyond the 48 rows"):
        surgery.plan(encoder(), at(weight("**.in_proj_weight", rows=(0, 999)), part))


def test_rows_are_not_trained_alone() -> None:
    with pytest.raises(surgery.RuleError, match="cannot be trained alone"):
        surgery.plan(encoder(), at(surgery.query, surgery.unfreeze))
    assert surgery.plan(encoder(), at(qkv, surgery.unfreeze)).trainable == 2 * 48 * 17


def test_replicas_of_data_parallel_are_refused() -> None:
    model = surgery.apply(encoder(), "lora")
    attention: Any = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    replica = attention._replicate_for_data_parallel()
    x = torch.randn(2, 5, 24)
    with pytest.raises(surgery.GraftError, match="replica of a MultiheadAttention"):
        replica(x, x, x)


# tables ------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """How many numbers the largest tensor has that something makes, but one."""

    def __init__(self, but: Tensor) -> None:
        super().__init__()
        self.largest, self.but = 0, but.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() != self.but:
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


ON_TABLES: dict[str, Callable[[], Any]] = {
    "lora": lambda: at(weight("table.weight"), lora(rank=2)),
    "rows": lambda: at(weight("table.weight"), surgery.parts.rows([3, 900])),
    "alone": lambda: at(weight("table.weight", tied=False), lora(rank=2)),
}


class Words(nn.Module):
    """A large table, tied to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 32, padding_idx=0)
        self.head = nn.Linear(32, 1000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh())


@pytest.mark.parametrize("name", ON_TABLES)
def test_no_table_is_made(name: str) -> None:
    torch.manual_seed(0)
    model, ids = Words().double(), torch.tensor([[0, 3, 900]])
    surgery.apply(model, ON_TABLES[name]())
    stir_parts(model)
    with Sizes(model.table.weight) as sizes:
        got = model(ids)
        got.square().sum().backward()
    assert sizes.largest <= 3 * 1000  # what the head gives
    grads = [p.grad for p in surgery.parameters(model)]
    for hooked in model.surgery.default.hooked_sites:
        hooked.is_small = False
    for p in surgery.parameters(model):
        p.grad = None
    with Sizes(model.table.weight) as sizes:
        want = model(ids)
        want.square().sum().backward()
    assert sizes.largest >= 32 * 1000
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    for a, p in zip(grads, surgery.parameters(model), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=0, atol=1e-11)


def test_what_reads_the_sum_is_given_it() -> None:
    """LoRA at a table, and rows of that which are scaled."""
    torch.manual_seed(0)
    model, ids = Words().double(), torch.tensor([[1, 3, 900]])
    plain = copy.deepcopy(model)
    surgery.apply(model, at(weight("table.weight"), lora(rank=2)), name="one")
    surgery.apply(model, at(weight("table.weight"), append(surgery.parts.rescale())), name="two")
    stir_parts(model)
    got = model(ids)
    surgery.merge(model)
    torch.testing.assert_close(model(ids), got, rtol=0, atol=1e-13)
    assert not torch.equal(model(ids), plain(ids))
    surgery.unmerge(model)
    surgery.revert(model, name="two")
    assert all(hooked.is_small for hooked in model.surgery.one.hooked_sites)
