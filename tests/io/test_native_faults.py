"""Faults of reads and writes, from a table that replaces the ring (`faults.FaultTable`).

Every fault ends in a job that is done, with the right failure or the right bytes, and in a pipeline that takes the next
job.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from faults import Fault, FaultTable, boasting, corrupting, not_started, refused, short
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import (
    READ,
    SLOT_BYTES,
    WRITE,
    Stage,
    assert_usable,
    bytes_of,
    checksums_of,
    content,
    finish,
    make_job,
    noise,
    plain,
    rewrite,
    run,
    until,
    whole,
)

from engine.format.layout import align_up
from engine.format.plan import ALIGNMENT, Source
from engine.io.job import BlockState, Direction, Failure, FailureKind, Job
from engine.io.packing import pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline

# Tries without progress before a job fails, and refusals of a submission in a row (native/pipeline/pipeline.c).
RETRIES_MAX = 16
REFUSALS_MAX = 100


FAULTY_BYTES = 5 * SLOT_BYTES + 100
FAULTY_PLAN = whole(FAULTY_BYTES, SLOT_BYTES)


class Faulty(NamedTuple):
    """A job that was run through a table of faults."""

    job: Job
    pipeline: Pipeline
    table: FaultTable
    tensor: torch.Tensor
    expected: torch.Tensor

    def block_of(self, operation: int) -> int:
        """The block of an operation."""
        return self.table.operations[operation].file_offset // SLOT_BYTES

    def assert_right(self, fd: int) -> None:
        """Assert that the job succeeded, and that all bytes are right."""
        assert self.job.failure is None
        assert set(self.job.states()) == {BlockState.WRITTEN}
        if self.job.c_job.direction == WRITE:
            assert content(fd, FAULTY_BYTES) == bytes_of(self.expected)
        assert torch.equal(self.tensor, self.expected)


def faulty(pipeline: Pipeline, table: FaultTable, fd: int, direction: Direction) -> Faulty:
    """Write, or read existing bytes back."""
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


@pytest.mark.every_staging
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
def test_a_transient_error_is_retried(
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


@pytest.mark.every_staging
@directions
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_retries_of_a_lasting_error_are_bounded(
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
def test_a_short_transfer_continues_at_an_aligned_byte(
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
    # The request is complete if the file ends here, or if a read has all stored bytes.
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
def test_short_transfers_with_progress_succeed(
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
    # The last piece is whole: its 4096 bytes are fewer than a transfer may move.
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
def test_more_bytes_than_requested_is_a_failure(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, operation: int
) -> None:
    table = FaultTable({operation: boasting()})
    pipeline = open_pipeline(1, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, errno.EIO, operation)
    assert_usable(pipeline, buffered_fd)


@pytest.mark.every_staging
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


@pytest.mark.every_staging
@directions
def test_a_file_refused_by_the_ring_fails_the_job(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction
) -> None:
    table = FaultTable(set_file_error=errno.EMFILE)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    done = faulty(pipeline, table, buffered_fd, direction)
    assert done.job.failure == Failure(FailureKind.IO, errno.EMFILE, None)
    assert not table.operations
    table.set_file_error = 0
    assert_usable(pipeline, buffered_fd)


@pytest.mark.every_staging
@directions
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOMEM])
def test_a_transient_submission_error_is_retried(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, error: int
) -> None:
    table = FaultTable(refusals=[error] * REFUSALS_MAX)
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    faulty(pipeline, table, buffered_fd, direction).assert_right(buffered_fd)
    assert_usable(pipeline, buffered_fd)


@pytest.mark.every_staging
@directions
@pytest.mark.parametrize(("error", "count"), [(errno.EBADF, 1), (errno.EOPNOTSUPP, 1), (errno.EBUSY, REFUSALS_MAX + 1)])
def test_a_lost_ring_fails_every_job(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, direction: Direction, error: int, count: int
) -> None:
    table = FaultTable(refusals=[error] * count)
    pipeline = open_pipeline(3, SLOT_BYTES, table)
    waiting = make_job(WRITE, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))])
    pipeline.submit(waiting)  # holds two slots, until the ring is gone
    until(lambda: set(waiting.states()[:2]) == {BlockState.STAGED})
    pipeline.attach(waiting, [buffered_fd])
    behind = make_job(direction, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))])
    assert finish(pipeline, waiting).failure == Failure(FailureKind.IO, error, None)
    for job in (behind, make_job(direction, FAULTY_PLAN, [plain(noise(FAULTY_BYTES))], checked=True)):
        pipeline.submit(job)
        assert finish(pipeline, job).failure == Failure(FailureKind.IO, error, None)
    assert not table.exceptions and not table.files


def one_block(direction: Direction, file_offset: int) -> Job:
    """A job of one block at any location."""
    tensor = noise(SLOT_BYTES)
    extents = pack_extents([0], [0], [SLOT_BYTES], [0])
    blocks = pack_blocks([(file_offset, SLOT_BYTES, 0, 0, 1)])
    sources = pack_sources([Source(tensor.data_ptr(), SLOT_BYTES)])
    return Job(direction, sources, extents, blocks, pack_order([0]), 1, checksums=[bytes(16)], owners=tensor)


def test_every_backend_keeps_the_errno_of_the_kernel(stage: Stage) -> None:
    """A full device, a byte beyond any file, a descriptor for the other direction: the kernel refuses, and no table."""
    full = os.open("/dev/full", os.O_RDWR)
    to_read = os.open(stage.path, os.O_RDONLY)
    to_write = os.open(stage.path, os.O_WRONLY)
    try:
        for direction, file_offset, descriptor, error in (
            (WRITE, 0, full, errno.ENOSPC),
            (WRITE, 1 << 62, stage.fd, errno.EFBIG),
            (WRITE, 0, to_read, errno.EBADF),
            (READ, 0, to_write, errno.EBADF),
        ):
            job = run(stage.pipeline, one_block(direction, file_offset), [descriptor])
            assert job.failure == Failure(FailureKind.IO, error, 0)
            assert_usable(stage.pipeline, stage.fd)
    finally:
        for descriptor in (full, to_read, to_write):
            os.close(descriptor)


def test_a_short_write_of_the_kernel_is_continued_to_its_errno(stage: Stage) -> None:
    """A limit on file size: write(2) moves the bytes that fit, and refuses the rest."""
    tensor, plan = noise(2 * SLOT_BYTES), whole(2 * SLOT_BYTES, SLOT_BYTES)
    os.truncate(stage.path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT_BYTES + ALIGNMENT, before[1]))
    try:
        job = run(stage.pipeline, make_job(WRITE, plan, [plain(tensor)]), [stage.fd])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert job.failure == Failure(FailureKind.IO, errno.EFBIG, 1) and job.counters["retry_count"] == 1
    assert content(stage.fd, 2 * SLOT_BYTES) == bytes_of(tensor)[: SLOT_BYTES + ALIGNMENT]
    assert_usable(stage.pipeline, stage.fd)


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
    staging_threads=st.integers(1, 4),
    script=st.dictionaries(st.integers(0, 14), FAULTS, max_size=8),
    refusals=st.lists(st.sampled_from([errno.EINTR, errno.EAGAIN]), max_size=3),
    backwards=st.booleans(),
)
def test_success_means_the_right_bytes(
    buffered_fd: int,
    direction: Direction,
    slot_count: int,
    staging_threads: int,
    script: dict[int, Fault],
    refusals: list[int],
    backwards: bool,
) -> None:
    table = FaultTable(script, refusals, backwards)
    pipeline = Pipeline(slot_count, SLOT_BYTES, staging_threads=staging_threads, io_table=table.c_table)
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
    staging_threads=st.integers(1, 4),
    script=st.dictionaries(st.integers(0, 8), st.just(corrupting()) | FAULTS, min_size=1, max_size=4),
)
def test_no_corrupt_byte_is_read(
    buffered_fd: int, slot_count: int, staging_threads: int, script: dict[int, Fault]
) -> None:
    table = FaultTable(script)
    pipeline = Pipeline(slot_count, SLOT_BYTES, staging_threads=staging_threads, io_table=table.c_table)
    try:
        check_blocks(faulty(pipeline, table, buffered_fd, READ), buffered_fd)
        table.heal()
        assert_usable(pipeline, buffered_fd)
    finally:
        pipeline.close()


def check_blocks(done: Faulty, fd: int) -> None:
    """After a success all bytes are right.  After a failure blocks in state WRITTEN are right, and no other is read."""
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
