"""The resources of a process, to be compared before and after: descriptors, engine threads and mappings of slots."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """The targets of open descriptors, the names of the engine's threads, and the count of mappings kept from forks."""

    descriptors: Counter[str]
    threads: Counter[str]
    slot_mappings: int


def held() -> Held:
    """The resources of this process at this moment."""
    descriptors: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which the directory is read
            descriptors[os.readlink(f"/proc/self/fd/{name}")] += 1
    threads: Counter[str] = Counter()
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            threads[Path(f"/proc/self/task/{name}/comm").read_text().strip()] += 1
    # Slots are MADV_DONTFORK, which nothing else in a process of Python and torch is: "dc" in proc_pid_smaps(5).
    flags = [line.split()[1:] for line in Path("/proc/self/smaps").read_text().splitlines() if line[:8] == "VmFlags:"]
    ours = Counter({name: count for name, count in threads.items() if name.startswith("engine-")})
    return Held(descriptors, ours, sum("dc" in line for line in flags))
