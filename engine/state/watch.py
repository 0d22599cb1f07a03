"""Watch: whether the containers and the tensors of a training are as a walk has seen them.

Theory of operation.  Every save asks, in the training's own time, so what was seen is kept as one array of words that
native code walks (engine_native.h says what the words mean): some 0.4 us a tensor.  An object is told by its
address, so each one is kept alive as long as the watch is, or another could come to lie where it was.

Tensors are asked through DLPack's exchange table.  A torch that has none, or a tensor that DLPack has no words for, and
all of them are looked at in Python instead, which takes three times as long.

Rules: nothing is changed here; a difference is only ever found, and what it means is for a new walk to say.  What may
be missed is what is undone before anybody asks.  Called by `gather`, which watches containers, and `arena`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Sequence, Sized
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from engine.io.watching import Grad, Watched, describe_tensors, exchange_address, same_containers, same_tensors


class ContainerWatch:
    """Notices when one of the containers of a walk no longer holds the very same objects."""

    def __init__(self) -> None:
        self._words = array("Q")
        self._kept: list[object] = []
        self._answers: list[tuple[Callable[[], object], object]] = []

    def size(self, container: Sized) -> None:
        """Watch for additions and removals."""
        self._add(container, Watched.SIZE, len(container))

    def members(self, owner: dict[Any, Any], *keys: str) -> None:
        """Watch for other objects under these keys; None and nothing are the same."""
        self._add(owner, Watched.MEMBERS, len(keys), [each for key in keys for each in (key, owner.get(key))])

    def mapping(self, owner: dict[Any, Any]) -> None:
        """Watch a whole dictionary and its order; not what `OrderedDict.move_to_end` adds to that, which names nothing
        anew.  What is no dictionary is never unchanged.
        """
        items = list(dict.items(owner)) if isinstance(owner, dict) else []  # as native code walks it
        self._add(owner, Watched.DICT, len(items), [each for item in items for each in item])

    def sequence(self, items: list[Any]) -> None:
        """Watch a whole list."""
        held = list(items)  # another thread may change it: what native code walks must agree with itself
        self._add(items, Watched.LIST, len(held), held)

    def answer(self, question: Callable[[], object]) -> None:
        """Watch for an answer to a question that is not equal."""
        self._answers.append((question, question()))

    def unchanged(self) -> bool:
        """Whether nothing happened."""
        return same_containers(self._words) and all(question() == seen for question, seen in self._answers)

    def _add(self, container: Sized, watched: Watched, size: int, items: Sequence[object] = ()) -> None:
        self._words.extend((id(container), watched, size))
        self._words.extend(map(id, items))
        self._kept.append(container)
        self._kept.extend(items)


class TensorWatch:
    """Notices when a tensor no longer lies as it lay (`tensor.data = other`), or is no longer trained.

    Args:
        tensors: all of them, none of a kind that an arena refuses.
        params: those of them whose `requires_grad` matters.
    """

    def __init__(self, tensors: Sequence[Tensor], params: Iterable[Tensor]) -> None:
        self._tensors = tensors
        # What is refused, and neither way of looking sees: the imaginary part of a conjugate is a view with a stride.
        self._lazy = [tensor for tensor in tensors if tensor.is_complex() or not tensor.is_contiguous()]
        param_ids = {id(param) for param in params}
        self._exchange = _exchange()
        self._words = _words(tensors, param_ids)
        self._looks: list[tuple[Tensor, bool, _Look]] | None = None
        if self._exchange is None or not describe_tensors(self._exchange, self._words):
            asked = [(tensor, id(tensor) in param_ids) for tensor in tensors]
            self._looks = [(tensor, is_param, _look(tensor, is_param)) for tensor, is_param in asked]

    def unchanged(self) -> bool:
        """Whether nothing happened."""
        if self._looks is None:
            assert self._exchange is not None
            same = same_tensors(self._exchange, self._words)
        else:
            same = all(_look(tensor, is_param) == look for tensor, is_param, look in self._looks)
        return same and not any(tensor.is_conj() or tensor.is_neg() for tensor in self._lazy)


def _exchange() -> int | None:
    """The address of torch's exchange table, if this torch has one."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return None if capsule is None else exchange_address(capsule)


def _words(tensors: Iterable[Tensor], param_ids: Collection[int]) -> array[int]:
    """What is known of tensors before native code has described them."""
    words = array("Q")
    for tensor in tensors:
        grad = Grad.IGNORED
        if id(tensor) in param_ids:
            grad = Grad.WANTED if tensor.requires_grad else Grad.UNWANTED
        ndim = tensor.dim()
        words.extend((id(tensor), grad, 0, 0, ndim, *(0,) * (2 * ndim)))
    return words


_Look = tuple[int, tuple[int, ...], tuple[torch.dtype, torch.Size], bool | None]
_dtype_shape = attrgetter("dtype", "shape")


def _look(tensor: Tensor, is_param: bool) -> _Look:
    """All that can change of where and how a tensor lies, and whether it is trained, if that matters."""
    return tensor.data_ptr(), tensor.stride(), _dtype_shape(tensor), tensor.requires_grad if is_param else None
