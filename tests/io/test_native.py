"""The native pipeline, driven through `engine.io` directly: bytes of any layout round trip.

Theory of operation.  numpy is the model of a job.  A write is the bytes of a tensor in row-major order, cut at block
boundaries.  A checksum is the XXH3-128 of the xxhash package.  A successful job has moved every byte.

The examples of one hypothesis test share a pipeline and its files.  No test reads a clock; `HANG_NS` ends a test that
would hang.  The same holds for the other `test_native_*` files.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import xxhash
from faults import FaultTable, not_started
from hypothesis import given
from hypothesis import strategies as st
from jobs import (
    HANG_NS,
    LOOK_NS,
    READ,
    SLOT_BYTES,
    WRITE,
    Stage,
    assert_usable,
    bytes_of,
    checksums_of,
    content,
    cut,
    finish,
    make_job,
    noise,
    plain,
    rewrite,
    run,
    strided,
    until,
    whole,
)

from engine.format.layout import align_up
from engine.format.plan import ALIGNMENT, Extent
from engine.io.binding import DIMS_MAX, JOBS_MAX, block_checksum
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job, Milestone
from engine.io.pipeline import Pipeline
from engine.store.filesystem import Filesystem

# -- round trips of bytes ---------------------------------------------------------------------------------------------

SIZES = [1, 4095, 4096, 4097, 2 * SLOT_BYTES, 5 * SLOT_BYTES + 17, 40 * SLOT_BYTES + 1]


@pytest.mark.every_staging
@pytest.mark.parametrize("slot_count", [1, 2, 5])
@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_round_trip(open_pipeline: Callable[..., Pipeline], fd: int, nbytes: int, slot_count: int) -> None:
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
    # Every byte has its own source, in reverse order.
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
    files = [Filesystem().open_for_blocks(str(path), write=True, direct=True) for path in paths]
    fds = [file.number for file in files]
    plan = cut([[Extent(index, 0, 0, nbytes)] for index, nbytes in enumerate(sizes)], SLOT_BYTES)
    backwards = range(len(plan.blocks))[::-1]
    written = run(pipeline, make_job(WRITE, plan, [*map(plain, before)], order=backwards), fds)
    for path, tensor, nbytes in zip(paths, before, sizes, strict=True):
        assert path.read_bytes()[:nbytes] == bytes_of(tensor)
    read = run(pipeline, make_job(READ, plan, [*map(plain, after)], checksums=written.checksums()), fds)
    assert read.failure is None
    assert all(map(torch.equal, before, after))
    for file in files:
        file.close()


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
def test_padding_is_zero_in_a_slot_with_any_earlier_content(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
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
    """The recipe of a strided tensor: a base's shape, a slice of each dimension, and the order of dimensions."""

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
    """One tensor after the other, each its own source."""
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

    bases = [torch.zeros(view.shape, dtype=view.dtype) for view in drawn]
    targets = [base[view.slices].permute(view.order) for base, view in zip(bases, drawn, strict=True)]
    targets.sort(key=lambda tensor: -tensor.element_size())
    job = make_job(READ, plan, [*map(strided, targets)], checksums=written.checksums())
    assert run(stage.pipeline, job, [stage.fd]).failure is None
    assert b"".join(map(bytes_of, targets)) == stored
    # Only the elements of the views have changed in the bases.
    assert sum(map(count_bytes, bases)) == sum(map(count_bytes, targets))


def count_bytes(tensor: torch.Tensor) -> int:
    """The number of bytes of a tensor that are not zero."""
    return sum(byte != 0 for byte in bytes_of(tensor))


@pytest.mark.every_staging
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

# Around the lengths at which XXH3 changes its algorithm: 3, 8, 16, 128 and 240 bytes; stripes of 64; the streaming
# state's buffer of 256; blocks of 1024; and the pieces and streamed runs of native/staging/bulk.c.
XXH3_BOUNDARIES = (0, 3, 8, 16, 64, 128, 240, 256, 512, 1024, 2048, 4096, 8192, 64 << 10)


@pytest.mark.parametrize("boundary", XXH3_BOUNDARIES)
def test_a_checksum_is_the_unseeded_xxh3_128_of_the_bytes(boundary: int) -> None:
    for nbytes in range(max(1, boundary - 2), boundary + 3):
        data = bytes_of(noise(nbytes))
        assert block_checksum(data) == xxhash.xxh3_128_digest(data), nbytes


