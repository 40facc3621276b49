"""The bottleneck that reads what the norm at its place makes of x."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery import adapter, append, apply, at, prepend
from surgery.errors import RuleError
from surgery.spec import check
from surgery.spec.case import stir
from tests.models import images, tiny_vit

RULE = at("blocks.*.norm2", prepend(adapter(rank=16, normed=True), residual=True))


def test_it_is_the_norm_of_the_sum_with_what_it_makes_of_the_norm() -> None:
    torch.manual_seed(0)
    norm, x = nn.LayerNorm(8), torch.randn(2, 5, 8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model = apply(
        nn.Sequential(norm), at("0", prepend(adapter(rank=3, normed=True), residual=True))
    )
    torch.testing.assert_close(model(x), norm.forward(x), rtol=0, atol=0)
    stir(model, 0)
    (part,) = [m for m in model.surgery.modules() if hasattr(m, "down")]
    y = norm.forward(x)
    hidden = (y @ part.down.weight.mT + part.down.bias).relu()
    want = norm.forward(x + hidden @ part.up.weight.mT + part.up.bias)
    torch.testing.assert_close(model(x), want)


def test_it_stands_at_a_layer_norm_alone() -> None:
    for layer in (nn.RMSNorm(8), nn.Linear(8, 8)):
        with pytest.raises(RuleError, match="is no LayerNorm"):
            apply(nn.Sequential(layer), at("0", append(adapter(normed=True), residual=True)))


def test_the_laws_hold_of_it() -> None:
    report = check(tiny_vit().eval(), RULE, images(), examples=1).raise_broken()
    assert not report.broken
    assert "every_part_runs" in str(report)
