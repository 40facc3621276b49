"""PEFT's format: what the options of a configuration say of a model, and by what names a layer's
tensors are known. Of PEFT 0.21, `adapter_config.json`; nothing of PEFT is imported.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ..errors import FileError, is_integer, is_number

LARGEST = 2**24  # an integer in a configuration
LONGEST = 2**16  # characters of one text in it
MOST = 2**12  # names in one list
MOST_LOOPS = 6  # in one regular expression
MOST_WAYS = 2**24  # to divide a path among its loops over any letters: a match may try all of them
PATIENCE = 4.0  # seconds that all matching of one configuration may take
BASE = "Load it by PEFT, merge it there, and save the model."

# what is a configuration's own affair, or how training starts, or goes without saying here
SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "d_initial", "eps", "eva_config",
    "fan_in_fan_out", "inference_mode", "init_ia3_weights", "init_weights", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "rank_dropout", "rank_dropout_scale", "module_dropout", "revision", "runtime_config",
    "task_type",
}  # fmt: skip
PRINCIPAL = ("pissa", "olora")
STARTS = (*PRINCIPAL, "gaussian", "eva", "orthogonal", "mica")  # of a LoRA
PLACES = ("target_modules", "exclude_modules", "modules_to_save")
LAYERS = (*PLACES, "layers_to_transform", "layers_pattern")
KINDS = {
    "LORA": (*LAYERS, "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias",
             "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices",
             "init_lora_weights", "lora_bias"),
    "IA3": (*PLACES, "feedforward_modules"),
    "OFT": (*LAYERS, "r", "oft_block_size", "bias", "block_share", "use_cayley_neumann",
            "num_cayley_neumann_terms"),
    "VERA": (*LAYERS, "r", "vera_dropout", "bias", "projection_prng_key", "save_projection"),
    "LOHA": (*LAYERS, "r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
    "LOKR": (*LAYERS, "r", "alpha", "rank_pattern", "alpha_pattern", "decompose_factor",
             "decompose_both", "use_effective_conv2d"),
    "LN_TUNING": PLACES,
    "TRAINABLE_TOKENS": ("target_modules", "token_indices"),
}  # fmt: skip
DEFAULTS = {
    "r": 8, "alpha": 8, "lora_alpha": 8, "bias": "none", "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5, "save_projection": True, "projection_prng_key": 0,
    "lora_dropout": 0.0, "vera_dropout": 0.0,
}  # fmt: skip


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def _listed(each: Callable[[Any], bool], alone: bool = True) -> Callable[[Any], bool]:
    """A list of such; or one alone."""
    return lambda v: (
        (alone and each(v)) or (isinstance(v, list) and len(v) <= MOST and all(map(each, v)))
    )


def _named(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and _listed(_text)([*v]) and all(map(each, v.values()))


def _whole(value: object, least: int = 0) -> bool:
    return is_integer(value, least=least) and value <= LARGEST


def _rank(value: object) -> bool:
    return _whole(value, least=1)


def _alpha(value: object) -> bool:
    return is_number(value) and 0 < value <= LARGEST


def _signed(value: object) -> bool:
    return is_number(value) and _alpha(abs(value))


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _chance(value: object) -> bool:
    return is_number(value) and 0 <= value < 1


CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys([*LAYERS[:2], "feedforward_modules", "layers_pattern"], _listed(_text)),
    **dict.fromkeys(["modules_to_save", "target_parameters"], _listed(_text, alone=False)),
    **dict.fromkeys(["use_rslora", "use_dora", "lora_bias", "block_share"], _flag),
    **dict.fromkeys(["use_cayley_neumann", "save_projection"], _flag),
    **dict.fromkeys(["decompose_both", "use_effective_conv2d"], _flag),
    "alpha": _alpha,
    "lora_alpha": _signed,
    **dict.fromkeys(["lora_dropout", "vera_dropout"], _chance),
    "layers_to_transform": _listed(_whole),
    "rank_pattern": _named(_rank),
    "alpha_pattern": _named(_signed),
    "token_indices": _listed(_whole, alone=False),
    "r": _whole,
    "oft_block_size": _whole,
    "num_cayley_neumann_terms": lambda v: _whole(v, least=3) and v <= 64,
    "projection_prng_key": lambda v: is_integer(v, least=0) and v < 2**63,
    "decompose_factor": lambda v: v == -1 or _rank(v),
    "trainable_token_indices": lambda v: (
        _listed(_whole, False)(v) or _named(_listed(_whole, False))(v)
    ),
    "bias": lambda v: v in ("none", "all") or (_text(v) and v.endswith("_only")),
    # of PiSSA and OLoRA the base is less what they start from; so it is of others (CorDA, LoftQ,
    # LoRA-GA, PiSSA by a few rounds), whose start no file tells
    "init_lora_weights": lambda v: _flag(v) or (_text(v) and v in STARTS),
}


class Target(NamedTuple):
    """A layer that has tensors in a file.

    path    of it in the model; key: what its tensors there begin with
    known   by what the patterns of ranks know it
    name    of the parameter that its parts stand at; "": they stand at the layer, which is linear
    raw     whether the parameter is one of target_parameters
    bias    whether it is what LoRA adds to all that the layer gives (lora_bias)
    """

    path: str
    module: nn.Module
    key: str
    known: str
    name: str = ""
    raw: bool = False
    bias: bool = False

    @property
    def place(self) -> str:
        return f"{self.path}.{self.name}" if self.name else self.path

    @property
    def times(self) -> float:
        """PEFT adds the change of the projection in torch's attention twice (0.21)."""
        return 1.0 if self.raw or self.known == self.path else 2.0

    @property
    def weight(self) -> Tensor:
        """What the parts stand at, as it is kept."""
        return self.module._parameters[self.name or "weight"]  # type: ignore[return-value]


