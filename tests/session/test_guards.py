"""Guards in real trainings: whatever writes, a save has the tensors of the moment of the call, or is torn.

`SLOW` slots make the staging take long: two blocks at a time, each of which waits for the disk.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import same
from guarded import KINDS_HERE, needs_cow
from tears import SLOW, copies, is_exact, make_model
from torch import nn

import engine
from engine.options import GuardName

GUARDS: tuple[GuardName, ...] = (*KINDS_HERE, "fence")

Writer = Callable[[nn.Module, torch.optim.Optimizer], object]


@pytest.fixture(params=[*((guard, 1) for guard in GUARDS), *((guard, 2) for guard in KINDS_HERE[:1])], ids=str)
def eng(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[engine.Engine]:
    guard, staging_threads = request.param
    with engine.Engine(tmp_path, guard=guard, staging_threads=staging_threads, **SLOW) as opened:
        assert opened.guard == guard
        yield opened


def step_of_the_own_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def step_of_another_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0).step()


def forward_of_batch_norm(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()(torch.randn(8, 1000))


@torch.no_grad()
def write_beside_the_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As the first step of SAM does, and a swap of averaged weights."""
    for parameter in model.parameters():
        parameter.add_(1)


@torch.no_grad()
def copy_in(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.copy_(torch.zeros_like(parameter))


def write_data(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def write_by_numpy(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] = 3


def write_in_c(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        ctypes.memset(parameter.data_ptr(), 7, parameter.nbytes)


def write_in_a_thread(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    thread = threading.Thread(target=write_data, args=(model, optimizer))
    thread.start()
    thread.join()


def read_a_file_into_it(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with open("/dev/zero", "rb", buffering=0) as zeros:
        for parameter in model.parameters():
            zeros.readinto(parameter.detach().view(-1).view(torch.uint8).numpy().data)


# Held back by the fence, so that they never tear a save under any guard.
FENCED: list[Writer] = [step_of_the_own_optimizer, step_of_another_optimizer, forward_of_batch_norm]

# Seen by torch's version counters, and by the kernel's guards.
COUNTED: list[Writer] = [write_beside_the_step, copy_in]

# Seen by the kernel's guards only.
UNSEEN: list[Writer] = [write_data, write_by_numpy, write_in_c, write_in_a_thread, read_a_file_into_it]


@pytest.mark.parametrize("writer", FENCED)
@pytest.mark.parametrize("snapshot", ["auto", "lazy", "eager", "checked"])
def test_a_fenced_writer_never_tears(eng: engine.Engine, writer: Writer, snapshot: Any) -> None:
    model = make_model(norm=True)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    for _ in range(3):
        want = copies(arena)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "another optimizer", engine.EngineWarning)
            save = eng.checkpoint(arena, snapshot=snapshot)
        writer(model, optimizer)
        assert is_exact(eng, save, want)


@pytest.mark.parametrize("writer", [*COUNTED, *UNSEEN])
@pytest.mark.parametrize("snapshot", ["lazy", "checked"])
def test_no_writer_mixes_a_save(eng: engine.Engine, writer: Writer, snapshot: Any) -> None:
    """Under the fence nothing sees some writers, which is documented: there a lazy save needs their help."""
    if eng.guard == "fence" and snapshot == "lazy" and writer in UNSEEN:
        snapshot = "eager"
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    for _ in range(3):
        want = copies(arena)
        save = eng.checkpoint(arena, snapshot=snapshot)
        writer(model, optimizer)
        exact = is_exact(eng, save, want)
        assert exact or eng.guard != "cow"


def test_a_save_keeps_the_arena_that_nobody_keeps(eng: engine.Engine) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    save = eng.checkpoint(arena)
    del arena
    optimizer.step()
    assert is_exact(eng, save, want)


def test_parameters_that_another_optimizer_steps_are_named_once(eng: engine.Engine) -> None:
    model = make_model()
    arena = engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))
    other = torch.optim.SGD([model.get_parameter("1.weight")], lr=1.0)
    other.step()
    with pytest.warns(engine.EngineWarning, match=r"another optimizer .* has stepped 1\.weight;"):
        eng.checkpoint(arena).result()
    other.step()
    eng.checkpoint(arena).result()  # and no warning


def test_an_arena_that_was_torn_is_saved_eagerly_with_one_warning(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with engine.Engine(tmp_path, guard="detect", **SLOW) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        save = eng.checkpoint(arena)
        write_data(model, optimizer)
        with pytest.raises(engine.TornSnapshot, match=r"0\.weight"):
            save.result()
        for repetition in range(2):
            want = copies(arena)
            if repetition == 0:
                with pytest.warns(engine.EngineWarning, match="saved eagerly from now on"):
                    save = eng.checkpoint(arena)
            else:
                save = eng.checkpoint(arena)
            write_data(model, optimizer)
            assert is_exact(eng, save, want)


@needs_cow
def test_two_engines_save_one_arena(tmp_path: Path) -> None:
    """A block is clean only since the last save of the arena, even if another engine made that save."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    arena = engine.Arena.adopt(model, optimizer)
    with (
        engine.Engine(tmp_path / "a", guard="cow", **SLOW) as first,
        engine.Engine(tmp_path / "b", guard="cow", **SLOW) as second,
    ):
        for step in range(8):
            for eng in (first, second, first)[step % 2 :]:
                want = copies(arena)
                save = eng.checkpoint(arena)
                model.get_parameter(f"{step % 3}.weight").data.add_(1)
                assert is_exact(eng, save, want)


def test_guards_may_differ_from_engine_to_engine(tmp_path: Path) -> None:
    model = make_model()
    arena = engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))
    for guard in (*GUARDS, *GUARDS[::-1]):
        with engine.Engine(tmp_path / guard, guard=guard, **SLOW) as eng:
            want = copies(arena)
            save = eng.checkpoint(arena, snapshot="eager")
            write_data(model, torch.optim.SGD(model.parameters()))
            assert is_exact(eng, save, want)


@needs_cow
def test_what_does_not_change_is_neither_copied_nor_written(tmp_path: Path) -> None:
    """A frozen base of 12 MB and a head that is trained."""
    model = make_model()
    model.requires_grad_(False)
    head = nn.Linear(1000, 10)
    head.weight.grad = torch.ones_like(head.weight)
    both = nn.ModuleDict({"base": model, "head": head})
    optimizer = torch.optim.AdamW(head.parameters())
    with engine.Engine(tmp_path, guard="cow", **SLOW) as eng:
        arena = engine.Arena.adopt(both, optimizer)
        for _ in range(8):
            want = copies(arena)
            save = eng.checkpoint(arena)
            optimizer.step()
            assert is_exact(eng, save, want)
        stats = save.stats()
    assert stats["io_bytes"] <= 4 * SLOW["block_bytes"], "the head, its state, and blocks that they share"
    assert stats["clean_bytes"] >= 10 << 20, "all but the unit with the end of the base, whose last block changes"


def test_a_restore_into_a_guarded_arena(eng: engine.Engine) -> None:
    """Native code writes there, to memory that may still be protected since the save before."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    want = copies(arena)
    for _ in range(3):
        eng.checkpoint(arena).result()
    write_data(model, optimizer)
    eng.checkpoint(arena)
    eng.restore(arena, 1)
    assert all(same(tensor, want[name]) for name, tensor in arena.state_dict().items())


# -- hosts that refuse guards ------------------------------------------------------------------------------------------

ON_A_HOST = """
import os, sys, warnings
import torch, engine, seccomp
from engine import Arena, Engine, EngineWarning
import engine.session.snapshot
directory = sys.argv[1]
os.chmod(directory, 0o777)
model = torch.nn.Linear(500, 500)
optimizer = torch.optim.AdamW(model.parameters())  # now: what it imports may not be the other user's to read
{change}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    eng = Engine(directory + "/run", staging_bytes=512 << 10, block_bytes=256 << 10)
with eng:
    arena = Arena.adopt(model, optimizer)
    eng.checkpoint(arena).result()
    with open("/dev/zero", "rb", buffering=0) as zeros:  # the kernel writes to what may be protected
        assert zeros.readinto(model.weight.detach().view(-1).view(torch.uint8).numpy().data) == 1_000_000
    eng.checkpoint(arena).result()
    assert eng.load()["weight"].eq(0).all()
    print(eng.guard, eng.probe.guard, [str(each.message) for each in caught])
"""

# The last call makes the files of /proc/self the new user's, as they are of any process that was started by it.
UNPRIVILEGED = (
    "os.geteuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534)); "
    "__import__('ctypes').CDLL(None).prctl(4, 1, 0, 0, 0)"
)
USERFAULTFD = 282 if os.uname().machine == "aarch64" else 323


@pytest.mark.parametrize(
    ("change", "guard", "says"),
    [
        (UNPRIVILEGED, "detect", "vm.unprivileged_userfaultfd=1"),
        (f"seccomp.refuse(1, ({USERFAULTFD},)); {UNPRIVILEGED}", "fence", "a profile that allows userfaultfd"),
    ],
    ids=["without privilege", "under a seccomp filter"],
)
def test_a_host_that_refuses_a_guard_says_why(change: str, guard: str, says: str) -> None:
    """In the probe, and in a warning where there is nothing but the fence."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are their user's alone
        output = run_script(ON_A_HOST.format(change=change), directory)
    assert output.startswith(f"{guard} ") and says in output
    assert output.count("snapshots are guarded by") == (guard == "fence")


def run_script(script: str, directory: str) -> str:
    """The output of a script in its own process."""
    result = subprocess.run(
        [sys.executable, "-c", script, directory],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_guard_that_is_insisted_on_and_refused() -> None:
    script = f"""
import os, sys, engine, seccomp
from engine import Engine, PlatformError
os.chmod(sys.argv[1], 0o777)
seccomp.refuse(1, ({USERFAULTFD},))
{UNPRIVILEGED}
try:
    Engine(sys.argv[1], guard="detect", staging_bytes=512 << 10, block_bytes=256 << 10)
except PlatformError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as directory:
        assert "guard 'detect' does not work here" in run_script(script, directory)


@needs_cow
def test_a_save_in_flight_at_exit_is_exact(tmp_path: Path) -> None:
    """The interpreter drains it; its guard must not end before."""
    script = """
import sys, torch, engine
model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(5)])
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
arena = engine.Arena.adopt(model, optimizer)
eng = engine.Engine(sys.argv[1], guard="cow", staging_bytes=512 << 10, block_bytes=256 << 10)
for parameter in model.parameters():
    parameter.data.fill_(1)
save = eng.checkpoint(arena)
for parameter in model.parameters():
    parameter.data.fill_(2)
"""
    run_script(script, str(tmp_path))
    assert all(tensor.eq(1).all() for tensor in engine.open(tmp_path).load().values())
