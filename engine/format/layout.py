"""Layout: from a table of tensors to arena offsets and safetensors files.  Pure.

Theory of operation.  A `TensorSpec` says what a tensor is; `lay_out` decides where it goes, twice over:

* in the **arena**, where each segment starts on a multiple of `ARENA_ALIGNMENT` bytes, and
* in a **safetensors file** chosen by role, where segments are packed without holes, because the format
  forbids holes (safetensors `Metadata::validate`), and the data start on a `HEADER_ALIGNMENT` boundary.

The order is the same in both, so that a long run of the arena is a long run of the file.  Within a file
the largest element size comes first, so every tensor in the file is aligned to its own element size
without padding; then module buffers (which change in forward and so are staged first) come together.

Rules: no torch, no I/O, integers of any size, the same input always gives the same bytes.  Called by
`arena` with what it gathered, and by `manifest` for the dtype table.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from engine.errors import ArenaError

# CUDA allocations start on 256 bytes (CUDA C Programming Guide, "Device Memory Accesses"), and kernels
# choose their vector width by that; 64, a cache line and the alignment of torch's CPU allocator, divides it.
ARENA_ALIGNMENT = 256

# The data section starts on a page, so that O_DIRECT and mmap can both reach tensors directly.
HEADER_ALIGNMENT = 4096

# safetensors refuses a longer header (MAX_HEADER_SIZE in safetensors/src/tensor.rs).
HEADER_BYTES_MAX = 100_000_000


class DType(NamedTuple):
    """How one torch dtype is stored: its safetensors code, element size, and trailing components."""

    code: str
    itemsize: int
    components: int  # 2 where safetensors lacks the complex type: stored as (..., 2) real numbers


# Every dtype the engine stores, by torch's name.  Codes are safetensors' (`Dtype` in tensor.rs).
DTYPES: Mapping[str, DType] = {
    "complex128": DType("F64", 16, 2),
    "float64": DType("F64", 8, 1),
    "complex64": DType("C64", 8, 1),
    "int64": DType("I64", 8, 1),
    "uint64": DType("U64", 8, 1),
    "float32": DType("F32", 4, 1),
    "complex32": DType("F16", 4, 2),
    "int32": DType("I32", 4, 1),
    "uint32": DType("U32", 4, 1),
    "bfloat16": DType("BF16", 2, 1),
    "float16": DType("F16", 2, 1),
    "int16": DType("I16", 2, 1),
    "uint16": DType("U16", 2, 1),
    "float8_e4m3fn": DType("F8_E4M3", 1, 1),
    "float8_e5m2": DType("F8_E5M2", 1, 1),
    "float8_e4m3fnuz": DType("F8_E4M3FNUZ", 1, 1),
    "float8_e5m2fnuz": DType("F8_E5M2FNUZ", 1, 1),
    "int8": DType("I8", 1, 1),
    "uint8": DType("U8", 1, 1),
    "bool": DType("BOOL", 1, 1),
}

# Which file a role is stored in.  `grad` shares the optimizer's: both are of no use to inference.
FILES: Mapping[str, str] = {
    "model": "model.safetensors",
    "buffer": "model.safetensors",
    "optimizer": "optimizer.safetensors",
    "grad": "optimizer.safetensors",
}
ROLES = tuple(FILES)


class TensorSpec(NamedTuple):
    """What a tensor is, before it has a place.  `dtype` is torch's name, e.g. ``"float32"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Segment(NamedTuple):
    """One named tensor with its place in the arena and in its file.  Offsets and sizes are in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    arena_offset: int
    file_index: int
    file_offset: int
    nbytes: int


class FileLayout(NamedTuple):
    """One safetensors file: its name, its exact length and its padded header."""

    name: str
    nbytes: int
    header: bytes


class Layout(NamedTuple):
    """Where everything goes.  `segments` are in arena order, which is file order."""

    segments: tuple[Segment, ...]
    files: tuple[FileLayout, ...]
    arena_bytes: int


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    return -(-value // alignment) * alignment


def lay_out(specs: Iterable[TensorSpec], aliases: Mapping[str, str] | None = None) -> Layout:
    """Give every tensor its place.

    Args:
        specs: the tensors, in the order in which their owner knows them; names are unique.
        aliases: other names of the same tensors (tied weights), alias to stored name.  They are kept in
            the header's metadata as `safetensors.torch.save_model` does, so its `load_model` finds them.

    Raises:
        ArenaError: a name twice or not storable, an unknown dtype or role, or a header over 100 MB.
    """
    ordered = sorted(specs, key=_file_order)
    _check_specs(ordered)
    for alias in aliases or {}:
        _check_name(alias)
    groups: dict[str, list[TensorSpec]] = {}
    for spec in ordered:
        groups.setdefault(FILES[spec.role], []).append(spec)
    if not groups:
        groups[FILES["model"]] = []

    segments: list[Segment] = []
    files: list[FileLayout] = []
    arena_offset = 0
    for file_index, (file_name, members) in enumerate(groups.items()):
        header = encode_header(members, aliases or {})
        file_offset = len(header)
        for spec in members:
            nbytes = spec.nbytes
            segments.append(Segment(*spec, arena_offset, file_index, file_offset, nbytes))
            arena_offset = align_up(arena_offset + nbytes, ARENA_ALIGNMENT)
            file_offset += nbytes
        files.append(FileLayout(file_name, file_offset, header))
    return Layout(tuple(segments), tuple(files), arena_offset)


def encode_header(members: Sequence[TensorSpec], aliases: Mapping[str, str]) -> bytes:
    """The safetensors header of tensors packed in this order, padded so that data start on a page.

    The format: 8 bytes of little-endian length, then JSON, which may end in spaces.
    """
    table: dict[str, object] = {}
    names = {spec.name for spec in members}
    metadata = {alias: name for alias, name in aliases.items() if name in names}
    if metadata:
        table["__metadata__"] = metadata
    end = 0
    for spec in members:
        stored = DTYPES[spec.dtype]
        shape = [*spec.shape, stored.components] if stored.components > 1 else [*spec.shape]
        start, end = end, end + spec.nbytes
        table[spec.name] = {"dtype": stored.code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = align_up(8 + len(text), HEADER_ALIGNMENT) - 8
    if padded > HEADER_BYTES_MAX:
        raise ArenaError(
            f"the names and shapes of {len(members)} tensors need a header of {padded} bytes, and safetensors "
            f"reads at most {HEADER_BYTES_MAX}; use shorter names or fewer tensors"
        )
    return struct.pack("<Q", padded) + text.ljust(padded)


def _file_order(spec: TensorSpec) -> tuple[str, int, int]:
    """Model file first, then by falling element size, then by role; sorted() keeps the rest as given."""
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise ArenaError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold; convert it first"
        )
    if spec.role not in FILES:
        raise ArenaError(f"tensor {spec.name!r} has role {spec.role!r}; roles are {', '.join(ROLES)}")
    # Element sizes are powers of two, so falling order keeps every offset a multiple of its own element size,
    # and no block boundary (a multiple of 4096) ever cuts an element.
    return FILES[spec.role], -dtype.itemsize, ROLES.index(spec.role)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ArenaError(f"two tensors are called {spec.name!r}; names must be unique")
        _check_name(spec.name)
        if any(extent < 0 for extent in spec.shape):
            raise ArenaError(f"tensor {spec.name!r} has a negative dimension in {spec.shape}")
        seen.add(spec.name)


def _check_name(name: str) -> None:
    if name == "__metadata__" or not name.isprintable():
        raise ArenaError(f"a tensor cannot be called {name!r}: safetensors keeps or cannot show that name")
