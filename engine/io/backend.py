"""Backend: find the best way of moving blocks that works in a directory, by moving one.

Theory of operation.  There is a ladder of four ways, best first:

    io_uring         one ring, slots and files registered with it, O_DIRECT
    io_uring_plain   one ring, nothing registered, O_DIRECT
    threads          threads that call pread(2) and pwrite(2), O_DIRECT
    buffered         the same through the page cache

Versions and configurations say little about what a container, a limit or a file system allows.  So each rung is tried
with the slots that it would use: it writes one block to a file without a name in the directory, and reads it back.  The
first that works is taken.  Plan, statuses, checksums and commit are the same for all of them.

A full or failing disk rules out no rung: it would fail all of them, and an Engine must open on a full disk to restore
from it.  If the disk has no room for the file, the first rung that can be opened is taken.  Each cause has its own text
and remedy.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, get_args

from engine.errors import MEDIA_ERRORS, PlatformError, StorageError, remedy_for
from engine.format.plan import ALIGNMENT, Source
from engine.io.binding import JOB_PLACES, JOBS_MAX, NATIVE_PATH, direct_alignment
from engine.io.descriptor import Descriptor
from engine.io.guard_probe import GuardProbe
from engine.io.host import content_of, limit_of, named
from engine.io.job import Direction, FailureKind, Job, Milestone
from engine.io.packing import address_of, pack_blocks, pack_extents, pack_order, pack_sources
from engine.io.pipeline import OpenError, Pipeline, Refused, Shared
from engine.io.serving import Serving
from engine.options import Backend, Choice

LADDER: tuple[Backend, ...] = get_args(Backend)

# Errors of a write that come from the disk or a limit on its use, and not from the way of moving blocks.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_STORAGE_ERRORS = (*_NO_ROOM, errno.EROFS, errno.EFBIG, errno.ENXIO, errno.ENODEV, *MEDIA_ERRORS)

# The block that is written and read back: no two of its 8-byte words are equal.
_PATTERN = b"".join(number.to_bytes(8, "little") for number in range(ALIGNMENT // 8))

T = TypeVar("T")

_SYSCTL = "/proc/sys/kernel/io_uring_disabled"


class Scratch(Protocol):
    """The file operations of a trial; the store's `Filesystem` has them."""

    def open_scratch(self, directory: str, direct: bool) -> Descriptor:
        """Open an empty file that has no name, to read and write."""

    def close(self, descriptor: Descriptor) -> None:
        """Close it."""


class Attempt(NamedTuple):
    """One rung that was tried, with the cause of its failure and the remedy; both None if it works."""

    backend: Backend
    cause: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}: {'works' if self.cause is None else f'{self.cause}; {self.remedy}'}"


class Probe(NamedTuple):
    """What was tried in a directory, best first.  `backend` is the one that works, or None.

    `guard` says how snapshots are guarded; a Store alone, which knows no arena, has none.
    """

    directory: str
    backend: Backend | None
    attempts: tuple[Attempt, ...]
    guard: GuardProbe | None = None

    def __str__(self) -> str:
        lines = [f"{self.directory}: {self.backend or 'nothing works'}", *map(str, self.attempts)]
        return "\n".join([*lines, *([] if self.guard is None else [str(self.guard)])])


def open_pipeline(
    directory: str, filesystem: Scratch, choice: Choice, slot_count: int, slot_bytes: int, staging_threads: int
) -> tuple[Pipeline, Probe]:
    """Open a pipeline of the best backend that works in a directory, or of the one chosen.  Blocks on the disk.

    Raises:
        PlatformError: the one chosen does not work here, or none does.
        StorageError: no file can be made in the directory.
    """
    return _choose(directory, choice, partial(_try, directory, filesystem, slot_count, slot_bytes, staging_threads))


def open_serving(
    directory: str, filesystem: Scratch, choice: Choice, slot_count: int, slot_bytes: int, shared: Shared
) -> tuple[Serving, Probe]:
    """In a monitor: serve a trainer's pipeline by the best backend that works, or the one chosen; as `open_pipeline`.

    A way is tried with one slot, and then with the shared ones.
    """

    def serve(backend: Backend) -> Serving:
        _try(directory, filesystem, 1, ALIGNMENT, 1, backend).close()
        try:
            return Serving(slot_count, slot_bytes, backend, shared)
        except OpenError as error:
            raise _explain_open(error, slot_count * slot_bytes) from None

    return _choose(directory, choice, serve)


