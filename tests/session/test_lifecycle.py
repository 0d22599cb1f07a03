"""The life of an engine: open, lock, close, exit, fork, and the resources that it uses."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import FailingFilesystem, GatedFilesystem, stored

import engine
from engine.io.binding import JOBS_MAX
from engine.io.descriptor import Descriptor
from engine.io.pipeline import Pipeline
from engine.session.in_flight import InFlight
from engine.store.filesystem import Filesystem
from engine.store.writer import Write, Writer

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


def run_script(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python source in a separate process, in which every warning but that of a small memlock is an error."""
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:'io_uring_plain' is used",
            "-c",
            textwrap.dedent(script),
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=check,
        timeout=120,
    )


def threads() -> list[str]:
    """Names of this process's kernel threads."""
    return [Path(f"/proc/self/task/{tid}/comm").read_text().strip() for tid in os.listdir("/proc/self/task")]


def native_threads(count: int) -> bool:
    """Whether there are so many native threads, looked at again for a while: a worker of the kernel's, which io_uring
    may start for a write, bears its creator's name for a moment."""
    for _ in range(500):
        if threads().count("engine-io") == count:
            return True
        time.sleep(0.01)
    return False


def rings() -> int:
    """io_uring instances that this process has open."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[io_uring]"
    return count


def resident_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def test_one_ring_and_one_native_thread(tmp_path: Path) -> None:
    before_rings, before_threads = rings(), threads().count("engine-io")
    arena = engine.Arena.wrap({"a": torch.zeros(1_000_000)})
    with engine.Engine(tmp_path, max_async=3, **SMALL) as eng:
        for _ in range(6):
            saves = [eng.checkpoint(arena) for _ in range(3)]
            assert rings() == before_rings + 1
            assert native_threads(before_threads + 1)
            for save in saves:
                save.result()
        eng.restore(arena)
        assert rings() == before_rings + 1
    assert rings() == before_rings and native_threads(before_threads)


@pytest.mark.every_backend
def test_no_python_thread_moves_a_byte(tmp_path: Path) -> None:
    """The kernel's count of the bytes written by each thread: only the native thread writes data."""
    arena = engine.Arena.wrap({"a": torch.zeros(8_000_000)})

    def written_by_thread() -> dict[str, int]:
        written: dict[str, int] = {}
        for tid in os.listdir("/proc/self/task"):
            name = Path(f"/proc/self/task/{tid}/comm").read_text().strip()
            fields = dict(line.split(": ") for line in Path(f"/proc/self/task/{tid}/io").read_text().splitlines())
            kind = "native" if name.startswith(("engine-io", "engine-move")) else "python"
            written[kind] = written.get(kind, 0) + int(fields["write_bytes"])
        return written

    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena).result()
        before = written_by_thread()
        eng.checkpoint(arena).result()
        after = written_by_thread()
    assert after["native"] - before["native"] >= 32_000_000
    assert after["python"] - before["python"] < 1_000_000


@pytest.mark.every_backend
def test_memory_stays_where_it_is_while_saves_run(tmp_path: Path) -> None:
    tensors = {f"layers.{index}.w": torch.zeros(500_000) for index in range(32)}
    arena = engine.Arena.wrap(tensors)
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:
        for _ in range(3):
            eng.checkpoint(arena).result()
        gc.collect()
        before_bytes = resident_bytes()
        tracemalloc.start()
        for _ in range(10):
            eng.checkpoint(arena).result()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        grown_bytes = resident_bytes() - before_bytes
    # The arena has 64 MB.  The job's own arrays and the manifest are allowed, a copy of any part is not.
    assert peak_bytes < 1 << 20, peak_bytes
    assert grown_bytes < 8 << 20, grown_bytes


