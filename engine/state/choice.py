"""Choice: the part of a training that an arena holds.

Theory of operation.  `only=` names the tensors that an arena holds, and `exclude=` those that it leaves out, by the
patterns of `select`.  ``only="trained"`` is for a training that changes little of its model, such as LoRA.  It holds
what the training can change, so that a resume is bit-identical if the rest is loaded separately:

    parameters that the optimizer trains    their state    all persistent buffers, because a forward may write to any

Rules: the tensors of one memory (tied weights) are held if one of them is.  A tensor that is left out is neither moved
nor refused.  Called by `inventory` and `arena`.
"""

from __future__ import annotations

from engine.state.select import Named, Select, Selection


class Choice:
    """What `only=` and `exclude=` hold.

    Raises:
        ArgumentError: one of them is no pattern and no list of patterns.
    """

    def __init__(self, only: Select = None, exclude: Select = None) -> None:
        self.is_trained_only = only == "trained"
        self.is_all = only is None and exclude is None
        self._only = Selection(None if self.is_trained_only else only, "only")
        self._exclude = None if exclude is None else Selection(exclude, "exclude")

    def has(self, item: Named, is_trained: bool) -> bool:
        """Whether a tensor is held; `is_trained` says whether the optimizer's step writes to it."""
        if self.is_trained_only and item.role == "model" and not is_trained:
            return False
        return self._only.has(item) and (self._exclude is None or not self._exclude.has(item))
