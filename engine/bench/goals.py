"""The goals and their results: ratios of medians of one run.

Theory of operation.  A goal is a limit and a function that computes the compared value from a record.  If a sample is
missing, because a peer is not installed or a section was not run, the goal is neither met nor missed, and says so.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import TypeVar

from engine.bench.record import Record, Sample, values

OURS = "engine"
BLOCK_BYTES = 4 << 20  # the default of Engine
MEMORY_SLACK_BYTES = 16 << 20
SLOWDOWN_AT = "every 10"  # steps: the headline setting of PCcheck
# A rarer checkpoint costs as much as one every ten steps, without the wait for the save before it.
COMPUTED = ("computed: every 25", "computed: every 100")
# The kinds of fio's jobs, as they begin the settings of its samples; those that goals are set by also beside a copy.
OVERWRITTEN, PREALLOCATED, FRESH, READ = "overwritten", "preallocated", "fresh", "read"
JOBS = (OVERWRITTEN, PREALLOCATED, FRESH, READ)
BESIDE = " beside a copy"
COPIED = (OVERWRITTEN, PREALLOCATED, READ)
LIMITS = (*JOBS, *(f"{what}{BESIDE}" for what in COPIED))
# The settings of our turns that are no section of their own.
RECYCLED, FIRST, RESTORED, PART, LOOK = "recycled", "first", "restored", "one layer", "look"
PART_BLOCKS = 2  # the blocks of one layer of the main state: it has 3.4 MB
STAGED_WHOLE = "engine staged whole"
# The subjects of segments of training that save nothing: ordinary tensors, and an arena that has adopted them.
NONE, ADOPTED = "no checkpoints", "no checkpoints, adopted"

# The trainings of `unchanged`, and those of them that change next to nothing.
ALL_FROZEN, ADAPTERS, EMBEDDING, EXPERTS, CHANGED = (
    *("all frozen", "adapters", "embedding, 1 % of its rows", "experts, one in eight", "everything changed"),
)
STEADY = (ALL_FROZEN, ADAPTERS)
# The settings of `threads`, followed by the number of threads.
NULL, COPY, TMPFS_SAVE, TMPFS_RESTORE = "saved to /dev/null", "copied", "saved in tmpfs", "restored from tmpfs"
PARTLY = (*STEADY, EMBEDDING, EXPERTS)

# The guards, best first, and the settings of `guards`: those of steps are followed by their threads, and the staging.
GUARDS = ("cow", "detect", "fence")
CALL, STEP_ALONE, BESIDE_STEP = "call", "step alone", "step beside a save"
EVERY_CORE, ONE_THREAD, WHOLE = "every core", "one thread", "staged whole"

# The ways of `monitor`: the figures of the second are to be within 5 % of the first's.
IN_PROCESS, MONITORED = "in process", "monitored"

Number = TypeVar("Number", int, float)
Compute = Callable[[], float]  # raises _Unknown


@dataclass(frozen=True, slots=True)
class Outcome:
    """One goal: `measured` is None if a sample is missing.

    `standin` is the value with a part of the work in place of the engine: fio beside a copy, a read without a
    checkpoint around it (both in `limits`), or the look at every tensor without a save after it.  It comes from the
    same rounds, except for fio beside peers.  It is no bound, and is noisy too.
    """

    what: str
    goal: str
    measured: float | None
    met: bool | None
    unit: str = "x"
    standin: float | None = None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


class _Unknown(Exception):
    """A sample that a goal needs is not there."""


def outcomes(record: Record, peers: Iterable[str], loading_peers: Iterable[str]) -> list[Outcome]:
    """Every goal, in the order of the issue that set them."""
    peers, loading_peers = list(peers), list(loading_peers)
    return [
        *_throughput(record),
        *_against(record),
        *_held(record),
        _staging(record),
        *_slowdown(record, peers),
        _at_most("CPU seconds per GB, beside the best peer's", 0.5, lambda: _cpu(record, peers)),
        *_memory(record),
        *_restore(record, loading_peers),
        *_part(record),
        *_many_tensors(record),
        *_unchanged(record),
        *_threads(record),
        *_guards(record),
        *_monitor(record),
    ]


# -- comparisons -----------------------------------------------------------------------------------------------------


def _median(samples: list[Sample], name: str) -> float:
    found = values(samples, name)
    if not found:
        raise _Unknown
    return median(found)


def main_samples(record: Record, section: str, subject: str) -> list[Sample]:
    """A subject's samples at the size that most of the run is about."""
    return record.select(section, subject, nbytes=record.main_bytes, tensor_count=record.main_count, setting="")


