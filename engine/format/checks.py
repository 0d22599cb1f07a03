"""Checks: the numbers of a manifest must agree with each other.  Pure.

Theory of operation.  `manifest` has checked digests and types; here the numbers are checked against each other.  Then a
reader may rely on this: chunks partition files, blocks partition chunks, segments partition the data without holes,
shards partition their tensor, and every name is a plain file of the checkpoint's directory.

Called by `manifest`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from engine.errors import CorruptError
from engine.format.layout import DTYPES, HEADER_ALIGNMENT, INDEX_NAME, ROLES
from engine.format.plan import ALIGNMENT, ceil_div

if TYPE_CHECKING:
    from engine.format.manifest import DigestedFile, Manifest, SegmentRecord, Summary

MANIFEST_NAME = "manifest.json"

# A block must fit a staging slot of the engine that restores; the native pipeline counts a block's bytes in 32 bits.
BLOCK_BYTES_MAX = 1 << 30

# Steps are stored as JSON integers, which other languages read as signed 64-bit.
STEP_MAX = (1 << 63) - 1

# Offsets are signed 64-bit in the kernel (lseek(2)); lengths are rounded up to a block.
FILE_BYTES_MAX = (1 << 63) - 1 - BLOCK_BYTES_MAX

# Dimensions in which one tensor is cut into shards.  Device meshes cut in one or two; each doubles the check's cost.
SPLIT_DIMS_MAX = 4

_HASH_CHARS = 32  # of XXH3-128, in hexadecimal
_HEX = re.compile("[0-9a-f]*")
_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}\.safetensors")
_PART_NAME = re.compile(r"manifest-([0-9]{5})\.json")
_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")


def require(truth: bool, what: str) -> None:
    """Raise CorruptError unless a statement about the manifest is true."""
    if not truth:
        raise _inconsistent(what)


def check_head(manifest: Manifest | Summary) -> None:
    """The fields that a listing reads."""
    require(0 <= manifest.step <= STEP_MAX, f"step is {manifest.step}")
    require(0 <= manifest.created_ns < 1 << 63, f"created_ns is {manifest.created_ns}")
    require(re.fullmatch("[0-9a-f]{32}", manifest.checkpoint_id) is not None, "checkpoint_id is not 32 hex digits")
    require(len(manifest.files) >= 1, "there are no files")
    require(len({file.name for file in manifest.files}) == len(manifest.files), "a file is listed twice")
    for file in manifest.files:
        require(_FILE_NAME.fullmatch(file.name) is not None, f"{file.name!r} cannot be a data file's name")
        fits = 0 < file.header_bytes <= file.nbytes <= FILE_BYTES_MAX and file.header_bytes % HEADER_ALIGNMENT == 0
        require(fits, f"{file.name} has {file.nbytes} bytes, of which {file.header_bytes} header")


def check_parts(manifest: Manifest) -> None:
    """The checks that come before a part is read."""
    _check_digested(manifest.parts)
    for part in manifest.parts:
        require(_PART_NAME.fullmatch(part.name) is not None, f"{part.name!r} cannot be a part's name")
    own = manifest.chunks or manifest.segments or manifest.aliases
    require(not (manifest.parts and own), "it has parts, and chunks, segments or aliases of its own")


def is_user_name(name: str) -> bool:
    """Whether a user's file may have this name: a plain name that the engine does not use."""
    ours = name in (MANIFEST_NAME, INDEX_NAME) or name.endswith(".safetensors") or _PART_NAME.fullmatch(name)
    return _USER_NAME.fullmatch(name) is not None and not ours


def check_part_rank(name: str, rank: int) -> None:
    """A part is of the rank in its name; `check_parts` has checked the name."""
    require(name == f"manifest-{rank:05d}.json", f"{name} says it is the part of rank {rank}")


def check_whole(manifest: Manifest) -> None:
    """Everything else, once the parts are merged."""
    aligned = 0 < manifest.block_bytes <= BLOCK_BYTES_MAX and manifest.block_bytes % ALIGNMENT == 0
    require(aligned, f"block_bytes is {manifest.block_bytes}")
    _check_digested(manifest.user_files)
    for file in manifest.user_files:
        require(is_user_name(file.name), f"{file.name!r} cannot be a user file's name")
    _check_chunks(manifest)
    _check_segments(manifest)


def _inconsistent(what: str) -> CorruptError:
    return CorruptError(f"manifest.json is inconsistent: {what}")


def _check_digested(files: Sequence[DigestedFile]) -> None:
    require(len({file.name for file in files}) == len(files), "a file is listed twice")
    for file in files:
        fits = 0 <= file.nbytes <= FILE_BYTES_MAX and _SHA256.fullmatch(file.sha256) is not None
        require(fits, f"{file.name!r} has {file.nbytes} bytes and sha256 {file.sha256!r}")


