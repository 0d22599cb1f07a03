"""Trainings with transformers, accelerate, peft, diffusers and torchdata; no weights are loaded."""

from __future__ import annotations

from typing import Any

import torch
from catalog import training
from life import Run
from torch import Tensor, nn, optim
from torch_models import Both
from torch_optimizers import Net, batch_loss

WORDS = 64


def words() -> Tensor:
    return torch.randint(WORDS, (2, 12))


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype)
    return model


def train_language(run: Run, model: nn.Module, optimizer: Any, scheduler: Any = None, **options: Any) -> None:
    stateful = {} if scheduler is None else {"scheduler": scheduler}
    for _ in run.steps(model, optimizer, **options, **stateful):
        ids = words()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@training("transformers: GPT-2 (tied weights), cosine schedule with warmup", "transformers")
def gpt2(run: Run) -> None:
    from transformers import get_cosine_schedule_with_warmup

    model = tiny_gpt2()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    train_language(run, model, optimizer, get_cosine_schedule_with_warmup(optimizer, 2, 10))


@training("transformers: Llama in bfloat16, inverse square root schedule", "transformers")
def llama(run: Run) -> None:
    from transformers import get_inverse_sqrt_schedule

    model = tiny_llama(torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    train_language(run, model, optimizer, get_inverse_sqrt_schedule(optimizer, 2))


@training("transformers: Llama with gradient checkpointing", "transformers")
def llama_checkpointing(run: Run) -> None:
    model: Any = tiny_llama()
    model.gradient_checkpointing_enable()
    train_language(run, model.train(), optim.AdamW(model.parameters()))


@training("transformers: BERT, linear schedule", "transformers")
def bert(run: Run) -> None:
    from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=16))
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    train_language(run, model, optimizer, get_linear_schedule_with_warmup(optimizer, 2, 10))


@training("transformers: Adafactor with its schedule", "transformers")
def adafactor(run: Run) -> None:
    from transformers.optimization import Adafactor, AdafactorSchedule

    model = tiny_gpt2()
    optimizer = Adafactor(model.parameters())
    train_language(run, model, optimizer, AdafactorSchedule(optimizer))


@training(
    "accelerate: accumulation, bfloat16 autocast, clipping",
    "accelerate",
    note="what `prepare()` returns is adopted",
)
def accelerate(run: Run) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    raw = Net()
    plain = optim.AdamW(raw.parameters(), lr=1e-2)
    model, optimizer, scheduler = accelerator.prepare(raw, plain, optim.lr_scheduler.StepLR(plain, 3))
    for _ in run.steps(model, optimizer, raw=raw, scheduler=scheduler):
        for _ in range(2):
            with accelerator.accumulate(model):
                accelerator.backward(batch_loss(model))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@training("peft: LoRA on GPT-2", "peft", "transformers")
def lora(run: Run) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(tiny_gpt2(), config)
    trainable = [param for param in model.parameters() if param.requires_grad]
    train_language(run, model, optim.AdamW(trainable, lr=1e-2))


@training("peft: DoRA on Llama, all parameters in the optimizer", "peft", "transformers")
def dora(run: Run) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(), config)
    train_language(run, model, optim.AdamW(model.parameters(), lr=1e-2))


class Average(nn.Module):
    """diffusers' EMAModel keeps a list of tensors, which an arena holds if a module does."""

    def __init__(self, shadows: list[Tensor]) -> None:
        super().__init__()
        for index, shadow in enumerate(shadows):
            self.register_buffer(str(index), shadow)


@training("diffusers: UNet, DDPM noise, EMA", "diffusers", note="the EMA's tensors are buffers of an adopted module")
def unet(run: Run) -> None:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    ema = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    noise = DDPMScheduler(num_train_timesteps=20)
    counted = Counted(ema)
    for _ in run.steps(Both(model, Average(ema.shadow_params)), optimizer, schedule=schedule, ema=counted):
        images, added, times = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.randint(20, (2,))
        loss = nn.functional.mse_loss(model(noise.add_noise(images, added, times), times).sample, added)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())


class Counted:
    """The state of an EMAModel besides its tensors."""

    def __init__(self, ema: Any) -> None:
        self._ema = ema

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._ema.state_dict().items() if key != "shadow_params"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ema.load_state_dict(state)


@training(
    "torchdata: StatefulDataLoader with a worker, resumed in the middle of an epoch",
    "torchdata",
    note="a `generator=` of its own, seeded for each epoch: making an iterator draws from it",
)
def stateful_loader(run: Run) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    model = Net()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(20, 3, 8, 8), torch.randint(4, (20,)))
    order = torch.Generator()
    loader: Any = StatefulDataLoader(data, batch_size=4, shuffle=True, generator=order, num_workers=1)
    batches: Any = None
    for step in run.steps(model, optimizer, loader=loader):
        epoch, index = divmod(step - 1, len(loader))
        if batches is None or index == 0:
            order.manual_seed(epoch)
            batches = iter(loader)
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
