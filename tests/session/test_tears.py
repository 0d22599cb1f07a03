"""Tears: no writer mixes a save, at any moment, under any guard; and nothing of a guard can hang or harm a training.

`tears` has the checks, and `tear_campaign.py` is the long form.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from conditions import CONDITIONS, memory_cgroup
from disk import GatedFilesystem
from guarded import KINDS_HERE, needs_cow
from tears import BACKENDS, SLOW, Figures, Life, copies, is_exact, make_model
from torch import nn
from volumes import as_root, volume
from writers import WRITERS

import engine
from engine.format.layout import align_up
from engine.io.guard import GuardError, Kind
from engine.io.pipeline import Refused
from engine.options import GuardName

GUARDS: tuple[GuardName, ...] = (*KINDS_HERE, "fence")

ROUNDS = 300

_MAP_FIXED = 0x10  # asm-generic/mman-common.h

CAMPAIGN = Path(__file__).parents[1] / "support" / "tear_campaign.py"

# Far beyond the guard's patience of 5 s; a writer that waits so long hangs.
HANG_S = 60


def write_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def test_no_writer_mixes_a_save_at_any_moment(tmp_path: Path) -> None:
    figures = Figures()
    seed = 0 if "CI" in os.environ else random.SystemRandom().getrandbits(32)
    threads, number = torch.get_num_threads(), 0
    while figures.save_count < ROUNDS:
        Life(tmp_path / str(number), seed, number, figures, GUARDS).live()
        number += 1
    torch.set_num_threads(threads)
    assert {guard for guard, _, _ in figures.ends} == set(GUARDS)
    assert {name for kind, name in figures.choices if kind == "backend"} == set(BACKENDS)
    assert len({writer for _, writer, _ in figures.ends}) > len(WRITERS) // 2
    assert figures.early_count, "no writer has struck before all was staged"
    assert any(end == "torn" for guard, _, end in figures.ends if guard != "cow"), "no save was torn"


def has_memory_cgroup() -> bool:
    try:
        parent, _ = memory_cgroup()
    except OSError:
        return False
    return os.access(parent, os.W_OK)


@pytest.mark.parametrize(
    "condition",
    [
        pytest.param(
            each,
            marks=pytest.mark.skipif(
                each == "pressure" and not has_memory_cgroup(), reason="needs root, and a memory cgroup to divide"
            ),
        )
        for each in CONDITIONS
    ],
)
def test_no_writer_mixes_a_save_on_such_a_host(condition: str, tmp_path: Path) -> None:
    """In a process of its own, whose memory the condition is of.  40 rounds are a life of each guard."""
    arguments = ["--rounds", "40", "--condition", condition, "--directory", str(tmp_path), "--seed", "3"]
    result = subprocess.run(
        [sys.executable, str(CAMPAIGN), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(f"  {guard} " in result.stdout for guard in GUARDS), result.stdout


# -- failures ----------------------------------------------------------------------------------------------------------


@needs_cow
def test_a_writer_beside_a_frozen_file_system_goes_on_and_the_save_fails() -> None:
    """The disk stalls: no write(2) ends until the file system is thawed."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arena = engine.Arena.adopt(model, optimizer)
    with volume("ext4", 256 << 20) as root, engine.Engine(root / "run", guard="cow", **SLOW) as eng:
        eng.checkpoint(arena).result()
        subprocess.run([*as_root(), "fsfreeze", "--freeze", str(root)], check=True)
        try:
            save = eng.checkpoint(arena)
            writer = threading.Thread(target=write_data, args=(model,))
            writer.start()
            writer.join(HANG_S)
            went_on = not writer.is_alive()
        finally:
            subprocess.run([*as_root(), "fsfreeze", "--unfreeze", str(root)], check=True)
        assert went_on
        with pytest.raises(engine.TornSnapshot, match="waited for seconds"):
            save.result(HANG_S)
        want = copies(arena)
        save = eng.checkpoint(arena, snapshot="lazy")
        write_data(model)
        assert is_exact(eng, save, want)


@needs_cow
def test_a_writer_that_no_file_is_made_for_goes_on_and_the_save_fails(tmp_path: Path) -> None:
    """A commit thread hangs in a file operation; an Engine that saves elsewhere is not harmed."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arena = engine.Arena.adopt(model, optimizer)
    filesystem = GatedFilesystem()
    with engine.Engine(tmp_path / "a", guard="cow", filesystem=filesystem, **SLOW) as eng:
        save = eng.checkpoint(arena)
        write_data(model)  # returns, although nothing moves
        filesystem.gate.set()
        with pytest.raises(engine.TornSnapshot, match="waited for seconds"):
            save.result(HANG_S)
        with engine.Engine(tmp_path / "b", guard="cow", **SLOW) as other:
            want = copies(arena)
            save = other.checkpoint(arena)
            write_data(model)
            assert is_exact(other, save, want)


SCRIPT = """
import ctypes, os, signal, sys, threading, time
import torch, engine
from disk import GatedFilesystem
model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(4)])
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
arena = engine.Arena.adopt(model, optimizer)
filesystem = GatedFilesystem()
eng = engine.Engine(sys.argv[1], guard=sys.argv[2], staging_bytes=512 << 10, block_bytes=256 << 10,
                    filesystem=filesystem)
