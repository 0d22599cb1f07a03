"""Real faults of the host: of the process, its limits and its file systems.

Limits are set in processes of their own, which become an ordinary user where root is not bound by the limit.  `volumes`
mounts the file systems.  The contract is that of `test_faults.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import GatedFilesystem, names, stored
from volumes import as_root, volume

import engine
import engine.engine  # now: hosts that are changed below could not import it
from engine.store.filesystem import Filesystem

BACKEND: dict[str, Any] = {}
SMALL: dict[str, Any] = {"max_async": 1, "staging_bytes": 1 << 20, "block_bytes": 64 << 10, **BACKEND}

ARENA_BYTES = 4_000_000
VOLUME_BYTES = 64 << 20
HANG_S = 60


def filled(value: int) -> engine.Arena:
    """An arena of `ARENA_BYTES` that holds one value."""
    return engine.Arena.wrap({"a": torch.full((ARENA_BYTES // 4,), float(value))})


def save(eng: engine.Engine, step: int) -> None:
    eng.checkpoint(filled(step), step).result(HANG_S)


def check_steps(root: Path, steps: list[int]) -> None:
    """Assert that exactly these steps exist, with their saved contents."""
    assert [name for name in names(root) if name.startswith("step-")] == [f"step-{step:08d}" for step in steps]
    assert all(stored(root, step)["a"].eq(step).all() for step in steps)


def refusal(act: Callable[[], object], code: int) -> engine.StorageError:
    """The error of an act that the kernel refuses with an errno."""
    with pytest.raises(engine.StorageError) as caught:
        act()
    error = caught.value
    assert error.errno == code and error.operation and os.path.isabs(error.path) and str(error).endswith(error.remedy)
    return error


# -- full and failing file systems ------------------------------------------------------------------------------------


class Unasked(Filesystem):
    """Does not report free space, so that a save meets ENOSPC."""

    def free_bytes(self, directory: str) -> int | None:
        return None


@contextmanager
def filler(directory: Path) -> Iterator[None]:
    """Fills the file system to its last block until the end of the `with` block."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 20))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break
    yield
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("filesystem", [Filesystem, Unasked], ids=["asked", "unasked"])
def test_saves_work_again_when_a_full_disk_has_room(filesystem: type[Filesystem]) -> None:
    with volume("ext4", VOLUME_BYTES) as disk:
        root = disk / "run"
        with engine.Engine(root, filesystem=filesystem(), **SMALL) as eng:
            save(eng, 1)
            with filler(disk):
                error = refusal(lambda: save(eng, 2), errno.ENOSPC)
                asked = filesystem is Filesystem
                assert ("no older checkpoint is there to give up" if asked else "free space or lower keep") in str(
                    error
                )
                assert isinstance(error, engine.NoSpaceError) == asked
                check_steps(root, [1])
                assert eng.restore(filled(0)).step == 1
            save(eng, 2)
            save(eng, 3)
        check_steps(root, [2, 3])


def test_a_disk_without_inodes() -> None:
    """There is free space, but no inode left."""
    with volume("ext4", VOLUME_BYTES, mkfs=("-N", "64")) as disk:
        root = disk / "run"
        with engine.Engine(root, **SMALL) as eng:
            save(eng, 1)
            fillers = [disk / f"{number}" for number in range(64)]
            with pytest.raises(OSError, match="No space"):
                for path in fillers:
                    path.touch()
            refusal(lambda: save(eng, 2), errno.ENOSPC)
            check_steps(root, [1])
        with engine.Engine(root, **SMALL) as eng:  # not even a file without a name can be made
            assert eng.restore(filled(0)).step == 1
            for path in fillers:
                path.unlink(missing_ok=True)
            save(eng, 2)
        check_steps(root, [1, 2])


def test_a_file_system_that_the_kernel_makes_read_only() -> None:
    """As the kernel does on an error: saves are refused, restores work."""
    with volume("ext4", VOLUME_BYTES, mount=("errors=remount-ro",)) as disk:
        root = disk / "run"
        with engine.Engine(root, **SMALL) as eng:
            save(eng, 1)
            device = os.stat(disk).st_dev
            name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
            trigger = ["tee", f"/sys/fs/ext4/{name}/trigger_fs_error"]
            subprocess.run([*as_root(), *trigger], input=b"1", stdout=subprocess.DEVNULL, check=True)
            for step in (2, 3):
                refusal(partial(save, eng, step), errno.EROFS)
            assert eng.restore(filled(0)).step == 1
        check_steps(root, [1])


