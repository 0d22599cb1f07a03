"""Failures: failed saves that nobody has asked about.

Theory of operation.  A failed save raises from its `result()`.  A training loop that drops its Saves never calls that,
and would go on without a checkpoint.  So a commit thread notes each failed save here, and the next `checkpoint()`,
`wait()` or `close()` of the Engine reports those that nobody has asked about by then: once, as a warning or an error.
With a callback, each failed save is given to it at once instead, on the commit thread.

Rules: `note` may be called by any commit thread, and never raises.  A save that `checkpoint()` did not return (Ctrl-C
struck) has no owner, and is not reported.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from engine.errors import ArgumentError, warn
from engine.session.save import Save

OnError = Callable[[Save, BaseException], object] | Literal["raise"] | None

# Failures that are kept for the next report: a training that fails at each save makes one or two between reports.
_KEPT_MAX = 100

_log = logging.getLogger("engine")


class Failures:
    """The failed saves of one engine.

    Raises:
        ArgumentError: `on_error` is no callback, not ``"raise"`` and not None.
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error is not None and on_error != "raise" and not callable(on_error):
            raise ArgumentError(f'on_error is {on_error!r}; it must be a function of (save, error), "raise", or None')
        self._on_error = on_error
        self._failed: deque[Save] = deque(maxlen=_KEPT_MAX)  # its methods are atomic

    def note(self, save: Save, error: BaseException) -> None:
        """A save has ended with this failure."""
        if callable(self._on_error):
            try:
                self._on_error(save, error)
            except Exception:  # the callback is the user's
                with suppress(Exception):  # so are handlers of the log
                    _log.exception("on_error has failed for step %d", save.step)
        else:
            self._failed.append(save)

    def report(self, may_raise: bool = True) -> None:
        """Warn of the failed saves that nobody has asked about, or raise the first one's failure.

        Args:
            may_raise: False only warns.
        """
        unasked = []
        with suppress(IndexError):  # of an empty deque; another thread may empty it
            while True:
                save = self._failed.popleft()
                if save.is_unasked:
                    unasked.append(save)
        first = unasked.pop(0) if unasked and self._on_error == "raise" and may_raise else None
        try:
            if unasked:
                warn(_message(unasked))
        finally:
            if first is not None:
                first.result()


def _message(saves: list[Save]) -> str:
    failures = "; ".join(f"the save of step {save.step} failed: {save.exception()}" for save in saves)
    return f"{failures} (call result() or exception() of a Save, or pass on_error= to the Engine)"
