"""Layerwise saves: each layer is as it was when it was handed over, the result is a checkpoint like any other."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from disk import GatedFilesystem, same
from guarded import KINDS_HERE
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from jobs import until
from torch import Tensor, nn

import engine
from engine.options import GuardName
from engine.session.layerwise import LayerwiseSave

GUARDS: tuple[GuardName, ...] = (*KINDS_HERE, "fence")
HANG_S = 60

# Blocks of two pages: layers share some of them, and have several.
SMALL: dict[str, Any] = {"block_bytes": 8192, "staging_bytes": 64 << 10, "chunk_bytes": 32 << 10}


class Layered(nn.Module):
    """Layers of several sizes, one in another, with buffers, a frozen tensor, a tied one and one of the root."""

    def __init__(self, widths: Sequence[int] = (20, 70, 33)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(w, w), nn.BatchNorm1d(w)) for w in widths)
        self.embed = nn.Embedding(50, 40)
        self.frozen = nn.Linear(11, 13)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(40, 50)
        self.head.weight = self.embed.weight
        self.token = nn.Parameter(torch.zeros(100))


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def step(optimizer: torch.optim.Optimizer) -> None:
    """A step with new gradients."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


class Made:
    """A model, its optimizers, each of one layer, and its arena."""

    def __init__(self, widths: Sequence[int] = (20, 70, 33)) -> None:
        self.model = Layered(widths)
        layers = {f"layers.{index}": layer for index, layer in enumerate(self.model.layers)}
        self.parts: dict[str, list[nn.Parameter]] = {name: trained(layer) for name, layer in layers.items()}
        self.parts |= {
            "embed": [self.model.get_parameter("embed.weight")],
            "head": [self.model.head.bias],
            "token": [self.model.token],
        }
        self.optimizers = {
            name.replace(".", "-"): torch.optim.AdamW(parameters, lr=0.1) for name, parameters in self.parts.items()
        }
        for optimizer in self.optimizers.values():
            step(optimizer)
        self.arena = engine.Arena.adopt(self.model, self.optimizers)
        self.layers = [*self.parts, "frozen"]

    def step(self, layer: str) -> None:
        if layer in self.parts:
            step(self.optimizers[layer.replace(".", "-")])

    def now(self, layer: str = "") -> dict[str, Tensor]:
        """Clones of the tensors of a layer; a tied one belongs to the layer that stores it."""
        clones = {}
        for name, tensor in self.arena.state_dict().items():
            stored = self.arena.aliases.get(name, name)
            if not layer or stored == layer or stored.startswith(f"{layer}.") or f".{layer}." in stored:
                clones[name] = tensor.clone()
        return clones


def differing(eng: engine.Engine, save: engine.Save, want: dict[str, Tensor]) -> list[str]:
    """The tensors of a committed save that are not as they must be."""
    got = eng.load(save.result(HANG_S).step)
    return [name for name in want if not same(got[name], want[name])]


@pytest.mark.parametrize("guard", GUARDS)
@settings(
    max_examples=3,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_each_layer_is_as_it_was_when_it_was_handed_over(
    tmp_path_factory: pytest.TempPathFactory, guard: GuardName, data: st.DataObject
) -> None:
    """And the files are those that checkpoint() makes of the same tensors.  Other layers are written meanwhile."""
    made = Made(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4)))
    root = tmp_path_factory.mktemp("layerwise")
    block_bytes = data.draw(st.sampled_from([4096, 8192, 1 << 20]))
    staging_bytes = block_bytes * data.draw(st.integers(2, 8))
    options: dict[str, Any] = {"block_bytes": block_bytes, "staging_bytes": staging_bytes, "guard": guard}
    with engine.Engine(root / "a", **options) as eng, engine.Engine(root / "b", **options) as other:
        for number in range(2):
            want: dict[str, Tensor] = {}
            with eng.layerwise(
                made.arena, number, snapshot=data.draw(st.sampled_from(["auto", "eager", "checked"]))
            ) as (save):
                left = data.draw(st.permutations(made.layers))
                while left:
                    made.step(left[0])
                    want |= made.now(left[0])
                    save.layer_ready(left[0])
                    left = left[1:]
                    for layer in data.draw(st.lists(st.sampled_from(left), max_size=2)) if left else ():
                        made.step(layer)
            assert differing(eng, save, want) == []
            assert want.keys() == made.arena.state_dict().keys()
        whole = other.checkpoint(made.arena, step=1).result(HANG_S)
        assert other.chunks() == eng.chunks()
        for path in Path(whole.path).glob("*.safetensors"):
            assert path.read_bytes() == (root / "a" / "step-00000001" / path.name).read_bytes()
        eng.restore(made.arena)


