"""Trainings of models of many kinds: one that is saved, restored into a fresh model and resumed is bit-identical."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coded
import pytest
import torch
import torch.ao.quantization as quantization
from coded import Coded, CodedSgd
from guarded import KINDS_HERE
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer
from trainings import OwnStep

import engine
from engine.options import GuardName

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[], tuple[nn.Module, Optimizer]]


def step(model: nn.Module, optimizer: Optimizer, shape: tuple[int, ...], number: int) -> None:
    torch.manual_seed(number)
    optimizer.zero_grad()
    out = model(torch.randn(shape))
    out.abs().square().mean().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Every tensor of a training, in order."""
    states = sorted(optimizer.state_dict()["state"].items())  # by parameter, in whatever order they got their state
    values = [*model.state_dict().values(), *(value for _, state in states for value in state.values())]
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert mine == theirs


def assert_resumes(
    make: Make,
    path: Path,
    shape: tuple[int, ...],
    make_again: Make | None = None,
    same_base: bool = False,
    **adopt: Any,
) -> dict[str, Tensor]:
    """A training, saved after three steps, and one that goes on from there in a fresh model end in the same bits.

    Args:
        make_again: makes the fresh model, if not in the same way.
        same_base: the fresh model has the first one's initial tensors, of which a part is not saved.

    Returns:
        The tensors of the checkpoint.
    """
    torch.manual_seed(1)
    model, optimizer = make()
    arena = engine.Arena.adopt(model, optimizer, **adopt)
    with engine.Engine(path) as eng:
        for number in range(6):
            step(model, optimizer, shape, number)
            if number == 2:
                eng.checkpoint(arena, number)
    torch.manual_seed(1 if same_base else 2)
    fresh, fresh_optimizer = (make_again or make)()
    run = engine.open(path)
    arena = engine.Arena.adopt(fresh, fresh_optimizer, **adopt)
    run.restore(arena)
    loaded = run.load()
    live = arena.state_dict()
    assert_same(list(loaded.values()), [live[name] for name in loaded])
    for number in range(3, 6):
        step(fresh, fresh_optimizer, shape, number)
    assert_same(state_of(fresh, fresh_optimizer), state_of(model, optimizer))
    return loaded


def linear() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    return model, torch.optim.AdamW(model.parameters())


def test_a_compiled_training_resumes_in_a_raw_model(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model, optimizer = linear()
        compiled: Any = torch.compile(model, backend="eager")
        return compiled, optimizer

    loaded = assert_resumes(make, tmp_path, (7, 6), linear)
    assert set(loaded) >= {"0.weight", "1.running_mean", "optimizer.2.bias.exp_avg"}


def test_a_renamed_training_resumes(tmp_path: Path) -> None:
    loaded = assert_resumes(linear, tmp_path, (7, 6), rename=lambda name: f"net.{name}")
    assert set(loaded) >= {"net.0.weight", "net.1.running_mean", "optimizer.net.2.bias.exp_avg"}


class Quantized(nn.Module):
    """Layers between the stubs of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Any:
        return self.dequant(self.head(self.relu(self.norm(self.conv(self.quant(images)))).mean((2, 3))))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
@pytest.mark.parametrize(("backend", "version"), [("x86", 0), ("x86", 1), ("qnnpack", 1)])
def test_quantization_aware_training_resumes(backend: str, version: int, tmp_path: Path) -> None:
    """Observers of channels resize their buffers in the first forward; those of whole tensors do not."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = Quantized().train()
        model.qconfig = quantization.get_default_qat_qconfig(backend, version)
        quantization.fuse_modules_qat(model, [["conv", "norm", "relu"]], inplace=True)
        quantization.prepare_qat(model, inplace=True)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    loaded = assert_resumes(make, tmp_path, (5, 2, 8, 8))
    assert loaded["conv.weight_fake_quant.scale"].shape == ((4,) if backend == "x86" else (1,))


def test_a_histogram_observer_resumes(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(6, 4), quantization.HistogramObserver(bins=32), nn.Linear(4, 2))
        return model, torch.optim.AdamW(model.parameters())

    assert assert_resumes(make, tmp_path, (9, 6))["1.histogram"].shape == (32,)


class Counts(nn.Module):
    """Resizes its buffer in each forward, and writes to it."""

    seen: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.resize_(rows.shape[1:])
        self.seen += 1
        return rows


@pytest.mark.parametrize("guard", [*KINDS_HERE, "fence"])
def test_a_forward_that_resizes_tears_no_save(guard: GuardName, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), Counts(1000))
    optimizer = torch.optim.AdamW(model.parameters())
    slow: dict[str, Any] = {"staging_bytes": 512 << 10, "block_bytes": 256 << 10}
    with engine.Engine(tmp_path, guard=guard, keep=9, **slow) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        wanted = []
        for number in range(6):
            wanted.append({name: tensor.clone() for name, tensor in arena.state_dict().items()})
            eng.checkpoint(arena, number)
            step(model, optimizer, (3, 1000), number)
        eng.wait()
        for number, want in enumerate(wanted):
            assert_same(list(eng.load(number).values()), [want[name] for name in eng.load(number)])


