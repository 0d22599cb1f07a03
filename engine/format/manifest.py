"""Manifest: the commit record of one checkpoint.  Typed, encoded, decoded, validated.  Pure.

Theory of operation.  `manifest.json` says everything that a reader must know before it opens a data file: the
files and their lengths, the chunks with a checksum for every block, every tensor's place, and the caller's
`extra`.  On disk it is one JSON object,

    {"sha256":"<64 hex digits>","body":{...}}

whose digest covers the very bytes of the body, so nothing depends on how JSON may be reformatted.

Bytes read from disk are hostile until proven otherwise.  `decode` first checks the digest, then lets msgspec
check every type, then `_validate` checks every number against every other: after that a reader may trust that
chunks partition files, blocks partition chunks, and segments partition the data without holes, all within
63-bit offsets.  Nothing is allocated in proportion to a number in the manifest before that number has been
checked against the manifest's own length.

Called by `arena` (rows), `commit` (through `writer`), `catalog` and `reader`.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence, Set
from itertools import pairwise
from operator import attrgetter
from typing import Any

import msgspec

from engine.errors import ArgumentError, CorruptError
from engine.format.layout import DTYPES, HEADER_ALIGNMENT, ROLES, Layout
from engine.format.plan import ALIGNMENT, Chunk, Plan, PlannedFile, ceil_div, plan_geometry

MANIFEST_NAME = "manifest.json"
FORMAT = "engine.checkpoint"
VERSION = 1

# 100,000 tensors make about 15 MB, so this is room for some seven million.  More is not a manifest.
MANIFEST_BYTES_MAX = 1 << 30

# One job of the pipeline has room for so many (ENG_JOB_FILES_MAX in engine_native.h).
FILES_MAX = 8

# A block must fit a staging slot of whoever restores; the native pipeline counts a block's bytes in 32 bits.
BLOCK_BYTES_MAX = 1 << 30

# Steps are stored as JSON integers, and other languages read those as signed 64-bit.
STEP_MAX = (1 << 63) - 1

# Offsets are signed 64-bit in the kernel (lseek(2)), and are rounded up to a block.
FILE_BYTES_MAX = (1 << 63) - 1 - BLOCK_BYTES_MAX

# Tensors named in an error before the rest are counted.
_NAMES_SHOWN = 4

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}\.safetensors")
_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})","body":')
_SUFFIX = b"}\n"
_HEX = re.compile("[0-9a-f]*")
_DIGEST_CHARS = 64  # of SHA-256, in hexadecimal
_HASH_CHARS = 32  # of XXH3-128, in hexadecimal
_ENCODER = msgspec.json.Encoder()
# Rows made and encoded in two calls into C: half a millisecond, after which the training's thread may have Python.
_ROWS_AT_ONCE = 1000
# The columns of `SegmentRecord`, of a layout's segment.
_row = attrgetter("name", "dtype", "shape", "role", "layer", "file_index", "file_offset", "nbytes")


class ChunkRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chunk: its place, the layers it holds a part of, and the XXH3-128 of every block in hex."""

    file: int
    index: int
    offset: int
    nbytes: int
    layers: tuple[str, ...]
    checksums: tuple[str, ...]


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file: its name, its exact length, and how much of it is the safetensors header."""

    name: str
    nbytes: int
    header_bytes: int


class SegmentRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One tensor and its place: an array in JSON, as there may be a hundred thousand; no cycle can go through one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    file: int
    offset: int
    nbytes: int


# The segments of a manifest, encoded already.
Rows = msgspec.Raw


class _Head(msgspec.Struct, frozen=True):
    """What every version of the manifest says first."""

    format: str
    version: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a reader must know.  `options` and `extra` are in the form of `engine.format.values`."""

    format: str
    version: int
    step: int
    checkpoint_id: str
    created_ns: int
    block_bytes: int
    files: tuple[FileRecord, ...]
    chunks: tuple[ChunkRecord, ...]
    segments: tuple[SegmentRecord, ...]
    aliases: dict[str, str]
    options: Any
    extra: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all data files together."""
        return sum(file.nbytes for file in self.files)

    def geometry(self, chunks: Sequence[ChunkRecord]) -> Plan:
        """The plan of the files as they were cut, or of as many of its chunks as are asked for, without extents."""
        files = tuple(PlannedFile(file.name, file.nbytes, file.header_bytes) for file in self.files)
        planned = tuple(Chunk(chunk.file, chunk.index, chunk.offset, chunk.nbytes) for chunk in chunks)
        return plan_geometry(files, planned, self.block_bytes)


def segment_records(layout: Layout) -> tuple[SegmentRecord, ...]:
    """The rows of a layout's segments."""
    return tuple(SegmentRecord(*_row(segment)) for segment in layout.segments)


