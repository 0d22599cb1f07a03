"""Reader: from a committed checkpoint to memory.

Theory of operation.  The manifest gives every segment's location and what every block must hash to.  A read plans only
the blocks that hold a part of what is wanted; the native pipeline reads each into a slot, verifies it, and only then
copies it out.  Nothing read from disk reaches the caller's memory unverified.

The disk's fault makes an explicit `step=` raise, and makes "the newest" pass over to the next older checkpoint with a
warning.  The caller's fault is raised as it is, and is never answered by trying another checkpoint.

Rules: no torch.  Targets are addresses, and `owners` keeps their memory alive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple, TypeVar

from engine.errors import MEDIA_ERRORS, ClosedError, CorruptError, NotFoundError, StorageError, warn
from engine.format.manifest import ChunkRecord, Manifest, SegmentRecord, affected, block_checksums
from engine.format.plan import Block, ExtentColumns, Extents, block_rows, extent_columns, lay_extents, merge_runs
from engine.io.backend import open_like
from engine.io.job import Direction, Failure, FailureKind, Job, Milestone
from engine.io.packing import Packed, pack_blocks, pack_extents, pack_order
from engine.io.pipeline import Pipeline
from engine.store.access import Opened, OpenFile, ReadAccess
from engine.store.info import CheckpointInfo, info_of

# Slots of a pipeline opened for a checkpoint whose blocks do not fit the engine's: one is read, the other is copied
# out.
_LARGE_SLOT_COUNT = 2

T = TypeVar("T")


class PassedOver(NamedTuple):
    """A committed checkpoint that a restore could not use, and why."""

    step: int
    reason: str


class Target(NamedTuple):
    """A wanted segment of the checkpoint, and where its bytes go: a source of the job and an offset there."""

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
        directory: which; its owner keeps the step that is read from being retired.
        pipeline: gives the native thread that reads.

    Attributes:
        damaged: steps that this reader has found damaged; training may take their numbers when it comes past them.
    """

    def __init__(self, directory: ReadAccess, pipeline: Callable[[], Pipeline]) -> None:
        self._directory = directory
        self._pipeline = pipeline
        self.damaged: set[int] = set()

    def use(self, step: int | None, use: Callable[[Checkpoint], T]) -> tuple[T, tuple[PassedOver, ...]]:
        """Run `use` on the step asked for, or with None on the newest that it does not find damaged.  Blocks.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: the step asked for, or every one, is damaged or cannot be read.
        """
        passed_over: list[PassedOver] = []
        for candidate in self.candidates(step):
            try:
                with self._directory.opened(candidate) as opened:
                    return use(self._open(opened)), tuple(passed_over)
            except NotFoundError:
                if step is not None:
                    raise
                # else it was retired since it was listed: a save in flight has committed a newer one
            except (CorruptError, StorageError) as error:
                if is_damage(error):
                    self._directory.distrust(candidate)
                if step is not None:
                    raise
                demand_damage(error)
                passed_over.append(PassedOver(candidate, str(error)))
                self.damaged.add(candidate)
                warn(f"step {candidate} is passed over: {error}")
        if passed_over:
            reasons = "; ".join(f"step {bad.step}: {bad.reason}" for bad in passed_over)
            raise CorruptError(f"none of the checkpoints in {self._directory.root} can be restored: {reasons}")
        raise self.nothing()

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self._directory.steps()

    def manifest(self, step: int | None) -> Manifest:
        """The manifest of the step asked for, or with None of the newest.

        Raises:
            NotFoundError: there is no such checkpoint.
            CorruptError, StorageError: it is damaged or cannot be read.
        """
        for candidate in self.candidates(step):
            try:
                with self._directory.opened(candidate) as opened:
                    return opened.manifest()[0]
            except NotFoundError:
                if step is not None:
                    raise
        raise self.nothing()

    def info(self, step: int | None) -> CheckpointInfo:
        """What is known of a checkpoint without its tensors; raises as `manifest`."""
        for candidate in self.candidates(step):
            try:
                with self._directory.opened(candidate) as opened:
                    return info_of(opened.summary(), opened.path)
            except NotFoundError:
                if step is not None:
                    raise
        raise self.nothing()

    def nothing(self) -> NotFoundError:
        """The error that says that there is no checkpoint."""
        return NotFoundError(f"{self._directory.root} holds no committed checkpoint")

    def candidates(self, step: int | None) -> Iterator[int]:
        """The step asked for, or all, the newest first; listed anew each time, since saves may be in flight."""
        if step is not None:
            yield step
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
            sources: what the targets refer to, packed.
            owners: keeps the sources' memory alive.
            whole: verify every block, also those that hold nothing but header.

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
        """The engine's pipeline, or one of larger slots that lives as long as it is needed.

        Slots are as large as the largest block that is there, and not as the manifest says that one may be: they are
        allocated and pinned, and a few bytes on disk must not cost gigabytes.
        """
        ours = self._pipeline()
        slot_bytes = max((block.write_bytes for block in blocks), default=0)
        if slot_bytes <= ours.slot_bytes:
            yield ours
        else:
            with closing(open_like(ours, _LARGE_SLOT_COUNT, slot_bytes)) as pipeline:
                yield pipeline

    def open_file(self, opened: Opened, manifest: Manifest, index: int) -> OpenFile:
        """A data file, to read; CorruptError if it is missing, or no regular file."""
        file = manifest.files[index]
        try:
            return opened.open_file(file.name, self._pipeline().direct)
        except CorruptError as error:
            names = affected(manifest.segments, index, 0, file.nbytes)
            raise CorruptError(f"{error}; affected: {names}") from None

    def wrong_length(self, manifest: Manifest, path: str, index: int, nbytes: int) -> WrongLength | None:
        """How the length of a file differs from what the manifest says, if it does."""
        file = manifest.files[index]
        file_path = os.path.join(path, file.name)
        if nbytes == file.nbytes:
            return None
        reason = f"{file_path} has {nbytes} bytes, and its manifest says {file.nbytes}"
        if nbytes > file.nbytes:
            return WrongLength(None, file.nbytes, "no tensor", f"{reason}; affected: no tensor")
        chunk = chunk_at(manifest, index, nbytes)
        names = affected(manifest.segments, index, nbytes, file.nbytes - nbytes)
        return WrongLength(chunk, nbytes, names, f"{reason}; it ends in chunk {chunk}; affected: {names}")

    def _open(self, opened: Opened) -> Checkpoint:
        """A step's files, open and of the length that the manifest says, before anything is allocated."""
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
    """A file that is longer or shorter than its manifest says: from where on, and what that affects."""

    chunk: int | None
    offset: int
    tensors: str
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
    try:
        pipeline.submit(job)
        pipeline.attach(job, descriptors)
        pipeline.wait(job, Milestone.DONE)
    except BaseException:  # Ctrl-C: the kernel must be done with the arena before anyone else is
        pipeline.abort(job, 0)
        pipeline.wait(job, Milestone.DONE)
        raise


