"""What is asked of the watch before a call that relies on the parts."""

from __future__ import annotations

import warnings

from torch import nn

from ..errors import OperationError
from .hooks import HookedSite
from .journal import Hook, owner_of
from .watch import Watch, Watched, counted


def check_watched(operation: Watched, call: str) -> None:
    """Raise OperationError where parts can be seen not to count any more; warn where none ran.

    Before a call that relies on them: a module was replaced, or our hooks are gone from it, or the
    last forwards went round it.
    """
    watch: Watch = operation.watcher
    if lost := watch.lost(operation.hooked_sites):
        fact = "stand at modules that are no longer in the model (replaced since it was operated)"
    elif lost := _unhooked(operation):
        fact = "have lost their hooks"
    elif lost := [each for each in operation.hooked_sites if each.path in watch.bypassed]:
        fact = f"did not run in the last forward{watch.bypassed[lost[0].path]}"
    else:
        _warn_untrained(operation, call)
        return
    raise OperationError(
        call,
        f"{counted(lost, len(operation.hooked_sites))} {fact}: what was added there counts for "
        "nothing.",
        "Convert or change the model first, and apply the rules then.",
    )


def _unhooked(operation: Watched) -> list[HookedSite]:
    """Sites from whose modules our hooks were taken."""
    hooks = [entry for entry in operation.journal.entries if isinstance(entry, Hook)]
    gone = {
        id(entry.owner)
        for entry in hooks
        if not any(
            owner_of(hook) is entry.owner
            for table in (entry.module._forward_pre_hooks, entry.module._forward_hooks)
            for hook in table.values()
        )
    }
    return [hooked for hooked in operation.hooked_sites if id(hooked) in gone]


def _warn_untrained(operation: Watched, call: str) -> None:
    """Something else was trained, and parts were not: the model was run round their hooks."""
    sites = operation.hooked_sites
    parts = set(map(id, _parts_of(sites)))
    model = operation.model[0]
    trained = any(p.grad is not None for p in model.parameters() if id(p) not in parts)
    running = {hooked.like for hooked in sites if hooked.ran}
    never = [each for each in sites if not (each.optional or each.like in running)]
    if trained and never and _is_untrained(never):
        fact = f"{counted(never, len(sites))} never ran"
    elif trained and _is_untrained(sites):
        fact = f"no gradient came to any part at {counted(sites, len(sites))}"
    else:
        return
    warnings.warn(
        f"{call}: {fact}, though something else was trained: the model was run by another method "
        "than forward, or layers by theirs (checkpoint(layer.forward, x)), which goes round the "
        "hooks that run the parts.",
        stacklevel=4,
    )


def _is_untrained(sites: list[HookedSite]) -> bool:
    """Whether parts there ask for gradients, and got none."""
    asking = [p for p in _parts_of(sites) if p.requires_grad]
    return bool(asking) and all(p.grad is None for p in asking)


def _parts_of(sites: list[HookedSite]) -> list[nn.Parameter]:
    actions = [action for hooked in sites for action in hooked.actions]
    return [p for action in actions for p in action.part.parameters()]
