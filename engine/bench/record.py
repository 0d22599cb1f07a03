"""The record of a run: every sample with its subject, and the host; as JSON and back.

Theory of operation.  A sample names the act (`section`), its `subject`, the amount (`nbytes` in
`tensor_count` tensors), under which `setting`, in which round, and what was measured: values by name, whose unit is
the last word of the name (``_s`` seconds, ``_bytes``).  Nothing derived is stored.  The sections are:

    limit      fio, memcpy and pread: ``seconds_s``; the setting is what and how; pread reads only the blocks that it
               says
    ours       in the same rounds: as save, first, load and part; the setting is which.  And in the rounds of save, what
               every one of ours begins with: ``seconds_s``, the setting is "look"
    save       recycled or rotated files: ``held_s``, ``staged_s``, ``durable_s``, ``cpu_s``; ours with ``stats.*``
    first      the same, the first save of a new directory
    size       the same as save, over sizes
    tensors    the same as save, over numbers of tensors
    flight     several saves one after the other: ``seconds_s`` for all; the setting is how many may be in flight
    throughput  a training with a checkpoint every so many steps: ``step_s`` of all of them with the rest of the last
               checkpoint, ``held_s`` of all calls, ``durable_s`` of the slowest checkpoint, ``most_count`` in flight at
               a time; the setting is the drive, how many may be in flight, and the interval; without any the drive
    load       with a cold page cache: ``ready_s``, ``cpu_s``, ``read_bytes``
    part       one layer of it, cold: the same
    memory     ``peak_bytes`` and ``anonymous_bytes`` beyond the memory before, in a fresh process
    unchanged  a training that changes little, in each way to save it: the same as save, and ``changed_bytes`` of the
               blocks that differ from the step before; the setting is the training and the way
    threads    saves, restores and copies where no device is the limit: ``seconds_s``, but of copies ``cpu_s``, and of
               saves ``copying_s`` of all threads together; the setting is which, and the number of threads
    guards     under each guard: a save, with ``held_s`` and all that save has; ``step_s`` of an optimizer's step, alone
               or beside a save; and each checkpoint of a training, as slowdown; the setting is which
    monitor    the same as save; the setting says whether a monitor writes and commits
    slowdown   each checkpoint of a training, every so many steps: ``step_s`` of an undisturbed step, ``excess_s`` that
               those from the checkpoint on took longer, ``rest_s`` that the next would have to wait for, ``held_s``;
               the setting is the interval

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "engine.bench/3"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    section: str
    subject: str
    nbytes: int
    tensor_count: int
    setting: str
    round: int
    values: Mapping[str, float]


@dataclass(slots=True)
class Subject:
    """A measured subject: its use, or the reason why it was not measured."""

    name: str
    kind: str  # "save", "load", "limit" or "guard"
    how: str
    unavailable: str | None = None


@dataclass(slots=True)
class Record:
    """One run."""

    command: str
    date: str
    commit: str
    host: Mapping[str, str]
    main_bytes: int
    main_count: int
    staging_bytes: int
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def select(
        self,
        section: str,
        subject: str | None = None,
        *,
        nbytes: int | None = None,
        tensor_count: int | None = None,
        setting: str | None = None,
    ) -> list[Sample]:
        """The samples of a section; None stands for any."""
        wanted = {"subject": subject, "nbytes": nbytes, "tensor_count": tensor_count, "setting": setting}
        demands = [(name, value) for name, value in wanted.items() if value is not None]
        return [
            sample
            for sample in self.samples
            if sample.section == section and all(getattr(sample, name) == value for name, value in demands)
        ]


def values(samples: Iterable[Sample], name: str) -> list[float]:
    """One value of each sample that has it."""
    return [sample.values[name] for sample in samples if name in sample.values]


def encode(record: Record) -> str:
    """JSON, one sample a line, so that diff can compare two records."""
    fields = asdict(record)
    samples = fields.pop("samples")
    head = json.dumps({"format": FORMAT, **fields}, indent=1)
    lines = ",\n".join(f"  {json.dumps(sample)}" for sample in samples)
    return f'{head[:-2]},\n "samples": [\n{lines}\n ]\n}}\n'


def decode(text: str) -> Record:
    """The record of a JSON text.

    Raises:
        ValueError: it is none, or of another format.
    """
    fields: dict[str, Any] = json.loads(text)
    if fields.pop("format", None) != FORMAT:
        raise ValueError(f"this is no record of format {FORMAT}")
    subjects = [Subject(**subject) for subject in fields.pop("subjects")]
    samples = [Sample(**sample) for sample in fields.pop("samples")]
    return Record(**fields, subjects=subjects, samples=samples)
