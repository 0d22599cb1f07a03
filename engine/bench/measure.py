"""Rounds of saves and loads: every subject takes a turn in each, and every turn is timed in the same way.

Theory of operation.  Before a turn the file system is synced, so that no subject waits for writes of another, and
Python's garbage is collected.  The caller's clock times a turn: when the call returned, when the state could change,
when it was durable.  CPU time is of this process with all its threads, and of its children, by their own clocks.  The
work of kernel threads for a buffered writer is counted for no subject.  A generator with a fixed seed shuffles the
order within a round.  A subject that raises is out of the remaining rounds, and its row gives the reason.

posix_fadvise makes a cold page cache, file by file.  `read_bytes` of a load shows whether it was cold.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from engine.bench.record import Record, Sample, Subject
from engine.bench.savers import Saver
from engine.bench.states import State

REASON_MAX = 160  # characters of an error, so that a row stays one line
CLOCK_SCHEDULED = 2  # CPUCLOCK_SCHED in linux/posix-timers.h: nanoseconds on a CPU
PATHS = re.compile(r"(?<![\w.])/(?:[\w.-]+/)+")  # absolute: those of one machine, which say nothing on another

_libc = ctypes.CDLL(None, use_errno=True)

Turn = Callable[[], Mapping[str, float]]
KINDS = {
    "limit": "limit",
    "load": "load",
    "part": "load",
    "guards": "guard",
}  # of the subjects of a section; of all others "save"
Name = TypeVar("Name")


class _Over(Exception):
    """A turn has been taken as often as it should be."""


class Rounds:
    """The common state of a run: the record of its samples, the order of turns, and the subjects that are out."""

    def __init__(self, record: Record, directory: Path, only: Iterable[str] | None = None) -> None:
        self.record = record
        self.directory = directory
        self._only = None if only is None else set(only)
        self._order = random.Random(1)  # any seed will do, as long as it is the same in each run

    def wanted(self, name: str) -> bool:
        """Whether this subject takes part."""
        return self._only is None or name in self._only

    def shuffled(self, names: Iterable[Name]) -> list[Name]:
        """The order of turns in the next round."""
        order = list(names)
        self._order.shuffle(order)
        return order

    def introduce(self, name: str, kind: str, how: str) -> None:
        """Add a row for a subject, measured or not."""
        if not any(subject.name == name and subject.kind == kind for subject in self.record.subjects):
            self.record.subjects.append(Subject(name, kind, how))

    def refuse(self, name: str, kind: str, error: BaseException) -> None:
        """A subject is out, because of this: its row says so, or a note if it has samples already."""
        # A process that failed sends its whole traceback, and the last line names the error.
        text = (str(error).replace(str(self.directory), "DIR").strip().splitlines() or [""])[-1]
        reason = f"{type(error).__name__}: {PATHS.sub('', text)}"[:REASON_MAX]
        for subject in self.record.subjects:
            if (subject.name, subject.kind) != (name, kind):
                continue
            if any(sample.subject == name for sample in self.record.samples):
                self.record.notes.append(f"{name} failed later: {reason}")
            elif subject.unavailable is None:
                subject.unavailable = reason

    def run(
        self,
        section: str,
        turns: Mapping[tuple[str, str], Turn],
        state: tuple[int, int],
        numbers: range,
        *,
        seconds: float,
    ) -> set[tuple[str, str]]:
        """Let every subject take a turn in each of these rounds; only in the first one, once `seconds` are over.

        Args:
            turns: by name of the subject and setting.
            state: bytes and number of tensors.

        Returns:
            the subjects that are out.
        """
        remaining = dict(turns)
        self.run_together({section: remaining}, state, numbers, seconds=seconds)
        return set(turns) - set(remaining)

    def run_together(
        self,
        sections: Mapping[str, dict[tuple[str, str], Turn]],
        state: tuple[int, int],
        numbers: range,
        *,
        seconds: float,
    ) -> None:
        """The same with several sections in one order, so that whatever the host does falls on all of them alike; those
        who raise, and those whose turns are over, are taken out of their section."""
        end = time.monotonic() + seconds
        for number in numbers:
            if number != numbers[0] and time.monotonic() > end:
                break
            for section, key in self.shuffled([(section, key) for section, turns in sections.items() for key in turns]):
                settle(self.directory)
                try:
                    measured = sections[section][key]()
                except _Over:
                    del sections[section][key]
                    continue
                except Exception as error:  # a peer may raise anything
                    self.refuse(key[0], KINDS.get(section, "save"), error)
                    del sections[section][key]
                    continue
                self.record.samples.append(Sample(section, key[0], *state, key[1], number, dict(measured)))

    def open_savers(self, savers: Iterable[type[Saver]], state: State, warm_up: int) -> dict[str, Saver]:
        """Make savers, and let each save once, if at all; ours so often that the next save recycles files."""
        opened = {}
        for kind in savers:
            if not self.wanted(kind.name):
                continue
            self.introduce(kind.name, "save", kind.how)
            directory = self.directory / kind.name.replace(" ", "-")
            try:
                saver = kind(directory, state)
                for _ in range(warm_up if kind.adopts else min(warm_up, 1)):
                    timed_save(saver)
                opened[kind.name] = saver
            except Exception as error:  # a peer may raise anything
                self.refuse(kind.name, "save", error)
        return opened


def few(turn: Turn, count: int) -> Turn:
    """A turn that is only taken in the first `count` rounds."""
    remaining = iter(range(count))

    def limited() -> Mapping[str, float]:
        if next(remaining, None) is None:
            raise _Over
        return turn()

    return limited


def settle(directory: Path) -> None:
    """Flush all pending writes, and leave no work for the garbage collector."""
    gc.collect()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if _libc.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(descriptor)


def timed_save(saver: Saver) -> dict[str, float]:
    """One save of a state that has changed, its times in seconds; then the oldest is deleted."""
    step = saver.steps[-1] + 1 if saver.steps else 1
    saver.path(step)
    saver.state.change()
    cpu_ns, began_ns = cpu_time_ns(), time.perf_counter_ns()
    pending = saver.save(step)
    held_ns = time.perf_counter_ns()
    pending.wait_staged()
    staged_ns = time.perf_counter_ns()
    pending.wait_durable()
    durable_ns = time.perf_counter_ns()
    cpu_ns = cpu_time_ns() - cpu_ns
    saver.tidy()
    return {
        "held_s": (held_ns - began_ns) / 1e9,
        "staged_s": (staged_ns - began_ns) / 1e9,
        "durable_s": (durable_ns - began_ns) / 1e9,
        "cpu_s": cpu_ns / 1e9,
        **{f"stats.{name}": value for name, value in pending.stats().items()},
    }


def timed_load(load: Callable[[], object], files: Iterable[Path]) -> dict[str, float]:
    """One load from files that are not in the page cache."""
    for path in files:
        forget(path)
    gc.collect()
    cpu_ns, read_bytes = cpu_time_ns(), read_from_device()
    began_ns = time.perf_counter_ns()
    result = load()
    ready_ns = time.perf_counter_ns() - began_ns
    measured = {
        "ready_s": ready_ns / 1e9,
        "cpu_s": (cpu_time_ns() - cpu_ns) / 1e9,
        "read_bytes": read_from_device() - read_bytes,
    }
    del result  # not before: to give memory back is not a part of loading
    return measured


def forget(path: Path) -> None:
    """Drop a file, which must be clean, from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cpu_time_ns() -> int:
    """CPU time of this process, of its children that have ended, and of those that live."""
    ended = os.times()
    total = time.process_time_ns() + int((ended.children_user + ended.children_system) * 1e9)
    for process in descendants():
        try:
            total += time.clock_gettime_ns((~process << 3) | CLOCK_SCHEDULED)
        except OSError:
            continue  # it has just ended, and will be counted with those
    return total


def descendants() -> list[int]:
    """The processes below this one."""
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for children in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                below = [int(word) for word in children.read_text(encoding="ascii").split()]
            except OSError:
                continue  # it has just ended
            found += below
            waiting += below
    return found


def read_from_device() -> int:
    """Bytes that this process has caused to be read from storage."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("/proc/self/io has no line read_bytes")
