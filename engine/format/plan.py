"""Plan: from a layout to chunks, blocks and extents.  Pure; all rounding and alignment lives here.

Theory of operation.  A file is cut twice.  **Chunks** are the unit of status and of the manifest: the data
section is cut every `chunk_bytes`, and the first chunk carries the header as well.  **Blocks** are the unit
of one write or read: a chunk is cut every `block_bytes`.  Headers, chunk sizes and block sizes are all
multiples of `ALIGNMENT`, so every block starts aligned, as O_DIRECT requires.  Only the last block of a file may have a
length that is not a multiple.  Its write is padded with zeros, which a final truncate removes.  An **extent** is a run
contiguous both in its source and in its file.

    file   |header| segment | segment |   segment        | seg |
    chunk  |--------------------|--------------------|---------|
    block  |-------|-------|----|-------|-------|----|-------|-|
    extent |--|----|--|----|----|-------|-------|-|--|---|---|-|

A source is a number, which the writer turns into an address: first the headers, one per file, then the arena's sources.
A plan holds no address and no tensor, so it is computed once per arena and reused by every later save.

Rules: no torch, no I/O, integers of any size, deterministic.  Called by `manifest` (geometry), `arena`
(runs), `writer` and `reader`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import add, eq, le, not_, sub
from typing import NamedTuple, overload

from engine.errors import ArgumentError
from engine.format.layout import DTYPES, HEADER_ALIGNMENT, Layout, align_up

# O_DIRECT requires offsets, lengths and addresses aligned to the logical block of the device (open(2), statx(2)
# STATX_DIOALIGN): 512 or 4096 on every NVMe drive, and at most a page on any Linux file system.
ALIGNMENT = 4096

# A chunk is the unit of progress: 64 MiB take a fast drive a few tens of milliseconds, and the chunk table of a 1 TB
# checkpoint has 16,000 rows.
CHUNK_BYTES_DEFAULT = 64 << 20

assert HEADER_ALIGNMENT % ALIGNMENT == 0


class Source(NamedTuple):
    """A location in memory that bytes are read from or written to.

    With shape () it is plain memory; otherwise a strided tensor, which native code serialises row-major (strides in
    elements, dimensions that continue each other merged, at most 8).
    """

    address: int
    nbytes: int
    itemsize: int = 1
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


class Extent(NamedTuple):
    """A run of bytes contiguous in its source and in its file."""

    source: int
    source_offset: int
    file_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Extents(Sequence[Extent]):
    """Extents in columns, because there may be a hundred thousand.

    That many tuples take a second, most of it in Python's garbage collector, which visits them.  Columns of integers
    are processed by loops in C.
    """

    sources: list[int]
    source_offsets: list[int]
    file_offsets: list[int]
    nbytes: list[int]

    def __len__(self) -> int:
        return len(self.nbytes)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Extents: ...
    def __getitem__(self, index: int | slice) -> Extent | Extents:
        columns = (self.sources, self.source_offsets, self.file_offsets, self.nbytes)
        if isinstance(index, slice):
            return Extents(*(column[index] for column in columns))
        return Extent(*(column[index] for column in columns))

    def chosen(self, choice: Iterable[object]) -> Extents:
        """The extents whose entry in `choice` is true."""
        truths = list(choice)
        columns = (self.sources, self.source_offsets, self.file_offsets, self.nbytes)
        return Extents(*(list(compress(column, truths)) for column in columns))

    def index_at(self, offset: int) -> int:
        """The index of the first extent that ends beyond this offset of the file.  They are in order and disjoint."""
        after = bisect_right(self.file_offsets, offset)
        reaches = after > 0 and self.file_offsets[after - 1] + self.nbytes[after - 1] > offset
        return after - 1 if reaches else after

    def append(self, source: int, source_offset: int, file_offset: int, nbytes: int) -> None:
        """Add one extent."""
        self.sources.append(source)
        self.source_offsets.append(source_offset)
        self.file_offsets.append(file_offset)
        self.nbytes.append(nbytes)

    def append_within(self, extents: Extents, start: int, end: int) -> None:
        """Add extents, cut to a range of the file.  There is at least one, and each overlaps the range."""
        first = len(self)
        self.sources.extend(extents.sources)
        self.source_offsets.extend(extents.source_offsets)
        self.file_offsets.extend(extents.file_offsets)
        self.nbytes.extend(extents.nbytes)
        before = max(0, start - self.file_offsets[first])
        self.source_offsets[first] += before
        self.file_offsets[first] += before
        self.nbytes[first] -= before
        self.nbytes[-1] -= max(0, self.file_offsets[-1] + self.nbytes[-1] - end)
        assert self.nbytes[first] > 0 and self.nbytes[-1] > 0, (start, end)


class Block(NamedTuple):
    """One write or read: `nbytes` stored bytes at an aligned offset, made of a run of the plan's extents."""

    file_index: int
    file_offset: int
    nbytes: int
    extent_start: int
    extent_count: int

    @property
    def write_bytes(self) -> int:
        """Bytes that are written: `nbytes` padded with zeros to `ALIGNMENT`."""
        return align_up(self.nbytes, ALIGNMENT)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A contiguous range of one file, made of a run of blocks."""

    file_index: int
    index: int
    offset: int
    nbytes: int


class PlannedFile(NamedTuple):
    """One file of the plan: its name, its exact length and the length of its header."""

    name: str
    nbytes: int
    header_bytes: int


class Plan(NamedTuple):
    """How one arena becomes files.  `block_starts[i]` is the first block of chunk i; one more entry ends it."""

    files: tuple[PlannedFile, ...]
    chunks: tuple[Chunk, ...]
    blocks: tuple[Block, ...]
    extents: Extents
    block_starts: tuple[int, ...]
    block_bytes: int


class ExtentColumns(NamedTuple):
    """Extents as the pipeline takes them: offsets are within the block."""

    source_offsets: Sequence[int]
    block_offsets: Sequence[int]
    nbytes: Sequence[int]
    sources: Sequence[int]


def extent_columns(plan: Plan) -> ExtentColumns:
    """The plan's extents as the pipeline takes them."""
    extents = plan.extents
    block_offsets: list[int] = []
    for block in plan.blocks:
        file_offsets = extents.file_offsets[block.extent_start : block.extent_start + block.extent_count]
        block_offsets.extend(map(sub, file_offsets, repeat(block.file_offset)))
    return ExtentColumns(extents.source_offsets, block_offsets, extents.nbytes, extents.sources)


