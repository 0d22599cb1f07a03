"""Manifest: the commit record of one checkpoint.  Typed, encoded, decoded, validated.  Pure.

Theory of operation.  `manifest.json` has everything that a reader needs before it opens a data file: the files and
their lengths, the chunks with a checksum for every block, every tensor's location, and the caller's `extra`.  On disk
it is one JSON object,

    {"sha256":"<64 hex digits>","body":{...}}

whose digest covers the exact bytes of the body, so no canonical form of JSON is needed.  If several ranks write one
checkpoint, each writes its chunks and segments to a part, `manifest-00003.json` for rank 3, in the same envelope;
`manifest.json` then holds the digest of every part.

Bytes read from disk are hostile until they are checked.  `decode` checks the digest, msgspec checks every type, and
`checks` compares the numbers with each other.  Nothing is allocated in proportion to a number in the manifest before
that number has been checked against the manifest's own length.

A reader ignores fields that it does not know, and refuses a manifest whose `min_reader` is above `READER`.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

import msgspec

from engine.errors import ArgumentError, CorruptError, NewerFormatError
from engine.format.checks import MANIFEST_NAME as MANIFEST_NAME
from engine.format.checks import STEP_MAX as STEP_MAX
from engine.format.checks import check_head, check_part_rank, check_parts, check_whole, require
from engine.format.layout import Layout
from engine.format.plan import Chunk, Plan, PlannedFile, plan_geometry

FORMAT = "engine.checkpoint"
VERSION = 1

# The version that this engine reads; a manifest's `min_reader` may not be above it.
READER = 1

# 100,000 tensors make about 15 MB, so this is room for some seven million.
MANIFEST_BYTES_MAX = 1 << 30

# Tensors named in an error before the rest are counted.
_NAMES_SHOWN = 4

_PREFIX = re.compile(rb'\{"sha256":"([0-9a-f]{64})","body":')
_SUFFIX = b"}\n"
_DIGEST_CHARS = 64  # of SHA-256, in hexadecimal
_ENCODER = msgspec.json.Encoder()
# Rows made and encoded in two calls into C: half a millisecond, after which another thread may take the GIL.
_ROWS_AT_ONCE = 1000
# The columns of `SegmentRecord`, from a layout's segment.
_row = attrgetter(
    *("name", "dtype", "shape", "role", "layer", "file_index", "file_offset", "nbytes", "global_shape", "global_offset")
)

_Record = TypeVar("_Record")


class ChunkRecord(msgspec.Struct, frozen=True):
    """One chunk: its location, the layers it holds a part of, and the XXH3-128 of every block in hex."""

    file: int
    index: int
    offset: int
    nbytes: int
    layers: tuple[str, ...]
    checksums: tuple[str, ...]


class FileRecord(msgspec.Struct, frozen=True):
    """One data file: its name, its exact length, and how much of it is the safetensors header."""

    name: str
    nbytes: int
    header_bytes: int


class DigestedFile(msgspec.Struct, frozen=True):
    """A file whose SHA-256 the manifest holds: a user's file, or a rank's part."""

    name: str
    nbytes: int
    sha256: str


class SegmentRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor and its location: an array in JSON, as there may be a hundred thousand; no cycle can go through one.

    A shard also has the shape of the whole tensor and its offset in that; both are empty for a whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    layer: str
    file: int
    offset: int
    nbytes: int
    global_shape: tuple[int, ...] = ()
    global_offset: tuple[int, ...] = ()


# The encoded segments of a manifest.
Rows = msgspec.Raw


class _Head(msgspec.Struct, frozen=True):
    """The fields that every version of the manifest has."""

    format: str
    version: int
    min_reader: int


class Part(msgspec.Struct, frozen=True):
    """The chunks and segments that one rank wrote.  Their `file` is an index into the part's own `files`."""

    rank: int
    files: tuple[FileRecord, ...]
    chunks: tuple[ChunkRecord, ...]
    segments: tuple[SegmentRecord, ...]
    aliases: dict[str, str]


