"""The limits of the host: fio on the same file system, and memcpy.

Theory of operation.  fio has the engine's means: io_uring, O_DIRECT, fixed buffers and one registered file, in one
thread.  It writes as many bytes as the state has, and syncs at the end: to a file that does not exist (fresh), to one
with reserved blocks (preallocated), and to one that was written before (overwritten).  The limit is the best of two
block sizes and two depths.  Its buffers are in huge pages, like the engine's slots: with small pages, which are
scattered in memory, the same read took 140 ms in one run and 370 in the next.  A job takes its turn in the rounds like
every subject, and its time is fio's own, without its start.

A job overwrites and reads the same files that the engine recycles and restores, lent to it between the engine's turns,
because a virtual drive may be faster at some locations.  On the host of docs/perf.md the same job took 100 ms on some
files and 185 on others, repeatably, and files of a kind were next to each other.

A save that stages copies the state once.  A restore that verifies before a byte reaches a tensor reads the bytes once
and copies them once.  So fio also runs beside a thread that does the same in the time that fio takes: `BESIDE`.  It
shows how much of the limit such an engine can reach on a host whose device or memory is busy with the copy as well.

memcpy is that of the C library, in one thread, over huge pages, more than any cache holds.  It copies from memory that
is used several times a round, like the engine's arena, to memory that is used once, like its slots.  A virtual machine
copies memory that it has just received, or not used for a while, at half the speed.

pread is one call of preadv(2), past the page cache, for as many bytes as the blocks of one layer.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from engine.bench.goals import (
    BESIDE,
    BLOCK_BYTES,
    COPIED,
    FRESH,
    JOBS,
    OVERWRITTEN,
    PART_BLOCKS,
    PREALLOCATED,
    READ,
)
from engine.bench.measure import Rounds, Turn, forget, settle

FIO, MEMCPY, PREAD = "fio", "memcpy", "pread"
SHAPES = ((1, 4), (1, 16), (4, 4), (4, 16))  # blocks in MiB, and depths
DEEP = ((1, 16), (4, 16))  # those that are also tried beside a copy: the shallow ones were seldom the best
HOW = (
    "--ioengine=io_uring --direct=1 --fixedbufs=1 --registerfiles=1 --end_fsync=1, huge pages, blocks of 1 and 4 MiB, "
    "depths 4 and 16, beside a copy only 16"
)

Lent = Mapping[str, Callable[[], Sequence[Path]]]  # by kind of job: where the files are at the moment

_libc = ctypes.CDLL(None)
_libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_libc.memchr.restype = ctypes.c_void_p

# glibc(7), Memory Allocation Tunables: large allocations ask for transparent huge pages.  Since 2.35.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def limit_turns(rounds: Rounds, nbytes: int, lent: Lent) -> dict[tuple[str, str], Turn]:
    """Turns for all of fio's jobs in all shapes, for those beside a copy, for memcpy and for one small read."""
    turns = fio_turns(rounds, nbytes, JOBS, lent) | _pread_turn(rounds, lent)
    beside = fio_turns(rounds, nbytes, COPIED, lent, DEEP)
    if not beside and not rounds.wanted(MEMCPY):
        return turns
    source = huge_pages(nbytes)
    if rounds.wanted(MEMCPY):
        rounds.introduce(MEMCPY, "limit", "memmove of the C library, one thread, huge pages")
        turns[MEMCPY, "one thread"] = _Copy(source).timed
    if not beside:
        return turns
    copy = _Copy(source)
    for (name, alone), turn in beside.items():
        what, _, shape = alone.partition(", ")
        turns[name, f"{what}{BESIDE}, {shape}"] = _beside(rounds, copy, turn, looking=what == READ)
    return turns


