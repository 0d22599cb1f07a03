"""The saves in flight of an Engine: for itself, for other processes, and what is said where nobody can be asked."""

from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import GatedFilesystem
from jobs import until
from leaks import held

import engine
from engine.monitor import status
from engine.store.lock import holder_of

SMALL: dict[str, Any] = {"block_bytes": 64 << 10, "staging_bytes": 256 << 10, "chunk_bytes": 128 << 10}
NBYTES = 1 << 20
HANG_S = 60


def arena_of(value: float = 1.0) -> engine.Arena:
    return engine.Arena.wrap({"a": torch.full((NBYTES // 4,), value)})


def in_another_process(directory: Path, code: str) -> str:
    script = f"import sys, engine; run = engine.open(sys.argv[1]); {code}"
    return subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, timeout=HANG_S, check=True
    ).stdout.strip()


def test_saves_in_flight_are_seen_here_and_in_another_process(tmp_path: Path) -> None:
    filesystem = GatedFilesystem()
    with engine.Engine(tmp_path, filesystem=filesystem, **SMALL) as eng:
        assert eng.in_flight() == engine.open(tmp_path).in_flight() == ()
        first = eng.checkpoint(arena_of(), 3, snapshot="lazy")
        second = eng.checkpoint(arena_of(2.0), 5, snapshot="lazy")
        until(lambda: eng.in_flight()[0].staged_bytes >= 128 << 10)
        of_first, of_second = eng.in_flight()
        assert (of_first.step, of_second.step) == (3, 5)
        assert of_first.checkpoint_id == first.checkpoint_id and not of_first.is_safe
        assert list(of_first.chunks) == first.chunks()
        assert of_first.nbytes == NBYTES + 4096 and of_first.written_bytes == 0 == of_first.bytes_per_second
        assert 128 << 10 <= of_first.staged_bytes <= 256 << 10, "the slots are full, and no file is open"
        said = in_another_process(
            tmp_path, "print([(s.step, s.checkpoint_id, s.staged_bytes > 0, len(s.chunks)) for s in run.in_flight()])"
        )
        assert said == repr(
            [(s.step, s.checkpoint_id, s.staged_bytes > 0, len(s.chunks)) for s in (of_first, of_second)]
        )
        filesystem.gate.set()
        second.result(HANG_S)
        until(lambda: eng.in_flight() == ())
        assert engine.open(tmp_path).in_flight() == ()
        ended = first.status()
        assert ended.written_bytes == ended.staged_bytes == ended.nbytes and ended.bytes_per_second > 0
        assert ended.seconds == first.stats()["durable_ns"] / 1e9 and {c.status for c in ended.chunks} == {"durable"}


def test_a_layerwise_save_and_a_refused_one(tmp_path: Path) -> None:
    arena = arena_of()
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:
        with eng.layerwise(arena, 2) as save:
            (of_block,) = engine.open(tmp_path).in_flight()
            assert of_block.step == 2 and of_block.staged_bytes <= 4096
            refused = eng.checkpoint(arena_of(), on_busy="skip")
            assert refused.status()[:5] == (3, "", False, (), 0) and refused.status().bytes_per_second == 0
            save.layer_ready("")
        save.result(HANG_S)


def test_the_socket_is_gone_with_the_engine_and_leaves_nothing(tmp_path: Path) -> None:
    engine.Engine(tmp_path).close()
    gc.collect()
    before = held()
    eng = engine.Engine(tmp_path)
    path = tmp_path / ".engine" / "monitor.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    channel = status._connect(str(tmp_path))  # which stays open
    assert channel is not None
    assert status._ask(channel, str(tmp_path)) == status.ask_status(str(tmp_path))
    eng.close()
    assert not path.exists()
    channel.await_end()
    channel.close()
    until(lambda: held() == before)
    assert engine.open(tmp_path).in_flight() == ()


def test_an_engine_that_is_dropped_answers_no_more(tmp_path: Path) -> None:
    eng = engine.Engine(tmp_path)
    del eng
    gc.collect()
    assert engine.open(tmp_path).in_flight() == () and status.ask_status(str(tmp_path)) is None


def test_a_forked_child_keeps_no_socket(tmp_path: Path) -> None:
    """Its copy would take connections, and answer none."""
    eng = engine.Engine(tmp_path)
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(ready[1], b"r")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        sockets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        assert f"socket:[{os.fstat(eng._listener._socket.fileno()).st_ino}]" not in sockets  # type: ignore[union-attr]
        eng.close()
        assert engine.open(tmp_path).in_flight() == ()
    finally:
        os.write(done[1], b"d")
        os.waitpid(pid, 0)
        for end in (*ready, *done):
            os.close(end)


def test_an_owner_that_cannot_be_asked_is_not_taken_for_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.session.status._TRIES", 2)

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", refuse)  # as a file system without sockets would refuse bind(2)
        eng = engine.Engine(tmp_path)
    with pytest.raises(engine.PlatformError, match=rf"process {os.getpid()} has {tmp_path}, and cannot be asked"):
        engine.open(tmp_path).in_flight()
    assert eng.in_flight() == ()
    eng.checkpoint(arena_of(), 1).result(HANG_S)
    eng.close()
    assert engine.open(tmp_path).in_flight() == ()


def test_no_thread_for_the_socket_costs_the_status_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if getattr(self, "_target", None) is not None and self._target.__name__ == "_accept":  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with engine.Engine(tmp_path) as eng:
        assert not (tmp_path / ".engine" / "monitor.sock").exists()
        eng.checkpoint(arena_of(), 1).result(HANG_S)


def test_the_holder_of_a_run_is_listed(tmp_path: Path) -> None:
    private = str(tmp_path / ".engine")
    assert holder_of(private) is None
    with engine.Engine(tmp_path):
        assert holder_of(private) == os.getpid()
    assert holder_of(private) is None


def test_a_silent_owner_is_locked_and_not_in_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Engine is told of the lock, whatever the first one is doing."""
    monkeypatch.setattr(status, "_ANSWER_S", 0.2)
    monkeypatch.setattr("engine.session.status.answer", lambda _: time.sleep(HANG_S))
    with engine.Engine(tmp_path):
        (tmp_path / ".engine" / "monitor.sock").unlink()
        silent = socket.socket(socket.AF_UNIX)
        silent.bind(str(tmp_path / ".engine" / "monitor.sock"))
        silent.listen()
        with pytest.raises(engine.LockedError, match=rf"process {os.getpid()}"):
            engine.Engine(tmp_path)
        with pytest.raises(engine.PlatformError, match="does not answer"):
            engine.open(tmp_path).in_flight()
        silent.close()


def test_objects_show_what_a_person_asks_of_them(tmp_path: Path) -> None:
    filesystem = GatedFilesystem()
    eng = engine.Engine(tmp_path, filesystem=filesystem, max_async=1, **SMALL)
    assert repr(eng) == f"Engine({str(tmp_path)!r}, {eng.backend}, {eng.guard})"
    arena = arena_of()
    save = eng.checkpoint(arena, 3, snapshot="lazy")
    assert repr(eng) == f"Engine({str(tmp_path)!r}, {eng.backend}, {eng.guard}, steps in flight [3])"
    until(lambda: save.status().staged_bytes > 0)
    assert repr(save).startswith("Save(step 3, in flight, ")
    assert repr(save).endswith(f" staged and 0 written of {NBYTES + 4096} bytes)")
    assert repr(eng.checkpoint(arena_of(), on_busy="skip")) == "Save(step 4, refused)"
    filesystem.gate.set()
    save.result(HANG_S)
    assert repr(save) == "Save(step 3, committed)"
    with pytest.raises(OSError, match="mine"), eng.layerwise(arena, 5) as failed:
        raise OSError("mine")
    assert isinstance(failed.exception(HANG_S), engine.UsageError)
    assert repr(failed).startswith("LayerwiseSave(step 5, failed: UsageError('the block of step 5 was left by OSError")
    preemption = eng.on_preemption("SIGUSR2", deadline_s=90)
    assert repr(preemption) == "Preemption(SIGUSR2, 90 s)"
    preemption.close()
    assert repr(preemption) == "Preemption(SIGUSR2, 90 s, closed)"
    eng.close()
    (tmp_path / ".engine").rename(tmp_path / "away")
    assert repr(eng) == f"Engine({str(tmp_path)!r}, closed)", "nothing is read"


def test_questions_are_answered_again_when_descriptors_are_free_again(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with engine.Engine(tmp_path):
        channel = status._connect(str(tmp_path))
        assert channel is not None
        waiting = socket.socket(socket.AF_UNIX)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        spare = [os.dup(0) for _ in range(highest + 20 - len(os.listdir("/proc/self/fd")))]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
        try:
            waiting.connect(str(tmp_path / ".engine" / "monitor.sock"))  # and cannot be accepted
            time.sleep(0.2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in spare:
                os.close(each)
            waiting.close()
            channel.close()
        assert engine.open(tmp_path).in_flight() == ()


def test_the_socket_of_a_run_that_was_put_in_the_place_stays(tmp_path: Path) -> None:
    root = tmp_path / "run"
    first = engine.Engine(root)
    root.rename(tmp_path / "away")
    with engine.Engine(root):
        first.close()
        assert (root / ".engine" / "monitor.sock").exists() and engine.open(root).in_flight() == ()
