"""Values: a tree of plain values and tensors, as values that JSON can hold, and back.  Pure.

Theory of operation.  `extra` is stored in the manifest, and the manifest is JSON.  Values that JSON holds exactly are
stored as they are: None, bool, str, finite float, list, and int in the range that every JSON reader keeps.  Any other
value becomes an object of one key, its **tag**.  JSON objects have no other use, so no value of the caller can be
mistaken for a tag:

    (1, None)        {"tuple": [1, null]}
    {3: "a"}         {"dict": [[3, "a"]]}                  pairs: keys keep their type, and their order
    {"a"}            {"set": ["a"]}                        sorted by encoding, so equal sets encode equally
    2**64            {"int": "0x10000000000000000"}        hexadecimal: Python limits the digits of decimals only
    nan              {"float": "7ff8000000000000"}         the bits of a binary64, highest byte first
    b"hi"            {"bytes": "aGk="}
    torch.ones(1)    {"tensor": ["float32", [1], "AACAPw=="]}   torch's dtype, shape, row-major bytes
    numpy.ones(1)    {"array": ["<f8", [1], "AAAAAAAA8D8="]}    numpy's dtype; the shape of a scalar is null
    torch.float32    {"dtype": "float32"}
    torch.Size([2])  {"size": [2]}
    Path("a/b")      {"path": "a/b"}

An enum is stored as its value, a dataclass as a dict of its fields, a namedtuple as a tuple, and they come back as
those.  Any other subclass (a defaultdict) would come back as another type, and is refused with its path and a remedy.
An optimizer's options have the same form, but the caller did not choose their values (schedulers put numpy's floats
there).  So `encode_options` stores a subclass of a number, of text or of a tuple as the plain value that it equals.
Attributes of an OrderedDict, such as the `_metadata` of `Module.state_dict()`, are not values and are not stored.  A
tensor that occurs twice is stored twice.

This module knows neither torch nor numpy.  Their values are those of `foreign`: the caller of `encode` passes an
`adapt` that makes them, and the caller of `decode` passes a `make` that turns them back (`state.tensors` does both).

Rules: nothing is pickled, and nothing that was read is executed.  `decode` trusts no input, allocates memory in
proportion to its input, and raises only `CorruptError` and the errors of `make`.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, time, timedelta
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from engine.errors import CorruptError, ExtraError
from engine.format.foreign import (
    Adapt,
    ArrayValue,
    DtypeValue,
    Make,
    Refused,
    SizeValue,
    TensorValue,
    adapt_nothing,
    array_itemsize,
    content_bytes,
    is_array_dtype,
    is_possible,
    keep,
    undressed,
)
from engine.format.layout import DTYPES

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

# State dicts nest five or six deep.  A level costs three frames of Python's stack of 1000 (sys.getrecursionlimit) and
# three levels of JSON.  The limit also ends a value that contains itself.
DEPTH_MAX = 100

# The whole manifest is read before any tensor: a limit of 64 MiB keeps that below a second.
BINARY_BYTES_MAX = 64 << 20

# Integers up to this a binary64 holds exactly, and so every JSON reader (RFC 8259, section 6).
EXACT_INT_MAX = 2**53

# A value of a subclass of one of these becomes storable by the constructor of that type.
CONVERTIBLE = (int, float, str, tuple, list, set, frozenset, dict)

# What trainings also have at hand, and how to make it storable.
_ADVICE: tuple[tuple[tuple[type, ...], str], ...] = (
    ((argparse.Namespace, SimpleNamespace), "pass vars(...) of it"),
    ((deque, range), "pass list(...) of it"),
    ((date, time), "pass its isoformat()"),
    ((timedelta,), "pass its total_seconds()"),
    ((complex,), "pass its parts, (z.real, z.imag), or a tensor of it"),
)


class Names(list[str]):
    """Strings that are known to be valid text, encoded without a further check: there may be one for each tensor."""

    __slots__ = ()


class _Spot(NamedTuple):
    """The location of a value in the tree: the spot around it, the last step of its path, and its depth.

    The path is built only for an error: a string for each value would take time and memory in proportion to the square
    of the input.
    """

    around: _Spot | None
    step: str | None  # None: the subscript of `key`
    key: object
    depth: int

    @classmethod
    def root(cls, name: str, depth: int = 0) -> _Spot:
        """The outermost value, by the caller's name."""
        return cls(None, name, None, depth)

    @property
    def path(self) -> str:
        """The path, as a Python expression."""
        steps: list[str] = []
        spot: _Spot | None = self
        while spot is not None:
            steps.append(_subscript(spot.key) if spot.step is None else spot.step)
            spot = spot.around
        return "".join(reversed(steps))

    def at(self, step: str) -> _Spot:
        """The spot of a value inside this one that has no key."""
        return _Spot(self, step, None, self.depth + 1)

    def item(self, key: object) -> _Spot:
        """The spot of a value inside this one, under a key."""
        return _Spot(self, None, key, self.depth + 1)

    def corrupt(self, problem: str) -> CorruptError:
        """An error about the value here."""
        return CorruptError(f"{self.path} {problem}; the manifest is damaged, restore another step")


