"""Forks beside a monitor's channels and memory: a child keeps no copy, wherever the fork comes."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from processes import descriptors

from engine.monitor import forks, process
from engine.monitor.protocol import Channel
from engine.monitor.shared_memory import make_memory
from engine.options import Options

_FORKS = 50


def ours() -> Counter[str]:
    """The descriptors of the kinds that a monitor shares with a trainer."""
    kinds = ("socket:", "/memfd:engine-", "anon_inode:[eventfd]")
    return Counter(name for name in descriptors() if name.startswith(kinds))


def in_a_fork(function: Callable[[], object]) -> object:
    """The result of a function in a forked child."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            result = function()
        except BaseException:
            result = traceback.format_exc()
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        result = json.loads(answer.read())
    os.wait()
    return result


def test_a_child_keeps_no_memory_that_is_on_its_way_to_a_monitor() -> None:
    before = ours()
    board, shared = make_memory("engine-test", 4096), process._Memory()
    shared.make(Options())
    assert (ours() - before).total() == 4
    assert in_a_fork(lambda: sorted((ours() - before).elements())) == []
    assert os.fstat(board.number).st_size == 4096, "the parent has lost it"
    shared.close()
    board.close()
    assert ours() == before


def test_a_fork_beside_a_thread_that_makes_channels_and_memory() -> None:
    before = ours()
    ended = threading.Event()

    def make() -> None:
        while not ended.is_set():
            channel, theirs = Channel.pair()
            memory = make_memory("engine-test", 4096)
            memory.close()
            channel.close()
            theirs.close()

    maker = threading.Thread(target=make)
    maker.start()
    try:
        for _ in range(_FORKS):
            assert in_a_fork(lambda: sorted((ours() - before).elements())) == []
    finally:
        ended.set()
        maker.join()
    assert ours() == before


def test_a_fork_in_the_middle_of_making_a_channel_of_the_same_thread() -> None:
    """As in a signal handler."""
    with forks.no_fork():
        assert in_a_fork(lambda: True) is True
        with forks.no_fork():
            pass


def test_a_thread_that_is_interrupted_while_it_makes_a_channel_holds_up_no_other(tmp_path: Path) -> None:
    """A signal handler may wait for the others, as `close` does."""
    pairs: list[Channel] = []

    def make() -> None:
        channel, theirs = Channel.pair()
        theirs.close()
        pairs.append(channel)

    with forks.no_fork():
        other = threading.Thread(target=make)
        other.start()
        other.join(60)
        assert pairs, "it waits for the interrupted thread"
    pairs.pop().close()


def test_a_child_can_have_a_monitor_of_its_own(tmp_path: Path) -> None:
    """The child has a new lock, although another thread held the old one at the fork."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with forks.no_fork():
            inside.set()
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(60)

    def make() -> bool:
        channel, theirs = Channel.pair()
        with channel, theirs:
            return forks._lock.acquire(timeout=0)

    assert in_a_fork(make) is True  # the fork waits for a second, and goes on
    leave.set()
    holder.join()
