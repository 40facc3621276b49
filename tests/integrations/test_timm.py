"""What timm's training takes, of an operated model, without any code of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

import surgery
from surgery import attn, unfreeze
from tests.models import images, tiny_vit

RULES = [*surgery.methods.adapterx_ffn(), surgery.at(attn, unfreeze)]
X = images()


def base() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: NativeScaler) -> None:
    torch.manual_seed(0)  # of what is dropped
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X).square().sum()
    optimizer.zero_grad()
    scaler(loss, optimizer, clip_grad=1.0, parameters=surgery.parameters(model))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return [*one] == [*other] and all(torch.equal(one[key], other[key]) for key in one)


def test_the_mean_of_weights_is_an_operated_model(tmp_path: Path) -> None:
    model, plain = surgery.apply(base(), RULES), base()
    mean = ModelEmaV3(model, decay=0.75)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    rates = surgery.groups(model, lr=0.1, layer_decay=0.5)
    step(model, create_optimizer_v2(rates, opt="sgd", lr=0.1), NativeScaler("cpu"))
    mean.update(model)
    for key, now in model.state_dict().items():
        want = before[key].lerp(now, 0.25) if key in trained else before[key]
        assert torch.equal(mean.module.state_dict()[key], want)
    assert not same(mean.module, model)
    again = surgery.load(base(), surgery.save(mean.module, tmp_path / "mean.safetensors"))
    with torch.no_grad():
        assert torch.equal(again.eval()(X), mean.module.eval()(X))
    assert same(surgery.revert(mean.module), plain)
    assert not same(model, plain)


def test_rates_that_fall_by_layers_come_to_its_optimisers() -> None:
    model = surgery.apply(base(), RULES)
    optimizer = create_optimizer_v2(
        surgery.groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5), opt="adamw", lr=1.0
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {*rates} == {id(p) for p in surgery.parameters(model)}
    qkv = [rates[id(block.attn.qkv.weight)] for block in model.blocks]
    assert qkv == [0.125, 0.25, 0.5]


def test_its_checkpoints_go_on_to_the_bit(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, ModelEmaV3, torch.optim.Optimizer, NativeScaler]:
        model = surgery.apply(base(), RULES)
        optimizer = create_optimizer_v2(surgery.groups(model, lr=0.1), opt="adamw", lr=0.1)
        return model, ModelEmaV3(model, decay=0.75), optimizer, NativeScaler("cpu")

    model, mean, optimizer, scaler = made()
    step(model, optimizer, scaler)
    mean.update(model)
    saver = CheckpointSaver(
        model, optimizer, model_ema=mean, amp_scaler=scaler, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(0)
    again, other, goes_on, scale = made()
    assert resume_checkpoint(again, str(tmp_path / "last.pth.tar"), goes_on, scale) == 1
    load_checkpoint(other.module, str(tmp_path / "last.pth.tar"), use_ema=True)
    for each in ((model, optimizer, scaler, mean), (again, goes_on, scale, other)):
        step(*each[:3])
        each[3].update(each[0])
    assert same(again, model)
    assert same(other.module, mean.module)
    assert not same(other.module, again)