class Config:
    """An `adapter_config.json`, seen to say nothing that is not understood.

    call, remedy  for errors
    """

    def __init__(self, call: str, said: dict[str, Any], remedy: str = BASE) -> None:
        self.call, self.said, self.remedy = call, said, remedy
        self._compiled: dict[str, re.Pattern[str]] = {}
        self._spent = 0.0
        kind = said.get("peft_type")
        self.kind = kind if isinstance(kind, str) else ""
        if self.kind not in KINDS:
            self.fail(f"its peft_type is {kind!r:.100}, none of {', '.join(KINDS)}.")
        for name, value in said.items():
            known = name in SILENT or name in KINDS[self.kind]
            if not known and value not in (None, False, 0, "", {}, []):
                self.fail(f"{name:.100}={value!r:.100} is an option that is not known here.")
            if name in KINDS[self.kind] and value is not None and not CHECKS[name](value):
                self.fail(f"{name}={value!r:.100} is not read here, or makes no sense.")

    def fail(self, fact: str, remedy: str = "") -> NoReturn:
        """Raise FileError."""
        raise FileError(self.call, fact, remedy or self.remedy)

    def __getitem__(self, name: str) -> Any:
        value = self.said.get(name)
        return DEFAULTS.get(name) if value is None else value

    def of(self, pattern: str, default: str, target: Target) -> Any:
        """What a pattern says of a layer: the first of its keys that fits, or the default."""
        for key, value in (self[pattern] or {}).items():
            if self.match(r"(.*\.)?({})$", key, target.known):
                return value
        return self[default]

    def scale(self, target: Target) -> float:
        """What LoRA's product is multiplied with."""
        rank = self.of("rank_pattern", "r", target)
        alpha: float = self.of("alpha_pattern", "lora_alpha", target)
        return alpha / (math.sqrt(rank) if self["use_rslora"] else rank)

    def match(self, form: str, given: str, path: str) -> re.Match[str] | None:
        """How a regular expression of the file, put into a form, fits a path from its start."""
        pattern = form.replace("{}", given, 1)
        if pattern not in self._compiled:
            self._compiled[pattern] = self._compile(given, pattern)
        loops = len(_WIDE.findall(pattern))
        if math.comb(len(path) + loops, loops) > MOST_WAYS:
            self.fail(f"matching {given!r:.100} may take for ever.", "Name the modules.")
        start = time.monotonic()
        found = self._compiled[pattern].match(path)
        self._spent += time.monotonic() - start
        if self._spent > PATIENCE:
            self.fail(f"matching {given!r:.100} and others takes too long.", "Name the modules.")
        return found

    def _compile(self, given: str, pattern: str) -> re.Pattern[str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of sets in sets
                re.compile(given)
                compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            self.fail(f"{given!r:.100} is no regular expression ({error!s:.100}).")
        if _tangled(given):
            self.fail(f"matching {given!r:.100} may take for ever.", "Name the modules.")
        return compiled

    def names(self, option: str, path: str) -> bool:
        """Whether an option, a regular expression or names, means a path."""
        names = self[option] or []
        if isinstance(names, str):
            return self.match(r"(?:{})\Z", names, path) is not None
        return path in names or any(path.endswith(f".{name}") for name in names)

    def saves(self, path: str) -> bool:
        """Whether all of a module is in the file."""
        return any(path.endswith(name) for name in self["modules_to_save"] or [])

    def feeds_forward(self, path: str) -> bool:
        """Whether IA3 scales what a layer is given, and not what it gives."""
        names = self["feedforward_modules"] or []
        if isinstance(names, str):
            return self.match(r"(?:{})\Z", names, path) is not None
        return any(path.endswith(name) for name in names)

    def targets(self, path: str) -> bool:
        """Whether a module of this path is a layer with tensors, as PEFT has it."""
        saved = "|".join(map(re.escape, self["modules_to_save"] or []))
        if self.names("exclude_modules", path) or (
            saved and re.match(rf"(^|.*\.)({saved})($|\..*)", path)
        ):
            return False
        found, listed = self.names("target_modules", path), self["target_modules"]
        if not found or isinstance(listed, str) or path in listed:
            return found
        numbers = self["layers_to_transform"]
        numbers = [numbers] if isinstance(numbers, int) else numbers
        return not numbers or self._number(path) in numbers

    def _number(self, path: str) -> int | None:
        """Which of the model's layers a path is in."""
        patterns = self["layers_pattern"]
        form = (
            r"(?:^|.*?\.)(?:{})\.(?P<number>\d+)\." if patterns else r".*?\.{}\.(?P<number>\d+)\."
        )
        for pattern in [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]:
            if found := self.match(form, pattern or r"[^.]*", path):
                return int(found["number"][:9])
        return None


_LOOP = r"(?:[*+?]|\{\d*,?\d*\})[?+]?"
_WIDE = re.compile(
    r"(?:(?<!\\)\.|\\[DSWw]|(?<!0-9)(?<!\\d)\]|\))[*+{]"
)  # of nearly any letter; of groups
_LETTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]")  # escapes and classes
_OPENING = re.compile(r"\(\?(?:[:=!]|<[=!]|P<\w+>)")
_GROUP = re.compile(rf"\(([^()]*)\)({_LOOP})?")


