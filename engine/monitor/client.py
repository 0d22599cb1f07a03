"""Client: the trainer's end of a monitor, and the Store of an Engine whose directory a monitor owns.

Theory of operation.  `MonitoredStore` has what `store.Store` has, and the Engine does not tell them apart.  The trainer
keeps the pipeline, which stages and hashes; its mover posts to the monitor (`process.Monitor`).  Checkpoints are listed
and read in this process, with the step pinned in the monitor.

A monitor that has ended has failed its saves.  The next save, or whatever needs the directory's owner, starts another
one, and tells it of the damaged and the pinned steps.  A save that was to be published when the monitor ended may be
committed: the disk says whether.

Rules: no torch.  A forked child has neither the channels nor the shared memory, and gets `ForkedError` (`Pipeline`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec

from engine.errors import EngineError, NotFoundError, TornSnapshot
from engine.format.manifest import FileRecord
from engine.io.backend import Probe, open_to_read
from engine.io.descriptor import Descriptor
from engine.io.job import HASH_BYTES, JobMemory
from engine.io.pipeline import Pipeline
from engine.monitor.process import Monitor, refused
from engine.monitor.protocol import (
    Begin,
    Begun,
    Channel,
    ChannelEnded,
    Discard,
    Done,
    Pin,
    Publish,
    Published,
    Seal,
)
from engine.monitor.shared_memory import Board, board_bytes, make_memory
from engine.options import Options
from engine.store.committer import Attachment, SaveRecord
from engine.store.directory import Directory, OpenedStep
from engine.store.filesystem import Filesystem
from engine.store.info import CheckpointInfo, info_of
from engine.store.reader import Reader
from engine.store.retention import Retention
from engine.store.verify import Verifier
from engine.store.writer import Writer

# Slots of the pipeline that reads: twice the window of reads in flight (READ_WINDOW_BYTES of pipeline.c).
_READ_STAGING_BYTES = 128 << 20

# Between looks at whether another thread has started a monitor.
_START_LOOK_S = 0.05


class _Pin:
    """A step that is being read, and the channels that keep it from being retired: one of each monitor meanwhile."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._channels: list[Channel] = []

    def keep(self, monitor: Monitor) -> None:
        """Pin the step in a monitor, too.

        Raises:
            EngineError: the monitor has no such step, or has ended.
        """
        channel = monitor.open_request()
        self._channels.append(channel)
        with monitor.living():
            channel.send(Pin(self.step))
            channel.expect(Done)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class _Monitors:
    """The monitor of one Engine, and the next one where it has ended."""

    def __init__(self, root: str, options: Options, retention: Retention | None) -> None:
        self._mutex = threading.RLock()  # of the thread that starts one
        self._options = options
        self._retention = retention
        self.root = root
        self._is_closing = False
        self._distrusted: set[int] = set()
        self._pins: set[_Pin] = set()
        self.last = Monitor(root, options, retention)

    def current(self) -> Monitor:
        """The monitor, started anew if it has ended.  Blocks for a few tenths of a second then.

        Raises:
            EngineError: it cannot be started.
        """
        self.last.pipeline.check_owner()
        while self.last.is_lost and not self._is_closing:
            # Not for ever: the thread that starts one may be interrupted by a signal handler that closes the Engine,
            # and waits for this thread.
            if not self._mutex.acquire(timeout=_START_LOOK_S):
                continue
            try:
                if self.last.is_lost and not self._is_closing:
                    self._start()
            finally:
                self._mutex.release()
        return self.last

    def _start(self) -> None:
        self.last.close()
        self.last = Monitor(self.root, self._options, self._retention)
        if self._is_closing:  # a signal handler has closed the Engine meanwhile
            self.last.close()
            return
        for step in sorted(self._distrusted):
            self.last.call("distrust", step)
        for pin in tuple(self._pins):
            with suppress(NotFoundError):  # its reader will find that out
                pin.keep(self.last)

    def distrust(self, step: int) -> None:
        """Tell the monitor, and each one after it, that a step is damaged: others may be the last good ones."""
        self._distrusted.add(step)
        self.current().call("distrust", step)

    @contextmanager
    def pinned(self, step: int) -> Iterator[None]:
        """Keep a step from being retired, also by the monitors that are started meanwhile.

        Raises:
            NotFoundError: the step is not committed.
        """
        pin = _Pin(step)
        self._pins.add(pin)
        try:
            pin.keep(self.current())
            yield
        finally:
            self._pins.discard(pin)
            pin.close()

    def look(self) -> None:
        """The Engine is being closed, and waits for its saves: no other monitor is started."""
        self._is_closing = True
        self.last.look()

    def close(self) -> None:
        self._is_closing = True
        with self._mutex:
            self.last.close()


