"""Generators: the random generators that an optimizer keeps for itself.

Theory of operation.  An optimizer that draws at random (a Hessian's trace, stochastic rounding) may have a generator of
its own in an attribute, or in a list or dict there.  No `state_dict()` of torch's has it, and a training that resumes
with a fresh one goes on differently, without an error.  So a checkpoint has the state of each under its place:

    0.generator          attribute `generator` of the optimizer
    1.rngs.2             the third of the list `rngs` of the first wrapper

They are looked for at every save, because an optimizer may replace them.

Rules: generators of the whole process are left alone; they belong in `engine.rng_state()`.  Called by `optimizers`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from engine.errors import MismatchError


def find_generators(holders: Iterable[object]) -> dict[str, Any]:
    """The generators in the attributes of some objects, by their places."""
    shared = _of_the_process()
    return {
        f"{position}.{place}": value
        for position, holder in enumerate(holders)
        for place, value in _members(holder)
        if _kind(value) and not any(value is each for each in shared)
    }


def read_generators(generators: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of generators, as values that a checkpoint can hold."""
    return {place: {"kind": _kind(each), "state": _state(each)} for place, each in generators.items()}


def check_generators(label: str, generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Refuse states of generators that are not here.  One here that has no state stays as it is.

    Raises:
        MismatchError: naming the first.
    """
    for place, saved in states.items():
        kind = _kind(generators.get(place))
        if not isinstance(saved, Mapping) or kind != saved.get("kind"):
            has = f"a {kind} generator" if kind else "no generator"
            raise MismatchError(
                f"the checkpoint's {label} has a random generator in its attribute {_attribute(place)!r}, and the "
                f"arena's has {has} there; make the optimizer as the run that was saved did"
            )


def put_generators(label: str, generators: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Put checked states back.

    Raises:
        MismatchError: a generator refuses its state.
    """
    for place, saved in states.items():
        try:
            _put(generators[place], saved["state"])
        except Exception as error:
            raise MismatchError(
                f"the random generator in the attribute {_attribute(place)!r} of {label} refuses the state that it "
                f"had: {type(error).__name__}: {error}"
            ) from error


def _attribute(place: str) -> str:
    return place.partition(".")[2]


def _members(holder: object) -> Iterator[tuple[str, object]]:
    """The attributes of an object, and the items of those that are containers, with their places."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        if name in ("state", "param_groups"):  # which hold tensors and options
            continue
        yield name, value
        if isinstance(value, list | tuple):
            yield from ((f"{name}.{index}", each) for index, each in enumerate(value))
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", each) for key, each in list(value.items()))


def _kind(value: object) -> str:
    """The library of a generator; "" if the value is none."""
    if isinstance(value, torch.Generator):
        return "torch"
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # which has no state
        return "python"
    numpy = sys.modules.get("numpy")  # a generator of numpy's has imported it
    if numpy is None:
        return ""
    return "numpy" if isinstance(value, (numpy.random.Generator, numpy.random.RandomState)) else ""


def _of_the_process() -> list[object]:
    numpy = sys.modules.get("numpy")
    shared: list[object] = [torch.default_generator, getattr(random, "_inst", None)]
    return [*shared, numpy.random.mtrand._rand] if numpy is not None else shared


def _state(generator: Any) -> object:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.bit_generator.state


def _put(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
