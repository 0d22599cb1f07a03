"""Optimizers of other packages: some write parameters outside of their step, or keep state in subclasses of tensors."""

from __future__ import annotations

from catalog import training
from life import Run
from torch import nn
from torch_optimizers import Net, batch_loss, train


@training("schedulefree: AdamW, swapped for evaluation after each step", "schedulefree")
def schedule_free(run: Run) -> None:
    import schedulefree

    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=3)
    optimizer.train()
    for _ in run.steps(model, optimizer):
        optimizer.train()
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()
        optimizer.eval()


@training("prodigyopt: Prodigy", "prodigyopt")
def prodigy(run: Run) -> None:
    import prodigyopt

    model = Net()
    train(run, model, prodigyopt.Prodigy(model.parameters()))


@training("torchao.optim: AdamW8bit", "torchao")
def eight_bit(run: Run) -> None:
    import torchao.optim

    # Large enough for quantized state: 4096 elements.
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 4))
    train(run, model, torchao.optim.AdamW8bit(model.parameters()))
