"""Opening and closing the native pipeline: one thread, one ring, no leftovers, and no harm from a fork."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from jobs import (
    SLOT_BYTES,
    WRITE,
    bytes_of,
    content,
    finish,
    make_job,
    noise,
    plain,
    run,
    until,
    whole,
)
from processes import (
    descriptors,
    in_a_process_of_its_own,
    is_inaccessible,
    native_threads,
    ring_descriptors,
    rings,
    slots,
    status_bytes,
)

from engine.io.job import BlockState, Direction, Failure, FailureKind
from engine.io.pipeline import OpenError, Pipeline, Refused
from engine.options import Backend
from engine.store.filesystem import Filesystem


@pytest.mark.every_staging
def test_one_ring_and_its_threads_and_nothing_is_left(tmp_path: Path, staging_threads: int) -> None:
    rings_before, threads_before, descriptors_before = rings(), len(native_threads()), descriptors()
    descriptor = Filesystem().open_for_blocks(str(tmp_path / "blocks"), write=True, direct=True)
    pipeline = Pipeline(4, SLOT_BYTES, staging_threads=staging_threads)
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    for _ in range(2):
        jobs = [make_job(WRITE, plan, [plain(tensor)]) for _ in range(5)]
        for job in jobs:
            pipeline.submit(job)
        assert rings() == rings_before + 1
        until(lambda: len(native_threads()) == threads_before + staging_threads)
        for job in jobs:
            pipeline.attach(job, [descriptor.number])
            finish(pipeline, job)
    pipeline.close()
    pipeline.close()
    descriptor.close()
    until(lambda: len(native_threads()) == threads_before)
    assert descriptors() == descriptors_before


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("fails", [False, True])
def test_a_pipeline_does_not_keep_a_job_that_is_done(
    open_pipeline: Callable[..., Pipeline], fd: int, direction: Direction, fails: bool
) -> None:
    pipeline = open_pipeline(2)
    tensor, plan = noise(SLOT_BYTES), whole(SLOT_BYTES, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(tensor)]), [fd])
    job = make_job(direction, plan, [plain(tensor)], checksums=written.checksums())
    if fails:
        pipeline.submit(job)
        pipeline.abort(job, errno.EIO)
        finish(pipeline, job)
    else:
        run(pipeline, job, [fd])
    assert (job.failure is not None) == fails
    gone = weakref.ref(job)
    del job
    gc.collect()
    assert gone() is None


@pytest.mark.every_backend
@pytest.mark.parametrize("slot_count", [1, 2, 3])  # of 1 MiB: both pipelines fit into 8 MiB
def test_slots_begin_where_a_huge_page_may(rung: Backend, slot_count: int) -> None:
    before = slots()
    pipelines = [Pipeline(slot_count, 1 << 20, rung) for _ in range(2)]
    found = slots() - before
    assert found and not [start for start in found if start % (2 << 20)]
    for pipeline in pipelines:
        pipeline.close()
    assert slots() == before


@pytest.mark.every_staging
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
    # A leak of a slot, or of a sixteenth of a save's bytes, in every save would be three times as much.
    assert status_bytes("VmRSS") - resident_bytes < 4 << 20
    assert descriptors() == descriptors_before
    until(lambda: len(native_threads()) == threads)


@pytest.mark.every_backend
def test_native_threads_do_not_preempt_their_waker(open_pipeline: Callable[..., Pipeline]) -> None:
    open_pipeline(2)
    until(lambda: bool(native_threads()))
    assert {os.sched_getscheduler(int(task.name)) for task in native_threads()} == {os.SCHED_BATCH}


@pytest.mark.every_staging
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


@pytest.mark.every_staging
@pytest.mark.every_backend
def test_close_drains(fd: int, rung: Backend, staging_threads: int) -> None:
    pipeline = Pipeline(2, SLOT_BYTES, rung, staging_threads)
    tensor, plan = noise(50 * SLOT_BYTES), whole(50 * SLOT_BYTES, SLOT_BYTES)
    job = make_job(WRITE, plan, [plain(tensor)], checked=True)
    pipeline.submit(job)
    pipeline.attach(job, [fd])
    pipeline.close()
    assert job.failure is None
    assert set(job.states()) == {BlockState.WRITTEN}
    assert content(fd, len(tensor)) == bytes_of(tensor)


@pytest.mark.every_staging
@pytest.mark.every_backend
@pytest.mark.parametrize("direction", Direction)
def test_close_aborts_jobs_without_files(direction: Direction, rung: Backend, staging_threads: int) -> None:
    pipeline = Pipeline(2, SLOT_BYTES, rung, staging_threads)
    jobs = [make_job(direction, whole(9 * SLOT_BYTES, SLOT_BYTES), [plain(noise(9 * SLOT_BYTES))]) for _ in range(3)]
    for job in jobs:
        pipeline.submit(job)
    pipeline.close()
    assert {job.failure for job in jobs} == {Failure(FailureKind.ABORTED, errno.ECANCELED, None)}


@pytest.mark.parametrize(("slot_count", "slot_bytes"), [(0, 4096), (1, 0), (1, 4095), (1, 512), (40_000, 4096)])
def test_invalid_sizes_are_refused(slot_count: int, slot_bytes: int) -> None:
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


FORK = """
import os, sys, warnings
from jobs import *
from engine.errors import ForkedError
from engine.store.filesystem import Filesystem

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
    # The child now opens files with the numbers of the pipeline's descriptors; its own fork must not lose them.
    mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    in_a_fork(lambda: [os.fstat(descriptor) for descriptor in mine])
    own = Pipeline(1, 4096)
    assert run(own, job(), [fd]).failure is None
    own.close()

