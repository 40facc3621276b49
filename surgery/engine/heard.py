"""What the actions of one site hear in a forward: what the part at another site gave last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import GraftError
from .passes import Passes
from .streams import Streams, Tokens, is_recomputing
from .tracing import Here


class Heard:
    """What the actions of one site hear.

    sources  the number of an action, and where the part is that it hears, and that part
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.sources: dict[int, tuple[str, nn.Module]] = {}
        self.traced: dict[int, Tensor] = {}  # what compiled code told
        self.told: dict[int, Here] = {}
        self.answered: Any = WeakTensorKeyDictionary()  # what was heard for an input

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "sources": self.sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        for i, (path, part) in state["sources"].items():
            self.listen(i, path, part)

    def listen(self, i: int, path: str, part: nn.Module) -> None:
        """Action i hears a part, which is at `path`."""
        self.sources[i] = path, part
        if path != self.path:  # what is told there is told right before
            self.told[i] = Here()

    def tell(self, passes: Passes, i: int, out: Tensor) -> None:
        """What action i hears now."""
        if torch.compiler.is_compiling():
            self.traced[i] = out
            if i in self.told:
                self.told[i].note()
        else:
            self.traced.pop(i, None)
            passes.mine().heard[self.path, i] = out

    def is_here(self, numbers: list[int]) -> bool:
        """Whether compiled code has what these actions hear."""
        return all(self.told[i].noted() for i in numbers if i in self.told)

    def hear(self, passes: Passes, streams: Streams, i: int, given: Tensor) -> Tensor:
        """What the part that action i hears gave in this forward.

        given  what came to the site: a checkpoint that runs again gives the same, and is answered
               as it was then

        Raises GraftError where it did not run before, or is heard without its gradient.
        """
        earlier = self.answered.get(given, {}) if is_recomputing() else {}
        heard = earlier[i] if i in earlier else self._last(passes, streams, i)
        path, part = self.sources[i]
        if heard is None:
            raise GraftError(
                f"the graft at {self.path}",
                f"the part that it hears, at {path}, did not run before it in this forward.",
                "Give hears= a place that runs before this one.",
            )
        trained = any(p.requires_grad for p in part.parameters())
        transformed = torch._C._are_functorch_transforms_active()  # there it does not show
        if torch.is_grad_enabled() and trained and not (heard.requires_grad or transformed):
            raise GraftError(
                f"the graft at {self.path}",
                f"what it hears from {path} came without a gradient (reentrant checkpointing), "
                "which would silently be missing.",
                "Use checkpointing with use_reentrant=False.",
            )
        if not torch.compiler.is_compiling():
            self.answered[given] = {**self.answered.get(given, {}), i: heard}
        return heard

    def by_samples(self, i: int, heard: Tensor, tokens: Tokens, x: Tensor) -> Tensor:
        """What action i hears, by samples, as the tokens x are.

        Raises GraftError where it is one row for all samples (an FFN of tokens in a row).
        """
        rows = tokens.rows(heard) if heard.dim() == 3 else heard
        samples = tokens.rows(x).shape[0]  # len() would be a number, where it is exported for any
        if rows.shape[0] == samples:
            return rows
        raise GraftError(
            f"the graft at {self.path}",
            f"it hears {tuple(rows.shape)} from {self.sources[i][0]}, where tokens of {samples} "
            "samples are needed.",
            "Write insert(..., hears=) with a place that gives tokens by samples, (b, n, width).",
        )

    def _last(self, passes: Passes, streams: Streams, i: int) -> Tensor | None:
        """What was told last in this forward, whoever told it."""
        if torch.compiler.is_compiling():
            return self.traced.get(i)
        kept = passes.mine()
        if i in self.traced:  # compiled code told it, of another block, and later
            kept.heard[self.path, i] = self.traced.pop(i)
            streams.check_alone(self.path)
        return kept.heard.get((self.path, i))