def best_limit(record: Record, what: str, nbytes: int) -> float | None:
    """Seconds of fio's best setting for one kind of job; None if there is none."""
    medians = limits(record, what, nbytes)
    return min(medians.values(), default=None)


def limits(record: Record, what: str, nbytes: int) -> dict[str, float]:
    """The median of each setting of fio for one kind of job."""
    samples = [s for s in record.select("limit", "fio", nbytes=nbytes) if s.setting.startswith(f"{what}, ")]
    settings = _settings(samples)
    return {each: median(values((s for s in samples if s.setting == each), "seconds_s")) for each in settings}


def _settings(samples: Iterable[Sample]) -> list[str]:
    return sorted({sample.setting for sample in samples})


def slowdowns(record: Record, subject: str, setting: str, section: str = "slowdown") -> list[float]:
    """A subject's slowdowns: in each round the cost of its checkpoints, divided by the undisturbed steps of their
    periods.

    Args:
        setting: of `slowdown_settings`.
        section: "slowdown" or "guards".
    """
    rounds: dict[int, list[float]] = {}
    computed = setting in COMPUTED
    for sample in record.select(section, subject, setting=SLOWDOWN_AT if computed else setting):
        cost_s = sample.values["excess_s"] + (0 if computed else sample.values["rest_s"])
        rounds.setdefault(sample.round, []).append(cost_s / (interval(setting) * sample.values["step_s"]))
    return [mean(shares) for shares in rounds.values()]


def slowdown_settings(record: Record) -> list[str]:
    """The intervals there are slowdowns for, the shortest first."""
    measured = sorted(_settings(record.select("slowdown")), key=interval)
    return [*measured, *COMPUTED] if SLOWDOWN_AT in measured else measured


def interval_axes(record: Record) -> tuple[list[str], list[int], list[int]]:
    """The drives, the numbers in flight and the intervals that there are throughputs of."""
    parts = [sample.setting.rsplit(", ", 2) for sample in record.select("throughput", OURS)]
    drives = list(dict.fromkeys(drive for drive, _, _ in parts))
    flights = sorted({int(count.split()[0]) for _, count, _ in parts})
    return drives, flights, sorted({interval(each) for _, _, each in parts})


def throughputs(record: Record, drive: str, count: int, every: int) -> list[float]:
    """Steps per second with this many checkpoints in flight at this interval, as shares of the steps without any in the
    same round."""
    shares = []
    for sample in record.select("throughput", OURS, setting=f"{drive}, {count} in flight, every {every}"):
        beside = [s for s in record.select("throughput", ADOPTED, setting=drive) if s.round == sample.round]
        shares.append(_median(beside, "step_s") / sample.values["step_s"])
    return shares


def interval(setting: str) -> int:
    """The number of steps between checkpoints."""
    return int(setting.split()[-1])


def _limit(record: Record, what: str) -> float:
    best = best_limit(record, what, record.main_bytes)
    if best is None:
        raise _Unknown
    return best


def _ours(record: Record, setting: str, name: str, subject: str = OURS) -> float:
    """A median of the engine that is compared with a number only."""
    return _median(record.select("ours", subject, nbytes=record.main_bytes, setting=setting), name)


def _memcpy(record: Record) -> float:
    return _median(record.select("limit", "memcpy", nbytes=record.main_bytes), "seconds_s")


def _copied(record: Record, what: str) -> float:
    """fio's best time alone beside its best beside a copy, of the settings that there are of both."""
    alone, beside = (limits(record, kind, record.main_bytes) for kind in (what, what + BESIDE))
    both = [setting for setting in alone if setting.replace(what, what + BESIDE) in beside]
    best = [min(_known(found)) for found in ([alone[s] for s in both], list(beside.values()))]
    return best[0] / best[1]


def _best(record: Record, section: str, peers: Iterable[str], name: str) -> float:
    medians = [
        _median(main_samples(record, section, peer), name) for peer in peers if main_samples(record, section, peer)
    ]
    if not medians:
        raise _Unknown
    return min(medians)


def _cpu(record: Record, peers: list[str]) -> float:
    return _median(main_samples(record, "save", OURS), "cpu_s") / _best(record, "save", peers, "cpu_s")


# -- the goals, row by row -------------------------------------------------------------------------------------------


