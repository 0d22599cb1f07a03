"""The trainings that do not resume bit-identically yet, each with its reason.

Theory of operation.  A run fails if a training of this list resumes bit-identically, or is refused as its catalog entry
says, so that the list can only shrink.
"""

from __future__ import annotations

from catalog import Training
from runner import Verdict

_LATE = "refused at restore: the optimizer makes its state in its own step"
_SEVERAL = "refused at adopt: one optimizer"
_DTYPE = "refused at checkpoint: a `torch.dtype` in a parameter group"
_WRONG = "differs without an error"

# Optimizers of timm: those that make state late, and those with a dtype in their groups.
_LATE_OF_TIMM = """
adabelief adafactor adahessian adamc adamp adamuon adamwlegacy adan adanw adopt adoptc adoptw cadafactor cadamc cadamp
cadamw cadan cadanw cadopt cadoptc cadoptw clamb clambw claprop clion clionc cmars cnadamc cnadamw crmsproptf csgdc
csgdp csgdw kron kronc kronw lamb lambc lambcd lambcw lambw laprop lapropc larc lars lion lionc madgrad madgradw mars
muon nadamc nadamlegacy nadamuon nadamw nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief
radamlegacy rmsproptf rmsproptfc rmsproptfw sgdc sgdp sgdw
"""
_DTYPE_OF_TIMM = "adafactorbv adafactorbvc cadafactorbv cadafactorbvc"

NOT_YET: dict[str, str] = {
    "torch.optim: LBFGS": _LATE,
    "torch.optim: SparseAdam": _LATE,
    "torch.optim: Muon, and AdamW for the rest": _SEVERAL,
    "torch.optim: subclass with options of its own": _LATE,
    "torch.optim: subclass whose state_dict() has one more key": f"{_WRONG}: the key is not stored",
    "torch: module with get_extra_state()": f"{_WRONG}: the extra state is not stored",
    "torch: GAN, two optimizers": _SEVERAL,
    "torch: two optimizers, given as a list": _SEVERAL,
    "torch: optimizer in backward": _SEVERAL,
    "torch: layers frozen one after the other": "refused at restore: state of a parameter that is frozen again",
    "DDP: ZeroRedundancyOptimizer": f"{_WRONG}: state that the optimizer shards is not stored",
    "transformers: Adafactor with its schedule": _LATE,
    "accelerate: accumulation, bfloat16 autocast, clipping": "fails at adopt: the optimizer is wrapped",
    "lightning: GAN, manual optimization of two optimizers": _SEVERAL,
    "timm.optim: lookahead_adamw": f"{_WRONG}: the slow weights are not stored",
    "timm.optim: lookahead_sgd": f"{_WRONG}: the slow weights are not stored",
    "schedulefree: AdamW, swapped for evaluation after each step": _LATE,
    "prodigyopt: Prodigy": _LATE,
    "torchao.optim: AdamW8bit": "refused: tensors of a subclass",
    **{f"timm.optim: {name}": _LATE for name in _LATE_OF_TIMM.split()},
    **{f"timm.optim: {name}": _DTYPE for name in _DTYPE_OF_TIMM.split()},
}

# The outcome that the first word of a reason stands for.
_OUTCOMES = {"refused": "refused", "differs": "different", "fails": "failed"}


def complaint(training: Training, verdict: Verdict) -> str:
    """The difference between a verdict and the catalog; "" if there is none."""
    is_right = verdict.outcome == "same"
    if training.refused:
        is_right = verdict.outcome == "refused" and training.refused in verdict.detail
    reason = reason_for(training.name)
    if is_right and reason:
        return f"passes now, so remove it from NOT_YET ({reason})"
    if is_right or _OUTCOMES.get(reason.split(" ")[0].rstrip(":")) == verdict.outcome:
        return ""
    return verdict.detail or f"it has to be refused: {training.refused}"


def reason_for(name: str) -> str:
    """Why a training may go wrong; "" if it may not."""
    return NOT_YET.get(name, "")
