"""Packing: rows of Python integers as the arrays of C structs that native code reads.

Theory of operation.  A plan's extents, blocks and sources are the same for every save of an arena, so they are packed
once and handed to native code as they are.  Each `Packed` owns its bytes; cffi's view of them lives as long as it does.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from engine.format.plan import Source
from engine.io.binding import BLOCK, DIMS_MAX, EXTENT, SOURCE, ffi


class Packed(NamedTuple):
    """Rows as the C structs they stand for: `memory` holds `row_count` of them, `pointer` is cffi's view of it."""

    memory: bytes
    pointer: Any
    row_count: int


def pack_extents(
    source_offsets: Sequence[int], block_offsets: Sequence[int], nbytes: Sequence[int], sources: Sequence[int]
) -> Packed:
    """Pack extents, given in columns.  Packs whole columns, because there may be a hundred thousand."""
    offset_halves = array("I", array("Q", source_offsets).tobytes())
    columns = (offset_halves[0::2], offset_halves[1::2], block_offsets, nbytes, sources)
    words_each = EXTENT.size // offset_halves.itemsize
    words = array("I", bytes(EXTENT.size * len(nbytes)))
    for index, column in enumerate(columns):
        words[index::words_each] = array("I", column)
    return _pack("eng_extent", EXTENT, words.tobytes())


def pack_blocks(rows: Iterable[tuple[int, int, int, int, int]]) -> Packed:
    """Pack rows of (file_offset, nbytes, file, extent_start, extent_count)."""
    return _pack("eng_block", BLOCK, b"".join([BLOCK.pack(*row) for row in rows]))


def pack_sources(sources: Iterable[Source]) -> Packed:
    """Pack sources; the caller keeps their memory alive."""
    rows = []
    for source in sources:
        ndim = len(source.shape)
        assert ndim == len(source.stride) <= DIMS_MAX, source
        rest = (0,) * (DIMS_MAX - ndim)
        dims = (*source.shape, *rest, *source.stride, *rest)
        rows.append(SOURCE.pack(source.address, source.nbytes, source.itemsize, ndim, *dims))
    return _pack("eng_source", SOURCE, b"".join(rows))


def address_of(memory: bytes | bytearray) -> int:
    """The address of an object's bytes, valid while the object lives and is not resized."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))


def pack_order(blocks: Sequence[int]) -> Packed:
    """Pack block indices."""
    return _pack("uint32_t", struct.Struct("=I"), struct.pack(f"={len(blocks)}I", *blocks))


def _pack(ctype: str, row: struct.Struct, memory: bytes) -> Packed:
    assert len(memory) % row.size == 0
    return Packed(memory, ffi.from_buffer(f"{ctype}[]", memory), len(memory) // row.size)