# -- the directory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_directory_removed_under_a_running_engine(tmp_path: Path, how: str) -> None:
    root = tmp_path / "run"
    with engine.Engine(root, **SMALL) as eng:
        save(eng, 1)
        if how == "removed":
            shutil.rmtree(root)
        else:
            root.rename(tmp_path / "moved")
        if how == "replaced":
            other = engine.Engine(root, **SMALL)
        error = refusal(lambda: save(eng, 2), errno.ESTALE if how == "replaced" else errno.ENOENT)
        assert "open a new Engine" in str(error)
        if how == "removed":
            with pytest.raises(engine.CorruptError, match=r"manifest\.json is missing"):
                eng.restore(filled(0), step=1)
        if how == "replaced":
            save(other, 2)
            other.close()
            check_steps(root, [2])
    with engine.Engine(root, **SMALL) as again:
        save(again, 3)
    check_steps(root, [2, 3] if how == "replaced" else [3])


def test_a_replaced_directory_is_left_alone(tmp_path: Path) -> None:
    """The files of another engine have the same names: its save in flight, and its steps."""
    root, gated = tmp_path / "run", GatedFilesystem()
    options = {**SMALL, "staging_bytes": 2 * ARENA_BYTES}  # a save is staged even if its files are held up
    with engine.Engine(root, filesystem=gated, **options) as eng:
        gated.gate.set()
        save(eng, 1)
        save(eng, 2)
        gated.gate.clear()
        under_way = eng.checkpoint(filled(3), 3)
        until(lambda: (root / "step-00000003.partial" / "model.safetensors").exists())
        root.rename(tmp_path / "moved")
        others = GatedFilesystem()
        with engine.Engine(root, filesystem=others, **options) as other:
            others.gate.set()
            save(other, 1)
            save(other, 2)
            others.gate.clear()
            saving = other.checkpoint(filled(3), 3)
            until(lambda: (root / "step-00000003.partial" / "model.safetensors").exists())
            gated.gate.set()
            refusal(lambda: under_way.result(HANG_S), errno.ESTALE)
            refusal(lambda: save(eng, 4), errno.ESTALE)
            refusal(lambda: eng.rollback(1), errno.ESTALE)
            others.gate.set()
            assert saving.result(HANG_S).step == 3
            check_steps(root, [2, 3])


def until(condition: Callable[[], bool]) -> None:
    """Wait for an act of another thread."""
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a separate process that can import the modules of these tests."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=2 * HANG_S,
    )


def test_a_directory_made_read_only() -> None:
    """As an ordinary user, because root may write anywhere."""
    root = tempfile.mkdtemp()
    os.chmod(root, 0o777)
    try:
        finished = run(
            """
            import sys
            from test_hosts import *
            root = Path(sys.argv[1])
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            run = root / "run"
            with engine.Engine(run, **{**SMALL, "backend": "threads"}) as eng:
                save(eng, 1)
                os.chmod(run, 0o555)
                error = refusal(lambda: save(eng, 2), errno.EACCES)
                assert "give this user the right" in str(error), error
                assert eng.restore(filled(0)).step == 1
                os.chmod(run, 0o755)
                save(eng, 2)
            check_steps(run, [1, 2])
            """,
            root,
        )
    finally:
        shutil.rmtree(root)
    assert finished.returncode == 0, finished.stderr


def test_a_second_process_is_told_the_pid_of_the_holder(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        finished = run("import sys, engine; engine.Engine(sys.argv[1])", str(tmp_path))
        assert f"LockedError: {tmp_path} is in use by another Engine (process {os.getpid()})" in finished.stderr
        save(eng, 1)
    check_steps(tmp_path, [1])


# -- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    finished = run(
        """
        import resource, sys
        from test_hosts import *
        root = Path(sys.argv[1])
        with engine.Engine(root, **SMALL) as eng:
            save(eng, 1)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            for limit in (0, 4096, ARENA_BYTES):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                assert "ulimit -f" in str(refusal(lambda: save(eng, 2), errno.EFBIG))
                assert eng.restore(filled(0)).step == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        with engine.Engine(root, **SMALL) as eng:  # it says nothing of the backend
            assert eng.restore(filled(0)).step == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            check_steps(root, [1])
            save(eng, 2)
        check_steps(root, [1, 2])
        """,
        str(tmp_path),
    )
    assert finished.returncode == 0, finished.stderr


