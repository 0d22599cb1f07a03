"""Conditions: what a host does to the memory of a training, for the tear detector.

Theory of operation.  Each condition is of this process, and is in force as long as `under` is:

    small-pages   no huge pages (PR_SET_THP_DISABLE)
    collapsing    a thread collapses arenas into huge pages, and splits these again, without end
    pressure      a memory cgroup with little room, so that the kernel reclaims, and has no huge pages
    neighbours    a thread changes the protection of the pages before and after an arena, without end
    faulthandler  Python's handlers of SIGSEGV and SIGBUS are installed

`pressure` needs root.  Where the memory controller is of cgroup v2, memory.high throttles the process.  v1 has only the
limit, at which the kernel reclaims page cache.  Without swap an arena itself cannot be reclaimed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

import engine.state.memory as memory_module
from engine.format.layout import REGION_ALIGNMENT, align_up

_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_MADV_COLLAPSE = 25  # asm-generic/mman-common.h, since Linux 6.1
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

# Between two turns of a thread that disturbs; there are few cores.
_PAUSE_S = 0.002

# Memory that a process may add: some arenas with their copies, and page cache.
_ROOM_BYTES = 160 << 20

_MEMORY_V1, _MEMORY_V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def under(condition: str | None) -> Iterator[None]:
    """Impose a condition on this process; None: none."""
    if condition is None:
        yield
        return
    with CONDITIONS[condition]():
        yield


@contextmanager
def _small_pages() -> Iterator[None]:
    _prctl(_PR_SET_THP_DISABLE, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_THP_DISABLE, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


@contextmanager
def _faulthandler() -> Iterator[None]:
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable()
    try:
        yield
    finally:
        if not was_enabled:
            faulthandler.disable()


class _Range:
    """The mapping of an arena, kept alive: another one at its address would be disturbed instead."""

    def __init__(self, pages: mmap.mmap) -> None:
        self.pages = pages
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.end = self.start + len(pages)
        # Where the arena is in it, as HostMemory has it.
        self.address = align_up(self.start, REGION_ALIGNMENT)
        self.address_end = self.address + len(pages) - REGION_ALIGNMENT


@contextmanager
def _disturbed(disturb: Callable[[_Range], None], is_small: bool = False) -> Iterator[None]:
    """A thread disturbs the memory of the arenas that were made last."""
    ranges: list[_Range] = []
    stop = threading.Event()
    failures: list[BaseException] = []
    real = memory_module.allocate_pages

    def allocate(nbytes: int) -> mmap.mmap:
        pages = real(nbytes)
        if is_small:
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        if nbytes >= 2 * REGION_ALIGNMENT:  # of an arena of a unit or more
            ranges[:] = [*ranges[-1:], _Range(pages)]
        return pages

    def run() -> None:
        try:
            while not stop.wait(_PAUSE_S):
                for each in list(ranges):
                    disturb(each)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    with mock.patch.object(memory_module, "allocate_pages", allocate):
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
    if failures:
        raise failures[0]


def _collapse(each: _Range) -> None:
    """Collapse a unit as khugepaged does, which takes its time, and split another.

    MADV_COLLAPSE refuses what cannot be collapsed now, such as protected pages.  A change of the protection of one page
    splits the huge page that it is in; that page stays writable.
    """
    units = range(each.address, each.address_end - REGION_ALIGNMENT + 1, REGION_ALIGNMENT)
    turn = os.urandom(2)
    _libc.madvise(ctypes.c_void_p(each.start), ctypes.c_size_t(each.end - each.start), mmap.MADV_HUGEPAGE)
    _libc.madvise(ctypes.c_void_p(units[turn[0] % len(units)]), ctypes.c_size_t(REGION_ALIGNMENT), _MADV_COLLAPSE)
    split = units[turn[1] % len(units)] + 7 * mmap.PAGESIZE
    _protect(split, split + mmap.PAGESIZE, _READ_WRITE | mmap.PROT_EXEC)
    _protect(split, split + mmap.PAGESIZE, _READ_WRITE)


def _protect_neighbours(each: _Range) -> None:
    for start, end in ((each.start, each.address), (each.address_end, each.end)):
        for protection in (0, mmap.PROT_READ, _READ_WRITE):
            _protect(start, end, protection)


def _protect(start: int, end: int, protection: int) -> None:
    if start < end and _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


@contextmanager
def _pressure() -> Iterator[None]:
    """Put this process into a cgroup of its own, and back into the one it came from."""
    parent, limit = memory_cgroup()
    group = parent / f"engine-tears-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(_ROOM_BYTES))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def memory_cgroup() -> tuple[Path, str]:
    """The cgroup below which this process may make others that limit memory, and the name of the limit's file.

    Raises:
        OSError: there is none.
    """
    if (_MEMORY_V1 / "memory.limit_in_bytes").exists():
        return _MEMORY_V1, "memory.limit_in_bytes"
    if "memory" in (_MEMORY_V2 / "cgroup.subtree_control").read_text().split():
        return _MEMORY_V2, "memory.high"
    raise OSError(f"no memory controller is delegated below {_MEMORY_V2}")


CONDITIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "small-pages": _small_pages,
    "collapsing": lambda: _disturbed(_collapse, is_small=True),
    "pressure": _pressure,
    "neighbours": lambda: _disturbed(_protect_neighbours),
    "faulthandler": _faulthandler,
}
