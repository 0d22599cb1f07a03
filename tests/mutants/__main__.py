"""Try small changes to the engine one at a time, and list those that the nearest tests do not notice.

    make mutants                                   # ten minutes of Python and C
    make mutants SECONDS=300 SEED=2 ONLY=native/
    make mutants ONLY=engine/store/commit.py:31:4:removal      # one, and what its tests print

Theory of operation.  A copy of the working tree is kept in build/mutants/tree, with the compiled module beside the
Python sources, and an environment that finds this copy instead of the installed engine: it sees the packages of .venv,
but not the hook of the editable install, because Python reads no .pth file of a folder that another .pth file names.
For a mutation one file is changed, C is compiled again, the tests run, and the file is put back.  The tests stop at
the first failure.  If they pass, the mutation is unnoticed.  A mutation that makes them hang is noticed, if they
need less than half of the limit without it.  If the tests fail without the mutation, it stays undecided.

The run ends when its time is over; a mutation that is not decided by then is not counted.  The seed fixes the order,
and the time limits the count.  mutmut and cosmic-ray change only Python, so this is a script of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import c_mutations
import python_mutations
from mutation import Mutation, sample
from nearest import EQUIVALENT, tests_for

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "build/mutants/tree"
BUILD = ROOT / "build/mutants/native"
ENVIRONMENT = ROOT / "build/mutants/environment"
OUTPUT = ROOT / "build/mutants/output.txt"
MODULE = "_native.abi3.so"

MUTANT_S = 60  # with which nine of ten are to be noticed; a clean run of the nearest tests needs less than half
PYTEST = ("-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider")

NOTICED, HANGS, UNNOTICED, INVALID, UNDECIDED = "noticed", "hangs", "UNNOTICED", "does not compile", "undecided"


def prepare() -> None:
    """Bring the copy, its compiled module and its environment up to date."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(TREE, ignore_errors=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)
    if not ENVIRONMENT.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", ENVIRONMENT], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(ENVIRONMENT)})
    Path(packages, "tree.pth").write_text(f"{sysconfig.get_path('purelib')}\n{TREE}\n")
    tools = Path(sys.executable).parent
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run([tools / "cmake", "-S", TREE / "native", "-B", BUILD, *options], check=True, capture_output=True)
    if not build():
        sys.exit("engine: the C of the working tree does not compile")


def build() -> bool:
    """Compile the copy's C and put the module where the copy's Python finds it; False if it does not compile."""
    tools = Path(sys.executable).parent
    if subprocess.run([tools / "cmake", "--build", BUILD, "--parallel", "2"], capture_output=True).returncode:
        return False
    shutil.copy2(BUILD / MODULE, TREE / "engine" / MODULE)
    return True


def run_tests(tests: tuple[str, ...], limit_s: float) -> int | None:
    """pytest's exit status, or None if it did not end within the limit; OUTPUT holds what it printed."""
    environment = {**os.environ, "CI": "1", "PYTHONDONTWRITEBYTECODE": "1", "VIRTUAL_ENV": str(ENVIRONMENT)}
    scratch = Path(tempfile.mkdtemp(prefix="mutants-"))  # short: the path of a socket has 107 bytes at most
    with OUTPUT.open("wb") as output:
        process = subprocess.Popen(
            [ENVIRONMENT / "bin/python", *PYTEST, f"--basetemp={scratch}", *tests],
            cwd=TREE,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(max(limit_s, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # pytest, and the processes that it started
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


class Run:
    """One run of `make mutants`: the times of clean tests, and the result of each mutation."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._clean_s: dict[tuple[str, ...], float | None] = {}
        self.counts: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._ends

    def _clean(self, tests: tuple[str, ...]) -> float | None:
        """How long the tests take when nothing is changed; None if they do not pass, and so say nothing."""
        if tests not in self._clean_s:
            begun = time.monotonic()
            status = run_tests(tests, min(4 * MUTANT_S, self._ends - begun))
            if status == 0:
                self._clean_s[tests] = time.monotonic() - begun
                print(f"# {self._clean_s[tests]:4.0f} s unchanged: {' '.join(tests)}", flush=True)
            else:
                self._clean_s[tests] = None
                print(f"# do not pass unchanged (pytest: {status}): {' '.join(tests)}", flush=True)
                print(
                    "".join(f"#   {line}\n" for line in OUTPUT.read_text("utf-8", "replace").splitlines()[-5:]), end=""
                )
        return self._clean_s[tests]

    def try_one(self, mutation: Mutation) -> str:
        """How the mutation ended; the copy is as before afterwards."""
        tests = tests_for(mutation.path)
        clean_s = self._clean(tests)
        if clean_s is None:
            return UNDECIDED
        compiled = mutation.path.startswith("native/")
        target = TREE / mutation.path
        source = target.read_bytes()
        try:
            target.write_bytes(mutation.apply(source))
            if compiled and not build():
                return INVALID
            remaining_s = self._ends - time.monotonic()
            status = run_tests(tests, min(MUTANT_S, remaining_s))
        finally:
            target.write_bytes(source)
            if compiled and not build():
                sys.exit(f"engine: {mutation.path} does not compile any more after {mutation.name}")
        if status is None:
            return HANGS if remaining_s > MUTANT_S > 2 * clean_s else UNDECIDED
        return UNNOTICED if status == 0 else NOTICED

    def report(self, mutation: Mutation) -> None:
        change = mutation.describe((TREE / mutation.path).read_bytes())
        if reason := EQUIVALENT.get((mutation.path, change)):
            print(f"equivalent   {mutation.name}  {change}: {reason}", flush=True)
            return
        begun = time.monotonic()
        outcome = self.try_one(mutation)
        self.counts[outcome] += 1
        print(f"{outcome:12} {mutation.name}  {change}  ({time.monotonic() - begun:.0f} s)", flush=True)


def all_mutations() -> Iterator[Mutation]:
    """Of every file of the engine but the benchmark, which nothing durable depends on."""
    for path in sorted([*(TREE / "engine").rglob("*.py"), *(TREE / "native").rglob("*.c")]):
        name = path.relative_to(TREE).as_posix()
        if not name.startswith("engine/bench/"):
            yield from (c_mutations if path.suffix == ".c" else python_mutations).mutations(name, path.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Try small changes to the engine, and list those that no test notices."
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="a prefix of mutations' names: a folder, a file, or one mutation")
    options = parser.parse_args()
    prepare()
    chosen = [mutation for mutation in all_mutations() if mutation.name.startswith(options.only)]
    if not chosen:
        sys.exit(f"engine: no mutation's name begins with {options.only!r}")
    run = Run(options.seconds)
    print(f"# {len(chosen)} mutations, seed {options.seed}, {options.seconds:.0f} s", flush=True)
    for mutation in sample(chosen, options.seed):
        if run.over:
            break
        run.report(mutation)
    if len(chosen) == 1:
        print(OUTPUT.read_text("utf-8", "replace"))
    noticed = run.counts[NOTICED] + run.counts[HANGS]
    print(f"# {noticed} of {noticed + run.counts[UNNOTICED]} noticed; {dict(run.counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
