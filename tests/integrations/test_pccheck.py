"""PCcheck's names on this engine: the flat tensor, what is saved, and a training that is killed and resumes."""

from __future__ import annotations

import itertools
import logging
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
from engine.integrations.pccheck import (
    Chk_monitor,
    LayerwiseCheckpointTrainer,
    PCCheckAdapter,
    chunk_ranges,
    find,
    get_total_size,
    initialize,
    set_storage,
)

HANG_S = 120


class Mixed(nn.Module):
    """Parameters of several dtypes, a running mean, and a parameter that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.narrow = nn.Linear(10, 3, dtype=torch.bfloat16)
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.flag: Tensor
        self.register_buffer("flag", torch.tensor([True, False, True]))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.narrow(self.norm(self.first(inputs)).to(torch.bfloat16))
        return hidden.double() * self.wide


def training(seed: int = 0) -> tuple[Mixed, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Mixed()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=set_to_none)
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    model(data).square().mean().backward()
    optimizer.step()


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that a training changes, copied; gradients included."""
    values = [*model.parameters(), *model.buffers()]
    values += [value for param in model.parameters() for value in optimizer.state[param].values()]
    values += [param.grad for param in model.parameters() if param.grad is not None]
    return [value.detach().clone() for value in values]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def monitor_of(directory: Path, gpu_ar: Tensor, total_size: int, **options: Any) -> Chk_monitor:
    """As PCcheck's scripts make it: the first five arguments by position."""
    return Chk_monitor(None, total_size, 1, 2, True, gpu_ar=gpu_ar, checkpoint_dir=directory, **options)


# -- the flat tensor ------------------------------------------------------------------------------------------------


def test_parameters_gradients_and_moments_are_views_of_the_flat_tensor() -> None:
    model, optimizer = training()
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    assert gpu_ar.dtype == torch.float32 and gpu_ar.dim() == 1 and gpu_ar.numel() == total_size
    gpu_ar.zero_()
    held = state(model, optimizer)
    assert len(held) == 8 + 4 + 3 * 8 + 8  # parameters, buffers, step and two moments each, gradients
    assert all(not value.any() for value in held), "a tensor is not in the flat tensor"


def test_initialize_and_set_storage_change_nothing_in_a_training(one_thread: None) -> None:
    plain, adopted = training(), training()
    gpu_ar, _ = initialize(adopted[0], [adopted[1]])
    set_storage(adopted[0], [adopted[1]], gpu_ar)
    for number in range(5):
        train(*plain, number)
        train(*adopted, number)
    for model, optimizer in (plain, adopted):
        assert model.unused.grad is None
        optimizer.state[model.unused].clear()  # zeros in the arena, and nothing outside
    assert_same(state(*plain), state(*adopted))


def test_gradients_that_are_zeroed_in_place_stay_in_the_flat_tensor() -> None:
    model, optimizer = training()
    gpu_ar, _ = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    train(model, optimizer, 0, set_to_none=False)
    first = model.first.weight.grad
    assert first is not None and first.any()
    gpu_ar.zero_()
    assert not first.any()


def test_a_model_without_an_optimizer_and_one_with_several(tmp_path: Path) -> None:
    """PCcheck's microbenchmark passes no optimizer."""
    model = nn.Linear(4, 4)
    gpu_ar, total_size = initialize(model, [])
    set_storage(model, [], gpu_ar)
    assert model.weight.grad is None
    monitor = monitor_of(tmp_path / "none", gpu_ar, total_size)
    monitor.save(1).result()
    assert set(monitor.eng.load()) == {"weight", "bias"}
    monitor.kill_checkpoint()

    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.Adam(pair[0].parameters()), torch.optim.SGD(pair[1].parameters(), lr=0.1)]
    gpu_ar, total_size = initialize(pair, optimizers)
    set_storage(pair, optimizers, gpu_ar)
    monitor = monitor_of(tmp_path / "several", gpu_ar, total_size)
    monitor.save(1).result()
    assert {"gradients.0.weight", "gradients.1.weight", "optimizer.0.0.weight.exp_avg"} <= set(monitor.eng.load())
    monitor.kill_checkpoint()


def test_a_sparse_gradient_gets_no_space() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    gpu_ar, _ = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    model(torch.tensor([1, 2])).sum().backward()
    optimizer.step()  # refuses a dense gradient


def test_what_is_no_module_and_no_tensor_of_initialize_is_refused() -> None:
    model, optimizer = training()
    with pytest.raises(engine.ArgumentError, match=r"OrderedDict'>; it must be a torch\.nn\.Module"):
        initialize(model.state_dict(), [optimizer])  # type: ignore[arg-type]
    gpu_ar, _ = initialize(model, [optimizer])
    with pytest.raises(engine.ArgumentError, match="no slice or copy of it"):
        set_storage(model, [optimizer], gpu_ar[:])


