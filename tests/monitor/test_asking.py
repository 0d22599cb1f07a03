"""Asking a live monitor for its saves where descriptors, threads or room in a queue are missing."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from monitors import monitor_of
from raw_trainer import ClosedListener

import engine
from engine.monitor import status
from engine.monitor.listener import socket_path
from engine.monitor.protocol import AskStatus, Channel, Status
from engine.monitor.status import ask_status

STATUS = Status(1, 2, False, ())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / ".engine").mkdir()
    return tmp_path


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_monitor_without_descriptors_answers_once_it_has_some(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, isolation="process", staging_bytes=8 << 20) as eng:
        run, pid = engine.open(tmp_path), monitor_of(eng)
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        later = threading.Timer(0.5, resource.prlimit, (pid, resource.RLIMIT_NOFILE, (soft, hard)))
        later.start()
        try:
            assert run.in_flight() == ()  # a thread that is in accept(2) already has a number for this one
            assert run.in_flight() == ()
        finally:
            later.join()


def test_a_listener_without_a_thread_leaves_no_socket(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with ClosedListener(str(root), lambda: STATUS):
            assert os.listdir(root / ".engine") == []
    assert ask_status(str(root)) is None


def test_a_listener_without_a_thread_for_an_answer_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ClosedListener(str(root), lambda: STATUS):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert ask_status(str(root)) is None
        assert ask_status(str(root)) == STATUS


def test_a_listener_that_is_closed_ends_its_thread(root: Path) -> None:
    before = threading.active_count()
    with ClosedListener(str(root), lambda: STATUS):
        assert threading.active_count() == before + 1
        accepting = threading.enumerate()[-1]
    accepting.join(60)
    assert not accepting.is_alive()


class _Queue:
    """A socket of a run that accepts nothing, and whose queue is full."""

    def __init__(self, root: Path) -> None:
        self._stack = ExitStack()
        self.listening = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        with socket_path(str(root)) as path:
            self.listening.bind(path)
            self.listening.listen(0)
            with suppress(BlockingIOError):
                while True:
                    asking = self._stack.enter_context(socket.socket(socket.AF_UNIX))
                    asking.setblocking(False)
                    asking.connect(path)

    def answer(self) -> None:
        """Serve those in the queue, of which the last one asks."""
        while True:
            with Channel(self.listening.accept()[0]) as channel:
                channel.set_timeout(0.5)
                with suppress(TimeoutError):
                    assert isinstance(channel.expect(AskStatus), AskStatus)
                    channel.send(STATUS)
                    return

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def queue(root: Path) -> Iterator[_Queue]:
    made = _Queue(root)
    yield made
    made.close()


def test_a_full_queue_is_waited_for(root: Path, queue: _Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    sleep = time.sleep

    def note(seconds: float) -> None:
        refused.set()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    found: list[Status | None] = []
    asking = threading.Thread(target=lambda: found.append(ask_status(str(root))))
    asking.start()
    assert refused.wait(60), "the queue was not full"
    queue.answer()
    asking.join(60)
    assert found == [STATUS]


def test_a_queue_that_stays_full_is_told(root: Path, queue: _Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_ANSWER_S", 0.1)
    with pytest.raises(engine.PlatformError, match="does not answer"):
        ask_status(str(root))
