"""Binding: the compiled module `engine._native`, and the calls that need nothing else.

Theory of operation.  `native/engine_native.h` is the C interface.  This is the only importer of `engine._native`; the
rest of the engine takes `ffi`, `lib` and the constants from here.  Every call releases the GIL.

A module that was not built again after a change, or an installation of mixed versions, would misread what Python packs.
So the version of the interface and the sizes of the structs are compared once, at import.
"""

from __future__ import annotations

import struct
import sys

from engine.format.plan import ALIGNMENT

_REBUILD = "run `make setup` in a source tree, or install the package again (pip install --force-reinstall)"

try:
    from engine._native import ffi as ffi
    from engine._native import lib as lib
except ImportError as error:
    raise ImportError(f"the compiled module engine._native is missing ({error}); {_REBUILD}") from error

# The file of the compiled module.
NATIVE_PATH = str(sys.modules["engine._native"].__file__)

# The interface that the Python files are written for: ENG_VERSION of native/engine_native.h.
_VERSION = 6
_found = getattr(lib, "ENG_VERSION", None)
if _found != _VERSION:
    raise ImportError(f"{NATIVE_PATH} has version {_found} of the native interface, and not {_VERSION}; {_REBUILD}")

# Long enough to cost nothing, and short enough for a prompt Ctrl-C.
WAIT_SLICE_NS = 50_000_000

# The number of live jobs that a pipeline has room for, and of a job's files with a place in the ring's table.
JOBS_MAX: int = lib.ENG_JOBS_MAX
JOB_PLACES: int = lib.ENG_JOB_PLACES
DIMS_MAX: int = lib.ENG_DIMS_MAX

# The structs that `packing` fills, as native code reads them.
EXTENT = struct.Struct("=QIIII")
BLOCK = struct.Struct("=QIIII")
SOURCE = struct.Struct(f"=QQII{2 * DIMS_MAX}q")

_agreed = {"eng_extent": EXTENT.size, "eng_block": BLOCK.size, "eng_source": SOURCE.size}
_differing = [name for name, nbytes in _agreed.items() if ffi.sizeof(name) != nbytes]
_differing += ["ENG_ALIGNMENT"] if lib.ENG_ALIGNMENT != ALIGNMENT else []
if _differing:
    raise ImportError(f"{NATIVE_PATH} differs from the Python files in {', '.join(_differing)}; {_REBUILD}")


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


def memory_checksum(address: int, nbytes: int) -> bytes:
    """The content hash of memory that the caller keeps alive.  Blocks, without the GIL."""
    return bytes(lib.eng_hash_bytes(ffi.cast("void *", address), nbytes).digest)
