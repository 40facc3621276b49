"""Files of before, one a rule set, load and answer as they did when they were saved.

By commit f63c2d9, those of younger rule sets by the commit that brought them (tests.data.make).

Each was made of `tiny_vit` with seed 0, operated and stirred.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from tests.models import images, tiny_vit

DATA = Path(__file__).parents[1] / "data"
CLOUDS = {"pointgst", "point_peft"}  # not for images
SETS = [name for name in surgery.methods.__all__ if name not in CLOUDS]


@cache
def answers() -> dict[str, Tensor]:
    """What each model answered to `images()`."""
    return load_file(DATA / "answers.safetensors")


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().eval()


def test_every_rule_set_has_a_file_and_an_answer() -> None:
    files = {file.stem for file in DATA.glob("*.safetensors")} - {"answers"}
    assert files == set(SETS) == set(answers())


@pytest.mark.parametrize("name", SETS)
def test_a_file_of_before_loads_and_answers_as_it_did(name: str) -> None:
    model = surgery.load(fresh(), DATA / f"{name}.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(images()), answers()[name])
        assert not torch.allclose(model(images()), fresh()(images())), "the file does nothing"