def _subscript(key: object) -> str:
    try:
        return f"[{json.dumps(key) if isinstance(key, str) else repr(key)}]"
    except ValueError:  # an integer of more digits than Python prints (sys.get_int_max_str_digits)
        return "[...]"


def encode(value: object, where: str = "extra", adapt: Adapt = adapt_nothing) -> Json:
    """The value as Python values that JSON can hold; the result shares nothing with the value.

    Args:
        value: dicts, lists, tuples, sets, None, bool, int, float, str, bytes, paths, enums, dataclasses, namedtuples
            and values of `foreign`, nested.
        where: the caller's name of the value; error messages start their path with it.
        adapt: returns a value of `foreign` for another value, or why it is refused, or None.

    Raises:
        ExtraError: something in it cannot be stored; the message holds the path to it and the remedy.
    """
    return _Encoder(_EXTRA, adapt).encode(value, _Spot.root(where))


def decode(value: object, where: str = "extra", make: Make = keep) -> object:
    """The value that was given to `encode`, from its decoded JSON.

    Args:
        value: the decoded JSON.
        where: the name of the value, as for `encode`.
        make: turns a value of `foreign` into what it stands for.

    Raises:
        CorruptError: the value does not have the form of `encode`.
    """
    return _Decoder(make).decode(value, _Spot.root(where))


def encode_options(options: Mapping[str, object], adapt: Adapt = adapt_nothing) -> Json:
    """The options of `Arena.options` in the same form; `decode_options` reads it.

    Raises:
        ExtraError: the optimizer has an option that cannot be stored.
    """
    encoder = _Encoder(_OPTIONS, adapt)
    pairs: list[Json] = [
        [key, encoder.encode(value, _Spot.root(f"the optimizer's {key}", 1))] for key, value in options.items()
    ]
    return {"dict": pairs}


def decode_options(value: object, make: Make = keep) -> dict[str, Any]:
    """The options that were given to `encode_options`; {} if there is no optimizer.

    Raises:
        CorruptError: the value does not have the form of `encode_options`.
    """
    options = decode(value, "options", make)
    shape = {"param_groups": list, "state": dict, "absent": list}
    optional = {"class": str, "added": dict, "generators": dict}
    if not isinstance(options, dict) or (options and {k: type(options.get(k)) for k in shape} != shape):
        raise CorruptError("the manifest's options are not an optimizer's")
    if any(type(options.get(key, kind())) is not kind for key, kind in optional.items()):
        raise CorruptError("the manifest's options are not an optimizer's")
    if options:
        dicts = all(type(value) is dict for value in (*options["param_groups"], *options["state"].values()))
        if not dicts or not all(type(name) is str for name in (*options["state"], *options["absent"])):
            raise CorruptError("the manifest's options are not an optimizer's")
    return options


class _Holder(NamedTuple):
    """The owner of the values: its name and advice in errors, and the subclasses that it accepts."""

    name: str
    advice: str
    size_advice: str
    plain: Mapping[type, Callable[[Any], object]]


_EXTRA = _Holder(
    name="extra",
    advice="pass plain values or tensors: an object's state_dict()",
    size_advice="put big tensors into the arena (Arena.wrap)",
    plain={},
)
_OPTIONS = _Holder(
    name="a checkpoint",
    advice="have the optimizer keep a plain value or a tensor there: a number's .item(), the name of a function",
    size_advice="have the optimizer keep less there (LBFGS: a smaller history_size)",
    # Conversions of the base type, not the subclass's: str() of an enum's member is its name.
    plain={int: int.__int__, float: float.__float__, str: str.__str__, tuple: tuple},
)


