"""Engine: configuration, what is in flight, backpressure, close.

Theory of operation.  An Engine owns one directory (through its lock), one native pipeline (one thread, one ring or
what stands in for it, a fixed set of slots) and a few commit threads that sleep in native code.  `checkpoint()` does
in the caller's time only what must be done there: see that the arena is what it was, encode `extra`, hand over the
job, and wait for what must be staged before the caller goes on.  The rest is `writer`'s and `reader`'s.

Steps go forward.  A save's step must be after every committed one, so that "the newest" is always the line of
training that goes on; `rollback()` takes later steps out of service first.  Steps that a restore has found
damaged are set aside by themselves when training comes past them again.

Rules: methods may be called from several threads, but one arena only from one at a time; a forked child gets
`ForkedError`; close drains, and so do leaving the context manager and the interpreter's exit.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

from engine.errors import (
    ArenaError,
    ArgumentError,
    BusyError,
    ClosedError,
    EngineWarning,
    PlatformError,
    StepError,
    UsageError,
)
from engine.format.checks import BLOCK_BYTES_MAX
from engine.format.layout import Layout
from engine.format.manifest import STEP_MAX
from engine.format.plan import ALIGNMENT, chunk_size
from engine.format.values import encode as encode_extra
from engine.format.values import encode_options
from engine.io.backend import Choice, Probe, degradation, find, open_pipeline
from engine.io.job import Milestone
from engine.io.packing import Packed
from engine.io.pipeline import Backend, Pipeline
from engine.session.in_flight import InFlight, Ticket
from engine.session.workers import Workers, is_worker
from engine.state.arena import Arena
from engine.store.catalog import Catalog
from engine.store.filesystem import Filesystem
from engine.store.reader import Damage, Reader, RestoreInfo, Select, Tensors
from engine.store.writer import PackedPlan, Save, Writer, pack_arena_sources, pack_plan

Snapshot = Literal["eager", "lazy", "checked"]
OnBusy = Literal["wait", "skip", "raise"]

# Half of the pipeline's room for jobs (ENG_JOBS_MAX), so that restores always find a place.
MAX_ASYNC_MAX = 32

# Far beyond the depth that any drive gains from, and within what the kernel takes: 32,768 entries of a ring and
# 16,384 registered buffers (IORING_MAX_ENTRIES and IORING_MAX_REG_BUFFERS in io_uring/).
SLOT_COUNT_MAX = 1024


@dataclass(slots=True)
class _Packs:
    """What is kept of an arena between saves: its plans by chunk size, and its sources as they last lay."""

    layout: Layout
    plans: dict[int, PackedPlan] = field(default_factory=dict)
    places: object = None
    sources: Packed | None = None


class Engine:
    """Checkpoints of one directory.

    Args:
        directory: where; created if it is not there.
        keep: how many committed checkpoints to leave; None for all.
        max_async: how many saves may be in flight, 1 to 32.
        staging_bytes: memory for staging slots, allocated now and pinned if the locked-memory limit allows; at most
            1024 slots are made of it.
        block_bytes: the size of one write or read, a multiple of 4096; a slot holds one.
        backend: how blocks are moved (see `engine.io.backend`).  ``"auto"`` takes the best that works in the directory,
            with a warning if that is not ``"io_uring"``; any other is insisted on.
        filesystem: how to reach the directory; tests inject faults here.

    Raises:
        ArgumentError: a number is out of range.
        LockedError: another Engine has the directory.
        PlatformError: the backend insisted on does not work here; says why, and what would help.
        StorageError: the directory cannot be made, read or synced.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 2,
        max_async: int = 2,
        staging_bytes: int = 256 << 20,
        block_bytes: int = 4 << 20,
        backend: Choice = "auto",
        filesystem: Filesystem | None = None,
    ) -> None:
        if keep is not None:
            _check_range("keep", keep, 1, None)
        _check_range("max_async", max_async, 1, MAX_ASYNC_MAX)
        slot_count = _slot_count(staging_bytes, block_bytes)
        _check_choice("backend", backend, Choice)
        self._block_bytes = block_bytes
        with ExitStack() as undo:
            self._catalog = Catalog(os.fspath(directory), filesystem or Filesystem(), spare_max=max_async)
            undo.callback(self._catalog.close)
            self._pipeline, self._probe = open_pipeline(
                self._catalog.root, self._catalog.filesystem, backend, slot_count, block_bytes
            )
            undo.callback(self._pipeline.close)
            self._workers = _start_workers(max_async)
            undo.callback(self._workers.close)
            degraded = degradation(self._probe)
            if degraded is not None:
                warnings.warn(degraded, EngineWarning, stacklevel=2)  # which may raise, if the user wants it so
            undo.pop_all()
        self._writer = Writer(self._catalog, self._pipeline, keep)
        self._reader = Reader(self._catalog, self._pipeline)
        self._in_flight = InFlight(max_async)
        self._closing = False
        self._packs: weakref.WeakKeyDictionary[Arena, _Packs] = weakref.WeakKeyDictionary()
        # For an Engine that nobody has closed: at its collection, or at exit.  In a forked child it does nothing.
        self._closer = weakref.finalize(self, _shut_down, self._in_flight, self._workers, self._pipeline, self._catalog)

    # -- saving -----------------------------------------------------------------------------------------------

    def checkpoint(
        self,
        arena: Arena,
        step: int | None = None,
        *,
        extra: Any = None,
        chunk_count: int | None = None,
        chunk_bytes: int | None = None,
        snapshot: Snapshot | None = None,
        on_busy: OnBusy = "wait",
    ) -> Save:
        """Make an arena durable while training goes on.

        Blocks until a place is free (see `on_busy`), and until what may change next has been staged: with
        ``"lazy"`` what no fence protects (`Arena.unfenced`), with ``"eager"`` everything.  Everything else happens in
        the background.

        Args:
            arena: what to save.
            step: its number, after every committed step; None for the next one.
            extra: a tree of plain values and small tensors, copied now.
            chunk_count, chunk_bytes: how to cut the files into chunks (see `engine.format.plan.chunk_size`).
            snapshot: ``"lazy"`` returns while staging goes on, and is the default for an arena adopted with its
                optimizer, whose step it holds back; ``"eager"`` is the default for all others.  ``"checked"`` is
                that default, and hashes the arena a second time: a writer in between fails the save.
            on_busy: with `max_async` saves in flight ``"wait"`` for one to end, ``"raise"`` BusyError, or
                ``"skip"``: the Save returned has failed with BusyError and nothing was done.

        Raises:
            ArenaError: a tensor of the arena cannot be stored, or a restore of it has failed half-way.
            ArgumentError, ExtraError, StepError, BusyError, ClosedError: see the messages.
        """
        began_ns = time.monotonic_ns()
        self._check_usable()
        _check_options(step, chunk_count, chunk_bytes, snapshot, on_busy)
        if arena.torn:
            raise ArenaError("a restore of this arena failed half-way; restore it whole before saving it")
        ticket = Ticket()
        save: Save | None = None
        try:
            if not self._in_flight.admit(ticket, wait=on_busy == "wait"):
                return self._refuse(step, on_busy)
            arena.refresh()
            options = arena.options()
            meta = {
                "aliases": dict(arena.aliases),
                "optimizers": {"": encode_options(options)} if options else {},
                "extra": encode_extra(extra),
            }
            packed, sources = self._pack(arena, chunk_count, chunk_bytes)
            taken = self._take_step(ticket, step)
            save = self._writer.prepare(arena, packed, sources, taken, checked=snapshot == "checked")
            arena.hold(save.wait_staged)
            self._writer.start(save)
            self._workers.submit(functools.partial(_finish, self._in_flight, ticket, self._writer, save, meta))
            lazy = snapshot == "lazy" or (snapshot != "eager" and arena.fenced)
            if not lazy:
                save.wait_staged()
            elif packed.urgent_count:
                save.wait_milestone(Milestone.URGENT)
        except BaseException:
            self._take_back(ticket, save)
            raise
        save.mark_held(began_ns)
        return save

    def rollback(self, step: int) -> list[int]:
        """Take every committed step after this one out of service, to train on from it; returns them.

        Blocks until that is durable.

        Raises:
            NotFoundError: this step is not committed.
            StepError: a save is in flight.
        """
        self._check_usable()
        return self._in_flight.while_idle(lambda: self._catalog.retire_after(step))

    # -- restoring --------------------------------------------------------------------------------------------

    def restore(self, arena: Arena, step: int | None = None, *, select: Select = None) -> RestoreInfo:
        """Fill an arena from a checkpoint.  Blocks until every byte has been read and verified.

        Args:
            arena: with the same names, shapes and dtypes as were saved; any chunking.
            step: which; None for the newest that verifies, passing over damaged ones with a warning.
            select: patterns of layers or names; only those tensors are read and changed.  Hyperparameters, and
                what else the optimizer keeps besides tensors, stay as they are.

        Raises:
            MismatchError: the arena does not fit the checkpoint; nothing was changed.
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: the checkpoint asked for, or every one, is damaged or unreadable.  The
                arena may hold a part of it, and will not be saved until a whole restore succeeds.
        """
        self._check_usable()
        return self._reader.restore(arena, step, select)

    def load(self, step: int | None = None, *, select: Select = None) -> Tensors:
        """Read a checkpoint's tensors into new memory, by name, tied names included.  Blocks.

        Raises as `restore`; ArgumentError if `select` matches nothing.
        """
        self._check_usable()
        return self._reader.load(step, select)[0]

    def verify(self, step: int | None = None) -> tuple[Damage, ...]:
        """Read every block of a checkpoint, into no tensor, and return all that is damaged: nothing if it is sound.

        Blocks.

        Args:
            step: which; None for the newest.

        Raises:
            NotFoundError: there is no such checkpoint.
            StorageError: it could not be read, for a reason that says nothing of it, such as too many open files.
        """
        self._check_usable()
        return self._reader.verify(step)

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        self._check_usable()
        return self._catalog.steps()

    @property
    def backend(self) -> Backend:
        """How blocks are moved: ``"io_uring"``, ``"io_uring_plain"``, ``"threads"`` or ``"buffered"``."""
        return self._pipeline.backend

    @property
    def probe(self) -> Probe:
        """What was tried when the Engine was opened, and why a better backend was not taken."""
        return self._probe

    # -- ending -----------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return not self._closing and self._closer.alive

    def close(self) -> None:
        """See every save in flight to its end, stop the native thread, give the directory back.  Blocks.

        May be called again: after Ctrl-C in the middle of it, that goes on where it was.
        """
        if is_worker():
            raise UsageError("close() would wait for the very thread that calls it; call it from another")
        self._closing = True
        _shut_down(self._in_flight, self._workers, self._pipeline, self._catalog)
        self._closer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        return f"Engine({self._catalog.root!r}, {state}, {len(self._catalog.steps())} checkpoints)"

    # -- how --------------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        self._pipeline.check_owner()
        if not self.is_open:
            raise ClosedError(f"the Engine of {self._catalog.root} has been closed; open a new one")

    def _take_back(self, ticket: Ticket, save: Save | None) -> None:
        """After Ctrl-C or a failure in the middle of `checkpoint`: what has begun must leave the arena alone.

        A save that was handed over is its commit thread's, and goes on if all is staged: it holds what it should.
        """
        if not self._in_flight.claim(ticket):
            assert save is not None
            self._writer.interrupt(save)
            return
        try:
            if save is not None:
                self._writer.abandon(save)
        finally:
            self._in_flight.withdraw(ticket)

    def _refuse(self, step: int | None, on_busy: OnBusy) -> Save:
        saving = self._in_flight.steps()
        busy = BusyError(f"steps {saving} are in flight; wait for one, or raise max_async")
        if on_busy == "raise":
            raise busy
        return Save.refused(self._in_flight.next_step(self._catalog.steps()) if step is None else step, busy)

    def _take_step(self, ticket: Ticket, step: int | None) -> int:
        """Reserve a step, and make way for it where a restore has found what was there damaged."""
        committed, damaged = self._catalog.steps, self._reader.damaged
        if step is None:
            taken = self._in_flight.reserve(ticket, None, committed)
            if taken > STEP_MAX:
                raise StepError(f"step {taken - 1} is the last that there can be; roll back to an earlier one")
        else:
            taken = self._in_flight.reserve(ticket, step, lambda: [s for s in committed() if s not in damaged])
        # Only these: a later step may be committed at this moment by a save that was in flight.
        for passed in [s for s in committed() if s >= taken and s in damaged]:
            aside = self._catalog.set_aside(passed)
            damaged.discard(passed)
            warnings.warn(f"step {passed} is damaged and was renamed to {aside}", EngineWarning, stacklevel=3)
        damaged.discard(taken)  # from here on the number is the new save's
        return taken

    def _pack(self, arena: Arena, chunk_count: int | None, chunk_bytes: int | None) -> tuple[PackedPlan, Packed]:
        """The arena's plan and sources, packed: once per layout and chunk size, and once per move of its tensors."""
        packs = self._packs.get(arena)
        if packs is None or packs.layout is not arena.layout:
            packs = self._packs[arena] = _Packs(arena.layout)
        if packs.sources is None or packs.places is not arena.sources:
            packs.places, packs.sources = arena.sources, pack_arena_sources(arena)
        size = chunk_size(arena.layout, chunk_count, chunk_bytes)
        if size not in packs.plans:
            packs.plans[size] = pack_plan(arena, self._block_bytes, size)
        return packs.plans[size], packs.sources


