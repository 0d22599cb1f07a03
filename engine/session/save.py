"""Save: a checkpoint in flight, for its caller.

Theory of operation.  A `Save` is a Future over a `Write` of the store.  Its chunks' status is read live from memory
that the native thread writes: the least advanced block of a chunk counts.

A Future's own lock is taken in Python, where Ctrl-C could leave it taken for ever, and a fork could copy it taken.
So a Save waits at a `Gate`, and keeps its outcome itself as well.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

from engine.errors import ArgumentError, BusyError, UsageError
from engine.format.plan import Plan
from engine.io.job import Milestone, bytes_come
from engine.session.gate import Gate, seconds
from engine.state.select import near
from engine.store.info import CheckpointInfo
from engine.store.writer import Write

# What completion offers: of a Future, and of a Save alone.
_PUBLIC_NAMES = (
    *("add_done_callback", "cancel", "cancelled", "done", "exception", "result", "running"),
    *("checkpoint_id", "chunks", "plan", "stats", "status", "step", "wait_staged"),
)


@dataclass(frozen=True, slots=True)
class ChunkStatus:
    """One chunk of a save: its location, and ``pending``, ``staged``, ``written``, ``durable`` or ``failed``."""

    file: str
    index: int
    offset: int
    nbytes: int
    layers: tuple[str, ...]
    status: str


def chunks_of(chunks: Sequence[ChunkStatus], layer: object) -> list[ChunkStatus]:
    """Those of the chunks that hold a part of a layer, or of one in it; of "" and None all.

    Args:
        layer: a module path, or a pattern of some (fnmatch(3), case-sensitive).

    Raises:
        ArgumentError: no chunk has such a layer.
    """
    if layer is None or layer == "":
        return [*chunks]
    if not isinstance(layer, str):
        raise ArgumentError(f"layer is {layer!r}; it must be the path of a module or a pattern, such as 'layers.*'")
    matches = re.compile(f"{fnmatch.translate(layer)}|{fnmatch.translate(f'{layer}.*')}").match
    found = [chunk for chunk in chunks if any(map(matches, chunk.layers))]
    if not found:
        known = dict.fromkeys(each for chunk in chunks for each in chunk.layers)
        raise ArgumentError(f"no chunk holds a layer {layer!r}; {near([layer], known)}")
    return found


class SaveStatus(NamedTuple):
    """A save in flight, at one moment.

    Attributes:
        step, checkpoint_id: which checkpoint it will be.
        is_safe: whether it is completed even if its trainer dies now: a monitor has all that it needs.
        chunks: how far each has come.
        nbytes: bytes of all files.
        staged_bytes: those that are copied out of the arena.
        written_bytes: those of them that are on the device, or were there already.
        seconds: since the save began.
    """

    step: int
    checkpoint_id: str
    is_safe: bool
    chunks: tuple[ChunkStatus, ...]
    nbytes: int
    staged_bytes: int
    written_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Written bytes a second, since the save began."""
        return self.written_bytes / self.seconds if self.seconds > 0 else 0.0


