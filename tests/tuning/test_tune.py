"""`engine.tune` on this host: the whole, at small sizes, and that nothing is left of it however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from leaks import held
from tuned import BASE, OFFERED, any_measurements
from volumes import volume

import engine
from engine.errors import ArgumentError, PlatformError, StorageError
from engine.io.backend import LADDER
from engine.options import Options
from engine.store.filesystem import Filesystem
from engine.tuning import search
from engine.tuning.interval import Costs, advise
from engine.tuning.measure import Bench, available_in, lost_seconds
from engine.tuning.report import duration, render

QUICK: dict[str, Any] = {"step_seconds": 0.1, "seconds": 0.5, "staging_bytes": 8 << 20, "block_bytes": 1 << 20}

PATIENT = {**QUICK, "seconds": 60.0}  # on a loaded host too every candidate is tried


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def small_arena() -> engine.Arena:
    return engine.Arena.wrap({f"layers.{index}": torch.rand(500_000) for index in range(12)})


def test_a_host_is_measured_once_and_nothing_is_left(tmp_path: Path) -> None:
    arena = small_arena()
    before, resources = {name: tensor.clone() for name, tensor in arena.state_dict().items()}, held()
    found = engine.tune(tmp_path, arena=arena, mtbf_seconds=3600, **QUICK)
    assert os.listdir(tmp_path) == [] and held() == resources
    assert all(torch.equal(tensor, before[name]) for name, tensor in arena.state_dict().items())
    measured = found.measured
    assert not found.is_cached and measured.sample_bytes <= measured.state_bytes
    assert found.interval_steps == found.interval.steps >= 1
    assert measured.lost_seconds >= measured.recycled.copying_seconds > 0
    assert {trial.name for trial in measured.trials} == {"block_bytes", "staging_bytes", "staging_threads", "backend"}
    assert all(trial.timing is not None or trial.cause for trial in measured.trials)
    assert [flight.count for flight in measured.flights] == [1, 2, 3, 4]
    for words in (
        "into new files",
        "read and verified",
        "saves at once: 4",
        "backend=threads",
        "PCcheck",
        "Daly",
        "every ",
    ):
        assert words in str(found)

    again = engine.tune(tmp_path, arena=arena, mtbf_seconds=3600, **QUICK)
    assert again.is_cached and again.measured == measured and again.options == found.options
    tighter = engine.tune(tmp_path, arena=arena, **{**QUICK, "overhead": 0.001})
    assert tighter.is_cached and tighter.interval.cost_steps >= found.interval.cost_steps
    with engine.Engine(tmp_path / "run", options=found.options) as eng:
        assert eng.checkpoint(arena, chunk_count=found.chunk_counts[0]).result().step == 0


def test_another_state_or_a_refresh_is_measured_again(tmp_path: Path) -> None:
    quick = {**QUICK, "seconds": 0.01}
    first = engine.tune(tmp_path, arena=small_arena(), **quick)
    assert engine.tune(tmp_path, arena=small_arena(), **quick).is_cached
    assert not engine.tune(tmp_path, arena=small_arena(), refresh=True, **quick).is_cached
    other = engine.Arena.wrap({"a": torch.rand(1000)})
    assert not engine.tune(tmp_path, arena=other, **quick).is_cached
    assert not engine.tune(tmp_path, arena=small_arena(), **{**quick, "max_async": 3}).is_cached
    late = [trial for trial in first.measured.trials if "were over" in trial.cause]
    assert late and "0.01 seconds were over" in str(first)


@pytest.mark.every_backend
def test_every_backend_is_tuned(tmp_path: Path, rung: engine.options.Backend) -> None:
    found = engine.tune(tmp_path, arena=small_arena(), **{**QUICK, "seconds": 0.2})
    assert found.measured.backend == rung
    tried = [trial.value for trial in found.measured.trials if trial.name == "backend"]
    assert tried == list(LADDER[LADDER.index(rung) + 1 :])
    assert os.listdir(tmp_path) == []


def test_an_adopted_training_is_tuned_and_goes_on(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    engine.tune(tmp_path, arena=arena, **{**QUICK, "seconds": 0.01})
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    with engine.Engine(tmp_path / "run") as eng:
        eng.checkpoint(arena).result()


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.3, 0.7])
def test_ctrl_c_at_any_moment_leaves_nothing(tmp_path: Path, cache_home: Path, after: float) -> None:
    arena = small_arena()
    resources = held()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, max(after, 1e-4))
            engine.tune(tmp_path, arena=arena, **{**QUICK, "seconds": 30.0})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert os.listdir(tmp_path) == [] and held() == resources
    assert not list(cache_home.rglob("*.json*"))


def test_a_kill_leaves_nothing_in_the_directory(tmp_path: Path) -> None:
    code = """
        import sys, torch, engine
        arena = engine.Arena.wrap({"a": torch.rand(4_000_000)})
        print("ready", flush=True)
        engine.tune(sys.argv[1], arena=arena, step_seconds=0.1, seconds=60.0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        links = Path(f"/proc/{process.pid}/fd")
        end = time.monotonic() + 60
        while not any(str(tmp_path) in target for target in _targets(links)):
            assert time.monotonic() < end, "tune opened no file in the directory"
            time.sleep(0.01)
        process.kill()
    assert os.listdir(tmp_path) == []


def _targets(links: Path) -> Sequence[str]:
    targets = []
    for name in os.listdir(links):
        try:
            targets.append(os.readlink(links / name))
        except FileNotFoundError:  # it was closed meanwhile
            continue
    return targets


def test_no_more_than_a_quarter_of_the_free_space_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[int] = []
    allocate = Filesystem.allocate

    def noting(self: Filesystem, *arguments: Any) -> None:
        allocate(self, *arguments)
        free.append(self.free_bytes(arguments[2]) or 0)

    with volume("ext4", 512 << 20) as mount:
        before = Filesystem().free_bytes(str(mount)) or 0
        monkeypatch.setattr(Filesystem, "allocate", noting)
        engine.tune(mount, arena=small_arena(), **{**QUICK, "seconds": 5.0})
        assert free and min(free) >= before * (1 - search.SHARE) - (1 << 20)


def test_a_directory_without_room_is_refused_and_left_as_it_was() -> None:
    with volume("ext4", 32 << 20) as mount:
        names = os.listdir(mount)
        with pytest.raises(StorageError, match="or tune a larger file system"):
            engine.tune(mount, arena=small_arena(), **QUICK)
        assert os.listdir(mount) == names


def test_slots_that_exceed_the_free_memory_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "available_bytes", lambda: 40 << 20)
    found = engine.tune(tmp_path, arena=small_arena(), **PATIENT)
    causes = {trial.value: trial.cause for trial in found.measured.trials if trial.name == "staging_bytes"}
    assert "exceed 10 MiB of free memory" in causes[16 << 20] and not causes[4 << 20]


