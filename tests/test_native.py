"""The native pipeline, driven through `engine.native` directly: on the real ring, and through a table of faults.

Theory of operation.  What a job must do is what numpy does to the same bytes: a write is a tensor's bytes in row-major
order, cut at block boundaries, a checksum is the specification's XXH3-64 (`xxh3.py`), and a job that says it succeeded
has moved every byte.  The second half replaces the ring by `faults.FaultTable`: every fault ends in a job that is done,
in the right failure or in the right bytes, and in a pipeline that takes the next job.

A pipeline and its files are shared by the examples of one hypothesis test.  No test reads a clock; `HANG_NS` ends one
that would never end.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine._native import ffi, lib
from faults import Fault, FaultTable, boasting, corrupting, not_started, refused, short
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import (
    HANG_NS,
    SEED,
    Memory,
    bytes_of,
    cut,
    finish,
    make_job,
    noise,
    plain,
    run,
    strided,
    until,
    whole,
)
from xxh3 import xxh3_64

from engine.filesystem import Filesystem
from engine.native import (
    ALIGNMENT,
    DIMS_MAX,
    JOBS_MAX,
    Backend,
    BlockState,
    Direction,
    Failure,
    FailureKind,
    Job,
    Milestone,
    OpenError,
    Pipeline,
    Refused,
    block_checksum,
)
from engine.plan import Extent, Plan, align_up

WRITE, READ = Direction.WRITE, Direction.READ
SLOT_BYTES = 4 * ALIGNMENT
LOOK_NS = 1  # a wait that only looks

# Tries without progress before a job fails, and refusals of a whole submission in a row (native/pipeline.c).
RETRIES_MAX = 16
REFUSALS_MAX = 100


class Stage(NamedTuple):
    """A pipeline, and a file to write to and read from."""

    pipeline: Pipeline
    path: Path
    fd: int


@pytest.fixture(scope="module", params=["io_uring", "io_uring_plain", "threads"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    path = tmp_path_factory.mktemp("native") / "blocks"
    fd = Filesystem().open_for_blocks(str(path), write=True, direct=True)
    pipeline = Pipeline(4, SLOT_BYTES, request.param)
    yield Stage(pipeline, path, fd)
    pipeline.close()
    os.close(fd)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = Filesystem().open_for_blocks(str(tmp_path / "blocks"), write=True, direct=True)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def buffered_fd(tmp_path: Path) -> Iterator[int]:
    """A file without O_DIRECT, for `FaultTable`: it moves any number of bytes, from memory of any alignment."""
    descriptor = os.open(tmp_path / "buffered", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def open_pipeline(rung: Backend) -> Iterator[Callable[..., Pipeline]]:
    """Opens pipelines, and closes them at the end."""
    opened: list[tuple[Pipeline, FaultTable | None]] = []  # the table too: it must outlive its pipeline

    def open_one(slot_count: int, slot_bytes: int = SLOT_BYTES, table: FaultTable | None = None) -> Pipeline:
        pipeline = Pipeline(slot_count, slot_bytes, rung, io_table=None if table is None else table.c_table)
        opened.append((pipeline, table))
        return pipeline

    yield open_one
    for pipeline, _ in opened:
        pipeline.close()


def content(fd: int, nbytes: int) -> bytes:
    """The start of a file, past whatever flags its descriptor has."""
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        return file.read(nbytes)


def rewrite(fd: int, offset: int, changed: bytes) -> None:
    """Change a file behind the pipeline's back."""
    with open(f"/proc/self/fd/{fd}", "r+b") as file:
        file.seek(offset)
        file.write(changed)


def checksums_of(plan: Plan, stored: list[bytes], seed: int = SEED) -> list[int]:
    """What the blocks of a plan must hash to."""
    return [
        block_checksum(
            stored[b.file_index][b.file_offset : b.file_offset + b.nbytes], seed, b.file_index, b.file_offset
        )
        for b in plan.blocks
    ]


def assert_usable(pipeline: Pipeline, fd: int) -> None:
    """The pipeline takes a write and a read of it, through every slot."""
    bytes_before, plan = noise(5 * SLOT_BYTES + 5, seed=7), whole(5 * SLOT_BYTES + 5, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(bytes_before)]), [fd])
    assert written.failure is None
    bytes_after = torch.zeros_like(bytes_before)
    read = run(pipeline, make_job(READ, plan, [plain(bytes_after)], checksums=written.checksums()), [fd])
    assert read.failure is None
    assert torch.equal(bytes_before, bytes_after)


# -- bytes there and back ---------------------------------------------------------------------------------------------

SIZES = [1, 4095, 4096, 4097, 2 * SLOT_BYTES, 5 * SLOT_BYTES + 17, 40 * SLOT_BYTES + 1]


@pytest.mark.parametrize("slot_count", [1, 2, 5])
@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_go_to_disk_and_back(
    open_pipeline: Callable[..., Pipeline], fd: int, nbytes: int, slot_count: int
) -> None:
    pipeline = open_pipeline(slot_count)
    before, after, plan = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8), whole(nbytes, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(before)]), [fd])
    assert written.failure is None
    assert set(written.states()) == {BlockState.WRITTEN}
    assert content(fd, nbytes) == bytes_of(before)
    assert written.counters["io_bytes"] == align_up(nbytes, ALIGNMENT) == os.fstat(fd).st_size
    read = run(pipeline, make_job(READ, plan, [plain(after)], checksums=written.checksums()), [fd])
    assert read.failure is None
    assert set(read.states()) == {BlockState.WRITTEN}
    assert torch.equal(before, after)


def test_a_file_of_exact_length_is_read_to_its_unaligned_end(stage: Stage) -> None:
    nbytes = SLOT_BYTES + 100
    before, after, plan = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8), whole(nbytes, SLOT_BYTES)
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(before)]), [stage.fd])
    os.truncate(stage.path, nbytes)
    read = run(stage.pipeline, make_job(READ, plan, [plain(after)], checksums=written.checksums()), [stage.fd])
    assert read.failure is None
    assert torch.equal(before, after)
    assert read.counters["io_bytes"] == nbytes


@pytest.mark.parametrize(("remaining_bytes", "block"), [(SLOT_BYTES, 1), (SLOT_BYTES + 50, 1), (0, 0), (50, 0)])
def test_a_file_that_ends_early_is_a_failure(stage: Stage, remaining_bytes: int, block: int) -> None:
    nbytes = SLOT_BYTES + 100
    before, after, plan = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8), whole(nbytes, SLOT_BYTES)
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(before)]), [stage.fd])
    os.truncate(stage.path, remaining_bytes)
    job = make_job(READ, plan, [plain(after)], checksums=written.checksums())
    failure = run(stage.pipeline, job, [stage.fd]).failure
    assert failure is not None
    assert failure.kind == FailureKind.SHORT
    assert failure.block in ({0, 1} if block == 0 else {1})
    assert not after[SLOT_BYTES:].any()


def test_a_block_is_made_of_many_extents(stage: Stage) -> None:
    # Every byte has a source of its own, and they lie backwards.
    nbytes = ALIGNMENT + 100
    before, after = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
    plan = cut([[Extent(nbytes - 1 - at, 0, at, 1) for at in range(nbytes)]], SLOT_BYTES)
    assert len(plan.extents) == nbytes and len(plan.blocks) == 1
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(byte) for byte in before.split(1)]), [stage.fd])
    assert content(stage.fd, nbytes) == bytes_of(before.flip(0))
    sources = [plain(byte) for byte in after.split(1)]
    run(stage.pipeline, make_job(READ, plan, sources, checksums=written.checksums()), [stage.fd])
    assert torch.equal(before, after)


