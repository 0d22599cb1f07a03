"""Reader: from a committed checkpoint to memory.

Theory of operation.  The manifest has every segment's location and every block's hash.  A read plans only the blocks
that hold a part of the targets; the native pipeline reads each into a slot, verifies it, and only then copies it out.
No byte from disk reaches the caller's memory unverified.

Damage on disk raises if a step was asked for; if the newest was asked for, the reader passes over to the next older
checkpoint with a warning.  An error of the caller is always raised, and no other checkpoint is tried.

Rules: no torch.  Targets are addresses, and `owners` keeps their memory alive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple, TypeVar

from engine.errors import (
    MEDIA_ERRORS,
    ArgumentError,
    ClosedError,
    CorruptError,
    ForkedError,
    NotFoundError,
    StorageError,
    warn,
)
from engine.format.manifest import (
    ChunkRecord,
    Manifest,
    SegmentRecord,
    affected,
    affected_names,
    block_checksums,
    listed,
)
from engine.format.plan import Block, ExtentColumns, Extents, block_rows, extent_columns, lay_extents, merge_runs
from engine.io.backend import open_like
from engine.io.job import Direction, Failure, FailureKind, Job, Milestone, contradiction
from engine.io.packing import Packed, pack_blocks, pack_extents, pack_order
from engine.io.pipeline import Pipeline
from engine.options import whole_number
from engine.store.access import Opened, OpenFile, ReadAccess
from engine.store.info import CheckpointInfo, info_of

# Slots of a pipeline for blocks that do not fit the engine's slots: one is read into while the other is copied out.
_LARGE_SLOT_COUNT = 2

T = TypeVar("T")


class PassedOver(NamedTuple):
    """A committed checkpoint that a restore could not use, and the reason."""

    step: int
    reason: str


class Target(NamedTuple):
    """A segment to read, and the location for its bytes: a source of the job and an offset there."""

    record: SegmentRecord
    source: int
    offset: int


class Checkpoint(NamedTuple):
    """A checkpoint whose manifest is valid, with its files open in the manifest's order."""

    step: int
    manifest: Manifest
    manifest_bytes: int
    path: str
    descriptors: Sequence[int]


