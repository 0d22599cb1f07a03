"""The ladder of backends: the attempts and messages on each host, and that every rung saves and restores.

The hosts are real where possible: a seccomp filter that refuses io_uring, a locked-memory limit of 8 MiB, a limit on
open files, a file system without O_DIRECT, a full disk.  The tests marked `every_backend` in the other files check
that the rungs do the same work.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same, stored
from guarded import KINDS_HERE
from leaks import held
from volumes import volume

import engine
from engine.errors import EngineWarning, PlatformError, StorageError
from engine.io import backend
from engine.io.backend import LADDER, Attempt
from engine.io.job import Failure, FailureKind, Job
from engine.io.pipeline import OpenError, Pipeline, Refused
from engine.options import Backend
from engine.store.filesystem import Filesystem

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}

# Saves and restores on a host that an earlier line has changed, and prints the backend.
ON_A_HOST = """
import errno, os, resource, sys, warnings
import torch
import engine, seccomp
from engine import Arena, Engine, probe  # imported now: an ordinary user may have no right to read the modules
from disk import same, stored

directory = sys.argv[1]

def unprivileged():
    if os.geteuid() == 0:  # some limits do not bind root, but user 65534
        os.chmod(directory, 0o777)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

{change}
tensors = {{"a": torch.rand(300_000), "b": torch.rand(1000)}}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    eng = engine.Engine(directory + "/run", guard="fence", {options})
with eng:
    for step in range(3):
        tensors["a"].add_(1)
        eng.checkpoint(engine.Arena.wrap(tensors), step=step).result()
    loaded = eng.load(2)
    assert same(loaded["a"], tensors["a"]) and same(eng.load(2, select="b")["b"], tensors["b"])
    assert same(stored(directory + "/run", 2)["a"], tensors["a"])
    assert engine.probe(directory).backend == eng.backend
print(eng.backend)
print(len(caught))
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def on_a_host(directory: Path, change: str, options: str = "") -> list[str]:
    """The output of the script in its own process."""
    script = ON_A_HOST.format(change=textwrap.dedent(change), options=options)
    result = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_this_host_has_the_best_backend(tmp_path: Path) -> None:
    """The other tests prove little if they do not run on the ring."""
    found = engine.probe(tmp_path, **SMALL)
    assert found[:3] == (str(tmp_path), "io_uring", (Attempt("io_uring"),))
    assert found.guard is not None and found.guard.guard == KINDS_HERE[0]
    best = KINDS_HERE[0]
    lines = rf"{tmp_path}: io_uring\nio_uring: works\nguard: {best}\n(.*\n)?{best}: works \(.* to protect a gigabyte\)"
    assert re.fullmatch(lines, str(found))
    assert os.listdir(tmp_path) == [], "a probe leaves something behind"
    with engine.Engine(tmp_path, **SMALL) as eng:
        assert (eng.backend, eng.guard, eng.probe[:3]) == ("io_uring", KINDS_HERE[0], found[:3])


def test_a_probe_has_as_many_slots_as_an_engine(tmp_path: Path) -> None:
    """With small blocks the memory has room for more slots than a ring takes."""
    with engine.Engine(tmp_path, block_bytes=4096) as eng:
        opened = eng.probe
    assert engine.probe(tmp_path, block_bytes=4096)[:3] == opened[:3]  # now: the limit on locked memory is one for both
    wrongs: list[dict[str, Any]] = [{"block_bytes": 0}, {"block_bytes": 5000}, {"staging_bytes": 4096}]
    for wrong in wrongs:
        with pytest.raises(engine.ArgumentError, match="it must be"):
            engine.probe(tmp_path, **wrong)


@pytest.mark.parametrize("name", LADDER)
def test_each_backend_can_be_requested_by_name(tmp_path: Path, name: Backend) -> None:
    tensors = {"a": torch.rand(100_000)}
    with engine.Engine(tmp_path, backend=name, **SMALL) as eng:
        assert eng.backend == name
        eng.checkpoint(engine.Arena.wrap(tensors), step=1).result()
    with engine.Engine(tmp_path, **SMALL) as eng:  # a backend reads the files of another
        assert same(eng.load(1)["a"], tensors["a"]) and same(stored(tmp_path, 1)["a"], tensors["a"])