@pytest.mark.every_backend
def test_several_files_in_any_order(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = open_pipeline(3)
    sizes = [3 * SLOT_BYTES + 1, ALIGNMENT, 5 * SLOT_BYTES]
    before = [noise(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    after = [torch.zeros_like(tensor) for tensor in before]
    paths = [tmp_path / f"{index}" for index in range(3)]
    fds = [Filesystem().open_for_blocks(str(path), write=True, direct=True) for path in paths]
    plan = cut([[Extent(index, 0, 0, nbytes)] for index, nbytes in enumerate(sizes)], SLOT_BYTES)
    backwards = range(len(plan.blocks))[::-1]
    written = run(pipeline, make_job(WRITE, plan, [*map(plain, before)], order=backwards), fds)
    for path, tensor, nbytes in zip(paths, before, sizes, strict=True):
        assert path.read_bytes()[:nbytes] == bytes_of(tensor)
    read = run(pipeline, make_job(READ, plan, [*map(plain, after)], checksums=written.checksums()), fds)
    assert read.failure is None
    assert all(map(torch.equal, before, after))
    for descriptor in fds:
        os.close(descriptor)


def test_a_read_may_want_only_a_part_of_a_block(stage: Stage) -> None:
    nbytes = 2 * SLOT_BYTES
    before, after, plan = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8), whole(nbytes, SLOT_BYTES)
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(before)]), [stage.fd])
    part = cut(
        [[Extent(0, 10, 10, 5), Extent(0, SLOT_BYTES - 3, SLOT_BYTES - 3, 6), Extent(0, 0, nbytes - 1, 1)]], SLOT_BYTES
    )
    read = run(stage.pipeline, make_job(READ, part, [plain(after)], checksums=written.checksums()), [stage.fd])
    assert read.failure is None
    expected = torch.zeros_like(after)
    for extent in part.extents:
        where = slice(extent.source_offset, extent.source_offset + extent.nbytes)
        expected[where] = before[extent.file_offset : extent.file_offset + extent.nbytes]
    assert torch.equal(after, expected)


@pytest.mark.every_backend
def test_padding_is_zero_whatever_the_slot_held(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline = open_pipeline(1)
    ones = torch.full((SLOT_BYTES,), 255, dtype=torch.uint8)
    run(pipeline, make_job(WRITE, whole(SLOT_BYTES, SLOT_BYTES), [plain(ones)]), [fd])
    for nbytes in (1, 4095, 4097, SLOT_BYTES - 1):
        run(pipeline, make_job(WRITE, whole(nbytes, SLOT_BYTES), [plain(ones)]), [fd])
        padded_bytes = align_up(nbytes, ALIGNMENT)
        assert content(fd, padded_bytes) == b"\xff" * nbytes + bytes(padded_bytes - nbytes)


# -- strided sources --------------------------------------------------------------------------------------------------

# One dtype for each element size.
DTYPES = [torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8]


class View(NamedTuple):
    """How to make a strided tensor: a base's shape, a slice of each dimension, and the order of dimensions."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    order: tuple[int, ...]

    def of_noise(self) -> torch.Tensor:
        """The view of a base of random bytes."""
        itemsize = self.dtype.itemsize
        base = noise(torch.Size(self.shape).numel() * itemsize).view(self.dtype).reshape(self.shape)
        return base[self.slices].permute(self.order)


@st.composite
def views(draw: st.DrawFn) -> View:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    slices = []
    for extent in shape:
        start = draw(st.integers(0, extent - 1))
        slices.append(slice(start, draw(st.integers(start + 1, extent)), draw(st.integers(1, 3))))
    order = tuple(draw(st.permutations(range(len(shape)))))
    return View(draw(st.sampled_from(DTYPES)), shape, tuple(slices), order)


def packed_runs(tensors: list[torch.Tensor]) -> list[Extent]:
    """One tensor after the other, each a source of its own."""
    runs, offset = [], 0
    for index, tensor in enumerate(tensors):
        nbytes = tensor.numel() * tensor.element_size()
        runs.append(Extent(index, 0, offset, nbytes))
        offset += nbytes
    return runs


@given(st.lists(views(), min_size=1, max_size=5))
def test_strided_tensors_are_gathered_and_scattered(stage: Stage, drawn: list[View]) -> None:
    # Widest first, as in a file: no block boundary cuts an element.
    tensors = sorted((view.of_noise() for view in drawn), key=lambda tensor: -tensor.element_size())
    plan = cut([packed_runs(tensors)], ALIGNMENT)
    written = run(stage.pipeline, make_job(WRITE, plan, [*map(strided, tensors)]), [stage.fd])
    assert written.failure is None
    stored = b"".join(map(bytes_of, tensors))
    assert content(stage.fd, len(stored)) == stored

    bases = [torch.zeros_like(view.of_noise()._base) for view in drawn]
    targets = [
        base.reshape(view.shape)[view.slices].permute(view.order) for base, view in zip(bases, drawn, strict=True)
    ]
    targets.sort(key=lambda tensor: -tensor.element_size())
    job = make_job(READ, plan, [*map(strided, targets)], checksums=written.checksums())
    assert run(stage.pipeline, job, [stage.fd]).failure is None
    assert b"".join(map(bytes_of, targets)) == stored
    # Nothing beside the views has changed: what a base holds is what went into its view.
    assert sum(map(count_bytes, bases)) == sum(map(count_bytes, targets))


def count_bytes(tensor: torch.Tensor) -> int:
    """How many of a tensor's bytes are not zero."""
    return sum(byte != 0 for byte in bytes_of(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_strided_tensors(open_pipeline: Callable[..., Pipeline], fd: int, dtype: torch.dtype) -> None:
    """Rows and extents beyond the pieces that staging copies at a time (128 KiB), cut anywhere."""
    pipeline = open_pipeline(2, 1 << 20)
    view = View(dtype, (7, 390, 401), (slice(None), slice(1, None), slice(None, None, 2)), (2, 0, 1)).of_noise()
    plan = cut([packed_runs([view])], 1 << 20)
    written = run(pipeline, make_job(WRITE, plan, [strided(view)]), [fd])
    assert content(fd, plan.files[0].nbytes) == bytes_of(view)
    target = torch.zeros_like(view)
    run(pipeline, make_job(READ, plan, [strided(target)], checksums=written.checksums()), [fd])
    assert bytes_of(target) == bytes_of(view)


def test_expanded_and_many_dimensional_tensors_are_gathered(stage: Stage) -> None:
    wide = noise(2**DIMS_MAX).reshape([2] * DIMS_MAX).permute(*range(DIMS_MAX)[::-1])
    repeated = noise(13).reshape(13, 1).expand(13, 200)
    plan = cut([packed_runs([wide, repeated])], SLOT_BYTES)
    assert run(stage.pipeline, make_job(WRITE, plan, [strided(wide), strided(repeated)]), [stage.fd]).failure is None
    assert content(stage.fd, plan.files[0].nbytes) == bytes_of(wide) + bytes_of(repeated)


# -- checksums --------------------------------------------------------------------------------------------------------

# From xxHash's own sanity test (tests/sanity_test_vectors.h, XSUM_XXH3_testdata): length, hash under seed 0, hash under
# seed 11400714785074694797.
XXH3_VECTORS = [
    (24, 0xA3FE70BF9D3510EB, 0x850E80FC35BDD690),
    (403, 0xCDEB804D65C6DEA4, 0x6259F6ECFD6443FD),
    (512, 0x617E49599013CB6B, 0x3CE457DE14C27708),
    (2048, 0xDD59E2C3A5F038E0, 0x66F81670669ABABC),
]


@pytest.mark.parametrize(("nbytes", "unseeded", "seeded"), XXH3_VECTORS)
def test_the_oracle_is_xxh3(nbytes: int, unseeded: int, seeded: int) -> None:
    prime = 11400714785074694797
    generator = itertools.accumulate(range(nbytes - 1), lambda state, _: state * prime % 2**64, initial=2654435761)
    data = bytes(state >> 56 for state in generator)
    assert (xxh3_64(data, 0), xxh3_64(data, prime)) == (unseeded, seeded)


@pytest.mark.parametrize("nbytes", [241, 1024, 1025, 4095, 4096, 16384, (128 << 10) + 1, 300_001])
def test_a_checksum_is_xxh3_under_the_seed_of_its_place(nbytes: int) -> None:
    data = bytes_of(noise(nbytes))
    seed = xxh3_64(struct.pack("<3Q", SEED, 1, 8192), 0)
    assert block_checksum(data, SEED, 1, 8192) == xxh3_64(data, seed)


@pytest.mark.parametrize("extent_bytes", [1000, 128 << 10, 300 << 10])
def test_the_pipeline_gives_the_checksums_of_the_stored_bytes(
    open_pipeline: Callable[..., Pipeline], fd: int, extent_bytes: int
) -> None:
    """Extents shorter than the pieces that are hashed at a time, as long, and longer."""
    nbytes = (700 << 10) + 3
    pipeline, tensor = open_pipeline(2, 512 << 10), noise(nbytes)
    pieces = tensor.split(extent_bytes)
    plan = cut([packed_runs([*pieces])], 512 << 10)
    job = run(pipeline, make_job(WRITE, plan, [*map(plain, pieces)]), [fd])
    assert job.checksums() == checksums_of(plan, [bytes_of(tensor)])


@given(st.binary(min_size=1, max_size=64), st.integers(0, 2**64 - 1), st.integers(0, 7), st.integers(0, 2**50))
def test_a_block_in_the_wrong_place_does_not_verify(block: bytes, seed: int, file: int, index: int) -> None:
    checksum = block_checksum(block, seed, file, index * ALIGNMENT)
    assert checksum == block_checksum(block, seed, file, index * ALIGNMENT)
    assert checksum != block_checksum(block, seed ^ 1, file, index * ALIGNMENT)
    assert checksum != block_checksum(block, seed, file + 1, index * ALIGNMENT)
    assert checksum != block_checksum(block, seed, file, (index + 1) * ALIGNMENT)
    assert checksum != block_checksum(block[:-1], seed, file, index * ALIGNMENT)


def test_blocks_that_changed_places_do_not_verify(stage: Stage) -> None:
    # Two equal blocks have different checksums, so that one cannot stand for the other.
    tensor = noise(SLOT_BYTES).repeat(2)
    plan = whole(2 * SLOT_BYTES, SLOT_BYTES)
    first, second = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd]).checksums()
    assert first != second
    job = make_job(READ, plan, [plain(tensor.clone())], checksums=[second, first])
    failure = run(stage.pipeline, job, [stage.fd]).failure
    assert failure is not None and failure.kind == FailureKind.CHECKSUM


@pytest.mark.every_backend
@pytest.mark.parametrize("flipped", [0, 5 * ALIGNMENT, 2 * SLOT_BYTES + 99])
def test_a_corrupt_block_reaches_no_tensor(open_pipeline: Callable[..., Pipeline], fd: int, flipped: int) -> None:
    pipeline = open_pipeline(1)  # one at a time, so that the blocks before it have been copied out
    nbytes = 2 * SLOT_BYTES + 100
    before, after, plan = noise(nbytes), torch.zeros(nbytes, dtype=torch.uint8), whole(nbytes, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(before)]), [fd])
    rewrite(fd, flipped, bytes([content(fd, nbytes)[flipped] ^ 0x80]))
    read = run(pipeline, make_job(READ, plan, [plain(after)], checksums=written.checksums()), [fd])
    bad = flipped // SLOT_BYTES
    assert read.failure == Failure(FailureKind.CHECKSUM, 0, bad)
    assert read.states()[: bad + 1] == bytes([BlockState.WRITTEN] * bad + [BlockState.FAILED])
    assert torch.equal(after[: bad * SLOT_BYTES], before[: bad * SLOT_BYTES])
    assert not after[bad * SLOT_BYTES :].any()
    assert_usable(pipeline, fd)


