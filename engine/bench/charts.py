"""Charts of a record, as PNG files that name their origin.

Theory of operation.  Each chart is drawn from samples and the medians of the goals.  The command, the host, the date
and the commit are at its foot, so that it can be read without the page around it.  A chart without samples is not
drawn. Bars are medians, their whiskers the quartiles.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engine.bench.goals import (
    ADOPTED,
    COMPUTED,
    NONE,
    OURS,
    OVERWRITTEN,
    READ,
    SLOWDOWN_AT,
    best_limit,
    interval,
    interval_axes,
    main_samples,
    slowdown_settings,
    slowdowns,
    throughputs,
)
from engine.bench.host import one_line
from engine.bench.noise import spread
from engine.bench.record import Record, Sample, values

FOOT_WIDTH = 150  # characters of its size in the width of a chart
OURS_COLOUR, PEER_COLOUR, LIMIT_COLOUR = "tab:green", "tab:gray", "tab:red"


def draw(record: Record, directory: Path) -> list[str]:
    """Write every chart that there are samples for; returns the names of the files."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")  # there need be no display
    pyplot = importlib.import_module("matplotlib.pyplot")
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, fill in CHARTS.items():
        figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
        if fill(record, axes):
            origin = f"{record.command}   {record.date}   commit {record.commit}"
            foot = "\n".join(
                [*textwrap.wrap(origin, FOOT_WIDTH), *textwrap.wrap(one_line(dict(record.host)), FOOT_WIDTH)]
            )
            figure.supxlabel(foot, fontsize=7, color="gray")
            figure.savefig(directory / name, dpi=110, metadata={"Software": None})
            drawn.append(name)
        pyplot.close(figure)
    return drawn


def _saving(record: Record, axes: Any) -> bool:
    found = _found(record, "save", "save")
    if not found:
        return False
    _bars(axes, found, "durable_s")
    held = [median(values(samples, "held_s")) * 1e3 for samples in found.values()]
    axes.barh(list(found), held, color="black", height=0.25, label="of that, the loop is held")
    _mark_limit(record, axes, OVERWRITTEN)
    axes.legend()
    axes.set_title(f"Until a save of {record.main_bytes / 1e6:.0f} MB is durable, recycled or rotated files")
    axes.set_xlabel("milliseconds")
    return True


def _holding(record: Record, axes: Any) -> bool:
    found = _found(record, "save", "save")
    if not found:
        return False
    for name, label, marker in (
        ("held_s", "call returns", "o"),
        ("staged_s", "state may change", "|"),
        ("durable_s", "durable", "x"),
    ):
        milliseconds = [median(values(samples, name)) * 1e3 for samples in found.values()]
        axes.plot(milliseconds, list(found), marker, label=label, markersize=9)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(f"When the loop goes on, {record.main_bytes / 1e6:.0f} MB in {record.main_count} tensors")
    axes.set_xlabel("milliseconds after the call")
    axes.legend()
    return True


def _restoring(record: Record, axes: Any) -> bool:
    found = _found(record, "load", "load")
    if not found:
        return False
    _bars(axes, found, "ready_s")
    _mark_limit(record, axes, READ)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.set_title(f"Restoring {record.main_bytes / 1e6:.0f} MB from a cold page cache")
    axes.set_xlabel("milliseconds")
    return True