@pytest.mark.every_backend
def test_close_and_context_manager_drain(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    arena = engine.Arena.wrap({"a": torch.zeros(1000)})
    eng = engine.Engine(tmp_path, filesystem=gated, **SMALL)
    saves = [eng.checkpoint(arena, step=step) for step in (1, 2)]
    gated.gate.set()
    eng.close()
    assert all(save.done() for save in saves) and sorted(s.result().step for s in saves) == [1, 2]
    with engine.Engine(tmp_path, **SMALL) as again:
        last = again.checkpoint(arena, step=3)
    assert last.done() and last.result().step == 3


def test_a_closed_engine_raises_closed_error(tmp_path: Path) -> None:
    eng = engine.Engine(tmp_path, **SMALL)
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    eng.close()
    eng.close()
    assert "closed" in repr(eng)
    calls = (lambda: eng.checkpoint(arena), lambda: eng.restore(arena), lambda: eng.rollback(0))
    for call in (*calls, eng.load, eng.verify, eng.steps):
        with pytest.raises(engine.ClosedError, match="has been closed"):
            call()


class Buffer(bytearray):
    """Memory that a weak reference can watch."""


def test_a_restore_interrupted_twice_keeps_the_memory_that_it_reads_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first interrupt hits the restore, the second its cleanup: the native job keeps running."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    buffer = Buffer(4000)
    memory, tensors = weakref.ref(buffer), {"a": torch.frombuffer(buffer, dtype=torch.float32)}
    del buffer
    with engine.Engine(tmp_path, **SMALL) as eng:
        arena = engine.Arena.wrap(tensors)
        eng.checkpoint(arena).result()
        with monkeypatch.context() as patched:
            patched.setattr(Pipeline, "attach", interrupt)
            patched.setattr(Pipeline, "aborting", lambda *_: interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                eng.restore(arena)
        tensors["a"].data = torch.zeros(1000)
        arena.refresh()
        gc.collect()
        assert memory() is not None, "the native thread reads into memory that is free"
    gc.collect()
    assert memory() is None


@pytest.mark.every_backend
def test_two_threads_may_close_an_engine(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            eng = engine.Engine(tmp_path, **SMALL)
            for closing in [pool.submit(eng.close) for _ in range(2)]:
                closing.result(timeout=60)


@pytest.mark.every_backend
def test_a_dropped_engine_releases_everything(tmp_path: Path) -> None:
    before = rings()
    eng = engine.Engine(tmp_path, **SMALL)
    eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(10)})).result()
    del eng
    gc.collect()
    assert rings() == before
    engine.Engine(tmp_path, **SMALL).close()