def test_a_restore_that_is_refused_resizes_nothing(tmp_path: Path) -> None:
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(engine.Arena.adopt(nn.Sequential(nn.Linear(2, 2), Counts(4)))).result()
        model = nn.Sequential(nn.Linear(2, 3), Counts(1))
        with pytest.raises(engine.MismatchError, match=r"0\.weight") as caught:
            eng.restore(engine.Arena.adopt(model))
        assert "1.seen" not in str(caught.value)
        assert model.get_buffer("1.seen").shape == (1,)
        arena = engine.Arena.adopt(model)
        model.get_buffer("1.seen").fill_(3)
        eng.restore(arena, select="1.seen")
        assert_same([model.get_buffer("1.seen")], [torch.zeros(4)])


def test_a_coded_optimizer_resumes(tmp_path: Path) -> None:
    """The state is of a tensor subclass.  The optimizer makes it in its first step, so the fresh one takes a step."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        return model, CodedSgd(model.parameters())

    def make_again() -> tuple[nn.Module, Optimizer]:
        model, optimizer = make()
        step(model, optimizer, (7, 6), 9)
        return model, optimizer

    loaded = assert_resumes(make, tmp_path, (7, 6), make_again)
    assert loaded["optimizer.1.weight.momentum.codes"].dtype == torch.int8


class Adapted(nn.Module):
    """A frozen base with statistics that change, and an adapter that is trained, as LoRA does it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, rows: Tensor) -> Any:
        return self.base(rows) + self.up(self.down(rows))


def adapted() -> tuple[nn.Module, Optimizer]:
    model = Adapted()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def test_only_what_is_trained_resumes_over_the_same_base(tmp_path: Path) -> None:
    loaded = assert_resumes(adapted, tmp_path, (7, 6), same_base=True, only="trained")
    assert {name for name in loaded if not name.startswith("optimizer.")} == {
        "down.weight",
        "up.weight",
        "base.1.running_mean",
        "base.1.running_var",
        "base.1.num_batches_tracked",
    }


def test_what_is_excluded_is_not_saved(tmp_path: Path) -> None:
    loaded = assert_resumes(adapted, tmp_path, (7, 6), same_base=True, exclude=["base.0", "base.2"])
    assert "base.1.weight" in loaded and not any(name.startswith(("base.0", "base.2")) for name in loaded)


def test_a_whole_checkpoint_fills_a_partial_arena(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, optimizer = adapted()
    with engine.Engine(tmp_path) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        step(model, optimizer, (7, 6), 0)
        eng.checkpoint(arena).result()
        torch.manual_seed(1)
        fresh, fresh_optimizer = adapted()
        eng.restore(engine.Arena.adopt(fresh, fresh_optimizer, only="trained"))
        assert_same(state_of(fresh, fresh_optimizer), state_of(model, optimizer))
        other, other_optimizer = adapted()
        part = engine.Arena.adopt(other, other_optimizer, exclude="up")
        before = other.get_parameter("up.weight").clone()
        eng.restore(part, select="*.weight")
        assert_same([other.get_parameter("up.weight")], [before])
        assert_same([other.get_parameter("down.weight")], [model.get_parameter("down.weight")])
        with pytest.raises(engine.MismatchError, match="matches no tensor"):
            eng.restore(part, select="up")


def test_a_partial_checkpoint_does_not_fill_a_whole_arena(tmp_path: Path) -> None:
    model, optimizer = adapted()
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer, only="trained")).result()
        fresh, fresh_optimizer = adapted()
        before = state_of(fresh, fresh_optimizer)
        arena = engine.Arena.adopt(fresh, fresh_optimizer)
        with pytest.raises(
            engine.MismatchError,
            match=r"base\.0\.weight, base\.0\.bias: not in the checkpoint(?s:.*)only= and exclude=",
        ):
            eng.restore(arena)
        assert_same(state_of(fresh, fresh_optimizer)[: len(before)], before)
        eng.restore(arena, select=["down", "up"])
        assert_same([fresh.get_parameter("up.weight")], [model.get_parameter("up.weight")])


