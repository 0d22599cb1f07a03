"""Limits: what an input of the fuzz targets may cost.

Theory of operation.  `allocating_at_most` counts what Python's allocators hand out (tracemalloc), msgspec's objects
included, and fails if at any moment more is taken than the bound.  Memory of torch and of the native thread is not
counted there: long runs hold it with libFuzzer's limit on the process, which is also what ends a hang (`run`).
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

# What any input may take, however short: error messages, an exception's frames, the caches of `re` and msgspec.
CONSTANT_BYTES = 256 << 10


@contextmanager
def allocating_at_most(nbytes: int) -> Iterator[None]:
    """Fail if the block ever holds more than this, and a constant, beyond what was there before."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= nbytes + CONSTANT_BYTES, f"{peak} bytes were allocated, and {nbytes} are the bound"
