"""The native resources of a process, as proc(5) shows them, and processes for tests that harm theirs.

Theory of operation.  proc(5) lists descriptors, threads and mappings.  Other threads make and remove them, so an entry
may vanish between the listing and its reading.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from jobs import HANG_NS


def rings() -> int:
    """How many io_uring descriptors this process has."""
    return descriptors().count("anon_inode:[io_uring]")


def descriptors() -> list[str]:
    """The targets of this process's descriptors."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return sorted(found)


def descriptor_numbers() -> set[int]:
    """The numbers of this process's descriptors."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return {number for number in numbers if os.path.lexists(f"/proc/self/fd/{number}")}


def stays_open_in_exec(descriptor: int) -> bool:
    """Whether a program that this process becomes would have a descriptor."""
    return not fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def native_threads() -> list[Path]:
    """The pipelines' threads and their helpers, as directories of proc(5).

    The kernel's workers for a ring are threads of this process too, and briefly have the name of their maker.
    """
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text().strip().startswith(("engine-io", "engine-stage-")):
                found.append(task)
    return found


def status_bytes(field: str) -> int:
    """A line of /proc/self/status that is in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def ring_descriptors() -> set[int]:
    """The numbers of this process's rings."""
    names = [int(name) for name in os.listdir("/proc/self/fd")]
    links = {name: f"/proc/self/fd/{name}" for name in names}
    return {name for name, link in links.items() if os.path.lexists(link) and "io_uring" in os.readlink(link)}


def slots() -> set[int]:
    """Where staging slots are mapped: memory without a name that no fork gets (proc_pid_smaps(5))."""
    found: set[int] = set()
    for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if not words[0].endswith(":"):
            start, is_anonymous = int(words[0].split("-")[0], 16), len(words) == 5
        elif words[0] == "VmFlags:" and "dc" in words and is_anonymous:
            found.add(start)
    return found


def is_inaccessible(address: int) -> bool:
    """Whether an address is mapped without access (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[1] == "---p"
    return False


def in_a_process_of_its_own(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the same Python, where it may fork, drop its rights or crash."""
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=HANG_NS / 1e9,
    )