class Believed(RuleBasedStateMachine):
    """What a save accepts and how it ends, in any order of calls."""

    root: Path

    @initialize()
    def open(self) -> None:
        self.made = Made((5, 9))
        self.eng = engine.Engine(self.root / str(len(list(self.root.iterdir()))), **SMALL)
        self.number = -1
        self.committed: list[int] = []
        self.save: LayerwiseSave | None = None
        self.handed: set[str] = set()

    @precondition(lambda self: self.save is None)
    @rule()
    def enter(self) -> None:
        self.number += 1
        self.block = self.eng.layerwise(self.made.arena, self.number)
        self.save, self.handed = self.block.__enter__(), set()

    @precondition(lambda self: self.save is not None)
    @rule(layer=st.sampled_from(["layers.0", "layers.0.1", "layers.1", "embed", "head", "token", "frozen", "none", ""]))
    def hand_over(self, layer: str) -> None:
        assert self.save is not None
        parts = {"layers.0": {"layers.0.0", "layers.0.1"}, "layers.1": {"layers.1.0", "layers.1.1"}}
        every = {*parts["layers.0"], *parts["layers.1"], "embed", "head", "token", "frozen"}
        holds = every if layer == "" else parts.get(layer, {layer} & every)
        if layer == "none":
            with pytest.raises(engine.ArgumentError, match="'none' is not in the arena"):
                self.save.layer_ready(layer)
        elif holds <= self.handed:
            with pytest.raises(engine.UsageError, match="handed over already"):
                self.save.layer_ready(layer)
        else:
            self.save.layer_ready(layer)
        self.handed |= holds
        assert set(self.save.remaining()) == every - self.handed

    @precondition(lambda self: self.save is not None)
    @rule(fails=st.booleans())
    def leave(self, fails: bool) -> None:
        assert self.save is not None
        save, self.save = self.save, None
        error = OSError("of the user") if fails else None
        missing = save.remaining()
        self.block.__exit__(type(error) if error else None, error, None)
        if not fails and not missing:
            assert save.result(HANG_S).step == self.number
            self.committed.append(self.number)
        else:
            with pytest.raises(engine.UsageError) as caught:
                save.result(HANG_S)
            assert "of the user" in str(caught.value) if fails else missing[0] in str(caught.value)
        assert self.eng.steps() == self.committed[-2:]

    def teardown(self) -> None:
        if hasattr(self, "eng"):
            self.eng.close()
            assert self.save is None or isinstance(self.save.exception(HANG_S), engine.ClosedError)


@pytest.mark.filterwarnings("ignore::engine.EngineWarning")
def test_any_order_of_calls(tmp_path: Path) -> None:
    machine = type("Machine", (Believed,), {"root": tmp_path})
    run_state_machine_as_test(machine, settings=settings(max_examples=10, stateful_step_count=12, deadline=None))


# -- when ------------------------------------------------------------------------------------------------------------


def test_staging_of_a_layer_starts_when_it_is_handed_over_and_not_before(tmp_path: Path) -> None:
    made = Made((300, 300))
    with engine.Engine(tmp_path, **SMALL | {"chunk_bytes": 8192}) as eng:
        with eng.layerwise(made.arena) as save:
            until(lambda: (tmp_path / "step-00000000.partial").exists())
            assert {chunk.status for chunk in save.chunks()} == {"pending"}
            made.step("layers.1")
            save.layer_ready("layers.1")
            of_one = {(c.file, c.index) for c in save.chunks() if set(c.layers) <= {"layers.1.0", "layers.1.1"}}
            assert len(of_one) > 30
            until(lambda: {c.status for c in save.chunks() if (c.file, c.index) in of_one} == {"written"})
            assert {c.status for c in save.chunks(layer="layers.0") if c.layers == ("layers.0.0",)} == {"pending"}
            assert eng.steps() == []
            save.layer_ready("")
        assert save.result(HANG_S).step == 0
        assert {chunk.status for chunk in save.chunks()} == {"durable"}


