"""Tune: `engine.tune`, the options and the checkpoint interval for one training on this host.

Theory of operation.  `tune` looks at the device, takes the measurements from the cache or from a `Search`, and decides.
Measurements depend on the directory, the host, the arena and the given options.  The decision also depends on the
training: the time of its step, the bound on its slowdown, the time between its failures.  So another bound or another
step needs no new measurement, unless other options win by it, which were not tried together yet.

The directory's lock is not taken: tuning neither reads nor writes a run.
"""

from __future__ import annotations

import errno
import math
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from numbers import Real
from typing import TYPE_CHECKING

from engine.errors import ArgumentError, StorageError
from engine.options import Options, Tunables, with_tunables
from engine.state.arena import Arena, check_arena
from engine.store.directory import is_directory, path_of
from engine.store.filesystem import Filesystem
from engine.store.writer import pack_all_sources
from engine.tuning import cache
from engine.tuning.decide import Measurements, in_flight, whole, write_seconds
from engine.tuning.device import Device, HostTree, chunk_counts, describe
from engine.tuning.interval import Costs, Interval, advise
from engine.tuning.measure import State
from engine.tuning.report import render
from engine.tuning.search import Search

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Tuning:
    """The result of `tune`.  `str()` of it is a table of the measurements, and the advice.

    Attributes:
        directory: its real path.
        device: below the directory.
        base: the given options.
        options: the options to use: the base, with what was faster by more than 5 % on this host.
        interval: how often to save, and what that costs.
        chunk_counts: the fewest and most chunks that are advised for this device.
        measured: all measurements.
        is_cached: whether they were taken from the cache.
    """

    directory: str
    device: Device
    base: Options
    options: Options
    interval: Interval
    chunk_counts: tuple[int, int]
    measured: Measurements
    is_cached: bool

    @property
    def interval_steps(self) -> int:
        """The shortest interval between two saves that keeps the slowdown within the bound."""
        return self.interval.steps

    def __str__(self) -> str:
        title = f"{self.directory}: {self.device}"
        decided = self.base, self.options, self.interval, self.chunk_counts
        return render(title, self.measured, *decided, self.is_cached)


def tune(
    directory: str | os.PathLike[str],
    *,
    arena: Arena,
    step_seconds: float,
    overhead: float = 0.03,
    mtbf_seconds: float | None = None,
    seconds: float = 8.0,
    refresh: bool = False,
    options: Options = DEFAULTS,
    **tunables: Unpack[Tunables],
) -> Tuning:
    """Measure this host, and find the options and the checkpoint interval for a training on it.

    Blocks for about twice `seconds`, or returns at once with the measurements of an earlier call for the same
    directory, host, arena and options.  Takes no lock.  Leaves nothing in the directory, even if it is killed, and uses
    at most a quarter of the free space and memory.  The arena is read, and must not be written to meanwhile.  Other
    load on the host makes the measurements worse: tune before training.

    Args:
        directory: of the run, or another directory on its file system; it exists.
        arena: of the training.
        step_seconds: the time of a step of the training without checkpoints.
        overhead: the bound on the part by which checkpoints may make the training slower: below 1, 0.03 for 3 %.
        mtbf_seconds: the mean time between two failures, for the optimal interval.
        seconds: the time for trying options; the other measurements take about as long, on a slow device longer.
        refresh: measure again, even if there are measurements in the cache.
        options: the options to begin with; any of them may also be given by its own keyword.  A backend other than
            ``"auto"`` is kept.

    Raises:
        ArgumentError: an argument is out of range.
        ArenaError: a tensor of the arena cannot be stored.
        PlatformError: the requested backend does not work here.
        StorageError: the directory does not exist or has too little room, no file can be made in it, or the device
            fails.
    """
    base = with_tunables("engine.tune", options, tunables, _KEYWORDS)
    check_arena(arena)
    step_seconds, overhead = _positive("step_seconds", step_seconds), _positive("overhead", overhead)
    if overhead >= 1:
        raise ArgumentError(
            f"overhead is {overhead:g}, which would let checkpoints double the time of the training; it must be a part "
            "of that time, such as 0.03 for 3 %"
        )
    seconds = _positive("seconds", seconds)
    mtbf_seconds = None if mtbf_seconds is None else _positive("mtbf_seconds", mtbf_seconds)
    filesystem = Filesystem()
    root = os.path.realpath(path_of(directory))
    if not is_directory(filesystem, root):
        raise StorageError(errno.ENOENT, "open", root, remedy="tune a directory that exists, such as its parent")
    arena.refresh()
    state = State(arena.layout, arena.runs, pack_all_sources(arena.layout, arena.sources), (arena, arena.memory))
    device = describe(HostTree(), root)
    search = Search(root, filesystem, state, base, device, arena.refresh, seconds)
    measured, found, is_cached = _find(search, _fingerprint(root, device, state, base), step_seconds, refresh)
    count = in_flight(base, measured.flights, measured.state_bytes, filesystem.free_bytes(root))
    found = replace(found, max_async=count)
    return Tuning(
        directory=root,
        device=device,
        base=base,
        options=found,
        interval=advise(_costs(measured, base, found, step_seconds), overhead, step_seconds, mtbf_seconds),
        chunk_counts=chunk_counts(device.kind, measured.sample_bytes / max(measured.recycled.durable_seconds, 1e-9)),
        measured=measured,
        is_cached=is_cached,
    )