@pytest.mark.parametrize("name", LADDER)
def test_blocks_larger_than_the_slots_are_read_the_same_way(tmp_path: Path, name: Backend) -> None:
    tensors = {"a": torch.rand(100_000)}
    with engine.Engine(tmp_path, backend=name, **SMALL) as eng:
        eng.checkpoint(engine.Arena.wrap(tensors), step=1).result()
    with engine.Engine(tmp_path, backend=name, staging_bytes=16 << 10, block_bytes=4 << 10) as eng:
        assert same(eng.load(1)["a"], tensors["a"])


@pytest.mark.parametrize("name", LADDER)
def test_a_second_pipeline_uses_the_same_backend_and_pins_nothing(name: Backend) -> None:
    """It is opened for one restore: registering its slots would cost more, and may exceed RLIMIT_MEMLOCK."""
    first = Pipeline(2, 4096, name)
    second = backend.open_like(first, 3, 8192)
    try:
        assert second.backend == ("io_uring_plain" if name == "io_uring" else name)
        assert second.slot_bytes == 8192 and second.direct == first.direct
    finally:
        second.close()
        first.close()


# -- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_a_seccomp_filter_leaves_threads(tmp_path: Path, error: str) -> None:
    used, count, warning = on_a_host(tmp_path, f"seccomp.refuse(errno.{error})", "staging_bytes=8 << 20")
    assert (used, count) == ("threads", "1")
    assert warning.startswith(f"EngineWarning 'threads' is used in {tmp_path}/run, and not 'io_uring': ")
    assert "seccomp" in warning and error in warning and "allows io_uring_setup" in warning


def test_the_cause_is_found_for_any_process_name(tmp_path: Path) -> None:
    """The kernel reports filters below the process's name, which is bytes (PR_SET_NAME)."""
    change = "import ctypes; ctypes.CDLL(None).prctl(15, bytes([0xFF, 0xC3])); seccomp.refuse(errno.ENOSYS)"
    used, _, warning = on_a_host(tmp_path, change)
    assert used == "threads" and "a seccomp filter" in warning


def test_a_filter_of_registration_alone_leaves_a_plain_ring(tmp_path: Path) -> None:
    used, count, warning = on_a_host(tmp_path, "seccomp.refuse(errno.EPERM, (seccomp.REGISTER,))")
    assert (used, count) == ("io_uring_plain", "1")
    assert "io_uring_register" in warning and "EPERM" in warning


def test_a_filter_of_submission_alone_leaves_threads(tmp_path: Path) -> None:
    """The set-up works, but no block moves: only a real write detects this."""
    used, count, warning = on_a_host(tmp_path, "seccomp.refuse(errno.EPERM, (seccomp.ENTER,))")
    assert (used, count) == ("threads", "1")
    assert "a write of one block is refused: EPERM" in warning


def test_little_locked_memory_leaves_a_plain_ring() -> None:
    change = "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20)); unprivileged()"
    # Not below pytest's own directory, which is its user's alone.
    with tempfile.TemporaryDirectory() as directory:
        used, count, warning = on_a_host(Path(directory), change)
    assert (used, count) == ("io_uring_plain", "1")
    assert "RLIMIT_MEMLOCK is 8388608, and 268435456 bytes of staging slots are to be pinned" in warning
    assert "ulimit -l" in warning
    advised = re.search(r"use (staging_bytes=\d+) with (block_bytes=\d+)", warning)
    assert advised is not None
    with tempfile.TemporaryDirectory() as directory:
        script = f"""
            import os, resource, sys
            import engine.engine
            directory = sys.argv[1]
            def unprivileged():
                if os.geteuid() == 0:
                    os.chmod(directory, 0o777)
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
            {change}
            with engine.engine.Engine(directory + "/run", {advised[1]}, {advised[2]}, guard="fence") as eng:
                print(eng.backend)
        """
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script), directory]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout == "io_uring\n", (
            "the remedy"
        )


def test_few_descriptors_leave_a_plain_ring(tmp_path: Path) -> None:
    change = "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))"
    # Within an ordinary user's memlock, which would be reported instead.
    used, count, warning = on_a_host(tmp_path, change, "staging_bytes=4 << 20, block_bytes=1 << 20")
    assert (used, count) == ("io_uring_plain", "1")
    assert "RLIMIT_NOFILE is 128, below the ring's table of 512 files" in warning and "ulimit -n" in warning