def test_corrupt_padding_is_not_the_blocks(stage: Stage) -> None:
    before, after, plan = noise(100), torch.zeros(100, dtype=torch.uint8), whole(100, SLOT_BYTES)
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(before)]), [stage.fd])
    rewrite(stage.fd, 100, b"\xff" * 100)
    job = make_job(READ, plan, [plain(after)], checksums=written.checksums())
    assert run(stage.pipeline, job, [stage.fd]).failure is None
    assert torch.equal(before, after)


# -- a checked snapshot -----------------------------------------------------------------------------------------------


def test_an_undisturbed_source_is_not_torn(stage: Stage) -> None:
    tensor, plan = noise(20 * SLOT_BYTES + 9), whole(20 * SLOT_BYTES + 9, SLOT_BYTES)
    job = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)], checked=True), [stage.fd])
    assert job.failure is None
    assert content(stage.fd, len(tensor)) == bytes_of(tensor)
    assert job.checksums() == checksums_of(plan, [bytes_of(tensor)])


@pytest.mark.every_backend
@pytest.mark.parametrize("block", [0, 1])
def test_a_writer_between_the_two_looks_is_caught(open_pipeline: Callable[..., Pipeline], fd: int, block: int) -> None:
    pipeline = open_pipeline(2)
    tensor, plan = noise(4 * SLOT_BYTES), whole(4 * SLOT_BYTES, SLOT_BYTES)
    job = make_job(WRITE, plan, [plain(tensor)], checked=True)
    pipeline.submit(job)
    until(lambda: set(job.states()[:2]) == {BlockState.STAGED})
    assert not pipeline.wait(job, Milestone.STAGED, LOOK_NS)
    tensor[(block + 1) * SLOT_BYTES - 1] ^= 1
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure == Failure(FailureKind.TORN, 0, block)
    assert job.states()[block] == BlockState.FAILED
    assert_usable(pipeline, fd)


# -- abort ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
def test_abort_before_the_files_are_there(stage: Stage, direction: Direction) -> None:
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    job = make_job(direction, plan, [plain(tensor)])
    stage.pipeline.submit(job)
    stage.pipeline.abort(job, errno.ENOSPC)
    assert finish(stage.pipeline, job).failure == Failure(FailureKind.ABORTED, errno.ENOSPC, None)
    assert BlockState.WRITTEN not in job.states()
    stage.pipeline.attach(job, [stage.fd])  # too late, and no error: it is what a writer does that lost the race
    assert_usable(stage.pipeline, stage.fd)


@pytest.mark.every_backend
@pytest.mark.parametrize("direction", Direction)
def test_abort_drains_what_is_under_way(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction
) -> None:
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    tensor = torch.zeros(4 * SLOT_BYTES, dtype=torch.uint8)
    stored, plan = bytes_of(noise(4 * SLOT_BYTES)), whole(4 * SLOT_BYTES, SLOT_BYTES)
    rewrite(buffered_fd, 0, stored)
    job = make_job(direction, plan, [plain(tensor)], checksums=checksums_of(plan, [stored]))
    pipeline.submit(job)
    pipeline.attach(job, [buffered_fd])
    until(lambda: len(table.operations) == 2)
    pipeline.abort(job, errno.ECANCELED)
    assert pipeline.wait(job, Milestone.STAGED, HANG_NS), "a failed job needs its sources no more"
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS), "done while the kernel may still be writing"
    gate.set()
    assert finish(pipeline, job).failure == Failure(FailureKind.ABORTED, errno.ECANCELED, None)
    assert not tensor.any(), "an aborted read reached its tensor"
    assert BlockState.WRITTEN not in job.states()
    assert len(table.operations) == 2
    assert not table.files and not table.exceptions
    assert_usable(pipeline, buffered_fd)


def test_abort_after_the_end_changes_nothing(stage: Stage) -> None:
    tensor, plan = noise(SLOT_BYTES), whole(SLOT_BYTES, SLOT_BYTES)
    job = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd])
    stage.pipeline.abort(job, errno.EIO)
    assert_usable(stage.pipeline, stage.fd)
    assert job.failure is None


def test_the_first_failure_is_the_one_that_is_told(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    table = FaultTable({1: not_started(errno.EIO)}, gate=gate)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    job = make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(noise(2 * SLOT_BYTES))])
    pipeline.submit(job)
    pipeline.attach(job, [buffered_fd])
    until(lambda: job.states() == bytes([BlockState.STAGED, BlockState.FAILED]))
    pipeline.abort(job, errno.EPERM)
    later = make_job(WRITE, whole(1, SLOT_BYTES), [plain(noise(1))])
    pipeline.submit(later)
    assert pipeline.wait(later, Milestone.URGENT, HANG_NS), "what was asked before it has been heard by then"
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS)
    gate.set()
    assert finish(pipeline, job).failure == Failure(FailureKind.IO, errno.EIO, 1)
    pipeline.attach(later, [buffered_fd])
    assert finish(pipeline, later).failure is None


# -- status and milestones --------------------------------------------------------------------------------------------


