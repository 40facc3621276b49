"""Inventories of skills mixed by task (Ponti et al. 2023, Poly; Caccia et al. 2023, MHR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import FileError, GraftError, OperationError, RuleError, is_integer
from ..rules.affine import Affine
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive
from .init import kaiming, register
from .low_rank import scale_of
from .qkv_rows import on_rows

Model = TypeVar("Model", bound=nn.Module)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Skills(nn.Module):
    """scale * x A B, with A and B mixed of S skills by the task: (..., width) to (..., out).

    The width of A and the output of B are split among `heads`, and each head mixes the skills by
    gates of its own: g = sigmoid(Z[task]), in training a sample of the relaxed Bernoulli variable
    of these logits (temperature 1), divided by their sum. A task is `choose`n for all samples (one
    draw in training), or one for each sample, whose features then come beside one another on the
    first axis: one entry for each (tokens), or the same number (windows).

    A (heads, S, width / heads, rank) starts Kaiming uniform (a = sqrt 5) in each head,
    B (heads, S, rank, out / heads) at zero, Z (tasks, heads, S) uniform in +-0.001.

    tasks   0: there is no Z, and all skills are averaged
    frozen  A and B are buffers: only Z is trained

    >>> Skills(768, 768, skills=8, tasks=19)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that
    A: Tensor
    B: Tensor
    Z: nn.Parameter | None

    def __init__(
        self,
        width: int,
        out: int,
        rank: int = 1,
        *,
        skills: int = 8,
        heads: int = 1,
        tasks: int = 1,
        scale: float = 1.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        A = kaiming(heads, skills, width // heads, rank, fan_in=width // heads)
        B = torch.zeros(heads, skills, rank, out // heads)
        register(self, "A", A, trained=not frozen)
        register(self, "B", B, trained=not frozen)
        logits = torch.empty(tasks, heads, skills).uniform_(-1e-3, 1e-3) if tasks else None
        self.Z = nn.Parameter(logits) if logits is not None else None
        self.scale = scale
        self.task = torch.tensor(0, device="cpu")  # no buffer: processes choose their own

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.mixed(self.gates(sampled=self.training))
        if A.dim() == 3:
            times = self._times(x.shape[0])
            A, B = (repeat(matrix, "b i o -> (b n) i o", n=times) for matrix in (A, B))
            hidden = torch.einsum("b...i,bir->b...r", x, A)
            return torch.einsum("b...r,bro->b...o", hidden, B) * self.scale
        return x @ A @ B * self.scale

    def gates(self, sampled: bool = False) -> Tensor:
        """(heads, S), or (b, heads, S) for tasks by sample; they sum to one over S."""
        if self.Z is None:
            heads, skills = self.A.shape[:2]
            return self.A.new_full((heads, skills), 1 / skills)
        chosen = self.Z.index_select(0, self.task.to(self.Z.device).view(-1))
        logits = chosen if self.task.dim() else chosen[0]
        if sampled:
            logits = logits + torch.rand_like(logits).logit(torch.finfo(logits.dtype).eps)
        gates = logits.sigmoid()
        return gates / (gates.sum(-1, keepdim=True) + 1e-12)

    def mixed(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """A (..., width, rank) and B (..., rank, out) for gates (..., heads, S)."""
        A = torch.einsum("...hs,hsir->...hir", gates, self.A)
        B = torch.einsum("...hs,hsro->...hro", gates, self.B)
        return rearrange(A, "... h i r -> ... (h i) r"), rearrange(B, "... h r o -> ... r (h o)")

    def affine(self) -> Affine:
        if self.task.dim():
            raise OperationError(
                "merge(model)",
                f"its tasks were chosen by sample ({len(self.task)} of them), and a weight is "
                "one for all.",
                "Choose one: choose(model, 0).",
            )
        A, B = self.mixed(self.gates())
        return Affine((A @ B).mT * self.scale, None)

    def _times(self, rows: int) -> int:
        """How many rows of the first axis each sample has. Raises GraftError where that is none."""
        times, over = divmod(rows, len(self.task))
        if over or not times:
            raise GraftError(
                "choose(model, task)",
                f"{len(self.task)} tasks were chosen, one a sample, and {rows} come.",
                "Choose as many tasks as the batch has samples, or one for all.",
            )
        return times

    def extra_repr(self) -> str:
        heads, skills, width, rank = self.A.shape
        tasks = 0 if self.Z is None else len(self.Z)
        return (
            f"{heads * width}, {heads * self.B.shape[-1]}, rank={rank}, skills={skills}, "
            f"heads={heads}, tasks={tasks}"
        )


@torch.no_grad()
def choose(model: Model, task: int | Tensor) -> Model:
    """Say of which task the samples are that an operated model is given from now on.

    task  an integer, for all samples; or one for each of them, (b,) integers, until the next call

    Every model starts with task 0, also when it is loaded. Returns the model. Raises RuleError
    where there is no such task, and OperationError where no part mixes skills by task, or the
    model is merged.

    >>> from surgery import apply, at
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> model = apply(model, at("0", skill_lora(skills=2, tasks=3)))
    >>> choose(model, torch.tensor([0, 2]))(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """
    shown = f"a tensor {tuple(task.shape)}" if isinstance(task, Tensor) else repr(task)
    call, model_name = f"choose(model, {shown})", type(model).__name__
    aside = vars(model).get("surgery")  # where the parts of a merged model are
    modules = [*model.modules(), *(aside.modules() if isinstance(aside, nn.Module) else ())]
    inventories = [module for module in modules if isinstance(module, Skills)]
    selectors = [skills.Z for skills in inventories if skills.Z is not None]
    if not selectors:
        raise OperationError(
            call,
            f"this {model_name} has no part that mixes skills by task.",
            'Operate it: apply(model, "mhr").',
        )
    if any(getattr(module, "merged", None) is True for module in modules):
        raise OperationError(
            call, f"this {model_name} is merged, for one task.", "Call unmerge(model) first."
        )
    ids = _ids(task, call, min(map(len, selectors)))
    for skills in inventories:
        if skills.Z is not None:
            skills.task = ids.to(skills.A.device)
    return model


def _ids(task: int | Tensor, rule: str, tasks: int) -> Tensor:
    """Tasks as a tensor of their own, () or (b,). Raises RuleError where there are none such."""
    whole = type(task) is int or (isinstance(task, Tensor) and task.dtype in INTEGERS)
    ids = torch.as_tensor(task).long().detach().clone() if whole else torch.empty(0)
    if ids.dim() > 1 or not ids.numel():
        raise RuleError(
            rule, "it is no task.", "Give an integer, or a tensor of them, (b,), one a sample."
        )
    wrong = ids.flatten()[((ids < 0) | (ids >= tasks)).flatten()]
    if wrong.numel():
        raise RuleError(
            rule,
            f"there is no task {wrong[0].item()}: they are numbered 0 to {tasks - 1}.",
            "Count them from zero, or operate the model for more: mhr(tasks=...).",
        )
    return ids


def inherit(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `new` with the skills of `old`: both are `surgery.state_dict` of a model.

    new   of a model with frozen skills (mhr_z), which get the values of the old ones; or with one
          skill and no selector (mhr_mu), which gets their average over skills, A and B each
    old   of a model with the inventory (mhr, poly), trained

    What else is in `new` stays: a selector for its own task, a head. Raises FileError where `old`
    has no skills for a place of `new`, or of another size.

    >>> from surgery import apply, at, load_state_dict, state_dict
    >>> def build(**how):
    ...     return apply(nn.Sequential(nn.Linear(8, 8)), at("0", skill_lora(**how)))
    >>> trained, new = build(skills=2, tasks=3), build(skills=2, frozen=True)
    >>> load_state_dict(new, inherit(state_dict(new), state_dict(trained)))
    """
    places = [key for key, t in new.items() if key.endswith((".A", ".B")) and t.dim() == 4]
    if not places:
        raise FileError("inherit", "the new tensors hold no skills.", "Operate it with mhr_z().")
    return {**new, **{key: _inherited(key, new[key], old.get(key)) for key in places}}


def _inherited(key: str, new: Tensor, old: Tensor | None) -> Tensor:
    if old is not None and old.shape == new.shape:
        return old
    if old is not None and old.dim() == 4:
        joined = "h i r -> 1 1 (h i) r" if key.endswith(".A") else "h r o -> 1 1 r (h o)"
        average: Tensor = rearrange(old.mean(1), joined)
        if average.shape == new.shape:
            return average
    there = "no such tensor" if old is None else f"one of {tuple(old.shape)}"
    raise FileError(
        "inherit",
        f"the new model has {key} of {tuple(new.shape)}, and the old one {there}.",
        "Give both the same architecture, rank, heads and number of skills.",
    )


@part
@usually("parallel")
def skill_lora(
    site: Site,
    skills: int = 8,
    rank: int = 1,
    tasks: int = 1,
    heads: int = 1,
    alpha: float | None = None,
    rows: str | None = None,
    frozen: bool = False,
) -> nn.Module:
    """A low-rank update mixed, for each task, of an inventory of skills; `choose` says the task.

    skills  in the inventory, each an A and a B of `rank`
    tasks   each has its own logits of the gates; 0: no gates, the average of all skills
    heads   into which A's input and B's output are split, each with its own gates (1: Poly)
    alpha   the scale is alpha / rank; None: 1
    rows    chunks of the output with an inventory each, "q _k v"; None: one for all of it
    frozen  A and B are not trained, only the logits: `inherit` gives them values

    Starts by adding nothing. It merges for the one task that is chosen. Raises RuleError where the
    heads do not divide width and output. Parameters, for each of the rows:
    skills * rank * (width + out), unless frozen, + tasks * heads * skills.
    Sources: Ponti et al. 2023 (Poly); Caccia et al. 2023 (MHR).

    >>> skill_lora(heads=4, tasks=3)
    skill_lora(tasks=3, heads=4)
    """
    positive("skill_lora", skills=skills, rank=rank, heads=heads)
    trains_nothing = frozen and not tasks
    if not is_integer(tasks, least=0) or trains_nothing:
        raise RuleError(
            f"skill_lora(tasks={tasks!r})",
            "it is no number of tasks" + (" that leaves anything to train." if frozen else "."),
            "Give an integer from 1 up, or 0 for the average of all skills.",
        )
    scale = scale_of("skill_lora", alpha, rank)

    def make(out: int) -> nn.Module:
        if site.width % heads or out % heads:
            raise RuleError(
                f"skill_lora(heads={heads})",
                f"the widths {site.width} and {out} do not both divide by {heads} heads.",
                "Give a divisor of both.",
            )
        return Skills(
            site.width, out, rank, skills=skills, heads=heads, tasks=tasks, scale=scale,
            frozen=frozen,
        )  # fmt: skip

    return on_rows(rows, site, "skill_lora", make)
