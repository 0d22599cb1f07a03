"""The watch over containers and tensors: the changes that it notices, and those that it ignores.

Containers are compared with a model: `unchanged()` answers as a comparison of the identities of all members does.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch
from dtypes import TORCH_DTYPES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.state.adopted import adopt_optimizers
from engine.state.choice import Choice
from engine.state.inventory import gather
from engine.state.watch import ContainerWatch, TensorWatch

# Equal small integers and strings may be one object; these objects are not.
OBJECTS = [object() for _ in range(4)]
# The keys of modules and optimizers: names, and tensors, whose == makes a tensor.
KEYS: list[Any] = ["weight", "bias", torch.zeros(1), torch.zeros(1)]


# Containers

dicts = st.dictionaries(st.integers(0, 3), st.integers(0, 3), max_size=4).map(
    lambda chosen: {KEYS[key]: OBJECTS[value] for key, value in chosen.items()}
)
lists = st.lists(st.sampled_from(OBJECTS), max_size=5)


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, int, int]:
    return draw(st.sampled_from(["put", "drop", "again"])), draw(st.integers(0, 3)), draw(st.integers(0, 3))


def edit_dict(owner: dict[Any, Any], what: str, key: Any, value: object) -> None:
    if what == "put":
        owner[key] = value
    elif what == "drop":
        owner.pop(key, None)
    elif key in owner:
        owner[key] = owner.pop(key)  # the same, but last


def edit_list(items: list[Any], what: str, index: int, value: object) -> None:
    if what == "put":
        items.insert(index, value)
    elif items and what == "drop":
        items.pop(index % len(items))
    elif items:
        items[index % len(items)] = value


@given(
    owners=st.lists(dicts, min_size=1, max_size=3),
    sequences=st.lists(lists, min_size=1, max_size=3),
    dict_edits=st.lists(edits(), max_size=3),
    list_edits=st.lists(edits(), max_size=3),
    data=st.data(),
)
def test_containers_are_unchanged_if_they_hold_the_same_objects(
    owners: list[dict[Any, Any]],
    sequences: list[list[Any]],
    dict_edits: list[tuple[str, int, int]],
    list_edits: list[tuple[str, int, int]],
    data: st.DataObject,
) -> None:
    watch = ContainerWatch()
    for owner in owners:
        watch.mapping(owner)
    for items in sequences:
        watch.sequence(items)
    seen = [ids(owner) for owner in owners], [list(map(id, items)) for items in sequences]
    assert watch.unchanged()
    for what, key, value in dict_edits:
        edit_dict(data.draw(st.sampled_from(owners)), what, KEYS[key], OBJECTS[value])
    for what, index, value in list_edits:
        edit_list(data.draw(st.sampled_from(sequences)), what, index, OBJECTS[value])
    assert watch.unchanged() is (
        seen == ([ids(owner) for owner in owners], [list(map(id, items)) for items in sequences])
    )


def ids(owner: dict[Any, Any]) -> list[tuple[int, int]]:
    return [(id(key), id(value)) for key, value in owner.items()]


def test_another_key_for_the_same_object_is_a_difference() -> None:
    owner = {"weight": OBJECTS[0]}
    watch = ContainerWatch()
    watch.mapping(owner)
    owner["kernel"] = owner.pop("weight")
    assert not watch.unchanged()


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda: defaultdict(list)])
def test_subclasses_of_dict_are_watched(make: Callable[[], dict[str, object]]) -> None:
    owner = make()
    owner.update(a=OBJECTS[0], b=OBJECTS[1])
    watch = ContainerWatch()
    watch.mapping(owner)
    assert watch.unchanged()
    owner["b"] = OBJECTS[2]
    assert not watch.unchanged()


def test_the_order_of_an_ordered_dictionary_is_ignored() -> None:
    owner = OrderedDict(a=OBJECTS[0], b=OBJECTS[1])
    owner.move_to_end("a")
    watch = ContainerWatch()
    watch.mapping(owner)
    assert watch.unchanged()
    owner["a"] = OBJECTS[2]
    assert not watch.unchanged()


def test_another_object_behind_a_getter_is_noticed() -> None:
    owners = [{"x": OBJECTS[0]}, {"x": OBJECTS[1]}]
    get_x = itemgetter("x")
    watch = ContainerWatch()
    for owner in owners:
        watch.member(get_x, owner)
        watch.member(len, owner)
    owners[0]["y"] = OBJECTS[1]
    assert not watch.unchanged()
    del owners[0]["y"]
    assert watch.unchanged()
    owners[1]["x"] = OBJECTS[0]
    assert not watch.unchanged()
    del owners[1]["x"]
    assert not watch.unchanged()


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=3), st.data())
def test_other_names_are_noticed(sets: list[set[str]], data: st.DataObject) -> None:
    watch = ContainerWatch()
    for names in sets:
        watch.names(names)
    seen = list(map(frozenset, sets))
    for name in data.draw(st.lists(st.sampled_from("abc"), max_size=2)):
        data.draw(st.sampled_from(sets)).symmetric_difference_update({name})
    assert watch.unchanged() is (seen == sets)


def test_a_mapping_that_is_no_dict_is_always_changed() -> None:
    watch = ContainerWatch()
    watch.mapping(UserDict(a=1))  # type: ignore[arg-type]  # as torch.jit has them
    assert not watch.unchanged()


def test_an_item_that_moves_to_the_next_container_is_noticed() -> None:
    dicts, lists = [{"a": OBJECTS[0]}, {"b": OBJECTS[1]}], [[OBJECTS[0]], [OBJECTS[1]]]
    for watched in ("dicts", "lists"):
        watch = ContainerWatch()
        for owner in dicts:
            watch.mapping(owner)
        for items in lists:
            watch.sequence(items)
        assert watch.unchanged()
        if watched == "dicts":
            dicts[0]["b"] = dicts[1].pop("b")
        else:
            lists[0].append(lists[1].pop())
        assert not watch.unchanged()


class Broken(list[int]):
    raised: BaseException | None = None

    def __len__(self) -> int:
        if self.raised is not None:
            raise self.raised
        return 0


def test_a_container_whose_size_raises_is_a_difference() -> None:
    container = Broken()
    watch = ContainerWatch()
    watch.sequence(container)
    assert watch.unchanged()
    container.raised = RuntimeError("no size")
    assert not watch.unchanged()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_during_a_look_at_containers_is_raised(interrupt: type[BaseException]) -> None:
    container = Broken()
    watch = ContainerWatch()
    watch.sequence(container)
    container.raised = interrupt()
    with pytest.raises(interrupt):
        watch.unchanged()


def test_a_member_stays_alive_so_that_no_other_object_takes_its_address() -> None:
    owner = {"a": object()}
    watch = ContainerWatch()
    watch.mapping(owner)
    for _ in range(1000):  # of the same size: the allocator would give the address of the first to one of these
        owner["a"] = object()
        assert not watch.unchanged()


# Tensors


def replace(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def act(tensor: Tensor) -> None:
        tensor.data = make(tensor.data)

    return act


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "elsewhere": replace(torch.clone),
    "dtype": replace(torch.Tensor.double),
    "dtype of the same size": replace(lambda data: data.view(torch.int32)),
    "shape": replace(lambda data: data.view(3, 2)),
    "one dimension": replace(torch.flatten),
    "strides": replace(lambda data: data.as_strided((2, 3), (1, 2))),
    "a part": replace(lambda data: data[:1]),
    "offset": replace(lambda data: data[1:]),
    "no elements": replace(lambda data: torch.empty(0)),
    "shared": lambda tensor: tensor.share_memory_(),
    "frozen": lambda tensor: tensor.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_tensor_that_moved_is_noticed(change: str, index: int) -> None:
    params = [nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(3)]
    watch = TensorWatch(params, params)
    assert watch.unchanged()
    # Only a tensor that is not trained can be an integer.
    if change == "dtype of the same size":
        params[index].requires_grad_(False)
        watch = TensorWatch(params, params)
    CHANGES[change](params[index])
    assert not watch.unchanged()
    assert not watch.unchanged(), "every look notices it"
    assert TensorWatch(params, params).unchanged()


def test_a_write_to_a_tensor_is_not_a_change() -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(()))]
    watch = TensorWatch(params, params)
    with torch.no_grad():
        for param in params:
            param.mul_(2)
    (params[0].sum() * params[1]).backward()
    assert watch.unchanged()


def test_requires_grad_matters_of_params_only() -> None:
    param, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = TensorWatch([param, other], [param])
    other.requires_grad_(False)
    assert watch.unchanged()
    param.requires_grad_(False)
    assert not watch.unchanged()


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1,) * 20])
def test_every_dtype_and_shape_can_be_watched(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    watch = TensorWatch([tensor], [])
    assert watch.unchanged()
    tensor.data = torch.empty((*shape, 1), dtype=tensor.dtype)
    assert not watch.unchanged()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_two_dtypes_over_the_same_bytes_differ(size: int) -> None:
    tensor = torch.zeros(1, dtype=torch.uint8)
    dtypes = [getattr(torch, name) for name, dtype in TORCH_DTYPES.items() if dtype.itemsize == size]
    whole = torch.zeros(16, dtype=torch.uint8)[:size]
    for one in dtypes:
        tensor.data = whole.view(one)
        watch = TensorWatch([tensor], [])
        for other in dtypes:
            tensor.data = whole.view(other)
            assert watch.unchanged() is (one == other)


def test_lazy_conjugation_is_noticed() -> None:
    tensor = torch.zeros(2, dtype=torch.complex64)
    watch = TensorWatch([tensor], [])
    tensor.data = tensor.data.conj()
    assert not watch.unchanged()


@pytest.mark.parametrize("shape", [(2,), (1,), ()])
def test_lazy_negation_is_noticed(shape: tuple[int, ...]) -> None:
    whole = torch.ones(shape, dtype=torch.complex64)
    tensor = whole.imag
    watch = TensorWatch([tensor], [])
    assert watch.unchanged()
    tensor.data = whole.conj().imag  # the same address, dtype, shape and stride
    assert not watch.unchanged()


class Angry(nn.Parameter):
    raised: BaseException | None = None

    def __getattribute__(self, name: str) -> Any:
        if name == "requires_grad" and self.raised is not None:
            raise self.raised
        return super().__getattribute__(name)


def test_a_subclass_whose_attributes_raise_is_a_difference() -> None:
    param = Angry(torch.ones(2))
    watch = TensorWatch([param], [param])
    assert watch.unchanged()
    param.raised = RuntimeError("do not ask")
    assert not watch.unchanged()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_during_a_look_at_tensors_is_raised(interrupt: type[BaseException]) -> None:
    param = Angry(torch.ones(2))
    watch = TensorWatch([param], [param])
    param.raised = interrupt()
    with pytest.raises(interrupt):
        watch.unchanged()


def frame_count(call: Callable[[], object]) -> int:
    """How many Python functions a call runs."""
    frames = []
    gc.collect()  # or finalizers of earlier tests could run in the call
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, argument: frames.append(frame) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(before)
    return len(frames)


def test_no_python_function_runs_for_a_tensor() -> None:
    """Such a function would cost more than the look does, and a save waits for the look."""
    counts = []
    for layer_count in (1, 50):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layer_count)))
        inventory = gather(model, adopt_optimizers(torch.optim.Adam(model.parameters())), None, Choice(), {})
        tensors = [tensor for entry in inventory.entries.values() for tensor in entry.tensors]
        watch = TensorWatch(tensors, inventory.params.values())
        assert inventory.watch.unchanged() and watch.unchanged()
        counts.append(frame_count(inventory.watch.unchanged) + frame_count(watch.unchanged))
    assert counts[0] == counts[1] > 0