def test_a_partial_arena_of_momentum_resumes(tmp_path: Path) -> None:
    """The momentum of what is left out is reserved in no segment."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        model[0].requires_grad_(False)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    assert set(assert_resumes(make, tmp_path / "a", (7, 6), same_base=True, only="trained")) == {
        "1.weight",
        "1.bias",
        "optimizer.1.weight.momentum_buffer",
        "optimizer.1.bias.momentum_buffer",
    }
    model, optimizer = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with engine.Engine(tmp_path / "b") as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()  # before any momentum is made
        fresh, _ = linear()
        fresh_optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
        step(fresh, fresh_optimizer, (7, 6), 0)
        eng.restore(engine.Arena.adopt(fresh, fresh_optimizer, exclude="0"))
        assert_same([fresh.get_parameter("2.weight")], [model.get_parameter("2.weight")])
        assert "momentum_buffer" not in fresh_optimizer.state[fresh.get_parameter("2.weight")]


class Complex(nn.Module):
    """Complex weights, and a complex buffer that forward writes to."""

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
        self.register_buffer("phase", torch.zeros(4, dtype=torch.complex64))

    def forward(self, rows: Tensor) -> Tensor:
        self.phase += 1j
        return rows.to(torch.complex64) @ self.weight


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = layers()
    change(model[0])
    return model


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.LazyLinear(4))
    model(torch.randn(7, 6))
    return model


# How to make each, and a name that its checkpoint has.
KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (Complex, "phase"),
    "lazy": (lazy, "1.running_mean"),
    "weight norm": (
        lambda: changed(nn.utils.parametrizations.weight_norm),
        "0.parametrizations.weight.original0",
    ),
    "spectral norm": (lambda: changed(nn.utils.parametrizations.spectral_norm), "0.parametrizations.weight.0._u"),
    "orthogonal": (lambda: changed(nn.utils.parametrizations.orthogonal), "0.parametrizations.weight.original"),
    "spectral norm by a hook": (lambda: changed(nn.utils.spectral_norm), "0.weight_u"),
    "pruned": (lambda: changed(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), "0.weight_mask"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_model_of_each_kind_resumes(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]

    def training() -> tuple[nn.Module, Optimizer]:
        model = make()
        return model, torch.optim.AdamW(model.parameters())

    assert name in assert_resumes(training, tmp_path, (7, 6))


def test_a_pruning_that_begins_in_a_training_is_taken_in(tmp_path: Path) -> None:
    """It replaces a parameter, so that the next save has a new layout."""
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine.Engine(tmp_path) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        eng.checkpoint(arena).result()
        prune.l1_unstructured(model[2], "weight", 0.5)
        step(model, optimizer, (7, 6), 0)
        eng.checkpoint(arena).result()
        assert_same([eng.load()["2.weight_orig"]], [model.get_parameter("2.weight_orig")])


def test_state_of_a_subclass_is_made_of_its_components(tmp_path: Path) -> None:
    model = layers()
    optimizer = CodedSgd(model.parameters())
    step(model, optimizer, (7, 6), 0)
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        fresh = layers()
        fresh_optimizer = CodedSgd(fresh.parameters())
        arena = engine.Arena.adopt(fresh, fresh_optimizer)
        eng.restore(arena)
        for number in (1, 2):
            step(model, optimizer, (7, 6), number)
            step(fresh, fresh_optimizer, (7, 6), number)
        assert_same(list(fresh.parameters()), list(model.parameters()))
        assert all(type(state["momentum"]) is Coded for state in fresh_optimizer.state.values())
        eng.checkpoint(arena).result()
        momentum = optimizer.state[model.get_parameter("0.weight")]["momentum"]
        assert_same([eng.load()["optimizer.0.weight.momentum.codes"]], [momentum.codes])


class Tagged(Coded):
    """Has a context."""

    tag: Any = "one"

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], (type(self).tag, torch.float32)


class TaggedSgd(CodedSgd):
    """SGD whose momentum is tagged."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            if not self.state[param]:
                self.state[param]["momentum"] = Tagged.of(torch.zeros_like(param))
        return super().step(closure)


def test_a_subclass_that_is_something_else_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    optimizer = TaggedSgd(model.parameters())
    step(model, optimizer, (7, 6), 0)
    arena = engine.Arena.adopt(model, optimizer)
    fresh = layers()
    fresh_optimizer = TaggedSgd(fresh.parameters())
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(arena).result()
        monkeypatch.setattr(Tagged, "tag", "two")
        with pytest.raises(engine.MismatchError, match=r"momentum.*Tagged .*'one'.*, and in the arena: .*'two'"):
            eng.restore(engine.Arena.adopt(model, optimizer))
        eng.restore(engine.Arena.adopt(model, optimizer), select=engine.role("model"))
        monkeypatch.setattr(Tagged, "tag", object())
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        with pytest.raises(engine.MismatchError, match=r"'optimizer\.0\.weight\.momentum' is a .*no plain value"):
            eng.restore(engine.Arena.adopt(fresh, fresh_optimizer))
        assert not fresh_optimizer.state
        eng.restore(engine.Arena.adopt(model, optimizer))


