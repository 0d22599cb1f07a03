"""Table: docs/trainings.md, made from the verdicts of one run.

Theory of operation.  One row for each training; trainings of one module of a library that went the same way share a
row.  The page says nothing that differs from run to run, so that a change of it is a change of the engine or of a
version.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from catalog import Training
from not_yet import reason_for
from runner import LAST, LAST_BEFORE_KILL, Verdict

HEAD = """# Trainings

`make zoo` makes this page. Each training runs {last} steps undisturbed, in a process of its own. A second process
trains and saves in every second step, and is killed with SIGKILL at a random moment after its first checkpoint and
before step {limit}. A third process restores and trains on. *Same* means two things. Parameters, buffers, optimizer
state, schedulers and random generators are bit-identical to the undisturbed training after every step of all processes.
The stock safetensors library finds the tensors under the names of the raw module. The scripts are in `tests/zoo/`; all
of them store `engine.rng_state()` in `extra`.

Python {python}, {versions}; CPU.

| training | result | what it needs |
|---|---|---|
"""


def write_table(path: Path, judged: Sequence[tuple[Training, Verdict]]) -> None:
    """Write the page."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for training, verdict in judged:
        group, _, name = training.name.partition(": ")
        # Names of modules have dots: their members are many, and alike.
        label = group if "." in group else training.name
        rows.setdefault((label, _result(training, verdict), training.note), []).append(name)
    packages = sorted({package for training, _ in judged for package in training.needs})
    versions = [f"{package} {metadata.version(package)}" for package in ["torch", *packages]]
    python = ".".join(platform.python_version_tuple()[:2])
    text = HEAD.format(last=LAST, limit=LAST_BEFORE_KILL + 1, python=python, versions=", ".join(versions))
    for (label, result, note), names in rows.items():
        first = label if len(names) == 1 and ": " in label else f"{label}: {'; '.join(names)}"
        text += f"| {first} | {result} | {note} |\n"
    path.write_text(text, encoding="utf-8")


def _result(training: Training, verdict: Verdict) -> str:
    reason = reason_for(training.name)
    if reason:
        return f"not yet: {reason}"
    if verdict.outcome == "same":
        return "same"
    return f"{verdict.outcome}: {verdict.detail.splitlines()[0]}"
