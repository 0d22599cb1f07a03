"""Foreign values: what `values` stores besides Python's own plain values, without the packages that made it.  Pure.

Theory of operation.  `extra` holds tensors, dtypes and arrays, but nothing in `format` imports torch or numpy.  A value
of theirs is stood for by a class of this module.  `state.tensors` makes one of a real value, and a real value of one.

    torch.Tensor     TensorValue        numpy.ndarray      ArrayValue, with a shape
    torch.dtype      DtypeValue         numpy.float32(1)   ArrayValue, without one: a scalar
    torch.Size       SizeValue

Objects that only dress up plain values are undressed by `undressed`: they come back as the plain values.

Rules: nothing is executed to make a value, but the properties of the caller's own objects.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

# numpy's code for an element: little-endian, of a kind and size that every platform has.
_ARRAY_DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(?:8|16)")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TensorValue:
    """A tensor outside torch.

    Attributes:
        dtype: torch's name of it, one of `layout.DTYPES`.
        shape: in elements.
        data: returns the row-major bytes of its elements, little-endian; called once, after their number is checked.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes | memoryview]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ArrayValue:
    """An array or a scalar outside numpy.

    Attributes:
        dtype: numpy's code, such as ``"<f8"``; `is_array_dtype` holds.
        shape: in elements; None for a scalar.
        data: as of a `TensorValue`.
    """

    dtype: str
    shape: tuple[int, ...] | None
    data: Callable[[], bytes | memoryview]


@dataclasses.dataclass(frozen=True, slots=True)
class DtypeValue:
    """A dtype outside torch: torch's name of it."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class SizeValue:
    """A torch.Size outside torch."""

    extents: tuple[int, ...]


class Refused(NamedTuple):
    """A value that cannot be stored: a description that follows "is" in the message, and advice."""

    what: str
    advice: str


Foreign: TypeAlias = "TensorValue | ArrayValue | DtypeValue | SizeValue"
Adapt: TypeAlias = Callable[[object], "Foreign | Refused | None"]
Make: TypeAlias = Callable[[Foreign], object]


def adapt_nothing(_: object) -> None:
    """Refuse every value that is not plain."""


def keep(value: Foreign) -> object:
    """Leave a foreign value as it is."""
    return value


def is_array_dtype(code: str) -> bool:
    """Whether arrays of this numpy dtype can be stored."""
    return _ARRAY_DTYPE.fullmatch(code) is not None


def array_itemsize(code: str) -> int:
    """Bytes of an element."""
    return int(code[2:])


def undressed(value: object) -> object:
    """The plain value that an enum, a dataclass or a namedtuple stands for; any other value itself."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(value)
    if dataclasses.is_dataclass(value) and not isinstance(
        value, (type, TensorValue, ArrayValue, DtypeValue, SizeValue)
    ):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def is_possible(shape: Iterable[int]) -> bool:
    """Whether a tensor of this shape has strides that fit 64 bits, as torch requires even without elements."""
    return math.prod(max(extent, 1) for extent in shape) < 1 << 63


def content_bytes(itemsize: int, shape: Iterable[int], at_most: int) -> int:
    """Bytes of a tensor, or any number above `at_most`: a product of many large sizes may have millions of digits."""
    shape = list(shape)
    nbytes = 0 if 0 in shape else itemsize
    for extent in shape:
        nbytes *= extent
        if nbytes > at_most:
            break
    return nbytes