class _RemoteCommits:
    """`committer.Commits` of one monitor."""

    def __init__(self, monitor: Monitor, directory: MonitoredDirectory) -> None:
        self._monitor = monitor
        self._directory = directory
        self._saves: dict[int, tuple[Channel, str]] = {}  # by step in flight: its channel, and its checkpoint's id

    def memory(self, block_count: int) -> JobMemory | None:
        """A board that the monitor will map, too."""
        nbytes = board_bytes(block_count)
        try:
            descriptor = make_memory("engine-board", nbytes)
        except OSError as error:
            raise refused(error, f"{nbytes} bytes of memory to share with a monitor") from None
        return _SharedBoard(descriptor, block_count)

    def begin(self, record: SaveRecord, direct: bool, memory: JobMemory | None) -> Attachment:
        """Have the monitor make the files; see `Commits.begin`."""
        assert isinstance(memory, _SharedBoard)
        channel = self._monitor.open_request()
        self._saves[record.step] = channel, record.checkpoint_id
        with self._monitor.living():
            channel.send(_begin(record, direct), [memory.descriptor.number])
            memory.descriptor.close()
            begun = channel.expect(Begun)
        hashes = [begun.known[start : start + HASH_BYTES] for start in range(0, len(begun.known), HASH_BYTES)]
        known = [hash_ if is_known else None for hash_, is_known in zip(hashes, begun.is_known, strict=True)]
        return Attachment(begun.path, begun.descriptors, known or None)

    def amend(self, record: SaveRecord) -> None:
        """Have the monitor replace the record of a save; see `Commits.amend`."""
        channel, _ = self._saves[record.step]
        with self._monitor.living():
            channel.send(_begin(record, direct=False))
            channel.expect(Done)

    def commit(self, step: int, checksums: Sequence[bytes], await_turn: Callable[[], None]) -> CheckpointInfo:
        """Have the monitor seal and publish; it has the checksums."""
        channel, checkpoint_id = self._saves[step]
        with self._monitor.living():
            channel.send(Seal())
            channel.expect(Done)
            await_turn()
            info = self._publish(channel, step, checkpoint_id)
        self._saves.pop(step)
        channel.close()
        return info

    def _publish(self, channel: Channel, step: int, checkpoint_id: str) -> CheckpointInfo:
        try:
            channel.send(Publish())
            published = channel.expect(Published)
        except ChannelEnded:
            info = self._directory.committed(step, checkpoint_id)
            if info is None:
                raise
            return info
        return CheckpointInfo(*(getattr(published, name) for name in CheckpointInfo._fields))

    def discard(self, step: int, error: BaseException) -> None:
        """Have the monitor delete what is left; nothing to do if it has failed there, or has ended."""
        if step not in self._saves:
            return
        channel, _ = self._saves.pop(step)
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
        with self._monitors.pinned(step), super().opened(step) as opened:
            yield opened

    def committed(self, step: int, checkpoint_id: str) -> CheckpointInfo | None:
        """A checkpoint that a monitor has made visible before it ended; durable when this returns.  None if it has not.

        The monitor may have ended between the rename and its sync.
        """
        try:
            with super().opened(step) as opened:
                info = info_of(opened.summary(), opened.path)
            if info.checkpoint_id != checkpoint_id:
                return None
            self.filesystem.sync_directory(self.root)
        except EngineError:
            return None
        return info

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
            self._writers: tuple[Monitor, Writer] | None = None
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
            writers = self._writers = monitor, Writer(monitor.pipeline, _RemoteCommits(monitor, self.catalog))
        return writers[1]

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return self.catalog.steps()

    def retire(self) -> None:
        """Retire every step that the retention rule does not keep."""
        self.catalog.retire()

    def look(self) -> None:
        """Called while the Engine waits for its saves to end: a monitor that stays stopped is not waited for."""
        self._monitors.look()

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
