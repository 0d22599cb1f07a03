"""Withheld blocks on a real kernel: none begins before it is released, and each has the bytes of its own release."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial

import pytest
import torch
from guarded import KINDS_HERE, UNIT_BYTES, Guarded, needs_cow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import HANG_NS, SLOT_BYTES, WRITE, content, finish, make_job, noise, plain, until, whole

from engine._native import ffi, lib
from engine.io.guard import NotArmed
from engine.io.job import BlockState, FailureKind, Job, Milestone
from engine.io.pipeline import Pipeline

BLOCKS = 12
GUARDED_BLOCK_BYTES = UNIT_BYTES // 4  # four to a unit


def withheld(tensor: torch.Tensor, block_bytes: int = SLOT_BYTES, **options: object) -> Job:
    return make_job(WRITE, whole(tensor.nbytes, block_bytes), [plain(tensor)], withheld=True, **options)


def has_written(job: Job, count: int) -> bool:
    return job.states().count(BlockState.WRITTEN) == count


@pytest.mark.every_backend
def test_no_block_begins_before_it_is_released(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline, tensor = open_pipeline(4, SLOT_BYTES), noise(BLOCKS * SLOT_BYTES)
    job = withheld(tensor)
    pipeline.submit(job)
    pipeline.attach(job, [fd])
    want = b""
    for released in range(BLOCKS):
        until(partial(has_written, job, released))
        assert set(job.states()) <= {BlockState.WRITTEN, BlockState.WITHHELD}
        assert not job.reached(Milestone.STAGED)
        block = BLOCKS - 1 - released
        tensor[block * SLOT_BYTES : (block + 1) * SLOT_BYTES].fill_(released)
        want = bytes([released]) * SLOT_BYTES + want
        pipeline.release(job, [block])
    assert finish(pipeline, job).failure is None
    assert content(fd, len(want)) == want


@pytest.mark.parametrize("checked", [False, True])
def test_blocks_are_staged_in_the_order_of_their_release(
    open_pipeline: Callable[..., Pipeline], fd: int, checked: bool
) -> None:
    """Two slots and no file: a block is staged, and one slot is left to other jobs."""
    pipeline, tensor = open_pipeline(2, SLOT_BYTES), noise(3 * SLOT_BYTES)
    job = withheld(tensor, checked=checked)
    pipeline.submit(job)
    pipeline.release(job, [1])
    until(lambda: job.states()[1] == BlockState.STAGED)
    pipeline.release(job, [2, 0])
    assert list(job.states()) == [BlockState.PENDING, BlockState.STAGED, BlockState.PENDING]
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure is None
    assert content(fd, tensor.nbytes) == tensor.numpy().tobytes()


def test_a_release_that_contradicts_itself_is_refused(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline, tensor = open_pipeline(2, SLOT_BYTES), noise(2 * SLOT_BYTES)
    job = withheld(tensor)
    pipeline.submit(job)
    release = lib.eng_release
    c_pipeline = pipeline._c_pipeline
    for blocks in ([2], [0, 1, 1], [0, 0], [1, 1]):
        assert release(c_pipeline, job.c_job, ffi.new("uint32_t[]", blocks), len(blocks)) == -22
        assert set(job.states()) == {BlockState.WITHHELD}
    pipeline.release(job, [0])
    assert release(c_pipeline, job.c_job, ffi.new("uint32_t[]", [0]), 1) == -22, "it is released already"
    pipeline.release(job, [])
    pipeline.release(job, [1])
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure is None
    assert release(c_pipeline, job.c_job, ffi.new("uint32_t[]", [0]), 0) == 0


def test_an_aborted_job_ends_with_blocks_withheld(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    pipeline, tensor = open_pipeline(2, SLOT_BYTES), noise(4 * SLOT_BYTES)
    job = withheld(tensor)
    pipeline.submit(job)
    pipeline.attach(job, [fd])
    pipeline.release(job, [0, 1])
    pipeline.abort(job, 5)
    assert finish(pipeline, job).failure is not None
    states = job.states()
    assert states[2:] == bytes([BlockState.WITHHELD] * 2)
    pipeline.release(job, [2])  # it has ended: nothing happens
    assert job.states() == states


@needs_cow
def test_a_guarded_job_that_has_ended_is_not_watched(open_pipeline: Callable[..., Pipeline]) -> None:
    pipeline, memory = open_pipeline(2, GUARDED_BLOCK_BYTES), Withheld("cow", UNIT_BYTES)
    job = memory.make_job(None)
    memory.guard.arm(job, memory)
    pipeline.submit(job)
    pipeline.abort(job, 5)
    finish(pipeline, job)
    pipeline.release(job, [0, 1])
    assert set(job.states()) == {BlockState.WITHHELD}
    memory.guard.close()


@pytest.mark.parametrize(
    "wrong", [{"withheld_count": 3}, {"urgent_count": 1}, {"direction": lib.ENG_READ}], ids=["some", "urgent", "read"]
)
def test_a_request_that_contradicts_itself_is_refused(
    open_pipeline: Callable[..., Pipeline], fd: int, wrong: dict[str, int]
) -> None:
    """Some blocks withheld and not all; urgent ones of an order that is not known; a read."""
    pipeline, job = open_pipeline(2, SLOT_BYTES), withheld(noise(4 * SLOT_BYTES))
    for name, value in wrong.items():
        setattr(job.c_job, name, value)
    pipeline.submit(job)
    assert finish(pipeline, job).failure == (FailureKind.INVALID, errno.EINVAL, None)


def test_a_pipeline_that_closes_aborts_a_job_whose_blocks_are_withheld(fd: int) -> None:
    with closing(Pipeline(2, SLOT_BYTES)) as pipeline:
        job = withheld(noise(4 * SLOT_BYTES))
        pipeline.submit(job)
        pipeline.attach(job, [fd])
        pipeline.release(job, [0])
    assert job.failure is not None and job.failure.kind == FailureKind.ABORTED


class Withheld(Guarded):
    """Guarded memory whose jobs are withheld."""

    def make_job(self, plan: object) -> Job:
        options = {"guard": self.guard.c_guard, "previous": self.guard.previous(self), "owners": self}
        return withheld(self.tensor, GUARDED_BLOCK_BYTES, **options)


@pytest.mark.skipif("detect" not in KINDS_HERE, reason="needs Linux 6.7")
def test_only_writers_that_wait_let_blocks_be_withheld() -> None:
    memory = Withheld("detect", UNIT_BYTES)
    with pytest.raises(NotArmed, match="EINVAL"):
        memory.guard.arm(memory.make_job(None), memory)
    memory.guard.close()


@needs_cow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_each_block_has_the_bytes_of_its_release(
    open_pipeline: Callable[..., Pipeline], fd: int, data: st.DataObject
) -> None:
    """Whatever is written before and after it, to it and to its neighbours, in this job and between jobs.

    Blocks that nobody has written to since the job before are clean, and are not copied.
    """
    pipeline = open_pipeline(data.draw(st.sampled_from([2, 16])), GUARDED_BLOCK_BYTES)
    memory = Withheld("cow", BLOCKS * GUARDED_BLOCK_BYTES)
    memory.fill(0)
    stamp = 0

    def write(block: int) -> None:
        nonlocal stamp
        stamp = (stamp + 1) % 251
        start = block * GUARDED_BLOCK_BYTES
        memory.tensor[start : start + GUARDED_BLOCK_BYTES].fill_(stamp)

    known = None
    for _ in range(data.draw(st.integers(2, 4))):
        job = memory.make_job(None)
        memory.guard.arm(job, memory)
        pipeline.submit(job)
        attached = data.draw(st.booleans())
        if attached:
            pipeline.attach(job, [fd], known)
        want = {}
        left = data.draw(st.permutations(range(BLOCKS)))
        while left:
            count = data.draw(st.integers(1, len(left)))
            group, left = left[:count], left[count:]
            for block in data.draw(st.lists(st.sampled_from(group), max_size=2)):
                write(block)
            for block in group:
                start = block * GUARDED_BLOCK_BYTES
                want[block] = memory.tensor[start : start + GUARDED_BLOCK_BYTES].numpy().tobytes()
            pipeline.release(job, group)
            if not attached:
                pipeline.attach(job, [fd], known)
                attached = True
            for block in data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=3)):
                if block in want or block in left:
                    write(block)
        assert finish(pipeline, job).failure is None
        assert content(fd, memory.tensor.nbytes) == b"".join(want[block] for block in range(BLOCKS))
        known = job.checksums()
        for block in data.draw(st.lists(st.integers(0, BLOCKS - 1), max_size=2)):
            write(block)
    memory.guard.close()


@needs_cow
def test_a_writer_of_a_withheld_block_beside_a_released_one_goes_on(
    open_pipeline: Callable[..., Pipeline], fd: int
) -> None:
    """Both are in one unit.  The released one is staged for it, although the job has no file yet."""
    pipeline, memory = open_pipeline(16, GUARDED_BLOCK_BYTES), Withheld("cow", UNIT_BYTES)
    memory.fill(1)
    before = memory.bytes_now()[:GUARDED_BLOCK_BYTES]
    job = memory.make_job(None)
    memory.guard.arm(job, memory)
    pipeline.submit(job)
    pipeline.release(job, [0])
    writer = threading.Thread(target=memory.tensor.fill_, args=(9,))
    writer.start()
    writer.join(HANG_NS / 1e9)
    assert not writer.is_alive() and job.states()[1] == BlockState.WITHHELD
    pipeline.release(job, [1, 2, 3])
    pipeline.attach(job, [fd])
    assert finish(pipeline, job).failure is None
    assert content(fd, UNIT_BYTES) == before + bytes([9]) * (3 * GUARDED_BLOCK_BYTES)
    memory.guard.close()


@needs_cow
def test_writers_beside_released_blocks_change_none_of_them(open_pipeline: Callable[..., Pipeline], fd: int) -> None:
    """Two threads write all the time to blocks that are withheld and to those that were released, four to a unit.

    A block is left alone only while its bytes are noted and it is released.
    """
    pipeline, memory = open_pipeline(4, GUARDED_BLOCK_BYTES), Withheld("cow", 2 * UNIT_BYTES)
    memory.fill(1)
    blocks = memory.tensor.split(GUARDED_BLOCK_BYTES)
    held = [threading.Lock() for _ in blocks]
    written: set[int] = set()
    ended = threading.Event()

    def write(seed: int) -> None:
        chance = random.Random(seed)
        while not ended.is_set():
            block = chance.randrange(len(blocks))
            if block in written and held[block].acquire(blocking=False):
                blocks[block].fill_(chance.randrange(256))
                held[block].release()

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    chance, known, clean_bytes = random.Random(2), None, 0
    for writer in writers:
        writer.start()
    try:
        for index in range(60):
            # A unit that is left alone and is released at once is clean in the third job, and in the fourth, which
            # releases its blocks one by one.
            lively = (range(4), range(4, 8), range(8))[index // 4 % 3]
            written = set(chance.sample(lively, chance.randrange(1, len(lively))))
            groups = [[block] for block in range(8)] if index % 4 == 3 else [[*range(4)], [*range(4, 8)]]
            job = memory.make_job(None)
            memory.guard.arm(job, memory)
            pipeline.submit(job)
            pipeline.attach(job, [fd], known)
            want = {}
            for group in chance.sample(groups, len(groups)):
                with ExitStack() as undo:
                    for block in group:
                        undo.enter_context(held[block])
                        want[block] = blocks[block].numpy().tobytes()
                    pipeline.release(job, group)
            assert finish(pipeline, job).failure is None
            assert content(fd, memory.tensor.nbytes) == b"".join(want[block] for block in range(len(blocks)))
            known = job.checksums()
            clean_bytes += job.counters["clean_bytes"]
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    assert clean_bytes > 0
    memory.guard.close()


@needs_cow
def test_blocks_that_nobody_wrote_to_are_clean_however_they_are_released(
    open_pipeline: Callable[..., Pipeline], fd: int
) -> None:
    pipeline, memory = open_pipeline(16, GUARDED_BLOCK_BYTES), Withheld("cow", 2 * UNIT_BYTES)
    memory.fill(1)
    clean, known = [], None
    for groups in ([[0, 1, 2, 3], [4, 5, 6, 7]],) * 3 + ([[7], [6, 0], [1, 2, 3, 4, 5]],):
        job = memory.make_job(None)
        memory.guard.arm(job, memory)
        pipeline.submit(job)
        pipeline.attach(job, [fd], known)
        for group in groups:
            pipeline.release(job, group)
        assert finish(pipeline, job).failure is None
        known = job.checksums()
        clean.append(job.counters["clean_bytes"])
    assert clean == [0, 0, 2 * UNIT_BYTES, 2 * UNIT_BYTES]
    memory.guard.close()