class Reader:
    """Reads the checkpoints of a directory.

    Args:
        directory: of the checkpoints; its owner does not retire a step that is being read.
        pipeline: returns the native thread that reads.

    Attributes:
        damaged: steps that this reader has found damaged; a later save may take their numbers.
    """

    def __init__(self, directory: ReadAccess, pipeline: Callable[[], Pipeline]) -> None:
        self._directory = directory
        self._pipeline = pipeline
        self.damaged: set[int] = set()

    def use(self, step: int | None, use: Callable[[Checkpoint], T]) -> tuple[T, tuple[PassedOver, ...]]:
        """Run `use` on a step, or with None on the newest that it does not find damaged.  Blocks.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: the step, or with None every step, is damaged or cannot be read.
        """
        passed_over: list[PassedOver] = []

        def act(opened: Opened) -> T:
            with self._distrusting(opened.step):
                return use(self._open(opened))

        def pass_over(candidate: int, error: Exception) -> None:
            demand_damage(error)
            passed_over.append(PassedOver(candidate, str(error)))
            self.damaged.add(candidate)
            warn(f"step {candidate} is passed over: {error}")

        try:
            return self.with_opened(step, act, pass_over if step is None else None), tuple(passed_over)
        except NotFoundError:
            if not passed_over:
                raise
            reasons = "; ".join(f"step {bad.step}: {bad.reason}" for bad in passed_over)
            what = f"none of the checkpoints in {self._directory.root} can be restored"
            raise CorruptError(f"{what}: {reasons}") from None

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self._directory.steps()

    def manifest(self, step: int | None) -> Manifest:
        """The manifest of a step, or with None of the newest.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: it is damaged or cannot be read.
        """
        return self.with_opened(step, lambda opened: opened.manifest()[0])

    def info(self, step: int | None) -> CheckpointInfo:
        """The facts of a checkpoint without its tensors; raises as `manifest`."""
        return self.with_opened(step, lambda opened: info_of(opened.summary(), opened.path))

    def with_opened(
        self,
        step: int | None,
        act: Callable[[Opened], T],
        on_damage: Callable[[int, Exception], T | None] | None = None,
    ) -> T:
        """Open a step, or with None the newest, and return the result of `act` on it.

        With None, a step that is retired after it was listed is passed over: a save in flight has committed a newer
        one.

        Args:
            step: which.
            act: may raise.
            on_damage: called with a step and the CorruptError or StorageError that opening it or `act` has raised; its
                result is returned, or if that is None the next older step is tried.  Without it the error is raised.

        Raises:
            NotFoundError: there is no such checkpoint, or none is left to try.
        """
        for candidate in self._candidates(step):
            try:
                with self._directory.opened(candidate) as opened:
                    return act(opened)
            except NotFoundError:
                if step is not None:
                    raise
            except (CorruptError, StorageError) as error:
                if on_damage is None:
                    raise
                result = on_damage(candidate, error)
                if result is not None:
                    return result
        raise NotFoundError(f"{self._directory.root} holds no committed checkpoint")

    def _candidates(self, step: int | None) -> Iterator[int]:
        """The given step, or with None all, newest first.  Lists them anew each time, since saves may be in flight.

        Raises:
            ArgumentError: the step is no number.
        """
        if step is not None:
            yield check_step(step)
            return
        tried: set[int] = set()
        while left := [s for s in self._directory.steps() if s not in tried]:
            tried.add(left[-1])
            yield left[-1]

    def read(
        self, checkpoint: Checkpoint, targets: Sequence[Target], sources: Packed, owners: object, whole: bool
    ) -> int:
        """Read the blocks that hold a part of the targets; returns the bytes read.  Blocks.

        Args:
            checkpoint: from `use`.
            targets: in the order of the manifest.
            sources: the packed sources that the targets refer to.
            owners: keeps the sources' memory alive.
            whole: verify every block, also those with only a header.

        Raises:
            CorruptError, StorageError: a block is damaged or cannot be read; the sources may hold a part.
        """
        manifest = checkpoint.manifest
        runs = _target_runs(manifest, targets)
        chunks = [chunk for chunk in manifest.chunks if whole or _is_touched(chunk, runs[chunk.file])]
        plan = lay_extents(manifest.geometry(chunks), runs)
        wanted = [index for index, block in enumerate(plan.blocks) if whole or block.extent_count]
        if not wanted:
            return 0
        checksums = block_checksums(chunks)
        blocks = [plan.blocks[index] for index in wanted]
        wanted_checksums = [checksums[index] for index in wanted]
        files = len(manifest.files)
        job = read_job(files, extent_columns(plan), blocks, wanted_checksums, sources, owners)
        with self.pipeline_for(blocks) as pipeline:
            drive(pipeline, job, checkpoint.descriptors)
        if job.failure is not None:
            raise explain(job.failure, manifest, checkpoint.path, blocks)
        return job.counters["io_bytes"]

    @contextmanager
    def pipeline_for(self, blocks: Sequence[Block]) -> Iterator[Pipeline]:
        """The engine's pipeline, or one with larger slots until the end of the `with` block.

        Its slots have the size of the largest block, not of the manifest's `block_bytes`: slots are allocated, and a
        few bytes on disk must not cost gigabytes.
        """
        ours = self._pipeline()
        slot_bytes = max((block.write_bytes for block in blocks), default=0)
        if slot_bytes <= ours.slot_bytes:
            yield ours
        else:
            with closing(open_like(ours, _LARGE_SLOT_COUNT, slot_bytes)) as pipeline:
                yield pipeline

    def open_file(self, opened: Opened, manifest: Manifest, index: int) -> OpenFile:
        """Open a data file to read; CorruptError if it is missing, or no regular file."""
        file = manifest.files[index]
        try:
            return opened.open_file(file.name, self._pipeline().direct)
        except CorruptError as error:
            names = affected(manifest.segments, index, 0, file.nbytes)
            raise CorruptError(f"{error}; affected: {names}") from None

    def wrong_length(self, manifest: Manifest, path: str, index: int, nbytes: int) -> WrongLength | None:
        """The difference between a file's length and the manifest, or None."""
        file = manifest.files[index]
        file_path = os.path.join(path, file.name)
        if nbytes == file.nbytes:
            return None
        reason = f"{file_path} has {nbytes} bytes, and its manifest says {file.nbytes}"
        if nbytes > file.nbytes:
            return WrongLength(None, file.nbytes, (), f"{reason}; affected: no tensor")
        chunk = chunk_at(manifest, index, nbytes)
        names = affected_names(manifest.segments, index, nbytes, file.nbytes - nbytes)
        told = listed(names) if names else "the header"
        return WrongLength(chunk, nbytes, names, f"{reason}; it ends in chunk {chunk}; affected: {told}")

    @contextmanager
    def _distrusting(self, step: int) -> Iterator[None]:
        """Distrust a step that proves damaged.  Inside `opened`, which keeps a save from taking its files before."""
        try:
            yield
        except (CorruptError, StorageError) as error:
            if is_damage(error):
                self._directory.distrust(step)
            raise

    def _open(self, opened: Opened) -> Checkpoint:
        """Open a step's files and check their lengths against the manifest, before anything is allocated."""
        manifest, manifest_bytes = opened.manifest()
        descriptors: list[int] = []
        for index in range(len(manifest.files)):
            file = self.open_file(opened, manifest, index)
            wrong = self.wrong_length(manifest, opened.path, index, file.nbytes)
            if wrong is not None:
                raise CorruptError(wrong.reason)
            descriptors.append(file.descriptor)
        return Checkpoint(opened.step, manifest, manifest_bytes, opened.path, descriptors)


