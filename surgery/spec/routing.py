"""Laws of routing, for parts that declare `routes`: g are the gates of N experts, u sub-tokens."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .._text import first_few
from ..engine import losses
from ..engine.routed import routes
from ..rules import routing
from .case import SEEDS, Case, operation
from .isolation import part_inputs
from .laws import Draw, applies, holds
from .snapshot import SITE, gap


def _routed(case: Case, draw: Draw) -> nn.Module:
    model = case.operated(stirred=draw(SEEDS, "seed"))
    applies(operation(model).routers, "no part routes")
    return model


def gates_lie_on_the_simplex(case: Case, draw: Draw) -> None:
    """g >= 0 and |sum g - 1| <= N eps, for every sub-token; the chosen one of top-1 is one."""
    model = _routed(case, draw)
    case.outputs(model)
    for path, routed in losses.routing(model).items():
        gates = routed.gates
        least, n = gates.min().item(), gates.shape[-1]
        holds(least >= 0, f"{path}: a gate is {least:.3g}")
        sums = gates.sum(-1)
        far = (sums - 1).abs().max().item()
        worst = sums[int((sums - 1).abs().argmax())].item()
        holds(
            far <= n * torch.finfo(gates.dtype).eps,
            f"{path}: the gates of a sub-token sum to {worst:.6g}, not 1",
        )
        chosen = routing.top1(gates)
        holds(
            bool((chosen.sum(-1) == 1).all() and ((chosen != 0).sum(-1) == 1).all()),
            f"{path}: top-1 is not one expert",
        )
        load = routed.load
        close = (load.sum() - 1).abs().item() <= n * torch.finfo(load.dtype).eps
        holds(close and load.min() >= 0, f"{path}: the loads are {first_few(load.tolist())}")


class _Router:
    """A part that routes, what it is given at a site, and what it holds for each expert."""

    def __init__(self, path: str, part: nn.Module, x: Tensor) -> None:
        self.path, self.part, self.x = path, part, x
        self.names: tuple[str, ...] = getattr(part, "by_expert", ())
        self.experts = len(getattr(part, self.names[0])) if self.names else 0
        self.sparse = getattr(part, "top_k", None) == 1

    def having(self, chosen: list[int]) -> nn.Module:
        """A copy of the part with these experts, in this order."""
        part = copy.deepcopy(self.part)
        for name in self.names:
            setattr(part, name, nn.Parameter(getattr(self.part, name).detach()[chosen].clone()))
        return part

    def answer(self, part: nn.Module) -> routing.Routed:
        """What a part gives for what the router is given."""
        with torch.no_grad():
            routed: routing.Routed = part(self.x)
        return routed


def _routers(case: Case, draw: Draw) -> list[_Router]:
    """Every router at each of its sites."""
    model = _routed(case, draw)
    routers = [
        _Router(hooked.path, action.part, given[0])
        for hooked, action, given in part_inputs(model, case.inputs())
        if routes(action)
    ]
    silent = [type(router.part).__name__ for router in routers if not router.names]
    by_expert = [router for router in routers if router.names]
    applies(
        by_expert, f"{first_few(silent)} does not say what it holds for each expert (by_expert)"
    )
    return by_expert


def experts_have_no_order(case: Case, draw: Draw) -> None:
    """The answer ~4 itself, and gates are permuted, when experts are permuted with the router.

    For every router at each of its sites.
    """
    turn, spoken = draw(st.integers(1, 5), "turn"), False
    for router in _routers(case, draw):
        experts = list(range(router.experts))
        order = experts[turn % len(experts) :] + experts[: turn % len(experts)]
        order = order[::-1] if order == experts else order
        output, gates = router.answer(router.part)
        best = gates.topk(2, dim=-1).values if router.experts > 1 else gates
        tie = (best[:, 0] - best[:, -1]).min().item() <= 64 * torch.finfo(gates.dtype).eps
        if router.sparse and tie:
            continue  # two experts are equally likely
        spoken = True
        other = router.answer(router.having(order))
        far = gap(other.output, output)
        holds(
            far <= SITE,
            f"{router.path}: with experts in the order {order} the answer moves by {far:.3g} eps",
        )
        moved = gap(other.gates, gates[:, order])
        holds(moved <= SITE, f"{router.path}: the gates do not move with the experts")
    applies(spoken, "two experts are equally likely at every router")


def equal_experts_are_one(case: Case, draw: Draw) -> None:
    """One expert: g = 1.0 exactly. N times the same: g = 1/N, and the answer ~4 that of the one.

    (With top_k=1 the answer is scaled by its gate: then ~4 a 1/N of it.) For every router.
    """
    which = draw(st.integers(0, 9), "expert")
    for router in _routers(case, draw):
        p = which % router.experts
        one = router.answer(router.having([p]))
        holds((one.gates == 1).all(), f"{router.path}: the gate of one expert alone is not 1")
        many = router.answer(router.having([p] * router.experts))
        far = gap(many.output, one.output * (1 / router.experts if router.sparse else 1.0))
        holds(
            far <= SITE, f"{router.path}: {router.experts} equal experts are {far:.3g} eps from one"
        )
        uneven = (many.gates - 1 / router.experts).abs().max().item()
        holds(
            uneven <= torch.finfo(many.gates.dtype).eps,
            f"{router.path}: the gates of equal experts are {uneven:.3g} from 1/{router.experts}",
        )


def balance_is_the_switch_loss(case: Case, draw: Draw) -> None:
    """L = sum over sites of N sum_p t_p mean(g_p), each in (0, N]; importance N sum P^2 in [1, N].

    t_p is the fraction of sub-tokens whose likeliest expert is p, and carries no gradient. (L >= 1
    is no law: 2/3 can be had with 4 experts.) With apply(balance=c) the gradient of c L is added
    without L in the loss: ~10000, in each parameter, over two backward passes.
    """
    model = _routed(case, draw)
    loss = case.loss(model)
    balance = losses.balance_loss(model)
    want = _switch_loss(model)
    far = (balance.double() - want).abs().item()
    most = 64 * torch.finfo(balance.dtype).eps * max(want.item(), 1.0)
    holds(
        far <= most,
        f"balance_loss(S) is {balance.item():.9g}, and the formula gives {want.item():.9g}",
    )
    trained = all(p.requires_grad for p in operation(model).parameters())
    if not trained or _called_again(case, model):
        return  # of a module called twice, balance_loss counts the last call
    slopes = _gradients(model, loss + 0.5 * balance)
    unseen = case.operated(balance=0.5)
    unseen.load_state_dict(model.state_dict())
    others = _gradients(unseen, case.loss(unseen))
    for name, slope in slopes.items():
        far = gap(others[name], slope) if slope.any() else others[name].abs().max().item()
        holds(
            far <= 1e4,
            f"with balance=0.5 the gradient of {name} is {far:.3g} eps from that of the sum",
        )


def _switch_loss(model: nn.Module) -> Tensor:
    """The formula, written out; Broken where a site leaves its bounds."""
    total = torch.zeros((), dtype=torch.float64)
    for path, routed in losses.routing(model).items():
        gates = routed.gates.double()
        n, mean = gates.shape[-1], gates.mean(0)
        loads = torch.stack([(gates.argmax(-1) == p).double().mean() for p in range(n)])
        site = (n * (loads * mean).sum()).item()
        holds(
            0 < site <= n * (1 + 1e-9), f"{path}: its balance loss is {site:.6g}, not in (0, {n}]"
        )
        importance = (n * mean.square().sum()).item()
        holds(
            1 - 1e-9 <= importance <= n * (1 + 1e-9), f"{path}: its importance is {importance:.6g}"
        )
        total += site
    return total


def _called_again(case: Case, model: nn.Module) -> bool:
    """Whether a forward calls a routed site more than once."""
    calls: list[int] = []
    exits = {id(hooked.exit): hooked.exit for hooked in operation(model).routers}
    hooks = [e.register_forward_hook(lambda m, *_: calls.append(id(m))) for e in exits.values()]
    case.outputs(model)
    for hook in hooks:
        hook.remove()
    return len(calls) != len(set(calls))


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in operation(model).named_parameters()
        if p.requires_grad
    }


LAWS = (
    gates_lie_on_the_simplex,
    experts_have_no_order,
    equal_experts_are_one,
    balance_is_the_switch_loss,
)
