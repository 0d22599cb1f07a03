"""Client: the trainer's end of a monitor, and the Store of an Engine whose directory a monitor owns.

Theory of operation.  `MonitoredStore` has what `store.Store` has, and the Engine does not tell them apart.  The trainer
keeps the pipeline, which stages and hashes; its mover posts to the monitor.  `_Monitor` is one process, its control
channel and its pipeline.  Checkpoints are listed and read in this process, with the step pinned in the monitor.

A monitor that has ended has failed its saves: the mover fails every block, and each request raises `MonitorLostError`.
The next save, or whatever needs the directory's owner, starts another one.

Rules: no torch.  A forked child has neither the channels nor the shared memory, and gets `ForkedError` (`Pipeline`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import msgspec

from engine.errors import EngineError, MonitorLostError, PlatformError, TornSnapshot
from engine.format.manifest import FileRecord
from engine.io.backend import Attempt, Probe, open_to_read
from engine.io.descriptor import Descriptor
from engine.io.job import HASH_BYTES, JobMemory
from engine.io.pipeline import Pipeline, Shared
from engine.monitor.protocol import (
    Begin,
    Begun,
    Call,
    Channel,
    ChannelEnded,
    Discard,
    Done,
    Hello,
    Pin,
    Publish,
    Published,
    Request,
    Seal,
    Welcome,
)
from engine.monitor.shared_memory import Board, board_bytes, make_memory, slots_bytes
from engine.options import Options
from engine.store.committer import Attachment, SaveRecord
from engine.store.directory import Directory, OpenedStep
from engine.store.filesystem import Filesystem
from engine.store.info import CheckpointInfo
from engine.store.reader import Reader
from engine.store.retention import Retention
from engine.store.verify import Verifier
from engine.store.writer import Writer

# Slots of the pipeline that reads: twice the window of reads in flight (READ_WINDOW_BYTES of pipeline.c).
_READ_STAGING_BYTES = 128 << 20

_REMEDY = "run the same command by hand for its error, or use isolation='none'"


def command(descriptor: int) -> list[str]:
    """The command that starts a monitor."""
    return [sys.executable, "-m", "engine.monitor", str(descriptor)]


class _Monitor:
    """One monitor: its process, its control channel, and the pipeline that posts to it.

    Raises:
        EngineError: the monitor cannot be started, or refuses the directory.
    """

    def __init__(self, root: str, options: Options, retention: Retention | None) -> None:
        self._mutex = threading.Lock()
        self._control, theirs = Channel.pair()
        self._process: subprocess.Popen[bytes] | None = None
        shared = _Memory()
        try:
            with theirs:
                self._process = _start(theirs.fileno())
            self.pid = self._process.pid
            shared.make(options)
            hello = Hello(
                root,
                options.max_async,
                retention,
                options.rewrite_all,
                options.backend,
                options.slot_count,
                options.block_bytes,
            )
            self._control.send(hello, shared.descriptors())
            welcome = self._control.expect(Welcome)
            self.root, self.retention = welcome.root, welcome.retention
            attempts = tuple(Attempt(*attempt) for attempt in welcome.attempts)
            self.probe = Probe(welcome.root, welcome.backend, attempts)
            self.pipeline = Pipeline(
                options.slot_count,
                options.block_bytes,
                welcome.backend,
                options.staging_threads,
                shared=shared.with_peer(self._control.number),
            )
        except BaseException as error:
            status = self.close()
            if isinstance(error, ChannelEnded):
                cause = f"the monitor's process has ended with status {status} while it started"
                raise PlatformError(cause, _REMEDY) from None
            raise
        finally:
            shared.close()

    @property
    def is_lost(self) -> bool:
        """Whether the process has ended."""
        return self._control.is_ended()

    def lost(self) -> MonitorLostError:
        """The error of whatever needed this monitor."""
        return MonitorLostError(
            f"the monitor of {self.root} (process {self.pid}) has ended: what it had not committed is discarded; "
            "training goes on, and the next save starts another monitor; see dmesg for whether the kernel ended it "
            "for want of memory"
        )

    @contextmanager
    def request(self) -> Iterator[Channel]:
        """A channel of its own for one request.

        Raises:
            MonitorLostError: the monitor ends before the `with` block does.
        """
        channel = self.open_request()
        with channel, self.living():
            yield channel

    def open_request(self) -> Channel:
        """The same, to be closed by the caller."""
        self.pipeline.check_owner()
        channel, theirs = Channel.pair()
        try:
            with theirs, self.living(), self._mutex:
                self._control.send(Request(), [theirs.fileno()])
        except BaseException:
            channel.close()
            raise
        return channel

    @contextmanager
    def living(self) -> Iterator[None]:
        """Turn the end of the process into an error of the engine's."""
        try:
            yield
        except ChannelEnded:
            raise self.lost() from None

    def call(self, name: str, step: int | None = None) -> list[int] | str | None:
        """Have the owner of the directory do this."""
        with self.request() as channel:
            channel.send(msgspec.convert({"type": "Call", "name": name, "step": step}, Call))
            return channel.expect(Done).value

    def close(self) -> int | None:
        """Let the process end, wait for it, and return its status.  Saves have ended.  May be called again."""
        pipeline = getattr(self, "pipeline", None)
        if pipeline is not None:
            pipeline.close()
        self._control.shut_down()
        status = None if self._process is None else self._process.wait()
        self._control.close()
        return status


