"""The sizes of NOAH's parts: drawn for training, chosen, and carried over to a plain model.

Source: Zhang et al. 2022 (NOAH).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .edit import append, unfreeze
from .errors import OperationError, RuleError
from .operate import operated
from .parts.adapter import QuickGELU, adapter
from .parts.elastic import ElasticAdapter, ElasticLora, ElasticPrompt
from .parts.lora import lora
from .parts.prompt import prompt
from .pattern import Pattern
from .relation import inside
from .role import anatomise, block, ffn, head, qkv
from .rule import Rule, at
from .state import state_dict
from .tree import Tree

Model = TypeVar("Model", bound=nn.Module)
KINDS: dict[type[nn.Module], str] = {
    ElasticPrompt: "tokens",
    ElasticLora: "rank",
    ElasticAdapter: "hidden",
}


class Subnet(NamedTuple):
    """The sizes of prompts, LoRA and adapters, one for each block; 0: nothing there."""

    tokens: tuple[int, ...]
    rank: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """What subnets are drawn from: each kind stands in the first of `blocks`, by one of its sizes.

    width   of the model, for `cost`
    depths  how many blocks, counted from the first, a kind may stand in
    tokens, rank, hidden  the sizes of the three kinds (NOAH's VTAB space; also 5, 10, 50, 100)

    Raises RuleError where a size is no integer from 1 up, or a depth is above `blocks`.
    """

    blocks: int = 12
    width: int = 768
    depths: tuple[int, ...] = (3, 6, 9, 12)
    tokens: tuple[int, ...] = (1, 5, 10)
    rank: tuple[int, ...] = (1, 5, 10)
    hidden: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            listed = values if isinstance(values, (tuple, list)) else (values,)
            wrong = [v for v in listed if isinstance(v, bool) or not isinstance(v, int) or v < 1]
            if wrong or not listed or (name == "depths" and max(listed) > self.blocks):
                raise RuleError(
                    f"Space({name}={values!r})",
                    f"these are no sizes for {self.blocks} blocks.",
                    "Give integers from 1 up, and depths of at most the number of blocks.",
                )

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return self.tokens, self.rank, self.hidden

    def row(self, depth: int, sizes: Iterable[int]) -> tuple[int, ...]:
        """The sizes of one kind, one a block: those given in the first `depth` blocks, then 0."""
        return tuple(size if i < depth else 0 for i, size in enumerate(sizes))

    @property
    def least(self) -> Subnet:
        depth = min(self.depths)
        return Subnet(*(self.row(depth, [min(sizes)] * self.blocks) for sizes in self.sizes))


def sample(space: Space, generator: random.Random) -> Subnet:
    """A subnet, each kind in the first k blocks, k drawn of the depths; each size drawn by itself.

    >>> sample(Space(blocks=3, depths=(2,)), random.Random(0)).tokens
    (5, 1, 0)
    """
    draw, blocks = generator.choice, range(space.blocks)
    rows = (space.row(draw(space.depths), [draw(s) for _ in blocks]) for s in space.sizes)
    return Subnet(*rows)


def cost(subnet: Subnet, width: int) -> int:
    """What a subnet trains: tokens d + rank 4 d + (2 d + 1) hidden + d for each block of width d.

    LoRA as on one linear from d to 3 d; an adapter of size 0 has no bias; heads are left out.

    >>> cost(Subnet((10,) * 12, (10,) * 12, (10,) * 12), 768)
    654456
    """
    units = sum(subnet.tokens) + 4 * sum(subnet.rank)
    return units * width + sum(2 * width * a + a + width for a in subnet.hidden if a)


def choose(model: Model, subnet: Subnet) -> Model:
    """Let the first units of each elastic part of a model run, as a subnet says; returns the model.

    Raises OperationError where the model has no elastic parts, and RuleError where the subnet has
    other blocks than the model, or sizes that its parts do not reach.

    >>> from surgery import apply
    >>> from surgery.parts.elastic import elastic_adapter
    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    >>> rule = at(ffn, append(elastic_adapter(rank=4), residual=True))
    >>> model = choose(apply(nn.Sequential(layer), rule), Subnet((0,), (0,), (2,)))
    >>> [part.active for part in model.surgery.default.children()]
    [2]
    """
    paths = [site.path for site in anatomise(Tree(model))["block"]]
    found = list(_elastic(model, paths))
    _check_rows(subnet, len(paths))
    for part, kind, i in found:
        size = getattr(subnet, kind)[i]
        if not 0 <= size <= part.most:
            raise RuleError(
                f"choose(model, {kind}[{i}]={size})",
                f"the part at {paths[i]} has {part.most} units.",
                "Give 0 to that many, or a larger supernet: noah(tokens=, rank=, hidden=).",
            )
    for part, kind, i in found:
        part.active = getattr(subnet, kind)[i]
    return model


def _elastic(model: nn.Module, paths: list[str]) -> list[tuple[Any, str, int]]:
    """Every elastic part, its kind, and the number of the block that it is in."""
    grafts = [g for operation in operated(model, "choose(model, ...)") for g in operation.grafts]
    found = [
        (step.part, KINDS[type(step.part)], _holder(graft.path, paths))
        for graft in grafts
        for step in graft.steps
        if type(step.part) in KINDS
    ]
    if not found:
        raise OperationError(
            "choose(model, ...)",
            f"this {type(model).__name__} has no part of elastic size.",
            "Operate it by noah(), or by elastic_prompt, elastic_lora and elastic_adapter.",
        )
    return found


def _holder(path: str, blocks: list[str]) -> int:
    around = [i for i, block in enumerate(blocks) if f"{path}.".startswith(f"{block}.")]
    if not around:
        raise OperationError(
            "choose(model, ...)",
            f"an elastic part at {path} lies in no block.",
            "Put elastic parts on blocks, or on what is inside of them.",
        )
    return max(around, key=lambda i: len(blocks[i]))


def _check_rows(subnet: Subnet, blocks: int) -> None:
    if {len(row) for row in subnet} != {blocks}:
        raise RuleError(
            f"Subnet of {', '.join(str(len(row)) for row in subnet)} blocks",
            f"sizes are needed for {blocks}.",
            "Give each kind one size a block, 0 where it stands in none: Space(blocks=...).",
        )


def subnet_rules(subnet: Subnet) -> list[Rule]:
    """The rules of a subnet by itself: plain prompts, LoRA and adapters of just those sizes.

    Raises RuleError where the kinds are not told for the same number of blocks.

    >>> subnet_rules(Subnet((5, 0), (0, 0), (0, 0)))
    [at(block[0], insert(prompt(tokens=5, dropout=0.1))), at(head, unfreeze, optional=True)]
    """
    _check_rows(subnet, len(subnet.tokens))
    rules = [rule for i, sizes in enumerate(zip(*subnet, strict=True)) for rule in _rules(i, sizes)]
    return [*rules, at(head, unfreeze, optional=True)]


def _rules(i: int, sizes: tuple[int, ...]) -> list[Rule]:
    tokens, rank, hidden = sizes
    here: Pattern = block[i]
    rules = [at(here, prompt(tokens=tokens, dropout=0.1))] if tokens else []
    if rank:
        rules.append(at(qkv & inside(here), lora(rank=rank, dropout=0.1)))
    if hidden:
        made = adapter(rank=hidden, activation=QuickGELU, dropout=0.1)
        rules.append(at(ffn & inside(here), append(made, residual=True)))
    return rules


@torch.no_grad()
def carry(supernet: nn.Module, model: Model) -> Model:
    """Fill a model operated by `subnet_rules` with the first units of a supernet; returns it.

    What is trained of the base (heads) comes along. The supernet with this subnet chosen and the
    model then give the same answers, to within rounding.

    Raises OperationError where the supernet does not have what the model needs.

    >>> from surgery import apply
    >>> from surgery.parts.elastic import elastic_adapter
    >>> def layer():
    ...     return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    >>> supernet = apply(layer(), at(ffn, append(elastic_adapter(rank=4), residual=True)))
    >>> model = carry(supernet, apply(layer(), subnet_rules(Subnet((0,), (0,), (2,)))))
    >>> [tuple(p.shape) for p in model.surgery.parameters()]
    [(2, 8), (2,), (8, 2), (8,)]
    """
    source, target = state_dict(supernet), state_dict(model)
    for key, tensor in target.items():
        have = source.get(key)
        dims = have.dim() if have is not None else -1
        if have is None or dims != tensor.dim() or any(map(int.__lt__, have.shape, tensor.shape)):
            raise OperationError(
                "carry(supernet, model)",
                f"the model has {key} {tuple(tensor.shape)}, the supernet "
                + (f"{tuple(have.shape)}." if have is not None else "has nothing of that name."),
                "Operate both alike: the supernet by noah(), the model by subnet_rules(subnet).",
            )
    for key, tensor in target.items():
        tensor.copy_(source[key][tuple(slice(n) for n in tensor.shape)])
    return model
