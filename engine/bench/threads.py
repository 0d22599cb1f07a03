"""Staging threads: saves and restores with one, two and more of them, where no device is the limit.

Theory of operation.  A drive would hide what a second thread gives, so there is none here:

    null      the pipeline alone writes to /dev/null, through the engine's own way of moving blocks.  What is left is
              copying, hashing, handing blocks over, and the calls into the kernel.
    copy      as many bare threads copy as much memory, a share each.  More than their gain the host does not give.
    tmpfs     whole saves and restores in /dev/shm, where a copy by the kernel takes the place of the drive.  That copy
              needs a core as well, so there is no goal for it.

Every number of threads that the host has cores for takes its turn in each round.  ``copying_s`` is the time that all
threads together spent copying and hashing, and ``cpu_s`` all CPU time: what the blocks cost, wherever they were staged.

The pipeline is no part of the public API; only below it is there a device that takes no time.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engine
from engine.bench.goals import BLOCK_BYTES, COPY, NULL, OURS, TMPFS_RESTORE, TMPFS_SAVE
from engine.bench.limits import huge_pages
from engine.bench.measure import Rounds, Turn, timed_load, timed_save
from engine.bench.savers import STAGING_BYTES, Ours
from engine.bench.states import State, make_state
from engine.format.plan import Source
from engine.io.job import Direction, Job, Milestone
from engine.io.packing import pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Pipeline
from engine.options import Backend

TMPFS = Path("/dev/shm")
TMPFS_SHARES = 4  # of the state: two checkpoints, the one being written, and a margin
COUNTS = (1, 2, 4, 8, 16)
WARM_UP = 3  # saves: the next one recycles files
MEMCPY = "memcpy"


class OursThreads(Ours):
    """The engine with a number of staging threads."""

    def __init__(self, directory: Path, state: State, count: int) -> None:
        self._count = count
        super().__init__(directory, state)

    def engine_options(self, state: State) -> Mapping[str, Any]:
        return {"staging_threads": self._count}


def measure(rounds: Rounds, nbytes: int, count: int, seconds: float) -> None:
    """So many rounds of every number of threads; of whole saves and restores only if tmpfs has room for them."""
    rounds.introduce(MEMCPY, "limit", "memcpy(3) in as many threads as stage")
    counts = [each for each in COUNTS if each <= len(os.sched_getaffinity(0))]
    with ExitStack() as stack:
        turns = _null_turns(rounds, stack, nbytes, counts)
        if TMPFS.is_dir() and shutil.disk_usage(TMPFS).free > TMPFS_SHARES * nbytes:
            turns |= _tmpfs_turns(stack, nbytes, counts)
        else:
            rounds.record.notes.append(f"{TMPFS} has no room for saves with several staging threads")
        rounds.run("threads", turns, (nbytes, 1), range(count), seconds=seconds)


def _null_turns(rounds: Rounds, stack: ExitStack, nbytes: int, counts: list[int]) -> dict[tuple[str, str], Turn]:
    backend = engine.probe(rounds.directory).backend
    assert backend is not None
    source, target = huge_pages(nbytes), huge_pages(STAGING_BYTES)
    null = os.open("/dev/null", os.O_WRONLY)
    stack.callback(os.close, null)
    turns: dict[tuple[str, str], Turn] = {}
    for count in counts:
        pipeline = _open(backend, count)
        stack.callback(pipeline.close)
        turns[OURS, f"{NULL}, {count}"] = _null_turn(pipeline, source, null)
        turns[MEMCPY, f"{COPY}, {count}"] = _copy_turn(source, target, count)
    return turns


def _open(backend: Backend, count: int) -> Pipeline:
    return Pipeline(STAGING_BYTES // BLOCK_BYTES, BLOCK_BYTES, backend, count)


def _null_turn(pipeline: Pipeline, source: ctypes.Array[ctypes.c_char], null: int) -> Turn:
    nbytes = len(source)
    offsets = range(0, nbytes, BLOCK_BYTES)
    sizes = [min(BLOCK_BYTES, nbytes - offset) for offset in offsets]
    blocks = [(offset, size, 0, index, 1) for index, (offset, size) in enumerate(zip(offsets, sizes, strict=True))]
    packed = (
        pack_sources([Source(ctypes.addressof(source), nbytes)]),
        pack_extents([*offsets], [0] * len(sizes), sizes, [0] * len(sizes)),
        pack_blocks(blocks),
        pack_order([*range(len(sizes))]),
    )

    def turn() -> Mapping[str, float]:
        job = Job(Direction.WRITE, *packed, file_count=1, owners=source)
        cpu_ns, began_ns = time.process_time_ns(), time.perf_counter_ns()
        pipeline.submit(job)
        pipeline.attach(job, [null])
        pipeline.wait(job, Milestone.DONE)
        taken_ns, cpu_ns = time.perf_counter_ns() - began_ns, time.process_time_ns() - cpu_ns
        if job.failure is not None:
            raise OSError(f"a job that writes to /dev/null failed: {job.failure}")
        return {"seconds_s": taken_ns / 1e9, "copying_s": job.counters["copying_ns"] / 1e9, "cpu_s": cpu_ns / 1e9}

    turn()
    return turn


def _copy_turn(source: ctypes.Array[ctypes.c_char], target: ctypes.Array[ctypes.c_char], count: int) -> Turn:
    """Blocks of the source, copied to slots by turns, as a pipeline does."""
    offsets, slots = range(0, len(source) - BLOCK_BYTES, BLOCK_BYTES), len(target) // BLOCK_BYTES

    def copy(first: int) -> None:
        start, end = ctypes.addressof(source), ctypes.addressof(target)
        for index in range(first, len(offsets), count):
            ctypes.memmove(end + index % slots * BLOCK_BYTES, start + offsets[index], BLOCK_BYTES)

    def turn() -> Mapping[str, float]:
        threads = [threading.Thread(target=copy, args=(first,)) for first in range(count)]
        began_ns = time.perf_counter_ns()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"seconds_s": (time.perf_counter_ns() - began_ns) / 1e9}

    return turn


def _tmpfs_turns(stack: ExitStack, nbytes: int, counts: list[int]) -> dict[tuple[str, str], Turn]:
    turns: dict[tuple[str, str], Turn] = {}
    for count in counts:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS, prefix="bench-")))
        saver = OursThreads(directory, make_state(nbytes, 1, plain=False), count)
        stack.callback(saver.close)
        for _ in range(WARM_UP):
            timed_save(saver)
        turns[OURS, f"{TMPFS_SAVE}, {count}"] = _save_turn(saver)
        turns[OURS, f"{TMPFS_RESTORE}, {count}"] = _restore_turn(saver)
    return turns


def _save_turn(saver: OursThreads) -> Turn:
    def turn() -> Mapping[str, float]:
        measured = timed_save(saver)
        copying_s = measured["stats.copying_ns"] / 1e9
        return {"seconds_s": measured["durable_s"], "copying_s": copying_s, "cpu_s": measured["cpu_s"]}

    return turn


def _restore_turn(saver: OursThreads) -> Turn:
    arena = saver.state.arena
    assert arena is not None

    def turn() -> Mapping[str, float]:
        measured = timed_load(lambda: saver.engine.restore(arena), [])
        return {"seconds_s": measured["ready_s"], "cpu_s": measured["cpu_s"]}

    return turn
