"""Pipeline: one native thread that moves the blocks of jobs.

Theory of operation.  A `Pipeline` is one native thread with one way of moving blocks, an io_uring or threads; a `Job`
is one save or restore handed to it.  The job's arrays live in Python-owned memory that the pipeline reads and writes,
so `_Held` keeps a Job and the owners of its sources alive until the job is done, even if its owner and the Pipeline are
gone.  A Pipeline that is not closed is stopped when it is collected, or at exit.  Every call that waits releases the
GIL and returns to Python every `WAIT_SLICE_NS`, so that Ctrl-C works.

C decides under its mutex whether a pipeline is closed, and whether a job is submitted or was aborted before.  So an
interrupt or another thread can leave nothing half done here.

A forked child has no native thread and no slots: a Pipeline used there raises `ForkedError`, and the child's copies of
the descriptors are closed at the fork (native/pipeline/service.c).
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

from engine.errors import ClosedError, ForkedError
from engine.io.binding import WAIT_SLICE_NS, ffi, lib
from engine.io.job import Job, Milestone
from engine.options import Backend

# As a timeout in ns.
_FOREVER = 2**64 - 1

_CLOSED = "the Engine has been closed; open a new one"

# The native way of each backend.  The last two differ in how files are opened: see `Pipeline.direct`.
_WAYS: dict[Backend, int] = {
    "io_uring": lib.ENG_RING_REGISTERED,
    "io_uring_plain": lib.ENG_RING_PLAIN,
    "threads": lib.ENG_THREADS,
    "buffered": lib.ENG_THREADS,
}


class Refused(IntEnum):
    """What the kernel refused when a pipeline or a guard was opened."""

    RESOURCES = lib.ENG_REFUSED_RESOURCES
    RING = lib.ENG_REFUSED_RING
    BUFFERS = lib.ENG_REFUSED_BUFFERS
    FILES = lib.ENG_REFUSED_FILES
    USERFAULTFD = lib.ENG_REFUSED_USERFAULTFD
    PROTECTION = lib.ENG_REFUSED_PROTECTION
    SCAN = lib.ENG_REFUSED_SCAN
    RANGE = lib.ENG_REFUSED_RANGE


class OpenError(Exception):
    """Opening a pipeline failed with `errno` at the part `refused`; `backend` makes a PlatformError of it."""

    def __init__(self, refused: Refused, error: int) -> None:
        super().__init__(refused, error)
        self.refused = refused
        self.errno = error


class Shared(NamedTuple):
    """What a trainer and its monitor share, as descriptors; see `eng_shared` of engine_native.h."""

    memory: int
    post: int
    wake: int
    peer: int

    def c_shared(self) -> Any:
        """As native code takes it."""
        return ffi.new("eng_shared *", tuple(self))


class _Held:
    """The native pipeline, and all memory that its thread may touch.

    It is in `_running` until the thread has stopped, even if the Pipeline is collected earlier.  The C struct is freed
    with `cell`, so no thread is still in a method of the Pipeline then.
    """

    def __init__(self, io_table: Any) -> None:
        self.cell = ffi.gc(ffi.new("eng_pipeline **"), lib.eng_free)
        self._io_table = io_table
        self._jobs: set[Job] = set()
        _running.add(self)

    def keep(self, job: Job) -> None:
        """Keep a job until it is done.  Drops the kept jobs that are done."""
        for kept in tuple(self._jobs):
            if kept.reached(Milestone.DONE):
                self.drop(kept)
        self._jobs.add(job)

    def drop(self, job: Job) -> None:
        """Let go of a job that the thread never had, or has finished."""
        self._jobs.discard(job)
        job.release()

    def release(self) -> None:
        """Let go of everything, once the thread has stopped."""
        for job in tuple(self._jobs):
            self.drop(job)
        _running.discard(self)


_running: set[_Held] = set()


def _stop(held: _Held) -> None:
    """Stop a Pipeline that is collected, or still open at exit: its jobs are aborted.

    It is one call into C, which Ctrl-C cannot interrupt.  In a forked child it does nothing.
    """
    if held.cell[0]:
        lib.eng_close(held.cell[0], errno.ECANCELED, _FOREVER)
    held.release()


def new_config(slot_count: int, slot_bytes: int, backend: Backend) -> Any:
    """An ``eng_config *`` for a backend."""
    return ffi.new("eng_config *", {"slot_count": slot_count, "slot_bytes": slot_bytes, "way": _WAYS[backend]})


class Pipeline:
    """One native thread, and `slot_count` staging slots of `slot_bytes` each.

    Args:
        slot_count: at least 1.
        slot_bytes: a multiple of `ALIGNMENT`; no block may be larger.
        backend: how blocks are moved; no other is tried.
        staging_threads: threads that copy and hash, the native thread itself among them.
        io_table: a cffi ``eng_io_table *`` that moves them instead; the seam for fault injection.
        shared: a monitor moves them, in the way of `backend`, out of shared memory; writes only.

    Raises:
        OpenError: the kernel refuses the backend, or the memory or descriptors for it.
    """

    def __init__(
        self,
        slot_count: int,
        slot_bytes: int,
        backend: Backend = "io_uring",
        staging_threads: int = 1,
        *,
        io_table: Any = None,
        shared: Shared | None = None,
    ) -> None:
        config = new_config(slot_count, slot_bytes, backend)
        config.staging_threads = staging_threads
        if shared is not None:
            c_shared = shared.c_shared()
            config.way, config.shared = lib.ENG_SHARED, c_shared
        if io_table is not None:
            config.io = io_table
        self._held = _Held(io_table)
        weakref.finalize(self, _stop, self._held)  # before the thread exists: Ctrl-C may come at any line
        result = lib.eng_open(config, self._held.cell)
        if result < 0:
            raise OpenError(Refused(config.refused), -result)
        self.pid = os.getpid()
        self.slot_bytes = slot_bytes
        self.staging_threads = staging_threads
        self.backend = backend

    def submit(self, job: Job) -> None:
        """Queue a job; staging begins at once.  Blocks only while `JOBS_MAX` jobs are in the pipeline.

        A job that was aborted before is not begun: it is done, and its failure is ABORTED.

        Raises:
            ClosedError: `close` was called, perhaps while this waited.
        """
        self.check_owner()
        self._held.keep(job)
        while (result := lib.eng_submit(self._c_pipeline, job.c_job, WAIT_SLICE_NS)) == -errno.EAGAIN:
            self.check_owner()
        if result == -errno.ESHUTDOWN:
            self._held.drop(job)
            raise ClosedError(_CLOSED)
        if result not in (0, -errno.ECANCELED):
            raise RuntimeError(f"eng_submit refused a job: {os.strerror(-result)}")

    def release(self, job: Job, blocks: Sequence[int]) -> None:
        """Let withheld blocks of a submitted job begin, in this order.  Does nothing for a job that has ended.

        Called by one thread at a time for a job.

        Raises:
            OSError: the kernel refused to guard their sources; the caller aborts the job.
        """
        self.check_owner()
        result = lib.eng_release(self._c_pipeline, job.c_job, ffi.new("uint32_t[]", list(blocks)), len(blocks))
        assert result != -errno.EINVAL, "a block was released twice"
        if result not in (0, -errno.ESRCH):
            raise OSError(-result, os.strerror(-result))

    def attach(self, job: Job, descriptors: Sequence[int], known: Sequence[bytes | None] | None = None) -> None:
        """Give a job its files.  Does nothing for a job that has failed.

        Args:
            job: submitted.
            descriptors: its files, open.
            known: for a write, the hash of each block that the file holds already, or None.  A block with that
                hash is not written.

        Raises:
            ClosedError: `close` has ended the job.
        """
        attachment = job.attachment(descriptors, known)
        self.check_owner()
        result = lib.eng_attach(self._c_pipeline, job.c_job, *attachment)
        if result == -errno.ESHUTDOWN:
            raise ClosedError(_CLOSED)
        if result not in (0, -errno.ESRCH):
            raise RuntimeError(f"eng_attach refused a job's files: {os.strerror(-result)}")

    def abort(self, job: Job, error: int) -> None:
        """Fail a job with an errno: its operations in flight are drained, and then it is done.

        A job that was never submitted is done at once, and one that is done already stays as it is.
        """
        self.check_owner()
        lib.eng_abort(self._c_pipeline, job.c_job, error)

    def aborting(self, job: Job, error: int) -> Callable[[], object]:
        """`abort` of a job as one call into C, which Ctrl-C cannot keep from being done.  Not for a forked child."""
        return partial(lib.eng_abort, self._c_pipeline, job.c_job, error)

    def wait(self, job: Job, milestone: Milestone, timeout_ns: int | None = None) -> bool:
        """Block until a milestone is reached, without the GIL.  False if `timeout_ns` passed first.

        Raises:
            ClosedError: the pipeline has been closed, and the job was never submitted.
        """
        left = timeout_ns
        while not job.reached(milestone):
            self.check_owner()
            slice_ns = WAIT_SLICE_NS if left is None else max(0, min(left, WAIT_SLICE_NS))
            result = lib.eng_wait(self._c_pipeline, job.c_job, milestone, slice_ns)
            if result == -errno.ESHUTDOWN:
                raise ClosedError(_CLOSED)
            if left is not None and result == 0:
                left -= slice_ns
                if left <= 0:
                    return False
        if milestone == Milestone.DONE:
            self._held.drop(job)
        return True

    def close(self, timeout_ns: int | None = None) -> bool:
        """Drain every job, also those of other threads, and stop the native thread.  Blocks.

        May be called again, from several threads, and from a signal handler that interrupts it: each call returns when
        the thread has stopped, or False if `timeout_ns` passed first.  After Ctrl-C the pipeline continues to close.
        """
        return self._close(0, timeout_ns)

    def abandon(self) -> None:
        """Abort every job, also one that `close` drains, and stop the native thread.

        Waits for the operations in flight, but for none of a monitor: it may be stopped (SIGSTOP).
        """
        self._close(errno.ECANCELED, None)

    def _close(self, error: int, timeout_ns: int | None) -> bool:
        self.check_owner()
        left = timeout_ns
        while True:
            slice_ns = WAIT_SLICE_NS if left is None else max(0, min(left, WAIT_SLICE_NS))
            if lib.eng_close(self._c_pipeline, error, slice_ns):
                self._held.release()
                return True
            if left is not None:
                left -= slice_ns
                if left <= 0:
                    return False

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that opened the pipeline."""
        return os.getpid() != self.pid

    @property
    def direct(self) -> bool:
        """Whether the files that jobs are given are to be opened with O_DIRECT."""
        return self.backend != "buffered"

    def check_owner(self) -> None:
        """Raise ForkedError in a forked child."""
        if self.is_forked:
            raise ForkedError(
                f"this Engine was opened by process {self.pid} and this is process {os.getpid()}, a fork of it; "
                "open an Engine of its own after the fork, or use the 'spawn' start method"
            )

    @property
    def _c_pipeline(self) -> Any:
        return self._held.cell[0]
