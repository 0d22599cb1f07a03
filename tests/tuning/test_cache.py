"""The cache of measurements: only the very same host, directory and arena gets them, and no content does harm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuned import BASE, OFFERED, any_measurements, measurements, trial

from engine.errors import CorruptError
from engine.options import MAX_ASYNC_MAX
from engine.store.filesystem import Filesystem
from engine.tuning import cache
from engine.tuning.cache import Fingerprint
from engine.tuning.decide import Measurements, confirmed, in_flight, write_seconds
from engine.tuning.device import Device
from engine.tuning.interval import Costs, advise
from engine.tuning.report import render

WANTED = Fingerprint(
    engine="0.1.0",
    kernel="6.18",
    device=Device("ext4", "nvme", ("nvme0n1",)),
    device_number=66304,
    cores=2,
    state_bytes=1 << 30,
    segment_count=148,
    options="Options()",
)
OTHER: dict[str, Any] = {
    "engine": "0.2.0",
    "kernel": "6.19",
    "device": Device("ext4", "ssd", ("sda",)),
    "device_number": 1,
    "cores": 4,
    "state_bytes": 1,
    "segment_count": 2,
    "options": "Options(max_async=3)",
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    found = cache.path_for("/run", {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert found is not None
    return found


@given(measured=any_measurements())
def test_measurements_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, measured: Measurements) -> None:
    path = str(tmp_path_factory.mktemp("cache") / "sub" / "file.json")
    cache.store(Filesystem(), path, WANTED, measured)
    assert cache.load(Filesystem(), path, WANTED) == measured
    assert os.listdir(os.path.dirname(path)) == ["file.json"]


def test_every_field_of_the_fingerprint_counts(path: str) -> None:
    cache.store(Filesystem(), path, WANTED, measurements())
    assert set(OTHER) == set(WANTED.__struct_fields__)
    for name, value in OTHER.items():
        assert cache.load(Filesystem(), path, msgspec.structs.replace(WANTED, **{name: value})) is None, name


def test_directories_have_files_of_their_own(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert cache.path_for("/run/a", environment) != cache.path_for("/run/b", environment)
    assert cache.path_for("/run/\udcff", environment)  # a name that is no text
    home = cache.path_for("/run/a", {"XDG_CACHE_HOME": "relative"})
    assert home is not None and home.startswith(os.path.expanduser("~/.cache/"))


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache.path_for("/run", {}) is None


@pytest.mark.parametrize("content", ["missing", "directory", "link", "pipe", "long", "empty", "text"])
def test_a_file_that_is_none_is_no_cache(path: str, content: str) -> None:
    parent = Path(path).parent
    parent.mkdir(parents=True)
    target = Path(path)
    if content == "directory":
        target.mkdir()
    elif content == "link":
        cache.store(Filesystem(), path, WANTED, measurements())
        target.rename(parent / "real.json")
        target.symlink_to(parent / "real.json")
    elif content == "pipe":
        os.mkfifo(target)
    elif content != "missing":
        target.write_bytes({"long": b" " * (1 << 20), "empty": b"", "text": b"\xff\xfe"}[content])
    assert cache.load(Filesystem(), path, WANTED) is None


def test_a_cache_that_cannot_be_written_is_left_alone(path: str) -> None:
    Path(path).parent.parent.mkdir(parents=True)
    Path(path).parent.write_bytes(b"a file in the way")
    cache.store(Filesystem(), path, WANTED, measurements())
    assert Path(path).parent.read_bytes() == b"a file in the way"


@given(st.binary(max_size=300))
def test_any_bytes_are_decoded_or_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        cache.decode(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.data())
def test_a_changed_value_is_refused_or_does_no_harm(data: st.DataObject) -> None:
    measured = measurements(tuple(trial(candidate, 1.0) for candidate in OFFERED[:2]))
    document: Any = msgspec.to_builtins({"fingerprint": WANTED, "measured": measured})
    node, key = document, data.draw(st.sampled_from(["fingerprint", "measured"]))
    while data.draw(st.booleans()) and isinstance(node[key], dict | list) and node[key]:
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node)) if isinstance(node, dict) else st.sampled_from(range(len(node))))
    node[key] = data.draw(JSON)
    try:
        stored = cache.decode(msgspec.json.encode(document))
    except CorruptError:
        return
    assert msgspec.convert(msgspec.to_builtins(stored.measured), Measurements) == stored.measured
    found = stored.measured
    options = confirmed(BASE, OFFERED, found, 0.1) or BASE
    assert options in [candidate.options for candidate in OFFERED] or options == BASE
    count = in_flight(BASE, found.flights, found.state_bytes, 1 << 40)
    assert 1 <= count <= MAX_ASYNC_MAX
    write = write_seconds(count, found.flights)
    costs = Costs(in_flight=count, write_seconds=write, durable_seconds=1, cost_seconds=1, restore_seconds=1)
    assert render("", found, BASE, options, advise(costs, 0.03, 0.1, None), (1, 1), True)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(CorruptError):
        cache.decode(b"[" * 200_000)
