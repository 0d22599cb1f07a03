"""Options: every tunable of an Engine, with its unit, its default and the source of the default.

Theory of operation.  `Options` is an immutable value that is checked when it is made.  `Engine`, `engine.open`,
`engine.probe` and `engine.tune` take one, and single values by keyword, which replace those of the Options.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from engine.errors import ArgumentError
from engine.format.checks import BLOCK_BYTES_MAX
from engine.format.plan import ALIGNMENT, CHUNK_BYTES_DEFAULT

# Ways to move blocks, best first: `io.backend` describes them.
Backend = Literal["io_uring", "io_uring_plain", "threads", "buffered"]
Choice = Literal["auto", "io_uring", "io_uring_plain", "threads", "buffered"]

# Ways to notice the writers of an arena while a save reads it, best first: `io.guard` describes the first two, and
# `state.fence` the last.
GuardName = Literal["cow", "detect", "fence"]
GuardChoice = Literal["auto", "cow", "detect", "fence"]

# The process that owns the directory: the trainer, or one that outlives it (`engine.monitor`).
Isolation = Literal["none", "process"]

# Half of the pipeline's room for jobs (ENG_JOBS_MAX), so that restores always find room.
MAX_ASYNC_MAX = 32

# Far above the queue depth that any drive gains from, and within the kernel's limits: 32,768 entries of a ring and
# 16,384 registered buffers (IORING_MAX_ENTRIES and IORING_MAX_REG_BUFFERS in io_uring/).
SLOT_COUNT_MAX = 1024

# ENG_STAGING_THREADS_MAX: more threads than the memory of a socket feeds, at some 15 GB/s each.
STAGING_THREADS_MAX = 16


class Tunables(TypedDict, total=False):
    """The fields of `Options`, as keywords."""

    staging_bytes: int
    staging_threads: int
    block_bytes: int
    chunk_bytes: int
    max_async: int
    backend: Choice
    guard: GuardChoice
    rewrite_all: bool
    split_untrained: bool
    isolation: Isolation


@dataclass(frozen=True, kw_only=True)
class Options:
    """The tunables of an Engine.

    Attributes:
        staging_bytes: memory for staging slots, at least two blocks; pinned if the locked-memory limit allows; at most
            1024 slots are made of it.  256 MiB: 500 MB are staged in 63 ms with it, and in 30 ms if all of them fit
            (docs/perf.md).
        staging_threads: threads that copy and hash the blocks of saves, and verify those of restores, 1 to 16; one is
            the thread that owns the ring.  1: one core stages some 15 GB/s, and one drive takes at most 14
            (docs/perf.md).  More pay where several drives take more, and take cores from the training meanwhile.
        block_bytes: the size of one write or read and of a slot, a multiple of 4096 of at most 1 GiB.  4 MiB:
            bandwidth times latency, some 2 MB, keeps a drive busy.
        chunk_bytes: the size of a chunk, the unit of status, rounded up to a multiple of 4096.  64 MiB take
            a fast drive some tens of milliseconds.
        max_async: how many saves may be in flight, 1 to 32.  2: one is written while the next one is staged.
        backend: how blocks are moved.  ``"auto"`` takes the best that works; any other is insisted on.
        guard: how a snapshot is kept from tearing.  ``"auto"`` takes the best that works; any other is insisted on.
        rewrite_all: write every block, even one that the recycled file holds already by its hash.
        split_untrained: store untrained tensors of the model (frozen parameters, buffers) in files of their own, which
            are hard-linked from the checkpoint before as long as nothing in them changes.  Off: the model is one file.
        isolation: ``"process"`` has a process of its own write and commit, the monitor.  It completes a save whose
            trainer dies after staging.  It costs some 0.3 s to start and 30 MB.

    Raises:
        ArgumentError: a value is out of range.
    """

    staging_bytes: int = 256 << 20
    staging_threads: int = 1
    block_bytes: int = 4 << 20
    chunk_bytes: int = CHUNK_BYTES_DEFAULT
    max_async: int = 2
    backend: Choice = "auto"
    guard: GuardChoice = "auto"
    rewrite_all: bool = False
    split_untrained: bool = False
    isolation: Isolation = "none"

    def __post_init__(self) -> None:
        self._check_range("max_async", 1, MAX_ASYNC_MAX)
        self._check_range("block_bytes", ALIGNMENT, BLOCK_BYTES_MAX)
        self._check_range("staging_bytes", 2 * self.block_bytes, None)
        self._check_range("staging_threads", 1, STAGING_THREADS_MAX)
        self._check_range("chunk_bytes", 1, None)
        check_choice("backend", self.backend, Choice)
        check_choice("guard", self.guard, GuardChoice)
        check_choice("isolation", self.isolation, Isolation)
        if self.block_bytes % ALIGNMENT:
            raise ArgumentError(f"block_bytes is {self.block_bytes}; it must be a multiple of {ALIGNMENT}")

    @property
    def slot_count(self) -> int:
        """The number of slots."""
        return min(self.staging_bytes // self.block_bytes, SLOT_COUNT_MAX)

    def _check_range(self, name: str, low: int, high: int | None) -> None:
        object.__setattr__(self, name, check_range(name, getattr(self, name), low, high))


def with_tunables(function: str, options: object, tunables: Mapping[str, Any], keywords: Iterable[str]) -> Options:
    """The Options of a call that takes them whole and one by one.

    Args:
        function: its name, for messages.
        options: given whole.
        tunables: given by keyword, and replace those of `options`.
        keywords: its other keywords.

    Raises:
        ArgumentError: there is no such keyword, or a value is out of range.
    """
    if not isinstance(options, Options):
        raise ArgumentError(f"options is {options!r}; it must be an engine.Options")
    known = [field.name for field in fields(Options)]
    check_keywords(function, tunables, [*keywords, *known])
    return replace(options, **tunables)


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise ArgumentError if a keyword is not known; the message names the nearest one that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise ArgumentError(f"{function}() has no keyword {name!r}; {hint}")


def whole_number(value: object) -> int | None:
    """An integer of any type (`operator.index`), such as numpy's or a tensor's, as an int; None if it is none.

    True is none, because it would name step 1.
    """
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):  # torch.tensor(True) has an index
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor that has no value
        return None


def check_range(name: str, value: object, low: int, high: int | None) -> int:
    """Return an integer from `low` to `high` as an int, or raise ArgumentError."""
    number = whole_number(value)
    if number is None:
        raise ArgumentError(f"{name} is {value!r}; it must be an integer")
    if number < low or (high is not None and number > high):
        raise ArgumentError(f"{name} is {number}; it must be at least {low}" + (f" and at most {high}" if high else ""))
    return number


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ArgumentError unless `value` is one of a Literal's."""
    if value not in choices.__args__:
        raise ArgumentError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices.__args__))}")
