"""Models of any package: what a module of builders, or the package itself, builds unasked."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from importlib.metadata import packages_distributions
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import RuleError, nearest_names
from . import packages

PREFIX = "package:"
HELP = (
    "Give package:NAME, of a package that has builders here, or of a module whose functions need "
    "no argument and give a model, or (model, example)."
)
EXTRA = 'Run: pip install "adapterx-surgery[survey-packages]", or that package alone.'
Builder = Callable[[], Any]


def is_package(source: str) -> bool:
    """Whether a source names a package."""
    return source.startswith(PREFIX)


def provided() -> list[str]:
    """The packages that have builders here."""
    return sorted(module.name for module in pkgutil.iter_modules(packages.__path__))


def distribution(source: str) -> str:
    """The name under which what a source imports is installed.

    >>> distribution("package:torch.nn"), distribution("timm")
    ('torch', 'timm')
    """
    top = source.removeprefix(PREFIX).partition(".")[0]
    return packages_distributions().get(top, [top])[0]


def builders(source: str) -> dict[str, Builder]:
    """What builds the models of a package, by name: what needs no argument.

    That is the functions of our file of builders where there is one; else those of the module
    itself or, where it has none, its classes of modules.

    Raises RuleError where the module is not installed, cannot be imported, or builds nothing.
    """
    name = source.removeprefix(PREFIX)
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise RuleError(source, "it names no module.", HELP)
    module = _imported(source, name)
    own = {n: value for n, value in vars(module).items() if _is_own(n, value, module)}
    functions = {n: f for n, f in own.items() if inspect.isfunction(f) and _may_build(f)}
    classes = {n: c for n, c in own.items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    candidates: dict[str, Builder] = {**(functions or classes)}
    found = {n: b for n, b in candidates.items() if _needs_nothing(b)}
    if not found:
        raise RuleError(
            source,
            f"no function or class of {name} gives a model without arguments.",
            f"Write a module of functions that do. {HELP}",
        )
    return found


def _imported(source: str, name: str) -> ModuleType:
    """Our builders of a package, or the module itself."""
    if not _is_there(name):
        near = "" if name in provided() else nearest_names(name, provided())
        remedy = f"Did you mean {near}? {HELP}" if near else EXTRA
        raise RuleError(source, f"{name} is not installed.", remedy)
    try:
        own = f"{packages.__name__}.{name}" if name in provided() else name
        return importlib.import_module(own)
    except Exception as error:
        what = f"importing {name} failed: {type(error).__name__}: {error}"
        raise RuleError(source, what, "Mend it, or install what it lacks.") from error


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of what holds it
        return False


def _is_own(name: str, value: Any, module: ModuleType) -> bool:
    """Whether a public name of a module is written in it, or below it."""
    home = getattr(value, "__module__", None) or ""
    return not name.startswith("_") and f"{home}.".startswith(f"{module.__name__}.")


def _may_build(function: Builder) -> bool:
    """Whether a function does not say that it gives something else (`torchvision.list_models`)."""
    given = inspect.signature(function).return_annotation
    word = given if isinstance(given, str) else getattr(given, "__name__", "")
    return not re.match(r"(None|NoneType|str|int|float|bool|list|dict|set)\b", word, re.IGNORECASE)


def _needs_nothing(builder: Builder) -> bool:
    """Whether it can be called as it is."""
    parameters = inspect.signature(builder).parameters.values()
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return all(p.default is not p.empty or p.kind in open_ended for p in parameters)


def built(source: str, name: str) -> tuple[nn.Module, Any]:
    """A package's model, and inputs of one forward, None where its builder gives none.

    Raises RuleError where it gives no model.
    """
    made = builders(source)[name]()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise RuleError(
            f"{source} {name}",
            f"it gave a {type(made).__name__}, and no model.",
            "Give a model, or a model and an example of its inputs.",
        )
    return model, example
