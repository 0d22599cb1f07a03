"""A model of the protocol between a trainer and its monitor: what is late, lost or doubled never commits a wrong step.

Theory of operation.  The real `Server` is driven by a `RawTrainer`, whose every message and post is a rule of a state
machine (hypothesis).  A message that is late is a rule that comes late.  One that is lost ends its channel, as on a
socket nothing else can be lost; a post that is lost is one that the dead trainer did not make.  A doubled one is sent
twice.  The model knows of each save what its outcome may be.  After each rule the disk shows the steps that it requires
and none that it forbids, and each has the bytes of its step.  Every wait has a limit, so a hang is a failure.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from raw_trainer import (
    BLOCK_COUNT,
    NAME,
    PLAN,
    SLOT_BYTES,
    SLOT_COUNT,
    RawTrainer,
    Serving,
    content,
    descriptor_of,
    set_block,
)

from engine.errors import EngineError, NotFoundError
from engine.io.job import BlockState
from engine.monitor.protocol import (
    Begun,
    Call,
    Channel,
    ChannelEnded,
    Discard,
    Done,
    Pin,
    Publish,
    Published,
    Seal,
)
from engine.monitor.shared_memory import Board
from engine.store.filesystem import Filesystem
from engine.store.owner import Owner

# Hundreds of runs are begun and fsynced; in memory that takes no time.
_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


@dataclass
class Save:
    """What the model knows of a save in flight."""

    step: int
    channel: Channel
    board: Board
    descriptor: int
    written: set[int] = field(default_factory=set)
    in_slots: dict[int, int] = field(default_factory=dict)  # blocks that are staged and not written
    is_staged: bool = False
    is_sealed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether a monitor alone can complete it."""
        return self.is_staged and len(self.written) + len(self.in_slots) == BLOCK_COUNT


