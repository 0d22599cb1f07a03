"""Every fault at every operation: of system calls and of blocks, under a whole Engine.

Theory of operation.  A scenario is one act of an Engine: open, save, restore, roll back, set aside.  It runs
repeatedly in copies of one prepared directory, each time with the next of its operations refused, until it ends
without meeting the refusal.  After each run the contract of docs/durability.md is checked: a typed error that names
operation, path, offset and remedy; no directory of the failed step; every earlier checkpoint unchanged; the same
Engine saves and restores; another one opens the directory; nothing is leaked.

`syscalls.SystemCalls` refuses system calls.  A `faults.FaultTable` in place of the ring refuses reads and writes of
blocks.  The Engines are opened with `BACKEND`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import random
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from disk import names
from faults import Fault, FaultTable, corrupting, not_started, refused, short
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import until
from leaks import held
from recorder import SMALL
from scenarios import content, training
from syscalls import Call, SystemCalls

import engine
from engine.io.descriptor import Descriptor
from engine.io.job import Job
from engine.io.pipeline import Pipeline
from engine.store.filesystem import Filesystem

BACKEND: dict[str, Any] = {}

# The calls of an Engine are counted, so only one save at a time.
OPTIONS: Mapping[str, Any] = {**SMALL, "keep": 2, "max_async": 1, **BACKEND}

# Not EINTR: Python makes a call again that a signal has interrupted (PEP 475), and so does `binding.allocate`.
ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EAGAIN, errno.ENOMEM, errno.EMFILE]
by_errno = pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)

# So many that every later call fails, too.
FOR_EVER = 1_000_000

HANG_S = 60  # ends a test that hangs; every wait here is short

injected: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """Prints the number of faults that this file has injected; pytest shows it with -s."""
    yield
    sys.stdout.write(f"\nfaults injected: {dict(injected)}\n")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = held()
    yield
    for _ in range(500):  # the kernel ends a ring's workers later
        if held() == before:
            break
        time.sleep(0.01)
    assert held() == before


@contextmanager
def opened(root: Path, **options: Any) -> Iterator[engine.Engine]:
    """An Engine with small slots, which fit any limit on locked memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'io_uring_plain' is used", engine.EngineWarning)
        eng = engine.Engine(root, **{**OPTIONS, **options})
    with eng:
        yield eng


def save(eng: engine.Engine, step: int | None, payload: int) -> int:
    """Save new contents, and wait for the save to end; returns the step."""
    training("trained").fill(payload)
    return eng.checkpoint(training("trained").arena, step, snapshot="eager").result(HANG_S).step


def stored(eng: engine.Engine, step: int) -> bytes:
    """The content of a step, in order of name."""
    return b"".join(tensor.numpy().tobytes() for _, tensor in sorted(eng.load(step).items()))


@contextmanager
def logged(level: int) -> Iterator[list[str]]:
    """The engine's log at a level; nothing is printed."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == level:
                messages.append(record.getMessage())

    log, handler = logging.getLogger("engine"), Keep()
    log.addHandler(handler)
    log.propagate = False
    try:
        yield messages
    finally:
        log.propagate = True
        log.removeHandler(handler)


# -- system calls -----------------------------------------------------------------------------------------------------


class Scenario(NamedTuple):
    """An act of an Engine in a prepared directory while calls are refused.

    `before` is done undisturbed.  The steps `kept` must exist with their contents whether `act` fails or not, and
    `made` if it does not fail.
    """

    directory: str
    act: Callable[[engine.Engine], object]
    kept: Mapping[int, int]
    made: Mapping[int, int]
    before: Callable[[engine.Engine], object] = lambda _: None


def restore(eng: engine.Engine, step: int | None = None) -> None:
    """A restore of the newest, or of this step, which returns the saved state or raises."""
    info = eng.restore(training("trained").arena, step)
    assert training("trained").content() == content("trained", info.step)


def find_damage(eng: engine.Engine) -> None:
    """A restore that passes over step 2, so that the next save sets it aside."""
    with pytest.warns(engine.EngineWarning, match="step 2 is passed over"):
        restore(eng)


def save_in_its_place(eng: engine.Engine) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "step 2 is damaged and was renamed", engine.EngineWarning)
        save(eng, 2, 2)


TWO = {1: 1, 2: 2}
SCENARIOS = {
    "first save": Scenario("empty", lambda eng: save(eng, 3, 3), {}, {3: 3}),
    "recycled save": Scenario("used", lambda eng: save(eng, 3, 3), {2: 2}, {3: 3}),
    "restore": Scenario("used", restore, TWO, TWO),
    "restore of a step": Scenario("used", lambda eng: restore(eng, 1), TWO, TWO),
    "rollback": Scenario("used", lambda eng: eng.rollback(1), {1: 1}, {}),
    "set aside": Scenario("damaged", save_in_its_place, {1: 1}, {2: 2}, find_damage),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories to begin with: ``empty``; ``used``, with steps 1 and 2, a spare and a leftover; ``damaged``."""
    for payload in range(30):
        content("trained", payload)  # which fills the tensors only the first time
    base = tmp_path_factory.mktemp("prepared")
    (base / "empty").mkdir()
    with opened(base / "used") as eng:
        for step in range(3):
            save(eng, step, step)
    leftover = base / "used" / "step-00000009.partial"
    leftover.mkdir()
    for name in ("model.safetensors", "old.safetensors"):
        (leftover / name).write_bytes(b"left by a kill")
    shutil.copytree(base / "used", base / "damaged")
    (base / "damaged" / "step-00000002" / "manifest.json").write_bytes(b"{}")
    return base


