"""Rng: the state of every random generator of a training, as values that a checkpoint's `extra` can hold.

Theory of operation.  Python's generator, numpy's global one (if numpy was imported), torch's default one for the CPU,
and those of CUDA devices (if CUDA was used).  Their states are tuples, arrays and tensors; here they become a dict of
plain values and CPU tensors.  Generators that a training makes for itself, such as a DataLoader's, are its own to
store.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import ArgumentError


def rng_state() -> dict[str, Any]:
    """The state of the random generators of this process, for `extra`; `set_rng_state` puts it back.

    Python's, torch's, numpy's global one if numpy was imported, and those of all CUDA devices if CUDA was initialised.
    Does not block, except that the states of CUDA devices are copied to the host.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (kind, torch.from_numpy(keys.copy()), int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back the result of `rng_state`, also of another process.

    Raises:
        ArgumentError: this is no such state, or it holds a generator that this process lacks.
    """
    try:
        random.setstate(state["python"])
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy

            kind, keys, *rest = state["numpy"]
            numpy.random.set_state((kind, keys.numpy(), *rest))
        if "cuda" in state:
            torch.cuda.set_rng_state_all(state["cuda"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ImportError) as error:
        raise ArgumentError(
            f"the random state could not be put back ({error}); pass what engine.rng_state() returned, in a process "
            "that has the same generators"
        ) from None
