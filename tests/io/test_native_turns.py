"""Jobs share the slots and the pipeline's thread: none starves another, and no set of jobs blocks another.

`SteppedTable` is a device of which the test decides what completes and when, so a test sees which job got a slot at any
moment, whatever the speed of the host.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults import FaultTable
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs import (
    HANG_NS,
    LOOK_NS,
    READ,
    WRITE,
    bytes_of,
    checksums_of,
    content,
    finish,
    make_job,
    noise,
    plain,
    rewrite,
    until,
    whole,
)

from engine.format.plan import ALIGNMENT
from engine.io.job import BlockState, Direction, Job, Milestone
from engine.io.pipeline import Pipeline


class SteppedTable(FaultTable):
    """Completes as many operations as the test releases, the oldest first or those of one file only.

    Attributes:
        started: the descriptor of every operation, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.moving: list[tuple[int, int]] = []  # slot and descriptor
        self.started: list[int] = []
        self.most: Counter[int] = Counter()  # of each file the most operations in flight at a time
        self.released = 0
        self.only: int | None = None

    def release(self, count: int = 1 << 30, only: int | None = None) -> None:
        """Let this many more operations complete; with `only` those of a descriptor."""
        with self.lock:
            self.released, self.only = count, only

    def in_flight(self) -> Counter[int]:
        """The operations in flight, by descriptor."""
        with self.lock:
            return Counter(fd for _, fd in self.moving)

    def _start(self, context: Any, io: Any) -> int:
        with self.lock:
            result = super()._start(context, io)
            self.moving.append((io.slot, io.fd))
            self.started.append(io.fd)
            for fd, count in Counter(fd for _, fd in self.moving).items():
                self.most[fd] = max(self.most[fd], count)
            return result

    def _reap(self, _context: Any, completions: Any, capacity: int, wait: int) -> int:
        with self.lock:
            ready = [pair for pair in self.moving if self.only in (None, pair[1])][: min(self.released, capacity)]
            self.released -= len(ready)
            results = dict(self._completed)
            for index, pair in enumerate(ready):
                completions[index].slot, completions[index].result = pair[0], results[pair[0]]
                self.moving.remove(pair)
                self._completed.remove((pair[0], results[pair[0]]))
        if wait and not ready:
            threading.Event().wait(0.001)  # as if woken: the pipeline looks into its inbox and comes back
        return len(ready)


class Saved:
    """A job with a file and content of its own."""

    def __init__(self, path: Path, block_count: int, seed: int, direction: Direction = WRITE, **options: Any) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        self.plan = whole(block_count * ALIGNMENT, ALIGNMENT)
        self.expected = bytes_of(noise(block_count * ALIGNMENT, seed))
        if direction == READ:
            rewrite(self.fd, 0, self.expected)
            self.tensor = torch.zeros(block_count * ALIGNMENT, dtype=torch.uint8)
            options["checksums"] = checksums_of(self.plan, [self.expected])
        else:
            self.tensor = noise(block_count * ALIGNMENT, seed)
        self.direction = direction
        self.attached = False
        self.job: Job = make_job(direction, self.plan, [plain(self.tensor)], **options)

    def attach(self, pipeline: Pipeline) -> None:
        pipeline.attach(self.job, [self.fd])
        self.attached = True

    def begin(self, pipeline: Pipeline) -> None:
        pipeline.submit(self.job)
        self.attach(pipeline)

    def assert_whole(self) -> None:
        """Every byte has landed, at its own location of its own file or tensor."""
        landed = content(self.fd, len(self.expected)) if self.direction == WRITE else bytes_of(self.tensor)
        assert landed == self.expected

    def count(self, *states: BlockState) -> int:
        return sum(self.job.states().count(state) for state in states)

    def close(self) -> None:
        os.close(self.fd)


def saves(directory: Path, *block_counts: int) -> list[Saved]:
    return [Saved(directory / f"{index}", count, index) for index, count in enumerate(block_counts)]


