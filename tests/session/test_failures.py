"""Failed saves whose outcome is never asked for, and `on_error`."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import FailingFilesystem

import engine

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


class Failing:
    """An Engine, of which each save fails that `fail` begins."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.filesystem = FailingFilesystem()
        self.eng = engine.Engine(directory, filesystem=self.filesystem, **SMALL, **options)
        self.arena = engine.Arena.wrap({"a": torch.zeros(1000)})

    def fail(self, step: int) -> engine.Save:
        self.filesystem.fail_next("sync_file", 5)
        save = self.eng.checkpoint(self.arena, step)
        while not save.done():
            save.wait_staged()
        return save


@pytest.mark.parametrize("call", ["checkpoint", "wait", "close", "exit"])
def test_the_next_call_warns_once_of_a_failure_that_nobody_asked_about(tmp_path: Path, call: str) -> None:
    failing = Failing(tmp_path)
    failing.fail(1)
    calls: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: failing.eng.checkpoint(failing.arena, 2).result(),
        "wait": failing.eng.wait,
        "close": failing.eng.close,
        "exit": lambda: failing.eng.__exit__(None, None, None),
    }
    with pytest.warns(engine.EngineWarning, match=r"the save of step 1 failed: .*errno 5.*on_error") as caught:
        calls[call]()
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failing.eng.close()


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_a_failure_that_somebody_asked_about_is_not_reported(tmp_path: Path, ask: str) -> None:
    failing = Failing(tmp_path, on_error="raise")
    save = failing.fail(1)
    save.chunks()
    if ask == "result":
        with pytest.raises(engine.StorageError):
            save.result()
    assert isinstance(save.exception(), engine.StorageError)
    failing.eng.wait()
    failing.eng.checkpoint(failing.arena, 2).result()
    failing.eng.close()


def test_a_save_with_a_done_callback_is_not_reported(tmp_path: Path) -> None:
    failing = Failing(tmp_path, on_error="raise")
    failures: list[BaseException | None] = []
    failing.fail(1).add_done_callback(lambda save: failures.append(save.exception()))
    failing.eng.checkpoint(failing.arena, 2).result()
    failing.eng.close()
    assert isinstance(failures[0], engine.StorageError)


def test_the_status_of_chunks_is_no_question(tmp_path: Path) -> None:
    failing = Failing(tmp_path)
    assert {chunk.status for chunk in failing.fail(1).chunks()} == {"failed"}
    with pytest.warns(engine.EngineWarning, match="step 1"):
        failing.eng.close()


@pytest.mark.parametrize("call", ["checkpoint", "wait", "close"])
def test_raise_raises_the_failure_at_the_next_call(tmp_path: Path, call: str) -> None:
    failing = Failing(tmp_path, on_error="raise")
    save = failing.fail(1)
    calls: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: failing.eng.checkpoint(failing.arena, 2),
        "wait": failing.eng.wait,
        "close": failing.eng.close,
    }
    with pytest.raises(engine.StorageError) as caught:
        calls[call]()
    assert caught.value is save.exception()
    assert failing.eng.is_open == (call != "close")
    if call != "close":
        assert failing.eng.checkpoint(failing.arena, 2).result().step == 2
        failing.eng.close()
    with engine.Engine(tmp_path, **SMALL):
        pass  # the lock is free


def test_the_error_that_ends_a_block_is_not_hidden(tmp_path: Path) -> None:
    failing = Failing(tmp_path, on_error="raise")
    with pytest.warns(engine.EngineWarning, match="step 1"), pytest.raises(KeyError), failing.eng:
        failing.fail(1)
        raise KeyError
    assert not failing.eng.is_open


def test_a_callback_gets_the_save_and_its_failure_at_once(tmp_path: Path) -> None:
    got: list[tuple[engine.Save, BaseException]] = []
    called = threading.Event()

    def on_error(save: engine.Save, error: BaseException) -> None:
        got.append((save, error))
        called.set()

    failing = Failing(tmp_path, on_error=on_error)
    save = failing.fail(1)
    assert called.wait(60) and [(save, save.exception())] == got
    failing.eng.checkpoint(failing.arena, 2).result()
    failing.eng.close()
    assert len(got) == 1


def test_a_callback_that_raises_is_logged_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on_error(save: engine.Save, error: BaseException) -> None:
        raise RuntimeError("the pager is down")

    with caplog.at_level(logging.ERROR, "engine"):
        failing = Failing(tmp_path, on_error=on_error)
        failing.fail(1)
        failing.eng.wait()
        assert failing.eng.checkpoint(failing.arena, 2).result().step == 2
        failing.eng.close()
    assert "on_error has failed for step 1" in caplog.text and "the pager is down" in caplog.text


def test_on_error_is_checked_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(engine.ArgumentError, match=r"on_error is 'ignore'; it must be a function"):
        engine.Engine(tmp_path / "run", on_error="ignore")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
