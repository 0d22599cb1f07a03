"""Preemption: one last checkpoint after a signal that announces the end of the process.

Theory of operation.  Schedulers send SIGTERM or SIGUSR1 some seconds before SIGKILL.  A handler only notes the signal.
The next `checkpoint()` is at a step boundary, since the training loop calls it: it is the last one, and waits until
every save in flight has ended; with ``isolation="process"`` only until the monitor has all that it needs.  So is the
end of the next block of `layerwise()`.  A `checkpoint()` inside such a block is not: the block's end comes after it.
Then the process ends as it would have ended without this, only later:

    handler before                   at the signal     after the last checkpoint
    SIG_DFL                          -                 the default action: the process is killed by the signal
    a function that returns          it is called      `checkpoint()` returns, and the function's owner decides
    a function that raises           it is called      its exception is raised
    SIG_IGN                          none of ours is installed
    a function installed since       it calls ours     `checkpoint()` returns, and its owner decides

`close` ends the process in the same way if no checkpoint came after the signal.

A thread of its own writes the log, because a handler may interrupt the code that writes it.  A forked child inherits
handlers, so a hook at the fork puts back the handlers from before; a child that was forked without Python's hooks is
known by its process id.

Rules: Python runs handlers on the main thread only, and only that may install them.  One `Preemption` in a process.
Called by `engine`.
"""

from __future__ import annotations

import logging
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue
from types import FrameType
from typing import Any

from engine.errors import ArgumentError, UsageError, warn
from engine.session.gate import seconds
from engine.session.in_flight import InFlight
from engine.session.save import Save

# SLURM's `--signal`, Kubernetes, torchrun and `kill` send SIGTERM; users of SLURM often choose SIGUSR1.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# The pause between two looks at whether a monitor has all of the saves in flight.
_SLICE_S = 0.005

_Handler = Callable[[int, FrameType | None], Any] | int | None

Signals = int | str | Iterable[int | str]

_log = logging.getLogger("engine")

_active: set[Preemption] = set()  # of this process: none, or one


