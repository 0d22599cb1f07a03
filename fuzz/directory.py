"""For any content of a checkpoint directory, an Engine works or raises an EngineError, and touches nothing outside.

A restore returns the state saved under that step, bit for bit, or raises.  So does `load`.  `verify` finds damage
wherever a restore does.  Their memory is bounded by the size of the files, and none of them waits for a FIFO or a
device.

Every input is choices for hypothesis: a few changes to a directory with two checkpoints, a spare and a leftover.  Files
are cut, flipped, swapped or deleted, and replaced by links to each other and to files outside, FIFOs, sockets, devices
and directories.  Names of every kind appear.  A hostile writer rewrites a manifest with the right digest.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import stat
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import nearly_valid

import engine
from engine.errors import EngineError, EngineWarning
from engine.format.manifest import decode
from fuzz.choices import fuzz_one_input
from fuzz.limits import allocating_at_most

SMALL: dict[str, Any] = {"keep": 2, "max_async": 1, "staging_bytes": 1 << 16, "block_bytes": 4096}

# A manifest is read several times, one after the other, and takes the bounds of `fuzz/manifest.py` and
# `fuzz/extra.py` together.  A plan of it takes less.
BYTES_PER_BYTE = 192
# An Engine with its slots' bookkeeping, and the memory of Python to adopt, save and restore a few tensors.
ENGINE_BYTES = 4 << 20

# Deeper than Python calls (sys.getrecursionlimit), at two calls a level.
DEEP = 510

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors")
SPARE = ".engine/spare/00000001"
DIRECTORIES = ("step-00000001", "step-00000002", SPARE, "step-00000009.partial")
ODD_NAMES = (
    *("step-00000003", "step-00000003.partial", "step-00000007.damaged", "step-000000001", "lock", "spare", ".engine"),
    *("step-9223372036854775807", "step-9999999999999999999", "99999999", "9999999999999999999", "00000002"),
    *(
        "step-" + 8 * "\N{FULLWIDTH DIGIT ONE}",
        8 * "\N{ARABIC-INDIC DIGIT ONE}",
        "\udcff\udcfe",
        "x" * 255,
        "a\nb",
        "-rf",
    ),
)
PLACES = (*DIRECTORIES, ".engine/spare", ".engine", ".")
PATHS = st.sampled_from(
    [*PLACES[:-1], *(f"{directory}/{file}" for directory in DIRECTORIES for file in FILES)]
) | st.builds("/".join, st.tuples(st.sampled_from(PLACES), st.sampled_from([*ODD_NAMES, *FILES])))


class Change(NamedTuple):
    """One change to a directory, and its parameters; each kind uses the parameters that it needs."""

    kind: str
    path: str
    other: str
    number: int
    content: bytes


class Template(NamedTuple):
    """A directory to start from, the contents of its steps, and the manifests of two of them."""

    parent: Path
    payloads: Mapping[int, Mapping[str, bytes]]
    manifests: Mapping[int, bytes]


@functools.cache
def training() -> engine.Arena:
    """A training that has made one step: two blocks of parameters, three of optimizer state, and a header for each.

    Reused for the next input, unless this one restored forged bytes: making one takes longer than all the rest.
    """
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    arena = engine.Arena.adopt(model, optimizer)
    model(torch.ones(40)).sum().backward()
    optimizer.step()
    return arena


def held(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@functools.cache
def template() -> Template:
    """Made once; the content of `parent` is copied for every input."""
    parent = Path(tempfile.mkdtemp())
    payloads: dict[int, dict[str, bytes]] = {}
    arena = training()
    with engine.Engine(parent / "root", **SMALL) as eng:
        for step in (0, 1, 2):
            for tensor in arena.state_dict().values():
                tensor.fill_(step + 0.5)
            eng.checkpoint(arena, step=step, extra={"step": step}, chunk_bytes=4096).result()
            payloads[step] = held(arena.state_dict())
    leftover = parent / "root" / DIRECTORIES[3]
    leftover.mkdir()
    shutil.copy(parent / "root" / DIRECTORIES[0] / "model.safetensors", leftover)
    # The files outside equal those inside, so that only our checks notice that a link was followed.
    shutil.copytree(parent / "root", parent / "outside")
    manifests = {step: (parent / "root" / f"step-{step:08d}" / "manifest.json").read_bytes() for step in (1, 2)}
    return Template(parent, payloads, manifests)


# -- changing it ------------------------------------------------------------------------------------------------------


def _rewrite(path: Path, edit: Callable[[bytearray], None]) -> None:
    content = bytearray()
    if os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode):
        content += path.read_bytes()
    else:
        _away(path)  # a FIFO would have us wait, too
    edit(content)
    path.write_bytes(content)


def _flip(content: bytearray, number: int) -> None:
    if content:
        content[number // 8 % len(content)] ^= 1 << number % 8


def _repeat_block(content: bytearray, number: int) -> None:
    block = content[:4096]
    content[4096 * (number % 3) :][:4096] = block


def _away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    if source != target and source not in target.parents and target not in source.parents:
        _away(target)
        source.rename(target)


def _copy(source: Path, target: Path) -> None:
    _away(target)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def _listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fsencode(path))


# /dev/null and /dev/zero, which could be read; and a number that no driver has.
DEVICES = (os.makedev(1, 3), os.makedev(1, 5), os.makedev(511, 99))


def apply(root: Path, change: Change) -> None:
    """Do one thing, if it can be done."""
    path, other, outside = root / change.path, root / change.other, root.parent / "outside"
    # ValueError: shutil refuses to copy a tree into itself, OSError: the existing files do not allow it.
    with suppress(OSError, ValueError):
        match change.kind:
            case "flip":
                _rewrite(path, lambda content: _flip(content, change.number))
            case "cut":
                _rewrite(path, lambda content: content.__delitem__(slice(change.number, None)))
            case "extend":
                _rewrite(path, lambda content: content.extend(change.content))
            case "block":
                _rewrite(path, lambda content: _repeat_block(content, change.number))
            case "write":
                _rewrite(path, lambda content: content.__setitem__(slice(None), change.content))
            case "delete":
                _away(path)
            case "move":
                _move(path, other)
            case "copy" if path != other and path not in other.parents and other not in path.parents:
                _copy(path, other)
            case _:
                _away(path)
                put(path, other, outside / change.path, change)


def put(path: Path, other: Path, outside: Path, change: Change) -> None:
    """Put something that is no file where nothing is."""
    match change.kind:
        case "link":
            path.symlink_to(other)
        case "link out":
            path.symlink_to(outside)
        case "link up":
            path.symlink_to(os.path.relpath(outside, path.parent))
        case "hard link":
            path.hardlink_to(other)
        case "hard link out":
            path.hardlink_to(outside)
        case "fifo":
            os.mkfifo(path)
        case "socket":
            _listen(path)
        case "device":  # as root only
            os.mknod(path, stat.S_IFCHR | 0o600, DEVICES[change.number % len(DEVICES)])
        case "directory":
            path.mkdir()
        case "deep":
            os.makedirs(path / "/".join("d" * DEEP))


KINDS = (
    *("flip", "cut", "extend", "block", "write", "delete", "move", "copy", "link", "link out", "link up", "hard link"),
    *("hard link out", "fifo", "socket", "device", "directory", "deep"),
)
CHANGES = st.builds(Change, st.sampled_from(KINDS), PATHS, PATHS, st.integers(0, 2**16), st.binary(max_size=64))
# A hostile writer's manifest: one field changed, and the digest right.
FORGERIES = st.none() | st.sampled_from([1, 2]).flatmap(
    lambda step: st.tuples(
        st.just(step), st.deferred(lambda: nearly_valid(st.just(decode(template().manifests[step]))))
    )
)


# -- the invariant ----------------------------------------------------------------------------------------------------


def one_input(data: bytes) -> None:
    """Hold the invariant for one input."""
    fuzz_one_input(changed, data)


@given(st.lists(CHANGES, max_size=4), FORGERIES)
def changed(changes: list[Change], forgery: tuple[int, bytes] | None) -> None:
    """The invariant, for a directory to which all this was done."""
    with tempfile.TemporaryDirectory() as scratch:
        parent = Path(scratch)
        for name in ("root", "outside"):
            shutil.copytree(template().parent / name, parent / name)
        root = parent / "root"
        if forgery is not None:
            (root / f"step-{forgery[0]:08d}" / "manifest.json").write_bytes(forgery[1])
        for change in changes:
            apply(root, change)
        before = look(parent)
        training()
        with allocating_at_most(BYTES_PER_BYTE * size(root) + ENGINE_BYTES), warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineWarning)
            use(root, honest=forgery is None)
        if forgery is not None:
            training.cache_clear()
        assert look(parent) == before, "something outside was touched"


def size(root: Path) -> int:
    """Bytes of all files in a directory."""
    paths = (Path(directory, name) for directory, _, names in os.walk(root) for name in names)
    return sum(path.lstat().st_size for path in paths)


def look(parent: Path) -> dict[str, tuple[object, ...]]:
    """All files beside `root`: kind, length, time of change and content.

    Not the number of names: the engine may delete one of those inside.
    """
    seen: dict[str, tuple[object, ...]] = {}
    for directory, directories, names in os.walk(parent):
        if Path(directory) == parent:
            directories.remove("root")
        for path in (Path(directory, name) for name in (".", *directories, *names)):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            changed_ns = None if Path(directory) == parent and path == parent else status.st_mtime_ns
            seen[str(path)] = (status.st_mode, status.st_size, changed_ns, content)
    return seen


def use(root: Path, honest: bool) -> None:
    """Every call of an Engine; with `honest`, on checkpoints that are not forged."""
    arena = training()
    try:
        eng = engine.Engine(root, **SMALL)
    except EngineError:
        return
    with eng:
        for step in eng.steps():
            check_step(eng, root, step, honest)
        with suppress(EngineError):
            info = eng.restore(arena)
            assert not honest or held(arena.state_dict()) == template().payloads[info.step]
        with suppress(EngineError):
            eng.verify()
        check_save(eng)


def check_save(eng: engine.Engine) -> None:
    """A save beside all this is there afterwards, or is refused."""
    tensors = {"saved": torch.arange(3000.0)}
    try:
        saved = eng.checkpoint(engine.Arena.wrap(tensors)).result()
    except EngineError:
        return
    assert eng.verify(saved.step) == () and held(eng.load(saved.step)) == held(tensors)


def check_step(eng: engine.Engine, root: Path, step: int, honest: bool) -> None:
    """A step restores to the state saved under its number, or is refused; all ways to read it agree."""

    def restored() -> Mapping[str, torch.Tensor]:
        eng.restore(training(), step)
        return training().state_dict()

    reads: tuple[Callable[[], Mapping[str, torch.Tensor]], ...] = (lambda: eng.load(step), restored)
    answers: list[bool] = []
    for read in reads:
        try:
            found = held(read())
        except EngineError:
            answers.append(False)
            continue
        answers.append(True)
        directory = root / f"step-{step:08d}"
        assert not any(path.is_symlink() for path in (directory, *(directory / file for file in FILES)))
        assert not honest or found == template().payloads[step], "what was not saved was restored"
    try:
        sound = eng.verify(step) == ()
    except EngineError:
        sound = False
    assert sound or not any(answers), "a restore took what verification calls damaged"
    assert not honest or answers == [sound, sound], (answers, sound)
