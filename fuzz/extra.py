"""Any JSON is a value of `extra`, or raises CorruptError, within 96 bytes of memory for each of its bytes.

A dtype that only a later torch has raises PlatformError.  A decoded value encodes again, and the encoding decodes to a
value with the same encoding.

An input that begins with a NUL is choices for hypothesis: tags and payloads that often fit.  Any other is JSON text.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from strategies import tagged

from engine.errors import CorruptError, PlatformError
from engine.state.tensors import decode, encode
from fuzz.choices import fuzz_one_input
from fuzz.limits import allocating_at_most

# An empty set or frozenset is 10 to 16 bytes of JSON, and 216 of memory, as much again while it is made of another, and
# 232 of the object it is read from; a pair of a dict is 7, and 56 and 32 in lists, 104 in the dict and 88 in spots.
BYTES_PER_BYTE = 96


def one_input(data: bytes) -> None:
    """Hold the invariant for one input."""
    if data.startswith(b"\0"):
        fuzz_one_input(changed, data[1:])
    else:
        check(data)


@given(tagged())
def changed(tree: Any) -> None:
    """The invariant, for JSON that looks like a value."""
    check(json.dumps(tree).encode())


def check(text: bytes) -> None:
    """The invariant, for JSON text; other input is skipped."""
    with allocating_at_most(BYTES_PER_BYTE * len(text)):
        try:
            value = decode(msgspec.json.decode(text))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, CorruptError, PlatformError):
            return
    encoded = encode(value)
    assert encode(decode(encoded)) == encoded
