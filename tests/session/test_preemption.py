"""Signals that announce the end of a process: one last checkpoint, and the status that the signal gives.

Real signals and real processes; `preempted` forks them.  Each script below continues `PRELUDE`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import until
from preempted import HANG_S, Preempted, Server

import engine
from engine.session import preemption as preemptions

PRELUDE = """
    import os, signal, sys, threading, time, warnings

    warnings.simplefilter("ignore", engine.EngineWarning)  # a small limit on locked memory
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    options = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}

    def train():
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    def await_signal(preemption):
        print("ready", flush=True)
        while not preemption.requested:
            time.sleep(0.005)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Callable[[str], Preempted]:
    return lambda script: server.start(tmp_path / "process", textwrap.dedent(PRELUDE) + textwrap.dedent(script))


LOOP = """
    with engine.Engine(directory, **options) as eng:
        preemption = eng.on_preemption()
        for step in range(1, 100):
            train()
            if step == 3:
                await_signal(preemption)
            if step == 1 or preemption.requested:
                print("at", step)  # stays in the buffer of standard output until it is flushed
                eng.checkpoint(arena, step)
    print("after")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_last_checkpoint_is_durable_and_the_signal_ends_the_process(
    start: Callable[[str], Preempted], number: int
) -> None:
    process = start(LOOP)
    process.until("ready")
    process.kill(number)
    assert process.wait() == -number, process.errors
    assert process.steps() == [1, 3]
    assert process.output.splitlines() == ["at 1", "ready", "at 3"]
    assert f"{signal.Signals(number).name} has arrived: the next checkpoint() is the last one" in process.errors


def test_without_a_signal_nothing_changes(start: Callable[[str], Preempted]) -> None:
    process = start(LOOP.replace("await_signal(preemption)", "pass"))
    assert process.wait() == 0, process.errors
    assert process.steps() == [1] and "after" in process.output


def test_a_second_signal_changes_nothing(start: Callable[[str], Preempted]) -> None:
    script = LOOP.replace(
        "await_signal(preemption)", "await_signal(preemption); print('one', flush=True); time.sleep(0.5)"
    )
    process = start(script)
    process.until("ready")
    process.kill(signal.SIGUSR1)
    process.until("one")
    process.kill(signal.SIGTERM)
    assert process.wait() == -signal.SIGUSR1, process.errors
    assert process.steps() == [1, 3]
    assert "SIGTERM has arrived too, and changes nothing" in process.errors


def test_a_signal_inside_checkpoint_makes_that_save_the_last(start: Callable[[str], Preempted]) -> None:
    process = start("""
        from engine.store.filesystem import Filesystem

        class Signalling(Filesystem):
            def allocate(self, *arguments):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # the caller waits for staging, which waits for the slots, which wait for the files
                super().allocate(*arguments)

        big = engine.Arena.wrap({"a": torch.ones(1 << 20)})
        with engine.Engine(directory, filesystem=Signalling(), **options) as eng:
            preemption = eng.on_preemption()
            eng.checkpoint(big, 5, snapshot="eager")
            print("after", flush=True)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [5] and "after" not in process.output


