"""Optimizers that are not as torch's own: wrapped, made without `super().__init__()`, with state in odd locations.

Each is the smallest class that does what a library's does; its docstring names one.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class Accelerated(Optimizer):
    """accelerate's AcceleratedOptimizer: an Optimizer whose own `__init__` is all that there is."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Lightning:
    """LightningOptimizer: no Optimizer, but of a class that is one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (Lightning, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Lookahead(Optimizer):
    """timm's Lookahead: hooks that its step does not call, and buffers in the state of the inner optimizer."""

    def __init__(self, base: Optimizer, every: int = 2) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base_optimizer = base
        self.param_groups = base.param_groups
        self.defaults = {}
        self.state = defaultdict(dict)
        self.every = every
        for group in self.param_groups:
            group.setdefault("count", 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for group in self.param_groups:
            group["count"] += 1
            if group["count"] % self.every == 0:
                for param in group["params"]:
                    state = self._base_optimizer.state[param]
                    slow = state.setdefault("slow", param.detach().clone())
                    slow.add_(param - slow, alpha=0.5)
                    param.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class Sam(Optimizer):
    """davda54's SAM: an optimizer with state of its own around another one."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = AdamW(self.param_groups, lr=0.01)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in params_of(self):
            self.state[param]["old"] = param.detach().clone()
            param.add_(0.01)
            param.copy_(self.state[param]["old"])
        self.base_optimizer.step()


class Unhooked(Optimizer):
    """An optimizer whose `__init__` skips `super().__init__()`, and which torch therefore cannot hook."""

    def __init__(self, params: Any) -> None:
        self.defaults = {}
        self.state = defaultdict(dict)
        self.param_groups = [{"params": list(params), "lr": 0.1}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in params_of(self):
            param.grad = None

    def state_dict(self) -> Any:
        return {"state": dict(enumerate(self.state.get(param, {}) for param in params_of(self))), "param_groups": []}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for param in params_of(self):
            if param.grad is not None:
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                param -= velocity.add_(param.grad) * self.param_groups[0]["lr"]


class Stateless(Optimizer):
    """The same without any state: nothing of it can be stored."""

    def __init__(self) -> None:
        self.mine = 1


class Counting(AdamW):
    """An optimizer whose `state_dict()` adds a key, which changes its steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.01)
        self.count = 0
        self.scale = torch.ones(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        self.scale = self.scale * 1.25
        for param in params_of(self):
            param.add_(0.001 * self.count)
        return super().step(closure)

    def state_dict(self) -> Any:
        return super().state_dict() | {"count": self.count, "scale": self.scale}

    def load_state_dict(self, state_dict: Any) -> None:
        state_dict = dict(state_dict)
        self.count, self.scale = state_dict.pop("count"), state_dict.pop("scale")
        super().load_state_dict(state_dict)


class Hiding(SGD):
    """An optimizer whose state is not in `state`, as one that shards it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.hidden: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for index, param in enumerate(params_of(self)):
            self.hidden.setdefault(index, torch.zeros_like(param)).add_(1)
        return super().step(closure)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "state": {index: {"hidden": each} for index, each in self.hidden.items()}}


def params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of all groups."""
    return (param for group in optimizer.param_groups for param in group["params"])
