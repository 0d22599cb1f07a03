"""The examples run, and the demonstration resumes to the same weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# An ordinary user's locked-memory limit is too small for the default staging, and the example then warns.
MEMLOCK = "ignore:'io_uring_plain' is used"

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_a_run_killed_in_a_save_ends_with_the_same_weights(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", MEMLOCK, str(EXAMPLES / "kill_and_resume.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    digests = re.findall(r"^(?:never killed|killed and resumed) +sha256 ([0-9a-f]{64})$", result.stdout, re.MULTILINE)
    assert len(digests) == 2 and digests[0] == digests[1]
    assert "killed while it wrote step-" in result.stdout and "resumed from step" in result.stdout
    assert "all exactly as in memory" in result.stdout
    assert list((tmp_path / "runs").iterdir()) == [], "it has cleaned up after itself"
