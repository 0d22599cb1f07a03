"""The shared-memory mover and the thread that serves it in one process: bytes, faults, peers that break the rules."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Fault, FaultTable, not_started, refused, short
from jobs import HANG_NS, READ, SLOT_BYTES, WRITE, bytes_of, finish, make_job, noise, plain, run, until, whole
from leaks import held

from engine.io.backend import LADDER
from engine.io.binding import ffi, lib
from engine.io.descriptor import Descriptor
from engine.io.job import FailureKind, Milestone
from engine.io.pipeline import OpenError, Pipeline, Shared, _stop
from engine.io.serving import Serving
from engine.monitor.shared_memory import Board, board_bytes, make_memory, slots_bytes

SLOTS = 4


class Pair:
    """A pipeline, and what serves it."""

    def __init__(self, backend: Any = "io_uring", table: FaultTable | None = None, staging_threads: int = 1) -> None:
        self.memory = make_memory("slots", slots_bytes(SLOTS, SLOT_BYTES))
        self.events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(HANG_NS / 1e9)
        shared = Shared(self.memory.number, self.events[0], self.events[1], self.ours.fileno())
        self.table = table
        io_table = None if table is None else table.c_table
        served = shared._replace(peer=self.theirs.fileno())
        self.serving = Serving(SLOTS, SLOT_BYTES, backend, served, io_table=io_table)
        self.pipeline = Pipeline(SLOTS, SLOT_BYTES, backend, staging_threads, shared=shared)

    def header(self) -> Any:
        """The header of the shared memory, as the other process could write it."""
        mapping = ffi.new("eng_mapping *")
        assert lib.eng_map_shared(self.memory.number, lib.ENG_SHARED_HEADER_BYTES, mapping) == 0
        self.mapping = ffi.gc(mapping, lib.eng_unmap_shared)
        return ffi.buffer(mapping.address, 4096)

    def close(self) -> None:
        self.pipeline.close()
        self.serving.close()
        self.ours.close()
        self.theirs.close()
        self.memory.close()
        for event in self.events:
            os.close(event)


@pytest.fixture(params=LADDER)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


@pytest.fixture
def one() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_what_is_posted_is_written(pair: Pair, fd: int) -> None:
    content = noise(9 * SLOT_BYTES + 5)
    plan = whole(content.nbytes, SLOT_BYTES)
    pair.serving.admit(fd, 10 * SLOT_BYTES)
    for _ in range(3):
        job = run(pair.pipeline, make_job(WRITE, plan, [plain(content)]), [fd])
        assert job.failure is None
    with open(f"/proc/self/fd/{fd}", "rb") as file:
        assert file.read(content.nbytes) == bytes_of(content)
    pair.serving.withdraw(fd)


def test_only_admitted_files_are_written_and_only_to_their_ends(one: Pair, fd: int) -> None:
    content = noise(4 * SLOT_BYTES)
    plan = whole(content.nbytes, SLOT_BYTES)
    refused = run(one.pipeline, make_job(WRITE, plan, [plain(content)]), [fd])
    assert refused.failure is not None and refused.failure.errno == errno.EBADF
    one.serving.admit(fd, 2 * SLOT_BYTES)
    refused = run(one.pipeline, make_job(WRITE, plan, [plain(content)]), [fd])
    assert refused.failure is not None and refused.failure.errno == errno.EBADF
    assert os.fstat(fd).st_size <= 2 * SLOT_BYTES
    one.serving.withdraw(fd)
    refused = run(one.pipeline, make_job(WRITE, plan, [plain(content)]), [fd])
    assert refused.failure is not None and refused.failure.errno == errno.EBADF


def test_a_read_is_refused(one: Pair, fd: int) -> None:
    target = torch.zeros(SLOT_BYTES, dtype=torch.uint8)
    job = make_job(READ, whole(SLOT_BYTES, SLOT_BYTES), [plain(target)], checksums=[bytes(16)])
    assert run(one.pipeline, job, [fd]).failure == (FailureKind.IO, errno.EOPNOTSUPP, 0)


def test_a_peer_that_has_ended_fails_every_write(one: Pair, fd: int) -> None:
    """Nobody serves: the posts stay, and the other end of the socket goes."""
    one.serving.close()
    content = noise(9 * SLOT_BYTES)
    job = make_job(WRITE, whole(content.nbytes, SLOT_BYTES), [plain(content)])
    one.pipeline.submit(job)
    one.pipeline.attach(job, [fd])
    assert not one.pipeline.wait(job, Milestone.DONE, 50_000_000)
    one.theirs.close()
    failure = finish(one.pipeline, job).failure
    assert failure is not None and (failure.kind, failure.errno) == (FailureKind.IO, errno.EPIPE)
    later = run(one.pipeline, make_job(WRITE, whole(SLOT_BYTES, SLOT_BYTES), [plain(content)]), [fd])
    assert later.failure is not None and later.failure.errno == errno.EPIPE


def abandon(pipeline: Pipeline) -> None:
    pipeline.abandon()


def drain_and_abandon(pipeline: Pipeline) -> None:
    assert not pipeline.close(50_000_000)
    pipeline.abandon()


def stop_as_at_exit(pipeline: Pipeline) -> None:
    _stop(pipeline._held)


@pytest.mark.parametrize("how", [abandon, drain_and_abandon, stop_as_at_exit])
def test_a_pipeline_whose_peer_is_stopped_is_abandoned(one: Pair, fd: int, how: Callable[[Pipeline], None]) -> None:
    """Nobody serves, and the other end of the socket is open: a monitor under SIGSTOP."""
    one.serving.close()
    content = noise(9 * SLOT_BYTES)
    plan = whole(content.nbytes, SLOT_BYTES)
    attached, waiting = (make_job(WRITE, plan, [plain(content)]) for _ in range(2))
    one.pipeline.submit(attached)
    one.pipeline.attach(attached, [fd])
    one.pipeline.submit(waiting)
    assert not one.pipeline.wait(attached, Milestone.DONE, 50_000_000)
    how(one.pipeline)
    for job in (attached, waiting):
        assert job.reached(Milestone.DONE)
        assert job.failure == (FailureKind.ABORTED, errno.ECANCELED, None)
    assert one.pipeline.close()
    posted = struct.unpack("=I", one.header()[:4])[0]
    assert 0 < posted <= SLOTS  # which a monitor that goes on may still write


@pytest.mark.parametrize("backend", ["io_uring", "threads"])
def test_an_eventfd_that_counts_no_more_wakes_loses_none(backend: str, fd: int) -> None:
    """A write to it gives EAGAIN (eventfd(2)).  The other process, which shares it, may have it so at any moment."""
    made, done = Pair(backend, staging_threads=2), threading.Event()

    def fill() -> None:
        while not done.is_set():
            for event in made.events:
                with suppress(BlockingIOError):
                    os.eventfd_write(event, 2**64 - 2)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        content = noise(9 * SLOT_BYTES)
        made.serving.admit(fd, 10 * SLOT_BYTES)
        for _ in range(100):
            job = make_job(WRITE, whole(content.nbytes, SLOT_BYTES), [plain(content)])
            assert run(made.pipeline, job, [fd]).failure is None
    finally:
        done.set()
        filler.join()
        made.close()


@pytest.mark.parametrize(("offset", "value"), [(128, 5000), (128, 1)], ids=["too many", "none posted"])
def test_answers_that_nobody_asked_for_end_the_pipelines_trust(one: Pair, fd: int, offset: int, value: int) -> None:
    one.serving.close()
    content = noise(SLOT_BYTES)
    header = one.header()
    job = make_job(WRITE, whole(SLOT_BYTES, SLOT_BYTES), [plain(content)])
    one.pipeline.submit(job)
    one.pipeline.attach(job, [fd])
    until(lambda: struct.unpack("=I", header[:4])[0] == 1)
    answers = 256 + 1024 * 24  # behind the indices and the posts (native/moving/shared.h)
    whole_header = ffi.buffer(one.mapping.address, lib.ENG_SHARED_HEADER_BYTES)
    whole_header[answers : answers + 8] = struct.pack("=Ii", 77, 0)
    header[offset : offset + 4] = struct.pack("=I", value)
    os.eventfd_write(one.events[1], 1)
    failure = finish(one.pipeline, job).failure
    assert failure is not None and failure.errno == errno.EPIPE


@pytest.mark.parametrize(
    "post",
    [
        (SLOTS, 0, 0, 4096, 0),
        (0, 0, 0, 0, 0),
        (0, 0, 0, 2 * SLOT_BYTES, 0),
        (0, 0, SLOT_BYTES, 4096, 0),
        (0, 0, 2**32 - 4096, 8192, 0),
        (0, 0, 100, 4096, 0),
        (0, 0, 0, 4096, 7),
        (0, 0, 0, 4096, 2**64 - 4096),
        (0, 1, 0, 4096, 0),
    ],
)
def test_a_hostile_post_writes_nothing(one: Pair, fd: int, post: tuple[int, ...]) -> None:
    one.serving.admit(fd, SLOT_BYTES)
    header = one.header()
    slot, wrong, offset, nbytes, file_offset = post
    header[256:280] = struct.pack("=IiIIQ", slot, -1 if wrong else fd, offset, nbytes, file_offset)
    header[:4] = struct.pack("=I", 1)
    os.eventfd_write(one.events[0], 1)
    until(lambda: struct.unpack("=I", header[64:68])[0] == 1)  # it was taken
    one.serving.withdraw(fd)
    assert os.fstat(fd).st_size == 0
    if slot == SLOTS:  # to which there is no answer
        assert_trust_is_lost(one, fd)


def assert_trust_is_lost(pair: Pair, fd: int) -> None:
    """Both ends of the socket have ended, and every write fails."""
    assert pair.ours.recv(1) == b"" and pair.theirs.recv(1) == b""
    later = run(pair.pipeline, make_job(WRITE, whole(SLOT_BYTES, SLOT_BYTES), [plain(noise(SLOT_BYTES))]), [fd])
    assert later.failure is not None and later.failure.errno == errno.EPIPE


def test_indices_that_overrun_are_not_followed(one: Pair, fd: int) -> None:
    one.serving.admit(fd, SLOT_BYTES)
    header = one.header()
    header[:4] = struct.pack("=I", 1 << 31)
    os.eventfd_write(one.events[0], 1)
    assert_trust_is_lost(one, fd)
    one.serving.withdraw(fd)
    one.serving.close()  # it ends, and has taken nothing
    assert struct.unpack("=I", header[64:68])[0] == 0


def test_memory_to_share_has_all_of_its_pages() -> None:
    """A page that the kernel refuses at its first touch would end the process by SIGBUS."""
    memory = make_memory("slots", slots_bytes(SLOTS, SLOT_BYTES))
    assert os.fstat(memory.number).st_blocks * 512 >= slots_bytes(SLOTS, SLOT_BYTES)
    memory.close()


def test_memory_that_is_too_small_or_not_sealed_is_refused(tmp_path: Path) -> None:
    small = make_memory("small", 4096)
    with open(tmp_path / "file", "wb+") as file:
        file.truncate(slots_bytes(SLOTS, SLOT_BYTES))
        for number, error in ((small.number, errno.EINVAL), (file.fileno(), errno.EINVAL), (-1, errno.EBADF)):
            with pytest.raises(OpenError):
                Serving(SLOTS, SLOT_BYTES, "threads", Shared(number, small.number, small.number, small.number))
            with pytest.raises(OSError) as caught:
                Board(number, 10_000)
            assert caught.value.errno == error
    small.close()


def test_a_board_is_shared_and_keeps_no_descriptor() -> None:
    before = held().descriptors
    descriptor: Descriptor = make_memory("board", board_bytes(3))
    ours, theirs = Board(descriptor.number, 3), Board(descriptor.number, 3)
    descriptor.close()
    assert held().descriptors == before
    assert not theirs.is_staged and theirs.block_states() == bytes(3)
    ours.states[1:2] = b"\2"
    ours.checksums[16:32] = b"x" * 16
    ours.mark_staged()
    assert theirs.is_staged and theirs.block_states() == b"\0\2\0"
    assert theirs.block_checksums() == [bytes(16), b"x" * 16, bytes(16)]


@pytest.mark.parametrize(
    ("script", "refusals", "failure"),
    [
        ({0: short(4096), 2: refused(errno.EAGAIN)}, [], None),
        ({1: refused(errno.EIO)}, [], errno.EIO),
        ({1: not_started(errno.EBUSY)}, [], errno.EBUSY),
        ({}, [errno.EBADF], errno.EBADF),
    ],
)
def test_faults_of_the_inner_table_reach_the_pipeline(
    buffered_fd: int, script: dict[int, Fault], refusals: list[int], failure: int | None
) -> None:
    gate = threading.Event()
    made = Pair("threads", FaultTable(script, gate=gate))
    try:
        made.serving.admit(buffered_fd, 8 * SLOT_BYTES)
        content = noise(6 * SLOT_BYTES)
        job = make_job(WRITE, whole(content.nbytes, SLOT_BYTES), [plain(content)])
        made.pipeline.submit(job)
        made.pipeline.attach(job, [buffered_fd])
        assert made.table is not None
        made.table._refusals.extend(refusals)
        gate.set()
        found = finish(made.pipeline, job).failure
        assert (None if found is None else found.errno) == failure
        if failure is None:
            with open(f"/proc/self/fd/{buffered_fd}", "rb") as file:
                assert file.read() == bytes_of(content)
        assert made.table.exceptions == []
    finally:
        made.close()
