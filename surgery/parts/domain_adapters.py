"""One part per domain, of which one runs (Pfeiffer et al. 2020, MAD-X)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import GraftError, OperationError, RuleError, is_integer
from ..rules.part import Maker, Shared, maker, part
from ..structure.module_tree import Site
from .arguments import declare_as, positive


class Domains(nn.Module):
    """One module for each domain, (..., width) to (..., out); `active` says which one runs.

    active  a number from 0 up, for the whole batch; or numbers (b,), one for each sample along
            the first axis of what comes. It is no tensor of the state: a loaded model starts at 0

    Only those that are active run, and only they get a gradient.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.by_domain = nn.ModuleList(modules)
        self.active: int | Tensor = 0
        declare_as(self, modules)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.active, Tensor):
            return self._by_sample(x, self.active.to(x.device))
        out: Tensor = self.by_domain[self.active](x)
        return out

    def _by_sample(self, x: Tensor, ids: Tensor) -> Tensor:
        """Each domain's module on its own samples, put back in their order."""
        if len(x) != len(ids):
            raise GraftError(
                f"choose(model, {len(ids)} domains)",
                f"features of shape {tuple(x.shape)} came, {len(x)} along the first axis.",
                "Give one domain for each sample of the batch, and put the part where samples "
                "are on the first axis; or choose one domain for the whole batch.",
            )
        order = ids.argsort(stable=True)
        sizes = ids.bincount(minlength=len(self.by_domain)).tolist()
        groups = x.index_select(0, order).split_with_sizes(sizes)
        pairs = zip(self.by_domain, groups, strict=True)
        out = torch.cat([module(group) for module, group in pairs if len(group)])
        return torch.empty_like(out).index_copy(0, order, out)

    def extra_repr(self) -> str:
        return f"active={self.active if isinstance(self.active, int) else self.active.tolist()}"


@part
def domains(site: Site, part: Maker, count: int = 2) -> nn.Module:
    """One `part` for each of `count` domains at a site; `choose(model, 1)` says which one runs.

    Starts as the part does, each with values of its own. Parameters: count * those of the part.
    Raises RuleError where `part` is shared or routes. Source: Pfeiffer et al. 2020 (MAD-X),
    section 4.1.

    >>> from surgery.parts.adapters import adapter
    >>> domains(adapter(rank=8), count=3)
    domains(part=adapter(rank=8), count=3)
    """
    positive("domains", count=count)
    modules = [maker(part, "domains")(site) for _ in range(count)]
    if isinstance(part, Shared) or any(getattr(module, "routes", False) for module in modules):
        raise RuleError(
            f"domains({part!r}, ...)",
            "each domain has a part of its own, which gives a tensor.",
            "Give the part itself, not shared and no mixture: domains(adapter(rank=8)).",
        )
    return Domains(modules)


def choose(model: nn.Module, domain: int | Tensor) -> None:
    """Say which domain the parts of `domains(...)` in a model are to run as from now on.

    domain  a number from 0 up; or integers (b,), one for each sample of the batches to come

    Raises OperationError where the model has no such part, RuleError where a part has no such
    domain; then nothing is changed.

    >>> from surgery import append, apply, at
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> model = apply(model, at("0", append(domains(lambda site: nn.Linear(4, 4)))))
    >>> choose(model, 1)
    >>> choose(model, torch.tensor([0, 1, 1]))
    >>> model(torch.randn(3, 4)).shape
    torch.Size([3, 4])
    """
    places = [module for module in model.modules() if isinstance(module, Domains)]
    if not places:
        raise OperationError(
            f"choose(model, {domain!r})",
            f"this {type(model).__name__} has no part of several domains.",
            "Operate on it first, with domains(part) or methods.language_adapter().",
        )
    count = min(len(place.by_domain) for place in places)
    if not _is_domain(domain, count):
        raise RuleError(
            f"choose(model, {domain!r})",
            f"the parts of this {type(model).__name__} have {count} domains.",
            f"Give an integer from 0 to {count - 1}, or a tensor (b,) of such.",
        )
    active = domain.detach().clone() if isinstance(domain, Tensor) else domain
    for place in places:
        place.active = active


def _is_domain(domain: object, count: int) -> bool:
    """Whether it is a number below `count`, or a tensor (b,) of such."""
    if isinstance(domain, Tensor):
        fraction = domain.is_floating_point() or domain.is_complex()
        if fraction or domain.dtype == torch.bool or domain.dim() != 1 or not len(domain):
            return False
        return int(domain.min()) >= 0 and int(domain.max()) < count
    return is_integer(domain, least=0) and domain < count
