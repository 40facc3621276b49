"""Room for more ranks than rules use: nothing of it acts, is trained, or is in a file."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    activate,
    adapter,
    at,
    block,
    head,
    insert,
    lora,
    mixed,
    parallel,
    prompt,
    qkv,
    shared,
    swap,
    unfreeze,
)
from surgery.errors import FileError, OperationError, RuleError
from surgery.parts import adalora, dylora, mica, molora, prolora, toplora
from surgery.parts.room import room_of, used
from surgery.parts.row_lengths import magnitude
from surgery.rules.rule import Rule
from surgery.rules.weights import weight
from surgery.state.averaging import swapped
from surgery.training import eva, loftq
from tests.engine.test_activity import X, answer, operation, train, vit


def dora(rank: int, **told: Any) -> Rule:
    update = shared(lora(rank=rank, **told), by=qkv)
    return at(qkv, parallel(update), surgery.append(magnitude(update)))


KINDS: dict[str, Any] = {
    "lora": lambda rank, alpha=None: at(qkv, lora(rank=rank, alpha=alpha, rows="q _k v")),
    "rslora": lambda rank, alpha=None: at(qkv, lora(rank=rank, alpha=alpha, root=True)),
    "lora_fa": lambda rank, alpha=None: at(qkv, lora(rank=rank, alpha=alpha, frozen_A=True)),
    "of a weight": lambda rank, alpha=None: at(
        weight("**.qkv.weight"), lora(rank=rank, alpha=alpha)
    ),
    "of a kernel": lambda rank, alpha=None: at(
        weight("patch_embed.proj.weight"), lora(rank=rank, alpha=alpha)
    ),
    "dylora": lambda rank, alpha=None: at(qkv, dylora(rank=rank, alpha=alpha)),
    "mica": lambda rank, alpha=None: at(qkv, mica(rank=rank, alpha=alpha)),
    "molora": lambda rank, alpha=None: at(qkv, molora(rank=rank, alpha=alpha)),
    "hydralora": lambda rank, alpha=None: at(qkv, molora(rank=rank, alpha=alpha, one_A=True)),
    "dora": lambda rank, alpha=None: dora(rank, alpha=alpha),
}
RANKS = {2: None, 4: 16.0, 8: 3.0}  # and alphas
ROOM = 8


def file_of(rules: Any, path: Path, seed: int) -> tuple[Path, Tensor]:
    """A file of an operation that was trained, and what that answers."""
    model = surgery.apply(vit(), rules, seed=seed)
    train(model, "default", seed)
    return surgery.save(model, path), answer(model)


def files_of(name: str, folder: Path) -> dict[int, tuple[Path, Tensor]]:
    return {
        rank: file_of(KINDS[name](rank, alpha), folder / f"{rank}.safetensors", rank)
        for rank, alpha in RANKS.items()
    }


def near(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(a.dtype).eps
    return bool((a - b).abs().max() <= 16 * eps * b.abs().max())


def roomy(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if room_of(part) is not None]


@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_it_acts_or_is_trained(name: str) -> None:
    """As without, step by step, the room at zero: with momentum and decay, too."""
    models = [surgery.apply(vit().train(), KINDS[name](2, 3.0), room=r) for r in (None, ROOM)]
    a, b = ({k: t.clone() for k, t in surgery.state_dict(m).items()} for m in models)
    assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    outs = []
    for model in models:
        own = surgery.parameters(model)
        optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(step)  # DyLoRA draws
            model(X).square().sum().backward()
            optimizer.step()
        outs.append(answer(model.eval()))
    assert roomy(models[1])
    for part in roomy(models[1]):
        for key, axis in part.ranks.items():
            rest = getattr(part, key).narrow(axis, 2, ROOM - 2)
            assert rest.numel()
            assert not rest.any()
            grad = getattr(part, key).grad
            assert grad is None or not grad.narrow(axis, 2, ROOM - 2).any()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-11)
    assert not torch.equal(outs[0], answer(vit())), "nothing was trained"


def test_what_stands_in_it_does_nothing() -> None:
    """Momentum of more ranks, left over from before a swap, may write there."""
    model = surgery.apply(vit(), KINDS["lora"](2), room=ROOM)
    train(model, "default", 0)  # writes to all of it
    want = surgery.apply(vit(), KINDS["lora"](2))
    surgery.load_state_dict(want, surgery.state_dict(model))
    assert any(p.A[:, 2:].any() for p in roomy(model))
    assert near(answer(model), answer(want))
    model(X).sum().backward()
    for part in roomy(model):
        assert not part.A.grad[:, 2:].any()
        assert not part.B.grad[..., 2:].any()


@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_ranks_and_scales(name: str, tmp_path: Path) -> None:
    """Swapped in, an operation is what a loaded file is: answers, counts, file, training."""
    files = files_of(name, tmp_path)
    model = surgery.apply(vit(), KINDS[name](2), name="a", room=ROOM)
    base, tensors = answer(vit()), {k: id(t) for k, t in model.named_parameters()}
    for rank in (8, 2, 4, 8):
        file, want = files[rank]
        swap(model, "a", file)
        assert near(answer(model), want)
        loaded = surgery.load(vit(), file, name="a")
        ours, theirs = (surgery.state_dict(m, name="a") for m in (model, loaded))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        again = surgery.save(model, tmp_path / "again", name="a")
        assert again.read_bytes() == surgery.save(loaded, tmp_path / "b", name="a").read_bytes()
        surgery.load(model, again, name="a")  # of its rules, now
        assert surgery.report(model).rows == surgery.report(loaded).rows
    mark = surgery.fingerprint(model)
    over = file_of(KINDS[name](9), tmp_path / "9", 1)[0]
    with pytest.raises(FileError, match="the file has 9 ranks, and there is room for 8"):
        swap(model, "a", over)
    assert surgery.fingerprint(model) == mark
    assert tensors == {k: id(t) for k, t in model.named_parameters()}
    assert torch.equal(answer(activate(model, None)), base)
    assert torch.equal(answer(surgery.revert(model)), base)


def test_numbers_that_are_none_are_gone(tmp_path: Path) -> None:
    """Zero times one of them is none; so what a file leaves free is zero, and not as it was."""
    (small, want), (large, _) = (files_of("lora", tmp_path)[rank] for rank in (2, 8))
    broken = surgery.load(vit(), large)
    for part in operation(broken, "default").children():
        nn.init.constant_(part.B, math.nan)
    model = surgery.apply(vit(), KINDS["lora"](2), name="a", room=ROOM)
    swap(model, "a", surgery.save(broken, tmp_path / "broken"))
    assert answer(model).isnan().all()
    assert near(answer(swap(model, "a", small)), want)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_loaded_with_room(name: str, tmp_path: Path) -> None:
    files = files_of(name, tmp_path)
    model = surgery.load(vit(), files[4][0], name="a", room=ROOM)
    assert {room_of(part) for part in roomy(model)} == {ROOM}
    assert near(answer(model), files[4][1])
    surgery.load(model, files[4][0], name="a", room=ROOM)
    with pytest.raises(OperationError, match="under that name already"):
        surgery.load(model, files[4][0], name="a", room=16)
    assert near(answer(swap(model, "a", files[8][0])), files[8][1])


def test_a_fault_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = file_of([KINDS["lora"](4, 16.0), at(head, unfreeze)], tmp_path / "a", 1)
    model = surgery.apply(vit(), [KINDS["lora"](2), at(head, unfreeze)], name="a", room=ROOM)
    train(model, "a", 3)
    mark, told = surgery.fingerprint(model), copy.deepcopy(operation(model, "a").record)
    write, count = surgery.engine.journal.Journal.overwrite, iter(range(100))

    def fails(self: Any, *given: Any) -> None:
        if next(count) == 12:
            raise MemoryError
        write(self, *given)

    monkeypatch.setattr(surgery.engine.journal.Journal, "overwrite", fails)
    with pytest.raises(MemoryError):
        swap(model, "a", file)
    assert surgery.fingerprint(model) == mark
    assert operation(model, "a").record == told
    assert {part.rank for part in roomy(model)} == {2}


@pytest.mark.parametrize("name", KINDS)
def test_no_compiling_anew(name: str, tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    files = files_of(name, tmp_path)
    model = surgery.apply(vit(), KINDS[name](2), name="a", room=ROOM)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):  # the second compiles what keeps gates anew
        answer(compiled)
    graphs, made = counter.frame_count, counters["stats"]["unique_graphs"]
    assert graphs
    for i in range(50 if name == "lora" else 6):
        file, want = files[[*RANKS][i % 3]]
        swap(model, "a", file)
        assert near(answer(compiled), want)
    assert counter.frame_count == graphs
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["lora", "rslora", "molora", "mica", "dora"])
def test_rows_of_several(name: str, tmp_path: Path) -> None:
    files = files_of(name, tmp_path)
    model = vit()
    for key in "ab":
        surgery.apply(model, KINDS[name](2), name=key, room=ROOM)
    swap(model, "a", files[8][0])
    swap(model, "b", files[4][0])
    x = torch.randn(4, *X.shape[1:], dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with mixed(model, ["b", None, "a", "b"]):
            together = model(x)
        for rows, key in (([0, 3], "b"), ([2], "a"), ([1], None)):
            assert near(together[rows], activate(model, key)(x)[rows])
        swap(model, "a", files[2][0])
        assert near(activate(model, "a")(x), surgery.load(vit(), files[2][0])(x))


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("molora", "hydralora")])
def test_merging(name: str, tmp_path: Path) -> None:
    file, want = file_of(KINDS[name](4, 16.0), tmp_path / "4", 1)
    model = surgery.apply(vit(), KINDS[name](2), name="a", room=ROOM)
    swap(model, "a", file)
    before = answer(model)
    merged = answer(surgery.merge(model))
    torch.testing.assert_close(merged, want, rtol=1e-9, atol=1e-11)
    assert torch.equal(answer(surgery.unmerge(model)), before)


def test_copies(tmp_path: Path) -> None:
    file, want = file_of(KINDS["lora"](4, 16.0), tmp_path / "4", 1)
    model = surgery.apply(vit(), KINDS["lora"](2), name="a", room=ROOM)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = answer(model)
        assert near(answer(swap(copied, "a", file)), want)
        assert torch.equal(answer(model), before)


@pytest.mark.parametrize("room", [None, ROOM])
def test_removing_one_above_leaves_it(room: int | None, tmp_path: Path) -> None:
    """A later operation does not remember, and bring back, what is another's."""
    file, want = file_of(KINDS["lora_fa"](4, 16.0), tmp_path / "4", 1)
    model = surgery.apply(vit(), KINDS["lora_fa"](4, 16.0), name="a", room=room)
    surgery.apply(model, at(head, unfreeze), name="b")
    swap(model, "a", file)
    with surgery.disabled(model, "b"):
        assert near(answer(model), want)
    surgery.revert(model, name="b")
    assert near(answer(model), want)


