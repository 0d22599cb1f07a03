"""Writer: one save, from memory to a committed checkpoint.

Theory of operation.  The content of a checkpoint is gathered once into a `Content` and handed down.  `Writer.start`
hands the native pipeline a job over it, and staging starts at once.  `Writer.finish` runs on a commit thread.  While
staging is under way, it has the files made by what commits.  It gives them to the job, waits for the last completion,
and has the save committed.  No Python thread touches a byte of the sources.

After a failure at any point the job is drained, the files are deleted, and the error is raised.

Rules: no torch.  The directory is reached through `committer.Commits` alone, which may be in another process.  Sources
are addresses, and `Content.owners` keeps their memory alive.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from engine.errors import ClosedError, EngineError, PlatformError, StorageError, TornSnapshot
from engine.format.handover import Spans
from engine.format.layout import INDEX_NAME, Layout, model_index
from engine.format.manifest import Rows, affected, chunk_layers, listed, segment_records
from engine.format.plan import Extents, Plan, Source, block_rows, extent_columns, make_plan
from engine.format.values import Json
from engine.io.guard import Guard
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job, JobMemory, Milestone, contradiction, least
from engine.io.packing import Packed, address_of, pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline
from engine.store.committer import Commits, SaveRecord
from engine.store.info import CheckpointInfo


@dataclass(slots=True)
class PackedPlan:
    """A plan, packed for the pipeline: everything that all saves of one layout have in common.

    The layers of its chunks are computed at first use, on a commit thread, so not in a caller's time.  If two threads
    compute them at once, both get the same result.
    """

    plan: Plan
    layout: Layout
    extents: Packed
    blocks: Packed
    order: Packed
    urgent_count: int
    rows: Rows
    _layers: tuple[tuple[str, ...], ...] | None = None
    _spans: Spans | None = None

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """For each chunk, the layers that it holds a part of."""
        if self._layers is None:
            self._layers = chunk_layers(self.plan, self.layout)
        return self._layers

    @property
    def spans(self) -> Spans:
        """The blocks of each segment."""
        if self._spans is None:
            self._spans = Spans.of(self.plan, self.layout)
        return self._spans


@dataclass(frozen=True, slots=True)
class Content:
    """The content of one checkpoint and the location of its bytes: all that a save needs.

    Attributes:
        packed: the plan.
        sources: the locations of the plan's sources, the headers first (`pack_all_sources`).
        owners: keeps the sources' memory alive.
        guard: watches the sources until they are staged, or None.
        changed: called when all is staged; the segments that are known to have changed meanwhile.
        aliases, optimizers, modules, wrappers, extra, metrics, tag: of the manifest, encoded.
        user_files: content of small files that are written beside the data files, by name.
    """

    packed: PackedPlan
    sources: Packed
    owners: object
    guard: Guard | None = None
    changed: Callable[[], Sequence[str]] = tuple
    aliases: Mapping[str, str] = field(default_factory=dict)
    optimizers: Mapping[str, Json] = field(default_factory=dict)
    modules: Mapping[str, Json] = field(default_factory=dict)
    wrappers: Mapping[str, Json] = field(default_factory=dict)
    extra: Json = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    tag: str | None = None
    user_files: Mapping[str, bytes] = field(default_factory=dict)


def pack_plan(
    layout: Layout,
    runs: Sequence[Extents],
    rows: Rows,
    urgent_names: Collection[str],
    block_bytes: int,
    chunk_bytes: int,
) -> PackedPlan:
    """Plan a layout's files and pack the plan.  Time and memory in proportion to the number of tensors.

    Args:
        layout, runs, rows: of the tensors, from `lay_out`, `file_runs` and `encode_rows`.
        urgent_names: the segments to stage first.
        block_bytes, chunk_bytes: multiples of `ALIGNMENT`.
    """
    plan = make_plan(layout, runs, block_bytes, chunk_bytes)
    urgent = _urgent_blocks(plan, layout, urgent_names)
    order = sorted(range(len(plan.blocks)), key=lambda block: block not in urgent)
    return PackedPlan(
        plan=plan,
        layout=layout,
        extents=pack_extents(*extent_columns(plan)),
        blocks=pack_blocks(block_rows(plan.blocks)),
        order=pack_order(order),
        urgent_count=len(urgent),
        rows=rows,
    )


def pack_all_sources(layout: Layout, sources: Sequence[Source]) -> Packed:
    """A plan's sources: the headers, which the layout keeps alive, then those of the tensors."""
    headers = [Source(address_of(file.header), len(file.header)) for file in layout.files]
    return pack_sources([*headers, *sources])