@pytest.mark.parametrize("on_busy", ["skip", "raise"])
def test_the_last_checkpoint_is_made_although_saves_are_in_flight(
    start: Callable[[str], Preempted], on_busy: str
) -> None:
    process = start(f"""
        from engine.store.filesystem import Filesystem

        class Slow(Filesystem):
            def allocate(self, *arguments):
                time.sleep(0.3)
                super().allocate(*arguments)

        with engine.Engine(directory, filesystem=Slow(), max_async=1, **options) as eng:
            preemption = eng.on_preemption()
            eng.checkpoint(arena, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            eng.checkpoint(arena, 2, on_busy={on_busy!r})
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [1, 2]


def test_closing_the_engine_ends_the_process_when_saves_are_durable(start: Callable[[str], Preempted]) -> None:
    process = start("""
        with engine.Engine(directory, **options) as eng:
            preemption = eng.on_preemption()
            eng.checkpoint(arena, 7)
            await_signal(preemption)
        print("after", flush=True)
    """)
    process.until("ready")
    process.kill(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [7] and "after" not in process.output


def test_an_exception_is_not_hidden_by_the_signal(start: Callable[[str], Preempted]) -> None:
    process = start("""
        with engine.Engine(directory, **options) as eng:
            preemption = eng.on_preemption()
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("of the training")
    """)
    assert process.wait() == 1
    assert "RuntimeError: of the training" in process.errors


def test_a_loop_on_another_thread_ends_the_process(start: Callable[[str], Preempted]) -> None:
    process = start("""
        eng = engine.Engine(directory, **options)
        preemption = eng.on_preemption()

        def loop():
            await_signal(preemption)
            eng.checkpoint(arena, 4)
            time.sleep(60)

        thread = threading.Thread(target=loop)
        thread.start()
        thread.join()
    """)
    process.until("ready")
    process.kill(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [4]


def test_the_init_process_of_a_container_exits(start: Callable[[str], Preempted]) -> None:
    """The kernel spares it from the default action."""
    process = start("""
        import ctypes

        new_user, new_pid = 0x10000000, 0x20000000  # CLONE_NEWUSER and CLONE_NEWPID of linux/sched.h
        flags = new_pid if os.geteuid() == 0 else new_user | new_pid
        assert ctypes.CDLL(None).unshare(flags) == 0, "the host lets nobody make a PID namespace"
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            sys.exit(os.waitstatus_to_exitcode(status))
        assert os.getpid() == 1
        with engine.Engine(directory, **options) as eng:
            eng.on_preemption()
            signal.raise_signal(signal.SIGTERM)
            eng.checkpoint(arena, 3)
    """)
    assert process.wait() == 128 + signal.SIGTERM, process.errors
    assert process.steps() == [3]


# -- layer by layer -------------------------------------------------------------------------------------------------


LAYERWISE = """
    second = engine.Arena.wrap(dict(a=torch.ones(100)))
    with engine.Engine(directory, max_async=3, **options) as eng:
        preemption = eng.on_preemption()
        for step in range(2, 100, 2):
            with eng.layerwise(arena, step) as save:
                train()
                {at_the_signal}
                print("after", step, flush=True)
                save.layer_ready("")
"""


def test_the_block_of_a_layerwise_save_ends_the_process_when_it_is_left(start: Callable[[str], Preempted]) -> None:
    process = start(LAYERWISE.format(at_the_signal="step == 4 and await_signal(preemption)"))
    process.until("ready")
    process.kill(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [2, 4] and "after 6" not in process.output


def test_a_checkpoint_inside_a_block_leaves_the_end_to_that_block(start: Callable[[str], Preempted]) -> None:
    in_block = "step == 4 and (os.kill(os.getpid(), signal.SIGTERM), eng.checkpoint(second, 5))"
    process = start(LAYERWISE.format(at_the_signal=in_block))
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [4, 5] and "after 4" in process.output and "after 6" not in process.output


def test_a_preemption_is_not_closed_inside_a_block(tmp_path: Path, noting: Noting) -> None:
    with engine.Engine(tmp_path) as eng:
        preemption = eng.on_preemption([signal.SIGUSR2])
        with eng.layerwise(ARENA) as save:
            signal.raise_signal(signal.SIGUSR2)
            with pytest.raises(engine.UsageError, match=r"close\(\) in a block of layerwise\(\)"):
                preemption.close()
            save.layer_ready("")
        assert save.done() and not preemption.requested


def test_a_block_that_is_left_by_an_exception_ends_nothing(tmp_path: Path, noting: Noting) -> None:
    with engine.Engine(tmp_path) as eng:
        preemption = eng.on_preemption([signal.SIGUSR2])
        with pytest.raises(OSError, match="mine"), eng.layerwise(ARENA):
            signal.raise_signal(signal.SIGUSR2)
            raise OSError("mine")
        assert preemption.requested
        with eng.layerwise(ARENA, on_busy="skip") as save:
            save.layer_ready("")
        assert save.result() and not preemption.requested


# -- handlers of others ---------------------------------------------------------------------------------------------


def test_a_handler_from_before_that_exits_is_obeyed_after_the_last_checkpoint(
    start: Callable[[str], Preempted],
) -> None:
    process = start("\n    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))" + LOOP)
    process.until("ready")
    process.kill(signal.SIGTERM)
    assert process.wait() == 7, process.errors
    assert process.steps() == [1, 3] and "after" not in process.output


# Lightning's handlers, of its signal connector: a note, beside whatever was there before.
LIGHTNING = """
    noted = []

    class Compose:
        def __init__(self, handlers):
            self.handlers = handlers

        def __call__(self, number, frame):
            for handler in self.handlers:
                if callable(handler):
                    handler(number, frame)

    def register():
        handlers = [lambda number, frame: noted.append(number)]
        before = signal.getsignal(signal.SIGTERM)
        if before not in (None, signal.SIG_DFL):
            handlers.append(before)
        signal.signal(signal.SIGTERM, Compose(handlers))

    {before}
    with engine.Engine(directory, **options) as eng:
        preemption = eng.on_preemption()
        {after}
        for step in range(1, 100):
            train()
            if step == 3:
                await_signal(preemption)
                assert noted == [signal.SIGTERM], "not called at the signal"
            if preemption.requested:
                eng.checkpoint(arena, step).result()
                assert not preemption.requested
            if noted:
                assert noted == [signal.SIGTERM], "called twice"
                print("stopped at", step, flush=True)
                sys.exit(143)
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_beside_a_handler_like_lightnings_its_owner_ends_the_process(
    start: Callable[[str], Preempted], order: str
) -> None:
    calls = {"before": "pass", "after": "pass", order: "register()"}
    process = start(LIGHTNING.format(**calls))
    process.until("ready")
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.errors
    assert process.steps() == [3] and "stopped at 3" in process.output


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with engine.Engine(tmp_path) as eng:
            with pytest.warns(engine.EngineWarning, match=r"SIGUSR2 is ignored by this process \(SIG_IGN\)"):
                preemption = eng.on_preemption([signal.SIGUSR2])
            signal.raise_signal(signal.SIGUSR2)
            assert not preemption.requested
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_handler_that_is_not_pythons_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as its documentation says
    with engine.Engine(tmp_path) as eng, pytest.raises(engine.UsageError, match="SIGUSR2 has a handler that is not"):
        eng.on_preemption([signal.SIGUSR2])


# -- in this process, under a handler that returns ------------------------------------------------------------------


class Noting:
    """A handler of SIGUSR2 that returns: `checkpoint()` does too, and the test goes on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1


@pytest.fixture
def noting() -> Iterator[Noting]:
    handler = Noting()
    before = signal.signal(signal.SIGUSR2, handler)
    yield handler
    assert signal.getsignal(signal.SIGUSR2) is handler, "the handler from before is back"
    signal.signal(signal.SIGUSR2, before)


ARENA = engine.Arena.wrap({"a": torch.ones(50_000)})


def test_handlers_are_put_back_once_the_last_checkpoint_is_made(tmp_path: Path, noting: Noting) -> None:
    with engine.Engine(tmp_path) as eng:
        preemption = eng.on_preemption([signal.SIGUSR2])
        signal.raise_signal(signal.SIGUSR2)
        assert preemption.requested and noting.count == 1
        save = eng.checkpoint(ARENA)
        assert save.done() and not preemption.requested
        assert signal.getsignal(signal.SIGUSR2) is noting
        eng.on_preemption([signal.SIGUSR2])  # another one


def test_a_closed_preemption_hands_signals_on(tmp_path: Path, noting: Noting) -> None:
    """No other thread than the main one can put a handler back."""
    with engine.Engine(tmp_path) as eng:
        preemption = eng.on_preemption([signal.SIGUSR2])
        closer = threading.Thread(target=preemption.close)
        closer.start()
        closer.join()
        assert signal.getsignal(signal.SIGUSR2) is not noting
        signal.raise_signal(signal.SIGUSR2)
        assert noting.count == 1 and not preemption.requested
        signal.signal(signal.SIGUSR2, noting)


def test_a_closed_preemption_hands_a_default_action_on(start: Callable[[str], Preempted]) -> None:
    process = start("""
        eng = engine.Engine(directory, **options)
        preemption = eng.on_preemption()
        closer = threading.Thread(target=eng.close)
        closer.start()
        closer.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors


def test_a_collected_engine_leaves_no_handler(tmp_path: Path, noting: Noting) -> None:
    eng = engine.Engine(tmp_path)
    eng.on_preemption([signal.SIGUSR2])
    del eng
    assert signal.getsignal(signal.SIGUSR2) is noting


def test_one_engine_of_a_process_has_a_preemption(tmp_path: Path, noting: Noting) -> None:
    with engine.Engine(tmp_path / "a") as first, engine.Engine(tmp_path / "b") as second:
        first.on_preemption([signal.SIGUSR2])
        with pytest.raises(engine.UsageError, match="another Engine of this process has on_preemption"):
            second.on_preemption([signal.SIGUSR2])
        first.close()
        second.on_preemption([signal.SIGUSR2]).close()


@pytest.mark.parametrize(
    ("signals", "deadline_s", "message"),
    [
        ([signal.SIGKILL], None, "signals has SIGKILL, which no process can handle"),
        ([9999], None, "signals has 9999, which is no signal of this host"),
        (["SIGFOO"], None, "signals has 'SIGFOO', which is no signal .*'SIGTERM', or a sequence of those"),
        ("TERM", None, "signals has 'TERM', which is no signal"),
        (None, None, "signals has None, which is no signal"),
        ([], None, "signals is empty; name at least one"),
        ([signal.SIGUSR2], 0, "deadline_s is 0; it must be a positive number"),
        ([signal.SIGUSR2], "1", "it must be a number of seconds"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, signals: Any, deadline_s: Any, message: str) -> None:
    with engine.Engine(tmp_path) as eng, pytest.raises(engine.ArgumentError, match=message):
        eng.on_preemption(signals, deadline_s)
    assert not preemptions._active


@pytest.mark.parametrize("signals", ["SIGUSR2", signal.SIGUSR2, int(signal.SIGUSR2), ("SIGUSR2", signal.SIGUSR2)])
def test_signals_are_given_by_number_or_name(tmp_path: Path, noting: Noting, signals: Any) -> None:
    with engine.Engine(tmp_path) as eng:
        preemption = eng.on_preemption(signals)
        signal.raise_signal(signal.SIGUSR2)
        assert preemption.requested


def test_only_the_main_thread_can_install(tmp_path: Path) -> None:
    with engine.Engine(tmp_path) as eng:
        errors: list[BaseException] = []

        def install() -> None:
            try:
                eng.on_preemption([signal.SIGUSR2])
            except engine.UsageError as error:
                errors.append(error)

        thread = threading.Thread(target=install)
        thread.start()
        thread.join()
        assert "main thread only" in str(errors)


# -- the deadline ---------------------------------------------------------------------------------------------------


def test_a_deadline_that_the_last_save_would_have_missed_is_warned_of_once(tmp_path: Path, noting: Noting) -> None:
    with engine.Engine(tmp_path) as eng:
        eng.on_preemption([signal.SIGUSR2], deadline_s=1e-6)
        eng.checkpoint(ARENA).result()  # nothing is measured yet
        with pytest.warns(
            engine.EngineWarning, match=r"20\d{4} bytes at the measured .* s, and the deadline is 1e-06 s"
        ):
            eng.checkpoint(ARENA).result()
        eng.checkpoint(ARENA).result()


@pytest.mark.parametrize(("deadline_s", "is_short"), [(1e-6, True), (3600.0, False), (None, False)])
def test_the_log_says_at_the_signal_whether_the_deadline_is_too_short(
    tmp_path: Path, noting: Noting, caplog: pytest.LogCaptureFixture, deadline_s: float | None, is_short: bool
) -> None:
    with engine.Engine(tmp_path) as eng:
        eng.on_preemption([signal.SIGUSR2, signal.SIGUSR1], deadline_s)
        eng.checkpoint(ARENA).result()
        with caplog.at_level(logging.WARNING, "engine"):
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            until(lambda: "SIGUSR1 has arrived too" in caplog.text)
        first, _ = caplog.messages  # of one signal one message, however often it comes
        assert first.startswith("SIGUSR2 has arrived: the next checkpoint() is the last one")
        assert ("will likely not be durable in time" in first) is is_short


def test_a_failed_save_measures_nothing_and_the_last_one_ends_the_process_all_the_same(
    start: Callable[[str], Preempted],
) -> None:
    process = start("""
        from engine.store.filesystem import Filesystem

        class Full(Filesystem):
            def allocate(self, *arguments):
                raise OSError(28, "No space left on device")

        warnings.simplefilter("error", engine.EngineWarning)
        warnings.filterwarnings("ignore", "the save of step 1 failed")
        with engine.Engine(directory, filesystem=Full(), **options) as eng:
            preemption = eng.on_preemption(deadline_s=1e-6)
            eng.checkpoint(arena, 1).exception()
            os.kill(os.getpid(), signal.SIGTERM)
            eng.checkpoint(arena, 2)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [] and "the save of step 2 failed" in process.errors
    assert "in time" not in process.errors


# -- the monitor ----------------------------------------------------------------------------------------------------

MONITORED = """
    big = engine.Arena.wrap({"a": torch.ones(1 << 22)})
    with engine.Engine(directory, isolation="process", **options) as eng:
        preemption = eng.on_preemption(deadline_s=60)
        eng.checkpoint(big, 1).result()
        save = eng.checkpoint(big, 2)
        save.result()
        assert save.measured()[1] == save.stats()["staged_ns"] / 1e9, "the deadline is of staging only"
        await_signal(preemption)
        eng.checkpoint(big, 3)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_with_a_monitor_the_last_checkpoint_is_durable_soon_after_the_process(
    start: Callable[[str], Preempted], number: int
) -> None:
    """The signal goes to every process of the job, the monitor too."""
    process = start(MONITORED)
    process.until("ready")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, number)
    assert process.wait() == -number, process.errors
    until(lambda: process.steps()[-1] == 3)  # the trainer may be gone before it asks to retire step 1


def test_with_a_monitor_the_process_need_not_wait_for_the_disk(start: Callable[[str], Preempted]) -> None:
    """The monitor is stopped when the last save is staged, and goes on when the trainer is dead."""
    process = start("""
        from engine.monitor.shared_memory import Board

        mark_staged = Board.mark_staged

        def stop_and_mark(board):
            [child] = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            print(child, "stops", flush=True)
            os.kill(int(child), signal.SIGSTOP)
            mark_staged(board)

        Board.mark_staged = stop_and_mark
        with engine.Engine(directory, isolation="process", **options) as eng:
            preemption = eng.on_preemption()
            os.kill(os.getpid(), signal.SIGTERM)
            eng.checkpoint(arena, 5)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == []
    os.kill(int(process.output.split()[0]), signal.SIGCONT)
    until(lambda: process.steps() == [5])


def test_a_monitor_that_has_ended_completes_nothing(start: Callable[[str], Preempted]) -> None:
    """It dies when the last save is staged: the process waits until the failure is known and logged."""
    process = start("""
        from engine.monitor.shared_memory import Board

        mark_staged = Board.mark_staged

        def kill_and_mark(board):
            [child] = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            os.kill(int(child), signal.SIGKILL)
            os.waitid(os.P_PID, int(child), os.WEXITED | os.WNOWAIT)
            mark_staged(board)
            time.sleep(0.3)  # the save fails after that

        Board.mark_staged = kill_and_mark
        with engine.Engine(directory, isolation="process", **options) as eng:
            preemption = eng.on_preemption()
            os.kill(os.getpid(), signal.SIGTERM)
            eng.checkpoint(arena, 5)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert "the save of step 5 failed: the monitor of" in process.errors


# -- other processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fork", ["os.fork", "ctypes.PyDLL(None).fork"])
def test_a_forked_child_does_the_default(start: Callable[[str], Preempted], fork: str) -> None:
    """The second fork runs no hook of Python."""
    process = start(f"""
        import ctypes

        eng = engine.Engine(directory, **options)
        preemption = eng.on_preemption()
        child = {fork}()
        if child == 0:
            while True:
                time.sleep(0.01)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, status
        assert not preemption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested
        eng.checkpoint(arena, 2)
    """)
    assert process.wait() == -signal.SIGTERM, process.errors
    assert process.steps() == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_workers_of_a_data_loader_do_the_default(start: Callable[[str], Preempted], number: int) -> None:
    process = start("""
        from torch.utils.data import DataLoader

        eng = engine.Engine(directory, **options)
        preemption = eng.on_preemption()
        batches = iter(DataLoader(list(range(1000)), num_workers=1))
        next(batches)
        [worker] = batches._workers
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(batches))  # or its end raises in the loop
        print("worker", worker.pid, "runs", flush=True)
        worker.join()
        print(worker.exitcode, preemption.requested, flush=True)
        del batches
        eng.close()
    """)
    process.until("runs")
    os.kill(int(process.output.split()[1]), number)
    assert process.wait() == 0, process.errors
    assert process.output.splitlines()[-1] == f"{-number} False"


TORCHRUN = """
    import os, signal, sys, time
    import torch
    import engine

    arena = engine.Arena.wrap({"a": torch.ones(1000)})
    with engine.Engine(sys.argv[1]) as eng:
        preemption = eng.on_preemption(deadline_s=30)
        for step in range(1, 100_000):
            if step % 1000 == 1 or preemption.requested:
                eng.checkpoint(arena, step, extra={"last": preemption.requested}).result()
            print("step", step, flush=True)
            time.sleep(0.01)
"""


def test_under_torchrun_the_last_checkpoint_is_made(tmp_path: Path) -> None:
    """Its agent sends SIGTERM to the workers, and SIGKILL 30 s later."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(TORCHRUN))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    paths = os.pathsep.join(sys.path)
    with (
        open(tmp_path / "errors", "wb") as errors,
        subprocess.Popen(
            [*command, str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as agent,
    ):
        assert agent.stdout is not None
        assert "step 5\n" in agent.stdout, (tmp_path / "errors").read_text()  # reads no further than that line
        agent.send_signal(signal.SIGTERM)
        began = time.monotonic()
        agent.stdout.read()
        assert agent.wait(HANG_S) != 0
        assert time.monotonic() - began < 29, "the agent had to kill the worker"
    with engine.open(tmp_path / "run") as run:
        assert run.extra() == {"last": True} and run.steps()[-1] >= 6
