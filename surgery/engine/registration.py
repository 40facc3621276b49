"""The hooks of sites, put on modules, and the order in which those of one module run.

Of sites at one module the later joined is the outer; but one whose tokens stay in for several
blocks goes around those in them, and ends of stretches that nobody calls go around all others.
"""

from __future__ import annotations

from typing import Any

from .ends import EndHook
from .features import declared
from .hooks import HookedSite
from .journal import Journal, owner_of, owners_of
from .streams import Between
from .tokens import ENTERING


def register(hooked: HookedSite, journal: Journal) -> None:
    """Hook into the site; inputs meet the last rule first, and what holds others before all."""
    for end in hooked.ends:
        end.join(journal)
    if not hooked.ends:
        _register(hooked, journal)
    for fits in hooked.fits:
        journal.hook(fits.module, fits.enter, before=True, with_kwargs=True)
    for module in {hooked.entry, hooked.exit}:
        _settle(module._forward_pre_hooks, first=True)
        _settle(module._forward_hooks, first=False)


def _register(hooked: HookedSite, journal: Journal) -> None:
    replaces = hooked.replacement is not None
    hooks = hooked.entry._forward_pre_hooks
    earlier = owners_of(hooks, HookedSite)
    inner = any(action.place in ENTERING for other in earlier.values() for action in other.actions)
    hooked.remembers |= inner and any(action.place == "beside" for action in hooked.actions)
    if hooked.enters or hooked.remembers or replaces:
        journal.hook(hooked.entry, hooked.enter, before=True, with_kwargs=True)
        for key in earlier:
            hooks[key] = hooks.pop(key)
    if hooked.wraps:
        journal.set(hooked.entry, "forward", hooked.instead)
    if hooked.leaves or not replaces:
        journal.hook(hooked.exit, hooked.leave, with_kwargs=True)
    _nest(hooks, first=True)
    _nest(hooked.exit._forward_hooks, first=False)
    if hooked.stretches:
        _before_others(hooked.exit._forward_hooks)


def register_between(hooked: HookedSite, journal: Journal) -> None:
    """Set tokens aside between the blocks in which they stay."""
    switch = hooked.switch
    for k, block in enumerate(hooked.stretch):
        before, after = block.module._forward_pre_hooks, block.module._forward_hooks
        names = declared(type(block.module).forward)
        new = Between(switch.streams, block.path, names)
        between = next(iter(owners_of(before, Between).values()), new)
        if between is new:
            journal.hook(block.module, new.enter, before=True, prepend=True, with_kwargs=True)
        journal.set(between, "switches", (*between.switches, switch.is_on))
        if k > 0 and not between.inner:
            journal.set(between, "inner", True)
        if k < len(hooked.stretch) - 1 and not owners_of(after, Between):
            journal.hook(block.module, new.leave, with_kwargs=True)
        for key in owners_of(after, Between):  # behind all that acts inside of the block
            after[key] = after.pop(key)
        _before_others(after)


# in which order ---------------------------------------------------------------------------------


def _encloses(hooked: HookedSite, other: HookedSite) -> bool:
    """Whether its tokens are in throughout another site, and beyond it."""
    (a, b), (c, d) = hooked.extent, other.extent
    return hooked.inserts and a <= c and d <= b and (a, b) != (c, d)


def _nest(hooks: dict[int, Any], first: bool) -> None:
    """Order sites by what encloses what: if `first`, before what it encloses, else after it."""
    order = list(owners_of(hooks, HookedSite).items())
    for i in range(1, len(order)):
        for k in range(i, 0, -1):
            (_, a), (_, b) = order[k - 1 : k + 1]
            if not (_encloses(b, a) if first else _encloses(a, b)):
                break
            order[k - 1 : k + 1] = order[k], order[k - 1]
    ours, nested = {key for key, _ in order}, iter(order)
    for key in [next(nested)[0] if key in ours else key for key in hooks]:  # others keep theirs
        hooks[key] = hooks.pop(key)


def _before_others(hooks: Any) -> None:
    """Take tokens out before hooks of others see them; parts that act on the output stay behind."""
    ours = [key for key in hooks if _is_ours(hooks[key])]
    sites = owners_of(hooks, HookedSite).values()
    if all(action.place not in ("after", "beside") for s in sites for action in s.actions):
        for key in reversed(ours):
            hooks.move_to_end(key, last=False)
    else:
        for key in ours:
            hooks.move_to_end(key)


def _is_ours(hook: Any) -> bool:
    return type(owner_of(hook)).__module__.startswith(f"{__package__}.")


def _settle(hooks: Any, first: bool) -> None:
    """Order the hooks of one module that are ours: ends of stretches first, or else last.

    Of two that begin there the later joined is the outer, as with hooks on modules of their own.
    A stretch inside of the module (Perceiver's, which ends with its block) is within all that.
    """
    owners = {key: owner_of(hook) for key, hook in hooks.items()}
    ends = sorted(key for key, owner in owners.items() if isinstance(owner, EndHook))
    others = [key for key, owner in owners.items() if isinstance(owner, HookedSite)]
    if not ends:
        return
    order = iter(_in_order(owners, ends, others, first))
    ours = {*ends, *others}
    for key in [next(order) if key in ours else key for key in list(hooks)]:
        hooks[key] = hooks.pop(key)


def _in_order(owners: dict[int, Any], ends: list[int], others: list[int], first: bool) -> list[int]:
    """The keys of ends of stretches, and of other hooks, in the order in which they are to run."""
    joined = [key for key in ends if not owners[key].entering]
    joined += [key for key in reversed(ends) if owners[key].entering]
    in_order = sorted(joined, key=lambda key: owners[key].rank)
    inner = [k for k in in_order if any(_encloses(owners[o], owners[k].site) for o in others)]
    outer = [key for key in in_order if key not in inner]
    return [*outer, *others, *inner] if first else [*inner, *others, *outer]