def test_the_total_size_counts_what_exists() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    assert get_total_size(model, [optimizer]) == 8
    train(nn.Sequential(nn.Linear(6, 3), model), optimizer, 0)
    assert get_total_size(model, [optimizer]) == 8 + 2 * 8 + 2  # two moments, and a step for each parameter


def test_a_wrapped_arena_has_no_flat_memory() -> None:
    with pytest.raises(engine.UsageError, match="wrapped arena has no memory of its own"):
        engine.Arena.wrap({"a": torch.ones(3)}).flat()


# -- the monitor object ---------------------------------------------------------------------------------------------


def test_a_loop_in_the_style_of_pccheck(tmp_path: Path) -> None:
    model, optimizer = training()
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    chunks = {"bsize": total_size // 4, "memory_saving": True}
    monitor = monitor_of(
        tmp_path, gpu_ar, total_size, model=model.state_dict(), optimizer=optimizer.state_dict(), **chunks
    )
    for number in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        while monitor.gpu_copy_in_progress():
            continue
        optimizer.step()
        monitor.save()
        while monitor.checkpoint_in_progress():
            continue
        assert monitor.eng.steps()[-1] == number, "a save without a step is of the optimizer's step"
    assert not monitor.gpu_copy_in_progress()
    monitor.kill_checkpoint()
    monitor.kill_checkpoint()
    with pytest.raises(engine.ClosedError):
        monitor.save()


def test_bsize_is_the_number_of_elements_in_a_chunk(tmp_path: Path) -> None:
    gpu_ar = torch.zeros(10_000)
    header = 4096  # in the first chunk, beside its data
    for bsize, sizes in ((4096, [header + 16384, 16384, 40_000 - 2 * 16384]), (None, [header + 40_000])):
        monitor = monitor_of(tmp_path / str(bsize), gpu_ar, 10_000, bsize=bsize)
        assert [chunk.nbytes for chunk in monitor.save().chunks()] == sizes
        monitor.kill_checkpoint()


def test_a_synchronous_monitor_has_one_save_in_flight(tmp_path: Path) -> None:
    gpu_ar = torch.zeros(1000)
    monitor = monitor_of(tmp_path, gpu_ar, 1000, is_sync=True)
    first = monitor.save()
    monitor.save()
    assert first.done()
    monitor.kill_checkpoint()


def test_a_monitor_needs_a_tensor_and_one_rank(tmp_path: Path) -> None:
    with pytest.raises(engine.ArgumentError, match="gpu_ar is None; pass the tensor that initialize"):
        Chk_monitor(None, 10, 1, 1, True, None)  # type: ignore[arg-type]
    with pytest.raises(engine.UsageError, match="let rank 0 alone save"):
        monitor_of(tmp_path, torch.zeros(10), 10, is_distributed=True, rank=1, world_size=2)


def test_a_save_without_a_step_is_of_the_step_that_the_optimizer_has_reached(tmp_path: Path) -> None:
    """As in PCcheck's loops, which pass none.  The training step goes on after a restore."""
    for last, start in ((5, 0), (9, 4)):
        model, optimizer = training()
        gpu_ar, total_size = initialize(model, [optimizer])
        set_storage(model, [optimizer], gpu_ar)
        monitor = monitor_of(tmp_path, gpu_ar, total_size, keep=None)
        assert monitor.restore() == start
        for number in range(start, last):
            train(model, optimizer, number)
            if number % 2:
                monitor.save().result()
        monitor.kill_checkpoint()
    with engine.open(tmp_path) as run:
        assert run.steps() == [2, 4, 6, 8]
    info = find(tmp_path, "step_6")
    assert info is not None and info.step == 6


def test_two_saves_of_one_step_are_two_checkpoints_of_that_training_step(tmp_path: Path) -> None:
    model, optimizer = training()
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    monitor = monitor_of(tmp_path, gpu_ar, total_size)
    train(model, optimizer, 0)
    train(model, optimizer, 1)
    assert [monitor.save().step, monitor.save().step] == [2, 3]
    monitor.eng.wait()
    assert monitor.restore() == 2
    train(model, optimizer, 2)
    assert monitor.save().result().step == 4
    assert monitor.restore() == 3
    monitor.kill_checkpoint()


def test_a_save_that_nothing_counts_warns_at_the_restore(tmp_path: Path) -> None:
    monitor = monitor_of(tmp_path, torch.zeros(10), 10)
    monitor.save()
    monitor.save()
    monitor.eng.wait()
    with pytest.warns(engine.EngineWarning, match=r"1 was saved without .* so 1 counts saves: pass the step"):
        assert monitor.restore() == 1
    monitor.save(7)
    monitor.eng.wait()
    assert monitor.restore() == 7
    monitor.kill_checkpoint()


def test_gradients_are_in_no_file_that_a_loader_of_models_reads(tmp_path: Path) -> None:
    model, optimizer = training()
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    train(model, optimizer, 0)
    monitor = monitor_of(tmp_path, gpu_ar, total_size)
    path = Path(monitor.save().result().path)
    assert load_file(path / "model.safetensors").keys() == model.state_dict().keys()
    gradients = load_file(path / "gradients.safetensors")
    assert gradients.keys() == {f"gradients.{name}" for name, _ in model.named_parameters()}
    assert model.first.weight.grad is not None
    assert torch.equal(gradients["gradients.first.weight"], model.first.weight.grad)
    assert monitor.eng.load(select=engine.role("grad")).keys() == gradients.keys()
    plain, other = training(seed=1)
    arena = engine.Arena.adopt(plain, other)
    info = monitor.eng.restore(arena, strict=False)  # as the migration page says
    assert set(info.unexpected) == gradients.keys()
    assert torch.equal(plain.first.weight, model.first.weight)
    monitor.eng.restore(arena, select="first")
    monitor.kill_checkpoint()


@pytest.mark.parametrize("accumulating", [True, False])
def test_a_restore_gives_gradients_and_random_generators_back(tmp_path: Path, accumulating: bool) -> None:
    """A save between two backward passes of one step holds half a sum."""
    model, optimizer = training()
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    train(model, optimizer, 0)
    if not accumulating:
        optimizer.zero_grad()
    monitor = monitor_of(tmp_path, gpu_ar, total_size)
    monitor.save(1, extra={"epoch": 7})
    saved, drawn = state(model, optimizer), torch.randn(3)
    monitor.kill_checkpoint()

    model, optimizer = training(seed=1)
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    monitor = monitor_of(tmp_path, gpu_ar, total_size)
    assert monitor.restore() == 1
    assert_same(state(model, optimizer), saved)
    assert (model.first.weight.grad is not None) is accumulating
    assert model.unused.grad is None, "autograd gave it none"
    assert torch.equal(torch.randn(3), drawn)
    assert monitor.eng.extra()["extra"] == {"epoch": 7}
    monitor.kill_checkpoint()


def test_another_tensor_is_saved_as_it_is(tmp_path: Path) -> None:
    gpu_ar = torch.arange(1000, dtype=torch.int16)
    monitor = monitor_of(tmp_path, gpu_ar, 1000)
    monitor.save(1).result()
    gpu_ar.zero_()
    assert monitor.restore("step_1") == 1
    assert torch.equal(gpu_ar, torch.arange(1000, dtype=torch.int16))
    monitor.kill_checkpoint()


# -- the trainer ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**12), st.integers(-3, 200))
def test_chunks_are_equal_but_for_the_last_and_hold_everything(total: int, count: int) -> None:
    ranges = chunk_ranges(total, count)
    assert sum(end - start for start, end in ranges) == total
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    size = -(-total // max(1, count))
    assert all(end - start == size for start, end in ranges[:-1]) and len(ranges) <= max(1, count)
    assert all(0 < end - start <= size for start, end in ranges)


def test_the_worked_example_of_the_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """500 MB of float32 in three chunks."""
    trainer = LayerwiseCheckpointTrainer(checkpoint_dir=tmp_path, verbose=True)
    trainer.gpu_ar = torch.zeros(125_000_000)
    with caplog.at_level(logging.INFO, "engine.pccheck"):
        save = trainer.save_entire_checkpoint_in_chunks("step_10", 10, 3)
    assert caplog.messages == [
        "step_10: step 10, 125000000 elements in 3 chunks",
        "step_10: chunk 1 of 3 has the elements 0:41666667 (41666667 elements)",
        "step_10: chunk 2 of 3 has the elements 41666667:83333334 (41666667 elements)",
        "step_10: chunk 3 of 3 has the elements 83333334:125000000 (41666666 elements)",
    ]
    assert save is not None
    page, data = 4096, -(-41_666_667 * 4 // 4096) * 4096
    assert [chunk.nbytes for chunk in save.chunks()] == [page + data, data, 500_000_000 - 2 * data], "in whole pages"
    assert save.result().step == 10
    trainer.shutdown()


def skipped(trainer: LayerwiseCheckpointTrainer, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    assert trainer.save_entire_checkpoint_in_chunks("a", 1, 2) is None
    [message] = caplog.messages
    return message


def test_a_save_without_content_is_skipped_with_the_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = LayerwiseCheckpointTrainer(checkpoint_dir=tmp_path / "run", verbose=False)
    assert skipped(trainer, caplog) == "the chunked save of 'a' is skipped (gpu_ar=False, elements=0, use_pccheck=True)"
    trainer.gpu_ar = torch.zeros(0)
    assert "gpu_ar=True, elements=0" in skipped(trainer, caplog)
    model = nn.Linear(2, 2)
    trainer = LayerwiseCheckpointTrainer(
        model, torch.optim.SGD, {"lr": 0.1}, tmp_path / "run", use_pccheck=False, verbose=False
    )
    assert "use_pccheck=False" in skipped(trainer, caplog)
    trainer.gpu_ar = torch.zeros(3)
    assert "elements=3, use_pccheck=False" in skipped(trainer, caplog)
    trainer.shutdown()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (-2, 1), (1, 1), (2, 2), (5, 5)])
def test_a_chunk_count_below_one_is_one(tmp_path: Path, count: int, expected: int) -> None:
    adapter = PCCheckAdapter(checkpoint_file=tmp_path, gpu_ar=torch.zeros(100_000))
    save = adapter.save_entire_checkpoint_in_chunks("a", 1, count)
    assert save is not None and len(save.chunks()) == expected
    adapter.shutdown()


def test_a_checkpoint_is_found_by_its_id(tmp_path: Path) -> None:
    adapter = PCCheckAdapter(checkpoint_file=tmp_path, gpu_ar=torch.zeros(100), keep=None)
    assert adapter.gpu_ar is not None
    for step, name in ((1, "first"), (2, "twice"), (3, "twice"), (4, "last")):
        adapter.gpu_ar.fill_(step)
        assert adapter.save_entire_checkpoint(name, step) is not None
    adapter.eng.wait()
    found = {name: adapter.find(name) for name in ("first", "twice", "last", "none")}
    assert {name: info and info.step for name, info in found.items()} == {
        "first": 1,
        "twice": 3,
        "last": 4,
        "none": None,
    }
    assert adapter.restore("first") == 1 and bool((adapter.gpu_ar == 1).all())
    assert adapter.restore() == 4 and bool((adapter.gpu_ar == 4).all())
    with pytest.raises(engine.NotFoundError, match="has the id 'none'"):
        adapter.restore("none")
    manifest = tmp_path / "step-00000003/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    info = find(tmp_path, "twice")  # beside the Engine
    assert info is not None and info.step == 2, "a damaged one is passed over"
    adapter.shutdown()


def test_a_restore_needs_somewhere_to_restore_to(tmp_path: Path) -> None:
    adapter = PCCheckAdapter(checkpoint_file=tmp_path)
    with pytest.raises(engine.UsageError, match="gpu_ar is None"):
        adapter.restore()
    with pytest.raises(engine.UsageError, match="needs a model and an optimizer_class"):
        LayerwiseCheckpointTrainer(checkpoint_dir=tmp_path).train_step(torch.ones(1), torch.ones(1), nn.MSELoss())


@pytest.mark.parametrize("give", [lambda model: torch.optim.Adam, lambda model: torch.optim.Adam(model.parameters())])
def test_the_trainer_trains_saves_and_resumes(
    tmp_path: Path, give: Callable[[nn.Module], Any], one_thread: None
) -> None:
    def trainer() -> LayerwiseCheckpointTrainer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6))
        return LayerwiseCheckpointTrainer(model, give(model), None, tmp_path, device="cpu", verbose=False)

    def steps(each: LayerwiseCheckpointTrainer, last: int) -> list[float]:
        losses = []
        while each.current_training_step < last:
            data = torch.randn(4, 6, generator=torch.Generator().manual_seed(each.current_training_step))
            losses.append(each.train_step(data, data, nn.MSELoss(), each.current_training_step == 2))
        return losses

    first = trainer()
    losses = steps(first, 6)
    first.finalize_checkpoint()
    first.shutdown()
    second = trainer()
    assert second.restore() == 3 and second.find("step_3") is not None
    assert steps(second, 6) == losses[3:]
    assert first.model is not None and second.model is not None
    assert_same([*first.model.parameters()], [*second.model.parameters()])
    second.shutdown()


