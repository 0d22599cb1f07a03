"""Snapshot: how each save of an arena gets the tensors as they were when `checkpoint()` was called.

Theory of operation.  A save copies the arena while training goes on.  What keeps a writer from tearing it depends on
the guard, and on who may write:

    cow      a writer waits until what it writes to is staged; every save may be lazy
    detect   optimizers are held back by the fence, and a save fails if anybody else wrote; lazy where there is a fence
    fence    optimizers are held back; nobody notices other writers, so only torch's own optimizers are trusted

A lazy save returns while staging goes on, an eager one when it has ended.  Under ``"auto"`` an arena whose save was
torn is saved eagerly from then on, with one warning.

A guard belongs to the memory of an arena, and not to an Engine: two Engines may save one arena.  Wrapped arenas have
no guard, because their memory is shared with others.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Literal, NamedTuple

from engine.errors import PlatformError, warn
from engine.io.guard import Guard, GuardError, NotArmed
from engine.io.guard_probe import GuardProbe, explain_guard, probe_guard
from engine.options import GuardChoice
from engine.state.arena import Arena
from engine.state.memory import HostMemory

Snapshot = Literal["auto", "eager", "lazy", "checked"]


class SnapshotPlan(NamedTuple):
    """How one save gets its snapshot.

    Attributes:
        guard: watches the arena, or None.
        is_lazy: the call returns while staging goes on.
        is_checked: every block is hashed in the call, and compared when it is staged.
        holds_writers: the fence holds optimizers back until the save is staged.
        urgent_names: segments that are staged before the call returns.
    """

    guard: Guard | None
    is_lazy: bool
    is_checked: bool
    holds_writers: bool
    urgent_names: Collection[str]


class Snapshots:
    """Plans the snapshots of one engine.

    Raises:
        PlatformError: the guard insisted on does not work here.
    """

    def __init__(self, choice: GuardChoice) -> None:
        self._choice = choice
        self.probe: GuardProbe = probe_guard(choice)
        self._torn: weakref.WeakSet[Arena] = weakref.WeakSet()
        self._unguarded: weakref.WeakSet[Arena] = weakref.WeakSet()
        self._warned: weakref.WeakSet[Arena] = weakref.WeakSet()

    def plan(self, arena: Arena, snapshot: Snapshot, layerwise: bool = False) -> SnapshotPlan:
        """How to save an arena now.

        A layerwise save has a guard only if writers wait: ``detect`` would take the first write to a layer for a tear
        of one that shares a page with it.  It is not checked in the call, but layer by layer.
        """
        guard = self._guard(arena)
        if layerwise and guard is not None and guard.kind != "cow":
            guard = None
        kind = "fence" if guard is None else guard.kind
        is_exact = kind == "cow"
        if snapshot == "auto" and arena in self._torn and arena not in self._warned:
            self._warned.add(arena)
            warn(
                "a save of this arena was torn by a writer that no fence holds back; the arena is saved eagerly from "
                "now on, which holds checkpoint() until it is staged: let that writer call wait_staged() first, and "
                "say snapshot='lazy'"
            )
        is_lazy = {
            "lazy": True,
            "eager": False,
            "checked": is_exact or (arena.fenced and not layerwise),
            "auto": arena not in self._torn and (is_exact or _is_fenced(arena, kind)),
        }[snapshot]
        return SnapshotPlan(
            guard,
            is_lazy,
            is_checked=snapshot == "checked" and guard is None,
            holds_writers=not is_exact,
            urgent_names=() if is_exact else arena.unfenced,
        )

    def note_torn(self, arena: Arena) -> None:
        """A save of the arena has failed because it was torn."""
        self._torn.add(arena)

    def note_refused(self, arena: Arena, refusal: NotArmed) -> bool:
        """The kernel refused to protect the arena for a save: whether to begin it again, without the guard."""
        if self._choice != "auto" or arena in self._unguarded:
            return False
        self._leave_unguarded(arena, refusal)
        return True

    def _leave_unguarded(self, arena: Arena, refusal: PlatformError) -> None:
        self._unguarded.add(arena)
        warn(f"this arena is saved without the guard {self.probe.guard!r}: {refusal.cause}; {refusal.remedy}")

    def _guard(self, arena: Arena) -> Guard | None:
        """The guard of an arena's memory, opened at its first save.

        Raises:
            PlatformError: the guard insisted on is refused for this memory, though it worked for other memory.
        """
        memory, kind = arena.buffer, self.probe.guard
        if memory is None or kind == "fence" or arena in self._unguarded:
            return None
        guard = _guards.get(memory)
        if guard is not None and guard.kind == kind and not guard.is_forked:
            return guard
        if guard is not None:
            arena.fence()
            guard.close()
        try:
            guard = _guards[memory] = _open(memory, kind)
        except PlatformError as error:
            if self._choice != "auto":
                raise
            self._leave_unguarded(arena, error)
            return None
        return guard


# One for each memory, whichever Engine asks first.
_guards: weakref.WeakKeyDictionary[HostMemory, Guard] = weakref.WeakKeyDictionary()


def _open(memory: HostMemory, kind: Literal["cow", "detect"]) -> Guard:
    try:
        guard = Guard(kind, memory.address, memory.nbytes)
    except GuardError as error:
        raise PlatformError(*explain_guard(error)) from None
    weakref.finalize(memory, guard.close).atexit = False  # before its pages are unmapped
    return guard


def _is_fenced(arena: Arena, kind: str) -> bool:
    """Whether the fence holds back what is likely to write."""
    return arena.fenced and (kind == "detect" or arena.steps_by_torch)
