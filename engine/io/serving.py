"""Serving: a monitor's thread that writes what a trainer's pipeline posts.

Theory of operation.  A `Serving` maps the memory that the trainer shares, and writes its slots to the files that it
admits (`native/moving/serve.c`).  The slots' content stays readable after the trainer has ended.

Rules: `admit` a file before the trainer hears of its descriptor, and `withdraw` it before it is closed.
"""

from __future__ import annotations

import weakref
from typing import Any

from engine.io.binding import ffi, lib
from engine.io.pipeline import OpenError, Refused, Shared, new_config
from engine.options import Backend


class Serving:
    """One native thread, and the slots of a trainer's pipeline.

    Args:
        slot_count, slot_bytes: as of the pipeline.
        backend: how blocks are written.
        shared: what the trainer shares.
        io_table: a cffi ``eng_io_table *`` that writes instead; the seam for fault injection.

    Raises:
        OpenError: the kernel refuses the backend, the memory is not that of such a pipeline, or there is none for it.
    """

    def __init__(
        self, slot_count: int, slot_bytes: int, backend: Backend, shared: Shared, *, io_table: Any = None
    ) -> None:
        config = new_config(slot_count, slot_bytes, backend)
        c_shared = shared.c_shared()
        config.shared = c_shared
        if io_table is not None:
            config.io = io_table
        self._io_table = io_table
        self._cell = ffi.new("eng_serve **")
        self._free = weakref.finalize(self, lib.eng_serve_free, self._cell)
        result = lib.eng_serve_open(config, self._cell)
        if result < 0:
            raise OpenError(Refused(config.refused), -result)
        self.slot_count = slot_count
        self.slot_bytes = slot_bytes

    def admit(self, descriptor: int, nbytes: int) -> None:
        """Let the trainer write to the first bytes of a file."""
        if lib.eng_serve_admit(self._cell[0], descriptor, nbytes) < 0:
            raise MemoryError

    def withdraw(self, descriptor: int) -> None:
        """Let it write no more, and wait for the writes under way."""
        lib.eng_serve_withdraw(self._cell[0], descriptor)

    def slot(self, index: int, nbytes: int) -> Any:
        """The first bytes of a slot, as a buffer that is valid until `close`."""
        assert nbytes <= self.slot_bytes, (nbytes, self.slot_bytes)
        return ffi.buffer(lib.eng_serve_slot(self._cell[0], index), nbytes)

    def close(self) -> None:
        """Wait for the writes under way, and release everything.  May be called again."""
        self._free()
