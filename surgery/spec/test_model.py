"""What pytest --pyargs surgery.spec runs: every property on the model that the options name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..named import build, inputs_of, rules_of
from .check import specify


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each property; none without --surgery-model."""
    asked = metafunc.config.getoption
    if not asked("--surgery-model", default=""):
        metafunc.parametrize("property", [])
        return
    model = build(asked("--surgery-model"), "cpu")
    marked = specify(
        model=model,
        rules=rules_of(asked("--surgery-rules")),
        inputs=lambda: inputs_of(asked("--surgery-inputs"), model),
        examples=asked("--surgery-examples"),
    )
    metafunc.parametrize(*marked.args)


def test_model(property: Callable[[], None]) -> None:
    """The property holds."""
    property()