def encode_rows(layout: Layout) -> Rows:
    """The rows as they stand in a manifest: the same for every save of an arena, so they are encoded once."""
    count = len(layout.segments)
    slices = (layout.segments[start : start + _ROWS_AT_ONCE] for start in range(0, count, _ROWS_AT_ONCE))
    return Rows(b"[" + b",".join([_ENCODER.encode(list(map(_row, each)))[1:-1] for each in slices]) + b"]")


def chunk_layers(plan: Plan, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """For each chunk of a plan, the layers it holds a part of, in order."""
    segments = layout.segments  # in the order of files and their offsets
    found = []
    for chunk in plan.chunks:
        start, end = (chunk.file_index, chunk.offset), (chunk.file_index, chunk.offset + chunk.nbytes)
        first = bisect_right(segments, start, key=lambda s: (s.file_index, s.file_offset + s.nbytes))
        last = bisect_left(segments, end, key=lambda s: (s.file_index, s.file_offset))
        found.append(tuple(dict.fromkeys([segment.layer for segment in segments[first:last] if segment.nbytes])))
    return tuple(found)


def affected(segments: Iterable[SegmentRecord], file_index: int, offset: int, nbytes: int) -> str:
    """The tensors that lie in a range of a file, shortened where they are many."""
    end = offset + nbytes
    here = (s for s in segments if s.file == file_index and s.nbytes > 0)
    names = [s.name for s in here if s.offset < end and s.offset + s.nbytes > offset]
    shown = ", ".join(names[:_NAMES_SHOWN]) if names else "the header"
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} tensors more"


def block_checksums(chunks: Iterable[ChunkRecord]) -> list[bytes]:
    """One content hash a block, in the order of the blocks of their `geometry`."""
    return [bytes.fromhex(text) for chunk in chunks for text in chunk.checksums]


def chunk_records(plan: Plan, layers: Sequence[tuple[str, ...]], checksums: Sequence[bytes]) -> tuple[ChunkRecord, ...]:
    """The rows of a plan's chunks, once its blocks' checksums are known."""
    assert len(checksums) == len(plan.blocks), (len(checksums), len(plan.blocks))
    hexes = [checksum.hex() for checksum in checksums]
    return tuple(
        ChunkRecord(chunk.file_index, chunk.index, chunk.offset, chunk.nbytes, names, tuple(hexes[start:end]))
        for chunk, names, (start, end) in zip(plan.chunks, layers, pairwise(plan.block_starts), strict=True)
    )


def encode(manifest: Manifest, rows: Rows | None = None) -> bytearray:
    """The bytes of `manifest.json`, made in one piece of memory: there may be megabytes of them.

    Args:
        manifest: what they say.
        rows: its segments, from `encode_rows`, if they are encoded already; it has none then.

    Raises:
        ArgumentError: there are more of them than a reader would take; only `extra` can make so many.
    """
    start, between = b'{"sha256":"', b'","body":'
    raw = bytearray(start + bytes(_DIGEST_CHARS) + between)
    body_start = len(raw)
    assert rows is None or not manifest.segments, "a manifest has its segments, or is given their rows"
    segments = Rows(_ENCODER.encode(manifest.segments)) if rows is None else rows
    _ENCODER.encode_into(msgspec.structs.replace(manifest, segments=segments), raw, body_start)
    body_bytes = len(raw) - body_start
    if body_bytes > MANIFEST_BYTES_MAX // 2:  # half, so that no reader's limit is ever near
        raise ArgumentError(f"the manifest would have {body_bytes} bytes; store less in `extra`")
    with memoryview(raw) as view:
        digest = hashlib.sha256(view[body_start:]).hexdigest()
        view[len(start) : len(start) + _DIGEST_CHARS] = digest.encode()
    raw += _SUFFIX
    return raw


def decode(raw: bytes) -> Manifest:
    """The manifest in these bytes.

    Raises:
        CorruptError: the digest, a type or a number is wrong; the message says which.
    """
    prefix = _PREFIX.match(raw)
    if prefix is None or not raw.endswith(_SUFFIX):
        raise CorruptError("manifest.json does not have the form of a manifest")
    body = memoryview(raw)[prefix.end() : -len(_SUFFIX)]
    if hashlib.sha256(body).hexdigest().encode() != prefix.group(1):
        raise CorruptError("manifest.json does not match its own sha256")
    try:
        head = msgspec.json.decode(body, type=_Head)  # first: a later version may have other fields
        _require(head.format == FORMAT, f"format is {head.format!r}, not {FORMAT!r}")
        _require(head.version == VERSION, f"version is {head.version}; this engine reads {VERSION}")
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptError(f"manifest.json cannot be decoded: {error}") from None
    _validate(manifest)
    return manifest


def _inconsistent(what: str) -> CorruptError:
    return CorruptError(f"manifest.json is inconsistent: {what}")


def _require(truth: bool, what: str) -> None:
    if not truth:
        raise _inconsistent(what)