def _training(record: Record, axes: Any) -> bool:
    samples = record.select("slowdown")
    if not samples:
        return False
    settings = slowdown_settings(record)
    intervals = [interval(setting) for setting in settings]
    for subject in sorted({s.subject for s in samples} - {NONE, ADOPTED}):
        found = [slowdowns(record, subject, setting) for setting in settings]
        points = [(at, median(each) * 100) for at, each in zip(intervals, found, strict=True) if each]
        axes.plot(*zip(*points, strict=True), "o-", label=subject, linewidth=3 if subject == OURS else 1)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=10)  # noise around zero is on both sides of it
    axes.set_xticks(intervals, [str(each) for each in intervals])
    axes.axhline(3, color=LIMIT_COLOUR, linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_title("How much longer training takes with checkpoints")
    computed = ", ".join(str(interval(each)) for each in COMPUTED)
    axes.set_xlabel(f"steps between checkpoints ({computed}: computed from {interval(SLOWDOWN_AT)})")
    axes.set_ylabel("per cent")
    axes.legend()
    return True


def _throughput(record: Record, axes: Any) -> bool:
    drives, flights, intervals = interval_axes(record)
    if not drives:
        return False
    for drive, line in zip(drives, ("o-", "s--"), strict=False):
        for number, count in enumerate(flights):
            found = [throughputs(record, drive, count, at) for at in intervals]
            points = [(at, median(each) * 100) for at, each in zip(intervals, found, strict=True) if each]
            axes.plot(*zip(*points, strict=True), line, color=f"C{number}", label=f"{count} in flight, {drive}")
    axes.set_xticks(intervals, [str(each) for each in intervals])
    _scale(axes, "Throughput of a training with checkpoints of 66 MB", "steps between checkpoints", "% of none")
    return True


def _sizes(record: Record, axes: Any) -> bool:
    samples = record.select("size")
    for subject in sorted({s.subject for s in samples}):
        _line(
            axes,
            [s for s in samples if s.subject == subject],
            "nbytes",
            lambda s: s.nbytes / s.values["durable_s"] / 1e9,
        )
    limits = [(n, best_limit(record, OVERWRITTEN, n)) for n in sorted({s.nbytes for s in samples})]
    points = [(nbytes, nbytes / best / 1e9) for nbytes, best in limits if best is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o--", color=LIMIT_COLOUR, label="fio's best, overwritten")
    _scale(axes, "Durable throughput by size", "bytes", "GB/s")
    return bool(samples)


def _tensors(record: Record, axes: Any) -> bool:
    samples = record.select("tensors", setting="")
    for subject in sorted({s.subject for s in samples}):
        _line(axes, [s for s in samples if s.subject == subject], "tensor_count", lambda s: s.values["held_s"] * 1e3)
    axes.set_yscale("log")
    _scale(axes, "How long the loop is held, by number of tensors", "tensors", "milliseconds")
    return bool(samples)


def _memory(record: Record, axes: Any) -> bool:
    samples = record.select("memory", nbytes=record.main_bytes)
    found = {s.subject: s.values["peak_bytes"] / 2**20 for s in samples}
    axes.barh(list(found), list(found.values()), color=_colours(found))
    axes.axvline(record.staging_bytes / 2**20 + 16, color=LIMIT_COLOUR, linestyle=":", label="staging_bytes + 16 MiB")
    axes.invert_yaxis()
    axes.set_title(f"Peak memory beyond a state of {record.main_bytes / 1e6:.0f} MB")
    axes.set_xlabel("MiB")
    axes.legend()
    return bool(samples)


CHARTS: dict[str, Callable[[Record, Any], bool]] = {
    "saving.png": _saving,
    "holding.png": _holding,
    "restoring.png": _restoring,
    "slowdown.png": _training,
    "throughput.png": _throughput,
    "sizes.png": _sizes,
    "tensors.png": _tensors,
    "memory.png": _memory,
}


def _found(record: Record, kind: str, section: str) -> dict[str, list[Sample]]:
    """The samples of all subjects of a kind that have any, in the order of the rows."""
    names = [subject.name for subject in record.subjects if subject.kind == kind]
    return {name: samples for name in names if (samples := main_samples(record, section, name))}


def _bars(axes: Any, found: dict[str, list[Sample]], name: str) -> None:
    spreads = [spread(values(samples, name)) for samples in found.values()]
    medians = [each.median * 1e3 for each in spreads]
    whiskers = [
        [(each.median - each.low) * 1e3 for each in spreads],
        [(each.high - each.median) * 1e3 for each in spreads],
    ]
    axes.barh(list(found), medians, xerr=whiskers, color=_colours(found), capsize=3)
    axes.invert_yaxis()


def _colours(names: dict[str, Any]) -> list[str]:
    return [OURS_COLOUR if name.startswith(OURS) else PEER_COLOUR for name in names]


def _mark_limit(record: Record, axes: Any, what: str) -> None:
    best = best_limit(record, what, record.main_bytes)
    if best is not None:
        axes.axvline(best * 1e3, color=LIMIT_COLOUR, linestyle=":", label=f"fio's best, {what}, in rounds of its own")


def _line(axes: Any, samples: list[Sample], along: str, height: Callable[[Sample], float]) -> None:
    places = sorted({getattr(sample, along) for sample in samples})
    heights = [median(height(s) for s in samples if getattr(s, along) == place) for place in places]
    axes.plot(places, heights, "o-", label=samples[0].subject, linewidth=3 if samples[0].subject == OURS else 1)


def _scale(axes: Any, title: str, along: str, up: str) -> None:
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.set_xlabel(along)
    axes.set_ylabel(up)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
