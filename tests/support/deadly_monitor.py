"""A monitor that kills its trainer, itself, or both, at one operation; `monitored_lives` starts it.


Theory of operation.  It is the real server with the file system of `deadly`.  Its life comes in the environment.  The
main thread opens the directory; every other thread saves.  With no company, all threads that save count together, so
that the retirement after a save, which is a request of its own, is counted with it.  The save that counts is the one
after those that the trainer waits for.  A life has one kill: a file beside its log says that it has had it.

Rules: no torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from deadly import DeadlyFilesystem, Life, Log, Progress, kill_and_wait, kill_myself

from engine.monitor.server import main
from engine.store.filesystem import Filesystem

# The life as JSON, and the trainer's process.
LIFE, TRAINER = "ENGINE_TEST_LIFE", "ENGINE_TEST_TRAINER"


class MonitorFilesystem(DeadlyFilesystem):
    """Ends the life's victim."""

    def __init__(self, life: Life, log: Log) -> None:
        super().__init__(life, log)
        self._begun: set[str] = set()
        if not life.company:
            self._thread = Progress()

    def is_saving(self) -> bool:
        """Whether this is not the thread that opens and closes."""
        return threading.current_thread() is not threading.main_thread()

    def make_directory(self, path: str) -> None:
        self._count(path)
        super().make_directory(path)

    def rename(self, source: str, target: str) -> None:
        self._count(target)
        super().rename(source, target)

    def _is_here(self, number: int) -> bool:
        return not os.path.exists(_mark(self._life)) and super()._is_here(number)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        """Whole, where this process goes on: half of a file is what a monitor's own death may leave."""
        if self._life.victim != "trainer":
            return super().write_new_file(path, content)
        with self._operation("write_new_file", path):
            Filesystem.write_new_file(self, path, content)

    def die(self, **where: Any) -> None:
        """End the victim.  If that is the trainer, go on."""
        if not first_death(self._life):
            return
        self._log("dying", **where)
        if self._life.victim in ("trainer", "both"):
            kill_and_wait(int(os.environ[TRAINER]))
        if self._life.victim in ("monitor", "both"):
            kill_myself()

    def _count(self, path: str) -> None:
        """Aim at the save after those that are waited for."""
        if path.endswith(".partial") and self.is_saving() and path not in self._begun:
            self._begun.add(path)
            if len(self._begun) == self._life.settled_count + 1:
                self.aim(int(os.path.basename(path).removeprefix("step-").removesuffix(".partial")), None)


def first_death(life: Life) -> bool:
    """Whether this life has had no kill yet; it has one now."""
    try:
        os.close(os.open(_mark(life), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _mark(life: Life) -> str:
    return life.log + ".killed"


def run(descriptor: int) -> None:
    """Be a monitor."""
    life = Life(**json.loads(os.environ[LIFE]))
    log = Log(life.log)
    log("monitor", pid=os.getpid())
    main(descriptor, MonitorFilesystem(life, log))


if __name__ == "__main__":
    run(int(sys.argv[1]))
