"""Checks of a `Begin` before a file is made of it.

Theory of operation.  A monitor makes the files that a message names, and writes blocks where it says.  A trainer with a
fault must not have it write elsewhere, or exhaust it.  So names are plain names, and chunks follow each other and cover
the files.  What the manifest holds besides is the trainer's, and is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.format.checks import FILE_BYTES_MAX, MANIFEST_NAME, STEP_MAX
from engine.format.manifest import FileRecord
from engine.format.plan import ALIGNMENT
from engine.monitor.protocol import Begin


def check_begin(begin: Begin, slot_bytes: int) -> None:
    """See above.

    Raises:
        ValueError: the message contradicts itself, or the monitor's slots.
    """
    _require(0 <= begin.step <= STEP_MAX, f"step {begin.step}")
    _require(begin.block_bytes == slot_bytes, f"blocks of {begin.block_bytes} bytes, and slots of {slot_bytes}")
    names = [*(file.name for file in begin.files), *begin.user_files, *begin.small_files]
    for name in names:
        is_plain = len(name) > 0 and not {"/", "\0"} & set(name) and name not in (".", "..", MANIFEST_NAME)
        _require(is_plain, f"a file named {name!r}")
    _require(len(set(names)) == len(names), "a file that is named twice")
    _require(set(begin.untrained) <= {file.name for file in begin.files}, "an untrained file that is not there")
    for file in begin.files:
        _require(0 <= file.header_bytes <= file.nbytes <= FILE_BYTES_MAX, f"{file.name} with {file.nbytes} bytes")
    _require(len(begin.layers) == len(begin.chunks), "layers of other chunks")
    _check_chunks(begin.chunks, begin.files)


def _check_chunks(chunks: Sequence[tuple[int, int, int, int]], files: Sequence[FileRecord]) -> None:
    """As in a manifest: each follows the one before it, and together they cover the files."""
    position = (0, 0, 0)  # the file, index and offset that the next chunk must have
    for file, index, offset, nbytes in chunks:
        _require((file, index, offset) == position and file < len(files), f"chunk {index} of file {file} at {offset}")
        end, size = offset + nbytes, files[file].nbytes
        fits = nbytes > 0 and end <= size and (end == size or end % ALIGNMENT == 0)
        _require(fits, f"chunk {index} of file {file} with {nbytes} bytes")
        position = (file + 1, 0, 0) if end == size else (file, index + 1, end)
    _require(position == (len(files), 0, 0), "chunks that do not cover the files")


def _require(truth: bool, what: str) -> None:
    if not truth:
        raise ValueError(f"the trainer has asked for a save with {what}")
