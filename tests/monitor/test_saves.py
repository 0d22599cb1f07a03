"""An Engine with ``isolation="process"``: every kind of save, the process behind it, and what is left of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same, stored
from jobs import until
from leaks import held
from monitors import is_there, monitor_of
from processes import descriptors, in_a_process_of_its_own
from torch import nn

import engine
from engine.monitor.client import MonitoredStore

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10, "isolation": "process"}


def status_kib(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 300))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 300)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def arena(model: nn.Module) -> Iterator[engine.Arena]:
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    yield engine.Arena.adopt(model, optimizer)


def test_the_monitor_owns_the_directory_and_the_trainer_has_nothing_of_it_open(
    tmp_path: Path, arena: engine.Arena
) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        pid = monitor_of(eng)
        lock, *_ = (tmp_path / ".engine" / "lock").read_text().split()
        assert int(lock) == pid != os.getpid()
        assert not any(str(tmp_path) in name for name in descriptors()), "the trainer has something of the run open"
        open_there = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        assert not any(name.endswith(".safetensors") for name in open_there), "an ended save has open files"
        assert os.getsid(pid) == pid, "a signal to the trainer's process group would reach it"
        with pytest.raises(engine.LockedError, match=f"process {pid}"):
            engine.Engine(tmp_path, **SMALL)
        with pytest.raises(engine.LockedError, match=f"process {pid}"):
            engine.Engine(tmp_path)


def test_the_monitor_has_no_torch_and_is_small(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        pid = monitor_of(eng)
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "_native" in maps and "torch" not in maps and "numpy" not in maps
        beside_slots = status_kib(pid, "RssAnon") + status_kib(pid, "RssFile")
        sys.stdout.write(f"resident beside the slots: {beside_slots >> 10} MiB\n")
        assert beside_slots < 40 << 10


@pytest.mark.parametrize("closes", ["close", "collect"])
def test_nothing_is_left(tmp_path: Path, closes: str) -> None:
    arena = engine.Arena.wrap({"a": torch.ones(1 << 20)})  # without a guard, which stays with its memory
    before = held()
    eng = engine.Engine(tmp_path, **SMALL)
    pid = monitor_of(eng)
    saves = [eng.checkpoint(arena, step=step) for step in range(3)]
    eng.restore(arena)
    assert eng.verify() == ()
    assert saves[-1].result().step == 2  # kept, and with it the memory of its states only
    if closes == "close":
        eng.close()
        eng.close()
    else:
        del eng
    until(lambda: not is_there(pid) and held() == before)
    assert not (tmp_path / ".engine" / "monitor.sock").exists()
    assert saves[-1].chunks()[0].status == "durable"


def test_a_save_holds_what_the_tensors_were(tmp_path: Path, model: nn.Module, arena: engine.Arena) -> None:
    linear = model.get_submodule("0")
    assert isinstance(linear, nn.Linear)
    want = linear.weight.detach().clone()
    with engine.Engine(tmp_path, **SMALL) as eng:
        save = eng.checkpoint(
            arena,
            step=3,
            extra={"epoch": 7, "big": 2**70, "t": torch.ones(3)},
            metrics={"loss": 0.5, "nan": float("nan")},
            tag="kept",
            files={"config.json": b"{}"},
        )
        with torch.no_grad():
            linear.weight.zero_()
        info = save.result()
        assert (info.step, info.tag, info.metrics) == (3, "kept", {"loss": 0.5, "nan": None})
        assert info.checkpoint_id == save.checkpoint_id and info.path == str(tmp_path / "step-00000003")
        assert same(stored(tmp_path, 3)["0.weight"], want)
        assert (tmp_path / "step-00000003" / "config.json").read_bytes() == b"{}"
        assert eng.info() == info and eng.extra()["big"] == 2**70
        eng.restore(arena)
        assert torch.equal(linear.weight, want) and eng.verify() == ()
        assert {chunk.status for chunk in save.chunks()} == {"durable"}


def test_blocks_that_a_recycled_file_holds_are_not_written(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, keep=1, **SMALL) as eng:
        skipped = []
        for step in range(6):
            save = eng.checkpoint(arena, step=step)
            save.result()
            skipped.append(save.stats()["skipped_bytes"])
        assert skipped[0] == 0 and skipped[-1] == sum(-(-(chunk.nbytes) // 4096) * 4096 for chunk in save.chunks()), (
            "every block is held by the recycled file"
        )
        assert eng.steps() == [5]


def test_untrained_files_are_linked(tmp_path: Path) -> None:
    frozen = nn.Linear(200, 200).requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(200, 200))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    model(torch.randn(1, 200)).sum().backward()
    optimizer.step()
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, keep=None, split_untrained=True, **SMALL) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
        files = {
            step: {p.name: p.stat().st_ino for p in eng_path.glob("*.safetensors")}
            for step, eng_path in ((step, tmp_path / f"step-{step:08d}") for step in (1, 2))
        }
        shared = {name for name, inode in files[1].items() if files[2][name] == inode}
        assert len(shared) == 1 and len(files[1]) >= 3
        with torch.no_grad():
            frozen.weight[0, 0] += 1
        eng.checkpoint(arena, step=3).result()
        assert same(stored(tmp_path, 3)["0.weight"], frozen.weight.detach())
        assert eng.verify(3) == () and eng.verify(2) == ()


def test_several_saves_in_flight_become_visible_in_order(tmp_path: Path, arena: engine.Arena) -> None:
    seen: list[int] = []
    with engine.Engine(tmp_path, keep=None, max_async=4, **SMALL) as eng:
        saves = [eng.checkpoint(arena, step=step) for step in range(8)]
        for save in saves:
            save.add_done_callback(lambda ended: seen.append(ended.result().step))
        eng.wait()
        until(lambda: len(seen) == 8)
        assert eng.steps() == list(range(8)) and seen == list(range(8))
        assert all(eng.verify(step) == () for step in range(8))


def test_rollback_delete_retention_and_another_engine(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, retention=engine.Retention(last=None, every=4), **SMALL) as eng:
        for step in range(5):
            eng.checkpoint(arena, step=step).result()
        assert sorted(eng.rollback(2)) == [3, 4] and eng.steps() == [0, 1, 2]
        eng.delete(1)
        with pytest.raises(engine.NotFoundError, match="holds no step 1"):
            eng.delete(1)
        with pytest.raises(engine.NotFoundError, match="holds no step 9"):
            eng.restore(arena, 9)
        assert eng.steps() == [0, 2] and eng.retention.every == 4
    with engine.Engine(tmp_path) as other:
        assert other.retention.every == 4 and other.steps() == [0, 2]
        other.checkpoint(arena, step=3).result()
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.restore(arena, 3)


def test_a_step_that_is_read_is_not_deleted(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        with eng._store.catalog.opened(1), pytest.raises(engine.StepError, match="being read"):
            eng.delete(1)
        eng.delete(1)


def test_a_tear_fails_the_save_and_the_next_one_works(tmp_path: Path) -> None:
    tensor = torch.zeros(1 << 20)
    arena = engine.Arena.wrap({"w": tensor})
    with engine.Engine(tmp_path, **SMALL) as eng:
        store = eng._store
        assert isinstance(store, MonitoredStore)
        os.kill(monitor_of(eng), signal.SIGSTOP)  # no slot becomes free
        save = eng.checkpoint(arena, step=1, snapshot="lazy")
        tensor.add_(1)
        os.kill(monitor_of(eng), signal.SIGCONT)
        with pytest.raises(engine.TornSnapshot):
            save.result()
        eng.checkpoint(arena, step=2, snapshot="eager").result()
        assert eng.steps() == [2] and same(stored(tmp_path, 2)["w"], tensor)
        assert sorted(os.listdir(tmp_path)) == [".engine", "step-00000002"]


def test_another_process_sees_saves_and_chunks_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1 << 20, dtype=torch.float32)
    arena = engine.Arena.wrap({"w": tensor})
    with engine.Engine(tmp_path, chunk_bytes=1 << 20, **SMALL) as eng:
        run = engine.open(tmp_path)
        assert run.in_flight() == ()
        released = threading.Event()
        eng.checkpoint(arena, step=0).result()
        before = eng._store.pipeline.wait

        def held_back(*arguments: Any) -> bool:
            released.wait(60)
            return before(*arguments)

        monkeypatch.setattr(eng._store.pipeline, "wait", held_back)
        save = eng.checkpoint(arena, step=1, snapshot="lazy")
        until(lambda: bool(run.in_flight()) and {c.status for c in run.in_flight()[0].chunks} == {"written"})
        (status,) = run.in_flight()
        assert (status.step, status.checkpoint_id) == (1, save.checkpoint_id)
        assert [
            c._replace(status="") if False else (c.file, c.index, c.offset, c.nbytes, c.layers) for c in status.chunks
        ] == [(c.file, c.index, c.offset, c.nbytes, c.layers) for c in save.chunks()]
        code = "import sys, engine; print([s.step for s in engine.open(sys.argv[1]).in_flight()])"
        assert in_a_process_of_its_own(code, str(tmp_path)).stdout.split() == ["[1]"]
        released.set()
        save.result()
        until(lambda: run.in_flight() == ())
    assert run.in_flight() == ()


def test_a_long_path_and_a_stale_socket(tmp_path: Path, arena: engine.Arena) -> None:
    root = tmp_path / ("d" * 120) / "run"
    (root / ".engine").mkdir(parents=True)
    (root / ".engine" / "monitor.sock").write_bytes(b"")
    with engine.Engine(root, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        assert engine.open(root).in_flight() == ()
        assert (root / ".engine" / "monitor.sock").stat().st_mode & 0o777 == 0o600


def test_memory_that_the_kernel_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with vm.overcommit_memory=2: of the slots when the Engine is opened, of a board at the save."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refused() -> Any:
        cause = r"refused \d+ bytes of memory to share with a monitor: .*Cannot allocate memory.*staging_bytes"
        return pytest.raises(engine.PlatformError, match=cause)

    before = held()
    with monkeypatch.context() as patch, refused():
        patch.setattr(os, "posix_fallocate", refuse)
        engine.Engine(tmp_path, **SMALL)
    until(lambda: held() == before)
    arena = engine.Arena.wrap({"w": torch.ones(10)})
    with engine.Engine(tmp_path, **SMALL) as eng:
        with monkeypatch.context() as patch, refused():
            patch.setattr(os, "posix_fallocate", refuse)
            eng.checkpoint(arena, step=1).result()
        eng.checkpoint(arena, step=2).result()
        assert eng.steps() == [2]


def test_no_monitor_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(engine.PlatformError, match="refused a process for the monitor"):
        engine.Engine(tmp_path, **SMALL)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(engine.PlatformError, match="ended with status 1 while it started"):
        engine.Engine(tmp_path, **SMALL)
    assert held() == before


def test_a_fork_has_nothing_of_the_monitor(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena, step=1).result()
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                names = [name for name in descriptors() if "socket:" in name or "engine-" in name or "eventfd" in name]
                maps = Path("/proc/self/maps").read_text()
                with pytest.raises(engine.ForkedError):
                    eng.checkpoint(arena)
                with pytest.raises(engine.ForkedError):
                    eng.delete(1)
                os.write(writer, b"slots mapped" if "engine-slots" in maps else repr(names).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            assert answer.read() == "[]"
        os.waitpid(child, 0)
        eng.checkpoint(arena, step=2).result()


def test_signals_to_the_group_do_not_end_the_monitor(tmp_path: Path, arena: engine.Arena) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(monitor_of(eng), each)
        eng.checkpoint(arena, step=1).result()


def test_the_time_to_start(tmp_path: Path) -> None:
    """No time is asserted, but that what costs the most of it is not imported."""
    code = (
        "import sys, time; t = time.process_time(); import engine.monitor.server; print(time.process_time() - t)\n"
        "print({'torch', 'numpy', 'importlib.metadata', 'zipfile', 'tempfile', 'subprocess'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, imported = done.stdout.splitlines()
    sys.stdout.write(f"processor time of a monitor's imports: {float(seconds):.2f} s\n")
    assert imported == "set()"


def test_a_layerwise_save_has_the_options_of_the_end_of_its_block(tmp_path: Path) -> None:
    layer = nn.Linear(30, 30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    arena = engine.Arena.adopt(layer, optimizer)
    with engine.Engine(tmp_path, **SMALL) as eng:
        with eng.layerwise(arena, 1) as save:
            optimizer.param_groups[0]["lr"] = 0.25
            save.layer_ready("")
        save.result()
        optimizer.param_groups[0]["lr"] = 0.125
        eng.restore(arena)
    assert optimizer.param_groups[0]["lr"] == 0.25
