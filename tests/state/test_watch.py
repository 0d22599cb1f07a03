"""The watch over containers and tensors: what it must notice, and what it must not.

The containers are held against a model: what `unchanged()` says is what comparing with a list of the same objects says.
The tensors are asked both ways, through DLPack's exchange table and in Python, which must come to the same answers.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import engine.state.watch
from engine.format.layout import DTYPES
from engine.io.watching import Grad, describe_tensors, exchange_address
from engine.state.watch import ContainerWatch, TensorWatch

# Small integers and interned strings are the same object wherever they come from; these are not.
OBJECTS = [object() for _ in range(4)]
# Keys as modules and optimizers have them: names, and tensors, whose == makes a tensor.
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
def test_containers_are_unchanged_if_they_hold_the_same(
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


def test_another_name_for_the_same_is_a_difference() -> None:
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


def test_an_ordered_dictionary_may_be_in_any_order() -> None:
    owner = OrderedDict(a=OBJECTS[0], b=OBJECTS[1])
    owner.move_to_end("a")
    watch = ContainerWatch()
    watch.mapping(owner)
    assert watch.unchanged()
    owner["a"] = OBJECTS[2]
    assert not watch.unchanged()


def test_sizes_members_and_answers() -> None:
    names, owner, answers = {"a"}, {"x": OBJECTS[0]}, [True]
    watch = ContainerWatch()
    watch.size(names)
    watch.members(owner, "x", "y")
    watch.answer(lambda: answers[0])
    owner["z"] = OBJECTS[1]
    assert watch.unchanged()
    names.add("b")
    assert not watch.unchanged()
    names.discard("b")
    owner["y"] = OBJECTS[1]
    assert not watch.unchanged()
    del owner["y"]
    assert watch.unchanged()
    owner["x"] = OBJECTS[1]
    assert not watch.unchanged()
    owner["x"] = OBJECTS[0]
    answers[0] = False
    assert not watch.unchanged()
    answers[0] = True
    assert watch.unchanged()


def test_what_is_no_dict_is_a_difference_and_leaves_no_exception() -> None:
    watch = ContainerWatch()
    watch.mapping(UserDict(a=1))  # type: ignore[arg-type]  # as the containers of torch.jit are none
    assert not watch.unchanged()
    watch = ContainerWatch()
    watch.sequence((1, 2))  # type: ignore[arg-type]
    assert not watch.unchanged()


class Broken(list[int]):
    raised: BaseException | None = None

    def __len__(self) -> int:
        if self.raised is not None:
            raise self.raised
        return 0


def test_a_container_that_cannot_say_its_size_is_a_difference() -> None:
    container = Broken()
    watch = ContainerWatch()
    watch.size(container)
    assert watch.unchanged()
    container.raised = RuntimeError("no size")
    assert not watch.unchanged()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_containers_are_asked_is_raised(interrupt: type[BaseException]) -> None:
    container = Broken()
    watch = ContainerWatch()
    watch.size(container)
    container.raised = interrupt()
    with pytest.raises(interrupt):
        watch.unchanged()


def test_what_left_is_kept_so_that_no_other_object_is_taken_for_it() -> None:
    owner = {"a": object()}
    watch = ContainerWatch()
    watch.mapping(owner)
    for _ in range(1000):  # of the same size: the allocator would give the place of the first to one of these
        owner["a"] = object()
        assert not watch.unchanged()


# Tensors


@pytest.fixture(params=["exchange", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tensors are asked."""
    name: str = request.param
    if name == "python":
        monkeypatch.setattr(engine.state.watch, "_exchange", lambda: None)
    else:
        assert hasattr(Tensor, "__dlpack_c_exchange_api__"), "the torch of constraints.txt has the table"
    return name


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
def test_a_tensor_that_moved_is_noticed(change: str, index: int, way: str) -> None:
    params = [nn.Parameter(torch.arange(6.0).reshape(2, 3)) for _ in range(3)]
    watch = TensorWatch(params, params)
    assert watch.unchanged()
    # An integer that has a gradient cannot be; what is not trained may be one.
    if change == "dtype of the same size":
        params[index].requires_grad_(False)
        watch = TensorWatch(params, params)
    CHANGES[change](params[index])
    assert not watch.unchanged()
    assert not watch.unchanged(), "as often as it is asked"
    assert TensorWatch(params, params).unchanged()


