"""The goals, and how far they are met: ratios of medians of one run.

Theory of operation.  A goal is a limit and a way to compute what is compared with it from a record.  Where a sample is
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
# The kinds of fio's jobs, as they begin the settings of its samples; those that goals are set by also beside a copy.
WRITES = ("fresh", "preallocated", "overwritten")
PLAIN = (*WRITES, "read")
BESIDE = " beside a copy"
COPIED = tuple(what + BESIDE for what in PLAIN if what != "fresh")
# The subjects of segments of training that save nothing: ordinary tensors, and an arena that has adopted them.
NONE, ADOPTED = "no checkpoints", "no checkpoints, adopted"

Number = TypeVar("Number", int, float)
Compute = Callable[[], float]  # raises _Unknown


@dataclass(frozen=True, slots=True)
class Outcome:
    """One goal: `measured` is None where something was not measured.

    `beside_copy` is what would be measured with fio in the engine's place, beside a copy (see `limits`): as much as the
    host gives to whoever stages a state and looks at what it has staged.
    """

    what: str
    goal: str
    measured: float | None
    met: bool | None
    unit: str = "x"
    beside_copy: float | None = None

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
        _at_least("arena free again, beside memcpy", 0.8, lambda: _staging(record)),
        *_slowdown(record, peers),
        _at_most("CPU seconds per GB, beside the best peer's", 0.5, lambda: _cpu(record, peers)),
        *_memory(record),
        *_restore(record, loading_peers),
        *_part(record),
        *_many_tensors(record),
    ]


# -- what is compared ------------------------------------------------------------------------------------------------


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
    """The median seconds of each setting of fio for one kind of job."""
    samples = [s for s in record.select("limit", "fio", nbytes=nbytes) if s.setting.startswith(f"{what}, ")]
    return {
        setting: median(values((s for s in samples if s.setting == setting), "seconds_s"))
        for setting in sorted({s.setting for s in samples})
    }


def slowdowns(record: Record, subject: str, setting: str) -> list[float]:
    """A subject's slowdown in each round: what its checkpoints cost together, beside the undisturbed steps of their
    periods."""
    rounds: dict[int, list[float]] = {}
    for sample in record.select("slowdown", subject, setting=setting):
        share = sample.values["excess_s"] / (interval(setting) * sample.values["step_s"])
        rounds.setdefault(sample.round, []).append(share)
    return [mean(shares) for shares in rounds.values()]


def interval(setting: str) -> int:
    """The number of steps between checkpoints."""
    return int(setting.split()[-1])


def _limit(record: Record, what: str) -> float:
    best = best_limit(record, what, record.main_bytes)
    if best is None:
        raise _Unknown
    return best


def _staging(record: Record) -> float:
    memcpy = _median(record.select("limit", "memcpy", nbytes=record.main_bytes), "seconds_s")
    return memcpy / _median(main_samples(record, "save", "engine staged whole"), "staged_s")


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
    def row(what: str, goal: float, limit: str, section: str) -> Outcome:
        return _at_least(
            what,
            goal,
            lambda: _limit(record, limit) / _median(main_samples(record, section, OURS), "durable_s"),
            beside_copy=lambda: _limit(record, limit) / _limit(record, limit + BESIDE),
        )

    return [
        row("durable throughput, recycled, beside fio's best overwrite", 0.95, "overwritten", "save"),
        row("durable throughput, first saves, beside fio's best on preallocated files", 0.95, "preallocated", "first"),
    ]


def _against(record: Record) -> list[Outcome]:
    goals = {"torch.save": 4, "safetensors": 2, "DCP save": 4, "DCP async_save": 7, "torch-checkpointing": 7}

    def theirs(peer: str) -> float:
        return _median(main_samples(record, "save", peer), "durable_s")

    def row(peer: str, goal: float) -> Outcome:
        return _at_least(
            f"durable, against {peer}",
            goal,
            lambda: theirs(peer) / _median(main_samples(record, "save", OURS), "durable_s"),
            beside_copy=lambda: theirs(peer) / _limit(record, "overwritten" + BESIDE),
        )

    return [row(peer, goal) for peer, goal in goals.items()]


def _held(record: Record) -> list[Outcome]:
    def beside(peer: str) -> float:
        theirs = _median(main_samples(record, "save", peer), "held_s")
        return _median(main_samples(record, "save", OURS), "held_s") / theirs

    def growth() -> float:
        sizes = sorted({sample.nbytes for sample in record.select("size", OURS)})
        if len(sizes) < 2:
            raise _Unknown
        low, high = (_median(record.select("size", OURS, nbytes=size), "held_s") for size in (sizes[0], sizes[-1]))
        return high / low

    def each_tensor() -> float:
        count = _most_tensors(record)
        return _median(record.select("tensors", OURS, tensor_count=count, setting=""), "held_s") / count * 1e6

    return [
        _at_most("loop held, beside torch-checkpointing", 0.5, lambda: beside("torch-checkpointing")),
        _at_most("loop held, beside DCP async_save", 0.01, lambda: beside("DCP async_save")),
        # "Flat" is the word; twice is what a page of a larger plan that has left the cache may cost.
        _at_most("loop held, the largest size beside the smallest", 2, growth),
        _at_most("loop held, a tensor, at the most tensors", 1, each_tensor, unit="us"),
    ]


def _slowdown(record: Record, peers: list[str]) -> list[Outcome]:
    def ours() -> float:
        return median(_known(slowdowns(record, OURS, SLOWDOWN_AT))) * 100

    def above(setting: str) -> float:
        theirs = [median(found) for peer in peers if (found := slowdowns(record, peer, setting))]
        return (min(_known(theirs)) - median(_known(slowdowns(record, OURS, setting)))) * 100

    settings = sorted({s.setting for s in record.select("slowdown")}, key=interval)
    return [
        _at_most(f"training slowdown, a checkpoint {SLOWDOWN_AT} steps", 3, ours, unit="%"),
        *(
            _at_least(f"training slowdown {setting}, best peer's less ours", 0, lambda s=setting: above(s), unit="%")  # type: ignore[misc]
            for setting in settings
        ),
    ]


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
    def ours() -> float:
        return _median(main_samples(record, "load", OURS), "ready_s")

    def reading() -> float:
        return _limit(record, "read" + BESIDE)

    return [
        _at_least(
            "restore, cold, beside fio's best read",
            0.95,
            lambda: _limit(record, "read") / ours(),
            beside_copy=lambda: _limit(record, "read") / reading(),
        ),
        _at_least(
            "restore, cold, against the best peer",
            1,
            lambda: _best(record, "load", peers, "ready_s") / ours(),
            beside_copy=lambda: _best(record, "load", peers, "ready_s") / reading(),
        ),
    ]


def _part(record: Record) -> list[Outcome]:
    layer_bytes = record.main_bytes / record.main_count

    def beyond() -> float:
        return (_median(main_samples(record, "part", OURS), "read_bytes") - layer_bytes) / BLOCK_BYTES

    def proportion() -> float:
        part, whole = (_median(main_samples(record, section, OURS), "ready_s") for section in ("part", "load"))
        share = _median(main_samples(record, "part", OURS), "read_bytes") / record.main_bytes
        if not share:
            raise _Unknown
        return part / whole / share

    return [
        _at_most("one layer: blocks read beyond it (it lies in one file)", 2, beyond, unit="blocks"),
        _at_most("one layer: share of a whole restore's time, beside the share of its bytes", 2, proportion),
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

    def held() -> float:
        count = _most_tensors(record)
        return first(count, "held_s") / count * 1e6

    return [
        _at_most(
            "the most tensors: a first save's plan, headers and manifest, beside the largest state", 10, share, "%"
        ),
        _at_most("the most tensors: loop held by that first save, a tensor", 1, held, unit="us"),
    ]


def _most_tensors(record: Record) -> int:
    return max(_known([sample.tensor_count for sample in record.select("tensors", OURS)]))


def _known(found: list[Number]) -> list[Number]:
    if not found:
        raise _Unknown
    return found


def _at_least(what: str, goal: float, compute: Compute, unit: str = "x", beside_copy: Compute | None = None) -> Outcome:
    found = _outcome(what, f">= {goal:g} {unit}", compute, lambda measured: measured >= goal, unit)
    if beside_copy is None:
        return found
    try:
        return replace(found, beside_copy=beside_copy())
    except _Unknown:
        return found


def _at_most(what: str, goal: float, compute: Compute, unit: str = "x") -> Outcome:
    return _outcome(what, f"<= {goal:g} {unit}", compute, lambda measured: measured <= goal, unit)


def _outcome(what: str, goal: str, compute: Compute, holds: Callable[[float], bool], unit: str) -> Outcome:
    try:
        measured = compute()
    except _Unknown:
        return Outcome(what, goal, None, None, unit)
    return Outcome(what, goal, measured, holds(measured) and not math.isnan(measured), unit)
