"""Arrangement: the locations of an arena's segments in memory, and all else that follows from their table.

Theory of operation.  A **table** is what an inventory says about the segments: names, dtypes, shapes, strides.  An
**arrangement** is computed from a table alone, when an inventory has brought another one: the layout, the plan of each
file and the rows of the manifest, so that a save computes none of them.

    buffer   | segment  .| segment   .|seg.| reserved .|      . is padding to 256 bytes, always zero
    source 0 |-----------------------------------------|      contiguous segments are read here
    source 1             |-----------|                        a channels_last segment has its own source

The segments of a wrapped arena have no buffer, and each has a source of its own.

Rules: an arrangement is never changed, so callers may cache by the identity of its layout.  A new one keeps the buffer
of the one before if no segment there would change.  Called by `arena`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.format.layout import DTYPES, Layout, Segment, TensorSpec, lay_out
from engine.format.manifest import Rows, encode_rows
from engine.format.plan import Extents, Source, file_runs
from engine.state.inventory import Inventory
from engine.state.memory import HostMemory, dense_stride, merge_dims


class Table(NamedTuple):
    """Everything that a layout and its plans depend on: specs, strides and aliases by name, `Arena.unfenced`, and
    whether untrained tensors have files of their own."""

    specs: Mapping[str, TensorSpec]
    strides: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    unfenced: frozenset[str]
    split_untrained: bool


class Arrangement(NamedTuple):
    """Everything that follows from a table.  One value, so that an interrupt replaces all of it or nothing.

    Attributes:
        locations: for each segment, the index of its source and its offset there in bytes.
        buffer: None for a wrapped arena.
    """

    table: Table
    layout: Layout
    rows: Rows
    locations: tuple[tuple[int, int], ...]
    runs: tuple[Extents, ...]
    buffer: HostMemory | None


def tabulate(inventory: Inventory, adopted: bool, fenced: bool, split_untrained: bool) -> Table:
    """The table of an inventory.

    Args:
        inventory: the tensors.
        adopted: whether they move to a buffer.
        fenced: whether optimizers hold their steps back.
        split_untrained: whether untrained tensors have files of their own.
    """
    entries = inventory.entries
    specs = {name: entry.spec for name, entry in entries.items()}
    # Wrapped tensors are read with the strides that they have at each save.
    strides = {name: dense_stride(entry.like) for name, entry in entries.items()} if adopted else {}
    trained = inventory.trained
    roles = {"buffer", "grad", "model"} if fenced else {"buffer", "grad"}
    unfenced = frozenset(name for name, spec in specs.items() if spec.role in roles and name not in trained)
    return Table(specs, strides, inventory.aliases, unfenced, split_untrained)


def arrange(table: Table, adopted: bool, previous: Arrangement | None) -> Arrangement:
    """The arrangement of a table, in the previous buffer if no segment of that would change."""
    layout = lay_out(
        list(table.specs.values()),
        table.aliases,
        untrained=table.unfenced,
        split_untrained=table.split_untrained,
    )
    buffer = None
    if adopted:
        fits = previous is not None and (_in_arena(layout), table.strides) == (
            _in_arena(previous.layout),
            previous.table.strides,
        )
        buffer = previous.buffer if previous is not None and fits else HostMemory(layout.arena_bytes)
    locations: list[tuple[int, int]] = []
    source_count = 1 if adopted else 0  # the buffer as a whole
    for segment in layout.segments:
        if adopted and _is_contiguous(segment, table.strides[segment.name]):
            locations.append((0, segment.arena_offset))
        else:
            locations.append((source_count, 0))
            source_count += 1
    file_count = len(layout.files)
    runs = file_runs(layout, [(source + file_count, offset) for source, offset in locations])
    return Arrangement(table, layout, encode_rows(layout), tuple(locations), runs, buffer)


def _in_arena(layout: Layout) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int]]]:
    """The part of a layout that a buffer depends on."""
    return layout.arena_bytes, {s.name: (s.dtype, s.shape, s.arena_offset) for s in layout.segments}


def sources_of(arrangement: Arrangement, inventory: Inventory) -> tuple[Source, ...]:
    """The memory that the locations of an arrangement refer to."""
    buffer, segments = arrangement.buffer, arrangement.layout.segments
    if buffer is None:
        tensors = [inventory.entries[segment.name].tensors[0] for segment in segments]
        return tuple(_source(s, t.data_ptr(), t.stride()) for s, t in zip(segments, tensors, strict=True))
    sources = [Source(buffer.address, buffer.nbytes)]
    for segment, (source, _) in zip(segments, arrangement.locations, strict=True):
        if source:
            stride = arrangement.table.strides[segment.name]
            sources.append(_source(segment, buffer.address + segment.arena_offset, stride))
    return tuple(sources)


def _source(segment: Segment, address: int, stride: Sequence[int]) -> Source:
    """A source of one segment alone."""
    if _is_contiguous(segment, stride):
        return Source(address, segment.nbytes)
    shape, merged_stride = zip(*merge_dims(segment.shape, stride), strict=True)
    return Source(address, segment.nbytes, DTYPES[segment.dtype].itemsize, shape, merged_stride)


def _is_contiguous(segment: Segment, stride: Sequence[int]) -> bool:
    dims = merge_dims(segment.shape, stride)
    return segment.nbytes == 0 or not dims or (len(dims) == 1 and dims[0][1] == 1)
