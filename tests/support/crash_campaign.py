"""The long form of test_crash.py: as many crash states as requested, or the one with a given number.

    python tests/support/crash_campaign.py --states 1000000 --seed 1
    python tests/support/crash_campaign.py --replay NUMBER

The deterministic states come first: every stop of every scenario, and every stop after a kill or a power cut in the
scenarios of `NESTED`.  The seed draws the rest.  The first violation ends the campaign, with the number that reproduces
it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator

from cases import CUT, KILL, Case, Recorder, every_plain, every_second, every_stop, random_cases
from crash import Violation, checking
from scenarios import SCENARIOS

# first_save and recycled_save: every kill and every cut in them is followed through, in some hundred thousand states.
NESTED = range(2)

_TOLD_EVERY = 10_000


def every_case(recorder: Recorder, seed: int) -> Iterator[Case]:
    """All crash states of a campaign."""
    yield from every_plain(recorder, range(len(SCENARIOS)))
    for scenario, nesting in itertools.product(NESTED, (KILL, CUT)):
        yield from every_second(recorder, scenario, nesting, every_stop(recorder, scenario))
    yield from random_cases(recorder, random.Random(seed))


def main() -> int:
    """Run a campaign or replay one state; the exit status says whether everything held."""
    arguments = argparse.ArgumentParser(description="Crash states of the engine: tried until one does not hold.")
    arguments.add_argument("--states", type=int, default=1_000_000, help="how many to try")
    arguments.add_argument("--seed", type=int, default=0, help="of the random part")
    arguments.add_argument("--replay", type=int, metavar="NUMBER", help="try this one only")
    options = arguments.parse_args()
    began = time.monotonic()
    with checking() as (recorder, checker):
        if options.replay is not None:
            cases = iter([Case.of(options.replay)])
        else:
            cases = itertools.islice(every_case(recorder, options.seed), options.states)
        for case in cases:
            try:
                checker.check(case)
            except Violation as violation:
                sys.stderr.write(f"after {checker.tried_count} crash states: {violation}\n")
                return 1
            if checker.tried_count % _TOLD_EVERY == 0:
                sys.stdout.write(f"{checker.tried_count} crash states, {checker.distinct_count} distinct\n")
                sys.stdout.flush()
        seconds = time.monotonic() - began
        sys.stdout.write(
            f"{checker.tried_count} crash states, {checker.distinct_count} distinct, nothing lost, {seconds:.0f} s\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
