"""An Engine whose directory another process owns, without torch: the cut that the later monitor needs.

Beside these, the tests of the engine and of snapshots run so (conftest, `remote_owner`).
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same, stored
from hooked import HookedFilesystem
from leaks import held
from processes import descriptors
from remote import OwnerProcesses, has_ended
from torch import nn

import engine

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


class Stopping(HookedFilesystem):
    """Stops the first save at one operation, until it is let go."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.reached, self.released = threading.Event(), threading.Event()

    def before(self, operation: str, path: str, target: str = "") -> None:
        if operation == self.operation and "step-" in path:
            self.reached.set()
            assert self.released.wait(60)


def files_of(pid: int) -> list[str]:
    """The targets of a process's descriptors."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the socket of a request that has just ended
            found.append(os.readlink(entry))
    return found


def test_the_owner_has_the_lock_and_the_trainer_the_pipeline(tmp_path: Path, owners: OwnerProcesses) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(1000)}), step=1).result()
        (owner,) = owners.owners
        lock = str(tmp_path / ".engine" / "lock")
        assert owner.pid != os.getpid() and lock in files_of(owner.pid)
        assert not any(str(tmp_path) in name for name in descriptors()), "the trainer has something of the run open"
        assert not any(name.endswith(".safetensors") for name in files_of(owner.pid)), "an ended save has open files"
        with pytest.raises(engine.LockedError, match=f"process {owner.pid}"):
            engine.Engine(tmp_path, **SMALL)
        maps = Path(f"/proc/{owner.pid}/maps").read_text()
        assert "_native" in maps and "torch" not in maps


def test_nothing_is_left_when_the_engine_is_closed(tmp_path: Path, owners: OwnerProcesses) -> None:
    arena = engine.Arena.wrap({"a": torch.ones(1000)})
    before = held()
    with engine.Engine(tmp_path, **SMALL) as eng:
        for step in range(3):
            eng.checkpoint(arena, step=step).result()
        eng.restore(arena)
        assert eng.verify() == ()
    (owner,) = owners.owners
    owners.end_owners()
    assert has_ended(owner.pid) and held() == before


@pytest.mark.parametrize("operation", ["make_directory", "allocate", "sync_file", "write_new_file", "rename"])
def test_a_save_fails_clearly_when_its_owner_dies_and_training_goes_on(
    tmp_path: Path, owners: OwnerProcesses, operation: str
) -> None:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 200)).sum().backward()
    arena = engine.Arena.adopt(model, optimizer)
    stopping = Stopping(operation)
    with engine.Engine(tmp_path, filesystem=stopping, **SMALL) as eng:
        save = eng.checkpoint(arena, step=1)
        assert stopping.reached.wait(60)
        os.kill(owners.owners[0].pid, signal.SIGKILL)
        stopping.released.set()
        with pytest.raises(engine.PlatformError, match=r"the process that owns .* has ended; open a new Engine"):
            save.result(60)
        before = model.weight.detach().clone()
        optimizer.step()
        assert not same(model.weight.detach(), before)
        with pytest.raises(engine.PlatformError, match="has ended"):
            eng.checkpoint(arena, step=2)
    with engine.Engine(tmp_path, **SMALL) as eng:  # the lock went with the process
        assert eng.steps() == []
        eng.checkpoint(arena, step=1).result()
        assert same(stored(tmp_path, 1)["weight"], model.weight.detach())
