"""Crash consistency: the simulated disk is sound, and no crash of it loses a durable checkpoint.

`cases` has the states, `crash` the checks, and `crash_campaign.py` is the long form.  The mutations at the end show
that the simulator detects damage when the code is broken.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from cases import CUT, KILL, Case, Recorder, every_plain, every_second, every_stop, random_cases
from crash import Checker, Violation, checking
from hypothesis import given
from hypothesis import strategies as st
from mutations import MUTATIONS, Drop, reordered, without
from recorder import RUN, World, blank
from scenarios import SCENARIOS
from simulator import (
    ROOT,
    SECTOR_BYTES,
    Create,
    Disk,
    Fates,
    Link,
    Operation,
    Remove,
    Rename,
    Sync,
    Trace,
    Truncate,
    Write,
)

from engine.io.job import FailureKind, Job

# The number of random states in make test; the campaign tries the rest.
RANDOM_COUNT = 3000

FILE, DIRECTORY, OTHER = 1, 2, 3


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Recorder, Checker]]:
    with checking() as pair:
        yield pair


@pytest.fixture(scope="module")
def recorder(both: tuple[Recorder, Checker]) -> Recorder:
    return both[0]


@pytest.fixture(scope="module")
def checker(both: tuple[Recorder, Checker]) -> Checker:
    return both[1]


# -- the disk -----------------------------------------------------------------------------------------------------


def trace(*operations: Operation) -> Trace:
    """On a disk with one file of one sector and two directories."""
    disk = Disk({FILE: b"a" * SECTOR_BYTES}, {ROOT: {"f": FILE, "d": DIRECTORY, "o": OTHER}, DIRECTORY: {}, OTHER: {}})
    return Trace(disk, operations)


def outcomes(of: Trace, random_count: int = 200) -> list[Disk]:
    """The possible states of the disk after a whole trace."""
    stop = len(of.operations)
    pending = of.pending(stop)
    numbers = [*range(Fates.simple_count(len(pending))), *range(Fates.RANDOM, Fates.RANDOM + random_count)]
    return [of.cut(stop, Fates(number, pending)) for number in numbers]


def test_fsync_of_a_file_covers_earlier_writes() -> None:
    written = trace(Write(FILE, 0, b"b" * 100), Truncate(FILE, 100), Sync(FILE, True))
    assert {disk.files[FILE] for disk in outcomes(written)} == {b"b" * 100}
    late = trace(Sync(FILE, True), Write(FILE, 0, b"b" * SECTOR_BYTES))
    held = {disk.files[FILE] for disk in outcomes(late)}
    assert {b"a" * SECTOR_BYTES, b"b" * SECTOR_BYTES} < held, "kept, dropped, and garbage as well"
    assert outcomes(late, 0)[1].files[FILE] == b"a" * SECTOR_BYTES


def test_fsync_of_a_file_and_of_its_name_are_independent() -> None:
    new: list[Operation] = [Create(DIRECTORY, "n", 9, False), Write(9, 0, b"content")]
    named = {disk.directories[DIRECTORY].get("n") for disk in outcomes(trace(*new, Sync(9, True)))}
    assert named == {9, None}
    held = {disk.files[9] for disk in outcomes(trace(*new, Sync(DIRECTORY, True)), 0)}
    assert held == {b"content", b""}


def test_a_write_tears_at_sectors() -> None:
    torn = trace(Write(FILE, 0, b"b" * 2 * SECTOR_BYTES))
    held = {disk.files[FILE] for disk in outcomes(torn)}
    half = b"a" * SECTOR_BYTES + b"b" * SECTOR_BYTES
    assert {half, b"b" * SECTOR_BYTES, b"b" * 2 * SECTOR_BYTES, b"a" * SECTOR_BYTES} <= held


def test_a_rename_is_whole_and_covered_by_both_directories() -> None:
    moved = Rename(DIRECTORY, "n", OTHER, "m", FILE)
    made: list[Operation] = [Create(DIRECTORY, "n", FILE, False), Sync(DIRECTORY, True)]

    def places(*syncs: int) -> set[tuple[bool, bool]]:
        disks = outcomes(trace(*made, moved, *(Sync(inode, True) for inode in syncs)))
        return {("n" in disk.directories[DIRECTORY], "m" in disk.directories[OTHER]) for disk in disks}

    assert places() == places(OTHER) == places(DIRECTORY) == {(True, False), (False, True)}
    assert places(OTHER, DIRECTORY) == {(False, True)}


def test_a_durable_rename_after_an_unsynced_one_may_leave_two_names() -> None:
    """The reason why moves from a spare are synced before their checkpoint is published (C5)."""
    first, second = Rename(ROOT, "f", DIRECTORY, "x", FILE), Rename(DIRECTORY, "x", DIRECTORY, "y", FILE)
    assert any(disk.twice_named() for disk in outcomes(trace(first, second, Sync(DIRECTORY, True))))
    assert not any(disk.twice_named() for disk in outcomes(trace(first, second)))
    assert not any(
        disk.twice_named() for disk in outcomes(trace(first, second, Sync(DIRECTORY, True), Sync(ROOT, True)))
    )


def test_a_link_is_covered_by_the_directory_of_the_new_name() -> None:
    linked = Link(DIRECTORY, "n", FILE)
    disks = outcomes(trace(linked))
    assert {disk.find("d/n") for disk in disks} == {FILE, None} and not any(disk.twice_named() for disk in disks)
    assert {disk.find("d/n") for disk in outcomes(trace(linked, Sync(FILE, True), Sync(ROOT, True)))} == {FILE, None}
    assert {disk.find("d/n") for disk in outcomes(trace(linked, Sync(DIRECTORY, True)))} == {FILE}
    moved = Rename(DIRECTORY, "n", OTHER, "m", FILE)
    twice = trace(linked, moved, Rename(OTHER, "m", OTHER, "k", FILE), Sync(OTHER, True))
    assert any(disk.twice_named() for disk in outcomes(twice)), "more names than links"
    lost = trace(linked, Remove(ROOT, "f", FILE), Sync(DIRECTORY, True), Sync(ROOT, True))
    assert {(disk.find("d/n"), disk.links[FILE]) for disk in outcomes(lost)} == {(FILE, 1)}


def test_a_removal_is_pending_until_its_directory_is_synced() -> None:
    removed = Remove(ROOT, "f", FILE)
    assert {disk.find("f") for disk in outcomes(trace(removed))} == {FILE, None}
    assert {disk.find("f") for disk in outcomes(trace(removed, Sync(ROOT, True)))} == {None}


def test_a_later_fsync_does_not_recover_writes_lost_by_a_failed_one() -> None:
    written = Write(FILE, 0, b"b" * SECTOR_BYTES)
    failed = trace(written, Sync(FILE, False), Sync(FILE, True))
    assert b"a" * SECTOR_BYTES in {disk.files[FILE] for disk in outcomes(failed)}
    again = trace(written, Sync(FILE, False), written, Sync(FILE, True))
    assert {disk.files[FILE] for disk in outcomes(again)} == {b"b" * SECTOR_BYTES}


def test_the_state_that_keeps_everything_equals_the_real_directory(tmp_path: Path) -> None:
    """The recorder misses nothing: its traces lead to the same files as the engine made."""
    for index, (name, scenario) in enumerate(SCENARIOS.items()):
        directory = tmp_path / str(index)
        directory.mkdir()
        world = World(directory, blank())
        scenario(world)
        done = world.trace()
        live = done.live(len(done.operations))
        modelled = {path: live.files.get(inode) for path, inode in live.walk()}
        real = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
        del real[f"{RUN}/.engine/lock"]  # its content does not matter
        assert modelled == {path: file.read_bytes() if file.is_file() else None for path, file in real.items()}, name


def test_traces_are_the_same_each_time(recorder: Recorder) -> None:
    with checking() as (again, _):
        for index in range(len(SCENARIOS)):
            assert recorder.scenario(index).trace.operations == again.scenario(index).trace.operations


# -- the engine on it ---------------------------------------------------------------------------------------------


def test_there_are_enough_states(recorder: Recorder) -> None:
    assert sum(1 for _ in every_plain(recorder, range(len(SCENARIOS)))) >= 10_000


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_crash_at_every_stop(recorder: Recorder, checker: Checker, name: str) -> None:
    for case in every_plain(recorder, [list(SCENARIOS).index(name)]):
        checker.check(case)


@pytest.mark.parametrize("nesting", [KILL, CUT], ids=["kill", "power cut"])
def test_a_second_crash_at_every_stop_of_recovery(recorder: Recorder, checker: Checker, nesting: int) -> None:
    first_save = list(SCENARIOS).index("first_save")
    for case in every_second(recorder, first_save, nesting, every_stop(recorder, first_save)):
        checker.check(case)


def test_random_crashes(recorder: Recorder, checker: Checker) -> None:
    """Any scenario, nested or not; torn writes and garbage among the unsynced operations."""
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    for case in itertools.islice(random_cases(recorder, random.Random(seed)), RANDOM_COUNT):
        checker.check(case)


@given(st.tuples(*(st.integers(0, (1 << bits) - 1) for bits in (8, 16, 40, 2, 16, 40))))
def test_a_case_is_determined_by_its_number(values: tuple[int, ...]) -> None:
    assert Case.of(Case(*values).number) == Case(*values)


# -- what the simulator detects -----------------------------------------------------------------------------------


def first_violation(checker: Checker, cases: Iterable[Case]) -> Violation | None:
    for case in cases:
        try:
            checker.check(case)
        except Violation as violation:
            return violation
    return None


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_engine_is_detected(name: str) -> None:
    mutation = MUTATIONS[name]
    with checking(mutation.change) as (recorder, checker):
        assert first_violation(checker, mutation.cases(recorder)) is not None


def test_a_reader_without_checksums_is_detected() -> None:
    """The real traces, checked with a reader that accepts a block that does not verify."""
    failure = vars(Job)["failure"].fget

    def lenient(job: Job) -> object:
        found = failure(job)
        return None if found is not None and found.kind == FailureKind.CHECKSUM else found

    with checking() as (recorder, checker):
        cases = list(every_plain(recorder, [list(SCENARIOS).index("set_aside")]))
        with mock.patch.object(Job, "failure", property(lenient)):
            violation = first_violation(checker, cases)
    assert violation is not None and "was damaged, and is restored" in str(violation)


def test_the_reordering_copy_of_commit_equals_the_real_one(recorder: Recorder) -> None:
    """The mutations that swap lines of `commit` use a copy of it; this checks the copy."""
    with checking(reordered("C1 C2 C3 C4 C6")) as (copied, _):
        index = list(SCENARIOS).index("recycled_save")
        assert copied.scenario(index).trace.operations == recorder.scenario(index).trace.operations


def test_a_violation_names_the_case_number_that_reproduces_it() -> None:
    with checking(without(Drop("publish", "/run"))) as (recorder, checker):
        violation = first_violation(checker, every_plain(recorder, [0]))
        assert violation is not None
        found = re.search(r"--replay (\d+)", str(violation))
        assert found is not None
    with checking(without(Drop("publish", "/run"))) as (_, again), pytest.raises(Violation) as caught:
        again.check(Case.of(int(found.group(1))))
    assert str(caught.value) == str(violation)
