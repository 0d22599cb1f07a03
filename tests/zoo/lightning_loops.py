"""Lightning, which has the loop: a callback adopts when training starts, and saves after each batch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from catalog import training
from life import Run
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset

NOTE = "a callback adopts in `on_train_start` and saves in `on_train_batch_end`"


class Noise(Dataset[Tensor]):
    """One batch a step, counted from the step that was resumed."""

    def __init__(self, last: int) -> None:
        self.start, self.last = 0, last

    def __len__(self) -> int:
        return self.last

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.start + index)
        return torch.randn(4, 6, generator=generator)


def fit(run: Run, module: Any) -> None:
    """Train a LightningModule from the step that is resumed."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    noise = Noise(run.last)

    class Saving(lightning.Callback):  # type: ignore[misc]
        start = 0

        def on_train_start(self, trainer: Any, module: Any) -> None:
            schedulers = {f"scheduler{i}": c.scheduler for i, c in enumerate(trainer.lr_scheduler_configs)}
            optimizers = trainer.optimizers
            noise.start = run.begin(module, optimizers if len(optimizers) > 1 else optimizers[0], **schedulers)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            run.end(noise.start + index + 1)
            if noise.start + index + 1 == run.last:
                trainer.should_stop = True

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Saving()],
    )
    trainer.fit(module, DataLoader(noise, batch_size=None))
    run.finish()


@training("lightning: automatic optimization, scheduler for each step", "lightning", note=NOTE)
def automatic(run: Run) -> None:
    import lightning

    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 1))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = optim.AdamW(self.parameters(), lr=1e-2)
            scheduler = optim.lr_scheduler.StepLR(optimizer, 3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    fit(run, Regression())


@training("lightning: GAN, manual optimization of two optimizers", "lightning", note=NOTE)
def gan(run: Run) -> None:
    import lightning

    class Gan(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
            self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 1))

        def training_step(self, batch: Tensor, index: int) -> None:
            first, second = self.optimizers()
            fake = self.generator(torch.randn(4, 4))
            second.zero_grad()
            self.manual_backward((self.discriminator(fake.detach()) - self.discriminator(batch)).mean())
            second.step()
            first.zero_grad()
            self.manual_backward(-self.discriminator(fake).mean())
            first.step()

        def configure_optimizers(self) -> Any:
            return [optim.Adam(self.generator.parameters()), optim.Adam(self.discriminator.parameters())]

    fit(run, Gan())