def test_states_and_milestones_come_in_order(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    pipeline = open_pipeline(2, SLOT_BYTES, FaultTable(gate=gate))
    plan, tensor = whole(3 * SLOT_BYTES, SLOT_BYTES), noise(3 * SLOT_BYTES)
    pending, staged, written = (bytes([state]) for state in (BlockState.PENDING, BlockState.STAGED, BlockState.WRITTEN))
    job = make_job(WRITE, plan, [plain(tensor)], order=[2, 0, 1], urgent_count=1)
    assert job.states() == 3 * pending

    pipeline.submit(job)  # without files: two slots, so two blocks, the urgent one first
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert job.states()[2:] == staged
    until(lambda: job.states() == staged + pending + staged)
    assert not pipeline.wait(job, Milestone.STAGED, LOOK_NS)

    pipeline.attach(job, [buffered_fd])
    gate.set()
    assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
    assert BlockState.PENDING not in job.states()
    finish(pipeline, job)
    assert job.states() == 3 * written
    counters = job.counters
    assert 0 < counters["submitted_ns"] < counters["staged_ns"] < counters["done_ns"]
    assert counters["copying_ns"] > 0 and counters["hashing_ns"] > 0
    assert counters["copying_ns"] + counters["hashing_ns"] < counters["done_ns"] - counters["submitted_ns"]


def test_all_is_staged_before_all_is_written(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    pipeline = open_pipeline(2, SLOT_BYTES, FaultTable(gate=gate))
    tensor = noise(2 * SLOT_BYTES)
    expected = bytes_of(tensor)
    job = make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(tensor)], urgent_count=2)
    pipeline.submit(job)
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
    tensor.zero_()  # the source is the caller's again
    pipeline.attach(job, [buffered_fd])
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS)
    gate.set()
    assert finish(pipeline, job).failure is None
    assert content(buffered_fd, len(expected)) == expected


def test_what_was_staged_before_the_files_were_there_is_written_in_order(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    """Whichever slots it came to lie in: the second job takes those first that the first has freed last."""
    table = FaultTable()
    pipeline = open_pipeline(4, SLOT_BYTES, table)
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1]):
        table.operations.clear()
        job = make_job(WRITE, whole(4 * SLOT_BYTES, SLOT_BYTES), [plain(noise(4 * SLOT_BYTES))], order=order)
        pipeline.submit(job)
        assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
        pipeline.attach(job, [buffered_fd])
        assert finish(pipeline, job).failure is None
        assert [operation.file_offset // SLOT_BYTES for operation in table.operations] == order


def test_a_job_that_waits_for_its_files_keeps_no_other_from_starting(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    table = FaultTable()
    pipeline = open_pipeline(4, SLOT_BYTES, table)
    first, second = (make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(noise(2 * SLOT_BYTES))]) for _ in "ab")
    for job in (first, second):
        pipeline.submit(job)
        assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
    for job in (second, first):
        table.operations.clear()
        pipeline.attach(job, [buffered_fd])
        assert finish(pipeline, job).failure is None
        assert [operation.file_offset // SLOT_BYTES for operation in table.operations] == [0, 1]


def test_nothing_urgent_is_staged_at_once(open_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = open_pipeline(1)
    job = make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(noise(2 * SLOT_BYTES))])
    pipeline.submit(job)
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert not pipeline.wait(job, Milestone.STAGED, LOOK_NS)
    pipeline.abort(job, errno.ECANCELED)
    finish(pipeline, job)


# Of these two are 64 MiB, which is what is read at a time, and nobody touches more of one than a block.
LARGE_SLOT_BYTES = 32 << 20


def read_of(fd: int, block_count: int) -> tuple[Job, torch.Tensor, bytes]:
    """A read of small blocks that lie in a file, where it goes, and what has to come."""
    stored = bytes_of(noise(block_count * ALIGNMENT))
    rewrite(fd, 0, stored)
    plan, tensor = whole(len(stored), ALIGNMENT), torch.zeros(len(stored), dtype=torch.uint8)
    return make_job(READ, plan, [plain(tensor)], checksums=checksums_of(plan, [stored])), tensor, stored


def test_reads_leave_slots_to_work_on(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    """64 MiB are under way at a time, however many slots there are."""
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = open_pipeline(5, LARGE_SLOT_BYTES, table)
    job, tensor, stored = read_of(buffered_fd, 6)
    pipeline.submit(job)
    pipeline.attach(job, [buffered_fd])
    until(lambda: len(table.operations) == 2)
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS)
    assert len(table.operations) == 2
    gate.set()
    assert finish(pipeline, job).failure is None
    assert bytes_of(tensor) == stored