def test_counts() -> None:
    rule = at(qkv, lora(rank=2))
    plain, wide = surgery.apply(vit(), rule), surgery.apply(vit(), rule, room=ROOM)
    assert surgery.report(plain).rows == surgery.report(wide).rows
    (told,) = [n for n in surgery.report(wide).notes if n not in surgery.report(plain).notes]
    more = sum(p.numel() for p in wide.parameters()) - sum(p.numel() for p in plain.parameters())
    assert told == f"note: room for 8 ranks: {more:,} more numbers, which nothing trains"
    planned = surgery.plan(vit(), rule, room=ROOM)
    assert planned.added == planned.trainable == surgery.plan(vit(), rule).added
    surgery.apply(wide, rule, name="b", room=4)
    tell = [n for n in surgery.report(wide).notes if n.startswith("default: active")]
    assert tell == [f"default: active, {planned.trainable:,} trained"]


REFUSED = {
    "adapter": (at(surgery.ffn, parallel(adapter(rank=2))), r"adapter\(rank=2\) at "),
    "adalora": (at(qkv, adalora(rank=2)), r"adalora\(rank=2\) at "),
    "toplora": (at(qkv, toplora(rank=2)), r"toplora\(rank=2\) at "),
    "prolora": (at(qkv, prolora(rank=4)), r"prolora\(rank=4\) at "),
    "vera": ("vera", r"frozen\(\) at shared/frozen"),
    "adapterx": ("adapterx_ffn", r"moa\(.*\) at shared/moa"),
    "among others": ([at(qkv, lora(rank=2)), at(qkv, adalora(rank=2))], r"adalora\(rank=2\) at "),
    "too small": (at(qkv, lora(rank=9)), "uses 9 ranks"),
    "none": (at(block, insert(prompt(tokens=2))), "no part here has ranks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_have_it_is_named(case: str) -> None:
    rules, told = REFUSED[case]
    model = vit()
    mark = surgery.fingerprint(model)
    for call in (surgery.plan, surgery.apply):
        with pytest.raises(RuleError, match=told):
            call(model, rules, room=ROOM)
    assert surgery.fingerprint(model) == mark


@pytest.mark.parametrize("room", [0, -1, 2.5, "8", True, math.inf])
def test_no_number_of_ranks(room: Any) -> None:
    with pytest.raises(RuleError, match="no number of ranks"):
        surgery.apply(vit(), at(qkv, lora(rank=2)), room=room)


def test_without_memory() -> None:
    model = vit().to("meta")
    with pytest.raises(RuleError, match="on the meta device"):
        surgery.apply(model, at(qkv, lora(rank=2)), room=ROOM)
    assert not hasattr(model, "surgery")


def test_given_to_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file, want = file_of(at(qkv, lora(rank=4, alpha=16.0)), tmp_path / "4", 1)
    model = surgery.apply(vit(), at(qkv, lora(rank=2)), room=ROOM)
    swap(model, "default", file)
    surgery.save_peft(model, tmp_path / "ours")
    surgery.save_peft(surgery.load(vit(), file), tmp_path / "theirs")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert near(answer(surgery.load_peft(vit(), tmp_path / "ours")), want)


def test_it_goes_along(tmp_path: Path) -> None:
    """To another dtype; used ranks are views of what is there."""
    file, _ = file_of(KINDS["lora"](4, 16.0), tmp_path / "4", 1)
    model = surgery.apply(vit(), KINDS["lora"](2), room=ROOM)
    swap(model, "default", file)
    want = answer(model)
    model.float()
    with torch.no_grad():
        assert (model(X.float()) - want).abs().max() < 1e-5
    part = roomy(model)[0]
    assert all(t.data_ptr() == getattr(part, key).data_ptr() for key, t in used(part))


@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_starts_of_what_is_used(start: str) -> None:
    told = []
    for room in (None, ROOM):
        model = surgery.apply(vit(), at(qkv, lora(rank=2, alpha=3.0)), room=room)
        was = {key: tensor.clone() for key, tensor in surgery.state_dict(model).items()}
        weights = {f"blocks.{i}.attn.qkv": b.attn.qkv.weight for i, b in enumerate(model.blocks)}
        _ = eva(model, [X]) if start == "eva" else loftq(model, weights, torch.round)
        told.append(surgery.state_dict(model))
    assert told[0].keys() == told[1].keys()
    assert all(torch.equal(told[1][key], tensor) for key, tensor in told[0].items())
    assert not all(torch.equal(was[key], tensor) for key, tensor in told[1].items())


def test_states_of_torch(tmp_path: Path) -> None:
    """A checkpoint of the whole model says which ranks are used; it is for what uses those."""
    files = files_of("lora", tmp_path)
    model = surgery.apply(vit(), KINDS["lora"](2), name="a", room=ROOM)
    fresh = copy.deepcopy(model)
    swap(model, "a", files[8][0])
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"other ranks there.*swap\(model, \"a\", file\)"):
        fresh.load_state_dict(state)
    again = surgery.apply(vit(), KINDS["lora"](2), name="a", room=ROOM)
    swap(again, "a", files[8][0])
    for part in roomy(again):
        nn.init.zeros_(part.B)
    again.load_state_dict({k: t.to(torch.bfloat16).to(t) for k, t in state.items()})
    again.load_state_dict(state)
    assert torch.equal(answer(again), answer(model))


def test_it_is_exported_and_lent(tmp_path: Path) -> None:
    file, want = file_of(KINDS["lora"](4, 16.0), tmp_path / "4", 1)
    model = surgery.load(vit(), file, room=ROOM)
    exported = torch.export.export(model, (X,)).module()
    assert near(answer(exported), want)
    zeros = {key: torch.zeros_like(t) for key, t in surgery.state_dict(model).items()}
    with swapped(model, zeros):
        assert torch.equal(answer(model), answer(vit()))
    assert near(answer(model), want)
