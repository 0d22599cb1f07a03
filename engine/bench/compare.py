"""Whether a change is slower, beyond noise: this tree beside another revision, in turns.

    python -m engine.bench.compare BASE

Theory of operation.  The revision is checked out into a temporary worktree and built in its own environment, as
`make sanitize` does.  Both run the benchmark of this tree, so the revision need not have one.  Both run in turns
(base, this, base, this ...), each time in a fresh process, because runs of one process agree with each other more than
with the next one's.  The median of each run is one number, and `noise.chance` says how likely the difference between
the two groups of them is if there is none.  Slower or faster is said when that is less than one in a hundred, so that
with five quantities a false alarm is one in twenty, and when the difference is worth mentioning.

Ends with status 1 if something is slower.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from engine.bench.noise import chance
from engine.bench.record import Record, decode, values

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 6  # the least likely of all outcomes has a chance of 2 in 924 then
CHANCE_MAX = 0.01
WORTH = 0.02  # of the base's time

# The compared values, by section.
QUANTITIES = (
    ("save", "held_s"),
    ("save", "staged_s"),
    ("save", "durable_s"),
    ("first", "durable_s"),
    ("load", "ready_s"),
)

SITE_PACKAGES = 'import sysconfig; print(sysconfig.get_path("purelib"))'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.bench.compare", description="Is this tree slower?")
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--size", type=float, default=200, metavar="MB", help="the size of the state")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in each run")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="runs of each")
    parser.add_argument("--directory", type=Path, default=ROOT / "runs", help="where to write")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Record]] = {"base": [], "this": []}
    with tempfile.TemporaryDirectory(prefix="engine-compare-") as place:
        tree = Path(place, "tree")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, options.base], check=True)
        try:
            pythons = {"base": (build(tree, Path(place, "environment")), tree), "this": (Path(sys.executable), ROOT)}
            for pair in range(options.pairs):
                for name, (python, where) in pythons.items():
                    print(f"run {pair + 1} of {options.pairs}, {name}", file=sys.stderr, flush=True)
                    runs[name].append(run(python, where, options, Path(place, "output")))
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    verdicts = compare(runs["base"], runs["this"])
    for line in describe(verdicts):
        print(line)
    return int(any(verdict == "slower" for *_, verdict in verdicts.values()))


def build(tree: Path, environment: Path) -> Path:
    """Put this benchmark into a revision's tree, and build that; the Python that imports it."""
    shutil.rmtree(tree / "engine/bench", ignore_errors=True)
    shutil.copytree(ROOT / "engine/bench", tree / "engine/bench")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin/python"
    site, tools = (
        subprocess.run([each, "-c", SITE_PACKAGES], check=True, capture_output=True, text=True).stdout.strip()
        for each in (python, sys.executable)
    )
    # Seen through a .pth file, whose own .pth files are not processed: the other build stays out of sight.
    Path(site, "tools.pth").write_text(f"{tools}\n", encoding="utf-8")
    install: list[str | Path] = [
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-build-isolation",
        "--no-deps",
        "--editable",
        tree,
    ]
    subprocess.run([python, "-m", "pip", *install], check=True, env={**os.environ, "PATH": tool_path()})
    where = "import engine; print(engine.__file__)"
    found = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, cwd=environment).stdout
    if not Path(found.strip()).is_relative_to(tree):
        raise RuntimeError(f"the environment made for {tree.name} imports another engine")
    return python


def tool_path() -> str:
    """PATH with the tools that build."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(python: Path, tree: Path, options: argparse.Namespace, output: Path) -> Record:
    """One short run of the benchmark, of the engine alone."""
    scale = ["--size", str(options.size), "--rounds", str(options.rounds)]
    what = ["--only", "engine", "--sections", "main,load", "--directory", str(options.directory.resolve())]
    command: list[str | Path] = [python, "-m", "engine.bench", "--quick", *scale, *what, "--output", output]
    subprocess.run(command, check=True, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return decode((output / "record.json").read_text(encoding="utf-8"))


def compare(
    base: Sequence[Record], this: Sequence[Record]
) -> Mapping[tuple[str, str], tuple[float, float, float, str]]:
    """For each quantity the medians of both in seconds, the chance, and ``slower``, ``faster`` or ``no difference``."""
    verdicts = {}
    for section, name in QUANTITIES:
        before, after = (
            [median(values(record.select(section, "engine"), name)) for record in records] for records in (base, this)
        )
        likely = chance(before, after)
        low, high = median(before), median(after)
        told = likely < CHANCE_MAX and abs(high - low) > WORTH * low
        verdicts[section, name] = (
            low,
            high,
            likely,
            ("slower" if high > low else "faster") if told else "no difference",
        )
    return verdicts


def describe(verdicts: Mapping[tuple[str, str], tuple[float, float, float, str]]) -> list[str]:
    """A line for each quantity."""
    return [
        f"{section:6} {name:10} {before * 1e3:9.3f} ms -> {after * 1e3:9.3f} ms  ({after / before - 1:+.1%}, "
        f"chance {likely:.3f})  {verdict}"
        for (section, name), (before, after, likely, verdict) in verdicts.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
