"""Tables of a record, on the terminal and as Markdown in docs/perf.md, and its line in the history.

Theory of operation.  A table is a title, heads and rows of text, made from samples, and is written as text or
Markdown. A figure is a median, with its quartiles if there are several samples.  Every subject has a row; a subject
without samples has the reason there.  The part of docs/perf.md between two markers is replaced whole, so no figure
there is typed.

Pure but for `publish`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from engine.bench.goals import (
    ADOPTED,
    BESIDE_STEP,
    BLOCK_BYTES,
    CALL,
    EVERY_CORE,
    FIRST,
    LIMITS,
    NONE,
    ONE_THREAD,
    OURS,
    PART,
    PART_BLOCKS,
    RECYCLED,
    RESTORED,
    STAGED_WHOLE,
    STEP_ALONE,
    WHOLE,
    Outcome,
    best_limit,
    interval,
    interval_axes,
    limits,
    main_samples,
    slowdown_settings,
    slowdowns,
    throughputs,
)
from engine.bench.host import one_line
from engine.bench.noise import spread
from engine.bench.record import Record, Sample, Subject, values

# The engine in the rounds of the limit: subject, act, and the time that a goal refers to.
OUR_TURNS = (
    (OURS, RECYCLED, "durable_s"),
    (OURS, FIRST, "durable_s"),
    (OURS, RESTORED, "ready_s"),
    (OURS, PART, "ready_s"),
    (STAGED_WHOLE, RECYCLED, "staged_s"),
)
MARKERS = "<!-- measured: begin, written by python -m engine.bench -->\n", "<!-- measured: end -->\n"


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the heads of the columns, and the rows."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(record: Record, goals: Iterable[Outcome]) -> list[Table]:
    """Everything that there is to say, without empty tables."""
    found = [
        _goal_table(goals),
        _limit_table(record),
        _save_table(record),
        _load_table(record),
        _slowdown_table(record),
        _scale_table(record, "size", "by size"),
        _scale_table(record, "tensors", "by number of tensors"),
        _flight_table(record),
        _throughput_table(record),
        _unchanged_table(record),
        _threads_table(record),
        _guard_table(record),
        _guarded_training_table(record),
        _monitor_table(record),
        Table("How each was used", ("", "", "how"), [(s.name, s.kind, s.how) for s in record.subjects]),
    ]
    return [table for table in found if table.rows]


def terminal(table: Table) -> str:
    """A table with aligned columns; a reason in place of a figure makes no column wider."""
    rows = [table.heads, *table.rows]
    whole = [row for row in rows if len(row) == len(table.heads)]
    widths = [max(len(row[column]) for row in whole) for column in range(len(table.heads))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]) if row in whole else row[1:])])
        for row in rows
    ]
    return "\n".join([table.title, *(f"  {line}".rstrip() for line in lines)]) + "\n"


def markdown(table: Table) -> str:
    """A table as Markdown has it."""
    rows = [table.heads, ["---"] * len(table.heads), *table.rows]
    padded = [[*row, *[""] * (len(table.heads) - len(row))] for row in rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in padded]
    return f"### {table.title}\n\n" + "\n".join(lines) + "\n"


def provenance(record: Record) -> str:
    """Where the figures come from, in a paragraph."""
    notes = "".join(f" {note}." for note in record.notes)
    return (
        f"`{record.command}`, {record.date}, commit {record.commit}, {record.seconds / 60:.0f} minutes. "
        f"{one_line(dict(record.host))}. Medians, with quartiles in brackets.{notes}"
    )


def publish(record: Record, goals: Sequence[Outcome], page: Path, charts: Sequence[str]) -> None:
    """Put a record's tables and charts between the markers of a page."""
    begin, end = MARKERS
    pictures = "".join(f"![{Path(name).stem}]({name})\n\n" for name in charts)
    body = f"{provenance(record)}\n\n{pictures}" + "\n".join(markdown(table) for table in tables(record, goals))
    text = page.read_text(encoding="utf-8")
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{body}\n{end}", text, flags=re.S
    )
    if count != 1:
        raise ValueError(f"{page.name} has the markers of what is measured {count} times; it must have them once")
    page.write_text(replaced, encoding="utf-8")


