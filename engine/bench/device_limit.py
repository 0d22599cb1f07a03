"""A limit on the bytes that this process writes per second, so that a fast drive is measured as a slower one.

Theory of operation.  The kernel's blkio controller (cgroup v1) or io controller (cgroup v2) delays the requests of the
processes of a cgroup (blkio-controller.rst and cgroup-v2.rst in Documentation/admin-guide).  The process is moved into
a cgroup of its own, and back at the end.  Both need root, and a file system on a block device.  The latency of a
request that is not delayed stays that of the drive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/blkio")
_V2 = Path("/sys/fs/cgroup")


@contextmanager
def limited(directory: Path, write_bytes_per_s: int) -> Iterator[None]:
    """Limit the writes of this process to the device of a directory.

    Raises:
        OSError: the host has no such controller, or this user may not use it.
    """
    number = os.stat(directory).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    if _V1.is_dir():
        root, name, line = _V1, "blkio.throttle.write_bps_device", f"{device} {write_bytes_per_s}"
    else:
        root, name, line = _V2, "io.max", f"{device} wbps={write_bytes_per_s}"
    before = root / _current("blkio" if root == _V1 else "").lstrip("/")
    ours = root / f"engine-bench-{os.getpid()}"
    ours.mkdir()
    try:
        (ours / name).write_text(line, encoding="ascii")
        (ours / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
        try:
            yield
        finally:
            (before / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    finally:
        ours.rmdir()


def _current(controller: str) -> str:
    """The cgroup of this process in the hierarchy of a controller; "" is that of cgroup v2 (cgroups(7))."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    raise OSError(f"this process is in no cgroup of {controller or 'version 2'}")