def outcome(act: Callable[[], object]) -> tuple[engine.EngineError | None, list[str]]:
    """The typed error of an act, and the checkpoints that it passed over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except engine.EngineError as error:
            return error, [str(warning.message) for warning in caught]
    return None, [str(warning.message) for warning in caught]


def check_error(error: engine.EngineError, calls: list[Call], code: int) -> None:
    """The error names the refused operation, its path, its errno and a remedy.

    If several were refused it may name any of them: a failed rollback names its last.
    """
    if calls[0].operation == "flock" and code == errno.EWOULDBLOCK:
        assert isinstance(error, engine.LockedError)
        return
    assert isinstance(error, engine.StorageError), error
    # The length of a file is asked for while it is read.
    assert error.path in {call.path for call in calls if call.operation in (error.operation, "stat")}
    assert (error.errno, error.offset) == (code, None)
    assert str(error).endswith(f"{os.strerror(code)} (errno {code}); {error.remedy}") and error.remedy


def check_refused(error: engine.EngineError | None, told: list[str], system: SystemCalls, code: int) -> None:
    """Assert that the refusal failed the act with the right error, or was passed over with a warning."""
    injected["system calls"] += len(system.refused)
    grave = [call for call in system.refused if not call.is_probe]
    if code in (errno.ENOSPC, errno.EDQUOT):
        grave = [call for call in grave if not call.is_scratch]
    if isinstance(error, engine.CorruptError):  # every step was passed over
        assert code == errno.EIO and len(told) == 2 and all(os.strerror(code) in text for text in told)
    elif error is not None:
        check_error(error, grave, code)
    else:
        # A lock that is refused for a moment is asked for again, because a monitor may be about to give it back.
        again = code == errno.EWOULDBLOCK and all(call.operation == "flock" for call in grave)
        assert told or again or not grave, f"{grave} was not reported"


def disturb(scenario: Scenario, root: Path, code: int, start: int, count: int) -> bool:
    """Run a scenario with some of its calls refused; False if it ended before them."""
    system = SystemCalls()
    with system.installed(), logged(logging.WARNING) as retired, opened(root) as eng:
        scenario.before(eng)
        there = committed(root)
        begun = len(system.calls)
        system.refuse(code, start, count)
        error, passed_over = outcome(lambda: scenario.act(eng))
        system.heal()
        check_not_synced_again(system.calls[begun + start :])
        if not system.refused:
            assert error is None
            return False
        check_refused(error, passed_over + retired, system, code)
        visible = visible_all_the_same(there, root, system) if error is not None else set()
        check_goes_on(eng, scenario.kept if error is not None else {**scenario.kept, **scenario.made}, visible)
        steps = eng.steps()
    with system.installed(), opened(root) as again:
        assert set(again.steps()) == {*steps, *visible}
        check_goes_on(again, {step: step for step in visible}, set())
    return True


def check_not_synced_again(calls: list[Call]) -> None:
    """A failed fsync is not repeated (I7): the first of these calls was refused."""
    if calls and calls[0].operation == "fsync":
        assert calls[0] not in calls[1:]


def committed(root: Path) -> set[tuple[str, int]]:
    """The directories that have a step's name, and their inodes."""
    return {(name, (root / name).stat().st_ino) for name in names(root) if "." not in name}


