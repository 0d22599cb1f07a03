"""A Store whose directory is owned by another process: the trainer's end of `owner_process`.

Theory of operation.  `RemoteOwner` is a `WriteAccess` that sends every call to the owner's process.  Files come back as
descriptors.  If a test's file system has a hook before operations, the owner's process sends the call of the hook here,
and the thread of that request runs it.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import owner_process
from hooked import HookedFilesystem
from jobs import until
from owner_process import receive, send

from engine.errors import EngineError, PlatformError, warn
from engine.format.manifest import Manifest, Summary
from engine.store.access import BegunSave, HeldRange, NewFile, OpenFile
from engine.store.directory import step_name
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention


class OwnerProcesses:
    """Starts owners, and ends those that a test has left."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        command = [sys.executable, owner_process.__file__, str(theirs.fileno())]
        paths = os.pathsep.join(sys.path)
        self._template = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths})
        theirs.close()
        self.owners: list[RemoteOwner] = []

    def own(self, root: str, filesystem: Filesystem, spare_max: int, retention: Retention | None = None) -> RemoteOwner:
        """The argument `own` of `Store`, in place of `Owner`."""
        ours, theirs = socket.socketpair()
        send(self._connection, None, [theirs.fileno()])
        theirs.close()
        owner = RemoteOwner(ours, root, filesystem, spare_max, retention)
        self.owners.append(owner)
        return owner

    def end_owners(self) -> None:
        """Let no owner outlive its test."""
        for owner in self.owners:
            owner.close()
            until(functools.partial(has_ended, owner.pid))
        self.owners.clear()

    def close(self) -> None:
        """End the template."""
        self._connection.close()
        assert self._template.wait(60) == 0


def has_ended(pid: int) -> bool:
    """Whether there is no such process any more."""
    return not Path("/proc", str(pid)).exists()


class _Conversations:
    """Requests to one owner's process."""

    def __init__(self, control: socket.socket, root: str, filesystem: Filesystem) -> None:
        assert type(filesystem) is Filesystem or isinstance(filesystem, HookedFilesystem), (
            "only questions can travel: derive the file system from HookedFilesystem"
        )
        self.filesystem = filesystem
        self._control = control
        self._root = root
        self._mutex = threading.Lock()

    @contextmanager
    def begun(self) -> Iterator[socket.socket]:
        """A socket for one request."""
        ours, theirs = socket.socketpair()
        with ours, self.living():
            with theirs, self._mutex:
                send(self._control, None, [theirs.fileno()])
            yield ours

    @contextmanager
    def living(self) -> Iterator[None]:
        """Turn the end of the other process into an error of the engine's."""
        try:
            yield
        except (EOFError, ConnectionError):
            cause = f"the process that owns {self._root} has ended"
            raise PlatformError(cause, "open a new Engine, which starts from what is there") from None

    def ask(self, connection: socket.socket, *message: object) -> tuple[Any, list[int]]:
        """Send a message, answer the questions that come back, and return the result with its descriptors."""
        send(connection, message)
        while True:
            (kind, content), descriptors = receive(connection)
            if kind == "before":
                send(connection, self._refusal(*content))
                continue
            result, warnings = content
            for text in warnings:
                warn(text)
            if kind == "failed":
                raise result
            return result, descriptors

    def _refusal(self, operation: str, path: str, target: str) -> Exception | None:
        assert isinstance(self.filesystem, HookedFilesystem)
        try:
            self.filesystem.before(operation, path, target)
        except EngineError as error:
            return error
        return None

    def end(self) -> None:
        """Let the other process end."""
        with suppress(OSError):  # it has ended already
            self._control.shutdown(socket.SHUT_RDWR)  # also where a forked child has the socket
        self._control.close()