def _validate(manifest: Manifest) -> None:
    _require(0 <= manifest.step <= STEP_MAX, f"step is {manifest.step}")
    _require(0 <= manifest.created_ns < 1 << 63, f"created_ns is {manifest.created_ns}")
    _require(re.fullmatch("[0-9a-f]{32}", manifest.checkpoint_id) is not None, "checkpoint_id is not 32 hex digits")
    aligned = 0 < manifest.block_bytes <= BLOCK_BYTES_MAX and manifest.block_bytes % ALIGNMENT == 0
    _require(aligned, f"block_bytes is {manifest.block_bytes}")
    _validate_files(manifest)
    _validate_chunks(manifest)
    _validate_segments(manifest)


def _validate_files(manifest: Manifest) -> None:
    _require(1 <= len(manifest.files) <= FILES_MAX, f"there are {len(manifest.files)} files")
    _require(len({file.name for file in manifest.files}) == len(manifest.files), "a file is listed twice")
    for file in manifest.files:
        _require(_FILE_NAME.fullmatch(file.name) is not None, f"{file.name!r} cannot be a data file's name")
        fits = 0 < file.header_bytes <= file.nbytes <= FILE_BYTES_MAX and file.header_bytes % HEADER_ALIGNMENT == 0
        _require(fits, f"{file.name} has {file.nbytes} bytes, of which {file.header_bytes} header")


def _validate_chunks(manifest: Manifest) -> None:
    position = (0, 0, 0)  # the file, index and offset that the next chunk must have
    for chunk in manifest.chunks:
        where = f"chunk {chunk.index} of file {chunk.file}"
        _require((chunk.file, chunk.index, chunk.offset) == position, f"{where} at {chunk.offset} does not follow")
        file_bytes = manifest.files[chunk.file].nbytes
        end = chunk.offset + chunk.nbytes
        _require(chunk.nbytes > 0 and end <= file_bytes, f"{where} does not lie in its file")
        _require(end == file_bytes or end % ALIGNMENT == 0, f"{where} ends unaligned")
        count = ceil_div(chunk.nbytes, manifest.block_bytes)
        _require(len(chunk.checksums) == count, f"{where} has {len(chunk.checksums)} checksums for {count} blocks")
        # All at once, as there may be a hundred thousand; one by one only to name the one that is wrong.
        if set(map(len, chunk.checksums)) != {_HASH_CHARS} or _HEX.fullmatch("".join(chunk.checksums)) is None:
            wrong = next(text for text in chunk.checksums if len(text) != _HASH_CHARS or _HEX.fullmatch(text) is None)
            raise _inconsistent(f"{where} has checksum {wrong!r}")
        position = (chunk.file + 1, 0, 0) if end == file_bytes else (chunk.file, chunk.index + 1, end)
        _require(position[0] < len(manifest.files) or chunk is manifest.chunks[-1], f"{where} is not the last")
    _require(position == (len(manifest.files), 0, 0), "the chunks do not cover the files")


def _validate_segments(manifest: Manifest) -> None:
    ends = [file.header_bytes for file in manifest.files]
    names: set[str] = set()
    for segment in manifest.segments:
        wrong = _wrong_segment(segment, names, ends)
        if wrong is not None:
            raise _inconsistent(f"tensor {segment.name!r} {wrong}")
        names.add(segment.name)
        ends[segment.file] += segment.nbytes
    for file, end in zip(manifest.files, ends, strict=True):
        _require(end == file.nbytes, f"the tensors of {file.name} end at {end}, the file at {file.nbytes}")
    for alias, name in manifest.aliases.items():
        _require(alias not in names and name in names, f"alias {alias!r} of {name!r} does not fit")


def _wrong_segment(segment: SegmentRecord, names: Set[str], ends: Sequence[int]) -> str | None:
    """What is wrong with a segment that follows these, if anything; there may be a hundred thousand."""
    if segment.name in names:
        return "is listed twice"
    if segment.dtype not in DTYPES or segment.role not in ROLES:
        return f"is {segment.dtype}, {segment.role}"
    if not 0 <= segment.file < len(ends):
        return f"is in file {segment.file}"
    if _nbytes(segment) != segment.nbytes:
        return f"of shape {segment.shape} has {segment.nbytes} bytes"
    if segment.offset != ends[segment.file]:
        return f"at {segment.offset} leaves a hole or overlaps"
    return None


def _nbytes(segment: SegmentRecord) -> int | None:
    """Bytes of a segment by dtype and shape, or None once the product leaves what a file can hold."""
    nbytes = DTYPES[segment.dtype].itemsize
    for extent in segment.shape:
        if not 0 <= extent < 1 << 63:  # beyond what a tensor can have, also where another dimension is 0
            return None
        nbytes = min(nbytes * extent, FILE_BYTES_MAX + 1)
    return nbytes if nbytes <= FILE_BYTES_MAX else None
