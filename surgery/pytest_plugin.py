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
