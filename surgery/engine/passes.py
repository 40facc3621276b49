"""What one forward keeps, for each thread of execution: a thread, an asyncio task, a replica's."""

from __future__ import annotations

import asyncio
import threading
import weakref
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from .caches import Given

Kept = TypeVar("Kept")
Key: TypeAlias = tuple[str, int]  # the path of a site, the number of an action there


class Pass:
    """What a forward keeps until the next one begins.

    inputs    of sites whose parts run beside them, until their end
    gates     of the parts that route
    heard     what the parts gave that an action hears
    caches    what sites that insert tokens were given beside them, until their end
    ran       the marks of what was called
    compiled  gates that compiled code had left when this forward ran: they are of an earlier one
    whole     whether this is a forward of the whole model, and is not over
    reading   looks into this forward
    kind      of forward, as the watch knows them
    blind     it cannot be looked into, which would alter its answer or have code compiled anew
    """

    def __init__(self) -> None:
        self.whole = False
        self.reading: Any = None
        self.kind: Any = None
        self.blind = False
        self.gates: dict[Key, Tensor] = {}
        self.compiled: dict[Key, weakref.ref[Tensor]] = {}
        self.begin()

    def begin(self) -> None:
        """Nothing is left of an earlier forward, but the gates."""
        self.inputs: dict[Key, Tensor] = {}
        self.heard: dict[Key, Tensor] = {}
        self.caches: dict[str, Given] = {}
        self.ran: set[str] = set()

    def knew(self, key: Key, gates: Tensor) -> bool:
        """Whether compiled code had left these gates before."""
        known = self.compiled.get(key)
        return known is not None and known() is gates


class ByThread(Generic[Kept]):
    """One object of a kind for each thread of execution.

    traced  that of compiled code, which knows of no threads
    """

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> Any:
        return type(self), ()  # copies begin anew

    def make(self) -> Kept:
        """A new one."""
        raise NotImplementedError

    def forget(self) -> None:
        """No forward has run."""
        self.traced = self.make()
        self.by_thread: weakref.WeakKeyDictionary[Any, Kept] = weakref.WeakKeyDictionary()

    def mine(self) -> Kept:
        """That of the thread of execution that asks."""
        if torch.compiler.is_compiling():
            return self.traced
        thread = thread_of_execution()
        found = self.by_thread.get(thread)
        if found is None:
            found = self.by_thread[thread] = self.make()
        return found

    def all(self) -> list[Kept]:
        """Those of all threads that live."""
        return list(self.by_thread.values())


class Passes(ByThread[Pass]):
    """The passes of one operation."""

    def make(self) -> Pass:
        return Pass()

    def begin(self, left: dict[Key, Tensor]) -> None:
        """A forward of the whole model begins in this thread.

        left  the gates that compiled code has left, which are of an earlier one
        """
        mine = self.mine()
        mine.begin()
        mine.whole, mine.gates = True, {}
        mine.compiled = {key: weakref.ref(gates) for key, gates in left.items()}

    def keep_gates(self, key: Key, gates: Tensor, left: Tensor | None) -> None:
        """Those of this forward, at one part; compiled code has left others there."""
        mine = self.mine()
        mine.gates[key] = gates
        if left is not None:
            mine.compiled[key] = weakref.ref(left)

    def gates(self, left: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Those of the last forward in this thread of execution, or in compiled code if later."""
        mine = self.mine()
        later = {key: gates for key, gates in left.items() if not mine.knew(key, gates)}
        return {**mine.gates, **later}

    def elsewhere(self) -> bool:
        """Whether a forward in another thread of execution has left gates."""
        return any(each.gates for each in self.all())


def thread_of_execution() -> Any:
    """The task that runs, where there are tasks; else the thread."""
    if asyncio._get_running_loop() is not None and (task := asyncio.current_task()) is not None:
        return task
    return threading.current_thread()
