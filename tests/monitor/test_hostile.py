"""A trainer that sends and posts nonsense: its monitor does not fail, and writes nothing but the files of its saves."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_trainer import (
    BLOCK_COUNT,
    CHUNKS,
    DONE_HEAD,
    DONE_TAIL,
    ENTRIES,
    FILE_BYTES,
    HANG_S,
    NAME,
    PLAN,
    POST_HEAD,
    POST_TAIL,
    POSTS,
    SLOT_BYTES,
    RawTrainer,
    Serving,
    begin_message,
    content,
    descriptor_of,
    set_block,
)

from engine.errors import EngineError
from engine.format.manifest import FileRecord
from engine.format.plan import ALIGNMENT
from engine.io.job import BlockState
from engine.monitor import process
from engine.monitor.protocol import (
    Begin,
    Begun,
    Call,
    Channel,
    ChannelEnded,
    Done,
    Message,
    Pin,
    Publish,
    Published,
    Request,
    Seal,
)
from engine.monitor.shared_memory import Board, board_bytes, make_memory
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner

_LENGTH = struct.Struct("!Q")

# What msgspec decodes in different ways, and how long it says that it is.
NO_MESSAGES = {
    "nothing": b"",
    "another type": b"\x01",
    "text that is no text": b"\x82\xa4type\xa4Call\xa4name\xa6\xff\xff\xff\xff\xff\xff",
    "arrays in arrays": b"\x82\xa4type\xa7Discard\xa1x" + b"\x91" * 100_000,
    "an array that ends early": b"\x82\xa4type\xa5Begin\xa6layers\xdd\xff\xff\xff\xff",
    "another message": msgspec.msgpack.encode({"type": "Welcomes"}),
    "one that is not the monitor's": msgspec.msgpack.encode(Seal()),
}


def save_whole(trainer: RawTrainer, step: int) -> None:
    """A save as it should be."""
    channel, board = trainer.begin(step)
    with channel:
        write_blocks(trainer, descriptor_of(channel.expect(Begun)), board, step)
        for message, answer in ((Seal(), Done), (Publish(), Published)):
            channel.send(message)
            channel.expect(answer)


def write_blocks(trainer: RawTrainer, descriptor: int, board: Board, step: int) -> None:
    for block in range(BLOCK_COUNT):
        trainer.fill(0, content(step, block))
        trainer.post(0, descriptor, 0, PLAN.blocks[block].write_bytes, PLAN.blocks[block].file_offset)
        assert trainer.answers(1) == [(0, PLAN.blocks[block].write_bytes)]
        set_block(board, block, BlockState.WRITTEN, content(step, block))
    board.mark_staged()


def look(root: Path, steps: list[int]) -> None:
    """The monitor has ended well: the lock is free, these steps are whole, and nothing else is there."""
    owner = Owner(str(root), Filesystem(), 2)
    assert owner.steps() == steps
    owner.close()
    assert sorted(os.listdir(root.parent)) == ["run"] and not (root / "evil").exists()
    assert sorted(os.listdir(root)) == [".engine", *(f"step-{step:08d}" for step in steps)]
    for step in steps:
        want = b"".join(content(step, block) for block in range(BLOCK_COUNT))
        assert (root / f"step-{step:08d}" / NAME).read_bytes() == want


def raw(channel: Channel) -> socket.socket:
    return channel._socket


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "volume" / "run"


@pytest.mark.parametrize("name", NO_MESSAGES)
@pytest.mark.parametrize("where", ["first", "control", "request", "save"])
def test_bytes_that_are_no_message(root: Path, name: str, where: str) -> None:
    """They end the channel that they come on.  On the control channel, that is the end of the trainer."""
    root.parent.mkdir()
    trainer = RawTrainer()
    serving = Serving(trainer)
    sent = _LENGTH.pack(len(NO_MESSAGES[name])) + NO_MESSAGES[name]
    if where == "first":
        raw(trainer.control).sendall(sent)
        serving.join()
        trainer.close()
        return
    trainer.start(root)
    save_whole(trainer, 1)
    channel, board = trainer.begin(2)
    write_blocks(trainer, descriptor_of(channel.expect(Begun)), board, 2)
    if where == "request":
        other = trainer.request(Call("retire", None))
        other.expect(Done)
        other.close()
        mine, theirs = Channel.pair()
        with mine, theirs:
            trainer.control.send(Request(), [theirs.fileno()])
            raw(mine).sendall(sent)
    else:
        raw(trainer.control if where == "control" else channel).sendall(sent)
    if where != "save" or name.startswith("one that"):
        channel.close()
    trainer.control.shut_down()
    serving.join()
    trainer.close()
    channel.close()
    look(root, [1, 2])


# -- what a Begin asks for ------------------------------------------------------------------------------------------

_names = st.sampled_from(["../evil", "/evil", "evil/../../evil", "..", ".", "", "a\0b", "manifest.json", NAME])
_numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from([-1, 0, 1, ALIGNMENT, FILE_BYTES, 1 << 62])


@st.composite
def _changes(draw: st.DrawFn) -> dict[str, Any]:
    """A field or two of a Begin, with what no trainer asks for."""
    files = st.lists(st.builds(FileRecord, _names | st.just("b"), _numbers, _numbers), max_size=3).map(tuple)
    chunks = st.lists(st.tuples(_numbers, _numbers, _numbers, _numbers), max_size=3).map(tuple)
    wrong = {
        "step": _numbers.filter(lambda step: not 0 <= step < 1 << 63),
        "block_bytes": _numbers.filter(lambda nbytes: nbytes != SLOT_BYTES),
        "files": files,
        "chunks": chunks.filter(lambda drawn: drawn != CHUNKS),
        "layers": st.just(((),)),
        "untrained": st.just(("evil",)),
        "user_files": _names.map(lambda name: {name: b"evil"}),
        "small_files": _names.map(lambda name: {name: b"evil"}),
    }
    fields = draw(st.lists(st.sampled_from(sorted(wrong)), min_size=1, max_size=2, unique=True))
    return {name: draw(wrong[name]) for name in fields}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(_changes(), min_size=1, max_size=8))
def test_a_save_that_no_trainer_asks_for(
    tmp_path_factory: pytest.TempPathFactory, changes: list[dict[str, Any]]
) -> None:
    """It is refused, and the next save works."""
    root = tmp_path_factory.mktemp("volume") / "volume" / "run"
    root.parent.mkdir()
    trainer = RawTrainer()
    serving = Serving(trainer)
    trainer.start(root)
    for changed in changes:
        channel, _ = trainer.begin(**{"step": 1, **changed})
        with channel, pytest.raises(RuntimeError, match="asked for a save with"):
            channel.expect(Begun)
    save_whole(trainer, 1)
    trainer.close()
    serving.join()
    look(root, [1])


def test_a_board_that_is_none(root: Path, tmp_path: Path) -> None:
    """Too small, not sealed, or no memory at all."""
    root.parent.mkdir()
    trainer = RawTrainer()
    serving = Serving(trainer)
    trainer.start(root)
    small = make_memory("test-small", board_bytes(BLOCK_COUNT) - 1)
    unsealed = os.memfd_create("test-unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, board_bytes(BLOCK_COUNT))
    with open("/dev/null", "rb") as null:
        for descriptor in (small.number, unsealed, null.fileno()):
            with trainer.request(begin_message(1), [descriptor]) as channel, pytest.raises(RuntimeError, match="board"):
                channel.expect(Begun)
    with trainer.request(begin_message(1)) as channel, pytest.raises(ChannelEnded):
        channel.expect(Begun)
    small.close()
    os.close(unsealed)
    save_whole(trainer, 1)
    trainer.close()
    serving.join()
    look(root, [1])


@pytest.mark.parametrize("step", [-1, 1 << 63, (1 << 64) - 1])
def test_steps_that_are_none(root: Path, step: int) -> None:
    root.parent.mkdir()
    trainer = RawTrainer()
    serving = Serving(trainer)
    trainer.start(root)
    messages: list[Message] = [Pin(step), Call("delete", step), Call("distrust", step), Call("set_aside", step)]
    for message in messages:
        with trainer.request(message) as channel:
            try:
                channel.expect(Done)
            except (EngineError, RuntimeError):
                continue
    save_whole(trainer, 1)
    trainer.close()
    serving.join()
    look(root, [1])


# -- the slots' memory ----------------------------------------------------------------------------------------------


class Process:
    """A real monitor: a crash of its native thread is that of its process."""

    def __init__(self, trainer: RawTrainer) -> None:
        number = trainer.theirs.fileno()
        self._process = subprocess.Popen(process.command(number), pass_fds=[number])
        trainer.theirs.close()

    def join(self) -> None:
        assert self._process.wait(HANG_S) == 0

    def descriptors(self) -> Iterator[int]:
        return map(int, os.listdir(f"/proc/{self._process.pid}/fd"))


def test_posts_to_anything_but_the_files_of_saves(root: Path) -> None:
    """Whatever is open in the monitor, and whatever part of a slot."""
    root.parent.mkdir()
    trainer = RawTrainer()
    monitor = Process(trainer)
    trainer.start(root)
    save_whole(trainer, 1)
    channel, board = trainer.begin(2)
    file = descriptor_of(channel.expect(Begun))
    trainer.fill(1, b"evil" * 1000)
    posts = [(1, number, 0, ALIGNMENT, 0) for number in (*monitor.descriptors(), -1, 999) if number != file]
    posts += [(1, file, *wrong) for wrong in ((0, 0, 0), (0, 2 * ALIGNMENT, 0), (ALIGNMENT, ALIGNMENT, 0), (0, 512, 0))]
    posts += [(1, file, 0, ALIGNMENT, offset) for offset in (1, 1 << 40, (1 << 64) - ALIGNMENT)]
    for post in posts:
        trainer.post(*post)
        ((slot, result),) = trainer.answers(1)
        assert slot == 1 and result < 0, post
    write_blocks(trainer, file, board, 2)
    channel.close()
    trainer.close()
    monitor.join()
    look(root, [1, 2])


@pytest.mark.parametrize("seed", range(6))
def test_nonsense_in_shared_memory(root: Path, seed: int) -> None:
    """It may spoil the saves of this trainer, and nothing else: not the monitor, and not what is committed."""
    chance = random.Random(seed)
    root.parent.mkdir()
    trainer = RawTrainer()
    monitor = Process(trainer)
    trainer.start(root)
    save_whole(trainer, 1)
    channel, board = trainer.begin(2)
    channel.expect(Begun)
    for _ in range(200):
        index = chance.choice([POST_TAIL, POST_HEAD, DONE_TAIL, DONE_HEAD, POSTS])
        size = 4 if index != POSTS else chance.randrange(24 * 64)
        trainer.memory[index : index + size] = chance.randbytes(size)
        board.checksums[:] = chance.randbytes(len(board.checksums))
        board.states[:] = chance.randbytes(len(board.states))
        os.eventfd_write(trainer.post_fd, 1)
    board.mark_staged()
    channel.close()
    trainer.close()
    monitor.join()
    look(root, [1])


@pytest.mark.parametrize("tail", [ENTRIES + 1, 1 << 31])
def test_a_trainer_that_breaks_the_rules_of_the_ring_ends_its_monitor(root: Path, tail: int) -> None:
    """Although the trainer lives.  It sees the end on its channel, and what is committed stays."""
    root.parent.mkdir()
    trainer = RawTrainer()
    monitor = Process(trainer)
    trainer.start(root)
    save_whole(trainer, 1)
    (taken,) = struct.unpack("<I", trainer.memory[POST_HEAD : POST_HEAD + 4])
    trainer.memory[POST_TAIL : POST_TAIL + 4] = struct.pack("<I", taken + tail)
    os.eventfd_write(trainer.post_fd, 1)
    monitor.join()
    assert trainer.control.is_ended()
    trainer.close()
    look(root, [1])


def test_messages_are_those_of_the_protocol() -> None:
    """The bytes above are no messages, but for the last."""
    decoder = msgspec.msgpack.Decoder(Seal | Begin)
    for name, sent in NO_MESSAGES.items():
        if name.startswith("one that"):
            assert decoder.decode(sent) == Seal()
        else:
            with pytest.raises((ValueError, RecursionError)):
                decoder.decode(sent)
