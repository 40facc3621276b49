"""What pytest --pyargs surgery.spec runs: every property on the model that its options name.

`surgery.pytest_plugin` makes them of the options, a test for each.
"""

from __future__ import annotations

from collections.abc import Callable


def test_model(property: Callable[[], None]) -> None:
    """The property holds."""
    property()