def test_writes_under_way_keep_no_read_waiting(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = open_pipeline(4, LARGE_SLOT_BYTES, table)
    read, tensor, stored = read_of(buffered_fd, 2)
    # The very bytes that lie there, so that it does not matter which comes first.
    write = make_job(WRITE, whole(len(stored), ALIGNMENT), [plain(noise(len(stored)))])
    for job in (write, read):
        pipeline.submit(job)
        pipeline.attach(job, [buffered_fd])
    until(lambda: len(table.operations) == 4)  # two of each, though the writes alone are 64 MiB of slots
    gate.set()
    for job in (write, read):
        assert finish(pipeline, job).failure is None
    assert bytes_of(tensor) == stored


class Watching(FaultTable):
    """Notes how many blocks of a job were there when each operation was started."""

    def __init__(self) -> None:
        super().__init__()
        self.job: Job | None = None
        self.seen: list[int] = []

    def _start(self, context: Any, io: Any) -> int:
        assert self.job is not None
        self.seen.append(self.job.states().count(BlockState.WRITTEN))
        return super()._start(context, io)


def test_the_device_is_given_its_next_blocks_before_the_last_are_verified(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    table = Watching()
    pipeline = open_pipeline(4, LARGE_SLOT_BYTES, table)
    table.job, tensor, stored = read_of(buffered_fd, 4)
    assert run(pipeline, table.job, [buffered_fd]).failure is None
    assert bytes_of(tensor) == stored
    assert table.seen == [0, 0, 0, 0]  # two are under way at a time, and the last two when the first two had come


def test_a_failed_job_holds_nobody_up(stage: Stage) -> None:
    job = make_job(WRITE, whole(9 * SLOT_BYTES, SLOT_BYTES), [plain(noise(9 * SLOT_BYTES))], urgent_count=9)
    stage.pipeline.submit(job)
    stage.pipeline.abort(job, errno.EIO)
    assert stage.pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert stage.pipeline.wait(job, Milestone.STAGED, HANG_NS)
    finish(stage.pipeline, job)


# -- many jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.every_backend
@pytest.mark.parametrize("attach_backwards", [False, True])
def test_more_jobs_at_once_than_slots(
    open_pipeline: Callable[..., Pipeline], tmp_path: Path, attach_backwards: bool
) -> None:
    pipeline = open_pipeline(2)
    plan = whole(2 * SLOT_BYTES + 1, SLOT_BYTES)
    tensors = [noise(2 * SLOT_BYTES + 1, seed) for seed in range(JOBS_MAX)]
    jobs = [make_job(WRITE, plan, [plain(tensor)]) for tensor in tensors]
    fds = [
        Filesystem().open_for_blocks(str(tmp_path / f"{index}"), write=True, direct=True) for index in range(JOBS_MAX)
    ]
    for job in jobs:
        pipeline.submit(job)
    for index in range(JOBS_MAX)[:: -1 if attach_backwards else 1]:
        pipeline.attach(jobs[index], [fds[index]])
    for job, tensor, descriptor in zip(jobs, tensors, fds, strict=True):
        assert finish(pipeline, job).failure is None
        assert content(descriptor, len(tensor)) == bytes_of(tensor)
        os.close(descriptor)


@pytest.mark.every_backend
def test_a_job_too_many_waits_for_a_place(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline, plan = open_pipeline(2), whole(SLOT_BYTES, SLOT_BYTES)
    jobs = [make_job(WRITE, plan, [plain(noise(SLOT_BYTES, seed))]) for seed in range(JOBS_MAX + 1)]
    for job in jobs[:-1]:
        pipeline.submit(job)
    thread = threading.Thread(target=pipeline.submit, args=(jobs[-1],))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "there is no place for it"
    pipeline.abort(jobs[0], errno.ECANCELED)
    thread.join(HANG_NS / 1e9)
    assert not thread.is_alive()
    for job in jobs[1:]:  # all of them first: who has the slots is the pipeline's choice
        pipeline.attach(job, [fd])
    assert {finish(pipeline, job).failure for job in jobs[1:]} == {None}


@pytest.mark.every_backend
def test_jobs_from_several_threads(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = open_pipeline(3)
    plan = whole(3 * SLOT_BYTES + 7, SLOT_BYTES)
    wrong: list[object] = []

    def save_and_restore(number: int) -> None:
        descriptor = Filesystem().open_for_blocks(str(tmp_path / f"{number}"), write=True, direct=True)
        for seed in range(10):
            before = noise(3 * SLOT_BYTES + 7, 100 * number + seed)
            after = torch.zeros_like(before)
            written = run(pipeline, make_job(WRITE, plan, [plain(before)]), [descriptor])
            job = make_job(READ, plan, [plain(after)], checksums=written.checksums())
            if run(pipeline, job, [descriptor]).failure or not torch.equal(before, after):
                wrong.append((number, seed))
        os.close(descriptor)

    threads = [threading.Thread(target=save_and_restore, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def ring_descriptors() -> set[int]:
    """The numbers of this process's rings."""
    names = [int(name) for name in os.listdir("/proc/self/fd")]
    links = {name: f"/proc/self/fd/{name}" for name in names}
    return {name for name, link in links.items() if os.path.lexists(link) and "io_uring" in os.readlink(link)}


def slots() -> set[int]:
    """Where staging slots are mapped: memory without a name that no fork gets (proc_pid_smaps(5))."""
    found: set[int] = set()
    for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if not words[0].endswith(":"):
            start, is_anonymous = int(words[0].split("-")[0], 16), len(words) == 5
        elif words[0] == "VmFlags:" and "dc" in words and is_anonymous:
            found.add(start)
    return found


def is_inaccessible(address: int) -> bool:
    """Whether an address is mapped for nobody to use (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[1] == "---p"
    return False


@pytest.mark.parametrize("backend", ["io_uring", "io_uring_plain"])
@pytest.mark.parametrize("direction", Direction)
def test_a_broken_ring_is_replaced_for_the_next_job(fd: int, direction: Direction, backend: Backend) -> None:
    others, descriptors_before, slots_before = ring_descriptors(), descriptors(), slots()
    pipeline = Pipeline(2, SLOT_BYTES, backend)
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(tensor)]), [fd])
    for _ in range(3):
        (broken,) = slots() - slots_before
        null = os.open("/dev/null", os.O_RDWR)
        (own,) = ring_descriptors() - others
        os.dup2(null, own)  # from here on the kernel takes nothing from it
        os.close(null)
        target = torch.zeros_like(tensor)
        source = tensor if direction == WRITE else target
        jobs = [make_job(direction, plan, [plain(source)], checksums=written.checksums()) for _ in range(2)]
        failure = run(pipeline, jobs[0], [fd]).failure
        assert failure is not None and failure.kind == FailureKind.IO and failure.errno != 0
        assert run(pipeline, jobs[1], [fd]).failure is None
        assert content(fd, len(tensor)) == bytes_of(tensor) and torch.equal(source, tensor)
        assert is_inaccessible(broken), "a late read may land in other memory"
    pipeline.close()
    assert descriptors() == descriptors_before


# -- opening and closing ----------------------------------------------------------------------------------------------


def rings() -> int:
    """How many io_uring descriptors this process has."""
    return descriptors().count("anon_inode:[io_uring]")


def descriptors() -> list[str]:
    """What the descriptors of this process are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(found)


def native_threads() -> list[Path]:
    """The pipelines' threads, as directories of proc(5).

    The kernel's workers for a ring are threads of ours that come and go, and for a moment bear their maker's name.
    """
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text().strip() == "engine-io":
                found.append(task)
    return found


def status_bytes(field: str) -> int:
    """A line of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def test_one_ring_and_one_thread_and_nothing_is_left(tmp_path: Path) -> None:
    rings_before, threads_before, descriptors_before = rings(), len(native_threads()), descriptors()
    descriptor = Filesystem().open_for_blocks(str(tmp_path / "blocks"), write=True, direct=True)
    pipeline = Pipeline(4, SLOT_BYTES)
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    for _ in range(2):
        jobs = [make_job(WRITE, plan, [plain(tensor)]) for _ in range(5)]
        for job in jobs:
            pipeline.submit(job)
        assert rings() == rings_before + 1
        until(lambda: len(native_threads()) == threads_before + 1)
        for job in jobs:
            pipeline.attach(job, [descriptor])
            finish(pipeline, job)
    pipeline.close()
    pipeline.close()
    os.close(descriptor)
    until(lambda: len(native_threads()) == threads_before)
    assert descriptors() == descriptors_before


@pytest.mark.every_backend
def test_memory_does_not_grow_with_saves(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    slot_bytes = 64 << 10
    pipeline = open_pipeline(4, slot_bytes)
    tensor, plan = noise(8 * slot_bytes), whole(8 * slot_bytes, slot_bytes)

    def save(count: int) -> None:
        for _ in range(count):
            assert run(pipeline, make_job(WRITE, plan, [plain(tensor)], checked=True), [fd]).failure is None

    save(50)
    gc.collect()
    resident_bytes, descriptors_before, threads = status_bytes("VmRSS"), descriptors(), len(native_threads())
    save(200)
    gc.collect()
    # A leak of a slot, or of a sixteenth of what a save moves, in every save would be three times as much.
    assert status_bytes("VmRSS") - resident_bytes < 4 << 20
    assert descriptors() == descriptors_before
    until(lambda: len(native_threads()) == threads)


@pytest.mark.every_backend
def test_native_threads_take_no_cpu_from_who_wakes_them(open_pipeline: Callable[..., Pipeline]) -> None:
    open_pipeline(2)
    until(lambda: bool(native_threads()))
    assert {os.sched_getscheduler(int(task.name)) for task in native_threads()} == {os.SCHED_BATCH}


@pytest.mark.every_backend
def test_an_idle_thread_sleeps(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline = open_pipeline(2)

    def all_sleep() -> bool:
        # The state comes after the name in parentheses (proc_pid_stat(5)).
        states = set()
        for task in native_threads():
            with suppress(FileNotFoundError, ProcessLookupError):
                states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
        return states == {"S"}

    job = make_job(WRITE, whole(4 * SLOT_BYTES, SLOT_BYTES), [plain(noise(4 * SLOT_BYTES))])
    for _ in range(2):  # with a job that waits for its files, and with none
        until(all_sleep)
        if job.states()[0] == BlockState.PENDING:
            pipeline.submit(job)
    pipeline.attach(job, [fd])
    finish(pipeline, job)
    until(all_sleep)


@pytest.mark.every_backend
def test_close_drains(fd: int, rung: Backend) -> None:
    pipeline = Pipeline(2, SLOT_BYTES, rung)
    tensor, plan = noise(50 * SLOT_BYTES), whole(50 * SLOT_BYTES, SLOT_BYTES)
    job = make_job(WRITE, plan, [plain(tensor)], checked=True)
    pipeline.submit(job)
    pipeline.attach(job, [fd])
    pipeline.close()
    assert job.failure is None
    assert set(job.states()) == {BlockState.WRITTEN}
    assert content(fd, len(tensor)) == bytes_of(tensor)


@pytest.mark.every_backend
@pytest.mark.parametrize("direction", Direction)
def test_close_gives_up_jobs_that_never_got_files(direction: Direction, rung: Backend) -> None:
    pipeline = Pipeline(2, SLOT_BYTES, rung)
    jobs = [make_job(direction, whole(9 * SLOT_BYTES, SLOT_BYTES), [plain(noise(9 * SLOT_BYTES))]) for _ in range(3)]
    for job in jobs:
        pipeline.submit(job)
    pipeline.close()
    assert {job.failure for job in jobs} == {Failure(FailureKind.ABORTED, errno.ECANCELED, None)}


@pytest.mark.parametrize(("slot_count", "slot_bytes"), [(0, 4096), (1, 0), (1, 4095), (1, 512), (40_000, 4096)])
def test_sizes_that_make_no_pipeline(slot_count: int, slot_bytes: int) -> None:
    descriptors_before = descriptors()
    with pytest.raises(OpenError) as caught:
        Pipeline(slot_count, slot_bytes)
    assert caught.value.errno == errno.EINVAL
    assert descriptors() == descriptors_before


def test_no_descriptors_is_a_platform_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    threads = len(native_threads())
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OpenError) as caught:
            Pipeline(1, 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (caught.value.refused, caught.value.errno) == (Refused.RESOURCES, errno.EMFILE)
    until(lambda: len(native_threads()) == threads)


def in_a_process_of_its_own(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the same Python, where it may fork, drop its rights or crash."""
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=HANG_NS / 1e9,
    )


FORK = """
import os, sys, warnings
from jobs import *
from engine.errors import ForkedError
from engine.filesystem import Filesystem

def in_a_fork(body):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads is the point
        child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def links():
    names = {int(name) for name in os.listdir("/proc/self/fd")}
    return {os.readlink(f"/proc/self/fd/{name}") for name in names if os.path.lexists(f"/proc/self/fd/{name}")}

def job():
    return make_job(Direction.WRITE, whole(10000, 4096), [plain(noise(10000))])

def kept_from_forks():
    ranges = []
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            words = line.split()
            if not words[0].endswith(":"):
                current, is_slots = words[0], len(words) == 5  # anonymous memory has no name
            elif words[0] == "VmFlags:" and "dc" in words and is_slots:  # not copied on fork (proc_pid_smaps(5))
                ranges.append(current)
    return ranges

def child():
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert "io_uring" not in mapped and not [kept for kept in pipelines_memory if kept in mapped], mapped
    assert not {link for link in links() if "io_uring" in link or "eventfd" in link}, links()
    calls = {
        "submit": lambda: pipeline.submit(job()),
        "attach": lambda: pipeline.attach(waiting, [fd]),
        "abort": lambda: pipeline.abort(waiting, 5),
        "wait": lambda: pipeline.wait(waiting, Milestone.DONE),
        "close": pipeline.close,
    }
    for name, call in calls.items():
        try:
            call()
        except ForkedError as error:
            assert str(os.getppid()) in str(error) and str(os.getpid()) in str(error)
        else:
            raise AssertionError(f"a forked child may {name}")
    # What the child opens now has the numbers that the pipeline's descriptors had; its own fork must not lose them.
    mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    in_a_fork(lambda: [os.fstat(descriptor) for descriptor in mine])
    own = Pipeline(1, 4096)
    assert run(own, job(), [fd]).failure is None
    own.close()

before = kept_from_forks()
pipeline = Pipeline(2, 4096)
pipelines_memory = set(kept_from_forks()) - set(before)
assert pipelines_memory, "the slots would be copied"
fd = Filesystem().open_for_blocks(sys.argv[1], write=True, direct=True)
assert run(pipeline, job(), [fd]).failure is None
waiting = job()
pipeline.submit(waiting)
in_a_fork(child)
pipeline.attach(waiting, [fd])
assert finish(pipeline, waiting).failure is None
pipeline.close()
"""


def test_a_fork_has_no_pipeline_and_harms_nobody(tmp_path: Path) -> None:
    finished = in_a_process_of_its_own(FORK, str(tmp_path / "blocks"))
    assert (finished.returncode, finished.stderr) == (0, "")


MEMLOCK = """
import errno, os, resource, sys
from jobs import *
from engine.native import OpenError, Refused
from engine.filesystem import Filesystem

fd = Filesystem().open_for_blocks(sys.argv[1], write=True, direct=True)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
if os.geteuid() == 0:  # root is not bound by the limit; nobody is
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Pipeline(16, 1 << 20)
except OpenError as error:
    assert (error.refused, error.errno) == (Refused.BUFFERS, errno.ENOMEM)
else:
    raise AssertionError("16 MiB were pinned")
pipeline = Pipeline(16, 1 << 20, "io_uring_plain")
before = noise(40_000_001)
written = run(pipeline, make_job(Direction.WRITE, whole(40_000_001, 1 << 20), [plain(before)]), [fd])
after = torch.zeros_like(before)
plan = whole(40_000_001, 1 << 20)
read = run(pipeline, make_job(Direction.READ, plan, [plain(after)], checksums=written.checksums()), [fd])
assert written.failure is None and read.failure is None and torch.equal(before, after)
pipeline.close()
"""


def test_an_ordinary_user_with_little_locked_memory(tmp_path: Path) -> None:
    finished = in_a_process_of_its_own(MEMLOCK, str(tmp_path / "blocks"))
    assert (finished.returncode, finished.stderr) == (0, "")


STRAY = """
import os, sys
from faults import *
from jobs import *

class Stray(FaultTable):
    def _reap(self, context, completions, capacity, wait):
        completions[0].slot, completions[0].result = int(sys.argv[2]), 4096
        return 1

table = Stray()
pipeline = Pipeline(2, 4096, io_table=table.c_table)
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
run(pipeline, make_job(Direction.WRITE, whole(1, 4096), [plain(noise(1))]), [fd])
"""


@pytest.mark.parametrize("slot", ["1", "2"])
def test_a_completion_that_nobody_asked_for_ends_the_process(tmp_path: Path, slot: str) -> None:
    assert in_a_process_of_its_own(STRAY, str(tmp_path / "blocks"), slot).returncode == -signal.SIGABRT


# -- jobs that contradict themselves ----------------------------------------------------------------------------------

# Rows that `loosened` arrays have, so that a wrong count of them stays in memory that is ours.
ROOM = 32


def loosened(job: Job, arena: torch.Tensor) -> Any:
    """A job's struct with arrays that may be changed and are longer than they need to be."""
    c_job = job.c_job
    arrays = {"sources": "eng_source", "extents": "eng_extent", "blocks": "eng_block", "order": "uint32_t"}
    arrays |= {"checksums": "uint64_t", "states": "uint8_t"}
    counts = [c_job.source_count, c_job.extent_count, *(4 * [c_job.block_count])]
    kept = []
    for (name, ctype), count in zip(arrays.items(), counts, strict=True):
        array = ffi.new(f"{ctype}[{ROOM}]")
        ffi.memmove(array, getattr(c_job, name), count * ffi.sizeof(ctype))
        setattr(c_job, name, array)
        kept.append(array)
    for row in range(ROOM):
        c_job.sources[row].address = arena.data_ptr()
    job.owners_of_arrays = kept  # type: ignore[attr-defined]
    return c_job


# A plain source and a strided one of 3 x 4 x 5 int32 in three blocks, the second with two extents.
ARENA = torch.zeros(8 << 20, dtype=torch.uint8)
BASE_SOURCES = [plain(ARENA), Memory(ARENA.data_ptr(), 4, (3, 4, 5), (40, 10, 2), ARENA)]
BASE_PLAN = cut(
    [[Extent(0, 0, 0, SLOT_BYTES + 16), Extent(1, 0, SLOT_BYTES + 16, 240)], [Extent(0, 0, 0, 10)]], SLOT_BYTES
)


def edited(path: str, value: int) -> Callable[[Any], None]:
    """A change of one number of a job: ``"blocks.0.nbytes"`` or ``"direction"``."""

    def edit(c_job: Any) -> None:
        *names, last = path.split(".")
        at = c_job
        for name in names:
            at = at[int(name)] if name.isdigit() else getattr(at, name)
        if last.isdigit():
            at[int(last)] = value
        else:
            setattr(at, last, value)

    edit.__name__ = f"{path}={value}"
    return edit


INVALID = [
    ("direction", 2),
    ("block_count", 0),
    ("urgent_count", 4),
    ("file_count", 0),
    ("file_count", 9),
    ("file_count", 2**32 - 1),
    ("sources.1.ndim", 9),
    ("sources.1.ndim", 2**32 - 1),
    ("sources.1.itemsize", 0),
    ("sources.1.itemsize", 3),
    ("sources.1.itemsize", 32),
    ("sources.1.shape.0", 0),
    ("sources.1.shape.2", -1),
    ("sources.1.shape.0", 2**62),
    ("sources.1.shape.0", 2**62 + 3),
    ("sources.1.shape.1", 2**58),
    ("extents.0.source", 2),
    ("extents.1.source", 2**32 - 1),
    ("extents.0.nbytes", 0),
    ("extents.0.nbytes", SLOT_BYTES - 1),
    ("extents.0.nbytes", SLOT_BYTES + 1),
    ("extents.0.nbytes", 2**32 - 1),
    ("extents.0.source_offset", 2**64 - 1),
    ("extents.1.block_offset", 1),
    ("extents.2.block_offset", 15),
    ("extents.2.block_offset", 17),
    ("extents.2.block_offset", 2**32 - 1),
    ("extents.2.source_offset", 4),
    ("extents.2.source_offset", 2),
    ("extents.2.nbytes", 236),
    ("blocks.0.nbytes", 0),
    ("blocks.0.nbytes", SLOT_BYTES - 1),
    ("blocks.0.nbytes", SLOT_BYTES + 1),
    ("blocks.0.nbytes", 2**32 - 1),
    ("blocks.2.file", 2),
    ("blocks.2.file", 2**32 - 1),
    ("blocks.1.file_offset", SLOT_BYTES + 1),
    ("blocks.1.file_offset", 2**63 - SLOT_BYTES),
    ("blocks.1.file_offset", 2**64 - ALIGNMENT),
    ("blocks.1.extent_start", 3),
    ("blocks.1.extent_start", 2**32 - 1),
    ("blocks.1.extent_count", 1),
    ("blocks.1.extent_count", 4),
    ("blocks.1.extent_count", 2**32 - 1),
    ("order.0", 3),
    ("order.2", 2**32 - 1),
]


@pytest.mark.parametrize("edit", [edited(*pair) for pair in INVALID], ids=lambda edit: edit.__name__)
def test_a_job_that_contradicts_itself_is_refused(stage: Stage, edit: Callable[[Any], None]) -> None:
    rewrite(stage.fd, 0, b"untouched")
    job = make_job(WRITE, BASE_PLAN, BASE_SOURCES)
    edit(loosened(job, ARENA))
    stage.pipeline.submit(job)
    assert finish(stage.pipeline, job).failure == Failure(FailureKind.INVALID, errno.EINVAL, None)
    assert content(stage.fd, 9) == b"untouched"
    assert_usable(stage.pipeline, stage.fd)


def test_the_base_of_these_is_valid(stage: Stage) -> None:
    job = make_job(WRITE, BASE_PLAN, BASE_SOURCES)
    loosened(job, ARENA)
    assert run(stage.pipeline, job, [stage.fd, stage.fd]).failure is None


@pytest.mark.parametrize("direction", Direction)
def test_an_order_that_leaves_a_block_out_is_no_success(stage: Stage, direction: Direction) -> None:
    tensor, plan = noise(3 * SLOT_BYTES), whole(3 * SLOT_BYTES, SLOT_BYTES)
    checksums = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd]).checksums()
    job = make_job(direction, plan, [plain(tensor)], order=[0, 2, 2], checksums=checksums)
    assert run(stage.pipeline, job, [stage.fd]).failure == Failure(FailureKind.INVALID, errno.EINVAL, 1)
    assert_usable(stage.pipeline, stage.fd)


# Values around every rule.  None makes a valid strided source reach further than ARENA is long: a plain source's offset
# and every address are the caller's to answer for (native/job.c), so those are not among them.
COUNTS = st.integers(0, ROOM)
EDITS: dict[str, st.SearchStrategy[int]] = {
    "direction": st.integers(0, 2),
    "checked": st.integers(0, 2),
    "source_count": COUNTS,
    "extent_count": COUNTS,
    "block_count": COUNTS,
    "urgent_count": COUNTS,
    "file_count": st.sampled_from([0, 1, 2, 3, 8, 9, 2**32 - 1]),
    "sources.{row}.itemsize": st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 2**32 - 1]),
    "sources.{row}.ndim": st.sampled_from([0, 1, 2, 3, 8, 9, 2**32 - 1]),
    "sources.{row}.shape.{column}": st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**62]),
    "sources.{row}.stride.{column}": st.sampled_from([0, 1, 2, 3]),
    "extents.{row}.source_offset": st.sampled_from([0, 1, 2, 4, 8, 240, 2048, 2**64 - 1]),
    "extents.{row}.block_offset": st.sampled_from([0, 1, 16, 4095, SLOT_BYTES, 2**32 - 1]),
    "extents.{row}.nbytes": st.sampled_from([0, 1, 8, 16, 240, SLOT_BYTES, SLOT_BYTES + 1, 2**32 - 1]),
    "extents.{row}.source": st.sampled_from([0, 1, 2, ROOM - 1, 2**32 - 1]),
    "blocks.{row}.file_offset": st.sampled_from([0, 1, 4096, SLOT_BYTES, 2**40, 2**63 - SLOT_BYTES, 2**64 - 4096]),
    "blocks.{row}.nbytes": st.sampled_from([0, 1, 10, 256, SLOT_BYTES, SLOT_BYTES + 1, 2**32 - 1]),
    "blocks.{row}.file": st.sampled_from([0, 1, 2, 7, 8, 2**32 - 1]),
    "blocks.{row}.extent_start": st.sampled_from([0, 1, 2, 3, ROOM - 1, 2**32 - 1]),
    "blocks.{row}.extent_count": st.sampled_from([0, 1, 2, 4, ROOM, 2**32 - 1]),
    "order.{row}": st.sampled_from([0, 1, 2, 3, 2**32 - 1]),
}


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int]]:
    drawn = []
    for template in draw(st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=4)):
        path = template.format(row=draw(st.integers(0, 3)), column=draw(st.integers(0, 3)))
        drawn.append((path, draw(EDITS[template])))
    return drawn


