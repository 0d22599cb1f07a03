"""The invariants of the fuzz targets, for the kept corpus and a few hundred examples each.

`make fuzz` runs the targets themselves, guided by coverage.  Nothing here needs the packages that it installs.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from fuzz import directory, extra, header, manifest

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
TARGETS = ("manifest", "extra", "header", "directory")
KEPT = sorted(path for target in TARGETS for path in (CORPUS / target).iterdir())


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Failed saves are logged, and most fail.  The files of a target are deleted afterwards."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory.template.cache_clear()
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_every_target_has_a_corpus() -> None:
    for target in (*TARGETS, "job"):
        assert any((CORPUS / target).iterdir()), target


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_input_of_the_corpus_passes(path: Path) -> None:
    importlib.import_module(f"fuzz.{path.parent.name}").one_input(path.read_bytes())


@pytest.mark.parametrize(
    ("invariant", "count"),
    [(manifest.changed, 200), (extra.changed, 300), (header.laid_out, 100), (directory.changed, 40)],
    ids=TARGETS,
)
def test_a_few_generated_inputs_pass(invariant: Callable[[], None], count: int) -> None:
    # Most examples of a manifest are large, and making a directory of files takes a while on two cores shared.
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    settings(max_examples=count, suppress_health_check=checks)(invariant)()
