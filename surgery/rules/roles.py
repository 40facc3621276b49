"""Roles: block, attn, ffn, qkv, proj, norm, embed and head, found by structure, never by name.

fused is the one projection that makes query, key and value at once, a third each; fc1 and fc2 are
the layers of a feed-forward network; query, key and value a forward on an example tells apart.

Attention is what projects features inside a block and is no feed-forward network, and where an
example is given what a forward shows to mix tokens by data; a block is the repeated module that
holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RuleError
from ..structure.anatomy import roles_of, told_roles, torch_operands
from ..structure.attention_states import OPERANDS
from ..structure.module_tree import Tree
from ..structure.weights import ParameterSite
from .selector import Selected, Selection


@dataclass(frozen=True, repr=False)
class Role(Selection):
    """A place by its function in a transformer."""

    name: str

    @property
    def word(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    def select(self, tree: Tree) -> Selected:
        return {site: {} for site in roles_of(tree)[self.name]}


class Operand(Role):
    """A projection that makes the query, the key or the value of attention, and nothing else."""

    def select(self, tree: Tree) -> Selected:
        if not roles_of(tree)["qkv"]:  # as of any role that the model lacks
            return {}
        told = told_roles(tree)
        if self.name not in told and all(
            isinstance(s, ParameterSite) for s in roles_of(tree)["qkv"]
        ):
            told = torch_operands(tree)
        if self.name not in told:
            raise RuleError(
                f"at({self.name}, ...)",
                "the module tree does not tell queries, keys and values apart.",
                "Give apply(..., example=inputs), and a forward tells; or use an address, or qkv.",
            )
        return {site: {} for site in told[self.name]}


block, attn, ffn, qkv, proj = map(Role, ("block", "attn", "ffn", "qkv", "proj"))
norm, embed, head = map(Role, ("norm", "embed", "head"))
fused, fc1, fc2 = map(Role, ("fused", "fc1", "fc2"))
query, key, value = map(Operand, OPERANDS)
ROLES = (embed, block, norm, attn, qkv, proj, ffn, head)
