"""What a training loop needs beyond rules: sizes searched for (NOAH), sensitivities (SPT), ranks
pruned (AdaLoRA)."""

from .adalora import Budget
from .noah import Scored, Space, Subnet, carry, choose, cost, evolve, sample, subnet_rules
from .spt import Allotment, allot, fill, measure, spt_adapter, spt_lora, spt_rules

__all__ = [
    "Allotment", "Budget", "Scored", "Space", "Subnet", "allot", "carry", "choose", "cost",
    "evolve", "fill", "measure", "sample", "spt_adapter", "spt_lora", "spt_rules", "subnet_rules",
]  # fmt: skip
