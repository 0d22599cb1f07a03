"""Memory beyond the state: the peak of a saver, in a fresh process.

    python -m engine.bench.footprint NAME NBYTES TENSORS DIRECTORY

Theory of operation.  The process makes the state, saves a tiny one so that all code is loaded, and resets the kernel's
record of the peak (5 in /proc/self/clear_refs).  It then makes the saver and saves three times.  The need of the
saver, its staging included, is the peak of its resident memory (VmHWM) less the resident memory before.  The peaks of
its child processes are added; shared memory and files count once, where they are made.  The page cache is resident
memory of no process, and is in no figure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from engine.bench.measure import Rounds, Turn, descendants, timed_save
from engine.bench.savers import SAVERS, Saver
from engine.bench.states import make_state

SAVES = 3  # with two kept, the third is the first that recycles or deletes
TINY_BYTES = 1 << 20


def turns(rounds: Rounds, nbytes: int, tensor_count: int, names: tuple[str, ...]) -> dict[tuple[str, str], Turn]:
    """A turn in a fresh process for each subject that has a row and can run."""
    for kind in SAVERS:
        if kind.name in names and rounds.wanted(kind.name):
            rounds.introduce(kind.name, "save", kind.how)
    out = {subject.name for subject in rounds.record.subjects if subject.kind == "save" and subject.unavailable}
    return {
        (name, ""): _turn(rounds.directory, name, nbytes, tensor_count)
        for name in names
        if rounds.wanted(name) and name not in out
    }


def _turn(directory: Path, name: str, nbytes: int, tensor_count: int) -> Turn:
    def turn() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=directory, prefix="memory-") as place:
            arguments = [name, str(nbytes), str(tensor_count), place]
            command = [sys.executable, "-m", "engine.bench.footprint", *arguments]
            run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode:
            raise OSError((run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1])
        measured: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
        return measured

    return turn


def measure(kind: type[Saver], nbytes: int, tensor_count: int, directory: Path) -> dict[str, float]:
    """The memory of a saver in this process, beyond the state."""
    state = make_state(nbytes, tensor_count, plain=not kind.adopts, adopted=kind.adopts)
    tiny = kind(directory / "tiny", make_state(TINY_BYTES, 1, plain=not kind.adopts, adopted=kind.adopts))
    timed_save(tiny)
    tiny.close()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = memory("self")
    saver = kind(directory / "state", state)
    for _ in range(SAVES):
        timed_save(saver)
    after = memory("self")
    children = [memory(str(process)) for process in descendants()]
    saver.close()
    children_bytes = sum(child["VmHWM"] - child["RssFile"] - child["RssShmem"] for child in children)
    return {
        "peak_bytes": after["VmHWM"] - before["VmRSS"] + children_bytes,
        "anonymous_bytes": after["RssAnon"] - before["RssAnon"] + children_bytes,
        "children_bytes": children_bytes,
    }


def memory(process: str) -> dict[str, int]:
    """The resident memory of a process, as the kernel reports it, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem")
    return {name: int(fields[name].split()[0]) * 1024 for name in names}


def main() -> None:
    name, nbytes, tensor_count, directory = sys.argv[1:]
    [kind] = [saver for saver in SAVERS if saver.name == name]
    print(json.dumps(measure(kind, int(nbytes), int(tensor_count), Path(directory))))


if __name__ == "__main__":
    main()