def _throughput(record: Record) -> list[Outcome]:
    def row(what: str, limit: str, setting: str) -> Outcome:
        return _against_limit(record, what, limit, lambda: _ours(record, setting, "durable_s"))

    return [
        row("durable throughput, recycled, beside fio's best overwrite", OVERWRITTEN, RECYCLED),
        row("durable throughput, first saves, beside fio's best on preallocated files", PREALLOCATED, FIRST),
    ]


def _against(record: Record) -> list[Outcome]:
    goals = {"torch.save": 4, "safetensors": 2, "DCP save": 4, "DCP async_save": 7, "torch-checkpointing": 7}

    def durable(name: str) -> float:
        return _median(main_samples(record, "save", name), "durable_s")

    def row(peer: str, goal: float) -> Outcome:
        return _with_standin(
            _at_least(f"durable, against {peer}", goal, lambda: durable(peer) / durable(OURS)),
            lambda: durable(peer) / _limit(record, OVERWRITTEN + BESIDE),
        )

    return [row(peer, goal) for peer, goal in goals.items()]


def _held(record: Record) -> list[Outcome]:
    def theirs(peer: str) -> float:
        return _median(main_samples(record, "save", peer), "held_s")

    def beside(peer: str, goal: float) -> Outcome:
        return _with_standin(
            _at_most(
                f"loop held, beside {peer}",
                goal,
                lambda: _median(main_samples(record, "save", OURS), "held_s") / theirs(peer),
            ),
            lambda: _ours(record, LOOK, "seconds_s") / theirs(peer),
        )

    def growth() -> float:
        sizes = sorted({sample.nbytes for sample in record.select("size", OURS)})
        if len(sizes) < 2:
            raise _Unknown
        low, high = (_median(record.select("size", OURS, nbytes=size), "held_s") for size in (sizes[0], sizes[-1]))
        return high / low

    return [
        beside("torch-checkpointing", 0.5),
        beside("DCP async_save", 0.01),
        # "Flat" is the word.  Twice is allowed: a larger plan has more pages outside the cache.
        _at_most("loop held, the largest size beside the smallest", 2, growth),
        _held_a_tensor(record, "loop held, a tensor, at the most tensors", setting=""),
    ]


def _slowdown(record: Record, peers: list[str]) -> list[Outcome]:
    def ours() -> float:
        return median(_known(slowdowns(record, OURS, SLOWDOWN_AT))) * 100

    def above(setting: str) -> float:
        theirs = [median(found) for peer in peers if (found := slowdowns(record, peer, setting))]
        return (min(_known(theirs)) - median(_known(slowdowns(record, OURS, setting)))) * 100

    def row(setting: str) -> Outcome:
        rarer = " and ".join(str(interval(each)) for each in COMPUTED)
        named = f"{setting} (and so every {rarer})" if setting == SLOWDOWN_AT else setting
        return _at_least(f"training slowdown {named}, best peer's less ours", 0, lambda: above(setting), unit="%")

    measured = [setting for setting in slowdown_settings(record) if setting not in COMPUTED]
    return [_at_most(f"training slowdown, a checkpoint {SLOWDOWN_AT} steps", 3, ours, unit="%"), *map(row, measured)]


def _staging(record: Record) -> Outcome:
    return _at_least(
        "arena free again, beside memcpy",
        0.8,
        lambda: _memcpy(record) / _ours(record, RECYCLED, "staged_s", STAGED_WHOLE),
    )


def _memory(record: Record) -> list[Outcome]:
    sizes = sorted({sample.nbytes for sample in record.select("memory", OURS)}) or [record.main_bytes]

    def beyond(nbytes: int) -> float:
        return (_median(record.select("memory", OURS, nbytes=nbytes), "peak_bytes") - record.staging_bytes) / 2**20

    return [
        _at_most(
            f"peak extra memory beyond staging_bytes, {nbytes / 1e6:.0f} MB",
            MEMORY_SLACK_BYTES / 2**20,
            lambda nbytes=nbytes: beyond(nbytes),  # type: ignore[misc]
            unit="MiB",
        )
        for nbytes in sizes
    ]


def _restore(record: Record, peers: list[str]) -> list[Outcome]:
    def ahead() -> float:
        return _best(record, "load", peers, "ready_s") / _median(main_samples(record, "load", OURS), "ready_s")

    return [
        _against_limit(
            record, "restore, cold, beside fio's best read", READ, lambda: _ours(record, RESTORED, "ready_s")
        ),
        _at_least("restore, cold, against the best peer", 1, ahead),
    ]


