"""Server: the monitor's process, which owns a directory of checkpoints and outlives the trainer.

Theory of operation.  The process has one trainer, which started it and has the other end of the control channel.  It
owns the lock, the catalog and the files of the saves, and a native thread that writes what the trainer's pipeline posts
(`io.serving`).  Each request has a thread of its own.

A save is committed by one thread and one code, `committer.Committer`, whether the trainer lives or not.  If the save's
channel ends before the save has, the trainer is dead.  Then the save is completed if its board says that all was
staged and nothing had changed meanwhile: a block that is not written yet is in a slot, where it is found by the hash of
its content, and is written from there.  If a block is not to be found, or the board does not say so, the save is
discarded.  When the control channel has ended and every request with it, the directory is given back and the process
ends.

The trainer has died when its channels end: the kernel closes a process's descriptors when none of its threads runs any
more, and forked children close their copies at the fork.

The process ignores the signals that end a process group or a job (`protocol.IGNORED`), and has a session of its own: it
always ends by itself, soon after the trainer.

Rules: no torch and no numpy.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from itertools import pairwise
from typing import cast

import msgspec

from engine.errors import TornSnapshot
from engine.format.manifest import Rows
from engine.format.plan import Chunk, PlannedFile, plan_geometry
from engine.format.values import Json
from engine.io.backend import open_serving
from engine.io.binding import block_checksum
from engine.io.job import HASH_BYTES, BlockState, bytes_come, least
from engine.io.pipeline import Shared
from engine.io.serving import Serving
from engine.monitor.begin import check_begin
from engine.monitor.listener import Listener
from engine.monitor.protocol import (
    IGNORED,
    Begin,
    Begun,
    Call,
    Channel,
    ChannelEnded,
    ChunkState,
    Discard,
    Done,
    Hello,
    Message,
    Pin,
    Publish,
    Published,
    Request,
    SaveState,
    Seal,
    Status,
    Welcome,
    failed,
)
from engine.monitor.shared_memory import Board
from engine.store.committer import Attachment, Committer, SaveRecord
from engine.store.filesystem import Filesystem
from engine.store.info import CheckpointInfo
from engine.store.owner import Owner

_log = logging.getLogger("engine.monitor")


class _TrainerGone(Exception):
    """The trainer ended before its save."""


class _Discarded(Exception):
    """The trainer had the save discarded."""


class _InFlight:
    """A save in flight, for its turn and for those that ask."""

    def __init__(self, record: SaveRecord, board: Board) -> None:
        self.record = record
        self.board = board
        self.ended = threading.Event()
        self._began = time.monotonic()

    def state(self) -> SaveState:
        """Every chunk and how far it has come."""
        record = self.record
        states = self.board.block_states()
        starts = pairwise(record.plan.block_starts)
        chunks = [
            ChunkState(
                record.plan.files[chunk.file_index].name,
                chunk.index,
                chunk.offset,
                chunk.nbytes,
                tuple(layers),
                least(states[start:end]).name.lower(),
            )
            for chunk, layers, (start, end) in zip(record.plan.chunks, record.layers(), starts, strict=True)
        ]
        sizes = [block.nbytes for block in record.plan.blocks]
        staged, written = bytes_come(states, sizes)
        seconds = time.monotonic() - self._began
        is_safe = self.board.is_staged
        return SaveState(
            record.step, record.checkpoint_id, is_safe, tuple(chunks), sum(sizes), staged, written, seconds
        )


class _Warnings(threading.local):
    """What this thread's request has warned of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def take(self) -> tuple[str, ...]:
        texts, self.texts = tuple(self.texts), []
        return texts


_warnings = _Warnings()