def test_out_of_descriptors_at_every_point(tmp_path: Path) -> None:
    """One descriptor more each time, until there are enough."""
    finished = run(
        """
        import resource, sys, warnings
        from test_hosts import *
        from leaks import held
        warnings.simplefilter("ignore", engine.EngineWarning)  # with few descriptors not every backend works
        root = Path(sys.argv[1])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

        def starved(act):
            # The limit is on numbers: those below it that are free would be taken first.
            lowest = os.open("/dev/null", os.O_RDONLY)
            os.close(lowest)
            for count in range(100):
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, hard))
                try:
                    made = act()
                except engine.StorageError as error:
                    assert error.errno == errno.EMFILE and "ulimit -n" in str(error), error
                except engine.PlatformError as error:
                    assert "ulimit -n" in str(error), error
                else:
                    return count, made
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        before = held()
        refused_opens, eng = starved(lambda: engine.Engine(root, **SMALL))
        opened = held()
        for step in (1, 2):
            refused_saves, _ = starved(lambda: save(eng, step))
            assert held().descriptors == opened.descriptors
        refused_restores, info = starved(lambda: eng.restore(filled(0)))
        assert info.step == 2 and held().descriptors == opened.descriptors
        save(eng, 3)
        eng.close()
        assert held() == before
        check_steps(root, [2, 3])
        print(refused_opens, refused_saves, refused_restores)
        """,
        str(tmp_path),
    )
    assert finished.returncode == 0, finished.stderr
    assert all(int(count) >= 1 for count in finished.stdout.split()), finished.stdout


# -- signals and exceptions -------------------------------------------------------------------------------------------

# One process that has imported torch forks a child for every signal; a child reports every durable step.
SIGNALLED = """
import logging, random, signal, sys
from test_hosts import *

logging.getLogger("engine").setLevel(logging.CRITICAL)  # a save that was interrupted says so
torch.set_num_threads(1)  # a fork has none of OpenMP's threads, and would wait for them

def child(root, act, handled, out):
    if handled:
        def leave(number, frame):
            if frame.f_code.co_name == "_remove":  # of a WeakSet: Python ignores what is raised in a weakref's callback
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                return
            raise SystemExit(7)
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGALRM, leave)
    eng = engine.Engine(root, **{**SMALL, "keep": 3, "max_async": 2})
    out.write(b".")
    step = max(eng.steps(), default=0)
    kept = []  # Python ignores exceptions of a handler inside a finalizer, and a dropped arena has one
    while True:
        step += 1
        if act == "restore" and step > 2:
            kept.append(filled(0))
            eng.restore(kept[-1])
            continue
        kept.append(filled(step))
        saving = eng.checkpoint(kept[-1], step)
        if act == "result" or step < 3:
            out.write(b"%d\\n" % saving.result(HANG_S).step)

def signalled(root, act, handled, delay_s, until_saved):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            child(root, act, handled, os.fdopen(writing, "wb", buffering=0))
        except SystemExit as error:
            sys.exit(error.code)  # as Python does: saves in flight are drained
        finally:
            sys.stdout.flush()
    os.close(writing)
    with os.fdopen(reading, "rb") as reported:
        assert reported.read(1) == b"."
        steps = reported.readline().split() if until_saved else []  # or a slow host would have nothing to lose
        signal.sigtimedwait([], delay_s)  # sleeps, without needing to be woken
        os.kill(pid, signal.SIGTERM)
        steps += reported.read().split()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (7 if handled else -signal.SIGTERM), (act, status)
    return int(steps[-1]) if steps else 0

random.seed(int(sys.argv[2]))
for act in ("checkpoint", "restore", "result"):
    for handled in (False, True):
        root, newest = Path(sys.argv[1]) / f"{act}-{handled}", 0
        for _ in range(4):
            last = signalled(root, act, handled, random.uniform(0, 0.1), until_saved=newest == 0)
            with engine.Engine(root, **{**SMALL, "backend": "threads"}) as eng:
                steps = eng.steps()
                assert not steps or steps[-1] >= max(last, newest), (steps, last, newest)
                for step in steps:
                    assert eng.load(step)["a"].eq(step).all()
                newest = max([newest, *steps])
                check_steps(root, steps)
        assert newest, "nothing was ever saved"
"""


def test_sigterm_inside_checkpoint_restore_and_result(tmp_path: Path) -> None:
    finished = run(SIGNALLED, str(tmp_path), "7")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_an_exception_in_the_training_loop_with_saves_in_flight(tmp_path: Path) -> None:
    gated = GatedFilesystem()
    with (
        pytest.raises(ZeroDivisionError),
        engine.Engine(tmp_path, filesystem=gated, **{**SMALL, "max_async": 2, "staging_bytes": 4 * ARENA_BYTES}) as eng,
    ):
        saves = [eng.checkpoint(filled(step), step) for step in (1, 2)]
        assert not any(save.done() for save in saves)
        gated.gate.set()
        raise ZeroDivisionError
    assert [save.result().step for save in saves] == [1, 2]
    check_steps(tmp_path, [1, 2])
