"""Engine: the facade.  Configuration, saving, restoring, close.

Theory of operation.  An Engine owns a `Store` (one directory, one native thread) and a few commit threads that sleep
in native code.  `checkpoint()` is `session.checkpoint`'s, and reading is `session.reading`'s; this file ties them
together and sees to it that nothing outlives `close`.

Steps go forward.  A save's step must be after every committed one, so that "the newest" is always the line of
training that goes on; `rollback()` takes later steps out of service first.  Steps that a restore has found
damaged are set aside by themselves when training comes past them again.

Rules: methods may be called from several threads, but one arena only from one at a time; a forked child gets
`ForkedError`; close drains, and so do leaving the context manager and the interpreter's exit.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections.abc import Mapping
from enum import Enum
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.errors import ArgumentError, ClosedError, LockedError, PlatformError, StorageError, UsageError, warn
from engine.io.backend import Probe, degradation, find
from engine.io.guard_probe import guard_degradation, probe_guard
from engine.monitor.client import MonitoredStore
from engine.monitor.listener import Listener
from engine.monitor.status import await_orphan
from engine.options import Backend, GuardName, Options, Tunables, check_range, with_tunables
from engine.session.checkpoint import Checkpointer
from engine.session.failures import Failures, OnError
from engine.session.gate import seconds
from engine.session.in_flight import InFlight
from engine.session.layerwise import Layerwise, LayerwiseSave
from engine.session.preemption import SIGNALS, Preemption, Signals
from engine.session.reading import Lent, Reading
from engine.session.request import FileContent, OnBusy, Request
from engine.session.save import Save, SaveStatus
from engine.session.snapshot import Snapshot, Snapshots
from engine.session.status import answer
from engine.session.workers import Workers
from engine.state.arena import Arena
from engine.store.directory import is_directory, path_of
from engine.store.filesystem import Filesystem
from engine.store.reader import check_step
from engine.store.retention import Retention
from engine.store.store import Store

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULTS = Options()


# A monitor that ends removes its socket a moment before it gives the directory back: some system calls lie between.
_ENDING_TRIES, _ENDING_S = 10, 0.2


class _Unset(Enum):
    """The default of `keep`, because None means to keep everything."""

    UNSET = "the rule that is stored with the run"


def _open_store(
    directory: str, options: Options, retention: Retention | None, filesystem: Filesystem
) -> Store | MonitoredStore:
    make = MonitoredStore if options.isolation == "process" else Store
    for _ in range(_ENDING_TRIES):
        try:
            return make(directory, options, retention, filesystem)
        except LockedError as locked:
            try:
                has_ended = await_orphan(directory)
            except PlatformError:  # it does not answer
                raise locked from None
            if not has_ended:
                raise
        time.sleep(_ENDING_S / _ENDING_TRIES)
    return make(directory, options, retention, filesystem)


class Engine(Reading):
    """Checkpoints of one directory.

    Args:
        directory: of the checkpoints; created if it does not exist.
        keep: the number of committed checkpoints to keep; None for all.  Short for
            ``retention=Retention(last=keep)``.
        retention: the rule that says which checkpoints are kept; stored with the run.  Without it and `keep` the stored
            rule is used; a new run keeps two.
        on_error: a function that is called with each Save that fails and its failure, on a commit thread; or
            ``"raise"``, for the next `checkpoint()`, `wait()` or `close()` to raise the failure of a save whose
            `result()` and `exception()` nobody has called.  None: they warn of it, once.
        options: the tunables; any of them may also be given by its own keyword.
        filesystem: the file operations; tests inject faults here.

    Raises:
        ArgumentError: a number is out of range.
        LockedError: another Engine has the directory.
        PlatformError: the requested backend does not work here; has the cause and the remedy.
        StorageError: the directory cannot be created, read or synced.
    """

    def __init__(
        self,
        directory: str | bytes | os.PathLike[str],
        *,
        keep: int | _Unset | None = _Unset.UNSET,
        retention: Retention | None = None,
        options: Options = DEFAULTS,
        filesystem: Filesystem | None = None,
        on_error: OnError = None,
        **tunables: Unpack[Tunables],
    ) -> None:
        retention = _rule(keep, retention)
        options = with_tunables("Engine", options, tunables, _KEYWORDS)
        self._failures = Failures(on_error)
        self._workers = Workers()
        self._store = _open_store(path_of(directory), options, retention, filesystem or Filesystem())
        try:
            self._workers.start(options.max_async)
            self._lent = Lent(self._store.reader, self._store.verifier)
            self._in_flight = InFlight(options.max_async)
            self._listener = listener = Listener(self._store.root, partial(answer, self._in_flight))
            self._snapshots = Snapshots(options.guard)
            self._checkpointer = Checkpointer(
                self._store, options, self._in_flight, self._workers, self._snapshots, self._failures
            )
            degraded = [degradation(self._store.probe), guard_degradation(self._snapshots.probe)]
            if any(degraded):
                warn("; ".join(filter(None, degraded)))  # which may raise, if the user wants it so
            self._closing = False
            self._preemption: Preemption | None = None
            # Closes an Engine that is collected, or still open at exit.  In a forked child it does nothing.
            self._closer = weakref.finalize(self, _shut_down, self._in_flight, self._workers, self._store, listener)
            if not isinstance(self._store, MonitoredStore):  # there the monitor answers
                listener.open()
        except BaseException:  # Ctrl-C too
            self._workers.close()
            self._store.close()
            raise

    # -- saving -----------------------------------------------------------------------------------------------

    def checkpoint(
        self,
        arena: Arena,
        step: int | None = None,
        *,
        extra: Any = None,
        chunk_count: int | None = None,
        chunk_bytes: int | None = None,
        snapshot: Snapshot = "auto",
        on_busy: OnBusy = "wait",
        metrics: Mapping[str, float] | None = None,
        tag: str | None = None,
        files: Mapping[str, FileContent] | None = None,
    ) -> Save:
        """Make an arena durable while training goes on.

        Blocks until a permit is free (see `on_busy`), and until a part of the arena is staged: nothing of it under
        the guard ``"cow"``, under the others what no fence protects (`Arena.unfenced`), and all of it with ``"eager"``.
        The rest happens in the background.

        Args:
            arena: the tensors to save.
            step: its number, after every committed step and every step in flight; None for the next one.
            extra: a tree of plain values and small tensors, copied now.
            chunk_count, chunk_bytes: how to cut the files into chunks (see `format.plan.chunk_size`).
            snapshot: ``"lazy"`` returns while staging goes on, ``"eager"`` when it has ended.  ``"auto"`` is lazy where
                the guard keeps likely writers from tearing the save: any adopted arena under ``"cow"``, one with an
                optimizer under ``"detect"``, one with an optimizer of torch's own under ``"fence"``.  ``"checked"``
                never commits a mixed checkpoint: without a guard it hashes the whole arena in the call, and fails the
                save if a block that is staged has another hash.
            on_busy: with `max_async` saves in flight ``"wait"`` for one to end, ``"raise"`` BusyError, or
                ``"skip"``: the Save returned has failed with BusyError and nothing was done.
            metrics: numbers by name, for listings and for ``Retention(best=...)``.
            tag: a label of at most 255 characters; a checkpoint with a tag is never retired, only deleted by `delete`.
            files: small files to store beside the tensors, such as a model's config.json: plain names to bytes, or to
                the path of a file that is read now; at most 64 MiB in all.

        Raises:
            ArenaError: a tensor of the arena cannot be stored, or a restore of it has failed half-way.
            UsageError: a signal handler that interrupts `checkpoint` calls it, or the arena has an open block of
                `layerwise`.
            ArgumentError, ExtraError, StepError, BusyError, ClosedError: see the messages.
            EngineError: an earlier save has failed (``on_error="raise"``); nothing was begun.
        """
        self._check_usable()
        self._failures.report()
        request = Request(step, extra, chunk_count, chunk_bytes, snapshot, on_busy, metrics, tag, files)
        save = self._checkpointer.begin(arena, self._before_save(request))
        self._after_save(save)
        return save

    def layerwise(
        self,
        arena: Arena,
        step: int | None = None,
        *,
        extra: Any = None,
        chunk_count: int | None = None,
        chunk_bytes: int | None = None,
        snapshot: Snapshot = "auto",
        on_busy: OnBusy = "wait",
        metrics: Mapping[str, float] | None = None,
        tag: str | None = None,
        files: Mapping[str, FileContent] | None = None,
    ) -> Layerwise:
        """Make an arena durable layer by layer, each as soon as it is final.

            with eng.layerwise(arena, step=n) as save:
                ...                              # the optimizer steps layers.3
                save.layer_ready("layers.3")     # from here on it is staged, beside what computes the others

        The result is one checkpoint like any other; it holds of each layer what it was at `layer_ready`, and of
        hyperparameters what they were at the end of the block.  If the block is left without every layer, the save
        fails and names them.  An exception in the block discards the save.

        Do not write to a layer again in the block, unless the guard is ``"cow"``.  With ``snapshot="eager"``,
        `layer_ready` returns when the blocks that it completed are staged.  To restore the arena in the block, to give
        it other tensors, or to close the Engine discards the save.  To save the arena in the block is refused.

        Args:
            arena, step, extra, chunk_count, chunk_bytes, snapshot, on_busy, metrics, tag, files: as `checkpoint`.
                Without the guard ``"cow"``, ``"auto"`` is lazy if all optimizers are torch's own.

        Raises as `checkpoint`, when the block is entered.
        """
        self._check_usable()
        request = Request(step, extra, chunk_count, chunk_bytes, snapshot, on_busy, metrics, tag, files)

        def begin(opened: list[LayerwiseSave]) -> LayerwiseSave:
            self._check_usable()
            self._failures.report()
            return self._checkpointer.begin_layerwise(arena, self._before_save(request), opened)

        def leave(save: LayerwiseSave) -> None:
            self._checkpointer.leave(arena, save)
            self._after_save(save)

        return Layerwise(begin, leave)

    def _before_save(self, request: Request) -> Request:
        """The request as a preemption has it: the last save waits for a permit."""
        preemption = self._preemption
        if preemption is None:
            return request
        preemption.before_save()
        return request.waiting() if preemption.requested else request

    def _after_save(self, save: Save) -> None:
        """End the process if this was the last save."""
        preemption = self._preemption
        if preemption is not None and not self._workers.is_current():  # which ends the saves, and must not wait
            preemption.after_save(save)

    def in_flight(self) -> tuple[SaveStatus, ...]:
        """The saves in flight at this moment, by step, and how far each chunk has come.  Does not block.

        Other processes see the same with ``engine.open(directory).in_flight()``.
        """
        self._check_usable()
        return tuple(save.status() for save in self._in_flight.saves())

    def wait(self, timeout: float | None = None) -> bool:
        """Block until every save that is in flight now has ended; False if `timeout` seconds passed first.

        A failed save raises from its own `result()`, and here only with ``on_error="raise"``.
        """
        self._check_usable()
        if self._workers.is_current():
            raise UsageError("wait() would wait for the very thread that calls it; call it from another")
        if self._in_flight.has_own_block:
            raise UsageError("wait() in a block of layerwise() would wait for that block; call it after the block")
        ended = self._in_flight.wait(seconds(timeout))
        self._failures.report()
        return ended

    def on_preemption(self, signals: Signals = SIGNALS, deadline_s: float | None = None) -> Preemption:
        """End the process after one last checkpoint when a signal arrives.

            preemption = eng.on_preemption(deadline_s=60)
            for step in range(start, last):
                train(step)
                if step % 100 == 0 or preemption.requested:
                    eng.checkpoint(arena, step)

        The first `checkpoint()` after the signal is the last one: it waits until every save in flight has ended, and
        then ends the process as the signal would have done.  So does the end of a block of `layerwise()`, and
        `close()` if no checkpoint came before it.
        Handlers from before are called at the signal.  See docs/preemption.md.

        Args:
            signals: which ones, by number or by name: `signal.SIGTERM`, ``"SIGTERM"``, or a sequence of those.
            deadline_s: seconds from the signal until the process is killed.  A warning says if a save takes longer.

        Raises:
            ArgumentError: a signal cannot be handled, or the deadline is no positive number.
            UsageError: this is not the main thread; another Engine has done so; a handler is not Python's.
        """
        self._check_usable()
        self._preemption = preemption = Preemption(signals, deadline_s, self._in_flight)
        # Or nobody would end the process after a signal.  At exit the saves are drained under the handlers.
        weakref.finalize(self, preemption.end).atexit = False
        return preemption

    def rollback(self, step: int) -> list[int]:
        """Retire every committed step after this one, to train on from it; returns the retired steps.

        Blocks until that is durable.

        Raises:
            NotFoundError: this step is not committed.
            StepError: a save is in flight.
            StorageError: it is refused, now or because an earlier sync of a directory failed.
        """
        self._check_usable()
        number = check_step(step)
        return self._in_flight.while_idle(lambda: self._store.catalog.retire_after(number))

    def delete(self, step: int) -> None:
        """Delete a committed checkpoint, even a tagged one, and free its room.  Blocks until that is durable.

        Raises:
            NotFoundError: the step is not committed.
            StepError: it is being read.
            StorageError: it is refused, now or because an earlier sync of a directory failed.
        """
        self._check_usable()
        self._store.catalog.delete(check_step(step))

    @property
    def retention(self) -> Retention:
        """The rule in effect."""
        return self._store.catalog.retention

    @property
    def backend(self) -> Backend:
        """How blocks are moved: ``"io_uring"``, ``"io_uring_plain"``, ``"threads"`` or ``"buffered"``."""
        return self._store.pipeline.backend

    @property
    def probe(self) -> Probe:
        """What was tried when the Engine was opened, and why a better backend or guard was not taken."""
        return self._store.probe._replace(guard=self._snapshots.probe)

    @property
    def guard(self) -> GuardName:
        """How the snapshots of adopted arenas are kept from tearing: ``"cow"``, ``"detect"`` or ``"fence"``."""
        return self._snapshots.probe.guard

    # -- ending -----------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return not self._closing and self._closer.alive

    def close(self) -> None:
        """Wait for every save in flight, stop the native thread, and release the directory.  Blocks.

        May be called again: after Ctrl-C the next call continues.  Warns of failed saves that nobody has asked about,
        or raises (see `on_error`), after everything is released.
        """
        self._close(may_raise=True)

    def _close(self, may_raise: bool) -> None:
        if self._workers.is_current():
            raise UsageError("close() would wait for the very thread that calls it; call it from another")
        self._closing = True
        _shut_down(self._in_flight, self._workers, self._store, self._listener)
        self._closer.detach()
        preemption = self._preemption
        if preemption is not None:
            if preemption.requested and may_raise:
                self._failures.report(may_raise=False)
                preemption.close()
            preemption.end()
        self._failures.report(may_raise)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(may_raise=error is None)  # or it would hide the error that ended the block

    def __repr__(self) -> str:
        if self._store.pipeline.is_forked:
            return f"Engine({self._store.root!r}, of another process)"
        if not self.is_open:
            return f"Engine({self._store.root!r}, closed)"
        saving = self._in_flight.steps()
        in_flight = f", steps in flight {saving}" if saving else ""
        return f"Engine({self._store.root!r}, {self.backend}, {self.guard}{in_flight})"

    def _lend(self) -> Lent:
        self._check_usable()
        return self._lent

    def _check_usable(self) -> None:
        self._store.pipeline.check_owner()
        if not self.is_open:
            raise ClosedError(f"the Engine of {self._store.root} has been closed; open a new one")


# Of an Engine, beside the tunables.
_KEYWORDS = tuple(Engine.__init__.__kwdefaults__ or ())


def _shut_down(in_flight: InFlight, workers: Workers, store: Store | MonitoredStore, listener: Listener) -> None:
    """Drain and release everything, in order.  Each part may be done already."""
    if store.pipeline.is_forked:
        return
    if workers.is_current():  # the collector runs on a commit thread, which cannot wait for itself
        threading.Thread(target=_shut_down, args=(in_flight, workers, store, listener)).start()
        return
    store.look()
    in_flight.close()
    in_flight.wait_for_others(store.look)  # or a call of theirs could come behind the end of the commit threads
    workers.close(store.look)
    listener.close()  # before the directory is given back, because it removes a name
    store.close()


def probe(directory: str | os.PathLike[str], *, options: Options = DEFAULTS, **tunables: Unpack[Tunables]) -> Probe:
    """Find out which backend and guard an Engine with these options would use, and why not better ones.

    Blocks while a block is written and read.  Takes no lock and leaves nothing behind.  It uses as many slots as
    such an Engine, so beside an open Engine a limit on locked memory may be too small for both.

    Raises:
        ArgumentError: a number is out of range.
        StorageError: no file can be made in the directory, or it does not exist.
    """
    options = with_tunables("engine.probe", options, tunables, ["options"])
    root, filesystem = os.path.realpath(path_of(directory)), Filesystem()
    if not is_directory(filesystem, root):
        raise StorageError(errno.ENOENT, "open", root, remedy="probe a directory that exists, such as its parent")
    found = find(root, filesystem, options.slot_count, options.block_bytes, options.staging_threads)
    return found._replace(guard=probe_guard("auto"))


def _rule(keep: int | _Unset | None, retention: Retention | None) -> Retention | None:
    """The rule given by these arguments, or None."""
    if retention is not None and not isinstance(retention, Retention):
        raise ArgumentError(f"retention is {retention!r}; it must be an engine.Retention, or None")
    if isinstance(keep, _Unset):
        return retention
    if retention is not None:
        raise ArgumentError("keep and retention were both given; keep=N is short for retention=Retention(last=N)")
    return Retention(last=None if keep is None else check_range("keep", keep, 1, None))