def test_the_trainer_reshapes_the_output_of_a_sequence_model(tmp_path: Path) -> None:
    trainer = LayerwiseCheckpointTrainer(nn.Linear(4, 9), torch.optim.SGD, {"lr": 0.1}, tmp_path, verbose=False)
    loss = trainer.train_step(torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long), nn.CrossEntropyLoss())
    assert loss > 0
    trainer.shutdown()


@pytest.mark.parametrize("use_monitor", [False, True])
def test_use_monitor_asks_for_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_monitor: bool) -> None:
    asked: list[dict[str, Any]] = []

    def record(_directory: object, **options: Any) -> None:
        asked.append(options)

    monkeypatch.setattr(engine, "Engine", record)
    LayerwiseCheckpointTrainer(nn.Linear(2, 2), checkpoint_dir=tmp_path, use_monitor=use_monitor)
    monitor_of(tmp_path, torch.zeros(3), 3, use_monitor=use_monitor)
    expected = {"isolation": "process"} if use_monitor else {}
    assert asked == [{"max_async": 4, "keep": 2, **expected}, {"max_async": 2, "keep": 2, **expected}]


# -- killed and resumed ---------------------------------------------------------------------------------------------

SCRIPT = """
    import hashlib, os, signal, sys
    import torch
    from engine.integrations.pccheck import Chk_monitor, initialize, set_storage

    directory, kill_at = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.BatchNorm1d(256), torch.nn.ReLU(), torch.nn.Dropout(0.2),
        torch.nn.Linear(256, 64),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gpu_ar, total_size = initialize(model, [optimizer])
    set_storage(model, [optimizer], gpu_ar)
    chk_monitor = Chk_monitor(
        None, total_size, 1, 2, True, gpu_ar=gpu_ar, bsize=total_size // 3,
        model=model.state_dict(), optimizer=optimizer.state_dict(), memory_saving=True, checkpoint_dir=directory,
    )
    batch_idx = chk_monitor.restore()
    print("start", batch_idx, flush=True)
    while batch_idx < 30:
        data = torch.randn(8, 64, generator=torch.Generator().manual_seed(batch_idx))
        optimizer.zero_grad()
        loss = (model(data) - data).square().mean()
        loss.backward()
        while chk_monitor.gpu_copy_in_progress():
            continue
        optimizer.step()
        batch_idx += 1
        if batch_idx % 3 == 0:
            chk_monitor.save(batch_idx)
        if batch_idx == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    chk_monitor.kill_checkpoint()
    sha256 = hashlib.sha256()
    for param in model.parameters():
        for value in (param, *optimizer.state[param].values()):
            sha256.update(value.detach().numpy().tobytes())
    for value in model.buffers():
        sha256.update(value.numpy().tobytes())
    print("end", sha256.hexdigest())
"""