# Of `tune`, beside the tunables.
_KEYWORDS = tuple(name for name in tune.__annotations__ if name not in ("directory", "tunables", "return"))


def _find(
    search: Search, fingerprint: cache.Fingerprint, step_seconds: float, refresh: bool
) -> tuple[Measurements, Options, bool]:
    """The measurements, the options that won, and whether the measurements are those of an earlier call."""
    path = cache.path_for(search.directory, os.environ)
    measured = None if refresh or path is None else cache.load(search.filesystem, path, fingerprint)
    if measured is not None and (found := search.confirmed(measured, step_seconds)) is not None:
        return measured, found, True
    measured = search.run(step_seconds)
    if path is not None:
        cache.store(search.filesystem, path, fingerprint, measured)
    return measured, search.confirmed(measured, step_seconds) or search.base, False


def _costs(measured: Measurements, base: Options, found: Options, step_seconds: float) -> Costs:
    """The times of the whole state, with the options that were found."""
    final = measured.final
    timing, factor = None, 1.0
    if final is not None and final.timing is not None and final.base is not None and found != base:
        timing, factor = final.timing, final.timing.durable_seconds / max(final.base.durable_seconds, 1e-9)
    one = whole(timing or measured.recycled, found if timing else base, measured)
    staged_late = max(0.0, one.staged_seconds - step_seconds)
    return Costs(
        in_flight=found.max_async,
        write_seconds=write_seconds(found.max_async, measured.flights) * factor * measured.scale
        + measured.commit_seconds,
        durable_seconds=one.durable_seconds + measured.commit_seconds,
        cost_seconds=measured.held_seconds + staged_late + measured.lost_seconds * measured.scale,
        restore_seconds=measured.read_seconds * measured.scale,
    )


def _fingerprint(root: str, device: Device, state: State, base: Options) -> cache.Fingerprint:
    return cache.Fingerprint(
        engine=version("uring-checkpoint"),
        kernel=platform.release(),
        device=device,
        device_number=os.stat(root).st_dev,
        cores=len(os.sched_getaffinity(0)),
        state_bytes=state.nbytes,
        segment_count=len(state.layout.segments),
        options=repr(base),
    )


def _positive(name: str, value: object) -> float:
    """A positive number of any type as a float, or ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ArgumentError(f"{name} is {value!r}; it must be a positive number")
    return float(value)