@settings(max_examples=200)
@given(direction=st.sampled_from(Direction), drawn=edits())
def test_no_job_harms_the_pipeline(stage: Stage, direction: Direction, drawn: list[tuple[str, int]]) -> None:
    written = run(stage.pipeline, make_job(WRITE, BASE_PLAN, BASE_SOURCES), [stage.fd, stage.fd])
    job = make_job(direction, BASE_PLAN, BASE_SOURCES, checksums=written.checksums())
    c_job = loosened(job, ARENA)
    for path, value in drawn:
        edited(path, value)(c_job)
    stage.pipeline.submit(job)
    lib.eng_attach(stage.pipeline._pipeline, c_job, ffi.new("int32_t[]", [stage.fd] * ROOM))
    finish(stage.pipeline, job)
    if job.failure is None:
        assert set(ffi.buffer(c_job.states, c_job.block_count)[:]) == {BlockState.WRITTEN}
    assert_usable(stage.pipeline, stage.fd)


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTY_BYTES = 5 * SLOT_BYTES + 100
FAULTY_PLAN = whole(FAULTY_BYTES, SLOT_BYTES)


class Faulty(NamedTuple):
    """A job that went through a table of faults."""

    job: Job
    pipeline: Pipeline
    table: FaultTable
    tensor: torch.Tensor
    expected: torch.Tensor

    def block_of(self, operation: int) -> int:
        """The block that an operation was about."""
        return self.table.operations[operation].file_offset // SLOT_BYTES

    def assert_right(self, fd: int) -> None:
        """The job succeeded, and all bytes are where they belong."""
        assert self.job.failure is None
        assert set(self.job.states()) == {BlockState.WRITTEN}
        if self.job.c_job.direction == WRITE:
            assert content(fd, FAULTY_BYTES) == bytes_of(self.expected)
        assert torch.equal(self.tensor, self.expected)