class Save(Future[CheckpointInfo]):
    """A checkpoint in flight.

    `result()` blocks until the checkpoint is durable and committed, and raises the save's failure otherwise.  A Save
    cannot be cancelled.  Its methods may be called from any thread.

    Attributes:
        step, checkpoint_id: which checkpoint this is.
    """

    def __new__(cls, *given: object, **_named: object) -> Save:
        """Refuse a call by anybody but `Engine.checkpoint`, which gives a step and a `Write`."""
        if len(given) < 2 or not isinstance(given[1], Write | None):
            raise UsageError("a Save is made by Engine.checkpoint(arena), or by engine.checkpoint(arena, directory)")
        return super().__new__(cls)

    def __init__(
        self,
        step: int,
        write: Write | None,
        is_commit_thread: Callable[[], bool] = lambda: False,
        note_staged: Callable[[], object] = lambda: None,
    ) -> None:
        """Not for callers: `Engine.checkpoint` makes Saves.

        Args:
            note_staged: called before a thread that waited for the staging goes on.
        """
        super().__init__()
        self.set_running_or_notify_cancel()
        self.step = step
        self.checkpoint_id = "" if write is None else write.checkpoint_id
        self._write = write
        self._is_commit_thread = is_commit_thread
        self._note_staged = note_staged
        self._ended = Gate()
        self._info: CheckpointInfo | None = None
        self._failure: BaseException | None = None
        self._began_ns = time.monotonic_ns()
        self._held_ns = 0
        self._durable_ns = 0
        self._asked = False

    @classmethod
    def refused(cls, step: int, error: BusyError) -> Save:
        """A save that was never begun."""
        save = cls(step, None)
        save.end(None, error)
        save.resolve()
        return save

    def wait_staged(self, timeout: float | None = None) -> bool:
        """Block until the arena may change again, or the save has failed; False if `timeout` seconds passed first."""
        staged = self.wait_milestone(Milestone.STAGED, timeout)
        if staged:
            self._note_staged()
        return staged

    def wait_milestone(self, milestone: Milestone, timeout: float | None = None) -> bool:
        """Block until the native job has come so far, or has failed; False if `timeout` seconds passed first."""
        limit = seconds(timeout)
        if self._write is None:
            return True
        return self._write.wait(milestone, None if limit is None else int(limit * 1e9))

    def chunks(self, layer: str | None = None) -> list[ChunkStatus]:
        """Every chunk and how far it has come, at this moment.  Does not block.

        Args:
            layer: only the chunks that hold a part of this layer, or of one in it, such as ``"layers.3"``; or of the
                layers that a pattern matches, such as ``"layers.*.attn"``.

        Raises:
            ArgumentError: the arena has no such layer.
        """
        if self._write is None:
            return []
        return chunks_of(self._chunks(self._write), layer)

    def status(self) -> SaveStatus:
        """The save at this moment: every chunk, and how many bytes have come how far.  Does not block."""
        if self._write is None:
            return SaveStatus(self.step, "", False, (), 0, 0, 0, 0.0)
        sizes = [block.nbytes for block in self._write.packed.plan.blocks]
        staged, written = bytes_come(self._write.job.states(), sizes)
        return SaveStatus(
            self.step,
            self.checkpoint_id,
            self.outlives_trainer,
            tuple(self._chunks(self._write)),
            sum(sizes),
            staged,
            written,
            (self._durable_ns or time.monotonic_ns() - self._began_ns) / 1e9,
        )

    def _chunks(self, write: Write) -> list[ChunkStatus]:
        packed = write.packed
        failed = self.done() and self._failure is not None
        ended = "failed" if failed else "durable" if self.done() else None
        states = write.chunk_states()
        return [
            ChunkStatus(
                packed.plan.files[chunk.file_index].name,
                chunk.index,
                chunk.offset,
                chunk.nbytes,
                layers,
                ended or state.name.lower(),
            )
            for chunk, layers, state in zip(packed.plan.chunks, packed.layers, states, strict=True)
        ]

    def stats(self) -> dict[str, int]:
        """What the save took, as far as it has come; times in ns.

        ``held_ns``: inside `checkpoint()`.  ``staged_ns``: from the call until the arena could change again.
        ``written_ns``: from the call until the last block was written.  ``durable_ns``: from the call until committed.
        ``copying_ns``: of all staging threads together, on copying and hashing.  ``io_bytes``: bytes written.
        ``skipped_bytes``: bytes that the recycled files held already.  ``clean_bytes``: those of them that were not
        even copied, because nothing had written to them.  ``retry_count``: operations tried again.
        """
        if self._write is None:
            return {}
        counters = self._write.job.counters
        return {
            "held_ns": self._held_ns,
            "staged_ns": max(0, counters["staged_ns"] - self._began_ns),
            "written_ns": max(0, counters["done_ns"] - self._began_ns),
            "durable_ns": self._durable_ns,
            "copying_ns": counters["copying_ns"],
            "io_bytes": counters["io_bytes"],
            "skipped_bytes": counters["skipped_bytes"],
            "clean_bytes": counters["clean_bytes"],
            "retry_count": counters["retry_count"],
        }

    @property
    def plan(self) -> Plan:
        """How the arena was cut.

        Raises:
            BusyError: the save was refused, and has no plan.
        """
        if self._write is None:
            raise BusyError(f"step {self.step} was refused, and has no plan")
        return self._write.packed.plan

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._ended.is_open

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """The committed checkpoint.  Blocks.

        Raises:
            TimeoutError: `timeout` seconds passed first.
            ForkedError: in a forked child, to which no result ever comes.
            UsageError: in a done callback of the same Engine, for a save that has not ended.
            EngineError: the save has failed.
        """
        self._await_end(timeout)
        self._asked = True
        try:
            if self._failure is not None:
                raise self._failure
            assert self._info is not None
            return self._info
        finally:
            del self  # or the failure's traceback would hold a frame that holds the failure

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The save's failure, or None; blocks and raises as `result`."""
        self._await_end(timeout)
        self._asked = True
        return self._failure

    def add_done_callback(self, fn: Callable[[Future[CheckpointInfo]], object]) -> None:
        """Have a function called with the save once it has ended, on the commit thread; at once if it has."""
        self._asked = True  # by the function
        super().add_done_callback(fn)

    def measured(self) -> tuple[int, float] | None:
        """The bytes of the checkpoint, and the seconds for which this process had to live; None if it is not committed.

        Those are until it was committed, or with a monitor until it was staged.
        """
        if self._info is None:
            return None
        lived_ns = self.stats()["staged_ns"] if self._has_monitor else self._durable_ns
        return self._info.nbytes, max(lived_ns, 1) / 1e9

    def left_bytes(self) -> int:
        """The bytes for which this process has still to live; see `measured`."""
        done = ("staged", "written", "durable") if self._has_monitor else ("written", "durable")
        return sum(chunk.nbytes for chunk in self.chunks() if chunk.status not in done)

    @property
    def outlives_trainer(self) -> bool:
        """Whether the monitor completes the save if this process dies now."""
        return self._write is not None and self._write.outlives_trainer

    @property
    def _has_monitor(self) -> bool:
        return self._write is not None and self._write.memory is not None

    @property
    def is_unasked(self) -> bool:
        """Whether this returned save has failed, and its outcome was never asked for."""
        return self._failure is not None and self._held_ns > 0 and not self._asked

    def end(self, info: CheckpointInfo | None, failure: BaseException | None) -> None:
        """Let `result()` return or raise.  Called by the thread that ends the save."""
        self._info, self._failure, self._durable_ns = info, failure, time.monotonic_ns() - self._began_ns
        self._ended.open()

    def resolve(self) -> None:
        """Run the Future's callbacks, once the save has ended.  Called by the same thread."""
        if self._failure is not None:
            self.set_exception(self._failure)
        elif self._info is not None:
            self.set_result(self._info)

    def mark_held(self, began_ns: int) -> None:
        """Called once, as `checkpoint()` returns: it began then, on the clock of time.monotonic_ns()."""
        self._began_ns, self._held_ns = began_ns, time.monotonic_ns() - began_ns

    def __repr__(self) -> str:
        if self._write is None:
            return f"{type(self).__name__}(step {self.step}, refused)"
        if self.done():
            ended = "committed" if self._failure is None else f"failed: {self._failure!r}"
            return f"{type(self).__name__}(step {self.step}, {ended})"
        status = self.status()
        come = f"{status.staged_bytes} staged and {status.written_bytes} written of {status.nbytes} bytes"
        return f"{type(self).__name__}(step {self.step}, in flight, {come})"

    def __dir__(self) -> list[str]:
        """The names for callers; the others are for the rest of the engine."""
        return sorted(_PUBLIC_NAMES)

    def _await_end(self, timeout: float | None) -> None:
        timeout = seconds(timeout)
        if not self._ended.is_open and self._write is not None:
            self._write.pipeline.check_owner()
            if self._is_commit_thread():
                raise UsageError(
                    "a done callback runs on the thread that commits saves, and would wait for itself; wait in another "
                    "thread"
                )
        if not self._ended.wait(timeout):
            raise FutureTimeoutError

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Save belongs to the process that made it, and cannot be pickled")
