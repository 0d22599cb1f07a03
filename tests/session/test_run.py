"""`engine.open`: reading a run without its lock, beside a training and on a read-only mount."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_a_process_of_its_own
from volumes import mounted_read_only

import engine
from engine.io.backend import open_to_read
from engine.io.descriptor import Descriptor
from engine.session import run as run_module
from engine.store.filesystem import Filesystem

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}

CHANGES = ("make_directory", "rename", "unlink", "remove_directory", "write_new_file", "allocate", "truncate")


def saved(path: Path, *steps: int, keep: int | None = None) -> engine.Arena:
    """A run with these steps; every element of a step's tensors is its number."""
    tensors = {"a.weight": torch.zeros(300, 100), "a.bias": torch.zeros(100)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(path, keep=keep, **SMALL) as eng:
        for step in steps:
            for tensor in tensors.values():
                tensor.fill_(step)
            eng.checkpoint(arena, step=step, extra={"step": step}).result()
    return arena


def values(tensors: dict[str, torch.Tensor]) -> set[float]:
    return {float(value) for tensor in tensors.values() for value in tensor.unique()}


def test_a_run_is_read_beside_the_engine_that_writes_it(tmp_path: Path) -> None:
    arena = saved(tmp_path, 1, 2)
    with engine.Engine(tmp_path, **SMALL) as eng, engine.open(tmp_path, **SMALL) as run:
        assert run.steps() == eng.steps() == [1, 2]
        assert run.info() == eng.info() and run.info(1) == eng.info(1)
        assert run.extra() == {"step": 2} and run.extra(1) == eng.extra(1) == {"step": 1}
        assert values(run.load()) == {2} and values(run.load(1, select="a.bias")) == {1}
        assert run.verify() == () and run.restore(arena, 1).step == 1
        eng.checkpoint(arena, step=3).result()
        assert run.steps() == [1, 2, 3] and values(run.load()) == {1}
        assert repr(run) == f"Run({str(tmp_path)!r}, 3 checkpoints)"


def test_nothing_is_changed_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a reader changes nothing")

    saved(tmp_path, 1)
    readonly = type("ReadOnly", (Filesystem,), dict.fromkeys(CHANGES, refuse))
    monkeypatch.setattr(run_module, "Filesystem", readonly)
    before = sorted(os.walk(tmp_path))
    with engine.open(tmp_path, **SMALL) as run:
        assert values(run.load()) == {1} and run.verify() == ()
    assert sorted(os.walk(tmp_path)) == before


def test_a_run_on_a_read_only_mount_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "run", 1, 2)
    with mounted_read_only(tmp_path / "run", tmp_path / "mounted") as mounted, engine.open(mounted, **SMALL) as run:
        assert values(run.load()) == {2} and run.verify() == () and run.extra(1) == {"step": 1}


