"""The checks of laws.py have teeth: on an engine broken on purpose, each of them fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import ops
from surgery.engine import hooks, journal, nothing_found, operation, placement, unfreezing, verify
from surgery.engine import planning as plan
from surgery.engine.hooks import HookedSite
from surgery.engine.journal import Journal
from surgery.engine.operation import Additions, Operation
from surgery.engine.placement import Placement
from surgery.structure import module_tree
from tests.engine import (
    test_bases,
    test_fused_encoder,
    test_hooks,
    test_uncalled_modules,
    test_verify,
)
from tests.laws import checks as laws

Patch = pytest.MonkeyPatch
Saboteur = Callable[[Patch], object]


def wrapped(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Put `change(real, *args)` in the place of a function."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kw: change(real, *args, **kw))


# each saboteur breaks one thing ----------------------------------------------------------------


def a_tree_that_shows_grafts(patch: Patch) -> None:
    patch.setattr(Additions, "_is_surgery_additions", False)


def no_match_is_silent(patch: Patch) -> None:
    def lenient(real: Any, rule: Any, tree: Any) -> Any:
        try:
            return real(rule, tree)
        except surgery.MatchError:
            return {}

    wrapped(patch, plan, "match_rule", lenient)


def times_is_a_minimum(patch: Patch) -> None:
    patch.setattr(plan, "match_rule", lambda rule, tree: rule.where.find(tree))


def conflicts_are_ignored(patch: Patch) -> None:
    patch.setattr(plan, "check_conflicts", lambda *given: None)


def edits_act_in_reverse(patch: Patch) -> None:
    def join(real: Any, self: Operation, site: Any, steps: list[Any], *more: Any) -> None:
        real(self, site, steps[::-1], *more)

    wrapped(patch, Operation, "join", join)


def the_first_prepend_is_outermost(patch: Patch) -> None:
    patch.setattr(hooks, "reversed", list, raising=False)


def parallel_reads_what_the_module_reads(patch: Patch) -> None:
    def init(real: Any, self: HookedSite, *args: Any) -> None:
        real(self, *args)
        self.remembers = False

    wrapped(patch, HookedSite, "__init__", init)


def undo_does_nothing(patch: Patch) -> None:
    patch.setattr(Operation, "undo", lambda self: None)


def undo_forgets(*kinds: type) -> Saboteur:
    """A walk back that leaves out some kinds of entries; of keys, those of attributes."""

    def sabotage(patch: Patch) -> None:
        def undo(real: Any, self: Journal) -> None:
            kept = [e for e in self.entries if not (isinstance(e, kinds) and not _is_table(e))]
            self.entries[:] = kept
            real(self)

        wrapped(patch, Journal, "undo", undo)

    return sabotage


def _is_table(entry: journal.Entry) -> bool:
    return isinstance(entry, journal.Key) and bool(entry.table)


def undo_leaves_hooks(patch: Patch) -> None:
    patch.setattr(journal, "unhook", lambda module, owner: None)


def undo_leaves_what_was_added(patch: Patch) -> None:
    def undo(real: Any, self: journal.Key) -> None:
        if not self.table:
            real(self)

    wrapped(patch, journal.Key, "undo", undo)


def undo_takes_all_hooks(patch: Patch) -> None:
    def unhook(module: nn.Module, owner: object) -> None:
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()

    patch.setattr(journal, "unhook", unhook)


def unfreezing_keeps_no_copy(patch: Patch) -> None:
    def train_only(real: Any, self: Operation, *args: Any) -> None:
        before = list(self.journal.values)
        real(self, *args)
        values = list(self.journal.values)[len(before) :]
        self.journal.entries[:] = [
            e for e in self.journal.entries if not any(e is value for value in values)
        ]

    wrapped(patch, Operation, "train_only", train_only)


def copies_are_views(patch: Patch) -> None:
    def train_only(real: Any, self: Operation, *args: Any) -> None:
        real(self, *args)
        self.journal.entries[:] = [
            e._replace(value=e.tensor.detach()) if isinstance(e, journal.Value) else e
            for e in self.journal.entries
        ]

    wrapped(patch, Operation, "train_only", train_only)


def random_numbers_are_not_restored(patch: Patch) -> None:
    patch.setattr(torch, "set_rng_state", lambda state: None)


def pythons_random_numbers_are_not_restored(patch: Patch) -> None:
    patch.setattr("random.setstate", lambda state: None)


def numpys_random_numbers_are_not_restored(patch: Patch) -> None:
    patch.setattr("numpy.random.set_state", lambda state: None)


def parts_live_at_their_sites(patch: Patch) -> None:
    def join(real: Any, self: Operation, site: Any, steps: list[Any], *more: Any) -> None:
        real(self, site, steps, *more)
        for i, step in enumerate(steps):
            site.exit.module._modules[f"surgery_{i}"] = step.part

    wrapped(patch, Operation, "join", join)


def the_base_is_wrapped(patch: Patch) -> None:
    def join(real: Any, self: Operation, site: Any, steps: list[Any], *more: Any) -> None:
        real(self, site, steps, *more)
        parent = site.parent and site.parent.module
        if parent is not None:
            parent._modules[site.steps[-1].name] = nn.Sequential(site.module)

    wrapped(patch, Operation, "join", join)


def unfreezing_makes_new_tensors(patch: Patch) -> None:
    def train_only(real: Any, self: Operation, modules: Any, chosen: set[int], *own: Any) -> None:
        real(self, modules, chosen, *own)
        for module in modules:
            for name, p in list(module._parameters.items()):
                if p is not None and id(p) in chosen:
                    module._parameters[name] = nn.Parameter(p.detach().clone())

    wrapped(patch, Operation, "train_only", train_only)


def the_room_is_in_the_root(patch: Patch) -> None:
    patch.setattr(operation, "_host", lambda model: model)


def every_graft_counts_as_run(patch: Patch) -> None:
    patch.setattr(Operation, "prove", lambda self, *why: None)


def parts_start_at_random(patch: Patch) -> None:
    def make(real: Any, self: Placement, seed: int) -> nn.Module:
        part = real(self, seed)
        for p in part.parameters():
            nn.init.normal_(p, std=1e-4)
        return part

    wrapped(patch, Placement, "make", make)


def parts_do_nothing(patch: Patch) -> None:
    def act(real: Any, self: HookedSite, i: int, step: Any, x: Any, base: Any, came: Any) -> Any:
        return base + 1e-30 * real(self, i, step, x, base, came)  # a gradient comes to them

    wrapped(patch, HookedSite, "_act", act)


def seeds_follow_the_order_of_calls(patch: Patch) -> None:
    count = itertools.count()

    def make(real: Any, self: Placement, seed: int) -> nn.Module:
        return real(self, seed + next(count))

    wrapped(patch, Placement, "make", make)


def hooks_are_closures(patch: Patch) -> None:
    def init(real: Any, self: HookedSite, *args: Any) -> None:
        real(self, *args)
        enter, leave = self.enter, self.leave
        object.__setattr__(self, "enter", _Closure(enter))
        object.__setattr__(self, "leave", _Closure(leave))

    wrapped(patch, HookedSite, "__init__", init)


class _Closure:
    """Calls a function that a deep copy does not reach."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __deepcopy__(self, memo: Any) -> _Closure:
        return self


