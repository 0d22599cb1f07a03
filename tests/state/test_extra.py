"""The codec of `extra`: exact round trips, refusals by path, and hostile input."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import enum
import json
import math
import pathlib
import random
import re
import struct
import subprocess
import sys
import types

import msgspec
import numpy
import pytest
import torch
from dtypes import TORCH_DTYPES
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CorruptError, ExtraError, PlatformError
from engine.format.layout import DTYPES
from engine.format.values import BINARY_BYTES_MAX, DEPTH_MAX
from engine.state.tensors import decode, encode, encode_options

# torch says once per process that complex32 is experimental; the codec moves its bytes all the same.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Record:
    field: int = 1


Point = collections.namedtuple("Point", "x y")


class Mode(str, enum.Enum):
    """A kind of enum with a str() that differs from its value."""

    FAST = "fast"


class Shade(enum.Enum):
    DARK = "dark"


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers() | st.sampled_from([2**53, -(2**53), 2**53 + 1, -(2**53) - 1, 2**64, -(2**200)])
FLOATS = st.floats() | st.sampled_from([-0.0, math.nan, -math.nan, math.inf, -math.inf, 1e22])


@st.composite
def scalars(draw: st.DrawFn) -> object:
    return draw(st.none() | st.booleans() | INTEGERS | FLOATS | TEXT | st.binary())


@st.composite
def keys(draw: st.DrawFn) -> object:
    """The possible keys of a dictionary and members of a set."""
    return draw(
        st.recursive(scalars(), lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3))
    )


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and any shape, of any bits, contiguous or not."""
    dtype = getattr(torch, draw(st.sampled_from(sorted(TORCH_DTYPES))))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    flat = torch.tensor(list(draw(st.binary(min_size=1, max_size=64))), dtype=torch.uint8)
    if dtype == torch.bool:
        flat = flat % 2
    nbytes = math.prod(shape) * dtype.itemsize
    tensor = flat.repeat(nbytes // flat.numel() + 1)[:nbytes].view(dtype).view(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


ARRAY_DTYPES = ["|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]


@st.composite
def arrays(draw: st.DrawFn) -> object:
    """An array or a scalar of any dtype that is stored, of any bits, contiguous or not."""
    code = draw(st.sampled_from(ARRAY_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    nbytes = math.prod(shape) * int(code[2:])
    data = draw(st.binary(min_size=nbytes, max_size=nbytes))
    array = numpy.frombuffer(bytes(byte % 2 for byte in data) if code == "|b1" else data, code).reshape(shape)
    return draw(st.sampled_from([array.T, array.flat[0] if array.size else array]))


NAMES = st.sampled_from([torch.float32, torch.qint8, torch.complex32]) | st.sampled_from(
    [torch.Size([]), torch.Size([2])]
)
PATHS = st.sampled_from(["", ".", "/", "a/b", "../../etc", "x" * 300]).map(pathlib.Path)


def containers(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    dicts = st.dictionaries(keys(), values, max_size=4)
    return (
        st.lists(values, max_size=4)
        | st.lists(values, max_size=4).map(tuple)
        | st.sets(keys(), max_size=4)
        | st.frozensets(keys(), max_size=4)
        | dicts
        | dicts.map(collections.OrderedDict)
        | dicts.map(collections.Counter)
    )


TREES = st.recursive(scalars() | tensors() | arrays() | NAMES | PATHS, containers, max_leaves=20)


def exactly(value: object) -> object:
    """A value in a form whose equality compares type, order and bits."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().view(-1).view(torch.uint8).tolist()
        return kind, value.dtype, tuple(value.shape), bits
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return kind, value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, dict):
        return kind, [(exactly(key), exactly(member)) for key, member in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [exactly(member) for member in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((exactly(member) for member in value), key=repr)
    return kind, value


@given(TREES)
def test_round_trip_through_both_json_libraries(value: object) -> None:
    encoded = encode(value)
    expected = exactly(value)
    assert exactly(decode(msgspec.json.decode(msgspec.json.encode(encoded)))) == expected
    assert exactly(decode(json.loads(json.dumps(encoded, allow_nan=False)))) == expected


@given(TREES)
def test_the_same_value_encodes_to_the_same_json(value: object) -> None:
    assert json.dumps(encode(value)) == json.dumps(encode(copy.deepcopy(value)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, None), {"tuple": [1, None]}),
        ({3: "a"}, {"dict": [[3, "a"]]}),
        ({"b", "a"}, {"set": ["a", "b"]}),
        (2**64, {"int": "0x10000000000000000"}),
        (math.nan, {"float": "7ff8000000000000"}),
        (b"hi", {"bytes": "aGk="}),
        (torch.ones(1), {"tensor": ["float32", [1], "AACAPw=="]}),
        (numpy.ones(1), {"array": ["<f8", [1], "AAAAAAAA8D8="]}),
        (numpy.arange(2, dtype=">u2"), {"array": ["<u2", [2], "AAABAA=="]}),
        (numpy.float32(1), {"array": ["<f4", None, "AACAPw=="]}),
        (numpy.bool_(True), {"array": ["|b1", None, "AQ=="]}),
        (torch.bfloat16, {"dtype": "bfloat16"}),
        (torch.Size([2, 3]), {"size": [2, 3]}),
        (pathlib.PurePosixPath("a/b"), {"path": "a/b"}),
        ({Colour.RED: Mode.FAST}, {"dict": [[1, "fast"]]}),
        (Record(3), {"dict": [["field", 3]]}),
        ((Point(1, Shade.DARK),), {"tuple": [{"tuple": [1, "dark"]}]}),
        ([True, 2**53, -0.0], [True, 2**53, -0.0]),
    ],
)
def test_the_form_on_disk(value: object, expected: object) -> None:
    assert json.dumps(encode(value)) == json.dumps(expected)


def test_integers_beyond_the_limit_on_decimal_digits() -> None:
    huge = 1 << 20_000  # some 6,000 digits; Python prints 4,300 by default
    assert decode(encode({huge: -huge})) == {huge: -huge}
    with pytest.raises(CorruptError, match=r"^extra\[\.\.\.\] is there twice"):
        decode({"dict": [[{"int": hex(huge)}, 1], [{"int": hex(huge)}, 2]]})
    with pytest.raises(ExtraError, match=r"^extra\[\.\.\.\] is a builtins\.object"):
        encode({huge: object()})


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_tensors_of_every_dtype(name: str) -> None:
    dtype = getattr(torch, name)
    for shape in [(), (0,), (3, 0, 2), (2, 3)]:
        tensor = torch.ones((*shape, DTYPES[name].itemsize), dtype=torch.uint8).view(dtype).view(shape)
        restored = decode(encode(tensor))
        assert exactly(restored) == exactly(tensor)
        assert isinstance(restored, torch.Tensor) and restored.untyped_storage().resizable()


def test_a_tensor_is_taken_as_it_is_now_without_its_graph() -> None:
    tensor = torch.arange(6.0).view(2, 3).requires_grad_()
    encoded = encode({"whole": tensor * 1, "turned": tensor.t(), "conjugate": torch.tensor([1j]).conj()})
    with torch.no_grad():
        tensor.zero_()
    restored = decode(encoded)
    assert isinstance(restored, dict)
    assert restored["whole"].tolist() == [[0, 1, 2], [3, 4, 5]] and not restored["whole"].requires_grad
    assert restored["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and restored["turned"].is_contiguous()
    assert restored["conjugate"].tolist() == [-1j]


def test_values_of_real_trainings_round_trip() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 2, 5])
    extra = {"scheduler": scheduler.state_dict(), "torch": torch.get_rng_state(), "python": random.getstate()}
    extra |= {"numpy": numpy.random.get_state(), "generator": numpy.random.default_rng(1).bit_generator.state}
    restored = decode(encode(extra))
    assert exactly(restored) == exactly(extra)
    assert isinstance(restored, dict) and type(restored["scheduler"]["milestones"]) is collections.Counter
    scheduler.load_state_dict(restored["scheduler"])
    random.setstate(restored["python"])
    numpy.random.set_state(restored["numpy"])


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (collections.defaultdict(int), r"dict\(\.\.\.\)"),
        (numpy.array(["a"]), r"\.tolist\(\)"),
        (numpy.array([None]), r"\.tolist\(\)"),
        (numpy.str_("a"), r"\.tolist\(\)"),
        (numpy.ma.masked_array([1], [True]), r"\.tolist\(\)"),
        (pathlib.PurePosixPath("\udc80"), "store it as bytes"),
        (len, "plain values"),
        (object, "plain values"),
        (1j, "pass its parts"),
        (bytearray(b"x"), "plain values"),
        ("\ud800", "store it as bytes"),
        (torch.nn.Parameter(torch.ones(1)), r"\.detach\(\)"),
        (torch.ones(2).to_sparse(), r"\.to_dense\(\)"),
        (torch.ones(1, device="meta"), r"\.cpu\(\)"),
        (torch.empty(1, dtype=torch.bits8), r"\.to\(dtype\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else type(value).__name__,
)
def test_refusals_name_the_path_and_the_remedy(value: object, remedy: str) -> None:
    for tree, path in [
        (value, "extra"),
        ({"rng": [0, (1, value)]}, r'extra\["rng"\]\[1\]\[1\]'),
        (collections.OrderedDict({(1, "a"): {None: value}}), r"extra\[\(1, 'a'\)\]\[None\]"),
    ]:
        with pytest.raises(ExtraError, match=rf"^{path} is .*{remedy}"):
            encode(tree)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {(1, torch.ones(1)): 2}}, r'extra\["a"\]\.keys\(\) would not equal itself'),
        ({(1, Shade.DARK): 2}, r"extra\.keys\(\) would not equal itself"),
        ({numpy.float64(1)}, r"extra\{\.\.\.\} would not equal itself"),
        ({torch.float32: 1}, r"extra\.keys\(\) would not equal itself"),
        ([{object()}], r"extra\[0\]\{\.\.\.\} is a builtins.object"),
        ({(1, (len,)): 2}, r"extra\.keys\(\)\[1\]\[0\] is a builtins.builtin_function"),
    ],
)
def test_keys_and_members_are_refused_by_path(value: object, path: str) -> None:
    with pytest.raises(ExtraError, match=f"^{path}"):
        encode(value)


def test_the_root_of_a_path_is_named_by_the_caller() -> None:
    with pytest.raises(ExtraError, match=r"^options\[1\] is"):
        encode([1, object()], "options")
    with pytest.raises(CorruptError, match=r"^options\[1\] has the unknown tag"):
        decode([1, {"object": 1}], "options")


def test_options_store_subclasses_as_their_base_values() -> None:
    group = {"lr": numpy.float64(0.1), "mode": Mode.FAST, "count": Colour.RED, "size": (torch.Size([1, 2]),)}
    group |= {"dtype": torch.bfloat16, "half": numpy.float32(0.5)}
    decoded = decode(json.loads(json.dumps(encode_options({"param_groups": [group], "state": {}}))))
    assert exactly(decoded) == exactly(
        {
            "param_groups": [
                {"lr": 0.1, "mode": "fast", "count": 1, "size": ((1, 2),)}
                | {"dtype": torch.bfloat16, "half": numpy.float32(0.5)}
            ],
            "state": {},
        }
    )
    assert encode_options({"a": [1.5, {2: b"x"}]}) == encode({"a": [1.5, {2: b"x"}]}), "one form for both"


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (numpy.array([None]), r"\.tolist\(\)"),
        (len, "name of a function"),
        (collections.defaultdict(int), r"dict\(\.\.\.\)"),
        (torch.ones(1, device="meta"), r"\.cpu\(\)"),
        (torch.zeros(BINARY_BYTES_MAX + 1, dtype=torch.uint8), "history_size"),
    ],
    ids=["numpy", "function", "defaultdict", "meta", "vast"],
)
def test_options_are_refused_as_the_optimizers(value: object, remedy: str) -> None:
    with pytest.raises(ExtraError, match=rf"""^the optimizer's param_groups\[0\]\["foo"\] .*{remedy}""") as caught:
        encode_options({"param_groups": [{"foo": value}]})
    assert "Arena.wrap" not in str(caught.value) and "extra" not in str(caught.value)


def test_the_default_device_does_not_matter() -> None:
    encoded = encode(torch.arange(3))
    torch.set_default_device("meta")
    try:
        restored = decode(encoded)
    finally:
        torch.set_default_device(None)
    assert isinstance(restored, torch.Tensor) and restored.device.type == "cpu" and restored.tolist() == [0, 1, 2]


def nest(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_limited_on_both_sides() -> None:
    assert decode(encode(nest(DEPTH_MAX))) == nest(DEPTH_MAX)
    with pytest.raises(ExtraError, match=rf"^extra(\[0\]){{{DEPTH_MAX + 1}}} is over {DEPTH_MAX} levels"):
        encode(nest(DEPTH_MAX + 1))
    with pytest.raises(CorruptError, match=f"is over {DEPTH_MAX} levels"):
        decode(nest(DEPTH_MAX + 1))


def test_the_deepest_dictionary_fits_through_json() -> None:
    value: object = None
    for _ in range(DEPTH_MAX):
        value = {"a": value}
    encoded = encode(value)
    assert decode(msgspec.json.decode(msgspec.json.encode(encoded))) == value
    assert decode(json.loads(json.dumps(encoded))) == value


def test_a_cycle_is_refused() -> None:
    cycle: dict[str, object] = {}
    cycle["self"] = [cycle]
    with pytest.raises(ExtraError, match="break its cycle"):
        encode(cycle)


def test_tensors_and_bytes_are_limited_in_sum() -> None:
    half = torch.zeros(BINARY_BYTES_MAX // 2, dtype=torch.uint8)
    # Expanded: one byte of memory says it is half of the limit, and the limit is checked before it is spread out.
    vast = torch.zeros(1, dtype=torch.uint8).expand(1 << 50)
    assert encode([half, b""]) != encode([half, b"x"])
    with pytest.raises(ExtraError, match=rf'^extra\["b"\] brings .* {BINARY_BYTES_MAX + 1} bytes, .*Arena\.wrap'):
        encode({"a": half, "b": bytes(BINARY_BYTES_MAX // 2 + 1)})
    with pytest.raises(ExtraError, match=r"Arena\.wrap"):
        encode(vast)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=3),
)
TAGS = ["int", "float", "bytes", "tuple", "set", "frozenset", "dict", "ordered_dict", "counter", "tensor"]
TAGS += ["array", "dtype", "size", "path"]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, 2**63, 2**70, -1, True, 1.0, 2**200]), max_size=3)
PAYLOADS = (
    st.text("0x9af-AQ=", max_size=17)
    | st.tuples(st.sampled_from([*DTYPES, "qint8", "<f8", "|b1", "|O", 1]), SHAPES | st.none(), TEXT).map(list)
    | SHAPES
    | st.sampled_from(["float32", "onnx", "_C", "\0"])
)


def hostile(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    payloads = values | st.lists(st.lists(values, min_size=2, max_size=2), max_size=3)
    return payloads | st.dictionaries(st.sampled_from(TAGS), payloads, min_size=1, max_size=1)


@given(JSON | st.recursive(JSON | PAYLOADS, hostile, max_leaves=12))
def test_hostile_input_is_decoded_or_corrupt(value: object) -> None:
    try:
        decoded = decode(value)
    except CorruptError as error:
        assert str(error).startswith(("extra", "an array of shape"))
        return
    except PlatformError as error:
        assert "which torch" in str(error), "a dtype of a later torch"
        return
    assert exactly(decode(encode(decoded))) == exactly(decoded), "what decodes can be stored again"


@given(TREES, st.data())
def test_a_damaged_encoding_is_decoded_or_corrupt(value: object, data: st.DataObject) -> None:
    text = json.dumps(encode(value))
    index = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:index] + data.draw(st.sampled_from('0a"[]{}:,-')) + text[index + 1 :]
    with contextlib.suppress(json.JSONDecodeError, CorruptError, PlatformError):
        decode(json.loads(damaged))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "object of one key"),
        ({"tuple": [], "set": []}, "object of one key"),
        ({"pickle": "gASVAA=="}, "unknown tag 'pickle'"),
        ({"int": "12"}, "hexadecimal integer"),
        ({"int": 12}, "not text"),
        ({"float": "nan"}, "16 hexadecimal digits"),
        ({"bytes": "a"}, "not base64"),
        ({"bytes": "aGk=\n"}, "not base64"),
        ({"bytes": "\u00e9"}, "not base64"),
        ("\ud800", "not text"),
        ({"tuple": "abc"}, "not a list"),
        ({"set": {"list": []}}, "not a list"),
        ({"set": [1, True]}, "member twice"),
        ({"set": [[1]]}, "cannot be a key"),
        ({"dict": [[1, 2, 3]]}, "list of pairs"),
        ({"dict": "ab"}, "list of pairs"),
        ({"dict": [["a", 1], ["a", 2]]}, "is there twice"),
        ({"dict": [[{"tensor": ["uint8", [1], "AA=="]}, 1]]}, "cannot be a key"),
        ({"tensor": ["uint8", [1]]}, "a dtype, a shape and base64"),
        ({"tensor": ["qint8", [1], "AA=="]}, "unknown dtype 'qint8'"),
        ({"tensor": [["uint8"], [1], "AA=="]}, "not text"),
        ({"tensor": ["uint8", [-1], "AA=="]}, "list of sizes"),
        ({"tensor": ["uint8", [True], "AA=="]}, "list of sizes"),
        ({"tensor": ["uint8", [0, 2**63], ""]}, "list of sizes"),
        ({"tensor": ["uint8", [2], "AA=="]}, "1 bytes, which is not what uint8"),
        ({"tensor": ["float32", [2**62, 2**62], "AA=="]}, "1 bytes, which is not what float32"),
        ({"tensor": ["float64", [2**62, 2**62, 0], ""]}, "impossible shape"),
        ({"tensor": ["uint8", [1], None]}, "not text"),
        ({"array": ["|O", [1], "AA=="]}, "unknown dtype"),
        ({"array": ["<f16", [1], "AA=="]}, "unknown dtype"),
        ({"array": ["<f8", None, "AA=="]}, "1 bytes, which is not what <f8"),
        ({"array": ["|u1", [2], "AA=="]}, "1 bytes, which is not what |u1"),
        ({"array": ["|u1", [2**62, 2**62, 0], ""]}, "impossible shape"),
        ({"dtype": "Float"}, "not the name of a dtype"),
        ({"size": [-1]}, "list of sizes"),
        ({"path": 1}, "not text"),
    ],
)
def test_corruption_names_the_path_and_the_problem(value: object, problem: str) -> None:
    with pytest.raises(CorruptError, match=rf'^extra\["rng"\]\[0\].*{re.escape(problem)}'):
        decode({"dict": [["rng", [value]]]})


def test_an_array_that_numpy_cannot_make_is_corrupt() -> None:
    with pytest.raises(CorruptError, match="cannot be made"):
        decode({"array": ["|u1", [1] * 100, "AA=="]})


def test_arrays_are_read_without_numpy() -> None:
    code = """
import sys
import types
sys.modules["numpy"] = None
from engine.format.values import decode
assert decode({"array": ["<f8", [1], "AAAAAAAA8D8="]}).shape == (1,)
from engine.errors import PlatformError
from engine.state import tensors
try:
    tensors.decode({"array": ["<f8", [1], "AAAAAAAA8D8="]})
except PlatformError as error:
    assert "install numpy" in str(error)
else:
    raise AssertionError("numpy is not there")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (argparse.Namespace(lr=1), r"vars\(\.\.\.\)"),
        (types.SimpleNamespace(lr=1), r"vars\(\.\.\.\)"),
        (collections.deque([1]), r"list\(\.\.\.\)"),
        (range(3), r"list\(\.\.\.\)"),
        (datetime.datetime(2026, 1, 2), r"isoformat\(\)"),
        (datetime.timedelta(seconds=1), r"total_seconds\(\)"),
        (1 + 2j, r"\(z\.real, z\.imag\)"),
        (torch.device("cpu"), r"str\(\.\.\.\)"),
    ],
)
def test_what_a_training_has_at_hand_is_refused_with_its_conversion(value: object, advice: str) -> None:
    with pytest.raises(ExtraError, match=rf'extra\["v"\] is a .*, which extra cannot hold; pass .*{advice}'):
        encode({"v": value})
