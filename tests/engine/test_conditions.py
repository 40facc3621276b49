"""States of a model in which calls cannot be right: every public function, in every state."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import surgery
from surgery import adapter, append, at, lora, unfreeze
from surgery.parts.adapter_sum import coefficients, combined
from surgery.parts.binary import binary_adapter
from surgery.parts.elastic import elastic_adapter
from surgery.parts.skills import choose as choose_task
from surgery.parts.skills import skill_lora
from surgery.state import averaging, packed
from surgery.training import noah, spt

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its older ways

X = torch.linspace(-1, 1, 24).view(3, 8)
RULES = [at("first", lora(rank=2)), at("last", unfreeze)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


# the calls: those that want a model as it is built, and those that want one that was operated ----

Call = Callable[[nn.Module, Path], Any]


def _disabled(model: nn.Module, folder: Path) -> None:
    with surgery.disabled(model):
        pass


def _swapped(model: nn.Module, folder: Path) -> None:
    with averaging.swapped(model, STATE):
        pass


def operated(rules: Any = RULES) -> nn.Module:
    return surgery.apply(build(), rules)


STATE = surgery.state_dict(operated())
BARE: dict[str, Call] = {
    "anatomy": lambda m, f: surgery.anatomy(m),
    "apply": lambda m, f: surgery.apply(m, RULES),
    "fingerprint": lambda m, f: surgery.fingerprint(m),
    "load": lambda m, f: surgery.load(m, f / "good.safetensors"),
    "plan": lambda m, f: surgery.plan(m, RULES),
    "Plan.apply": lambda m, f: surgery.plan(m, RULES).apply(),
    "spt.measure": lambda m, f: spt.measure(m, [X.to(next(m.parameters()).device)], _loss),
}
OPERATED: dict[str, Call] = {
    "apply, a second time": lambda m, f: surgery.apply(m, RULES, name="second"),
    "balance_loss": lambda m, f: surgery.balance_loss(m),
    "disabled": _disabled,
    "load_state_dict": lambda m, f: surgery.load_state_dict(m, STATE),
    "merge": lambda m, f: surgery.merge(m),
    "parameters": lambda m, f: surgery.parameters(m),
    "report": lambda m, f: str(surgery.report(m)),
    "revert": lambda m, f: surgery.revert(m),
    "routing": lambda m, f: surgery.routing(m),
    "save": lambda m, f: surgery.save(m, f / "x.safetensors"),
    "state_dict": lambda m, f: surgery.state_dict(m),
    "swapped": _swapped,
    "ensemble": lambda m, f: averaging.ensemble(m, [STATE], X),
}
MERGED: dict[str, Call] = {"unmerge": lambda m, f: surgery.unmerge(m)}


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


def test_every_public_function_of_a_model_is_listed() -> None:
    functions = {
        name: value
        for name in surgery.__all__
        if inspect.isfunction(value := getattr(surgery, name))
    }
    of_models = {
        name
        for name, value in functions.items()
        if next(iter(inspect.signature(value).parameters), "") == "model"
    }
    assert of_models == {*BARE, *OPERATED, *MERGED} & {*functions}
