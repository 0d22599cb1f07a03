"""engine: checkpoint storage for PyTorch training on Linux.

    arena = engine.Arena.adopt(model, optimizer)
    save = engine.checkpoint(arena, "runs/exp1", step=100)    # returns at once; training goes on
    save.result()                                             # durable

`Arena` holds the tensors, `Engine` owns a directory of checkpoints, `Save` is one in flight.  The functions
`checkpoint` and `restore` use one default Engine for each directory.  See docs/architecture.md for the packages.

Theory of operation.  Names are imported when they are first used (PEP 562), so that `engine.store` and a command line
start without torch.  Editors and type checkers see the imports below.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import TYPE_CHECKING

if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    raise ImportError(
        f"engine needs Linux on x86-64 or aarch64, because it is built on io_uring; this is {sys.platform} on "
        f"{platform.machine()}"
    )

if TYPE_CHECKING:
    __version__: str

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
        MonitorLostError,
        NewerFormatError,
        NoSpaceError,
        NotFoundError,
        PlatformError,
        RetiredError,
        StepError,
        StorageError,
        TornSnapshot,
        UsageError,
    )
    from engine.io.backend import Attempt, Probe
    from engine.io.guard_probe import GuardAttempt, GuardProbe
    from engine.options import Options
    from engine.session.layerwise import LayerwiseSave
    from engine.session.preemption import Preemption
    from engine.session.restore import RestoreInfo
    from engine.session.resume import resume
    from engine.session.run import Run
    from engine.session.run import open_run as open
    from engine.session.save import ChunkStatus, Save, SaveStatus
    from engine.state.arena import Arena
    from engine.state.backward import step_in_backward
    from engine.state.rng import rng_state, set_rng_state
    from engine.state.select import role
    from engine.store.info import CheckpointInfo
    from engine.store.reader import PassedOver
    from engine.store.retention import Retention
    from engine.store.verify import Damage
    from engine.tuning.tune import Tuning, tune

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
    "GuardAttempt",
    "GuardProbe",
    "LayerwiseSave",
    "LockedError",
    "MismatchError",
    "MonitorLostError",
    "NewerFormatError",
    "NoSpaceError",
    "NotFoundError",
    "Options",
    "PassedOver",
    "PlatformError",
    "Preemption",
    "Probe",
    "RestoreInfo",
    "Retention",
    "RetiredError",
    "Run",
    "Save",
    "SaveStatus",
    "StepError",
    "StorageError",
    "TornSnapshot",
    "Tuning",
    "UsageError",
    "checkpoint",
    "open",
    "probe",
    "restore",
    "resume",
    "rng_state",
    "role",
    "set_rng_state",
    "step_in_backward",
    "tune",
]

# The module of every name that is not of `engine.errors`.
_MODULES = {
    "Arena": "engine.state.arena",
    "Attempt": "engine.io.backend",
    "CheckpointInfo": "engine.store.info",
    "ChunkStatus": "engine.session.save",
    "Damage": "engine.store.verify",
    "Engine": "engine.engine",
    "GuardAttempt": "engine.io.guard_probe",
    "GuardProbe": "engine.io.guard_probe",
    "LayerwiseSave": "engine.session.layerwise",
    "Options": "engine.options",
    "PassedOver": "engine.store.reader",
    "Preemption": "engine.session.preemption",
    "Probe": "engine.io.backend",
    "RestoreInfo": "engine.session.restore",
    "Retention": "engine.store.retention",
    "Run": "engine.session.run",
    "Save": "engine.session.save",
    "Tuning": "engine.tuning.tune",
    "SaveStatus": "engine.session.save",
    "checkpoint": "engine.defaults",
    "open": "engine.session.run",
    "probe": "engine.engine",
    "restore": "engine.defaults",
    "resume": "engine.session.resume",
    "rng_state": "engine.state.rng",
    "role": "engine.state.select",
    "set_rng_state": "engine.state.rng",
    "step_in_backward": "engine.state.backward",
    "tune": "engine.tuning.tune",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        # Not above: with what it imports itself it is a quarter of the start of a monitor.
        return importlib.import_module("importlib.metadata").version("uring-checkpoint")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES.get(name, "engine.errors"))
    value = getattr(module, "open_run" if name == "open" else name)
    globals()[name] = value  # the next time it is found without this call
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
