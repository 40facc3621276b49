"""The suite has teeth: each property fails on an engine, a part or a router with one thing wrong.

And on the real one it holds: the same case, without the saboteur.
"""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    adapter,
    append,
    at,
    attn,
    block,
    ffn,
    freeze,
    head,
    moa,
    nearest,
    norm,
    ops,
    parallel,
    prepend,
    shared,
    unfreeze,
)
from surgery.engine import apply as engine_apply
from surgery.engine import journal, plain, reports, trained
from surgery.engine import losses as engine_losses
from surgery.engine import planning as plan
from surgery.engine.hooked_weights import HookedWeight
from surgery.engine.hooks import HookedSite
from surgery.engine.journal import Journal
from surgery.engine.operation import Operation, additions_of, operations
from surgery.engine.placement import Placement
from surgery.engine.states import StateGuard
from surgery.rules import roles, routing, selector
from surgery.rules.affine import Affine
from surgery.spec import PROPERTIES, Absent, Broken, Case, check
from surgery.spec.strategies import affine
from surgery.spec.suite import Run
from surgery.spec.transformer import Transformer
from surgery.state import checkpoint
from surgery.structure import path
from tests import models
from tests.laws import test_sabotage as engine
from tests.laws.test_sabotage import Patch, wrapped

MIXTURE = moa(experts=3, rank=2, heads=2, activation=nn.GELU)


# what is broken: rules with a part of a third party's -----------------------------------------


class Part(nn.Module):
    """A linear map, as a third party may write one, with one thing wrong."""

    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.linear = nn.Linear(site.width, site.out)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class MixesSamples(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 1e-6 * x.mean(0))


class LooksAtOtherTokens(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 1e-6 * x.mean(-2, keepdim=True))


class CountsItsCalls(Part):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


class WritesToItsInput(Part):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(1.01)
        return self.linear(x)


class TurnsGradientsOff(Part):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return self.linear(x)


class SeedsTheWorld(Part):
    def forward(self, x: Tensor) -> Tensor:
        random.seed(0)
        return self.linear(x)


class RemembersItsFirstInput(Part):
    starts_at_zero = True
    first: Tensor | None = None

    def __init__(self, site: surgery.Site) -> None:
        super().__init__(site)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach().abs().mean()
        return self.linear(x) * self.first


