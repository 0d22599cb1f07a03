"""Layout: from a table of tensors to arena offsets and safetensors files.  Pure.

Theory of operation.  A `TensorSpec` describes a tensor; `lay_out` gives it two locations:

* in the **arena**, where each segment starts on a multiple of `ARENA_ALIGNMENT` bytes, and
* in a **safetensors file** chosen by role and optimizer, where segments are packed without holes, because the format
  forbids holes (safetensors `Metadata::validate`), and the data start on a `HEADER_ALIGNMENT` boundary.

The order is the same in both, so that a long run of the arena is a long run of the file.  A file is sorted by falling
element size, so every tensor in it is aligned to its own element size without padding; then by role, so that module
buffers, which change in forward and are staged first, are contiguous.

A model may be cut into several files, as Hugging Face does: `model-00001-of-00003.safetensors` and so on, with an index
of the file of each tensor.  It is cut by size, and by `Kind`: trained parameters, frozen parameters, untrained buffers.
The files of the last two are linked from the checkpoint before as long as nothing in them changes.  Buffers are apart
from frozen parameters, which are large, because a forward may change some bytes of buffers.

Rules: no torch, no I/O, integers of any size, the same input always gives the same bytes.  Called by `arena`, and by
`manifest` for the dtype table.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from engine.errors import ArenaError

# CUDA allocations start on 256 bytes (CUDA C Programming Guide, "Device Memory Accesses"), and kernels
# choose their vector width by that; 64, a cache line and the alignment of torch's CPU allocator, divides it.
ARENA_ALIGNMENT = 256

# The trained and the untrained segments begin on huge pages of x86-64 and aarch64, in which memory is write-protected:
# what a training never writes shares none with what it does.
REGION_ALIGNMENT = 2 << 20

# The data section starts on a page, so that O_DIRECT and mmap can both reach tensors directly.
HEADER_ALIGNMENT = 4096

# safetensors refuses a longer header (MAX_HEADER_SIZE in safetensors/src/tensor.rs).
HEADER_BYTES_MAX = 100_000_000


class DType(NamedTuple):
    """How one torch dtype is stored: its safetensors code, element size, and the shape in the header."""

    code: str
    itemsize: int
    components: int  # 2 if safetensors lacks the complex type: stored as (..., 2) real numbers
    packed: int = 1  # numbers in one element of torch: the header counts them in the last dimension

    def header_shape(self, shape: Sequence[int]) -> list[int]:
        """The shape in the header."""
        if self.components > 1:
            return [*shape, self.components]
        return [*shape[:-1], self.packed * math.prod(shape[-1:])] if self.packed > 1 else [*shape]


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
    "float8_e8m0fnu": DType("F8_E8M0", 1, 1),
    "float4_e2m1fn_x2": DType("F4", 1, 1, packed=2),
    "int8": DType("I8", 1, 1),
    "uint8": DType("U8", 1, 1),
    "bool": DType("BOOL", 1, 1),
}

# The kind of file for each role.  Inference needs the model's alone.
FILE_STEMS: Mapping[str, str] = {"model": "model", "buffer": "model", "optimizer": "optimizer", "grad": "gradients"}
ROLES = tuple(FILE_STEMS)

_MODEL_FILE = "model.safetensors"

# The index that Hugging Face's loaders read if a model is in several files.
INDEX_NAME = "model.safetensors.index.json"

# An optimizer's name is part of its file's name, which has at most 100 characters before the suffix.
OPTIMIZER_NAME = re.compile("[a-z0-9-]{0,64}")


class TensorSpec(NamedTuple):
    """A tensor before it has a location.  `dtype` is torch's name, e.g. ``"float32"``.

    `optimizer` is the name of the optimizer that owns it, "" for the only one.  A shard of a larger tensor also has the
    shape of the whole tensor and its offset in that; both are empty for a whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    optimizer: str = ""
    global_shape: tuple[int, ...] = ()
    global_offset: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Segment(NamedTuple):
    """One named tensor with its locations in the arena and in its file.  Offsets and sizes are in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    optimizer: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    arena_offset: int
    file_index: int
    file_offset: int
    nbytes: int


class Kind(IntEnum):
    """The tensors that share a file if untrained ones are apart, in the order of the files."""

    TRAINED = 0
    FROZEN = 1  # parameters that no step of training writes
    BUFFER = 2


class FileLayout(NamedTuple):
    """One safetensors file: its name, its exact length and its padded header.

    `is_untrained` says that the file is for untrained tensors alone, so that it may be linked while none changes.
    """

    name: str
    nbytes: int
    header: bytes
    is_untrained: bool = False


class Layout(NamedTuple):
    """The locations of all tensors.  `segments` are in arena order, which is file order."""

    segments: tuple[Segment, ...]
    files: tuple[FileLayout, ...]
    arena_bytes: int


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    return -(-value // alignment) * alignment


def lay_out(
    specs: Iterable[TensorSpec],
    aliases: Mapping[str, str] | None = None,
    model_file_bytes_max: int | None = None,
    untrained: Collection[str] = frozenset(),
    split_untrained: bool = False,
) -> Layout:
    """Give every tensor its locations.

    Args:
        specs: the tensors, in their owner's order; names are unique.
        aliases: other names of the same tensors (tied weights), alias to stored name.  They are kept in
            the header's metadata as `safetensors.torch.save_model` does, so its `load_model` finds them.
        model_file_bytes_max: cut the model between tensors into files of at most so many bytes of tensors; a larger
            tensor has a file of its own.
        untrained: the names of tensors that no step of training writes.  They are together in a file, and share no huge
            page of the arena with the others.
        split_untrained: give the untrained tensors of the model files of their own.

    Raises:
        ArenaError: a name twice or not storable, an unknown dtype or role, or a header over 100 MB.
    """

    def kind(spec: TensorSpec) -> Kind:
        is_apart = split_untrained and spec.name in untrained and FILE_STEMS[spec.role] == "model"
        return Kind.TRAINED if not is_apart else Kind.BUFFER if spec.role == "buffer" else Kind.FROZEN

    ordered = sorted(specs, key=lambda spec: (*_file_order(spec, kind), spec.name not in untrained))
    _check_specs(ordered)
    for alias in aliases or {}:
        _check_name(alias)
    groups: dict[tuple[str, Kind], list[TensorSpec]] = {}
    for spec in ordered:
        groups.setdefault((_file_name(spec), kind(spec)), []).append(spec)
    if not groups:
        groups[_MODEL_FILE, Kind.TRAINED] = []

    segments: list[Segment] = []
    files: list[FileLayout] = []
    arena_offset = 0
    region: tuple[bool, Kind] | None = None
    for file_index, (file_name, file_kind, members) in enumerate(_cut(groups, model_file_bytes_max)):
        header = encode_header(members, aliases or {})
        file_offset = len(header)
        for spec in members:
            nbytes = spec.nbytes
            before, region = region, (spec.name in untrained, file_kind)
            if before not in (None, region):
                arena_offset = align_up(arena_offset, REGION_ALIGNMENT)
            segments.append(Segment(*spec, arena_offset, file_index, file_offset, nbytes))
            arena_offset = align_up(arena_offset + nbytes, ARENA_ALIGNMENT)
            file_offset += nbytes
        files.append(FileLayout(file_name, file_offset, header, file_kind != Kind.TRAINED))
    return Layout(tuple(segments), tuple(files), arena_offset)


def encode_header(members: Sequence[TensorSpec], aliases: Mapping[str, str]) -> bytes:
    """The safetensors header of tensors packed in this order, padded so that data start on a page.

    The format: 8 bytes of little-endian length, then JSON, which may end in spaces.  Older transformers refuse a
    file whose metadata has no "format".
    """
    names = {spec.name for spec in members}
    metadata = {alias: name for alias, name in aliases.items() if name in names}
    table: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    end = 0
    for spec in members:
        stored = DTYPES[spec.dtype]
        start, end = end, end + spec.nbytes
        table[spec.name] = {
            "dtype": stored.code,
            "shape": stored.header_shape(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    padded = align_up(8 + len(text), HEADER_ALIGNMENT) - 8
    if padded > HEADER_BYTES_MAX:
        raise ArenaError(
            f"the names and shapes of {len(members)} tensors need a header of {padded} bytes, and safetensors "
            f"reads at most {HEADER_BYTES_MAX}; use shorter names or fewer tensors"
        )
    return struct.pack("<Q", padded) + text.ljust(padded)


def model_index(layout: Layout) -> bytes | None:
    """The content of `INDEX_NAME`; None if the model is in one file or in shards, which its readers do not know."""
    weights = [segment for segment in layout.segments if FILE_STEMS[segment.role] == "model"]
    weight_map = {segment.name: layout.files[segment.file_index].name for segment in weights}
    if len(set(weight_map.values())) < 2 or any(segment.global_shape for segment in weights):
        return None
    index = {"metadata": {"total_size": sum(segment.nbytes for segment in weights)}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _file_name(spec: TensorSpec) -> str:
    stem = FILE_STEMS[spec.role]
    return f"{stem}-{spec.optimizer}.safetensors" if spec.optimizer and stem == "optimizer" else f"{stem}.safetensors"


def _cut(
    groups: Mapping[tuple[str, Kind], Sequence[TensorSpec]], model_bytes_max: int | None
) -> Iterable[tuple[str, Kind, Sequence[TensorSpec]]]:
    """The files: their names, as Hugging Face gives them to a model in several, their kinds and their tensors."""
    shards: list[tuple[Kind, Sequence[TensorSpec]]] = []
    others: list[tuple[str, Kind, Sequence[TensorSpec]]] = []
    for (name, kind), members in groups.items():
        if name == _MODEL_FILE:
            shards += [(kind, shard) for shard in _shards(members, model_bytes_max)]
        else:
            others.append((name, kind, members))
    count = len(shards)
    for number, (kind, shard) in enumerate(shards, 1):
        yield _MODEL_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", kind, shard
    yield from others


def _shards(members: Sequence[TensorSpec], bytes_max: int | None) -> list[Sequence[TensorSpec]]:
    """Tensors cut into runs of at most so many bytes, or of one tensor."""
    if bytes_max is None:
        return [members]
    shards: list[list[TensorSpec]] = [[]]
    shard_bytes = 0
    for spec in members:
        if shards[-1] and shard_bytes + spec.nbytes > bytes_max:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(spec)
        shard_bytes += spec.nbytes
    return list(shards)


def _file_order(spec: TensorSpec, kind: Callable[[TensorSpec], Kind]) -> tuple[str, int, int, int]:
    """Model file first, then by kind, by falling element size, by role; sorted() keeps the rest as given."""
    dtype = DTYPES.get(spec.dtype)
    if dtype is None:
        raise ArenaError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, which safetensors cannot hold; convert it first"
        )
    if spec.role not in FILE_STEMS:
        raise ArenaError(f"tensor {spec.name!r} has role {spec.role!r}; roles are {', '.join(ROLES)}")
    # Element sizes are powers of two, so falling order keeps every offset a multiple of the element size, and no
    # block boundary (a multiple of 4096) cuts an element.
    return _file_name(spec), kind(spec), -dtype.itemsize, ROLES.index(spec.role)


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ArenaError(f"two tensors are called {spec.name!r}; names must be unique")
        _check_name(spec.name)
        if any(extent < 0 for extent in spec.shape):
            raise ArenaError(f"tensor {spec.name!r} has a negative dimension in {spec.shape}")
        if not OPTIMIZER_NAME.fullmatch(spec.optimizer):
            raise ArenaError(
                f"an optimizer cannot be called {spec.optimizer!r}: its name is part of a file's name; use at most 64 "
                "of a to z, 0 to 9 and -"
            )
        assert len(spec.global_shape) == len(spec.global_offset) in (0, len(spec.shape)), spec
        seen.add(spec.name)


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise ArenaError(
            f"a tensor cannot be called {name!r}: safetensors keeps that name for itself; rename the tensor"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ArenaError(f"a tensor cannot be called {name!r}: that is no valid Unicode; rename the tensor") from None
