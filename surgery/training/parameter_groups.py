"""What an optimiser is given: groups of parameters that know what each tensor is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from .._table import Table
from ..engine.apply import operated, parameters
from ..engine.operation import Operation, operations
from ..errors import OperationError, RuleError
from ..rules.roles import block, head
from ..structure.layers import held_weights, is_conv, is_norm, is_token, named_modules
from ..structure.module_tree import Site, Tree

DECAYED = ("weight", "B")
TOKENS = ("tokens", "prompts")  # of parts that hold learned tokens


class Groups(list[dict[str, Any]]):
    """Parameter groups as optimisers take them, which print as a table."""

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = [
            (g["name"], len(g["params"]), sum(p.numel() for p in g["params"]), g["lr"],
             g["weight_decay"])
            for g in self
        ]  # fmt: skip
        title = "Parameter groups"
        return str(Table(title, ("what", "tensors", "parameters", "lr", "weight decay"), rows))


class TrainedTensor(NamedTuple):
    """A trained tensor: what it is ("weight", "bias", ...), and where.

    depth  of its block: 0 before all blocks, then 1, 2, ...; of a tied one, where it is last
    """

    parameter: nn.Parameter
    kind: str
    in_head: bool
    depth: int


def groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    head_lr: float | None = None,
    layer_decay: float = 1.0,
    ratio: float = 1.0,
) -> Groups:
    """Optimiser parameter groups of all that is trained: torch.optim.AdamW(groups(model, ...)).

    Matrices decay; biases (also stacks of them, one for each expert), norms, vectors, learned
    tokens, embeddings and routers do not. Each group has a "name"; `print` shows them as a table.

    weight_decay  of matrices, those of the head too
    head_lr       the learning rate of the model's head; None: lr
    layer_decay   lr * layer_decay ** k for what stands k blocks below the top (Bao et al. 2022,
                  BEiT): a part that blocks share has the rate of the last of them
    ratio         of the learning rate of LoRA's B to that of A (Hayou et al. 2024, LoRA+: 16)

    Raises OperationError on a model that was never operated, and where a decay by layers is asked
    for and there are no blocks; RuleError where a number is none that can be.

    >>> from surgery import apply
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2)
    >>> print(groups(apply(encoder, "lora"), lr=1e-3, weight_decay=0.1, ratio=16))
    Parameter groups
    what    tensors  parameters     lr  weight decay
    weight        2         256  0.001           0.1
    B             2         768  0.016           0.1
    """
    for name, number in [("lr", lr), ("head_lr", head_lr), ("weight_decay", weight_decay),
                         ("layer_decay", layer_decay), ("ratio", ratio)]:  # fmt: skip
        _check(name, number)
    operated(model, "groups(model, ...)")
    trained = {id(p) for p in parameters(model)}
    tensors = list(_tensors(model, layer_decay != 1))
    top = max((t.depth for t in tensors), default=0)
    found = {id(t.parameter): t for t in tensors if id(t.parameter) in trained}  # tied ones once
    made: dict[tuple[str, float, float], list[nn.Parameter]] = defaultdict(list)
    for t in found.values():
        rate = head_lr if t.in_head and head_lr is not None else lr
        rate *= layer_decay ** (top - t.depth) * (ratio if t.kind == "B" else 1.0)
        decay = weight_decay if t.kind in DECAYED else 0.0
        kind = t.kind if t.kind != "B" or ratio != 1 else "weight"
        name = f"{'head ' * t.in_head}{kind}"
        name += f", {top - t.depth} blocks below the top" if layer_decay != 1 else ""
        made[name, rate, decay].append(t.parameter)
    return Groups(
        {"params": params, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), params in made.items()
    )


def _check(name: str, value: Any) -> None:
    if value is None and name == "head_lr":
        return
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise RuleError(f"groups({name}={value!r})", "it is no rate.", "Give a number, 0 or more.")


def _tensors(model: nn.Module, by_depth: bool) -> Iterator[TrainedTensor]:
    """Each tensor of the base and of the parts, with what it is."""
    tree = Tree(model)
    heads, blocks = _heads(model, tree), _blocks(tree) if by_depth else []
    if by_depth and not blocks:
        raise OperationError(
            "groups(layer_decay=...)",
            f"no blocks are found in this {type(model).__name__}.",
            "Leave layer_decay out.",
        )
    sites = {site.path: site for site in tree.sites}
    for path, module in named_modules(model):
        begins = sites[path].order if path in sites else 0
        inside, depth = any(_is_in(path, h) for h in heads), _depth(begins, begins + 1, blocks)
        for name, p in held_weights(module):
            is_position = p.dim() == 3 and len(p) == 1 and not is_conv(module)  # (1, n, width)
            kind = "tokens" if is_position else _kind(module, name, p)
            yield TrainedTensor(p, kind, inside, depth)
    for operation in operations(model):
        depths = _depths(operation, blocks)
        for module in operation.modules():
            depth = depths.get(id(module), len(blocks))  # what parts share is at no place itself
            for name, p in held_weights(module):
                yield TrainedTensor(p, _kind(module, name, p), False, depth)


def _depths(operation: Operation, blocks: list[Site]) -> dict[int, int]:
    """By the id of a module of a part, the depth of the last place where it acts."""
    depths: dict[int, int] = {}
    for hooked in operation.hooked_sites:
        depth = _depth(*hooked.extent, blocks)
        for module in [m for action in hooked.actions for m in action.part.modules()]:
            depths[id(module)] = max(depth, depths.get(id(module), 0))
    return depths


def _heads(model: nn.Module, tree: Tree) -> list[str]:
    """The paths of heads, as a forward told them when rules were applied, or as modules do."""
    told = [o.record["roles"].get("head") for o in operations(model)]
    known = [[path for path, *_ in heads] for heads in told if heads]
    return known[-1] if known else [site.path for site in head.find(tree)]


def _blocks(tree: Tree) -> list[Site]:
    return sorted(block.find(tree), key=lambda site: site.order)


def _depth(order: int, end: int, blocks: list[Site]) -> int:
    """Of what lies there: 1 for the first block, and so on; 0 before, one more behind all."""
    if blocks and order >= blocks[-1].exit.end:
        return len(blocks) + 1
    return sum(site.order < end for site in blocks)


def _is_in(path: str, holder: str) -> bool:
    return path == holder or path.startswith(f"{holder}.") or not holder


def _kind(module: nn.Module, name: str, p: nn.Parameter) -> str:
    """What a tensor of a module is to an optimiser."""
    known = getattr(module, "kinds", {}).get(name, "")  # where a part says it itself
    if known or name == "router":
        return str(known or name)
    if "bias" in name:  # bias, down_bias (one for each expert), relative_position_bias_table
        return "bias"
    if is_norm(module) or name.startswith("norm_"):
        return "norm"
    if isinstance(module, nn.Embedding) or is_token(p) or name in TOKENS:
        return "tokens"
    if p.numel() == max(p.shape, default=1):
        return "vector"
    return "B" if name == "B" and "A" in module._parameters else "weight"
