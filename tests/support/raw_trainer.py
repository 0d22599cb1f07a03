"""A trainer's end of the monitor's protocol, by hand: no pipeline, so that a test may send and post anything.

Theory of operation.  A `RawTrainer` maps the slots' memory and posts there as `shared.c` does (`shared.h` has the
layout).  It sends messages as `client` does, each at the moment that the test chooses.  Its saves have one file of five
blocks, the last of them short.  `Serving` runs the real `Server` on a thread of this process.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from engine.format.manifest import FileRecord
from engine.format.plan import ALIGNMENT, Chunk, PlannedFile, plan_geometry
from engine.io.binding import block_checksum, ffi, lib
from engine.io.job import BlockState
from engine.monitor.listener import Listener
from engine.monitor.protocol import Begin, Begun, Channel, ChannelEnded, Hello, Message, Request, Welcome
from engine.monitor.server import Server
from engine.monitor.shared_memory import Board, board_bytes, make_memory, slots_bytes
from engine.options import Choice
from engine.store.filesystem import Filesystem
from engine.store.retention import Retention

SLOT_COUNT, SLOT_BYTES = 4, ALIGNMENT
NAME, FILE_BYTES = "model.safetensors", 4 * ALIGNMENT + 100
CHUNKS = ((0, 0, 0, 2 * ALIGNMENT), (0, 1, 2 * ALIGNMENT, FILE_BYTES - 2 * ALIGNMENT))
PLAN = plan_geometry((PlannedFile(NAME, FILE_BYTES, ALIGNMENT),), tuple(Chunk(*chunk) for chunk in CHUNKS), SLOT_BYTES)
BLOCK_COUNT = len(PLAN.blocks)

# Of shared.h: four indices and two rings.
POST_TAIL, POST_HEAD, DONE_TAIL, DONE_HEAD, POSTS, ENTRIES = 0, 64, 128, 192, 256, 1024
_POST, _DONE = struct.Struct("<IiIIQ"), struct.Struct("<Ii")
_DONES = POSTS + ENTRIES * _POST.size

# Ends a test that hangs.
HANG_S = 60.0


def content(step: int, block: int) -> bytes:
    """The bytes of a block of a step; unlike those of any other."""
    return struct.pack("<II", step, block) * (PLAN.blocks[block].nbytes // 8) + bytes(PLAN.blocks[block].nbytes % 8)


def begin_message(step: int, **changed: Any) -> Begin:
    """A Begin, with some fields changed."""
    fields: dict[str, Any] = {
        "step": step,
        "checkpoint_id": f"{step:032x}",
        "direct": False,
        "block_bytes": SLOT_BYTES,
        "files": (FileRecord(NAME, FILE_BYTES, ALIGNMENT),),
        "untrained": (),
        "chunks": CHUNKS,
        "layers": ((),) * len(CHUNKS),
        "rows": b"[]",
        **dict.fromkeys(("aliases", "wrappers", "optimizers", "modules"), b"{}"),
        "extra": b"null",
        "metrics": {},
        "tag": None,
        "user_files": {},
        "small_files": {},
    }
    return Begin(**{**fields, **changed})


class RawTrainer:
    """One control channel and the slots' memory.  Its other end is `theirs`, to be served."""

    def __init__(self) -> None:
        self.control, self.theirs = Channel.pair()
        self._memory = make_memory("test-slots", slots_bytes(SLOT_COUNT, SLOT_BYTES))
        self.post_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        mapping = ffi.new("eng_mapping *")
        assert lib.eng_map_shared(self._memory.number, slots_bytes(SLOT_COUNT, SLOT_BYTES), mapping) == 0
        self._mapping = ffi.gc(mapping, lib.eng_unmap_shared)
        self.memory: Any = ffi.buffer(mapping.address, slots_bytes(SLOT_COUNT, SLOT_BYTES))
        self._post_tail = self._done_head = 0

    def hello(self, root: Path, backend: Choice = "threads", **changed: Any) -> Hello:
        """The first message, with some fields changed."""
        fields = {"retention": Retention(last=None), "rewrite_all": False, "slot_count": SLOT_COUNT}
        return Hello(
            **{"root": str(root), "spare_max": 2, "backend": backend, "slot_bytes": SLOT_BYTES, **fields, **changed}
        )

    def start(self, root: Path) -> Welcome:
        """Say hello, and be answered."""
        self.control.set_timeout(HANG_S)
        self.control.send(self.hello(root), self.descriptors())
        return self.control.expect(Welcome)

    def descriptors(self) -> list[int]:
        """What comes with the first message."""
        return [self._memory.number, self.post_fd, self._wake_fd]

    def request(self, message: Message, descriptors: Sequence[int] = ()) -> Channel:
        """A channel of its own, on which this is the first message."""
        channel, theirs = Channel.pair()
        channel.set_timeout(HANG_S)
        with theirs:
            self.control.send(Request(), [theirs.fileno()])
        channel.send(message, descriptors)
        return channel

    def begin(self, step: int, **changed: Any) -> tuple[Channel, Board]:
        """Ask for a save; the answer is not awaited."""
        memory = make_memory("test-board", board_bytes(BLOCK_COUNT))
        board = Board(memory.number, BLOCK_COUNT)
        channel = self.request(begin_message(step, **changed), [memory.number])
        memory.close()
        return channel, board

    def fill(self, slot: int, raw: bytes) -> None:
        """Copy to a slot, with zeros behind."""
        start = int(lib.ENG_SHARED_HEADER_BYTES) + slot * SLOT_BYTES
        self.memory[start : start + SLOT_BYTES] = raw + bytes(SLOT_BYTES - len(raw))

    def post(self, slot: int, descriptor: int, slot_offset: int, nbytes: int, file_offset: int) -> None:
        """Append a post, whatever it says, and wake the monitor."""
        start = POSTS + self._post_tail % ENTRIES * _POST.size
        self.memory[start : start + _POST.size] = _POST.pack(slot, descriptor, slot_offset, nbytes, file_offset)
        self._post_tail += 1
        self.memory[POST_TAIL : POST_TAIL + 4] = struct.pack("<I", self._post_tail % (1 << 32))
        os.eventfd_write(self.post_fd, 1)

    def answers(self, count: int) -> list[tuple[int, int]]:
        """So many answers, each a slot and a result.  Blocks.

        Raises:
            TimeoutError: they do not come.
        """
        found: list[tuple[int, int]] = []
        while len(found) < count:
            (tail,) = struct.unpack("<I", self.memory[DONE_TAIL : DONE_TAIL + 4])
            if tail == self._done_head:
                if not select.select([self._wake_fd], [], [], HANG_S)[0]:
                    raise TimeoutError
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                continue
            start = _DONES + self._done_head % ENTRIES * _DONE.size
            slot, result = _DONE.unpack(self.memory[start : start + _DONE.size])
            self._done_head += 1
            found.append((slot, result))
        return found

    def close(self) -> None:
        """Be dead: only what is shared stays as it is."""
        for descriptor in (self.post_fd, self._wake_fd):
            os.close(descriptor)
        self._memory.close()
        self.control.close()
        self.theirs.close()


def set_block(board: Board, block: int, state: BlockState, raw: bytes) -> None:
    """As the pipeline: the checksum, and then the state."""
    board.checksums[16 * block : 16 * block + 16] = block_checksum(raw)
    board.states[block : block + 1] = bytes([state])


class ClosedListener(Listener):
    """A listener whose socket does not stay open until the process ends, since that of a test goes on."""

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


class Serving:
    """A `Server` on a thread, until its trainer is gone."""

    def __init__(self, trainer: RawTrainer) -> None:
        self.error: BaseException | None = None
        self._server = Server(Channel(trainer.theirs.dup()), Filesystem())
        trainer.theirs.close()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for its end.

        Raises:
            TimeoutError: it does not end.
        """
        self._thread.join(HANG_S)
        if self._thread.is_alive():
            raise TimeoutError("the server does not end")
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            with suppress(ChannelEnded), mock.patch("engine.monitor.server.Listener", ClosedListener):
                self._server.run()
        except BaseException as error:
            self.error = error
        finally:
            self._server._control.close()


def descriptor_of(begun: Begun) -> int:
    """The number in the monitor of the one file of a save."""
    (descriptor,) = begun.descriptors
    return descriptor
