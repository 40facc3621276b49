"""Options for pytest --pyargs surgery.spec: the suite on a model of one's own, without any code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--surgery-model, --surgery-rules, --surgery-inputs, --surgery-examples."""
    group = parser.getgroup("surgery", "surgery: the specification suite (--pyargs surgery.spec)")
    group.addoption("--surgery-model", default="", help="as surgery check takes it")
    group.addoption("--surgery-rules", default="adapterx_ffn", help="as surgery check takes them")
    group.addoption("--surgery-inputs", default="", help="as surgery check takes them")
    group.addoption("--surgery-examples", type=int, default=5, help="of each property (default 5)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test of surgery.spec.test_model for each property; none without --surgery-model."""
    if metafunc.module.__name__ != "surgery.spec.test_model":
        return
    asked = metafunc.config.getoption
    if not asked("--surgery-model", default=""):
        metafunc.parametrize("property", [])
        return
    from ._resolve import build, inputs_of, rules_of  # pytest loads this file in every project
    from .spec.suite import specify

    model = build(asked("--surgery-model"), "cpu")
    marked = specify(
        model=model,
        rules=rules_of(asked("--surgery-rules")),
        inputs=lambda: inputs_of(asked("--surgery-inputs"), model),
        examples=asked("--surgery-examples"),
    )
    metafunc.parametrize(*marked.args)
