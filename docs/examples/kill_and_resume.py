"""The demonstration: train, be killed during a save, resume, and compare with an undisturbed run.

    python docs/examples/kill_and_resume.py

1. Run `train_gpt.py` undisturbed, and time its checkpoints beside torch.save with fsync.
2. Run it again as a separate process, and kill it (SIGKILL) at a random moment of a save.
3. Start it once more: it resumes from the newest committed checkpoint.
4. Compare the weights of 1 and 3, and read the checkpoint of 3 with the stock safetensors library.
5. Kill a training with `isolation="process"` when a save is staged: its monitor commits the save.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
import train_gpt
from safetensors import safe_open
from torch import Tensor

import engine

# Where this host lacks something, an Engine warns in every process.  The first run shows that, and the others need not.
WARNINGS = ("'io_uring_plain' is used", "'threads' is used", "'buffered' is used", "snapshots are guarded")
TRAIN = [
    sys.executable,
    *(f"-Wignore:{beginning}" for beginning in WARNINGS),
    str(Path(__file__).with_name("train_gpt.py")),
]


def main() -> int:
    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs", prefix="kill-and-resume-") as runs:
        print(f"A run of {train_gpt.STEPS} steps that nobody disturbs:", flush=True)
        timings = Timings(Path(runs, "undisturbed"))
        state = timings.train().state_dict()
        expected = train_gpt.digest(state)

        directory = Path(runs, "killed")
        print("\nThe same run, killed while it saves:", flush=True)
        while not kill_while_saving(directory, longest_delay_s=timings.median_ms("durable_ns") / 1000 / 2):
            print("  that save was committed just before the kill; once more", flush=True)
        print("\nStarted again:", flush=True)
        output = subprocess.run([*TRAIN, str(directory)], check=True, stdout=subprocess.PIPE, text=True).stdout
        print(output)
        actual = output.split()[-1]

        same = actual == expected
        print(f"never killed        sha256 {expected}\nkilled and resumed  sha256 {actual}")
        print("The weights are the very same.\n" if same else "THE WEIGHTS DIFFER.\n")
        same_files = compare_with_safetensors(committed_checkpoints(directory)[-1], state)
        timings.report(sum(tensor.nbytes for tensor in state.values()))
        committed = the_monitor_commits(Path(runs, "monitored"))
    return 0 if same and same_files and committed else 1


def the_monitor_commits(directory: Path) -> bool:
    """Whether the save of a training that was killed after staging is committed by its monitor."""
    print("\nA training with isolation='process', killed when its second save is staged:", flush=True)
    script = str(Path(__file__).with_name("monitored.py"))
    process = subprocess.run([*TRAIN[:-1], script, str(directory)])
    at_death = [path.name for path in committed_checkpoints(directory)]
    with warnings.catch_warnings():
        for beginning in WARNINGS:
            warnings.filterwarnings("ignore", beginning)
        eng = engine.Engine(directory)  # waits until the monitor has ended
    with eng:
        steps, damage = eng.steps(), eng.verify()
    if process.returncode == 0 or steps != [1, 2] or damage:
        print(f"ITS MONITOR HAS COMMITTED {steps}, WITH DAMAGE {damage}.")
        return False
    print(f"  committed when it died: {', '.join(at_death)}; its monitor then ended with steps {steps}, all sound")
    return True


def kill_while_saving(directory: Path, longest_delay_s: float) -> bool:
    """Kill a training process at a random moment of a save; whether the save was still going on when it died."""
    with subprocess.Popen([*TRAIN, str(directory)]) as process:
        while True:
            wait_for_save(process, directory)
            time.sleep(random.uniform(0, longest_delay_s))
            if saving := list(directory.glob("step-*.partial")):
                break
        process.kill()
    if not saving[0].exists():
        return False
    committed = ", ".join(path.name for path in committed_checkpoints(directory))
    print(f"  killed while it wrote {saving[0].name}; committed by then: {committed}")
    return True


def wait_for_save(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Return while a save is in flight that is not the directory's first."""
    while not (committed_checkpoints(directory) and list(directory.glob("step-*.partial"))):
        if process.poll() is not None:
            sys.exit(f"the run ended (status {process.returncode}) before it could be killed in a save; start again")
        time.sleep(0.0005)


def committed_checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if path.suffix != ".partial")


def compare_with_safetensors(checkpoint: Path, state: Mapping[str, Tensor]) -> bool:
    """Whether the files, read by a library that is independent of the engine, equal the tensors in memory."""
    stored: dict[str, Tensor] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    wrong = [name for name in state if name not in stored or not torch.equal(stored[name], state[name])]
    verdict = f"{len(wrong)} NOT as in memory, {wrong[0]} first" if wrong else "all exactly as in memory"
    print(f"The safetensors library reads {len(stored)} tensors from {checkpoint.name}: {verdict}.")
    return not wrong


class Timings:
    """An undisturbed run that saves its state with torch.save as well, in turns with the engine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.saves: list[engine.Save] = []
        self.torch_save_ms: list[float] = []

    def train(self) -> engine.Arena:
        return train_gpt.train(str(self.directory), self.after_step)

    def after_step(self, step: int, arena: engine.Arena, save: engine.Save | None) -> None:
        if save is not None:
            self.saves.append(save)
        elif self.saves and step % train_gpt.CHECKPOINT_EVERY == train_gpt.CHECKPOINT_EVERY // 2:
            self.saves[-1].result()  # one disk: each has it for itself
            self.torch_save_ms.append(torch_save_ms(arena.state_dict(), self.directory / "state.pt"))

    def median_ms(self, name: str) -> float:
        return median(save.stats()[name] for save in self.saves) / 1e6

    def report(self, nbytes: int) -> None:
        ours = [self.median_ms(name) for name in ("held_ns", "staged_ns", "durable_ns")]
        theirs = [median(self.torch_save_ms)] * 3  # it returns when all is done
        print(f"\n{nbytes / 1e6:.0f} MB, medians of {len(self.saves)} and {len(self.torch_save_ms)} saves in one run:")
        print(f"{'':24}{'call returns':>14}{'step may go on':>17}{'durable':>14}")
        for name, times_ms in [("engine.checkpoint", ours), ("torch.save and fsync", theirs)]:
            print(f"  {name:22}{times_ms[0]:11.1f} ms{times_ms[1]:14.1f} ms{times_ms[2]:11.1f} ms")


def torch_save_ms(state: Mapping[str, Tensor], path: Path) -> float:
    """Milliseconds until torch.save's file would survive a power failure: fsync of the file and of its directory."""
    path.unlink(missing_ok=True)
    start = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    sys.exit(main())