def block_rows(blocks: Iterable[Block]) -> Iterator[tuple[int, int, int, int, int]]:
    """Blocks as the pipeline takes them: (file_offset, nbytes, file, extent_start, extent_count)."""
    for block in blocks:
        yield block.file_offset, block.nbytes, block.file_index, block.extent_start, block.extent_count


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient rounded up."""
    return -(-dividend // divisor)


def chunk_size(layout: Layout, chunk_count: int | None, chunk_bytes: int | None) -> int:
    """Bytes of data per chunk, a multiple of `ALIGNMENT`.

    `chunk_count` divides the data of all files together, counted in elements of the widest dtype and rounded
    up: 125,000,000 float32 in 3 are 41,666,667 each.  As no chunk spans two files and sizes are rounded up to
    `ALIGNMENT`, there may be one chunk more per further file, and fewer where the arena is small.

    Raises:
        ArgumentError: both are given, or one is not positive.
    """
    if chunk_count is not None and chunk_bytes is not None:
        raise ArgumentError("chunk_count and chunk_bytes say the same thing twice; give one of them")
    if chunk_count is not None:
        if chunk_count < 1:
            raise ArgumentError(f"chunk_count is {chunk_count}; it must be at least 1")
        data_bytes = sum(file.nbytes - len(file.header) for file in layout.files)
        element = max((DTYPES[segment.dtype].itemsize for segment in layout.segments), default=1)
        per_chunk = ceil_div(ceil_div(data_bytes, element), chunk_count) * element
    else:
        per_chunk = CHUNK_BYTES_DEFAULT if chunk_bytes is None else chunk_bytes
        if per_chunk < 1:
            raise ArgumentError(f"chunk_bytes is {per_chunk}; it must be at least 1")
    return max(align_up(per_chunk, ALIGNMENT), ALIGNMENT)


def file_runs(layout: Layout, places: Sequence[tuple[int, int]]) -> tuple[Extents, ...]:
    """For each file its runs, the header first: the part of a plan that does not depend on chunks and blocks.

    Args:
        layout: segments and files.
        places: for each segment, its source and its offset there.  Sources below ``len(layout.files)`` are the
            files' headers.
    """
    assert len(places) == len(layout.segments), (len(places), len(layout.segments))
    sources = [source for source, _ in places]
    source_offsets = [source_offset for _, source_offset in places]
    file_offsets = [segment.file_offset for segment in layout.segments]
    nbytes = [segment.nbytes for segment in layout.segments]
    file_indices = [segment.file_index for segment in layout.segments]
    runs = []
    for index, file in enumerate(layout.files):
        # Segments are in the order of files.
        here = slice(bisect_left(file_indices, index), bisect_right(file_indices, index))
        header = (index, 0, 0, len(file.header))
        columns = (sources, source_offsets, file_offsets, nbytes)
        whole = Extents(*([first, *column[here]] for first, column in zip(header, columns, strict=True)))
        runs.append(merge_runs(whole))
    return tuple(runs)


def make_plan(layout: Layout, runs: Sequence[Extents], block_bytes: int, chunk_bytes: int) -> Plan:
    """Plan the files of a layout.

    Args:
        layout: segments and files.
        runs: its `file_runs`.
        block_bytes: size of a block, a multiple of `ALIGNMENT`.
        chunk_bytes: size of a chunk's data, a multiple of `ALIGNMENT`.
    """
    files = tuple(PlannedFile(file.name, file.nbytes, len(file.header)) for file in layout.files)
    chunks = tuple(chunk for index, file in enumerate(files) for chunk in cut_file(index, file, chunk_bytes))
    return lay_extents(plan_geometry(files, chunks, block_bytes), runs)


def cut_file(file_index: int, file: PlannedFile, chunk_bytes: int) -> Iterable[Chunk]:
    """Cut a file into chunks of `chunk_bytes` of data; the first has the header as well."""
    assert chunk_bytes > 0 and chunk_bytes % ALIGNMENT == 0, chunk_bytes
    assert file.header_bytes % ALIGNMENT == 0 and file.nbytes >= file.header_bytes > 0, file
    count = max(1, ceil_div(file.nbytes - file.header_bytes, chunk_bytes))
    for index in range(count):
        start = file.header_bytes + index * chunk_bytes if index else 0
        end = min(file.header_bytes + (index + 1) * chunk_bytes, file.nbytes)
        yield Chunk(file_index, index, start, end - start)


def plan_geometry(files: tuple[PlannedFile, ...], chunks: tuple[Chunk, ...], block_bytes: int) -> Plan:
    """A plan with chunks and blocks but no extents: as much as a manifest records."""
    assert block_bytes > 0 and block_bytes % ALIGNMENT == 0, block_bytes
    blocks: list[Block] = []
    block_starts = [0]
    for chunk in chunks:
        for offset in range(0, chunk.nbytes, block_bytes):
            nbytes = min(block_bytes, chunk.nbytes - offset)
            blocks.append(Block(chunk.file_index, chunk.offset + offset, nbytes, 0, 0))
        block_starts.append(len(blocks))
    return Plan(files, chunks, tuple(blocks), Extents([], [], [], []), tuple(block_starts), block_bytes)


def lay_extents(plan: Plan, runs: Sequence[Extents]) -> Plan:
    """Cut each file's runs at its block boundaries.  Blocks that no run touches get no extents.

    Args:
        plan: of `plan_geometry`, with its blocks in order of file and offset.
        runs: for each file, the runs to read or write, as `merge_runs` returns them.
    """
    assert not plan.extents, "blocks that nothing touches would keep what they have"
    extents = Extents([], [], [], [])
    blocks: list[Block] = []
    for block in plan.blocks:
        here = runs[block.file_index]
        block_end = block.file_offset + block.nbytes
        first = here.index_at(block.file_offset)
        last = bisect_left(here.file_offsets, block_end, lo=first)
        if first == last:
            blocks.append(block)
            continue
        blocks.append(block._replace(extent_start=len(extents), extent_count=last - first))
        extents.append_within(here[first:last], block.file_offset, block_end)
    wanted_bytes = sum(sum(merged.nbytes) for merged in runs)
    assert sum(extents.nbytes) == wanted_bytes, "a run lies outside every block"
    return plan._replace(blocks=tuple(blocks), extents=extents)


def merge_runs(runs: Extents) -> Extents:
    """Join neighbours that continue each other in source and file; drop empty runs.

    Runs are in order of file offset and do not overlap.
    """
    runs = runs.chosen(runs.nbytes)
    source_ends = map(add, runs.source_offsets, runs.nbytes)
    file_ends = list(map(add, runs.file_offsets, runs.nbytes))
    assert all(map(le, file_ends, runs.file_offsets[1:])), "runs overlap"
    ended = zip(runs.sources, source_ends, file_ends, strict=True)
    begun = zip(runs.sources[1:], runs.source_offsets[1:], runs.file_offsets[1:], strict=True)
    is_head = [True, *map(not_, map(eq, begun, ended))]
    heads = runs.chosen(is_head)
    ends = compress(file_ends, [*is_head[1:], True])
    nbytes = list(map(sub, ends, heads.file_offsets))
    return Extents(heads.sources, heads.source_offsets, heads.file_offsets, nbytes)
