"""Choices: hypothesis makes an example of the bytes of a fuzzer.

Theory of operation.  A test of hypothesis draws its values from a stream of choices.  `fuzz_one_input` takes the stream
from the bytes, so libFuzzer changes the choices and not the values.
"""

from __future__ import annotations

from typing import Any


def fuzz_one_input(test: Any, data: bytes) -> None:
    """Run a test that `given` has made, for the choices in these bytes; bytes that end too early are no example.

    The type that `given` declares lacks the attribute `hypothesis`, so the test is any object here.
    """
    test.hypothesis.fuzz_one_input(data)
