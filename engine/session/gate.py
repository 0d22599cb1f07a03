"""Gate: opens once, and can be waited for.

Theory of operation.  `threading.Event` and `Condition` wait in Python code, where Ctrl-C can strike between any two
lines and leave a lock taken for ever.  A gate is a lock of the interpreter's own: it is taken when the gate is made
and released when it opens.  A waiter takes it and gives it back, each in one call into C.  An interrupt between the
two calls leaves the lock taken, so other waiters also check the flag every `_SLICE_S`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from numbers import Real

from engine.errors import ArgumentError

# Long enough to cost nothing, and short enough for a waiter that cannot get the lock.
_SLICE_S = 0.05

# A timeout of some thirty years is none.
_TIMEOUT_MAX_S = 1e9


def seconds(timeout: float | None) -> float | None:
    """A caller's timeout, checked: none of it if negative, and at most some decades.

    Raises:
        ArgumentError: it is no number.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real) or timeout != timeout:
        raise ArgumentError(f"timeout is {timeout!r}; it must be a number of seconds, or None to wait without an end")
    return float(min(max(timeout, 0.0), _TIMEOUT_MAX_S))


class Gate:
    """Closed at first, open for ever after `open`."""

    __slots__ = ("_lock", "_open")

    def __init__(self) -> None:
        self._open = False
        self._lock = threading.Lock()
        self._lock.acquire()

    @property
    def is_open(self) -> bool:
        """Whether `open` has been called."""
        return self._open

    def open(self) -> None:
        """Let every waiter go on.  May be called again."""
        if not self._open:
            self._open = True
            with suppress(RuntimeError):  # two threads opened it at once
                self._lock.release()

    def wait(self, timeout: float | None = None, look: Callable[[], object] = lambda: None) -> bool:
        """Block until the gate is open; False if `timeout` seconds passed first.  Calls `look` again and again."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._open:
            look()
            left = _SLICE_S if end is None else min(_SLICE_S, end - time.monotonic())
            if left <= 0:
                return False
            if self._lock.acquire(timeout=left):
                self._lock.release()
        return True