def inherited() -> set[str]:
    """The descriptors that a program started from here would have, and their targets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one by which the directory is read, or one that is closed meanwhile
            if not fcntl.fcntl(int(name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                found.add(f"{name}: {os.readlink(f'/proc/self/fd/{name}')}")
    return found


@pytest.mark.every_backend
def test_a_started_program_inherits_no_descriptor(tmp_path: Path) -> None:
    class Looking(Filesystem):
        """Looks while data files are open, those to write and those to read."""

        def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
            super().allocate(descriptor, nbytes, path)
            looks.append(inherited())

        def size(self, descriptor: Descriptor, path: str) -> int:
            looks.append(inherited())
            return super().size(descriptor, path)

        def open_scratch(self, directory: str, direct: bool) -> Descriptor:
            descriptor = super().open_scratch(directory, direct)
            looks.append(inherited())
            return descriptor

    looks: list[set[str]] = []
    before = inherited()
    with engine.Engine(tmp_path, filesystem=Looking(), **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(100_000)})).result()
        eng.load()
        looks.append(inherited())
    with engine.Engine(tmp_path, staging_bytes=8192, block_bytes=4096, filesystem=Looking()) as eng:
        eng.load()  # through a second pipeline with larger slots
    assert len(looks) >= 5 and all(look <= before for look in looks), set().union(*looks) - before


@pytest.mark.parametrize("fails", [False, True])
def test_a_permit_is_free_when_its_save_has_ended(tmp_path: Path, fails: bool) -> None:
    """A callback runs on the commit thread at the very moment at which the Future resolves."""
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    next_saves: list[engine.Save] = []

    gate = threading.Event()

    class Waiting(FailingFilesystem):
        def allocate(self, descriptor: Descriptor, nbytes: int, path: str) -> None:
            assert gate.wait(60)
            super().allocate(descriptor, nbytes, path)

    failing = Waiting()
    with engine.Engine(tmp_path, max_async=1, filesystem=failing, **SMALL) as eng:
        save = eng.checkpoint(arena, step=1)
        save.add_done_callback(lambda _: next_saves.append(eng.checkpoint(arena, step=2, on_busy="skip")))
        if fails:
            failing.fail_next("truncate", 5)
        gate.set()
        assert isinstance(save.exception(60), engine.StorageError) == fails
        while not next_saves:
            time.sleep(0.001)
        assert next_saves[0].result(60).step == 2
        assert eng.steps() == ([2] if fails else [1, 2])


@pytest.mark.parametrize("fails", [False, True])
def test_an_ended_save_does_not_keep_the_arena_alive(tmp_path: Path, fails: bool) -> None:
    """Saves may be kept for their results, one for each step of a training."""
    failing = FailingFilesystem()
    tensor = torch.zeros(1000)
    storage = weakref.ref(tensor.untyped_storage())
    with engine.Engine(tmp_path, filesystem=failing, **SMALL) as eng:
        if fails:
            failing.fail_next("truncate", 5)
        save = eng.checkpoint(engine.Arena.wrap({"a": tensor}), step=1)
        assert (save.exception(60) is not None) == fails
        del tensor
        gc.collect()
        assert storage() is None
        assert {chunk.status for chunk in save.chunks()} == {"failed" if fails else "durable"} and save.stats()


@pytest.mark.parametrize("ends", ["committed", "missing", "raised"])
def test_an_ended_layerwise_save_does_not_keep_the_arena_alive(tmp_path: Path, ends: str) -> None:
    tensor = torch.zeros(1000)
    storage = weakref.ref(tensor.untyped_storage())
    with engine.Engine(tmp_path, **SMALL) as eng:
        with contextlib.suppress(OSError), eng.layerwise(engine.Arena.wrap({"a": tensor}), step=1) as save:
            if ends == "raised":
                raise OSError
            if ends == "committed":
                save.layer_ready("")
        assert (save.exception(60) is None) == (ends == "committed")
        del tensor
        gc.collect()
        assert storage() is None
        assert save.remaining() == [] and save.chunks()
        with pytest.raises(engine.UsageError, match="after the block of step 1 was left"):
            save.layer_ready("")


def test_an_abandoned_save_does_not_keep_the_arena_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the next save, which may never come."""
    tensor = torch.zeros(1000)
    storage = weakref.ref(tensor.untyped_storage())
    with engine.Engine(tmp_path, **SMALL) as eng:
        submit = Pipeline.submit

        def submit_and_interrupt(*arguments: Any) -> None:
            submit(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Pipeline, "submit", submit_and_interrupt)
            eng.checkpoint(engine.Arena.wrap({"a": tensor}), step=1)
        del tensor
        gc.collect()
        assert storage() is None


def test_a_failed_save_is_no_cycle(tmp_path: Path) -> None:
    filesystem = FailingFilesystem()
    gc.collect()
    gc.disable()
    try:
        with engine.Engine(tmp_path, filesystem=filesystem, **SMALL) as eng:
            filesystem.fail_next("truncate", 5)
            save = eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(100)}), step=1)
            assert isinstance(save.exception(60), engine.StorageError)
            ended = weakref.ref(save)
            del save
        assert ended() is None, gc.get_referrers(ended())
    finally:
        gc.enable()


@pytest.mark.every_backend
def test_no_descriptor_is_left(tmp_path: Path) -> None:
    arena = engine.Arena.wrap({"a": torch.zeros(10_000)})
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(arena).result()
        eng.restore(arena)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            eng.checkpoint(arena).result()
            eng.restore(arena)
            eng.load()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.every_backend
