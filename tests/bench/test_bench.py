"""The benchmark: a tiny run reports everything, and its reports follow from its samples.

Nothing here depends on durations.  The run is of a few megabytes, the engine and torch.save.  The goals are computed
from made-up samples, one met and one missed for each.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.bench import (
    charts,
    compare,
    footprint,
    goals,
    guards,
    limits,
    measure,
    monitored,
    report,
    slowdown,
    states,
    threads,
    throughput,
    unchanged,
)
from engine.bench.__main__ import QUICK, SECTIONS, main
from engine.bench.device_limit import limited
from engine.bench.loaders import LOADERS, OursLoader, SafetensorsLoader
from engine.bench.noise import GROUP_MAX, chance, spread
from engine.bench.record import FORMAT, Record, Sample, Subject, decode, encode, values
from engine.bench.savers import SAVERS, Ours, OursWhole, Pending, Safetensors, Saver, TorchSave

PEERS, LOADING_PEERS = ("torch.save", "safetensors"), ("safetensors",)
PNG = b"\x89PNG\r\n\x1a\n"

finite = st.floats(min_value=0.001, max_value=1000)
groups = st.lists(finite, min_size=1, max_size=5)


def make_record(samples: list[Sample] | None = None) -> Record:
    return Record(
        command="python -m engine.bench",
        date="2026-01-01 00:00 UTC",
        commit="abc",
        host={"processor": "any"},
        main_bytes=10**9,
        main_count=148,
        staging_bytes=256 << 20,
        subjects=[Subject("engine", "save", "as it is"), Subject("torch.save", "save", "as it is")],
        samples=samples or [],
    )


def sample(section: str, subject: str, setting: str = "", number: int = 0, **measured: float) -> Sample:
    return Sample(section, subject, 10**9, 148, setting, number, measured)


# -- a tiny run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record, str]:
    """The files, the record and the output of a tiny run."""
    place = tmp_path_factory.mktemp("bench")
    docs = place / "docs"
    docs.mkdir()
    begin, end = report.MARKERS
    (docs / "perf.md").write_text(f"# Before\n\n{begin}What was measured before.\n{end}\nAfter.\n", encoding="utf-8")
    (docs / "perf").mkdir()
    command = [sys.executable, "-m", "engine.bench", "--quick", "--size", "2", "--rounds", "1"]
    what = ["--only", "engine,torch.save,memcpy", "--sections", "limit,main,load,flight"]
    what += ["--directory", str(place / "runs")]
    where = ["--output", str(place / "output"), "--publish", str(docs)]
    done = subprocess.run([*command, *what, *where], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place, decode((place / "output/record.json").read_text(encoding="utf-8")), done.stdout


def test_a_run_prints_every_table(run: tuple[Path, Record, str]) -> None:
    _, _, printed = run
    for title in ("Goals", "The limit", "Saving 2 MB in 148 tensors", "Restoring 2 MB", "Saves one after the other"):
        assert f"\n{title}" in f"\n{printed}", title
    assert "torch.save(tensors, path), fsync of file and directory" in printed


def test_a_run_records_every_sample_that_was_asked_for(run: tuple[Path, Record, str]) -> None:
    _, record, _ = run
    assert {(s.section, s.subject) for s in record.samples} == {
        *(("save", "engine"), ("save", "torch.save"), ("first", "engine"), ("first", "torch.save")),
        *(("limit", "memcpy"), ("load", "engine"), ("part", "engine"), ("flight", "engine")),
        ("ours", "engine"),
    }
    ours = {s.setting: set(s.values) for s in record.select("ours")}
    assert set(ours) == {goals.RECYCLED, goals.FIRST, goals.RESTORED, goals.PART, goals.LOOK}
    assert "durable_s" in ours[goals.FIRST] and "read_bytes" in ours[goals.PART]
    for each in record.select("save"):
        assert 0 < each.values["held_s"] <= each.values["staged_s"] <= each.values["durable_s"]
        assert each.values["cpu_s"] > 0
    [save] = record.select("save", "engine")
    assert save.values["stats.io_bytes"] >= 2 * 10**6, "the engine's own counters are in its samples"
    assert (record.main_bytes, record.main_count) == (2 * 10**6, 148)


def test_the_fewest_and_the_most_tensors_alternate(tmp_path: Path) -> None:
    scales = replace(QUICK, tensors_bytes=10**5, tensor_counts=(2, 5, 9), rounds=2, scale_rounds=1)
    rounds = measure.Rounds(make_record(), tmp_path, ["engine"])
    SECTIONS["tensors"](rounds, scales)
    taken = [(s.tensor_count, s.section, s.setting) for s in rounds.record.samples]
    assert taken[:2] == [(5, "tensors", ""), (5, "tensors", "first")]
    ends = [(count, *what) for count in (2, 9) for what in (("looks", ""), ("tensors", ""), ("tensors", "first"))]
    for start in (2, 8):
        assert sorted(taken[start : start + 6]) == ends
        assert [count for count, *_ in taken[start : start + 6]] == [2, 2, 2, 9, 9, 9]
    assert list(tmp_path.iterdir()) == []


def test_trainings_that_change_little_are_saved_in_every_way(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path)
    unchanged.measure(rounds, 2 * 10**6, 1, 0, lambda: None)
    ways = {s.setting: s.values for s in rounds.record.select("unchanged", "engine")}
    assert set(ways) == {f"{training}, {way}" for training in unchanged.TRAININGS for way in unchanged.WAYS}
    for setting, measured in ways.items():
        training, _, way = setting.rpartition(", ")
        total = ways[f"{training}, rewritten"]["stats.io_bytes"]
        assert measured["stats.io_bytes"] == (total if way == "rewritten" else measured["changed_bytes"]), setting
        assert (measured["changed_bytes"] == 0) == (training == goals.ALL_FROZEN)
    [table] = [t for t in report.tables(rounds.record, []) if t.title == "Trainings that change little"]
    assert len(table.rows) == len(ways)


def test_every_number_of_staging_threads_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TMPFS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    rounds = measure.Rounds(make_record(), tmp_path)
    nbytes = 9 * 10**6
    threads.measure(rounds, nbytes, 2, 60)
    found = rounds.record.samples
    whats = (goals.NULL, goals.COPY, goals.TMPFS_SAVE, goals.TMPFS_RESTORE)
    assert sorted(s.setting for s in found) == sorted(f"{what}, {count}" for what in whats for count in (1, 1, 2, 2))
    for each in found:
        assert each.values["seconds_s"] > 0
        if each.setting.startswith((goals.NULL, goals.TMPFS_SAVE)):
            assert each.values["copying_s"] > 0
    [table] = [t for t in report.tables(rounds.record, []) if t.title.startswith("Staging threads")]
    assert len(table.rows) == 8
    assert not rounds.record.notes and list(tmp_path.iterdir()) == []


def test_a_tmpfs_without_room_is_left_out_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "TMPFS", tmp_path / "missing")
    rounds = measure.Rounds(make_record(), tmp_path)
    threads.measure(rounds, 9 * 10**6, 1, 60)
    assert {s.setting.partition(",")[0] for s in rounds.record.samples} == {goals.NULL, goals.COPY}
    assert len(rounds.record.notes) == 1


def test_a_monitored_save_stands_beside_one_without(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path)
    monitored.measure(rounds, 10**6, 4, 2, 1, seconds=0)
    found = {s.setting: s.values for s in rounds.record.select("monitor", goals.OURS)}
    assert found.keys() == {goals.IN_PROCESS, goals.MONITORED}
    assert all(each["durable_s"] >= each["held_s"] > 0 and each["cpu_s"] > 0 for each in found.values())
    [table] = [t for t in report.tables(rounds.record, []) if "monitor" in t.title]
    assert [row[0] for row in table.rows] == [goals.IN_PROCESS, goals.MONITORED]
    told = {o.what: o.met for o in goals.outcomes(rounds.record, [], [])}
    assert told["with a monitor beside without: durable"] is not None


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training of `slowdown`, so small that a step takes no time."""
    for name, value in {"WIDTH": 8, "LAYERS": 1, "HEADS": 2, "CONTEXT": 4, "STEPS_ASIDE": 1}.items():
        monkeypatch.setattr(slowdown, name, value)


