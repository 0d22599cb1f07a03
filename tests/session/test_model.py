"""An Engine against a dictionary: save, fail, retire, restore, damage, roll back and reopen, in any order.

The model is the user's view: a mapping from committed step to its tensors.  After every rule the directory must show
exactly the steps of the model.  Every step that was not damaged on purpose must load to exactly its tensors, here and
in the stock library.  Each open draws a backend and a number of staging threads.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from disk import FAILURES, FailingFilesystem, names, same, stored
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import engine
from engine.io.backend import LADDER
from engine.options import Backend

BACKENDS = st.sampled_from(LADDER)
STAGING_THREADS = st.integers(1, 3)

# One tensor shorter than a block, one of several blocks that ends unaligned, one empty, one of another role.
SHAPES = {"a.w": (10,), "b.w": (9_001,), "c.w": (0, 4)}


class Believed(RuleBasedStateMachine):
    """The machine; `committed` is the model."""

    @initialize(keep=st.integers(1, 3), max_async=st.integers(1, 3), backend=BACKENDS, threads=STAGING_THREADS)
    def open_first(self, keep: int, max_async: int, backend: Backend, threads: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="engine-model-"))
        self.keep, self.max_async = keep, max_async
        self.committed: dict[int, dict[str, Tensor]] = {}
        self.damaged: set[int] = set()
        self.passed_over: set[int] = set()  # of the damaged, those that this engine has seen to be
        self.next_value = 0.0
        self.tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.arena = engine.Arena.wrap(self.tensors)
        self.open(backend, threads)

    def open(self, backend: Backend, threads: int) -> None:
        self.filesystem = FailingFilesystem()
        self.engine = engine.Engine(
            self.directory,
            keep=self.keep,
            max_async=self.max_async,
            staging_bytes=64 << 10,
            block_bytes=8 << 10,
            backend=backend,
            staging_threads=threads,
            filesystem=self.filesystem,
        )

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()
            shutil.rmtree(self.directory)

    def mutate(self) -> dict[str, Tensor]:
        self.next_value += 1
        for tensor in self.tensors.values():
            tensor.fill_(self.next_value)
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def next_step(self) -> int:
        return max(self.committed, default=-1) + 1

    def forget_old(self) -> None:
        self.forget(set(sorted(self.committed)[: -self.keep]))

    def forget(self, steps: set[int]) -> None:
        for step in steps:
            del self.committed[step]
        self.damaged -= steps
        self.passed_over -= steps

    @rule(gap=st.integers(0, 3), chunks=st.integers(1, 4))
    def save(self, gap: int, chunks: int) -> None:
        step = self.next_step() + gap
        want = self.mutate()
        info = self.engine.checkpoint(self.arena, step, extra={"value": self.next_value}, chunk_count=chunks).result()
        assert info.step == step
        self.committed[step] = want
        self.forget_old()

    @rule(count=st.integers(2, 4))
    def save_several_at_once(self, count: int) -> None:
        first = self.next_step()
        wants, saves = {}, []
        for step in range(first, first + count):
            wants[step] = self.mutate()
            saves.append(self.engine.checkpoint(self.arena, step))
        for save in saves:
            save.result()
        self.committed |= wants
        self.forget_old()

    @rule(operation=st.sampled_from(FAILURES), error=st.sampled_from([5, 28, 122]))
    def save_and_fail(self, operation: str, error: int) -> None:
        self.mutate()
        self.filesystem.fail_next(operation, error, for_good=operation == "allocate")
        save = self.engine.checkpoint(self.arena, self.next_step())
        with pytest.raises(engine.StorageError) as caught:
            save.result()
        assert caught.value.errno == error and self.filesystem.operation is None

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def save_an_old_step(self, data: st.DataObject) -> None:
        """Refused, unless all that is in its way has been passed over as damaged: then that is set aside."""
        step = data.draw(st.sampled_from(sorted(self.committed)))
        later = {s for s in self.committed if s >= step}
        if later <= self.passed_over:
            want = self.mutate()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.engine.checkpoint(self.arena, step).result()
            assert len(caught) == len(later)
            self.forget(later)
            self.committed[step] = want
        else:
            with pytest.raises(engine.StepError):
                self.engine.checkpoint(self.arena, step)

    @rule()
    def restore_newest(self) -> None:
        good = [step for step in self.committed if step not in self.damaged]
        if not good:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", engine.EngineWarning)
                with pytest.raises((engine.NotFoundError, engine.CorruptError)):
                    self.engine.restore(self.arena)
                self.passed_over.update(self.committed)
                # The arena may now be torn, which only a whole restore mends; a user would start afresh.
                self.arena = engine.Arena.wrap(self.tensors)
            return
        passed_over = sorted((s for s in self.damaged if s > max(good)), reverse=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            info = self.engine.restore(self.arena)
        assert info.step == max(good) and [bad.step for bad in info.passed_over] == passed_over
        assert len(caught) == len(passed_over)
        self.passed_over.update(passed_over)
        self.assert_holds(self.committed[info.step])

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def restore_one(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed)))
        if step in self.damaged:
            with pytest.raises(engine.CorruptError):
                self.engine.restore(self.arena, step)
            self.arena = engine.Arena.wrap(self.tensors)
        else:
            self.engine.restore(self.arena, step)
            self.assert_holds(self.committed[step])

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.committed)))
        later = sorted((s for s in self.committed if s > step), reverse=True)
        assert self.engine.rollback(step) == later
        self.forget(set(later))

    @precondition(lambda self: len(self.committed) > len(self.damaged))
    @rule(data=st.data(), position=st.floats(0, 1, exclude_max=True))
    def damage(self, data: st.DataObject, position: float) -> None:
        step = data.draw(st.sampled_from(sorted(set(self.committed) - self.damaged)))
        file = self.directory / f"step-{step:08d}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[int(position * len(content))] ^= 0x10
        file.write_bytes(content)
        self.damaged.add(step)

    @rule(backend=BACKENDS, threads=STAGING_THREADS)
    def reopen(self, backend: Backend, threads: int) -> None:
        self.engine.close()
        self.passed_over.clear()
        self.open(backend, threads)

    @rule(backend=BACKENDS, threads=STAGING_THREADS)
    def reopen_with_leftovers(self, backend: Backend, threads: int) -> None:
        """As after a kill: a save that was under way has left its directory."""
        self.engine.close()
        self.passed_over.clear()
        partial = self.directory / f"step-{self.next_step():08d}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"x" * 5000)
        self.open(backend, threads)

    def assert_holds(self, want: dict[str, Tensor]) -> None:
        assert all(same(self.tensors[name], want[name]) for name in want)

    @invariant()
    def the_directory_is_what_we_believe(self) -> None:
        if not hasattr(self, "engine"):
            return
        assert self.engine.steps() == sorted(self.committed)
        visible = [name for name in names(self.directory) if ".damaged" not in name]
        assert visible == [f"step-{step:08d}" for step in sorted(self.committed)]

    @invariant()
    def every_step_that_is_not_damaged_is_whole(self) -> None:
        if not hasattr(self, "engine"):
            return
        for step in self.committed.keys() - self.damaged:
            for there in (self.engine.load(step), stored(self.directory, step)):
                assert there.keys() == self.committed[step].keys()
                assert all(same(there[name], tensor) for name, tensor in self.committed[step].items())


TestBelieved = Believed.TestCase
TestBelieved.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
