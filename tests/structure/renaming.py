"""Models under other names: attributes and classes are called at random, and what they do stays.

A forward reads `self.attn` as ever: while it runs, and only then, old names lead to the new ones.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import getattr_static
from itertools import count
from types import FunctionType
from typing import Any

from torch import nn

from surgery.structure.module_tree import Site


def renamed(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same model, in place: random names for all that its own classes hold, and for these.

    Torch's own modules keep what they hold by which name; lists and dicts keep their keys. Of what
    derives from one of torch's layers the class alone has another name.
    """
    rename = _Renaming(seed)
    for module in list(model.modules()):
        rename(module)
    return model


def original(site: Site) -> str:
    """The path that a site of a renamed model had before."""
    if not site.is_span:
        return ".".join(_steps(site))
    depth, entry, exit = len(site.steps), _steps(site.entry), _steps(site.exit)
    a, b = ".".join(entry[depth:]), ".".join(exit[depth:])
    return ".".join([*entry[:depth], f"({a} to {b})"])


def originals(sites: Iterable[Site]) -> list[str]:
    """The paths that sites of a renamed model had before."""
    return [original(site) for site in sites]


def _steps(site: Site) -> list[str]:
    """Its path step by step, by the old names."""
    within = [site, *site.above()][:-1]
    return [_old_name(s.parent.module, s.steps[-1].name) for s in reversed(within) if s.parent]


def _old_name(holder: nn.Module, name: str) -> str:
    names: dict[str, str] = getattr(type(holder), "_new_names", {})
    return next((old for old, new in names.items() if new == name), name)


class _Renaming:
    """One class, and one name for each attribute, for all modules of a class."""

    def __init__(self, seed: int) -> None:
        self.random, self.number = random.Random(seed), count()
        self.classes: dict[type[nn.Module], type[nn.Module]] = {}

    def __call__(self, module: nn.Module) -> None:
        kind = type(module)
        if _is_torchs(kind):
            return
        if kind not in self.classes:
            self.classes[kind] = _other_class(kind, self.word().title())
        if not any(_is_torchs(base) for base in kind.__mro__ if base not in _HOLDERS):
            names: dict[str, str] = self.classes[kind]._new_names  # type: ignore[assignment]
            for old in _attributes(module):
                names.setdefault(old, self.word())
            _rename(module, names)
        module.__class__ = self.classes[kind]

    def word(self) -> str:
        letters = (self.random.choice(string.ascii_lowercase) for _ in range(6))
        return f"{''.join(letters)}{next(self.number)}"


_HOLDERS = (nn.Module, nn.Sequential, object)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "torch" and issubclass(kind, nn.Module)


def _attributes(module: nn.Module) -> list[str]:
    """What a module holds under names that its class has chosen."""
    kept = vars(nn.Module())
    held = [module.__dict__, module._parameters, module._buffers, module._modules]
    if isinstance(module, nn.Sequential):  # which runs through them
        held.pop()
    names = [name for each in held for name in each if name not in kept]
    return [n for n in names if not n.startswith("_") and not hasattr(type(module), n)]


def _rename(module: nn.Module, names: dict[str, str]) -> None:
    for held in (module.__dict__, module._parameters, module._buffers, module._modules):
        found = {names.get(name, name): value for name, value in held.items()}
        held.clear()
        held.update(found)
    unsaved = module._non_persistent_buffers_set
    module._non_persistent_buffers_set = {names.get(name, name) for name in unsaved}


class _Running:
    """How many methods of renamed modules run: only then do old names lead anywhere."""

    depth = 0


def _other_class(kind: type[nn.Module], name: str) -> type[nn.Module]:
    names: dict[str, str] = {}

    def get(self: Any, name: str) -> Any:
        if _Running.depth and name in names:
            return getattr(self, names[name])
        return kind.__getattr__(self, name)

    def set(self: Any, name: str, value: Any) -> None:
        kind.__setattr__(self, names.get(name, name) if _Running.depth else name, value)

    methods = {
        name: _running(method)
        for name in dir(kind)
        if not hasattr(nn.Module, name) or name == "forward"
        if isinstance(method := getattr_static(kind, name), FunctionType)
        if method is not nn.Module.forward
    }
    own = {"_new_names": names, "__getattr__": get, "__setattr__": set, "__module__": "renamed"}
    return type(name, (kind,), {**methods, **own})


def _running(method: FunctionType) -> Callable[..., Any]:
    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        _Running.depth += 1
        try:
            return method(*args, **kwargs)
        finally:
            _Running.depth -= 1

    return run
