"""Listener: the socket in a run's directory by which any process of the user asks what is in flight.

Theory of operation.  `.engine/monitor.sock` is bound by the owner of the directory, which has its lock: a monitor or an
Engine in its own process.  So a socket file that is there already is a dead owner's and is removed.  A connection is
answered as long as it lasts.  One to a monitor ends with the process: a client that keeps it sees the monitor end.  A
file system without sockets costs the status of saves, nothing else.

A forked child closes its copy of the socket: it would keep the queue open, and answer nothing.

A path of a socket has 107 bytes at most (unix(7)), and a run's directory may have a longer one.  So both ends name the
socket through an open descriptor of its directory, in /proc/self/fd.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from engine.monitor.forks import UnforkedSocket, listed, no_fork
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

# A thread that was woken from accept(2) ends at once.
_CLOSE_S = 1.0


class Listener:
    """Answers those that ask for the status, on threads of its own: in a `with` block, or from `open` to `close`."""

    def __init__(self, root: str, status: Callable[[], Status]) -> None:
        self._root = root
        self._status = status
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._own: os.stat_result | None = None  # of the name
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()

    def open(self) -> None:
        """Begin to answer.  Does nothing where no socket or thread can be made."""
        try:
            with no_fork():  # a child between both lines would keep its copy
                listening = listed(UnforkedSocket(socket.AF_UNIX))
        except OSError:
            return
        try:
            with socket_path(self._root) as path:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                os.fchmod(listening.fileno(), 0o600)  # bind(2) gives the name this mode, without the umask's bits
                listening.bind(path)
                self._own = os.stat(path)
            listening.listen(_BACKLOG)
            self._socket = listening
            thread = threading.Thread(target=self._accept, args=(listening,), daemon=True)
            thread.start()
            self._thread = thread
        except (OSError, RuntimeError):
            self.close()
            listening.close()

    def close(self) -> None:
        """End the answers: remove the name, and close the socket and every connection.

        Called while the directory is owned.  May be called again, also after Ctrl-C.
        """
        listening = self._socket
        if listening is None:
            return
        self._remove_name()
        with suppress(OSError):  # wakes the thread in accept(2)
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for channel in tuple(self._channels):
            channel.shut_down()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)  # in accept(2) it keeps the file system busy, and umount(8) would fail
        self._socket = None

    def __enter__(self) -> Listener:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the name.  The socket stays open until the process ends, and tells those connected of it."""
        if self._socket is not None:
            self._remove_name()

    def _remove_name(self) -> None:
        with suppress(OSError), socket_path(self._root) as path:
            # The directory may have been moved away, and another one put in its place.
            if self._own is not None and os.path.samestat(os.stat(path), self._own):
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
            self._channels.add(channel)
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