class Protocol(RuleBasedStateMachine):
    """Rules are what a trainer does; several saves are in flight."""

    saves = Bundle("saves")

    @initialize()
    def start(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="engine-model-", dir=_MEMORY), "run")
        self.required: set[int] = set()  # steps that are visible
        self.allowed: set[int] = set()  # and those that may be
        self.in_flight: list[Save] = []
        self.next_step = 1
        self.free_slots = list(range(SLOT_COUNT))
        self.connect()

    def connect(self) -> None:
        self.trainer = RawTrainer()
        self.serving = Serving(self.trainer)
        self.trainer.start(self.root)

    # -- a save ---------------------------------------------------------------------------------------------------

    @rule(target=saves, gap=st.integers(0, 2))
    def begin(self, gap: int) -> Save:
        step, self.next_step = self.next_step + gap, self.next_step + gap + 1
        channel, board = self.trainer.begin(step)
        save = Save(step, channel, board, descriptor_of(channel.expect(Begun)))
        self.in_flight.append(save)
        return save

    @rule(save=saves)
    def begin_is_doubled(self, save: Save) -> None:
        """The second is refused, and the first goes on."""
        if save not in self.in_flight:
            return
        channel, _ = self.trainer.begin(save.step)
        with channel, pytest.raises(RuntimeError, match="in flight"):
            channel.expect(Begun)

    @rule(save=saves, block=st.integers(0, BLOCK_COUNT - 1))
    def stage(self, save: Save, block: int) -> None:
        """A block is in a slot: its post is late."""
        if save in self.in_flight and block not in save.written and block not in save.in_slots and self.free_slots:
            slot = save.in_slots[block] = self.free_slots.pop()
            self.trainer.fill(slot, content(save.step, block))
            set_block(save.board, block, BlockState.STAGED, content(save.step, block))

    @rule(save=saves, count=st.integers(1, 2))
    def write(self, save: Save, count: int) -> None:
        """What is staged is posted, maybe twice, and all answers come."""
        if save not in self.in_flight:
            return
        for block, slot in save.in_slots.items():
            geometry = PLAN.blocks[block]
            for _ in range(count):
                self.trainer.post(slot, save.descriptor, 0, geometry.write_bytes, geometry.file_offset)
            results = self.trainer.answers(count)
            assert {each for each, _ in results} == {slot}
            assert sum(result == geometry.write_bytes for _, result in results) >= 1, results
            set_block(save.board, block, BlockState.WRITTEN, content(save.step, block))
            save.written.add(block)
        self.free_slots += save.in_slots.values()
        save.in_slots = {}

    @rule(save=saves)
    def stage_the_rest(self, save: Save) -> None:
        for block in range(BLOCK_COUNT):
            if not self.free_slots:
                self.write(save, 1)
            self.stage(save, block)

    @rule(save=saves)
    def mark_staged(self, save: Save) -> None:
        if save in self.in_flight and len(save.written) + len(save.in_slots) == BLOCK_COUNT:
            save.board.mark_staged()
            save.is_staged = True

    @rule(save=saves)
    def seal(self, save: Save) -> None:
        if save in self.in_flight and len(save.written) == BLOCK_COUNT and save.is_staged and not save.is_sealed:
            save.channel.send(Seal())
            save.channel.expect(Done)
            save.is_sealed = True

    @rule(save=consumes(saves))
    def publish(self, save: Save) -> None:
        """The trainer waits for its turn; a monitor would too."""
        if save in self.in_flight and save.is_sealed and save is min(self.in_flight, key=lambda each: each.step):
            save.channel.send(Publish())
            assert save.channel.expect(Published).step == save.step
            self.end(save, required=True)

    @rule(save=consumes(saves))
    def publish_comes_early(self, save: Save) -> None:
        """While an earlier save is in flight, or before it was sealed: then it is discarded."""
        if save in self.in_flight and not save.is_sealed:
            save.channel.send(Publish())
            save.channel.expect(Done)
            self.end(save)

    @rule(save=consumes(saves))
    def seal_is_doubled(self, save: Save) -> None:
        if save in self.in_flight and save.is_sealed:
            save.channel.send(Seal())
            save.channel.expect(Done)
            self.end(save)

    @rule(save=consumes(saves), torn=st.booleans())
    def discard(self, save: Save, torn: bool) -> None:
        if save in self.in_flight:
            save.channel.send(Discard(torn))
            save.channel.expect(Done)
            self.end(save)

    # -- what is lost ---------------------------------------------------------------------------------------------

    @rule()
    def die(self) -> None:
        """Everything ends at once.  What was whole is committed, and the rest is not."""
        for save in self.in_flight:
            save.channel.close()
        self.trainer.close()
        self.serving.join()
        for save in list(self.in_flight):
            self.end(save, required=save.is_whole)
        self.free_slots = list(range(SLOT_COUNT))
        self.look()
        self.connect()

    @rule(order=st.randoms(use_true_random=False))
    def publish_out_of_order(self, order: object) -> None:
        """All that is sealed is told to publish, the latest first: no step is seen before an earlier one."""
        sealed = sorted((save for save in self.in_flight if save.is_sealed), key=lambda save: -save.step)
        unsealed = [save.step for save in self.in_flight if not save.is_sealed]
        sealed = [save for save in sealed if save.step < min(unsealed, default=save.step + 1)]
        for save in sealed:
            save.channel.send(Publish())
            if save is not sealed[-1]:
                assert not {each.step for each in sealed} & self.visible(), "a step was visible out of order"
        for save in reversed(sealed):
            assert save.channel.expect(Published).step == save.step
            self.end(save, required=True)

    # -- other requests -------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def delete_is_doubled(self, data: st.DataObject) -> None:
        if not self.required:
            return
        step = data.draw(st.sampled_from(sorted(self.required)))
        with self.trainer.request(Pin(step)) as pin:
            pin.expect(Done)
            with self.trainer.request(Call("delete", step)) as channel, pytest.raises(EngineError, match="being read"):
                channel.expect(Done)
        self.unpinned(step)
        with self.trainer.request(Call("delete", step)) as channel, pytest.raises(NotFoundError):
            channel.expect(Done)

    def unpinned(self, step: int) -> None:
        """Delete it, once the monitor has seen the pin end."""
        for _ in range(1000):
            with self.trainer.request(Call("delete", step)) as channel:
                try:
                    channel.expect(Done)
                    break
                except EngineError as error:
                    assert "being read" in str(error)
        self.required.remove(step)

    # -- what has to hold -----------------------------------------------------------------------------------------

    def end(self, save: Save, required: bool = False) -> None:
        save.channel.close()
        self.in_flight.remove(save)
        self.free_slots += save.in_slots.values()
        if required:
            self.required.add(save.step)

    def visible(self) -> set[int]:
        names = [name for name in os.listdir(self.root) if name.startswith("step-") and not name.endswith(".partial")]
        return {int(name.removeprefix("step-")) for name in names}

    @invariant()
    def look(self) -> None:
        if not hasattr(self, "root"):
            return
        assert self.visible() == self.required
        for step in self.required:
            path = self.root / f"step-{step:08d}"
            assert sorted(os.listdir(path)) == ["manifest.json", NAME]
            assert (path / NAME).read_bytes() == b"".join(content(step, block) for block in range(BLOCK_COUNT))
            assert f'"checkpoint_id":"{step:032x}"' in (path / "manifest.json").read_text()

    def teardown(self) -> None:
        if not hasattr(self, "root"):
            return
        self.die()
        self.trainer.close()
        self.serving.join()
        owner = Owner(str(self.root), Filesystem(), 2)  # the lock is free
        assert set(owner.steps()) == self.required
        owner.close()
        shutil.rmtree(self.root.parent)


Protocol.TestCase.settings = settings(stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestProtocol = Protocol.TestCase


def test_the_sizes_fit() -> None:
    """The last block is short, and there are fewer slots than blocks."""
    assert PLAN.blocks[-1].nbytes < SLOT_BYTES and SLOT_COUNT < BLOCK_COUNT


def test_channel_ended_is_no_engine_error() -> None:
    assert not issubclass(ChannelEnded, EngineError)
