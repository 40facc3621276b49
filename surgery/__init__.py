"""Surgery: config-free, declarative model surgery for PyTorch.

model = surgery.apply(model, rules="adapterx_ffn")
loss = criterion(model(x), y) + 0.01 * surgery.balance_loss(model)
surgery.save(model, "tuned.safetensors")
"""

from . import methods, parts
from ._preserve import fingerprint
from .engine.activity import activate, train_only
from .engine.apply import apply, disabled, parameters, revert
from .engine.losses import Routing, balance_loss, penalty, routing
from .engine.materialise import materialise
from .engine.merging import merge, unmerge
from .engine.mixture import mixed
from .engine.planning import Plan, plan
from .engine.reports import anatomy, draw_loads, report
from .errors import (
    ConflictError,
    FileError,
    GraftError,
    MatchError,
    OperationError,
    RuleError,
    SurgeryError,
)
from .methods import rulesets
from .parts import QuickGELU, adapter, lora, moa, prompt, prompt_generator, scale_shift
from .parts import functional as ops
from .rules.edits import (
    append,
    attend,
    freeze,
    insert,
    parallel,
    prepend,
    replace,
    side,
    token,
    unfreeze,
)
from .rules.part import part, shared
from .rules.relations import holding, inside, nearest, span, until
from .rules.roles import (
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
from .rules.rule import Rule, at
from .rules.selector import where
from .rules.weights import weight
from .state.checkpoint import load, load_state_dict, save, state_dict
from .state.hugging_face import from_pretrained, save_pretrained
from .state.inspection import inspect
from .state.lora_conversion import as_lora
from .state.peft_reading import load_peft
from .state.peft_writing import save_peft
from .state.swapping import swap
from .structure.module_tree import Site
from .training.parameter_groups import groups

__version__ = "0.1.0"

__all__ = [
    "ConflictError", "FileError", "GraftError", "MatchError", "OperationError", "Plan",
    "QuickGELU", "Routing", "Rule", "RuleError", "Site", "SurgeryError", "activate", "adapter",
    "anatomy", "append", "apply", "as_lora", "at", "attend", "attn", "balance_loss", "block",
    "disabled", "draw_loads", "embed", "fc1", "fc2", "ffn", "fingerprint", "freeze",
    "from_pretrained", "fused", "groups", "head", "holding", "insert", "inside", "inspect",
    "key", "load", "load_peft", "load_state_dict", "lora", "materialise", "merge", "methods",
    "mixed", "moa", "nearest", "norm", "ops", "parallel", "parameters", "part", "parts",
    "penalty", "plan", "prepend", "proj", "prompt", "prompt_generator", "qkv", "query",
    "replace", "report", "revert", "routing", "rulesets", "save", "save_peft",
    "save_pretrained", "scale_shift", "shared", "side", "span", "state_dict", "swap", "token",
    "train_only", "unfreeze", "unmerge", "until", "value", "weight", "where",
]  # fmt: skip
