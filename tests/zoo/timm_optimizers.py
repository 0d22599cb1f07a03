"""Every optimizer of timm that needs no further package."""

from __future__ import annotations

from typing import Any

from catalog import training
from life import Run
from torch_optimizers import Net, batch_loss

# `timm.optim.list_optimizers()` of the version in requirements.txt, without those of apex and bitsandbytes.
NAMES = """
adabelief adadelta adafactor adafactorbv adafactorbvc adagrad adahessian adam adamax adamc adamp adamuon adamw
adamwlegacy adan adanw adopt adoptc adoptw cadafactor cadafactorbv cadafactorbvc cadamc cadamp cadamw cadan cadanw
cadopt cadoptc cadoptw clamb clambw claprop clion clionc cmars cnadamc cnadamw crmsproptf csgdc csgdp csgdw kron kronc
kronw lamb lambc lambcd lambcw lambw laprop lapropc larc lars lion lionc madgrad madgradw mars momentum muon nadam
nadamc nadamlegacy nadamuon nadamw nesterov nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief radam
radamlegacy radamw rmsprop rmsproptf rmsproptfc rmsproptfw sgd sgdc sgdp sgdw
"""


def _register(name: str) -> None:
    @training(f"timm.optim: {name}", "timm")
    def optimized(run: Run) -> None:
        import timm.optim

        model = Net()
        optimizer: Any = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.01)
        needs_graph = getattr(optimizer, "is_second_order", False)  # adahessian
        for _ in run.steps(model, optimizer):
            optimizer.zero_grad()
            batch_loss(model).backward(create_graph=needs_graph)
            optimizer.step()


for _name in (*NAMES.split(), "lookahead_adamw", "lookahead_sgd"):
    _register(_name)
