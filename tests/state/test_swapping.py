"""Files into operations that are there: filled, swapped, without a head; and looked into."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import activate, adapter, at, ffn, head, lora, parallel, qkv, shared, swap, unfreeze
from surgery.cli import main
from surgery.errors import FileError, OperationError
from surgery.parts import moa
from tests.engine.test_activity import answer, train, vit
from tests.models import images

X = images().double()


def made(rules: Any, file: Path, seed: int = 0) -> Tensor:
    """A file of an operation that was trained, and what that answers."""
    model = surgery.apply(vit(), rules, seed=seed)
    train(model, "default", seed)
    surgery.save(model, file)
    return answer(model)


RULES: dict[str, Any] = {
    "lora": [at(qkv, lora(rank=2)), at(head, unfreeze)],
    "shared": [at(ffn, parallel(shared(moa(heads=2, rank=4)))), at(head, unfreeze)],
    "adapterx_ffn": "adapterx_ffn",
    "full": "full",
}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("way", ["load", "swap"])
@pytest.mark.parametrize("name", RULES)
def test_what_is_there_is_filled(name: str, way: str, active: bool, tmp_path: Path) -> None:
    want = made(RULES[name], tmp_path / "a.safetensors", seed=3)
    model = surgery.apply(vit(), RULES[name], name="a")
    tensors = {key: id(t) for key, t in model.named_parameters()}
    other = answer(activate(model, None))
    if active:
        activate(model, "a")
    if way == "load":
        surgery.load(model, tmp_path / "a.safetensors", name="a")
    else:
        swap(model, "a", tmp_path / "a.safetensors")
    assert tensors == {key: id(t) for key, t in model.named_parameters()}
    assert torch.equal(answer(model), want if active else other)
    assert torch.equal(answer(activate(model, "a")), want)
    assert torch.equal(answer(activate(model, None)), other)
    surgery.revert(model)
    assert torch.equal(answer(model), other)


@torch.no_grad()
def test_one_of_several_is_filled(tmp_path: Path) -> None:
    want = {
        name: made(RULES["lora"], tmp_path / f"{name}.safetensors", seed)
        for seed, name in enumerate("abc")
    }
    model = vit()
    for name in "ab":
        surgery.load(model, tmp_path / f"{name}.safetensors", name=name)
        activate(model, None)
    for chosen in ("a", "b", None):
        activate(model, chosen)
        for name, file in (("b", "c"), ("a", "b"), ("b", "b"), ("a", "a")):
            swap(model, name, tmp_path / f"{file}.safetensors")
        for name in "ab":
            assert torch.equal(answer(activate(model, name)), want[name])


def test_other_rules_are_no_filling(tmp_path: Path) -> None:
    made("lora", tmp_path / "a.safetensors")
    model = surgery.apply(vit(), "adaptformer", name="a")
    mark = surgery.fingerprint(model)
    with pytest.raises(OperationError, match="operated under that name already"):
        surgery.load(model, tmp_path / "a.safetensors", name="a")
    with pytest.raises(FileError, match="of other rules"):
        swap(model, "a", tmp_path / "a.safetensors")
    with pytest.raises(OperationError, match="there are, in order: a"):
        swap(model, "b", tmp_path / "a.safetensors")
    assert surgery.fingerprint(model) == mark


SCALED = {
    "scale of the edit": (
        at(ffn, parallel(adapter(rank=2), scale=0.1)),
        at(ffn, parallel(adapter(rank=2), scale=0.2)),
    ),
    "number of a part": (
        at(ffn, parallel(shared(moa(heads=2, rank=4, top_k=1)))),
        at(ffn, parallel(shared(moa(heads=2, rank=4, top_k=None)))),
    ),
    "place": (at(qkv, lora(rank=2)), at(surgery.fc1, lora(rank=2))),
}


@pytest.mark.parametrize("case", SCALED)
def test_what_differs_in_a_number_is_refused(case: str, tmp_path: Path) -> None:
    one, other = SCALED[case]
    made(one, tmp_path / "a.safetensors")
    with pytest.raises(FileError):
        swap(surgery.apply(vit(), other, name="a"), "a", tmp_path / "a.safetensors")


RANKS = {2: None, 4: 16.0, 8: 2.0}


def test_ranks_go_into_room_without_compiling_anew(tmp_path: Path) -> None:
    from torch._dynamo.testing import CompileCounter

    want = {
        rank: made(at(qkv, lora(rank=rank, alpha=alpha, rows="q _k v")), tmp_path / f"{rank}", rank)
        for rank, alpha in RANKS.items()
    }
    model = surgery.apply(vit(), at(qkv, lora(rank=8, alpha=4.0, rows="q _k v")), name="a")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    answer(compiled)
    frames = counter.frame_count
    for i in range(50):
        rank = [*RANKS][i % 3]
        swap(model, "a", tmp_path / f"{rank}")
        torch.testing.assert_close(answer(compiled), want[rank], rtol=0, atol=1e-12)
    assert counter.frame_count == frames
    small = surgery.apply(vit(), at(qkv, lora(rank=2, rows="q _k v")), name="a")
    mark = surgery.fingerprint(small)
    with pytest.raises(FileError, match="the file has 4 ranks, and there is room for 2"):
        swap(small, "a", tmp_path / "4")
    assert surgery.fingerprint(small) == mark


def test_a_model_of_other_classes(tmp_path: Path) -> None:
    made([at(qkv, lora(rank=2)), at(head, unfreeze)], tmp_path / "a.safetensors")
    model = vit()
    model.head = nn.Linear(24, 9).double()
    own = model.head.weight.clone()
    with pytest.raises(FileError):
        surgery.load(model, tmp_path / "a.safetensors")
    assert not hasattr(model, "surgery")
    surgery.load(model, tmp_path / "a.safetensors", head=False)
    assert torch.equal(model.head.weight, own)
    assert model.head.weight.requires_grad
    like = surgery.load(vit(), tmp_path / "a.safetensors")
    assert torch.equal(model.forward_features(X), like.forward_features(X))
    surgery.load(model, tmp_path / "a.safetensors", head=False)  # filled, once it is there


def test_a_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(RULES["lora"], tmp_path / "a.safetensors")
    assert main(["show", str(tmp_path / "a.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "at(qkv, parallel(lora(rank=2)))" in told
    assert "blocks.*.attn.qkv x3" in told
    assert "parts 576 numbers in 6 tensors, of the base 125 in 2; float64" in told
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert main(["show", str(tmp_path / "b.safetensors")]) == 2
    assert "no whole safetensors file" in capsys.readouterr().err


def test_tensors_that_are_not_those_of_the_file(tmp_path: Path) -> None:
    made(RULES["lora"], tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "a.safetensors").write_bytes(bytes(data))
    with pytest.raises(FileError, match="not those that it was written with"):
        surgery.load(vit(), tmp_path / "a.safetensors")


def test_the_base_is_verified(tmp_path: Path) -> None:
    model = surgery.apply(vit(), RULES["lora"])
    train(model, "default", 0)
    file = surgery.save(model, tmp_path / "a.safetensors", verify=True)
    surgery.load(vit(), file, verify=True)
    surgery.load(surgery.apply(vit(), RULES["lora"]), file, verify=True)
    other = vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 1e-9
    mark = surgery.fingerprint(other)
    with pytest.raises(FileError, match="another base than the file was made for"):
        surgery.load(other, file, verify=True)
    assert surgery.fingerprint(other) == mark
    with pytest.raises(FileError, match="holds no hash of its base"):
        surgery.load(vit(), surgery.save(model, tmp_path / "b.safetensors"), verify=True)


@torch.no_grad()
def test_a_forward_of_another_thread_meets_one_file_alone(tmp_path: Path) -> None:
    rules = at(qkv, lora(rank=2))
    want = [made(rules, tmp_path / f"{i}.safetensors", i) for i in range(2)]
    model = surgery.apply(vit(), rules, name="a")
    swap(model, "a", tmp_path / "0.safetensors")
    inside, go_on, told = threading.Event(), threading.Event(), list[Tensor]()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    model.blocks[1].register_forward_hook(wait)
    runs = threading.Thread(target=lambda: told.append(answer(model)))
    runs.start()
    assert inside.wait(30)
    swaps = threading.Thread(target=lambda: swap(model, "a", tmp_path / "1.safetensors"))
    swaps.start()
    swaps.join(0.3)
    assert swaps.is_alive(), "it did not wait"
    go_on.set()
    runs.join(30)
    swaps.join(30)
    assert torch.equal(told[0], want[0])
    assert torch.equal(answer(model), want[1])


def test_an_error_in_a_forward_holds_no_swap_up(tmp_path: Path) -> None:
    made(at(qkv, lora(rank=2)), tmp_path / "a.safetensors")
    model = surgery.apply(vit(), at(qkv, lora(rank=2)), name="a")

    def fails() -> None:
        with pytest.raises(ValueError, match="unpack"):
            model(torch.zeros(1, 2, 3))

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join(30)
    swap(model, "a", tmp_path / "a.safetensors")
