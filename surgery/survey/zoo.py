"""The models of the survey: how each is named, built small, and fed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .builders import builders
from .dummy_inputs import Inputs, feed, unfed
from .shrink import Shrink, mended, shrunk

LADDER = (  # sizes to try; pictures cut, or as they are, in whole grids where towers merge patches
    Shrink(),
    Shrink(image=None, sections=True, grid=4),
    Shrink(by=4, image=None, heads=True, grid=4),
    Shrink(by=4, image=None),
    Shrink(by=4, image=None, heads=True, sections=True, grid=4),
    Shrink(by=16, image=None),
    Shrink(by=8, layers=None, image=None),
    Shrink(by=8, image=None, vocab=None),
    Shrink(by=1, layers=2, image=None),
)
SOURCES = ("timm", "torchvision", "transformers")
MOST = 450_000_000  # parameters of a model that is built for real


def names(source: str) -> list[str]:
    """Every model of a source.

    Raises ModuleNotFoundError where it is not installed, RuleError where it builds nothing.
    """
    if source == "timm":
        import timm

        return list(timm.list_models())
    if source == "torchvision":
        import torchvision

        return list(torchvision.models.list_models())
    if source == "transformers":
        return model_types()
    return list(builders(source))


def sketch(source: str, name: str) -> nn.Module:
    """A timm or torchvision model on the meta device, without weights, where it can be so."""
    try:
        with torch.device("meta"):
            return real(source, name)
    except NotImplementedError:  # it reads its own weights as it is built
        return real(source, name)


def real(source: str, name: str) -> nn.Module:
    """A timm or torchvision model with random weights."""
    torch.manual_seed(0)
    model: nn.Module
    if source == "timm":
        import timm

        model = timm.create_model(name)
        return model
    import torchvision

    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    bare = {k: None for k in ("weights", "weights_backbone") if k in parameters}
    model = builder(**bare)
    return model


def picture(source: str, model: nn.Module) -> Inputs:
    """One input of the size that a timm or torchvision model asks for, by the name it asks for."""
    size: tuple[int, ...] = (3, 224, 224)
    if source == "timm":
        size = tuple(getattr(model, "default_cfg", {}).get("input_size", size))
    elif ".video" in type(model).__module__:
        size = (3, 16, 224, 224)
    generator = torch.Generator().manual_seed(0)
    main, *more = inspect.signature(model.forward).parameters
    inputs: Inputs = {main: torch.randn(1, *size, generator=generator)}
    if more and more[0] == "image2":  # optical flow, RAFT: two pictures
        inputs = {
            name: torch.randn(1, 3, 128, 128, generator=generator) for name in (main, more[0])
        }
    return inputs


def model_types() -> list[str]:
    """Every model type of transformers that has a model of its own."""
    from transformers.models.auto import configuration_auto, modeling_auto

    types: list[str] = list(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])
    return [name for name in types if name in modeling_auto.MODEL_MAPPING_NAMES]


def default_config(model_type: str) -> Any:
    """The config that a transformers type has where nothing is said."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


def model_of(config: Any) -> nn.Module:
    """The bare model of a config, in eval mode; where transformers names several, the first.

    A config that lacks what its model asks for is given it.
    """
    kind = _class_of(config)
    wanted = getattr(kind, "config_class", None) or type(config)
    if not isinstance(config, wanted):  # the whole is a shell: take the part that has this model
        config = next((v for v in vars(config).values() if isinstance(v, wanted)), config)
    for _ in range(8):
        try:
            model: nn.Module = kind(config) if kind else _auto(config)
            return model.eval()
        except (AttributeError, KeyError, TypeError) as error:
            if not mended(config, error):
                raise
    raise RuntimeError("its config lacks too much")


def _class_of(config: Any) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES.get(config.model_type, ())
    return getattr(transformers, names if isinstance(names, str) else (*names, "")[0], None)


def _auto(config: Any) -> nn.Module:
    import transformers

    auto: Any = transformers.AutoModel
    model: nn.Module = auto.from_config(config)
    return model


def candidates(model_type: str) -> Iterator[tuple[Shrink, nn.Module | Exception]]:
    """The model in one size after another, or why that size cannot be built."""
    base = default_config(model_type)
    errors: list[str] = []
    for how in LADDER:
        if errors[2:] and len(set(errors[-3:])) == 1 and how is not LADDER[-1]:
            continue  # no size will do; fewer kinds of layers may
        try:
            torch.manual_seed(0)
            yield how, _built(shrunk(base, how))
        except ImportError as error:  # of a package that no size would bring
            yield how, error
            return
        except Exception as error:
            errors.append(repr(error))
            yield how, error


def on_meta(model_type: str) -> nn.Module:
    """The model on the meta device, to be read and not run: small, or as it is by default."""
    base = default_config(model_type)
    first_error: Exception | None = None
    for how in (*LADDER[:3], None):
        try:
            config = shrunk(base, how) if how else base
            with torch.device("meta"):
                return model_of(config)
        except Exception as error:
            first_error = first_error or error
    raise first_error or RuntimeError(model_type)


def _built(config: Any) -> nn.Module:
    """Build on the meta device to count, then for real. Raises MemoryError above MOST."""
    try:
        with torch.device("meta"):
            model = model_of(config)
        size = sum(p.numel() for p in model.parameters())
    except Exception:
        size = 0
    if size > MOST:
        raise MemoryError(f"{size:,} parameters even when small")
    return model_of(config)


def tiny(model_type: str, seconds: float = 40.0) -> tuple[nn.Module, Inputs]:
    """A small model of a transformers type, and inputs by name with which its forward runs.

    The first size that takes every modality of the forward; where there is none, the first that
    runs at all. Raises the last error of a forward (or of building) where nothing runs.
    """
    deadline = time.monotonic() + seconds
    trouble: Exception | None = None
    partly_fed: tuple[nn.Module, Inputs] | None = None
    for _, model in candidates(model_type):
        if isinstance(model, Exception):
            trouble = trouble or model
            continue
        try:
            left = min(12.0, deadline - time.monotonic())
            inputs = feed(model, left, whole=partly_fed is not None)
            if not unfed(model, inputs):
                return model, inputs
            partly_fed = partly_fed or (model, inputs)
        except Exception as error:
            trouble = error  # of the forward: it says more than that of the building
        if time.monotonic() > deadline:
            break
    if partly_fed:
        return partly_fed
    raise trouble or RuntimeError("no time was left")