class Preemption:
    """Ends the process after one last checkpoint.  Made by `Engine.on_preemption`."""

    def __init__(self, signals: Signals, deadline_s: float | None, in_flight: InFlight) -> None:
        """Not for callers: see `Engine.on_preemption`."""
        chosen = _checked(signals)
        if deadline_s is not None and seconds(deadline_s) == 0:
            raise ArgumentError(f"deadline_s is {deadline_s}; it must be a positive number of seconds, or None")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "on_preemption() installs signal handlers, which Python allows on the main thread only; call it there"
            )
        if _active:
            raise UsageError("another Engine of this process has on_preemption(); close that one's Preemption first")
        self._deadline_s = seconds(deadline_s)
        self._in_flight = in_flight
        self._pid = os.getpid()
        self._previous: dict[int, _Handler] = {}
        self._signal: int | None = None
        self._held: BaseException | None = None
        self._may_end = False
        self._over = False
        self._saves: list[Save] = []
        self._warned = False
        self._woken: SimpleQueue[tuple[int, float] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._report, daemon=True, name="engine-preemption")
        self._thread.start()
        _active.add(self)
        try:
            for number in chosen:
                self._install(number)
        except BaseException:
            self.end()
            raise

    def _install(self, number: int) -> None:
        previous = signal.getsignal(number)
        name = signal.Signals(number).name
        if previous is None:
            raise UsageError(
                f"{name} has a handler that is not Python's, which no other handler can call: leave it out"
            )
        if previous == signal.SIG_IGN:
            warn(f"{name} is ignored by this process (SIG_IGN), and stays so; signal.SIG_DFL before makes it count")
            return
        self._previous[number] = previous  # first: the signal may come at once
        signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived, and the last checkpoint is to be made now."""
        return self._signal is not None and not self._over

    def close(self) -> None:
        """Put back the handlers from before.  After a signal the process ends first, when no save is in flight.

        Raises:
            UsageError: after a signal, in a block of `layerwise()`, which it would wait for.
        """
        if self.requested:
            if self._in_flight.has_own_block:
                raise UsageError("close() in a block of layerwise() would wait for that block; call it after the block")
            self.finish()
        self.end()

    def end(self) -> None:
        """Put back the handlers from before, whatever has arrived.  May be called again, and by any thread."""
        self._over = True
        _active.discard(self)
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                with suppress(ValueError):  # not the main thread: `_handle` hands the signal on
                    signal.signal(number, previous)
        self._woken.put(None)

    def __repr__(self) -> str:
        names = ", ".join(signal.Signals(number).name for number in self._previous)
        deadline = "" if self._deadline_s is None else f", {self._deadline_s:g} s"
        arrived = "" if self._signal is None else f", {signal.Signals(self._signal).name} has arrived"
        return f"Preemption({names or 'no signal'}{deadline}{', closed' if self._over else arrived})"

    def before_save(self) -> None:
        """Called by `checkpoint()` first: warn, once, if the save before took longer than the deadline."""
        rate = self._rate()
        if rate is None or self._deadline_s is None or self._warned:
            return
        nbytes, taken_s = rate
        if taken_s > self._deadline_s:
            self._warned = True
            warn(_too_slow(nbytes, nbytes / taken_s, self._deadline_s))

    def after_save(self, save: Save) -> None:
        """Called by `checkpoint()` last, and at the end of a block of `layerwise()`.

        Ends the process if a signal has arrived, when no save is in flight.
        """
        last = [each for each in self._saves if each.measured() is not None][-1:]
        self._saves = [*last, *(each for each in self._saves if not each.done()), save]
        if self.requested and not self._in_flight.has_own_block:  # whose end comes after this
            self.finish()

    def finish(self) -> None:
        """End the process when no save in flight needs it any more.  Returns where another handler decides."""
        while not self._in_flight.wait(_SLICE_S):
            if {save.step for save in self._saves if save.outlives_trainer}.issuperset(self._in_flight.steps()):
                break  # a monitor makes them durable
        number = self._signal
        assert number is not None
        if self._over:  # another thread has saved at the same time
            return
        if threading.current_thread() is threading.main_thread():
            self._end_process(number)
        else:
            self._may_end = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler.  It interrupts any code of the main thread, so it takes no lock and writes nothing."""
        previous = self._previous[number]
        if self._over or os.getpid() != self._pid:
            if callable(previous):
                previous(number, frame)
            elif signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
                signal.raise_signal(number)
        elif self._may_end:
            self._end_process(number)
        else:
            if self._signal is None:
                self._signal = number
            self._woken.put((number, time.monotonic()))
            if callable(previous):
                try:
                    previous(number, frame)
                except BaseException as error:  # raised when the last checkpoint is durable
                    self._held = self._held or error

    def _end_process(self, number: int) -> None:
        """End the process as the signal would have ended it without us, or return."""
        is_ours = signal.getsignal(number) == self._handle
        held, previous = self._held, self._previous[number]
        self.end()
        if held is not None:
            raise held
        if is_ours and previous == signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # the default action loses what they hold
                with suppress(Exception):
                    stream.flush()
            signal.raise_signal(number)
            if os.getpid() == 1:  # the kernel spares the init process of a PID namespace, as of a container
                raise SystemExit(128 + number)

    def _report(self) -> None:
        """Its own thread: say what a signal has led to."""
        told: set[int] = set()
        while (woken := self._woken.get()) is not None:
            number, at = woken
            if number in told:  # timeout(1) sends one to the process, and one to its group
                continue
            name = signal.Signals(number).name
            with suppress(Exception):  # handlers of the log are the user's, and may raise
                if not told:
                    _log.warning(
                        "%s has arrived: the next checkpoint() is the last one, and then the process ends%s",
                        *(name, self._deadline_report(at)),
                    )
                else:
                    _log.warning("%s has arrived too, and changes nothing", name)
            told.add(number)

    def _deadline_report(self, at: float) -> str:
        """That the last checkpoint will be late, if it will; else nothing."""
        rate = self._rate()
        if rate is None or self._deadline_s is None:
            return ""
        nbytes, taken_s = rate
        left = sum(save.left_bytes() for save in self._saves if not save.done())
        is_late = (left + nbytes) * taken_s / nbytes > self._deadline_s - (time.monotonic() - at)
        return f"; {_too_slow(left + nbytes, nbytes / taken_s, self._deadline_s)}" if is_late else ""

    def _rate(self) -> tuple[int, float] | None:
        """`Save.measured` of the newest committed save, or None."""
        return next((rate for save in reversed(self._saves) if (rate := save.measured()) is not None), None)


def _too_slow(nbytes: int, bytes_per_second: float, deadline_s: float) -> str:
    return (
        f"the last checkpoint will likely not be durable in time: {nbytes} bytes at the measured "
        f"{bytes_per_second / 1e6:.1f} MB/s take {nbytes / bytes_per_second:.1f} s, and the deadline is {deadline_s:g} "
        "s after the signal; have the signal sent earlier, and save more often"
    )


def _checked(signals: object) -> list[int]:
    """The numbers of signals that a handler can be installed for."""
    every: Iterable[Any] = (
        signals if isinstance(signals, Iterable) and not isinstance(signals, str | bytes) else [signals]
    )
    numbers = []
    for given in every:
        try:
            number = signal.Signals[given] if isinstance(given, str) else signal.Signals(operator.index(given))
        except (KeyError, TypeError, ValueError):
            raise ArgumentError(
                f"signals has {given!r}, which is no signal of this host; pass signal.SIGTERM or 'SIGTERM', or a "
                "sequence of those"
            ) from None
        if number in (signal.SIGKILL, signal.SIGSTOP):
            raise ArgumentError(f"signals has {number.name}, which no process can handle")
        numbers.append(int(number))
    if not numbers:
        raise ArgumentError("signals is empty; name at least one, such as signal.SIGTERM")
    return list(dict.fromkeys(numbers))


def _restore_in_child() -> None:
    for preemption in list(_active):
        preemption.end()  # the only thread of a child is its main thread


os.register_at_fork(after_in_child=_restore_in_child)