class CountsSamples(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * len(x)


class TakesTwoSamples(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(2, 8, -1))


class KnowsPositions(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.arange(x.shape[-2]).to(x).unsqueeze(-1)


class SaysThatItIsAffine(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def affine(self) -> tuple[Tensor, Tensor]:
        return 7 * self.linear.weight, self.linear.bias


class RoutesInSilence(Part):
    def forward(self, x: Tensor) -> ops.Routed:
        return ops.Routed(self.linear(x), torch.ones(x.shape[:-1].numel(), 1).to(x))


class KeepsWhatFilesDoNot(Part):
    def __init__(self, site: surgery.Site) -> None:
        super().__init__(site)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean += x.detach().mean()
        return self.linear(x) + self.mean


class Fails(Part):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("of its own")


class DropsInEval(Part):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.1, training=True)


class BreaksTheGraph(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if float(x.detach().sum()) > 0 else 0.5)


class Detaches(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.detach()).detach() + 0 * self.linear.bias


class SaysThatItStartsAtZero(Part):
    starts_at_zero = True


class TurnsItsStrides(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).transpose(0, 1).contiguous().transpose(0, 1)


class SumsTo99(nn.Module):
    """A mixture of two whose gates lack a hundredth."""

    routes = True
    by_expert = ("embeddings", "experts")

    def __init__(self, site: surgery.Site, most: float = 0.99) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.randn(2, site.width))
        self.experts = nn.Parameter(torch.randn(2, site.out, site.width))
        self.most = most

    def forward(self, x: Tensor) -> ops.Routed:
        u = x.flatten(0, -2)
        gates = (u @ self.embeddings.t()).softmax(-1) * self.most
        out = torch.einsum("me,eoc,mc->mo", gates, self.experts, u)
        return ops.Routed(out.view(*x.shape[:-1], -1), gates)


def beside(part: type[nn.Module]) -> list[surgery.Rule]:
    return [at(ffn, parallel(part))]


def after_head(part: type[nn.Module]) -> list[surgery.Rule]:
    return [at(head, append(part))]


# what is broken: an engine ---------------------------------------------------------------------


def or_is_the_left_one(patch: Patch) -> None:
    patch.setattr(selector.Either, "test", lambda self, tree, site: self.left.test(tree, site))


def a_complement_forgets_the_root(patch: Patch) -> None:
    real = selector.Other.candidates
    patch.setattr(selector.Other, "candidates", lambda self, tree: real(self, tree)[1:])


def positions_are_not_counted_from_the_end(patch: Patch) -> None:
    patch.setattr(path._Position, "fits", lambda self, step: step.position == self.index)


def captures_are_forgotten(patch: Patch) -> None:
    real = path.match
    patch.setattr(path, "match", lambda *args: None if real(*args) is None else {})


def roles_are_names(patch: Patch) -> None:
    def roles_of(real: Any, tree: Any) -> Any:
        found = real(tree)
        return {**found, "ffn": [s for s in found["ffn"] if "mlp" in s.path]}

    wrapped(patch, importlib.import_module("surgery.spec.matching"), "roles_of", roles_of)


def ffn_finds_attention(patch: Patch) -> None:
    def select(real: Any, self: Any, tree: Any) -> Any:
        return real(attn if self is ffn else self, tree)

    wrapped(patch, type(roles.ffn), "select", select)


def attention_finds_ffns(patch: Patch) -> None:
    def select(real: Any, self: Any, tree: Any) -> Any:
        return real(ffn if self is attn else self, tree)

    wrapped(patch, type(roles.ffn), "select", select)


def scales_are_squared(patch: Patch) -> None:
    def init(real: Any, self: HookedSite, switch: Any, site: Any, steps: list[Any]) -> None:
        real(self, switch, site, [s._replace(scale=s.scale and s.scale**2) for s in steps])

    wrapped(patch, HookedSite, "__init__", init)


def some_sites_are_left_out(patch: Patch) -> None:
    def leave(real: Any, self: HookedSite, *args: Any) -> Any:
        if ".1." in self.path:
            self.switch.mark(self.path, self.compiled)
            return None
        return real(self, *args)

    wrapped(patch, HookedSite, "leave", leave)


def shared_parts_count_each_time(patch: Patch) -> None:
    added = property(lambda self: sum(plan.count_parameters([p.sketch()]) for p in self.placements))
    patch.setattr(plan.Plan, "added", added)


def a_shared_part_is_copied(patch: Patch) -> None:
    def join(real: Any, self: Operation, site: Any, steps: list[Any], *more: Any) -> None:
        real(self, site, [s._replace(part=copy.deepcopy(s.part)) for s in steps], *more)

    wrapped(patch, Operation, "join", join)


def an_alias_is_split(patch: Patch) -> None:
    def open(real: Any, self: Operation, model: nn.Module) -> None:
        real(self, model)
        if getattr(model, "again", None) is not None:
            model.again = copy.deepcopy(model.again)

    wrapped(patch, Operation, "open", open)


def gates_sum_to_99(patch: Patch) -> None:
    wrapped(patch, ops, "route", lambda real, *args: real(*args) * 0.99)


def the_first_expert_is_preferred(patch: Patch) -> None:
    def route(real: Any, *args: Any) -> Tensor:
        gates = real(*args)
        bent = gates * torch.linspace(1, 2, gates.shape[-1]).to(gates)
        return bent / bent.sum(-1, keepdim=True)

    wrapped(patch, ops, "route", route)


def gates_are_a_softmax_over_tokens(patch: Patch) -> None:
    wrapped(patch, ops, "route", lambda real, *args: real(*args).log().softmax(0))


def the_balance_loss_is_the_importance(patch: Patch) -> None:
    def balance(real: Any, gates: Tensor) -> Tensor:
        return gates.shape[-1] * gates.mean(0).square().sum()

    wrapped(patch, routing, "balance", balance)


def balance_in_apply_does_nothing(patch: Patch) -> None:
    patch.setattr(routing, "with_balance", lambda output, gates, coefficient: output)


def a_weight_stays_what_parts_make(patch: Patch) -> None:
    patch.setattr(HookedWeight, "leave", lambda self, *given: None)


def a_weight_is_read_as_it_is(patch: Patch) -> None:
    wrapped(patch, HookedWeight, "made", lambda real, self, now: dict(now))


def of_two_routers_one_counts(patch: Patch) -> None:
    wrapped(patch, engine_losses, "_gates", lambda real, *args: real(*args)[-1:])


def twice_is_fine(patch: Patch) -> None:
    def check(model: nn.Module, name: str) -> None:
        room = additions_of(model)
        if room is not None:
            room._modules.pop(name, None)

    patch.setattr(plan, "check_model", check)


def one_revert_takes_all(patch: Patch) -> None:
    def undo(real: Any, self: Operation) -> None:
        for operation in operations(self.model[0])[::-1]:
            real(operation)

    wrapped(patch, Operation, "undo", undo)


def files_hold_parts_only(patch: Patch) -> None:
    patch.setattr(checkpoint, "trained_of", lambda model, operation: [])


def an_interrupted_undo_stays_half_done(patch: Patch) -> None:
    for module in (journal, engine_apply):
        patch.setattr(module, "completed", lambda work: work())


def what_is_unfrozen_by_hand_is_unknown(patch: Patch) -> None:
    patch.setattr(trained, "by_hand", lambda model: [])


def what_is_adopted_keeps_no_copy(patch: Patch) -> None:
    def adopt(real: Any, model: nn.Module, *places: Any) -> None:
        real(model, *places)
        for done in operations(model):
            adopted = {(id(module), name) for module, name in done.adopted}
            done.journal.entries[:] = [
                e._replace(value=e.tensor.detach())
                if isinstance(e, journal.Value) and (id(e.module), e.name) in adopted
                else e
                for e in done.journal.entries
            ]

    wrapped(patch, engine_apply, "adopt", adopt)


def the_report_counts_what_rules_say(patch: Patch) -> None:
    real = reports.summary
    patch.setattr(reports, "summary", lambda *args: real(*args[:4]))


def files_may_lack_keys(patch: Patch) -> None:
    def load(model: nn.Module, tensors: Any, *, name: str = "default") -> None:
        own = checkpoint._places(model, name)
        with torch.no_grad():
            for key in set(own) & set(tensors):
                own[key].copy_(tensors[key])

    patch.setattr(checkpoint, "load_state_dict", load)


def meta_parts_are_float32(patch: Patch) -> None:
    def make(real: Any, self: Placement, seed: int) -> nn.Module:
        part = real(self, seed)
        return part.float() if self.device.type == "meta" else part

    wrapped(patch, Placement, "make", make)


def merging_forgets_the_scale(patch: Patch) -> None:
    patch.setattr(Affine, "times", lambda self, scale: self)


def unmerging_subtracts(patch: Patch) -> None:
    def write(real: Any, self: Journal, module: nn.Module, name: str, value: Tensor) -> None:
        before = getattr(module, name).detach().clone()
        real(self, module, name, value)
        after = getattr(module, name).detach()
        self.entries[-1] = self.entries[-1]._replace(value=after - (after - before))

    wrapped(patch, Journal, "write", write)


def merging_leaves(what: str) -> Any:
    """Of what merging takes out, some stays in: by the table that it is in."""

    def take(real: Any, module: nn.Module, table: str, *rest: Any) -> None:
        if table != what:
            real(module, table, *rest)

    return lambda patch: wrapped(patch, plain, "_take", take)


def merging_is_never_refused(patch: Patch) -> None:
    merge = importlib.import_module("surgery.engine.merging")
    patch.setattr(merge, "merge", lambda model: model)
    patch.setattr("surgery.spec.lifecycle.merge", lambda model: model)


def base_keys_alone_do_not_load(patch: Patch) -> None:
    patch.setattr(StateGuard, "_after_loading", lambda self, module, keys: None)


def seeds_are_of_the_clock(patch: Patch) -> None:
    real, seeds = Placement.make, iter(range(10**6))
    patch.setattr(Placement, "make", lambda self, seed: real(self, seed + next(seeds)))


# cases -----------------------------------------------------------------------------------------

ADAPTERX = [
    at(ffn, parallel(shared(MIXTURE), scale=0.5)),
    at(nearest(norm, before=ffn), unfreeze),
    at(head, unfreeze),
]
SERIAL = [*ADAPTERX, at(attn, prepend(affine()), append(affine(), residual=True))]
TWO = [at(ffn, parallel(MIXTURE), parallel(MIXTURE))]
LINEAR = [at("head", parallel(affine(), scale=0.5)), at("embed", append(affine()))]


@lru_cache(maxsize=1000)
def named(rules: str, form: str = "") -> Case:
    forms: dict[str, dict[str, Any]] = {
        "": {},
        "aliased": {"aliased": True},
        "spread": {"spread": True},
    }
    own = {"adapterx": ADAPTERX, "serial": SERIAL, "two": TWO, "linear": LINEAR}
    own |= {"adapter": [at(ffn, parallel(adapter(rank=8), scale=0.5))]}
    own |= {"freeze": [at(block, unfreeze), at(ffn, freeze), *ADAPTERX]}
    model = Transformer(**forms[form])
    return Case(model, own[rules], model.example())


def none(patch: Patch) -> None:
    """The engine as it is: what is wrong is the part."""


Tooth = tuple[str, Callable[[Patch], object], Any]
TEETH: list[Tooth] = [
    ("matching_is_pure", engine.reporting_writes, "adapterx"),
    ("matching_is_pure", engine.planning_draws, "adapterx"),
    ("patterns_are_a_boolean_algebra", or_is_the_left_one, "adapterx"),
    ("patterns_are_a_boolean_algebra", a_complement_forgets_the_root, "adapterx"),
    ("addresses_match_whole_paths", positions_are_not_counted_from_the_end, "adapterx"),
    ("addresses_match_whole_paths", captures_are_forgotten, "adapterx"),
    ("names_mean_nothing_to_roles", roles_are_names, "adapterx"),
    ("roles_do_what_they_say", ffn_finds_attention, "adapter"),
    ("roles_do_what_they_say", attention_finds_ffns, "adapter"),
    ("grafts_are_invisible", engine.a_tree_that_shows_grafts, "adapterx"),
    ("missing_or_miscounted_sites_raise", engine.no_match_is_silent, "adapterx"),
    ("missing_or_miscounted_sites_raise", engine.names_beside_others_are_free, "adapterx"),
    ("missing_or_miscounted_sites_raise", engine.times_is_a_minimum, "adapterx"),
    ("missing_or_miscounted_sites_raise", engine.errors_have_no_remedy, "adapterx"),
    ("missing_or_miscounted_sites_raise", engine.errors_do_not_name_the_rule, "adapterx"),
    ("it_runs", none, beside(Fails)),
    ("outputs_keep_their_form", none, after_head(TurnsItsStrides)),
    ("parts_start_as_the_identity", engine.parts_start_at_random, "adapterx"),
    ("parts_start_as_the_identity", none, beside(SaysThatItStartsAtZero)),
    ("scale_is_linear", scales_are_squared, "adapterx"),
    ("every_part_runs", some_sites_are_left_out, "adapterx"),
    ("every_part_runs", engine.only_the_first_call_is_hooked, "aliased"),
    ("samples_do_not_mix", none, beside(MixesSamples)),
    ("samples_do_not_mix", none, beside(CountsSamples)),
    ("samples_do_not_mix", none, beside(TakesTwoSamples)),
    ("tokens_do_not_mix", none, beside(LooksAtOtherTokens)),
    ("tokens_do_not_mix", none, [*ADAPTERX, at("stages.[0].[1].mlp", append(LooksAtOtherTokens))]),
    ("tokens_have_no_order", none, beside(KnowsPositions)),
    ("no_other_token_is_heard", none, "causal"),
    ("no_other_token_is_heard", none, "padded"),
    ("parts_are_what_they_declare", none, beside(SaysThatItStartsAtZero)),
    ("parts_are_what_they_declare", none, beside(SaysThatItIsAffine)),
    ("parts_are_what_they_declare", none, beside(RoutesInSilence)),
    ("forward_changes_nothing", none, beside(CountsItsCalls)),
    ("forward_changes_nothing", none, beside(WritesToItsInput)),
    ("forward_changes_nothing", none, beside(TurnsGradientsOff)),
    ("forward_changes_nothing", none, beside(SeedsTheWorld)),
    ("forward_is_deterministic", none, beside(DropsInEval)),
    ("forward_is_deterministic", none, beside(RemembersItsFirstInput)),
    ("forward_is_deterministic", seeds_are_of_the_clock, "adapterx"),
    ("disabled_is_the_base", engine.disabled_keeps_trained_values, "adapterx"),
    ("disabled_is_the_base", engine.disabled_keeps_parts, "adapterx"),
    ("it_compiles_whole", none, beside(BreaksTheGraph)),
    ("weights_are_theirs_outside", a_weight_stays_what_parts_make, "encoder"),
    ("weights_are_theirs_outside", a_weight_is_read_as_it_is, "encoder"),
    ("freezing_is_exact", engine.nothing_is_frozen, "adapterx"),
    ("freezing_is_exact", engine.what_is_unfrozen_stays_so, "freeze"),
    ("gradients_reach_every_part", none, beside(Detaches)),
    ("counts_are_closed_forms", shared_parts_count_each_time, "adapterx"),
    ("counts_are_closed_forms", engine.sharing_is_forgotten, "adapterx"),
    ("sharing_is_kept", engine.sharing_is_forgotten, "adapterx"),
    ("sharing_is_kept", a_shared_part_is_copied, "adapterx"),
    ("sharing_is_kept", engine.hooks_are_closures, "adapterx"),
    ("aliases_are_kept", an_alias_is_split, "aliased"),
    ("aliases_are_kept", engine.the_base_is_wrapped, "aliased"),
    ("parts_are_like_their_site", engine.parts_are_always_float32, "adapter"),
    ("parts_are_like_their_site", engine.parts_are_always_in_training_mode, "adapter"),
    ("what_is_trained_is_one_set", what_is_unfrozen_by_hand_is_unknown, "adapterx"),
    ("what_is_trained_is_one_set", what_is_adopted_keeps_no_copy, "adapterx"),
    ("what_is_trained_is_one_set", the_report_counts_what_rules_say, "adapterx"),
    ("gates_lie_on_the_simplex", gates_sum_to_99, "adapterx"),
    ("gates_lie_on_the_simplex", none, beside(SumsTo99)),
    ("experts_have_no_order", the_first_expert_is_preferred, "adapterx"),
    ("equal_experts_are_one", gates_are_a_softmax_over_tokens, "adapterx"),
    ("equal_experts_are_one", none, beside(SumsTo99)),
    ("balance_is_the_switch_loss", the_balance_loss_is_the_importance, "adapterx"),
    ("balance_is_the_switch_loss", balance_in_apply_does_nothing, "adapterx"),
    ("balance_is_the_switch_loss", of_two_routers_one_counts, "two"),
    ("revert_is_exact", engine.undo_forgets(journal.Key), "adapterx"),
    ("revert_is_exact", engine.undo_forgets(journal.Flag), "adapterx"),
    ("revert_is_exact", engine.unfreezing_keeps_no_copy, "adapterx"),
    ("revert_is_exact", engine.undo_leaves_hooks, "adapterx"),
    ("revert_is_exact", engine.undo_takes_all_hooks, "adapterx"),
    ("copies_revert_too", engine.undo_forgets(journal.Value), "adapterx"),
    ("copies_revert_too", engine.hooks_are_closures, "adapterx"),
    ("twice_is_refused", twice_is_fine, "adapterx"),
    ("stacked_operations_come_off_in_order", one_revert_takes_all, "adapterx"),
    ("disjoint_rules_commute", engine.seeds_follow_the_order_of_calls, "serial"),
    ("faults_leave_nothing", engine.undo_does_nothing, "adapterx"),
    ("faults_leave_nothing", engine.undo_forgets(journal.Flag), "adapterx"),
    (
        "faults_in_revert_leave_one_of_two",
        an_interrupted_undo_stays_half_done,
        "adapterx",
    ),
    ("failing_parts_leave_nothing", engine.undo_does_nothing, "adapterx"),
    ("failing_parts_leave_nothing", engine.random_numbers_are_not_restored, "adapterx"),
    ("base_keys_are_kept", engine.parts_live_at_their_sites, "adapterx"),
    ("base_keys_are_kept", engine.the_base_is_wrapped, "adapterx"),
    ("files_round_trip", files_hold_parts_only, "adapterx"),
    ("files_round_trip", files_may_lack_keys, "adapterx"),
    ("files_round_trip", none, beside(KeepsWhatFilesDoNot)),
    ("copies_are_independent", engine.hooks_are_closures, "adapterx"),
    ("meta_has_the_same_plan", meta_parts_are_float32, "adapter"),
    ("merge_is_equivalent", merging_forgets_the_scale, "linear"),
    ("merge_is_equivalent", unmerging_subtracts, "linear"),
    ("merge_is_equivalent", merging_leaves("_forward_hooks"), "linear"),
    ("merge_is_equivalent", merging_leaves("_modules"), "linear"),
    ("base_keys_are_kept", base_keys_alone_do_not_load, "adapterx"),
    ("merge_is_equivalent", merging_is_never_refused, "adapterx"),
    ("user_hooks_come_first", engine.grafts_come_before_user_hooks, "adapter"),
]


@lru_cache(maxsize=2)
def worded(form: str) -> Case:
    """A part that looks at other tokens, where a causal or a padding mask hides some."""
    if form == "causal":
        return Case(models.hf_gpt2(), beside(LooksAtOtherTokens), models.words_in())
    inputs = {
        "input_ids": models.words_in(),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 2] * 2),
    }
    return Case(models.hf_bert().bert, beside(LooksAtOtherTokens), inputs)


