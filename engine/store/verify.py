"""Verify: every damaged part of a checkpoint.

Theory of operation.  Verification reads the same blocks through the same jobs as a restore, but copies none out.  There
is one job for each chunk.  A job ends at its first failure, so after a failure there is one job for each remaining
block, to find all damage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.errors import CorruptError, StorageError
from engine.format.manifest import MANIFEST_NAME, Manifest, affected_names, block_checksums, digest_of
from engine.format.plan import Block, ExtentColumns
from engine.format.values import decode, decode_options
from engine.io.job import BlockState, Failure, Job
from engine.io.packing import pack_sources
from engine.io.pipeline import Pipeline
from engine.store.access import Opened, ReadAccess
from engine.store.reader import Checkpoint, Reader, chunk_at, demand_damage, drive, explain, read_job

# The descriptor of a missing file (engine_native.h, set_files).
_NO_FILE = -1


class Damage(NamedTuple):
    """A part of a checkpoint that differs from the saved one.

    Attributes:
        path: the file.
        chunk, offset: the location in the file; None for the whole file, or for bytes beyond its chunks.
        tensors: the names of the affected tensors; empty if only a header or a file of the user's is damaged, and None
            if a damaged manifest leaves no tensor of the checkpoint readable.
        reason: a sentence with all of the above; of many tensors, the first few and a count.
    """

    path: str
    chunk: int | None
    offset: int | None
    tensors: tuple[str, ...] | None
    reason: str


class Verifier:
    """Verifies the checkpoints of a directory.

    Args:
        directory: of the checkpoints.
        reader: reads their blocks.
    """

    def __init__(self, directory: ReadAccess, reader: Reader) -> None:
        self._directory = directory
        self._reader = reader

    def verify(self, step: int | None) -> tuple[Damage, ...]:
        """Read every block of a committed checkpoint, and return all damage.  Blocks."""
        return self._reader.with_opened(step, self._verify_opened, self._without_directory)

    def _verify_opened(self, opened: Opened) -> tuple[Damage, ...]:
        damage = self._verify(opened)
        if damage:
            self._directory.distrust(opened.step)
            if not opened.is_in_place():
                raise CorruptError(damage[0].reason)  # which `opened` makes a RetiredError of
        return damage

    def _without_directory(self, step: int, error: Exception) -> tuple[Damage, ...]:
        """The damage of a step whose directory is gone."""
        if not isinstance(error, CorruptError):
            raise error
        path = os.path.join(self._directory.path(step), MANIFEST_NAME)
        return (Damage(path, None, None, None, str(error)),)

    def _verify(self, opened: Opened) -> tuple[Damage, ...]:
        """Everything wrong with a step."""
        try:
            manifest, manifest_bytes = opened.manifest()
            decode(manifest.extra)
            for options in manifest.optimizers.values():
                decode_options(options)
            for name, value in (*manifest.modules.items(), *manifest.wrappers.items()):
                decode(value, name)
        except (CorruptError, StorageError) as error:
            demand_damage(error)
            return (Damage(os.path.join(opened.path, MANIFEST_NAME), None, None, None, str(error)),)
        return tuple(self._verify_files(opened, manifest, manifest_bytes))

    def _verify_files(self, opened: Opened, manifest: Manifest, manifest_bytes: int) -> Iterator[Damage]:
        """All damage in the files.  A file of a wrong length is read too."""
        descriptors: list[int] = []
        for index, file in enumerate(manifest.files):
            descriptors.append(_NO_FILE)
            try:
                opened_file = self._reader.open_file(opened, manifest, index)
                descriptors[index] = opened_file.descriptor
                wrong = self._reader.wrong_length(manifest, opened.path, index, opened_file.nbytes)
                if wrong is not None:
                    yield Damage(os.path.join(opened.path, file.name), *wrong)
            except (CorruptError, StorageError) as error:
                demand_damage(error)
                names = affected_names(manifest.segments, index, 0, file.nbytes)
                yield Damage(os.path.join(opened.path, file.name), None, None, names, str(error))
        yield from _verify_user_files(opened, manifest)
        yield from self._verify_blocks(Checkpoint(opened.step, manifest, manifest_bytes, opened.path, descriptors))

    def _verify_blocks(self, found: Checkpoint) -> Iterator[Damage]:
        """All damage in the blocks of the files that exist."""
        plan = found.manifest.geometry(found.manifest.chunks)
        checksums = block_checksums(found.manifest.chunks)
        with self._reader.pipeline_for(plan.blocks) as pipeline:
            for chunk, start, end in zip(plan.chunks, plan.block_starts, plan.block_starts[1:], strict=False):
                if found.descriptors[chunk.file_index] != _NO_FILE:
                    yield from _verify_chunk(pipeline, found, plan.blocks[start:end], checksums[start:end])


def _verify_user_files(opened: Opened, manifest: Manifest) -> Iterator[Damage]:
    for record in manifest.user_files:
        path = os.path.join(opened.path, record.name)
        try:
            if digest_of(record.name, opened.read_small(record.name, record.nbytes)) != record:
                raise CorruptError(f"{path} is not the file that was saved: its sha256 differs")
        except (CorruptError, StorageError) as error:
            demand_damage(error)
            yield Damage(path, None, None, (), str(error))


def _verify_chunk(
    pipeline: Pipeline, found: Checkpoint, blocks: Sequence[Block], checksums: Sequence[bytes]
) -> Iterator[Damage]:
    """Read a chunk's blocks and copy none out; after a failure, read the remaining ones one by one."""
    nothing, no_extents = pack_sources(()), ExtentColumns((), (), (), ())

    def read(start: int, end: int) -> Job:
        job = read_job(len(found.descriptors), no_extents, blocks[start:end], checksums[start:end], nothing)
        drive(pipeline, job, found.descriptors)
        return job

    job = read(0, len(blocks))
    if job.failure is None:
        return
    damage = [_damage(job.failure, found, blocks)]
    for index, state in enumerate(job.states()):
        if state != BlockState.WRITTEN and index != job.failure.block:
            single = read(index, index + 1)
            if single.failure is not None:
                damage.append(_damage(single.failure, found, blocks[index : index + 1]))
    yield from sorted(damage, key=lambda row: row.offset or 0)


def _damage(failure: Failure, found: Checkpoint, blocks: Sequence[Block]) -> Damage:
    """The native failure as damage.  Raises it if the disk is not the cause."""
    error = explain(failure, found.manifest, found.path, blocks)
    demand_damage(error)
    if failure.block is None:
        raise error
    block = blocks[failure.block]
    return Damage(
        os.path.join(found.path, found.manifest.files[block.file_index].name),
        chunk_at(found.manifest, block.file_index, block.file_offset),
        block.file_offset,
        affected_names(found.manifest.segments, block.file_index, block.file_offset, block.nbytes),
        str(error),
    )