def aliases_are_sites_of_their_own(patch: Patch) -> None:
    def grow(self: module_tree.Tree, module: nn.Module, parent: Any, steps: Any, above: Any) -> Any:
        site = self._known[id(module)] = module_tree.Site(module, parent, steps)
        site.order = len(self.sites)
        self.sites.append(site)
        for step, child in module_tree._children(module):
            site.children.append(self._grow(child, site, (*steps, step), above))
        site.end = len(self.sites)
        return site

    patch.setattr(module_tree.Tree, "_grow", grow)


def only_the_first_call_is_hooked(patch: Patch) -> None:
    def leave(real: Any, self: HookedSite, *args: Any) -> Any:
        return None if self.ran else real(self, *args)

    wrapped(patch, HookedSite, "leave", leave)


def disabled_keeps_trained_values(patch: Patch) -> None:
    patch.setattr("surgery.engine.apply._changed", lambda done: [])


def disabled_keeps_parts(patch: Patch) -> None:
    patch.setattr(
        Operation, "enabled", property(lambda self: True, lambda self, on: None), raising=False
    )


def the_inner_disabled_ends_the_outer(patch: Patch) -> None:
    real = surgery.disabled

    @contextmanager
    def disabled(model: nn.Module) -> Iterator[None]:
        with real(model):
            yield
        for done in operation.operations(model):
            done.enabled = True

    patch.setattr(surgery, "disabled", disabled)