class Summary(msgspec.Struct, frozen=True):
    """The fields of a manifest that a listing and a retention rule need."""

    step: int
    checkpoint_id: str
    created_ns: int
    files: tuple[FileRecord, ...]
    metrics: dict[str, float | None] = {}
    tag: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all data files together."""
        return sum(file.nbytes for file in self.files)


class Manifest(msgspec.Struct, frozen=True):
    """The record of a checkpoint.

    `optimizers` has each optimizer's options by its name; the only optimizer may be called "".  `modules` has what
    modules keep besides tensors, by its name in `state_dict()`.  `wrappers` has what tensor subclasses are besides
    their components, by the subclass's name.  These and `extra` are in the form of `engine.format.values`.  A metric
    that is not finite is None.
    """

    format: str
    version: int
    min_reader: int
    step: int
    checkpoint_id: str
    created_ns: int
    block_bytes: int
    files: tuple[FileRecord, ...]
    chunks: tuple[ChunkRecord, ...]
    segments: tuple[SegmentRecord, ...]
    aliases: dict[str, str]
    optimizers: dict[str, Any]
    extra: Any
    metrics: dict[str, float | None] = {}
    tag: str | None = None
    user_files: tuple[DigestedFile, ...] = ()
    parts: tuple[DigestedFile, ...] = ()
    modules: dict[str, Any] = {}
    wrappers: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all data files together."""
        return sum(file.nbytes for file in self.files)

    def geometry(self, chunks: Sequence[ChunkRecord]) -> Plan:
        """The plan of the files with these chunks, without extents."""
        files = tuple(PlannedFile(file.name, file.nbytes, file.header_bytes) for file in self.files)
        planned = tuple(Chunk(chunk.file, chunk.index, chunk.offset, chunk.nbytes) for chunk in chunks)
        return plan_geometry(files, planned, self.block_bytes)


def segment_records(layout: Layout) -> tuple[SegmentRecord, ...]:
    """The rows of a layout's segments."""
    return tuple(SegmentRecord(*_row(segment)) for segment in layout.segments)


def encode_rows(layout: Layout) -> Rows:
    """The rows as a manifest has them: the same for every save of an arena, so they are encoded once."""
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


def affected_names(segments: Iterable[SegmentRecord], file_index: int, offset: int, nbytes: int) -> tuple[str, ...]:
    """The names of the tensors in a range of a file; none if it is all header."""
    end = offset + nbytes
    here = (s for s in segments if s.file == file_index and s.nbytes > 0)
    return tuple(s.name for s in here if s.offset < end and s.offset + s.nbytes > offset)


def affected(segments: Iterable[SegmentRecord], file_index: int, offset: int, nbytes: int) -> str:
    """The same for a message; of many names, the first few and a count."""
    names = affected_names(segments, file_index, offset, nbytes)
    return listed(names) if names else "the header"  # the only name may be empty


def listed(names: Sequence[str], kind: str = "tensors") -> str:
    """Names for a message, of tensors or of another kind; of many, the first few and a count."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} {kind} more"


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


def known_hashes(plan: Plan, manifest: Manifest, names: Collection[str]) -> list[bytes | None]:
    """For each block of a plan, the hash that a manifest records for the same file and range, or None.

    Args:
        plan: of the checkpoint to write.
        manifest: of the checkpoint whose files are overwritten.
        names: the names of its files that are reused.
    """
    recorded: dict[tuple[str, int], tuple[int, str]] = {}
    for chunk in manifest.chunks:
        name = manifest.files[chunk.file].name
        if name not in names:
            continue
        for start, text in zip(range(0, chunk.nbytes, manifest.block_bytes), chunk.checksums, strict=True):
            recorded[name, chunk.offset + start] = min(manifest.block_bytes, chunk.nbytes - start), text
    known: list[bytes | None] = []
    for block in plan.blocks:
        nbytes, text = recorded.get((plan.files[block.file_index].name, block.file_offset), (0, ""))
        known.append(bytes.fromhex(text) if nbytes == block.nbytes else None)
    return known


def encode(manifest: Manifest, rows: Rows | None = None) -> bytearray:
    """The bytes of `manifest.json`, in one buffer without copies: there may be megabytes.

    Args:
        manifest: the record.
        rows: its segments, encoded by `encode_rows`; the manifest then has none itself.

    Raises:
        ArgumentError: there are more bytes than a reader accepts; only `extra` can make so many.
    """
    return _seal(manifest, rows)


def encode_part(part: Part, rows: Rows | None = None) -> bytearray:
    """The bytes of a rank's part; as `encode`."""
    return _seal(part, rows)


def part_name(rank: int) -> str:
    """The name of a rank's part."""
    return f"manifest-{rank:05d}.json"


def digest_of(name: str, raw: bytes | bytearray) -> DigestedFile:
    """The record of a file with this content."""
    return DigestedFile(name, len(raw), hashlib.sha256(raw).hexdigest())


def decode(raw: bytes | bytearray, read_part: Callable[[DigestedFile], bytes] | None = None) -> Manifest:
    """The manifest in these bytes, its parts merged into it.

    Args:
        raw: the bytes of `manifest.json`.
        read_part: returns the bytes of a part's file, at most one more than its record says.

    Raises:
        CorruptError: a digest, a type or a number is wrong; the message says which.
        NewerFormatError: the checkpoint is for a later engine.
    """
    manifest = _open(raw, MANIFEST_NAME, Manifest)
    check_head(manifest)
    check_parts(manifest)
    if manifest.parts:
        if read_part is None:
            raise CorruptError(f"manifest.json has {len(manifest.parts)} parts, and no part is read here")
        manifest = merge_parts(manifest, [decode_part(read_part(record), record) for record in manifest.parts])
    check_whole(manifest)
    return manifest


