"""Guards on a real kernel: a save has the bytes of the moment when it was armed, or fails, whatever writes.

The range is guarded in units of 2 MiB, so the plans here are of a few megabytes, in blocks that units and blocks cut
differently.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from guarded import KINDS_HERE, UNIT_BYTES, Guarded, needs_cow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import HANG_NS, WRITE, Stage, content, cut, finish, make_job, noise, plain, strided, whole

from engine.errors import PlatformError
from engine.format.plan import ALIGNMENT, Extent, Plan
from engine.io.guard import Guard, GuardError, Kind, NotArmed
from engine.io.job import Failure, FailureKind, Milestone
from engine.io.pipeline import Pipeline

MIB = 1 << 20
BLOCK_BYTES = MIB // 4  # so that the slots fit in 8 MiB of locked memory, which an ordinary user may have
NBYTES = 9 * MIB + 3 * ALIGNMENT  # the last unit is not whole
PATIENCE_S = 5.0  # PATIENCE_NS of native/guarding/guard.c


@pytest.fixture
def open_guarded() -> Iterator[Callable[..., Guarded]]:
    """Makes guarded memory, whose guards end with the test."""
    with ExitStack() as undo:

        def open_one(kind: Kind, nbytes: int = NBYTES, huge: bool = True) -> Guarded:
            made = Guarded(kind, nbytes, huge)
            undo.callback(made.guard.close)
            made.fill(0)
            return made

        yield open_one


def assert_exact_or_torn(kind: Kind, failure: Failure | None, fd: int, before: bytes) -> None:
    """What each kind promises of a save whose arena was written to."""
    if failure is None:
        assert content(fd, len(before)) == before
    else:
        assert (kind, failure.kind, failure.errno) == ("detect", FailureKind.TORN, errno.EBUSY)


def write_all(tensor: torch.Tensor) -> None:
    tensor.fill_(7)


def write_backwards(tensor: torch.Tensor) -> None:
    for piece in reversed(tensor.split(64 << 10)):
        piece.add_(1)


def write_in_c(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 5, len(tensor))


def write_in_the_kernel(tensor: torch.Tensor) -> None:
    with open("/dev/zero", "rb", buffering=0) as zeros:
        assert zeros.readinto(tensor.numpy().data) == len(tensor)


def write_in_threads(tensor: torch.Tensor) -> None:
    threads = [threading.Thread(target=piece.fill_, args=(index,)) for index, piece in enumerate(tensor.chunk(4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


WRITERS = [write_all, write_backwards, write_in_c, write_in_the_kernel, write_in_threads]


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("slot_count", "staging_threads"), [(2, 1), (16, 1), (3, 2), (16, 4)], indirect=["staging_threads"]
)
def test_a_save_has_the_bytes_of_the_call_or_is_torn(
    open_pipeline: Callable[..., Pipeline],
    open_guarded: Callable[..., Guarded],
    fd: int,
    kind: Kind,
    writer: Callable[[torch.Tensor], None],
    slot_count: int,
) -> None:
    pipeline, memory, plan = open_pipeline(slot_count, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    for seed in range(3):
        memory.fill(seed)
        before = memory.bytes_now()
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd])
        writer(memory.tensor)
        assert_exact_or_torn(kind, finish(pipeline, job).failure, fd, before)


@pytest.mark.every_staging
@needs_cow
@pytest.mark.every_backend
def test_a_writer_waits_for_no_file(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int
) -> None:
    """A block that a writer wants is staged although the job has no files yet, and although it was clean."""
    nbytes = 5 * MIB
    pipeline, memory, plan = open_pipeline(21, BLOCK_BYTES), open_guarded("cow", nbytes), whole(nbytes, BLOCK_BYTES)
    for _ in range(3):  # the second time unchanged, the third time clean
        before = memory.bytes_now()
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd])
        finish(pipeline, job)
    job = memory.begin(pipeline, plan)
    memory.tensor.fill_(9)
    pipeline.attach(job, [fd], [*job.checksums()])
    assert finish(pipeline, job).failure is None
    assert content(fd, nbytes) == before


@pytest.mark.every_staging
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_what_nobody_wrote_is_neither_copied_nor_written(
    open_pipeline: Callable[..., Pipeline], fd: int, kind: Kind
) -> None:
    pipeline, plan = open_pipeline(4, BLOCK_BYTES), whole(NBYTES, BLOCK_BYTES)
    memory = Guarded(kind, NBYTES)
    memory.fill(0)
    known = None
    counters = []
    for index in range(5):
        memory.tensor[:100] = index  # block 0, and with it the blocks of unit 0
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd], known)
        assert finish(pipeline, job).failure is None
        assert content(fd, NBYTES) == memory.bytes_now()
        known = [*job.checksums()]
        counters.append((job.counters["clean_bytes"], job.counters["skipped_bytes"]))
    others = NBYTES - BLOCK_BYTES
    assert counters[0] == (0, 0)
    assert counters[1] == (0, others)  # copied and hashed, found to be there
    assert counters[2:] == [(NBYTES - UNIT_BYTES, others)] * 3
    pipeline.close()
    memory.guard.close()


@pytest.mark.every_staging
@needs_cow
def test_a_clean_block_that_the_file_lacks_is_written(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int
) -> None:
    pipeline, memory, plan = open_pipeline(4, BLOCK_BYTES), open_guarded("cow"), whole(NBYTES, BLOCK_BYTES)
    for _ in range(4):
        os.ftruncate(fd, 0)
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd])
        assert finish(pipeline, job).failure is None
        assert content(fd, NBYTES) == memory.bytes_now()
        assert job.counters["clean_bytes"] == 0


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_block_of_another_plan_is_never_clean(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind
) -> None:
    pipeline, memory = open_pipeline(4, BLOCK_BYTES), open_guarded(kind)
    forward = whole(NBYTES, BLOCK_BYTES)
    half = NBYTES // 2 // ALIGNMENT * ALIGNMENT
    swapped = cut([[Extent(0, half, 0, NBYTES - half), Extent(0, 0, NBYTES - half, half)]], BLOCK_BYTES)
    for plan in (forward, forward, swapped, forward):
        before = memory.bytes_now()
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd], [None] * len(plan.blocks))
        assert finish(pipeline, job).failure is None
        expected = before if plan is forward else before[half:] + before[:half]
        assert content(fd, NBYTES) == expected


@pytest.mark.every_staging
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_failed_save_leaves_nothing_clean_that_it_did_not_stage(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind
) -> None:
    pipeline, memory, plan = open_pipeline(2, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    for _ in range(3):
        job = memory.begin(pipeline, plan)
        pipeline.attach(job, [fd])
        finish(pipeline, job)
    known = [*job.checksums()]
    memory.tensor.fill_(3)
    failed = memory.begin(pipeline, plan)
    pipeline.abort(failed, errno.EIO)
    finish(pipeline, failed)
    job = memory.begin(pipeline, plan)
    pipeline.attach(job, [fd], known)
    assert finish(pipeline, job).failure is None
    assert content(fd, NBYTES) == memory.bytes_now()


@pytest.mark.every_staging
@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("end", ["abort", "abort before submit", "disarm", "close"])
def test_the_end_of_a_job_lets_writers_go_on(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind, end: str
) -> None:
    """The job never gets a file, and its slot is taken."""
    pipeline, memory, plan = open_pipeline(2, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    job = memory.make_job(plan)
    memory.guard.arm(job, plan)
    if end in ("abort", "close"):
        pipeline.submit(job)
    writer = threading.Thread(target=memory.tensor.fill_, args=(1,))
    writer.start()
    if end == "disarm":
        memory.guard.disarm(job)
    elif end == "close":
        pipeline.close()
    else:
        pipeline.abort(job, errno.ECANCELED)
    writer.join(HANG_NS / 1e9)
    assert not writer.is_alive()
    pipeline.close()
    assert memory.bytes_now() == b"\1" * NBYTES


@needs_cow
def test_a_writer_that_waits_too_long_goes_on_and_the_save_fails(open_guarded: Callable[..., Guarded], fd: int) -> None:
    pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), open_guarded("cow"), whole(NBYTES, BLOCK_BYTES)
    job = memory.begin(pipeline, plan)  # and no file, so that two slots stage one block, and no more
    memory.tensor.fill_(1)
    pipeline.attach(job, [fd])
    failure = finish(pipeline, job).failure
    assert failure is not None and (failure.kind, failure.errno) == (FailureKind.TORN, errno.ETIMEDOUT)
    before = memory.bytes_now()
    job = memory.begin(pipeline, plan)
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure is None and content(fd, NBYTES) == before
    pipeline.close()


@needs_cow
def test_a_writer_has_its_patience_for_itself(open_guarded: Callable[..., Guarded], fd: int) -> None:
    """A writer that went on long before is not taken for one that waits since then.

    Each unit is one block.  The first writer's block takes the only slot that a job without a file may have, so the
    pipeline looks for no other wish, and does not take this one off the list.
    """
    pipeline, memory = Pipeline(2, UNIT_BYTES), open_guarded("cow", 2 * UNIT_BYTES)
    plan, before = whole(2 * UNIT_BYTES, UNIT_BYTES), memory.bytes_now()
    units = memory.tensor.chunk(2)
    writers = [threading.Thread(target=unit.fill_, args=(9,)) for unit in units]
    holder = make_job(WRITE, whole(UNIT_BYTES, UNIT_BYTES), [plain(noise(UNIT_BYTES))])
    pipeline.submit(holder)
    assert pipeline.wait(holder, Milestone.STAGED, HANG_NS)  # and has that slot until it gets a file
    job = memory.begin(pipeline, plan)
    writers[0].start()
    time.sleep(0.2)  # until it waits
    pipeline.attach(holder, [fd])
    writers[0].join(HANG_NS / 1e9)
    time.sleep(PATIENCE_S + 0.2)
    writers[1].start()
    time.sleep(0.2)
    pipeline.attach(job, [fd])
    writers[1].join(HANG_NS / 1e9)
    assert finish(pipeline, job).failure is None
    assert content(fd, 2 * UNIT_BYTES) == before
    pipeline.close()


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_guarded_job_is_not_checked_too(open_guarded: Callable[..., Guarded], kind: Kind) -> None:
    """A clean block is not copied, so nothing could be compared with its first hash."""
    pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    options = {"guard": memory.guard.c_guard, "owners": memory}
    with pytest.raises(NotArmed, match="EINVAL"):
        memory.guard.arm(make_job(WRITE, plan, [plain(memory.tensor)], checked=True, **options), plan)
    job = memory.make_job(plan)
    memory.guard.arm(job, plan)
    job.c_job.checked = 1
    pipeline.submit(job)
    assert finish(pipeline, job).failure == (FailureKind.INVALID, errno.EINVAL, None)
    memory.tensor.fill_(1)  # nobody waits
    pipeline.close()


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_one_job_at_a_time(stage: Stage, open_guarded: Callable[..., Guarded], kind: Kind) -> None:
    pipeline, memory, plan = Pipeline(2, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    first, second = memory.begin(pipeline, plan), memory.make_job(plan)
    with pytest.raises(PlatformError, match="EBUSY"):
        memory.guard.arm(second, plan)
    pipeline.attach(first, [stage.fd])
    assert pipeline.wait(first, Milestone.STAGED, HANG_NS)
    second = memory.make_job(plan)
    memory.guard.arm(second, plan)
    memory.guard.disarm(second)
    finish(pipeline, first)
    pipeline.close()


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_closed_guard_protects_nothing(open_guarded: Callable[..., Guarded], kind: Kind) -> None:
    memory, plan = open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    memory.guard.arm(memory.make_job(plan), plan)
    memory.guard.close()
    memory.tensor.fill_(1)
    again = Guard(kind, memory.tensor.data_ptr(), NBYTES)
    again.close()


@pytest.mark.every_staging
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_forked_child_writes_its_own_copy(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind
) -> None:
    pipeline, memory, plan = open_pipeline(2, BLOCK_BYTES), open_guarded(kind), whole(NBYTES, BLOCK_BYTES)
    before = memory.bytes_now()
    job = memory.begin(pipeline, plan)

    child = os.fork()
    if child == 0:
        ctypes.memset(memory.tensor.data_ptr(), 5, NBYTES)
        memory.guard.close()
        os._exit(memory.bytes_now() != b"\5" * NBYTES)
    assert os.waitpid(child, 0)[1] == 0
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure is None
    assert content(fd, NBYTES) == before


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_save_is_of_one_moment_within_the_call(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind
) -> None:
    """A thread writes to a unit that was clean, and then to one that was not, while the guard is armed.

    A save that has the second write and not the first is of no moment.
    """
    unit_count = 64
    pipeline, memory = open_pipeline(8, ALIGNMENT), open_guarded(kind, unit_count * UNIT_BYTES)
    runs = [Extent(0, u * UNIT_BYTES, u * ALIGNMENT, ALIGNMENT) for u in range(unit_count)]
    plan, known = cut([runs], ALIGNMENT), None
    heads = memory.tensor.view(unit_count, UNIT_BYTES)
    both = heads[:: unit_count - 1, 0]  # of the first unit and the last one, written in this order by one call into C
    both.zero_()
    for _ in range(150):
        for is_raced in (False, False, True):  # the first unit is clean from the third save on
            heads[1::2, 1].add_(1)
            job = memory.make_job(plan)
            writer = threading.Thread(target=both.add_, args=(1,))
            if is_raced:
                writer.start()
            memory.guard.arm(job, plan)
            pipeline.submit(job)
            pipeline.attach(job, [fd], known)
            if is_raced:
                writer.join()
            if finish(pipeline, job).failure is None:
                known = [*job.checksums()]
                stored = content(fd, unit_count * ALIGNMENT)
                first, last = stored[0], stored[(unit_count - 1) * ALIGNMENT]
                assert first == last or (first, last) == (int(both[0]), (int(both[1]) - 1) % 256), (
                    "the second write without the first"
                )
            else:
                assert kind == "detect"
                known = None


@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("huge", [False, True])
def test_pages_that_were_never_touched_are_guarded_too(
    open_pipeline: Callable[..., Pipeline], fd: int, kind: Kind, huge: bool
) -> None:
    pipeline, memory, plan = open_pipeline(2, BLOCK_BYTES), Guarded(kind, NBYTES, huge), whole(NBYTES, BLOCK_BYTES)
    job = memory.begin(pipeline, plan)
    pipeline.attach(job, [fd])
    memory.tensor.fill_(1)
    assert_exact_or_torn(kind, finish(pipeline, job).failure, fd, bytes(NBYTES))
    memory.guard.close()


def test_a_range_that_is_no_memory_is_refused() -> None:
    with pytest.raises(GuardError):
        Guard("cow", 16 * UNIT_BYTES, UNIT_BYTES)


# -- any plan, any writes ----------------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, nbytes: int) -> Plan:
    """A plan of one or two files, that takes pieces of the memory in any order, and not all of it."""
    cuts = sorted(draw(st.sets(st.integers(1, nbytes // ALIGNMENT - 1), max_size=6)))
    bounds = [0, *(cut_ * ALIGNMENT for cut_ in cuts), nbytes]
    pieces = draw(st.permutations(list(pairwise(bounds))))
    pieces = pieces[: draw(st.integers(1, len(pieces)))]
    split = draw(st.integers(0, len(pieces)))
    files: list[list[Extent]] = []
    for members in filter(None, (pieces[:split], pieces[split:])):
        runs, offset = [], 0
        for start, end in members:
            runs.append(Extent(0, start, offset, end - start))
            offset += end - start
        files.append(runs)
    return cut(files, draw(st.sampled_from([64 << 10, BLOCK_BYTES, 3 * BLOCK_BYTES // 4 // ALIGNMENT * ALIGNMENT])))


def expected(plan: Plan, before: bytes) -> list[bytes]:
    """The files that a plan makes of the memory."""
    files = [bytearray(file.nbytes) for file in plan.files]
    for block in plan.blocks:
        for index in range(block.extent_start, block.extent_start + block.extent_count):
            _, start, offset, nbytes = plan.extents[index]
            files[block.file_index][offset : offset + nbytes] = before[start : start + nbytes]
    return [bytes(file) for file in files]


WRITES = st.lists(st.tuples(st.integers(0, NBYTES - 1), st.integers(1, 3 * MIB), st.integers(0, 255)), max_size=3)


@pytest.mark.parametrize("kind", KINDS_HERE)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_saves_with_any_writes_between_and_beside_them(tmp_path: Path, kind: Kind, data: st.DataObject) -> None:
    """Files that hold the save before the last one are given again, as a recycled checkpoint is."""
    plan = data.draw(plans(NBYTES))
    slot_count, staging_threads = data.draw(st.sampled_from([3, 24])), data.draw(st.integers(1, 4))
    memory = Guarded(kind, NBYTES)
    pipeline = Pipeline(slot_count, BLOCK_BYTES, staging_threads=staging_threads)
    memory.fill(0)
    generations = [[os.open(tmp_path / f"{g}-{i}", os.O_RDWR | os.O_CREAT) for i in range(2)] for g in range(2)]
    known: list[list[bytes | None] | None] = [None, None]

    def write() -> None:
        for start, nbytes, byte in data.draw(WRITES):
            memory.tensor[start : start + nbytes] = byte

    for number in range(data.draw(st.integers(1, 6))):
        write()
        before = memory.bytes_now()
        job = memory.begin(pipeline, plan)
        if not data.draw(st.booleans()) or len(plan.blocks) > 3:
            pipeline.attach(job, generations[number % 2][: len(plan.files)], known[number % 2])
            write()
        else:
            write()
            pipeline.attach(job, generations[number % 2][: len(plan.files)], known[number % 2])
        failure = finish(pipeline, job).failure
        if failure is None:
            known[number % 2] = [*job.checksums()]
            for descriptor, stored in zip(generations[number % 2], expected(plan, before), strict=False):
                assert content(descriptor, len(stored)) == stored
        else:
            known[number % 2] = None
            assert (kind, failure.kind, failure.errno) == ("detect", FailureKind.TORN, errno.EBUSY)
    pipeline.close()
    memory.guard.close()
    for descriptor in (*generations[0], *generations[1]):
        os.close(descriptor)


@pytest.mark.every_staging
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_strided_sources_are_guarded_whole(
    open_pipeline: Callable[..., Pipeline], open_guarded: Callable[..., Guarded], fd: int, kind: Kind
) -> None:
    pipeline, memory = open_pipeline(4, BLOCK_BYTES), open_guarded(kind, 8 * MIB)
    turned = memory.tensor.view(2048, 4096).t()
    plan = whole(8 * MIB, BLOCK_BYTES)
    for _ in range(3):
        before = turned.contiguous().numpy().tobytes()
        job = make_job(WRITE, plan, [strided(turned)], guard=memory.guard.c_guard, previous=memory.guard.previous(plan))
        memory.guard.arm(job, plan)
        pipeline.submit(job)
        pipeline.attach(job, [fd])
        memory.tensor.add_(1)
        assert_exact_or_torn(kind, finish(pipeline, job).failure, fd, before)


@pytest.mark.skipif("cow" in KINDS_HERE, reason="this user has every guard")
def test_guards_that_need_a_privilege() -> None:
    """All tests of guards, with root's privileges."""
    root = Path(__file__).parents[1]
    files = [
        str(root / each)
        for each in ("io/test_guard.py", "io/test_guard_faults.py", "session/test_guards.py", "session/test_tears.py")
    ]
    command = ["sudo", "-n", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=root.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