class _Memory:
    """The slots' memory and the two eventfds, until both processes have them."""

    def __init__(self) -> None:
        self._opened: list[Descriptor] = []

    def make(self, options: Options) -> None:
        nbytes = slots_bytes(options.slot_count, options.block_bytes)
        try:
            self._opened.append(make_memory("engine-slots", nbytes))
            for _ in ("post", "wake"):
                descriptor = Descriptor()
                descriptor.fill(partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                self._opened.append(descriptor)
        except OSError as error:
            raise _refused(error, f"{nbytes} bytes of memory to share with a monitor") from None

    def descriptors(self) -> list[int]:
        return [descriptor.number for descriptor in self._opened]

    def with_peer(self, peer: int) -> Shared:
        memory, post, wake = self.descriptors()
        return Shared(memory, post, wake, peer)

    def close(self) -> None:
        for descriptor in self._opened:
            descriptor.close()


def _refused(error: OSError, what: str) -> PlatformError:
    cause = f"the kernel refused {what}: {error}"
    return PlatformError(cause, "free memory or descriptors, lower staging_bytes, or use isolation='none'")


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    """Start a monitor, which inherits this descriptor and standard error, and nothing else.

    It has a session of its own, so that a signal to the trainer's process group or terminal does not reach it.
    """
    if not sys.executable:
        raise PlatformError("this Python does not know its own executable, which a monitor runs", _REMEDY)
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    try:
        return subprocess.Popen(
            command(descriptor),
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd="/",
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
    except OSError as error:
        raise _refused(error, "a process for the monitor") from None


class _Monitors:
    """The monitor of one Engine, and the next one where it has ended."""

    def __init__(self, root: str, options: Options, retention: Retention | None) -> None:
        self._mutex = threading.RLock()
        self._options = options
        self._retention = retention
        self.root = root
        self.last = _Monitor(root, options, retention)
        self._closed = False
        self._distrusted: set[int] = set()

    def current(self) -> _Monitor:
        """The monitor, started anew if it has ended.  Blocks for a few tenths of a second then.

        Raises:
            EngineError: it cannot be started.
        """
        self.last.pipeline.check_owner()
        with self._mutex:
            if self.last.is_lost and not self._closed:
                self.last.close()
                self.last = _Monitor(self.root, self._options, self._retention)
                for step in sorted(self._distrusted):
                    self.last.call("distrust", step)
            return self.last

    def distrust(self, step: int) -> None:
        """Tell the monitor, and each one after it, that a step is damaged: others may be the last good ones."""
        with self._mutex:
            self._distrusted.add(step)
        self.current().call("distrust", step)

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            self.last.close()


class _RemoteCommits:
    """`committer.Commits` of one monitor."""

    def __init__(self, monitor: _Monitor) -> None:
        self._monitor = monitor
        self._channels: dict[int, Channel] = {}  # by step in flight

    def memory(self, block_count: int) -> JobMemory | None:
        """A board that the monitor will map, too."""
        nbytes = board_bytes(block_count)
        try:
            descriptor = make_memory("engine-board", nbytes)
        except OSError as error:
            raise _refused(error, f"{nbytes} bytes of memory to share with a monitor") from None
        return _SharedBoard(descriptor, block_count)

    def begin(self, record: SaveRecord, direct: bool, memory: JobMemory | None) -> Attachment:
        """Have the monitor make the files; see `Commits.begin`."""
        assert isinstance(memory, _SharedBoard)
        channel = self._channels[record.step] = self._monitor.open_request()
        with self._monitor.living():
            channel.send(_begin(record, direct), [memory.descriptor.number])
            memory.descriptor.close()
            begun = channel.expect(Begun)
        hashes = [begun.known[start : start + HASH_BYTES] for start in range(0, len(begun.known), HASH_BYTES)]
        known = [hash_ if is_known else None for hash_, is_known in zip(hashes, begun.is_known, strict=True)]
        return Attachment(begun.path, begun.descriptors, known or None)

    def amend(self, record: SaveRecord) -> None:
        """Have the monitor replace the record of a save; see `Commits.amend`."""
        channel = self._channels[record.step]
        with self._monitor.living():
            channel.send(_begin(record, direct=False))
            channel.expect(Done)

    def commit(self, step: int, checksums: Sequence[bytes], await_turn: Callable[[], None]) -> CheckpointInfo:
        """Have the monitor seal and publish; it has the checksums."""
        channel = self._channels[step]
        with self._monitor.living():
            channel.send(Seal())
            channel.expect(Done)
            await_turn()
            channel.send(Publish())
            published = channel.expect(Published)
        self._channels.pop(step).close()
        return CheckpointInfo(*(getattr(published, name) for name in CheckpointInfo._fields))

    def discard(self, step: int, error: BaseException) -> None:
        """Have the monitor delete what is left; nothing to do if it has failed there, or has ended."""
        channel = self._channels.pop(step, None)
        if channel is None:
            return
        with channel, suppress(ChannelEnded):
            channel.send(Discard(isinstance(error, TornSnapshot)))
            channel.expect(Done)

    def lost(self) -> EngineError | None:
        """The error of every save since the monitor has ended, or None."""
        return self._monitor.lost() if self._monitor.is_lost else None


class _SharedBoard(Board):
    """A board whose memory the monitor has yet to get."""

    def __init__(self, descriptor: Descriptor, block_count: int) -> None:
        super().__init__(descriptor.number, block_count)
        self.descriptor = descriptor


def _begin(record: SaveRecord, direct: bool) -> Begin:
    plan = record.plan
    return Begin(
        step=record.step,
        checkpoint_id=record.checkpoint_id,
        direct=direct,
        block_bytes=plan.block_bytes,
        files=tuple(FileRecord(*file) for file in plan.files),
        untrained=tuple(record.untrained),
        chunks=tuple((chunk.file_index, chunk.index, chunk.offset, chunk.nbytes) for chunk in plan.chunks),
        layers=tuple(record.layers()),
        rows=bytes(record.rows),
        aliases=msgspec.json.encode(dict(record.aliases)),
        optimizers=msgspec.json.encode(dict(record.optimizers)),
        modules=msgspec.json.encode(dict(record.modules)),
        wrappers=msgspec.json.encode(dict(record.wrappers)),
        extra=msgspec.json.encode(record.extra),
        metrics=dict(record.metrics),
        tag=record.tag,
        user_files=dict(record.user_files),
        small_files=dict(record.small_files),
    )


class MonitoredDirectory(Directory):
    """The checkpoints of a directory that a monitor owns; `access.ReadAccess`, and the changes that an Engine asks for.

    Reading is of this process, under a pin that the monitor keeps.
    """

    def __init__(self, monitors: _Monitors, filesystem: Filesystem) -> None:
        super().__init__(monitors.root, filesystem)
        self._monitors = monitors

    @property
    def retention(self) -> Retention:
        """The rule in effect."""
        return self._monitors.last.retention

    @contextmanager
    def opened(self, step: int) -> Iterator[OpenedStep]:
        """Open a committed step, which is not retired meanwhile; raises as `Catalog.opened`."""
        with self._monitors.current().request() as channel:
            channel.send(Pin(step))
            channel.expect(Done)
            with super().opened(step) as opened:
                yield opened

    def distrust(self, step: int) -> None:
        """Record that a step is damaged."""
        self._monitors.distrust(step)

    def retire(self) -> None:
        """Retire all steps that the rule does not keep."""
        self._call("retire")

    def retire_after(self, step: int) -> list[int]:
        """Retire every step later than this one, and return them."""
        value = self._call("retire_after", step)
        assert isinstance(value, list)
        return value

    def delete(self, step: int) -> None:
        """Delete a committed step."""
        self._call("delete", step)

    def set_aside(self, step: int) -> str | None:
        """Rename a damaged step, and return its new path; None if it was deleted by hand."""
        value = self._call("set_aside", step)
        assert not isinstance(value, list)
        return value

    def _call(self, name: str, step: int | None = None) -> list[int] | str | None:
        return self._monitors.current().call(name, step)


class MonitoredStore:
    """One directory of checkpoints that a monitor owns, with the attributes of `store.Store`; as it in all else.

    Raises:
        PlatformError: a monitor cannot be started.
    """

    def __init__(self, directory: str, options: Options, retention: Retention | None, filesystem: Filesystem) -> None:
        self._monitors = _Monitors(filesystem.real_path(directory), options, retention)
        try:
            self._writers: tuple[_Monitor, Writer] | None = None
            self.catalog = MonitoredDirectory(self._monitors, filesystem)
            self._reading = _Reading(options)
            self.reader = Reader(self.catalog, self._reading.get)
            self.verifier = Verifier(self.catalog, self.reader)
        except BaseException:
            self._monitors.close()
            raise

    @property
    def root(self) -> str:
        """The directory's real path."""
        return self.catalog.root

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline of the last monitor."""
        return self._monitors.last.pipeline

    @property
    def probe(self) -> Probe:
        """What the last monitor tried when it was started."""
        return self._monitors.last.probe

    @property
    def writer(self) -> Writer:
        """Runs saves through the monitor, which is started anew if it has ended."""
        monitor = self._monitors.current()
        writers = self._writers
        if writers is None or writers[0] is not monitor:
            writers = self._writers = monitor, Writer(monitor.pipeline, _RemoteCommits(monitor))
        return writers[1]

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.catalog.steps()

    def retire(self) -> None:
        """Retire every step that the retention rule does not keep."""
        self.catalog.retire()

    def close(self) -> None:
        """Drain the pipeline, and let the monitor give the directory back and end.  Blocks.  May be called again."""
        self._reading.close()
        self._monitors.close()


class _Reading:
    """The pipeline that reads, in this process, opened at first use: the monitor only writes."""

    def __init__(self, options: Options) -> None:
        slots = max(2, _READ_STAGING_BYTES // options.block_bytes)
        self._slot_count = min(options.slot_count, slots)
        self._slot_bytes = options.block_bytes
        self._staging_threads = options.staging_threads
        self._mutex = threading.RLock()
        self._pipeline: Pipeline | None = None

    def get(self) -> Pipeline:
        with self._mutex:
            if self._pipeline is None:
                self._pipeline = open_to_read(self._slot_count, self._slot_bytes, self._staging_threads)
            return self._pipeline

    def close(self) -> None:
        with self._mutex:
            if self._pipeline is not None:
                self._pipeline.close()