def decode_part(raw: bytes, record: DigestedFile) -> Part:
    """The part in these bytes, which the manifest records.

    Raises:
        CorruptError: they are not what was recorded.
    """
    if (len(raw), hashlib.sha256(raw).hexdigest()) != (record.nbytes, record.sha256):
        raise CorruptError(f"{record.name} is not the part that manifest.json records")
    part = _open(raw, record.name, Part)
    check_part_rank(record.name, part.rank)
    return part


def decode_summary(raw: bytes | bytearray) -> Summary:
    """The summary in these bytes of a manifest.  Checks the digest, and decodes no chunk and no segment.

    Raises:
        CorruptError, NewerFormatError: as `decode`.
    """
    summary = _open(raw, MANIFEST_NAME, Summary)
    check_head(summary)
    return summary


def merge_parts(manifest: Manifest, parts: Sequence[Part]) -> Manifest:
    """A manifest with the chunks, segments and aliases of its parts, in order of file and offset.

    Raises:
        CorruptError: a part names a file that the manifest lacks, or parts contradict each other.
    """
    places = {file: index for index, file in enumerate(manifest.files)}
    chunks: list[ChunkRecord] = []
    segments: list[SegmentRecord] = []
    aliases: dict[str, str] = {}
    for part in parts:
        require(all(file in places for file in part.files), f"the part of rank {part.rank} has another file")
        index = [places[file] for file in part.files]
        rows: tuple[ChunkRecord | SegmentRecord, ...] = (*part.chunks, *part.segments)
        in_range = all(0 <= row.file < len(index) for row in rows)
        require(in_range, f"the part of rank {part.rank} has a row of no file")
        chunks += [msgspec.structs.replace(chunk, file=index[chunk.file]) for chunk in part.chunks]
        segments += [msgspec.structs.replace(segment, file=index[segment.file]) for segment in part.segments]
        agree = all(aliases.get(alias, name) == name for alias, name in part.aliases.items())
        require(agree, f"the part of rank {part.rank} has another name for an alias")
        aliases |= part.aliases
    return msgspec.structs.replace(
        manifest,
        chunks=tuple(sorted(chunks, key=lambda chunk: (chunk.file, chunk.offset))),
        segments=tuple(sorted(segments, key=lambda segment: (segment.file, segment.offset, segment.nbytes))),
        aliases=aliases,
    )


def _seal(record: Manifest | Part, rows: Rows | None) -> bytearray:
    """A record in its envelope."""
    start, between = b'{"sha256":"', b'","body":'
    raw = bytearray(start + bytes(_DIGEST_CHARS) + between)
    body_start = len(raw)
    assert rows is None or not record.segments, "a record has its segments, or is given their rows"
    segments = Rows(_ENCODER.encode(record.segments)) if rows is None else rows
    _ENCODER.encode_into(msgspec.structs.replace(record, segments=segments), raw, body_start)
    body_bytes = len(raw) - body_start
    if body_bytes > MANIFEST_BYTES_MAX // 2:  # half, to stay far from the limit of any reader
        raise ArgumentError(f"the manifest would have {body_bytes} bytes; store less in `extra`")
    with memoryview(raw) as view:
        digest = hashlib.sha256(view[body_start:]).hexdigest()
        view[len(start) : len(start) + _DIGEST_CHARS] = digest.encode()
    raw += _SUFFIX
    return raw


def _open(raw: bytes | bytearray, name: str, record: type[_Record]) -> _Record:
    """Check the digest of an envelope, and decode its record; `name` is for messages."""
    prefix = _PREFIX.match(raw)
    if prefix is None or not raw.endswith(_SUFFIX):
        raise CorruptError(f"{name} does not have the form of a manifest")
    body = memoryview(raw)[prefix.end() : -len(_SUFFIX)]
    if hashlib.sha256(body).hexdigest().encode() != prefix.group(1):
        raise CorruptError(f"{name} does not match its own sha256")
    try:
        if record is not Part:  # first: the fields of a later format may have other types
            head = msgspec.json.decode(body, type=_Head)
            require(head.format == FORMAT, f"format is {head.format!r}, not {FORMAT!r}")
            if head.min_reader > READER:
                raise NewerFormatError(
                    f"{name} is of format version {head.version} and needs a reader of version {head.min_reader}, and "
                    f"this engine reads {READER}; upgrade the engine"
                )
        return msgspec.json.decode(body, type=record)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptError(f"{name} cannot be decoded: {error}") from None
