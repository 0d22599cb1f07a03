"""File systems that a test can stop or break, and readers of the files that an engine left on disk.

`GatedFilesystem` stops every save before it makes its files, so that a test can examine an engine in the middle of a
save.  `FailingFilesystem` refuses one operation with an errno.  `syscalls.SystemCalls` refuses system calls.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from hooked import HookedFilesystem
from safetensors.torch import load_file

from engine.errors import StorageError


class GatedFilesystem(HookedFilesystem):
    """Saves wait in `allocate` until `gate` is set; restores are not held up.

    `gates` may hold another gate for the saves of one step, by the name of its directory.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gates: dict[str, threading.Event] = {}

    def before(self, operation: str, path: str, target: str = "") -> None:
        if operation == "allocate":
            step_name = Path(path).parent.name.removesuffix(".partial")
            assert self.gates.get(step_name, self.gate).wait(60), "a test forgot to open its gate"


class FailingFilesystem(HookedFilesystem):
    """Refuses the next operation of a name with an error, once; of directories a partial's, of renames a commit's.

    A save that meets a full disk makes room and allocates once more.  An allocation that is refused for good is refused
    then, too.
    """

    def __init__(self) -> None:
        self.operation: str | None = None
        self.error = 0
        self._full: str | None = None
        self._for_good = False

    def fail_next(self, operation: str, error: int, for_good: bool = False) -> None:
        """Arm it."""
        self.operation, self.error, self._full, self._for_good = operation, error, None, for_good

    def before(self, operation: str, path: str, target: str = "") -> None:
        if operation == "sync_directory" and not path.endswith(".partial"):
            return
        if operation == "rename" and (".engine" in target or not target.endswith(tuple("0123456789"))):
            return
        if operation == "open_for_blocks":
            self._full = None  # of a save before
        if self.operation == operation or (operation == "allocate" and path == self._full):
            self.operation, self._full = None, path if self._for_good else None
            raise StorageError(self.error, operation, path)


# Every operation of a save that FailingFilesystem can refuse before the commit point.
FAILURES = ("open_for_blocks", "allocate", "truncate", "sync_file", "write_new_file", "sync_directory", "rename")


def stored(directory: str | os.PathLike[str], step: int) -> dict[str, torch.Tensor]:
    """The tensors that the stock safetensors library reads from all files of a committed step."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted((Path(directory) / f"step-{step:08d}").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def names(directory: str | os.PathLike[str]) -> list[str]:
    """The names in a directory, without the engine's own."""
    return sorted(name for name in os.listdir(directory) if name != ".engine")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: the same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)
