"""Limits: the memory that one input of a fuzz target may take.

Theory of operation.  `allocating_at_most` counts the memory of Python's allocators (tracemalloc), msgspec's objects
included, and fails if the bound is exceeded at any moment.  It does not count memory of torch and the native thread.
Long runs bound these with libFuzzer's limit on the process, which also ends hangs (`run`).
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

# The allowance of any input, however short: error messages, an exception's frames, the caches of `re` and msgspec.
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