def _finish(in_flight: InFlight, ticket: Ticket, writer: Writer, save: Save, meta: Mapping[str, Any]) -> None:
    """What a commit thread runs.  Not a method: a save in flight must not keep an Engine alive that its owner has
    dropped, or the Engine would be closed on the very thread that its closing waits for."""
    if in_flight.claim(ticket):
        writer.finish(save, meta, functools.partial(in_flight.withdraw, ticket))


def _shut_down(in_flight: InFlight, workers: Workers, pipeline: Pipeline, catalog: Catalog) -> None:
    """Drain and give back, in the order of use.  Each part may be done already."""
    if pipeline.is_forked:
        return
    if is_worker():  # the collector ran there, and a thread cannot wait for itself
        threading.Thread(target=_shut_down, args=(in_flight, workers, pipeline, catalog)).start()
        return
    in_flight.close()
    workers.close()
    pipeline.close()
    catalog.close()


def probe(directory: str | os.PathLike[str], *, staging_bytes: int = 256 << 20, block_bytes: int = 4 << 20) -> Probe:
    """Find out which backend an Engine of this configuration would use in a directory, and why not a better one.

    Blocks while a block is written and read.  Takes no lock and leaves nothing behind.  For that time it has the slots
    of such an Engine: beside another one a limit on locked memory may not be enough for both.

    Raises:
        ArgumentError: a number is out of range.
        StorageError: no file can be made in the directory, for instance because it is not there.
    """
    return find(os.path.realpath(directory), Filesystem(), _slot_count(staging_bytes, block_bytes), block_bytes)


