"""Every optimizer of torch, on one small network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from catalog import training
from life import Run
from torch import Tensor, nn, optim


class Net(nn.Module):
    """Parameters of one, two and four dimensions, a frozen one, and module buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        out: Tensor = self.head(self.drop(torch.relu(self.hidden(features))))
        return out


def batch_loss(model: nn.Module) -> Tensor:
    """The loss of random images, of which the global generator decides."""
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
    return nn.functional.cross_entropy(model(images), labels)


def train(run: Run, model: nn.Module, optimizer: Any, loss_of: Callable[[nn.Module], Tensor] = batch_loss) -> None:
    """The plainest loop."""
    for _ in run.steps(model, optimizer):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


Make = Callable[[Iterable[Tensor]], optim.Optimizer]

VARIANTS: dict[str, Make] = {
    "Adadelta": lambda params: optim.Adadelta(params),
    "Adafactor": lambda params: optim.Adafactor(params),
    "Adagrad": lambda params: optim.Adagrad(params),
    "Adam": lambda params: optim.Adam(params),
    "Adam, amsgrad, foreach": lambda params: optim.Adam(params, amsgrad=True, foreach=True),
    "Adam, fused": lambda params: optim.Adam(params, fused=True),
    "Adam, capturable, tensor lr": lambda params: optim.Adam(params, lr=torch.tensor(1e-3), foreach=False),
    "Adamax": lambda params: optim.Adamax(params),
    "AdamW": lambda params: optim.AdamW(params),
    "ASGD": lambda params: optim.ASGD(params),
    "NAdam": lambda params: optim.NAdam(params),
    "RAdam": lambda params: optim.RAdam(params),
    "RMSprop": lambda params: optim.RMSprop(params),
    "RMSprop, centered, momentum": lambda params: optim.RMSprop(params, momentum=0.9, centered=True),
    "Rprop": lambda params: optim.Rprop(params),
    "SGD": lambda params: optim.SGD(params, lr=0.1),
    "SGD, nesterov": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}


def _register(name: str, make: Make) -> None:
    @training(f"torch.optim: {name}")
    def plain(run: Run) -> None:
        model = Net()
        train(run, model, make(model.parameters()))


for _name, _make in VARIANTS.items():
    _register(_name, _make)


@training("torch.optim: LBFGS")
def lbfgs(run: Run) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, history_size=5, line_search_fn="strong_wolfe")
    inputs = torch.randn(32, 6)
    targets = inputs.sum(1, keepdim=True).sin()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for _ in run.steps(model, optimizer):
        optimizer.step(closure)


@training("torch.optim: SparseAdam")
def sparse_adam(run: Run) -> None:
    model = nn.Embedding(50, 8, sparse=True)
    optimizer = optim.SparseAdam(model.parameters())
    train(run, model, optimizer, lambda m: m(torch.randint(50, (6,))).square().mean())


@training("torch.optim: Muon, and AdamW for the rest", note="both: `adopt(model, [muon, adamw])`")
def muon(run: Run) -> None:
    model = Net()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    rest = [param for param in model.parameters() if param.ndim != 2]
    optimizers = [optim.Muon(matrices, lr=0.02), optim.AdamW(rest)]
    for _ in run.steps(model, optimizers):
        model.zero_grad()
        batch_loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()


@training("torch.optim: subclass with options of its own")
def subclass(run: Run) -> None:
    class Warmed(optim.AdamW):
        """Scales its gradients by a count that only its `state_dict()` holds."""

        count = 0

        def step(self, closure: Any = None) -> Any:
            self.count += 1
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.mul_(min(1.0, self.count / 5))
            return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]
            super().load_state_dict({key: value for key, value in state.items() if key != "count"})

    model = Net()
    train(run, model, Warmed(model.parameters(), weight_decay=0.1))


@training("torch.optim: subclass whose state_dict() has one more key")
def one_more_key(run: Run) -> None:
    class Counting(optim.AdamW):
        """Decays its learning rate by a count of `zero_grad()`; the step is torch's."""

        count = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.count += 1
            for group in self.param_groups:
                group["lr"] = 1e-2 / self.count
            super().zero_grad(set_to_none)

        def state_dict(self) -> dict[str, Any]:
            return super().state_dict() | {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]
            super().load_state_dict({key: value for key, value in state.items() if key != "count"})

    model = Net()
    train(run, model, Counting(model.parameters()))


@training("torch.optim: own optimizer with nested state")
def nested(run: Run) -> None:
    class History(optim.Optimizer):
        """Averages its last gradients, which it keeps in a list in a dict."""

        def __init__(self, params: Iterable[Tensor]) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        past = self.state[param].setdefault("past", {"grads": []})["grads"]
                        past.append(param.grad.clone())
                        del past[:-3]
                        param.sub_(sum(past) / len(past), alpha=group["lr"])

    model = Net()
    train(run, model, History(model.parameters()))


@training("torch.optim: SAM around SGD", note="`adopt` gets the optimizer whose `step()` is called last")
def sam(run: Run) -> None:
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained = [param for param in model.parameters() if param.requires_grad]
    for _ in run.steps(model, optimizer):
        images, labels = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            moves = [0.05 * param.grad / (param.grad.norm() + 1e-12) for param in trained if param.grad is not None]
            for param, move in zip(trained, moves, strict=True):
                param.add_(move)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for param, move in zip(trained, moves, strict=True):
                param.sub_(move)
        optimizer.step()


@training("torch.optim: groups with options of their own")
def groups(run: Run) -> None:
    model = Net()
    optimizer = optim.AdamW(model.conv.parameters(), lr=1e-2)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3, "betas": (0.8, 0.9)})
    train(run, model, optimizer)
