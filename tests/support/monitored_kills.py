"""Kills of a trainer, of its monitor, or of both: the history of a directory, and the promises after every life.

Theory of operation.  As `kills`, whose checks of the disk and of the log hold here too.  In addition:

- a save whose board was marked staged before its trainer died is visible, if the monitor was not killed;
- a step whose board was never marked is never visible;
- a monitor that was not killed ends by itself, with status 0;
- a trainer whose monitor was killed reports its last step;
- a trainer that closes its engine has nothing of the monitor left.

Kills at system calls are strace's: those of each kind are counted for each thread, and the first to come so far is
killed on entry.  That is between any two effects that a process can have outside its own memory.

A life in a hurry is followed at once by another one, which has to wait for the orphan of the first by itself.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from kills import BACKENDS, Figures, Lost, Ordeal, Outcome, Server, require

VICTIMS = ("trainer", "monitor", "both")

# A life that goes on after a kill has to come to its end in a few seconds.
_STEP_COUNT = 6

# What a trainer and its monitor ask of the kernel in a save, by the names on any architecture; "?" where one has none.
CALLS = (
    "openat",
    "close",
    "?mkdir,mkdirat",
    "?rename,?renameat,renameat2",
    "?unlink,?rmdir,unlinkat",
    "?link,linkat",
    "?stat,?lstat,?newfstatat,fstat,statx",
    "getdents64",
    "fallocate",
    "ftruncate",
    "fsync,fdatasync",
    "read,pread64",
    "write,pwrite64",
    "io_uring_enter",
    "sendmsg,sendto",
    "recvmsg,recvfrom",
    "socketpair,shutdown",
    "memfd_create,fcntl",
    "mmap,munmap,madvise",
    "?poll,ppoll",
    "ioctl",
    "futex",
    "clone,clone3",
)

# Beyond so many calls of a kind the next kinds are tried: what follows is more of the same.
_CALLS_MAX = 60

# Points of a save, in each ordeal: before its files are attached, and when its board is marked.
_ATTACH, _MARKED = 4, 7


@dataclass
class MonitoredFigures(Figures):
    """Counters.  A life in which a monitor was killed counts as a kill, although its trainer goes on.

    Attributes:
        victims: kills by victim.
        committed_count: saves that a monitor committed after its trainer's death, unreported.
        discarded_count: saves that a monitor discarded after its trainer's death.
        lost_count: saves that failed because their monitor was killed.
    """

    victims: Counter[str] = field(default_factory=Counter)
    committed_count: int = 0
    discarded_count: int = 0
    lost_count: int = 0

    def note_life(self, outcome: Outcome) -> None:
        """Count any life."""
        self.life_count += 1
        did = [(event["line"], event["operation"]) for event in outcome.of("did")]
        self.recycled_count += sum(line == "C5" for line, _ in did)
        self.linked_count += did.count(("L1", "rename"))

    def note_kill(self, kind: str, life: dict[str, Any], outcome: Outcome) -> None:
        """Count a life that had a kill."""
        dying = outcome.of("dying")
        where = "S" if life["where"] == "call" else str(dying[0]["line"]).split()[0] if dying else outcome.phase
        self.phases[kind, where] += 1
        self.victims[life["victim"]] += 1
        self.backends[life["backend"]] += 1
        self.torn_count += any(0 < e["written"] < e["nbytes"] for e in dying if "written" in e)
        self.lost_count += len(outcome.of("lost"))
        if life["where"] == "time":
            self.random_count += 1
            self.random_in_flight_count += bool(outcome.in_flight or outcome.of("lost"))


class MonitoredOrdeal(Ordeal):
    """One directory's history, with a monitor.  Of `victims` each life draws one."""

    def __init__(
        self,
        server: Server,
        volume: Path,
        kind: str,
        chance: random.Random,
        figures: MonitoredFigures,
        split: bool = False,
    ) -> None:
        super().__init__(server, volume, kind, chance, figures, split)
        self._monitored = figures

    def suffer_all(self, victims: Sequence[str], every: int, random_count: int) -> None:
        """Kills at operations, points, parts of the bytes and moments.

        Args:
            victims: each of them at each place.
            every: of the operations and points only one in so many, each time other ones.
            random_count: kills of each victim at a random moment.
        """
        self._live(step_count=2)
        for victim in victims:
            for where in ("open", "save", "point"):
                self._numbers(where, victim, every)
            for number in _ATTACH, _MARKED:
                self._live("point", number, victim=victim, settled_count=1)
            for part in range(4):
                self._live("write", (part + self._chance.random()) / 4, victim=victim)
            seconds = self._live(step_count=_STEP_COUNT).seconds
            for _ in range(random_count):
                self._live("time", self._chance.uniform(0, seconds), victim=victim, keep=self._chance.randint(1, 3))
        self.end()

    def suffer_calls(self, victims: Sequence[str], calls: Sequence[str], every: int) -> None:
        """Kills on entry to system calls of a save and of those after it, of each kind the first and then some.

        Args:
            victims, calls: each of these.
            every: between two numbers of calls lie less than so many.
        """
        for victim in victims:
            for call in calls:
                number = 1  # for a thread has few of most kinds
                while number <= _CALLS_MAX:
                    outcome = self._live("call", number, call=call, victim=victim, settled_count=1)
                    if not outcome.was_killed and not outcome.of("dying"):
                        break
                    number += 1 + self._chance.randrange(every)
        self.end()

    def _numbers(self, where: str, victim: str, every: int) -> None:
        for number in count(self._chance.randrange(every), every):
            company = where != "open" and bool(self._chance.randrange(2))
            if not self._live(where, number, victim=victim, company=company, settled_count=1).of("dying"):
                return

    def _live(
        self, where: str = "", at: float = 0, step_count: int = _STEP_COUNT, keep: int = 1, **life: Any
    ) -> Outcome:
        """One life, and checks of its log, its orphans and its files."""
        life |= {"where": where, "at": at, "step_count": step_count, "keep": keep, "split": self._split}
        life |= {"backend": self._chance.choice(BACKENDS), "victim": life.get("victim", "none")}
        life["hurry"] = life["victim"] == "trainer" and bool(self._chance.randrange(2))
        outcome = self._server.live(self._directory, **life)
        self._monitored.note_life(outcome)
        if outcome.was_killed or outcome.of("dying") or (where == "time" and outcome.of("lost")):
            self._monitored.note_kill(self._kind, life, outcome)
        try:
            self._look_at_log(outcome, is_mortal=life["victim"] in ("trainer", "both"))
            self._look_at_orphans(outcome, life["victim"])
            if life["hurry"]:
                self._follow(outcome)
            self._look_at_marks(outcome, life["victim"], self.look())
        except Lost as lost:
            raise Lost(
                f"{lost}\n  on {self._kind}, in {outcome.phase}, life {self._monitored.life_count}: {life}\n  "
                + "\n  ".join(map(str, outcome.events[-12:]))
            ) from lost
        return outcome

    def _follow(self, before: Outcome) -> None:
        """A life right after that of a killed trainer, which waits for the monitor of that one."""
        keep = 3  # so that it retires nothing that the look at the marks would miss
        life = {"where": "", "step_count": 0, "keep": keep, "split": self._split, "backend": "auto", "victim": "none"}
        outcome = self._server.live(self._directory, **life)
        self._look_at_log(outcome, is_mortal=False)
        self._look_at_orphans(outcome, "none")

    def _look_at_orphans(self, outcome: Outcome, victim: str) -> None:
        fine = {0, -signal.SIGKILL} if victim in ("monitor", "both") else {0}
        require(set(outcome.orphans) <= fine, f"a monitor has ended with status {outcome.orphans}")
        for closed in outcome.of("closed"):
            require(not closed["left"], f"a closed engine has left {closed['left']}")

    def _look_at_marks(self, outcome: Outcome, victim: str, steps: list[int]) -> None:
        """What is visible is what was completely staged."""
        began, marking, marked = ({e["step"] for e in outcome.of(kind)} for kind in ("began", "marking", "marked"))
        early = began - marking & set(steps)
        require(not (began - marking) & set(steps), f"steps {early} are visible, and were not staged: {steps}")
        if victim == "trainer" and outcome.was_killed:
            require(max(steps, default=0) >= max(marked, default=0), f"{marked} were staged, and {steps} are visible")
            reported = {e["step"] for e in outcome.of("reported")}
            self._monitored.committed_count += len(set(steps) & began - reported)
            self._monitored.discarded_count += len(began - marking)
        if victim in ("monitor", "none"):
            last = max(began, default=0)
            require(last in {0, *(e["step"] for e in outcome.of("reported"))}, f"the last step {last} was not reported")