def test_hyperparameters_and_plain_state_are_those_of_the_end_of_the_block(tmp_path: Path) -> None:
    made = Made((5,))
    group = made.optimizers["embed"].param_groups[0]
    with engine.Engine(tmp_path, **SMALL) as eng:
        with eng.layerwise(made.arena, extra={"n": 1}) as save:
            group["lr"] = 0.25
            save.layer_ready("")
        save.result(HANG_S)
        group["lr"] = 0.5
        eng.restore(made.arena)
        assert group["lr"] == 0.25 and eng.extra() == {"n": 1}


def test_an_eager_layer_is_staged_when_it_is_handed_over(tmp_path: Path) -> None:
    made = Made((300, 300))
    with engine.Engine(tmp_path, guard="fence", **SMALL) as eng:
        want = made.now()
        with eng.layerwise(made.arena, snapshot="eager") as save:
            for layer in made.layers:
                save.layer_ready(layer)
                assert not {"pending"} & {c.status for c in save.chunks() if set(c.layers) == {f"{layer}.0"}}
        for parameter in made.model.parameters():
            parameter.data.add_(1)
        assert differing(eng, save, want) == []


# -- what ends a save --------------------------------------------------------------------------------------------------


@contextmanager
def discarded(eng: engine.Engine, made: Made, match: str, number: int = 1) -> Iterator[LayerwiseSave]:
    """A block in which the save is discarded; the next save works."""
    with eng.layerwise(made.arena, number) as save:
        save.layer_ready("embed")
        yield save
        assert save.wait_staged(HANG_S), "nothing reads the arena"
        save.layer_ready("")  # training goes on
    with pytest.raises(engine.UsageError, match="after the block"):
        save.layer_ready("")
    with pytest.raises(engine.EngineError, match=match):
        save.result(HANG_S)
    assert not list(Path(eng._store.root).glob("*.partial"))
    assert number not in eng.steps()


def test_a_block_left_without_every_layer_fails_the_save(tmp_path: Path) -> None:
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng:
        with eng.layerwise(made.arena, 0) as save:
            save.layer_ready("layers")
            save.layer_ready("embed")
            save.layer_ready("token")
        with pytest.raises(engine.UsageError, match=r"step 0 lacks frozen, head: call layer_ready\(\)"):
            save.result(HANG_S)
        assert eng.checkpoint(made.arena, 1).result(HANG_S).step == 1
        with eng.layerwise(made.arena, 2) as save:
            pass
        save.wait_staged()
        until(save.done)
        with pytest.warns(engine.EngineWarning, match="step 2 lacks"):
            eng.wait()


def test_an_exception_in_the_block_discards_the_save_and_is_raised(tmp_path: Path) -> None:
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng:
        for error in (ValueError("mine"), KeyboardInterrupt()):
            with pytest.raises(type(error)), eng.layerwise(made.arena, 0) as save:
                save.layer_ready("")
                raise error
            with pytest.raises(engine.UsageError, match=f"left by {type(error).__name__}"):
                save.result(HANG_S)
            assert eng.steps() == []
        eng.checkpoint(made.arena, 0).result(HANG_S)


def test_a_block_that_is_never_left_discards_the_save(tmp_path: Path) -> None:
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng:
        block = eng.layerwise(made.arena, 0)
        save = block.__enter__()
        with pytest.raises(engine.UsageError, match="entered once"):
            block.__enter__()
        save.layer_ready("embed")
        del block
        gc.collect()
        with pytest.raises(engine.UsageError, match="never left"):
            save.result(HANG_S)
        eng.checkpoint(made.arena, 0).result(HANG_S)


