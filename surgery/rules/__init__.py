"""What can be said: where (selectors, roles, relations), what (edits, parts), and both (rules).

`part`, which makes a builder a word, is `surgery.part`: here the name is that of its file.
"""

from .edits import append, attend, freeze, insert, parallel, prepend, replace, side, token, unfreeze
from .part import shared
from .relations import holding, inside, nearest, span, until
from .roles import (
    attn,
    block,
    embed,
    fc1,
    fc2,
    ffn,
    fused,
    head,
    key,
    norm,
    proj,
    qkv,
    query,
    value,
)
from .rule import Rule, Rules, at
from .selector import Selector, where
from .weights import weight

__all__ = [
    "Selector", "Rule", "Rules", "append", "at", "attend", "attn", "block", "embed", "fc1",
    "fc2", "ffn", "freeze", "fused", "head", "holding", "insert", "inside", "key", "nearest",
    "norm", "parallel", "prepend", "proj", "qkv", "query", "replace", "shared", "side", "span",
    "token", "unfreeze", "until", "value", "weight", "where",
]  # fmt: skip

# what rules, and files of them, may say, beside the words of parts
WORDS = [name for name in __all__ if name not in ("Selector", "Rule", "Rules")]
