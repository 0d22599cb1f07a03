"""A Descriptor is closed with its last reference at the latest, whenever a signal handler raises."""

from __future__ import annotations

import os
import random
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from engine.io.descriptor import Descriptor

# The interrupts of the random test, and the time in which each strikes: some twenty openings.
INTERRUPTS = 3000
INTERRUPT_S = 1e-4


class Interrupt(BaseException):
    """Raised by a signal handler."""


def opened(path: Path) -> Descriptor:
    descriptor = Descriptor()
    descriptor.fill(partial(os.open, path, os.O_RDONLY))
    return descriptor


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_it_has_no_number_before_it_is_filled_and_after_it_is_closed(tmp_path: Path) -> None:
    assert Descriptor().number == -1
    descriptor = opened(tmp_path)
    number = descriptor.number
    assert os.path.samestat(os.fstat(number), tmp_path.stat())
    descriptor.close()
    assert descriptor.number == -1 and not is_open(number)


def test_a_second_close_closes_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path)
    number = first.number
    first.close()
    second = opened(tmp_path)
    assert second.number == number
    first.close()
    first.close_in_child()
    del first
    assert is_open(number)
    second.close()


def test_the_last_reference_closes_it(tmp_path: Path) -> None:
    descriptor = opened(tmp_path)
    number = descriptor.number
    del descriptor
    assert not is_open(number)


def test_an_error_of_open_is_raised_and_nothing_is_held(tmp_path: Path) -> None:
    descriptor = Descriptor()
    with pytest.raises(FileNotFoundError):
        descriptor.fill(partial(os.open, tmp_path / "missing", os.O_RDONLY))
    assert descriptor.number == -1


def test_several_threads_may_close_it(tmp_path: Path) -> None:
    for _ in range(200):
        descriptor = opened(tmp_path)
        number = descriptor.number
        other = threading.Thread(target=descriptor.close)
        other.start()
        descriptor.close()
        other.join()
        assert not is_open(number)


def test_a_forked_child_closes_its_copy(tmp_path: Path) -> None:
    descriptor = opened(tmp_path)
    pid = os.fork()
    if pid == 0:
        number = descriptor.number
        descriptor.close_in_child()
        os._exit(is_open(number))
    assert os.waitpid(pid, 0)[1] == 0
    assert is_open(descriptor.number)
    descriptor.close()


def test_interrupts_at_random_moments_lose_no_descriptor(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    before = len(os.listdir("/proc/self/fd"))
    chance, handler = random.Random(1), signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(INTERRUPTS):
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, INTERRUPT_S))
                while True:
                    opened(tmp_path)
            except Interrupt:
                pass
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert len(os.listdir("/proc/self/fd")) == before
