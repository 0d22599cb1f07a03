"""Signals beside a monitor: at its start, and handlers that close the Engine in the middle of a call."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deadly import kill_and_wait
from jobs import until
from monitors import has_ended, monitor_of

import engine
from engine.monitor import client, process
from engine.monitor.protocol import IGNORED, Channel, Request

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10, "isolation": "process"}


@pytest.fixture
def arena() -> engine.Arena:
    return engine.Arena.wrap({"w": torch.ones(1 << 10)})


def in_time(function: Callable[[], object]) -> None:
    """Run a function that may wait for ever."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    if failures:
        raise failures[0]


def test_signals_between_the_start_and_the_main_of_a_monitor(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys\n"
        f"for each in {[int(each) for each in IGNORED]}: os.kill(os.getpid(), each)\n"
        "from engine.monitor.server import main; main(int(sys.argv[1]))"
    )
    monkeypatch.setattr(process, "command", lambda fd: [sys.executable, "-c", code, str(fd)])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with engine.Engine(tmp_path, **SMALL) as eng:
        assert eng.checkpoint(arena, step=1).result(60).step == 1
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{monitor_of(eng)}/status").read_text().splitlines())
        assert int(status["SigBlk"], 16) == 0 and int(status["ShdPnd"], 16) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask, "the trainer's signals stay blocked"


def test_the_mask_of_signals_is_given_back_when_no_monitor_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(engine.PlatformError):
        engine.Engine(tmp_path, **SMALL)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_a_handler_may_close_the_engine_while_a_monitor_is_started(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit thread asks for the monitor at that moment, and close waits for that thread."""
    eng = engine.Engine(tmp_path, **SMALL)
    eng.checkpoint(arena, step=1).result()
    kill_and_wait(monitor_of(eng))
    started: list[int] = []
    asked: list[BaseException] = []
    asking = threading.Event()

    def retire() -> None:
        asking.set()
        try:
            eng._store.retire()
        except engine.EngineError as error:
            asked.append(error)

    def interrupted(*arguments: Any) -> process.Monitor:
        monitor = process.Monitor(*arguments)
        started.append(monitor.pid)
        eng._workers.submit(retire)
        assert asking.wait(60)
        time.sleep(0.2)  # until it waits for this thread
        eng.close()  # as a handler would, on this very thread
        return monitor

    monkeypatch.setattr(client, "Monitor", interrupted)
    with pytest.raises(engine.ClosedError):
        in_time(lambda: eng.checkpoint(arena, step=2))
    assert len(asked) == 1 and isinstance(asked[0], engine.MonitorLostError)
    until(lambda: has_ended(*started))
    assert engine.open(tmp_path).steps() == [1]


def test_a_handler_that_interrupts_a_request_waits_for_no_other(
    tmp_path: Path, arena: engine.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Channel.send
    interrupted: list[int] = []

    def send(channel: Channel, message: Any, descriptors: Any = ()) -> None:
        if isinstance(message, Request) and not interrupted:
            interrupted.append(1)
            in_time(lambda: eng.info(1))  # as a handler that waits for a thread that asks
        real(channel, message, descriptors)

    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        monkeypatch.setattr(Channel, "send", send)
        assert eng.info(1).step == 1 and interrupted


def test_requests_of_many_threads_reach_the_monitor_whole(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        found: list[int] = []

        def ask() -> None:
            found.extend(eng.info(1).step for _ in range(20))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [1] * 160
        os.kill(monitor_of(eng), signal.SIGTERM)
        assert eng.info(1).step == 1