def test_a_file_system_without_direct_io_leaves_the_page_cache() -> None:
    with volume("ramfs", 0) as path:
        used, count, warning = on_a_host(path, "")
        assert (used, count) == ("buffered", "1")
        assert f"the file system of {path}/run has no direct I/O (O_DIRECT); keep checkpoints on ext4" in warning
        with pytest.raises(PlatformError, match=r"backend 'threads' does not work in .*O_DIRECT"):
            engine.Engine(path / "run", backend="threads", **SMALL)


def test_a_file_system_without_direct_io_or_nameless_files_is_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the file before it refuses to open it."""
    without_nameless_files(monkeypatch)
    with volume("ramfs", 0) as path:
        assert engine.probe(path, **SMALL).backend == "buffered"
        assert os.listdir(path) == []


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.filterwarnings("ignore:'buffered' is used")  # tmpfs has had O_DIRECT since Linux 6.6
def test_a_full_disk_does_not_prevent_restoring(kind: str) -> None:
    tensors = {"a": torch.rand(100_000)}
    with volume(kind, 32 << 20) as path:
        with engine.Engine(path / "run", **SMALL) as eng:
            used = eng.backend
            eng.checkpoint(engine.Arena.wrap(tensors), step=1).result()
        with open(path / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(1 << 20) if kind == "ext4" else bytes(1 << 12))
        with engine.Engine(path / "run", **SMALL) as eng:
            assert eng.backend == used
            assert same(eng.load(1)["a"], tensors["a"])


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusal(refused: Refused, error: int) -> PlatformError:
    return backend._explain_open(OpenError(refused, error), 1 << 20)


@pytest.mark.parametrize(("value", "whom"), [("2", "every process"), ("1", "kernel.io_uring_group")])
def test_the_sysctl_is_distinguished_from_a_filter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, whom: str
) -> None:
    """The sysctl is of the whole host, so a file stands in for it; the errno is the kernel's (io_uring.c)."""
    (tmp_path / "io_uring_disabled").write_text(f"{value}\n")
    monkeypatch.setattr(backend, "_SYSCTL", str(tmp_path / "io_uring_disabled"))
    error = refusal(Refused.RING, errno.EPERM)
    assert f"kernel.io_uring_disabled is {value}" in error.cause and whom in error.cause
    assert "sysctl -w kernel.io_uring_disabled=0" in error.remedy


def test_every_cause_has_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "content_of", lambda path: "")  # neither sysctl nor filter, on every host
    monkeypatch.setattr(resource, "getrlimit", lambda which: (4096, 4096))
    errors = [
        refusal(Refused.RING, errno.EPERM),  # a filter
        refusal(Refused.RING, errno.ENOSYS),
        refusal(Refused.RING, errno.ENOMEM),
        refusal(Refused.RING, errno.EMFILE),
        refusal(Refused.BUFFERS, errno.ENOMEM),
        refusal(Refused.BUFFERS, errno.EFAULT),
        refusal(Refused.FILES, errno.EMFILE),
        refusal(Refused.RESOURCES, errno.ENOMEM),
        refusal(Refused.RESOURCES, errno.EAGAIN),
    ]
    assert len({error.cause for error in errors}) == len(errors)
    assert all(error.remedy for error in errors)
    assert "has no io_uring" in errors[1].cause and "CONFIG_IO_URING" in errors[1].remedy


@pytest.mark.parametrize("refused", [Refused.RING, Refused.BUFFERS])
def test_an_absent_limit_is_not_blamed(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    error = refusal(refused, errno.ENOMEM)
    assert "RLIMIT" not in str(error) and "ENOMEM" in error.cause and "memory" in error.remedy


@pytest.mark.parametrize("name", LADDER)
def test_threads_do_not_mention_a_missing_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: Backend) -> None:
    monkeypatch.setattr(Job, "failure", Failure(FailureKind.IO, errno.EPERM, 0))
    with pytest.raises(PlatformError, match="a write of one block is refused: EPERM") as caught:
        engine.Engine(tmp_path, backend=name, **SMALL)
    assert ("io_uring" in caught.value.remedy) == name.startswith("io_uring")


