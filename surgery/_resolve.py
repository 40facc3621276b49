"""What a command line names: models, rules and inputs, found by name or in a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RuleError, SurgeryError, nearest_names
from .rules.rule import Rules
from .survey.dummy_inputs import feed

MODEL = "timm:NAME, or package.module:function (or file.py:function) that returns a model"
RULES = "the name of a rule set, or package.module:NAME (or file.py:NAME) of rules of your own"
INPUTS = "package.module:function (or file.py:function) that returns inputs of one forward"


def build(name: str, device: str = "meta", pretrained: bool = False) -> nn.Module:
    """The model that the command line names; timm's without its weights, or pretrained.

    Raises RuleError where there is no such model, with the nearest names.

    >>> build("torch.nn:Identity")
    Identity()
    """
    kind, _, what = name.partition(":")
    if kind == "timm" and what:
        return _timm(what, device, pretrained)
    target = _object(name, "MODEL", MODEL)
    model = target if isinstance(target, nn.Module) else _called(target, name)
    if not isinstance(model, nn.Module):
        raise RuleError(name, f"it gave a {type(model).__name__}, and no model.", f"Give {MODEL}.")
    return model


def rules_of(name: str) -> Rules:
    """The rules that the command line names.

    >>> rules_of("full")
    'full'
    """
    if ":" not in name:
        return name
    rules: Rules = _object(name, "RULES", RULES)
    return rules


def inputs_of(name: str, model: nn.Module) -> Any:
    """Inputs of one forward, two samples of them where that can be told.

    name  of a function that gives them; "": what the model says by `example()` or, as timm's do, by
          `default_cfg`, or else a guess by the names that its forward gives to what it takes

    Raises RuleError where there is nothing to go by.

    >>> inputs_of("torch:zeros", nn.Identity())
    Traceback (most recent call last):
    surgery.errors.RuleError: torch:zeros: calling it failed: TypeError: ...
    """
    if name:
        inputs = _object(name, "INPUTS", INPUTS)
        return _called(inputs, name) if _is_function(inputs) else inputs
    if callable(example := getattr(model, "example", None)):
        return example()
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size:
        return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    try:
        return feed(model)
    except Exception as error:
        raise RuleError(
            type(model).__name__,
            f"nothing tells what it takes, and a guess failed: {type(error).__name__}: {error}",
            f"Give --inputs: {INPUTS}.",
        ) from error


def _timm(name: str, device: str, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise missing("timm", "vision") from error
    if not timm.is_model(name):
        near = nearest_names(name, timm.list_models())
        raise RuleError(
            f"timm:{name}",
            "timm has no model of this name.",
            f"Nearest: {near}."
            if near
            else 'See python -c "import timm; print(timm.list_models())".',
        )
    with torch.device(device):
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    return model


def missing(module: str, extra: str) -> RuleError:
    """The error where a module is not installed, which an extra of this package brings."""
    return RuleError(
        f"import {module}",
        f"{module} is not installed.",
        f'Run: pip install "adapterx-surgery[{extra}]"',
    )


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)


def _object(name: str, what: str, help: str) -> Any:
    """The object that `module:attribute` or `file.py:attribute` names."""
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise RuleError(name, f"this names no {what}.", f"Give {help}.")
    module = _imported(module_name, name)
    if not hasattr(module, attribute):
        near = nearest_names(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise RuleError(
            name,
            f"{module_name} has no {attribute}.",
            f"Nearest: {near}." if near else "Check the spelling.",
        )
    return getattr(module, attribute)


def _imported(module_name: str, name: str) -> Any:
    try:
        if not module_name.endswith(".py"):
            sys.path.insert(0, "")
            return importlib.import_module(module_name)
        path = Path(module_name).resolve()
        loaded = (m for m in sys.modules.values() if getattr(m, "__file__", None) == str(path))
        return next(loaded, None) or _executed(path)
    except SurgeryError:
        raise
    except Exception as error:
        raise RuleError(
            name,
            f"importing {module_name} failed: {type(error).__name__}: {error}",
            "Give a module that can be imported from this folder, or a file that ends in .py.",
        ) from error


def _executed(path: Path) -> Any:
    """A file as a module, known by its name from then on: pickles look for classes there."""
    name = path.stem if path.stem not in sys.modules else f"surgery_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot read {path}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as python file.py does
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _called(function: Any, name: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise RuleError(
            name,
            f"calling it failed: {type(error).__name__}: {error}",
            "Give a function that takes no arguments.",
        ) from error
