"""Refusals: a tensor that cannot be stored is named, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from trainings import OwnStep, mlp

from engine.errors import ArenaError, ArgumentError
from engine.state.arena import Arena

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(Tensor):
    """A tensor subclass, as DTensor is one."""


def overlapping_rows() -> dict[str, Tensor]:
    base = torch.zeros(6)
    return {"first": base[:4], "culprit": base[2:]}


def overlapping_columns() -> dict[str, Tensor]:
    base = torch.zeros(4, 6)
    return {"fine": torch.zeros(2), "first": base[:, :3], "culprit": base[:, 2:]}


def wrongly_sized() -> dict[str, Tensor]:
    base = torch.zeros(4, 6)
    return {"first": base[:, :2], "culprit": base.view(torch.int16)[:, 6:]}


REFUSED: dict[str, tuple[Callable[[], Tensor | dict[str, Tensor]], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse_coo(), "sparse.*to_dense"),
    "quantized": (lambda: torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8), "quantized"),
    "meta": (lambda: torch.zeros(2, device="meta"), "meta device.*to_empty"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "not initialized.*one batch"),
    "subclass": (lambda: torch.zeros(2).as_subclass(Odd), "is a Odd"),
    "conjugate": (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "resolve_conj"),
    "negative": (lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "expanded": (lambda: torch.zeros(1, 3).expand(2, 3), "share memory.*clone"),
    "unfold": (lambda: torch.zeros(9).unfold(0, 3, 1), "share memory.*clone"),
    "nine dims": (lambda: torch.zeros([4] * 9)[tuple([slice(None, None, 2)] * 9)], "more than 8 dimensions"),
    "dtype": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "bits8"),
    "overlap, contiguous": (overlapping_rows, "'first' and 'culprit' overlap"),
    "overlap, strided": (overlapping_columns, "'first' and 'culprit' overlap"),
    "overlap, element sizes": (wrongly_sized, "'first' and 'culprit' overlap"),
}


@pytest.mark.parametrize("adopted", [True, False], ids=["adopted", "wrapped"])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_refused_by_name_with_nothing_changed(kind: str, adopted: bool) -> None:
    make, words = REFUSED[kind]
    made = make()
    tensors = made if isinstance(made, dict) else {"fine": torch.ones(2), "culprit": made}
    model = nn.Module()
    model.trained = nn.Linear(2, 2)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            model.register_parameter(name, tensor)
        else:
            model.register_buffer(name, tensor)
    optimizer = torch.optim.Adam(model.trained.parameters())
    address = model.trained.weight.data_ptr()
    with pytest.raises(ArenaError, match=f"(?s)'culprit'.*{words}|{words}"):
        if adopted:
            Arena.adopt(model, optimizer)
        else:
            Arena.wrap(tensors)
    assert model.trained.weight.data_ptr() == address
    assert len(optimizer.state) == 0 and not optimizer._optimizer_step_pre_hooks


# Called with arguments that no type checker would pass.
ADOPT: Callable[..., Arena] = Arena.adopt
WRAP: Callable[..., Arena] = Arena.wrap


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ADOPT("model"), r"model is a builtins\.str"),
        (lambda: Arena.adopt(mlp().state_dict()), r"model is a collections\.OrderedDict"),
        (lambda: ADOPT(mlp(), []), r"optimizer is an empty builtins\.list"),
        (lambda: ADOPT(mlp(), [torch.optim.SGD(mlp().parameters()), 3]), r"optimizer '1' is a builtins\.int"),
        (lambda: ADOPT(mlp(), {"Adam": 3}), r"cannot be called 'Adam'.*use 1 to 64 of a to z"),
        (lambda: ADOPT(mlp(), {"": 3}), r"cannot be called ''"),
        (lambda: ADOPT(mlp(), {torch.zeros(1): 3}), r"cannot be called a torch\.Tensor.*or give a list"),
        (lambda: Arena.adopt(mlp(), mlp()), r"optimizer is a torch\.nn\.modules\.container\.Sequential"),
        (lambda: WRAP([torch.zeros(1)]), r"tensors is a builtins\.list"),
        (lambda: WRAP({7: torch.zeros(1)}), r"7 is mapped to a torch\.Tensor"),
        (lambda: WRAP({"w": [1]}), r"'w' is mapped to a builtins\.list"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(call: Callable[[], Arena], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        call()


def test_more_refusals_by_name() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    model.optimizer = nn.ModuleDict({"w": nn.ParameterDict({"exp_avg": torch.zeros(1)})})
    optimizer = torch.optim.Adam([model.w])
    with pytest.raises(ArenaError, match=r"two tensors are called 'optimizer\.w\.exp_avg'"):
        Arena.adopt(model, optimizer)
    assert len(optimizer.state) == 0, "state that was created before the refusal"
    del model.optimizer
    model.register_parameter("__metadata__", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ArenaError, match="cannot be called '__metadata__'"):
        Arena.adopt(model, optimizer)
    assert len(optimizer.state) == 0 and not optimizer._optimizer_step_pre_hooks
    assert not model._load_state_dict_pre_hooks


def test_devices_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ArenaError, match=r"'1\.weight' is on the meta device"):
        Arena.adopt(model)


def test_optimizer_state_is_refused_by_name() -> None:
    model = mlp()
    optimizer = OwnStep(model.parameters())
    optimizer.state[model[0].weight] = {"velocity": torch.eye(3).to_sparse_coo()}
    with pytest.raises(ArenaError, match=r"'optimizer\.0\.weight\.velocity' is sparse"):
        Arena.adopt(model, optimizer)
    optimizer.state[model[0].weight] = [1]
    with pytest.raises(ArenaError, match=r"state of 'optimizer\.0\.weight' is a list"):
        Arena.adopt(model, optimizer)
