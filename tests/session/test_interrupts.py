"""Ctrl-C at any moment of `checkpoint()` and `restore()`: no torn snapshot, no lost permit, and the engine works on.
Ctrl-C while an Engine is opened: nothing of it is left.

First at the moments that make a difference, one by one; then at random ones, of every call that opens files.
"""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import pytest
import torch
from disk import GatedFilesystem
from jobs import until
from leaks import held

import engine
from engine.io.backend import LADDER
from engine.io.descriptor import Descriptor
from engine.io.job import Job, Milestone
from engine.io.pipeline import Pipeline
from engine.session.checkpoint import Checkpointer
from engine.session.in_flight import InFlight
from engine.store.writer import Writer

HANG_S = 20  # ends a test that hangs; nothing here takes a second

BLOCK_BYTES = 4096
TINY: dict[str, Any] = {"max_async": 1, "staging_bytes": 3 * BLOCK_BYTES, "block_bytes": BLOCK_BYTES}


class Begun(GatedFilesystem):
    """Signals that a commit thread has taken over a save, which then waits for the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
        self.begun.set()
        super().allocate(descriptor, nbytes, path)


class Interrupted(NamedTuple):
    """An Engine, and an arena of a tensor that is all ones."""

    engine: engine.Engine
    filesystem: Begun
    arena: engine.Arena
    tensor: torch.Tensor

    def check_goes_on(self, on_busy: Literal["wait", "raise"] = "wait") -> None:
        """The one permit is free again, at once or soon, and the next save is right."""
        self.filesystem.gate.set()
        self.tensor.fill_(5)
        assert self.engine.checkpoint(self.arena, on_busy=on_busy).result(HANG_S).step >= 0
        assert self.engine.load()["a"].eq(5).all()


@pytest.fixture
def interrupted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[int], Interrupted]]:
    """Makes an Engine and a tensor of so many elements."""
    opened: list[Interrupted] = []

    def make(elements: int) -> Interrupted:
        filesystem, tensor = Begun(), torch.ones(elements)
        eng = engine.Engine(tmp_path, filesystem=filesystem, **TINY)
        opened.append(Interrupted(eng, filesystem, engine.Arena.wrap({"a": tensor}), tensor))
        return opened[0]

    with caplog.at_level(logging.CRITICAL, "engine"):
        yield make
        for it in opened:
            it.filesystem.gate.set()
            it.engine.close()


def test_an_interrupt_after_staging_does_not_fail_the_save(
    interrupted: Callable[[int], Interrupted], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = interrupted(10)  # fits the slots, so it is staged before it has its files
    wait_staged = engine.Save.wait_staged
    saves: list[engine.Save] = []

    def staged_and_interrupted(save: engine.Save, timeout: float | None = None) -> bool:
        staged = wait_staged(save, timeout)
        if not saves:
            saves.append(save)
            assert it.filesystem.begun.wait(HANG_S)
            raise KeyboardInterrupt
        return staged

    monkeypatch.setattr(engine.Save, "wait_staged", staged_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        it.engine.checkpoint(it.arena, step=1)
    monkeypatch.undo()
    it.tensor.fill_(2)
    it.check_goes_on()
    assert saves[0].result(HANG_S).step == 1 and it.engine.steps() == [1, 2] and it.engine.load(1)["a"].eq(1).all()


def test_an_interrupt_before_staging_fails_the_save(
    interrupted: Callable[[int], Interrupted], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = interrupted(10 * BLOCK_BYTES)
    wait_staged = engine.Save.wait_staged
    saves: list[engine.Save] = []

    def interrupt(save: engine.Save, timeout: float | None = None) -> bool:
        if not saves:
            saves.append(save)
            assert it.filesystem.begun.wait(HANG_S) and not wait_staged(save, 0)
            raise KeyboardInterrupt
        return wait_staged(save, timeout)

    monkeypatch.setattr(engine.Save, "wait_staged", interrupt)
    with pytest.raises(KeyboardInterrupt):
        it.engine.checkpoint(it.arena, step=1)
    monkeypatch.undo()
    assert saves[0].wait_staged(0) and not saves[0].done(), "the arena is left alone, though the files are not made"
    it.check_goes_on()
    assert it.engine.steps() == [0] and isinstance(saves[0].exception(), engine.StorageError)


@pytest.mark.parametrize("place", ["prepare", "hold", "submit"])
def test_an_interrupt_before_the_handover_abandons_the_save(
    interrupted: Callable[[int], Interrupted], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    it = interrupted(10 * BLOCK_BYTES)
    it.filesystem.gate.set()
    target: tuple[type, str] = {
        "prepare": (Job, "__init__"),
        "hold": (engine.Arena, "hold"),
        "submit": (Pipeline, "submit"),
    }[place]
    real = getattr(*target)

    def done_and_interrupted(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(*target, done_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        it.engine.checkpoint(it.arena, step=1)
    monkeypatch.undo()
    fencing = threading.Thread(target=it.arena.fence, daemon=True)
    fencing.start()
    fencing.join(HANG_S)
    assert not fencing.is_alive(), "the fence waits for an abandoned save for ever"
    assert it.engine.steps() == []
    it.check_goes_on("raise")
    assert it.engine.steps() == [0], "neither a place nor a step is taken"


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["Store", "Lent", "InFlight", "Checkpointer", "finalize"])
def test_an_interrupt_while_an_engine_is_opened_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, done: bool
) -> None:
    real = weakref.finalize if place == "finalize" else getattr(engine.engine, place)

    def interrupt(*arguments: Any) -> None:
        if done:
            real(*arguments)
        raise KeyboardInterrupt

    if place == "finalize":  # in that module only: the pipeline needs the real one
        monkeypatch.setattr(engine.engine, "weakref", SimpleNamespace(finalize=interrupt))
    else:
        monkeypatch.setattr(engine.engine, place, interrupt)
    gc.collect()  # what earlier tests have left
    before, threads_before = held(), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.Engine(tmp_path, **TINY)
    until(lambda: held() == before)  # a worker of the kernel's may end a moment after its ring
    assert caught.tb is not None, "the frame of __init__ is kept, so nothing here is the collector's work"
    monkeypatch.undo()
    for thread in set(threading.enumerate()) - threads_before:
        thread.join(HANG_S)  # it has been told to end
        assert not thread.is_alive()
    engine.Engine(tmp_path, **TINY).close()


@pytest.mark.parametrize("second", ["_take_back", "abandon", "withdraw"])
@pytest.mark.parametrize("place", ["hold", "submit"])
def test_a_second_interrupt_leaves_nothing_behind(
    interrupted: Callable[[int], Interrupted], monkeypatch: pytest.MonkeyPatch, place: str, second: str
) -> None:
    it = interrupted(10 * BLOCK_BYTES)
    it.filesystem.gate.set()
    targets: dict[str, tuple[type, str]] = {
        "hold": (engine.Arena, "hold"),
        "submit": (Pipeline, "submit"),
        "_take_back": (Checkpointer, "_take_back"),
        "abandon": (Writer, "abandon"),
        "withdraw": (InFlight, "withdraw"),
    }
    real = getattr(*targets[place])
    real_second = getattr(*targets[second])

    def done_and_interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    def interrupted_again(*arguments: Any) -> Any:
        if threading.current_thread() is threading.main_thread():  # the only one that a signal strikes in
            raise KeyboardInterrupt
        return real_second(*arguments)

    monkeypatch.setattr(*targets[place], done_and_interrupted)
    monkeypatch.setattr(*targets[second], interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        it.engine.checkpoint(it.arena, step=1)
    monkeypatch.undo()
    it.check_goes_on()
    assert it.engine.steps() == [0], "neither a place nor a step is taken"


@pytest.mark.parametrize("second", ["abort", "wait"])
@pytest.mark.parametrize("first", ["submit", "attach"])
def test_a_second_interrupt_leaves_no_read_behind(
    interrupted: Callable[[int], Interrupted], monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    it = interrupted(10 * BLOCK_BYTES)
    it.filesystem.gate.set()
    it.engine.checkpoint(it.arena, step=1).result(HANG_S)
    real = getattr(Pipeline, first)
    jobs: list[Job] = []

    def done_and_interrupted(pipeline: Pipeline, job: Job, *arguments: Any) -> None:
        if first == "submit":  # without its files the read would wait for them for ever
            real(pipeline, job, *arguments)
        jobs.append(job)
        raise KeyboardInterrupt

    def interrupted_again(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, first, done_and_interrupted)
    monkeypatch.setattr(Pipeline, second, interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        it.engine.restore(it.arena)
    monkeypatch.undo()
    until(lambda: jobs[0].reached(Milestone.DONE))
    assert it.arena.torn
    it.engine.restore(it.arena)
    it.check_goes_on()


# A timer interrupts at random moments of calls that take about as long.  In a separate process: an interrupt may
# also strike in pytest, or in a callback of the collector, which then writes "Exception ignored" to stderr.
SCRIPT = """
import logging, random, signal, sys
import torch, engine