def what_is_unfrozen_stays_so(patch: Patch) -> None:
    def unfrozen(matches: Any, check_braces: bool) -> tuple[set[int], list[str]]:
        places = [
            sites
            for rule, sites in matches
            for edit in rule.rest
            if getattr(edit, "trained", False)
        ]
        modules = [end.module for sites in places for s in sites for end in (s.entry, s.exit)]
        return {id(p) for module in modules for p in module.parameters()}, []

    patch.setattr(plan, "unfrozen_by", unfrozen)


def nothing_is_frozen(patch: Patch) -> None:
    patch.setattr(Operation, "train_only", lambda self, modules, chosen, own: None)


def parts_are_always_float32(patch: Patch) -> None:
    patch.setattr(placement, "_surroundings", lambda site: (torch.device("cpu"), torch.float32))


def parts_are_always_in_training_mode(patch: Patch) -> None:
    wrapped(patch, Placement, "make", lambda real, self, seed: real(self, seed).train())


def sharing_is_forgotten(patch: Patch) -> None:
    def name_all(real: Any, placed: list[Placement], names: Any) -> None:
        real(placed, names)
        for i, p in enumerate(placed):
            p.key = f"{p.key}/{i}"

    wrapped(patch, plan, "name_all", name_all)


def grafts_come_before_user_hooks(patch: Patch) -> None:
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        wrapped(
            patch,
            nn.Module,
            name,
            lambda real, self, hook, **kw: real(
                self,
                hook,
                **{**kw, "prepend": isinstance(getattr(hook, "__self__", 0), HookedSite)},
            ),
        )


def planning_draws(patch: Patch) -> None:
    wrapped(patch, Placement, "sketch", lambda real, self: (torch.rand(1), real(self))[1])
    patch.setattr(torch, "set_rng_state", lambda state: None)


def reporting_writes(patch: Patch) -> None:
    def sketch(real: Any, self: Placement) -> nn.Module:
        self.site.module.eval()
        return real(self)

    wrapped(patch, Placement, "sketch", sketch)


def gates_lose_their_gradient(patch: Patch) -> None:
    patch.setattr("surgery.engine.losses._check_gradient", lambda hooks, gates: None)


def errors_have_no_remedy(patch: Patch) -> None:
    def init(self: surgery.SurgeryError, rule: str, fact: str, remedy: str) -> None:
        Exception.__init__(self, fact)
        self.rule, self.fact, self.remedy = rule, fact, ""

    patch.setattr(surgery.SurgeryError, "__init__", init)


def errors_do_not_name_the_rule(patch: Patch) -> None:
    patch.setattr(surgery.SurgeryError, "__str__", lambda self: f"{self.fact}\n{self.remedy}")


def addresses_are_not_looked_up(patch: Patch) -> None:
    text = "Write something else."
    patch.setattr(nothing_found, "_nearest_addresses", lambda address, tree: text)


def names_beside_others_are_free(patch: Patch) -> None:
    patch.setattr(plan, "check_written", lambda rule, tree: None)


def integers_are_weights(patch: Patch) -> None:
    patch.setattr(unfreezing, "is_quantised", lambda weight: False)


# which check sees it ---------------------------------------------------------------------------

in_order = laws.edits_act_in_rule_order
no_fault = laws.apply_is_all_or_nothing
copied = partial(laws.revert_is_bitwise, via=laws.copied)

