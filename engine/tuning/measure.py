"""Measure: time parts of a save, on files without names.

Theory of operation.  A `Sample` is the first chunks of an arena's own plan, read from its own memory, so tuning needs
no second copy of a training.  A `Bench` writes it through a pipeline, as a save does: copied, hashed, written past the
page cache and synced.  The files have no names (`Filesystem.open_scratch`), so a kill at any moment leaves nothing in
the directory.  A rung of the ladder that writes through the page cache has files of its own.

The arena's memory is read and never written.  After Ctrl-C every job is drained before the exception goes on, so
nothing reads the arena then.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, takewhile
from statistics import median
from typing import TypeVar

from engine.errors import StorageError
from engine.format.layout import Layout, align_up
from engine.format.plan import ALIGNMENT, Block, ExtentColumns, Extents, block_rows, extent_columns, make_plan
from engine.io.backend import open_pipeline
from engine.io.descriptor import Descriptor
from engine.io.host import content_of
from engine.io.job import Direction, Job, Milestone
from engine.io.packing import Packed, pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline
from engine.options import Options
from engine.store.filesystem import Filesystem
from engine.store.reader import read_job
from engine.tuning.decide import Timing

# Samples are whole chunks, so that blocks of every size cover the same bytes: the largest block that is tried.
SAMPLE_CHUNK_BYTES = 16 << 20

# What a load thread reads at a time: beyond the caches of one core on most hosts, and some tenth of a millisecond.
_LOAD_BYTES = 1 << 20

# A shorter window counts too few pieces of the load.
_WINDOW_SECONDS = 0.1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class State:
    """The bytes of an arena, and where they are in its files."""

    layout: Layout
    runs: Sequence[Extents]
    sources: Packed
    owners: object

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.layout.files)


@dataclass(slots=True)
class _Cut:
    """A sample in blocks of one size, packed."""

    extents: Packed
    blocks: Packed
    order: Packed
    rows: tuple[Block, ...]


@dataclass(slots=True)
class Sample:
    """The first chunks of a state, in as many bytes as are wanted or the chunk that exceeds them."""

    state: State
    chunk_bytes: int
    wanted_bytes: int
    _cuts: dict[int, _Cut] = field(default_factory=dict)

    def cut(self, block_bytes: int) -> _Cut:
        """The sample in blocks of this size."""
        if block_bytes not in self._cuts:
            plan = make_plan(self.state.layout, self.state.runs, block_bytes, self.chunk_bytes)
            begun = [0]
            for chunk in plan.chunks:
                begun.append(begun[-1] + chunk.nbytes)
            chunk_count = sum(1 for _ in takewhile(lambda start: start < self.wanted_bytes, begun[:-1]))
            rows = plan.blocks[: plan.block_starts[chunk_count]]
            extents = pack_extents(*extent_columns(plan))
            self._cuts[block_bytes] = _Cut(extents, pack_blocks(block_rows(rows)), pack_order(range(len(rows))), rows)
        return self._cuts[block_bytes]

    @property
    def nbytes(self) -> int:
        """Bytes that one save of the sample writes."""
        return sum(block.nbytes for block in self.cut(self.chunk_bytes).rows)

    def ends(self) -> list[int]:
        """For each file of the state the bytes that the sample has of it, padded as they are written."""
        ends = [0] * len(self.state.layout.files)
        for block in self.cut(self.chunk_bytes).rows:
            ends[block.file_index] = align_up(block.file_offset + block.nbytes, ALIGNMENT)
        return ends

    def writing(self, block_bytes: int, files: object) -> Job:
        """A save of the sample; keeps the files open until it is done."""
        cut = self.cut(block_bytes)
        count, owners = len(self.state.layout.files), (self.state.owners, files)
        return Job(Direction.WRITE, self.state.sources, cut.extents, cut.blocks, cut.order, count, owners=owners)

    def reading(self, block_bytes: int, files: object, checksums: Sequence[bytes]) -> Job:
        """A read of the sample that verifies every block and copies none out."""
        rows = [block._replace(extent_start=0, extent_count=0) for block in self.cut(block_bytes).rows]
        nothing = ExtentColumns((), (), (), ())
        return read_job(len(self.state.layout.files), nothing, rows, checksums, pack_sources(()), owners=files)


class Bench:
    """Writes samples into files without names in one directory.

    Files are closed with their last reference, and a job holds its own until it is done.  So no number of a closed file
    is written to, however often Ctrl-C strikes.
    """

    def __init__(self, directory: str, filesystem: Filesystem, sample: Sample) -> None:
        self.directory = directory
        self.sample = sample
        self._filesystem = filesystem
        self._sets: dict[tuple[bool, int], list[Descriptor | None]] = {}

    def take(self, sample: Sample) -> None:
        """Go on with another sample."""
        self._sets.clear()
        self.sample = sample

    @contextmanager
    def pipeline(self, options: Options) -> Iterator[Pipeline]:
        """A pipeline as an Engine with these options has it.

        Raises:
            PlatformError: the requested backend does not work here.
        """
        pipeline, _ = open_pipeline(
            self.directory,
            self._filesystem,
            options.backend,
            options.slot_count,
            options.block_bytes,
            options.staging_threads,
        )
        try:
            yield pipeline
        finally:
            pipeline.close()

    def reserve(self, direct: bool, number: int = 0) -> list[Descriptor | None]:
        """A set of files with their blocks reserved, made at first use; None for a file that the sample has nothing of.

        Raises:
            StorageError: there is no room, or no file can be made.
        """
        if (direct, number) not in self._sets:
            made: list[Descriptor | None] = []
            self._sets[direct, number] = made
            for nbytes in self.sample.ends():
                file = self._filesystem.open_scratch(self.directory, direct) if nbytes else None
                made.append(file)
                if file is not None:
                    self._filesystem.allocate(file, nbytes, self.directory)
        return self._sets[direct, number]

    def save(self, pipeline: Pipeline, count: int = 1, first: int = 0) -> Timing:
        """So many saves of the sample at once, into the sets of files from `first` on; durable when the last one is."""
        began_ns = time.monotonic_ns()
        sets = [self.reserve(pipeline.direct, first + number) for number in range(count)]
        jobs = [self.sample.writing(pipeline.slot_bytes, files) for files in sets]
        self._drive(pipeline, jobs, sets)
        for descriptor in filter(None, chain.from_iterable(sets)):
            self._filesystem.sync_file(descriptor, self.directory)
        ended_ns = time.monotonic_ns()
        staged_ns = max(job.counters["staged_ns"] for job in jobs)
        copying_ns = sum(job.counters["copying_ns"] for job in jobs)
        return Timing(max(0, staged_ns - began_ns) / 1e9, (ended_ns - began_ns) / 1e9, copying_ns / 1e9)

    def read_seconds(self, pipeline: Pipeline, rounds: int) -> float:
        """The median time of reading and verifying the sample."""
        files = self.reserve(pipeline.direct)
        job = self.sample.writing(pipeline.slot_bytes, files)
        self._drive(pipeline, [job], [files])
        checksums = job.checksums()
        taken = []
        for _ in range(rounds):
            began = time.monotonic()
            self._drive(pipeline, [self.sample.reading(pipeline.slot_bytes, files, checksums)], [files])
            taken.append(time.monotonic() - began)
        return median(taken)

    def fresh_seconds(self, pipeline: Pipeline, count: int) -> float:
        """The median time of a save into files that are made for it: the first so many sets.

        None is dropped in between, because deleting may send the drive discards, which would slow down the next save.
        """
        taken = []
        for number in range(count):
            began = time.monotonic()
            self.save(pipeline, first=number)
            taken.append(time.monotonic() - began)
        return median(taken)

    def commit_seconds(self, record_bytes: int, rounds: int) -> float:
        """The median time of a commit's small file and two syncs of the directory."""
        taken = []
        for _ in range(rounds):
            began = time.monotonic()
            file = self._filesystem.open_scratch(self.directory, direct=False)
            try:
                self._filesystem.write_range(file, 0, bytes(record_bytes), self.directory)
                self._filesystem.sync_file(file, self.directory)
            finally:
                self._filesystem.close(file)
            for _ in range(2):
                self._filesystem.sync_directory(self.directory)
            taken.append(time.monotonic() - began)
        return median(taken)

    def _drive(self, pipeline: Pipeline, jobs: Sequence[Job], sets: Sequence[Sequence[Descriptor | None]]) -> None:
        """Run jobs to their end, each on its set of files.  Blocks; after a failure it drains them first."""
        aborts = [pipeline.aborting(job, errno.ECANCELED) for job in jobs]
        try:
            for job, files in zip(jobs, sets, strict=True):
                pipeline.submit(job)
                pipeline.attach(job, [-1 if file is None else file.number for file in files])
            for job in jobs:
                pipeline.wait(job, Milestone.DONE)
        except BaseException:  # Ctrl-C too
            for abort in aborts:
                abort()
            for job in jobs:
                pipeline.wait(job, Milestone.DONE)
            raise
        for job in jobs:
            if job.failure is not None:
                raise StorageError(job.failure.errno, "write", self.directory)


