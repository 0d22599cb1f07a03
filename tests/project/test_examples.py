"""The examples run, and the demonstration resumes to the same weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"

# On a host that refuses to register buffers, an Engine warns, as for an ordinary user, whose locked-memory limit is too
# small for the default staging.
ON_SUCH_A_HOST = """
import errno, os, sys
import seccomp
seccomp.refuse(errno.EPERM, (seccomp.REGISTER,))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
WARNING = "always:'io_uring_plain' is used"


def test_a_run_killed_in_a_save_ends_with_the_same_weights(tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-c", ON_SUCH_A_HOST),
            *("-W", "error", "-W", WARNING, str(EXAMPLES / "kill_and_resume.py")),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests/support")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    digests = re.findall(r"^(?:never killed|killed and resumed) +sha256 ([0-9a-f]{64})$", result.stdout, re.MULTILINE)
    assert len(digests) == 2 and digests[0] == digests[1]
    assert "killed while it wrote step-" in result.stdout and "resumed from step" in result.stdout
    assert "all exactly as in memory" in result.stdout
    assert "its monitor then ended with steps [1, 2], all sound" in result.stdout
    assert result.stderr.count("EngineWarning") == 1, "the three processes say once what this host lacks"
    assert list((tmp_path / "runs").iterdir()) == [], "it has cleaned up after itself"