def _choose(directory: str, choice: Choice, open_rung: Callable[[Backend], T]) -> tuple[T, Probe]:
    opened, probe = _climb_down(directory, LADDER if choice == "auto" else (choice,), open_rung)
    if opened is not None:
        return opened, probe
    causes = _join([attempt.cause for attempt in probe.attempts])
    tried = "no backend works" if choice == "auto" else f"backend {choice!r} does not work"
    remedy = _join([attempt.remedy for attempt in probe.attempts])
    raise PlatformError(f"{tried} in {directory}: {causes}", remedy if choice == "auto" else f"{remedy}; or use 'auto'")


def find(directory: str, filesystem: Scratch, slot_count: int, slot_bytes: int, staging_threads: int) -> Probe:
    """The result that `open_pipeline` would have in a directory.  Blocks on the disk; leaves nothing open or behind.

    Raises:
        StorageError: no file can be made in the directory.
    """
    pipeline, probe = _climb_down(
        directory, LADDER, partial(_try, directory, filesystem, slot_count, slot_bytes, staging_threads)
    )
    if pipeline is not None:
        pipeline.close()
    return probe


def open_like(pipeline: Pipeline, slot_count: int, slot_bytes: int) -> Pipeline:
    """A second pipeline of the same backend; its slots are not registered, because it is not kept for long.

    Raises:
        PlatformError: the host lacks the memory, descriptors or threads for it.
    """
    try:
        backend: Backend = "io_uring_plain" if pipeline.backend == "io_uring" else pipeline.backend
        return Pipeline(slot_count, slot_bytes, backend, pipeline.staging_threads)
    except OpenError as error:
        raise _explain_open(error, slot_count * slot_bytes) from None


def open_to_read(slot_count: int, slot_bytes: int, staging_threads: int) -> Pipeline:
    """A pipeline that reads, on a ring if one works here; its slots are not registered.

    Nothing is written: the trial reads a block of the compiled module's own file.

    Raises:
        PlatformError: the host lacks the memory, descriptors or threads for it.
    """
    try:
        return _try_to_read("io_uring_plain", slot_count, slot_bytes, staging_threads)
    except PlatformError:
        return _try_to_read("threads", slot_count, slot_bytes, staging_threads)


def _try_to_read(backend: Backend, slot_count: int, slot_bytes: int, staging_threads: int) -> Pipeline:
    try:
        pipeline = Pipeline(slot_count, slot_bytes, backend, staging_threads)
    except OpenError as error:
        raise _explain_open(error, slot_count * slot_bytes) from None
    try:
        with open(NATIVE_PATH, "rb") as file:
            job = _move(pipeline, Direction.READ, file.fileno(), bytearray(ALIGNMENT), [bytes(16)])
        if job.failure is not None and job.failure.kind != FailureKind.CHECKSUM:  # a wrong checksum: it was read
            _refused(job, "read", backend)
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def degradation(probe: Probe) -> str | None:
    """The warning for the user if the best backend did not work; None if it did."""
    refused = [attempt for attempt in probe.attempts if attempt.cause is not None]
    if not refused:
        return None
    reasons = _join([f"{attempt.cause}; {attempt.remedy}" for attempt in refused])
    return f"{probe.backend!r} is used in {probe.directory}, and not {refused[0].backend!r}: {reasons}"


def _climb_down(directory: str, rungs: Sequence[Backend], open_rung: Callable[[Backend], T]) -> tuple[T | None, Probe]:
    attempts: list[Attempt] = []
    for backend in rungs:
        try:
            opened = open_rung(backend)
        except PlatformError as error:
            attempts.append(Attempt(backend, error.cause, error.remedy))
            continue
        attempts.append(Attempt(backend))
        return opened, Probe(directory, backend, tuple(attempts))
    return None, Probe(directory, None, tuple(attempts))