def case_of(what: Any) -> Case:
    if what in ("causal", "padded"):
        return worded(what)
    if what == "encoder":  # torch's own attention, whose weights nobody calls
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return Case(encoder, "lora", torch.randn(2, 5, 16))
    if isinstance(what, str):
        return named(*(("serial", "aliased") if what == "aliased" else (what,)))
    model = Transformer()
    return Case(model, what, model.example())


def _name(value: Any) -> str:
    if isinstance(value, list):
        first = value[0]
        return first if isinstance(first, str) else getattr(first.rest[0].part, "__name__", "more")
    return value if isinstance(value, str) else engine._name(value)


@pytest.mark.parametrize(("name", "saboteur", "what"), TEETH, ids=_name)
def test_the_property_sees(name: str, saboteur: Callable[[Patch], object], what: Any) -> None:
    case = case_of(what)
    if saboteur is not none:
        _ = case.trouble  # found out before the saboteur comes, since a case keeps it
    with pytest.MonkeyPatch.context() as patch:
        saboteur(patch)
        with pytest.raises(Broken) as told:
            Run(PROPERTIES[name], copy.copy(case), 25)()
    assert str(told.value).startswith(f"{name} is broken: ")
    assert "AttributeError" not in str(told.value)  # a saboteur that misses what it is to break


