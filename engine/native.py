"""Native: the compiled pipeline, typed.  The only importer of `engine._native`.

Theory of operation.  `native/engine_native.h` is the C interface; this module gives it Python's manners and no
policy of its own.  A `Pipeline` is one native thread with one way of moving blocks, an io_uring or threads; a `Job`
is one save or restore handed to it.  The job's arrays live in Python-owned memory that the pipeline reads and writes,
so a Job is kept alive by its Pipeline until it is done, whatever its owner does.  Every call that waits releases the
GIL and comes back every `WAIT_SLICE_NS`, so that Ctrl-C works.

A fork has neither the thread nor the slots: a Pipeline touched in a forked child raises `ForkedError`, and the
child's copies of its descriptors are closed at the fork.

Called by `watch`, `backend`, `writer`, `reader` and `engine`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Protocol

from engine.errors import ClosedError, ForkedError

try:
    from engine._native import ffi, lib
except ImportError as error:
    raise ImportError(
        f"the compiled module engine._native is missing; build it with 'pip install .' ({error})"
    ) from error

# Long enough to cost nothing, short enough that Ctrl-C feels prompt.
WAIT_SLICE_NS = 50_000_000

# How long to sleep between looks at something that ends within milliseconds.
_BUSY_PAUSE_S = 0.001

_CLOSED = "the Engine has been closed; open a new one"

# The number of live jobs that a pipeline has room for, and of files in one job (engine_native.h).
JOBS_MAX: int = lib.ENG_JOBS_MAX
JOB_FILES_MAX: int = lib.ENG_JOB_FILES_MAX
DIMS_MAX: int = lib.ENG_DIMS_MAX
ALIGNMENT: int = lib.ENG_ALIGNMENT

_EXTENT = struct.Struct("=QIIII")
_BLOCK = struct.Struct("=QIIII")
_SOURCE = struct.Struct(f"=QII{2 * DIMS_MAX}q")
assert _EXTENT.size == ffi.sizeof("eng_extent")
assert _BLOCK.size == ffi.sizeof("eng_block")
assert _SOURCE.size == ffi.sizeof("eng_source")


Backend = Literal["io_uring", "io_uring_plain", "threads", "buffered"]

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


class Direction(IntEnum):
    """Which way a job moves bytes."""

    WRITE = lib.ENG_WRITE
    READ = lib.ENG_READ


class BlockState(IntEnum):
    """How far a block has come.  A block read, verified and copied out is WRITTEN."""

    PENDING = lib.ENG_PENDING
    STAGED = lib.ENG_STAGED
    WRITTEN = lib.ENG_WRITTEN
    FAILED = lib.ENG_FAILED


class Milestone(IntEnum):
    """What a job can be waited for."""

    URGENT = lib.ENG_URGENT
    STAGED = lib.ENG_ALL_STAGED
    DONE = lib.ENG_DONE


class FailureKind(IntEnum):
    """Why a job failed."""

    IO = lib.ENG_IO_FAILURE
    SHORT = lib.ENG_SHORT_FAILURE
    CHECKSUM = lib.ENG_CHECKSUM_FAILURE
    TORN = lib.ENG_TORN_FAILURE
    INVALID = lib.ENG_INVALID_FAILURE
    ABORTED = lib.ENG_ABORTED_FAILURE


class Failure(NamedTuple):
    """A job's first failure.  `block` is the block it happened on, or None."""

    kind: FailureKind
    errno: int
    block: int | None


