"""Run the zoo: `make zoo` runs all, and writes docs/trainings.md.

Usage: python tests/zoo/zoo.py [--publish FILE] [--json] [--seed N] [PATTERN ...]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from catalog import Training, load_catalog
from not_yet import complaint
from runner import Verdict, is_available, judge
from table import write_table


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, kill, resume and compare every training of the zoo.")
    parser.add_argument("patterns", nargs="*", default=["*"], help="of the names of trainings")
    parser.add_argument("--seed", type=int, default=1, help="decides when trainings are killed")
    parser.add_argument("--publish", type=Path, help="the table to write")
    parser.add_argument("--json", action="store_true", help="print each verdict as a line of JSON")
    parser.add_argument("--torch-only", action="store_true", help="only trainings that need no other package")
    options = parser.parse_args()
    catalog = load_catalog()
    chosen = [t for t in catalog.values() if any(fnmatch.fnmatchcase(t.name, p) for p in options.patterns)]
    if options.torch_only:
        chosen = [t for t in chosen if not t.needs]
    missing = [t.name for t in chosen if not is_available(t)]
    if missing:
        sys.exit(f"engine: {len(missing)} trainings need packages that `make zoo` installs, such as {missing[0]}")
    verdicts = []
    for one in chosen:
        verdict = judge(one, options.seed)
        verdicts.append(verdict)
        line = json.dumps(verdict._asdict()) if options.json else _line(one, verdict)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if options.publish:
        write_table(options.publish, list(zip(chosen, verdicts, strict=True)))
    wrong = [v.name for one, v in zip(chosen, verdicts, strict=True) if complaint(one, v)]
    if not options.json:
        sys.stdout.write(f"{len(verdicts) - len(wrong)} passed, {len(wrong)} failed\n")
    return bool(wrong) and not options.json


def _line(one: Training, verdict: Verdict) -> str:
    said = complaint(one, verdict)
    mark = "FAILED" if said else "ok    "
    return f"{mark} {verdict.seconds:5.1f} s  {one.name}: {verdict.outcome}; {said or verdict.detail}"


if __name__ == "__main__":
    sys.exit(main())
