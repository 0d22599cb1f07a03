"""Watch: tells whether containers and tensors are still as one walk saw them.

Theory of operation.  Every save begins with this look, in the training's own time.  A watch keeps what the walk saw in
flat lists and compares the present with them.  Each comparison is one loop inside the interpreter (`map` over methods
of torch and functions of `operator`), so no Python frame runs for a tensor.  Decision 0014 has the measurements.

Containers are compared by the identity of their members.  The lists keep those members alive, so no other object can
take the address of one.  Tensors are compared by the answers of `_QUESTIONS`.  All questions are put to one tensor
before the next, because most of the time is spent on fetching the tensor from memory.

Rules: a look changes nothing, so an interrupted look leaves nothing half done.  An Exception during a look is a
difference: the walk that follows meets its cause again and reports it.  A change that is reverted before the next look
is not noticed.  Called by `inventory`, which watches containers, and by `arena`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

from torch import Tensor

_Getter = Callable[[Any], object]

# All that can change of a tensor without another object taking its place.  The last two are False for every tensor that
# an arena accepts.
_QUESTIONS: tuple[_Getter, ...] = (
    Tensor.data_ptr,
    Tensor.stride,
    attrgetter("dtype"),
    attrgetter("shape"),
    Tensor.is_conj,
    Tensor.is_neg,
)
_is_trained = attrgetter("requires_grad")


class ContainerWatch:
    """Notices that a container of a walk no longer holds the same objects in the same order."""

    def __init__(self) -> None:
        self._watchable = True
        self._members: dict[_Getter, tuple[list[object], list[object]]] = {}  # owners, and what each had
        self._dicts: list[dict[Any, Any]] = []
        self._dict_sizes: list[int] = []
        self._dict_items: list[object] = []  # keys and values in turn
        self._lists: list[Sequence[object]] = []
        self._list_sizes: list[int] = []
        self._list_items: list[object] = []
        self._sets: list[set[str]] = []
        self._set_copies: list[frozenset[str]] = []

    def member(self, getter: _Getter, owner: object) -> None:
        """Watch for another object where `getter` leads to.  A getter is defined once, for many owners."""
        owners, seen = self._members.setdefault(getter, ([], []))
        owners.append(owner)
        seen.append(getter(owner))

    def mapping(self, owner: dict[Any, Any]) -> None:
        """Watch the keys, values and insertion order of a dictionary.  A mapping of another kind is always changed.

        The order that `OrderedDict.move_to_end` makes is not the insertion order, and is not watched.
        """
        if not isinstance(owner, dict):
            self._watchable = False
            return
        items = list(dict.items(owner))
        self._dicts.append(owner)
        self._dict_sizes.append(len(items))
        self._dict_items.extend(chain.from_iterable(items))

    def sequence(self, items: Sequence[object]) -> None:
        """Watch the items of a list."""
        held = list(items)
        self._lists.append(items)
        self._list_sizes.append(len(held))
        self._list_items.extend(held)

    def names(self, names: set[str]) -> None:
        """Watch the members of a set of strings."""
        self._sets.append(names)
        self._set_copies.append(frozenset(names))

    def unchanged(self) -> bool:
        """Whether every container holds what it held."""
        try:
            return self._watchable and self._same_members() and self._same_dicts() and self._same_lists_and_sets()
        except Exception:
            return False

    def _same_members(self) -> bool:
        return all(all(map(is_, map(getter, owners), seen)) for getter, (owners, seen) in self._members.items())

    def _same_dicts(self) -> bool:
        # With equal sizes, the flat lists are equal only if each dictionary is.  dict.items ignores a subclass's order.
        items = chain.from_iterable(chain.from_iterable(map(dict.items, self._dicts)))
        return list(map(len, self._dicts)) == self._dict_sizes and all(map(is_, items, self._dict_items))

    def _same_lists_and_sets(self) -> bool:
        return (
            list(map(len, self._lists)) == self._list_sizes
            and all(map(is_, chain.from_iterable(self._lists), self._list_items))
            and all(map(eq, self._sets, self._set_copies))
        )


class TensorWatch:
    """Notices that a tensor has other memory, another form (`tensor.data = other`), or is no longer trained.

    Args:
        tensors: all of them, none of a kind that an arena refuses.
        params: those of them whose `requires_grad` matters.
    """

    def __init__(self, tensors: Collection[Tensor], params: Iterable[Tensor]) -> None:
        self._tensors = tensors
        self._params = list(params)
        # Most tensors of a training share few shapes and strides, so equal answers are kept once.
        known: dict[object, object] = {}
        self._seen = [[known.setdefault(a, a) for a in map(question, tensors)] for question in _QUESTIONS]
        self._trained = list(map(_is_trained, self._params))

    def unchanged(self) -> bool:
        """Whether every tensor is as it was."""
        try:
            return all(map(eq, self._answers(), zip(*self._seen, strict=True))) and self._trained == list(
                map(_is_trained, self._params)
            )
        except Exception:
            return False

    def _answers(self) -> Iterator[tuple[object, ...]]:
        return zip(*(map(question, self._tensors) for question in _QUESTIONS), strict=True)
