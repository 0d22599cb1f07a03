"""Models of torch that are more than parameters: tied, lazy, pruned, quantized, complex, averaged, compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from catalog import training
from life import Run
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch_optimizers import Net, batch_loss, train


@training("torch: transformer with tied embeddings")
def tied(run: Run) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, words: Tensor) -> Tensor:
            out: Tensor = self.head(self.layers(self.embedding(words)))
            return out

    def loss_of(model: nn.Module) -> Tensor:
        words = torch.randint(40, (2, 9))
        return nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    model = Language()
    train(run, model, optim.AdamW(model.parameters()), loss_of)


@training("torch: recurrent network with flattened weights")
def recurrent(run: Run) -> None:
    model = nn.LSTM(4, 8, num_layers=2, dropout=0.1)
    train(run, model, optim.Adam(model.parameters()), lambda m: m(torch.randn(5, 2, 4))[0].square().mean())


@training("torch: channels_last, bfloat16 parameters")
def channels_last(run: Run) -> None:
    model = Net().to(memory_format=torch.channels_last).to(torch.bfloat16)  # type: ignore[call-overload]

    def loss_of(model: nn.Module) -> Tensor:
        images = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        return nn.functional.cross_entropy(model(images).float(), torch.randint(4, (4,)))

    train(run, model, optim.AdamW(model.parameters()), loss_of)


@training("torch: complex parameters")
def complex_parameters(run: Run) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(17, dtype=torch.complex64))
            self.head = nn.Linear(32, 1)

        def forward(self, signal: Tensor) -> Tensor:
            out: Tensor = self.head(torch.fft.irfft(torch.fft.rfft(signal) * self.filter, n=32))
            return out

    model = Spectral()
    train(run, model, optim.Adam(model.parameters()), lambda m: m(torch.randn(4, 32)).square().mean())


@training("torch: lazy modules", note="one batch goes through the model before `adopt`")
def lazy(run: Run) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 3, 6, 6))
    train(run, model, optim.SGD(model.parameters(), 0.1), lambda m: m(torch.randn(2, 3, 6, 6)).square().mean())


@training("torch: lazy modules that no batch has gone through", refused="is not initialized; run one batch")
def too_lazy(run: Run) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    train(run, model, optim.SGD(model.parameters(), 0.1), lambda m: m(torch.randn(2, 4)).square().mean())


@training("torch: parametrizations (weight and spectral norm, orthogonal)")
def parametrized(run: Run) -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )
    train(run, model, optim.AdamW(model.parameters()), lambda m: m(torch.randn(4, 8)).square().mean())


@training("torch: pruning", note="prune before `adopt`, as in the run that was saved")
def pruned(run: Run) -> None:
    model = Net()
    prune.random_unstructured(model.hidden, "weight", amount=0.5)
    prune.l1_unstructured(model.conv, "weight", amount=0.3)
    train(run, model, optim.SGD(model.parameters(), 0.1, momentum=0.9))


@training("torch: module with get_extra_state()")
def extra_state(run: Run) -> None:
    class Warmed(Net):
        """Scales its output by a count that only its extra state holds."""

        count = 0

        def forward(self, images: Tensor) -> Tensor:
            self.count += 1
            return super().forward(images) * min(1.0, self.count / 6)

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: Any) -> None:
            self.count = state["count"]

    model = Warmed()
    train(run, model, optim.AdamW(model.parameters()))


@training("torch: quantization-aware training")
def quantized(run: Run) -> None:
    from torch.ao import quantization

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant = quantization.QuantStub()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
            self.dequant = quantization.DeQuantStub()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.dequant(self.body(self.quant(x)))
            return out

    model = Quantized().train()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    train(run, model, optim.SGD(model.parameters(), 0.1), lambda m: m(torch.randn(4, 8)).square().mean())


class Both(nn.Module):
    """What is trained, and its average: one module, so that one arena holds both."""

    def __init__(self, model: nn.Module, average: nn.Module) -> None:
        super().__init__()
        self.model, self.average = model, average


@training("torch: AveragedModel (EMA)", note="adopt a module that holds both")
def ema(run: Run) -> None:
    model = Net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = optim.AdamW(model.parameters())
    for _ in run.steps(Both(model, average), optimizer):
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()
        average.update_parameters(model)


@training("torch: AveragedModel (SWA with SWALR, update_bn)", note="adopt a module that holds both")
def swa(run: Run) -> None:
    model = Net()
    average = AveragedModel(model)
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=4)
    for step in run.steps(Both(model, average), optimizer, scheduler=scheduler):
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()
        if step > 2:
            average.update_parameters(model)
            scheduler.step()
        if step == run.last:
            update_bn([torch.randn(4, 3, 8, 8)], average)


@training("torch: EMA by hand, teacher and student", note="adopt a module that holds both")
def teacher(run: Run) -> None:
    student = Net()
    mean = copy.deepcopy(student).requires_grad_(False)
    optimizer = optim.AdamW(student.parameters())
    for _ in run.steps(Both(student, mean), optimizer):
        images = torch.randn(4, 3, 8, 8)
        loss = (student(images) - mean(images)).square().mean() + batch_loss(student)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(mean.parameters(), student.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)


def train_compiled(run: Run, backend: str) -> None:
    model = Net()
    compiled: Any = torch.compile(model, backend=backend)
    optimizer = optim.AdamW(model.parameters())
    for _ in run.steps(compiled, optimizer, raw=model):
        optimizer.zero_grad()
        batch_loss(compiled).backward()
        optimizer.step()


@training("torch.compile: model (aot_eager)")
def compiled_model(run: Run) -> None:
    train_compiled(run, "aot_eager")


@training("torch.compile: submodule (aot_eager)")
def compiled_part(run: Run) -> None:
    model = Net()
    names = model.hidden
    model.hidden = torch.compile(names, backend="aot_eager")  # type: ignore[assignment]
    optimizer = optim.AdamW(model.parameters())
    raw = copy.copy(model)
    raw._modules = {**model._modules, "hidden": names}
    for _ in run.steps(model, optimizer, raw=raw):
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()


@training("torch.compile: step of the optimizer (aot_eager)")
def compiled_step(run: Run) -> None:
    model = Net()
    optimizer = optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), capturable=False, foreach=False)

    @torch.compile(backend="aot_eager")
    def take_step() -> None:
        optimizer.step()

    for _ in run.steps(model, optimizer):
        optimizer.zero_grad()
        batch_loss(model).backward()
        take_step()