def visible_all_the_same(there: set[tuple[str, int]], root: Path, system: SystemCalls) -> set[int]:
    """The steps left by a failed save: only the known gap of I3 in docs/durability.md allows one."""
    left = {name for name, _ in committed(root) - there}
    for name in left:
        syncs = {call.operation for call in system.refused if call.path == os.path.realpath(root)}
        assert syncs & {"open", "fsync"}, "it is known to be durable"
        assert Call("rename", os.path.join(os.path.realpath(root), name)) in system.refused, "it was not taken back"
    return {int(name.removeprefix("step-")) for name in left}


def check_goes_on(eng: engine.Engine, held_steps: Mapping[int, int], visible: set[int]) -> None:
    """Assert that all saved steps exist, and that the Engine restores and saves."""
    for step, payload in held_steps.items():
        assert stored(eng, step) == content("trained", payload)
    if visible:  # a step that this Engine does not count blocks a save of that number
        with logged(logging.ERROR), pytest.raises(engine.StepError, match="open a new Engine"):
            save(eng, max(visible), 20)
    free = max([*eng.steps(), *visible], default=0) + 1 if visible else None
    step = save(eng, free, 21)
    assert eng.restore(training("trained").arena).step == step and training("trained").content() == content(
        "trained", 21
    )


@by_errno
@pytest.mark.parametrize("name", SCENARIOS)
def test_one_system_call_refused_during_a_save(prepared: Path, tmp_path: Path, name: str, error: int) -> None:
    scenario = SCENARIOS[name]
    count = sweep(prepared / scenario.directory, tmp_path, functools.partial(disturb, scenario), error, 1)
    assert count >= 10, "hardly anything was refused"


# A disk that is gone, and a file system that the kernel made read-only for that.
from_one_on = pytest.mark.parametrize("error", [errno.EIO, errno.EROFS], ids=errno.errorcode.__getitem__)


@from_one_on
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_system_call_refused_from_one_on_during_a_save(
    prepared: Path, tmp_path: Path, name: str, error: int
) -> None:
    scenario = SCENARIOS[name]
    sweep(prepared / scenario.directory, tmp_path, functools.partial(disturb, scenario), error, FOR_EVER)


Attempt = Callable[[Path, int, int, int], bool]


def sweep(directory: Path, scratch: Path, attempt: Attempt, error: int, count: int) -> int:
    """Attempt something in fresh copies of a directory, with a later call refused each time, until none is."""
    start = 0
    while True:
        root = scratch / f"{start}"
        shutil.copytree(directory, root)
        with logged(logging.ERROR):
            reached = attempt(root, error, start, count)
        shutil.rmtree(root)
        if not reached:
            return start
        start += 1


def disturb_opening(root: Path, code: int, start: int, count: int) -> bool:
    """Open an Engine with some of its calls refused; False if it was open before them."""
    system = SystemCalls()
    held_before = {step: step for step in TWO if (root / f"step-{step:08d}").exists()}

    def open_and_close() -> None:
        with opened(root / "deep" if not held_before else root):
            system.heal()

    with system.installed():
        system.refuse(code, start, count)
        error, told = outcome(open_and_close)
        system.heal()
        if not system.refused:
            return False
        check_refused(error, told, system, code)
        with opened(root / "deep" if not held_before else root) as eng:
            check_goes_on(eng, held_before, set())
    return True


@by_errno
@pytest.mark.parametrize("directory", ["empty", "used"])
def test_a_system_call_refused_during_open(prepared: Path, tmp_path: Path, directory: str, error: int) -> None:
    assert sweep(prepared / directory, tmp_path, disturb_opening, error, 1) >= 10, "hardly anything was refused"


@from_one_on
@pytest.mark.parametrize("directory", ["empty", "used"])
def test_every_system_call_refused_from_one_on_during_open(
    prepared: Path, tmp_path: Path, directory: str, error: int
) -> None:
    sweep(prepared / directory, tmp_path, disturb_opening, error, FOR_EVER)


# -- reads and writes of blocks ---------------------------------------------------------------------------------------

# These errors are never transient; the pipeline retries the others.
LASTING = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS]
PASSING = [errno.EINTR, errno.EAGAIN, errno.ENOMEM]

# More than the pipeline's tries of an operation and of a submission (native/pipeline/pipeline.c).
RETRIES = 17
REFUSALS = 101