def _urgent_blocks(plan: Plan, layout: Layout, names: Collection[str]) -> set[int]:
    """The blocks that hold a part of these segments."""
    if not names:
        return set()
    stored = (s for s in layout.segments if s.nbytes and s.name in names)
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


class Write:
    """A save under way in the store.  Its methods may be called from any thread."""

    def __init__(
        self,
        step: int,
        content: Content,
        pipeline: Pipeline,
        checked: bool,
        withheld: bool = False,
        memory: JobMemory | None = None,
        lost: Callable[[], EngineError | None] = lambda: None,
    ) -> None:
        """Not for callers: `Writer.prepare` makes them."""
        self.step = step
        self.checkpoint_id = secrets.token_hex(16)
        self.packed = content.packed
        self.content: Content | None = content
        self._is_let_go = False
        self.pipeline = pipeline
        self.memory = memory
        self._lost = lost
        self.job = Job(
            Direction.WRITE,
            content.sources,
            content.packed.extents,
            content.packed.blocks,
            content.packed.order,
            len(content.packed.plan.files),
            urgent_count=0 if withheld else content.packed.urgent_count,
            checked=checked,
            owners=content,
            guard=None if content.guard is None else content.guard.c_guard,
            previous=None if content.guard is None else content.guard.previous(content.packed),
            withheld=withheld,
            memory=memory,
        )

    def wait(self, milestone: Milestone, timeout_ns: int | None = None) -> bool:
        """Block until the job has reached a milestone, or has failed; False if `timeout_ns` passed first.

        Returns at once in a forked child: its copy of the sources is read by no save.
        """
        if self.job.reached(milestone) or self.pipeline.is_forked:
            return True
        return self.pipeline.wait(self.job, milestone, timeout_ns)

    @property
    def outlives_trainer(self) -> bool:
        """Whether another process completes the save if this one dies now."""
        return self.memory is not None and self.memory.is_staged and self._lost() is None

    def chunk_states(self) -> list[BlockState]:
        """For each chunk the state of its least advanced block, at this moment."""
        states = self.job.states()
        return [least(states[start:end]) for start, end in pairwise(self.packed.plan.block_starts)]

    def amend(self, **fields: Any) -> None:
        """Replace fields of the content, if it is still needed.  Another thread may let go of it at any moment."""
        content = self.content
        if content is not None:
            self.content = replace(content, **fields)
        if self._is_let_go:
            self.content = None

    def let_go(self) -> None:
        """Forget the content: a save may be kept long after its end, and must not keep the sources' memory."""
        self._is_let_go = True
        self.content = None