def test_a_class_that_was_not_imported_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers()
    optimizer = CodedSgd(model.parameters())
    step(model, optimizer, (7, 6), 0)
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        monkeypatch.setattr(coded, "Coded", None)
        fresh = layers()
        fresh_optimizer = CodedSgd(fresh.parameters())
        with pytest.raises(engine.MismatchError, match=r"coded\.Coded .* no such class of tensors; take one step"):
            eng.restore(engine.Arena.adopt(fresh, fresh_optimizer))
        assert not fresh_optimizer.state


def test_a_partial_arena_of_several_optimizers_resumes(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, list[Optimizer]]:
        torch.manual_seed(1)
        model: Any = layers()
        model[0].bias.requires_grad_(False)
        return model, [torch.optim.AdamW([model[0].weight]), OwnStep(model[2].parameters())]

    def run(model: nn.Module, optimizers: list[Optimizer], numbers: range) -> None:
        for number in numbers:
            for optimizer in optimizers:
                step(model, optimizer, (7, 6), number)

    model, optimizers = build()
    arena = engine.Arena.adopt(model, optimizers, only="trained")
    whole = engine.Arena.adopt(model, optimizers)
    with engine.Engine(tmp_path / "part") as eng, engine.Engine(tmp_path / "whole") as other:
        run(model, optimizers, range(2))
        arena.refresh()
        eng.checkpoint(arena).result()
        other.checkpoint(whole).result()
        run(model, optimizers, range(2, 4))
        for each in (eng, other):
            fresh, fresh_optimizers = build()
            each.restore(engine.Arena.adopt(fresh, fresh_optimizers, only="trained"))
            run(fresh, fresh_optimizers, range(2, 4))
            for one, two in zip(optimizers, fresh_optimizers, strict=True):
                assert_same(state_of(fresh, two), state_of(model, one))
        fresh, fresh_optimizers = build()
        other.restore(engine.Arena.adopt(fresh, fresh_optimizers, exclude="2"))
        assert not fresh_optimizers[1].state, "what is left out gets no state"


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: torch.optim.AdamW(params, lr=0.01),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9),
    ],
    ids=["AdamW", "SGD", "RMSprop"],
)
@pytest.mark.parametrize("is_frozen_again", [False, True], ids=["unfrozen", "frozen again"])
def test_state_of_a_parameter_that_is_frozen_at_the_restore_is_restored(
    make_optimizer: Callable[[Any], Optimizer], is_frozen_again: bool, tmp_path: Path
) -> None:
    """A layer is frozen when the training is made, unfrozen after a step, and perhaps frozen for a while again."""

    def make() -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        model[0].requires_grad_(False)
        return model, make_optimizer(model.parameters())

    def train(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for number in numbers:
            model.get_submodule("0").requires_grad_(number in (1, 2, 5) if is_frozen_again else number > 0)
            step(model, optimizer, (7, 6), number)

    model, optimizer = make()
    with engine.Engine(tmp_path) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        train(model, optimizer, range(4))
        eng.checkpoint(arena, step=3).result()
        train(model, optimizer, range(4, 7))
    fresh, fresh_optimizer = make()
    arena = engine.Arena.adopt(fresh, fresh_optimizer)
    engine.open(tmp_path).restore(arena)
    train(fresh, fresh_optimizer, range(4, 7))
    assert_same(state_of(fresh, fresh_optimizer), state_of(model, optimizer))
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(arena, step=7).result()
        for name, tensor in eng.load().items():
            assert_same([tensor], [arena.state_dict()[name]])


def test_state_of_a_frozen_parameter_that_the_checkpoint_lacks_is_taken_away(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path) as eng:
        eng.checkpoint(arena, step=0).result()
        model[0].requires_grad_(True)
        step(model, optimizer, (7, 6), 0)
        eng.checkpoint(arena, step=1).result()
        model[0].requires_grad_(False)
        assert optimizer.state[model.get_parameter("0.weight")]
        eng.restore(arena, step=0)
        assert not optimizer.state[model.get_parameter("0.weight")]
        eng.restore(arena, step=1)
        assert optimizer.state[model.get_parameter("0.weight")]["step"] == 1


def test_state_of_a_frozen_parameter_outside_the_arena_is_not_made(tmp_path: Path) -> None:
    model, optimizer = linear()
    with engine.Engine(tmp_path) as eng:
        step(model, optimizer, (7, 6), 0)
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        fresh, _ = linear()
        fresh.get_submodule("0").requires_grad_(False)
        fresh_optimizer = torch.optim.AdamW(fresh.parameters())
        part = engine.Arena.adopt(fresh, fresh_optimizer, only="trained")
        with pytest.raises(engine.MismatchError, match=r"optimizer\.0\.weight\.exp_avg,.*: not in the arena"):
            eng.restore(part)
        assert fresh.get_parameter("0.weight") not in fresh_optimizer.state
