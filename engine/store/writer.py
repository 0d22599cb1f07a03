"""Writer: one save, from the arena to a committed checkpoint.

Theory of operation.  A save has two halves.  `Writer.start` runs in the caller's `checkpoint()`: it hands the
native pipeline a job over a plan packed once per arena, and staging starts at once.  `Writer.finish` runs on one
of the engine's commit threads, which sleep in native code: it makes the files while staging is under way, gives
them to the job, waits for the last completion, and commits.  No Python thread touches a byte of the arena.

A `Save` is a Future.  Its chunks' status is read live from memory that the native thread writes: a chunk is as
far as the least of its blocks.  Whatever fails, the job is drained before its descriptors are closed, what it
wrote is deleted, the failure is logged once, and `result()` raises it; training goes on.

Called by `engine` only.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from engine.errors import BusyError, StorageError, TornSnapshot
from engine.format.layout import Layout, align_up
from engine.format.manifest import (
    FORMAT,
    READER,
    VERSION,
    FileRecord,
    Manifest,
    Rows,
    affected,
    chunk_layers,
    chunk_records,
    encode,
    segment_records,
)
from engine.format.plan import ALIGNMENT, Plan, Source, block_rows, extent_columns, make_plan
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job, Milestone
from engine.io.packing import Packed, address_of, pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline
from engine.state.arena import Arena
from engine.store.catalog import Catalog
from engine.store.commit import WrittenFile, commit

_log = logging.getLogger("engine")

# How long to sleep between looks for a save's end: a save takes hundreds of times as long.
_PAUSE_S = 0.0005


class CheckpointInfo(NamedTuple):
    """A committed checkpoint.  `nbytes` counts its data files."""

    step: int
    checkpoint_id: str
    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ChunkStatus:
    """One chunk of a save: its place, and ``pending``, ``staged``, ``written``, ``durable`` or ``failed``."""

    file: str
    index: int
    offset: int
    nbytes: int
    layers: tuple[str, ...]
    status: str


@dataclass(slots=True)
class PackedPlan:
    """A plan with all that every save of the same arena has in common, ready for the pipeline.

    The layers of its chunks are made when they are first asked for, on a commit thread: in no caller's time, but of one
    who asks for the chunks of a first save before.  Should two ask at once, each makes the same.
    """

    plan: Plan
    layout: Layout
    extents: Packed
    blocks: Packed
    order: Packed
    urgent_count: int
    rows: Rows
    _layers: tuple[tuple[str, ...], ...] | None = None

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """For each chunk, the layers that it holds a part of."""
        if self._layers is None:
            self._layers = chunk_layers(self.plan, self.layout)
        return self._layers


def pack_plan(arena: Arena, block_bytes: int, chunk_bytes: int) -> PackedPlan:
    """Plan an arena's files and pack the plan.  Time and memory in proportion to the number of tensors."""
    layout = arena.layout
    plan = make_plan(layout, arena.runs, block_bytes, chunk_bytes)
    urgent = _urgent_blocks(plan, layout, arena.unfenced)
    order = sorted(range(len(plan.blocks)), key=lambda block: block not in urgent)
    return PackedPlan(
        plan=plan,
        layout=layout,
        extents=pack_extents(*extent_columns(plan)),
        blocks=pack_blocks(block_rows(plan.blocks)),
        order=pack_order(order),
        urgent_count=len(urgent),
        rows=arena.rows,
    )


def pack_arena_sources(arena: Arena) -> Packed:
    """A plan's sources as they lie now: the headers, which the layout keeps alive, then the arena's own."""
    headers = [Source(address_of(file.header), 1, (), ()) for file in arena.layout.files]
    return pack_sources([*headers, *arena.sources])


