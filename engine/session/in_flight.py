"""In flight: how many saves there may be, which steps they have, and whose each of them is.

Theory of operation.  A save holds one of `max_async` places, and its step, from the moment `checkpoint()` admits
it until it is committed or has failed.  Ctrl-C can strike between any two lines of `checkpoint()`, so a place is
not a count but a `Ticket` in a set: putting it in and taking it out can be repeated without harm, and the caller's
``except`` need not know how far it came.  Between the caller and the commit thread a ticket is claimed exactly
once; whoever claims it first sees the save to its end.

Rules: every method may be called from any thread, and only `admit` waits.  Called by `engine`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from engine.errors import ClosedError, StepError

# How long to sleep between looks for a place: saves take a hundred times as long.
_PAUSE_S = 0.001


class Ticket:
    """One save's place.  Compared by identity; its fields belong to `InFlight`."""

    __slots__ = ("claimed", "step")

    def __init__(self) -> None:
        self.step: int | None = None
        self.claimed = False


class InFlight:
    """The saves in flight of one engine, at most `count_max` of them."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._tickets: set[Ticket] = set()
        # A lock and no Condition: those wait in Python, and an interrupt inside that would leave the lock as it should
        # not be.  Entering and leaving a lock are one call into C each.
        self._lock = threading.RLock()
        self._closed = False

    def admit(self, ticket: Ticket, wait: bool) -> bool:
        """Give a ticket a place, waiting for one if asked to; False if there is none.

        Raises:
            ClosedError: `close` was called, perhaps while this waited.
        """
        while True:
            with self._lock:
                if self._closed:
                    raise ClosedError("the Engine has been closed; open a new one")
                if len(self._tickets) < self._count_max:
                    self._tickets.add(ticket)
                    return True
            if not wait:
                return False
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Admit nobody any more."""
        with self._lock:
            self._closed = True

    def reserve(self, ticket: Ticket, step: int | None, committed: Callable[[], list[int]]) -> int:
        """Give a ticket its step: the one asked for, or with None the next one.

        Raises:
            StepError: the step is in flight, or not after every committed one.
        """
        with self._lock:
            steps = committed()
            saving = self._steps()
            if step is None:
                step = self.next_step(steps)
            if step in saving:
                raise StepError(f"step {step} is being saved already")
            later = [s for s in steps if s >= step]
            if later:
                raise StepError(
                    f"step {step} is not after the committed steps {later}; to train on from an earlier step, call "
                    "rollback(step) with the step you restored, which takes the later ones out of service"
                )
            ticket.step = step
            return step

    def next_step(self, committed: list[int]) -> int:
        """The step after every one that is committed or in flight."""
        return max([*committed, *self.steps()], default=-1) + 1

    def claim(self, ticket: Ticket) -> bool:
        """Whether the caller is the first to claim this ticket, and so the one who ends its save."""
        with self._lock:
            first = not ticket.claimed
            ticket.claimed = True
            return first

    def withdraw(self, ticket: Ticket) -> None:
        """Give a place back, if the ticket has one."""
        with self._lock:
            self._tickets.discard(ticket)

    def while_idle(self, action: Callable[[], list[int]]) -> list[int]:
        """Run `action` with no save in flight, and none admitted before it has ended.

        Raises:
            StepError: saves are in flight.
        """
        with self._lock:
            if self._tickets:
                raise StepError(f"{len(self._tickets)} saves are in flight {self._steps()}; wait for them first")
            return action()

    def steps(self) -> list[int]:
        """The steps in flight, in order."""
        with self._lock:
            return self._steps()

    def _steps(self) -> list[int]:
        return sorted(ticket.step for ticket in self._tickets if ticket.step is not None)
