"""Tensors: values of torch and numpy as the values of a manifest, and back.

Theory of operation.  `format.values` knows neither torch nor numpy; `format.foreign` has a class for each kind of value
of theirs.  This module makes those of real values, and real values of those.  It also makes the tensors that `load`
fills.

Rules: numpy is imported only to restore an array, because torch works without it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import CorruptError, PlatformError
from engine.format import values
from engine.format.foreign import ArrayValue, DtypeValue, Foreign, Refused, SizeValue, TensorValue, is_array_dtype
from engine.format.layout import DTYPES
from engine.format.manifest import SegmentRecord
from engine.format.values import Json
from engine.state.memory import allocate_pages

# From here on `make_tensor` takes memory from the kernel, in huge pages, of which this is one on x86-64.  To fault
# 500 MB in by 4096 bytes at a time took 90 of 240 ms on the host of docs/perf.md.
_PAGES_BYTES_MIN = 2 << 20


def encode(value: object, where: str = "extra") -> Json:
    """`values.encode`, which takes dense CPU tensors, dtypes, sizes, and numpy's arrays and scalars as well."""
    return values.encode(value, where, _adapt)


def encode_options(options: Mapping[str, object]) -> Json:
    """`values.encode_options`, likewise."""
    return values.encode_options(options, _adapt)


def decode(value: object, where: str = "extra") -> object:
    """`values.decode`, which makes those values."""
    return values.decode(value, where, _make)


def decode_options(value: object) -> dict[str, Any]:
    """`values.decode_options`, likewise."""
    return values.decode_options(value, _make)


def make_tensor(record: SegmentRecord) -> Tensor:
    """A tensor of a segment's dtype and shape, whose elements are still to be filled.

    Raises:
        CorruptError: no tensor can have its shape.
        PlatformError: this torch does not know its dtype.
    """
    dtype = _dtype(record.dtype, f"tensor {record.name!r}")
    if record.nbytes >= _PAGES_BYTES_MIN:
        return torch.frombuffer(allocate_pages(record.nbytes), dtype=dtype).view(record.shape)
    try:
        return torch.empty(record.shape, dtype=dtype, device="cpu")
    except RuntimeError:
        if record.nbytes:
            raise  # no memory
        # No elements, yet sizes whose strides overflow torch's 64 bits: no tensor ever had it.
        raise CorruptError(f"tensor {record.name!r} has the impossible shape {record.shape}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype, as `layout.DTYPES` has it."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str, holder: str) -> torch.dtype:
    """Torch's dtype of this name, which `layout.DTYPES` has; older releases lack the newest of them."""
    dtype = vars(torch).get(name)  # getattr() would import a module of that name
    if not isinstance(dtype, torch.dtype):
        raise PlatformError(f"{holder} is of {name}, which torch {torch.__version__} lacks", "use a later torch")
    return dtype


def _adapt(value: object) -> Foreign | Refused | None:
    if isinstance(value, Tensor):
        return _adapt_tensor(value)
    if isinstance(value, torch.dtype):
        return DtypeValue(dtype_name(value))
    if isinstance(value, torch.Size):
        return SizeValue(tuple(value))
    if isinstance(value, torch.device):
        return Refused("a torch.device", "pass str(...) of it, which torch.device(...) takes")
    return _adapt_array(value)


def _adapt_tensor(value: Tensor) -> TensorValue | Refused:
    if type(value) is not Tensor:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return Refused(f"a {name}", "pass a plain torch.Tensor: .detach() of a parameter")
    if (
        value.device.type != "cpu"
        or value.layout != torch.strided
        or value.is_nested
        or dtype_name(value.dtype) not in DTYPES
    ):
        what = f"a {value.layout} tensor of {value.dtype} on {value.device}"
        return Refused(what, "convert it with .to_dense(), .to(dtype) or .cpu() to a dense CPU tensor that it can hold")
    return TensorValue(dtype_name(value.dtype), tuple(value.shape), lambda: _bytes_of(value))


def _adapt_array(value: object) -> ArrayValue | Refused | None:
    numpy = sys.modules.get("numpy")  # a value of numpy's has imported it
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    kind = type(value)
    code = value.dtype.newbyteorder("<").str
    if (isinstance(value, numpy.ndarray) and kind is not numpy.ndarray) or not is_array_dtype(code):
        return Refused(
            f"a numpy.{kind.__name__} of {value.dtype}", "pass .tolist() of it, or an array of plain numbers"
        )
    shape = value.shape if isinstance(value, numpy.ndarray) else None
    return ArrayValue(code, shape, lambda: value.astype(code).tobytes())


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)  # torch gives bytes away through numpy only


def _make(value: Foreign) -> object:
    if isinstance(value, TensorValue):
        return _make_tensor(value)
    if isinstance(value, ArrayValue):
        return _make_array(value)
    return _dtype(value.name, "the checkpoint") if isinstance(value, DtypeValue) else torch.Size(value.extents)


def _make_tensor(value: TensorValue) -> Tensor:
    data = value.data()
    flat = torch.empty(len(data), dtype=torch.uint8, device="cpu")
    ctypes.memmove(flat.data_ptr(), bytes(data), len(data))
    return flat.view(_dtype(value.dtype, "a tensor of the checkpoint")).view(value.shape)


def _make_array(value: ArrayValue) -> object:
    try:
        import numpy
    except ImportError:
        raise PlatformError("the checkpoint holds an array of numpy, which is not installed", "install numpy") from None
    flat = numpy.frombuffer(bytearray(value.data()), value.dtype)
    try:
        return flat[0] if value.shape is None else flat.reshape(value.shape)
    except ValueError as error:  # more dimensions than numpy takes, or sizes whose product overflows
        raise CorruptError(f"an array of shape {value.shape} cannot be made: {error}") from None
