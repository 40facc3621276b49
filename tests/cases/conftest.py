"""What the cases share: tiny models, trained-looking parts, and "right, or refused clearly"."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What other libraries warn of is no matter here; what surgery warns of, the tests catch."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without the name of the test in its path: messages have paths in them."""
    return tmp_path_factory.mktemp("t")


@pytest.fixture
def right_or_refused() -> Callable[..., None]:
    """right_or_refused(call, check, match=None, warned=None, also=()): one of these, or it fails.

    - `call()` returns, and `check(what it returned)` finds it right;
    - it raises a SurgeryError (or one of `also`), whose text has the pattern `match` in it;
    - where `warned` is given: a warning that has this pattern in it was given on the way.
    """

    def run(
        call: Callable[[], Any],
        check: Callable[[Any], Any],
        match: str | None = None,
        warned: str | None = None,
        also: tuple[type[Exception], ...] = (),
    ) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                value = call()
            except (surgery.SurgeryError, *also) as error:
                said = str(error)
                assert match is None or re.search(match, said), (
                    f"refused, without {match!r}: {said}"
                )
                return
        if warned is not None and any(re.search(warned, str(each.message)) for each in seen):
            return
        check(value)

    return run


@pytest.fixture
def tuned() -> Callable[..., nn.Module]:
    """tuned(model, std=0.2): gives what was added values as training would, and returns it."""

    def fill(model: nn.Module, std: float = 0.2, seed: int = 3) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("surgery.") or ".surgery." in name:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((std * drawn).to(parameter.dtype))
        return model

    return fill


@pytest.fixture
def apart() -> Callable[[Tensor, Tensor], float]:
    """apart(a, b): the largest difference; infinite where the shapes differ or one is not
    finite.
    """

    def measure(a: Tensor, b: Tensor) -> float:
        if a.shape != b.shape:
            return float("inf")
        most = (a.detach().double() - b.detach().double()).abs().max().item()
        return most if most == most else float("inf")

    return measure


@pytest.fixture
def vit() -> Callable[..., nn.Module]:
    """vit(): timm's, width 24, 3 blocks, 16 x 16 images in 4 patches, 4 classes, the same each."""

    def build(**changes: Any) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        chosen: dict[str, Any] = {
            "img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3,
            "num_heads": 3, "num_classes": 4,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return VisionTransformer(**{**chosen, **changes}).eval()

    return build


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