def history_line(record: Record, goals: Iterable[Outcome]) -> str:
    """The key medians of a run, as one line of JSON."""
    saves = {s.name: main_samples(record, "save", s.name) for s in record.subjects if s.kind == "save"}
    loads = {s.name: main_samples(record, "load", s.name) for s in record.subjects if s.kind == "load"}
    line = {
        "date": record.date,
        "commit": record.commit,
        "host": one_line(dict(record.host)),
        "main_bytes": record.main_bytes,
        "durable_s": {name: median(values(found, "durable_s")) for name, found in saves.items() if found},
        "held_s": {name: median(values(found, "held_s")) for name, found in saves.items() if found},
        "ready_s": {name: median(values(found, "ready_s")) for name, found in loads.items() if found},
        "fio_s": {what: best for what in LIMITS if (best := best_limit(record, what, record.main_bytes)) is not None},
        "goals": {goal.what: goal.measured for goal in goals},
    }
    return json.dumps(line) + "\n"


# -- the tables ------------------------------------------------------------------------------------------------------


def _goal_table(goals: Iterable[Outcome]) -> Table:
    def figure(value: float | None, unit: str) -> str:
        return "" if value is None else f"{value:.3g} {unit}"

    rows = [(g.what, g.goal, figure(g.measured, g.unit), g.verdict, figure(g.standin, g.unit)) for g in goals]
    return Table("Goals", ("what", "goal", "measured", "", "stand-in"), rows)


def _limit_table(record: Record) -> Table:
    rows: list[Sequence[str]] = []
    for nbytes in sorted({sample.nbytes for sample in record.select("limit")}):
        for what in LIMITS:
            found = limits(record, what, nbytes)
            if found:
                setting = min(found, key=lambda key: found[key])
                samples = record.select("limit", "fio", nbytes=nbytes, setting=setting)
                rows.append((_size(nbytes), f"fio {setting}", *_times(samples, "seconds_s"), _rate(nbytes, samples)))
        copies = record.select("limit", "memcpy", nbytes=nbytes)
        if copies:
            rows.append((_size(nbytes), "memcpy", *_times(copies, "seconds_s"), _rate(nbytes, copies)))
        for subject, setting, name in OUR_TURNS:
            samples = record.select("ours", subject, nbytes=nbytes, setting=setting)
            if samples:
                rate = _rate(nbytes, samples, name) if setting != PART else ""
                rows.append((_size(nbytes), f"{subject}, {setting}", *_times(samples, name), rate))
    reads = record.select("limit", "pread")
    if reads:
        rows.append((_size(PART_BLOCKS * BLOCK_BYTES), "pread", *_times(reads, "seconds_s"), ""))
    rows += [(s.name, s.unavailable) for s in record.subjects if s.kind == "limit" and s.unavailable]
    return Table("The limit", ("", "who, fio at its best setting", "ms", "GB/s"), rows)


def _save_table(record: Record) -> Table:
    title = f"Saving {_size(record.main_bytes)} in {record.main_count} tensors, recycled or rotated files"
    heads = ("", "loop held, ms", "state may change, ms", "durable, ms", "GB/s", "first, ms", "CPU s/GB", "memory, MiB")
    rows = [_save_row(record, subject) for subject in record.subjects if subject.kind == "save"]
    return Table(title, heads, rows)


def _save_row(record: Record, subject: Subject) -> Sequence[str]:
    samples = main_samples(record, "save", subject.name)
    if not samples:
        return _absent(subject)
    memory = record.select("memory", subject.name, nbytes=record.main_bytes)
    return (
        subject.name,
        *(_times(samples, name)[0] for name in ("held_s", "staged_s", "durable_s")),
        _rate(record.main_bytes, samples, "durable_s"),
        *_times(main_samples(record, "first", subject.name), "durable_s"),
        _middle(samples, "cpu_s", record.main_bytes / 1e9),
        _middle(memory, "peak_bytes", 2**20, digits=0),
    )