ABSENT = -7.0  # a value that no saved tensor has


class Blocks:
    """An Engine over a table of faults, which are counted from when they are armed."""

    def __init__(self, eng: engine.Engine, table: FaultTable, root: Path) -> None:
        self.engine, self.table, self.root = eng, table, root

    def arm(self, script: Mapping[int, Fault], **options: Any) -> int:
        """Make these operations fail; returns the number of the first."""
        self.table.arm(script, **options)
        injected["blocks"] += len(script)
        return len(self.table.operations)

    def save(self) -> engine.EngineError | None:
        """A save of step 3."""
        with logged(logging.ERROR):
            return outcome(lambda: save(self.engine, 3, 3))[0]

    def restore(self, step: int | None = 2) -> engine.EngineError | None:
        """A restore into tensors with other values; none of them may get a wrong byte."""
        tensors = training("trained").arena.state_dict()
        for tensor in tensors.values():
            tensor.fill_(ABSENT)
        error, passed_over = outcome(lambda: restore(self.engine, step))
        injected["checkpoints passed over"] += len(passed_over)
        if error is not None:
            self.check_torn(tensors)
        return error

    def check_torn(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """After a restore of step 2 has failed half-way: the restored bytes are right, and the arena is not saved."""
        assert training("trained").arena.torn
        with pytest.raises(engine.ArenaError, match="half-way"):
            self.engine.checkpoint(training("trained").arena)
        self.table.heal()
        for name, wanted in self.engine.load(2).items():
            assert tensors[name].eq(wanted).logical_or(tensors[name].eq(ABSENT)).all(), name
        restore(self.engine, 2)  # for later tests the arena must be whole

    def check_failed(self, error: engine.EngineError | None, code: int, operation: str, number: int) -> None:
        """An error that names this operation; no step 3; and the engine works on."""
        assert isinstance(error, engine.StorageError)
        refused_one = self.table.operations[number]
        assert (error.errno, error.operation, error.offset) == (code, operation, refused_one.file_offset)
        step_name = "step-00000003.partial" if operation == "write" else "step-00000002"
        assert Path(error.path).parent == self.root / step_name and Path(error.path).suffix == ".safetensors"
        assert f"at byte {error.offset}: {os.strerror(code)}" in str(error) and str(error).endswith(error.remedy)
        self.check_goes_on({1, 2})

    def check_goes_on(self, steps: set[int]) -> None:
        assert {int(name[5:]) for name in names(self.root)} == steps
        self.table.heal()
        check_goes_on(self.engine, {step: step for step in steps}, set())


@contextmanager
def blocks(prepared: Path, scratch: Path, **options: Any) -> Iterator[Blocks]:
    """An Engine on steps 1 and 2; afterwards another one opens the directory."""
    table = FaultTable()
    root = Path(os.path.realpath(scratch)) / f"{len(os.listdir(scratch))}"
    shutil.copytree(prepared / "used", root)
    with (
        table.moving_blocks(),
        SystemCalls().installed(),
        opened(root, keep=None, **options, backend="buffered") as eng,
    ):
        yield Blocks(eng, table, root)
        steps = eng.steps()
    assert not table.exceptions, table.exceptions
    with opened(root, keep=None) as again:
        assert again.steps() == steps and stored(again, 1) == content("trained", 1)
    shutil.rmtree(root)


# Two files of three blocks each: `scenarios.Training`.
NUMBERS = range(6)
acts = pytest.mark.parametrize("act", ["write", "read"])


def run(it: Blocks, act: str) -> engine.EngineError | None:
    return it.save() if act == "write" else it.restore()


def check_done(it: Blocks, act: str) -> None:
    """The act has succeeded, and all bytes are right."""
    it.table.heal()
    if act == "write":
        assert stored(it.engine, 3) == content("trained", 3)
    else:
        assert training("trained").content() == content("trained", 2)


@acts
@pytest.mark.parametrize("error", LASTING, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("fault", [refused, not_started])
def test_a_lasting_error_of_a_block(
    prepared: Path, tmp_path: Path, act: str, error: int, fault: Callable[[int], Fault]
) -> None:
    for number in NUMBERS:
        with blocks(prepared, tmp_path) as it:
            first = it.arm({number: fault(error)})
            it.check_failed(run(it, act), error, act, first + number)
    with blocks(prepared, tmp_path) as it:
        first = it.arm({})
        assert run(it, act) is None and len(it.table.operations) - first == len(NUMBERS)


@acts
@pytest.mark.parametrize("error", PASSING, ids=errno.errorcode.__getitem__)
def test_a_transient_error_of_a_block(prepared: Path, tmp_path: Path, act: str, error: int) -> None:
    for number in NUMBERS:
        with blocks(prepared, tmp_path) as it:
            it.arm({number: refused(error)})
            assert run(it, act) is None
            check_done(it, act)
        with blocks(prepared, tmp_path, staging_bytes=2 * 4096) as it:  # so few slots that the order is known
            first = it.arm(dict.fromkeys(range(number, number + 2 * RETRIES), refused(error)))
            failure = run(it, act)
            it.check_failed(failure, error, act, first + number)


@acts
@pytest.mark.parametrize("error", PASSING, ids=errno.errorcode.__getitem__)
def test_a_refused_submission(prepared: Path, tmp_path: Path, act: str, error: int) -> None:
    """A transient refusal is retried; after a lasting one every job fails until the Engine is opened again."""
    with blocks(prepared, tmp_path) as it:
        it.table.refuse([error] * (REFUSALS - 1))
        assert run(it, act) is None
        check_done(it, act)
        it.table.refuse([error] * REFUSALS)
        injected["blocks"] += 2 * REFUSALS - 1
        for _ in range(2):
            failure = outcome(lambda: save(it.engine, 4, 4))[0]
            assert isinstance(failure, engine.StorageError) and failure.errno == error
            assert failure.path == str(it.root / "step-00000004.partial") and failure.operation == "write"
        assert "step-00000004" not in names(it.root)


@acts
def test_a_completion_of_no_bytes(prepared: Path, tmp_path: Path, act: str) -> None:
    for number in NUMBERS:
        with blocks(prepared, tmp_path) as it:
            first = it.arm({number: short(0)})
            error = run(it, act)
            if act == "write":
                it.check_failed(error, errno.EIO, act, first + number)
            else:
                where = it.table.operations[first + number].file_offset
                assert isinstance(error, engine.CorruptError) and f"byte {where}" in str(error)
                it.check_goes_on({1, 2})


def test_a_corrupt_block_reaches_no_tensor(prepared: Path, tmp_path: Path) -> None:
    for number in NUMBERS:
        with blocks(prepared, tmp_path) as it:
            it.arm({number: corrupting()})
            error = it.restore()
            assert isinstance(error, engine.CorruptError) and "checksum" in str(error)
            it.check_goes_on({1, 2})


@pytest.mark.parametrize("fault", [refused(errno.EIO), short(0), corrupting()], ids=lambda fault: fault.kind)
def test_a_restore_passes_over_the_newest_for_a_bad_block(prepared: Path, tmp_path: Path, fault: Fault) -> None:
    for number in NUMBERS:
        with blocks(prepared, tmp_path) as it:
            it.arm({number: fault})
            assert it.restore(None) is None and training("trained").content() == content("trained", 1)


class Gated(NamedTuple):
    """An Engine whose reads and writes complete only while `gate` is set."""

    engine: engine.Engine
    table: FaultTable
    gate: threading.Event

    def hold(self) -> None:
        """Let nothing complete from now on.  Called while no job is running."""
        self.gate.clear()
        self.table.operations.clear()

    def wait_started(self) -> None:
        """Return when an operation is in flight."""
        until(lambda: len(self.table.operations) > 0)


@contextmanager
def gated(directory: Path, filesystem: Filesystem | None = None) -> Iterator[Gated]:
    """The gate is open at first, and opened again at the latest when the Engine is to be closed."""
    gate = threading.Event()
    table = FaultTable(gate=gate)
    gate.set()
    with ExitStack() as stack:
        with table.moving_blocks():  # of this Engine alone
            eng = stack.enter_context(opened(directory, filesystem=filesystem, backend="buffered"))
        stack.callback(gate.set)
        yield Gated(eng, table, gate)
    assert not table.exceptions, table.exceptions


class Closing(Filesystem):
    """Records whether blocks were still in flight when a data file was closed."""

    def __init__(self) -> None:
        self.data: set[Descriptor] = set()
        self.closed: list[Descriptor] = []

    def open_for_blocks(self, path: str, write: bool, direct: bool, directory: Descriptor | None = None) -> Descriptor:
        descriptor = super().open_for_blocks(path, write, direct, directory)
        self.data.add(descriptor)
        return descriptor

    def close(self, descriptor: Descriptor) -> None:
        if descriptor in self.data:
            self.closed.append(descriptor)
            self.data.discard(descriptor)
        super().close(descriptor)


@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), engine.StorageError(errno.EIO, "write", "here")],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_save_closes_no_file_with_writes_in_flight(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that is closed too early may be reused by another file, which then gets the writes."""
    filesystem = Closing()
    with gated(tmp_path, filesystem) as it, logged(logging.ERROR):
        it.hold()
        attach = Pipeline.attach

        def failing(pipeline: Pipeline, job: Job, descriptors: Sequence[int], known: Any = None) -> None:
            attach(pipeline, job, descriptors, known)
            it.wait_started()
            raise error

        monkeypatch.setattr(Pipeline, "attach", failing)
        pending = it.engine.checkpoint(training("trained").arena, step=1, snapshot="lazy")
        it.wait_started()
        time.sleep(0.05)  # for an event that must not happen
        assert not pending.done() and not filesystem.closed and len(filesystem.data) == 2
        it.gate.set()
        assert pending.exception(HANG_S) is error and len(filesystem.closed) == 2
        monkeypatch.undo()
        save(it.engine, 1, 3)
        assert names(tmp_path) == ["step-00000001"]


def test_an_interrupted_restore_closes_no_file_with_reads_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = Closing()
    with ThreadPoolExecutor(1) as pool, gated(tmp_path, filesystem) as it:
        it.gate.set()
        save(it.engine, 1, 3)
        it.hold()
        filesystem.closed.clear()
        attach = Pipeline.attach

        def interrupted(pipeline: Pipeline, job: Job, descriptors: Sequence[int], known: Any = None) -> None:
            attach(pipeline, job, descriptors, known)
            it.wait_started()
            raise KeyboardInterrupt

        monkeypatch.setattr(Pipeline, "attach", interrupted)
        loading = pool.submit(it.engine.load, 1)
        it.wait_started()
        time.sleep(0.05)  # for an event that must not happen
        assert not loading.done() and not filesystem.closed
        it.gate.set()
        with pytest.raises(KeyboardInterrupt):
            loading.result(HANG_S)
        assert len(filesystem.closed) == 2
        monkeypatch.undo()
        assert stored(it.engine, 1) == content("trained", 3)


def test_the_lock_is_held_until_the_last_read_has_ended(tmp_path: Path) -> None:
    """Another Engine could overwrite the files that are being read: pins are of one Engine."""
    with ThreadPoolExecutor(2) as pool, gated(tmp_path) as it:
        it.gate.set()
        save(it.engine, 1, 3)
        it.hold()
        loading = pool.submit(stored, it.engine, 1)
        it.wait_started()
        closing = pool.submit(it.engine.close)
        until(lambda: not it.engine.is_open)
        try:
            for _ in range(20):
                with pytest.raises(engine.LockedError), opened(tmp_path):
                    pass
                time.sleep(0.005)
            assert not loading.done() and not closing.done()
        finally:
            it.gate.set()
            closing.result(HANG_S)
        assert loading.result(HANG_S) == content("trained", 3)
    with opened(tmp_path) as again:
        assert stored(again, 1) == content("trained", 3)


FAULTS = st.one_of(
    st.builds(short, st.integers(0, 3 * 4096)),
    st.builds(refused, st.sampled_from(LASTING + PASSING)),
)


@acts
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.dictionaries(st.integers(0, 30), FAULTS, max_size=8),
    seed=st.none() | st.integers(0, 2**32),
    block_bytes=st.sampled_from([4096, 2 * 4096, 4 * 4096]),
)
def test_short_transfers_in_any_order(
    prepared: Path, tmp_path: Path, act: str, script: dict[int, Fault], seed: int | None, block_bytes: int
) -> None:
    """A success has the right bytes; a failure has a typed error and leaves nothing."""
    with blocks(prepared, tmp_path, block_bytes=block_bytes, staging_bytes=4 * block_bytes) as it:
        it.arm(script, order=None if seed is None else random.Random(seed))
        error = run(it, act)
        if error is None:
            check_done(it, act)
            it.check_goes_on({1, 2, 3} if act == "write" else {1, 2})
        else:
            assert isinstance(error, engine.StorageError | engine.CorruptError), error
            it.check_goes_on({1, 2})