def test_a_failing_device_is_an_error_of_the_base_and_a_cause_of_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bench.pipeline

    def refusing(self: Bench, options: Options) -> Any:
        if options.block_bytes != QUICK["block_bytes"]:
            raise PlatformError("no such blocks here", "use others")
        return opened(self, options)

    monkeypatch.setattr(Bench, "pipeline", refusing)
    found = engine.tune(tmp_path, arena=small_arena(), **PATIENT)
    causes = [trial.cause for trial in found.measured.trials if trial.name == "block_bytes"]
    assert causes == ["no such blocks here"] * len(causes) and causes
    assert "not measured: no such blocks here" in str(found)

    def failing(*_: object) -> None:
        raise StorageError(5, "fsync", "here")

    monkeypatch.setattr(Filesystem, "sync_file", failing)
    with pytest.raises(StorageError, match="fsync"):
        engine.tune(tmp_path, arena=small_arena(), refresh=True, **QUICK)
    assert os.listdir(tmp_path) == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"step_seconds": 0}, "step_seconds is 0; it must be a positive number"),
    ({"step_seconds": "1"}, "step_seconds is '1'"),
    ({"overhead": -0.1}, "overhead is -0.1"),
    ({"overhead": float("nan")}, "overhead is nan"),
    ({"overhead": 3}, "overhead is 3, which would let .* such as 0.03 for 3 %"),
    ({"overhead": 1.0}, "overhead is 1, "),
    ({"mtbf_seconds": float("inf")}, "mtbf_seconds is inf"),
    ({"seconds": True}, "seconds is True"),
    ({"max_async": 0}, "max_async is 0"),
    ({"staging": 1}, "did you mean staging_bytes"),
    ({"arena": {}}, "arena is a builtins.dict"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=str)
def test_wrong_arguments_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("(", r"\(")):
        engine.tune(tmp_path, **{"arena": small_arena(), **QUICK, **change})


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="tune a directory that exists"):
        engine.tune(tmp_path / "missing", arena=small_arena(), **QUICK)


# -- parts -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.lists(st.tuples(st.integers(0, 2**50), st.integers(0, 2**50)), max_size=3))
def test_available_memory_is_the_least_that_any_limit_leaves(kib: int, limits: list[tuple[int, int]]) -> None:
    meminfo = f"MemTotal: 99 kB\nMemAvailable:   {kib} kB\nBuffers: 1 kB"
    texts = [(str(limit), str(usage)) for limit, usage in limits]
    rooms = [kib << 10, *(limit - usage for limit, usage in limits)]
    assert available_in(meminfo, [*texts, ("max", "5"), ("", "")]) == max(0, min(rooms))


def test_memory_that_nothing_tells_of_is_none() -> None:
    assert available_in("", []) == 0


@pytest.mark.parametrize("core_count", [1, 3])
def test_a_save_takes_no_more_from_a_load_than_its_own_time(core_count: int) -> None:
    taken: list[float] = []

    def save() -> None:
        began = time.monotonic()
        time.sleep(0.005)
        taken.append(time.monotonic() - began)

    resources = held()
    assert 0 <= lost_seconds(save, core_count, 3) <= max(taken)
    assert held() == resources


@given(any_measurements(), st.sampled_from(OFFERED), st.none() | st.floats(1e-3, 1e7), st.booleans())
def test_any_measurements_are_printed(measured: Any, candidate: Any, mtbf: float | None, cached: bool) -> None:
    costs = Costs(in_flight=2, write_seconds=1.0, durable_seconds=0.5, cost_seconds=0.1, restore_seconds=0.2)
    text = render("here", measured, BASE, candidate.options, advise(costs, 0.03, 0.1, mtbf), (2, 3), cached)
    assert f"{candidate.name}={candidate.value}" in text and ("Young" in text) == (mtbf is not None)
    assert ("by an earlier call" in text) == cached
    for trial in measured.trials:
        assert trial.cause in text


@given(st.floats(0, 1e9))
def test_a_duration_has_a_unit(seconds: float) -> None:
    assert duration(seconds).split()[1] in ("us", "ms", "s", "min", "h")
