"""The command line of the benchmark: the sections to run, their scale, and the outputs of the record.

    python -m engine.bench --quick
    python -m engine.bench --output build/bench --publish docs      # make bench runs this
    python -m engine.bench --from docs/perf/record.json --publish docs

Theory of operation.  The sections run one after the other, each within its share of the time.  A fast subject gets all
its rounds, and a slow host has fewer rounds.  All files are below a temporary directory in `--directory`, which selects
the file system and device to measure, and is removed at the end.  Sizes that do not fit there, or not in memory, are
left out, and the record says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import engine
from engine.bench import (
    charts,
    footprint,
    goals,
    guards,
    host,
    limits,
    monitored,
    report,
    slowdown,
    threads,
    throughput,
    unchanged,
)
from engine.bench.limits import Lent
from engine.bench.loaders import LOADERS, LOADING_PEERS, OursLoader
from engine.bench.measure import Rounds, Turn, few, timed_load, timed_save
from engine.bench.record import Record, decode, encode
from engine.bench.savers import PEERS, SAVERS, STAGING_BYTES, Ours, OursKeeping, OursWhole, Saver
from engine.bench.states import State, make_state

MB, GB = 10**6, 10**9
MAIN_COUNT = 148  # tensors, as in the measurements that the goals were set by
LAYER = f"layers.{MAIN_COUNT // 2}"  # the one that is read without the rest
WARM_UP = 3  # saves: two are kept, so the third is the first that recycles, and the next is as all that follow
ROUNDS_WITHOUT_GOAL = 1  # of peers' first saves and fio's fresh files, which take long and are no goal

# Peers that scale as they do at any number of tensors; the others take minutes at 10,000.
SCALE_PEERS = ("engine", "torch.save", "safetensors")
# How TensorStore lays out its files is no question that a training answers.
TRAINING = ("engine", *(name for name in PEERS if name != "TensorStore files"))


@dataclass(frozen=True, slots=True)
class Scales:
    """How much of everything."""

    main_bytes: int = 500 * MB
    rounds: int = 7
    limit_rounds: int = 9  # each of fio's jobs has each of the three files that it is lent three times
    sizes: tuple[int, ...] = (10 * MB, 100 * MB, 500 * MB, 2 * GB, 8 * GB)
    peers_bytes_max: int = 500 * MB
    tensors_bytes: int = 100 * MB
    tensor_counts: tuple[int, ...] = (10, 148, 1000, 10_000, 100_000)
    flights: tuple[int, ...] = (1, 2, 3, 4)
    flight_saves: int = 8
    scale_rounds: int = 5
    intervals: tuple[int, ...] = slowdown.INTERVALS
    guard_intervals: tuple[int, ...] = guards.INTERVALS
    memory_peers: bool = True  # each is a process that imports torch, makes the state and saves four times
    slowdown_rounds: int = 7
    flight_intervals: tuple[int, ...] = throughput.INTERVALS
    flight_rounds: int = 3
    # What a section may take beyond its first round, most with a factor, some for each of their sizes: with these a run
    # on a slow host fits into the 20 minutes that there are.
    seconds: float = 60.0
    slowdown_seconds: float = 150.0
    flight_seconds: float = 90.0


QUICK = Scales(
    main_bytes=100 * MB,
    rounds=2,
    limit_rounds=2,
    sizes=(10 * MB, 100 * MB),
    tensors_bytes=20 * MB,
    tensor_counts=(10, 1000),
    flights=(1, 2),
    scale_rounds=2,
    intervals=(10,),
    guard_intervals=(1,),
    memory_peers=False,
    slowdown_rounds=1,
    flight_intervals=(1,),
    flight_rounds=1,
    seconds=15.0,
    slowdown_seconds=1.0,
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # DCP warns at each save that there is one process, which is intended.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    record = _measure(options) if options.source is None else decode(options.source.read_text(encoding="utf-8"))
    outcomes = goals.outcomes(record, PEERS, LOADING_PEERS)
    for table in report.tables(record, outcomes):
        print(report.terminal(table))
    for note in record.notes:
        print(note)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "record.json").write_text(encode(record), encoding="utf-8")
        charts.draw(record, options.output)
    if options.publish is not None:
        _publish(record, outcomes, options.publish, again=options.source is not None)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description="Measure the engine and its peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: two minutes")
    parser.add_argument("--size", type=float, metavar="MB", help="the size that most is measured at")
    parser.add_argument("--rounds", type=int, help="how many rounds of each section")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...", help="only these subjects")
    parser.add_argument("--sections", type=lambda text: text.split(","), metavar="NAME,...", help="only these")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs"), help="where to write, which is what is measured"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the record and the charts here")
    parser.add_argument(
        "--publish", type=Path, metavar="DOCS", help="write perf.md's tables and charts, and the history"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="RECORD", help="measure nothing, read this record")
    return parser


def _publish(record: Record, outcomes: list[goals.Outcome], docs: Path, *, again: bool) -> None:
    """Charts, record, tables and history of a run; the same record again makes no second line in the history."""
    perf = docs / "perf"
    drawn = charts.draw(record, perf)
    (perf / "record.json").write_text(encode(record), encoding="utf-8")
    report.publish(record, outcomes, docs / "perf.md", [f"perf/{name}" for name in drawn])
    if not again:
        with (perf / "history.jsonl").open("a", encoding="utf-8") as history:
            history.write(report.history_line(record, outcomes))


def _measure(options: argparse.Namespace) -> Record:
    scales = QUICK if options.quick else Scales()
    if options.size is not None:
        scales = replace(scales, main_bytes=int(options.size * MB))
    if options.rounds is not None:
        scales = replace(
            scales,
            rounds=options.rounds,
            limit_rounds=options.rounds,
            scale_rounds=options.rounds,
            slowdown_rounds=options.rounds,
            flight_rounds=options.rounds,
        )
    if (options.output or options.publish) and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("charts need matplotlib, which is not installed; make bench installs it")
    unknown = set(options.sections or ()) - set(SECTIONS)
    if unknown:
        raise SystemExit(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    options.directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="bench-") as place:
        record = Record(
            command=_command(options),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            commit=host.commit(),
            host={**host.describe(Path(place)), "backend": engine.probe(place).backend or "none"},
            main_bytes=scales.main_bytes,
            main_count=MAIN_COUNT,
            staging_bytes=STAGING_BYTES,
        )
        rounds = Rounds(record, Path(place), options.only)
        for name, section in SECTIONS.items():
            if options.sections is None or name in options.sections:
                print(f"{time.monotonic() - began:5.0f} s  {name}", file=sys.stderr, flush=True)
                section(rounds, scales)
    record.seconds = time.monotonic() - began
    return record


def _command(options: argparse.Namespace) -> str:
    """The command for the same run, without the directory: the host is described, not named."""
    words = ["python -m engine.bench"]
    words += ["--quick"] if options.quick else []
    words += [f"--size {options.size:g}"] if options.size is not None else []
    words += [f"--rounds {options.rounds}"] if options.rounds is not None else []
    words += [f"--only {','.join(options.only)!r}"] if options.only is not None else []
    words += [f"--sections {','.join(options.sections)}"] if options.sections is not None else []
    return " ".join(words)


# -- the sections ----------------------------------------------------------------------------------------------------


def _limit(rounds: Rounds, scales: Scales) -> None:
    """The limit at one size, and the engine in the same rounds.  No peer is in them: a drive that still works for a
    peer would add noise to the next turn."""
    nbytes, shape = scales.main_bytes, (scales.main_bytes, MAIN_COUNT)
    with ExitStack() as stack:
        ours, lent = _our_turns(rounds, scales, stack)
        limit = limits.limit_turns(rounds, nbytes, lent)
        for name, setting in limit:
            if setting.startswith(goals.FRESH):
                limit[name, setting] = few(limit[name, setting], ROUNDS_WITHOUT_GOAL)
        sections = {"ours": ours, "limit": limit}
        rounds.run_together(sections, shape, range(scales.limit_rounds), seconds=3 * scales.seconds)
    _clear(rounds)


def _our_turns(rounds: Rounds, scales: Scales, stack: ExitStack) -> tuple[dict[tuple[str, str], Turn], Lent]:
    """The turns of the engine that goals compare with the limit, and the files that are lent to fio."""
    turns: dict[tuple[str, str], Turn] = {}
    if not any(rounds.wanted(kind.name) for kind in (Ours, OursWhole)):
        return turns, {}
    state = make_state(scales.main_bytes, MAIN_COUNT, plain=False)
    savers = rounds.open_savers((Ours, OursWhole), state, WARM_UP)
    lent = _lent(savers)
    for name, saver in savers.items():
        stack.callback(saver.close)
        turns[name, goals.RECYCLED] = _save_turn(saver)
    if rounds.wanted(Ours.name):
        loader = OursLoader(rounds.directory / "load", state)
        stack.callback(loader.close)
        keeping = OursKeeping(rounds.directory / "keeping", state)
        stack.callback(keeping.close)
        turns[Ours.name, goals.FIRST] = _new_files_turn(keeping)
        turns[Ours.name, goals.RESTORED] = lambda: timed_load(loader.load, loader.files())
        turns[Ours.name, goals.PART] = lambda: timed_load(lambda: loader.load_part(LAYER), loader.files())
        lent = {**lent, goals.READ: loader.data_files}
    return turns, lent


def _main(rounds: Rounds, scales: Scales) -> None:
    """Saves and first saves of all subjects, at one size, in the same rounds."""
    state = make_state(scales.main_bytes, MAIN_COUNT)
    shape = (scales.main_bytes, MAIN_COUNT)
    savers = rounds.open_savers(SAVERS, state, WARM_UP)
    saves = {(name, ""): _save_turn(saver) for name, saver in savers.items()}
    firsts = {(name, ""): _first_turn(rounds, type(saver), state) for name, saver in savers.items()}
    for name, _ in firsts:
        if name != Ours.name:
            firsts[name, ""] = few(firsts[name, ""], ROUNDS_WITHOUT_GOAL)
    looks = {(Ours.name, goals.LOOK): _look_turn(state)} if rounds.wanted(Ours.name) else {}
    sections = {"save": saves, "first": firsts, "ours": looks}
    rounds.run_together(sections, shape, range(scales.rounds), seconds=2 * scales.seconds)  # two sections in one
    for saver in savers.values():
        saver.close()
    _clear(rounds)


def _load(rounds: Rounds, scales: Scales) -> None:
    """Whole restores and parts of them, from a cold page cache."""
    state = make_state(scales.main_bytes, MAIN_COUNT)
    shape = (scales.main_bytes, MAIN_COUNT)
    wholes: dict[tuple[str, str], Turn] = {}
    parts: dict[tuple[str, str], Turn] = {}
    with ExitStack() as stack:
        for kind in LOADERS:
            if not rounds.wanted(kind.name):
                continue
            rounds.introduce(kind.name, "load", kind.how)
            try:
                loader = kind(rounds.directory / "load" / kind.name.replace(" ", "-"), state)
            except Exception as error:  # a peer may raise anything
                rounds.refuse(kind.name, "load", error)
                continue
            stack.callback(loader.close)
            wholes[kind.name, ""] = lambda loader=loader: timed_load(loader.load, loader.files())  # type: ignore[misc]
            if kind.parts:
                parts[kind.name, ""] = lambda loader=loader: timed_load(  # type: ignore[misc]
                    lambda: loader.load_part(LAYER), loader.files()
                )
        rounds.run_together({"load": wholes, "part": parts}, shape, range(scales.rounds), seconds=scales.seconds)
    _clear(rounds)


def _memory(rounds: Rounds, scales: Scales) -> None:
    """The peak of all subjects at the main size, and of the engine at the largest."""
    shape = (scales.main_bytes, MAIN_COUNT)
    # The configurations of the engine that differ in their memory.
    names = (Ours.name, *((OursWhole.name, *PEERS) if scales.memory_peers else ()))
    turns = footprint.turns(rounds, *shape, names)
    with ThreadPoolExecutor(2) as pool:  # the memory of a process does not depend on others
        begun = {key: pool.submit(turn) for key, turn in turns.items()}
        rounds.run("memory", {key: each.result for key, each in begun.items()}, shape, range(1), seconds=0)
    largest = max(_fitting(rounds, scales.sizes), default=0)
    if largest > scales.main_bytes:
        shape = (largest, MAIN_COUNT)
        rounds.run("memory", footprint.turns(rounds, *shape, ("engine",)), shape, range(1), seconds=0)


def _size(rounds: Rounds, scales: Scales) -> None:
    """The engine, fio, and peers that take less than minutes, at each size."""
    for nbytes in _fitting(rounds, scales.sizes):
        small = nbytes <= scales.peers_bytes_max
        state = make_state(nbytes, MAIN_COUNT, plain=small)
        names = SCALE_PEERS if small else (Ours.name,)
        savers = rounds.open_savers([kind for kind in SAVERS if kind.name in names], state, WARM_UP)
        saves = {(name, ""): _save_turn(saver) for name, saver in savers.items()}
        shape = (nbytes, MAIN_COUNT)
        # The main size has all of fio's jobs and settings; which is best differs little with size, so one does here.
        kinds = [goals.OVERWRITTEN] if nbytes != scales.main_bytes else []
        fio = limits.fio_turns(rounds, nbytes, kinds, _lent(savers), ((4, 16),))
        numbers = range(scales.scale_rounds if nbytes <= scales.main_bytes else min(3, scales.scale_rounds))
        rounds.run_together({"size": saves, "limit": fio}, shape, numbers, seconds=scales.seconds / 2)
        for saver in savers.values():
            saver.close()
        _clear(rounds)


def _tensors(rounds: Rounds, scales: Scales) -> None:
    """The same bytes in ever more tensors; the first save of an Engine apart, which plans the arena."""
    for count in scales.tensor_counts:
        kinds = [saver for saver in SAVERS if saver.name in SCALE_PEERS]
        if count in _ends(scales):
            kinds.remove(Ours)
        state = make_state(scales.tensors_bytes, count)
        shape = (scales.tensors_bytes, count)
        savers = rounds.open_savers(kinds, state, WARM_UP)
        saves = {(name, ""): _save_turn(saver) for name, saver in savers.items()}
        rounds.run("tensors", saves, shape, range(scales.scale_rounds), seconds=scales.seconds / 4)
        firsts = {(name, "first"): _first_turn(rounds, type(saver), state) for name, saver in savers.items()}
        rounds.run("tensors", firsts, shape, range(1), seconds=0)
        for saver in savers.values():
            saver.close()
        _clear(rounds)
    if rounds.wanted(Ours.name):
        _ends_in_turn(rounds, scales)


def _ends_in_turn(rounds: Rounds, scales: Scales) -> None:
    """Ours of the fewest and of the most tensors, in turn: goals are about how far their first saves differ, and about
    what one tensor costs, beside the look at it alone.  Peers take seconds for as many, and leave time for one round.
    """
    rounds.introduce(Ours.name, "save", Ours.how)
    with ExitStack() as stack:
        sections = []
        for count in _ends(scales):
            state = make_state(scales.tensors_bytes, count, plain=False)
            saver = Ours(rounds.directory / f"{Ours.name}-{count}", state)
            stack.callback(saver.close)
            for _ in range(WARM_UP):
                timed_save(saver)
            saves = {(Ours.name, ""): _save_turn(saver), (Ours.name, "first"): _first_turn(rounds, Ours, state)}
            sections.append((state.tensor_count, {"tensors": saves, "looks": {(Ours.name, ""): _look_turn(state)}}))
        for number in range(scales.rounds):
            for count, turns in sections:
                shape = (scales.tensors_bytes, count)
                rounds.run_together(turns, shape, range(number, number + 1), seconds=0)
    _clear(rounds)


def _ends(scales: Scales) -> tuple[int, int]:
    return min(scales.tensor_counts), max(scales.tensor_counts)


def _flight(rounds: Rounds, scales: Scales) -> None:
    """Several saves of the engine one after the other."""
    if not rounds.wanted(Ours.name):
        return
    state = make_state(scales.main_bytes, MAIN_COUNT, plain=False)
    assert state.arena is not None
    with ExitStack() as stack:
        turns: dict[tuple[str, str], Turn] = {}
        for count in scales.flights:
            eng = stack.enter_context(
                engine.Engine(rounds.directory / f"flight-{count}", max_async=count, rewrite_all=True)
            )
            turn = _flight_turn(eng, state.arena, scales.flight_saves)
            turn()  # there is something to recycle
            turns[Ours.name, f"max_async={count}"] = turn
        shape = (scales.main_bytes, MAIN_COUNT)
        rounds.run("flight", turns, shape, range(scales.scale_rounds), seconds=scales.seconds / 2)
    _clear(rounds)


def _slowdown(rounds: Rounds, scales: Scales) -> None:
    """A training with checkpoints."""
    count, seconds = scales.slowdown_rounds, scales.slowdown_seconds
    slowdown.measure(rounds, TRAINING, scales.intervals, count, seconds=seconds)
    _clear(rounds)


def _throughput(rounds: Rounds, scales: Scales) -> None:
    """The throughput of a training by interval, with 1 to 4 checkpoints in flight."""
    if rounds.wanted(Ours.name):
        count, seconds = scales.flight_rounds, scales.flight_seconds
        throughput.measure(rounds, scales.flights, scales.flight_intervals, count, seconds=seconds)
        _clear(rounds)


def _unchanged(rounds: Rounds, scales: Scales) -> None:
    """Trainings that change little, with and without elision."""
    if rounds.wanted(Ours.name):
        seconds = scales.seconds / 4
        unchanged.measure(rounds, scales.main_bytes, scales.rounds, seconds, lambda: _clear(rounds))


def _threads(rounds: Rounds, scales: Scales) -> None:
    """Several staging threads, where no device is the limit."""
    if rounds.wanted(Ours.name):
        threads.measure(rounds, scales.main_bytes, 2 * scales.rounds, scales.seconds / 3)


def _guards(rounds: Rounds, scales: Scales) -> None:
    """What each guard holds back."""
    if rounds.wanted(Ours.name):
        count, seconds = scales.rounds, 1.2 * scales.seconds  # three minutes with the warm-up
        intervals = scales.guard_intervals
        guards.measure(rounds, scales.main_bytes, MAIN_COUNT, count, seconds=seconds, intervals=intervals)
        _clear(rounds)


def _monitor(rounds: Rounds, scales: Scales) -> None:
    """What it costs that another process writes and commits."""
    if rounds.wanted(Ours.name):
        count, seconds = 2 * scales.rounds, scales.seconds / 3
        monitored.measure(rounds, scales.main_bytes, MAIN_COUNT, count, WARM_UP, seconds)
        _clear(rounds)


SECTIONS: dict[str, Callable[[Rounds, Scales], None]] = {
    "limit": _limit,
    "main": _main,
    "load": _load,
    "slowdown": _slowdown,
    "memory": _memory,
    "size": _size,
    "tensors": _tensors,
    "flight": _flight,
    "throughput": _throughput,
    "unchanged": _unchanged,
    "threads": _threads,
    "guards": _guards,
    "monitor": _monitor,
}


def _lent(savers: Mapping[str, Saver]) -> Lent:
    """The files that fio overwrites: those that the engine recycles."""
    ours = savers.get(Ours.name)
    return {goals.OVERWRITTEN: ours.data_files} if isinstance(ours, Ours) else {}


def _save_turn(saver: Saver) -> Turn:
    return lambda: timed_save(saver)


def _look_turn(state: State) -> Turn:
    """The first part of every save alone: the check that each tensor is at its location."""
    arena = state.arena
    assert arena is not None

    def turn() -> Mapping[str, float]:
        began_ns = time.perf_counter_ns()
        arena.refresh()
        return {"seconds_s": (time.perf_counter_ns() - began_ns) / 1e9}

    return turn


def _first_turn(rounds: Rounds, kind: type[Saver], state: State) -> Turn:
    """A save into a new directory, which is taken away again outside the time."""

    def turn() -> Mapping[str, float]:
        directory = rounds.directory / "first"
        saver = kind(directory, state)
        try:
            return timed_save(saver)
        finally:
            saver.close()
            shutil.rmtree(directory)

    return turn


def _new_files_turn(saver: OursKeeping) -> Turn:
    """A save into new files, which are taken away again outside the time; once before its first turn."""

    def turn() -> Mapping[str, float]:
        measured = timed_save(saver)
        shutil.rmtree(saver.path(saver.steps[-1]))
        return measured

    turn()
    return turn


def _flight_turn(eng: engine.Engine, arena: engine.Arena, count: int) -> Turn:
    def turn() -> Mapping[str, float]:
        began = time.perf_counter()
        for save in [eng.checkpoint(arena) for _ in range(count)]:
            save.result()
        return {"seconds_s": time.perf_counter() - began, "save_count": float(count)}

    return turn


def _fitting(rounds: Rounds, sizes: tuple[int, ...]) -> list[int]:
    """The sizes for which there is room: in memory an arena, or its tensors, beside the original; on disk the kept
    checkpoints, the one being written, and a margin for the peers."""
    memory = _available_memory()
    room = shutil.disk_usage(rounds.directory).free
    fitting = [size for size in sizes if 2.2 * size < memory and 5.2 * size < room]
    for size in sorted(set(sizes) - set(fitting)):
        note = f"{size / MB:.0f} MB left out: {memory / GB:.0f} GB of memory and {room / GB:.0f} GB of disk are free"
        if note not in rounds.record.notes:
            rounds.record.notes.append(note)
    return fitting


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")


def _clear(rounds: Rounds) -> None:
    """Remove the files of a section."""
    for path in rounds.directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