@pytest.mark.usefixtures("small_training")
def test_each_guard_has_its_calls_steps_and_trainings(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path)
    threads = torch.get_num_threads()
    guards.measure(rounds, 2 * 10**6, 148, 1, seconds=0, intervals=(1, 25))
    assert torch.get_num_threads() == threads
    names = {
        subject.name for subject in rounds.record.subjects if (subject.kind, subject.unavailable) == ("guard", None)
    }
    assert "engine fence" in names
    for name in names:
        found = {s.setting: s.values for s in rounds.record.select("guards", name)}
        assert found.keys() >= {goals.CALL, "every 1", "every 25"}
        assert set(found[goals.CALL]) >= {"held_s", "staged_s", "durable_s", "stats.copying_ns"}
        steps = {setting for setting in found if setting.startswith("step ")}
        assert len(steps) == 6 and all(found[setting]["step_s"] > 0 for setting in steps)
    calls = rounds.record.select("guards", setting=goals.CALL)
    assert {s.tensor_count for s in calls} == {148}, "each of 37 parameters has two moments and a count"
    assert rounds.record.select("guards", guards.NOBODY, setting="every 1")[0].values["excess_s"] is not None
    steps_table, trainings_table = (table for table in report.tables(rounds.record, []) if "guard" in table.title)
    assert [row[0] for row in steps_table.rows] == [
        name for guard in goals.GUARDS for name in [f"engine {guard}"] * 2 if name in names
    ]
    assert {row[0] for row in trainings_table.rows} == names | {guards.NOBODY}
    assert trainings_table.heads[1:3] == ("every 1", "every 25")


@pytest.mark.usefixtures("small_training")
def test_a_guard_that_is_refused_has_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **options: object) -> engine.Engine:
        if options.get("guard") != "fence":
            raise engine.PlatformError("userfaultfd(2) is refused", "allow it")
        return opened(*_, **options)  # type: ignore[arg-type]

    opened = engine.Engine
    monkeypatch.setattr(engine, "Engine", refused)
    rounds = measure.Rounds(make_record(), tmp_path)
    guards.measure(rounds, 10**5, 4, 1, seconds=0, intervals=(1,))
    table = next(table for table in report.tables(rounds.record, []) if "guard" in table.title)
    assert [row[0] for row in table.rows] == ["engine cow", "engine detect", "engine fence", "engine fence"]
    assert "userfaultfd(2) is refused" in table.rows[0][1]