class _Encoder:
    """One call of `encode`; it adds up the bytes of tensors and bytes objects."""

    def __init__(self, holder: _Holder, adapt: Adapt) -> None:
        self.holder = holder
        self.adapt = adapt
        self.binary_bytes = 0

    def encode(self, value: object, spot: _Spot) -> Json:
        if spot.depth > DEPTH_MAX:
            raise ExtraError(f"{spot.path} is over {DEPTH_MAX} levels deep; flatten it, or break its cycle")
        kind = type(value)
        write = _WRITERS.get(kind)
        if write is not None:
            return write(self, value, spot)
        plain = undressed(value)
        if plain is not value:
            # A level deeper, because an enum's value may be a member of another enum, and so on.
            return self.encode(plain, spot._replace(depth=spot.depth + 1))
        for base, convert in self.holder.plain.items():
            if isinstance(value, base):
                return self.encode(convert(value), spot)
        if isinstance(value, PurePath):
            return {"path": self.text(str(value), spot)}
        adapted = self.adapt(value)
        if isinstance(adapted, Refused):
            raise ExtraError(f"{spot.path} is {adapted.what}, which {self.holder.name} cannot hold; {adapted.advice}")
        if adapted is not None:
            return _WRITERS[type(adapted)](self, adapted, spot)
        name = f"{kind.__module__}.{kind.__qualname__}"
        advice = _conversion(value) or self.holder.advice
        raise ExtraError(f"{spot.path} is a {name}, which {self.holder.name} cannot hold; {advice}")

    def plain(self, value: bool | None, spot: _Spot) -> Json:
        return value

    def integer(self, value: int, spot: _Spot) -> Json:
        return value if -EXACT_INT_MAX <= value <= EXACT_INT_MAX else {"int": hex(value)}

    def real(self, value: float, spot: _Spot) -> Json:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}

    def text(self, value: str, spot: _Spot) -> Json:
        if not _is_text(value):
            raise ExtraError(f"{spot.path} is text with a lone surrogate, which UTF-8 cannot hold; store it as bytes")
        return value

    def binary(self, value: bytes, spot: _Spot) -> Json:
        self._charge(len(value), spot)
        return {"bytes": base64.b64encode(value).decode()}

    def names(self, value: Names, spot: _Spot) -> list[Json]:
        return list(value)

    def elements(self, value: Iterable[object], spot: _Spot) -> list[Json]:
        room = spot.depth < DEPTH_MAX
        return [
            member if room and _is_json(member) else self.encode(member, spot.item(index))
            for index, member in enumerate(value)
        ]

    def sequence(self, value: tuple[object, ...], spot: _Spot) -> Json:
        return {"tuple": self.elements(value, spot)}

    def members(self, value: set[object] | frozenset[object], spot: _Spot) -> Json:
        encoded = [self._hashable(member, spot.at("{...}")) for member in value]
        return {_TAGS[type(value)]: sorted(encoded, key=repr)}

    def mapping(self, value: dict[object, object], spot: _Spot) -> Json:
        room = spot.depth < DEPTH_MAX
        pairs: list[Json] = [
            [
                key if room and _is_json(key) else self._hashable(key, spot.at(".keys()")),
                member if room and _is_json(member) else self.encode(member, spot.item(key)),
            ]
            for key, member in value.items()
        ]
        return {_TAGS[type(value)]: pairs}

    def tensor(self, value: TensorValue, spot: _Spot) -> Json:
        self._charge_elements(value.shape, DTYPES[value.dtype].itemsize, spot)
        return {"tensor": [value.dtype, [*value.shape], base64.b64encode(value.data()).decode()]}

    def array(self, value: ArrayValue, spot: _Spot) -> Json:
        self._charge_elements(value.shape or (), array_itemsize(value.dtype), spot)
        shape: Json = None if value.shape is None else [*value.shape]
        return {"array": [value.dtype, shape, base64.b64encode(value.data()).decode()]}

    def dtype(self, value: DtypeValue, spot: _Spot) -> Json:
        return {"dtype": value.name}

    def size(self, value: SizeValue, spot: _Spot) -> Json:
        return {"size": [*value.extents]}

    def _hashable(self, value: object, spot: _Spot) -> Json:
        encoded = self.encode(value, spot)
        if not _is_key(encoded) or not _stays_equal(value):
            raise ExtraError(f"{spot.path} would not equal itself when it is read; use a name or a number instead")
        return encoded

    def _charge_elements(self, shape: tuple[int, ...], itemsize: int, spot: _Spot) -> None:
        """Before anything is copied."""
        if not is_possible(shape):
            raise ExtraError(f"{spot.path} has no elements, and the sizes {shape}, which cannot be stored")
        self._charge(math.prod(shape) * itemsize, spot)

    def _charge(self, nbytes: int, spot: _Spot) -> None:
        self.binary_bytes += nbytes
        if self.binary_bytes > BINARY_BYTES_MAX:
            raise ExtraError(
                f"{spot.path} brings tensors and bytes to {self.binary_bytes} bytes, and {self.holder.name} holds at "
                f"most {BINARY_BYTES_MAX} beside the arena; {self.holder.size_advice}"
            )


