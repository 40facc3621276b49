"""How AdaLoRA's budget of ranks falls, and which triplets are kept (Zhang et al. 2023).

budget = Budget(model, rank=8, steps=10_000, warmup=500, cooldown=2000)
...
loss.backward(); optimizer.step(); budget.step(); optimizer.zero_grad()
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..parts.arguments import positive
from ..parts.low_rank_forms import AdaLoRA


class Budget:
    """The triplets of a model's AdaLoRA parts that are kept: the most important, ever fewer.

    The budget is all of them for `warmup` steps, then falls by a cubic to `rank` a part, which it
    reaches `cooldown` steps before the end. Every `every` steps, and at each of the last ones,
    l becomes zero where a triplet is not among the most important of all parts.

    betas  of the means of sensitivity |p * grad| and of its uncertainty, whose product counts

    Raises RuleError where no part is AdaLoRA's, or the steps leave no time for the budget to fall.
    Source: Zhang et al. 2023 (AdaLoRA), Algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        steps: int,
        *,
        warmup: int = 0,
        cooldown: int = 0,
        every: int = 1,
        betas: tuple[float, float] = (0.85, 0.85),
    ) -> None:
        positive("Budget", rank=rank, steps=steps, every=every)
        self.parts = [m for m in model.modules() if isinstance(m, AdaLoRA)]
        if not self.parts or warmup + cooldown >= steps:
            raise RuleError(
                f"Budget(steps={steps}, warmup={warmup}, cooldown={cooldown})",
                "no step is left for it to fall in." if self.parts else "no part is AdaLoRA's.",
                "Give more steps." if self.parts else "Apply adalora() first.",
            )
        self.end, self.steps, self.warmup, self.cooldown = rank, steps, warmup, cooldown
        self.every, self.betas, self.taken = every, betas, 0
        self.means = [
            [(torch.zeros_like(p), torch.zeros_like(p)) for p in (part.l, part.A, part.B)]
            for part in self.parts
        ]

    def size(self) -> int:
        """How many triplets of all parts are kept at this step."""
        most, least = sum(len(p.l) for p in self.parts), self.end * len(self.parts)
        time = (self.taken - self.warmup) / (self.steps - self.cooldown - self.warmup)
        left = 1 - min(max(time, 0.0), 1.0)
        return int((most - least) * left**3) + least

    @torch.no_grad()
    def step(self) -> int:
        """After the optimizer's step, while the gradients are there. Returns how many are kept."""
        self.taken += 1
        last = self.taken > self.steps - self.cooldown
        if self.taken < self.steps - self.cooldown:
            self._measure()
        if last or (self.taken > self.warmup and self.taken % self.every == 0):
            self._prune()
        return self.size()

    def _measure(self) -> None:
        mean, spread = self.betas
        for part, means in zip(self.parts, self.means, strict=True):
            for p, (kept, far) in zip((part.l, part.A, part.B), means, strict=True):
                now = torch.zeros_like(p) if p.grad is None else (p * p.grad).abs()
                kept.mul_(mean).add_(now, alpha=1 - mean)
                far.mul_(spread).add_((now - kept).abs(), alpha=1 - spread)

    def _prune(self) -> None:
        scores = torch.cat([self._importance(means) for means in self.means])
        keep = torch.zeros_like(scores).scatter(0, scores.topk(min(self.size(), len(scores)))[1], 1)
        each = torch.split(keep, [len(part.l) for part in self.parts])
        for part, kept in zip(self.parts, each, strict=True):
            part.l.mul_(kept)

    def _importance(self, means: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Of each triplet of a part: of its l, and the means over its two vectors."""
        value, right, left = (kept * far for kept, far in means)
        return value + right.mean(1) + left.mean(0)
