"""Protocol: the messages between a trainer, its monitor, and readers of a live run.

Theory of operation.  A `Channel` is a Unix stream socket that carries messages: a length, a msgpack value (msgspec
checks every type), and descriptors beside it (unix(7), SCM_RIGHTS).  Nothing is pickled.

The trainer has one control channel to its monitor.  Each request has a channel of its own, which the trainer makes and
sends through the control channel, so that a request that blocks delays no other.  Most are one question and one answer.
The save's is:

    trainer                         monitor
    Begin, and the board     ->
                             <-     Begun: the files are open, and which blocks they hold
    (blocks are posted through the slots' memory, and written)
    Begin again              ->     only of a layerwise save, when its block is left: the record of its end
                             <-     Done
    Seal                     ->
                             <-     Done: sealed
    (waits until every earlier step has ended)
    Publish                  ->
                             <-     Published

Discard ends it at any point before Publish, and `Failed` answers any message.  If the channel ends instead, the trainer
is dead, and the monitor completes the save or discards it by itself (`server`).

The socket in the run's directory answers `AskStatus`, to any process of the same user.  Both of its ends check the
other's user (SO_PEERCRED), and so does the monitor on the control channel; the trainer has made both ends of that.
"""

from __future__ import annotations

import array
import logging
import os
import select
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import msgspec

from engine import errors
from engine.errors import EngineError
from engine.format.manifest import FileRecord
from engine.monitor.forks import UnforkedSocket, listed, no_fork
from engine.options import Backend, Choice
from engine.store.retention import Retention

_LENGTH = struct.Struct("!Q")

# A message has the manifest of a checkpoint at most (manifest.MANIFEST_BYTES_MAX), and the user's small files.
MESSAGE_BYTES_MAX = 2 << 30

# No message has more descriptors than `Hello`.
_DESCRIPTORS_MAX = 8

# Signals to every process of a job, which do not end a monitor: it is started with them blocked, and then ignores them.
IGNORED = (
    *(signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGPIPE),
    *(signal.SIGUSR1, signal.SIGUSR2),  # of schedulers that announce an end
)

_log = logging.getLogger("engine")


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message on the control channel, with the slots' memory and the two eventfds: own this directory."""

    root: str
    spare_max: int
    retention: Retention | None
    rewrite_all: bool
    backend: Choice
    slot_count: int
    slot_bytes: int


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The directory is owned, and slots are served.  Attempts: backend, cause and remedy of each rung tried."""

    root: str
    retention: Retention
    backend: Backend
    attempts: tuple[tuple[Backend, str | None, str | None], ...]
    warnings: tuple[str, ...]


class Request(msgspec.Struct, frozen=True, tag=True):
    """On the control channel: a new channel comes with this."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Begin a save; the board comes with it.  See `committer.SaveRecord`; JSON in bytes is passed on as it is."""

    step: int
    checkpoint_id: str
    direct: bool
    block_bytes: int
    files: tuple[FileRecord, ...]
    untrained: tuple[str, ...]
    chunks: tuple[tuple[int, int, int, int], ...]
    layers: tuple[tuple[str, ...], ...]
    rows: bytes
    aliases: bytes
    optimizers: bytes
    modules: bytes
    wrappers: bytes
    extra: bytes
    metrics: dict[str, float | None]
    tag: str | None
    user_files: dict[str, bytes]
    small_files: dict[str, bytes]


class Begun(msgspec.Struct, frozen=True, tag=True):
    """The files are open: their numbers in the monitor, and the hashes of blocks that they hold, or nothing."""

    path: str
    descriptors: tuple[int, ...]
    known: bytes
    is_known: bytes


class Seal(msgspec.Struct, frozen=True, tag=True):
    """All blocks are written: make them durable."""


class Publish(msgspec.Struct, frozen=True, tag=True):
    """Make the sealed checkpoint visible."""


class Published(msgspec.Struct, frozen=True, tag=True):
    """The fields of its `CheckpointInfo`."""

    step: int
    checkpoint_id: str
    path: str
    nbytes: int
    created_ns: int
    metrics: dict[str, float | None]
    tag: str | None
    warnings: tuple[str, ...]


class Discard(msgspec.Struct, frozen=True, tag=True):
    """The save has failed in the trainer; `torn` if because the tensors changed."""

    torn: bool


class Call(msgspec.Struct, frozen=True, tag=True):
    """A method of the owner, which changes the directory."""

    name: Literal["distrust", "retire", "retire_after", "delete", "set_aside"]
    step: int | None


