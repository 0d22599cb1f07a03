"""Known blocks: a write skips blocks that its files already hold.  Also jobs of many files.

Theory of operation.  A `FaultTable` does the I/O and lists every operation, so a test sees which blocks were written.
"""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from faults import FaultTable, refused, short
from hypothesis import given
from hypothesis import strategies as st
from jobs import (
    READ,
    SLOT_BYTES,
    WRITE,
    bytes_of,
    checksums_of,
    content,
    cut,
    finish,
    make_job,
    noise,
    plain,
    run,
    until,
    whole,
)

from engine.format.layout import align_up
from engine.format.plan import ALIGNMENT, Extent
from engine.io.binding import JOB_PLACES
from engine.io.job import BlockState, Failure, FailureKind, Job, Milestone
from engine.io.pipeline import Pipeline

BLOCKS = 6
NBYTES = (BLOCKS - 1) * SLOT_BYTES + 100
PLAN = whole(NBYTES, SLOT_BYTES)


def changed_at(blocks: set[int]) -> torch.Tensor:
    """The bytes of `noise`, with one byte different in each of these blocks."""
    tensor = noise(NBYTES)
    for block in blocks:
        tensor[block * SLOT_BYTES + 99] ^= 1
    return tensor


def write(
    pipeline: Pipeline, table: FaultTable, fd: int, tensor: torch.Tensor, known: list[bytes | None], staged_first: bool
) -> tuple[Job, set[int]]:
    """Write a tensor over a file; returns the job and the blocks whose I/O was started."""
    before = len(table.operations)
    job = make_job(WRITE, PLAN, [plain(tensor)])
    pipeline.submit(job)
    if staged_first:
        assert pipeline.wait(job, Milestone.STAGED)
    pipeline.attach(job, [fd], known)
    finish(pipeline, job)
    assert not table.exceptions and not table.files
    return job, {operation.file_offset // SLOT_BYTES for operation in table.operations[before:]}


@pytest.mark.every_staging
@pytest.mark.parametrize("staged_first", [False, True])
@pytest.mark.parametrize("changed", [set(), {0}, {3}, {BLOCKS - 1}, {0, 2, 5}, set(range(BLOCKS))])
def test_only_blocks_that_differ_from_the_known_ones_are_written(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int, changed: set[int], staged_first: bool
) -> None:
    table = FaultTable()
    pipeline = open_pipeline(BLOCKS + 1 if staged_first else 2, SLOT_BYTES, table)
    old = run(pipeline, make_job(WRITE, PLAN, [plain(noise(NBYTES))]), [buffered_fd])
    tensor = changed_at(changed)
    job, written = write(pipeline, table, buffered_fd, tensor, [*old.checksums()], staged_first)
    assert job.failure is None and set(job.states()) == {BlockState.WRITTEN}
    assert written == changed
    assert content(buffered_fd, NBYTES) == bytes_of(tensor)
    assert job.checksums() == checksums_of(PLAN, [bytes_of(tensor)])
    written_bytes = sum(align_up(PLAN.blocks[block].nbytes, ALIGNMENT) for block in changed)
    assert job.counters["io_bytes"] == written_bytes
    assert job.counters["skipped_bytes"] == align_up(NBYTES, ALIGNMENT) - written_bytes


@given(
    st.lists(st.sampled_from(["right", "wrong", "unknown"]), min_size=BLOCKS, max_size=BLOCKS),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_mixture_of_known_blocks(drawn: list[str], staged_first: bool, staging_threads: int) -> None:
    table, tensor = FaultTable(), noise(NBYTES)
    right = checksums_of(PLAN, [bytes_of(tensor)])
    choices: dict[str, Callable[[bytes], bytes | None]] = {
        "right": lambda hash_: hash_,
        "wrong": lambda hash_: hash_[::-1],
        "unknown": lambda _: None,
    }
    known = [choices[kind](hash_) for kind, hash_ in zip(drawn, right, strict=True)]
    opened = Pipeline(BLOCKS + 1, SLOT_BYTES, staging_threads=staging_threads, io_table=table.c_table)
    with tempfile.TemporaryFile() as file, closing(opened) as pipeline:
        job, written = write(pipeline, table, file.fileno(), tensor, known, staged_first)
    assert job.failure is None
    assert written == {index for index, kind in enumerate(drawn) if kind != "right"}


def test_a_block_that_was_begun_is_completed(open_pipeline: Callable[..., Pipeline], buffered_fd: int) -> None:
    """A short write is followed by the rest of the block, even if the file is known to hold it."""
    table = FaultTable()
    pipeline = open_pipeline(BLOCKS, SLOT_BYTES, table)
    old = run(pipeline, make_job(WRITE, PLAN, [plain(noise(NBYTES))]), [buffered_fd])
    table.arm({0: short(ALIGNMENT)})
    tensor = changed_at({1})
    job, written = write(pipeline, table, buffered_fd, tensor, [*old.checksums()], staged_first=False)
    assert job.failure is None and written == {1}
    assert job.counters["retry_count"] == 1
    assert content(buffered_fd, NBYTES) == bytes_of(tensor)


def test_a_failure_beside_skipped_blocks_fails_the_job(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    table = FaultTable()
    pipeline = open_pipeline(2, SLOT_BYTES, table)
    old = run(pipeline, make_job(WRITE, PLAN, [plain(noise(NBYTES))]), [buffered_fd])
    table.arm({0: refused(5)})
    job, _ = write(pipeline, table, buffered_fd, changed_at({4}), [*old.checksums()], staged_first=False)
    assert job.failure == Failure(FailureKind.IO, 5, 4)


@pytest.mark.every_staging
def test_a_torn_source_is_reported_even_if_its_blocks_are_known(
    open_pipeline: Callable[..., Pipeline], buffered_fd: int
) -> None:
    pipeline = open_pipeline(2, SLOT_BYTES, FaultTable())
    tensor = noise(NBYTES)
    old = run(pipeline, make_job(WRITE, PLAN, [plain(tensor)]), [buffered_fd])
    job = make_job(WRITE, PLAN, [plain(tensor)], checked=True)
    pipeline.submit(job)
    until(lambda: job.states()[0] == BlockState.STAGED)
    tensor[-1] ^= 1
    pipeline.attach(job, [buffered_fd], [*old.checksums()])
    assert finish(pipeline, job).failure == Failure(FailureKind.TORN, errno.EBUSY, len(PLAN.blocks) - 1)


@pytest.fixture
def descriptors_raised() -> Iterator[None]:
    """As many descriptors as the host allows: its usual soft limit, 1024, leaves room for fewer files than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.every_backend
@pytest.mark.usefixtures("descriptors_raised")
@pytest.mark.parametrize("file_count", [JOB_PLACES, JOB_PLACES + 1, 1024])
def test_a_job_has_any_number_of_files(open_pipeline: Callable[..., Pipeline], tmp_path: Path, file_count: int) -> None:
    """Files beyond the size of the ring's table, and the last block of each."""
    pipeline = open_pipeline(3)
    nbytes = ALIGNMENT + 8
    tensor = noise(file_count * nbytes)
    plan = cut([[Extent(0, index * nbytes, 0, nbytes)] for index in range(file_count)], ALIGNMENT)
    with ExitStack() as opened:  # whatever fails, no later test lacks descriptors
        fds = []
        for index in range(file_count):
            fds.append(os.open(tmp_path / f"{index}", os.O_RDWR | os.O_CREAT))
            opened.callback(os.close, fds[-1])
        written = run(pipeline, make_job(WRITE, plan, [plain(tensor)]), fds)
        assert written.failure is None
        stored = b"".join((tmp_path / f"{index}").read_bytes()[:nbytes] for index in range(file_count))
        assert stored == bytes_of(tensor)
        after = torch.zeros_like(tensor)
        read = run(pipeline, make_job(READ, plan, [plain(after)], checksums=written.checksums()), fds)
        assert read.failure is None and torch.equal(tensor, after)
