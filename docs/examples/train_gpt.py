"""Train a small GPT on the text of Python's own documentation, checkpointing through `engine`.

    python docs/examples/train_gpt.py runs/gpt

Kill it at any time and start it again: it continues from the newest committed checkpoint, and ends with the same
weights as a run that was never killed.  `kill_and_resume.py`, next to this file, does this and compares.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Mapping
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

import engine

STEPS, CHECKPOINT_EVERY, WARM_UP_STEPS = 30, 5, 10
BATCH, CONTEXT = 4, 64  # sequences in a batch, bytes in a sequence
VOCABULARY, WIDTH, LAYERS, HEADS = 256, 384, 5, 6  # 9.1 million parameters, 109 MB with AdamW's two moments
DROPOUT, LEARNING_RATE, SEED = 0.1, 1e-3, 1337


def train(directory: str, after_step: Callable[..., None] = lambda step, arena, save: None) -> engine.Arena:
    """Train to the end, from the newest checkpoint in the directory if there is one."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    text = read_text()
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))

    arena = engine.Arena.adopt(model, optimizer)  # parameters and optimizer state are now in one buffer
    with engine.Engine(directory, keep=2) as eng:
        first_step = 1
        if eng.steps():  # committed checkpoints, oldest first
            restored = eng.restore(arena)  # the newest: weights, moments and hyperparameters are back in place
            warm_up.load_state_dict(restored.extra["warm_up"])
            torch.set_rng_state(restored.extra["rng"])
            first_step = restored.step + 1
            print(f"  resumed from step {restored.step}", flush=True)

        for step in range(first_step, STEPS + 1):
            loss = model.loss(*read_batch(text, step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
            save = None
            if step % CHECKPOINT_EVERY == 0:
                # Returns at once, and is written while training goes on.  What is neither model nor optimizer goes
                # into `extra`: the schedule, and the state of the random numbers that dropout draws from.
                extra = {"warm_up": warm_up.state_dict(), "rng": torch.get_rng_state()}
                save = eng.checkpoint(arena, step=step, extra=extra)
                print(f"  step {step:3d}  loss {loss.item():.4f}", flush=True)
            after_step(step, arena, save)  # a hook for kill_and_resume.py
    return arena  # leaving the `with` has waited for the last checkpoint


class GPT(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class Layer(nn.Module):
    """Causal self-attention, then a feed-forward network, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.forward_norm = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.feed_forward(self.forward_norm(x)))
        return x


def read_text() -> Tensor:
    """Some 700 kB of English that every CPython ships with, as bytes."""
    return torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8).long()


def read_batch(text: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of a step: a function of the seed and the step, so there is no reader to restore."""
    generator = torch.Generator().manual_seed(SEED * 1_000_000 + step)
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of all tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.contiguous()
        sha256.update(name.encode() + ctypes.string_at(flat.data_ptr(), flat.nbytes))
    return sha256.hexdigest()


if __name__ == "__main__":
    trained = train(sys.argv[1] if len(sys.argv) > 1 else "runs/gpt")
    print(f"  model and optimizer after step {STEPS}: sha256 {digest(trained.state_dict())}")
