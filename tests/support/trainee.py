"""The trainee: a training process to be killed, and the server that forks one for each of its lives.

    python tests/support/trainee.py        reads requests and writes answers, each a line of JSON

Theory of operation.  A life opens an Engine, verifies every step, restores the newest, and trains on with a lazy save
of every step until it is killed or reaches its end.  It logs events, one append each, which a kill cannot take back.
It logs a report of `result()` only after that has returned.  `kills` reads the log.

A `Life` says where a life ends.  "open" and "save" count the operations on the `Filesystem` during the open, or on the
thread that commits one save.  Number 2n ends the life before operation n and 2n + 1 after it; "before" a new file
means with half of it written.  "write" ends the life when a given part of a save's bytes is written.  In all these the
process kills itself.  At "time" the server kills it, a number of seconds after the fork.

So that the operations are the same each time, a life waits for its first saves one by one.  They leave spares that
were whole checkpoints, and the next save takes one.  With company, the save of the next step is in flight then: the
counted save commits once that one has come to C1 as well, where it waits until the counted save has ended.

Importing torch takes longer than a life, so the server imports everything that a training needs.  It has no threads and
no Engine when it forks, so the fork is as good as a fresh process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import engine
from engine.io.descriptor import Descriptor
from engine.store.filesystem import Filesystem

MAX_ASYNC = 2

# Some hundred blocks in a save, and as few slots as can be, so that writing them takes a while.
ENGINE_OPTIONS: Mapping[str, Any] = {"max_async": MAX_ASYNC, "block_bytes": 8 << 10, "staging_bytes": 16 << 10}

# 1.6 MB with AdamW's two moments, and 64 kB that no optimizer trains.
_INPUTS, _HIDDEN, _BATCH = 128, 512, 8

# After so many steps the frozen layer changes.
_FROZEN_STEPS = 5

# Ends a life that hangs; none takes a hundredth of it.
_HANG_S = 60.0


@dataclass(frozen=True)
class Life:
    """The task of one process.

    Attributes:
        directory: of the engine; empty for a training without one.
        log: the file to append events to.
        step_count: how many steps to train at most.
        backend, keep: the engine's.
        where: "open", "save", "write", "time", or empty: it comes to its end.
        at: a number of an operation, a part, or seconds; see above.
        settled_count: how many saves it waits for one by one.
        company: whether another save is in flight.
        split: whether untrained tensors have files of their own.
    """

    directory: str
    log: str
    step_count: int
    backend: str = "auto"
    keep: int = 1
    where: str = ""
    at: float = 0
    settled_count: int = 0
    company: bool = False
    split: bool = False


class Log:
    """Events, each one append to a file: a kill leaves it whole up to the last, or without it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __call__(self, event: str, **fields: Any) -> None:
        os.write(self._descriptor, json.dumps({"event": event, **fields}).encode() + b"\n")


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the names and bytes of all tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode() + tensor.numpy().tobytes())
    return sha256.hexdigest()


