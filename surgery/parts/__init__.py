"""The small trainable modules, one family a file. Each word here makes a part for a rule."""

from .adapter import Adapter, QuickGELU, adapter
from .moa import MixtureOfAdapters, moa
from .prompt import Prompt, PromptGenerator, prompt, prompt_generator

WORDS = ("QuickGELU", "adapter", "moa", "prompt", "prompt_generator")  # what rules may call

__all__ = [
    "WORDS", "Adapter", "MixtureOfAdapters", "Prompt", "PromptGenerator", "QuickGELU", "adapter",
    "moa", "prompt", "prompt_generator",
]  # fmt: skip