def _part(record: Record) -> list[Outcome]:
    layer_bytes = record.main_bytes / record.main_count

    def beyond() -> float:
        return (_ours(record, PART, "read_bytes") - layer_bytes) / BLOCK_BYTES

    def proportion(part_s: float) -> float:
        share = _ours(record, PART, "read_bytes") / record.main_bytes
        if not share:
            raise _Unknown
        return part_s / _ours(record, RESTORED, "ready_s") / share

    def reading() -> float:
        if round(_ours(record, PART, "read_bytes") / BLOCK_BYTES) != PART_BLOCKS:  # a run at another size
            raise _Unknown
        return _median(record.select("limit", "pread"), "seconds_s")

    return [
        _at_most("one layer: blocks read beyond it (it lies in one file)", 2, beyond, unit="blocks"),
        _with_standin(
            _at_most(
                "one layer: share of a whole restore's time, beside the share of its bytes",
                2,
                lambda: proportion(_ours(record, PART, "ready_s")),
            ),
            lambda: proportion(reading()),
        ),
    ]


def _many_tensors(record: Record) -> list[Outcome]:
    def first(count: int, name: str) -> float:
        return _median(record.select("tensors", OURS, tensor_count=count, setting="first"), name)

    def share() -> float:
        counts = {sample.tensor_count for sample in record.select("tensors", OURS)}
        sizes = {sample.nbytes for sample in record.select("size", OURS)}
        if len(counts) < 2 or not sizes:
            raise _Unknown
        largest = _median(record.select("size", OURS, nbytes=max(sizes)), "durable_s")
        return (first(max(counts), "durable_s") - first(min(counts), "durable_s")) / largest * 100

    return [
        _at_most(
            "the most tensors: a first save's plan, headers and manifest, beside the largest state", 10, share, "%"
        ),
        _held_a_tensor(record, "the most tensors: loop held by that first save, a tensor", setting="first"),
    ]


def _unchanged(record: Record) -> list[Outcome]:
    def of(training: str, way: str, name: str) -> float:
        return _median(record.select("unchanged", OURS, setting=f"{training}, {way}"), name)

    def beyond(training: str) -> float:
        # Of a save that changes nothing, in shares of a block.
        changed = of(training, "elided", "changed_bytes")
        return (of(training, "elided", "stats.io_bytes") - changed) / (changed or BLOCK_BYTES) * 100

    def held(training: str, way: str) -> float:
        return of(training, way, "held_s") * 1e3

    def durable(training: str, way: str) -> float:
        return of(training, way, "durable_s") * 1e3

    def cpu(training: str, way: str) -> float:
        return of(training, way, "cpu_s") / of(training, "rewritten", "cpu_s")

    def slower() -> float:
        return of(CHANGED, "elided", "durable_s") / of(CHANGED, "rewritten", "durable_s")

    rows = [
        _at_most(f"{each}: bytes written beyond changed blocks", 1, lambda each=each: beyond(each), "%")  # type: ignore[misc]
        for each in PARTLY
    ]
    for way in ("elided", "split"):
        for each in STEADY:
            told = f"{each}, {way}"
            rows += [
                _at_most(f"{told}: loop held", 1, lambda each=each, way=way: held(each, way), "ms"),  # type: ignore[misc]
                _at_most(f"{told}: durable", 10, lambda each=each, way=way: durable(each, way), "ms"),  # type: ignore[misc]
                _at_most(f"{told}: CPU, beside rewriting", 0.05, lambda each=each, way=way: cpu(each, way)),  # type: ignore[misc]
            ]
    return [*rows, _at_most(f"{CHANGED}: durable, beside rewriting", 1.05, slower)]


def _monitor(record: Record) -> list[Outcome]:
    def beside(name: str) -> float:
        return _median(record.select("monitor", OURS, setting=MONITORED), name) / _median(
            record.select("monitor", OURS, setting=IN_PROCESS), name
        )

    names = {"held_s": "loop held", "staged_s": "state may change", "durable_s": "durable", "cpu_s": "CPU"}
    return [
        _at_most(f"with a monitor beside without: {told}", 1.05, lambda name=name: beside(name))  # type: ignore[misc]
        for name, told in names.items()
    ]


