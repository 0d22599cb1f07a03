"""Any bytes are a manifest that holds together, or CorruptError or NewerFormatError, within 64 bytes of memory a byte.

A decoded manifest encodes and decodes to itself, has a geometry that partitions its files into blocks with one checksum
each, and names no file outside its directory.

An input that begins with a NUL is choices for hypothesis: a manifest with one field changed and the digest right.  One
that begins as a manifest.json is taken as it is, and any other as the body of one whose digest is right.
"""

from __future__ import annotations

import os

from hypothesis import given
from strategies import nearly_valid, sealed

from engine.errors import CorruptError, NewerFormatError
from engine.format.manifest import Manifest, Summary, block_checksums, decode, decode_summary, encode
from fuzz.choices import fuzz_one_input
from fuzz.limits import allocating_at_most

# An empty object is 3 bytes of JSON with its comma, and 64 of memory and 8 in its list; one that holds something is 7
# and 232.  Lists grow by an eighth at a time, and the tables of `_validate` come on top.
BYTES_PER_BYTE = 64


def one_input(data: bytes) -> None:
    """Hold the invariant for one input."""
    if data.startswith(b"\0"):
        fuzz_one_input(changed, data[1:])
    elif data.startswith(b'{"sha256":"'):
        check(data)
    else:
        check(sealed(data))


@given(nearly_valid())
def changed(raw: bytes) -> None:
    """The invariant, for a manifest with one field changed."""
    check(raw)


def check(raw: bytes) -> None:
    """The invariant, for the bytes of a file."""
    with allocating_at_most(BYTES_PER_BYTE * len(raw)):
        try:
            manifest = decode(raw)
        except (CorruptError, NewerFormatError):
            return
    assert decode(encode(manifest)) == manifest
    summary = decode_summary(raw)
    assert all(getattr(summary, name) == getattr(manifest, name) for name in Summary.__struct_fields__)
    check_geometry(manifest)
    for file in manifest.files:
        assert os.path.normpath(file.name) == os.path.basename(file.name) == file.name and "\0" not in file.name


def check_geometry(manifest: Manifest) -> None:
    """Blocks partition files, and there is a checksum for each."""
    plan = manifest.geometry(manifest.chunks)
    assert len(plan.blocks) == len(block_checksums(manifest.chunks))
    ends = [0] * len(plan.files)
    for block in plan.blocks:
        assert 0 < block.nbytes <= manifest.block_bytes and block.file_offset == ends[block.file_index]
        ends[block.file_index] += block.nbytes
    assert ends == [file.nbytes for file in plan.files]
