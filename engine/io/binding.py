"""Binding: the compiled module `engine._native`, and the calls that need nothing else.

Theory of operation.  `native/engine_native.h` is the C interface.  This is the only importer of `engine._native`; the
rest of the engine takes `ffi`, `lib` and the constants from here.  Every call releases the GIL.
"""

from __future__ import annotations

import sys

from engine.format.plan import ALIGNMENT

try:
    from engine._native import ffi as ffi
    from engine._native import lib as lib
except ImportError as error:
    raise ImportError(
        f"the compiled module engine._native is missing; build it with 'pip install .' ({error})"
    ) from error

# Long enough to cost nothing, and short enough for a prompt Ctrl-C.
WAIT_SLICE_NS = 50_000_000

# The file of the compiled module.
NATIVE_PATH = str(sys.modules["engine._native"].__file__)

# The number of live jobs that a pipeline has room for, and of a job's files with a place in the ring's table.
JOBS_MAX: int = lib.ENG_JOBS_MAX
JOB_PLACES: int = lib.ENG_JOB_PLACES
DIMS_MAX: int = lib.ENG_DIMS_MAX

if lib.ENG_ALIGNMENT != ALIGNMENT:
    raise ImportError(
        f"the compiled module engine._native is of another version: it aligns blocks to {lib.ENG_ALIGNMENT} bytes, and "
        f"this one to {ALIGNMENT}; build it again with 'pip install .'"
    )


def block_checksum(block: bytes | bytearray | memoryview) -> bytes:
    """The content hash of a block with these stored bytes: XXH3-128 in canonical form."""
    view = ffi.from_buffer(block)
    return bytes(lib.eng_hash_bytes(view, len(view)).digest)


def allocate(descriptor: int, offset: int, nbytes: int) -> int:
    """Reserve the blocks of a range of a file (fallocate(2)); 0 or an errno.  Blocks, without the GIL."""
    return -int(lib.eng_allocate(descriptor, offset, nbytes))


def direct_alignment(descriptor: int) -> int:
    """The alignment that O_DIRECT requires on this file (statx(2)), or 0 if the kernel does not report it."""
    return int(lib.eng_direct_alignment(descriptor))