def test_whatever_would_wait_for_an_open_block_discards_the_save(tmp_path: Path) -> None:
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng, engine.Engine(tmp_path / "other", **SMALL) as other:
        eng.checkpoint(made.arena, 0).result(HANG_S)
        with discarded(eng, made, "still open when its arena was restored"):
            eng.restore(made.arena)
        with discarded(eng, made, "still open when its arena was restored"):
            other.checkpoint(engine.Arena.wrap({"a": torch.ones(3)})).result(HANG_S)  # of another arena
            eng.restore(made.model)
        with eng.layerwise(made.arena, 1) as save:
            made.model.head.bias.data = made.model.head.bias.data + 1
            made.arena.state_dict()
        with pytest.raises(engine.EngineError, match="still open when its arena"):
            save.result(HANG_S)


def test_a_save_of_the_arena_in_its_open_block_is_refused(tmp_path: Path) -> None:
    """By any Engine and from any thread; the block goes on."""
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng, engine.Engine(tmp_path / "other", **SMALL) as other:
        with eng.layerwise(made.arena, 3) as save:
            save.layer_ready("embed")
            for each in (eng, other):
                with pytest.raises(engine.UsageError, match=r"open block of layerwise\(\), of step 3"):
                    each.checkpoint(made.arena)
            with pytest.raises(engine.UsageError, match="open block"), eng.layerwise(made.arena, 4):
                pass
            caught: list[BaseException] = []

            def saves() -> None:
                try:
                    eng.checkpoint(made.arena, 5)
                except engine.UsageError as error:
                    caught.append(error)

            thread = threading.Thread(target=saves)
            thread.start()
            thread.join(HANG_S)
            assert len(caught) == 1
            pid = os.fork()
            if pid == 0:  # whose block nobody will leave
                try:
                    engine.Engine(tmp_path / "child", **SMALL).checkpoint(made.arena).result(HANG_S)
                except BaseException:
                    os._exit(1)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            save.layer_ready("")
        assert differing(eng, save, made.now()) == []
        assert eng.checkpoint(made.arena).result(HANG_S).step == 4
        assert eng.steps() == [3, 4] and other.steps() == []


def test_tensors_that_are_replaced_in_the_block_fail_the_save(tmp_path: Path) -> None:
    """What the arena holds of them is old."""
    made = Made()
    with engine.Engine(tmp_path, **SMALL) as eng:
        with eng.layerwise(made.arena, 0) as save:
            made.model.head.bias.data = made.model.head.bias.data + 1
            save.layer_ready("")
        with pytest.raises(engine.ArenaError, match="replaced in the block of step 0"):
            save.result(HANG_S)
        want = made.now()
        assert differing(eng, eng.checkpoint(made.arena, 0), want) == []


def test_calls_that_would_wait_for_their_own_block_are_refused(tmp_path: Path) -> None:
    made, other = Made(), Made((3,))
    with engine.Engine(tmp_path, max_async=1, **SMALL) as eng:
        with eng.layerwise(made.arena, 0) as save:
            for wait in (save.result, save.exception, save.wait_staged):
                with pytest.raises(engine.UsageError, match="would wait for its own block"):
                    wait()
            with pytest.raises(engine.UsageError, match="would wait for that block"):
                eng.wait()
            with pytest.raises(engine.BusyError, match="in this thread"):
                eng.checkpoint(other.arena)
            with pytest.raises(TimeoutError):
                save.result(0.01)
            refused = eng.layerwise(other.arena, 1, on_busy="skip")
            with refused as skipped:
                skipped.layer_ready("anything")
                assert skipped.remaining() == [] and skipped.chunks() == []
            assert isinstance(skipped.exception(), engine.BusyError)
            save.layer_ready("")
        assert save.result(HANG_S).step == 0
        assert eng.checkpoint(other.arena).result(HANG_S).step == 1


@pytest.mark.filterwarnings("ignore:the save of step 0 failed:engine.EngineWarning")
@pytest.mark.parametrize("in_thread", [False, True])
def test_an_engine_that_is_closed_in_the_block_discards_the_save(tmp_path: Path, in_thread: bool) -> None:
    made = Made()
    eng = engine.Engine(tmp_path, **SMALL)
    with eng.layerwise(made.arena, 0) as save:
        save.layer_ready("embed")
        closing = threading.Thread(target=eng.close)
        if in_thread:
            closing.start()
            closing.join(HANG_S)
            assert not closing.is_alive()
        else:
            eng.close()
    assert isinstance(save.exception(HANG_S), engine.ClosedError)