def _load_table(record: Record) -> Table:
    title = f"Restoring {_size(record.main_bytes)} from a cold page cache, and one layer of {record.main_count}"
    heads = ("", "ready, ms", "GB/s", "read, MB", "CPU s/GB", "one layer, ms", "read, MB")
    rows: list[Sequence[str]] = []
    for subject in record.subjects:
        if subject.kind != "load":
            continue
        samples = main_samples(record, "load", subject.name)
        part = main_samples(record, "part", subject.name)
        if not samples:
            rows.append(_absent(subject))
            continue
        rows.append(
            (
                subject.name,
                *_times(samples, "ready_s"),
                _rate(record.main_bytes, samples, "ready_s"),
                _middle(samples, "read_bytes", 1e6, digits=0),
                _middle(samples, "cpu_s", record.main_bytes / 1e9),
                *_times(part, "ready_s"),
                _middle(part, "read_bytes", 1e6, digits=1),
            )
        )
    return Table(title, heads, rows)


def _slowdown_table(record: Record) -> Table:
    samples = record.select("slowdown")
    settings = slowdown_settings(record)
    rows = []
    for name in [NONE, ADOPTED, *(subject.name for subject in record.subjects if subject.kind == "save")]:
        cells = [slowdowns(record, name, setting) for setting in settings]
        if any(cells):
            slower = (f"{median(found) * 100:+.1f} %" if found else "" for found in cells)
            own = record.select("slowdown", name)
            rows.append((name, *slower, *_times(own, "step_s"), *_times(own, "held_s")))
    size = f" of {_size(samples[0].nbytes)}" if samples else ""
    heads = ("", *settings, "undisturbed step, ms", "loop held, ms")
    return Table(f"Training slowdown, by steps between checkpoints{size}", heads, rows)


def _scale_table(record: Record, section: str, title: str) -> Table:
    samples = record.select(section)
    keys = sorted({(s.nbytes, s.tensor_count, s.setting, s.subject) for s in samples})
    rows = []
    for nbytes, count, setting, subject in keys:
        found = record.select(section, subject, nbytes=nbytes, tensor_count=count, setting=setting)
        cells = (_times(found, name)[0] for name in ("held_s", "staged_s", "durable_s"))
        rows.append((f"{subject}{', ' + setting if setting else ''}", _size(nbytes), f"{count:,}", *cells))
    heads = ("", "size", "tensors", "loop held, ms", "state may change, ms", "durable, ms")
    return Table(f"Saving, {title}", heads, rows)


def _flight_table(record: Record) -> Table:
    rows = []
    for setting in sorted({sample.setting for sample in record.select("flight")}):
        samples = record.select("flight", OURS, setting=setting)
        total = samples[0].nbytes * samples[0].values["save_count"]
        rows.append((setting, *_times(samples, "seconds_s"), _rate(total, samples)))
    return Table("Saves one after the other, by how many may be in flight", ("", "all, ms", "GB/s"), rows)


def _throughput_table(record: Record) -> Table:
    """Median shares of the throughput without checkpoints, and of the shortest interval how many were in flight."""
    drives, flights, intervals = interval_axes(record)
    rows = []
    for drive in drives:
        for count in flights:
            found = [throughputs(record, drive, count, interval) for interval in intervals]
            first = record.select("throughput", OURS, setting=f"{drive}, {count} in flight, every {min(intervals)}")
            most = max(values(first, "most_count"), default=0)
            shares = [f"{median(each):.1%}" if each else "" for each in found]
            rows.append((f"{drive}, max_async={count}", *shares, *_times(first, "durable_s"), f"{most:.0f}"))
    heads = (
        "",
        *(f"every {interval}" for interval in intervals),
        f"durable, ms, every {min(intervals, default=1)}",
        "in flight",
    )
    return Table("Training throughput by steps between checkpoints of 66 MB, beside none", heads, rows)


def _unchanged_table(record: Record) -> Table:
    rows = []
    for setting in sorted({sample.setting for sample in record.select("unchanged", OURS)}):
        samples = record.select("unchanged", OURS, setting=setting)
        written = (_middle(samples, name, 1e6) for name in ("changed_bytes", "stats.io_bytes"))
        times = (_times(samples, name)[0] for name in ("held_s", "durable_s", "cpu_s"))
        rows.append((setting, *written, *times))
    heads = ("", "changed, MB", "written, MB", "held, ms", "durable, ms", "CPU, ms")
    return Table("Trainings that change little", heads, rows)