@pytest.mark.parametrize("kind", [FailureKind.SHORT, FailureKind.CHECKSUM])
def test_a_backend_that_moves_wrong_bytes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: FailureKind
) -> None:
    monkeypatch.setattr(Job, "failure", Failure(kind, 0, 0))
    found = engine.probe(tmp_path, **SMALL)
    assert found.backend is None
    assert {attempt.cause for attempt in found.attempts} == {"a block's write did not move what it should have"}


@pytest.mark.parametrize("error", ["EUCLEAN", "EFBIG", "ENODEV", "EIO"])
def test_a_disk_that_fails_refuses_no_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str) -> None:
    monkeypatch.setattr(Job, "failure", Failure(FailureKind.IO, getattr(errno, error), 0))
    assert engine.probe(tmp_path, **SMALL).backend == "io_uring"


def test_a_refused_open_releases_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kept exception does not keep the directory locked."""
    before = held()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse(monkeypatch, {"io_uring": errno.EPERM})
        with pytest.raises(EngineWarning) as warned:
            engine.Engine(tmp_path, **SMALL)
    monkeypatch.undo()
    engine.Engine(tmp_path, **SMALL).close()
    real_start = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 1:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real_start(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(PlatformError, match=r"2 commit threads could not be started.*ulimit -u") as refused:
        engine.Engine(tmp_path, **SMALL)
    monkeypatch.undo()
    assert not started[0].is_alive()
    engine.Engine(tmp_path, **SMALL).close()
    assert held().threads == before.threads and held().slot_mappings == before.slot_mappings
    assert warned.value and refused.value


def test_a_refused_backend_requested_by_name_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse(monkeypatch, {"io_uring": errno.EPERM})
    with pytest.raises(PlatformError, match=rf"backend 'io_uring' does not work in {tmp_path}: .*io_uring") as caught:
        engine.Engine(tmp_path, backend="io_uring", **SMALL)
    assert "seccomp" in caught.value.remedy and "or use 'auto'" in caught.value.remedy
    monkeypatch.undo()
    engine.Engine(tmp_path, **SMALL).close()  # and the directory is free


def test_auto_goes_down_one_rung_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused: dict[str, int] = {}
    for name, lower in zip(LADDER, [*LADDER[1:], None], strict=True):
        refused[name] = errno.EPERM
        refuse(monkeypatch, refused)
        if lower is None:
            with pytest.raises(PlatformError, match="no backend works"):
                engine.Engine(tmp_path, **SMALL)
            break
        with pytest.warns(EngineWarning, match=f"'{lower}' is used in {tmp_path}, and not 'io_uring'") as caught:
            eng = engine.Engine(tmp_path, **SMALL)
        eng.close()
        assert len(caught) == 1 and eng.backend == lower
        assert [attempt.backend for attempt in eng.probe.attempts if attempt.cause] == list(refused)
        assert engine.probe(tmp_path, **SMALL)[:3] == eng.probe[:3]


def refuse(monkeypatch: pytest.MonkeyPatch, refused: dict[str, int]) -> None:
    """Have these backends refused as the kernel refuses them."""

    def opened(slot_count: int, slot_bytes: int, name: Backend, staging_threads: int) -> Pipeline:
        if name in refused:
            raise OpenError(Refused.RING, refused[name])
        return Pipeline(slot_count, slot_bytes, name, staging_threads)

    monkeypatch.setattr(backend, "Pipeline", opened)


def test_a_larger_alignment_rules_out_direct_io(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "direct_alignment", lambda descriptor: 65536)
    found = engine.probe(tmp_path, **SMALL)
    assert found.backend == "buffered"
    assert {attempt.cause for attempt in found.attempts[:3]} == {
        f"direct I/O in {tmp_path} is aligned to 65536 bytes, and blocks to 4096"
    }


def refuse_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, dict.fromkeys(LADDER, errno.EPERM))


def refuse_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "direct_alignment", lambda descriptor: 65536)


def refuse_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "failure", Failure(FailureKind.IO, errno.EPERM, 0))


def interrupt_move(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "attach", interrupted)


@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("fault", [refuse_to_open, refuse_alignment, refuse_to_move, interrupt_move])
def test_a_refused_backend_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Callable[[pytest.MonkeyPatch], None], nameless: bool
) -> None:
    if not nameless:
        without_nameless_files(monkeypatch)
    fault(monkeypatch)
    before = held()
    if fault is interrupt_move:
        with pytest.raises(KeyboardInterrupt):
            engine.probe(tmp_path, **SMALL)
    else:
        found = engine.probe(tmp_path, **SMALL)
        assert found.backend == ("buffered" if fault is refuse_alignment else None)
    assert held() == before and os.listdir(tmp_path) == []


def test_a_directory_that_is_not_there_cannot_be_probed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        engine.probe(tmp_path / "nowhere")


def test_a_file_system_without_nameless_files_is_probed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_nameless_files(monkeypatch)
    assert engine.probe(tmp_path, **SMALL).backend == "io_uring"
    assert os.listdir(tmp_path) == []


def without_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernel refuse O_TMPFILE."""
    real_open = os.open

    def without_tmpfile(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without_tmpfile)