def test_a_save_that_fails_in_the_block_does_not_disturb_it(tmp_path: Path) -> None:
    class Full(GatedFilesystem):
        def allocate(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    made = Made()
    with engine.Engine(tmp_path, filesystem=Full(), **SMALL) as eng:
        with eng.layerwise(made.arena, 0) as save:
            until(save.done)
            for layer in made.layers:
                made.step(layer)
                save.layer_ready(layer)
        assert isinstance(save.exception(), OSError)


def test_a_part_of_a_layer_that_changes_before_its_block_is_complete_tears_the_save(tmp_path: Path) -> None:
    """Nothing counts the write, and no block with it was released."""
    made = Made((5, 9))
    for guard in GUARDS:
        with engine.Engine(tmp_path / guard, guard=guard) as eng:
            with eng.layerwise(made.arena, 0) as save:
                save.layer_ready("layers.0")
                made.model.get_parameter("layers.0.0.weight").data.add_(1)
                save.layer_ready("layers.1")
                save.layer_ready("")
            with pytest.raises(engine.TornSnapshot, match=r"changed layers\.0\.0\.weight after layer_ready\(\)"):
                save.result(HANG_S)


@pytest.mark.parametrize("guard", [kind for kind in GUARDS if kind != "cow"])
def test_a_counted_write_to_a_layer_that_is_handed_over_tears_the_save(tmp_path: Path, guard: GuardName) -> None:
    made = Made((300,))
    filesystem = GatedFilesystem()
    with engine.Engine(tmp_path, guard=guard, filesystem=filesystem, **SMALL) as eng:
        with eng.layerwise(made.arena, 0, snapshot="lazy") as save:
            save.layer_ready("layers.0")
            made.step("layers.0")
            save.layer_ready("")
            filesystem.gate.set()
        with pytest.raises(engine.TornSnapshot):
            save.result(HANG_S)


# -- optimizers that step in backward ----------------------------------------------------------------------------------


def step_in_backward(made: Made, per_parameter: bool = False) -> None:
    """As torch's tutorial on optimizer steps in backward does."""
    for name, parameters in made.parts.items():
        optimizer = made.optimizers[name.replace(".", "-")]
        left = set(parameters)

        def hook(parameter: Tensor, optimizer: Any = optimizer, left: Any = left, every: Any = parameters) -> None:
            left.discard(parameter)
            if not left:
                left.update(every)
                optimizer.step()
                optimizer.zero_grad()

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(hook)


def loss(model: Layered) -> Tensor:
    total = model.embed(torch.arange(50)).square().sum() + model.head(torch.ones(3, 40)).square().sum()
    for layer in model.layers:
        total = total + layer(torch.randn(4, layer[0].in_features)).square().sum()  # type: ignore[index]
    assert isinstance(total, Tensor)
    return total


@pytest.mark.parametrize("guard", GUARDS)
def test_layers_are_handed_over_as_they_step_in_backward(tmp_path: Path, guard: GuardName) -> None:
    """The parameter that gets no gradient, and the frozen layer, at the end."""
    made = Made()
    made.model.zero_grad()
    step_in_backward(made)
    left: list[set[str]] = []
    saves: list[LayerwiseSave] = []
    made.model.embed.weight.register_post_accumulate_grad_hook(lambda _: left.append(set(saves[-1].remaining())))
    with engine.Engine(tmp_path, guard=guard, **SMALL) as eng:
        for number in range(2):
            with eng.layerwise(made.arena, number) as save, save.in_backward():
                saves.append(save)
                loss(made.model).backward()
                assert set(save.remaining()) == {"frozen", "token"}
            assert differing(eng, save, made.now()) == []
    assert len(left) == 2 and all("embed" not in each and "frozen" in each for each in left), "inside backward"


def test_a_layer_that_was_handed_over_by_hand_is_not_handed_over_again(tmp_path: Path) -> None:
    made = Made()
    made.model.zero_grad()
    step_in_backward(made)
    with engine.Engine(tmp_path, **SMALL) as eng:
        with eng.layerwise(made.arena, 0) as save, save.in_backward():
            save.layer_ready("frozen")
            loss(made.model).backward()
        assert differing(eng, save, made.now()) == []
        made.model.zero_grad()
        loss(made.model).backward()  # outside a block nothing is handed over


# -- kills, interrupts, resumption -------------------------------------------------------------------------------------

TRAIN = """
import os, sys
import torch, engine
from torch import nn

directory, last, kill_at, kill_after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(200, 200) for _ in range(5)])
optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-3) for layer in model]
arena = engine.Arena.adopt(model, optimizers)
counts = [0] * 5
stepped = 0

def hook_of(index):
    def hook(_):
        global stepped
        counts[index] += 1
        if counts[index] % 2 == 0:
            optimizers[index].step()
            optimizers[index].zero_grad()
            stepped += 1
            if step == kill_at and stepped == kill_after:
                os.kill(os.getpid(), 9)
    return hook

for index, layer in enumerate(model):
    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(hook_of(index))
with engine.Engine(directory, block_bytes=64 << 10, staging_bytes=256 << 10) as eng:
    for step in range(engine.resume(arena, eng) + 1, last + 1):
        stepped = 0
        batch = torch.randn(16, 200, generator=torch.Generator().manual_seed(step))
        loss = (model(batch) - batch).square().mean()
        if step % 2:
            loss.backward()
        else:
            with eng.layerwise(arena, step) as save, save.in_backward():
                loss.backward()
import hashlib
digest = hashlib.sha256()
for name, tensor in sorted(arena.state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def train(directory: Path, last: int, kill_at: int = 0, kill_after: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRAIN, str(directory), str(last), str(kill_at), str(kill_after)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S * 2,
    )


def test_a_training_killed_in_its_blocks_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """A block in which the process dies leaves no checkpoint, however many layers were handed over."""
    undisturbed = train(tmp_path / "a", 8)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for kill_at, kill_after in ((2, 3), (6, 5)):
        killed = train(tmp_path / "b", 8, kill_at, kill_after)
        assert killed.returncode == -9, killed.stderr
        steps = engine.open(tmp_path / "b").steps()
        assert not steps or steps[-1] < kill_at
    resumed = train(tmp_path / "b", 8)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == undisturbed.stdout != ""


INTERRUPTS = """
import logging, random, signal, sys, warnings
import torch, engine

random.seed(1)
logging.getLogger("engine").setLevel(logging.CRITICAL)
warnings.simplefilter("ignore")
small = {"max_async": 1, "staging_bytes": 128 << 10, "block_bytes": 32 << 10, "guard": sys.argv[2]}
model = torch.nn.Sequential(*[torch.nn.Linear(100, 100) for _ in range(4)])
arena = engine.Arena.adopt(model)

def fill(value):
    for parameter in model.parameters():
        parameter.data.fill_(value)

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
eng, interrupted = engine.Engine(sys.argv[1], **small), 0
for step in range(300):
    fill(step)
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
        with eng.layerwise(arena, step=3 * step) as save:
            for layer in range(4):
                save.layer_ready(str(layer))
    except KeyboardInterrupt:
        interrupted += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    save = None
    fill(-1)
    if step % 25 == 24:
        fill(step)
        with eng.layerwise(arena, step=3 * step + 1) as save:
            save.layer_ready("")
        save.result(60)
        for committed in eng.steps():
            values = torch.cat([each.reshape(-1) for each in eng.load(committed).values()]).unique()
            assert len(values) == 1 and values[0] != -1, (committed, values)
eng.close()
print(interrupted)
"""


@pytest.mark.parametrize("guard", ["fence", *(kind for kind in KINDS_HERE if kind == "cow")])
def test_interrupts_at_random_moments_of_blocks(tmp_path: Path, guard: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTS, str(tmp_path), guard], capture_output=True, text=True, timeout=HANG_S * 2
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 50, "hardly anything was interrupted"


def test_a_backward_pass_that_steps_nothing_stores_nothing(tmp_path: Path) -> None:
    """The optimizer steps after the block, as most trainings do: the checkpoint would be of the moment before."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, **SMALL) as eng:
        refused = pytest.raises(engine.UsageError, match="no optimizer stepped in the block of step 1")
        with refused, eng.layerwise(arena, 1) as save, save.in_backward():
            model(torch.ones(4)).sum().backward()
        assert eng.steps() == []