class Training:
    """A model whose every step depends on all earlier ones, dropout's random numbers and running means included.

    Its first layer is frozen, and changes every few steps by other hands than the optimizer's.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._frozen = nn.Linear(_INPUTS, _INPUTS).requires_grad_(False)
        self._model = nn.Sequential(
            self._frozen,
            nn.Linear(_INPUTS, _HIDDEN),
            nn.BatchNorm1d(_HIDDEN),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(_HIDDEN, _INPUTS),
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self.arena = engine.Arena.adopt(self._model, self._optimizer)

    def step(self, number: int) -> None:
        """One step of training on the data of this number."""
        if number % _FROZEN_STEPS == 0:
            self._frozen.weight[number % _INPUTS].add_(0.01)
        data = torch.randn(_BATCH, _INPUTS, generator=torch.Generator().manual_seed(number))
        self._optimizer.zero_grad()
        loss: torch.Tensor = (self._model(data) - data).square().mean()
        loss.backward()
        self._optimizer.step()

    def digest(self) -> str:
        """The required content of a checkpoint of this moment."""
        return digest(self.arena.state_dict())


class _Thread(threading.local):
    """The progress of the engine on this thread: in the opening, or in the save of a step."""

    step: int | None = None
    line = ""
    count = 0


class DeadlyFilesystem(Filesystem):
    """The real one, which logs its operations, and ends the process at the chosen one."""

    def __init__(self, life: Life, log: Log) -> None:
        self._life = life
        self._log = log
        self._thread = _Thread()
        self._target: int | None = None
        self._waiting: int | None = None
        self._arrived, self._released = threading.Event(), threading.Event()

    def aim(self, step: int, waiting: int | None) -> None:
        """From now on: the step of the counted save, and that of the one in its company."""
        self._target, self._waiting = step, waiting

    def release(self) -> None:
        """The save that is counted has ended."""
        self._released.set()

    def die(self, **where: Any) -> NoReturn:
        """Be killed here and now."""
        self._log("dying", **where)
        os.kill(os.getpid(), signal.SIGKILL)
        while True:
            signal.pause()

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
        if is_worker() and name.endswith(".partial") and operation in ("make_directory", "rename"):
            thread.step, thread.count = int(name.removeprefix("step-").removesuffix(".partial")), 0
        thread.line = line = (_line_of_save if is_worker() else _line_of_open)(operation, name, thread.line)
        if line == "C1" and thread.step is not None and thread.step == self._waiting:
            self._arrived.set()
            assert self._released.wait(_HANG_S), "nobody released the save that waits"
        if line == "C1" and thread.step == self._target and self._waiting is not None:
            assert self._arrived.wait(_HANG_S), "the company never came"
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
        where, step = ("save", self._target) if is_worker() else ("open", None)
        return self._life.where == where and self._life.at == number and self._thread.step == step


def is_worker() -> bool:
    """Whether this is a commit thread."""
    return threading.current_thread().name.startswith("engine-commit")


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


class _Trainee:
    """One life."""

    def __init__(self, life: Life, log: Log) -> None:
        self._life = life
        self._log = log
        self._filesystem = DeadlyFilesystem(life, log)
        self._training = Training()
        self._saves: deque[tuple[engine.Save, str]] = deque()

    def live(self) -> None:
        """From the opening to the end, unless it is killed."""
        life = self._life
        with engine.Engine(
            life.directory,
            keep=life.keep,
            backend=life.backend,  # type: ignore[arg-type]
            filesystem=self._filesystem,
            split_untrained=life.split,
            **ENGINE_OPTIONS,
        ) as eng:
            spares = os.listdir(Path(life.directory, ".engine/spare"))
            self._log("opened", steps=eng.steps(), spare_count=len(spares), names=os.listdir(life.directory))
            for step in eng.steps():
                self._log("loaded", step=step, digest=digest(eng.load(step)))
            first = self._resume(eng)
            unsettled = first + life.settled_count
            self._filesystem.aim(unsettled, unsettled + 1 if life.company else None)
            for step in range(first, first + life.step_count):
                self._step(eng, step, wait=step < unsettled)
                if step == unsettled:
                    self._target = self._saves[-1][0]
                if step == unsettled + life.company:
                    self._attend(self._target)
                while self._saves and self._saves[0][0].done():
                    self._report()
            while self._saves:
                self._report()
        self._log("closed")

    def _resume(self, eng: engine.Engine) -> int:
        """Restore the newest step, if there is one; returns the next step."""
        if not eng.steps():
            return 1
        restored = eng.restore(self._training.arena)
        torch.set_rng_state(restored.extra["rng"])
        passed_over = [found.reason for found in restored.passed_over]
        self._log("restored", step=restored.step, digest=self._training.digest(), passed_over=passed_over)
        return restored.step + 1

    def _step(self, eng: engine.Engine, step: int, wait: bool) -> None:
        self._training.step(step)
        state = self._training.digest()
        self._log("began", step=step)
        save = eng.checkpoint(self._training.arena, step, extra={"rng": torch.get_rng_state()})
        self._saves.append((save, state))
        if wait:
            save.result(_HANG_S)

    def _attend(self, target: engine.Save) -> None:
        """See the counted save to where its life ends, if it ends there, and let its company go on."""
        if self._life.where == "write":
            self._die_writing(target)
        if self._life.where == "save":
            target.result(_HANG_S)
        self._filesystem.release()

    def _report(self) -> None:
        """Say that the oldest save is durable, once it is."""
        save, state = self._saves.popleft()
        self._log("reported", step=save.result(_HANG_S).step, digest=state)

    def _die_writing(self, save: engine.Save) -> None:
        nbytes = sum(file.nbytes for file in save.plan.files)
        while (written := _done_bytes(save)) < self._life.at * nbytes:
            os.sched_yield()  # the commit thread needs the interpreter's lock
        self._filesystem.die(line="W", step=save.step, written=written, nbytes=nbytes)


def _done_bytes(save: engine.Save) -> int:
    """How much of a save is written, or need not be."""
    stats = save.stats()
    return stats["io_bytes"] + stats["skipped_bytes"]


def live(life: Life) -> None:
    """Live one life, in its own process."""
    torch.set_num_threads(1)  # so that sums are formed in one order
    log = Log(life.log)
    log("started")
    if life.directory:
        _Trainee(life, log).live()
        return
    training = Training()
    for step in range(1, life.step_count + 1):
        training.step(step)
        log("reported", step=step, digest=training.digest())


def _fork(life: Life) -> int:
    """A process that lives this life; its pid."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        live(life)
        status = 0
    except BaseException:
        Log(life.log)("failed", what=traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    """Fork a life for each request, wait for its end, and report its status (-9 for a kill) and its seconds.

    A life that hangs is killed as well, and reported as such.
    """
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"Retention\(.*keeps fewer")  # lives of one directory differ in `keep`
    warnings.filterwarnings("ignore", "the kernel did not register")  # an ordinary user's memlock limit
    logging.getLogger("engine").addHandler(logging.StreamHandler())  # pytest shows the engine's log
    Training()  # torch imports a thousand modules late
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    for request in sys.stdin:
        life = Life(**json.loads(request))
        began = time.monotonic()
        child = _fork(life)
        ended = os.pidfd_open(child)
        in_time = bool(select.select([ended], [], [], life.at if life.where == "time" else _HANG_S)[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        hung = not in_time and life.where != "time"
        answer = {"status": status, "hung": hung, "seconds": time.monotonic() - began}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