class Writer:
    """Runs saves: `prepare` and `start` in the caller, `finish` on a commit thread.

    Args:
        pipeline: the native thread.
        commits: makes the files and commits.
    """

    def __init__(self, pipeline: Pipeline, commits: Commits) -> None:
        self._pipeline = pipeline
        self._commits = commits

    def prepare(self, step: int, content: Content, checked: bool, withheld: bool = False) -> Write:
        """Make a save for `start`; begins nothing.

        Args:
            withheld: no block is staged before `release` is given it.
        """
        memory = self._commits.memory(len(content.packed.plan.blocks))
        return Write(step, content, self._pipeline, checked, withheld, memory, self._commits.lost)

    def start(self, write: Write) -> None:
        """Begin staging: from here on the content is that of this moment.  Returns at once."""
        if write.content is not None and write.content.guard is not None:
            write.content.guard.arm(write.job, write.packed)
        try:
            self._pipeline.submit(write.job)
        except ClosedError:  # that of a monitor that has ended is closed when another one is started
            lost = self._commits.lost()
            if lost is None:
                raise
            raise lost from None

    def release(self, write: Write, blocks: Sequence[int]) -> None:
        """Stage withheld blocks: their content is that of this moment.  Returns at once.

        Raises:
            PlatformError: the kernel refused to guard them; the caller interrupts the save.
        """
        try:
            self._pipeline.release(write.job, blocks)
        except OSError as error:
            cause = f"the guard could not watch a layer ({error})"
            raise PlatformError(cause, "save again, or use guard='fence'") from None

    def interrupt(self, write: Write) -> None:
        """Make a save fail if it is still staging.  Blocks until it no longer reads its sources."""
        if not write.job.reached(Milestone.STAGED):
            self._pipeline.abort(write.job, errno.ECANCELED)
            self._pipeline.wait(write.job, Milestone.STAGED)

    def abandon(self, write: Write) -> None:
        """End a prepared or started save that no commit thread will finish.  Blocks.  May be called again.

        It has no files, so nothing of it is in flight.  Its sources are let go of.
        """
        self._pipeline.abort(write.job, errno.ECANCELED)
        self._pipeline.wait(write.job, Milestone.DONE)
        write.let_go()

    def finish(
        self, write: Write, await_turn: Callable[[], None], await_content: Callable[[], None] | None = None
    ) -> CheckpointInfo:
        """Complete a started save up to its commit.  Blocks.

        Args:
            write: started.
            await_turn: called after sealing, before the checkpoint becomes visible; may block.
            await_content: called when all blocks are staged, of a save whose content is not whole before it returns;
                may block, and raises if the save is given up.

        Raises:
            TornSnapshot, StorageError, ...: the save has failed, and its files are deleted.
        """
        try:
            return self._write_and_commit(write, await_turn, await_content)
        except BaseException as error:
            with suppress(Exception):
                self._commits.discard(write.step, error)
            lost = self._commits.lost()
            if lost is not None and not isinstance(error, TornSnapshot):
                raise lost from None
            raise
        finally:
            write.let_go()

    def _write_and_commit(
        self, write: Write, await_turn: Callable[[], None], await_content: Callable[[], None] | None
    ) -> CheckpointInfo:
        # No variable here holds the content: the traceback of a failure would keep the sources' memory alive.
        job, packed = write.job, write.packed
        try:
            begun = self._commits.begin(_record(write), self._pipeline.direct, write.memory)
            self._pipeline.attach(job, begun.descriptors, begun.known)
            self._pipeline.wait(job, Milestone.STAGED)
            _refuse_changed(write)
            if await_content is not None and job.failure is None:
                await_content()
                self._commits.amend(_record(write))
            if write.memory is not None and job.failure is None:
                write.memory.mark_staged()
            _ = packed.layers  # made now: the caller goes on, and the device writes
        except BaseException as error:
            self._pipeline.abort(job, getattr(error, "errno", None) or errno.ECANCELED)
            raise
        finally:
            self._pipeline.wait(job, Milestone.DONE)
        if job.failure is not None:
            raise _explain(job.failure, packed, begun.path)
        if set(job.states()) != {BlockState.WRITTEN}:  # a bug of ours; must never be committed
            raise RuntimeError(
                f"step {write.step} has blocks that were not written, and no failure; report this as a bug"
            )
        return self._commits.commit(write.step, job.checksums(), await_turn)


def _refuse_changed(write: Write) -> None:
    """Called when all is staged.

    Raises:
        TornSnapshot: the sources have changed meanwhile.
    """
    changed = () if write.content is None else write.content.changed()
    if changed:
        raise _torn(listed(changed))


def _torn(names: str) -> TornSnapshot:
    return TornSnapshot(
        f"a writer changed {names} while the arena was being staged; let nothing write to it before wait_staged() "
        "returns"
    )


def _record(write: Write) -> SaveRecord:
    """All of a save but its bytes."""
    content, packed = write.content, write.packed
    assert content is not None, "finished twice"
    index = model_index(packed.layout)
    return SaveRecord(
        step=write.step,
        checkpoint_id=write.checkpoint_id,
        plan=packed.plan,
        untrained={file.name for file in packed.layout.files if file.is_untrained},
        layers=lambda: packed.layers,
        rows=packed.rows,
        aliases=content.aliases,
        optimizers=content.optimizers,
        modules=content.modules,
        extra=content.extra,
        metrics=content.metrics,
        tag=content.tag,
        wrappers=content.wrappers,
        user_files=content.user_files,
        small_files={} if index is None else {INDEX_NAME: index},
    )


def _explain(failure: Failure, packed: PackedPlan, partial: str) -> Exception:
    """The native failure as an error with a remedy; `partial` is the directory of the files."""
    block = None if failure.block is None else packed.plan.blocks[failure.block]
    path = partial if block is None else os.path.join(partial, packed.plan.files[block.file_index].name)
    offset = None if block is None else block.file_offset
    if failure.kind == FailureKind.TORN and block is not None:
        names = affected(segment_records(packed.layout), block.file_index, block.file_offset, block.nbytes)
        if failure.errno == errno.ETIMEDOUT:
            return TornSnapshot(
                f"a writer of {names} waited for seconds while no block was staged, and was let go on; the disk "
                "stalls, or the writer holds the GIL: raise staging_bytes to the size of the arena, or save with "
                "snapshot='eager'"
            )
        return _torn(names)
    if failure.kind == FailureKind.SHORT:
        return StorageError(errno.EIO, "write", path, offset)
    if failure.kind == FailureKind.INVALID:
        return contradiction("save", path)
    assert failure.kind in (FailureKind.IO, FailureKind.ABORTED), failure
    return StorageError(failure.errno, "write", path, offset)
