"""Defaults: `engine.checkpoint` and `engine.restore`, on one Engine for each directory.

Theory of operation.  A script with one run directory should not need to name an Engine.  The first call for a
directory opens an Engine with the default options; later calls find it by the directory's real path, so that two
spellings of one path share it.  It lives until the interpreter exits, which drains it.  A forked child starts with no
default Engines, and with a new lock: another thread may have held the parent's at the fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engine.engine import Engine
from engine.errors import ArgumentError, BusyError
from engine.options import Tunables, check_keywords
from engine.session.restore import RestoreInfo
from engine.session.save import Save
from engine.state.arena import Arena
from engine.state.select import Select
from engine.store.directory import path_of

# Of Engine.checkpoint, and of Engine.
_KEYWORDS = tuple(Engine.checkpoint.__kwdefaults__ or ())
_OF_AN_ENGINE = (*(Engine.__init__.__kwdefaults__ or ()), *Tunables.__annotations__)

_engines: dict[str, Engine] = {}
_opening: set[str] = set()
_mutex = threading.RLock()  # reentrant, for a signal handler that saves


def checkpoint(arena: Arena, directory: str | os.PathLike[str], step: int | None = None, **options: Any) -> Save:
    """`Engine.checkpoint` on the directory's default Engine; the same arguments and errors."""
    for name in options:
        if name in _OF_AN_ENGINE and name not in _KEYWORDS:
            raise ArgumentError(
                f"engine.checkpoint() has no keyword {name!r}, which is one of Engine; open the directory yourself: "
                f"Engine(directory, {name}=...).checkpoint(arena)"
            )
    check_keywords("engine.checkpoint", options, _KEYWORDS)  # before the directory is made
    return _engine(directory).checkpoint(arena, step, **options)


def restore(
    arena: Arena | nn.Module | Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    select: Select = None,
    strict: bool = True,
) -> RestoreInfo:
    """`Engine.restore` on the directory's default Engine; the same arguments and errors."""
    return _engine(directory).restore(arena, step, select=select, strict=strict)


def _engine(directory: str | os.PathLike[str]) -> Engine:
    key = os.path.realpath(path_of(directory))
    with _mutex:
        found = _engines.get(key)
        if found is None or not found.is_open:
            if key in _opening:  # by this very thread: a signal handler has interrupted it
                raise BusyError(
                    f"the Engine of {key} is being opened by the code that this interrupted; call again later"
                )
            _opening.add(key)
            try:
                found = _engines[key] = Engine(directory)
            finally:
                _opening.discard(key)
        return found


def _start_afresh_in_child() -> None:
    global _mutex
    _forgotten.append(dict(_engines))  # not collected: that would close the parent's
    _engines.clear()
    _mutex = threading.RLock()
    _opening.clear()


# The parent's Engines, in a child.
_forgotten: list[dict[str, Engine]] = []

os.register_at_fork(after_in_child=_start_afresh_in_child)
