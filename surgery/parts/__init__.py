"""The small trainable modules, one family a file. Each word here makes a part for a rule."""

from .adapter import Adapter, QuickGELU, adapter
from .moa import MixtureOfAdapters, moa

__all__ = ["Adapter", "MixtureOfAdapters", "QuickGELU", "adapter", "moa"]
