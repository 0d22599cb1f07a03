"""Guard probe: which kind of guard works on this host, found out by guarding some memory.

Theory of operation.  As with backends, versions say little about what a container allows, so each kind is tried, best
first, on memory of its own.  The first that works is taken.  `auto` passes over a kind that protects memory too slowly:
where there are no huge pages, every page costs.  If no kind works, the guard is the fence: hooks of torch that hold
optimizers back, and no help from the kernel.
"""

from __future__ import annotations

import errno
import mmap
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from engine.errors import PlatformError
from engine.format.plan import Source
from engine.io.binding import ffi
from engine.io.guard import KINDS, Guard, GuardError, Kind
from engine.io.host import content_of, named
from engine.io.job import Direction, Job
from engine.io.packing import pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import Refused
from engine.options import GuardChoice, GuardName

# What is guarded in a trial: a few huge pages, which cost a few milliseconds to fill.
_UNIT_BYTES = 2 << 20
_TRIAL_BYTES = 8 * _UNIT_BYTES

# The least of so many times: others may take the CPU in the middle of one.
_TRIALS = 5

# Protecting a gigabyte takes 0.1 to 0.3 ms in huge pages and 20 to 40 ms without (512 MB on Linux 6.18).  Between them
# a busy host, or one with few huge pages left, still counts as one that has them.
_PROTECT_NS_MAX = 5_000_000


class GuardAttempt(NamedTuple):
    """One kind that was tried.

    Attributes:
        guard: which.
        cause, remedy: why it is not used, and what to do about it; both None where it is.
        protect_ns: what it takes to protect a gigabyte, in ns; None where it does not work.
    """

    guard: GuardName
    cause: str | None = None
    remedy: str | None = None
    protect_ns: int | None = None

    def __str__(self) -> str:
        cost = "" if self.protect_ns is None else f" ({self.protect_ns / 1e6:.2f} ms to protect a gigabyte)"
        return f"{self.guard}: {'works' if self.cause is None else f'{self.cause}; {self.remedy}'}{cost}"


class GuardProbe(NamedTuple):
    """What was tried, best first, and the guard that is used."""

    guard: GuardName
    attempts: tuple[GuardAttempt, ...]

    def __str__(self) -> str:
        return "\n".join([f"guard: {self.guard}", *map(str, self.attempts)])


def probe_guard(choice: GuardChoice) -> GuardProbe:
    """Find the best guard that works here, or try the one chosen.  Takes a few milliseconds.

    Raises:
        PlatformError: the one chosen does not work here.
    """
    attempts: list[GuardAttempt] = []
    for kind in _kinds(choice):
        attempt = _try(kind, is_chosen=choice != "auto")
        attempts.append(attempt)
        if attempt.cause is None:
            return GuardProbe(kind, tuple(attempts))
        if choice != "auto":
            raise PlatformError(
                f"guard {choice!r} does not work here: {attempt.cause}", f"{attempt.remedy}; or use 'auto'"
            )
    return GuardProbe("fence", (*attempts, GuardAttempt("fence")))


def guard_degradation(probe: GuardProbe) -> str | None:
    """What to tell the user where no guard works, or None: the other two keep every save from mixing two moments."""
    if probe.guard != "fence":
        return None
    refused = [attempt for attempt in probe.attempts if attempt.cause is not None]
    if not refused:
        return None  # the fence was asked for
    reasons = "; ".join(dict.fromkeys(f"{attempt.cause}; {attempt.remedy}" for attempt in refused))
    return f"snapshots are guarded by {probe.guard!r}, and not by {refused[0].guard!r}: {reasons}"