def test_the_throughput_of_a_training_is_measured_by_interval_and_saves_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that does not let the drive be limited has the rows of the drive as it is, and a note."""

    def refuse(_directory: Path, _limit: int) -> AbstractContextManager[None]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(throughput, "limited", refuse)
    monkeypatch.setattr(throughput, "STEP_COUNT", 2)
    monkeypatch.setattr(throughput, "WARM_UP", 1)
    rounds = measure.Rounds(make_record(), tmp_path)
    throughput.measure(rounds, (1, 3), (1, 2), 2, seconds=0)
    assert [s.setting for s in rounds.record.select("throughput", goals.ADOPTED)] == [throughput.AS_IT_IS] * 2
    found = {s.setting: s.values for s in rounds.record.select("throughput", goals.OURS)}
    assert set(found) == {f"{throughput.AS_IT_IS}, {n} in flight, every {i}" for n in (1, 3) for i in (1, 2)}
    assert all(0 < each["held_s"] < 2 * each["step_s"] and each["durable_s"] > 0 for each in found.values())
    assert rounds.record.notes == [f"{throughput.LIMITED}: not measured, Permission denied"]
    assert goals.interval_axes(rounds.record) == ([throughput.AS_IT_IS], [1, 3], [1, 2])
    [table] = [t for t in report.tables(rounds.record, []) if t.title.startswith("Training throughput")]
    assert [row[0] for row in table.rows] == [f"{throughput.AS_IT_IS}, max_async={n}" for n in (1, 3)]


def test_a_throughput_is_a_share_of_the_steps_without_checkpoints_of_its_round() -> None:
    def at(setting: str, subject: str, number: int, step_s: float) -> Sample:
        return Sample("throughput", subject, 1, 1, setting, number, {"step_s": step_s})

    every = "a drive, 2 in flight, every 5"
    samples = [at("a drive", goals.ADOPTED, 0, 1), at("a drive", goals.ADOPTED, 0, 3), at(every, goals.OURS, 0, 4)]
    samples += [at("a drive", goals.ADOPTED, 1, 10), at(every, goals.OURS, 1, 10)]
    assert goals.throughputs(make_record(samples), "a drive", 2, 5) == [0.5, 1.0]


def test_a_limit_on_the_drive_is_lifted_again(tmp_path: Path) -> None:
    """Where the host allows one; elsewhere the refusal leaves nothing either."""
    before = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    with suppress(OSError), limited(tmp_path, 10**9):
        assert Path("/proc/self/cgroup").read_text(encoding="utf-8") != before
    assert Path("/proc/self/cgroup").read_text(encoding="utf-8") == before
    assert not [*Path("/sys/fs/cgroup").glob("engine-bench-*"), *Path("/sys/fs/cgroup").glob("*/engine-bench-*")]


def test_a_run_describes_the_host_and_does_not_name_it(run: tuple[Path, Record, str]) -> None:
    place, record, _ = run
    assert {"processor", "cores", "memory", "kernel", "file system", "device", "torch", "fio", "backend"} <= set(
        record.host
    )
    text = encode(record)
    assert str(place) not in text and os.uname().nodename not in record.host.values()
    assert "--directory" not in record.command and "--size 2" in record.command


def test_the_json_has_the_documented_shape(run: tuple[Path, Record, str]) -> None:
    place, record, _ = run
    read = json.loads((place / "output/record.json").read_text(encoding="utf-8"))
    assert read["format"] == FORMAT
    assert set(read["samples"][0]) == {"section", "subject", "nbytes", "tensor_count", "setting", "round", "values"}
    assert set(read["subjects"][0]) == {"name", "kind", "how", "unavailable"}
    assert decode(encode(record)) == record


def test_a_run_draws_the_charts_that_it_has_samples_for(run: tuple[Path, Record, str]) -> None:
    place, _, _ = run
    for directory in (place / "output", place / "docs/perf"):
        drawn = {path.name: path.read_bytes() for path in directory.glob("*.png")}
        assert set(drawn) == {"saving.png", "holding.png", "restoring.png"}
        assert all(content.startswith(PNG) and len(content) > 10_000 for content in drawn.values())


def test_a_run_is_published_between_the_markers(run: tuple[Path, Record, str]) -> None:
    place, record, _ = run
    page = (place / "docs/perf.md").read_text(encoding="utf-8")
    assert page.startswith("# Before\n") and page.endswith("\nAfter.\n") and "What was measured before" not in page
    assert record.command in page and "![saving](perf/saving.png)" in page and "| torch.save |" in page
    [line] = (place / "docs/perf/history.jsonl").read_text(encoding="utf-8").splitlines()
    history = json.loads(line)
    assert set(history["durable_s"]) == {"engine", "torch.save"} and history["commit"] == record.commit


def test_a_record_is_published_again_without_a_second_line(run: tuple[Path, Record, str], tmp_path: Path) -> None:
    place, _, _ = run
    docs = tmp_path / "docs"
    shutil.copytree(place / "docs", docs)
    assert main(["--from", str(docs / "perf/record.json"), "--publish", str(docs)]) == 0
    for name in ("perf.md", "perf/record.json", "perf/history.jsonl"):
        assert (docs / name).read_bytes() == (place / "docs" / name).read_bytes(), name


def test_nothing_is_left_behind(run: tuple[Path, Record, str]) -> None:
    place, _, _ = run
    assert list((place / "runs").iterdir()) == []


def test_an_unknown_section_is_refused() -> None:
    with pytest.raises(SystemExit, match="there is no section nothing"):
        main(["--sections", "nothing"])


# -- peers -------------------------------------------------------------------------------------------------------------


class Broken(TorchSave):
    """A peer that does not work here."""

    name = "broken"

    def save(self, step: int) -> Pending:
        raise OSError(f"nothing works below {self.directory}")


class Failing(TorchSave):
    """A peer that works until it has been warmed up."""

    name = "failing"

    def save(self, step: int) -> Pending:
        if step > 2:
            raise OSError("no more")
        return super().save(step)


def test_a_peer_that_is_not_installed_or_fails_gets_a_row_with_the_reason(tmp_path: Path) -> None:
    class Missing(TorchSave):
        name = "missing"
        packages = ("no_such_package",)

    rounds = measure.Rounds(make_record(), tmp_path)
    rounds.record.subjects.clear()
    opened = rounds.open_savers((Missing, Broken, TorchSave), states.make_state(10**9 // 10**5, 2, adopted=False), 1)
    assert list(opened) == ["torch.save"]
    why = {subject.name: subject.unavailable for subject in rounds.record.subjects}
    assert why["missing"] is not None and "no_such_package" in why["missing"]
    assert why["broken"] == "OSError: nothing works below DIR/broken" and why["torch.save"] is None
    text = "".join(report.terminal(table) for table in report.tables(rounds.record, []))
    assert "No module named 'no_such_package'" in text and "nothing works below" in text


def test_a_peer_that_fails_midway_is_dropped_and_the_others_continue(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path)
    state = states.make_state(10_000, 2, adopted=False)
    opened = rounds.open_savers((Failing, TorchSave), state, 3)
    turns = {(name, ""): lambda saver=saver: measure.timed_save(saver) for name, saver in opened.items()}
    out = rounds.run("save", turns, (10_000, 2), range(3), seconds=60)
    assert out == {("failing", "")}
    assert [s.round for s in rounds.record.select("save", "torch.save")] == [0, 1, 2]
    assert len(rounds.record.select("save", "failing")) == 1, "peers recycle nothing, and have been warmed up once"
    assert rounds.record.notes == ["failing failed later: OSError: no more"]


# The parts of fio that matter here: it writes whole blocks only, and makes a file anew that is too short.
LIKE_FIO = """#!{python}
import json, os, sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
path, size, block = options["filename"], int(options["size"]), int(options["bs"])
if options["rw"] == "write":
    if os.path.exists(path) and os.path.getsize(path) < size:
        os.unlink(path)
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(bytes(size // block * block))
done = {{"runtime": 100, "io_bytes": size // block * block}}
print(json.dumps({{"jobs": [{{options["rw"]: done}}]}}))
"""


@pytest.fixture
def like_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> measure.Rounds:
    """Rounds on a host where fio is that."""
    (tmp_path / "fio").write_text(LIKE_FIO.format(python=sys.executable))
    (tmp_path / "fio").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "place").mkdir()
    return measure.Rounds(make_record(), tmp_path / "place")


@pytest.mark.parametrize("nbytes", [10_000_000, 2_000_000], ids=["no whole number of blocks", "less than a block"])
def test_fio_writes_to_existing_files(like_fio: measure.Rounds, nbytes: int) -> None:
    for turn in limits.fio_turns(like_fio, nbytes, goals.JOBS, {}).values():
        for _ in range(3):
            assert turn()["seconds_s"] > 0  # or it would have raised
    kept = [path.stat().st_size for path in like_fio.directory.glob("*/*")]
    assert len(kept) == 4 * (1 + 1), "one that is overwritten, and one that is read, for each shape"
    assert min(kept) >= nbytes


def test_fio_alternates_between_its_lent_files(like_fio: measure.Rounds) -> None:
    """Each of its jobs with all of them, and in one round with different ones."""
    state = states.make_state(10_000_000, 3, plain=False)
    saver = Ours(like_fio.directory / "ours", state)
    try:
        for _ in range(3):
            measure.timed_save(saver)
        inodes = [path.stat().st_ino for path in saver.data_files()]
        assert len(set(inodes)) == 3
        lent = {goals.OVERWRITTEN: saver.data_files}
        first, second = limits.fio_turns(like_fio, 10_000_000, ["overwritten"], lent, [(4, 4), (4, 16)]).values()
        written: list[int] = []
        with mock.patch.object(limits, "_job", lambda path, *_: written.append(path.stat().st_ino)):
            for _ in range(4):
                first()
                second()
                measure.timed_save(saver)  # which renames them
        assert [inodes.index(each) for each in written] == [0, 1, 1, 2, 2, 0, 0, 1]
        assert [path.stat().st_ino for path in saver.data_files()] == inodes, "and they are still recycled"
        assert not list(like_fio.directory.glob("fio-*")), "it has made no other files"
    finally:
        saver.close()


def test_fio_reads_the_files_that_the_engine_restores(like_fio: measure.Rounds) -> None:
    loader = OursLoader(like_fio.directory / "load", states.make_state(10_000_000, 3, plain=False))
    try:
        [path] = loader.data_files()
        assert path in loader.files() and path.stat().st_size >= 10_000_000
    finally:
        loader.close()


def test_a_subject_with_few_rounds_does_not_shorten_the_others(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path)
    rounds.introduce("one", "save", "")
    turns = {("one", ""): measure.few(lambda: {"seconds_s": 1.0}, 2), ("two", ""): lambda: {"seconds_s": 2.0}}
    rounds.run_together({"save": turns}, (1, 1), range(4), seconds=60)
    assert [s.round for s in rounds.record.select("save", "one")] == [0, 1]
    assert [s.round for s in rounds.record.select("save", "two")] == [0, 1, 2, 3]
    assert rounds.record.notes == [] and rounds.record.subjects[0].unavailable is None, "it has not failed"


def test_fio_replacing_a_lent_file_is_detected(like_fio: measure.Rounds) -> None:
    [turn] = limits.fio_turns(like_fio, 10_000_000, ["overwritten"], {}, [(4, 4)]).values()
    [path] = like_fio.directory.glob("*/*")
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="made one anew"):
        turn()


def test_every_goal_of_fio_has_a_job_beside_a_copy(like_fio: measure.Rounds) -> None:
    turns = limits.limit_turns(like_fio, 10_000_000, {})
    assert {setting.partition(", ")[0] for name, setting in turns if name == "fio"} == set(goals.LIMITS)
    beside = turns["fio", "overwritten beside a copy, 4 MiB x 16"]
    assert beside()["seconds_s"] == beside()["seconds_s"] == turns["fio", "overwritten, 4 MiB x 16"]()["seconds_s"]
    assert turns["memcpy", "one thread"]()["seconds_s"] > 0


def test_a_small_read_is_all_or_nothing(like_fio: measure.Rounds) -> None:
    [turn] = limits._pread_turn(like_fio, {}).values()
    [path] = like_fio.directory.iterdir()
    assert turn()["seconds_s"] > 0 and path.stat().st_size == goals.PART_BLOCKS * goals.BLOCK_BYTES
    os.truncate(path, goals.BLOCK_BYTES)
    with pytest.raises(OSError, match="has read 4194304 of 8388608 bytes"):
        turn()


@pytest.mark.parametrize("looking", [True, False])
def test_a_copy_is_made_once_in_a_period_and_read_on_request(looking: bool) -> None:
    copy = limits._Copy(limits.huge_pages(100_000))
    expected = ["make", "look"] if looking else ["make"]
    done: list[str] = []
    all_done = threading.Event()

    def note(what: str) -> None:
        done.append(what)
        if len(done) == len(expected):
            all_done.set()

    with (
        mock.patch.object(copy, "make", lambda: note("make")),
        mock.patch.object(copy, "look", lambda: note("look")),
        copy.every(3600, looking=looking),
    ):
        assert all_done.wait(60)
    assert done == expected


def test_a_missing_copy_is_detected() -> None:
    copy = limits._Copy(limits.huge_pages(100_000))
    copy.make()
    copy.look()
    ctypes.memset(copy._target, 0, 1)
    with pytest.raises(AssertionError, match="not what was copied"):
        copy.look()


def test_a_copy_that_fails_fails_the_job_beside_it() -> None:
    copy = limits._Copy(limits.huge_pages(100_000))
    with (
        pytest.raises(ZeroDivisionError),
        mock.patch.object(copy, "make", lambda: 1 // 0),
        copy.every(1.0, looking=True),
    ):
        pass


def test_a_missing_fio_gets_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    rounds = measure.Rounds(make_record(), tmp_path)
    assert limits.fio_turns(rounds, 4096, goals.JOBS, {}) == {}
    [row] = [subject for subject in rounds.record.subjects if subject.name == "fio"]
    assert row.unavailable is not None and "not installed" in row.unavailable


@pytest.mark.parametrize("kind", [TorchSave, Safetensors, Ours], ids=lambda kind: kind.name)
def test_two_checkpoints_are_kept_and_hold_the_state(kind: type[Saver], tmp_path: Path) -> None:
    state = states.make_state(100_000, 3)
    saver = kind(tmp_path / "saves", state)
    for _ in range(4):
        measure.timed_save(saver)
    saver.close()
    kept = sorted(path for path in (tmp_path / "saves").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    path = kept[-1] / "model.safetensors" if kept[-1].is_dir() else kept[-1]
    read = torch.load(path, weights_only=True) if kind is TorchSave else load_file(path)
    assert set(read) == set(state.tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in state.tensors.items())


@pytest.mark.parametrize("kind", [OursLoader, SafetensorsLoader], ids=lambda kind: kind.name)
def test_a_load_puts_back_what_was_saved(kind: type[OursLoader | SafetensorsLoader], tmp_path: Path) -> None:
    state = states.make_state(100_000, 3)
    loader = kind(tmp_path / "load", state)
    live = state.arena.state_dict() if kind is OursLoader and state.arena is not None else dict(state.tensors)
    saved = {name: tensor.clone() for name, tensor in live.items()}

    def changed(load: Callable[[], object]) -> set[str]:
        """The tensors that are not as saved after being overwritten and then loaded."""
        for tensor in live.values():
            tensor.zero_()
        measured = measure.timed_load(load, loader.files())
        assert measured["ready_s"] > 0
        return {name for name, tensor in live.items() if not torch.equal(tensor, saved[name])}

    assert changed(loader.load) == set()
    assert changed(lambda: loader.load_part("layers.1")) == {"layers.0.weight", "layers.2.weight"}
    loader.close()


def test_names_are_unique_and_usable_on_the_command_line() -> None:
    for kinds in (SAVERS, LOADERS):
        names = [kind.name for kind in kinds]
        assert len(set(names)) == len(names) and not any("," in name for name in names)


@pytest.mark.parametrize("kind", [Ours, TorchSave], ids=lambda kind: kind.name)
def test_memory_counts_bytes_beyond_the_state(kind: type[Saver], tmp_path: Path) -> None:
    """The engine needs its staging, and torch.save nothing beyond its process.

    Without the right to lock so much memory slots are not pinned, and only their written pages count.
    """
    rounds = measure.Rounds(make_record(), tmp_path)
    state_bytes, staging_bytes = 8 << 20, (256 << 20) if kind is Ours else 0
    [turn] = footprint.turns(rounds, state_bytes, 4, (kind.name,)).values()
    peak_bytes = turn()["peak_bytes"]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    pinned = os.geteuid() == 0 or limit == resource.RLIM_INFINITY or limit >= staging_bytes
    least_bytes = staging_bytes if pinned else min(staging_bytes, state_bytes)
    assert least_bytes * 0.95 <= peak_bytes < staging_bytes + (64 << 20)


# -- states ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 3000))
@settings(max_examples=30, deadline=None)
def test_a_state_has_its_bytes_in_its_tensors(tensor_count: int, units: int) -> None:
    nbytes = 4 * (tensor_count + units)
    tensors = states.make_tensors(nbytes, tensor_count)
    assert len(tensors) == tensor_count and sum(tensor.nbytes for tensor in tensors.values()) == nbytes
    sizes = {len(tensor) for tensor in tensors.values()}
    assert max(sizes) - min(sizes) <= 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == tensor_count


def test_a_state_longer_than_the_pattern_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "PATTERN_COUNT", 10)
    joined = torch.cat(list(states.make_tensors(4 * 25, 3).values()))
    assert torch.equal(joined[:10], joined[10:20]) and torch.equal(joined[:5], joined[20:])


def test_the_adopted_state_is_the_same_numbers() -> None:
    state = states.make_state(10_000, 7)
    assert state.arena is not None and state.arena.fenced and not state.arena.unfenced
    adopted = state.arena.state_dict()
    assert set(adopted) == set(state.tensors)
    assert all(torch.equal(adopted[name], tensor) for name, tensor in state.tensors.items())


# -- statistics --------------------------------------------------------------------------------------------------------


@given(st.lists(finite, min_size=1, max_size=30))
def test_quartiles_are_within_the_samples(numbers: list[float]) -> None:
    low, middle, high = spread(numbers)
    assert min(numbers) <= low <= middle <= high <= max(numbers)
    assert middle == pytest.approx(median(numbers))


@given(groups, groups)
@settings(deadline=None)
def test_chance_is_a_probability_and_symmetric(first: list[float], second: list[float]) -> None:
    likely = chance(first, second)
    assert 0 < likely <= 1
    assert chance(second, first) == pytest.approx(likely)
    assert chance(sorted(first), second) == likely


@given(groups)
@settings(deadline=None)
def test_equal_groups_do_not_differ(numbers: list[float]) -> None:
    assert chance(numbers, numbers) == 1


@pytest.mark.parametrize(("count", "expected"), [(3, 2 / 20), (4, 2 / 70), (6, 2 / 924)])
def test_disjoint_groups_have_the_least_possible_chance(count: int, expected: float) -> None:
    """Of all ways to divide the numbers, this one and its mirror image."""
    assert chance([float(i) for i in range(count)], [1000.0 + i for i in range(count)]) == pytest.approx(expected)


def test_groups_too_large_to_enumerate_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 9"):
        chance([1.0] * (GROUP_MAX + 1), [1.0])
    with pytest.raises(ValueError, match="groups of 0"):
        chance([], [1.0])


# -- goals -------------------------------------------------------------------------------------------------------------


def outcome(record: Record, what: str) -> goals.Outcome:
    """The goal of this name, or the only one whose name begins with it."""
    outcomes = goals.outcomes(record, PEERS, LOADING_PEERS)
    [found] = [each for each in outcomes if each.what == what] or [e for e in outcomes if e.what.startswith(what)]
    return found


def test_the_stand_in_replaces_the_engine_in_a_goal() -> None:
    record = make_record()
    record.samples += [
        sample("ours", "engine", "recycled", durable_s=0.2),
        sample("ours", "engine", "restored", ready_s=0.4),
        sample("ours", "engine", "one layer", ready_s=0.02, read_bytes=2 * goals.BLOCK_BYTES + 5000),
        sample("limit", "fio", "overwritten, 4 MiB x 4", seconds_s=0.1),
        sample("limit", "fio", "overwritten, 1 MiB x 16", seconds_s=0.12),
        sample("limit", "fio", "overwritten beside a copy, 1 MiB x 16", seconds_s=0.15),
        sample("limit", "fio", "overwritten beside a copy, 4 MiB x 16", seconds_s=0.19),
        sample("save", "engine", held_s=0.002, durable_s=0.2),
        sample("save", "torch-checkpointing", held_s=0.001, durable_s=0.9),
        sample("ours", "engine", "look", seconds_s=0.0015),
        sample("limit", "pread", "2 blocks", seconds_s=0.01),
    ]
    found = {
        "durable throughput, recycled": (0.5, 0.12 / 0.15),  # of fio's settings, those that there are of both
        "durable, against torch-checkpointing": (4.5, 6.0),
        "loop held, beside torch-checkpointing": (2.0, 1.5),
        "one layer: share": (0.05 / (8393608 / 1e9), 0.025 / (8393608 / 1e9)),
    }
    for what, (measured, standin) in found.items():
        each = outcome(record, what)
        assert each.measured == pytest.approx(measured) and each.standin == pytest.approx(standin), what
    assert outcome(record, "restore, cold, beside fio").standin is None
    record.samples.append(sample("ours", "engine", "one layer", ready_s=0.02, read_bytes=goals.BLOCK_BYTES))
    record.samples.append(sample("ours", "engine", "one layer", ready_s=0.02, read_bytes=goals.BLOCK_BYTES))
    assert outcome(record, "one layer: share").standin is None, "two blocks are no stand-in for a tensor within one"


def test_without_samples_no_goal_is_met_or_missed() -> None:
    outcomes = goals.outcomes(make_record(), PEERS, LOADING_PEERS)
    assert len(outcomes) >= 15
    assert {each.verdict for each in outcomes} == {"not measured"}


@pytest.mark.parametrize(
    ("what", "samples", "measured", "verdict"),
    [
        pytest.param(
            "durable throughput, recycled",
            [
                sample("ours", "engine", "recycled", durable_s=0.2),
                sample("limit", "fio", "overwritten, 1 MiB x 4", seconds_s=0.19),
            ],
            0.95,
            "met",
            id="throughput met",
        ),
        pytest.param(
            "durable throughput, recycled",
            [
                sample("ours", "engine", "recycled", durable_s=0.2),
                sample("save", "engine", durable_s=0.1),
                sample("limit", "fio", "overwritten, 1 MiB x 4", seconds_s=0.19),
                sample("limit", "fio", "overwritten, 4 MiB x 4", seconds_s=0.1),
                sample("limit", "fio", "overwritten beside a copy, 4 MiB x 4", seconds_s=0.01),
                sample("limit", "fio", "fresh, 4 MiB x 4", seconds_s=0.01),
            ],
            0.5,
            "missed",
            id="the best of fio's settings counts, of that kind, and ours in the same rounds",
        ),
        pytest.param(
            "durable, against torch.save",
            [sample("save", "engine", durable_s=0.1), sample("save", "torch.save", durable_s=0.39)],
            3.9,
            "missed",
            id="peer missed",
        ),
        pytest.param(
            "loop held, beside DCP async_save",
            [sample("save", "engine", held_s=0.001), sample("save", "DCP async_save", held_s=0.2)],
            0.005,
            "met",
            id="held met",
        ),
        pytest.param(
            "CPU seconds per GB",
            [
                sample("save", "engine", cpu_s=0.3),
                sample("save", "torch.save", cpu_s=1.0),
                sample("save", "safetensors", cpu_s=0.5),
            ],
            0.6,
            "missed",
            id="the best peer counts",
        ),
        pytest.param(
            "arena free again",
            [
                sample("limit", "memcpy", "one thread", seconds_s=0.05),
                sample("ours", "engine staged whole", "recycled", staged_s=0.0625),
            ],
            0.8,
            "met",
            id="staging met",
        ),
        pytest.param(
            "peak extra memory",
            [sample("memory", "engine", peak_bytes=(256 + 17) << 20)],
            17,
            "missed",
            id="memory missed",
        ),
        pytest.param(
            "training slowdown, a checkpoint",
            [
                sample("slowdown", "engine", "every 10", excess_s=0.03, step_s=0.1, rest_s=0),
                sample("slowdown", "engine", "every 10", excess_s=0.01, step_s=0.1, rest_s=0),
                sample("slowdown", "engine", "every 10", number=1, excess_s=0.03, step_s=0.2, rest_s=0),
                sample("slowdown", "engine", "every 1", excess_s=0.02, step_s=0.1, rest_s=0),
            ],
            100 * (0.02 / 1 + 0.03 / 2) / 2,
            "met",
            id="what a checkpoint costs in its period of steps",
        ),
        pytest.param(
            "training slowdown every 5",
            [
                sample("slowdown", "engine", "every 5", excess_s=0.25, step_s=0.1, rest_s=0),
                sample("slowdown", "torch.save", "every 5", excess_s=0.2, step_s=0.1, rest_s=0),
                sample("slowdown", "safetensors", "every 5", excess_s=0.35, step_s=0.1, rest_s=0),
            ],
            -10,
            "missed",
            id="one peer is less in the way",
        ),
        pytest.param(
            "training slowdown every 10 (and so every 25 and 100)",
            [
                sample("slowdown", "engine", "every 10", excess_s=0.05, step_s=0.1, rest_s=0),
                sample("slowdown", "torch.save", "every 10", excess_s=0.25, step_s=0.1, rest_s=0),
            ],
            (0.25 - 0.05) / (10 * 0.1) * 100,
            "met",
            id="what is computed has no goal of its own",
        ),
        pytest.param(
            "restore, cold, against",
            [sample("load", "engine", ready_s=0.2), sample("load", "safetensors", ready_s=0.3)],
            1.5,
            "met",
            id="restore met",
        ),
        pytest.param(
            "one layer: blocks read",
            [sample("ours", "engine", "one layer", read_bytes=10**9 / 148 + 3 * (4 << 20))],
            3,
            "missed",
            id="three blocks too many",
        ),
        pytest.param(
            "adapters: bytes written beyond",
            [sample("unchanged", "engine", "adapters, elided", changed_bytes=1000, **{"stats.io_bytes": 1010})],
            1,
            "met",
            id="one percent more than the changed blocks",
        ),
        pytest.param(
            "all frozen: bytes written beyond",
            [sample("unchanged", "engine", "all frozen, elided", changed_bytes=0, **{"stats.io_bytes": 4 << 20})],
            100,
            "missed",
            id="one block where none has changed",
        ),
        pytest.param(
            "adapters, split: durable",
            [sample("unchanged", "engine", "adapters, split", durable_s=0.011)],
            11,
            "missed",
            id="durable late",
        ),
        pytest.param(
            "adapters, elided: CPU",
            [
                sample("unchanged", "engine", "adapters, elided", cpu_s=0.004),
                sample("unchanged", "engine", "adapters, rewritten", cpu_s=0.1),
            ],
            0.04,
            "met",
            id="a twenty-fifth of rewriting",
        ),
        pytest.param(
            "everything changed: durable",
            [
                sample("unchanged", "engine", "everything changed, elided", durable_s=0.21),
                sample("unchanged", "engine", "everything changed, rewritten", durable_s=0.2),
            ],
            1.05,
            "met",
            id="no slower where everything changes",
        ),
        pytest.param(
            "two staging threads beside one, no device",
            [
                sample("threads", "engine", f"{goals.NULL}, 1", seconds_s=0.08),
                sample("threads", "engine", f"{goals.NULL}, 2", seconds_s=0.05),
            ],
            1.6,
            "missed",
            id="a second thread that gives less than it should",
        ),
        pytest.param(
            "two staging threads beside one, no device: CPU seconds",
            [
                sample("threads", "engine", f"{goals.NULL}, 1", cpu_s=0.04),
                sample("threads", "engine", f"{goals.NULL}, 2", cpu_s=0.05),
            ],
            1.25,
            "missed",
            id="two threads that need more time together",
        ),
        pytest.param(
            "four staging threads",
            [sample("threads", "engine", f"{goals.NULL}, 4", seconds_s=0.02)],
            50,
            "met",
            id="four drives are kept busy",
        ),
        pytest.param(
            "cow: loop held by a call",
            [
                sample("guards", "engine cow", "call", held_s=0.0004),
                sample("guards", "engine fence", "call", held_s=0.1),
            ],
            0.4,
            "missed",
            id="held under cow",
        ),
        pytest.param(
            "cow: a step beside a save, what",
            [
                sample("guards", "engine cow", "call", **{"stats.copying_ns": 10**6}),
                sample("guards", "engine cow", "call, staged whole", **{"stats.copying_ns": 40 * 10**6}),
                sample("guards", "engine cow", "step alone, every core", step_s=0.08),
                sample("guards", "engine cow", "step beside a save, every core", step_s=0.9),
                sample("guards", "engine cow", "step beside a save, every core, staged whole", step_s=0.11),
                sample("guards", "engine cow", "step beside a save, one thread, staged whole", step_s=0.9),
            ],
            0.75,
            "met",
            id="a step takes longer by the staging, and no more",
        ),
        pytest.param(
            "cow: a step on one thread",
            [
                sample("guards", "engine cow", "step alone, one thread", step_s=0.1),
                sample("guards", "engine cow", "step beside a save, one thread, staged whole", step_s=0.12),
            ],
            1.2,
            "missed",
            id="a step on one thread beside a save",
        ),
        pytest.param(
            "cow: training slowdown every 5",
            [
                sample("guards", "engine cow", "every 5", step_s=0.1, excess_s=0.02, rest_s=0),
                sample("guards", "engine fence", "every 5", step_s=0.1, excess_s=0.01, rest_s=0.005),
                sample("slowdown", "engine fence", "every 5", step_s=0.1, excess_s=0.5, rest_s=0.005),
            ],
            -1,
            "missed",
            id="more than under fence",
        ),
    ],
)
def test_a_goal_is_computed_from_samples(what: str, samples: list[Sample], measured: float, verdict: str) -> None:
    found = outcome(make_record(samples), what)
    assert found.measured == pytest.approx(measured)
    assert found.verdict == verdict


def test_every_hundred_steps_is_computed_from_every_ten() -> None:
    record = make_record([sample("slowdown", "engine", "every 10", excess_s=0.5, step_s=0.1, rest_s=0)])
    assert goals.slowdown_settings(record) == ["every 10", *goals.COMPUTED]
    assert goals.slowdowns(record, "engine", "computed: every 100") == [pytest.approx(0.5 / (100 * 0.1))]
    [table] = [t for t in report.tables(record, []) if t.title.startswith("Training slowdown")]
    assert table.heads[1:4] == ("every 10", "computed: every 25", "computed: every 100")
    assert table.rows[0][1:4] == ("+50.0 %", "+20.0 %", "+5.0 %")


def test_the_steps_of_a_checkpoint_end_with_the_one_after_it_is_durable() -> None:
    """A clock that advances by one a step, by ten in steps until the save is durable, by three in the next step, and by
    two in a later one."""
    now = 0.0
    durable: Future[None] = Future()
    steps: list[int] = []

    class Saving:
        steps: ClassVar[list[int]] = []

        def path(self, step: int) -> None:
            self.steps.append(step)

        def save(self, _: int) -> Pending:
            return Pending(durable=durable)

        def tidy(self) -> None:
            pass

    def step(_: object = None) -> None:
        nonlocal now
        steps.append(len(steps))
        begun = len(steps) - (1 + slowdown.STEPS_ASIDE)  # since the first of the segment, at whose end the save begins
        if begun == 3:
            durable.set_result(None)
        now += {2: 10, 3: 10, 4: 3, 6: 2}.get(begun, 1)

    training = mock.Mock(step=step)
    with mock.patch("engine.bench.slowdown.time.perf_counter", lambda: now):
        [cost] = slowdown.segment(training, Saving(), 10, 1)  # type: ignore[arg-type]
    assert cost["step_s"] == 1 and cost["excess_s"] == (1 + 10 + 10 + 3) - 4 and cost["rest_s"] == 0
    assert len(steps) == 1 + slowdown.STEPS_ASIDE + 10 + 1 + slowdown.STEPS_ASIDE


def test_the_wait_for_an_unfinished_save_counts_only_for_measured_intervals() -> None:
    now = 0.0

    def step(_: object = None) -> None:
        nonlocal now
        now += 1

    class Late(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            nonlocal now
            now += 7

    saver = mock.Mock(steps=[1], save=lambda _: Pending(durable=Late()))
    with mock.patch("engine.bench.slowdown.time.perf_counter", lambda: now):
        [cost] = slowdown.segment(mock.Mock(step=step), saver, 10, 1)
    assert (cost["step_s"], cost["excess_s"], cost["rest_s"]) == (1, 0, 7)
    record = make_record([sample("slowdown", "engine", "every 10", 0, **cost)])
    assert goals.slowdowns(record, "engine", "every 10") == [0.7]
    assert goals.slowdowns(record, "engine", "computed: every 25") == [0]


def test_fio_is_lent_the_files_that_the_engine_overwrites_and_reads(tmp_path: Path) -> None:
    rounds = measure.Rounds(make_record(), tmp_path, ["engine"])
    scales = replace(QUICK, main_bytes=1_000_000, limit_rounds=1)
    with mock.patch.object(limits, "limit_turns", return_value={}) as limit_turns:
        SECTIONS["limit"](rounds, scales)
    assert limit_turns.call_args.args[2].keys() == {goals.OVERWRITTEN, goals.READ}
    assert {sample.setting for sample in rounds.record.select("ours", "engine")} == {
        *(goals.RECYCLED, goals.FIRST, goals.RESTORED, goals.PART),
    }


def test_the_engine_has_a_row_among_the_limits_of_its_size() -> None:
    record = make_record()
    record.samples += [
        sample("limit", "fio", "overwritten, 4 MiB x 16", seconds_s=0.5),
        sample("limit", "fio", "overwritten beside a copy, 4 MiB x 16", seconds_s=0.6),
        sample("limit", "memcpy", "one thread", seconds_s=0.1),
        sample("limit", "pread", "2 blocks", seconds_s=0.004),
        *(sample("ours", "engine", setting, durable_s=0.8, ready_s=0.4) for setting in ("recycled", "restored")),
        sample("ours", OursWhole.name, "recycled", staged_s=0.2),
        replace(sample("limit", "fio", "overwritten, 4 MiB x 16", seconds_s=4.0), nbytes=8 * 10**9),
    ]
    [table] = [t for t in report.tables(record, []) if t.title == "The limit"]
    assert [(row[0], row[1], row[2]) for row in table.rows] == [
        ("1 GB", "fio overwritten, 4 MiB x 16", "500"),
        ("1 GB", "fio overwritten beside a copy, 4 MiB x 16", "600"),
        ("1 GB", "memcpy", "100"),
        ("1 GB", "engine, recycled", "800"),
        ("1 GB", "engine, restored", "400"),
        ("1 GB", "engine staged whole, recycled", "200"),
        ("8 GB", "fio overwritten, 4 MiB x 16", "4000"),
        ("8 MB", "pread", "4"),
    ]


def test_the_goals_about_scale() -> None:
    def scaled(section: str, nbytes: int, count: int, setting: str, **measured: float) -> Sample:
        return replace(sample(section, "engine", setting, 0, **measured), nbytes=nbytes, tensor_count=count)

    record = make_record(
        [
            scaled("size", 10, 148, "", held_s=0.001, durable_s=0.01),
            scaled("size", 8000, 148, "", held_s=0.003, durable_s=2.0),
            scaled("tensors", 100, 10, "first", held_s=0.001, durable_s=0.1),
            scaled("tensors", 100, 100_000, "first", held_s=0.4, durable_s=0.5),
            scaled("tensors", 100, 100_000, "", held_s=0.05, durable_s=0.3),
            scaled("looks", 100, 100_000, "", seconds_s=0.03),
        ]
    )
    assert outcome(record, "loop held, the largest size").verdict == "missed"
    assert outcome(record, "loop held, a tensor").measured == pytest.approx(0.5)
    assert outcome(record, "loop held, a tensor").verdict == "met"
    assert outcome(record, "loop held, a tensor").standin == pytest.approx(0.3)
    plan = outcome(record, "the most tensors: a first save's plan")
    assert plan.measured == pytest.approx(20) and plan.verdict == "missed"
    assert outcome(record, "the most tensors: loop held").verdict == "missed"
    assert outcome(record, "the most tensors: loop held").standin == pytest.approx(0.3)


def test_a_missed_goal_is_missed_in_both_tables() -> None:
    record = make_record([sample("save", "engine", durable_s=0.1), sample("save", "torch.save", durable_s=0.2)])
    table = report.tables(record, goals.outcomes(record, PEERS, LOADING_PEERS))[0]
    for text in (report.terminal(table), report.markdown(table)):
        [line] = [line for line in text.splitlines() if "against torch.save" in line]
        assert "missed" in line and "2 x" in line and "met" not in line.replace("missed", "")


# -- tables and charts -------------------------------------------------------------------------------------------------


def test_every_chart_is_drawn_when_there_are_samples(tmp_path: Path) -> None:
    times: dict[str, Any] = {"held_s": 0.01, "staged_s": 0.02, "durable_s": 0.1, "cpu_s": 0.1}
    record = make_record(
        [
            *(sample("save", name, **times) for name in ("engine", "torch.save")),
            sample("load", "engine", ready_s=0.1),
            *(
                sample("slowdown", name, f"every {n}", excess_s=0.1, step_s=0.1, rest_s=0)
                for n in (1, 10)
                for name in ("engine", goals.NONE)
            ),
            *(replace(sample("size", "engine", **times), nbytes=size) for size in (10**7, 10**9)),
            *(replace(sample("tensors", "engine", **times), tensor_count=count) for count in (10, 1000)),
            sample("limit", "fio", "overwritten, 1 MiB x 4", seconds_s=0.09),
            sample("memory", "engine", peak_bytes=2e8),
            sample("throughput", goals.ADOPTED, throughput.AS_IT_IS, step_s=0.1),
            sample("throughput", "engine", f"{throughput.AS_IT_IS}, 1 in flight, every 5", step_s=0.2, durable_s=1),
        ]
    )
    record.subjects.append(Subject("engine", "load", "as it is"))
    assert charts.draw(record, tmp_path) == list(charts.CHARTS)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in charts.CHARTS)


def test_a_page_without_its_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "perf.md"
    page.write_text("# No markers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="0 times"):
        report.publish(make_record(), [], page, [])
    assert page.read_text(encoding="utf-8") == "# No markers\n"


def test_the_committed_page_has_its_markers() -> None:
    text = (Path(__file__).parents[2] / "docs/perf.md").read_text(encoding="utf-8")
    assert all(text.count(marker) == 1 for marker in report.MARKERS)


def test_json_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no record of format"):
        decode('{"format": "another/1"}')


@given(st.lists(st.dictionaries(st.sampled_from(["held_s", "cpu_s"]), finite, max_size=2), max_size=5))
def test_a_record_survives_json(measured: list[dict[str, Any]]) -> None:
    record = make_record([sample("save", "engine", number=i, **each) for i, each in enumerate(measured)])
    assert decode(encode(record)) == record
    assert values(record.samples, "held_s") == [each["held_s"] for each in measured if "held_s" in each]


# -- comparing revisions -----------------------------------------------------------------------------------------------


def runs_of(durable_s: list[float]) -> list[Record]:
    return [
        make_record(
            [
                sample("save", "engine", held_s=0.001, staged_s=0.05, durable_s=seconds),
                sample("first", "engine", durable_s=0.2),
                sample("load", "engine", ready_s=0.1),
            ]
        )
        for seconds in durable_s
    ]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([0.120, 0.121, 0.122, 0.123, 0.124, 0.125], "slower"),
        ([0.080, 0.081, 0.082, 0.083, 0.084, 0.085], "faster"),
        ([0.099, 0.140, 0.110, 0.098, 0.112, 0.108], "no difference"),
        ([0.1060, 0.1061, 0.1062, 0.1063, 0.1064, 0.1065], "slower"),
        ([0.1026, 0.1027, 0.1028, 0.1029, 0.1030, 0.1031], "no difference"),
    ],
    ids=["slower", "faster", "noise", "a little, and surely", "too little to mention"],
)
def test_a_change_is_distinguished_from_noise(after: list[float], verdict: str) -> None:
    base = [0.100, 0.101, 0.102, 0.1021, 0.1022, 0.1023]
    verdicts = compare.compare(runs_of(base), runs_of(after))
    assert verdicts["save", "durable_s"][-1] == verdict
    assert {told for key, (*_, told) in verdicts.items() if key != ("save", "durable_s")} == {"no difference"}
    assert any(verdict in line and "durable_s" in line for line in compare.describe(verdicts))


def test_only_the_public_interface_is_used() -> None:
    """The layers allow the benchmark to import "engine"; it uses public names only."""
    taken = set()
    for path in Path(measure.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "engine":
                taken.add(node.attr)
    assert {"Arena", "Engine", "probe"} <= taken <= set(engine.__all__)
