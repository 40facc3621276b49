"""What a training loop needs: parameter groups, sizes and ranks, sensitivities, starts."""

from .adalora import Budget
from .masks import chosen, magnitudes
from .noah import Scored, Space, Subnet, carry, choose, cost, evolve, sample, subnet_rules
from .parameter_groups import Groups, groups
from .quantised import loftq, loftq_base
from .spt import Allotment, allot, fill, measure, spt_adapter, spt_lora, spt_rules
from .starts import aim_at_salient, corda, eva, eva_rules, lora_ga

__all__ = [
    "Allotment", "Budget", "Groups", "Scored", "Space", "Subnet", "aim_at_salient", "allot",
    "carry", "choose", "chosen", "corda", "cost", "eva", "eva_rules", "evolve", "fill", "groups",
    "loftq", "loftq_base", "lora_ga", "magnitudes", "measure", "sample", "spt_adapter", "spt_lora",
    "spt_rules", "subnet_rules",
]  # fmt: skip