def _check_chunks(manifest: Manifest) -> None:
    position = (0, 0, 0)  # the file, index and offset that the next chunk must have
    for chunk in manifest.chunks:
        where = f"chunk {chunk.index} of file {chunk.file}"
        require((chunk.file, chunk.index, chunk.offset) == position, f"{where} at {chunk.offset} does not follow")
        file_bytes = manifest.files[chunk.file].nbytes
        end = chunk.offset + chunk.nbytes
        require(chunk.nbytes > 0 and end <= file_bytes, f"{where} does not lie in its file")
        require(end == file_bytes or end % ALIGNMENT == 0, f"{where} ends unaligned")
        count = ceil_div(chunk.nbytes, manifest.block_bytes)
        require(len(chunk.checksums) == count, f"{where} has {len(chunk.checksums)} checksums for {count} blocks")
        # All at once, as there may be a hundred thousand; one by one only to name the wrong one.
        if set(map(len, chunk.checksums)) != {_HASH_CHARS} or _HEX.fullmatch("".join(chunk.checksums)) is None:
            wrong = next(text for text in chunk.checksums if len(text) != _HASH_CHARS or not _HEX.fullmatch(text))
            raise _inconsistent(f"{where} has checksum {wrong!r}")
        position = (chunk.file + 1, 0, 0) if end == file_bytes else (chunk.file, chunk.index + 1, end)
        require(position[0] < len(manifest.files) or chunk is manifest.chunks[-1], f"{where} is not the last")
    require(position == (len(manifest.files), 0, 0), "the chunks do not cover the files")


def _check_segments(manifest: Manifest) -> None:
    ends = [file.header_bytes for file in manifest.files]
    names: set[str] = set()
    shards: dict[str, list[SegmentRecord]] = {}
    for segment in manifest.segments:
        wrong = _wrong_segment(segment, ends)
        if segment.global_shape:
            shards.setdefault(segment.name, []).append(segment)
        if segment.name in names and not (segment.global_shape and len(shards[segment.name]) > 1):
            wrong = "is listed twice"
        if wrong is not None:
            raise _inconsistent(f"tensor {segment.name!r} {wrong}")
        names.add(segment.name)
        ends[segment.file] += segment.nbytes
    for file, end in zip(manifest.files, ends, strict=True):
        require(end == file.nbytes, f"the tensors of {file.name} end at {end}, the file at {file.nbytes}")
    for name, rows in shards.items():
        wrong = _wrong_shards(rows)
        require(wrong is None, f"tensor {name!r} {wrong}")
    for alias, name in manifest.aliases.items():
        require(alias not in names and name in names, f"alias {alias!r} of {name!r} does not fit")


def _wrong_segment(segment: SegmentRecord, ends: Sequence[int]) -> str | None:
    """The fault of a segment in itself or after the segments before it, or None.  There may be a hundred thousand."""
    if segment.dtype not in DTYPES or segment.role not in ROLES:
        return f"is {segment.dtype}, {segment.role}"
    if not 0 <= segment.file < len(ends):
        return f"is in file {segment.file}"
    if _nbytes(segment) != segment.nbytes:
        return f"of shape {segment.shape} has {segment.nbytes} bytes"
    if segment.offset != ends[segment.file]:
        return f"at {segment.offset} leaves a hole or overlaps"
    if (segment.global_shape or segment.global_offset) and not _is_within(segment):
        return f"of shape {segment.shape} at {segment.global_offset} does not lie within {segment.global_shape}"
    return None


def _nbytes(segment: SegmentRecord) -> int | None:
    """Bytes of a segment by dtype and shape, or None if they exceed the limits of a file."""
    nbytes = DTYPES[segment.dtype].itemsize
    for extent in segment.shape:
        if not 0 <= extent < 1 << 63:  # no tensor has such a dimension, even beside one of 0
            return None
        nbytes = min(nbytes * extent, FILE_BYTES_MAX + 1)
    return nbytes if nbytes <= FILE_BYTES_MAX else None


def _is_within(shard: SegmentRecord) -> bool:
    if not len(shard.shape) == len(shard.global_shape) == len(shard.global_offset):
        return False
    rows = zip(shard.shape, shard.global_offset, shard.global_shape, strict=True)
    return all(offset >= 0 and offset + extent <= whole < 1 << 63 for extent, offset, whole in rows)


def _wrong_shards(rows: Sequence[SegmentRecord]) -> str | None:
    """The fault of the shards of one tensor, each of which is within it, or None.

    Boxes partition a box exactly if their signed corners add up to the corners of that box.  A corner counts +1 or -1
    by the number of its upper ends.
    """
    first = rows[0]
    whole = first.global_shape
    if any((row.dtype, row.role, row.global_shape) != (first.dtype, first.role, whole) for row in rows):
        return "has shards of several dtypes, roles or global shapes"
    if len({row.file for row in rows}) != len(rows):
        return "has two shards in one file"
    if 0 in whole:
        return None
    split = [dim for dim, extent in enumerate(whole) if any(row.shape[dim] != extent for row in rows)]
    if len(split) > SPLIT_DIMS_MAX:
        return f"is cut in {len(split)} dimensions, and at most {SPLIT_DIMS_MAX} are read"
    corners: Counter[tuple[int, ...]] = Counter()
    boxes = [((0,) * len(whole), whole, -1), *((row.global_offset, row.shape, 1) for row in rows)]
    for (offset, shape, sign), ends in product(boxes, product((0, 1), repeat=len(split))):
        corner = tuple(offset[dim] + shape[dim] * end for dim, end in zip(split, ends, strict=True))
        corners[corner] += sign * math.prod(-1 if end else 1 for end in ends)
    return "has shards that leave a hole or overlap" if any(corners.values()) else None
