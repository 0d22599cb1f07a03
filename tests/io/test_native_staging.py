"""Helper threads that stage: what holds for one thread holds while a helper is in the middle of a block.

Theory of operation.  The first block of a job goes to the helper, and the second one waits for it.  The memory of the
first one is held (`held_pages`): the helper stops in it until the test releases it, so that everything that a pipeline
does meanwhile can be seen.  The tests marked `every_staging` in the other files run jobs of every kind with helpers.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faults import Fault, FaultTable, refused
from guarded import UNIT_BYTES, Guarded, needs_cow
from held_pages import HeldPages, needs_held_pages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import (
    HANG_NS,
    LOOK_NS,
    READ,
    SLOT_BYTES,
    WRITE,
    Memory,
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
    until,
    whole,
)
from processes import in_a_process_of_its_own, native_threads

from engine.format.plan import ALIGNMENT, Extent, Plan
from engine.io.binding import lib
from engine.io.job import BlockState, Failure, FailureKind, Job, Milestone
from engine.io.pipeline import OpenError, Pipeline
from engine.options import STAGING_THREADS_MAX

pytestmark = needs_held_pages

BLOCKS = 6
NBYTES = BLOCKS * SLOT_BYTES
PLAN = whole(NBYTES, SLOT_BYTES)
PENDING, STAGED, WRITTEN, FAILED, _WITHHELD = (bytes([state]) for state in BlockState)

# Of a job whose first block is held: one helper has it, and the next one waits for that helper.
HELD_PLAN = cut([[Extent(0, 0, 0, SLOT_BYTES), Extent(1, 0, SLOT_BYTES, NBYTES - SLOT_BYTES)]], SLOT_BYTES)


class Held(NamedTuple):
    """A job of which a helper is in the middle of block 0, while block 1 waits for it."""

    pipeline: Pipeline
    job: Job
    pages: HeldPages
    table: FaultTable
    expected: bytes

    def attach(self, fd: int) -> None:
        self.pipeline.attach(self.job, [fd])

    def assert_waits(self) -> None:
        """The sources are not the caller's again, and the job is not done."""
        assert self.pages.is_touched
        assert not self.pipeline.wait(self.job, Milestone.STAGED, LOOK_NS)
        assert not self.job.reached(Milestone.DONE)

    def release(self) -> Failure | None:
        """Let the helper go on, and wait for the end."""
        self.pages.release()
        return finish(self.pipeline, self.job).failure


@pytest.fixture
def hold() -> Iterator[Callable[..., Held]]:
    """Begins writes whose first block is held; lets all go on at the end."""
    with ExitStack() as undo:

        def begin(slot_count: int = BLOCKS + 1, **options: Any) -> Held:
            pages, rest, table = HeldPages(noise(SLOT_BYTES, 1)), noise(NBYTES - SLOT_BYTES, 2), FaultTable()
            pipeline = Pipeline(slot_count, SLOT_BYTES, "io_uring", 2, io_table=table.c_table)
            undo.callback(pipeline.close)
            undo.callback(pages.release)
            sources = [Memory(pages.address, 1, (), (), pages.content), plain(rest)]
            job = make_job(WRITE, HELD_PLAN, sources, **options)
            pipeline.submit(job)
            until(lambda: pages.is_touched)
            return Held(pipeline, job, pages, table, bytes_of(pages.content) + bytes_of(rest))

        yield begin


# -- order and milestones ---------------------------------------------------------------------------------------------


