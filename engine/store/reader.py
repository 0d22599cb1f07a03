"""Reader: one restore, from a committed checkpoint to tensors.

Theory of operation.  The manifest says where every tensor lies and what every block must hash to; a restore
plans only the blocks that the wanted tensors lie in, and the native pipeline reads each into a slot, verifies
it, and only then copies it out.  Nothing read from disk reaches a tensor unverified.

What can be wrong is told apart.  The caller's fault (names, shapes, dtypes that do not fit) is found before a
byte of the arena changes, and is never answered by trying another checkpoint.  The disk's fault makes an
explicit `step=` raise, and makes "the newest" pass over to the next older checkpoint with a warning.  If a
restore fails half-way the arena is marked torn, and no checkpoint is taken of it until a whole restore succeeds.

`verify` reads the same blocks through the same jobs, into no tensor: one job a chunk, and after a failure one a block,
since a job ends at its first failure and verification is to find them all.

Called by `engine` only.
"""

from __future__ import annotations

import fnmatch
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import (
    MEDIA_ERRORS,
    ArgumentError,
    ClosedError,
    CorruptError,
    EngineWarning,
    MismatchError,
    NotFoundError,
    StorageError,
)
from engine.format.layout import Segment
from engine.format.manifest import MANIFEST_NAME, ChunkRecord, Manifest, SegmentRecord, affected, block_checksums
from engine.format.plan import (
    Block,
    ExtentColumns,
    Extents,
    Source,
    block_rows,
    extent_columns,
    lay_extents,
    merge_runs,
)
from engine.format.values import decode as decode_extra
from engine.io.backend import open_like
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job, Milestone
from engine.io.packing import Packed, pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline
from engine.state.arena import Arena, allocate_pages
from engine.store.catalog import Catalog

# Slots of a pipeline opened for a checkpoint whose blocks do not fit the engine's: one is read, the other is copied
# out.
_LARGE_SLOT_COUNT = 2

# From here on `load` takes a tensor's memory from the kernel, in huge pages, of which this is one on x86-64.  To fault
# 500 MB in by 4096 bytes at a time took 90 of 240 ms on the host of docs/perf.md.
_PAGES_BYTES_MIN = 2 << 20

# In the place of a descriptor: the file is not there (engine_native.h, set_file).
_NO_FILE = -1

Select = str | Sequence[str] | None
Tensors = dict[str, Tensor]


class PassedOver(NamedTuple):
    """A committed checkpoint that a restore could not use, and why."""

    step: int
    reason: str


class RestoreInfo(NamedTuple):
    """A restored checkpoint.  `nbytes_read` counts what came from disk, the manifest included."""

    step: int
    checkpoint_id: str
    path: str
    extra: Any
    nbytes_read: int
    passed_over: tuple[PassedOver, ...]


class Damage(NamedTuple):
    """A part of a checkpoint that is not what was written.

    Attributes:
        path: the file.
        chunk, offset: where in the file; None where the file as a whole is meant, or what lies beyond its chunks.
        tensors: the names of those affected, shortened where they are many.
        reason: what is wrong, in a sentence that holds all of the above.
    """

    path: str
    chunk: int | None
    offset: int | None
    tensors: str
    reason: str


class _Target(NamedTuple):
    """A wanted tensor of the checkpoint, and where its bytes go: a source of the job and an offset there."""

    record: SegmentRecord
    source: int
    offset: int


class _Found(NamedTuple):
    """A checkpoint whose manifest is valid, with its files open in the manifest's order."""

    manifest: Manifest
    path: str
    descriptors: Sequence[int]


