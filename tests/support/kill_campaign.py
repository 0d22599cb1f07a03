"""The long form of test_kills.py: as many kills as requested, on each file system in turn.

    python tests/support/kill_campaign.py --kills 5000 --seed 1
    python tests/support/kill_campaign.py --seed 1 --replay ROUND KIND

With --monitor the engine has a monitor, and the victim is the trainer, the monitor, or both (`monitored_kills`).
With --split untrained tensors have files of their own, which are linked from step to step.

A round is one ordeal on each file system, in a new directory.  The volumes are reused, and age.  Random choices
follow from the seed, the round and the file system.  The first violation after a kill ends the campaign, with the
arguments that repeat the ordeal.  Kills at a random moment are repeated at the same time, but may hit another
operation.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kills import VOLUMES, Figures, Lost, Ordeal, Server, serving
from monitored_kills import CALLS, VICTIMS, MonitoredFigures, MonitoredOrdeal
from volumes import volume

# In one ordeal; with these a third of all kills come at a random moment.
_RANDOM_COUNT = 100

# In one ordeal with a monitor, for each victim: one in so many operations, other ones each time, and the random ones.
_EVERY, _MONITORED_RANDOM_COUNT = 12, 5

# And kinds of system calls; one in `_EVERY` of each.
_CALL_COUNT = 6


@dataclass(frozen=True)
class Campaign:
    """What all ordeals have in common."""

    server: Server
    seed: int
    split: bool
    monitor: bool
    figures: Figures

    def suffer(self, root: Path, kind: str, round_number: int) -> None:
        """One ordeal."""
        chance = random.Random(f"{self.seed} {round_number} {kind}")
        try:
            if isinstance(self.figures, MonitoredFigures):
                monitored = MonitoredOrdeal(self.server, root, kind, chance, self.figures, self.split)
                monitored.suffer_all(VICTIMS, _EVERY, _MONITORED_RANDOM_COUNT)
                monitored.suffer_calls(("trainer", "monitor"), chance.sample(CALLS, _CALL_COUNT), _EVERY)
            else:
                Ordeal(self.server, root, kind, chance, self.figures, self.split).suffer([False, True], _RANDOM_COUNT)
        except Lost as lost:
            raise Lost(
                f"after {self.figures.kill_count} kills: {lost}\n"
                f"  see it again with: python tests/support/kill_campaign.py --seed {self.seed} "
                f"{'--monitor ' * self.monitor}{'--split ' * self.split}--replay {round_number} {kind}\n"
            ) from lost


def report(figures: Figures, seconds: float) -> str:
    """The figures, in a few lines."""
    lines = [f"{figures.kill_count} kills in {figures.life_count} lives, {seconds:.0f} s"]
    for kind in VOLUMES:
        phases = {phase: number for (where, phase), number in sorted(figures.phases.items()) if where == kind}
        told = ", ".join(f"{phase} {number}" for phase, number in phases.items())
        lines.append(f"  {kind}: {sum(phases.values())} ({told})")
    lines.append(f"  backends: {', '.join(f'{name} {number}' for name, number in sorted(figures.backends.items()))}")
    lines.append(
        f"  {figures.random_count} at a random moment, of which {figures.random_in_flight_count} hit a save in flight; "
        f"{figures.torn_count} between the first byte of a save and its last; {figures.recycled_count} saves recycled, "
        f"{figures.linked_count} files linked"
    )
    if isinstance(figures, MonitoredFigures):
        lines.append(
            f"  victims: {', '.join(f'{name} {number}' for name, number in sorted(figures.victims.items()))}; saves of "
            f"a dead trainer: {figures.committed_count} committed, {figures.discarded_count} discarded; of a dead "
            f"monitor: {figures.lost_count} failed"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run a campaign or replay one ordeal; the exit status says whether everything held."""
    arguments = argparse.ArgumentParser(description="Kill a training again and again, until something is lost.")
    arguments.add_argument("--kills", type=int, default=5000, help="how many at least")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--monitor", action="store_true", help="with isolation='process'")
    arguments.add_argument("--split", action="store_true", help="untrained tensors in files of their own")
    arguments.add_argument("--replay", nargs=2, metavar=("ROUND", "KIND"), help="this ordeal only")
    options = arguments.parse_args()
    sys.stdout.write(f"seed {options.seed}\n")
    began, figures = time.monotonic(), MonitoredFigures() if options.monitor else Figures()
    program = "monitored_lives.py" if options.monitor else "trainee.py"
    kinds = [options.replay[1]] if options.replay else list(VOLUMES)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-kills-"))
        server = stack.enter_context(serving(Path(scratch), program))
        campaign = Campaign(server, options.seed, options.split, options.monitor, figures)
        roots = {kind: stack.enter_context(volume(kind, VOLUMES[kind])) for kind in kinds}
        try:
            for number in [int(options.replay[0])] if options.replay else count():
                for kind, root in roots.items():
                    campaign.suffer(root, kind, number)
                    sys.stdout.write(f"round {number}, {kind}: {figures.kill_count} kills\n")
                    sys.stdout.flush()
                if figures.kill_count >= options.kills:
                    break
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")
        except Lost as lost:
            sys.stderr.write(str(lost))
            return 1
        finally:
            sys.stdout.write(report(figures, time.monotonic() - began))
    sys.stdout.write("nothing lost\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