def _conversion(value: object) -> str:
    """Advice on how to convert the value into one that can be stored; empty if unknown."""
    for base in CONVERTIBLE:
        if isinstance(value, base):
            return f"pass {base.__name__}(...) of it"
    for kinds, advice in _ADVICE:
        if isinstance(value, kinds):
            return advice
    return ""


def _is_json(value: object) -> TypeGuard[bool | int | float | str | None]:
    """Whether JSON holds the value as it is.

    This is true of most values, and a spot for each would be most of the work: every save encodes the optimizer's
    options in the caller's time.
    """
    if type(value) is str:
        return value.isascii()
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return -EXACT_INT_MAX <= value <= EXACT_INT_MAX
    return value is None or type(value) is bool


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# The tags of values that can be keys; members of the first two can be keys themselves.
_KEY_CONTAINERS = ("tuple", "frozenset")
_KEYS = ("int", "float", "bytes", "path", "size")


def _is_key(encoded: object) -> bool:
    """Whether a value of this form can be the key of a dictionary or the member of a set."""
    if isinstance(encoded, dict):
        [(tag, payload)] = encoded.items()
        return tag in _KEYS or (tag in _KEY_CONTAINERS and all(map(_is_key, payload)))
    return not isinstance(encoded, list)


def _stays_equal(value: object) -> bool:
    """Whether a key equals what it is stored as: the members of an IntEnum do, those of an Enum do not."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_stays_equal, value))
    plain = undressed(value)
    return plain is value or bool(plain == value)


class _Decoder:
    """One call of `decode`."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def decode(self, value: object, spot: _Spot) -> object:
        if spot.depth > DEPTH_MAX:
            raise spot.corrupt(f"is over {DEPTH_MAX} levels deep")
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return _read_text(value, spot)
        if isinstance(value, list):
            return self.elements(value, spot)
        if not isinstance(value, dict) or len(value) != 1:
            raise spot.corrupt("is not a JSON value or an object of one key")
        [(tag, payload)] = value.items()
        read = _READERS.get(tag)
        if read is None:
            raise spot.corrupt(f"has the unknown tag {tag!r}")
        return read(self, payload, spot)

    def integer(self, payload: object, spot: _Spot) -> int:
        text = _read_text(payload, spot)
        if not re.fullmatch("-?0x[0-9a-f]+", text):
            raise spot.corrupt("is not a hexadecimal integer")
        return int(text, 16)

    def real(self, payload: object, spot: _Spot) -> float:
        text = _read_text(payload, spot)
        if not re.fullmatch("[0-9a-f]{16}", text):
            raise spot.corrupt("is not the 16 hexadecimal digits of a binary64")
        value: float = struct.unpack(">d", bytes.fromhex(text))[0]
        return value

    def binary(self, payload: object, spot: _Spot) -> bytes:
        return _read_binary(payload, spot)

    def elements(self, payload: object, spot: _Spot) -> list[object]:
        if not isinstance(payload, list):
            raise spot.corrupt("is not a list")
        if all(type(member) is str and _is_text(member) for member in payload):
            return payload  # names of parameters: there may be a hundred thousand
        return [self.decode(member, spot.item(index)) for index, member in enumerate(payload)]

    def sequence(self, payload: object, spot: _Spot) -> tuple[object, ...]:
        return tuple(self.elements(payload, spot))

    def members(self, payload: object, spot: _Spot) -> frozenset[object]:
        if not isinstance(payload, list):
            raise spot.corrupt("is not a list")
        members = frozenset(self._hashable(member, spot.at("{...}")) for member in payload)
        if len(members) != len(payload):
            raise spot.corrupt("has a member twice")
        return members

    def mapping(self, payload: object, spot: _Spot) -> dict[object, object]:
        if not isinstance(payload, list):
            raise spot.corrupt("is not a list of pairs")
        result: dict[object, object] = {}
        for pair in payload:
            if not isinstance(pair, list) or len(pair) != 2:
                raise spot.corrupt("is not a list of pairs")
            key = self._hashable(pair[0], spot.at(".keys()"))
            value_spot = spot.item(key)
            if key in result:
                raise value_spot.corrupt("is there twice")
            result[key] = self.decode(pair[1], value_spot)
        return result

    def tensor(self, payload: object, spot: _Spot) -> object:
        dtype, shape, text = _read_content(payload, spot)
        if dtype not in DTYPES:
            raise spot.corrupt(f"has the unknown dtype {dtype!r}")
        data = _read_elements(dtype, DTYPES[dtype].itemsize, _read_shape(shape, spot), text, spot)
        return self.make(TensorValue(dtype, tuple(_read_shape(shape, spot)), lambda: data))

    def array(self, payload: object, spot: _Spot) -> object:
        dtype, shape, text = _read_content(payload, spot)
        if not is_array_dtype(dtype):
            raise spot.corrupt(f"has the unknown dtype {dtype!r}")
        extents = None if shape is None else tuple(_read_shape(shape, spot))
        data = _read_elements(dtype, array_itemsize(dtype), extents or (), text, spot)
        return self.make(ArrayValue(dtype, extents, lambda: data))

    def dtype(self, payload: object, spot: _Spot) -> object:
        name = _read_text(payload, spot)
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
            raise spot.corrupt(f"is not the name of a dtype: {name[:40]!r}")
        return self.make(DtypeValue(name))

    def size(self, payload: object, spot: _Spot) -> object:
        return self.make(SizeValue(tuple(_read_shape(payload, spot))))

    def path(self, payload: object, spot: _Spot) -> Path:
        return Path(_read_text(payload, spot))

    def _hashable(self, payload: object, spot: _Spot) -> object:
        value = self.decode(payload, spot)
        if not _is_key(payload):
            raise spot.corrupt("cannot be a key or a member of a set")
        return value


