"""Cache: the measurements of a directory, kept for the next run.

Theory of operation.  There is one JSON file for each directory, in the user's cache (`$XDG_CACHE_HOME`, else
`~/.cache`).  It is not in the run's `.engine`, because several hosts may mount the disk of a run, measuring leaves
nothing in the directory, and a directory is no run before its first save.  The file has a `Fingerprint` of what it was
measured for.  With another one it counts as absent: another kernel, device, engine version, number of cores, state or
base options.

What a file says is hostile: its length is bounded, msgspec checks every type and range, and the numbers choose among
candidates that `decide` makes, so the worst that a planted file can do is a slower choice among those.  A cache that
cannot be read or written is none: nothing fails for it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.errors import CorruptError, StorageError
from engine.store.filesystem import Filesystem
from engine.tuning.decide import Bytes, Measurements, Text
from engine.tuning.device import Device

# Some 8 KiB are usual.
_FILE_BYTES_MAX = 256 << 10

_log = logging.getLogger("engine")


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What measurements hold for.

    Attributes:
        engine, kernel: their versions.
        device, device_number: below the directory.
        cores: of this process.
        state_bytes, segment_count: of the arena.
        options: the base, as text.
    """

    engine: Text
    kernel: Text
    device: Device
    device_number: Bytes
    cores: Bytes
    state_bytes: Bytes
    segment_count: Bytes
    options: Text


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fingerprint: Fingerprint
    measured: Measurements


def path_for(directory: str, environment: Mapping[str, str]) -> str | None:
    """The file for a directory, given by its real path; None for a user without a home."""
    cache = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG specification has such a value ignored
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return None
        cache = os.path.join(home, ".cache")
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]
    return os.path.join(cache, "uring-checkpoint", f"tuning-{digest}.json")


def load(filesystem: Filesystem, path: str, wanted: Fingerprint) -> Measurements | None:
    """The stored measurements, if they are those of this fingerprint."""
    try:
        stored = decode(filesystem.read_file(path, _FILE_BYTES_MAX))
    except (CorruptError, StorageError) as error:
        _log.debug("no measurements are taken from the cache: %s", error)
        return None
    return stored.measured if stored.fingerprint == wanted else None


def store(filesystem: Filesystem, path: str, fingerprint: Fingerprint, measured: Measurements) -> None:
    """Replace the stored measurements.  A cache that refuses them stays as it is."""
    new = f"{path}.{secrets.token_hex(8)}.new"
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        filesystem.write_new_file(new, msgspec.json.encode(_Stored(fingerprint, measured)))
        filesystem.rename(new, path)
    except OSError as error:
        _log.debug("the measurements are not cached: %s", error)
    finally:
        with suppress(OSError):  # it was renamed, or was never made
            filesystem.unlink(new)


def decode(raw: bytes) -> _Stored:
    """A stored file.

    Raises:
        CorruptError: it is none.
    """
    try:
        return msgspec.json.decode(raw, type=_Stored)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CorruptError(f"the cached measurements are none: {error}") from None