def _try(
    directory: str, filesystem: Scratch, slot_count: int, slot_bytes: int, staging_threads: int, backend: Backend
) -> Pipeline:
    """A pipeline that has written and read a block, if there is room for one; PlatformError if this backend does not
    work."""
    descriptor = _open_scratch(directory, filesystem, direct=backend != "buffered")
    try:
        try:
            pipeline = Pipeline(slot_count, slot_bytes, backend, staging_threads)
        except OpenError as error:
            raise _explain_open(error, slot_count * slot_bytes) from None
        try:
            if descriptor is not None:
                _round_trip(pipeline, descriptor.number)
        except BaseException:
            pipeline.close()
            raise
        return pipeline
    finally:
        if descriptor is not None:
            filesystem.close(descriptor)


def _open_scratch(directory: str, filesystem: Scratch, direct: bool) -> Descriptor | None:
    """A file without a name, or None if there is no room; PlatformError if it refuses O_DIRECT with our alignment."""
    try:
        descriptor = filesystem.open_scratch(directory, direct)
    except StorageError as error:
        if error.errno in _NO_ROOM:  # no inode is left
            return None
        if not direct or error.errno != errno.EINVAL:  # open(2): no O_DIRECT
            raise
        raise PlatformError(f"the file system of {directory} has no direct I/O (O_DIRECT)", _ELSEWHERE) from None
    wanted = direct_alignment(descriptor.number)
    if direct and wanted > ALIGNMENT:
        filesystem.close(descriptor)
        cause = f"direct I/O in {directory} is aligned to {wanted} bytes, and blocks to {ALIGNMENT}"
        raise PlatformError(cause, _ELSEWHERE)
    return descriptor


def _round_trip(pipeline: Pipeline, descriptor: int) -> None:
    """Write one block and read it back; PlatformError if the way does not work."""
    written = _move(pipeline, Direction.WRITE, descriptor, _PATTERN, None)
    if _refused(written, "write", pipeline.backend):
        return  # there is nothing to read back
    read = _move(pipeline, Direction.READ, descriptor, bytearray(ALIGNMENT), written.checksums())
    _refused(read, "read", pipeline.backend)


def _move(
    pipeline: Pipeline, direction: Direction, descriptor: int, memory: bytes | bytearray, checksums: list[bytes] | None
) -> Job:
    job = Job(
        direction,
        pack_sources([Source(address_of(memory), len(memory))]),
        pack_extents([0], [0], [ALIGNMENT], [0]),
        pack_blocks([(0, ALIGNMENT, 0, 0, 1)]),
        pack_order([0]),
        file_count=1,
        checksums=checksums,
        owners=memory,
    )
    pipeline.submit(job)
    pipeline.attach(job, [descriptor])
    pipeline.wait(job, Milestone.DONE)
    return job


def _refused(job: Job, operation: str, backend: Backend) -> bool:
    """Whether the disk refused a job; PlatformError if the way did."""
    failure = job.failure
    if failure is None or (failure.kind == FailureKind.IO and failure.errno in _STORAGE_ERRORS):
        return failure is not None
    if failure.kind != FailureKind.IO:
        raise PlatformError(f"a block's {operation} did not move what it should have", "see the kernel's log")
    remedy = _REMEDIES.get(failure.errno, _ALLOW) if backend in _RINGS else remedy_for(failure.errno)
    raise PlatformError(f"a {operation} of one block is refused: {named(failure.errno)}", remedy)


# -- causes and remedies ----------------------------------------------------------------------------------------------

# The backends that use io_uring.
_RINGS: tuple[Backend, ...] = ("io_uring", "io_uring_plain")

_ELSEWHERE = "keep checkpoints on ext4, XFS or another file system with direct I/O"
_ALLOW = "let a seccomp profile or security module that refuses it allow io_uring_setup, _enter and _register"
_REMEDIES = {
    errno.ENOMEM: "give the Engine a smaller staging_bytes, or the process more memory",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (sysctl fs.file-max)",
    errno.EAGAIN: "raise the limit on threads (ulimit -u, or pids.max of the cgroup)",
    errno.EINVAL: "use a kernel of 5.6 or later, or keep checkpoints on another file system",
}
_MEMLOCK = "raise it (ulimit -l, LimitMEMLOCK= in systemd, --ulimit memlock=-1 in docker)"

# Below this a suggestion of smaller slots would be slower than slots that are not pinned: blocks under 256 KiB.
_MEMLOCK_BYTES_MIN = 2 << 20


