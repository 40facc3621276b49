"""What a training loop needs: parameter groups, sizes searched for (NOAH), sensitivities (SPT), a
budget of ranks (AdaLoRA)."""

from .adalora import Budget
from .noah import Scored, Space, Subnet, carry, choose, cost, evolve, sample, subnet_rules
from .parameter_groups import Groups, groups
from .spt import Allotment, allot, fill, measure, spt_adapter, spt_lora, spt_rules

__all__ = [
    "Allotment", "Budget", "Groups", "Scored", "Space", "Subnet", "allot", "carry", "choose",
    "cost", "evolve", "fill", "groups", "measure", "sample", "spt_adapter", "spt_lora",
    "spt_rules", "subnet_rules",
]  # fmt: skip
