"""engine: checkpoint storage for PyTorch training on Linux.

    arena = engine.Arena.adopt(model, optimizer)
    save = engine.checkpoint(arena, "runs/exp1", step=100)    # returns at once; training goes on
    save.result()                                             # durable

`Arena` holds the tensors, `Engine` owns a directory of checkpoints, `Save` is one in flight.  The functions
`checkpoint` and `restore` use one default Engine for each directory.  See docs/architecture.md for the rooms.
"""

from __future__ import annotations

import platform
import sys

if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    raise ImportError(
        f"engine needs Linux on x86-64 or aarch64, because it is built on io_uring; this is {sys.platform} on "
        f"{platform.machine()}"
    )

from engine.defaults import checkpoint, restore
from engine.engine import Engine, probe
from engine.errors import (
    ArenaError,
    ArgumentError,
    BusyError,
    CheckpointError,
    ClosedError,
    CorruptError,
    EngineError,
    EngineWarning,
    ExtraError,
    ForkedError,
    LockedError,
    MismatchError,
    NewerFormatError,
    NoSpaceError,
    NotFoundError,
    PlatformError,
    StepError,
    StorageError,
    TornSnapshot,
    UsageError,
)
from engine.io.backend import Attempt, Probe
from engine.state.arena import Arena
from engine.store.reader import Damage, PassedOver, RestoreInfo
from engine.store.writer import CheckpointInfo, ChunkStatus, Save

__all__ = [
    "Arena",
    "ArenaError",
    "ArgumentError",
    "Attempt",
    "BusyError",
    "CheckpointError",
    "CheckpointInfo",
    "ChunkStatus",
    "ClosedError",
    "CorruptError",
    "Damage",
    "Engine",
    "EngineError",
    "EngineWarning",
    "ExtraError",
    "ForkedError",
    "LockedError",
    "MismatchError",
    "NewerFormatError",
    "NoSpaceError",
    "NotFoundError",
    "PassedOver",
    "PlatformError",
    "Probe",
    "RestoreInfo",
    "Save",
    "StepError",
    "StorageError",
    "TornSnapshot",
    "UsageError",
    "checkpoint",
    "probe",
    "restore",
]
