"""What a life that is to be killed needs and its monitor has too: its task, its log, and a file system that kills.

Rules: no torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.io.descriptor import Descriptor
from engine.store.filesystem import Filesystem

# Ends a life that hangs; none takes a hundredth of it.
HANG_S = 60.0


@dataclass(frozen=True)
class Life:
    """The task of one process.

    Attributes:
        directory: of the engine; empty for a training without one.
        log: the file to append events to.
        step_count: how many steps to train at most.
        backend, keep: the engine's.
        where: "open", "save", "write", "time", "call", or empty: it comes to its end.
        at: a number of an operation or a system call, a part, or seconds; see above.
        call: the system calls that are counted, as strace(1) names them.
        settled_count: how many saves it waits for one by one.
        company: whether another save is in flight.
        split: whether untrained tensors have files of their own.
        victim: the engine has a monitor, and this is killed: "trainer", "monitor" or "both".
        hurry: the next life begins before the monitor of this one has ended.
    """

    directory: str
    log: str
    step_count: int
    backend: str = "auto"
    keep: int = 1
    where: str = ""
    at: float = 0
    call: str = ""
    settled_count: int = 0
    company: bool = False
    split: bool = False
    victim: str = ""
    hurry: bool = False


class Log:
    """Events, each one append to a file: a kill leaves it whole up to the last, or without it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __call__(self, event: str, **fields: Any) -> None:
        os.write(self._descriptor, json.dumps({"event": event, **fields}).encode() + b"\n")


def kill_myself() -> NoReturn:
    """Does not return, although kill(2) may before the signal has ended this thread."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


def kill_and_wait(pid: int) -> None:
    """Kill another process, and wait until it has ended; nothing if it has."""
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        select.select([ended], [], [])
    except ProcessLookupError:
        return
    finally:
        os.close(ended)


class Progress:
    """The progress of the engine: in the opening, or in the save of a step."""

    step: int | None = None
    line = ""
    count = 0


class _Thread(threading.local, Progress):
    """That of each thread."""


class DeadlyFilesystem(Filesystem):
    """The real one, which logs its operations, and ends the process at the chosen one."""

    def __init__(self, life: Life, log: Log) -> None:
        self._life = life
        self._log = log
        self._thread: Progress = _Thread()
        self._target: int | None = None
        self._waiting: int | None = None
        self._arrived, self._released = threading.Event(), threading.Event()

    def aim(self, step: int, waiting: int | None) -> None:
        """From now on: the step of the counted save, and that of the one in its company."""
        self._target, self._waiting = step, waiting

    def release(self) -> None:
        """The save that is counted has ended."""
        self._released.set()

    def is_saving(self) -> bool:
        """Whether this is a thread that commits."""
        return threading.current_thread().name.startswith("engine-commit")

    def die(self, **where: Any) -> None:
        """Be killed here and now."""
        self._log("dying", **where)
        kill_myself()

    def make_directory(self, path: str) -> None:
        with self._operation("make_directory", path):
            super().make_directory(path)

    def rename(self, source: str, target: str) -> None:
        with self._operation("rename", target):
            super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        with self._operation("link", target):
            super().link(source, target)

    def write_range(self, descriptor: Descriptor, offset: int, content: bytes, path: str) -> None:
        with self._operation("write_range", path):
            super().write_range(descriptor, offset, content, path)

    def unlink(self, path: str) -> None:
        with self._operation("unlink", path):
            super().unlink(path)

    def remove_directory(self, path: str) -> None:
        with self._operation("remove_directory", path):
            super().remove_directory(path)

    def sync_directory(self, path: str) -> None:
        with self._operation("sync_directory", path):
            super().sync_directory(path)

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        if not write:
            return super().open_for_blocks(path, write, direct, directory)
        with self._operation("open_for_blocks", path):
            return super().open_for_blocks(path, write, direct, directory)

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        with self._operation("allocate", path):
            super().allocate(descriptor, nbytes, path)

    def truncate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        with self._operation("truncate", path):
            super().truncate(descriptor, nbytes, path)

    def sync_file(self, descriptor: Descriptor, path: str) -> None:
        with self._operation("sync_file", path):
            super().sync_file(descriptor, path)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        with self._operation("write_new_file", path, bytes(content)):
            super().write_new_file(path, content)

    @contextmanager
    def _operation(self, operation: str, path: str, content: bytes = b"") -> Iterator[None]:
        """Around an operation: log it, hold it up, die before or after it."""
        thread = self._thread
        name = os.path.relpath(path, self._life.directory)
        saves = self.is_saving()
        if saves and name.endswith(".partial") and operation in ("make_directory", "rename"):
            thread.step, thread.count = int(name.removeprefix("step-").removesuffix(".partial")), 0
        thread.line = line = (_line_of_save if saves else _line_of_open)(operation, name, thread.line)
        if line == "C1" and thread.step is not None and thread.step == self._waiting:
            self._arrived.set()
            assert self._released.wait(HANG_S), "nobody released the save that waits"
        if line == "C1" and thread.step == self._target and self._waiting is not None:
            assert self._arrived.wait(HANG_S), "the company never came"
        number, thread.count = 2 * thread.count, thread.count + 1
        fields = {"line": line, "operation": operation, "path": name, "step": thread.step, "number": number}
        if self._is_here(number):
            if content:
                super().write_new_file(path, content[: len(content) // 2])
            self.die(edge="before", **fields)
        self._log("asked", **fields)
        yield
        self._log("did", **fields)
        if self._is_here(number + 1):
            self.die(edge="after", **fields)

    def _is_here(self, number: int) -> bool:
        where, step = ("save", self._target) if self.is_saving() else ("open", None)
        return self._life.where == where and self._life.at == number and self._thread.step == step


def _line_of_open(operation: str, name: str, before: str) -> str:
    """Which line of docs/durability.md an operation of an opening is, after one of line `before`."""
    if operation == "make_directory":
        return "O1"
    if "retention.json" in name or (before == "O9" and name == ".engine"):
        return "O9"
    if operation == "rename":
        return "O4"
    if operation != "sync_directory":
        return "O7"
    if name.startswith(".engine/spare/"):
        return "O6"
    # Each directory that O1 has made is synced in its parent at once; O3 begins with the parent of the root.
    following = {"": "O3", "O1": "O1 fsync", "O1 fsync": "O3", "O4": "O5"}
    return following.get(before, before)


def _line_of_save(operation: str, name: str, before: str) -> str:
    """Which line of docs/durability.md an operation of a save is, after one of line `before`."""
    always = {"open_for_blocks": "B3", "allocate": "B3", "truncate": "C1", "write_new_file": "C3"}
    always |= {"link": "B2a", "write_range": "L1"}
    if operation in always:
        return always[operation]
    if operation == "sync_file":
        return "C3" if name.endswith("manifest.json") else "C2"
    is_partial, is_spare = ".partial" in name, name.startswith(".engine")
    if is_partial and before in ("B3", "L1") and operation in ("rename", "unlink"):
        return "L1"
    if operation == "rename":
        return "B2" if is_partial else "R1" if is_spare else "C6"
    if operation == "sync_directory":
        return "C4" if is_partial else "C5" if before == "C4" else "C7" if before == "C6" else "R2"
    if operation == "make_directory":
        return "B1"
    if operation == "remove_directory" and before == "C7":
        return "C8"
    return "B2" if is_partial or before in ("B1", "B2") else "R3"