def lost_seconds(save: Callable[[], object], core_count: int, rounds: int) -> float:
    """What one save takes from a program that keeps every core busy: it does less work beside saves than alone.

    The load has a thread on each core, which reads memory and computes a CRC of it without the GIL.  The threads wait
    for each other after each piece, as those of one operation of torch do: a core that is taken from one of them stops
    all.  Windows with and without saves take turns.
    """
    with _Load(core_count) as load:
        lost = []
        for _ in range(rounds):
            alone, _ = load.rate(lambda: time.sleep(_WINDOW_SECONDS))
            beside, (count, seconds) = load.rate(lambda: _repeat(save))
            lost.append(max(0.0, 1 - beside / alone) * seconds / count if alone else 0.0)
        return median(lost)


def _repeat(save: Callable[[], object]) -> tuple[int, float]:
    """Save until the window is over: how many times, and in which time."""
    began, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - began < _WINDOW_SECONDS:
        save()
        count += 1
    return count, time.monotonic() - began


class _Load:
    """Threads in lockstep that keep cores busy; a context that ends them."""

    def __init__(self, count: int) -> None:
        self._pieces = 0
        self._barrier = threading.Barrier(count, self._count_piece)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> _Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._barrier.abort()
        for thread in self._threads:
            thread.join()

    def _count_piece(self) -> None:
        self._pieces += 1

    def _run(self) -> None:
        memory = bytearray(os.urandom(4096) * (_LOAD_BYTES // 4096))
        with suppress(threading.BrokenBarrierError):
            while True:
                zlib.crc32(memory)
                self._barrier.wait()

    def rate(self, action: Callable[[], T]) -> tuple[float, T]:
        """The pieces of the load in a second while an action runs, and its result."""
        before, began = self._pieces, time.monotonic()
        result = action()
        return (self._pieces - before) / (time.monotonic() - began), result


# -- memory ----------------------------------------------------------------------------------------------------------

# The limit of a control group and what it uses, of versions 2 and 1; a container sees its own as the root.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """The memory that this process may still take."""
    return available_in(
        content_of("/proc/meminfo"), [(content_of(limit), content_of(usage)) for limit, usage in _LIMITS]
    )


def available_in(meminfo: str, limits: Sequence[tuple[str, str]]) -> int:
    """The least of `MemAvailable` (proc_meminfo(5)) and of what each limit leaves; 0 where nothing says."""
    words = next((line.split() for line in meminfo.splitlines() if line.startswith("MemAvailable:")), [])
    rooms = [int(words[1]) << 10] if len(words) == 3 and words[1].isdecimal() else []
    rooms += [int(limit) - int(usage) for limit, usage in limits if limit.isdecimal() and usage.isdecimal()]
    return max(0, min(rooms, default=0))
