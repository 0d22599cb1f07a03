"""Models, averages and schedulers of timm."""

from __future__ import annotations

from typing import Any

import torch
from catalog import training
from life import Run
from torch import nn, optim
from torch_models import Both
from torch_optimizers import Net, batch_loss


def train_image_model(run: Run, name: str, **options: Any) -> None:
    import timm
    from timm.utils import ModelEmaV3

    model = timm.create_model(name, num_classes=4, **options).to(memory_format=torch.channels_last)
    average = ModelEmaV3(model, decay=0.9)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for step in run.steps(Both(model, average), optimizer):
        images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.randint(4, (2,))).backward()
        optimizer.step()
        average.update(model, step=step)


@training("timm: ResNet, channels_last, ModelEmaV3", "timm", note="adopt a module that holds both")
def resnet(run: Run) -> None:
    train_image_model(run, "test_resnet")


@training("timm: ViT, channels_last, ModelEmaV3", "timm", note="adopt a module that holds both")
def vit(run: Run) -> None:
    train_image_model(run, "test_vit", img_size=32)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"t_initial": 8, "warmup_t": 2},
    "StepLRScheduler": {"decay_t": 2, "noise_range_t": (2, 8)},
    "TanhLRScheduler": {"t_initial": 8},
    "PolyLRScheduler": {"t_initial": 8},
    "MultiStepLRScheduler": {"decay_t": [2, 5]},
}


@training(
    "timm.scheduler: PlateauLRScheduler", "timm", note="`scheduler.lr_scheduler.state_dict()`: timm's own lacks a count"
)
def plateau(run: Run) -> None:
    import timm.scheduler

    model = Net()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = timm.scheduler.PlateauLRScheduler(optimizer, patience_t=1, mode="min")
    for step in run.steps(model, optimizer, scheduler=scheduler.lr_scheduler):
        optimizer.zero_grad()
        loss = batch_loss(model)
        loss.backward()
        optimizer.step()
        scheduler.step(step, metric=loss.item())


def _register(name: str, options: dict[str, Any]) -> None:
    @training(f"timm.scheduler: {name}", "timm", note="`extra={'scheduler': scheduler.state_dict()}`")
    def scheduled(run: Run) -> None:
        import timm.scheduler

        model = Net()
        optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = getattr(timm.scheduler, name)(optimizer, **options)
        for step in run.steps(model, optimizer, scheduler=scheduler):
            optimizer.zero_grad()
            loss = batch_loss(model)
            loss.backward()
            optimizer.step()
            scheduler.step(step, metric=loss.item())


for _name, _options in SCHEDULERS.items():
    _register(_name, _options)