def _read_text(payload: object, spot: _Spot) -> str:
    if not isinstance(payload, str) or not _is_text(payload):
        raise spot.corrupt("is not text")
    return payload


def _read_binary(payload: object, spot: _Spot) -> bytes:
    try:
        return base64.b64decode(_read_text(payload, spot), validate=True)
    except ValueError:  # binascii.Error is one; so is text that is not ASCII
        raise spot.corrupt("is not base64") from None


def _read_content(payload: object, spot: _Spot) -> tuple[str, object, object]:
    """The parts of a tensor or an array."""
    if not isinstance(payload, list) or len(payload) != 3:
        raise spot.corrupt("is not a dtype, a shape and base64")
    return _read_text(payload[0], spot), payload[1], payload[2]


def _read_shape(shape: object, spot: _Spot) -> list[int]:
    if not isinstance(shape, list) or not all(type(extent) is int and 0 <= extent < 2**63 for extent in shape):
        raise spot.corrupt("has a shape that is not a list of sizes")
    return shape


def _read_elements(dtype: str, itemsize: int, shape: Iterable[int], text: object, spot: _Spot) -> bytes:
    """The bytes of the elements, which are as many as the dtype and the shape say."""
    data, extents = _read_binary(text, spot), list(shape)
    if len(data) != content_bytes(itemsize, extents, len(data)):
        raise spot.corrupt(f"has {len(data)} bytes, which is not what {dtype} of shape {extents} takes")
    if not is_possible(extents):
        raise spot.corrupt(f"has the impossible shape {extents}")
    return data


_WRITERS: Mapping[type, Callable[[_Encoder, Any, _Spot], Json]] = {
    type(None): _Encoder.plain,
    Names: _Encoder.names,
    bool: _Encoder.plain,
    int: _Encoder.integer,
    float: _Encoder.real,
    str: _Encoder.text,
    bytes: _Encoder.binary,
    list: _Encoder.elements,
    tuple: _Encoder.sequence,
    set: _Encoder.members,
    frozenset: _Encoder.members,
    dict: _Encoder.mapping,
    OrderedDict: _Encoder.mapping,
    Counter: _Encoder.mapping,
    TensorValue: _Encoder.tensor,
    ArrayValue: _Encoder.array,
    DtypeValue: _Encoder.dtype,
    SizeValue: _Encoder.size,
}

_TAGS: Mapping[type, str] = {
    set: "set",
    frozenset: "frozenset",
    dict: "dict",
    OrderedDict: "ordered_dict",
    Counter: "counter",
}

_READERS: Mapping[object, Callable[[_Decoder, object, _Spot], object]] = {
    "int": _Decoder.integer,
    "float": _Decoder.real,
    "bytes": _Decoder.binary,
    "tuple": _Decoder.sequence,
    "set": lambda decoder, payload, spot: set(decoder.members(payload, spot)),
    "frozenset": _Decoder.members,
    "dict": _Decoder.mapping,
    "ordered_dict": lambda decoder, payload, spot: OrderedDict(decoder.mapping(payload, spot)),
    "counter": lambda decoder, payload, spot: Counter(decoder.mapping(payload, spot)),
    "tensor": _Decoder.tensor,
    "array": _Decoder.array,
    "dtype": _Decoder.dtype,
    "size": _Decoder.size,
    "path": _Decoder.path,
}