def _threads(record: Record) -> list[Outcome]:
    def seconds(what: str, count: int) -> float:
        return _median(record.select("threads", setting=f"{what}, {count}"), "seconds_s")

    def gain(what: str) -> float:
        return seconds(what, 1) / seconds(what, 2)

    def cpu(count: int) -> float:
        return _median(record.select("threads", OURS, setting=f"{NULL}, {count}"), "cpu_s")

    def rate(count: int) -> float:
        return _known([sample.nbytes for sample in record.select("threads", OURS)])[0] / seconds(NULL, count) / 1e9

    return [
        _with_standin(
            _at_least("two staging threads beside one, no device", 1.7, lambda: gain(NULL)), lambda: gain(COPY)
        ),
        _at_most("two staging threads beside one, no device: CPU seconds", 1.1, lambda: cpu(2) / cpu(1)),
        # What four drives of PCIe 5.0 take.
        _at_least("four staging threads, no device", 40, lambda: rate(4), unit="GB/s"),
    ]


def _guards(record: Record) -> list[Outcome]:
    def of(setting: str, name: str) -> float:
        return _median(record.select("guards", "engine cow", setting=setting), name)

    def beside(threads: str) -> float:
        """How much longer a step takes beside a save, in seconds."""
        return of(f"{BESIDE_STEP}, {threads}, {WHOLE}", "step_s") - of(f"{STEP_ALONE}, {threads}", "step_s")

    def slowdown(guard: str, every: int) -> float:
        return median(_known(slowdowns(record, f"engine {guard}", f"every {every}", "guards"))) * 100

    def below(every: int) -> Outcome:
        # Before there were guards, every save was as under `fence`.
        what = f"cow: training slowdown every {every}, fence's less this"
        return _at_least(what, 0, lambda: slowdown("fence", every) - slowdown("cow", every), "%")

    return [
        _at_most("cow: loop held by a call", 0.3, lambda: of(CALL, "held_s") * 1e3, "ms"),
        _at_most(
            "cow: a step beside a save, what it takes longer, beside the staging's own time",
            1,
            lambda: beside(EVERY_CORE) / (of(f"{CALL}, {WHOLE}", "stats.copying_ns") / 1e9),
        ),
        # "Near the step alone" are the words.  A tenth is allowed: the save reads memory that the step writes.
        _at_most(
            "cow: a step on one thread beside a save, beside the step alone",
            1.1,
            lambda: 1 + beside(ONE_THREAD) / of(f"{STEP_ALONE}, {ONE_THREAD}", "step_s"),
        ),
        *map(below, (1, 5)),
    ]


def _against_limit(record: Record, what: str, limit: str, ours: Compute) -> Outcome:
    """The goal that all of these have, of fio's best time for one kind of job."""
    return _with_standin(
        _at_least(what, 0.95, lambda: _limit(record, limit) / ours()),
        lambda: _copied(record, limit),
    )


def _with_standin(outcome: Outcome, standin: Compute) -> Outcome:
    try:
        return replace(outcome, standin=standin())
    except _Unknown:
        return outcome


def _held_a_tensor(record: Record, what: str, *, setting: str) -> Outcome:
    """The time for each tensor of a save, and of the look alone, with the most tensors."""

    def each_us(section: str, of: str, name: str) -> float:
        count = max(_known([sample.tensor_count for sample in record.select("tensors", OURS)]))
        return _median(record.select(section, OURS, tensor_count=count, setting=of), name) / count * 1e6

    return _with_standin(
        # The look is written in Python, where 1.3 us a tensor were measured; it took 0.45 in C.
        _at_most(what, 2, lambda: each_us("tensors", setting, "held_s"), unit="us"),
        lambda: each_us("looks", "", "seconds_s"),
    )


def _known(found: list[Number]) -> list[Number]:
    if not found:
        raise _Unknown
    return found


def _at_least(what: str, goal: float, compute: Compute, unit: str = "x") -> Outcome:
    return _outcome(what, f">= {goal:g} {unit}", compute, lambda measured: measured >= goal, unit)


def _at_most(what: str, goal: float, compute: Compute, unit: str = "x") -> Outcome:
    return _outcome(what, f"<= {goal:g} {unit}", compute, lambda measured: measured <= goal, unit)


def _outcome(what: str, goal: str, compute: Compute, holds: Callable[[float], bool], unit: str) -> Outcome:
    try:
        measured = compute()
    except _Unknown:
        return Outcome(what, goal, None, None, unit)
    return Outcome(what, goal, measured, holds(measured) and not math.isnan(measured), unit)