def _explain_open(error: OpenError, staging_bytes: int) -> PlatformError:
    """The cause and the remedy when a pipeline could not be opened; each cause has its own text."""
    explain: Callable[[int, int], tuple[str, str] | None] = {
        Refused.RESOURCES: lambda *_: None,
        Refused.RING: _explain_ring,
        Refused.BUFFERS: _explain_buffers,
        Refused.FILES: _explain_files,
    }[error.refused]
    known = explain(error.errno, staging_bytes)
    if known is not None:
        return PlatformError(*known)
    what = {
        Refused.RESOURCES: f"memory, a descriptor or a thread for {staging_bytes} bytes of staging slots",
        Refused.RING: "an io_uring (io_uring_setup)",
        Refused.BUFFERS: "the registration of staging slots (io_uring_register)",
        Refused.FILES: "the registration of files (io_uring_register)",
    }[error.refused]
    otherwise = remedy_for(error.errno) if error.refused == Refused.RESOURCES else _ALLOW
    return PlatformError(f"the kernel refused {what}: {named(error.errno)}", _REMEDIES.get(error.errno, otherwise))


def _explain_ring(error: int, _staging_bytes: int) -> tuple[str, str] | None:
    """io_uring_setup(2), ERRORS, and Documentation/admin-guide/sysctl/kernel.rst on io_uring_disabled."""
    disabled = content_of(_SYSCTL)
    if error == errno.EPERM and disabled in ("1", "2"):
        whom = "every process" if disabled == "2" else "processes outside kernel.io_uring_group without CAP_SYS_ADMIN"
        return f"the sysctl kernel.io_uring_disabled is {disabled}: io_uring is refused to {whom}", (
            "have root run sysctl -w kernel.io_uring_disabled=0"
        )
    filtered = "Seccomp:\t2" in content_of("/proc/self/status")
    if error == errno.EPERM or (error == errno.ENOSYS and filtered):
        return f"a seccomp filter or security module refuses io_uring ({named(error)}), as Docker's default does", (
            "run with a profile that allows io_uring_setup, io_uring_enter and io_uring_register "
            "(docker run --security-opt seccomp=FILE, seccompProfile in Kubernetes)"
        )
    if error == errno.ENOSYS:
        return "this kernel has no io_uring, as gVisor's and some of RHEL's and WSL's have none", (
            "use a kernel of 5.6 or later that is built with CONFIG_IO_URING"
        )
    limit = limit_of(resource.RLIMIT_MEMLOCK)
    if error == errno.ENOMEM and limit is not None:  # until 5.12 the ring itself was charged
        return f"RLIMIT_MEMLOCK is {limit}, too small for an io_uring", _MEMLOCK
    return None


def _explain_buffers(error: int, staging_bytes: int) -> tuple[str, str] | None:
    """io_uring_register(2), IORING_REGISTER_BUFFERS, ERRORS."""
    limit = limit_of(resource.RLIMIT_MEMLOCK)
    if error != errno.ENOMEM or limit is None:  # without a limit it is memory that is short
        return None
    cause = f"RLIMIT_MEMLOCK is {limit}, and {staging_bytes} bytes of staging slots are to be pinned"
    return f"{cause}, beside what this user has pinned already", _MEMLOCK + _smaller_slots(limit)


def _smaller_slots(limit: int) -> str:
    """Sizes of staging and blocks that a limit on locked memory allows; a quarter of it is left for the rest."""
    if limit < _MEMLOCK_BYTES_MIN:
        return ""
    block_bytes = limit // 8 // ALIGNMENT * ALIGNMENT
    return f", or use staging_bytes={6 * block_bytes} with block_bytes={block_bytes}"


def _explain_files(error: int, _staging_bytes: int) -> tuple[str, str] | None:
    """io_uring_register(2), IORING_REGISTER_FILES, ERRORS."""
    if error != errno.EMFILE:
        return None
    table = JOBS_MAX * JOB_PLACES
    limit = limit_of(resource.RLIMIT_NOFILE)
    return f"RLIMIT_NOFILE is {limit}, below the ring's table of {table} files", _REMEDIES[errno.EMFILE]


def _join(texts: Sequence[str | None]) -> str:
    """Each text once, in order."""
    return "; ".join(dict.fromkeys(text for text in texts if text is not None))
