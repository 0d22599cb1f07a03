"""A trainer or a monitor that dies at any moment of a save: nothing durable is lost, and nothing half is committed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import monitored_trainee
import pytest
import torch
from deadly import kill_and_wait
from disk import same, stored
from jobs import until
from leaks import held
from memory_groups import memory_group
from monitors import Hooks, has_ended, is_there, monitor_of
from volumes import volume

import engine
from engine.monitor.client import MonitoredDirectory
from engine.monitor.protocol import Channel, Done, Published
from engine.store.filesystem import Filesystem
from engine.store.info import CheckpointInfo

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10, "isolation": "process"}


def run_trainee(root: Path, moment: str, guard: str = "auto") -> int:
    """Run a training to its death; returns its status.  Its monitor goes on."""
    paths = os.pathsep.join(sys.path)
    process = subprocess.run(
        [sys.executable, monitored_trainee.__file__, str(root), moment, guard],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    return process.returncode


def outcome(root: Path) -> list[int]:
    """The committed steps, once the monitor has ended; each is whole, and the directory can be used."""
    pid = int(Path(f"{root}.pid").read_text())
    with engine.Engine(root) as eng:  # waits for the monitor to finish
        until(lambda: has_ended(pid))  # it gives the directory back first
        steps = eng.steps()
        assert all(eng.verify(step) == () for step in steps)
        assert not [name for name in os.listdir(root) if name.endswith(".partial")]
    if 2 in steps:
        want = torch.frombuffer(bytearray(Path(f"{root}.want").read_bytes()), dtype=torch.float32)
        assert same(stored(root, 2)["weight"], want.view(1000, 1000))
        info = engine.open(root).info(2)
        assert (info.tag, info.metrics) == ("last", {"loss": 0.5}) and engine.open(root).extra(2) == {"step": 2}
    return steps


@pytest.mark.parametrize(
    ("moment", "steps"),
    [
        ("before:Begin", [1]),
        ("after:Begin", [1]),
        ("before:attach", [1]),
        ("before:mark_staged", [1]),
        ("after:mark_staged", [1, 2]),
        ("before:Seal", [1, 2]),
        ("after:Seal", [1, 2]),
        ("answered:Done", [1, 2]),
        ("after:Publish", [1, 2]),
        ("answered:Published", [1, 2]),
    ],
)
def test_a_trainer_killed_at_a_stage(tmp_path: Path, moment: str, steps: list[int]) -> None:
    root = tmp_path / "run"
    assert run_trainee(root, moment) == -signal.SIGKILL
    assert outcome(root) == steps


@pytest.mark.parametrize("guard", ["cow", "fence"])
@pytest.mark.parametrize("moment", ["written:0.0", "written:0.5", "written:0.9", "written:1.0"])
def test_a_trainer_killed_while_blocks_are_written(tmp_path: Path, moment: str, guard: str) -> None:
    root = tmp_path / "run"
    assert run_trainee(root, moment, guard) == -signal.SIGKILL
    assert outcome(root) in ([1], [1, 2])


def test_a_trainer_killed_at_random(tmp_path: Path) -> None:
    chance = random.Random(7)
    for number in range(3):
        root = tmp_path / f"run-{number}"
        assert run_trainee(root, f"random:{chance.uniform(0, 0.06)}") == -signal.SIGKILL
        assert outcome(root) in ([1], [1, 2])


@pytest.mark.parametrize(
    ("moment", "status", "steps"),
    [("exit", 0, [[1, 2]]), ("exec", 0, [[1], [1, 2]]), ("fork_and_die", -signal.SIGKILL, [[1], [1, 2]])],
)
def test_a_trainer_that_ends_otherwise(tmp_path: Path, moment: str, status: int, steps: list[list[int]]) -> None:
    root = tmp_path / "run"
    assert run_trainee(root, moment) == status
    assert outcome(root) in steps


# -- the monitor's death --------------------------------------------------------------------------------------------


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    made = Hooks(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def arena() -> engine.Arena:
    return engine.Arena.wrap({"w": torch.arange(1 << 20, dtype=torch.float32)})


OPERATIONS = [
    "make_directory",
    "open_for_blocks",
    "allocate",
    "truncate",
    "sync_file",
    "write_new_file",
    "sync_directory",
    "rename",
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_monitor_killed_at_an_operation(tmp_path: Path, hooks: Hooks, arena: engine.Arena, operation: str) -> None:
    root = tmp_path / "run"

    def kill(pid: int, reached: str, path: str, target: str) -> None:
        if reached == operation and "step-00000002" in path:
            os.kill(pid, signal.SIGKILL)

    with engine.Engine(root, keep=None, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        first = monitor_of(eng)
        hooks.before = kill
        save = eng.checkpoint(arena, step=2)
        with pytest.raises(engine.MonitorLostError, match=rf"process {first}\) has ended.*next save starts another"):
            save.result(60)
        hooks.before = lambda *_: None
        assert eng.steps() == [1] and eng.checkpoint(arena, step=3).result(60).step == 3
        assert monitor_of(eng) != first and not is_there(first)
        assert eng.steps() == [1, 3] and eng.verify(3) == ()
    assert sorted(os.listdir(root)) == [".engine", "step-00000001", "step-00000003"]


def kill_if_there(pid: int) -> None:
    with suppress(ProcessLookupError):  # the last one was killed late, and another has been started
        os.kill(pid, signal.SIGKILL)


def test_a_monitor_killed_at_random(tmp_path: Path, arena: engine.Arena) -> None:
    chance = random.Random(3)
    before = held()
    committed: list[int] = []
    # A callback: a failure may be noted after its exception() was asked for here.
    with engine.Engine(tmp_path, keep=None, max_async=3, on_error=lambda *_: None, **SMALL) as eng:
        for step in range(0, 12, 3):
            pid = monitor_of(eng)
            killer = threading.Timer(chance.uniform(0, 0.1), kill_if_there, (pid,))
            killer.start()
            saves = [eng.checkpoint(arena, step=step + each) for each in range(3)]
            killer.join()
            for save in saves:
                error = save.exception(60)
                assert error is None or isinstance(error, engine.MonitorLostError), error
                committed += [save.step] if error is None else []
            until(lambda ended=pid: has_ended(ended))  # type: ignore[misc]  # or the next save may begin beside it
        assert set(committed) <= set(eng.steps())
        assert eng.checkpoint(arena, step=50).result(60).step == 50
        assert all(eng.verify(step) == () for step in eng.steps())
    until(lambda: held() == before)


@pytest.mark.parametrize("guard", ["cow", "detect", "fence"])
def test_training_goes_on_beside_a_dead_monitor(tmp_path: Path, guard: Any) -> None:
    """Nothing is staged into slots that are never freed: writers must be let go."""
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 1000)).sum().backward()
    optimizer.step()
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, guard=guard, **SMALL) as eng:
        os.kill(monitor_of(eng), signal.SIGSTOP)
        save = eng.checkpoint(arena, step=1)
        with pytest.raises(TimeoutError):
            save.result(0.2)
        os.kill(monitor_of(eng), signal.SIGKILL)
        optimizer.step()
        assert isinstance(save.exception(60), engine.MonitorLostError)
        assert eng.checkpoint(arena, step=2).result(60).step == 2


def test_a_stopped_monitor_holds_training_for_a_bound_only(tmp_path: Path) -> None:
    model = torch.nn.Linear(1000, 1000)
    arena = engine.Arena.adopt(model)
    with engine.Engine(tmp_path, **SMALL) as eng:
        if eng.guard != "cow":
            assert eng.guard in ("detect", "fence")
            return  # their writers do not wait in a page fault
        os.kill(monitor_of(eng), signal.SIGSTOP)
        try:
            save = eng.checkpoint(arena, step=1)
            with torch.no_grad():
                model.weight.zero_()  # waits for at most the guard's bound
            assert not save.done()
            with pytest.raises(engine.PlatformError, match="does not answer"), pytest.MonkeyPatch.context() as patch:
                patch.setattr("engine.monitor.status._ANSWER_S", 0.2)
                engine.open(tmp_path).in_flight()
        finally:
            os.kill(monitor_of(eng), signal.SIGCONT)
        with pytest.raises(engine.TornSnapshot, match="was let go on"):
            save.result(60)
        with pytest.warns(engine.EngineWarning, match="saved eagerly from now on"):
            assert eng.checkpoint(arena, step=2).result(60).step == 2


def test_a_stopped_trainer_keeps_its_save(tmp_path: Path) -> None:
    root = tmp_path / "run"
    paths = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, monitored_trainee.__file__, str(root), "none", "auto"],
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        until(Path(f"{root}.pid").exists)
        time.sleep(random.Random(5).uniform(0, 0.02))
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(engine.LockedError):  # it is not dead
            engine.Engine(root)
        process.send_signal(signal.SIGCONT)
        until(lambda: 2 in engine.open(root).steps())
    finally:
        process.kill()
        process.wait()
    assert outcome(root) == [1, 2]


def test_a_full_disk_fails_the_save_and_not_the_monitor(tmp_path: Path, hooks: Hooks, arena: engine.Arena) -> None:
    def refuse(pid: int, operation: str, path: str, target: str) -> None:
        if operation == "allocate" and "step-00000001" in path:
            raise engine.StorageError(28, "fallocate", path)

    hooks.before = refuse
    with engine.Engine(tmp_path, **SMALL) as eng:
        pid = monitor_of(eng)
        with pytest.raises(engine.StorageError, match="free space or lower keep"):
            eng.checkpoint(arena, step=1).result(60)
        assert eng.checkpoint(arena, step=2).result(60).step == 2 and monitor_of(eng) == pid
        assert sorted(os.listdir(tmp_path)) == [".engine", "step-00000002"]


@pytest.mark.filterwarnings("ignore::engine.EngineWarning")
def test_a_new_monitor_knows_which_step_is_damaged(tmp_path: Path, hooks: Hooks, arena: engine.Arena) -> None:
    """The steps before it, which the rule no longer keeps, are the last good ones until the next is committed."""
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in range(1, 7):
            eng.checkpoint(arena, step).result(60)
    (tmp_path / "step-00000006" / "model.safetensors").write_bytes(b"damaged")
    seen: list[list[int]] = []
    with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
        assert eng.restore(arena).step == 5
        os.kill(monitor_of(eng), signal.SIGKILL)
        until(lambda: eng._store._monitors.last.is_lost)  # type: ignore[union-attr]
        hooks.before = lambda *_: seen.append(engine.open(tmp_path).steps())
        eng.checkpoint(arena, step=7).result(60)
    before_commit = [steps for steps in seen if 7 not in steps]
    assert before_commit and all(steps == [1, 2, 3, 4, 5, 6] for steps in before_commit)


def test_a_step_that_is_read_is_pinned_in_the_next_monitor(tmp_path: Path, arena: engine.Arena) -> None:
    """It would be retired by it, and its files be overwritten: to the reader that looks like damage."""
    with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result(60)
        with eng._store.catalog.opened(1) as opened:
            kill_and_wait(monitor_of(eng))
            for step in (2, 3):
                eng.checkpoint(arena, step).result(60)
            assert opened.is_in_place() and eng.steps() == [1, 3]
            with pytest.raises(engine.StepError, match="being read"):
                eng.delete(1)
        eng.checkpoint(arena, 4).result(60)
        assert eng.steps() == [4]


def test_a_pinned_step_that_is_gone_holds_up_no_monitor(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step).result(60)
        with suppress(engine.EngineError), eng._store.catalog.opened(1):
            kill_and_wait(monitor_of(eng))
            shutil.rmtree(tmp_path / "step-00000001")
            eng.checkpoint(arena, 3).result(60)
            raise engine.ArgumentError("the reader has found it gone")
        assert eng.steps() == [2, 3]


def test_a_step_that_its_monitor_made_visible_is_not_lost(tmp_path: Path, hooks: Hooks, arena: engine.Arena) -> None:
    """The monitor is killed between the rename and the answer."""

    def kill(pid: int, operation: str, path: str, _: str) -> None:
        if operation == "sync_directory" and path == str(tmp_path) and (tmp_path / "step-00000002").exists():
            os.kill(pid, signal.SIGKILL)

    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        first = monitor_of(eng)
        hooks.before = kill
        save = eng.checkpoint(arena, step=2, metrics={"loss": 0.5}, tag="kept")
        info = save.result(60)
        hooks.before = lambda *_: None
        assert has_ended(first)
        assert (info.step, info.checkpoint_id, info.tag, info.metrics) == (2, save.checkpoint_id, "kept", {"loss": 0.5})
        assert eng.checkpoint(arena, step=3).result(60).step == 3
        assert eng.steps() == [1, 2, 3] and eng.info(2) == info and eng.verify(2) == ()


def test_what_is_visible_is_this_save_only_with_its_id_and_durably(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        info = eng.checkpoint(arena, step=1).result(60)
        directory = eng._store.catalog
        assert isinstance(directory, MonitoredDirectory)
        assert directory.committed(1, info.checkpoint_id) == info
        assert directory.committed(1, "another") is None and directory.committed(2, info.checkpoint_id) is None

        def refuse(_: Filesystem, path: str) -> None:
            raise engine.StorageError(errno.EIO, "fsync", path)

        monkeypatch.setattr(Filesystem, "sync_directory", refuse)
        assert directory.committed(1, info.checkpoint_id) is None


def test_a_warning_of_the_monitor_fails_no_committed_save(caplog: pytest.LogCaptureFixture) -> None:
    """Where the user makes errors of warnings, as these tests do."""
    channel, theirs = Channel.pair()
    with channel, Channel(theirs) as monitor:
        info = CheckpointInfo(1, "id", "path", 10, 0, {}, None)
        monitor.send(Published(**info._asdict(), warnings=("a spare stays, and is not used",)))
        monitor.send(Done(None, ("before the commit",)))
        assert channel.expect(Published).step == 1 and "a spare stays" in caplog.text
        with pytest.raises(engine.EngineWarning, match="before the commit"):
            channel.expect(Done)


def test_a_disk_that_is_really_full(arena: engine.Arena) -> None:
    """The save is refused, its monitor goes on, and so does training when there is room again."""
    with volume("ext4", 24 << 20) as disk:
        root, ballast = disk / "run", disk / "ballast"
        with engine.Engine(root, keep=1, **SMALL) as eng:
            pid = monitor_of(eng)
            eng.checkpoint(arena, step=1).result(60)
            with open(ballast, "wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            with pytest.raises(engine.NoSpaceError, match="of them are missing"):
                eng.checkpoint(arena, step=2).result(60)
            assert eng.steps() == [1] and eng.verify() == () and engine.open(root).in_flight() == ()
            ballast.unlink()
            assert eng.checkpoint(arena, step=2).result(60).step == 2 and monitor_of(eng) == pid
            assert eng.steps() == [2] and eng.verify() == ()


def test_the_oom_killer_takes_the_monitor(tmp_path: Path, arena: engine.Arena) -> None:
    """It gets a limit on memory of its own, which it is over in one of its next saves."""
    with engine.Engine(tmp_path, keep=None, on_error=lambda *_: None, **SMALL) as eng, memory_group() as group:
        eng.checkpoint(arena, step=1).result(60)
        first, committed = monitor_of(eng), [1]
        group.take(first, nbytes=4 << 10)
        for step in range(2, 100):
            error = eng.checkpoint(arena, step).exception(60)
            assert error is None or isinstance(error, engine.MonitorLostError), error
            committed += [step] if error is None else []
            if has_ended(first):
                break
        assert group.kill_count() == 1
        assert eng.checkpoint(arena, step=100).result(60).step == 100 and monitor_of(eng) != first
        assert eng.steps() == [*committed, 100] and eng.verify() == ()


def test_two_trainers_that_open_one_directory_at_once(tmp_path: Path, arena: engine.Arena) -> None:
    """One has it, and the other is told which process that is.  When the first is killed, the directory is free."""
    code = (
        "import os, signal, sys, engine\n"
        "try:\n"
        "    eng = engine.Engine(sys.argv[1], isolation='process', staging_bytes=8 << 20)\n"
        "    print('has', eng._store._monitors.last.pid, flush=True)\n"
        "    sys.stdin.read()\n"
        "except engine.LockedError as error:\n"
        "    print('is told', error, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    trainers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    told = sorted(str(trainer.stdout and trainer.stdout.readline()) for trainer in trainers)
    for trainer in trainers:
        with suppress(BrokenPipeError):
            trainer.communicate(timeout=60)
    monitor = int(told[0].split()[1])
    assert told[0].startswith("has") and told[1].startswith("is told") and f"process {monitor}" in told[1], told
    with engine.Engine(tmp_path, **SMALL) as eng:
        assert eng.checkpoint(arena, step=1).result(60).step == 1
    until(lambda: has_ended(monitor))
