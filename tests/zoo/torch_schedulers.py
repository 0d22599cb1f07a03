"""Every scheduler of torch, whose state is stored in `extra`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog import training
from life import Run
from torch import optim
from torch.optim import lr_scheduler as schedulers
from torch_optimizers import Net, batch_loss

NOTE = "`extra={'scheduler': scheduler.state_dict()}`"


def train_scheduled(run: Run, make: Callable[[optim.Optimizer], Any], *steps: str) -> None:
    model = Net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    for _ in run.steps(model, optimizer, scheduler=scheduler):
        optimizer.zero_grad()
        loss = batch_loss(model)
        loss.backward()
        optimizer.step()
        scheduler.step(*([loss.item()] if "metric" in steps else []))


def _sequential(optimizer: optim.Optimizer) -> Any:
    parts: list[schedulers.LRScheduler] = [
        schedulers.LinearLR(optimizer, total_iters=3),
        schedulers.CosineAnnealingLR(optimizer, T_max=6),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


MAKE: dict[str, Callable[[optim.Optimizer], Any]] = {
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda n: 0.9**n),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=6),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=10),
    "SequentialLR": _sequential,
    "StepLR": lambda o: schedulers.StepLR(o, 3),
}


def _register(name: str, make: Callable[[optim.Optimizer], Any]) -> None:
    @training(f"torch.optim.lr_scheduler: {name}", note=NOTE)
    def scheduled(run: Run) -> None:
        train_scheduled(run, make)


for _name, _make in MAKE.items():
    _register(_name, _make)


@training("torch.optim.lr_scheduler: ReduceLROnPlateau", note=NOTE)
def plateau(run: Run) -> None:
    train_scheduled(run, lambda o: schedulers.ReduceLROnPlateau(o, patience=1), "metric")