def _slot_count(staging_bytes: int, block_bytes: int) -> int:
    """How many slots an Engine has.

    Raises:
        ArgumentError: a number is out of range.
    """
    _check_range("block_bytes", block_bytes, ALIGNMENT, BLOCK_BYTES_MAX)
    _check_range("staging_bytes", staging_bytes, 2 * block_bytes, None)
    if block_bytes % ALIGNMENT:
        raise ArgumentError(f"block_bytes is {block_bytes}; it must be a multiple of {ALIGNMENT}")
    return min(staging_bytes // block_bytes, SLOT_COUNT_MAX)


def _start_workers(count: int) -> Workers:
    try:
        return Workers(count)
    except RuntimeError as error:  # what threading makes of pthread_create(3) and EAGAIN
        cause = f"{count} commit threads could not be started: {error}"
        raise PlatformError(cause, "raise the limit on threads (ulimit -u, or pids.max of the cgroup)") from None


def _check_options(
    step: int | None, chunk_count: int | None, chunk_bytes: int | None, snapshot: str | None, on_busy: str
) -> None:
    """What `checkpoint` was told; what it was not told costs nothing."""
    if step is not None:
        _check_range("step", step, 0, STEP_MAX)
    if chunk_count is not None:
        _check_range("chunk_count", chunk_count, 1, None)
    if chunk_bytes is not None:
        _check_range("chunk_bytes", chunk_bytes, 1, None)
    if snapshot is not None:
        _check_choice("snapshot", snapshot, Snapshot)
    _check_choice("on_busy", on_busy, OnBusy)


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name} is {value!r}; it must be an integer")
    if value < low or (high is not None and value > high):
        raise ArgumentError(f"{name} is {value}; it must be at least {low}" + (f" and at most {high}" if high else ""))


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices.__args__:
        raise ArgumentError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices.__args__))}")
