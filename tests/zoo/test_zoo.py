"""The trainings of the zoo that need torch alone, and the list of all.

They run in a process of their own, which forks: this one has threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from catalog import Training, load_catalog
from not_yet import NOT_YET, complaint
from processes import in_a_process_of_its_own
from runner import Verdict

ZOO = Path(__file__).parent
ROOT = ZOO.parents[1]
CATALOG = load_catalog()
TORCH_ONLY = [training for training in CATALOG.values() if not training.needs]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """Of all trainings that need torch alone."""
    output = subprocess.run(
        [sys.executable, str(ZOO / "zoo.py"), "--torch-only", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found = [Verdict(**json.loads(line)) for line in output.splitlines()]
    return {verdict.name: verdict for verdict in found}


@pytest.mark.parametrize("training", TORCH_ONLY, ids=lambda training: str(training.name))
def test_a_killed_training_resumes_bit_identically(training: Training, verdicts: dict[str, Verdict]) -> None:
    assert complaint(training, verdicts[training.name]) == ""


# The scheduler is not stored, so a resumed training begins its schedule anew.
FORGETFUL = """
from catalog import Training
from life import Run
from runner import judge
from torch import optim
from torch_optimizers import Net, batch_loss

def forgetful(run: Run) -> None:
    model = Net()
    optimizer = optim.SGD(model.parameters(), 0.1)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in run.steps(model, optimizer):
        optimizer.zero_grad()
        batch_loss(model).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 * scheduler._step_count
        scheduler.step()

verdict = judge(Training("forgetful", forgetful, (), "", "", 1), 1)
print(verdict.outcome, verdict.detail)
"""


def test_a_training_that_stores_too_little_is_noticed() -> None:
    done = in_a_process_of_its_own(FORGETFUL)
    assert done.stdout.startswith("different resumed at step"), done.stdout + done.stderr


def test_a_verdict_is_compared_with_the_lists() -> None:
    """A training that goes wrong is a failure, and so is one of NOT_YET that resumes."""
    name = "torch.optim: AdamW"
    verdict = Verdict(name, "different", "step 5 differs", (), 0.0, 2)
    assert complaint(CATALOG[name], verdict) == "step 5 differs"
    for listed in NOT_YET:
        refused = CATALOG[listed].refused
        right = Verdict(listed, "refused" if refused else "same", refused, (), 0.0, 2)
        assert "remove it" in complaint(CATALOG[listed], right)


def test_the_page_lists_every_training() -> None:
    page = (ROOT / "docs/trainings.md").read_text(encoding="utf-8")
    missing = [name for name in CATALOG if name.partition(": ")[2] not in page]
    assert not missing, f"run `make zoo`: docs/trainings.md lacks {missing}"
