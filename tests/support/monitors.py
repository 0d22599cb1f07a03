"""Monitors for tests: hooks before their operations, and what is known of their processes.

Theory of operation.  `Hooks` listens on a Unix socket and replaces the command that starts a monitor by
`hooked_monitor`, which asks here before each operation.  Each question has a thread of its own, as each request has in
the monitor, so an answer may wait.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import hooked_monitor
import pytest
from hooked import HookedFilesystem

import engine
from engine.errors import EngineError
from engine.monitor import process
from engine.monitor.client import MonitoredStore
from engine.options import Options
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention

# Called with the process, the operation, the path and the target; may raise, wait, or kill the process.
Hook = Callable[[int, str, str, str], None]


class Hooks:
    """Calls `before` before each operation of every monitor that is started meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Hook = lambda *_: None
        self._roots: dict[str, Filesystem] = {}
        self._directory = tempfile.TemporaryDirectory()
        path = os.path.join(self._directory.name, "hooks")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        monkeypatch.setenv(hooked_monitor.ADDRESS, path)
        monkeypatch.setattr(process, "command", lambda fd: [sys.executable, hooked_monitor.__file__, str(fd)])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def make_store(
        self, directory: str, options: Options, retention: Retention | None, filesystem: Filesystem
    ) -> MonitoredStore:
        """A store whose monitor calls a hooked file system of this process; in the place of `Store`."""
        assert type(filesystem) is Filesystem or isinstance(filesystem, HookedFilesystem), (
            "only questions can travel: derive the file system from HookedFilesystem"
        )
        self._roots[os.path.realpath(directory)] = filesystem
        self.before = self._ask_filesystem
        return MonitoredStore(directory, options, retention, filesystem)

    def _ask_filesystem(self, _: int, operation: str, path: str, target: str) -> None:
        """Ask the file system of the innermost run that a path is in."""
        owners = [root for root in self._roots if path == root or path.startswith(root + os.sep)]
        filesystem = self._roots[max(owners, key=len)] if owners else None
        if isinstance(filesystem, HookedFilesystem):
            filesystem.before(operation, path, target)

    def close(self) -> None:
        """Ask no more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._socket.close()
        self._directory.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            with connection.makefile("rb") as question:
                pid, operation, path, target = pickle.loads(question.read())
            refusal: EngineError | None = None
            try:
                self.before(pid, operation, path, target)
            except EngineError as error:
                refusal = error
            connection.sendall(pickle.dumps(refusal))


def monitor_of(eng: engine.Engine) -> int:
    """The process of an Engine's monitor."""
    store = eng._store
    assert isinstance(store, MonitoredStore)
    return store._monitors.last.pid


def is_there(pid: int) -> bool:
    """Whether a process exists, be it as a zombie."""
    return Path("/proc", str(pid)).exists()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only its parent has not noticed.

    The first thread of a killed process may be a zombie before the last one has ended and its descriptors are closed.
    """
    try:
        is_zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return is_zombie and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True
