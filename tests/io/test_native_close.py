"""Closing the native pipeline: beside every other call, never, and in the middle of another close."""

from __future__ import annotations

import contextlib
import errno
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from faults import FaultTable
from jobs import HANG_NS, SLOT_BYTES, WRITE, finish, make_job, noise, plain, until, whole
from processes import descriptors, in_a_process_of_its_own, native_threads, slots

from engine.errors import ClosedError
from engine.io.job import Failure, FailureKind, Job, Milestone
from engine.io.pipeline import Pipeline
from engine.options import Backend


class Gated(NamedTuple):
    """See the fixture."""

    pipeline: Pipeline
    job: Job
    gate: threading.Event


@pytest.fixture
def gated(buffered_fd: int) -> Iterator[Gated]:
    """A pipeline with a job that does not end before its gate is opened.  The fixture opens it at the end."""
    gate = threading.Event()
    table = FaultTable(gate=gate)
    pipeline = Pipeline(2, SLOT_BYTES, io_table=table.c_table)
    job = make_job(WRITE, whole(4 * SLOT_BYTES, SLOT_BYTES), [plain(noise(4 * SLOT_BYTES))])
    pipeline.submit(job)
    pipeline.attach(job, [buffered_fd])
    safety = threading.Timer(HANG_NS / 4e9, gate.set)
    safety.start()
    yield Gated(pipeline, job, gate)
    gate.set()
    safety.cancel()
    pipeline.close()


@contextlib.contextmanager
def on_alarm(handler: Callable[[], object]) -> Iterator[None]:
    """Run a handler of a signal that comes soon."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_every_close_at_once_returns_when_the_thread_has_stopped(gated: Gated) -> None:
    with ThreadPoolExecutor(4) as pool:
        closings = [pool.submit(gated.pipeline.close) for _ in range(4)]
        assert not wait(closings, timeout=0.1).done, "a close has not waited"
        gated.gate.set()
        for closing in closings:
            closing.result(timeout=HANG_NS / 1e9)
    assert gated.job.failure is None


def test_a_signal_handler_may_close_in_the_middle_of_close(gated: Gated) -> None:
    def close_too() -> None:
        gated.gate.set()
        gated.pipeline.close()

    with on_alarm(close_too):
        gated.pipeline.close()
    assert gated.job.failure is None


def test_ctrl_c_ends_a_close_and_a_later_one_leaves_nothing(buffered_fd: int, request: pytest.FixtureRequest) -> None:
    descriptors_before, slots_before, threads_before = descriptors(), slots(), len(native_threads())
    gated = request.getfixturevalue("gated")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), on_alarm(interrupt):
        gated.pipeline.close()
    assert not gated.gate.is_set(), "close held Ctrl-C back until it was done"
    gated.gate.set()
    gated.pipeline.close()
    assert gated.job.failure is None
    until(lambda: len(native_threads()) == threads_before)
    assert (descriptors(), slots()) == (descriptors_before, slots_before)


def test_after_close_every_method_raises_closed_error(gated: Gated) -> None:
    gated.gate.set()
    gated.pipeline.close()
    job = make_job(WRITE, whole(1, SLOT_BYTES), [plain(noise(1))])
    calls: list[Callable[[], object]] = [
        lambda: gated.pipeline.submit(job),
        lambda: gated.pipeline.attach(job, [0]),
        lambda: gated.pipeline.wait(job, Milestone.DONE),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    gated.pipeline.abort(job, errno.EIO)  # ends jobs that nothing else ends
    assert finish(gated.pipeline, job).failure == Failure(FailureKind.ABORTED, errno.EIO, None)
    assert finish(gated.pipeline, gated.job).failure is None


@pytest.mark.every_staging
@pytest.mark.every_backend
def test_a_job_submitted_beside_close_ends_or_is_refused(rung: Backend, staging_threads: int) -> None:
    plan, tensor = whole(1, 4096), noise(1)
    for _ in range(50):
        pipeline = Pipeline(2, 4096, rung, staging_threads)
        taken: list[Job] = []

        def submit_until_closed(pipeline: Pipeline = pipeline, taken: list[Job] = taken) -> None:
            with suppress(ClosedError):
                while True:
                    job = make_job(WRITE, plan, [plain(tensor)])
                    pipeline.submit(job)
                    taken.append(job)

        with ThreadPoolExecutor(2) as pool:
            submitting = [pool.submit(submit_until_closed) for _ in range(2)]
            until(lambda taken=taken: len(taken) > 2)  # type: ignore[misc]
            pipeline.close()
            for submitter in submitting:
                submitter.result(timeout=HANG_NS / 1e9)
        assert all(job.reached(Milestone.DONE) for job in taken)


# -- a pipeline that is not closed ------------------------------------------------------------------------------------

UNCLOSED = """
import gc, os, sys, time
from jobs import *
from processes import descriptors, native_threads
from engine.io.job import BlockState
from engine.store.filesystem import Filesystem

NBYTES = 256 << 20
path, backend, how, staging_threads = sys.argv[1:]
file = Filesystem().open_for_blocks(path, write=True, direct=True)
fd = file.number
os.ftruncate(fd, NBYTES)
before = descriptors()

def begin():
    tensor, plan = torch.zeros(NBYTES, dtype=torch.uint8), whole(NBYTES, 1 << 20)
    pipeline = Pipeline(4, 1 << 20, backend, int(staging_threads))
    job = make_job(READ, plan, [plain(tensor)], checksums=checksums_of(plan, [bytes(NBYTES)]))
    pipeline.submit(job)
    pipeline.attach(job, [fd])
    until(lambda: BlockState.WRITTEN in job.states())
    return pipeline

if how == "exit":
    kept = begin()
    sys.exit(3)  # as an assertion that failed would
begin()
gc.collect()
until(lambda: not native_threads())
assert descriptors() == before
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["exit", "collected"])
@pytest.mark.parametrize(
    ("backend", "staging_threads"),
    [("io_uring", 1), ("io_uring_plain", 1), ("threads", 1), ("io_uring", 3)],
    indirect=["staging_threads"],
)
def test_an_unclosed_pipeline_is_stopped_before_its_memory_is_freed(
    tmp_path: Path, backend: str, how: str, staging_threads: int
) -> None:
    finished = in_a_process_of_its_own(UNCLOSED, str(tmp_path / "blocks"), backend, how, str(staging_threads))
    assert (finished.returncode, finished.stderr) == (3, "")


def test_the_memory_of_a_dropped_job_lives_until_the_job_is_done(gated: Gated, buffered_fd: int) -> None:
    owner = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    memory = weakref.ref(owner)
    job = make_job(WRITE, whole(SLOT_BYTES, SLOT_BYTES), [plain(owner)])
    gated.pipeline.submit(job)
    gated.pipeline.attach(job, [buffered_fd])
    del owner, job
    gc.collect()
    assert memory() is not None
    gated.gate.set()
    finish(gated.pipeline, gated.job)
    until(lambda: is_gone_after_another_job(gated.pipeline, memory))


def is_gone_after_another_job(pipeline: Pipeline, memory: weakref.ref[torch.Tensor]) -> bool:
    """Whether memory is released when another job has ended."""
    job = make_job(WRITE, whole(1, SLOT_BYTES), [plain(noise(1))])
    pipeline.submit(job)
    pipeline.abort(job, errno.ECANCELED)
    finish(pipeline, job)
    return memory() is None
