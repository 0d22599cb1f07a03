"""Job: one save or restore, in the form that native code executes.

Theory of operation.  A job's arrays are Python's memory that the pipeline reads and writes, so its `Pipeline` keeps it
alive until it is done.  Its states and milestones may be read at any time, from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from engine.io.binding import ffi, lib
from engine.io.packing import Packed

# A content hash: XXH3-128 in canonical form.
HASH_BYTES: int = ffi.sizeof("eng_hash")


class Direction(IntEnum):
    """Which way a job moves bytes."""

    WRITE = lib.ENG_WRITE
    READ = lib.ENG_READ


class BlockState(IntEnum):
    """How far a block has come.  A block read, verified and copied out is WRITTEN.

    WITHHELD comes before PENDING: `Pipeline.release` makes the one the other.
    """

    PENDING = lib.ENG_PENDING
    STAGED = lib.ENG_STAGED
    WRITTEN = lib.ENG_WRITTEN
    FAILED = lib.ENG_FAILED
    WITHHELD = lib.ENG_WITHHELD


class Milestone(IntEnum):
    """A point in a job that can be waited for."""

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


def least(states: bytes) -> BlockState:
    """The state of the least advanced block; FAILED if one has failed.  A byte that is no state counts as FAILED."""
    known = set(BlockState)
    if any(state not in known or state == BlockState.FAILED for state in set(states)):
        return BlockState.FAILED
    return BlockState.PENDING if BlockState.WITHHELD in states else BlockState(min(states))


def bytes_come(states: bytes, sizes: Iterable[int]) -> tuple[int, int]:
    """Of blocks in these states, of these sizes in order: the bytes that are staged, and those that are written too."""
    written = staged = 0
    for state, size in zip(states, sizes, strict=True):
        staged += size if state in (BlockState.STAGED, BlockState.WRITTEN) else 0
        written += size if state == BlockState.WRITTEN else 0
    return staged, written


def contradiction(operation: str, path: str) -> RuntimeError:
    """The error for `FailureKind.INVALID`: no file system has refused anything, and no retry helps."""
    cause = "its plan contradicts itself, or reaches beyond the memory of a tensor"
    return RuntimeError(f"the {operation} of {path} is refused: {cause}; report this as a bug")


class JobMemory(Protocol):
    """Memory that another process reads too, for the states and checksums of one job; the job keeps it.

    Attributes:
        states: one byte a block.
        checksums: `HASH_BYTES` a block.
    """

    states: Any
    checksums: Any

    def mark_staged(self) -> None:
        """Record that all is staged, and that nothing changed meanwhile: the save may be completed without its job."""

    @property
    def is_staged(self) -> bool:
        """Whether `mark_staged` was called."""


class Job:
    """One save or restore.

    Args:
        direction: which way.
        sources, extents, blocks, order: packed; see `engine_native.h`.
        file_count: how many files `Pipeline.attach` will be given.
        urgent_count: `Milestone.URGENT` is reached when this many blocks, the first of `order`, are staged.
        checked: hash the sources again once all is staged.
        checksums: for a read, the content hash that each block must have, `HASH_BYTES` each.
        owners: objects to keep alive as long as the pipeline may touch the sources.
        guard: the native guard of a write, or None.
        previous: the checksums of the job that the guard was armed with before, if that had the same plan.
        withheld: no block of this write begins before `Pipeline.release` is given it; `order` is ignored.
        memory: for states and checksums, all zero; None for memory of its own.
    """

    def __init__(
        self,
        direction: Direction,
        sources: Packed,
        extents: Packed,
        blocks: Packed,
        order: Packed,
        file_count: int,
        urgent_count: int = 0,
        checked: bool = False,
        checksums: Sequence[bytes] | None = None,
        owners: object = None,
        guard: Any = None,
        previous: bytes | None = None,
        withheld: bool = False,
        memory: JobMemory | None = None,
    ) -> None:
        previous_view = ffi.NULL if previous is None else ffi.from_buffer("eng_hash[]", previous)
        c_order = ffi.new("uint32_t[]", blocks.row_count) if withheld else order.pointer
        self._kept: object = (sources, extents, blocks, order, c_order, owners, guard, previous_view)
        self._memory = memory  # the views below are of it
        self._states: Any = bytearray(max(blocks.row_count, 1)) if memory is None else memory.states
        self._checksums: Any = bytearray(HASH_BYTES * max(blocks.row_count, 1)) if memory is None else memory.checksums
        if withheld:
            self._states[:] = bytes([BlockState.WITHHELD]) * len(self._states)
        if checksums is not None:
            assert len(checksums) == blocks.row_count, (len(checksums), blocks.row_count)
            self._checksums = bytearray(b"".join(checksums))
            assert len(self._checksums) == HASH_BYTES * blocks.row_count, len(self._checksums)
        self._states_view = ffi.from_buffer("uint8_t[]", self._states)
        self._checksums_view = ffi.from_buffer("eng_hash[]", self._checksums)
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
                "withheld_count": blocks.row_count if withheld else 0,
                "sources": sources.pointer,
                "extents": extents.pointer,
                "blocks": blocks.pointer,
                "order": c_order,
                "checksums": self._checksums_view,
                "states": self._states_view,
                "guard": ffi.NULL if guard is None else guard,
                "previous": previous_view,
            },
        )

    def attachment(self, descriptors: Sequence[int], known: Sequence[bytes | None] | None) -> tuple[Any, Any, Any]:
        """The arrays of `eng_attach`, which the job keeps alive."""
        assert len(descriptors) == self.c_job.file_count, (len(descriptors), self.c_job.file_count)
        arrays = (ffi.new("int32_t[]", list(descriptors)), ffi.NULL, ffi.NULL)
        if known is not None:
            assert len(known) == self.block_count, (len(known), self.block_count)
            hashes = b"".join([hash_ or bytes(HASH_BYTES) for hash_ in known])
            flags = bytes([hash_ is not None for hash_ in known])
            arrays = (arrays[0], ffi.from_buffer("eng_hash[]", hashes), ffi.from_buffer("uint8_t[]", flags))
        self._kept = (self._kept, arrays)
        return arrays

    def reached(self, milestone: Milestone) -> bool:
        """Whether the job has come so far.  Asks neither the pipeline nor the process that opened it."""
        return bool(lib.eng_reached(self.c_job, milestone))

    def release(self) -> None:
        """Let go of the sources and their owners: a job may be kept long after it is done."""
        self._kept = None

    def states(self) -> bytes:
        """One `BlockState` a block, as they are at this moment."""
        return bytes(self._states[: self.block_count])

    def checksums(self) -> list[bytes]:
        """The blocks' content hashes; those of a write are final once it is staged."""
        packed = bytes(self._checksums)
        return [packed[start : start + HASH_BYTES] for start in range(0, HASH_BYTES * self.block_count, HASH_BYTES)]

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
        """Measurements of the pipeline: times in ns on the clock of time.monotonic_ns(), bytes and retries."""
        times = ("submitted_ns", "staged_ns", "done_ns", "copying_ns", "hashing_ns")
        return {
            name: int(getattr(self.c_job, name))
            for name in (*times, "io_bytes", "skipped_bytes", "clean_bytes", "retry_count")
        }