def fio_turns(
    rounds: Rounds,
    nbytes: int,
    kinds: Iterable[str],
    lent: Lent,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> dict[tuple[str, str], Turn]:
    """Turns for fio alone; none, and a row that says why, if there is no fio.

    Args:
        kinds: of `goals.JOBS`.
        lent: files of at least so many bytes that jobs of a kind overwrite or read in turn; others have one each.
        shapes: sizes of blocks in MiB, and depths.
    """
    if not rounds.wanted(FIO):
        return {}
    rounds.introduce(FIO, "limit", HOW)
    if shutil.which("fio") is None:
        rounds.refuse(FIO, "limit", FileNotFoundError("fio is not installed; make bench does it"))
        return {}
    return {
        (FIO, f"{what}, {block_mib} MiB x {depth}"): _turn(
            _in_turn(lent[what], number) if _are_lent(lent, what) else _own_file(rounds.directory, nbytes, what),
            nbytes,
            what,
            block_mib,
            depth,
        )
        for what in kinds
        for number, (block_mib, depth) in enumerate(shapes)
    }


def _are_lent(lent: Lent, what: str) -> bool:
    """Whether there are files for a kind of job; there are none if a state is in several files."""
    return what in lent and bool(lent[what]())


def _in_turn(find: Callable[[], Sequence[Path]], first: int) -> Iterator[Path]:
    """One of these files after the other, without end; jobs begin with different ones, so that a round has no
    favourite."""
    for number in itertools.count(first):
        paths = find()
        yield paths[number % len(paths)]


def _own_file(directory: Path, nbytes: int, what: str) -> Iterator[Path]:
    """The one file of a job, in its own directory; it exists if the job overwrites or reads it."""
    path = Path(tempfile.mkdtemp(prefix="fio-", dir=directory)) / "0"
    if what in (OVERWRITTEN, READ):
        # fio deletes a file that is shorter than it should be before it writes (extend_file in its filesetup.c).
        _preallocate(path, nbytes, 4)
        _job(path, nbytes, 4, 16, "write")
    return itertools.repeat(path)


def _preallocate(path: Path, nbytes: int, block_mib: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(nbytes, block_mib << 20))
        os.fsync(file.fileno())


class _Copy:
    """Memory that is copied to memory of the copy's own, both in huge pages, as arenas and slots are; three times by
    now, as ours has saved three times before the first round."""

    def __init__(self, source: ctypes.Array[ctypes.c_char]) -> None:
        self._nbytes = len(source)
        self._source, self._target = source, huge_pages(self._nbytes)
        for _ in range(3):
            self.make()

    def make(self) -> None:
        ctypes.memmove(self._target, self._source, self._nbytes)

    def look(self) -> None:
        """Read all of the copy, by searching for a byte that it does not contain."""
        if _libc.memchr(self._target, 0, self._nbytes) is not None:
            raise AssertionError("the copy is not what was copied")

    def timed(self) -> Mapping[str, float]:
        """A turn: one copy."""
        began_ns = time.perf_counter_ns()
        self.make()
        return {"seconds_s": (time.perf_counter_ns() - began_ns) / 1e9}

    @contextmanager
    def every(self, period_s: float, *, looking: bool) -> Iterator[None]:
        """Meanwhile make a copy once in each period, and perhaps look at it.  ctypes lets go of the GIL for either."""
        ended = threading.Event()

        def work() -> None:
            while not ended.is_set():
                began = time.monotonic()
                self.make()
                if looking:
                    self.look()
                ended.wait(max(0.0, period_s - (time.monotonic() - began)))

        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(work)
            try:
                yield
            finally:
                ended.set()
                working.result()


def _beside(rounds: Rounds, copy: _Copy, job: Turn, *, looking: bool) -> Turn:
    """The same job beside one copy, spread over the time of the job: the median of its last three turns, as each may be
    on another file; at first its time alone."""
    taken_s: deque[float] = deque(maxlen=3)

    def turn() -> Mapping[str, float]:
        if not taken_s:
            taken_s.append(job()["seconds_s"])
            settle(rounds.directory)
        with copy.every(median(taken_s), looking=looking):
            taken_s.append(job()["seconds_s"])
        return {"seconds_s": taken_s[-1]}

    return turn


def _pread_turn(rounds: Rounds, lent: Lent) -> dict[tuple[str, str], Turn]:
    """A turn for reading `PART_BLOCKS` blocks that are in no cache, with one call: the first that fio reads."""
    if not rounds.wanted(PREAD):
        return {}
    rounds.introduce(PREAD, "limit", f"preadv(2), O_DIRECT, one call for {PART_BLOCKS} blocks of 4 MiB, huge pages")
    nbytes = PART_BLOCKS * BLOCK_BYTES
    if _are_lent(lent, READ):
        path = lent[READ]()[0]
    else:
        path = rounds.directory / "pread"
        path.write_bytes(os.urandom(nbytes))
    memory = huge_pages(nbytes)

    def turn() -> Mapping[str, float]:
        forget(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            began_ns = time.perf_counter_ns()
            read_bytes = os.preadv(descriptor, [memory], 0)
            seconds_s = (time.perf_counter_ns() - began_ns) / 1e9
        finally:
            os.close(descriptor)
        if read_bytes != nbytes:
            raise OSError(f"preadv(2) has read {read_bytes} of {nbytes} bytes")
        return {"seconds_s": seconds_s}

    return {(PREAD, f"{PART_BLOCKS} blocks"): turn}


def huge_pages(nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Memory that is there, and full of ones.  As `memory.allocate_pages`, which is no part of the public API."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_char * nbytes).from_buffer(pages)
    ctypes.memset(memory, 1, nbytes)
    return memory


def _turn(paths: Iterator[Path], nbytes: int, what: str, block_mib: int, depth: int) -> Turn:
    def turn() -> Mapping[str, float]:
        path = next(paths)
        if what == READ:
            forget(path)
            return {"seconds_s": _job(path, nbytes, block_mib, depth, "read")}
        if what == PREALLOCATED:
            _preallocate(path, nbytes, block_mib)
        try:
            if what == FRESH:
                return {"seconds_s": _job(path, nbytes, block_mib, depth, "write")}
            with path.open("rb") as file:
                seconds_s = _job(path, nbytes, block_mib, depth, "write")
                if os.fstat(file.fileno()).st_nlink == 0:
                    raise OSError("fio has deleted the file that was there, and made one anew")
            return {"seconds_s": seconds_s}
        finally:
            if what != OVERWRITTEN:
                path.unlink()

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
