"""Pipeline: one native thread that moves the blocks of jobs.

Theory of operation.  A `Pipeline` is one native thread with one way of moving blocks, an io_uring or threads; a `Job`
is one save or restore handed to it.  The job's arrays live in Python-owned memory that the pipeline reads and writes,
so a Job is kept alive by its Pipeline until it is done, whatever its owner does.  Every call that waits releases the
GIL and comes back every `WAIT_SLICE_NS`, so that Ctrl-C works.

A fork has neither the thread nor the slots: a Pipeline touched in a forked child raises `ForkedError`, and the
child's copies of its descriptors are closed at the fork.

Called by `watch`, `backend`, `writer`, `reader` and `engine`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from engine.errors import ClosedError, ForkedError
from engine.io.binding import WAIT_SLICE_NS, ffi, lib
from engine.io.job import Job, Milestone
from engine.options import Backend

# How long to sleep between looks at something that ends within milliseconds.
_BUSY_PAUSE_S = 0.001

_CLOSED = "the Engine has been closed; open a new one"

# What moves the blocks for each backend.  The last two differ in how the files are opened: see `Pipeline.direct`.
_WAYS: dict[Backend, int] = {
    "io_uring": lib.ENG_RING_REGISTERED,
    "io_uring_plain": lib.ENG_RING_PLAIN,
    "threads": lib.ENG_THREADS,
    "buffered": lib.ENG_THREADS,
}


class Refused(IntEnum):
    """What the kernel refused when a pipeline was opened."""

    RESOURCES = lib.ENG_REFUSED_RESOURCES
    RING = lib.ENG_REFUSED_RING
    BUFFERS = lib.ENG_REFUSED_BUFFERS
    FILES = lib.ENG_REFUSED_FILES


class OpenError(Exception):
    """A pipeline could not be opened: `refused` says at what, `errno` why.  `backend` makes a PlatformError of it."""

    def __init__(self, refused: Refused, error: int) -> None:
        super().__init__(refused, error)
        self.refused = refused
        self.errno = error


class Pipeline:
    """One native thread, and `slot_count` staging slots of `slot_bytes` each.

    Args:
        slot_count: at least 1.
        slot_bytes: a multiple of `ALIGNMENT`; no block may be larger.
        backend: how blocks are moved; nothing else is tried.
        io_table: a cffi ``eng_io_table *`` that moves them instead; the seam for fault injection.

    Raises:
        OpenError: the kernel refuses the backend, or the memory or descriptors for it.
    """

    def __init__(
        self, slot_count: int, slot_bytes: int, backend: Backend = "io_uring", *, io_table: Any = None
    ) -> None:
        config = ffi.new("eng_config *", {"slot_count": slot_count, "slot_bytes": slot_bytes, "way": _WAYS[backend]})
        if io_table is not None:
            config.io = io_table
        opened = ffi.new("eng_pipeline **")
        result = lib.eng_open(config, opened)
        if result < 0:
            raise OpenError(Refused(config.refused), -result)
        self._io_table = io_table
        self._pipeline = opened[0]
        self.pid = os.getpid()
        self._live: set[Job] = set()
        # Who is inside a call, so that close() does not free the pipeline under another thread.  A set of tokens and
        # not a count: taking one out twice, after an interrupt, does no harm.
        self._users: set[object] = set()
        self._lock = threading.RLock()
        self._closing = False
        self.slot_bytes = slot_bytes
        self.backend = backend

    def submit(self, job: Job) -> None:
        """Queue a job; staging begins at once.  Blocks only while `JOBS_MAX` jobs are under way."""
        with self._in_use() as pipeline:
            if self._closing:
                raise ClosedError(_CLOSED)
            self._live.add(job)
            while (result := lib.eng_submit(pipeline, job.c_job)) == -errno.EBUSY:
                time.sleep(_BUSY_PAUSE_S)
            assert result == 0, f"eng_submit refused a job: {os.strerror(-result)}"

    def attach(self, job: Job, descriptors: Sequence[int]) -> None:
        """Give a job its files.  A job that has failed meanwhile does not want them any more."""
        assert len(descriptors) == job.c_job.file_count
        with self._in_use() as pipeline:
            result = lib.eng_attach(pipeline, job.c_job, ffi.new("int32_t[]", list(descriptors)))
        assert result in (0, -errno.ESRCH), os.strerror(-result)

    def abort(self, job: Job, error: int) -> None:
        """Fail a job with an errno; what is in flight is drained, and then it is done.

        A job that was never submitted is done at once, and one that is done already stays as it is.
        """
        if job.c_job.submitted_ns == 0:
            job.c_job.failure, job.c_job.error = lib.ENG_ABORTED_FAILURE, error
            job.c_job.milestones = Milestone.URGENT | Milestone.STAGED | Milestone.DONE
            return
        with self._in_use() as pipeline:
            result = lib.eng_abort(pipeline, job.c_job, error)
        assert result in (0, -errno.ESRCH), os.strerror(-result)

    def wait(self, job: Job, milestone: Milestone, timeout_ns: int | None = None) -> bool:
        """Block until a milestone is reached, without the GIL.  False if `timeout_ns` passed first."""
        left = timeout_ns
        while not job.reached(milestone):
            slice_ns = WAIT_SLICE_NS if left is None else max(0, min(left, WAIT_SLICE_NS))
            with self._in_use() as pipeline:
                reached = lib.eng_wait(pipeline, job.c_job, milestone, slice_ns)
            if left is not None and not reached:
                left -= slice_ns
                if left <= 0:
                    return False
        if milestone == Milestone.DONE:
            self._live.discard(job)
            job.release()
        return True

    def close(self) -> None:
        """Drain every job, other threads' too, and stop the thread.  Blocks.  May be called again."""
        self.check_owner()
        if self._pipeline is None:
            return
        self._closing = True
        lib.eng_stop(self._pipeline)  # all that others wait for is reached
        with self._lock:
            pipeline, self._pipeline = self._pipeline, None
        while self._users:
            time.sleep(_BUSY_PAUSE_S)
        lib.eng_close(pipeline)

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

    @contextmanager
    def _in_use(self) -> Iterator[Any]:
        """The C pipeline, which lives until this is left."""
        self.check_owner()
        user = object()
        try:
            with self._lock:
                if self._pipeline is None:
                    raise ClosedError(_CLOSED)
                self._users.add(user)
            yield self._pipeline
        finally:
            self._users.discard(user)
