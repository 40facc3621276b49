"""The README's table of methods tells what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import surgery
from backbones.point_mae import PointMAE
from surgery import rulesets
from tests.methods.test_methods import CLOUDS, MERGE

README = (Path(__file__).parents[1] / "README.md").read_text()
ROWS = {
    name: (int(count.replace(",", "")), merges)
    for name, count, merges in re.findall(
        r"^\| `(\w+)` \| .+ \| ([\d,]+) \| (yes|no|-|one task) \| .*\|$", README, re.M
    )
}


def test_every_rule_set_has_a_line() -> None:
    assert list(ROWS) == [row[0] for row in rulesets().rows]


@pytest.mark.parametrize("name", ROWS)
def test_what_it_trains_and_whether_it_merges(name: str) -> None:
    count, merges = ROWS[name]
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
        cloud = PointMAE(10)
    if name in CLOUDS:
        assert surgery.plan(cloud, name).added == count
    else:
        assert surgery.plan(model, name).trainable == count + 769 * 10
    assert merges == "-" or (merges != "no") is (name in MERGE)
