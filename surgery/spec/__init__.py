"""The specification suite: what must be true of any model operated by any rules.

from surgery.spec import check

print(check(model, rules, inputs))
"""

from .case import Case
from .laws import Absent, Broken, law
from .strategies import addresses, from_model, parts, rules, transformers
from .suite import GROUPS, PROPERTIES, Report, Verdict, check, specify

__all__ = [
    "Absent", "Broken", "Case", "GROUPS", "PROPERTIES", "Report", "Verdict", "addresses", "check",
    "from_model", "law", "parts", "rules", "specify", "transformers",
]  # fmt: skip