SEEN: list[tuple[Saboteur, Callable[[], object]]] = [
    (a_tree_that_shows_grafts, laws.grafts_are_invisible),
    (a_tree_that_shows_grafts, laws.rules_meet_the_untouched_model),
    (no_match_is_silent, laws.no_match_is_an_error),
    (addresses_are_not_looked_up, laws.no_match_is_an_error),
    (addresses_are_not_looked_up, laws.no_match_of_one_name_is_an_error),
    (names_beside_others_are_free, laws.no_match_of_one_name_is_an_error),
    (integers_are_weights, laws.a_quantised_weight_is_not_unfrozen),
    (times_is_a_minimum, laws.wrong_times_is_an_error),
    (conflicts_are_ignored, laws.two_replacements_conflict),
    (edits_act_in_reverse, in_order),
    (the_first_prepend_is_outermost, in_order),
    (parallel_reads_what_the_module_reads, in_order),
    (undo_does_nothing, no_fault),
    (undo_forgets(journal.Key), laws.revert_is_bitwise),
    (undo_forgets(journal.Flag), no_fault),
    (undo_forgets(journal.Flag), laws.revert_is_bitwise),
    (undo_forgets(journal.Value), laws.revert_is_bitwise),
    (undo_forgets(journal.Value), copied),
    (undo_leaves_hooks, no_fault),
    (undo_leaves_hooks, laws.revert_is_bitwise),
    (undo_leaves_what_was_added, no_fault),
    (undo_leaves_what_was_added, laws.revert_is_bitwise),
    (undo_takes_all_hooks, laws.revert_is_bitwise),
    (unfreezing_keeps_no_copy, laws.revert_is_bitwise),
    (copies_are_views, laws.revert_is_bitwise),
    (random_numbers_are_not_restored, no_fault),
    (random_numbers_are_not_restored, laws.applying_draws_nothing),
    (random_numbers_are_not_restored, laws.planning_draws_nothing),
    (pythons_random_numbers_are_not_restored, laws.applying_draws_nothing),
    (numpys_random_numbers_are_not_restored, laws.applying_draws_nothing),
    (undo_does_nothing, laws.failed_apply_keeps_gradients),
    (parts_live_at_their_sites, laws.base_is_kept),
    (the_base_is_wrapped, laws.base_is_kept),
    (unfreezing_makes_new_tensors, laws.base_is_kept),
    (parts_live_at_their_sites, laws.base_checkpoint_loads),
    (the_room_is_in_the_root, laws.containers_stay_containers),
    (every_graft_counts_as_run, laws.a_site_that_never_runs_is_an_error),
    (undo_does_nothing, laws.a_site_that_never_runs_is_an_error),
    (parts_start_at_random, laws.starts_as_the_identity),
    (parts_do_nothing, laws.starts_as_the_identity),
    (planning_draws, laws.looking_changes_nothing),
    (planning_draws, laws.planning_draws_nothing),
    (reporting_writes, laws.looking_changes_nothing),
    (errors_have_no_remedy, laws.errors_say_rule_fact_remedy),
    (errors_do_not_name_the_rule, laws.errors_say_rule_fact_remedy),
    (seeds_follow_the_order_of_calls, laws.disjoint_rules_commute),
    (hooks_are_closures, laws.copies_are_independent),
    (hooks_are_closures, copied),
    (aliases_are_sites_of_their_own, laws.aliased_sites_are_joined_once),
    (only_the_first_call_is_hooked, laws.every_call_under_an_alias_is_hooked),
    (disabled_keeps_trained_values, laws.disabled_is_the_base),
    (disabled_keeps_parts, laws.disabled_is_the_base),
    (the_inner_disabled_ends_the_outer, laws.disabled_may_be_nested),
    (what_is_unfrozen_stays_so, laws.the_last_word_counts),
    (nothing_is_frozen, laws.the_last_word_counts),
    (parts_are_always_float32, laws.parts_are_like_their_site),
    (parts_are_always_in_training_mode, laws.parts_are_like_their_site),
    (sharing_is_forgotten, laws.shared_part_is_stored_once),
    (grafts_come_before_user_hooks, laws.user_hooks_come_first),
    (gates_lose_their_gradient, laws.balance_is_never_missing),
]