directory, count, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
random.seed(count)
logging.getLogger("engine").setLevel(logging.CRITICAL)
small = {"max_async": 2, "staging_bytes": 256 << 10, "block_bytes": 64 << 10, "backend": backend}
tensors = {"a": torch.zeros(200_000)}

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
eng, interrupted = engine.Engine(directory, **small), 0
for step in range(count):
    arena = engine.Arena.wrap(tensors)
    tensors["a"].fill_(step)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-3))
        if step % 3:
            eng.checkpoint(arena, step=3 * step)
        elif eng.steps():
            eng.restore(arena)
    except KeyboardInterrupt:
        interrupted += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    tensors["a"].fill_(-1)  # an interrupted save must not see this
    if step % 50 == 49:
        tensors["a"].fill_(step)
        arena = engine.Arena.wrap(tensors)
        saves = [eng.checkpoint(arena, step=3 * step + more) for more in (1, 2)]  # every permit is free again
        for save in saves:
            save.result(timeout=60)
        for committed in eng.steps():
            values = eng.load(committed)["a"].unique()
            assert len(values) == 1 and values[0] != -1, (committed, values)
        if step % 100 == 99:
            eng.close()
            eng = engine.Engine(directory, **small)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
eng.close()
print(interrupted)
"""


@pytest.mark.parametrize("backend", LADDER)
def test_interrupts_at_random_moments(tmp_path: Path, backend: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "600", backend], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 100, "hardly anything was interrupted"


# At random moments of every call that opens files without a save.  Nothing is left of a call, and it works again.
OTHER_CALLS = """
import logging, os, random, signal, sys, time
from collections import Counter
import torch, engine

