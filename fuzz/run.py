"""Run one fuzz target under atheris: `python fuzz/run.py TARGET [libFuzzer's arguments]`.

Theory of operation.  A target is a module of this package with a function `one_input(data)`, which returns or raises.
The hook of atheris imports everything of `engine`, and adds the counters that lead libFuzzer to new branches.
libFuzzer ends the process if an input takes too much time or memory, and keeps the input.
"""

from __future__ import annotations

import importlib
import logging
import sys

import atheris


def main() -> None:
    """Import the target named first, and give it to libFuzzer with the other arguments."""
    program, target, *arguments = sys.argv
    logging.disable()  # a save that fails is logged, and most do
    with atheris.instrument_imports(include=["engine"]):
        one_input = importlib.import_module(f"fuzz.{target}").one_input
    atheris.Setup([program, *arguments], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