def _name(value: Any) -> str:
    value = value.func if isinstance(value, partial) else value
    return value.__qualname__.replace(".<locals>.sabotage", "")


@pytest.mark.parametrize(("saboteur", "check"), SEEN, ids=_name)
def test_the_law_sees(saboteur: Saboteur, check: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        saboteur(patch)
        with pytest.raises(AssertionError):
            check()


def test_every_law_has_a_check_and_every_check_a_saboteur() -> None:
    numbers = {int((check.__doc__ or "").split()[1].rstrip(":")) for check in laws.CHECKS.values()}
    assert numbers == set(range(1, 11))
    seen = {_name(check) for _, check in SEEN}
    assert set(laws.CHECKS) <= seen


def test_gates_that_do_not_sum_to_one_are_seen() -> None:
    from tests.parts import test_mixture

    with pytest.MonkeyPatch.context() as patch:
        wrapped(patch, ops, "route", lambda real, *args: real(*args) * 0.99)
        with pytest.raises(AssertionError):
            test_mixture.test_gates_lie_on_the_simplex(None)
        with pytest.raises(AssertionError):
            test_mixture.test_it_equals_the_loop(1, torch.float64, (5, 7))


def gradients_are_not_looked_for(patch: Patch) -> None:
    patch.setattr(verify, "_check_gradients", lambda answer, targets: [])


def the_start_is_not_compared(patch: Patch) -> None:
    patch.setattr(verify, "_check_start", lambda operation, run, answer: None)


def only_the_way_with_gradients_is_proved(patch: Patch) -> None:
    wrapped(patch, verify, "_proved", torch.enable_grad()(lambda real, *args: real(*args)))


def nested_tensors_are_let_through(patch: Patch) -> None:
    wrapped(patch, Operation, "watch", lambda real, self, model, modules: real(self, model, ()))


def only_the_end_of_a_span_counts(patch: Patch) -> None:
    patch.setattr(HookedSite, "ran", property(lambda self: self.path in self.switch.seen))


def only_the_query_is_the_input(patch: Patch) -> None:
    def given(args: Any, kwargs: Any, hooked: HookedSite) -> Any:
        return args[0], lambda tensor: ((tensor, *args[1:]), kwargs)

    patch.setattr(hooks, "input_of", given)


def quantised_weights_tell_the_dtype(patch: Patch) -> None:
    patch.setattr(placement, "_beside", lambda module, above: torch.float32)


def what_is_never_called_is_not_refused(patch: Patch) -> None:
    patch.setattr(plan, "check_called", lambda *given: None)


BYPASSES: list[tuple[Saboteur, Callable[[], object]]] = [
    (
        gradients_are_not_looked_for,
        test_verify.test_an_unfrozen_tensor_that_no_gradient_comes_to_is_named,
    ),
    (the_start_is_not_compared, test_verify.test_a_part_that_does_not_start_as_it_says_is_told),
    (
        only_the_way_with_gradients_is_proved,
        test_verify.test_a_graft_that_runs_with_gradients_only_is_an_error,
    ),
    (nested_tensors_are_let_through, test_fused_encoder.test_nested_tensors_come_back_with_revert),
    (
        only_the_end_of_a_span_counts,
        test_uncalled_modules.test_a_span_whose_beginning_is_read_only_is_no_silence,
    ),
    (
        only_the_query_is_the_input,
        partial(
            test_hooks.test_what_comes_before_self_attention_reaches_query_key_and_value, False
        ),
    ),
    (
        quantised_weights_tell_the_dtype,
        partial(
            test_bases.test_parts_beside_quantised_weights_are_of_the_norms_dtype,
            "float8",
            torch.bfloat16,
        ),
    ),
    (
        what_is_never_called_is_not_refused,
        test_uncalled_modules.test_a_span_may_not_end_there_either,
    ),
]


@pytest.mark.parametrize(("saboteur", "check"), BYPASSES, ids=_name)
def test_the_tests_of_bypasses_see(saboteur: Saboteur, check: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        saboteur(patch)
        with pytest.raises((AssertionError, RuntimeError, surgery.GraftError)):
            check()