# A save is the monitor's once it knows that all of it is staged, which is a moment after the trainer knows.
UNTIL_SAFE = """
import sys
import engine


def until_safe(step):
    run = engine.open(sys.argv[1])
    while step not in run.steps() and not any(each.step == step and each.is_safe for each in run.in_flight()):
        pass


"""


def run_script(directory: Path, kill_at: int, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-W", "error", "-W", "ignore:'io_uring_plain'"),
            *("-c", textwrap.dedent(script), str(directory), str(kill_at)),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_a_script_of_the_adapter_alone_is_killed_and_resumes_bit_identically(tmp_path: Path) -> None:
    whole = run_script(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    killed = run_script(tmp_path / "killed", 18)  # at once after the call that saves
    assert killed.returncode == -signal.SIGKILL and "end" not in killed.stdout, killed.stderr
    again = run_script(tmp_path / "killed", 25)
    assert again.returncode == -signal.SIGKILL, again.stderr
    start = int(again.stdout.split()[1])
    assert start in (12, 15, 18), "two saves may be in flight, and an earlier one is lost only with all later ones"
    resumed = run_script(tmp_path / "killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout.split()[1]) > start
    assert resumed.stdout.split()[-1] == whole.stdout.split()[-1]


def test_a_script_with_a_monitor_loses_no_save_that_was_staged(tmp_path: Path) -> None:
    script = SCRIPT.replace("memory_saving=True,", "memory_saving=True, use_monitor=True,")
    script = script.replace("if batch_idx == kill_at:", "if batch_idx == kill_at:\n            until_safe(save.step)")
    script = UNTIL_SAFE + textwrap.dedent(script)
    script = script.replace("chk_monitor.save(batch_idx)", "save = chk_monitor.save(batch_idx)")
    assert run_script(tmp_path, 18, script).returncode == -signal.SIGKILL
    resumed = run_script(tmp_path, 0, script)
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout.split()[1]) == 18