directory, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
logging.getLogger("engine").setLevel(logging.CRITICAL)
small = {"max_async": 2, "staging_bytes": 256 << 10, "block_bytes": 64 << 10}
saved = engine.Arena.wrap({"a": torch.ones(50_000)})

def interrupt(*_):
    raise KeyboardInterrupt

def held():
    names = []
    for kind, read in ("fd", os.readlink), ("task", lambda path: open(path + "/comm").read().strip()):
        for name in os.listdir("/proc/self/" + kind):
            try:
                names.append(read(f"/proc/self/{kind}/{name}"))
            except (FileNotFoundError, ProcessLookupError):  # the directory that is read, or a thread that ends
                pass
    return Counter(names)

def save_two():
    for _ in range(2):
        eng.checkpoint(saved).result(60)

def open_and_close():
    engine.Engine(directory + "/other", backend="threads", guard="fence", **small).close()

calls = {
    "restore": (lambda: None, lambda: eng.restore(engine.Arena.wrap({"a": torch.zeros(50_000)}))),
    "load": (lambda: None, lambda: eng.load()),
    "verify": (lambda: None, lambda: eng.verify()),
    "rollback": (save_two, lambda: eng.rollback(eng.steps()[0])),
    "delete": (save_two, lambda: eng.delete(eng.steps()[-1])),
    "open": (lambda: None, open_and_close),
}
signal.signal(signal.SIGALRM, interrupt)
eng = engine.Engine(directory, keep=3, **small)
save_two()
for name, (prepare, call) in calls.items():
    took = []
    for _ in range(3):
        prepare()
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    before, interrupted = held(), 0
    for _ in range(rounds):
        prepare()
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, min(took)))
            call()
        except KeyboardInterrupt:
            interrupted += 1
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
        end = time.monotonic() + 20
        while held() - before and time.monotonic() < end:  # a thread ends a moment after it was told to
            time.sleep(0.001)
        assert not held() - before, (name, held() - before)
    save_two()
    for step in eng.steps()[1:]:  # nothing counts as being read
        eng.delete(step)
    save_two()
    assert len(eng.rollback(eng.steps()[0])) == 2 and not eng.verify() and eng.load()["a"].eq(1).all()
    print(name, interrupted)
eng.close()
"""


def test_interrupts_at_random_moments_of_calls_that_open_files(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", OTHER_CALLS, str(tmp_path), "1", "50"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    interrupted = {name: int(count) for name, count in map(str.split, result.stdout.splitlines())}
    assert len(interrupted) == 6 and sum(interrupted.values()) > 100, "hardly anything was interrupted"
