"""Processes that get signals: a server that forks one for each script, and the test's handle of such a process.

    python tests/support/preempted.py      reads requests and writes answers, each a line of JSON

Theory of operation.  Importing torch takes longer than a script, so the server imports all that scripts need, and forks
without threads or an Engine: the fork is as good as a fresh process.  A script ends as any program does.  Its output
goes to files, so that what a killed process has flushed is there.  The server is its parent and returns its status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch

import engine

# Ends a test that hangs; no script takes a tenth of it.
HANG_S = 60.0


class Server:
    """Forks a process for each script."""

    def __init__(self) -> None:
        paths = os.pathsep.join(sys.path)
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **alone, "PYTHONPATH": paths, "PYTHONUNBUFFERED": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, directory: Path, script: str) -> Preempted:
        """Run a script in a process of its own.  It finds `engine`, `torch` and its `directory`."""
        directory.mkdir()
        for name in ("stdout", "stderr"):
            (directory / name).touch()
        pid = self.ask({"directory": str(directory), "script": textwrap.dedent(script)})
        return Preempted(self, pid, directory)

    def ask(self, request: dict[str, object]) -> int:
        """One request and its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: int = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(HANG_S)


class Preempted:
    """A process that runs a script."""

    def __init__(self, server: Server, pid: int, directory: Path) -> None:
        self._server = server
        self._directory = directory
        self.pid = pid

    @property
    def output(self) -> str:
        """What the script has printed and flushed."""
        return (self._directory / "stdout").read_text()

    @property
    def errors(self) -> str:
        """Its standard error, with the engine's log."""
        return (self._directory / "stderr").read_text()

    def until(self, text: str) -> None:
        """Wait until the script has printed this."""
        end = time.monotonic() + HANG_S
        while text not in self.output:
            assert time.monotonic() < end, f"{text!r} is not in {self.output!r}; {self.errors}"
            time.sleep(0.01)

    def kill(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(self._server.ask({"wait": self.pid}))

    def steps(self) -> list[int]:
        """The committed steps of its run."""
        with engine.open(self._directory / "run") as run:
            return run.steps()


def main() -> None:
    """Fork a process for each request, which returns from here; wait for it when asked to."""
    model = torch.nn.Linear(1, 1)
    engine.Arena.adopt(model, torch.optim.AdamW(model.parameters()))  # torch imports a thousand modules late
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            running.discard(request["wait"])
            end = time.monotonic() + HANG_S
            while (ended := os.waitpid(request["wait"], os.WNOHANG))[0] == 0:
                if time.monotonic() > end:
                    os.kill(request["wait"], signal.SIGKILL)
                time.sleep(0.005)
            print(ended[1], flush=True)  # noqa: T201
            continue
        pid = os.fork()
        if pid:
            running.add(pid)
            print(pid, flush=True)  # noqa: T201
            continue
        directory = request["directory"]
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
        names = {"__name__": "script", "directory": f"{directory}/run", "engine": engine, "torch": torch}
        exec(compile(request["script"], "script", "exec"), names)  # noqa: S102
        return
    for pid in running:  # of tests that have failed
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