def test_a_probe_needs_no_lock_and_takes_none(tmp_path: Path) -> None:
    with engine.Engine(tmp_path, **SMALL) as eng:
        assert engine.probe(tmp_path, **SMALL)[:3] == eng.probe[:3]
        eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(10)})).result()


# -- room -------------------------------------------------------------------------------------------------------------


def test_a_save_without_room_says_how_much_is_missing() -> None:
    tensors = {"a": torch.rand(1_000_000)}  # 4 MB: twice fit, with a spare, and a third save only over the spare
    arena = engine.Arena.wrap(tensors)
    with volume("ext4", 16 << 20) as path, engine.Engine(path / "run", keep=1, max_async=1, **SMALL) as eng:
        for step in (1, 2, 3):
            eng.checkpoint(arena, step=step).result()
        big = engine.Arena.wrap({"a": torch.rand(5_000_000)})
        needed = 20_000_000 + 4096 + 96
        before = sorted(path.rglob("*"))
        free = Filesystem().free_bytes(str(path))
        assert free is not None
        save = eng.checkpoint(big, step=4)
        error = save.exception()
        assert isinstance(error, engine.NoSpaceError) and error.errno == errno.ENOSPC
        spare = sum(file.stat().st_blocks * 512 for file in (path / "run" / ".engine" / "spare").rglob("*.*"))
        assert spare >= 4_000_000
        assert abs(error.missing_bytes - (needed - free - spare)) <= 2 * 4096
        assert str(error.missing_bytes) in str(error) and error.remedy in str(error)
        assert sorted(path.rglob("*")) == before, "something was begun"
        eng.checkpoint(arena, step=4).result()
        assert eng.steps() == [4]


def test_blocks_reserved_for_root_are_room_for_root() -> None:
    with volume("ext4", 64 << 20, mkfs=("-m", "50")) as path, engine.Engine(path / "run", **SMALL) as eng:
        error = eng.checkpoint(engine.Arena.wrap({"a": torch.rand(9_000_000)}), step=1).exception()
        assert isinstance(error, engine.NoSpaceError) == (os.geteuid() != 0), error
        assert eng.steps() == ([1] if os.geteuid() == 0 else [])


def test_a_spare_file_with_a_second_name_adds_no_room() -> None:
    """Deleting such a file frees no room."""
    arena = engine.Arena.wrap({"a": torch.rand(1_000_000)})
    with volume("ext4", 16 << 20) as path, engine.Engine(path / "run", keep=1, max_async=1, **SMALL) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
        (spare,) = (path / "run" / ".engine" / "spare").rglob("model.safetensors")
        (path / "backup").hardlink_to(spare)
        free = Filesystem().free_bytes(str(path))
        assert free is not None
        with open(path / "filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, free - (2 << 20))
        assert isinstance(eng.checkpoint(arena, step=3).exception(), engine.NoSpaceError)
        (path / "backup").unlink()
        eng.checkpoint(arena, step=3).result()


def test_a_file_system_that_reports_no_free_space_is_tried() -> None:
    with volume("ramfs", 0) as path, warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineWarning)
        assert Filesystem().free_bytes(str(path)) is None
        with engine.Engine(path / "run", **SMALL) as eng:
            eng.checkpoint(engine.Arena.wrap({"a": torch.zeros(1000)}), step=1).result()
