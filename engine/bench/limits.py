"""What the host can do at all: fio on the same file system, and memcpy.

Theory of operation.  fio is given what the engine has: io_uring, O_DIRECT, fixed buffers and one registered file, in
one thread.  It writes as many bytes as the state has, and syncs at the end: to a file that is not there yet (fresh), to
one whose blocks are reserved (preallocated), and to one that it has written before (overwritten).  The limit is the
best of two block sizes and two depths.  Its buffers are in huge pages, as the engine's slots are: with small ones, that
lie scattered in memory, the same read took 140 ms in one run and 370 in the next.  A job takes its turn in the rounds
like everybody else, and its time is fio's own, without its start.

No save can do with less than one copy of the state and one look at the copy, and no restore that verifies what it
reads.  So fio also runs beside a thread that does that much, as often as fio moves the state: `BESIDE`.  It shows what
is left of the limit on a host whose device, or the memory that it needs, is busy with that as well.

memcpy is that of the C library, in one thread, over huge pages that have been touched, more than any cache holds.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.bench.goals import BESIDE, COPIED, WRITES
from engine.bench.measure import Rounds, Turn, forget

FIO, MEMCPY = "fio", "memcpy"
BLOCK_MIB, DEPTHS = (1, 4), (4, 16)
HOW = (
    "--ioengine=io_uring --direct=1 --fixedbufs=1 --registerfiles=1 --end_fsync=1, huge pages, blocks of 1 and 4 MiB, "
    "depths 4 and 16"
)

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memchr.restype = ctypes.c_void_p

# glibc(7), Memory Allocation Tunables: large allocations ask for transparent huge pages.  Since 2.35.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def setting(what: str, block_mib: int, depth: int) -> str:
    """The setting of a job, as samples have it; all of one kind begin with what they do."""
    return f"{what}, {block_mib} MiB x {depth}"


def fio_turns(
    rounds: Rounds, nbytes: int, shapes: tuple[tuple[int, int], ...] | None = None
) -> dict[tuple[str, str], Turn]:
    """Turns for fio in each way; none, and a row that says why, if there is no fio."""
    if not rounds.wanted(FIO):
        return {}
    rounds.introduce(FIO, "limit", HOW)
    if shutil.which("fio") is None:
        rounds.refuse(FIO, "limit", FileNotFoundError("fio is not installed; make bench does it"))
        return {}
    shapes = shapes or tuple((block, depth) for block in BLOCK_MIB for depth in DEPTHS)
    path = rounds.directory / "fio"
    _job(path, nbytes, 4, 16, "write")  # there is something to overwrite and to read
    # fio leaves out what is no whole block, and deletes a file that is shorter than it should be before it writes
    # (extend_file in its filesetup.c): that would be no overwriting.
    os.truncate(path, nbytes)
    return {
        (FIO, setting(what, *shape)): _turn(path, nbytes, what, *shape)
        for what in (*WRITES, "read")
        for shape in shapes
    }


def beside_turns(rounds: Rounds, nbytes: int) -> dict[tuple[str, str], Turn]:
    """Turns for fio beside a copy, in blocks of 4 MiB, 16 deep.  Called after `fio_turns`, which makes the file."""
    path = rounds.directory / "fio"
    if not path.exists():
        return {}
    copy = _Copy(nbytes)

    def beside(job: Turn) -> Turn:
        def turn() -> Mapping[str, float]:
            alone_s = job()["seconds_s"]
            with copy.every(alone_s):
                return job()

        return turn

    return {(FIO, setting(what + BESIDE, 4, 16)): beside(_turn(path, nbytes, what, 4, 16)) for what in COPIED}


def memcpy_turns(rounds: Rounds, nbytes: int) -> dict[tuple[str, str], Turn]:
    """A turn for memcpy."""
    if not rounds.wanted(MEMCPY):
        return {}
    rounds.introduce(MEMCPY, "limit", "memmove of the C library, one thread, huge pages")
    copy = _Copy(nbytes)

    def turn() -> Mapping[str, float]:
        began_ns = time.perf_counter_ns()
        copy.make()
        return {"seconds_s": (time.perf_counter_ns() - began_ns) / 1e9}

    return {(MEMCPY, "one thread"): turn}


class _Copy:
    """Memory that is copied to other memory, both in huge pages, as arenas and slots are."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._source, self._target = _huge_pages(nbytes), _huge_pages(nbytes)

    def make(self) -> None:
        ctypes.memmove(self._target, self._source, self._nbytes)

    def look(self) -> None:
        """Read all of the copy: what is looked for is not in there."""
        _libc.memchr(self._target, 0, self._nbytes)

    @contextmanager
    def every(self, period_s: float) -> Iterator[None]:
        """Meanwhile make and look at a copy once in each period.  ctypes lets go of the GIL for either."""
        ended = threading.Event()

        def work() -> None:
            while not ended.is_set():
                began = time.monotonic()
                self.make()
                self.look()
                ended.wait(max(0.0, period_s - (time.monotonic() - began)))

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _huge_pages(nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Memory that is there, and full of ones."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_char * nbytes).from_buffer(pages)
    ctypes.memset(memory, 1, nbytes)
    return memory


def _turn(path: Path, nbytes: int, what: str, block_mib: int, depth: int) -> Callable[[], Mapping[str, float]]:
    def turn() -> Mapping[str, float]:
        target = path
        if what == "read":
            forget(path)
        elif what != "overwritten":
            target = path.with_name(f"fio-{what}")
            target.unlink(missing_ok=True)
            if what == "preallocated":
                with target.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                    os.fsync(file.fileno())
        inode = path.stat().st_ino
        try:
            seconds_s = _job(target, nbytes, block_mib, depth, "read" if what == "read" else "write")
            assert path.stat().st_ino == inode, "fio has made a file anew that it was to overwrite"
            return {"seconds_s": seconds_s}
        finally:
            if target != path:
                target.unlink()

    return turn


def _job(path: Path, nbytes: int, block_mib: int, depth: int, rw: str) -> float:
    """Run fio once; its own time in seconds, which it knows in milliseconds."""
    block_bytes = block_mib << 20
    options = {
        **{"name": "limit", "filename": str(path), "rw": rw, "size": max(block_bytes, nbytes // 4096 * 4096)},
        **{"bs": block_bytes, "iodepth": depth, "ioengine": "io_uring", "direct": 1, "fixedbufs": 1},
        **{"registerfiles": 1, "end_fsync": int(rw == "write"), "fallocate": "none", "thread": 1},
        # A whole block at the end: O_DIRECT refuses anything else, and a state is hardly ever a whole number of them.
        **{"blockalign": 4096, "bs_unaligned": 0, "invalidate": 0, "output-format": "json"},
    }
    command = ["fio", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, **HUGE_PAGES}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise OSError(f"fio ended with {run.returncode}: {(run.stderr or run.stdout).strip().splitlines()[-1]}")
    [job] = json.loads(run.stdout)["jobs"]
    done = job[rw]
    # Bytes and milliseconds are rounded, so the time is scaled to the bytes that were asked for.
    return float(done["runtime"] / 1000 * nbytes / done["io_bytes"])
