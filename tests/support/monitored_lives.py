"""The trainee with a monitor: a training to be killed with it or without it, and the server that forks its lives.

    python tests/support/monitored_lives.py      reads requests and writes answers, as trainee.py does

Theory of operation.  As `trainee`, with ``isolation="process"``.  A life's victim is the trainer, the monitor, or both.
"open" and "save" count the operations of the monitor (`deadly_monitor`).  "point" counts what the trainer does on the
commit thread of one save: before and after each message, each attachment of files, and the mark that all is staged.
"write" and "time" are as there.  "call" counts system calls of the victim, from the save after those that are waited
for: strace(1) kills it on entry to one.

A trainer whose monitor was killed has to go on: it logs each save that is lost, and its last step has to be reported.

The server is the reaper of orphans (prctl(2), PR_SET_CHILD_SUBREAPER), so it knows of every process of a life, also of
a monitor whose trainer is dead, and waits until each has ended.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import deadly_monitor
import torch
from deadly import HANG_S, Life, Log, kill_and_wait, kill_myself
from deadly_monitor import LIFE, TRAINER, first_death
from trainee import ENGINE_OPTIONS, Training, digest

import engine
from engine.io.pipeline import Pipeline
from engine.monitor import process
from engine.monitor.client import MonitoredStore
from engine.monitor.process import Monitor
from engine.monitor.protocol import Begin, Channel
from engine.monitor.shared_memory import Board

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


class _Thread(threading.local):
    """The save of a commit thread, and how many points it has passed."""

    step: int | None = None
    count = 0


class _Trainee:
    """One life."""

    def __init__(self, life: Life, log: Log) -> None:
        self._life = life
        self._log = log
        self._training = Training()
        self._saves: deque[tuple[engine.Save, str]] = deque()
        self._thread = _Thread()
        self._target: int | None = None
        self._traced: Monitor | None = None
        self._eng: engine.Engine
        os.environ |= {LIFE: json.dumps(asdict(life)), TRAINER: str(os.getpid())}
        process.command = lambda descriptor: [sys.executable, deadly_monitor.__file__, str(descriptor)]

    def live(self) -> None:
        """From the opening to the end, unless it is killed."""
        before = _held()
        self._watch()
        with self._persist(self._open) as eng:
            self._eng = eng
            self._log("opened", steps=eng.steps(), spare_count=0, names=os.listdir(self._life.directory))
            for step in eng.steps():
                self._log("loaded", step=step, digest=digest(self._persist(partial(self._eng.load, step))))
            self._train(eng, self._resume(eng))
        if self._traced is not None and self._traced.close() == -signal.SIGKILL:
            self._log("dying", line="S", call=self._life.call)
        del self._eng, self._training, self._traced, eng  # a guard stays with its memory, and has the last save's board
        gc.collect()
        self._log("closed", left=sorted(set(_held()) - set(before)))

    def _open(self) -> engine.Engine:
        life = self._life
        return engine.Engine(
            life.directory,
            keep=life.keep,
            backend=life.backend,  # type: ignore[arg-type]
            split_untrained=life.split,
            isolation="process",
            on_error=lambda *_: None,  # each save is asked
            **ENGINE_OPTIONS,
        )

    def _persist(self, function: Callable[[], Any]) -> Any:
        """Once more, if the monitor was killed meanwhile."""
        try:
            return function()
        except (engine.MonitorLostError, engine.PlatformError) as error:
            if not os.path.exists(self._life.log + ".killed"):
                raise
            self._log("persisted", what=str(error))
            return function()

    def _resume(self, eng: engine.Engine) -> int:
        """Restore the newest step, if there is one; returns the next step."""
        if not eng.steps():
            return 1
        restored = self._persist(lambda: eng.restore(self._training.arena))
        torch.set_rng_state(restored.extra["rng"])
        passed_over = [found.reason for found in restored.passed_over]
        self._log("restored", step=restored.step, digest=self._training.digest(), passed_over=passed_over)
        return int(restored.step) + 1

    def _train(self, eng: engine.Engine, first: int) -> None:
        life = self._life
        self._target = first + life.settled_count
        for step in range(first, first + life.step_count):
            self._step(eng, step, wait=step < self._target)
            if step == self._target and life.where == "write":
                self._end_writing(self._saves[-1][0])
            while self._saves and self._saves[0][0].done():
                self._report()
        while self._saves:
            self._report()
        if life.step_count:
            last = first + life.step_count
            self._step(eng, last, wait=False)
            if not self._report():
                self._step(eng, last + 1, wait=False)
                self._report(is_last=True)

    def _step(self, eng: engine.Engine, step: int, wait: bool) -> None:
        self._training.step(step)
        state = self._training.digest()
        if step == self._target and self._life.where == "call":
            self._trace()
        self._log("began", step=step)
        extra = {"rng": torch.get_rng_state()}
        save = self._persist(lambda: eng.checkpoint(self._training.arena, step, extra=extra))
        self._saves.append((save, state))
        if wait:
            save.exception(HANG_S)

    def _report(self, is_last: bool = False) -> bool:
        """Say that the oldest save is durable, once it is; False if it is lost with its monitor."""
        save, state = self._saves.popleft()
        error = save.exception(HANG_S)
        if isinstance(error, engine.MonitorLostError) and os.path.exists(self._life.log + ".killed") and not is_last:
            self._log("lost", step=save.step)
            return False
        if error is not None:
            raise error
        self._log("reported", step=save.result().step, digest=state)
        return True

    # -- where it ends --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Have every point of a save pass here."""
        _around(Channel, "send", self._point)
        _around(Channel, "expect", self._point)
        _around(Pipeline, "attach", self._point)
        _around(Board, "mark_staged", self._point)

    def _point(self, name: str, edge: int, arguments: Any) -> None:
        if not threading.current_thread().name.startswith("engine-commit"):
            return
        thread = self._thread
        if name == "send" and edge == 0 and isinstance(arguments[1], Begin):
            thread.step, thread.count = arguments[1].step, 0
        if name == "mark_staged":
            self._log("marked" if edge else "marking", step=thread.step)
        number, thread.count = thread.count, thread.count + 1
        life = self._life
        if life.where == "point" and life.at == number and thread.step == self._target is not None:
            self._end(line=f"{name}-{'after' if edge else 'before'}", step=thread.step)

    def _trace(self) -> None:
        """Have the victim killed on entry to one of its system calls from now on."""
        life = self._life
        assert first_death(life)
        pid = os.getpid()
        if life.victim == "monitor":
            store = self._eng._store
            assert isinstance(store, MonitoredStore)
            self._traced = store._monitors.last
            pid = self._traced.pid
        inject = f"inject={life.call}:signal=SIGKILL:when={int(life.at)}"
        command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", f"trace={life.call}", "-e", inject, "-p", str(pid)]
        self._strace = subprocess.Popen(command)
        while not _is_traced(pid):
            assert self._strace.poll() is None, "strace does not attach to its own user's process: run as root"
            time.sleep(0.001)

    def _end_writing(self, save: engine.Save) -> None:
        nbytes = sum(file.nbytes for file in save.plan.files)
        while (written := _done_bytes(save)) < self._life.at * nbytes and not save.done():
            os.sched_yield()
        self._end(line="W", step=save.step, written=written, nbytes=nbytes)

    def _end(self, **where: Any) -> None:
        """End the victim.  If that is the monitor, go on."""
        if not first_death(self._life):
            return
        self._log("dying", **where)
        if self._life.victim in ("monitor", "both"):
            store = self._eng._store
            assert isinstance(store, MonitoredStore)
            kill_and_wait(store._monitors.last.pid)
        if self._life.victim in ("trainer", "both"):
            kill_myself()


