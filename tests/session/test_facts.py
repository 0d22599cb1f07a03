"""Metrics, tags and small files of a checkpoint, the rules that use them, and blocks that are not written twice."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import leaks
import pytest
import torch

import engine
from engine.session.request import FILES_BYTES_MAX
from engine.store.filesystem import Filesystem

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "block_bytes": 64 << 10}


def arena(elements: int = 1000) -> tuple[engine.Arena, torch.Tensor]:
    tensor = torch.arange(elements, dtype=torch.float32)
    return engine.Arena.wrap({"a": tensor}), tensor


def test_metrics_tag_and_files_are_read_back(tmp_path: Path) -> None:
    held, _ = arena()
    metrics = {"loss": 2.5, "bad": math.nan, "epoch": 3}
    with engine.Engine(tmp_path, **SMALL) as eng:
        saved = eng.checkpoint(
            held, step=1, metrics=metrics, tag="before the drop", files={"config.json": b"{}"}
        ).result()
        assert saved == eng.info(1) == engine.open(tmp_path).info()
        assert eng.metrics() == engine.open(tmp_path).metrics(1) == saved.metrics
        assert saved.metrics == {"loss": 2.5, "bad": None, "epoch": 3} and saved.tag == "before the drop"
        assert (Path(saved.path) / "config.json").read_bytes() == b"{}"
        assert eng.verify() == ()
        (Path(saved.path) / "config.json").write_bytes(b"[]")
        [damage] = eng.verify()
        assert damage.path.endswith("config.json") and "sha256 differs" in damage.reason
        assert eng.restore(held).step == 1, "a user's file is not needed to restore"


def test_files_are_stored_as_they_were_when_the_save_began(tmp_path: Path) -> None:
    """A caller may fill one dictionary anew for each save."""
    files = {"config.json": b"1"}

    class FilledAnew(Filesystem):
        def make_directory(self, path: str) -> None:
            if path.endswith(".partial"):  # on the commit thread, before the small files are gathered
                files.update({"config.json": b"2", "../outside": b""})
            super().make_directory(path)

    held, _ = arena()
    with engine.Engine(tmp_path, filesystem=FilledAnew(), **SMALL) as eng:
        saved = eng.checkpoint(held, files=files).result()
        assert files["config.json"] == b"2"
        assert (Path(saved.path) / "config.json").read_bytes() == b"1"
        assert not (tmp_path / "outside").exists() and eng.verify() == ()


def test_a_file_by_its_path_is_read_in_the_call(tmp_path: Path) -> None:
    config, words = tmp_path / "config.json", tmp_path / "words"
    config.write_bytes(b"1")
    words.write_bytes(bytes(range(256)) * 300)
    held, _ = arena()
    with engine.Engine(tmp_path / "run", keep=1, **SMALL) as eng:
        save = eng.checkpoint(held, files={"config.json": config, "vocabulary.bin": str(words), "note": b"n"})
        config.write_bytes(b"2")
        path = Path(save.result().path)
        assert (path / "config.json").read_bytes() == b"1" and (path / "note").read_bytes() == b"n"
        assert (path / "vocabulary.bin").read_bytes() == words.read_bytes()
        listed = json.loads((path / "manifest.json").read_bytes())["body"]["user_files"]
        assert {row["name"]: row["sha256"] for row in listed} == {
            file: hashlib.sha256((path / file).read_bytes()).hexdigest()
            for file in ("config.json", "vocabulary.bin", "note")
        }
        for _ in range(3):  # recycling takes data files only, and each save has the files that it was given
            path = Path(eng.checkpoint(held, files={"config.json": config}).result().path)
            assert (path / "config.json").read_bytes() == b"2" and not (path / "note").exists()
            assert eng.verify() == ()


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 36)  # a hole
    held, _ = arena()
    with engine.Engine(tmp_path / "run", **SMALL) as eng:
        with pytest.raises(engine.ArgumentError, match="files brings 'a' to over"):
            eng.checkpoint(held, files={"a": tmp_path / "large"})
        assert eng.steps() == []


def test_a_file_that_is_refused_is_closed(tmp_path: Path) -> None:
    held, _ = arena()
    with engine.Engine(tmp_path / "run", **SMALL) as eng:
        before = leaks.held()
        for _ in range(3):
            with pytest.raises(engine.ArgumentError, match="which is not a regular file"):
                eng.checkpoint(held, files={"a": tmp_path})
        assert leaks.held() == before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metrics": {"loss": torch.ones(1)}}, r"metrics has 'loss'.*\.item\(\)"),
        ({"metrics": {1: 2.0}}, "metrics has 1"),
        ({"tag": "a\nb"}, "tag is"),
        ({"tag": 5}, "tag is 5"),
        ({"files": {"../x": b""}}, r"files has '\.\./x'"),
        ({"files": {"manifest.json": b""}}, "files has 'manifest.json'"),
        ({"files": {"model.safetensors": b""}}, "files has 'model.safetensors'"),
        ({"files": {"a": 5}}, "files has 'a'"),
        ({"files": {"a": "/no/such/file"}}, "files has 'a' from '/no/such/file'.*No such file"),
        ({"files": {"a": "\0"}}, "files has 'a' from .*cannot be read"),
        ({"files": {"a": Path("/dev/zero")}}, "files has 'a' from '/dev/zero', which is not a regular file"),
        ({"files": {"a": "/"}}, "files has 'a' from '/', which"),
        ({"files": {"a": bytes(FILES_BYTES_MAX), "b": b"x"}}, "files brings 'b' to over 67108864 bytes"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(tmp_path: Path, wrong: dict[str, Any], words: str) -> None:
    held, _ = arena()
    with engine.Engine(tmp_path, **SMALL) as eng:
        with pytest.raises(engine.ArgumentError, match=words):
            eng.checkpoint(held, **wrong)
        assert eng.checkpoint(held).result().step == 0


def test_a_rule_keeps_the_newest_every_nth_the_best_and_the_tagged(tmp_path: Path) -> None:
    held, _ = arena()
    rule = engine.Retention(last=1, every=5, best=("loss", "min", 2))
    losses = [9, 8, 1, 7, 6, 5, 2, 4, 3, 9, 9, 9]
    with engine.Engine(tmp_path, retention=rule, **SMALL) as eng:
        for step, loss in enumerate(losses):
            eng.checkpoint(held, step=step, metrics={"loss": loss}, tag="mine" if step == 3 else None).result()
        assert eng.steps() == [0, 2, 3, 5, 6, 10, 11]
    with engine.Engine(tmp_path, **SMALL) as eng:  # the facts are read from the manifests now
        assert eng.retention == rule
        eng.checkpoint(held, step=12, metrics={"loss": 0}).result()
        assert eng.steps() == [0, 2, 3, 5, 10, 12]
        eng.delete(3)
        assert eng.steps() == [0, 2, 5, 10, 12]


def test_opening_by_a_default_never_retires_what_another_rule_kept(tmp_path: Path) -> None:
    held, _ = arena()
    with engine.Engine(tmp_path, keep=None, **SMALL) as eng:
        for step in range(10):
            eng.checkpoint(held, step=step).result()
    engine.checkpoint(held, tmp_path, step=10).result()  # a warning of retirement would be an error
    assert engine.open(tmp_path).steps() == list(range(11))


def test_an_unchanged_block_of_a_recycled_file_is_not_written(tmp_path: Path) -> None:
    held, tensor = arena(200_000)  # 13 blocks of 64 KiB, the last one short
    with engine.Engine(tmp_path, keep=1, max_async=1, **SMALL) as eng:
        for step in range(6):
            tensor[0] = step
            save = eng.checkpoint(held, step=step)
            save.result()
            stats = save.stats()
            assert eng.verify() == () and torch.equal(eng.load()["a"], tensor)
            if step < 2:
                assert stats["skipped_bytes"] == 0, "nothing to recycle whose content is known"
            else:
                assert stats["io_bytes"] == 64 << 10 and stats["skipped_bytes"] > 700_000
    with engine.Engine(tmp_path, keep=1, max_async=1, **SMALL) as eng:
        save = eng.checkpoint(held, step=6)
        save.result()
        assert save.stats()["skipped_bytes"] == 0, "the manifest of a spare that was found at open is not trusted"
        assert eng.verify() == ()


def test_rewrite_all_writes_every_block(tmp_path: Path) -> None:
    held, _ = arena(200_000)
    with engine.Engine(tmp_path, keep=1, max_async=1, rewrite_all=True, **SMALL) as eng:
        for step in range(5):
            save = eng.checkpoint(held, step=step)
            save.result()
            assert save.stats()["skipped_bytes"] == 0 and save.stats()["io_bytes"] > 800_000


def test_wait_returns_after_every_save_has_ended(tmp_path: Path) -> None:
    held, _ = arena()
    with engine.Engine(tmp_path, **SMALL) as eng:
        saves = [eng.checkpoint(held) for _ in range(2)]
        assert eng.wait() and all(save.done() for save in saves)
        assert eng.wait(0)
