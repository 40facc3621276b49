"""Parts that were made on the meta device: nothing runs until they have been given values."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, lora, moa, parallel, shared, unfreeze
from tests.models import images, tiny_vit

RULES = [
    at("blocks.*.attn.qkv", lora(rank=2)),
    at("blocks.*.mlp", parallel(shared(moa(rank=4, heads=3, bias=True)))),
    at("head", unfreeze),
]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


def on_meta() -> nn.Module:
    return surgery.apply(vit().to("meta"), RULES)


def tuned() -> nn.Module:
    model = surgery.apply(vit(), RULES)
    with torch.no_grad():
        for i, parameter in enumerate(surgery.parameters(model)):
            parameter.add_(0.01 * (i + 1))
    return model


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(surgery.SurgeryError, match="meta") as caught:
        call()
    assert caught.value.remedy


def emptied(model: nn.Module) -> nn.Module:
    """With memory that holds anything, and its base."""
    model.to_empty(device="cpu")
    model.load_state_dict(vit().state_dict(), strict=False)
    return model


BASES = {
    "assigned": lambda m: m.load_state_dict(vit().state_dict(), strict=False, assign=True),
    "emptied and loaded": emptied,
}


@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_filled_leaves_parts_without_a_start(base: str, tmp_path: Path) -> None:
    model = on_meta()
    BASES[base](model)
    refused(lambda: model(images()))
    refused(lambda: surgery.save(model, tmp_path / "x"))
    refused(lambda: surgery.merge(model))
    again = copy.deepcopy(model)
    refused(lambda: again(images()))
    with surgery.disabled(model):
        assert torch.equal(model(images()), vit()(images()))
    surgery.revert(model)
    assert torch.equal(model(images()), vit()(images()))


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _whole(model: nn.Module, assign: bool) -> None:
    model.load_state_dict(tuned().state_dict(), assign=assign)


def _ours(model: nn.Module) -> None:
    surgery.load_state_dict(model, surgery.state_dict(tuned()))


def _by_hand(model: nn.Module) -> None:
    values = tuned().state_dict()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.startswith("surgery."):
                tensor.copy_(values[key])
    model.load_state_dict({k: v for k, v in values.items() if "surgery." not in k}, strict=False)


FILLED: dict[str, tuple[bool, Callable[[nn.Module], None]]] = {
    "the whole state, assigned to meta": (False, lambda m: _whole(m, True)),
    "the whole state, copied": (True, lambda m: _whole(m, False)),
    "ours": (True, _ours),
    "by hand": (True, _by_hand),
}


@pytest.mark.parametrize("way", FILLED)
def test_filled_it_answers_as_what_the_values_are_of(way: str, tmp_path: Path) -> None:
    with_memory, fill = FILLED[way]
    model = on_meta()
    if with_memory:
        emptied(model)
    fill(model)
    want = tuned()(images())
    assert torch.equal(copy.deepcopy(model)(images()), want) or way == "by hand"
    assert torch.equal(model(images()), want)
    path = surgery.save(model, tmp_path / "x")
    assert torch.equal(surgery.load(vit(), path)(images()), want)


@pytest.mark.parametrize("base", BASES)
def test_a_base_that_is_filled_later_comes_back_after_training(base: str) -> None:
    """What was kept of the head had no memory: what has filled it is what it was."""
    model = on_meta()
    BASES[base](model)
    if base == "assigned":
        model.surgery.to_empty(device="cpu")
    state = {k: v for k, v in tuned().state_dict().items() if k.startswith("surgery.")}
    model.load_state_dict(state, strict=False)
    for _ in range(2):
        model(images()).sum().backward()
        with torch.no_grad():
            for parameter in surgery.parameters(model):
                parameter.sub_(parameter.grad)
    want = vit()(images())
    again = _pickled(copy.deepcopy(model))
    for each in (model, again):
        with surgery.disabled(each):
            assert torch.equal(each(images()), want)
        assert not torch.allclose(each(images()), want)
        assert torch.equal(surgery.revert(each)(images()), want)


def test_some_of_the_values_are_not_all() -> None:
    model = emptied(on_meta())
    state = {k: v for k, v in tuned().state_dict().items() if "lora" not in k}
    gone = next(key for key in state if key.startswith("surgery."))
    del state[gone]
    model.load_state_dict(state, strict=False)
    refused(lambda: model(images()))


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
def test_values_that_are_copied_to_meta_are_lost() -> None:
    model = on_meta()
    model.load_state_dict(tuned().state_dict())
    model.load_state_dict(vit().state_dict(), strict=False, assign=True)
    refused(lambda: model(images()))


def test_shapes_alone_go_through_a_model_on_meta() -> None:
    assert on_meta()(images().to("meta")).shape == vit()(images()).shape


def test_a_file_for_parts_on_meta_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = surgery.save(tuned(), tmp_path / "x")
    for model in (vit().to("meta"), on_meta()):
        before = surgery.fingerprint(model)
        refused(lambda model=model: surgery.load(model, path, name="second"))
        assert surgery.fingerprint(model) == before


def test_parts_with_memory_are_filled_before_their_base(tmp_path: Path) -> None:
    """A file's tensors are put where there is memory; the rest of the model may come later."""
    rules = RULES[:2]
    model = surgery.apply(vit().to("meta"), rules)
    source = surgery.apply(vit(), rules)
    model.surgery.to_empty(device="cpu")
    surgery.load_state_dict(model, surgery.state_dict(source))
    model.load_state_dict(vit().state_dict(), strict=False, assign=True)
    assert torch.equal(model(images()), source(images()))


def test_filled_it_is_compiled_whole() -> None:
    torch._dynamo.reset()
    model = surgery.apply(vit().to("meta"), RULES[0])
    model.load_state_dict(surgery.apply(vit(), RULES[0]).state_dict(), assign=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model(images())
    assert torch.allclose(compiled(images()), vit()(images()), atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_part_is_where_its_site_is(device: str) -> None:
    """A model in several places: parts are made beside their modules."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = nn.Linear(4, 4), nn.Linear(4, 4, device=device)

        def forward(self, x: Tensor) -> Tensor:
            return self.there(self.here(x))

    model = surgery.apply(Two(), at(nn.Linear, lora(rank=1)))
    devices = {name: p.device.type for name, p in model.surgery.named_parameters()}
    assert {d for n, d in devices.items() if "here/" in n and "there/" not in n} == {"cpu"}
    assert {d for n, d in devices.items() if "there/" in n} == {device}