filesystem.gate.set()
eng.checkpoint(arena).result()
filesystem.gate.clear()
eng.checkpoint(arena, snapshot="lazy")
last = [*model.parameters()][-2]
def write():
    last.data.fill_(2)
threading.Thread(target=write, daemon=True).start()  # waits for a block under cow
time.sleep(0.2)
{end}
"""


@pytest.mark.parametrize("kind", KINDS_HERE)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda each: each.name)
def test_a_process_that_crashes_while_a_writer_waits_is_gone_at_once(
    kind: Kind, end: signal.Signals, tmp_path: Path
) -> None:
    """And what it had committed is there."""
    script = SCRIPT.format(end=f"os.kill(os.getpid(), {int(end)}); time.sleep(600)")
    result = run(script, tmp_path, kind)
    assert result.returncode == -end, result.stderr
    run_ = engine.open(tmp_path)
    assert run_.steps() == [0]
    assert not run_.verify(0)


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_child_that_forks_while_a_writer_waits_writes_what_it_likes(kind: Kind, tmp_path: Path) -> None:
    """The child has no guard, and no thread that would answer a page fault."""
    script = SCRIPT.format(
        end="""
child = os.fork()
if child == 0:
    for parameter in model.parameters():
        ctypes.memset(parameter.data_ptr(), 5, parameter.nbytes)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
filesystem.gate.set()
"""
    )
    result = run(script, tmp_path, kind)
    assert result.returncode == 0, result.stderr


def run(script: str, directory: Path, guard: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, str(directory), guard],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=HANG_S * 2,
    )


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_closed_engine_leaves_memory_that_any_write_may_change(kind: Kind, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, guard=kind, **SLOW) as eng:
        for _ in range(3):
            eng.checkpoint(arena).result()  # unchanged, so that it stays protected
    write_data(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# -- a kernel that refuses ---------------------------------------------------------------------------------------------


def test_an_arena_whose_memory_the_kernel_refuses_is_saved_under_the_fence(tmp_path: Path) -> None:
    """One warning, and the guard of other arenas stays."""
    kind = KINDS_HERE[0]
    model, other = make_model(), make_model()
    arena = engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))
    with engine.Engine(tmp_path, **SLOW) as eng:
        assert eng.guard == kind
        refusal = mock.patch("engine.session.snapshot.Guard", side_effect=GuardError(Refused.RANGE, errno.EBUSY))
        with refusal, pytest.warns(engine.EngineWarning, match=f"without the guard '{kind}': .*EBUSY"):
            eng.checkpoint(arena).result()
        want = copies(arena)
        save = eng.checkpoint(arena, snapshot="eager")  # and no warning
        write_data(model)
        assert is_exact(eng, save, want)
        second = engine.Arena.adopt(other, torch.optim.AdamW(other.parameters()))
        want = copies(second)
        save = eng.checkpoint(second, snapshot="lazy")
        write_data(other)
        assert is_exact(eng, save, want) or kind == "detect"


def test_an_insisted_guard_that_the_kernel_refuses_fails_the_call(tmp_path: Path) -> None:
    kind = KINDS_HERE[-1]
    model = make_model()
    arena = engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))
    with engine.Engine(tmp_path, guard=kind, **SLOW) as eng:
        refusal = mock.patch("engine.session.snapshot.Guard", side_effect=GuardError(Refused.RANGE, errno.EBUSY))
        with refusal, pytest.raises(engine.PlatformError, match="EBUSY"):
            eng.checkpoint(arena)
        want = copies(arena)
        save = eng.checkpoint(arena)
        assert is_exact(eng, save, want)


def test_an_arena_that_the_kernel_refuses_to_protect_is_saved_without_its_guard(tmp_path: Path) -> None:
    """Refused in the middle of the call: the save is made all the same, with one warning, and no writer is held."""
    model = make_model()
    model.get_parameter("2.weight").requires_grad_(False)
    arena = engine.Arena.adopt(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    with engine.Engine(tmp_path, **SLOW) as eng:
        eng.checkpoint(arena).result()
        make_hole(arena)
        write_data(model)
        want = copies(arena)
        with pytest.warns(engine.EngineWarning, match=f"without the guard '{KINDS_HERE[0]}': .* could not be armed"):
            save = eng.checkpoint(arena, snapshot="eager")
        write_data(model)
        assert is_exact(eng, save, want)
        want = copies(arena)
        assert is_exact(eng, eng.checkpoint(arena), want)  # and no warning
    with engine.Engine(tmp_path / "insists", guard=KINDS_HERE[0], **SLOW) as eng:
        with pytest.raises(engine.PlatformError, match="could not be armed"):
            eng.checkpoint(arena)
        write_data(model)
        assert eng.steps() == []


def make_hole(arena: engine.Arena) -> None:
    """Put another page into the gap between trained and untrained segments: a range with a hole cannot be protected."""
    starts = [arena.sources[source].address + offset for source, offset in arena.locations]
    used = sorted((start, start + each.nbytes) for start, each in zip(starts, arena.segments, strict=True))
    address = next(
        align_up(end, mmap.PAGESIZE) for (_, end), (start, _) in pairwise(used) if start - end > 2 * mmap.PAGESIZE
    )
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    assert libc.mmap(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address