def test_saves_of_very_different_sizes_share_the_slots(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    """With a slow device, and the largest first: from the time when all are there each has its share of the slots."""
    table = SteppedTable()
    pipeline = open_pipeline(8, ALIGNMENT, table)
    jobs = saves(tmp_path, 400, 40, 20, 4)
    jobs[0].begin(pipeline)
    until(lambda: table.in_flight() == {jobs[0].fd: 8})
    for job in jobs[1:]:
        job.begin(pipeline)
        assert pipeline.wait(job.job, Milestone.URGENT, HANG_NS), "it is in the queue"
    shared = 8
    for _ in range(shared):  # the first gives up what is above its share, one slot for each completion
        before = len(table.started)
        table.release(1)
        until(lambda before=before: len(table.started) > before)  # type: ignore[misc]
    assert sorted(table.in_flight().values()) == [2, 2, 2, 2]
    table.release()
    for job in jobs:
        assert finish(pipeline, job.job).failure is None
        job.assert_whole()
    done = [job.job.counters["done_ns"] for job in jobs]
    assert done == sorted(done, reverse=True), "the smallest is done first"
    assert not table.exceptions


def test_an_older_save_keeps_its_share_beside_later_ones(
    open_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    table = SteppedTable()
    pipeline = open_pipeline(6, ALIGNMENT, table)
    first, *later = saves(tmp_path, 60, 600, 600)
    for job in (first, *later):
        job.begin(pipeline)
    until(lambda: len(table.started) == 6)
    while first.count(BlockState.WRITTEN) < 60:
        before = len(table.started)
        table.release(1)
        until(lambda before=before: len(table.started) > before)  # type: ignore[misc]
    beside = Counter(table.started)
    assert beside[first.fd] == 60
    # A third each, but for the slots that the first had before the others came and the last in flight.
    assert all(60 - 6 <= beside[job.fd] <= 60 + 6 for job in later)
    table.release()
    for job in (first, *later):
        assert finish(pipeline, job.job).failure is None
        job.assert_whole()


def test_a_restore_goes_on_beside_a_save_that_never_waits(
    open_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """The save is older, and a device that completes everything at once always lets it stage the next block."""
    gate = threading.Event()
    pipeline = open_pipeline(4, ALIGNMENT, FaultTable(gate=gate))
    save, restore = Saved(tmp_path / "save", 2000, 1), Saved(tmp_path / "restore", 20, 2, READ)
    save.begin(pipeline)
    restore.begin(pipeline)
    gate.set()
    assert finish(pipeline, restore.job).failure is None
    assert finish(pipeline, save.job).failure is None
    assert restore.job.counters["done_ns"] < save.job.counters["staged_ns"]
    save.assert_whole()
    restore.assert_whole()


def test_urgent_blocks_go_first(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    """A caller waits for them in checkpoint(), so neither an older save nor a restore comes in between."""
    table = SteppedTable()
    pipeline = open_pipeline(4, ALIGNMENT, table)
    save, restore = Saved(tmp_path / "save", 100, 1), Saved(tmp_path / "restore", 100, 2, READ)
    for job in (save, restore):
        job.begin(pipeline)
    until(lambda: len(table.started) == 4)
    urgent = Saved(tmp_path / "urgent", 30, 3, urgent_count=20)
    urgent.begin(pipeline)
    # Submitted later, so the pipeline has seen the urgent one before this one's milestone.
    last = make_job(WRITE, whole(1, ALIGNMENT), [plain(noise(1))])
    pipeline.submit(last)
    assert pipeline.wait(last, Milestone.URGENT, HANG_NS)
    table.release(20)
    until(lambda: len(table.started) == 24)
    assert set(table.started[4:]) == {urgent.fd}
    assert pipeline.wait(urgent.job, Milestone.URGENT, HANG_NS)
    pipeline.abort(last, errno.ECANCELED)
    table.release()
    for job in (save, restore, urgent):
        assert finish(pipeline, job.job).failure is None
        job.assert_whole()


def test_a_save_without_files_leaves_a_slot_to_the_others(
    open_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """The thread that makes its files may be waiting for the very job that needs a slot."""
    pipeline = open_pipeline(4, ALIGNMENT)
    waiting, more = Saved(tmp_path / "waiting", 50, 1), Saved(tmp_path / "more", 50, 2)
    for save in (waiting, more):
        pipeline.submit(save.job)
    until(lambda: waiting.count(BlockState.STAGED) + more.count(BlockState.STAGED) == 3)
    for other in (Saved(tmp_path / "save", 30, 3), Saved(tmp_path / "restore", 30, 4, READ)):
        other.begin(pipeline)
        assert finish(pipeline, other.job).failure is None
        other.assert_whole()
    assert not pipeline.wait(waiting.job, Milestone.STAGED, LOOK_NS)
    for save in (more, waiting):
        save.attach(pipeline)
    for save in (more, waiting):
        assert finish(pipeline, save.job).failure is None
        save.assert_whole()


def test_chunks_of_one_save_are_moved_at_the_same_time(open_pipeline: Callable[..., Pipeline], tmp_path: Path) -> None:
    table = SteppedTable()
    pipeline = open_pipeline(16, ALIGNMENT, table)
    save = Saved(tmp_path / "save", 40, 1)
    save.begin(pipeline)
    until(lambda: len(table.started) == 16)
    assert len({operation.file_offset for operation in table.operations}) == 16
    table.release()
    assert finish(pipeline, save.job).failure is None
    save.assert_whole()


class Shared(RuleBasedStateMachine):
    """Any interleaving of submitting, giving files, completing, refusing and aborting, with any number of slots.

    The model is what must be true of the pipeline at rest.  A job with files makes progress as soon as the device lets
    it, whatever the others wait for; and each byte lands where it belongs.
    """

    @initialize(slot_count=st.integers(1, 5))
    def open(self, slot_count: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="engine-turns-"))
        self.table = SteppedTable()
        self.pipeline = Pipeline(slot_count, ALIGNMENT, "threads", io_table=self.table.c_table)
        self.slot_count = slot_count
        self.live: list[Saved] = []
        self.made = 0

    def teardown(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        self.table.release()
        for job in self.live:
            if not job.attached:
                job.attach(self.pipeline)
        for job in self.live:
            self.end(job)
        self.pipeline.close()
        shutil.rmtree(self.directory)
        assert not self.table.exceptions and not self.table.files

    def end(self, job: Saved) -> None:
        assert finish(self.pipeline, job.job).failure is None
        job.assert_whole()
        job.close()

    @precondition(lambda self: len(self.live) < 6)
    @rule(
        block_count=st.integers(1, 12),
        urgent_count=st.integers(0, 3),
        checked=st.booleans(),
        direction=st.sampled_from(Direction),
        attach=st.booleans(),
    )
    def begin(self, block_count: int, urgent_count: int, checked: bool, direction: Direction, attach: bool) -> None:
        self.made += 1
        options = {"urgent_count": min(urgent_count, block_count), "checked": checked} if direction == WRITE else {}
        job = Saved(self.directory / str(self.made), block_count, self.made, direction, **options)
        self.pipeline.submit(job.job)
        if attach:
            job.attach(self.pipeline)
        self.live.append(job)

    @precondition(lambda self: any(not job.attached for job in self.live))
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([job for job in self.live if not job.attached])).attach(self.pipeline)

    @rule(count=st.integers(1, 5))
    def complete(self, count: int) -> None:
        self.table.release(count)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def complete_one_file(self, data: st.DataObject) -> None:
        self.table.release(3, only=data.draw(st.sampled_from(self.live)).fd)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """The others neither wait nor fail."""
        job = data.draw(st.sampled_from(self.live))
        self.pipeline.abort(job.job, errno.EIO)
        self.table.release()  # what is in flight has to be drained
        finish(self.pipeline, job.job)
        self.live.remove(job)
        job.close()

    @precondition(lambda self: any(job.attached for job in self.live))
    @rule()
    def the_device_recovers(self) -> None:
        """Every job with files comes to its end, and those without have their blocks still to write."""
        self.table.release()
        for job in [job for job in self.live if job.attached]:
            self.end(job)
            self.live.remove(job)

    @invariant()
    def jobs_without_files_leave_a_slot(self) -> None:
        if hasattr(self, "live"):
            staged = sum(job.count(BlockState.STAGED) for job in self.live if not job.attached)
            assert staged < self.slot_count


TestShared = Shared.TestCase
TestShared.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
