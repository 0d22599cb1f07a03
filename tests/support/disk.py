"""File systems that a test can stop or break, and readers of the files that an engine left on disk.

`GatedFilesystem` stops every save before it makes its files, so that a test can examine an engine in the middle of a
save.  `FailingFilesystem` refuses one operation with an errno.  `syscalls.SystemCalls` refuses system calls.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.errors import StorageError
from engine.store.filesystem import Filesystem


class GatedFilesystem(Filesystem):
    """Saves wait in `allocate` until `gate` is set; restores are not held up.

    `gates` may hold another gate for the saves of one step, by the name of its directory.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gates: dict[str, threading.Event] = {}

    def allocate(self, descriptor: int, nbytes: int, path: str) -> None:
        step_name = Path(path).parent.name.removesuffix(".partial")
        assert self.gates.get(step_name, self.gate).wait(60), "a test forgot to open its gate"
        super().allocate(descriptor, nbytes, path)


class FailingFilesystem(Filesystem):
    """Refuses the next call of the method named `operation` with `error`, once."""

    def __init__(self) -> None:
        self.operation: str | None = None
        self.error = 0

    def fail_next(self, operation: str, error: int) -> None:
        """Arm it."""
        self.operation, self.error = operation, error

    def _refuse(self, operation: str, path: str) -> None:
        if self.operation == operation:
            self.operation = None
            raise StorageError(self.error, operation, path)

    def make_directory(self, path: str) -> None:
        self._refuse("make_directory", path)
        super().make_directory(path)

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: int | None = None) -> int:
        if write:
            self._refuse("open_for_blocks", path)
        return super().open_for_blocks(path, write, direct, directory)

    def allocate(self, descriptor: int, nbytes: int, path: str) -> None:
        self._refuse("allocate", path)
        super().allocate(descriptor, nbytes, path)

    def truncate(self, descriptor: int, nbytes: int, path: str) -> None:
        self._refuse("truncate", path)
        super().truncate(descriptor, nbytes, path)

    def sync_file(self, descriptor: int, path: str) -> None:
        self._refuse("sync_file", path)
        super().sync_file(descriptor, path)

    def write_new_file(self, path: str, content: bytes | bytearray) -> None:
        self._refuse("write_new_file", path)
        super().write_new_file(path, content)

    def sync_directory(self, path: str) -> None:
        if path.endswith(".partial"):
            self._refuse("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: str, target: str) -> None:
        if target.endswith(tuple("0123456789")) and ".engine" not in target:
            self._refuse("rename", source)
        super().rename(source, target)


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
