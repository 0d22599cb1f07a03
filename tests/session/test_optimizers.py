"""Optimizers of every kind: trained, saved, restored into fresh ones, and trained on bit-identically."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from trainings import bits, mlp
from wrappers import Accelerated, Counting, Lightning, Lookahead, Unhooked, params_of

import engine
from engine.state.memory import HostMemory

pytestmark = pytest.mark.usefixtures("one_thread")

TINY: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}

Made = tuple[nn.Module, Any, Callable[[int], None]]


def contents(model: nn.Module, optimizers: Any) -> Any:
    """All tensors as bytes, and all plain state."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return bits(value)
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    if isinstance(optimizers, dict):
        optimizers = list(optimizers.values())
    each = optimizers if isinstance(optimizers, list) else [optimizers]
    groups = [{k: v for k, v in group.items() if k != "params"} for one in each for group in one.param_groups]
    states = [plain([one.state.get(param, {}) for param in params_of(one)]) for one in each]
    return plain(model.state_dict()), plain(groups), states, [getattr(one, "count", 0) for one in each]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    out: Tensor = model(torch.randn(4, 6)).square().mean()
    return out


def gan() -> Made:
    model = nn.ModuleDict({"g": mlp(), "d": mlp()})
    optimizers = [AdamW(model["g"].parameters(), lr=0.01), SGD(model["d"].parameters(), lr=0.1, momentum=0.9)]

    def train(seed: int) -> None:
        for module, optimizer in zip((model["g"], model["d"]), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(module, seed).backward()
            optimizer.step()

    return model, optimizers, train


class OwnMuon(Optimizer):
    """An optimizer for matrices that makes its state in its step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in params_of(self):
            state = self.state[param]
            if not state:
                state["momentum"], state["rows"], state["steps"] = torch.zeros_like(param), torch.zeros(len(param)), 0
            assert param.grad is not None
            state["steps"] += 1
            state["rows"].add_(param.grad.square().sum(1))
            param -= 0.02 * state["momentum"].mul_(0.9).add_(param.grad) / state["steps"]


def muon_and_adamw() -> Made:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizers = {"muon": OwnMuon(matrices), "adam-w": AdamW(rest, lr=0.01)}

    def train(seed: int) -> None:
        loss_of(model, seed).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizers, train


def sparse_adam_and_muon() -> Made:
    """Torch's own: one that makes its state late, and, since torch 2.9, one for matrices."""
    embedding, head = nn.Embedding(7, 6, sparse=True), nn.Linear(6, 3, bias=False)
    model = nn.Sequential(embedding, head)
    for_matrices = getattr(torch.optim, "Muon", torch.optim.RMSprop)
    optimizers = [torch.optim.SparseAdam(embedding.parameters()), for_matrices(head.parameters(), lr=0.01)]

    def train(seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randint(0, 7, (4,))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return model, optimizers, train


def in_backward() -> Made:
    model = nn.Sequential(*(mlp() if index == 0 else nn.Linear(3, 3) for index in range(4)))
    by_param = {param: SGD([param], lr=0.1, momentum=0.9) for param in model.parameters()}

    def step(param: Any) -> None:
        by_param[param].step()
        by_param[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    return model, list(by_param.values()), lambda seed: loss_of(model, seed).backward()


def one(make: Callable[[Any], Any]) -> Callable[[], Made]:
    def made() -> Made:
        model = mlp()
        optimizer = make(model.parameters())

        def train(seed: int) -> None:
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()

        return model, optimizer, train

    return made


def scheduled() -> Made:
    model, optimizer, train = one(lambda p: AdamW(p, lr=0.01))()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step
    return model, optimizer, train


def lbfgs() -> Made:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=4)

    def train(seed: int) -> None:
        def loss() -> float:
            optimizer.zero_grad()
            value = loss_of(model, seed)
            value.backward()
            return value.item()

        optimizer.step(loss)

    return model, optimizer, train


class Shared(Optimizer):
    """An 8-bit optimizer's map: one tensor in the state of all parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in params_of(self):
            if "map" not in self.state[param]:
                maps = [state["map"] for state in self.state.values() if "map" in state]
                shared = maps[0] if maps else torch.linspace(-1, 1, 7)
                self.state[param].update(map=shared, codes=torch.zeros(param.numel(), dtype=torch.uint8))
            self.state[param]["codes"].add_(1)
            self.state[param]["map"].mul_(0.5)
            param.sub_(self.state[param]["map"].sum() + self.state[param]["codes"][0])


KINDS: dict[str, Callable[[], Made]] = {
    "gan": gan,
    "muon and adamw": muon_and_adamw,
    "in backward": in_backward,
    "sparse adam and muon": sparse_adam_and_muon,
    "lbfgs": lbfgs,
    "adafactor of torch": one(lambda p: getattr(torch.optim, "Adafactor", AdamW)(p)),
    "accelerated": one(lambda p: Accelerated(AdamW(p, lr=0.01))),
    "lightning": one(lambda p: Lightning(SGD(p, lr=0.1, momentum=0.9))),
    "lightning around accelerated": one(lambda p: Lightning(Accelerated(SGD(p, lr=0.1, momentum=0.9)))),
    "lookahead": one(lambda p: Lookahead(AdamW(p, lr=0.01))),
    "lookahead of a late one": one(lambda p: Lookahead(OwnMuonOfAll(p))),
    "unhooked": one(Unhooked),
    "adds keys": one(Counting),
    "lightning around added keys": one(lambda p: Lightning(Counting(p))),
    "scheduled": scheduled,
    "shared state": one(Shared),
}


class OwnMuonOfAll(OwnMuon):
    """The same for vectors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in params_of(self):
            momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
            param -= 0.02 * momentum.mul_(0.9).add_(param.grad)


@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_training_goes_on_bit_identically(tmp_path: Path, kind: str, stepped: int) -> None:
    torch.manual_seed(1)
    untouched, its_optimizers, train_untouched = KINDS[kind]()
    torch.manual_seed(1)
    model, optimizers, train = KINDS[kind]()
    with engine.Engine(tmp_path, **TINY) as eng:
        arena = engine.Arena.adopt(model, optimizers)
        for seed in range(stepped):
            train_untouched(seed)
            train(seed)
            eng.checkpoint(arena).result() if seed == 0 else None
        eng.checkpoint(arena, step=10).result()
        for seed in range(10, 14):
            train_untouched(seed)
            train(seed)
        assert contents(model, optimizers) == contents(untouched, its_optimizers), "adoption changed the training"

        torch.manual_seed(2)
        other, other_optimizers, train_other = KINDS[kind]()
        other_arena = engine.Arena.adopt(other, other_optimizers)
        eng.restore(other_arena)
        for seed in range(10, 14):
            train_other(seed)
        assert contents(other, other_optimizers) == contents(model, optimizers)
        eng.restore(arena, step=10)  # into one that has gone on
        for seed in range(10, 14):
            train(seed)
        assert contents(other, other_optimizers) == contents(model, optimizers)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_wait_for_a_save(kind: str) -> None:
    model, optimizers, train = KINDS[kind]()
    arena = engine.Arena.adopt(model, optimizers)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    waited: list[bool] = []

    def staged(timeout: float | None) -> bool:
        if timeout is None:
            waited.append({name: bits(tensor) for name, tensor in model.state_dict().items()} == before)
        return timeout is None

    arena.hold(staged, holds_writers=True)
    train(1)
    assert waited == [True], "the first writer waits before the first byte changes"
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} != before
    assert arena.take_foreign() == []


def test_files_and_names_of_several_optimizers(tmp_path: Path) -> None:
    model, optimizers, train = muon_and_adamw()
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        path = Path(eng.checkpoint(engine.Arena.adopt(model, optimizers), step=1).result().path)
        body = json.loads((path / "manifest.json").read_bytes())["body"]
        assert [file["name"] for file in body["files"]] == [
            *("model.safetensors", "optimizer-adam-w.safetensors", "optimizer-muon.safetensors")
        ]
        names = {name for name in eng.load() if name.startswith("optimizer")}
        assert {"optimizer.muon.0.weight.momentum", "optimizer.adam-w.0.bias.exp_avg"} <= names
        assert {name.split(".")[1] for name in names} == {"muon", "adam-w"}
        model, by_param, train = in_backward()
        assert len(by_param) > 8
        path = Path(eng.checkpoint(engine.Arena.adopt(model, by_param), step=2).result().path)
        assert sorted(each.name for each in path.glob("*.safetensors")) == [
            *("model.safetensors", "optimizer.safetensors")
        ]


def test_other_optimizers_are_refused_with_nothing_changed(tmp_path: Path) -> None:
    model, optimizers, train = gan()
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizers)).result()
        for given, words in [
            (optimizers[::-1], r"group 0 of the checkpoint's optimizer '0'.*\['g\.0\.weight'.*\['d\.0\.weight'"),
            (dict(zip("gd", optimizers, strict=True)), "has the optimizers 0, 1 and the arena has the optimizers d, g"),
            (optimizers[0], "has the optimizers 0, 1 and the arena has one optimizer without a name"),
            (None, r"checkpoint has an optimizer and the arena has none; make it with Arena\.adopt"),
        ]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "no optimizer of the arena trains")
                arena = engine.Arena.adopt(model, given)
            before = contents(model, optimizers)
            with pytest.raises(engine.MismatchError, match=words):
                eng.restore(arena)
            assert contents(model, optimizers) == before and not arena.torn


