"""In flight: the number of saves, their steps, and the order in which they become visible.

Theory of operation.  A save holds one of `max_async` permits, and its step, from the moment `checkpoint()` admits it
until it is committed or has failed.  Ctrl-C can strike between any two lines of `checkpoint()`, so a permit is not a
count but a `Permit` in a set: adding or removing it twice does no harm, and the caller's ``except`` need not know how
far the call came.  Commit threads may be given several calls for a permit; the first one to claim it ends the save.

Saves commit in the order of their steps: `await_turn` blocks a commit thread until every earlier step has been
committed or has failed.

Rules: every method may be called from any thread; `admit`, `await_turn` and `wait` block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from engine.errors import BusyError, ClosedError, StepError
from engine.session.gate import Gate
from engine.session.save import Save

T = TypeVar("T")


class Block(Protocol):
    """The block of a ``with`` statement in which a save is given its layers."""

    @property
    def is_open(self) -> bool: ...
    def discard_closed(self) -> None: ...


class Permit:
    """One save's right to be in flight.  Compared by identity; its fields belong to `InFlight`.

    But `handed_over`, which its owner sets before the save is handed to the commit threads, `block`, which is that of a
    layerwise save, and `save`, which is None until it is made.
    """

    __slots__ = ("block", "claimed", "ended", "handed_over", "save", "step", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.step: int | None = None
        self.claimed = False
        self.handed_over = False
        self.block: Block | None = None
        self.save: Save | None = None
        self.ended = Gate()

    @property
    def has_open_block(self) -> bool:
        """Whether its save is a layerwise one whose block has not been left."""
        return self.block is not None and self.block.is_open


class InFlight:
    """The saves in flight of one engine, at most `count_max` of them."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._permits: set[Permit] = set()
        self._ending: set[Permit] = set()  # freed, and their saves not known to have ended
        # A lock and no Condition: entering and leaving a lock are one call into C each (see `gate`).
        self._lock = threading.RLock()
        self._closed = False

    def admit(self, permit: Permit, wait: bool) -> bool:
        """Let a save in, waiting for another one to end if asked to; False if there is no room.

        Raises:
            ClosedError: `close` was called, perhaps while this waited.
            BusyError: it would wait for the caller's own blocks.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ClosedError("the Engine has been closed; open a new one")
                if len(self._permits) < self._count_max:
                    self._permits.add(permit)
                    return True
                oldest = min(self._permits, key=_order)
                own = [each for each in self._permits if each.has_open_block and each.thread == permit.thread]
            if not wait:
                return False
            if len(own) == self._count_max:
                raise BusyError(
                    "every save in flight is one of an open block of Engine.layerwise in this thread, which would wait "
                    "for itself; leave the block first, or raise max_async"
                )
            oldest.ended.wait(0.05)  # another one may end first: look again

    def close(self) -> None:
        """Admit no further save, and discard those of open blocks."""
        with self._lock:
            self._closed = True
            permits = [*self._permits]
        for permit in permits:
            if permit.block is not None:  # its thread may never leave it
                permit.block.discard_closed()

    @property
    def has_own_block(self) -> bool:
        """Whether this thread is in an open block of a layerwise save."""
        me = threading.get_ident()
        with self._lock:
            return any(permit.has_open_block and permit.thread == me for permit in self._permits)

    def reserve(self, permit: Permit, step: int | None, committed: Callable[[], list[int]]) -> int:
        """Give a permit its step: the one asked for, or with None the next one.

        Raises:
            StepError: the step is in flight, or not after every committed one and every one in flight.
        """
        with self._lock:
            steps = committed()
            saving = self._steps()
            if step is None:
                step = self.next_step(steps)
            if step in saving:
                raise StepError(f"step {step} is being saved already: wait for that save (its result(), or wait())")
            later = [s for s in steps if s >= step]
            if later:
                raise StepError(
                    f"step {step} is not after the committed steps {later}; to train on from an earlier step, call "
                    "rollback(step) with the step you restored, which takes the later ones out of service"
                )
            if saving and step < saving[-1]:
                raise StepError(f"step {step} is not after step {saving[-1]}, which is in flight; save steps in order")
            permit.step = step
            return step

    def next_step(self, committed: list[int]) -> int:
        """The step after every one that is committed or in flight."""
        return max([*committed, *self.steps()], default=-1) + 1

    def claim(self, permit: Permit) -> bool:
        """Whether the caller is the first to claim this permit, and so the one that ends its save."""
        with self._lock:
            first = not permit.claimed
            permit.claimed = True
            return first

    def await_turn(self, permit: Permit) -> None:
        """Block until every save of an earlier step has ended."""
        for earlier in self._before(permit):
            earlier.ended.wait()

    def free(self, permit: Permit) -> None:
        """Make room for another save: this one is about to end."""
        with self._lock:
            if permit in self._permits:
                self._ending.add(permit)
                self._permits.discard(permit)
            permit.save = None  # whose failure may hold a frame that holds the permit

    def withdraw(self, permit: Permit) -> None:
        """Give a permit back, if it is held: its save has ended."""
        with self._lock:
            self._permits.discard(permit)
            self._ending.discard(permit)
            permit.save = None
        permit.ended.open()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every save that is in flight now has ended; False if `timeout` seconds passed first."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            permits = [*self._permits, *self._ending]
        return all(p.ended.wait(None if end is None else max(0.0, end - time.monotonic())) for p in permits)

    def wait_for_others(self, look: Callable[[], object]) -> None:
        """Block until every save in flight has ended, but for those that this thread has not handed over yet.

        There is such a one if a signal handler that interrupts `checkpoint()` calls this, and then it cannot go on.
        `look` is called again and again meanwhile.
        """
        me = threading.get_ident()
        with self._lock:
            permits = [*self._permits, *self._ending]
        for permit in permits:
            if permit.handed_over or permit.thread != me:
                permit.ended.wait(look=look)

    def while_idle(self, action: Callable[[], T]) -> T:
        """Run `action` with no save in flight, and none admitted before it has ended.

        Raises:
            StepError: saves are in flight.
        """
        with self._lock:
            if self._permits:
                raise StepError(f"{len(self._permits)} saves are in flight {self._steps()}; wait for them first")
            return action()

    def saves(self) -> list[Save]:
        """The saves in flight, by step."""
        with self._lock:
            return [permit.save for permit in sorted(self._permits, key=_order) if permit.save is not None]

    def steps(self) -> list[int]:
        """The steps in flight, in order."""
        with self._lock:
            return self._steps()

    def _steps(self) -> list[int]:
        return sorted(permit.step for permit in self._permits if permit.step is not None)

    def _before(self, permit: Permit) -> list[Permit]:
        with self._lock:
            every = (*self._permits, *self._ending)
            return [other for other in every if _order(other) < _order(permit)]


def _order(permit: Permit) -> float:
    """Where a permit stands: one without a step will get a later one."""
    return float("inf") if permit.step is None else permit.step