def test_blocks_are_staged_beside_the_one_that_a_helper_has(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold(urgent_count=3)
    until(lambda: held.job.states() == 2 * PENDING + 4 * STAGED)
    held.assert_waits()
    assert not held.job.reached(Milestone.URGENT), "an urgent block is not staged"
    held.attach(buffered_fd)
    until(lambda: held.job.states() == 2 * PENDING + 4 * WRITTEN)
    held.assert_waits()
    assert held.release() is None
    assert held.job.states() == BLOCKS * WRITTEN
    assert content(buffered_fd, NBYTES) == held.expected
    assert held.job.checksums() == checksums_of(HELD_PLAN, [held.expected])


def test_the_urgent_milestone_waits_for_urgent_blocks_only(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold(order=[0, 1, 2, 3, 4, 5], urgent_count=0)
    assert held.pipeline.wait(held.job, Milestone.URGENT, HANG_NS)
    held.assert_waits()
    held.attach(buffered_fd)
    assert held.release() is None


def test_a_checked_job_hashes_all_before_it_stages_any(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold(checked=True)
    held.attach(buffered_fd)
    younger = make_job(WRITE, PLAN, [plain(noise(NBYTES))])
    run(held.pipeline, younger, [buffered_fd])  # which has slots, because the older job holds two
    assert held.job.states() == BLOCKS * PENDING and not held.job.reached(Milestone.URGENT)
    held.assert_waits()
    assert held.release() is None
    assert content(buffered_fd, NBYTES) == held.expected


def test_a_job_waits_for_its_files_while_a_helper_stages(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold()
    held.pages.release()
    assert held.pipeline.wait(held.job, Milestone.STAGED, HANG_NS)
    assert held.job.states() == BLOCKS * STAGED
    held.attach(buffered_fd)
    assert finish(held.pipeline, held.job).failure is None
    assert content(buffered_fd, NBYTES) == held.expected


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_block_that_a_helper_has_is_not_staged_twice(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold(order=[0, 0, 1, 2, 3, 4])
    held.attach(buffered_fd)
    until(lambda: held.job.states().count(WRITTEN) == 3)
    assert held.release() == Failure(FailureKind.INVALID, errno.EINVAL, 5)
    assert len(held.table.operations) == 5
    assert_usable(held.pipeline, buffered_fd)


@pytest.mark.parametrize("has_files", [False, True])
def test_an_aborted_job_keeps_its_sources_until_the_helper_is_done(
    hold: Callable[..., Held], buffered_fd: int, has_files: bool
) -> None:
    held = hold()
    until(lambda: STAGED in held.job.states())
    if has_files:
        held.attach(buffered_fd)
        until(lambda: WRITTEN in held.job.states())
    held.pipeline.abort(held.job, errno.EPERM)
    later = make_job(WRITE, whole(1, SLOT_BYTES), [plain(noise(1))])
    run(held.pipeline, later, [buffered_fd])  # the abort has been served by then
    held.assert_waits()
    assert held.release() == Failure(FailureKind.ABORTED, errno.EPERM, None)
    assert held.job.states()[:2] == 2 * PENDING, "what the helper copied is not used"
    assert_usable(held.pipeline, buffered_fd)


def test_the_first_failure_is_latched_beside_a_helper(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold()
    held.table.arm({0: refused(errno.EIO)}, always=refused(errno.ENOSPC))
    held.attach(buffered_fd)
    until(lambda: FAILED in held.job.states())
    failed_block = held.job.states().index(FAILED)
    held.assert_waits()
    failure = held.release()
    assert failure == Failure(FailureKind.IO, errno.EIO, failed_block)
    assert held.job.states().count(FAILED) == 1
    held.table.heal()
    assert_usable(held.pipeline, buffered_fd)


def test_a_lost_ring_waits_for_the_helper(hold: Callable[..., Held], buffered_fd: int) -> None:
    held = hold()
    held.table.refuse([errno.EBADF])
    held.attach(buffered_fd)
    until(lambda: len(held.table.operations) > 0)
    held.assert_waits()
    assert held.release() == Failure(FailureKind.IO, errno.EBADF, None)
    behind = make_job(WRITE, PLAN, [plain(noise(NBYTES))])
    held.pipeline.submit(behind)
    assert finish(held.pipeline, behind).failure == Failure(FailureKind.IO, errno.EBADF, None)


# -- close ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_files", [False, True])
def test_close_waits_for_the_helper(hold: Callable[..., Held], buffered_fd: int, has_files: bool) -> None:
    held = hold()
    if has_files:
        held.attach(buffered_fd)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(held.pipeline.close)
        assert not lib.eng_close(held.pipeline._c_pipeline, 0, 50_000_000), "the helper still copies"
        held.assert_waits()
        held.pages.release()
        closing.result(timeout=HANG_NS / 1e9)
    assert held.job.failure == (None if has_files else Failure(FailureKind.ABORTED, errno.ECANCELED, None))
    if has_files:
        assert content(buffered_fd, NBYTES) == held.expected


def test_a_pipeline_that_waits_for_a_helper_sleeps(hold: Callable[..., Held]) -> None:
    """Also while it is closing, when it must not sleep without a helper that wakes it."""
    held = hold(slot_count=3)
    closing = threading.Thread(target=held.pipeline.close)
    closing.start()
    until(lambda: held.job.failure is not None)  # the thread has seen that it is closing

    def all_sleep() -> bool:
        return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in native_threads()} == {"S"}

    until(lambda: all(all_sleep() for _ in range(20)))  # a thread that polls is seen running
    assert held.pages.is_touched
    held.pages.release()
    closing.join()


# -- writers ----------------------------------------------------------------------------------------------------------


@needs_cow
@pytest.mark.parametrize("slot_count", [3, 30])
def test_no_writer_waits_for_a_busy_helper(buffered_fd: int, slot_count: int) -> None:
    """The blocks of its unit that wait for the helper are staged by the native thread, at once."""
    block_bytes = UNIT_BYTES // 8
    pages, memory, table = HeldPages(noise(block_bytes, 1)), Guarded("cow", 2 * UNIT_BYTES), FaultTable()
    memory.fill(0)
    before = memory.bytes_now()
    plan = cut([[Extent(1, 0, 0, block_bytes), Extent(0, 0, block_bytes, 2 * UNIT_BYTES)]], block_bytes)
    pipeline = Pipeline(slot_count, block_bytes, "io_uring", 2, io_table=table.c_table)
    try:
        sources = [plain(memory.tensor), Memory(pages.address, 1, (), (), pages.content)]
        job = make_job(WRITE, plan, sources, guard=memory.guard.c_guard, previous=memory.guard.previous(plan))
        memory.guard.arm(job, plan)
        pipeline.submit(job)
        until(lambda: pages.is_touched)
        pipeline.attach(job, [buffered_fd])
        memory.tensor.fill_(1)  # waits for every block but the one that is held
        assert pages.is_touched and job.states()[:1] == PENDING
        until(lambda: PENDING not in job.states()[1:])  # a writer goes on just before the state says so
        assert pages.is_touched
        pages.release()
        assert finish(pipeline, job).failure is None
        assert content(buffered_fd, block_bytes + 2 * UNIT_BYTES) == bytes_of(pages.content) + before
    finally:
        pages.release()
        pipeline.close()
        memory.guard.close()


# -- reads ------------------------------------------------------------------------------------------------------------


class HeldRead(NamedTuple):
    """A read of which a helper copies out block 0."""

    pipeline: Pipeline
    job: Job
    pages: HeldPages
    table: FaultTable
    target: torch.Tensor


@pytest.fixture
def hold_read(buffered_fd: int) -> Iterator[Callable[[int | None], HeldRead]]:
    with ExitStack() as undo:

        def begin(corrupt_block: int | None = None) -> HeldRead:
            stored, pages = bytes_of(noise(NBYTES, 3)), HeldPages(torch.zeros(SLOT_BYTES, dtype=torch.uint8))
            rewrite(buffered_fd, 0, stored)
            table, target = FaultTable(), torch.zeros(NBYTES - SLOT_BYTES, dtype=torch.uint8)
            pipeline = Pipeline(BLOCKS, SLOT_BYTES, "io_uring", 2, io_table=table.c_table)
            undo.callback(pipeline.close)
            undo.callback(pages.release)
            checksums = checksums_of(HELD_PLAN, [stored])
            if corrupt_block is not None:
                checksums[corrupt_block] = bytes(16)
            sources = [Memory(pages.address, 1, (), (), pages.content), plain(target)]
            job = make_job(READ, HELD_PLAN, sources, checksums=checksums)
            pipeline.submit(job)
            pipeline.attach(job, [buffered_fd])
            until(lambda: pages.is_touched)
            return HeldRead(pipeline, job, pages, table, target)

        yield begin


def test_blocks_are_verified_beside_the_one_that_a_helper_has(
    hold_read: Callable[..., HeldRead], buffered_fd: int
) -> None:
    held = hold_read()
    until(lambda: held.job.states().count(WRITTEN) == BLOCKS - 2)
    assert not held.pipeline.wait(held.job, Milestone.DONE, LOOK_NS)
    held.pages.release()
    assert finish(held.pipeline, held.job).failure is None
    assert bytes_of(held.target) == content(buffered_fd, NBYTES)[SLOT_BYTES:]


def test_a_read_that_is_aborted_is_done_when_no_helper_writes_to_its_target(
    hold_read: Callable[..., HeldRead], buffered_fd: int
) -> None:
    held = hold_read()
    held.pipeline.abort(held.job, errno.EINTR)
    run(held.pipeline, make_job(WRITE, whole(1, SLOT_BYTES), [plain(noise(1))]), [buffered_fd])
    assert held.pages.is_touched and not held.job.reached(Milestone.DONE)
    held.pages.release()
    assert finish(held.pipeline, held.job).failure == Failure(FailureKind.ABORTED, errno.EINTR, None)
    assert held.job.states()[:1] == WRITTEN, "its bytes have reached the target"
    assert_usable(held.pipeline, buffered_fd)


def test_a_corrupt_block_fails_a_read_beside_a_helper(hold_read: Callable[..., HeldRead]) -> None:
    held = hold_read(BLOCKS - 1)
    until(lambda: FAILED in held.job.states())
    assert not held.job.reached(Milestone.DONE)
    held.pages.release()
    assert finish(held.pipeline, held.job).failure == Failure(FailureKind.CHECKSUM, 0, BLOCKS - 1)
    assert not held.target[-SLOT_BYTES:].any()


# -- opening ----------------------------------------------------------------------------------------------------------


def test_the_threads_are_counted_named_and_take_no_signals() -> None:
    before = {task.name for task in native_threads()}
    pipeline = Pipeline(2, SLOT_BYTES, "io_uring", 4)
    try:
        until(lambda: len(native_threads()) == len(before) + 4)
        own = [task for task in native_threads() if task.name not in before]
        until(lambda: sorted(map(name_of, own)) == ["engine-io", *(f"engine-stage-{k}" for k in range(3))])
        assert {os.sched_getscheduler(int(task.name)) for task in own} == {os.SCHED_BATCH}
        wanted = 0x7FFF_FFFF & ~crash_signals()
        # pthread_create(3) blocks more for a moment, in the new thread and in the one that makes it.
        until(lambda: all(int(lines_of(t, "SigBlk")[0].split()[1], 16) & 0x7FFF_FFFF == wanted for t in own))
    finally:
        pipeline.close()
    until(lambda: {task.name for task in native_threads()} == before)


def name_of(task: Path) -> str:
    return (task / "comm").read_text().strip()


def lines_of(task: Path, field: str) -> list[str]:
    return [line for line in (task / "status").read_text().splitlines() if line.startswith(field)]


def crash_signals() -> int:
    """As bits, with those that nothing can block (signal(7)): 9 and 19."""
    return sum(1 << number - 1 for number in (4, 5, 6, 7, 8, 9, 11, 19))


@pytest.mark.parametrize("count", [0, STAGING_THREADS_MAX + 1])
def test_a_number_of_threads_out_of_range_is_refused(count: int) -> None:
    assert STAGING_THREADS_MAX == lib.ENG_STAGING_THREADS_MAX
    with pytest.raises(OpenError) as caught:
        Pipeline(2, SLOT_BYTES, "io_uring", count)
    assert caught.value.errno == errno.EINVAL
    Pipeline(2, SLOT_BYTES, "io_uring", STAGING_THREADS_MAX).close()


NO_ROOM = """
import errno, resource
from jobs import *
from engine.io.pipeline import OpenError, Refused
from processes import native_threads, status_bytes

Pipeline(2, 4096).close()
stack_bytes = resource.getrlimit(resource.RLIMIT_STACK)[0]  # of a thread, too (pthread_create(3))
resource.setrlimit(resource.RLIMIT_AS, (status_bytes("VmSize") + 4 * stack_bytes,) * 2)
try:
    Pipeline(2, 4096, "io_uring", 16)
except OpenError as error:
    assert (error.refused, error.errno) == (Refused.RESOURCES, errno.EAGAIN), error
else:
    raise AssertionError("16 threads were started")
until(lambda: not native_threads())
"""


def test_a_helper_that_cannot_be_started_is_an_error_and_leaves_no_thread() -> None:
    finished = in_a_process_of_its_own(NO_ROOM)
    assert (finished.returncode, finished.stderr) == (0, "")


# -- any jobs ---------------------------------------------------------------------------------------------------------


FAULTS = st.sampled_from([errno.EIO, errno.EINTR, errno.EAGAIN]).map(refused)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of small and large blocks."""
    return whole(draw(st.integers(1, 12 * SLOT_BYTES)), draw(st.sampled_from([ALIGNMENT, SLOT_BYTES])))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    drawn=st.lists(st.tuples(plans(), st.booleans(), st.booleans()), min_size=1, max_size=4),
    slot_count=st.integers(1, 9),
    staging_threads=st.integers(1, 5),
    script=st.dictionaries(st.integers(0, 20), FAULTS, max_size=2),
    aborted=st.integers(-1, 3),
)
def test_several_jobs_are_each_right_or_failed(
    tmp_path: Path,
    drawn: list[tuple[Plan, bool, bool]],
    slot_count: int,
    staging_threads: int,
    script: dict[int, Fault],
    aborted: int,
) -> None:
    """Saves beside each other, then restores of those that succeeded: the model is the bytes of the tensors."""
    table = FaultTable(script)
    pipeline = Pipeline(slot_count, SLOT_BYTES, "io_uring", staging_threads, io_table=table.c_table)
    fds = [os.open(tmp_path / f"{index}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for index in range(len(drawn))]
    tensors = [noise(plan.files[0].nbytes, index) for index, (plan, _, _) in enumerate(drawn)]
    try:
        jobs = [
            make_job(WRITE, plan, [plain(tensor)], checked=checked, urgent_count=len(plan.blocks) if urgent else 0)
            for (plan, checked, urgent), tensor in zip(drawn, tensors, strict=True)
        ]
        for index, (job, fd) in enumerate(zip(jobs, fds, strict=True)):
            pipeline.submit(job)
            pipeline.attach(job, [fd])
            if index == aborted:
                pipeline.abort(job, errno.EPERM)
        for job, fd, tensor in zip(jobs, fds, tensors, strict=True):
            if finish(pipeline, job).failure is None:
                assert job.states() == job.block_count * WRITTEN
                assert content(fd, len(tensor)) == bytes_of(tensor)
        table.heal()
        for (plan, _, _), job, fd, tensor in zip(drawn, jobs, fds, tensors, strict=True):
            if job.failure is None:
                target = torch.zeros_like(tensor)
                read = run(pipeline, make_job(READ, plan, [plain(target)], checksums=job.checksums()), [fd])
                assert read.failure is None and torch.equal(target, tensor)
    finally:
        pipeline.close()
        for fd in fds:
            os.close(fd)
    assert not table.exceptions and not table.files
