"""The documentation is true: examples run, the sequence is the recorded one, links and citations have targets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.store.filesystem import Filesystem

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for directory in ("engine", "native", "tests", "docs")
    for path in sorted((ROOT / directory).rglob("*"))
    if path.suffix in (".py", ".c", ".h", ".md")
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def examples(page: str = "README.md") -> list[str]:
    """The Python of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_readme_run(tmp_path: Path) -> None:
    saving, opening, reading, probing = examples()
    outputs = [
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
        for code in (saving, saving, opening, reading, probing)  # the second time it resumes
    ]
    assert "CheckpointInfo(step=19" in outputs[0] and "CheckpointInfo(step=39" in outputs[1]
    assert "[34, 39]" in outputs[2]
    assert "'weight': (256, 256)" in outputs[3]
    assert f"{tmp_path}: io_uring" in outputs[4]
    assert sorted(path.name for path in (tmp_path / "runs/first").glob("step-*")) == ["step-00000034", "step-00000039"]


def test_the_examples_of_the_page_on_layers_run(tmp_path: Path) -> None:
    saving, reading = (
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True).stdout
        for code in examples("docs/layerwise.md")
    )
    assert "CheckpointInfo(step=20" in saving
    assert "['model.safetensors', 'optimizer-3.safetensors'] ('0', '1', '2', '3')" in saving
    assert reading == "optimizer.2.2.weight.step True\nTrue\n"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", prose(page))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken, f"{relative(page)} links to {broken}"


# Pages name these, but a clone does not have them: a build product.
ELSEWHERE = {"engine/_native.abi3.so"}


def test_files_and_tests_that_pages_name_exist() -> None:
    """A name in backquotes that looks like a path of ours, or a test, is one."""
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for page in PAGES:
        text = prose(page)
        paths = re.findall(r"`((?:engine|native|tests|docs)/[\w./-]+)`", text)
        missing = [path for path in paths if path not in ELSEWHERE and not (ROOT / path).exists()]
        missing += [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
        assert not missing, f"{relative(page)} names {missing}, which is not there"


def test_invariants_that_are_cited_exist() -> None:
    defined = set(
        re.findall(r"^- \*\*(I\d+)\*\* ", (ROOT / "docs/durability.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert defined == {f"I{number}" for number in range(1, len(defined) + 1)} and defined
    for path in SOURCES:
        for cited in re.findall(r"durability\.md\)?,? \(?((?:I\d+(?:,? and |, )?)+)", path.read_text(encoding="utf-8")):
            assert set(re.findall(r"I\d+", cited)) <= defined, f"{relative(path)} cites {cited}"


CHANGES = (
    *("make_directory", "rename", "unlink", "remove_directory", "sync_directory"),
    *("open_for_blocks", "allocate", "truncate", "sync_file", "write_new_file"),
)


class Recorder(Filesystem):
    """Records every operation that changes something or makes it durable, with its paths under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[str] = []

    def record(self, operation: str, arguments: tuple[object, ...]) -> None:
        paths = [Path(value) for value in arguments if isinstance(value, str)]
        self.seen.append(" ".join([operation, *(os.path.relpath(path, self.root) for path in paths)]))


def recorded(operation: str) -> Callable[..., object]:
    def method(self: Recorder, *arguments: object, **options: object) -> object:
        self.record(operation, arguments)
        return getattr(Filesystem, operation)(self, *arguments, **options)

    return method


for change in CHANGES:
    setattr(Recorder, change, recorded(change))


def test_the_documented_sequence_is_what_happens(tmp_path: Path) -> None:
    page = (ROOT / "docs/durability.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```sequence\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    documented = [line.split(maxsplit=1)[1] for line in block.splitlines()]
    small: dict[str, Any] = {"keep": 1, "max_async": 1, "staging_bytes": 8192, "block_bytes": 4096}
    arena = engine.Arena.wrap({"a": torch.ones(1000)})
    with engine.Engine(tmp_path, **small) as eng:
        for step in (1, 2):
            eng.checkpoint(arena, step=step).result()
    leftover = tmp_path / "step-00000003.partial"
    leftover.mkdir()
    for name in ("model.safetensors", "old.safetensors"):
        (leftover / name).touch()
    recorder = Recorder(tmp_path)
    with engine.Engine(tmp_path, filesystem=recorder, **small) as eng:
        eng.checkpoint(arena, step=3).result()
    assert recorder.seen == documented
