"""A tensor subclass as 8-bit optimizers have it, and an optimizer whose state it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


class Coded(Tensor):
    """Floats as codes of 8 bits and one scale.  It has no memory of its own."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, floats: Tensor) -> Coded:
        scale = floats.abs().max().clamp(min=1e-12) / 127
        return cls((floats / scale).round().to(torch.int8), scale)

    def floats(self) -> Tensor:
        return self.codes.float() * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: None, size: object, stride: object) -> Coded:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func is torch.ops.aten.copy_.default:
            source = args[1] if isinstance(args[1], cls) else cls.of(args[1])
            args[0].codes.copy_(source.codes)
            args[0].scale.copy_(source.scale)
            return args[0]
        plain = tree_map(lambda value: value.floats() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class CodedSgd(Optimizer):
    """SGD whose momentum is coded.  It makes its state in its first step."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = Coded.of(torch.zeros_like(param))
                state["momentum"].copy_(state["momentum"].floats() * 0.9 + param.grad)
                param -= group["lr"] * state["momentum"].floats()
