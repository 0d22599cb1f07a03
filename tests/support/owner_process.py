"""The process that owns directories in place of the test's, as the later monitor will (docs/architecture.md).

Theory of operation.  A template process is started once for a test session, without torch.  Each time an Engine is
opened it forks, and the child owns that Engine's directory: the lock, the catalog, the files of its saves.  A child has
a control socket from the trainer.  Each request has its own socket, which is sent through the control socket, so that a
request that blocks delays no other.  A step that is opened for reading keeps its socket until it is closed.  The child
ends with the control socket.

A message is a pickled value after its length, with descriptors beside it (unix(7), SCM_RIGHTS).  Before an operation a
hooked file system calls the test through the socket of its request.

Rules: no torch.  `remote` is the other end.
"""

from __future__ import annotations

import array
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from hooked import HookedFilesystem

from engine.store.access import BegunSave, OpenFile
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner

_LENGTH = struct.Struct("!Q")

# The limit of one message (unix(7), SCM_MAX_FD).
_DESCRIPTORS_MAX = 253


def send(connection: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Send a value, and descriptors with it."""
    raw = pickle.dumps(message)
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([_LENGTH.pack(len(raw))], beside)
    connection.sendall(raw)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """A value and the descriptors sent with it; EOFError where the other end is gone."""
    flags = socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
    header, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, _DESCRIPTORS_MAX, flags)
    if len(header) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(header)
    raw = bytearray()
    while len(raw) < length:
        part = connection.recv(length - len(raw))
        if not part:
            raise EOFError
        raw += part
    return pickle.loads(raw), descriptors


class _Request(threading.local):
    """The request that this thread works for."""

    connection: socket.socket
    warnings: list[str]


_request = _Request()


class _AskingFilesystem(HookedFilesystem):
    """Has the trainer's file system asked."""

    def before(self, operation: str, path: str, target: str = "") -> None:
        send(_request.connection, ("before", (operation, path, target)))
        refusal, _ = receive(_request.connection)
        if refusal is not None:
            raise refusal


def _collect(message: Warning | str, *_: object, **__: object) -> None:
    _request.warnings.append(str(message))


def _answer(function: Callable[..., Any], *arguments: object) -> Any:
    """Do what the request asks, and send the result or the error with the warnings; returns the result."""
    _request.warnings = []
    try:
        result = function(*arguments)
    except Exception as error:
        send(_request.connection, ("failed", (error, _request.warnings)))
        return None
    descriptors: Sequence[int] = ()
    if isinstance(result, BegunSave):
        descriptors = result.descriptors
    elif isinstance(result, OpenFile):
        descriptors = [result.descriptor]
    send(_request.connection, ("done", (result, _request.warnings)), descriptors)
    return result


def _serve(owner: Owner, descriptor: int) -> None:
    """One request, or everything that is asked of a step that is opened."""
    with socket.socket(fileno=descriptor) as connection, suppress(EOFError, ConnectionError):
        _request.connection = connection
        (name, arguments), _ = receive(connection)
        if name == "opened":
            _serve_opened(owner, *arguments)
        else:
            _answer(getattr(owner, name), *arguments)


def _serve_opened(owner: Owner, step: int) -> None:
    opening = owner.opened(step)
    opened: Any = None

    def enter() -> str:
        nonlocal opened
        opened = opening.__enter__()
        return str(opened.path)

    if _answer(enter) is None:
        return
    try:
        while True:
            (name, arguments), _ = receive(_request.connection)
            if name == "leave":
                break
            _answer(getattr(opened, name), *arguments)
    except (EOFError, ConnectionError):
        opening.__exit__(None, None, None)
        raise
    (error,) = arguments
    _answer(lambda: opening.__exit__(type(error) if error else None, error, None) and None)


def _own(control: socket.socket) -> None:
    """Own one directory for one trainer, until it says no more."""
    _request.connection = control
    (root, is_hooked, spare_max, retention), _ = receive(control)
    owner: Owner | None = None

    def open_owner() -> tuple[object, ...]:
        nonlocal owner
        owner = Owner(root, _AskingFilesystem() if is_hooked else Filesystem(), spare_max, retention)
        assert "torch" not in sys.modules
        return owner.root, owner.retention, os.getpid()

    _answer(open_owner)
    while owner is not None:
        _, descriptors = receive(control)
        threading.Thread(target=_serve, args=(owner, *descriptors), daemon=True).start()


def _run_template(template: socket.socket) -> None:
    """Fork an owner for each control socket that comes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    warnings.simplefilter("always")
    warnings.showwarning = _collect
    while True:
        _, (descriptor,) = receive(template)
        if os.fork() == 0:
            template.close()
            try:
                _own(socket.socket(fileno=descriptor))
            except (EOFError, ConnectionError):
                os._exit(0)
            finally:
                os._exit(1)
        os.close(descriptor)


if __name__ == "__main__":
    with suppress(EOFError):
        _run_template(socket.socket(fileno=int(sys.argv[1])))
