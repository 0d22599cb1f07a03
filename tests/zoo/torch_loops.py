"""Loops of torch that are more than forward, backward and step: several optimizers, scaling, accumulation, data."""

from __future__ import annotations

import torch
from catalog import training
from life import Run
from torch import Tensor, nn, optim
from torch_optimizers import Net, batch_loss


@training("torch: GAN, two optimizers", note="both: `adopt(model, {'g': ..., 'd': ...})`")
def gan(run: Run) -> None:
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    model = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    optimizers = {
        "g": optim.Adam(generator.parameters(), betas=(0.5, 0.9)),
        "d": optim.RMSprop(discriminator.parameters(), momentum=0.5),
    }
    loss = nn.functional.binary_cross_entropy_with_logits
    for _ in run.steps(model, optimizers):
        real, fake = torch.randn(8, 8) + 3, generator(torch.randn(8, 4))
        optimizers["d"].zero_grad()
        (loss(discriminator(real), torch.ones(8, 1)) + loss(discriminator(fake.detach()), torch.zeros(8, 1))).backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        loss(discriminator(fake), torch.ones(8, 1)).backward()
        optimizers["g"].step()


@training("torch: two optimizers, given as a list")
def pair(run: Run) -> None:
    model = Net()
    optimizers = [optim.SGD(model.conv.parameters(), 0.1, momentum=0.9), optim.AdamW(model.head.parameters())]
    for _ in run.steps(model, optimizers):
        model.zero_grad()
        batch_loss(model).backward()
        for optimizer in optimizers:
            optimizer.step()


@training("torch: optimizer in backward", note="all: `adopt(model, optimizers)`")
def in_backward(run: Run) -> None:
    model = Net()
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizers = {name: optim.AdamW([param]) for name, param in trainable.items()}

    def hook(name: str) -> None:
        def take_step(_: Tensor) -> None:
            optimizers[name].step()
            optimizers[name].zero_grad()

        trainable[name].register_post_accumulate_grad_hook(take_step)

    for name in trainable:
        hook(name)
    for _ in run.steps(model, list(optimizers.values())):
        batch_loss(model).backward()


@training("torch: bfloat16 autocast, accumulation, clipping", note="save between two steps of the optimizer")
def accumulating(run: Run) -> None:
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    for _ in run.steps(model, optimizer):
        optimizer.zero_grad()
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = batch_loss(model) / 3
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@training("torch: GradScaler", note="`extra={'scaler': scaler.state_dict()}`")
def scaled(run: Run) -> None:
    model = Net()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
    for _ in run.steps(model, optimizer, scaler=scaler):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = batch_loss(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # skips steps whose gradients overflow, which the first ones do
        scaler.update()


@training("torch: layers frozen one after the other")
def unfreezing(run: Run) -> None:
    model = Net()
    model.conv.requires_grad_(False)
    optimizer = optim.AdamW(model.parameters())
    for step in run.steps(model, optimizer):
        model.conv.requires_grad_(step > 1)
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()


@training("torch: reinforcement learning, target network and replay in buffers")
def q_learning(run: Run) -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online, self.target = nn.Linear(4, 2), nn.Linear(4, 2)
            self.target.requires_grad_(False)
            self.replay: Tensor
            self.position: Tensor
            self.register_buffer("replay", torch.zeros(16, 4))
            self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    agent = Agent()
    optimizer = optim.RMSprop(agent.online.parameters())
    for step in run.steps(agent, optimizer):
        agent.replay[agent.position % 16] = torch.randn(4)
        agent.position += 1
        state = agent.replay[torch.randint(16, (8,))]
        loss = (agent.online(state).max(1).values - agent.target(state).max(1).values - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 0:
            agent.target.load_state_dict(agent.online.state_dict())