def test_one_optimizer_in_a_list_or_alone_is_the_same(tmp_path: Path) -> None:
    model = mlp()
    optimizer = AdamW(model.parameters())
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, [optimizer])).result()
        eng.restore(engine.Arena.adopt(model, optimizer))


def test_parameters_in_no_optimizer_are_named_once() -> None:
    model = nn.ModuleDict({"g": mlp(), "d": mlp(), "frozen": mlp()})
    model["frozen"].requires_grad_(False)
    model["d"].tied = model["g"].get_parameter("0.weight")
    optimizer = AdamW(model["g"].parameters())
    words = r"no optimizer of the arena trains d\.0\.weight, d\.0\.bias, d\.2\.weight, d\.2\.bias: adopt every"
    with pytest.warns(engine.EngineWarning, match=words) as caught:
        engine.Arena.adopt(model, optimizer)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(engine.EngineWarning, match=r"and 4 tensors more"):
        engine.Arena.adopt(nn.ModuleList([model["g"], mlp(), mlp()]), optimizer)
    engine.Arena.adopt(model, [optimizer, SGD(model["d"].parameters(), lr=0.1)])


def test_a_new_layer_that_no_optimizer_trains_is_named_at_the_save_that_brings_it_in(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(arena).result()
        for _ in range(2):  # a second one under the same names, too
            model[2] = nn.Linear(3, 1)
            with pytest.warns(
                engine.EngineWarning, match=r"no optimizer of the arena trains 2\.weight, 2\.bias"
            ) as caught:
                eng.checkpoint(arena).result()
            assert len(caught) == 1 and caught[0].filename == __file__
            eng.checkpoint(arena).result()
        model[1] = nn.Linear(3, 3).requires_grad_(False)
        eng.checkpoint(arena).result()
        model[0] = nn.Linear(2, 3)
        optimizer.add_param_group({"params": model[0].parameters()})
        eng.checkpoint(arena).result()


def test_state_of_another_class_is_not_made(tmp_path: Path) -> None:
    model, optimizer, train = one(Unhooked)()
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        other, other_optimizer, _ = one(OwnMuonOfAll)()
        arena = engine.Arena.adopt(other, other_optimizer)
        before = contents(other, other_optimizer)
        with pytest.raises(engine.MismatchError, match=r"optimizer is a Unhooked, and the arena's, .* OwnMuonOfAll"):
            eng.restore(arena)
        assert contents(other, other_optimizer) == before and not arena.torn and not other_optimizer.state


def test_no_state_is_made_if_the_model_does_not_fit(tmp_path: Path) -> None:
    model, optimizer, train = one(Unhooked)()
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        other = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
        fresh = Unhooked(other.parameters())
        arena = engine.Arena.adopt(other, fresh)
        layout = arena.layout
        with pytest.raises(engine.MismatchError, match=r"2\.bias: float32\[3\] in the checkpoint"):
            eng.restore(arena)
        assert not fresh.state and arena.layout is layout and not arena.torn


def test_state_that_a_restore_makes_has_the_strides_of_its_parameter(tmp_path: Path) -> None:
    def make() -> tuple[Any, Optimizer]:
        model: Any = nn.Conv2d(3, 4, 3)
        model.to(memory_format=torch.channels_last)
        return model, OwnMuonOfAll(model.parameters())

    model, optimizer = make()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        other, fresh = make()
        with torch.inference_mode():
            eng.restore(engine.Arena.adopt(other, fresh))
    momentum = fresh.state[other.weight]["momentum"]
    assert momentum.stride() == other.weight.stride() and not momentum.is_inference()
    assert bits(momentum) == bits(optimizer.state[model.weight]["momentum"])


def test_state_after_the_saved_step_is_taken_away(tmp_path: Path) -> None:
    model, optimizer, train = one(Unhooked)()
    with engine.Engine(tmp_path, **TINY) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        eng.checkpoint(arena).result()
        first = copy.deepcopy(contents(model, optimizer))
        train(0)
        assert optimizer.state
        eng.restore(arena)
        assert not optimizer.state and contents(model, optimizer) == first


def test_state_of_a_damaged_checkpoint_does_not_stay(tmp_path: Path) -> None:
    model, optimizer, train = one(Unhooked)()
    with engine.Engine(tmp_path, **TINY, rewrite_all=True) as eng:
        arena = engine.Arena.adopt(model, optimizer)
        eng.checkpoint(arena, step=1).result()
        want = contents(model, optimizer)
        train(0)
        file = Path(eng.checkpoint(arena, step=2).result().path) / "optimizer.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"oops")
        other, fresh, _ = one(Unhooked)()
        with pytest.warns(engine.EngineWarning, match="step 2"):
            assert eng.restore(engine.Arena.adopt(other, fresh)).step == 1
    assert contents(other, fresh) == want and not fresh.state


def test_state_that_cannot_be_taken_in_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, train = one(Unhooked)()
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(engine.Arena.adopt(model, optimizer)).result()
        other, fresh, _ = one(Unhooked)()
        arena = engine.Arena.adopt(other, fresh)

        def refuse(self: HostMemory, nbytes: int) -> None:
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(HostMemory, "__init__", refuse)
            eng.restore(arena)
        assert not fresh.state and not arena.torn
        eng.restore(arena)
        assert contents(other, fresh) == contents(model, optimizer)


def test_added_keys_leave_tensors_and_groups_where_they_are(tmp_path: Path) -> None:
    model, optimizer, train = one(Counting)()
    arena = engine.Arena.adopt(model, optimizer)
    train(0)
    with engine.Engine(tmp_path, **TINY) as eng:
        eng.checkpoint(arena).result()
        want = optimizer.state_dict()["count"], bits(optimizer.scale)
        groups, state = optimizer.param_groups[0], optimizer.state[model[0].weight]  # type: ignore[index]
        moment, layout = state["exp_avg"], arena.layout
        train(1)
        assert (optimizer.count, bits(optimizer.scale)) != want
        eng.restore(arena)
    assert (optimizer.count, bits(optimizer.scale)) == want
    assert optimizer.param_groups[0] is groups and optimizer.state[model[0].weight] is state  # type: ignore[index]
    assert state["exp_avg"] is moment and arena.layout is layout


LATER: dict[str, tuple[Callable[..., Optimizer], dict[str, Any], str]] = {
    "amsgrad": (AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
    "centered": (torch.optim.RMSprop, {"centered": True}, "grad_avg"),
    "momentum": (torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
}


@pytest.mark.parametrize("saved_with", [True, False])
@pytest.mark.parametrize("option", LATER)
def test_the_state_of_an_option_is_restored_with_it(tmp_path: Path, option: str, saved_with: bool) -> None:
    """The option is set in the training that was saved and not in the resumed one, or the other way round."""
    make, later, key = LATER[option]

    def step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()

    def made(is_set: bool) -> tuple[nn.Module, Optimizer, engine.Arena]:
        model = mlp()
        optimizer = make(model.parameters(), lr=0.01)
        arena = engine.Arena.adopt(model, optimizer)
        if is_set:
            optimizer.param_groups[0].update(later)
        return model, optimizer, arena

    model, optimizer, arena = made(saved_with)
    other, other_optimizer, other_arena = made(not saved_with)
    step(model, optimizer, 1)
    with engine.Engine(tmp_path, **TINY) as run:
        run.checkpoint(arena).result()
        run.restore(other_arena)
    assert contents(other, other_optimizer) == contents(model, optimizer)
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert contents(other, other_optimizer) == contents(model, optimizer)
    assert all((key in state) is saved_with for state in other_optimizer.state.values())