def faulty(pipeline: Pipeline, table: FaultTable, fd: int, direction: Direction) -> Faulty:
    """Write, or read back what lies there already."""
    expected = noise(FAULTY_BYTES, seed=11)
    stored = bytes_of(expected)
    if direction == WRITE:
        tensor = expected.clone()
        rewrite(fd, 0, bytes(align_up(FAULTY_BYTES, ALIGNMENT)))
    else:
        tensor = torch.zeros(FAULTY_BYTES, dtype=torch.uint8)
        rewrite(fd, 0, stored)
    job = make_job(direction, FAULTY_PLAN, [plain(tensor)], checksums=checksums_of(FAULTY_PLAN, [stored]))
    run(pipeline, job, [fd])
    assert not table.exceptions, table.exceptions
    assert not table.files, "a file was not taken out again"
    return Faulty(job, pipeline, table, tensor, expected)


directions = pytest.mark.parametrize("direction", Direction)
operations = pytest.mark.parametrize("operation", [0, 1, 5])
slot_counts = pytest.mark.parametrize("slot_count", [1, 3])


@directions
@operations
@slot_counts
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EBADF])
@pytest.mark.parametrize("fault", [refused, not_started])
def test_an_error_of_the_kernel_fails_the_job(
    open_pipeline: Callable[..., Pipeline],
    buffered_fd: int,
    direction: Direction,
    operation: int,
    slot_count: int,
    error: int,
    fault: Callable[[int], Fault],
) -> None:
    table = FaultTable({operation: fault(error)})
    pipeline = open_pipeline(slot_count, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, error, done.block_of(operation))
    assert done.job.states()[done.block_of(operation)] == BlockState.FAILED
    assert done.job.counters["retry_count"] == 0
    assert_usable(pipeline, buffered_fd)