def test_close_in_another_thread_waits_for_loads(tmp_path: Path) -> None:
    """Threads inside the pipeline leave before it is freed.  Later callers get ClosedError."""
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(2_000_000)})).result()
    for _ in range(10):
        eng = engine.Engine(tmp_path, **SMALL)
        with ThreadPoolExecutor(4) as pool:

            def load_until_closed(eng: engine.Engine) -> int:
                count = 0
                with contextlib.suppress(engine.ClosedError):
                    while True:
                        assert eng.load()["a"].eq(1).all()
                        count += 1
                return count

            loads = [pool.submit(load_until_closed, eng) for _ in range(4)]
            time.sleep(0.02)
            eng.close()
            assert all(load.result(timeout=60) >= 0 for load in loads)


@pytest.mark.every_backend
def test_more_loads_at_once_than_the_pipeline_has_room_for(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(300_000)})).result()
        with ThreadPoolExecutor(2 * JOBS_MAX) as pool:
            loads = [pool.submit(eng.load) for _ in range(2 * JOBS_MAX)]
            assert all(load.result(timeout=60)["a"].eq(1).all() for load in loads)


@pytest.mark.every_backend
def test_close_wakes_callers_that_wait_for_a_permit(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    eng = engine.Engine(tmp_path, max_async=1, filesystem=gated, **SMALL)
    save = eng.checkpoint(arena)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(eng.checkpoint, arena)
        assert not wait([waiting], timeout=0.1).done
        closing = pool.submit(eng.close)
        with pytest.raises(engine.ClosedError):
            waiting.result(timeout=60)
        gated.gate.set()
        closing.result(timeout=60)
    assert save.result().step == 0


def test_close_on_a_commit_thread_is_refused(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    eng = engine.Engine(tmp_path, filesystem=gated, **SMALL)
    outcomes: list[BaseException | None] = []

    def close(_: object) -> None:
        try:
            eng.close()
        except engine.UsageError as error:
            outcomes.append(error)

    save = eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(10)}))
    save.add_done_callback(close)
    gated.gate.set()
    save.result()
    eng.close()
    assert "very thread" in str(outcomes[0])


def test_an_engine_collected_on_its_own_commit_thread_is_closed(tmp_path: Path) -> None:
    class Trainer:
        """Holds its engine and itself: only the collector frees it."""

        def __init__(self) -> None:
            self.engine = engine.Engine(tmp_path, filesystem=gated, **SMALL)
            self.me = self

    gated = GatedFilesystem()
    collected = threading.Event()

    def collect(_: object) -> None:
        gc.collect()
        collected.set()

    trainer = Trainer()
    save = trainer.engine.checkpoint(engine.Arena.wrap({"a": torch.zeros(10)}))
    save.add_done_callback(collect)
    del trainer
    gated.gate.set()
    assert collected.wait(60)
    for _ in range(600):  # another thread gives the lock back
        with contextlib.suppress(engine.LockedError):
            engine.Engine(tmp_path, **SMALL).close()
            break
        time.sleep(0.1)
    else:
        pytest.fail("the directory is still locked")


def test_a_log_handler_that_raises_does_not_lose_the_save(tmp_path: Path) -> None:
    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no room for the log")

    handler = Raising()
    failing = FailingFilesystem()
    logging.getLogger("engine").addHandler(handler)
    try:
        with engine.Engine(tmp_path, max_async=1, filesystem=failing, **SMALL) as eng:
            arena = engine.Arena.wrap({"a": torch.zeros(10)})
            failing.fail_next("truncate", 5)
            with pytest.raises(engine.StorageError):
                eng.checkpoint(arena).result(timeout=60)
            eng.checkpoint(arena).result(timeout=60)
    finally:
        logging.getLogger("engine").removeHandler(handler)


def test_a_link_to_the_directory_is_the_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with engine.Engine(tmp_path / "link", **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(10)}), step=3).result()
    assert stored(tmp_path / "real", 3)["a"].eq(1).all()


