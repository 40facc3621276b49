"""Which weights a task is sensitive to, and what is trained of them within a budget.

    rules, indices = spt_lora(model, batches, loss, budget=400_000)
    fill(surgery.apply(model, rules), indices)

Source: He et al. 2023 (SPT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._preserve import preserved
from ..engine.apply import operated
from ..engine.conditions import FILLING, MAKING, UNCUT, WRITING, check_state
from ..engine.operation import check_operable, operations
from ..errors import OperationError, RuleError
from ..parts.adapters import adapter
from ..parts.arguments import positive
from ..parts.low_rank import lora
from ..parts.sparse_updates import Sparse, sparse
from ..rules.edits import Edit, append, parallel, unfreeze
from ..rules.roles import head
from ..rules.rule import Rule, at
from ..structure.anatomy import roles_of
from ..structure.layers import is_token
from ..structure.module_tree import Tree

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[nn.Module, Any], Tensor]


class Allotment(NamedTuple):
    """Rules, and for each linear that is tuned in part the flat positions of its weight."""

    rules: list[Rule]
    indices: dict[str, Tensor]


# what a task is sensitive to -------------------------------------------------------------------


def measure(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """The squared gradient of every weight, summed over batches: tensors by name.

    batches  any: 16 of them in SPT's code, of the training data
    loss     a scalar of the model and one batch: lambda m, b: cross_entropy(m(b[0]), b[1])

    The model runs in eval mode, and is left as it was, gradients, flags, modes and RNG too.
    Raises RuleError where there is no batch or the loss is no scalar, and OperationError on a
    model that was operated.

    >>> scores = measure(nn.Linear(2, 1), [torch.ones(1, 2)], lambda m, x: m(x).sum())
    >>> scores["weight"], scores["bias"]
    (tensor([[1., 1.]]), tensor([1.]))
    """
    _check_bare(model, "measure(model, ...)")
    check_state(model, "measure(model, ...)", UNCUT, WRITING, MAKING, FILLING)
    named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    scores = {name: torch.zeros_like(p, requires_grad=False) for name, p in named.items()}
    count = 0
    with _differentiable(model, list(named.values())), torch.enable_grad():
        for count, batch in enumerate(batches, 1):  # noqa: B007
            _add(scores, named, loss(model, batch))
    if not count:
        raise RuleError("measure(batches=...)", "it holds no batch.", "Give one at least.")
    return scores


def _add(scores: dict[str, Tensor], named: dict[str, nn.Parameter], value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        raise RuleError(
            "measure(loss=...)",
            f"it gave {tuple(value.shape) if isinstance(value, Tensor) else value!r}, no scalar "
            "with a gradient.",
            "Return the mean loss of the batch: loss(model, batch).",
        )
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        if grad is not None:
            scores[name] += grad.square()


@contextmanager
def _differentiable(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """In eval mode, with a gradient for all; then as it was."""
    with preserved(model, modes=True, flags=True):
        model.eval()
        for p in parameters:
            p.requires_grad_(True)
        yield


def _check_bare(model: nn.Module, call: str) -> None:
    check_operable(model)
    if operations(model):
        raise OperationError(
            call,
            f"this {type(model).__name__} has been operated.",
            "Give the model as it was before, or call surgery.revert(model) first.",
        )


# what is trained -------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """A tensor that may be trained, and at which number of sensitive entries what is.

    limit   so many sensitive entries have it trained by `whole` numbers
    single  whether fewer are trained one by one
    """

    name: str
    score: Tensor
    limit: int
    whole: int
    single: bool

    def events(self, most: int, floor: float) -> tuple[Tensor, Tensor]:
        """Scores at which its cost rises, highest first, and by how much; none below `floor`.

        most  of single entries: more would not fit
        """
        flat = self.score.detach().flatten().cpu()
        flat = flat[flat >= floor] if floor > -math.inf else flat
        count = min(self.limit, len(flat), most if self.single else self.limit)
        top = flat.topk(count).values
        rises = torch.ones(count, dtype=torch.int64)
        if count == self.limit:
            rises[-1] = self.whole - (self.limit - 1 if self.single else 0)
        return (top, rises) if self.single else (top[self.limit - 1 :], rises[self.limit - 1 :])


def allot(
    scores: Mapping[str, Tensor],
    model: nn.Module,
    budget: int,
    kind: str | None = "lora",
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
) -> Allotment:
    """Rules that train what is most sensitive, as much of it as the budget allows.

    The highest scores of all weights of nn.Linear and of all vectors are taken, as many as fit.
    A weight that holds at least 1 / alpha as many of them as a LoRA (or adapter) there has numbers
    gets that; of another weight these entries are trained (indices: their flat positions, for
    `fill`); a vector that holds more than 1 / beta of its own is trained whole. Class tokens
    (1, 1, width) always are and count; the head always is and does not.

    budget  numbers to train, never exceeded
    kind    "lora" of the rank, parallel; "adapter" of the rank, GELU, on the linear's output;
            None: single entries only

    Raises RuleError where nothing fits the budget, or scores and model do not belong together.

    >>> model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False))
    >>> scores = {"0.weight": torch.arange(6.0).view(2, 3), "2.weight": torch.zeros(3, 2)}
    >>> allot(scores, model, budget=2, kind=None)
    Allotment(rules=[at("0", parallel(sparse(entries=2)))], indices={'0': tensor([4, 5])})
    """
    _check_allot(budget, kind, rank, alpha, beta)
    _check_bare(model, "allot(scores, model, ...)")
    tree = Tree(model)
    heads = _head_names(tree)
    tokens = _tokens(model)
    left = budget - sum(model.get_parameter(name).numel() for name in tokens)
    pool = list(_candidates(scores, model, heads, kind, (rank, alpha, beta)))
    taken = _taken(pool, left) if left >= 0 else []
    if not (taken or tokens) or left < 0:
        raise RuleError(
            f"allot(budget={budget})",
            f"{budget - left} numbers of class tokens are trained anyway, and nothing else fits."
            if tokens
            else "no single weight or module fits it.",
            "Give a larger budget.",
        )
    return _allotted(taken, tokens, model, kind, rank, bool(heads))


def _check_allot(budget: int, kind: str | None, rank: int, alpha: float, beta: float) -> None:
    positive("allot", budget=budget, rank=rank)
    if kind not in ("lora", "adapter", None):
        raise RuleError(f"allot(kind={kind!r})", "no such kind.", 'Give "lora", "adapter" or None.')
    if not (alpha >= 1 and beta > 0):
        raise RuleError(
            f"allot(alpha={alpha!r}, beta={beta!r})",
            "a module would be chosen for more entries than it has numbers, or by no share.",
            "Give alpha from 1 up and beta above 0.",
        )


def _tokens(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if is_token(p)]


def _head_names(tree: Tree) -> set[str]:
    """The names of the parameters of heads."""
    heads = {id(p) for site in roles_of(tree)["head"] for p in site.module.parameters()}
    return {name for name, p in tree.model.named_parameters() if id(p) in heads}


def _candidates(
    scores: Mapping[str, Tensor],
    model: nn.Module,
    heads: set[str],
    kind: str | None,
    settings: tuple[int, float, float],
) -> Iterator[_Candidate]:
    rank, alpha, beta = settings
    for name, p in model.named_parameters():
        path, _, last = name.rpartition(".")
        matrix = type(model.get_submodule(path)) is nn.Linear and last == "weight"
        if name in heads or not (matrix or p.dim() == 1):
            continue
        score = scores.get(name)
        if score is None or score.shape != p.shape:
            raise RuleError(
                "allot(scores, ...)",
                f"they tell nothing of {name} {tuple(p.shape)}"
                + ("." if score is None else f", but {tuple(score.shape)}."),
                "Give what measure(model, batches, loss) gave for this model.",
            )
        if not score.isfinite().all():
            raise RuleError(
                "allot(scores, ...)", f"those of {name} are not all finite.", "Mend the loss."
            )
        if not matrix:
            yield _Candidate(name, score, math.floor(p.numel() / beta) + 1, p.numel(), False)
        else:
            out, width = p.shape
            numbers = {"lora": rank * (width + out), "adapter": 2 * out * rank + rank + out}
            whole = numbers[kind] if kind else 0
            limit = math.ceil(whole / alpha) if kind else p.numel() + 1
            yield _Candidate(name, score, limit, whole, True)


def _taken(pool: list[_Candidate], budget: int) -> list[tuple[_Candidate, int]]:
    """Each candidate with as many of its entries as are among the highest that fit the budget.

    Every event costs 1 at least, so that only the first of them, one more than the budget, matter.
    """
    most, floor = budget + 1, -math.inf
    events = [torch.empty(0), *torch.empty(2, 0, dtype=torch.int64)]  # scores, rises, owners
    for i, candidate in enumerate(pool):
        top, rises = candidate.events(most, floor)
        new = top, rises, torch.full(top.shape, i)
        events = [torch.cat(pair) for pair in zip(events, new, strict=True)]
        if len(events[0]) > 2 * most:
            events = _highest(events, most)
            floor = float(events[0][-1])
    _, rises, owners = _highest(events, most)
    fit = int((rises.cumsum(0) <= budget).sum())
    counts = owners[:fit].bincount(minlength=len(pool)).tolist()
    return [pair for pair in zip(pool, counts, strict=True) if pair[1]]


def _highest(events: list[Tensor], most: int) -> list[Tensor]:
    """The events of the highest scores, of equal ones the first."""
    order = events[0].argsort(descending=True, stable=True)[:most]
    return [column[order] for column in events]


def _allotted(
    taken: list[tuple[_Candidate, int]],
    tokens: list[str],
    model: nn.Module,
    kind: str | None,
    rank: int,
    heads: bool,
) -> Allotment:
    """What was taken, as one rule for each module, in the order of the model."""
    edits: dict[str, list[Edit]] = {}
    vectors: dict[str, list[str]] = {}
    indices: dict[str, Tensor] = {}
    for name in tokens:
        path, _, last = name.rpartition(".")
        vectors.setdefault(path, []).append(last)
    for candidate, count in taken:
        path, _, last = candidate.name.rpartition(".")
        if not candidate.single:
            vectors.setdefault(path, []).append(last)
        elif count == candidate.limit:
            edits[path] = [_structured(kind, rank)]
        else:
            edits[path] = [parallel(sparse(entries=count))]
            indices[path] = candidate.score.flatten().topk(count).indices.sort().values
    for path, names in vectors.items():
        edits.setdefault(path, []).append(unfreeze(*names))
    order = [path for path, _ in model.named_modules() if path in edits]
    rules = [at(path, *edits[path]) for path in order]
    return Allotment([*rules, at(head, unfreeze)] if heads else rules, indices)


def _structured(kind: str | None, rank: int) -> Edit:
    if kind == "lora":
        return parallel(lora(rank=rank, dropout=0.1))
    return append(adapter(rank=rank, activation=nn.GELU, dropout=0.1), residual=True)


def spt_rules(
    scores: Mapping[str, Tensor],
    model: nn.Module,
    budget: int,
    kind: str | None = "lora",
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
) -> list[Rule]:
    """The rules of `allot` alone: enough to plan, and to load a file that `fill` was done for."""
    return allot(scores, model, budget, kind, rank, alpha, beta).rules


def fill(model: Model, indices: Mapping[str, Tensor]) -> Model:
    """Say to the sparse parts of an operated model which numbers they train; returns the model.

    indices  by address of the linear: flat positions (entries,) of its weight (out, width)

    Raises OperationError where a linear has no sparse part, and RuleError where positions do not
    fit it.

    >>> from surgery import apply
    >>> model = apply(nn.Sequential(nn.Linear(3, 2)), at("0", sparse(entries=2)))
    >>> fill(model, {"0": torch.tensor([0, 5])}).surgery.default.get_submodule("0/parallel").index
    tensor([0, 5])
    """
    parts = {
        hooked.path: action.part
        for operation in operated(model, "fill(model, indices)")
        for hooked in operation.hooked_sites
        for action in hooked.actions
        if isinstance(action.part, Sparse)
    }
    if lost := [path for path in indices if path not in parts]:
        raise OperationError(
            "fill(model, indices)",
            f"no sparse part is at {', '.join(lost)}.",
            "Operate the model by the rules that came with these indices.",
        )
    for path, index in indices.items():
        parts[path].check(index)
    for path, index in indices.items():
        parts[path].aim(index)
    return model


def spt_lora(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    budget: int,
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
) -> Allotment:
    """SPT-LoRA: measure and allot, with LoRA where a linear is sensitive as a whole; merges.

        rules, indices = spt_lora(model, batches, loss, budget=400_000)
        fill(surgery.apply(model, rules), indices)

    Takes what `measure` and `allot` take, and raises what they raise. SPT tries budgets of 0.2,
    0.4, 0.6, 0.8 and 1.0 million and keeps the best. Source: He et al. 2023 (SPT).
    """
    return allot(measure(model, batches, loss), model, budget, "lora", rank, alpha, beta)


def spt_adapter(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    budget: int,
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
) -> Allotment:
    """SPT-Adapter: measure and allot, with an adapter on a linear that is sensitive as a whole.

    Used as `spt_lora` is; it does not merge. Source: He et al. 2023 (SPT).
    """
    return allot(measure(model, batches, loss), model, budget, "adapter", rank, alpha, beta)