@directions
@operations
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_a_passing_error_is_tried_again(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, operation: int, error: int
) -> None:
    table = FaultTable({operation: refused(error)})
    pipeline = open_pipeline(1, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    done.assert_right(buffered_fd)
    assert done.job.counters["retry_count"] == 1
    first, again = table.operations[operation : operation + 2]
    assert first == again
    assert_usable(pipeline, buffered_fd)


@directions
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_a_lasting_error_is_not_tried_forever(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, error: int
) -> None:
    table = FaultTable({operation: refused(error) for operation in range(1, 2 + RETRIES_MAX)})
    pipeline = open_pipeline(1, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, error, 1)
    assert done.job.counters["retry_count"] == RETRIES_MAX + 1
    assert len(table.operations) == 2 + RETRIES_MAX
    assert_usable(pipeline, buffered_fd)

    # One fewer, and the last try succeeds.
    table = FaultTable({operation: refused(error) for operation in range(1, 1 + RETRIES_MAX)})
    faulty(open_pipeline(1, SLOT_BYTES, table), table, buffered_fd, direction).assert_right(buffered_fd)


@directions
@operations
@slot_counts
@pytest.mark.parametrize("moved_bytes", [1, 4095, 4096, 4097, SLOT_BYTES - 1])
def test_a_short_transfer_goes_on_from_an_aligned_byte(
    open_pipeline: Callable[..., Pipeline],
    buffered_fd: int,
    direction: Direction,
    operation: int,
    slot_count: int,
    moved_bytes: int,
) -> None:
    table = FaultTable({operation: short(moved_bytes)})
    pipeline = open_pipeline(slot_count, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    done.assert_right(buffered_fd)
    first = table.operations[operation]
    tail = [again for again in table.operations[operation + 1 :] if again.slot == first.slot][0:1]
    # What was asked for is done if the file ends here, or if a read has all the bytes that are stored.
    wanted = first.nbytes if direction == WRITE else min(first.nbytes, FAULTY_BYTES - first.file_offset)
    if moved_bytes < wanted:
        progress = moved_bytes // ALIGNMENT * ALIGNMENT
        rest = (first.file_offset + progress, first.nbytes - progress, first.address + progress)
        assert [(again.file_offset, again.nbytes, again.address) for again in tail] == [rest]
        assert done.job.counters["retry_count"] == 1
    else:
        assert done.job.counters["retry_count"] == 0
    assert_usable(pipeline, buffered_fd)


@directions
def test_every_transfer_may_be_short_as_long_as_there_is_progress(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction
) -> None:
    """More short transfers of one block than the bound on tries without progress."""
    slot_bytes = 2 * RETRIES_MAX * ALIGNMENT
    table = FaultTable(always=short(ALIGNMENT + 1))
    pipeline = open_pipeline(1, slot_bytes, table)
    tensor, plan = noise(slot_bytes), whole(slot_bytes, slot_bytes)
    rewrite(buffered_fd, 0, bytes_of(tensor))
    job = make_job(direction, plan, [plain(tensor)], checksums=checksums_of(plan, [bytes_of(tensor)]))
    assert run(pipeline, job, [buffered_fd]).failure is None
    assert content(buffered_fd, slot_bytes) == bytes_of(tensor)
    # The last piece is whole: its 4096 bytes are fewer than what a transfer may move.
    assert job.counters["retry_count"] == 2 * RETRIES_MAX - 1
    assert job.counters["io_bytes"] == slot_bytes


@directions
@pytest.mark.parametrize("moved_bytes", [0, 1, ALIGNMENT - 1])
def test_no_progress_is_a_failure(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, moved_bytes: int
) -> None:
    count = 1 if moved_bytes == 0 else 1 + RETRIES_MAX
    table = FaultTable({operation: short(moved_bytes) for operation in range(2, 2 + count)})
    pipeline = open_pipeline(1, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.SHORT, 0, 2)
    assert len(table.operations) == 2 + count
    assert_usable(pipeline, buffered_fd)


@directions
@operations
def test_more_bytes_than_were_asked_for_is_a_failure(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, operation: int
) -> None:
    table = FaultTable({operation: boasting()})
    pipeline = open_pipeline(1, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, errno.EIO, operation)
    assert_usable(pipeline, buffered_fd)


@directions
def test_completions_come_in_any_order(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction
) -> None:
    table = FaultTable({1: short(ALIGNMENT), 2: refused(errno.EAGAIN)}, backwards=True)
    pipeline = open_pipeline(4, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    done.assert_right(buffered_fd)
    assert done.job.counters["retry_count"] == 2
    assert_usable(pipeline, buffered_fd)


@directions
def test_a_file_that_the_ring_refuses_fails_the_job(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction
) -> None:
    table = FaultTable(set_file_error=errno.EMFILE)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, errno.EMFILE, None)
    assert not table.operations
    table.set_file_error = 0
    assert_usable(pipeline, buffered_fd)


@directions
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_a_submission_refused_in_passing_is_made_again(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, error: int
) -> None:
    table = FaultTable(refusals=[error] * REFUSALS_MAX)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    faulty(pipeline, table, buffered_fd, direction).assert_right(buffered_fd)
    assert_usable(pipeline, buffered_fd)


@directions
@pytest.mark.parametrize(("error", "count"), [(errno.EBADF, 1), (errno.EOPNOTSUPP, 1), (errno.EBUSY, REFUSALS_MAX + 1)])
def test_a_ring_that_is_gone_fails_every_job(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, error: int, count: int
) -> None:
    table = FaultTable(refusals=[error] * count)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    waiting = make_job(WRITE, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))])
    pipeline.submit(waiting)  # holds both slots, until the ring is gone
    until(lambda: set(waiting.states()[:2]) == {BlockState.STAGED})
    pipeline.attach(waiting, [buffered_fd])
    behind = make_job(direction, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))])
    assert finish(pipeline, waiting).failure == Failure(FailureKind.IO, error, None)
    for job in (behind, make_job(direction, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))], checked=True)):
        pipeline.submit(job)
        assert finish(pipeline, job).failure == Failure(FailureKind.IO, error, None)
    assert not table.exceptions and not table.files


FAULTS = st.one_of(
    st.sampled_from([errno.EIO, errno.ENOSPC, errno.EINTR, errno.EAGAIN, errno.ENOMEM]).map(refused),
    st.sampled_from([errno.EIO, errno.EBUSY]).map(not_started),
    st.integers(0, SLOT_BYTES + 1).map(short),
    st.integers(0, 4).map(lambda count: short(count * ALIGNMENT)),
    st.just(boasting()),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    direction=st.sampled_from(Direction),
    slot_count=st.integers(1, 4),
    script=st.dictionaries(st.integers(0, 14), FAULTS, max_size=8),
    refusals=st.lists(st.sampled_from([errno.EINTR, errno.EAGAIN]), max_size=3),
    backwards=st.booleans(),
)
def test_success_means_the_right_bytes(
    buffered_fd: int,
    direction: Direction,
    slot_count: int,
    script: dict[int, Fault],
    refusals: list[int],
    backwards: bool,
) -> None:
    table = FaultTable(script, refusals, backwards)
    pipeline = Pipeline(slot_count, SLOT_BYTES, io_table=table.c_table)
    try:
        done = faulty(pipeline, table, buffered_fd, direction)
        check_blocks(done, buffered_fd)
        table.heal()
        assert_usable(pipeline, buffered_fd)
    finally:
        pipeline.close()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slot_count=st.integers(1, 4),
    script=st.dictionaries(st.integers(0, 8), st.just(corrupting()) | FAULTS, min_size=1, max_size=4),
)
def test_no_corrupt_byte_is_read(buffered_fd: int, slot_count: int, script: dict[int, Fault]) -> None:
    table = FaultTable(script)
    pipeline = Pipeline(slot_count, SLOT_BYTES, io_table=table.c_table)
    try:
        check_blocks(faulty(pipeline, table, buffered_fd, READ), buffered_fd)
        table.heal()
        assert_usable(pipeline, buffered_fd)
    finally:
        pipeline.close()


def check_blocks(done: Faulty, fd: int) -> None:
    """A success is right as a whole; after a failure, what is said to be written is, and nothing else was read."""
    job = done.job
    stored = content(fd, FAULTY_BYTES).ljust(FAULTY_BYTES, b"\0")
    if job.failure is None:
        done.assert_right(fd)
        return
    assert job.failure.kind in (FailureKind.IO, FailureKind.SHORT, FailureKind.CHECKSUM)
    assert job.failure.block is not None and job.states()[job.failure.block] == BlockState.FAILED
    assert job.states().count(BlockState.FAILED) == 1
    for block, state in zip(FAULTY_PLAN.blocks, job.states(), strict=True):
        where = slice(block.file_offset, block.file_offset + block.nbytes)
        if state == BlockState.WRITTEN:
            assert stored[where] == bytes_of(done.expected[where])
            assert torch.equal(done.tensor[where], done.expected[where])
        elif job.c_job.direction == READ:
            assert not done.tensor[where].any(), "bytes of a block that failed reached the tensor"
