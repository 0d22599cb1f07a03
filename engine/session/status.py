"""Status: the saves in flight of a run, for any process of the user.

Theory of operation.  The owner of a run answers through the socket in its directory (`monitor.listener`): the monitor,
or the Engine, which has the saves in this process (`answer`).  A reader asks with `in_flight_of`.  If nobody answers,
the lock says whether that is because nobody has the run: an empty result means that nothing is in flight.
"""

from __future__ import annotations

import os
import time

import msgspec

from engine.errors import PlatformError
from engine.monitor.protocol import ChunkState, SaveState, Status
from engine.monitor.status import ask_status
from engine.session.in_flight import InFlight
from engine.session.save import ChunkStatus, SaveStatus
from engine.store.directory import PRIVATE_NAME
from engine.store.lock import holder_of

# An owner has the lock a moment before its socket, and a moment after it: a monitor probes the device in between.
_TRIES, _PAUSE_S = 20, 0.05


def answer(in_flight: InFlight) -> Status:
    """The saves of this process, as its Engine answers others."""
    pid = os.getpid()
    return Status(pid, pid, False, tuple(_state(save.status()) for save in in_flight.saves()))


def in_flight_of(root: str) -> tuple[SaveStatus, ...]:
    """The saves in flight of the run in this directory, by step.  Blocks for a second at most if nobody answers.

    Raises:
        PlatformError: the process that has the run does not answer, or cannot be asked.
    """
    for _ in range(_TRIES):
        status = ask_status(root)
        if status is not None:
            return tuple(map(_save_status, status.saves))
        holder = holder_of(os.path.join(root, PRIVATE_NAME))
        if holder is None:
            return ()
        time.sleep(_PAUSE_S)
    raise PlatformError(
        f"process {holder} has {root}, and cannot be asked what is in flight: it is another user's, or could make no "
        "socket there",
        "ask as its user or as root, and keep runs on a file system with sockets; steps() lists what is committed",
    )


def _state(status: SaveStatus) -> SaveState:
    fields = status._asdict()
    chunks = tuple(
        ChunkState(each.file, each.index, each.offset, each.nbytes, each.layers, each.status) for each in status.chunks
    )
    return SaveState(**{**fields, "chunks": chunks})


def _save_status(state: SaveState) -> SaveStatus:
    fields = msgspec.structs.asdict(state)
    chunks = tuple(ChunkStatus(**msgspec.structs.asdict(chunk)) for chunk in state.chunks)
    return SaveStatus(**{**fields, "chunks": chunks})
