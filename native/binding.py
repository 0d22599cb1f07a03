"""Write the C of the compiled module `engine._native`; CMake runs this while it builds.

Theory of operation.  `engine_native.h` alone describes the C interface.  The compiler reads all of it, and cffi
reads it without the preprocessor's lines, which cffi does not understand.  The module is cffi's
out-of-line API mode, so the compiler checks every declaration against the same header.

Usage: python binding.py engine_native.h _native.c
"""

from __future__ import annotations

import sys
from pathlib import Path

import cffi


def declarations(header: str) -> str:
    """The header without its preprocessor lines, each left blank so that cffi's errors name the right line."""
    return "\n".join("" if line.lstrip().startswith("#") else line for line in header.splitlines())


def main(header_path: str, output_path: str) -> None:
    """Read the header at `header_path` and write the module's C to `output_path`."""
    ffi = cffi.FFI()
    ffi.cdef(declarations(Path(header_path).read_text(encoding="utf-8")))
    ffi.set_source("engine._native", '#include "engine_native.h"')
    ffi.emit_c_code(output_path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
