"""Two gloo processes: rank 0 saves, and the others restore its checkpoint when they resume."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from catalog import training
from life import Run
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch_optimizers import Net, batch_loss

NOTE = "rank 0 has the Engine; the others restore through `engine.open`"


def join(run: Run) -> None:
    """Join the group of all ranks; it ends with the process, which may be killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{run.plan.rendezvous}",
        rank=run.plan.rank,
        world_size=run.plan.rank_count,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)


def train_on_ranks(run: Run, model: nn.Module, wrapped: nn.Module, adopted: nn.Module) -> None:
    optimizer = optim.AdamW(wrapped.parameters())
    for step in run.steps(adopted, optimizer, raw=model):
        with torch.random.fork_rng():
            torch.manual_seed(1000 * step + run.plan.rank)  # each rank has data of its own
            loss = batch_loss(wrapped)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.barrier()
    dist.destroy_process_group()


@training("DDP: adopted before it is wrapped", rank_count=2, note=NOTE)
def before(run: Run) -> None:
    join(run)
    model = Net()
    # A training adopts here; the wrapper is made over tensors that are in the arena already.
    optimizer = optim.AdamW(model.parameters())
    start = run.begin(model, optimizer)
    wrapped = DistributedDataParallel(model)
    for step in range(start + 1, run.last + 1):
        with torch.random.fork_rng():
            torch.manual_seed(1000 * step + run.plan.rank)
            loss = batch_loss(wrapped)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end(step)
        dist.barrier()
    run.finish()


@training("DDP: wrapped, the raw module adopted", rank_count=2, note=NOTE)
def after(run: Run) -> None:
    join(run)
    model = Net()
    train_on_ranks(run, model, DistributedDataParallel(model), model)


@training("DDP: wrapped, the wrapper adopted", rank_count=2, note=NOTE)
def wrapper(run: Run) -> None:
    join(run)
    model = Net()
    wrapped = DistributedDataParallel(model)
    train_on_ranks(run, model, wrapped, wrapped)


@training("DDP: ZeroRedundancyOptimizer", rank_count=2, refused="ZeroRedundancyOptimizer")
def sharded(run: Run) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch.jit

    join(run)
    model = Net()
    wrapped = DistributedDataParallel(model)
    trained = [param for param in wrapped.parameters() if param.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, optim.AdamW, lr=1e-2)
    for step in run.steps(model, optimizer):
        with torch.random.fork_rng():
            torch.manual_seed(1000 * step + run.plan.rank)
            loss = batch_loss(wrapped)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.consolidate_state_dict(to=0)
        dist.barrier()
    dist.destroy_process_group()