class Server:
    """One directory, owned for one trainer."""

    def __init__(self, control: Channel, filesystem: Filesystem) -> None:
        self._control = control
        self._filesystem = filesystem
        self._threads: list[threading.Thread] = []
        self._saves: dict[int, _InFlight] = {}
        self._mutex = threading.Lock()
        self._trainer_pid = control.peer()[0]

    def run(self) -> None:
        """Own the directory until the trainer has ended and every save with it."""
        hello, descriptors = self._control.receive()
        try:
            if not isinstance(hello, Hello) or len(descriptors) != 3 or self._control.peer()[1] != os.getuid():
                return
            try:
                memory, post, wake = descriptors
                owner, serving, welcome = self._open(hello, Shared(memory, post, wake, self._control.number))
            except Exception as error:
                self._control.send(failed(error, _warnings.take()))
                return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._owner, self._serving = owner, serving
        self._committer = Committer(owner, hello.rewrite_all)
        # The listener removes a name, so it ends before the directory is given back.
        with closing(owner), Listener(owner.root, self._status), closing(serving):
            try:
                with suppress(ChannelEnded):
                    self._control.send(welcome)
                    self._accept_requests()
            finally:
                for thread in self._threads:
                    thread.join()

    def _open(self, hello: Hello, shared: Shared) -> tuple[Owner, Serving, Welcome]:
        owner = Owner(hello.root, self._filesystem, hello.spare_max, hello.retention)
        try:
            serving, probe = open_serving(
                owner.root, self._filesystem, hello.backend, hello.slot_count, hello.slot_bytes, shared
            )
        except BaseException:
            owner.close()
            raise
        assert probe.backend is not None
        attempts = tuple((each.backend, each.cause, each.remedy) for each in probe.attempts)
        return owner, serving, Welcome(owner.root, owner.retention, probe.backend, attempts, _warnings.take())

    def _accept_requests(self) -> None:
        while True:
            message, descriptors = self._control.receive()
            if not isinstance(message, Request):
                for descriptor in descriptors:
                    os.close(descriptor)
                raise ChannelEnded
            if len(descriptors) != 1:  # this process has no descriptor left, and the kernel dropped it
                continue
            channel = Channel(socket.socket(fileno=descriptors[0]))
            thread = threading.Thread(target=self._serve, args=(channel,), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is left: the request ends, and the trainer's next one may be served
                channel.close()
                continue
            self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def _serve(self, channel: Channel) -> None:
        """One request."""
        with channel, suppress(ChannelEnded):
            message, descriptors = channel.receive()
            try:
                if isinstance(message, Begin) and len(descriptors) == 1:
                    self._save(channel, message, descriptors.pop())
                elif isinstance(message, Call):
                    _answer(channel, lambda: self._call(message))
                elif isinstance(message, Pin):
                    self._pin(channel, message.step)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _call(self, call: Call) -> Done:
        method = getattr(self._owner, call.name)
        result = method() if call.step is None else method(call.step)
        return Done(result, _warnings.take())

    def _pin(self, channel: Channel, step: int) -> None:
        try:
            with self._owner.opened(step):
                channel.send(Done(None, _warnings.take()))
                channel.receive()  # which ends the channel
        except ChannelEnded:
            raise
        except Exception as error:
            channel.send(failed(error, _warnings.take()))

    # -- saves ------------------------------------------------------------------------------------------------

    def _save(self, channel: Channel, begin: Begin, memory: int) -> None:
        """A save from its begin to its end.  Only this thread touches it."""
        try:
            check_begin(begin, self._serving.slot_bytes)
            record = _record(begin)
            board = Board(memory, len(record.plan.blocks))
        except Exception as error:
            channel.send(failed(error))
            return
        finally:
            os.close(memory)
        save = _InFlight(record, board)
        with self._mutex:
            is_alone = self._saves.setdefault(record.step, save) is save
        if not is_alone:  # one that was begun twice would discard the files of the first
            channel.send(failed(ValueError(f"step {record.step} is in flight")))
            return
        try:
            self._save_to_its_end(channel, save, begin.direct)
        finally:
            with self._mutex:
                del self._saves[record.step]
            save.ended.set()

    def _save_to_its_end(self, channel: Channel, save: _InFlight, direct: bool) -> None:
        step = save.record.step
        trainer = _Trainer(channel)
        descriptors: list[int] = []
        try:
            begun = self._committer.begin(save.record, direct)
            for descriptor, file in zip(begun.descriptors, save.record.plan.files, strict=True):
                self._serving.admit(descriptor, file.nbytes + self._serving.slot_bytes)
                descriptors.append(descriptor)
            trainer.tell(_begun(begun))
            if not trainer.asks(Seal, partial(self._amend, save)):
                self._withdraw(descriptors)
                self._complete(save)
            self._withdraw(descriptors)
            info = self._committer.commit(step, save.board.block_checksums(), lambda: self._await_turn(save, trainer))
        except BaseException as error:
            self._withdraw(descriptors)
            with suppress(Exception):
                torn = isinstance(error, _Discarded) and error.args[0]
                self._committer.discard(step, TornSnapshot() if torn else error)
            if isinstance(error, _TrainerGone):
                _log.warning("step %d was discarded: the trainer ended %s", step, error)
            else:
                trainer.tell(Done(None, _warnings.take()) if isinstance(error, _Discarded) else failed(error))
            return
        trainer.tell(_published(info))
        if trainer.is_gone:
            _log.warning("step %d was committed after its trainer had ended", step)
            with suppress(Exception):
                self._owner.retire()

    def _amend(self, save: _InFlight, begin: Begin) -> None:
        """Replace the record of a save by one of the same plan."""
        check_begin(begin, self._serving.slot_bytes)
        record = _record(begin)
        if (record.step, record.checkpoint_id, record.plan) != (
            save.record.step,
            save.record.checkpoint_id,
            save.record.plan,
        ):
            raise ValueError(f"step {save.record.step} is amended by the record of another save")
        self._committer.amend(record)
        save.record = record

    def _withdraw(self, descriptors: list[int]) -> None:
        while descriptors:
            self._serving.withdraw(descriptors.pop())

    def _await_turn(self, save: _InFlight, trainer: _Trainer) -> None:
        """Between seal and publish: every save of an earlier step has ended."""
        trainer.tell(Done(None, _warnings.take()))
        trainer.asks(Publish)  # where the trainer is gone, nobody else may begin a save of an earlier step
        with self._mutex:
            earlier = [each for step, each in self._saves.items() if step < save.record.step]
        for each in earlier:
            each.ended.wait()

    def _complete(self, save: _InFlight) -> None:
        """Write what a dead trainer has staged and not written.

        Raises:
            _TrainerGone: it had not staged all of it.
        """
        plan, states, checksums = save.record.plan, save.board.block_states(), save.board.block_checksums()
        if not save.board.is_staged:
            raise _TrainerGone("before all of it was staged")
        missing = [block for block, state in enumerate(states) if state != BlockState.WRITTEN]
        slots = self._slots_by_content({plan.blocks[block].nbytes for block in missing})
        files = self._owner.files(save.record.step)
        for block in missing:
            geometry = plan.blocks[block]
            slot = slots.get((geometry.nbytes, checksums[block]))
            if slot is None:
                raise _TrainerGone("and a staged block is in no slot")
            file = files[geometry.file_index]
            content = self._serving.slot(slot, geometry.write_bytes)
            self._filesystem.write_range(file.descriptor, geometry.file_offset, content, file.path)

    def _slots_by_content(self, sizes: set[int]) -> dict[tuple[int, bytes], int]:
        """For each of these lengths, and the hash of so many bytes of a slot, that slot."""
        slots = range(self._serving.slot_count)
        return {(size, block_checksum(self._serving.slot(slot, size))): slot for size in sizes for slot in slots}

    # -- status -----------------------------------------------------------------------------------------------

    def _status(self) -> Status:
        with self._mutex:
            saves = [self._saves[step] for step in sorted(self._saves)]
        states = tuple(save.state() for save in saves)
        return Status(os.getpid(), self._trainer_pid, self._control.is_ended(), states)


class _Trainer:
    """The trainer's end of a save's channel, which may be gone at any moment."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.is_gone = False

    def tell(self, message: Message) -> None:
        """Send a message, if the trainer is there."""
        try:
            self._channel.send(message)
        except ChannelEnded:
            self.is_gone = True

    def asks(self, kind: type[Seal] | type[Publish], amend: Callable[[Begin], None] | None = None) -> bool:
        """Wait for this message; False if the trainer is gone.  Until it comes, each `Begin` is given to `amend`.

        Raises:
            _Discarded: it has the save discarded; its argument says whether because it was torn.
        """
        while not self.is_gone:  # what it sends after nonsense is not waited for
            try:
                message, _ = self._channel.receive()
            except ChannelEnded:
                self.is_gone = True
                break
            if isinstance(message, kind):
                return True
            if not isinstance(message, Begin) or amend is None:
                raise _Discarded(isinstance(message, Discard) and message.torn)
            amend(message)
            self.tell(Done(None, _warnings.take()))
        return False


def _answer(channel: Channel, function: Callable[[], Message]) -> None:
    try:
        answer = function()
    except Exception as error:
        answer = failed(error, _warnings.take())
    channel.send(answer)


def _record(begin: Begin) -> SaveRecord:
    files = tuple(PlannedFile(file.name, file.nbytes, file.header_bytes) for file in begin.files)
    plan = plan_geometry(files, tuple(Chunk(*chunk) for chunk in begin.chunks), begin.block_bytes)
    return SaveRecord(
        step=begin.step,
        checkpoint_id=begin.checkpoint_id,
        plan=plan,
        untrained=begin.untrained,
        layers=lambda: begin.layers,
        rows=Rows(begin.rows),
        aliases=msgspec.json.decode(begin.aliases, type=dict[str, str]),
        optimizers=msgspec.json.decode(begin.optimizers, type=dict[str, msgspec.Raw]),
        modules=msgspec.json.decode(begin.modules, type=dict[str, msgspec.Raw]),
        wrappers=msgspec.json.decode(begin.wrappers, type=dict[str, msgspec.Raw]),
        extra=cast(Json, msgspec.Raw(begin.extra)),
        metrics=begin.metrics,
        tag=begin.tag,
        user_files=begin.user_files,
        small_files=begin.small_files,
    )


def _begun(begun: Attachment) -> Begun:
    known = begun.known or ()
    hashes = b"".join([hash_ or bytes(HASH_BYTES) for hash_ in known])
    return Begun(begun.path, tuple(begun.descriptors), hashes, bytes([hash_ is not None for hash_ in known]))


def _published(info: CheckpointInfo) -> Published:
    fields = {**info._asdict(), "metrics": dict(info.metrics)}
    return Published(**fields, warnings=_warnings.take())


def _collect(message: Warning | str, *_: object, **__: object) -> None:
    _warnings.texts.append(str(message))


def main(descriptor: int, filesystem: Filesystem | None = None) -> None:
    """Run a monitor for the trainer at the other end of this socket."""
    for each in IGNORED:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)  # those that came since the start are ignored, too
    os.set_inheritable(descriptor, False)
    warnings.simplefilter("always")
    warnings.showwarning = _collect
    logging.basicConfig(format="engine monitor %(process)d: %(message)s", stream=sys.stderr)
    with suppress(ChannelEnded):
        Server(Channel(socket.socket(fileno=descriptor)), filesystem or Filesystem()).run()