def explain_guard(error: GuardError) -> tuple[str, str]:
    """Why the kernel refused a guard, and what would help: each cause its own text."""
    reason = named(error.errno)
    if error.refused == Refused.USERFAULTFD:
        return _explain_userfaultfd(error.errno, reason)
    if error.refused == Refused.PROTECTION:
        return f"this kernel lacks the write protection of userfaultfd(2) that is needed ({reason})", _KERNEL
    if error.refused == Refused.SCAN:
        return f"this kernel lacks PAGEMAP_SCAN ({reason})", _KERNEL
    if error.refused == Refused.RANGE:
        return f"the kernel does not write-protect this memory ({reason})", _KERNEL
    return f"the kernel refused memory, a descriptor or a thread for a guard ({reason})", "raise that limit (ulimit -a)"


_KERNEL = "use a kernel of 6.7 or later with CONFIG_USERFAULTFD, on x86-64 or aarch64"


def _explain_userfaultfd(error: int, reason: str) -> tuple[str, str]:
    """userfaultfd(2), ERRORS, and Documentation/admin-guide/mm/userfaultfd.rst."""
    if "Seccomp:\t2" in content_of("/proc/self/status"):
        return (
            f"a seccomp filter or the lack of privilege refuses userfaultfd(2) ({reason}), as Docker's default does",
            (
                "run with a profile that allows userfaultfd (docker run --security-opt seccomp=FILE, seccompProfile in "
                "Kubernetes)"
            ),
        )
    if error == errno.EPERM:
        return f"this process may not use userfaultfd(2) for the kernel's own writes ({reason})", (
            "give it CAP_SYS_PTRACE or access to /dev/userfaultfd, or have root run "
            "sysctl -w vm.unprivileged_userfaultfd=1"
        )
    if error == errno.ENOSYS:
        return "this kernel has no userfaultfd(2)", _KERNEL
    return f"the kernel refused a userfaultfd(2) ({reason})", "raise the limit on open files (ulimit -n)"


def _kinds(choice: GuardChoice) -> Sequence[Kind]:
    if choice == "auto":
        return KINDS
    return [kind for kind in KINDS if kind == choice]


def _try(kind: Kind, is_chosen: bool) -> GuardAttempt:
    try:
        protect_ns = _measure(kind)
    except GuardError as error:
        return GuardAttempt(kind, *explain_guard(error))
    if kind == "cow" and protect_ns > _PROTECT_NS_MAX and not is_chosen:
        enabled = content_of("/sys/kernel/mm/transparent_hugepage/enabled")
        cause = f"to protect a gigabyte takes {protect_ns / 1e6:.1f} ms; huge pages are {enabled or 'not there'}"
        return GuardAttempt(kind, cause, "set transparent_hugepage/enabled to madvise or always", protect_ns)
    return GuardAttempt(kind, protect_ns=protect_ns)


def _measure(kind: Kind) -> int:
    """What it takes to protect a gigabyte, in ns.

    Raises:
        GuardError: the kernel refuses this kind.
    """
    pages = mmap.mmap(-1, _TRIAL_BYTES + _UNIT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that is built without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    view = ffi.from_buffer(pages)
    address = int(ffi.cast("uintptr_t", view))
    start = -address % _UNIT_BYTES
    for offset in range(start, start + _TRIAL_BYTES, mmap.PAGESIZE):
        pages[offset] = 1  # so that it is there
    guard = Guard(kind, address + start, _TRIAL_BYTES)
    try:
        job = Job(
            Direction.WRITE,
            pack_sources([Source(address + start, _TRIAL_BYTES)]),
            pack_extents([0], [0], [_TRIAL_BYTES], [0]),
            pack_blocks([(0, _TRIAL_BYTES, 0, 0, 1)]),
            pack_order([0]),
            file_count=1,
            guard=guard.c_guard,
        )
        return min(_time(guard, job) for _ in range(_TRIALS)) * (1 << 30) // _TRIAL_BYTES
    finally:
        guard.close()


def _time(guard: Guard, job: Job) -> int:
    began_ns = time.perf_counter_ns()
    guard.arm(job, None)
    took_ns = time.perf_counter_ns() - began_ns
    guard.disarm(job)
    return took_ns