def test_writing_is_no_change(way: str) -> None:
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(()))]
    watch = TensorWatch(params, params)
    with torch.no_grad():
        for param in params:
            param.mul_(2)
    (params[0].sum() * params[1]).backward()
    assert watch.unchanged()


def test_only_of_params_it_matters_whether_they_are_trained(way: str) -> None:
    param, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = TensorWatch([param, other], [param])
    other.requires_grad_(False)
    assert watch.unchanged()
    param.requires_grad_(False)
    assert not watch.unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1,) * 20])
def test_every_dtype_and_shape_can_be_watched(dtype: str, shape: tuple[int, ...], way: str) -> None:
    tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    watch = TensorWatch([tensor], [])
    assert watch.unchanged() and (watch._looks is None) is (way == "exchange")
    tensor.data = torch.zeros((*shape, 1), dtype=tensor.dtype)
    assert not watch.unchanged()


def test_no_two_dtypes_are_taken_for_each_other() -> None:
    seen = set()
    for dtype in DTYPES:
        watch = TensorWatch([torch.zeros(1, dtype=getattr(torch, dtype))], [])
        seen.add(watch._words[3])  # of eng_describe_tensors: object, grad, address, dtype
    assert len(seen) == len(DTYPES)


def test_lazy_conjugation_is_noticed(way: str) -> None:
    tensor = torch.zeros(2, dtype=torch.complex64)
    watch = TensorWatch([tensor], [])
    tensor.data = tensor.data.conj()
    assert not watch.unchanged()


def test_lazy_negation_is_noticed(way: str) -> None:
    whole = torch.ones(2, dtype=torch.complex64)
    tensor = whole.imag
    watch = TensorWatch([tensor], [])
    assert watch.unchanged()
    tensor.data = whole.conj().imag
    assert not watch.unchanged()


def test_what_cannot_be_described_is_looked_at_in_python() -> None:
    tensors = [torch.ones(2), torch.ones(2, device="meta")]  # an arena refuses it; DLPack has no words for it
    watch = TensorWatch(tensors, [])
    assert watch.unchanged() and watch._looks is not None
    tensors[0].data = torch.ones(2)
    assert not watch.unchanged()


class Angry(nn.Parameter):
    raised: BaseException | None = None

    @property
    def requires_grad(self) -> bool:
        if self.raised is not None:
            raise self.raised
        return True


def test_a_subclass_whose_attributes_raise_is_a_difference() -> None:
    param = Angry(torch.ones(2))
    watch = TensorWatch([param], [param])
    assert watch.unchanged() and watch._looks is None
    param.raised = RuntimeError("do not ask")
    assert not watch.unchanged()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_tensors_are_asked_is_raised(interrupt: type[BaseException], way: str) -> None:
    param = Angry(torch.ones(2))
    watch = TensorWatch([param], [param])
    param.raised = interrupt()
    with pytest.raises(interrupt):
        watch.unchanged()


class _Table(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("functions", ctypes.c_void_p * 6))


@pytest.mark.parametrize("change", ["nothing", "major", "function"])
def test_a_table_of_another_version_is_not_used(change: str) -> None:
    table = _Table.from_buffer_copy(
        ctypes.string_at(exchange_address(Tensor.__dlpack_c_exchange_api__), ctypes.sizeof(_Table))
    )
    if change == "major":
        table.major += 1
    elif change == "function":
        table.functions[4] = None  # older, two of an allocator's, one to Python, and this one from it
    tensor = torch.ones(2, 3)
    words = array("Q", [id(tensor), Grad.IGNORED, 0, 0, 2, 0, 0, 0, 0])
    assert describe_tensors(ctypes.addressof(table), words) is (change == "nothing")
    assert list(words[5:]) == ([2, 3, 3, 1] if change == "nothing" else [0] * 4)
    words[4] = 3
    assert not describe_tensors(ctypes.addressof(table), words), "it has not so many dimensions"
