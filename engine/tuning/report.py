"""Report: the measurements and the advice of a tuning as text.  Pure.

Theory of operation.  The first table has one row for each trial, beside the base that saved in the same rounds.  Times
are those of the sample.  The lines below it are of the whole state.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.options import Options
from engine.tuning.decide import Measurements, Timing, Trial, describe_options
from engine.tuning.interval import Interval

_HEADINGS = ("a save of the sample", "staged ms", "durable ms", "GB/s", "time beside the given options")


def render(
    title: str,
    measured: Measurements,
    base: Options,
    found: Options,
    interval: Interval,
    chunk_counts: tuple[int, int],
    is_cached: bool,
) -> str:
    """Everything, for a terminal."""
    when = "measured by an earlier call" if is_cached else "measured"
    mib = f"{measured.sample_bytes / 2**20:.1f} of {measured.state_bytes / 2**20:.1f} MiB"
    lines = [title, f"{when} with a sample of {mib}, through {measured.backend}", ""]
    lines += _aligned([_HEADINGS, *_rows(measured, base)])
    lines += ["", *_options(measured, base, found, chunk_counts), "", *_interval(interval)]
    return "\n".join(lines)


def _rows(measured: Measurements, base: Options) -> list[Sequence[str]]:
    nbytes = measured.sample_bytes
    given = f"given options: {base.slot_count} slots of {size(base.block_bytes)}"
    rows = [_row(given, nbytes, measured.recycled)]
    rows.append(_row("  into new files, not recycled ones", nbytes, Timing(0.0, measured.fresh_seconds)))
    rows.append(_row("  a restore: read and verified", nbytes, Timing(0.0, measured.read_seconds)))
    for flight in measured.flights:
        rows.append(
            _row(f"  saves at once: {flight.count}", flight.count * nbytes, Timing(0.0, flight.durable_seconds))
        )
    return rows + [_trial(trial, nbytes) for trial in (*measured.trials, *filter(None, [measured.final]))]


def _trial(trial: Trial, nbytes: int) -> Sequence[str]:
    value = size(trial.value) if trial.name.endswith("_bytes") and isinstance(trial.value, int) else trial.value
    name = f"together: {value}" if trial.name == "all" else f"{trial.name}={value}"
    if trial.timing is None or trial.base is None:
        return name, f"not measured: {trial.cause}"
    ratio = trial.timing.durable_seconds / max(trial.base.durable_seconds, 1e-9)
    return *_row(name, nbytes, trial.timing), f"{ratio:.2f} times, faster in {trial.wins} of {trial.rounds} rounds"


def _row(name: str, nbytes: int, timing: Timing) -> Sequence[str]:
    staged = f"{timing.staged_seconds * 1e3:.1f}" if timing.staged_seconds else ""
    speed = f"{nbytes / timing.durable_seconds / 1e9:.2f}" if timing.durable_seconds else ""
    return name, staged, f"{timing.durable_seconds * 1e3:.1f}", speed


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their cells; a row of two cells is a remark, which has no column."""
    cells = [row for row in rows if len(row) > 2]
    widths = [max((len(row[column]) for row in cells if len(row) > column), default=0) for column in range(5)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        texts = [row[0].ljust(widths[0])]
        texts += row[1:] if len(row) == 2 else [text.rjust(widths[1 + index]) for index, text in enumerate(row[1:4])]
        texts += row[4:]
        lines.append("  ".join(texts).rstrip())
    return lines


def _options(measured: Measurements, base: Options, found: Options, chunk_counts: tuple[int, int]) -> list[str]:
    changes = [describe_options(found, base)]
    changes += [f"max_async={found.max_async}"] if found.max_async != base.max_async else []
    changed = ", ".join(filter(None, changes))
    kept = "as given: nothing else was faster by more than 5 % in every round"
    low, high = chunk_counts
    new = ratio(measured.fresh_seconds, measured.recycled.durable_seconds)
    return [
        f"options      {changed or kept}",
        f"chunk_count  {low}" + (f" to {high}" if high > low else ""),
        f"new files    take {new} times as long as recycled ones",
    ]


def _interval(interval: Interval) -> list[str]:
    percent = interval.overhead * 100
    lines = [
        f"a save       is durable after {duration(interval.durable_seconds)}, {interval.in_flight} at once after "
        f"{duration(interval.write_seconds)}",
        f"             takes {duration(interval.cost_seconds)} from a training that keeps every core busy",
        f"interval     every {interval.steps} steps of {duration(interval.step_seconds)}: slower by "
        f"{interval.slowdown * 100:.1f} % (at most {percent:g} %)",
        f"             the greater of {interval.pccheck_steps} (PCcheck's formula) and {interval.cost_steps} (the "
        "cost of a save)",
        f"a failure    costs {duration(interval.loss_seconds)} on average, {duration(interval.restore_seconds)} of it "
        "the restore",
    ]
    if interval.mtbf_seconds is None:
        return [*lines, "             the optimal interval needs mtbf_seconds="]
    young, daly, loss = map(duration, (interval.young_seconds, interval.daly_seconds, interval.best_loss_seconds))
    return [
        *lines,
        f"optimum      for a failure every {duration(interval.mtbf_seconds)}: Young {young}, Daly {daly}",
        f"             every {interval.best_steps} steps; a failure then costs {loss}",
    ]


def size(nbytes: int) -> str:
    """A number of bytes in MiB, or KiB below one."""
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:g} KiB"


def duration(seconds: float | None) -> str:
    """A time in a unit that suits it; "?" for none."""
    if seconds is None:
        return "?"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def ratio(one: float, other: float) -> str:
    """How many times as long; "?" where nothing was measured."""
    return f"{one / other:.2f}" if other else "?"
