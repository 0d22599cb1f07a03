"""FaultTable: the pipeline's table of I/O operations in Python, with a script of faults.

Theory of operation.  The pipeline does every read and write through an `eng_io_table`.  This one does them at once with
pread(2) and pwrite(2), and reports them when it is reaped.  A script names operations, counted from the first, that
behave differently.  All others succeed.  The table runs on the pipeline's thread, which holds the GIL meanwhile, so a
test may read the lists once a job is done.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from engine._native import ffi, lib
from engine.io.pipeline import Pipeline

# How often the pipeline gets to look into its inbox while completions are held back.
_LOOK_S = 0.001

# More than requested, by less than the alignment: as wrong as any excess, and easier to miss.
_EXCESS_BYTES = 1


class Fault(NamedTuple):
    """A different behaviour of an operation.  Made by the functions below."""

    kind: str
    amount: int = 0


def refused(error: int) -> Fault:
    """Moves nothing, and completes with an errno."""
    return Fault("refused", error)


def not_started(error: int) -> Fault:
    """Is not even queued."""
    return Fault("not_started", error)


def short(moved_bytes: int) -> Fault:
    """Moves at most so many bytes, and reports their number."""
    return Fault("short", moved_bytes)


def boasting() -> Fault:
    """Moves all, and reports more."""
    return Fault("boasting")


def corrupting() -> Fault:
    """Moves all, with one bit flipped on the way into memory (only for reads)."""
    return Fault("corrupting")


class Operation(NamedTuple):
    """One read or write as the pipeline asked for it.  `fd` is the file's at that moment."""

    slot: int
    direction: int
    fd: int
    file_offset: int
    nbytes: int
    address: int


