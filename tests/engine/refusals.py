"""What the engine says of rules that come to nothing; the model must be as it was."""

from __future__ import annotations

from typing import Any

from torch import nn

import surgery
from tests.laws import checks as laws
from tests.laws.checks import raised


def apply_error(model: nn.Module, rules: Any, example: Any) -> str:
    """What apply says when its proof by the example fails."""
    before = laws.fingerprint(model)
    error = raised(surgery.GraftError, lambda: surgery.apply(model, rules, example=example))
    laws.assert_same(before, laws.fingerprint(model), "a proof that failed")
    return str(error)


def plan_error(model: nn.Module, rules: Any) -> str:
    """What plan says of rules that can come to nothing only."""
    before = laws.fingerprint(model)
    error = raised(surgery.RuleError, lambda: surgery.plan(model, rules))
    laws.assert_same(before, laws.fingerprint(model), "a plan that failed")
    return str(error)
