"""Descriptor: an open file or directory, owned by an object.

Theory of operation.  Ctrl-C may strike between any two bytecodes, so also after open(2) has returned a number and
before a variable has it.  A number that is lost there stays open for ever.  A `Descriptor` exists before the file is
opened: `fill` opens the file and keeps its number in one call into C, where no signal handler runs.  If the last
reference goes without `close`, the file is closed by the destructor, which is C code too.  A `__del__` would not do:
Ctrl-C may strike in it, and is lost there.

The number is borrowed: it is good as long as the Descriptor is referenced and not closed.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.io.binding import ffi, lib

# The index of a cell's only element.
_FIRST = (0,)


class Descriptor:
    """A descriptor that is closed with its last reference at the latest.  Holds none at first."""

    __slots__ = ("_cell", "_owner")

    def __init__(self) -> None:
        self._cell = ffi.new("int32_t *", -1)
        self._owner = ffi.gc(self._cell, lib.eng_close_file)

    @property
    def number(self) -> int:
        """The descriptor's number; -1 if there is none, or none any more."""
        return int(self._cell[0])

    def fill(self, opener: Callable[[], int]) -> None:
        """Call `opener` and keep the number that it returns; called once.

        `opener` is C code, such as a partial of `os.open`: list, map and iter call it and store its result without a
        bytecode in between.  The map ends before a second call, with `_FIRST`.
        """
        list(map(self._cell.__setitem__, _FIRST, iter(opener, None)))

    def close(self) -> None:
        """Close it.  May be called again, and from several threads."""
        ffi.release(self._owner)

    def close_in_child(self) -> None:
        """Close a forked child's copy, also if another thread of the parent was in `close` at the fork."""
        lib.eng_close_file(self._cell)
