"""Listener: the socket in a run's directory by which any process of the user asks a live monitor.

Theory of operation.  `.engine/monitor.sock` is bound by the monitor, which has the lock, so a socket file that is there
already is a dead monitor's and is removed.  A connection is answered as long as it lasts, and ends with the process: a
client that keeps it sees the monitor end.  A file system without sockets costs the status of saves, nothing else.

A path of a socket has 107 bytes at most (unix(7)), and a run's directory may have a longer one.  So both ends name the
socket through an open descriptor of its directory, in /proc/self/fd.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from engine.monitor.protocol import AskStatus, Channel, ChannelEnded, Status
from engine.store.directory import PRIVATE_NAME

_NAME = "monitor.sock"

# A question is a few bytes.
_QUESTION_BYTES_MAX = 4096

# Connections that wait to be accepted.
_BACKLOG = 16

# accept(2) gives these of a socket that is closed or shut down, for ever; any other error passes.
_CLOSED = (errno.EBADF, errno.EINVAL)

_RETRY_S = 0.05


class Listener:
    """Answers those that ask for the status, on threads of its own, until the end of the `with` block."""

    def __init__(self, root: str, status: Callable[[], Status]) -> None:
        self._root = root
        self._status = status
        self._socket: socket.socket | None = None

    def __enter__(self) -> Listener:
        listening = socket.socket(socket.AF_UNIX)
        try:
            with socket_path(self._root) as path:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                before = os.umask(0o177)  # nothing else makes files yet
                try:
                    listening.bind(path)
                finally:
                    os.umask(before)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            return self
        try:
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        except RuntimeError:  # no thread is left: the status is not told, and saves go on
            listening.close()
            with suppress(OSError), socket_path(self._root) as path:
                os.unlink(path)
            return self
        self._socket = listening
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the name.  The socket stays open until the process ends, and tells those connected of it."""
        if self._socket is not None:
            with suppress(OSError), socket_path(self._root) as path:
                os.unlink(path)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError as error:
                if error.errno in _CLOSED:
                    return
                time.sleep(_RETRY_S)  # no descriptor or memory is left at the moment: it waits in the queue
                continue
            channel = Channel(connection)
            try:
                threading.Thread(target=self._answer, args=(channel,), daemon=True).start()
            except RuntimeError:  # no thread is left: it may ask again
                channel.close()

    def _answer(self, channel: Channel) -> None:
        with channel, suppress(ChannelEnded):
            if channel.peer()[1] not in (os.getuid(), 0):
                return
            while True:
                message, descriptors = channel.receive(_QUESTION_BYTES_MAX)
                for descriptor in descriptors:
                    os.close(descriptor)
                if not isinstance(message, AskStatus):
                    return
                channel.send(self._status())


@contextmanager
def socket_path(root: str) -> Iterator[str]:
    """A short path of the socket of a run, valid in the `with` block."""
    directory = os.open(os.path.join(root, PRIVATE_NAME), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{_NAME}"
    finally:
        os.close(directory)
