"""A monitor that is stopped (SIGSTOP) while its trainer closes, exits, or starts it: it is left, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import until
from leaks import held
from monitors import Hooks, has_ended, monitor_of

import engine
from engine.monitor import process

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10, "isolation": "process"}

QUIET: dict[str, Any] = {**SMALL, "on_error": lambda *_: None}  # each save is asked


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    made = Hooks(monkeypatch)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_LOOK_S", 0.05)
    monkeypatch.setattr(process, "_STOPPED_LOOKS", 2)
    monkeypatch.setattr("engine.monitor.status._ANSWER_S", 0.2)


def go_on(pid: int) -> None:
    """Continue a stopped monitor, and wait for its end."""
    os.kill(pid, signal.SIGCONT)
    until(lambda: has_ended(pid))


def test_an_engine_is_closed_beside_a_stopped_monitor(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"w": torch.ones(1 << 20)})  # more than the slots hold
    before = held()
    eng = engine.Engine(tmp_path, **QUIET)
    eng.checkpoint(arena, step=1).result()
    pid = monitor_of(eng)
    os.kill(pid, signal.SIGSTOP)
    try:
        save = eng.checkpoint(arena, step=2, snapshot="lazy")
        eng.close()
        with pytest.raises(engine.MonitorLostError, match=rf"process {pid}\) is stopped.*kill -CONT {pid}"):
            save.result(0)
        with pytest.raises((engine.PlatformError, engine.LockedError)):  # it has the directory
            engine.Engine(tmp_path)
    finally:
        go_on(pid)
    until(lambda: held() == before)
    with engine.Engine(tmp_path, **SMALL) as eng:
        assert eng.steps() == [1] and eng.checkpoint(arena, step=2).result().step == 2


def test_what_was_staged_is_committed_by_a_monitor_that_was_left(tmp_path: Path, hooks: Hooks) -> None:
    stopped: list[int] = []

    def stop(pid: int, operation: str, path: str, _: str) -> None:
        if operation == "sync_file" and "step-00000002" in path and not stopped:
            stopped.append(pid)
            os.kill(pid, signal.SIGSTOP)

    arena = engine.Arena.wrap({"w": torch.ones(1 << 10)})
    with engine.Engine(tmp_path, keep=None, **QUIET) as eng:
        eng.checkpoint(arena, step=1).result()
        hooks.before = stop
        save = eng.checkpoint(arena, step=2)
    assert isinstance(save.exception(0), engine.MonitorLostError)
    assert engine.open(tmp_path).steps() == [1]
    go_on(*stopped)
    run = engine.open(tmp_path)
    assert run.steps() == [1, 2] and run.verify() == ()


def test_a_trainer_exits_beside_a_stopped_monitor(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch, engine\n"
        "from engine.monitor import process\n"
        "process._STOPPED_LOOKS = 2\n"
        f"eng = engine.Engine(sys.argv[1], **{SMALL})\n"
        "pid = eng._store._monitors.last.pid\n"
        "print(pid, flush=True)\n"
        "os.kill(pid, signal.SIGSTOP)\n"
        "save = eng.checkpoint(engine.Arena.wrap({'w': torch.ones(1 << 20)}), step=1, snapshot='lazy')\n"
    )
    with open(tmp_path / "said", "w+") as said:  # no pipe, which the stopped monitor would keep open
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], stdout=said, stderr=said, timeout=60)
        said.seek(0)
        pid, told = said.read().split("\n", 1)
    go_on(int(pid))
    assert done.returncode == 0 and "is stopped, and is not waited for any more" in told, told


def test_a_monitor_that_is_stopped_while_it_starts_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal, sys; os.kill(os.getpid(), signal.SIGSTOP)\n"
        "from engine.monitor.server import main; main(int(sys.argv[1]))"
    )
    monkeypatch.setattr(process, "command", lambda fd: [sys.executable, "-c", code, str(fd)])
    before = held()
    with pytest.raises(engine.MonitorLostError, match="is stopped"):
        engine.Engine(tmp_path, **SMALL)
    left = process._left.pop()
    go_on(left.pid)
    left.wait(60)
    until(lambda: held() == before)


def test_a_monitor_that_is_stopped_for_a_moment_is_waited_for(
    tmp_path: Path, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks at a running process in between begin the count again."""
    looks = iter([True, True, False] * 3)
    monkeypatch.setattr(process, "_is_stopped", lambda _: next(looks, False))

    def slow(pid: int, operation: str, path: str, _: str) -> None:
        if operation == "sync_file" and "step-00000001" in path:
            until(lambda: next(looks, None) is None)

    hooks.before = slow
    with engine.Engine(tmp_path, **SMALL) as eng:
        save = eng.checkpoint(engine.Arena.wrap({"w": torch.ones(1 << 10)}), step=1)
    assert save.result(0).step == 1