def test_a_missing_directory_is_reported_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(engine.NotFoundError, match="is no run: there is no such directory; check the path"):
        engine.open(tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()
    with pytest.raises(engine.NotFoundError, match="is no run"):
        engine.open(tmp_path)


def test_reading_beside_retirement_never_mixes_steps(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.zeros(50_000) for index in range(4)}
    arena = engine.Arena.wrap(tensors)
    stop = threading.Event()
    saved_steps: list[int] = []

    def train() -> None:
        with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
            step = 0
            while not stop.is_set():
                for tensor in tensors.values():
                    tensor.fill_(step)
                saved_steps.append(eng.checkpoint(arena, step=step, snapshot="eager").result().step)
                step += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while not saved_steps:
            pass
        retired = 0
        with engine.open(tmp_path, **SMALL) as run:
            for _ in range(100):
                assert len(values(run.load())) == 1, "the newest: never mixed, never an error"
                step = run.steps()[-1]
                try:
                    assert values(run.load(step)) == {step}
                except engine.NotFoundError as error:
                    retired += 1
                    assert str(step) in str(error)
    finally:
        stop.set()
        thread.join()
    assert saved_steps[-1] > 5


def test_a_run_closed_while_a_load_opens_files_starts_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    before = threads()
    run = engine.open(tmp_path, **SMALL)
    real = Filesystem.open_directory

    def close_first(filesystem: Filesystem, path: str) -> Descriptor:
        run.close()
        return real(filesystem, path)

    monkeypatch.setattr(Filesystem, "open_directory", close_first)
    with pytest.raises(engine.ClosedError, match=r"call engine\.open again"):
        run.load()
    assert threads() == before


def test_a_signal_handler_may_close_a_run_whose_thread_is_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    before = threads()
    run = engine.open(tmp_path, **SMALL)

    def close_meanwhile(*arguments: Any) -> Any:
        run.close()  # as a handler would, on this very thread
        return open_to_read(*arguments)

    monkeypatch.setattr(run_module, "open_to_read", close_meanwhile)
    with pytest.raises(engine.ClosedError, match=r"call engine\.open again"):
        run.load()
    assert threads() == before


def test_a_closed_run_raises_and_a_dropped_one_stops_its_thread(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    before = threads()
    run = engine.open(tmp_path, **SMALL)
    assert threads() == before, "no thread before a block is wanted"
    run.load()
    assert threads() > before
    run.close()
    run.close()
    assert threads() == before
    with pytest.raises(engine.ClosedError, match=r"call engine\.open again"):
        run.steps()
    dropped = engine.open(tmp_path, **SMALL)
    dropped.load()
    del dropped
    gc.collect()
    assert threads() == before


FORKED = """
import os, signal, sys, threading, time, warnings
import engine
from engine.session import run as run_module

run, opening, forked = engine.open(sys.argv[1]), threading.Event(), threading.Event()
open_to_read = run_module.open_to_read

def held_back(*arguments):
    opening.set()
    assert forked.wait(60)
    return open_to_read(*arguments)

run_module.open_to_read = held_back
loaded = []
loading = threading.Thread(target=lambda: loaded.append(run.load()))
if sys.argv[2] == "during the first load":
    loading.start()
    assert opening.wait(60)
else:
    forked.set()
    loading.start()
    loading.join()
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of several threads is the point
child = os.fork()
if child == 0:
    try:
        run.load()
    except engine.ForkedError as error:
        assert "call engine.open in this process" in str(error)
    else:
        os._exit(3)
    if sys.argv[3] == "closes it":
        run.close()
    sys.exit(0)
deadline = time.monotonic() + 20
while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
if ended[0] == 0:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    forked.set()
    sys.exit("the child hangs")
forked.set()
loading.join()
assert len(loaded) == 1 and run.load().keys() == loaded[0].keys()
run.close()
sys.exit(os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.mark.parametrize("child", ["closes it", "lets it go"])
@pytest.mark.parametrize("when", ["during the first load", "after a load"])
def test_a_forked_child_that_has_a_run_exits_and_leaves_the_parents_alone(
    tmp_path: Path, when: str, child: str
) -> None:
    """During the first load another thread of the parent has the lock of the Run's pipelines."""
    saved(tmp_path, 1)
    result = in_a_process_of_its_own(FORKED, str(tmp_path), when, child)
    assert (result.returncode, result.stderr) == (0, "")


def threads() -> int:
    """Native threads that own a ring."""
    names = [(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    return names.count("engine-io")


AS_ANOTHER_USER = """
import os, sys
from engine.store.directory import Directory
from engine.store.filesystem import Filesystem
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
run = Directory(sys.argv[1], Filesystem())
with run.opened(1) as opened:
    print(run.steps(), opened.manifest()[0].step)
"""


def test_another_users_run_is_read() -> None:
    """An ordinary user reads root's run, without the right to write there."""
    with tempfile.TemporaryDirectory() as name:
        saved(Path(name) / "run", 1)
        os.chmod(name, 0o755)
        command = [sys.executable, "-c", AS_ANOTHER_USER, str(Path(name) / "run")]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == "[1] 1\n"


def test_a_run_that_is_called_names_what_makes_one(tmp_path: Path) -> None:
    for given in ((), (tmp_path,), (str(tmp_path), engine.Options())):
        with pytest.raises(engine.UsageError, match=r"a Run is made by engine\.open"):
            engine.Run(*given)