class RemoteStep:
    """A committed step that the owner's process has open."""

    def __init__(self, conversations: _Conversations, connection: socket.socket, step: int, path: str) -> None:
        self.step = step
        self.path = path
        self.descriptors: list[int] = []
        self._conversations = conversations
        self._connection = connection

    def manifest(self) -> tuple[Manifest, int]:
        manifest, nbytes = self._ask("manifest")[0]
        return manifest, nbytes

    def summary(self) -> Summary:
        summary: Summary = self._ask("summary")[0]
        return summary

    def read_small(self, name: str, bytes_max: int) -> bytes:
        content: bytes = self._ask("read_small", name, bytes_max)[0]
        return content

    def open_file(self, name: str, direct: bool) -> OpenFile:
        file, (descriptor,) = self._ask("open_file", name, direct)
        self.descriptors.append(descriptor)
        return OpenFile(descriptor, file.nbytes)

    def is_in_place(self) -> bool:
        return bool(self._ask("is_in_place")[0])

    def _ask(self, name: str, *arguments: object) -> tuple[Any, list[int]]:
        return self._conversations.ask(self._connection, name, arguments)


class RemoteOwner:
    """A directory that another process owns; `access.WriteAccess`."""

    def __init__(
        self, control: socket.socket, root: str, filesystem: Filesystem, spare_max: int, retention: Retention | None
    ) -> None:
        self._conversations = _Conversations(control, root, filesystem)
        self._descriptors: dict[int, list[int]] = {}  # by step in flight
        self._closing = threading.Lock()
        self._is_open = True
        is_hooked = isinstance(filesystem, HookedFilesystem)
        try:
            with self._conversations.living():
                opened, _ = self._conversations.ask(control, root, is_hooked, spare_max, retention)
        except BaseException:
            control.close()
            raise
        self.root: str
        self.retention: Retention
        self.root, self.retention, self.pid = opened

    def steps(self) -> list[int]:
        return list(self._request("steps"))

    def path(self, step: int) -> str:
        return os.path.join(self.root, step_name(step))

    @contextmanager
    def opened(self, step: int) -> Iterator[RemoteStep]:
        with self._conversations.begun() as connection:
            path, _ = self._conversations.ask(connection, "opened", (step,))
            opened = RemoteStep(self._conversations, connection, step, path)
            error: EngineError | None = None
            try:
                yield opened
            except EngineError as raised:
                error = raised
                raise
            finally:
                _close(opened.descriptors)
                self._conversations.ask(connection, "leave", (error,))

    def begin_save(self, step: int, files: Sequence[NewFile], direct: bool) -> BegunSave:
        with self._conversations.begun() as connection:
            begun, descriptors = self._conversations.ask(connection, "begin_save", (step, files, direct))
        self._descriptors[step] = descriptors
        saved: BegunSave = begun._replace(descriptors=descriptors)
        return saved

    def settle_links(self, step: int, changed: Mapping[str, Sequence[HeldRange]]) -> None:
        self._request("settle_links", step, changed)

    def seal_save(self, step: int, small_files: Mapping[str, bytes]) -> None:
        self._request("seal_save", step, small_files)

    def publish_save(self, step: int, manifest: bytes | bytearray) -> str:
        path: str = self._request("publish_save", step, manifest)
        _close(self._descriptors.pop(step))
        return path

    def discard_save(self, step: int) -> None:
        _close(self._descriptors.pop(step, []))
        self._request("discard_save", step)

    def distrust(self, step: int) -> None:
        self._request("distrust", step)

    def retire(self) -> None:
        self._request("retire")

    def retire_after(self, step: int) -> list[int]:
        return list(self._request("retire_after", step))

    def delete(self, step: int) -> None:
        self._request("delete", step)

    def set_aside(self, step: int) -> str | None:
        path: str | None = self._request("set_aside", step)
        return path

    def close(self) -> None:
        with self._closing:
            if self._is_open:
                with suppress(PlatformError):  # the lock went with the process
                    self._request("close")
                self._conversations.end()
                self._is_open = False

    def _request(self, name: str, *arguments: object) -> Any:
        with self._conversations.begun() as connection:
            return self._conversations.ask(connection, name, arguments)[0]


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
