"""Rules and a part of one's own for a backbone that nobody knows, and the suite run on them."""

import torch
from custom_backbone import Loom
from torch import nn

from surgery import adapter, append, at, ffn, head, nearest, norm, parallel, shared, unfreeze
from surgery.spec import check


class Turn(nn.Module):
    """A part is a module: features come on the last axis, whatever the model's layout."""

    starts_at_zero = True  # what a part says of itself, the suite holds it to

    def __init__(self, width: int, out: int, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.down.T @ self.up.T

    def affine(self) -> tuple[torch.Tensor, None]:
        return self.up @ self.down, None  # a linear part says how, and surgery.merge folds it in


# Where: roles are found by structure, so they hold in Loom too; an address names what has no role.
RULES = [
    at(ffn, parallel(shared(adapter(rank=4)), scale=0.5)),  # one adapter beside every network
    at(nearest(norm, before=ffn), unfreeze),  # and each network's own norm
    at("threads.*.weft.{inward,outward}", parallel(lambda site: Turn(site.width, site.out))),
    at("threads.[-1].weft", append(lambda site: Turn(site.width, site.out), residual=True)),
    at(head, unfreeze),
]

if __name__ == "__main__":
    print(check(Loom, RULES, Loom().example()).raise_broken())
