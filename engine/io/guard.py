"""Guard: what watches the writers of an arena while a save reads it.

Theory of operation.  A `Guard` is a range of memory that native code write-protects when a save begins, and releases
block by block as the save stages it (`native/guarding/guard.c` says how).  There are two kinds, best first:

    cow      a writer waits until what it writes to is staged: userfaultfd(2) with a thread of ours that answers
    detect   a writer goes on, and the save fails if it was too early: userfaultfd(2) and PAGEMAP_SCAN, no privilege

Rules: a guard is for one job at a time.  The memory outlives the guard.  A forked child has no guard: what it inherits
of the memory is its own copy.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Literal, get_args

from engine.errors import PlatformError
from engine.io.binding import ffi, lib
from engine.io.host import named
from engine.io.job import Job
from engine.io.pipeline import Refused

Kind = Literal["cow", "detect"]

KINDS: tuple[Kind, ...] = get_args(Kind)

_NATIVE_KINDS: dict[Kind, int] = {"cow": lib.ENG_GUARD_COW, "detect": lib.ENG_GUARD_DETECT}


class GuardError(Exception):
    """The kernel refused a guard: which step, and the errno."""

    def __init__(self, refused: Refused, errno: int) -> None:
        super().__init__(f"{refused.name}: {os.strerror(errno)}")
        self.refused = refused
        self.errno = errno


class NotArmed(PlatformError):
    """A guard that was opened could not begin to watch."""


class Guard:
    """Watches a range of anonymous private memory.

    Args:
        kind: how.
        address, nbytes: multiples of the page size.

    Raises:
        GuardError: the kernel refuses this kind here.
    """

    def __init__(self, kind: Kind, address: int, nbytes: int) -> None:
        self.kind = kind
        self._pid = os.getpid()
        self._armed: tuple[object, Job] | None = None
        self._cell = ffi.new("eng_guard **")
        self._close = weakref.finalize(self, lib.eng_guard_free, self._cell)
        self._close.atexit = False  # saves in flight are still drained then; the kernel ends it with the process
        refused = ffi.new("uint32_t *")
        result = lib.eng_guard_open(_NATIVE_KINDS[kind], address, nbytes, refused, self._cell)
        if result < 0:
            raise GuardError(Refused(refused[0]), -result)

    @property
    def c_guard(self) -> Any:
        """The native guard, for a job."""
        return self._cell[0]

    def arm(self, job: Job, plan: object) -> None:
        """Begin to watch for a job that is submitted next.  Does not block; the job's end lets all writers go on.

        Args:
            job: made with `c_guard`, and with the result of `previous`.
            plan: what the job's extents and blocks are of.

        Raises:
            NotArmed: another job is armed, there is no memory, or the kernel refused to protect this memory.
        """
        self._armed = None
        result = lib.eng_guard_arm(job.c_job)
        if result < 0:
            cause = f"the guard {self.kind!r} could not be armed ({named(-result)})"
            raise NotArmed(cause, "save again, or use guard='fence'")
        self._armed = (plan, job)

    def disarm(self, job: Job) -> None:
        """Let all writers go on: an armed job will not be submitted."""
        lib.eng_guard_disarm(job.c_job)

    def previous(self, plan: object) -> bytes | None:
        """The checksums of the job that was armed last, if it was of the same plan; they are for the next job."""
        if self._armed is None or self._armed[0] is not plan:
            return None
        return b"".join(self._armed[1].checksums())

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that opened the guard."""
        return os.getpid() != self._pid

    def close(self) -> None:
        """Let all writers go on, and stop watching.  No armed job is left."""
        self._close()
