"""One thread, a fixed seed, and the tiny models as fixtures."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from surgery.engine.reading import end_interrupted
from tests import models

torch.set_num_threads(1)
gc.set_threshold(10_000, 10, 50)  # small models come and go: of many objects few are garbage


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same numbers for each test; and none leaves torch's calls looked into for the next."""
    torch.default_generator.manual_seed(0)  # manual_seed writes down the stack for each device
    yield
    end_interrupted()
    left = [torch._C._pop_torch_function_stack() for _ in _get_current_function_mode_stack()]
    assert not left


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, nothing kept after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def vit() -> nn.Module:
    return models.tiny_vit()


@pytest.fixture
def tv_vit() -> nn.Module:
    return models.torchvision_vit()


@pytest.fixture
def hf_vit() -> nn.Module:
    return models.hf_vit()


@pytest.fixture
def bert() -> nn.Module:
    return models.hf_bert()


@pytest.fixture
def encoder() -> nn.Module:
    return models.encoder()


def pytest_collection_finish() -> None:
    """The garbage collector need not walk over all that is imported again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="many more examples of each property")


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    """How many to try of each property."""
    return 50 if request.config.getoption("--thorough") else 2