class Source(Protocol):
    """Where bytes lie: plain memory if `shape` is empty, else a strided tensor (strides in elements)."""

    @property
    def address(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...


class Packed(NamedTuple):
    """Rows as the C structs they stand for: `memory` holds `row_count` of them, `pointer` is cffi's view of it."""

    memory: bytes
    pointer: Any
    row_count: int


def pack_extents(
    source_offsets: Sequence[int], block_offsets: Sequence[int], nbytes: Sequence[int], sources: Sequence[int]
) -> Packed:
    """Pack extents, which are given in columns, and by columns: there may be a hundred thousand."""
    offset_halves = array("I", array("Q", source_offsets).tobytes())
    columns = (offset_halves[0::2], offset_halves[1::2], block_offsets, nbytes, sources)
    words_each = _EXTENT.size // offset_halves.itemsize
    words = array("I", bytes(_EXTENT.size * len(nbytes)))
    for index, column in enumerate(columns):
        words[index::words_each] = array("I", column)
    return _pack("eng_extent", _EXTENT, words.tobytes())


def pack_blocks(rows: Iterable[tuple[int, int, int, int, int]]) -> Packed:
    """Pack rows of (file_offset, nbytes, file, extent_start, extent_count)."""
    return _pack("eng_block", _BLOCK, b"".join([_BLOCK.pack(*row) for row in rows]))


def pack_sources(sources: Iterable[Source]) -> Packed:
    """Pack sources; their memory stays the caller's to keep."""
    rows = []
    for source in sources:
        ndim = len(source.shape)
        assert ndim == len(source.stride) <= DIMS_MAX, source
        rest = (0,) * (DIMS_MAX - ndim)
        rows.append(_SOURCE.pack(source.address, source.itemsize, ndim, *source.shape, *rest, *source.stride, *rest))
    return _pack("eng_source", _SOURCE, b"".join(rows))


def address_of(memory: bytes | bytearray) -> int:
    """The address of an object's bytes, good as long as the object lives and, if it can, does not change its size."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))


def pack_order(blocks: Sequence[int]) -> Packed:
    """Pack block indices."""
    return _pack("uint32_t", struct.Struct("=I"), struct.pack(f"={len(blocks)}I", *blocks))


def block_checksum(block: bytes | bytearray | memoryview, seed: int, file_index: int, file_offset: int) -> int:
    """The checksum that the pipeline gives a block with these stored bytes: XXH3-64, seeded by its place."""
    view = ffi.from_buffer(block)
    return int(lib.eng_block_checksum(view, len(view), seed, file_index, file_offset))


def allocate(descriptor: int, nbytes: int) -> int:
    """Reserve a file's blocks (fallocate(2)); 0 or an errno.  Blocks, without the GIL."""
    return -int(lib.eng_allocate(descriptor, nbytes))


def direct_alignment(descriptor: int) -> int:
    """The alignment that O_DIRECT wants on this file (statx(2)), or 0 where the kernel does not say."""
    return int(lib.eng_direct_alignment(descriptor))


class Watched(IntEnum):
    """What of a container is watched: its size, everything in it, or what some keys of a dictionary lead to."""

    SIZE = lib.ENG_SIZED
    DICT = lib.ENG_DICT
    LIST = lib.ENG_LIST
    MEMBERS = lib.ENG_MEMBERS


class Grad(IntEnum):
    """What is known of a tensor's `requires_grad`."""

    UNWANTED = lib.ENG_GRAD_UNWANTED
    WANTED = lib.ENG_GRAD_WANTED
    IGNORED = lib.ENG_GRAD_IGNORED


def _with_gil(name: str, *arguments: type) -> Callable[..., int]:
    """A function that is called with the GIL, which cffi lets go of: native/watch.c looks at Python's objects."""
    address = int(ffi.cast("uintptr_t", ffi.addressof(lib, name)))
    return ctypes.PYFUNCTYPE(ctypes.c_int, *arguments)(address)


_same_containers = _with_gil("eng_same_containers", ctypes.c_void_p, ctypes.c_uint64)
_describe_tensors = _with_gil("eng_describe_tensors", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
_same_tensors = _with_gil("eng_same_tensors", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def exchange_address(capsule: object) -> int:
    """The address of the DLPackExchangeAPI in a type's `__dlpack_c_exchange_api__`; it outlives the process."""
    return int(_capsule_pointer(capsule, b"dlpack_exchange_api"))


def same_containers(words: array[int]) -> bool:
    """Whether containers hold the very objects that `words` say; see `engine_native.h`, also for the next two.

    The objects that words are addresses of are the caller's to keep alive.
    """
    return bool(_same_containers(*words.buffer_info()))


def describe_tensors(exchange: int, words: array[int]) -> bool:
    """Fill in how tensors lie, of which `words` have object, grad and ndim; False if one cannot be described."""
    return bool(_describe_tensors(exchange, *words.buffer_info()))


def same_tensors(exchange: int, words: array[int]) -> bool:
    """Whether tensors that were described lie as they lay."""
    return bool(_same_tensors(exchange, *words.buffer_info()))


def _pack(ctype: str, row: struct.Struct, memory: bytes) -> Packed:
    assert len(memory) % row.size == 0
    return Packed(memory, ffi.from_buffer(f"{ctype}[]", memory), len(memory) // row.size)


class Job:
    """One save or restore.

    Args:
        direction: which way.
        seed: of the checkpoint, 64 bits, mixed into every block's checksum.
        sources, extents, blocks, order: packed; see `engine_native.h`.
        file_count: how many files `Pipeline.attach` will be given.
        urgent_count: the first so many of `order` are staged before `Milestone.URGENT`.
        checked: hash the sources again once all is staged.
        checksums: for a read, what each block must verify against.
        owners: objects to keep alive as long as the pipeline may touch the sources.
    """

    def __init__(
        self,
        direction: Direction,
        seed: int,
        sources: Packed,
        extents: Packed,
        blocks: Packed,
        order: Packed,
        file_count: int,
        urgent_count: int = 0,
        checked: bool = False,
        checksums: Sequence[int] | None = None,
        owners: object = None,
    ) -> None:
        self._kept: object = (sources, extents, blocks, order, owners)
        self._states = bytearray(max(blocks.row_count, 1))
        self._checksums = ffi.new("uint64_t[]", max(blocks.row_count, 1))
        if checksums is not None:
            assert len(checksums) == blocks.row_count, (len(checksums), blocks.row_count)
            self._checksums[0 : blocks.row_count] = checksums
        self._states_view = ffi.from_buffer("uint8_t[]", self._states)
        self.block_count = blocks.row_count
        self.c_job = ffi.new(
            "eng_job *",
            {
                "direction": direction,
                "checked": checked,
                "source_count": sources.row_count,
                "extent_count": extents.row_count,
                "block_count": blocks.row_count,
                "urgent_count": urgent_count,
                "file_count": file_count,
                "seed": seed,
                "sources": sources.pointer,
                "extents": extents.pointer,
                "blocks": blocks.pointer,
                "order": order.pointer,
                "checksums": self._checksums,
                "states": self._states_view,
            },
        )

    def reached(self, milestone: Milestone) -> bool:
        """Whether the job has come so far.  Asks neither the pipeline nor the process that opened it."""
        return bool(lib.eng_reached(self.c_job, milestone))

    def release(self) -> None:
        """Let go of the sources and their owners: a job that is done may be looked at for long after."""
        self._kept = None

    def states(self) -> bytes:
        """One `BlockState` a block, as they are at this moment."""
        return bytes(self._states[: self.block_count])

    def checksums(self) -> list[int]:
        """The blocks' checksums; those of a write are final once it is staged."""
        return list(ffi.unpack(self._checksums, self.block_count)) if self.block_count else []

    @property
    def failure(self) -> Failure | None:
        """The first failure, once the job is done; None if there was none."""
        c_job = self.c_job
        if c_job.failure == lib.ENG_NO_FAILURE:
            return None
        block = int(c_job.failed_block)
        return Failure(FailureKind(c_job.failure), int(c_job.error), block if block < self.block_count else None)

    @property
    def counters(self) -> dict[str, int]:
        """What the pipeline measured: times in ns on the clock of time.monotonic_ns(), bytes and retries."""
        names = ("submitted_ns", "staged_ns", "done_ns", "copying_ns", "hashing_ns", "io_bytes", "retry_count")
        return {name: int(getattr(self.c_job, name)) for name in names}


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
        _open_pipelines.add(self)

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

    def _abandon(self) -> None:
        if self._pipeline is not None:
            lib.eng_abandon(self._pipeline)


# Weak: a Pipeline is its Engine's, and is only told of forks while it lives.
_open_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _abandon_all() -> None:
    for pipeline in tuple(_open_pipelines):
        pipeline._abandon()


os.register_at_fork(after_in_child=_abandon_all)