def _urgent_blocks(plan: Plan, layout: Layout, unfenced: Collection[str]) -> set[int]:
    """The blocks that hold a part of what no fence protects: that may change next, so they are staged first."""
    if not unfenced:
        return set()
    stored = (s for s in layout.segments if s.nbytes and s.name in unfenced)
    ranges = [(s.file_index, s.file_offset, s.file_offset + s.nbytes) for s in stored]
    urgent = set()
    cursor = 0
    for index, block in enumerate(plan.blocks):
        start, end = (block.file_index, block.file_offset), (block.file_index, block.file_offset + block.nbytes)
        while cursor < len(ranges) and (ranges[cursor][0], ranges[cursor][2]) <= start:
            cursor += 1
        if cursor < len(ranges) and ranges[cursor][:2] < end:
            urgent.add(index)
    return urgent


class Save(Future[CheckpointInfo]):
    """A checkpoint in flight.

    `result()` blocks until the checkpoint is durable and committed, and raises what went wrong otherwise.  A
    Save cannot be cancelled.  Its methods may be called from any thread.
    """

    def __init__(self, step: int) -> None:
        """Not for callers: `Engine.checkpoint` makes Saves."""
        super().__init__()
        self._ended = False
        self.set_running_or_notify_cancel()
        self.step = step
        self.checkpoint_id = secrets.token_hex(16)
        self._packed: PackedPlan | None = None
        self._job: Job | None = None
        self._pipeline: Pipeline | None = None
        self._began_ns = time.monotonic_ns()
        self._held_ns = 0
        self._durable_ns = 0

    @classmethod
    def refused(cls, step: int, error: BusyError) -> Save:
        """A save that was never begun."""
        save = cls(step)
        save.set_exception(error)
        return save

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Block until the arena may change again, or the save has failed; False if `timeout` seconds passed."""
        return self.wait_milestone(Milestone.STAGED, timeout)

    def chunks(self) -> list[ChunkStatus]:
        """Every chunk and how far it has come, at this moment.  Does not block."""
        if self._packed is None or self._job is None:
            return []
        plan = self._packed.plan
        failed = self.done() and self.exception() is not None
        durable = self.done() and not failed
        states = self._job.states()
        statuses = []
        for chunk, layers, (start, end) in zip(
            plan.chunks, self._packed.layers, pairwise(plan.block_starts), strict=True
        ):
            status = "failed" if failed else "durable" if durable else _least(states[start:end])
            name = plan.files[chunk.file_index].name
            statuses.append(ChunkStatus(name, chunk.index, chunk.offset, chunk.nbytes, layers, status))
        return statuses

    def stats(self) -> dict[str, int]:
        """What the save took, as far as it has come; times in ns.

        ``held_ns``: inside `checkpoint()`.  ``staged_ns``: from the call until the arena could change again.
        ``written_ns``: from the call until the last block was written.  ``durable_ns``: from the call until committed.
        ``copying_ns``: of the native thread, on copying and hashing.
        ``io_bytes``, ``retry_count``: bytes written, operations tried again.
        """
        if self._job is None:
            return {}
        counters = self._job.counters
        return {
            "held_ns": self._held_ns,
            "staged_ns": max(0, counters["staged_ns"] - self._began_ns),
            "written_ns": max(0, counters["done_ns"] - self._began_ns),
            "durable_ns": self._durable_ns,
            "copying_ns": counters["copying_ns"],
            "io_bytes": counters["io_bytes"],
            "retry_count": counters["retry_count"],
        }

    def mark_held(self, began_ns: int) -> None:
        """Called once, as `checkpoint()` returns: it began then, on the clock of time.monotonic_ns()."""
        self._began_ns, self._held_ns = began_ns, time.monotonic_ns() - began_ns

    def wait_milestone(self, milestone: Milestone, timeout: float | None = None) -> bool:
        """Block until the native job has come so far, or has failed; False if `timeout` seconds passed."""
        # Not done(): its lock is taken in Python, where Ctrl-C would leave it taken for ever.
        if self._pipeline is None or self._job is None or self._job.reached(milestone):
            return True
        if self._pipeline.is_forked:
            return True  # what this process sees of the arena is its own copy, which nobody reads
        return self._pipeline.wait(self._job, milestone, None if timeout is None else _nanoseconds(timeout))

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """As `Future.result`; raises ForkedError in a forked child, to which no result ever comes."""
        self._check_owner()
        self._await_end(timeout)
        return super().result(None if self._ended else 0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`, and as `result`."""
        self._check_owner()
        self._await_end(timeout)
        return super().exception(None if self._ended else 0)

    def set_result(self, result: CheckpointInfo) -> None:
        """Called by the commit thread."""
        self._ended = True
        super().set_result(result)

    def set_exception(self, exception: BaseException | None) -> None:
        """Called by whoever ends the save."""
        self._ended = True
        super().set_exception(exception)

    def _await_end(self, timeout: float | None) -> None:
        """Wait outside the Future's lock, which the commit thread needs: it is waited for in Python, where Ctrl-C could
        leave it taken for ever."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ended and (end is None or time.monotonic() < end):
            time.sleep(_PAUSE_S)

    @property
    def plan(self) -> Plan:
        """How the arena was cut.  Not of a save that was refused."""
        assert self._packed is not None
        return self._packed.plan

    def _check_owner(self) -> None:
        if self._pipeline is not None and self._pipeline.is_forked and not self.done():
            self._pipeline.check_owner()


def _nanoseconds(seconds: float) -> int:
    """A timeout as the pipeline takes it: none of it if negative, and at most some centuries."""
    return int(min(max(seconds, 0.0), 1e9) * 1e9)


def _least(states: bytes) -> str:
    """The status of a chunk whose blocks are in these states."""
    if BlockState.FAILED in states:
        return "failed"
    return BlockState(min(states)).name.lower()


class Writer:
    """Runs saves: `prepare` and `start` in the caller, `finish` on a commit thread.

    Args:
        catalog: the directory.
        pipeline: the native thread.
        keep: how many committed checkpoints to leave, or None for all.
    """

    def __init__(self, catalog: Catalog, pipeline: Pipeline, keep: int | None) -> None:
        self._catalog = catalog
        self._pipeline = pipeline
        self._keep = keep

    def prepare(self, arena: Arena, packed: PackedPlan, sources: Packed, step: int, checked: bool) -> Save:
        """Make a save that `start` will begin.  Nothing has happened yet."""
        save = Save(step)
        save._packed, save._pipeline = packed, self._pipeline
        save._job = Job(
            Direction.WRITE,
            sources,
            packed.extents,
            packed.blocks,
            packed.order,
            len(packed.plan.files),
            urgent_count=packed.urgent_count,
            checked=checked,
            owners=(arena.memory, packed, sources),
        )
        return save

    def start(self, save: Save) -> None:
        """Begin staging.  Returns at once."""
        assert save._job is not None
        self._pipeline.submit(save._job)

    def interrupt(self, save: Save) -> None:
        """Have a save fail that is still reading the arena.  Blocks until it has left the arena alone."""
        assert save._job is not None
        if not save._job.reached(Milestone.STAGED):
            self._pipeline.abort(save._job, errno.ECANCELED)
            self._pipeline.wait(save._job, Milestone.DONE)

    def abandon(self, save: Save) -> None:
        """End a prepared or started save that no commit thread will finish.  Blocks as `interrupt`."""
        assert save._job is not None
        self._pipeline.abort(save._job, errno.ECANCELED)
        self._pipeline.wait(save._job, Milestone.DONE)
        save.set_exception(StorageError(errno.ECANCELED, "write", self._catalog.partial_path(save.step)))

    def finish(self, save: Save, meta: Mapping[str, Any], done: Callable[[], None]) -> None:
        """See a save through to its commit or its failure; resolves the Future and never raises.

        Args:
            save: started.
            meta: ``aliases``, ``optimizers`` and ``extra`` of the manifest.
            done: called before the Future resolves, so that who waits for it finds the place free.
        """
        try:
            path = self._write_and_commit(save, meta)
        except BaseException as error:  # whatever it is belongs to the Future, not to this thread
            with suppress(Exception):
                self._catalog.discard(save.step)
            with suppress(Exception):  # handlers are the user's, and may raise
                _log.error("the save of step %d failed: %s", save.step, error)
            done()
            save.set_exception(error)
            return
        save._durable_ns = time.monotonic_ns() - save._began_ns
        with suppress(Exception):
            self._retire()
        done()
        nbytes = sum(file.nbytes for file in save.plan.files)
        save.set_result(CheckpointInfo(save.step, save.checkpoint_id, path, nbytes))

    def _write_and_commit(self, save: Save, meta: Mapping[str, Any]) -> str:
        job, packed = save._job, save._packed
        assert job is not None and packed is not None
        files: list[WrittenFile] = []
        try:
            try:
                self._make_files(save.step, packed.plan, files)
                self._pipeline.attach(job, [file.descriptor for file in files])
                self._pipeline.wait(job, Milestone.STAGED)
                _ = packed.layers  # made now: the caller has been let go, and the device writes
            except BaseException as error:
                self._pipeline.abort(job, getattr(error, "errno", None) or errno.ECANCELED)
                raise
            finally:
                self._pipeline.wait(job, Milestone.DONE)
            if job.failure is not None:
                raise _explain(job.failure, packed, files, self._catalog.partial_path(save.step))
            return commit(self._catalog, save.step, files, encode(self._manifest(save, meta), packed.rows))
        finally:
            for file in files:
                self._catalog.filesystem.close(file.descriptor)

    def _make_files(self, step: int, plan: Plan, files: list[WrittenFile]) -> None:
        filesystem = self._catalog.filesystem
        self._catalog.check_room(sum(align_up(file.nbytes, ALIGNMENT) for file in plan.files))
        partial = self._catalog.begin(step, [file.name for file in plan.files])
        for file in plan.files:
            path = os.path.join(partial, file.name)
            descriptor = filesystem.open_for_blocks(path, write=True, direct=self._pipeline.direct)
            files.append(WrittenFile(descriptor, path, file.nbytes))
            filesystem.allocate(files[-1].descriptor, align_up(file.nbytes, ALIGNMENT), path)

    def _manifest(self, save: Save, meta: Mapping[str, Any]) -> Manifest:
        job, packed = save._job, save._packed
        assert job is not None and packed is not None
        assert set(job.states()) == {BlockState.WRITTEN}, "committing a save with unwritten blocks"
        return Manifest(
            format=FORMAT,
            version=VERSION,
            min_reader=READER,
            step=save.step,
            checkpoint_id=save.checkpoint_id,
            created_ns=time.time_ns(),
            block_bytes=packed.plan.block_bytes,
            files=tuple(FileRecord(*file) for file in packed.plan.files),
            chunks=chunk_records(packed.plan, packed.layers, job.checksums()),
            segments=(),  # `encode` is given their rows
            **meta,
        )

    def _retire(self) -> None:
        """After the commit: what goes wrong here costs disk space, not the checkpoint."""
        if self._keep is None:
            return
        try:
            self._catalog.retire(self._keep)
        except Exception as error:  # the checkpoint is committed, and its Future must be told so
            _log.warning("old checkpoints could not be retired, and stay: %s", error)


def _explain(failure: Failure, packed: PackedPlan, files: Sequence[WrittenFile], partial: str) -> Exception:
    """The native failure as the error that says what to do about it; `partial` is where the files lie."""
    block = None if failure.block is None else packed.plan.blocks[failure.block]
    path = files[block.file_index].path if block is not None and files else partial
    offset = None if block is None else block.file_offset
    if failure.kind == FailureKind.TORN and block is not None:
        names = affected(segment_records(packed.layout), block.file_index, block.file_offset, block.nbytes)
        return TornSnapshot(
            f"a writer changed {names} while the arena was being staged; let nothing write to it before wait_staged() "
            "returns"
        )
    if failure.kind == FailureKind.SHORT:
        return StorageError(errno.EIO, "write", path, offset)
    assert failure.kind in (FailureKind.IO, FailureKind.ABORTED), failure
    return StorageError(failure.errno, "write", path, offset)
