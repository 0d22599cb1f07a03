"""The long form of test_tears.py: as many saves with a writer beside them as requested.

    python tests/support/tear_campaign.py --rounds 10000 --seed 1
    python tests/support/tear_campaign.py --seed 1 --replay LIFE

A round is one save.  Random choices follow from the seed and the number of the life; `tears` says what a life is.  The
first end that a guard does not permit ends the campaign, with the arguments that repeat the life.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from conditions import CONDITIONS, under
from guarded import KINDS_HERE
from tears import Figures, Life, Tear, report
from writers import WIDTH

from engine.options import GuardName

_TOLD_EVERY = 10


def campaign(rounds: int, seed: int, replay: int | None, width: int, directory: str | None) -> int:
    """Live until so many rounds are done; the exit status."""
    guards: tuple[GuardName, ...] = (*KINDS_HERE, "fence")
    figures, began = Figures(), time.monotonic()
    try:
        for number in count() if replay is None else [replay]:
            with tempfile.TemporaryDirectory(prefix="engine-tears-", dir=directory) as root:
                try:
                    Life(Path(root), seed, number, figures, guards, width).live()
                except Tear as tear:
                    again = f"python tests/support/tear_campaign.py --seed {seed} --replay {number} --width {width}"
                    sys.stderr.write(f"after {figures.save_count} rounds: {tear}\n  see it again with: {again}\n")
                    return 1
            if number % _TOLD_EVERY == 0:
                sys.stdout.write(f"life {number}: {figures.save_count} rounds, {time.monotonic() - began:.0f} s\n")
                sys.stdout.flush()
            if figures.save_count >= rounds:
                break
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
    finally:
        sys.stdout.write(report(figures))
    sys.stdout.write(f"no tear in {figures.save_count} rounds, {time.monotonic() - began:.0f} s\n")
    return 0


def main() -> int:
    """Run a campaign or replay one life; the exit status says whether everything held."""
    arguments = argparse.ArgumentParser(description="Write beside saves, until one is mixed.")
    arguments.add_argument("--rounds", type=int, default=10_000, help="how many saves at least")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--replay", type=int, metavar="LIFE", help="this life only")
    arguments.add_argument("--width", type=int, default=WIDTH, help="of the model: 15000 makes an arena of 8 GB")
    arguments.add_argument("--condition", choices=CONDITIONS, help="of the host")
    arguments.add_argument("--directory", help="where the checkpoints are; default: the system's temporary directory")
    options = arguments.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    sys.stdout.flush()
    with under(options.condition):
        return campaign(options.rounds, options.seed, options.replay, options.width, options.directory)


if __name__ == "__main__":
    sys.exit(main())