@pytest.mark.parametrize("boundary", XXH3_BOUNDARIES[:-1])  # within a slot
def test_a_block_staged_in_pieces_has_the_checksum_of_the_whole(stage: Stage, boundary: int) -> None:
    """Two plain extents cut at any byte, and two strided ones."""
    tensor = noise(SLOT_BYTES)
    for nbytes in range(max(1, boundary - 2), min(boundary + 3, SLOT_BYTES)):
        halves = [tensor[:nbytes], tensor[nbytes:]]
        columns = [tensor[: 2 * (nbytes // 2)].reshape(-1, 2).t(), tensor[2 * (nbytes // 2) :].reshape(-1, 2).t()]
        for parts, source in ((halves, plain), ([part for part in columns if part.numel()], strided)):
            plan = cut([packed_runs(parts)], SLOT_BYTES)
            job = run(stage.pipeline, make_job(WRITE, plan, [*map(source, parts)]), [stage.fd])
            assert job.checksums() == checksums_of(plan, [b"".join(map(bytes_of, parts))]), nbytes


@pytest.mark.parametrize("extent_bytes", [1000, 64 << 10, (64 << 10) + 37, (68 << 10) + 1, 128 << 10, 300 << 10])
def test_the_pipeline_gives_the_checksums_of_the_stored_bytes(
    open_pipeline: Callable[..., Pipeline], fd: int, extent_bytes: int
) -> None:
    """Extents that are copied through the caches, and past them in pieces, with and without a rest."""
    nbytes = (700 << 10) + 3
    pipeline, tensor = open_pipeline(2, 512 << 10), noise(nbytes)
    pieces = tensor.split(extent_bytes)
    plan = cut([packed_runs([*pieces])], 512 << 10)
    job = run(pipeline, make_job(WRITE, plan, [*map(plain, pieces)]), [fd])
    assert job.checksums() == checksums_of(plan, [bytes_of(tensor)])


@pytest.mark.parametrize("extent_bytes", [1000, (64 << 10) + 37, 2 << 20])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_source_changed_while_it_is_staged_gets_the_checksum_of_the_copied_bytes(
    open_pipeline: Callable[..., Pipeline], fd: int, extent_bytes: int, transposed: bool
) -> None:
    """Extents that are copied through the caches, and past them with a head and a tail and without, and strided."""
    pipeline, tensor = open_pipeline(2, 1 << 20), noise(max(extent_bytes, 32 << 10))
    parts = [*tensor.split(extent_bytes)] * ((2 << 20) // len(tensor))  # again and again, so that one is often hit
    if transposed:
        parts = [part[: len(part) // 2 * 2].reshape(2, -1).t() for part in parts]
    plan, sources = cut([packed_runs(parts)], 1 << 20), [*map(strided if transposed else plain, parts)]
    undisturbed = b"".join(map(bytes_of, parts))
    whole_states = {undisturbed, bytes(byte ^ 0xFF for byte in undisturbed)}
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            tensor.bitwise_xor_(0xFF)

    torn_count = 0
    with ThreadPoolExecutor(1) as threads:
        disturbing = threads.submit(disturb)
        try:
            for _ in range(1000):
                job = run(pipeline, make_job(WRITE, plan, sources), [fd])
                stored = content(fd, len(undisturbed))
                assert job.checksums() == checksums_of(plan, [stored])
                torn_count += stored not in whole_states
                if torn_count == 20:
                    break
        finally:
            ended.set()
            disturbing.result()
    assert torn_count == 20


@given(st.binary(min_size=1, max_size=512), st.data())
def test_a_changed_block_does_not_verify(block: bytes, data: st.DataObject) -> None:
    checksum, changed = block_checksum(block), bytearray(block)
    changed[data.draw(st.integers(0, len(block) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum == block_checksum(block)
    assert checksum != block_checksum(changed) and checksum != block_checksum(block[:-1])


def test_swapped_blocks_do_not_verify(stage: Stage) -> None:
    tensor, plan = noise(2 * SLOT_BYTES), whole(2 * SLOT_BYTES, SLOT_BYTES)
    first, second = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd]).checksums()
    job = make_job(READ, plan, [plain(tensor.clone())], checksums=[second, first])
    failure = run(stage.pipeline, job, [stage.fd]).failure
    assert failure is not None and failure.kind == FailureKind.CHECKSUM


@pytest.mark.every_staging
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


def test_corrupt_padding_does_not_fail_the_block(stage: Stage) -> None:
    before, after, plan = noise(100), torch.zeros(100, dtype=torch.uint8), whole(100, SLOT_BYTES)
    written = run(stage.pipeline, make_job(WRITE, plan, [plain(before)]), [stage.fd])
    rewrite(stage.fd, 100, b"\xff" * 100)
    job = make_job(READ, plan, [plain(after)], checksums=written.checksums())
    assert run(stage.pipeline, job, [stage.fd]).failure is None
    assert torch.equal(before, after)


# -- a checked snapshot -----------------------------------------------------------------------------------------------


def test_an_unchanged_source_is_not_torn(stage: Stage) -> None:
    tensor, plan = noise(20 * SLOT_BYTES + 9), whole(20 * SLOT_BYTES + 9, SLOT_BYTES)
    job = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)], checked=True), [stage.fd])
    assert job.failure is None
    assert content(stage.fd, len(tensor)) == bytes_of(tensor)
    assert job.checksums() == checksums_of(plan, [bytes_of(tensor)])


@pytest.mark.every_staging
@pytest.mark.every_backend
@pytest.mark.parametrize("block", range(4))
def test_a_checked_job_has_the_bytes_of_its_first_hash_or_is_torn(
    open_pipeline: Callable[..., Pipeline], fd: int, block: int
) -> None:
    """Two of its four blocks are staged, so a change of these comes too late to matter."""
    pipeline = open_pipeline(3)
    tensor, plan = noise(4 * SLOT_BYTES), whole(4 * SLOT_BYTES, SLOT_BYTES)
    before = bytes_of(tensor)
    job = make_job(WRITE, plan, [plain(tensor)], checked=True)
    pipeline.submit(job)
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert job.checksums() == checksums_of(plan, [before])
    until(lambda: set(job.states()[:2]) == {BlockState.STAGED})
    assert not pipeline.wait(job, Milestone.STAGED, LOOK_NS)
    tensor[(block + 1) * SLOT_BYTES - 1] ^= 1
    pipeline.attach(job, [fd])
    failure = finish(pipeline, job).failure
    if block < 2:
        assert failure is None and content(fd, len(before)) == before
    else:
        assert failure == Failure(FailureKind.TORN, errno.EBUSY, block)
        assert job.states()[block] == BlockState.FAILED
    assert_usable(pipeline, fd)


# -- abort ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
def test_abort_before_the_files_exist(stage: Stage, direction: Direction) -> None:
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    job = make_job(direction, plan, [plain(tensor)])
    stage.pipeline.submit(job)
    stage.pipeline.abort(job, errno.ENOSPC)
    assert finish(stage.pipeline, job).failure == Failure(FailureKind.ABORTED, errno.ENOSPC, None)
    assert BlockState.WRITTEN not in job.states()
    stage.pipeline.attach(job, [stage.fd])  # too late, but no error: a writer may lose this race
    assert_usable(stage.pipeline, stage.fd)


def test_a_job_aborted_before_it_is_submitted_is_not_begun(stage: Stage) -> None:
    job = make_job(WRITE, whole(9 * SLOT_BYTES, SLOT_BYTES), [plain(noise(9 * SLOT_BYTES))])
    stage.pipeline.abort(job, errno.EINTR)
    assert finish(stage.pipeline, job).failure == Failure(FailureKind.ABORTED, errno.EINTR, None)
    stage.pipeline.submit(job)
    assert_usable(stage.pipeline, stage.fd)
    assert set(job.states()) == {BlockState.PENDING}
    assert job.failure == Failure(FailureKind.ABORTED, errno.EINTR, None)


@pytest.mark.every_staging
@pytest.mark.every_backend
def test_a_job_aborted_while_it_waits_to_be_queued_is_not_begun(
    open_pipeline: Callable[..., Pipeline], fd: int
) -> None:
    pipeline, plan = open_pipeline(2), whole(SLOT_BYTES, SLOT_BYTES)
    jobs = [make_job(WRITE, plan, [plain(noise(SLOT_BYTES, seed))]) for seed in range(JOBS_MAX + 1)]
    for job in jobs[:-1]:
        pipeline.submit(job)
    thread = threading.Thread(target=pipeline.submit, args=(jobs[-1],))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), "there is no place for it"
    pipeline.abort(jobs[-1], errno.ECANCELED)
    assert finish(pipeline, jobs[-1]).failure == Failure(FailureKind.ABORTED, errno.ECANCELED, None)
    for job in jobs[:-1]:
        pipeline.abort(job, errno.ECANCELED)
    thread.join(HANG_NS / 1e9)
    assert not thread.is_alive()
    assert_usable(pipeline, fd)
    assert set(jobs[-1].states()) == {BlockState.PENDING}


@pytest.mark.every_staging
@pytest.mark.every_backend
@pytest.mark.parametrize("direction", Direction)
def test_abort_drains_operations_in_flight(
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


@pytest.mark.every_staging
def test_the_first_failure_is_reported(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
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
    assert pipeline.wait(later, Milestone.URGENT, HANG_NS), "the earlier request has been served by then"
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS)
    gate.set()
    assert finish(pipeline, job).failure == Failure(FailureKind.IO, errno.EIO, 1)
    pipeline.attach(later, [buffered_fd])
    assert finish(pipeline, later).failure is None


# -- status and milestones --------------------------------------------------------------------------------------------


def test_states_and_milestones_come_in_order(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    pipeline = open_pipeline(3, SLOT_BYTES, FaultTable(gate=gate))
    plan, tensor = whole(3 * SLOT_BYTES, SLOT_BYTES), noise(3 * SLOT_BYTES)
    pending, staged, written = (bytes([state]) for state in (BlockState.PENDING, BlockState.STAGED, BlockState.WRITTEN))
    job = make_job(WRITE, plan, [plain(tensor)], order=[2, 0, 1], urgent_count=1)
    assert job.states() == 3 * pending

    pipeline.submit(job)  # without files: all slots but one, so two blocks, the urgent one first
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
    assert 0 < counters["copying_ns"] < counters["done_ns"] - counters["submitted_ns"]
    assert counters["hashing_ns"] == 0, "blocks are hashed while they are copied"


@pytest.mark.every_staging
def test_a_restore_is_verified_before_a_younger_save_is_staged(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    """A save whose writes complete at once always has a free slot and a block to begin."""
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = open_pipeline(4, ALIGNMENT, table)
    tensor, large = noise(2 * ALIGNMENT), torch.zeros(1000 * ALIGNMENT, dtype=torch.uint8)
    plan, large_plan = whole(2 * ALIGNMENT, ALIGNMENT), whole(1000 * ALIGNMENT, ALIGNMENT)
    rewrite(buffered_fd, 0, bytes_of(tensor))
    restore = make_job(READ, plan, [plain(tensor.clone())], checksums=checksums_of(plan, [bytes_of(tensor)]))
    save = make_job(WRITE, large_plan, [plain(large)])
    for job in (restore, save):
        pipeline.submit(job)
        pipeline.attach(job, [buffered_fd])
    gate.set()
    assert finish(pipeline, restore).failure is None
    assert finish(pipeline, save).failure is None
    assert restore.counters["done_ns"] < save.counters["staged_ns"]


@pytest.mark.every_staging
def test_all_is_staged_before_all_is_written(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    pipeline = open_pipeline(3, SLOT_BYTES, FaultTable(gate=gate))
    tensor = noise(2 * SLOT_BYTES)
    expected = bytes_of(tensor)
    job = make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(tensor)], urgent_count=2)
    pipeline.submit(job)
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
    tensor.zero_()  # the job no longer reads the source
    pipeline.attach(job, [buffered_fd])
    assert not pipeline.wait(job, Milestone.DONE, LOOK_NS)
    gate.set()
    assert finish(pipeline, job).failure is None
    assert content(buffered_fd, len(expected)) == expected


def test_blocks_staged_before_the_files_exist_are_written_in_order(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    """With any number of slots: the second job first takes the slots that the first freed last."""
    table = FaultTable()
    pipeline = open_pipeline(5, SLOT_BYTES, table)
    for order in ([0, 1, 2, 3], [0, 1, 2, 3], [2, 0, 3, 1]):
        table.operations.clear()
        job = make_job(WRITE, whole(4 * SLOT_BYTES, SLOT_BYTES), [plain(noise(4 * SLOT_BYTES))], order=order)
        pipeline.submit(job)
        assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
        pipeline.attach(job, [buffered_fd])
        assert finish(pipeline, job).failure is None
        assert [operation.file_offset // SLOT_BYTES for operation in table.operations] == order


def test_a_job_without_files_does_not_block_others(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    table = FaultTable()
    pipeline = open_pipeline(5, SLOT_BYTES, table)
    first, second = (make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(noise(2 * SLOT_BYTES))]) for _ in "ab")
    for job in (first, second):
        pipeline.submit(job)
        assert pipeline.wait(job, Milestone.STAGED, HANG_NS)
    for job in (second, first):
        table.operations.clear()
        pipeline.attach(job, [buffered_fd])
        assert finish(pipeline, job).failure is None
        assert [operation.file_offset // SLOT_BYTES for operation in table.operations] == [0, 1]


@pytest.mark.every_staging
def test_without_urgent_blocks_the_urgent_milestone_is_reached_at_once(open_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = open_pipeline(1)
    job = make_job(WRITE, whole(2 * SLOT_BYTES, SLOT_BYTES), [plain(noise(2 * SLOT_BYTES))])
    pipeline.submit(job)
    assert pipeline.wait(job, Milestone.URGENT, HANG_NS)
    assert not pipeline.wait(job, Milestone.STAGED, LOOK_NS)
    pipeline.abort(job, errno.ECANCELED)
    finish(pipeline, job)


# Two of these are 64 MiB, the limit on reads in flight, and only one block of each is touched.
LARGE_SLOT_BYTES = 32 << 20


def read_of(fd: int, block_count: int) -> tuple[Job, torch.Tensor, bytes]:
    """A read of small blocks of a file, its target, and the expected bytes."""
    stored = bytes_of(noise(block_count * ALIGNMENT))
    rewrite(fd, 0, stored)
    plan, tensor = whole(len(stored), ALIGNMENT), torch.zeros(len(stored), dtype=torch.uint8)
    return make_job(READ, plan, [plain(tensor)], checksums=checksums_of(plan, [stored])), tensor, stored


def test_reads_leave_slots_for_staging(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    """At most 64 MiB of reads are in flight, with any number of slots."""
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


def test_reads_do_not_wait_for_writes_in_flight(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = open_pipeline(4, LARGE_SLOT_BYTES, table)
    read, tensor, stored = read_of(buffered_fd, 2)
    # The same bytes as in the file, so that the order does not matter.
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
    """Records at the start of each operation how many blocks of the job are WRITTEN."""

    def __init__(self) -> None:
        super().__init__()
        self.job: Job | None = None
        self.seen: list[int] = []

    def _start(self, context: Any, io: Any) -> int:
        assert self.job is not None
        self.seen.append(self.job.states().count(BlockState.WRITTEN))
        return super()._start(context, io)


def test_the_next_reads_start_before_the_last_blocks_are_verified(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    table = Watching()
    pipeline = open_pipeline(4, LARGE_SLOT_BYTES, table)
    table.job, tensor, stored = read_of(buffered_fd, 4)
    assert run(pipeline, table.job, [buffered_fd]).failure is None
    assert bytes_of(tensor) == stored
    assert table.seen == [0, 0, 0, 0]  # two in flight at a time; the last two start before the first are verified


def test_a_failed_job_does_not_delay_others(stage: Stage) -> None:
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
    files = [
        Filesystem().open_for_blocks(str(tmp_path / f"{index}"), write=True, direct=True) for index in range(JOBS_MAX)
    ]
    for job in jobs:
        pipeline.submit(job)
    for index in range(JOBS_MAX)[:: -1 if attach_backwards else 1]:
        pipeline.attach(jobs[index], [files[index].number])
    for job, tensor, file in zip(jobs, tensors, files, strict=True):
        assert finish(pipeline, job).failure is None
        assert content(file.number, len(tensor)) == bytes_of(tensor)
        file.close()


@pytest.mark.every_backend
def test_a_job_beyond_the_limit_waits(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
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
    for job in jobs[1:]:  # all of them first: the pipeline chooses which job has the slots
        pipeline.attach(job, [fd])
    assert {finish(pipeline, job).failure for job in jobs[1:]} == {None}


@pytest.mark.every_backend
def test_jobs_from_several_threads(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = open_pipeline(3)
    plan = whole(3 * SLOT_BYTES + 7, SLOT_BYTES)
    wrong: list[object] = []

    def save_and_restore(number: int) -> None:
        file = Filesystem().open_for_blocks(str(tmp_path / f"{number}"), write=True, direct=True)
        for seed in range(10):
            before = noise(3 * SLOT_BYTES + 7, 100 * number + seed)
            after = torch.zeros_like(before)
            written = run(pipeline, make_job(WRITE, plan, [plain(before)]), [file.number])
            job = make_job(READ, plan, [plain(after)], checksums=written.checksums())
            if run(pipeline, job, [file.number]).failure or not torch.equal(before, after):
                wrong.append((number, seed))
        file.close()

    threads = [threading.Thread(target=save_and_restore, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