def _target_runs(manifest: Manifest, targets: Sequence[Target]) -> list[Extents]:
    """For each file what is wanted of it, in order."""
    runs = [Extents([], [], [], []) for _ in manifest.files]
    for record, source, offset in targets:
        runs[record.file].append(source, offset, record.offset, record.nbytes)
    return list(map(merge_runs, runs))


def _is_touched(chunk: ChunkRecord, runs: Extents) -> bool:
    """Whether a chunk holds a part of what is wanted of its file."""
    first = runs.index_at(chunk.offset)
    return first < len(runs) and runs.file_offsets[first] < chunk.offset + chunk.nbytes


def is_damage(error: Exception) -> bool:
    """Whether an error says that a checkpoint is damaged, and not that it could not be read."""
    return isinstance(error, CorruptError) or getattr(error, "errno", None) in MEDIA_ERRORS


def demand_damage(error: Exception) -> None:
    """Raise an error that says nothing of the checkpoint: a refusal for want of descriptors, memory or permission."""
    if not is_damage(error):
        raise error


def chunk_at(manifest: Manifest, file_index: int, offset: int) -> int:
    """The index of the chunk that holds this byte of a file."""
    return next(c.index for c in manifest.chunks if c.file == file_index and c.offset <= offset < c.offset + c.nbytes)


def explain(failure: Failure, manifest: Manifest, path: str, blocks: Sequence[Block]) -> Exception:
    """The native failure as the error that says whose fault it is, and what it affects."""
    if failure.kind == FailureKind.ABORTED:
        return ClosedError("the Engine was closed before the restore had begun; open a new one")
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