class WrongLength(NamedTuple):
    """A file that is longer or shorter than its manifest says: the first wrong offset, and the affected tensors."""

    chunk: int | None
    offset: int
    tensors: tuple[str, ...]
    reason: str


def read_job(
    file_count: int,
    extents: ExtentColumns,
    blocks: Sequence[Block],
    checksums: Sequence[bytes],
    sources: Packed,
    owners: object = None,
) -> Job:
    """The read of these blocks, which refer to these extents."""
    return Job(
        Direction.READ,
        sources,
        pack_extents(*extents),
        pack_blocks(block_rows(blocks)),
        pack_order(range(len(blocks))),
        file_count,
        checksums=checksums,
        owners=owners,
    )


def drive(pipeline: Pipeline, job: Job, descriptors: Sequence[int]) -> None:
    """Run a read to its end.  Blocks.

    After Ctrl-C it first aborts the read, in one call into C that a second Ctrl-C cannot prevent, and then waits until
    the pipeline is done with the targets; a second Ctrl-C may cut only that short.
    """
    abort = pipeline.aborting(job, 0)
    try:
        pipeline.submit(job)
        pipeline.attach(job, descriptors)
        pipeline.wait(job, Milestone.DONE)
    except ForkedError:  # in a signal handler; the parent's read goes on
        raise
    except BaseException:
        abort()
        pipeline.wait(job, Milestone.DONE)
        raise


def check_step(step: object) -> int:
    """Return a step as an int, or raise ArgumentError: True would name step 1, and "1" none."""
    number = whole_number(step)
    if number is None:
        raise ArgumentError(f"step is {step!r}; it must be an integer, such as steps() returns")
    return number


def _target_runs(manifest: Manifest, targets: Sequence[Target]) -> list[Extents]:
    """For each file the runs of the targets in it, in order."""
    runs = [Extents([], [], [], []) for _ in manifest.files]
    for record, source, offset in targets:
        runs[record.file].append(source, offset, record.offset, record.nbytes)
    return list(map(merge_runs, runs))


def _is_touched(chunk: ChunkRecord, runs: Extents) -> bool:
    """Whether a chunk holds a part of these runs of its file."""
    first = runs.index_at(chunk.offset)
    return first < len(runs) and runs.file_offsets[first] < chunk.offset + chunk.nbytes


def is_damage(error: Exception) -> bool:
    """Whether an error means that a checkpoint is damaged, and not that it could not be read."""
    return isinstance(error, CorruptError) or getattr(error, "errno", None) in MEDIA_ERRORS


def demand_damage(error: Exception) -> None:
    """Raise an error that does not come from the checkpoint: no descriptors, memory or permission."""
    if not is_damage(error):
        raise error


def chunk_at(manifest: Manifest, file_index: int, offset: int) -> int:
    """The index of the chunk that holds this byte of a file."""
    return next(c.index for c in manifest.chunks if c.file == file_index and c.offset <= offset < c.offset + c.nbytes)


def explain(failure: Failure, manifest: Manifest, path: str, blocks: Sequence[Block]) -> Exception:
    """The native failure as an error, by its cause, with the affected tensors."""
    if failure.kind == FailureKind.ABORTED:
        return ClosedError("the Engine was closed before the restore had begun; open a new one")
    if failure.kind == FailureKind.INVALID:
        return contradiction("read", path)
    if failure.block is None:
        return StorageError(failure.errno, "read", path)
    block = blocks[failure.block]
    file = os.path.join(path, manifest.files[block.file_index].name)
    if failure.kind == FailureKind.IO:
        return StorageError(failure.errno, "read", file, block.file_offset)
    chunk = chunk_at(manifest, block.file_index, block.file_offset)
    what = "does not match its checksum" if failure.kind == FailureKind.CHECKSUM else "cannot be read: the file ends"
    return CorruptError(
        f"{file}: the block at byte {block.file_offset} (chunk {chunk}, {block.nbytes} bytes) {what}; "
        f"affected: {affected(manifest.segments, block.file_index, block.file_offset, block.nbytes)}"
    )