def _monitor_table(record: Record) -> Table:
    rows = []
    for setting in sorted({sample.setting for sample in record.select("monitor", OURS)}):
        samples = record.select("monitor", OURS, setting=setting)
        rows.append((setting, *(_times(samples, name)[0] for name in ("held_s", "staged_s", "durable_s", "cpu_s"))))
    heads = ("", "held, ms", "state may change, ms", "durable, ms", "CPU, ms")
    return Table("Saves through a monitor, and without one", heads, rows)


def _threads_table(record: Record) -> Table:
    rows = []
    for setting in dict.fromkeys(sample.setting for sample in record.select("threads")):
        samples = record.select("threads", setting=setting)
        blocks = -(-samples[0].nbytes // BLOCK_BYTES)
        rows.append(
            (
                setting,
                *_times(samples, "seconds_s"),
                _rate(samples[0].nbytes, samples),
                _middle(samples, "copying_s", blocks / 1e3),
                _middle(samples, "cpu_s", blocks / 1e3),
            )
        )
    heads = ("", "ms", "GB/s", "copied and hashed, ms a block", "CPU, ms a block")
    return Table("Staging threads, where no device is the limit", heads, sorted(rows))


def _guard_table(record: Record) -> Table:
    heads = (
        "",
        f"{CALL}, ms",
        f"{CALL}, staged, ms",
        "threads",
        f"{STEP_ALONE}, ms",
        f"{BESIDE_STEP}, ms",
        f"{WHOLE}, ms",
    )
    rows: list[Sequence[str]] = []
    for subject in record.subjects:
        if subject.kind != "guard":
            continue
        calls = record.select("guards", subject.name, setting=CALL)
        if not calls:
            rows.append(_absent(subject))
            continue
        for threads in (EVERY_CORE, ONE_THREAD):
            settings = (f"{STEP_ALONE}, {threads}", *(f"{BESIDE_STEP}, {threads}{end}" for end in ("", f", {WHOLE}")))
            steps = (_times(record.select("guards", subject.name, setting=each), "step_s")[0] for each in settings)
            rows.append((subject.name, *_times(calls, "held_s"), *_times(calls, "staged_s"), threads, *steps))
    return Table("What each guard holds back: a call, and a step of AdamW over the whole arena", heads, rows)


def _guarded_training_table(record: Record) -> Table:
    samples = [each for each in record.select("guards") if each.setting.startswith("every ")]
    settings = sorted({each.setting for each in samples}, key=interval)
    rows = []
    for name in sorted({each.subject for each in samples}):
        found = [slowdowns(record, name, setting, "guards") for setting in settings]
        own = [each for each in samples if each.subject == name]
        slower = (f"{median(each) * 100:+.1f} %" if each else "" for each in found)
        rows.append((name, *slower, *_times(own, "step_s"), *_times(own, "held_s")))
    size = f" of {_size(samples[0].nbytes)}" if samples else ""
    heads = ("", *settings, "undisturbed step, ms", "loop held, ms")
    return Table(f"Training slowdown under each guard, by steps between checkpoints{size}", heads, rows)


def _absent(subject: Subject) -> Sequence[str]:
    return (subject.name, subject.unavailable or "not run")


def _times(samples: Sequence[Sample], name: str) -> tuple[str]:
    """Median and quartiles in milliseconds; empty if there is nothing."""
    found = values(samples, name)
    if not found:
        return ("",)
    low, middle, high = (_digits(value * 1e3) for value in spread(found))
    return (middle if len(found) == 1 else f"{middle} [{low}, {high}]",)


def _middle(samples: Sequence[Sample], name: str, unit: float, digits: int = 2) -> str:
    """The median in a unit; empty if there is nothing."""
    found = values(samples, name)
    return f"{median(found) / unit:.{digits}f}" if found else ""


def _digits(number: float) -> str:
    """Three digits that mean something, or all before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _rate(nbytes: float, samples: Sequence[Sample], name: str = "seconds_s") -> str:
    found = values(samples, name)
    return f"{nbytes / median(found) / 1e9:.2f}" if found else ""


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
