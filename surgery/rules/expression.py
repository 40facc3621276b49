"""An expression is a value that remembers the word and the arguments that it was written with.

Selectors, edits, parts and rules are expressions, and that one idea gives them all a `repr` that
evaluates back, equality by value, and a form as plain data that a file can hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any

from torch import nn

from ..errors import FileError, SurgeryError


@dataclass(frozen=True, repr=False)
class Expression:
    """Base of all rule values, frozen dataclasses; `word` is what users write."""

    @property
    def word(self) -> str:
        return type(self).__name__.lower()

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, by name): the fields that make this value again, defaults left out."""
        given: list[Any] = []
        named: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.kw_only:
                if field.default is MISSING or value != field.default:
                    named[field.name] = value
            elif field.name == "rest":  # what was written as *rest
                given.extend(value)
            else:
                given.append(value)
        return tuple(given), named

    def everything(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `arguments`, with the defaults too that a later version might change."""
        return self.arguments()

    def __repr__(self) -> str:
        given, named = self.arguments()
        inner = [shown(a) for a in given] + [f"{k}={shown(v)}" for k, v in named.items()]
        return f"{self.word}({', '.join(inner)})"


def shown(value: object) -> str:
    """`repr` as users write it: "strings", classes such as `nn.Linear`, functions by place."""
    if isinstance(value, type):
        known = getattr(nn, value.__name__, None) is value
        return f"nn.{value.__name__}" if known else value.__name__
    if isinstance(value, UnionType):
        return " | ".join(map(shown, value.__args__))
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if callable(value) and not isinstance(value, Expression):
        code = getattr(value, "__code__", None)
        where = f" at {code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else ""
        return f"<{getattr(value, '__name__', type(value).__name__)}{where}>"
    return repr(value)


def _is_constant(value: Any, words: Mapping[str, Any]) -> bool:
    """Whether `value` is itself a public word (`ffn`, `unfreeze`), not a call of one."""
    word = value.word if isinstance(value, Expression) else getattr(value, "__name__", "")
    return words.get(word) is value


def encode(value: Any, words: Mapping[str, Any]) -> Any:
    """An expression as plain JSON data. Raises FileError where it holds code of the user's own."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return {"list": [encode(v, words) for v in value]}
    if _is_constant(value, words):
        return {"name": shown(value)}  # of a constant expression and of a class: its word
    if isinstance(value, type) and shown(value).startswith("nn."):
        return {"nn": value.__name__}
    if isinstance(value, Expression) and value.word in words:
        given, named = value.everything()
        return {
            "word": value.word,
            "given": [encode(v, words) for v in given],
            "named": {k: encode(v, words) for k, v in named.items()},
        }
    raise FileError(
        "save",
        f"the rules hold {shown(value)}, which is code of your own, and a file carries data only.",
        "Nothing is lost: give the same rules again when loading, load(model, path, rules=...).",
    )


def decode(data: Any, words: Mapping[str, Any]) -> Any:
    """The expression that `encode` made `data` from. Only words in `words` are ever called."""
    if data is None or isinstance(data, (str, int, float, bool)):
        return data
    try:
        return _decoded(data, words)
    except FileError:
        raise
    except (SurgeryError, TypeError, ValueError, RecursionError) as error:
        raise _unreadable(f"{data!r:.200}, which makes no rule ({error})") from error


def _decoded(data: Any, words: Mapping[str, Any]) -> Any:
    match data:
        case {"list": list(items)}:
            return [decode(d, words) for d in items]
        case {"name": str(name)} if isinstance(words.get(name), (Expression, type)):
            return words[name]
        case {"nn": str(name)} if _is_module_class(getattr(nn, name, None)):
            return getattr(nn, name)
        case {"word": str(word), "given": list(given), "named": dict(named)} if word in words:
            call: Callable[..., Any] = words[word]
            return call(*(decode(d, words) for d in given), **_decode_all(named, words))
    raise _unreadable(f"{data!r:.200}, which is no word of this version")


def _unreadable(what: str) -> FileError:
    return FileError(
        "load",
        f"the rules in the file hold {what}.",
        "The file is damaged or newer than this version; give the rules: load(..., rules=...).",
    )


def _is_module_class(value: object) -> bool:
    """Whether rules may tell places by it."""
    return isinstance(value, type) and issubclass(value, (nn.Module, nn.Parameter))


def _decode_all(named: dict[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): decode(v, words) for k, v in named.items()}