class FaultTable:
    """An I/O table with a script.

    Args:
        script: faults by the number of the operation.
        refusals: errnos that the first calls of `reap` return instead of completions.
        backwards: completions come one at a time, the last first.
        gate: completions wait for it.
        set_file_error: an errno with which files are refused.
        always: the fault of every operation that the script does not name.
    """

    def __init__(
        self,
        script: Mapping[int, Fault] | None = None,
        refusals: Sequence[int] = (),
        backwards: bool = False,
        gate: threading.Event | None = None,
        set_file_error: int = 0,
        always: Fault | None = None,
    ) -> None:
        self.operations: list[Operation] = []
        self.files: dict[int, int] = {}
        self.set_file_error = set_file_error
        self.exceptions: list[object] = []
        self._script = dict(script or {})
        self._always = always
        self._refusals = list(refusals)
        self._backwards = backwards
        self._order: random.Random | None = None
        self._gate = gate
        self._completed: list[tuple[int, int]] = []
        # cffi's callbacks live as long as their objects do, so a table must be kept as long as its pipeline.
        self._callbacks = (
            self._callback("int(void *, uint32_t, int32_t *, uint32_t)", self._set_files),
            self._callback("int(void *, eng_io *)", self._start),
            self._callback("int(void *, eng_completion *, uint32_t, uint32_t)", self._reap),
        )
        set_files, start, reap = self._callbacks
        self.c_table = ffi.new("eng_io_table *", {"set_files": set_files, "start": start, "reap": reap})

    def arm(self, script: Mapping[int, Fault], always: Fault | None = None, order: random.Random | None = None) -> None:
        """Set the faults, counted from here, and the order of completions if it is random.
        Called while no job is under way."""
        self._script = {len(self.operations) + number: fault for number, fault in script.items()}
        self._always = always
        self._order = order

    def refuse(self, refusals: Sequence[int]) -> None:
        """From now on `reap` returns these errnos instead of completions.  Called while no job is under way."""
        self._refusals = list(refusals)

    def heal(self) -> None:
        """Nothing goes wrong any more.  Called while no job is under way."""
        self._script.clear()
        self._refusals.clear()
        self._always = self._order = None

    @contextmanager
    def moving_blocks(self) -> Iterator[None]:
        """Engines that are opened meanwhile move their blocks through this table.

        As "buffered", for Engines opened with any backend: its memory is not aligned.
        """
        with mock.patch("engine.io.backend.Pipeline", functools.partial(Pipeline, io_table=self.c_table)):
            yield

    def _callback(self, signature: str, function: Any) -> Any:
        """A bug in here must fail the test and not hang it: it is kept, and the pipeline sees an errno."""

        def keep(_kind: object, exception: object, _trace: object) -> None:
            self.exceptions.append(exception)

        return ffi.callback(signature, function, error=-errno.EBADMSG, onerror=keep)

    def _set_files(self, _context: Any, first: int, fds: Any, count: int) -> int:
        given = list(enumerate(ffi.unpack(fds, count), first))
        if self.set_file_error and any(fd >= 0 for _, fd in given):
            return -self.set_file_error
        for place, fd in given:
            if fd >= 0:
                assert place not in self.files, "a file is given twice"
                self.files[place] = fd
            else:
                self.files.pop(place, None)
        return 0

    def _start(self, _context: Any, io: Any) -> int:
        address = int(ffi.cast("uintptr_t", io.address))
        assert io.place == lib.ENG_NO_PLACE or self.files[io.place] == io.fd
        operation = Operation(io.slot, io.direction, io.fd, io.file_offset, io.nbytes, address)
        fault = self._script.get(len(self.operations), self._always)
        self.operations.append(operation)
        assert operation.slot not in [slot for slot, _ in self._completed], "two operations of one slot"
        assert operation.file_offset % lib.ENG_ALIGNMENT == 0 and operation.nbytes % lib.ENG_ALIGNMENT == 0
        assert operation.address % lib.ENG_ALIGNMENT == 0 and operation.nbytes > 0
        if fault is not None and fault.kind == "not_started":
            return -fault.amount
        self._completed.append((operation.slot, _perform(operation, fault)))
        return 0

    def _reap(self, _context: Any, completions: Any, capacity: int, _wait: int) -> int:
        if self._gate is not None and not self._gate.wait(_LOOK_S):
            return 0  # as if woken: the pipeline looks into its inbox and comes back
        if self._refusals:
            return -self._refusals.pop(0)
        assert self._completed, "the pipeline reaps with nothing under way"
        if self._backwards:
            taken = [self._completed.pop()]
        elif self._order is not None:
            taken = [self._completed.pop(self._order.randrange(len(self._completed)))]
        else:
            taken, self._completed = self._completed[:capacity], self._completed[capacity:]
        for index, (slot, result) in enumerate(taken):
            completions[index].slot, completions[index].result = slot, result
        return len(taken)


def _perform(operation: Operation, fault: Fault | None) -> int:
    """Do the operation as far as the fault allows; returns the result that the kernel would."""
    if fault is not None and fault.kind == "refused":
        return -fault.amount
    wanted_bytes = min(fault.amount, operation.nbytes) if fault is not None and fault.kind == "short" else None
    try:
        moved_bytes = _move(operation, operation.nbytes if wanted_bytes is None else wanted_bytes)
    except OSError as error:
        assert error.errno is not None
        return -error.errno
    if fault is not None and fault.kind == "boasting":
        return operation.nbytes + _EXCESS_BYTES
    if fault is not None and fault.kind == "corrupting" and moved_bytes:
        memory = ffi.cast("uint8_t *", operation.address)
        memory[0] ^= 1
    return moved_bytes


def _move(operation: Operation, nbytes: int) -> int:
    memory = ffi.buffer(ffi.cast("uint8_t *", operation.address), operation.nbytes)
    if operation.direction == lib.ENG_WRITE:
        return os.pwrite(operation.fd, memory[:nbytes], operation.file_offset)
    content = os.pread(operation.fd, nbytes, operation.file_offset)
    memory[: len(content)] = content
    return len(content)