@pytest.mark.parametrize("block_bytes", [4096, 8192, 12288])
def test_small_blocks_work_with_the_default_staging(tmp_path: Path, block_bytes: int) -> None:
    with engine.Engine(tmp_path, block_bytes=block_bytes) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(100_000)}), step=3).result()
        assert eng.load()["a"].eq(1).all()


def test_a_save_is_staged_while_an_earlier_one_syncs(tmp_path: Path) -> None:
    syncing = threading.Event()
    release = threading.Event()

    class SlowSync(Filesystem):
        def sync_directory(self, path: str) -> None:
            if (tmp_path / "step-00000001").exists() and not release.is_set():
                syncing.set()
                assert release.wait(60)
            super().sync_directory(path)

    arena = engine.Arena.wrap({"a": torch.zeros(10)})
    with engine.Engine(tmp_path, filesystem=SlowSync(), **SMALL) as eng:
        first = eng.checkpoint(arena, step=1)
        assert syncing.wait(60)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(eng.checkpoint, arena, step=2)
            assert second.result(timeout=60).wait_staged() and not first.done()
            assert eng.steps() == []
            release.set()
        assert second.result().result().step == 2


def test_a_directory_has_one_engine_at_a_time(tmp_path: Path) -> None:
    with (
        engine.Engine(tmp_path, **SMALL),
        pytest.raises(engine.LockedError, match=rf"process {os.getpid()}"),
    ):
        engine.Engine(tmp_path, **SMALL)
    engine.Engine(tmp_path, **SMALL).close()


def test_interpreter_exit_drains(tmp_path: Path) -> None:
    run_script(
        """
        import sys, torch, engine
        eng = engine.Engine(sys.argv[1])
        arena = engine.Arena.wrap({"a": torch.full((5_000_000,), 3.0)})
        eng.checkpoint(arena, step=8)
        """,
        str(tmp_path),
    )
    assert stored(tmp_path, 8)["a"].eq(3).all()


def test_interpreter_exit_after_an_exception_drains(tmp_path: Path) -> None:
    result = run_script(
        """
        import sys, torch, engine
        arena = engine.Arena.wrap({"a": torch.full((5_000_000,), 3.0)})
        engine.checkpoint(arena, sys.argv[1], step=8)
        raise SystemExit("training went wrong")
        """,
        str(tmp_path),
        check=False,
    )
    assert result.returncode == 1 and result.stderr.strip() == "training went wrong"
    assert stored(tmp_path, 8)["a"].eq(3).all()


def test_a_forked_child_gets_a_clear_error_and_harms_nothing(tmp_path: Path) -> None:
    result = run_script(
        """
        import os, sys, torch, engine
        sys.path.append(sys.argv[2])
        from disk import GatedFilesystem
        gated = GatedFilesystem()
        eng = engine.Engine(sys.argv[1], filesystem=gated)
        arena = engine.Arena.wrap({"a": torch.ones(1_000_000)})
        save = eng.checkpoint(arena, step=1)
        child = os.fork()
        if child == 0:
            assert save.wait_staged(), "no save reads the child's copy of the arena"
            save_it, restore_it = lambda: eng.checkpoint(arena), lambda: eng.restore(arena)
            back = lambda: eng.rollback(1)
            for call in (save_it, restore_it, back, eng.load, eng.verify, eng.steps, save.result, save.exception):
                try:
                    call()
                except engine.ForkedError as error:
                    assert "fork" in str(error)
                else:
                    os._exit(3)
            eng.close()
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        gated.gate.set()
        save.result()
        eng.checkpoint(arena, step=2).result()
        print(eng.steps())
        eng.close()
        """,
        str(tmp_path),
        str(Path(__file__).parents[1] / "support"),
    )
    assert result.stdout.strip() == "[1, 2]"