def _is_traced(pid: int) -> bool:
    """Whether every thread of a process is traced."""
    with suppress(FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
        tasks = [Path(f"/proc/{pid}/task/{task}/status").read_text() for task in os.listdir(f"/proc/{pid}/task")]
        return not any("TracerPid:\t0\n" in status for status in tasks)
    return False


def _done_bytes(save: engine.Save) -> int:
    stats = save.stats()
    return stats["io_bytes"] + stats["skipped_bytes"]


def _around(owner: type, name: str, point: Callable[[str, int, Any], None]) -> None:
    """Have `point` called before (0) and after (1) each call of a method."""
    real: Callable[..., Any] = getattr(owner, name)

    def method(*arguments: Any, **named: Any) -> Any:
        point(name, 0, arguments)
        result = real(*arguments, **named)
        point(name, 1, arguments)
        return result

    setattr(owner, name, method)


def _held() -> list[str]:
    """What a process could leave: its sockets, eventfds and shared memory, open or mapped."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:  # the one that listed them
            continue
    found += [line.split(None, 5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line]
    return [name.strip() for name in found if name.startswith(("socket:", "/memfd:", "anon_inode:"))]


# -- the server ---------------------------------------------------------------------------------------------------


def _fork(life: Life) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    log = Log(life.log)
    try:
        torch.set_num_threads(1)  # so that sums are formed in one order
        log("started")
        if life.directory:
            _Trainee(life, log).live()
        else:
            training = Training()
            for step in range(1, life.step_count + 1):
                training.step(step)
                log("reported", step=step, digest=training.digest())
        status = 0
    except BaseException:
        log("failed", what=traceback.format_exc())
    finally:
        os._exit(status)


def _monitors(life: Life) -> list[int]:
    lines = Path(life.log).read_text().splitlines() if os.path.exists(life.log) else []
    return [event["pid"] for event in map(json.loads, lines) if event["event"] == "monitor"]


def _kill_now(life: Life, child: int) -> None:
    """End the victim of a life at a moment."""
    monitors = _monitors(life)[-1:]
    if life.victim != "trainer" and not monitors:
        return  # it comes to its end
    Path(life.log + ".killed").touch()
    if life.victim in ("trainer", "both"):
        os.kill(child, signal.SIGKILL)
    if life.victim in ("monitor", "both"):
        kill_and_wait(monitors[0])


def _await(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _reap() -> list[int] | None:
    """The statuses of all orphans, once each has ended; None if one hangs, which is killed."""
    statuses: list[int] = []
    began = time.monotonic()
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return statuses
        if pid:
            statuses.append(os.waitstatus_to_exitcode(status))
        elif time.monotonic() - began > HANG_S:
            for task in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                os.kill(int(task), signal.SIGKILL)
                os.waitpid(int(task), 0)
            return None
        else:
            time.sleep(0.005)


def _serve(life: Life) -> dict[str, Any]:
    Path(life.log + ".killed").unlink(missing_ok=True)
    began = time.monotonic()
    child = _fork(life)
    ended = os.pidfd_open(child)
    in_time = _await(ended, life.at if life.where == "time" else HANG_S)
    if not in_time and life.where == "time":
        _kill_now(life, child)
        in_time = _await(ended, HANG_S)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - began
    orphans = [] if life.hurry else _reap()
    return {"status": status, "hung": not in_time or orphans is None, "seconds": seconds, "orphans": orphans or []}


def main() -> None:
    """As `trainee.main`; the answer has the statuses of the orphans too."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"Retention\(.*keeps fewer")  # lives of one directory differ in `keep`
    warnings.filterwarnings("ignore", "the kernel did not register")  # an ordinary user's memlock limit
    logging.getLogger("engine").addHandler(logging.StreamHandler())
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    Training()  # torch imports a thousand modules late
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
    for request in sys.stdin:
        sys.stdout.write(json.dumps(_serve(Life(**json.loads(request)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