def test_every_property_has_a_saboteur() -> None:
    assert {name for name, *_ in TEETH} == set(PROPERTIES)


REAL = sorted({(name, what) for name, saboteur, what in TEETH if saboteur is not none})


@pytest.mark.parametrize(("name", "what"), REAL)
def test_without_the_saboteur_it_holds(name: str, what: str) -> None:
    case = case_of(what)
    try:
        Run(PROPERTIES[name], case, 10)()
    except Absent:
        assert (name, what) == ("merge_is_equivalent", "adapterx")


# what is told of a third party's mistakes ------------------------------------------------------


def broken(rules: Any, only: str) -> str:
    model = Transformer(depth=1)
    report = check(model, rules, model.example(), only=[only])
    assert [verdict.name for verdict in report.broken] == [only], str(report)
    with pytest.raises(Broken):
        report.raise_broken()
    return str(report)


SITE = "stages.0.0.mlp"
TOLD = [
    (SumsTo99, "gates_lie_on_the_simplex", ["|sum g - 1| <= N eps", SITE, "0.99, not 1", "seed 0"]),
    (
        MixesSamples,
        "samples_do_not_mix",
        ["d S(x)_i / d x_j = 0", f"MixesSamples at {SITE}", "(0, 1)"],
    ),
    (
        LooksAtOtherTokens,
        "tokens_do_not_mix",
        [f"LooksAtOtherTokens at {SITE}: token 0", "token 0"],
    ),
    (Detaches, "gradients_reach_every_part", ["stages/0/0/mlp/parallel.linear.weight", "seed 0"]),
    (CountsItsCalls, "forward_changes_nothing", ["parallel.calls: value", "seed 0"]),
]


@pytest.mark.parametrize(("part", "name", "words"), TOLD, ids=_name)
def test_the_report_names_law_site_values_and_the_smallest_example(part, name, words) -> None:
    told = broken(at(ffn, parallel(part)), name)
    for word in [*words, name, "smallest example: "]:
        assert word in told, told
