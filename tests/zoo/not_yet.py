"""The trainings that do not resume bit-identically yet, each with its reason.

Theory of operation.  A run fails if a training of this list resumes bit-identically, or is refused as its catalog entry
says, so that the list can only shrink.
"""

from __future__ import annotations

from catalog import Training
from runner import Verdict

NOT_YET: dict[str, str] = {}

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
