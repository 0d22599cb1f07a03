"""Memory cgroups: processes that the kernel's OOM killer ends at a limit of their own.

Theory of operation.  A group of version 1 is a directory (cgroups(7)); memory is charged to the group that its process
is in when it first touches it.  So a process that is moved to a new group is over a small limit with its next pages.  A
host without such groups, or a user who may not make one, skips the test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import until

_ROOT = Path("/sys/fs/cgroup/memory")


class MemoryGroup:
    """One group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, pid: int, nbytes: int) -> None:
        """Limit the memory of this group, and move a process to it."""
        (self.path / "memory.limit_in_bytes").write_text(str(nbytes))
        (self.path / "cgroup.procs").write_text(str(pid))

    def kill_count(self) -> int:
        """How many processes of the group the OOM killer has killed."""
        lines = (self.path / "memory.oom_control").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A new group below that of this process."""
    own = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    path = _ROOT / (own or [""])[0].lstrip("/") / f"engine-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup of version 1 can be made here: {error}")
    try:
        yield MemoryGroup(path)
    finally:
        until(lambda: not (path / "cgroup.procs").read_text())
        path.rmdir()
