"""Plan: chunks, blocks and extents, checked against their definitions, byte by byte if small enough."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import columns
from strategies import ANY_SHAPES, EDGES, FAR_EDGES, SMALL_SHAPES, plan_of, planned, specs

from engine.errors import ArgumentError
from engine.format.layout import DTYPES, Layout, TensorSpec, align_up, lay_out
from engine.format.plan import (
    ALIGNMENT,
    CHUNK_BYTES_DEFAULT,
    Extent,
    Plan,
    PlannedFile,
    ceil_div,
    chunk_size,
    cut_file,
    extent_columns,
    lay_extents,
    merge_runs,
    plan_geometry,
)

Arguments = tuple[Layout, list[tuple[int, int]], int, int]


def stored_runs(layout: Layout, where: Sequence[tuple[int, int]]) -> list[list[Extent]]:
    """The runs of each file before cutting: its header, then its segments."""
    runs = [[Extent(index, 0, 0, len(file.header))] for index, file in enumerate(layout.files)]
    for segment, (source, source_offset) in zip(layout.segments, where, strict=True):
        runs[segment.file_index].append(Extent(source, source_offset, segment.file_offset, segment.nbytes))
    return runs


def planned_runs(plan: Plan) -> list[list[Extent]]:
    """The extents of each file, in the order of its blocks."""
    runs: list[list[Extent]] = [[] for _ in plan.files]
    for block in plan.blocks:
        runs[block.file_index].extend(plan.extents[block.extent_start :][: block.extent_count])
    return runs


def joined(runs: Iterable[Extent]) -> list[Extent]:
    """The same bytes in the fewest runs, so that two ways of cutting compare equal."""
    result: list[list[int]] = []
    for source, source_offset, file_offset, nbytes in runs:
        if result:
            last = result[-1]
            if last[0] == source and last[1] + last[3] == source_offset and last[2] + last[3] == file_offset:
                last[3] += nbytes
                continue
        if nbytes:
            result.append([source, source_offset, file_offset, nbytes])
    return [Extent(*run) for run in result]


def byte_map(runs: Iterable[Extent]) -> dict[int, tuple[int, int]]:
    """For each byte of a file its source and offset there: the naive oracle."""
    result: dict[int, tuple[int, int]] = {}
    for run in runs:
        for index in range(run.nbytes):
            assert run.file_offset + index not in result, "a byte of the file twice"
            result[run.file_offset + index] = (run.source, run.source_offset + index)
    return result


@given(planned(ANY_SHAPES))
def test_extents_cover_every_stored_byte_of_the_files_once(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    for file, expected, actual in zip(plan.files, stored_runs(layout, where), planned_runs(plan), strict=True):
        end = 0
        for extent in actual:
            assert extent.file_offset == end and extent.nbytes > 0
            end += extent.nbytes
        assert end == file.nbytes
        assert joined(actual) == joined(expected)


@given(planned(ANY_SHAPES))
def test_extents_cover_every_stored_byte_of_the_sources_once_and_no_padding(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    pairs = zip(where, layout.segments, strict=True)
    stored = {(source, offset, offset + segment.nbytes) for (source, offset), segment in pairs}
    stored |= {(index, 0, len(file.header)) for index, file in enumerate(layout.files)}
    read = sorted((extent.source, extent.source_offset, extent.nbytes) for extent in plan.extents)
    for (source, offset, nbytes), (next_source, next_offset, _) in itertools.pairwise(read):
        assert source != next_source or offset + nbytes <= next_offset, "a byte of a source is read twice"
    for source, offset, nbytes in read:
        overlaps = [
            min(end, offset + nbytes) - max(start, offset)
            for held, start, end in stored
            if held == source and start < offset + nbytes and offset < end
        ]
        assert sum(overlaps) == nbytes, "an extent reads padding"
    assert sum(nbytes for _, _, nbytes in read) == sum(end - start for _, start, end in stored)


@given(planned(ANY_SHAPES))
def test_blocks_are_disjoint_ordered_aligned_and_cover_each_file(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    assert [block.file_index for block in plan.blocks] == sorted(block.file_index for block in plan.blocks)
    for index, file in enumerate(plan.files):
        blocks = [block for block in plan.blocks if block.file_index == index]
        end = 0
        for block in blocks:
            assert block.file_offset == end and end % ALIGNMENT == 0, "a whole write before this one"
            assert 0 < block.nbytes <= block_bytes
            assert block.write_bytes % ALIGNMENT == 0 and 0 <= block.write_bytes - block.nbytes < ALIGNMENT
            end += block.nbytes
        assert end == file.nbytes


@given(planned(ANY_SHAPES))
def test_extents_belong_to_one_block_each(arguments: Arguments) -> None:
    plan = plan_of(*arguments)
    next_extent = 0
    for block in plan.blocks:
        assert block.extent_start == next_extent
        next_extent += block.extent_count
        members = plan.extents[block.extent_start : next_extent]
        assert members[0].file_offset == block.file_offset
        assert sum(extent.nbytes for extent in members) == block.nbytes
    assert next_extent == len(plan.extents)


@given(planned(ANY_SHAPES))
def test_no_block_ends_inside_an_element(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    for segment in layout.segments:
        cuts = [
            block.file_offset - segment.file_offset
            for block in plan.blocks
            if block.file_index == segment.file_index
            and segment.file_offset < block.file_offset < segment.file_offset + segment.nbytes
        ]
        assert all(cut % DTYPES[segment.dtype].itemsize == 0 for cut in cuts)


@given(planned(ANY_SHAPES))
def test_chunks_partition_the_blocks(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    assert plan.block_starts[0] == 0 and plan.block_starts[-1] == len(plan.blocks)
    assert len(plan.block_starts) == len(plan.chunks) + 1
    for chunk, (start, stop) in zip(plan.chunks, itertools.pairwise(plan.block_starts), strict=True):
        members = plan.blocks[start:stop]
        assert members and {block.file_index for block in members} == {chunk.file_index}
        assert members[0].file_offset == chunk.offset
        assert sum(block.nbytes for block in members) == chunk.nbytes


@given(planned(ANY_SHAPES))
def test_chunks_cut_the_data_evenly_and_the_first_has_the_header(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    for index, file in enumerate(plan.files):
        chunks = [chunk for chunk in plan.chunks if chunk.file_index == index]
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        data = [chunk.nbytes - (0 if chunk.index else file.header_bytes) for chunk in chunks]
        assert all(nbytes == chunk_bytes for nbytes in data[:-1])
        assert sum(data) == file.nbytes - file.header_bytes
        assert len(chunks) == 1 or 0 < data[-1] <= chunk_bytes


@given(planned(ANY_SHAPES))
def test_the_columns_of_the_pipeline_are_the_extents_by_block(arguments: Arguments) -> None:
    plan = plan_of(*arguments)
    rows = list(zip(*extent_columns(plan), strict=True))
    assert len(rows) == len(plan.extents)
    for block in plan.blocks:
        here = slice(block.extent_start, block.extent_start + block.extent_count)
        assert rows[here] == [
            (extent.source_offset, extent.file_offset - block.file_offset, extent.nbytes, extent.source)
            for extent in plan.extents[here]
        ]


@given(planned(ANY_SHAPES))
def test_the_plan_is_deterministic(arguments: Arguments) -> None:
    layout, where, *sizes = arguments
    assert plan_of(layout, where, *sizes) == plan_of(layout, tuple(where), *sizes)


@given(planned(SMALL_SHAPES, max_count=4))
def test_extents_equal_the_naive_byte_map(arguments: Arguments) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    plan = plan_of(layout, where, block_bytes, chunk_bytes)
    for expected, actual in zip(stored_runs(layout, where), planned_runs(plan), strict=True):
        assert byte_map(actual) == byte_map(expected)


@given(planned(SMALL_SHAPES, max_count=4), st.data())
def test_extents_of_a_part_are_in_the_blocks_that_it_touches_only(arguments: Arguments, data: st.DataObject) -> None:
    layout, where, block_bytes, chunk_bytes = arguments
    whole = plan_of(layout, where, block_bytes, chunk_bytes)
    geometry = plan_geometry(whole.files, whole.chunks, block_bytes)
    part = [[run for run in runs if data.draw(st.booleans())] for runs in stored_runs(layout, where)]
    plan = lay_extents(geometry, [merge_runs(columns(runs)) for runs in part])
    wanted = [byte_map(runs) for runs in part]
    assert [byte_map(runs) for runs in planned_runs(plan)] == wanted
    for block, cut in zip(plan.blocks, whole.blocks, strict=True):
        assert block[:3] == cut[:3], "the cutting does not depend on what is read"
        touched = any(block.file_offset + index in wanted[block.file_index] for index in range(block.nbytes))
        assert (block.extent_count > 0) == touched


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_merged_runs_are_the_same_bytes_in_the_fewest_runs(steps: list[tuple[int, int, int, int]]) -> None:
    runs: list[Extent] = []
    file_offset = 0
    for source, source_offset, gap_bytes, nbytes in steps:
        follows = runs and source_offset == 0  # half of the time, continue at the end of the last run
        start = runs[-1].source_offset + runs[-1].nbytes if follows else source_offset
        file_offset += gap_bytes
        runs.append(Extent(source, start, file_offset, nbytes))
        file_offset += nbytes
    merged = list(merge_runs(columns(runs)))
    assert byte_map(merged) == byte_map(runs)
    assert merged == joined(run for run in runs if run.nbytes)
    assert all(run.nbytes for run in merged)


@pytest.mark.parametrize("nbytes", [*EDGES, *FAR_EDGES])
def test_the_edges_of_one_tensor(nbytes: int) -> None:
    layout = lay_out([TensorSpec("w", "uint8", (nbytes,), "model", "")])
    header_bytes = len(layout.files[0].header)
    chunk_bytes = chunk_size(layout, chunk_count=2, chunk_bytes=None)
    plan = plan_of(layout, [(1, 0)], align_up(chunk_bytes // 4, ALIGNMENT), chunk_bytes)
    assert plan.files[0].nbytes == header_bytes + nbytes
    assert len(plan.chunks) == (1 if nbytes <= ALIGNMENT else 2)
    last = plan.blocks[-1]
    assert last.file_offset + last.nbytes == header_bytes + nbytes
    assert last.write_bytes - last.nbytes == -nbytes % ALIGNMENT


def test_a_billion_bytes_in_three_chunks_are_the_ceil_of_a_third_each() -> None:
    layout = lay_out([TensorSpec("w", "float32", (125_000_000,), "model", "")])
    elements = 41_666_667
    chunk_bytes = chunk_size(layout, chunk_count=3, chunk_bytes=None)
    assert chunk_bytes == -(-elements * 4 // ALIGNMENT) * ALIGNMENT
    plan = plan_of(layout, [(1, 0)], 4 << 20, chunk_bytes)
    header_bytes = plan.files[0].header_bytes
    assert [chunk.nbytes for chunk in plan.chunks] == [
        header_bytes + chunk_bytes,
        chunk_bytes,
        500_000_000 - 2 * chunk_bytes,
    ]


@given(specs(ANY_SHAPES), st.integers(1, 50))
def test_chunk_count_obeys_ceil(table: list[TensorSpec], chunk_count: int) -> None:
    layout = lay_out(table)
    chunk_bytes = chunk_size(layout, chunk_count, None)
    data_bytes = sum(segment.nbytes for segment in layout.segments)
    widest = max((DTYPES[segment.dtype].itemsize for segment in layout.segments), default=1)
    assert chunk_bytes % ALIGNMENT == 0 and chunk_bytes * chunk_count >= data_bytes, "enough chunks"
    exact = max(1, -(-data_bytes // chunk_count))
    assert chunk_bytes < exact + widest + ALIGNMENT, "rounded up to one element, then to the alignment, no more"
    files = [PlannedFile(file.name, file.nbytes, len(file.header)) for file in layout.files]
    count = sum(len(list(cut_file(index, file, chunk_bytes))) for index, file in enumerate(files))
    assert count <= chunk_count + len(files) - 1


@given(specs(SMALL_SHAPES), st.integers(1, 2**50))
def test_chunk_bytes_are_rounded_up(table: list[TensorSpec], chunk_bytes: int) -> None:
    rounded = chunk_size(lay_out(table), None, chunk_bytes)
    assert rounded % ALIGNMENT == 0 and rounded - ALIGNMENT < chunk_bytes <= rounded


def test_chunk_size_by_default() -> None:
    assert chunk_size(lay_out([]), None, None) == CHUNK_BYTES_DEFAULT


@pytest.mark.parametrize(
    ("chunk_count", "chunk_bytes", "message"),
    [(3, 4096, "give one of them"), (0, None, "chunk_count is 0"), (None, 0, "chunk_bytes is 0")],
)
def test_chunk_size_refuses_by_value(chunk_count: int | None, chunk_bytes: int | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        chunk_size(lay_out([]), chunk_count, chunk_bytes)


@given(st.integers(0, 2**70), st.integers(1, 2**40))
def test_ceil_div_rounds_the_quotient_up(dividend: int, divisor: int) -> None:
    quotient = ceil_div(dividend, divisor)
    assert (quotient - 1) * divisor < dividend <= quotient * divisor


def test_runs_that_overlap_or_are_outside_every_block_fail_an_assertion() -> None:
    layout = lay_out([TensorSpec("w", "uint8", (10,), "model", "")])
    plan = plan_of(layout, [(1, 0)], ALIGNMENT, ALIGNMENT)
    end = plan.files[0].nbytes
    with pytest.raises(AssertionError, match="keep what they have"):
        lay_extents(plan, [])
    with pytest.raises(AssertionError, match="outside every block"):
        lay_extents(plan_geometry(plan.files, plan.chunks, ALIGNMENT), [columns([Extent(1, 0, end - 1, 2)])])
    with pytest.raises(AssertionError, match="overlap"):
        merge_runs(columns([Extent(1, 0, 0, 2), Extent(1, 5, 1, 2)]))