def test_a_forked_child_may_open_its_own(tmp_path: Path) -> None:
    result = run_script(
        """
        import os, sys, torch, engine
        model = torch.nn.Linear(10, 10)
        optimizer = torch.optim.SGD(model.parameters())
        arena = engine.Arena.adopt(model, optimizer)
        engine.checkpoint(arena, sys.argv[1] + "/parent")
        child = os.fork()
        if child == 0:
            optimizer.step()
            engine.checkpoint(arena, sys.argv[1] + "/child", extra="the child's").result()
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """,
        str(tmp_path),
    )
    assert result.returncode == 0
    assert stored(tmp_path / "child", 0).keys() == {"weight", "bias"}


def test_default_engines_are_shared_by_directory(tmp_path: Path) -> None:
    result = run_script(
        """
        import os, sys, torch, engine
        os.chdir(sys.argv[1])
        tensors = {"a": torch.zeros(10)}
        arena = engine.Arena.wrap(tensors)
        engine.checkpoint(arena, "runs", step=1, extra={"lr": 0.5}).result()
        engine.checkpoint(arena, sys.argv[1] + "/./runs", step=2).result()
        tensors["a"].fill_(1)
        info = engine.restore(arena, "runs", step=1)
        assert (info.step, info.extra, tensors["a"].sum().item()) == (1, {"lr": 0.5}, 0)
        """,
        str(tmp_path),
    )
    assert result.returncode == 0


def test_importing_on_another_platform_is_one_clear_error() -> None:
    result = run_script(
        """
        import platform
        platform.machine = lambda: "riscv64"
        import engine
        """,
        check=False,
    )
    assert result.returncode == 1
    assert "engine needs Linux on x86-64 or aarch64" in result.stderr.strip().splitlines()[-1]


def test_importing_without_the_compiled_module_says_how_to_build_it() -> None:
    result = run_script(
        """
        import sys
        sys.modules["engine._native"] = None
        from engine import Engine
        """,
        check=False,
    )
    assert "run `make setup` in a source tree, or install the package again" in result.stderr


def test_an_engine_opens_below_an_unreadable_parent(tmp_path: Path) -> None:
    class Unreadable(Filesystem):
        def sync_directory(self, path: str) -> None:
            if Path(path) == tmp_path:
                raise engine.StorageError(13, "open", path)
            super().sync_directory(path)

    (tmp_path / "runs").mkdir()
    with engine.Engine(tmp_path / "runs", filesystem=Unreadable(), **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(10)}), step=1).result()
        assert eng.steps() == [1]


def test_close_waits_for_a_checkpoint_that_another_thread_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, close = Writer.start, InFlight.close
    closing = threading.Event()

    def slow(writer: Writer, write: Write) -> None:
        start(writer, write)
        closer.start()
        assert closing.wait(10)
        closer.join(0.2)  # long enough for the commit threads to end, if close did not wait for this call

    def closed(in_flight: InFlight) -> None:
        close(in_flight)
        closing.set()

    monkeypatch.setattr(Writer, "start", slow)
    monkeypatch.setattr(InFlight, "close", closed)
    eng = engine.Engine(tmp_path, **SMALL)
    closer = threading.Thread(target=eng.close)
    save = eng.checkpoint(engine.Arena.wrap({"a": torch.ones(10)}), step=1)
    assert save.result(10).step == 1
    closer.join(10)
    assert not closer.is_alive() and engine.open(tmp_path).steps() == [1]


@pytest.mark.parametrize("place", ["prepare", "start"])
def test_a_signal_handler_that_interrupts_checkpoint_may_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    real = getattr(Writer, place)

    def interrupted(writer: Writer, *arguments: Any, **named: Any) -> Any:
        result = real(writer, *arguments, **named)
        eng.close()  # as a handler would, on this very thread
        return result

    monkeypatch.setattr(Writer, place, interrupted)
    eng = engine.Engine(tmp_path, **SMALL)
    with pytest.raises(engine.ClosedError):
        eng.checkpoint(engine.Arena.wrap({"a": torch.ones(10)}), step=1)
    assert not eng.is_open and engine.open(tmp_path).steps() == []