class Reader:
    """Restores from a catalog through a pipeline."""

    def __init__(self, catalog: Catalog, pipeline: Pipeline) -> None:
        self._catalog = catalog
        self._pipeline = pipeline
        # Steps that this engine has found damaged: training may take their place when it comes past them again.
        self.damaged: set[int] = set()

    def restore(self, arena: Arena, step: int | None, select: Select) -> RestoreInfo:
        """Fill an arena, or the selected part of it, and return what was restored.  Blocks."""
        arena.fence()
        arena.refresh()
        wanted = selector(select)

        def fill(found: _Found) -> int:
            targets = _match(arena, found.manifest, wanted, whole=select is None)
            options = _options(found.manifest)
            if select is None:
                arena.check_options(options)
            sources = pack_sources(arena.sources)
            was_torn = arena.torn
            arena.mark_torn()  # until everything that belongs together is there, whatever interrupts it
            nbytes = self._read(found, targets, sources, arena, whole=select is None)
            if select is None:
                arena.restored(options)
            else:
                arena.restored_part({target.record.name for target in targets}, options.get("absent", ()))
                if not was_torn:
                    arena.mark_whole()
            return nbytes

        return self._newest(step, fill)

    def load(self, step: int | None, select: Select) -> tuple[Tensors, RestoreInfo]:
        """Read tensors into new memory, without an arena.  Blocks."""
        wanted = selector(select)
        tensors: Tensors = {}

        def fill(found: _Found) -> int:
            tensors.clear()
            manifest = found.manifest
            absent = set(_options(manifest).get("absent", ()))
            targets: list[_Target] = []
            sources: list[Source] = []
            for record in manifest.segments:
                if record.name in absent or not wanted(record):
                    continue
                tensors[record.name] = tensor = _make_tensor(record)
                targets.append(_Target(record, len(sources), 0))
                sources.append(Source(tensor.data_ptr(), tensor.element_size(), (), ()))
            aliases = {alias: tensors[name] for alias, name in manifest.aliases.items() if name in tensors}
            packed = pack_sources(sources)
            nbytes = self._read(found, targets, packed, list(tensors.values()), whole=select is None)
            tensors.update(aliases)
            return nbytes

        info = self._newest(step, fill)
        if not tensors and select is not None:
            raise ArgumentError(f"select={select!r} matches no tensor of step {info.step}")
        return tensors, info

    def verify(self, step: int | None) -> tuple[Damage, ...]:
        """Read every block of a committed checkpoint and tell what is not as it was written.  Blocks."""
        for candidate in self._candidates(step):
            try:
                with self._catalog.pinned(candidate):
                    return self._verify(candidate)
            except NotFoundError:
                if step is not None:
                    raise
                # else retired since it was listed, as in _newest
        raise self._nothing()

    def _verify(self, step: int) -> tuple[Damage, ...]:
        """Everything wrong with a pinned step."""
        path = self._catalog.path(step)
        try:
            manifest, _ = self._catalog.manifest(step)
            decode_extra(manifest.extra)
            _options(manifest)
        except (CorruptError, StorageError) as error:
            _demand_damage(error)
            return (Damage(os.path.join(path, MANIFEST_NAME), None, None, "everything", str(error)),)
        return tuple(self._verify_files(manifest, path))

    def _verify_files(self, manifest: Manifest, path: str) -> Iterator[Damage]:
        """Everything wrong with the data files.  One of a wrong length is read all the same."""
        descriptors: list[int] = []
        try:
            for index, file in enumerate(manifest.files):
                descriptors.append(_NO_FILE)
                try:
                    descriptors[index] = self._open(manifest, path, index)
                    damage = self._wrong_length(manifest, path, index, descriptors[index])
                    if damage is not None:
                        yield damage
                except (CorruptError, StorageError) as error:
                    _demand_damage(error)
                    names = affected(manifest.segments, index, 0, file.nbytes)
                    yield Damage(os.path.join(path, file.name), None, None, names, str(error))
            yield from self._verify_blocks(_Found(manifest, path, descriptors))
        finally:
            self._close(descriptors)

    def _verify_blocks(self, found: _Found) -> Iterator[Damage]:
        """Everything wrong with the blocks of the files that are there."""
        plan = found.manifest.geometry(found.manifest.chunks)
        checksums = block_checksums(found.manifest.chunks)
        with self._pipeline_for(plan.blocks) as pipeline:
            for chunk, start, end in zip(plan.chunks, plan.block_starts, plan.block_starts[1:], strict=False):
                if found.descriptors[chunk.file_index] != _NO_FILE:
                    yield from _verify_chunk(pipeline, found, plan.blocks[start:end], checksums[start:end])

    def _newest(self, step: int | None, fill: Callable[[_Found], int]) -> RestoreInfo:
        """Run `fill` on the step asked for, or on the newest that it does not find damaged."""
        passed_over: list[PassedOver] = []
        for candidate in self._candidates(step):
            try:
                with self._catalog.pinned(candidate):
                    path = self._catalog.path(candidate)
                    manifest, manifest_bytes = self._catalog.manifest(candidate)
                    extra = decode_extra(manifest.extra)
                    with self._opened(manifest, path) as descriptors:
                        nbytes = manifest_bytes + fill(_Found(manifest, path, descriptors))
            except NotFoundError:
                if step is not None:
                    raise
                continue  # retired since it was listed: a save in flight has committed a newer one
            except (CorruptError, StorageError) as error:
                if step is not None:
                    raise
                _demand_damage(error)
                passed_over.append(PassedOver(candidate, str(error)))
                self.damaged.add(candidate)
                warnings.warn(f"step {candidate} is passed over: {error}", EngineWarning, stacklevel=4)
                continue
            return RestoreInfo(candidate, manifest.checkpoint_id, path, extra, nbytes, tuple(passed_over))
        if passed_over:
            reasons = "; ".join(f"step {bad.step}: {bad.reason}" for bad in passed_over)
            raise CorruptError(f"none of the checkpoints in {self._catalog.root} can be restored: {reasons}")
        raise self._nothing()

    def _nothing(self) -> NotFoundError:
        return NotFoundError(f"{self._catalog.root} holds no committed checkpoint")

    def _candidates(self, step: int | None) -> Iterator[int]:
        """The step asked for, or all, the newest first; listed anew each time, since saves may be in flight."""
        if step is not None:
            yield step
            return
        tried: set[int] = set()
        while left := [s for s in self._catalog.steps() if s not in tried]:
            tried.add(left[-1])
            yield left[-1]

    def _read(
        self,
        found: _Found,
        targets: Sequence[_Target],
        sources: Packed,
        owners: object,
        whole: bool,
    ) -> int:
        """Read the blocks that the targets lie in; returns the bytes read.

        A `whole` read verifies every block, also those that hold nothing but header.
        """
        manifest = found.manifest
        runs = _target_runs(manifest, targets)
        chunks = [chunk for chunk in manifest.chunks if whole or _is_touched(chunk, runs[chunk.file])]
        plan = lay_extents(manifest.geometry(chunks), runs)
        wanted = [index for index, block in enumerate(plan.blocks) if whole or block.extent_count]
        if not wanted:
            return 0
        checksums = block_checksums(chunks)
        blocks = [plan.blocks[index] for index in wanted]
        job = _make_job(
            len(manifest.files),
            extent_columns(plan),
            blocks,
            [checksums[index] for index in wanted],
            sources,
            owners,
        )
        with self._pipeline_for(blocks) as pipeline:
            _drive(pipeline, job, found.descriptors)
        if job.failure is not None:
            raise _explain(job.failure, manifest, found.path, blocks)
        return job.counters["io_bytes"]

    @contextmanager
    def _pipeline_for(self, blocks: Sequence[Block]) -> Iterator[Pipeline]:
        """The engine's pipeline, or one of larger slots that lives as long as it is needed.

        Slots are as large as the largest block that is there, and not as the manifest says that one may be: they are
        allocated and pinned, and a few bytes on disk must not cost gigabytes.
        """
        slot_bytes = max((block.write_bytes for block in blocks), default=0)
        if slot_bytes <= self._pipeline.slot_bytes:
            yield self._pipeline
        else:
            with closing(open_like(self._pipeline, _LARGE_SLOT_COUNT, slot_bytes)) as pipeline:
                yield pipeline

    @contextmanager
    def _opened(self, manifest: Manifest, path: str) -> Iterator[list[int]]:
        """The data files, open and of the length that the manifest says: checked before anything is allocated."""
        descriptors: list[int] = []
        try:
            for index in range(len(manifest.files)):
                descriptors.append(self._open(manifest, path, index))
                damage = self._wrong_length(manifest, path, index, descriptors[index])
                if damage is not None:
                    raise CorruptError(damage.reason)
            yield descriptors
        finally:
            self._close(descriptors)

    def _open(self, manifest: Manifest, path: str, index: int) -> int:
        file = manifest.files[index]
        try:
            file_path = os.path.join(path, file.name)
            return self._catalog.filesystem.open_for_blocks(file_path, write=False, direct=self._pipeline.direct)
        except CorruptError as error:
            names = affected(manifest.segments, index, 0, file.nbytes)
            raise CorruptError(f"{error}; affected: {names}") from None

    def _wrong_length(self, manifest: Manifest, path: str, index: int, descriptor: int) -> Damage | None:
        """What is wrong with the length of a file, if anything is."""
        file = manifest.files[index]
        file_path = os.path.join(path, file.name)
        nbytes = self._catalog.filesystem.size(descriptor, file_path)
        if nbytes == file.nbytes:
            return None
        reason = f"{file_path} has {nbytes} bytes, and its manifest says {file.nbytes}"
        if nbytes > file.nbytes:
            return Damage(file_path, None, file.nbytes, "no tensor", f"{reason}; affected: no tensor")
        chunk = _chunk_at(manifest, index, nbytes)
        names = affected(manifest.segments, index, nbytes, file.nbytes - nbytes)
        return Damage(file_path, chunk, nbytes, names, f"{reason}; it ends in chunk {chunk}; affected: {names}")

    def _close(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            if descriptor != _NO_FILE:
                self._catalog.filesystem.close(descriptor)


def _make_job(
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


def _drive(pipeline: Pipeline, job: Job, descriptors: Sequence[int]) -> None:
    try:
        pipeline.submit(job)
        pipeline.attach(job, descriptors)
        pipeline.wait(job, Milestone.DONE)
    except BaseException:  # Ctrl-C: the kernel must be done with the arena before anyone else is
        pipeline.abort(job, 0)
        pipeline.wait(job, Milestone.DONE)
        raise


def _verify_chunk(
    pipeline: Pipeline, found: _Found, blocks: Sequence[Block], checksums: Sequence[bytes]
) -> Iterator[Damage]:
    """Read a chunk's blocks into no tensor; after a failure, those that it has left open one by one."""
    nothing, no_extents = pack_sources(()), ExtentColumns((), (), (), ())

    def read(start: int, end: int) -> Job:
        job = _make_job(len(found.descriptors), no_extents, blocks[start:end], checksums[start:end], nothing)
        _drive(pipeline, job, found.descriptors)
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


def _make_tensor(record: SegmentRecord) -> Tensor:
    dtype = getattr(torch, record.dtype)
    if record.nbytes >= _PAGES_BYTES_MIN:
        return torch.frombuffer(allocate_pages(record.nbytes), dtype=dtype).view(record.shape)
    try:
        return torch.empty(record.shape, dtype=dtype, device="cpu")
    except RuntimeError:
        if record.nbytes:
            raise  # no memory
        # No elements, yet sizes whose strides overflow torch's 64 bits: no tensor ever had it.
        raise CorruptError(f"tensor {record.name!r} has the impossible shape {record.shape}") from None


def _options(manifest: Manifest) -> dict[str, Any]:
    """What the optimizer kept besides tensors, in the shape that `Arena.options` gives it."""
    if "" not in manifest.optimizers:
        return {}
    options = decode_extra(manifest.optimizers[""], "options")
    shape = {"param_groups": list, "state": dict, "absent": list}
    if not isinstance(options, dict) or (options and {k: type(v) for k, v in options.items()} != shape):
        raise CorruptError("the manifest's options are not an optimizer's")
    if options:
        dicts = all(type(value) is dict for value in (*options["param_groups"], *options["state"].values()))
        if not dicts or not all(type(name) is str for name in (*options["state"], *options["absent"])):
            raise CorruptError("the manifest's options are not an optimizer's")
    return options


def _target_runs(manifest: Manifest, targets: Sequence[_Target]) -> list[Extents]:
    """For each file what is wanted of it, in order."""
    runs = [Extents([], [], [], []) for _ in manifest.files]
    for record, source, offset in targets:
        runs[record.file].append(source, offset, record.offset, record.nbytes)
    return list(map(merge_runs, runs))


def _is_touched(chunk: ChunkRecord, runs: Extents) -> bool:
    """Whether a chunk holds a part of what is wanted of its file."""
    first = runs.index_at(chunk.offset)
    return first < len(runs) and runs.file_offsets[first] < chunk.offset + chunk.nbytes


def selector(select: Select) -> Callable[[SegmentRecord | Segment], bool]:
    """The predicate behind `select=`.

    A pattern (fnmatch(3), case-sensitive) picks a tensor if it matches its name, its layer, or the name of a
    member of its layer: ``"layers.3.*"`` picks everything under layers.3, the optimizer's state of it included;
    ``"layers.3"`` only what belongs to that very module; ``"*.exp_avg"`` one kind of state.
    """
    if select is None:
        return lambda _: True
    patterns = (select,) if isinstance(select, str) else tuple(select)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError(f"select is {select!r}; it must be a pattern or a list of patterns")

    # One expression for all patterns, and each layer once: there may be a hundred thousand names to try.
    matches = re.compile("|".join(map(fnmatch.translate, patterns))).match
    layers: dict[str, bool] = {}

    def wanted(segment: SegmentRecord | Segment) -> bool:
        layer = segment.layer
        if layer not in layers:
            layers[layer] = bool(matches(layer) or matches(f"{layer}."))
        return layers[layer] or bool(matches(segment.name))

    return wanted


def _match(
    arena: Arena, manifest: Manifest, wanted: Callable[[SegmentRecord | Segment], bool], whole: bool
) -> list[_Target]:
    """Pair the checkpoint's tensors with the arena's, or say everything that does not fit.

    Raises:
        MismatchError: listing every name, shape and dtype that differs.
    """
    stored = {record.name: record for record in manifest.segments if wanted(record)}
    here = {s.name: (s, place) for s, place in zip(arena.segments, arena.places, strict=True) if wanted(s)}
    problems = [f"{name}: not in the checkpoint" for name in here if name not in stored]
    problems += [f"{name}: not in the arena" for name in stored if name not in here]
    for name in stored.keys() & here.keys():
        record, segment = stored[name], here[name][0]
        if (record.dtype, record.shape) != (segment.dtype, segment.shape):
            problems.append(
                f"{name}: {record.dtype}{list(record.shape)} in the checkpoint, "
                f"{segment.dtype}{list(segment.shape)} in the arena"
            )
    if problems:
        lines = "\n  ".join(sorted(problems))
        if arena.makes_state_late and any(stored[name].role == "optimizer" for name in stored.keys() - here.keys()):
            lines += (
                "\nthe optimizer makes its state in its first step: take one step before adopting, then restore "
                "(LBFGS: two or more, until it has the tensors that the checkpoint has)"
            )
        raise MismatchError(f"step {manifest.step} does not fit the arena; nothing was changed:\n  {lines}")
    if not stored and not whole:
        raise MismatchError(f"the selection matches no tensor of step {manifest.step}; nothing was changed")
    return [_Target(record, *here[name][1]) for name, record in stored.items()]


def _demand_damage(error: Exception) -> None:
    """Raise an error that says nothing of the checkpoint: a refusal for want of descriptors, memory or permission."""
    if not isinstance(error, CorruptError) and getattr(error, "errno", None) not in MEDIA_ERRORS:
        raise error


def _damage(failure: Failure, found: _Found, blocks: Sequence[Block]) -> Damage:
    """The native failure as damage, or raise it where the disk is not to blame."""
    error = _explain(failure, found.manifest, found.path, blocks)
    _demand_damage(error)
    if failure.block is None:
        raise error
    block = blocks[failure.block]
    return Damage(
        os.path.join(found.path, found.manifest.files[block.file_index].name),
        _chunk_at(found.manifest, block.file_index, block.file_offset),
        block.file_offset,
        affected(found.manifest.segments, block.file_index, block.file_offset, block.nbytes),
        str(error),
    )


def _chunk_at(manifest: Manifest, file_index: int, offset: int) -> int:
    """The index of the chunk that holds this byte of a file."""
    return next(c.index for c in manifest.chunks if c.file == file_index and c.offset <= offset < c.offset + c.nbytes)


def _explain(failure: Failure, manifest: Manifest, path: str, blocks: Sequence[Block]) -> Exception:
    """The native failure as the error that says whose fault it is, and what it affects."""
    if failure.kind == FailureKind.ABORTED:
        return ClosedError("the Engine was closed before the restore had begun; open a new one")
    if failure.block is None:
        return StorageError(failure.errno, "read", path)
    block = blocks[failure.block]
    file = os.path.join(path, manifest.files[block.file_index].name)
    if failure.kind == FailureKind.IO:
        return StorageError(failure.errno, "read", file, block.file_offset)
    chunk = _chunk_at(manifest, block.file_index, block.file_offset)
    what = "does not match its checksum" if failure.kind == FailureKind.CHECKSUM else "cannot be read: the file ends"
    return CorruptError(
        f"{file}: the block at byte {block.file_offset} (chunk {chunk}, {block.nbytes} bytes) {what}; "
        f"affected: {affected(manifest.segments, block.file_index, block.file_offset, block.nbytes)}"
    )