before = kept_from_forks()
pipeline = Pipeline(2, 4096, staging_threads=int(sys.argv[2]))
pipelines_memory = set(kept_from_forks()) - set(before)
assert pipelines_memory, "the slots would be copied"
file = Filesystem().open_for_blocks(sys.argv[1], write=True, direct=True)
fd = file.number
assert run(pipeline, job(), [fd]).failure is None
waiting = job()
pipeline.submit(waiting)
in_a_fork(child)
pipeline.attach(waiting, [fd])
assert finish(pipeline, waiting).failure is None
pipeline.close()
"""


@pytest.mark.every_staging
def test_a_fork_has_no_pipeline_and_harms_neither_process(tmp_path: Path, staging_threads: int) -> None:
    finished = in_a_process_of_its_own(FORK, str(tmp_path / "blocks"), str(staging_threads))
    assert (finished.returncode, finished.stderr) == (0, "")


FORK_DURING_OPEN = """
import os, threading, warnings
from jobs import *
from processes import descriptors

warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads is the point
ended = False

def open_and_close():
    while not ended:
        Pipeline(16, 64 << 10).close()

thread = threading.Thread(target=open_and_close)
thread.start()
kept = 0
for _ in range(100):
    child = os.fork()
    if child == 0:
        os._exit(sum("io_uring" in name or "eventfd" in name for name in descriptors()))
    kept += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
ended = True
thread.join()
assert kept == 0, f"children kept {kept} descriptors"
"""

FORK_DURING_CLOSE = """
import os, threading, warnings
from jobs import *
from processes import rings

warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads is the point
lost = 0
for _ in range(20):
    pipeline = Pipeline(2, 4096)
    thread = threading.Thread(target=pipeline.close)
    thread.start()
    while rings():  # the native thread closes it; the closing thread needs the GIL, and has it seldom
        spun = sum(range(20_000))
    mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]  # one has the ring's number
    child = os.fork()
    if child == 0:
        open_ones = [fd for fd in mine if os.path.lexists(f"/proc/self/fd/{fd}")]
        os._exit(len(mine) - len(open_ones))
    lost += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    thread.join()
    for fd in mine:
        os.close(fd)
assert lost == 0, f"forked children lost {lost} descriptors that were not the pipeline's"
"""


@pytest.mark.parametrize("script", [FORK_DURING_OPEN, FORK_DURING_CLOSE], ids=["open", "close"])
def test_a_fork_beside_open_or_close_neither_keeps_nor_loses_a_descriptor(script: str) -> None:
    finished = in_a_process_of_its_own(script)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_close_unpins_the_slots_while_another_descriptor_of_the_ring_is_open() -> None:
    others, pinned_before = ring_descriptors(), status_bytes("VmPin")
    pipeline = Pipeline(16, 256 << 10)  # 4 MiB: an ordinary user may lock 8
    assert status_bytes("VmPin") - pinned_before == 4 << 20
    (own,) = ring_descriptors() - others
    kept = os.dup(own)  # as a child has one that was forked behind the back of every handler
    try:
        pipeline.close()
        until(lambda: status_bytes("VmPin") == pinned_before)
    finally:
        os.close(kept)


MEMLOCK = """
import errno, os, resource, sys
from jobs import *
from engine.io.pipeline import OpenError, Refused
from engine.store.filesystem import Filesystem

file = Filesystem().open_for_blocks(sys.argv[1], write=True, direct=True)
fd = file.number
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
if os.geteuid() == 0:  # the limit does not bind root, but user 65534
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
def test_an_unexpected_completion_aborts_the_process(tmp_path: Path, slot: str) -> None:
    assert in_a_process_of_its_own(STRAY, str(tmp_path / "blocks"), slot).returncode == -signal.SIGABRT


def break_ring(others: set[int]) -> None:
    """Replace the one ring that is not among `others` by /dev/null: the kernel takes nothing from it then."""
    null = os.open("/dev/null", os.O_RDWR)
    (own,) = ring_descriptors() - others
    os.dup2(null, own, inheritable=False)
    os.close(null)


@pytest.mark.parametrize("backend", ["io_uring", "io_uring_plain"])
def test_slots_of_a_broken_ring_are_not_mapped_again_after_close(fd: int, backend: Backend) -> None:
    others, slots_before = ring_descriptors(), slots()
    pipeline = Pipeline(2, SLOT_BYTES, backend)
    (slots_start,) = slots() - slots_before
    break_ring(others)
    job = make_job(WRITE, whole(9 * SLOT_BYTES, SLOT_BYTES), [plain(noise(9 * SLOT_BYTES))])
    assert run(pipeline, job, [fd]).failure is not None
    pipeline.close()
    assert is_inaccessible(slots_start), "a late read may land in other memory"


@pytest.mark.parametrize("backend", ["io_uring", "io_uring_plain"])
@pytest.mark.parametrize("direction", Direction)
def test_a_broken_ring_is_replaced_for_the_next_job(fd: int, direction: Direction, backend: Backend) -> None:
    others, descriptors_before, slots_before = ring_descriptors(), descriptors(), slots()
    pipeline = Pipeline(2, SLOT_BYTES, backend)
    tensor, plan = noise(9 * SLOT_BYTES), whole(9 * SLOT_BYTES, SLOT_BYTES)
    written = run(pipeline, make_job(WRITE, plan, [plain(tensor)]), [fd])
    for _ in range(3):
        (broken,) = slots() - slots_before
        break_ring(others)
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