class Pin(msgspec.Struct, frozen=True, tag=True):
    """Keep a step from being retired until the channel ends."""

    step: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """What was asked for is done; the result of a `Call`."""

    value: list[int] | str | None = None
    warnings: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error of the engine, by its name and arguments; any other one has no name."""

    kind: str | None
    arguments: tuple[str | int | bool | None, ...]
    warnings: tuple[str, ...]

    def error(self) -> Exception:
        """The error, to be raised here."""
        found = getattr(errors, self.kind or "", None)
        if isinstance(found, type) and issubclass(found, EngineError):
            return found(*self.arguments)
        return RuntimeError(f"the monitor has failed: {self.arguments[0]}; report this as a bug")


class AskStatus(msgspec.Struct, frozen=True, tag=True):
    """On the socket of the run: what is in flight?"""


class ChunkState(msgspec.Struct, frozen=True):
    """One chunk of a save in flight; as `session.save.ChunkStatus`."""

    file: str
    index: int
    offset: int
    nbytes: int
    layers: tuple[str, ...]
    status: str


class SaveState(msgspec.Struct, frozen=True):
    """One save in flight; as `session.save.SaveStatus`."""

    step: int
    checkpoint_id: str
    is_safe: bool
    chunks: tuple[ChunkState, ...]
    nbytes: int
    staged_bytes: int
    written_bytes: int
    seconds: float


class Status(msgspec.Struct, frozen=True, tag=True):
    """What the owner of a run has in flight, and whether its trainer is dead.

    The owner is a monitor, or the trainer itself.
    """

    pid: int
    trainer_pid: int
    is_orphan: bool
    saves: tuple[SaveState, ...]


Message = (
    Hello
    | Welcome
    | Request
    | Begin
    | Begun
    | Seal
    | Publish
    | Published
    | Discard
    | Call
    | Pin
    | Done
    | Failed
    | AskStatus
    | Status
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

T = TypeVar("T", bound=msgspec.Struct)


class ChannelEnded(Exception):
    """The other end is gone."""


class Channel:
    """One stream of messages.  One thread at a time sends, and one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        listed(self)

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """A channel, and the socket of its other end, to be sent away."""
        with no_fork():
            ours, theirs = (UnforkedSocket(fileno=each.detach()) for each in socket.socketpair())  # close-on-exec
            return cls(ours), listed(theirs)

    @property
    def number(self) -> int:
        """The descriptor, to be polled."""
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and descriptors with it.

        Raises:
            ChannelEnded: the other end is gone.
        """
        raw = _encoder.encode(message)
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            # In one call: a header whose message is kept back by Ctrl-C would spoil the channel.
            parts = [_LENGTH.pack(len(raw)), raw]
            sent = self._socket.sendmsg(parts, beside, socket.MSG_NOSIGNAL)
            if sent < _LENGTH.size + len(raw):
                self._socket.sendall(b"".join(parts)[sent:])
        except OSError:
            raise ChannelEnded from None

    def receive(self, bytes_max: int = MESSAGE_BYTES_MAX) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which the caller closes.  Blocks.

        Raises:
            ChannelEnded: the other end is gone, or sends what is no message.
            TimeoutError: see `set_timeout`.
        """
        descriptors: list[int] = []
        try:
            first, descriptors, _, _ = socket.recv_fds(
                self._socket, _LENGTH.size, _DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
            )
            header = bytearray(first)
            self._fill(header, _LENGTH.size)
            (length,) = _LENGTH.unpack(header)
            if length > bytes_max:
                raise ChannelEnded
            raw = bytearray()
            self._fill(raw, length)
            return _decoder.decode(raw), descriptors
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            # Bytes that are no text are a UnicodeDecodeError of msgspec's, and arrays in arrays a RecursionError.
            if isinstance(error, OSError | ValueError | RecursionError) and not isinstance(error, TimeoutError):
                raise ChannelEnded from None
            raise

    def expect(self, kind: type[T]) -> T:
        """The next message, which is of this kind.

        Raises:
            ChannelEnded: the other end is gone, or sends another one.
            EngineError: it is a `Failed`.
        """
        message, descriptors = self.receive()
        for descriptor in descriptors:
            os.close(descriptor)
        _warn(message)
        if isinstance(message, Failed):
            raise message.error()
        if not isinstance(message, kind):
            raise ChannelEnded
        return message

    def peer(self) -> tuple[int, int]:
        """The process and the user that made the other end (SO_PEERCRED)."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, user, _ = struct.unpack("3i", raw)
        return pid, user

    def is_ended(self) -> bool:
        """Whether the other end is gone, without waiting or taking a message."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def await_message(self, seconds: float) -> bool:
        """Block until there is something to receive, be it the end; False if that took longer."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))

    def set_timeout(self, seconds: float | None) -> None:
        """Have `receive` raise TimeoutError when nothing has come for so long; None: never."""
        self._socket.settimeout(seconds)

    def await_end(self) -> None:
        """Block until the other end is gone."""
        try:
            while self._socket.recv(1 << 10):
                pass
        except OSError:
            return

    def shut_down(self) -> None:
        """End the channel for both sides, also for a thread that is in `receive`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended
            return

    def close(self) -> None:
        """Close this end.  May be called again."""
        self._socket.close()

    def close_in_child(self) -> None:
        """Close a forked child's copy: the other process must see this one end."""
        descriptor = self._socket.detach()
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _fill(self, buffer: bytearray, size: int) -> None:
        while len(buffer) < size:
            part = self._socket.recv(min(size - len(buffer), 1 << 20))
            if not part:
                raise ChannelEnded
            buffer += part


def _warn(message: Message) -> None:
    """Pass on the warnings of a message.  They may raise, where the user makes errors of warnings."""
    for text in getattr(message, "warnings", ()):
        try:
            errors.warn(text)
        except errors.EngineWarning:
            if not isinstance(message, Published):
                raise
            _log.warning("%s", text)  # the step is committed, and must not be reported as failed


def failed(error: BaseException, warnings: Sequence[str] = ()) -> Failed:
    """An error as a message."""
    if isinstance(error, EngineError):
        reduced = error.__reduce__()
        assert isinstance(reduced, tuple)
        return Failed(type(error).__name__, tuple(reduced[1]), tuple(warnings))
    return Failed(None, (repr(error),), tuple(warnings))