def _tangled(pattern: str) -> bool:
    """Whether a regular expression has a loop of loops or of choices, or too many loops."""
    text = _OPENING.sub("(", _LETTER.sub("x", pattern))
    while group := _GROUP.search(text):
        loops = _loops(group[1])
        if group[2] and (loops or "|" in group[1]):
            return True
        within = "x*" * min(loops + bool(group[2]), MOST_LOOPS + 1)
        text = text[: group.start()] + within + text[group.end() :]
    return _loops(text) > MOST_LOOPS or "(?" in text


def _loops(text: str) -> int:
    return max(len(re.findall(_LOOP, branch)) for branch in text.split("|"))


# its names -------------------------------------------------------------------------------------

PREFIX = "base_model.model."
CORES = ("base_model.vera_A", "base_model.vera_B")  # the matrices that all layers of VeRA share
_WRAPPERS = r"(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+"


def plain_name(key: str, roots: set[str]) -> str:
    """A name in a file without what wrappers put into it, and without the adapter's own name.

    roots  what the model's own names begin with
    """
    name = re.sub(rf"^{_WRAPPERS}(?={re.escape(PREFIX)})", "", key).removeprefix(PREFIX)
    if name.partition(".")[0] not in roots:
        name = re.sub(f"^{_WRAPPERS}", "", name)
    name = re.sub(r"\.default(?=(\.[^.]*)?$)", "", name)
    return re.sub(r"\.(_orig_mod|_fsdp_wrapped_module)(?=\.)", "", name)
