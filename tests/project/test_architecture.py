"""Properties of the sources that no linter checks and a release needs.

Theory of operation.  Files are read as text, and git says which are committed.  Nothing here imports the engine.
Length of functions, unsafe modules and imports between packages are rules of ruff, lizard and import-linter, in
pyproject.toml and the Makefile.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON_FILES = sorted((ROOT / "engine").rglob("*.py"))
NATIVE_FILES = sorted(path for path in (ROOT / "native").rglob("*") if path.is_file())
C_FILES = sorted([*(ROOT / "native").rglob("*.c"), *(ROOT / "native").rglob("*.h")])
SOURCE_DIRECTORIES = ("engine", "native", "tests", "fuzz", "docs", ".ci", ".github")
TOP_FILES = {
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "RELEASING.md"),
    *("Makefile", "pyproject.toml", "constraints.txt"),
    *(".gitignore", ".clang-format", ".pre-commit-config.yaml"),
}
TEXT_SUFFIXES = {"", ".py", ".c", ".h", ".md", ".toml", ".txt", ".sh", ".json", ".svg", ".typed", ".yml", ".yaml"}


def relative(path: Path) -> str:
    """The path relative to the root, for test ids and messages."""
    return path.relative_to(ROOT).as_posix()


def committed_files() -> list[Path]:
    """The files that git tracks, or that `git add` would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def opening_comment(text: str) -> str:
    """The block comment or docstring, or the run of # lines, that a file opens with; empty if there is none."""
    match = re.match(r"/\*[\s\S]*?\*/|\"\"\"[\s\S]*?\"\"\"|(?:#[^\n]*\n)+", text)
    return match[0] if match else ""


def test_no_native_file_is_dead() -> None:
    build = (ROOT / "native/CMakeLists.txt").read_text(encoding="utf-8")
    # The word before ".c" is the whole name: ring.c must not be found in spring.c.
    dead = [path.name for path in C_FILES if path.suffix == ".c" and not re.search(rf"(?<!\w){path.name}\b", build)]
    includes = "".join(path.read_text(encoding="utf-8") for path in C_FILES)
    dead += [path.name for path in C_FILES if path.suffix == ".h" and f'{path.name}"' not in includes]
    assert not dead, f"nothing builds or includes {dead}"


def test_nothing_is_committed_by_accident() -> None:
    tops = {relative(path).split("/")[0] for path in committed_files()}
    assert tops == TOP_FILES | set(SOURCE_DIRECTORIES), "a leftover of a run is committed, or a file is missing"


def test_every_python_file_is_linted_and_typed() -> None:
    """Commands have no suffix, by which ruff and mypy find the others."""
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listings = [re.findall(rf"^{key} = \[(.*?)\]", config, re.MULTILINE) for key in ("extend-include", "files")]
    commands = [
        relative(path)
        for path in committed_files()
        if not path.suffix and re.match(rb"#!.*python", path.read_bytes()[:100])
    ]
    assert ".ci/lowest" in commands
    for listing in listings:
        unlisted = [command for command in commands if f'"{command}"' not in "".join(listing)]
        assert not unlisted, f"pyproject.toml does not list {unlisted} beside {listing}"


def test_every_decision_is_linked() -> None:
    text = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    decisions = sorted((ROOT / "docs/decisions").glob("0*.md"))
    assert decisions, "docs/decisions has no record"
    unlinked = [path.name for path in decisions if f"({path.name})" not in text]
    assert not unlinked, f"docs/decisions/README.md links none of {unlinked}"


@pytest.mark.parametrize("path", [*PYTHON_FILES, *NATIVE_FILES], ids=relative)
def test_every_file_opens_with_its_theory(path: Path) -> None:
    if path.is_dir() or path.suffix not in TEXT_SUFFIXES:
        pytest.fail(f"{relative(path)} is no source; native/ holds sources only")
    comment = opening_comment(path.read_text(encoding="utf-8"))
    assert len(comment.splitlines()) >= 3, f"{relative(path)} opens with no comment of three lines or more"


def test_no_file_names_the_machine_it_was_written_on() -> None:
    home = re.compile(r"(?<![\w.$}/-])/(?:home|root|work|tmp)(?![\w-])")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|pytorch\.org/whl|index[-_]url|find[-]links", re.IGNORECASE)
    for path in committed_files():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not home.search(line), f"{relative(path)}:{number} holds a path of one machine: {line.strip()}"
            assert not registry.search(line), f"{relative(path)}:{number} names a package registry: {line.strip()}"


def test_every_row_of_the_nearest_tests_is_of_files_that_exist() -> None:
    nearest = runpy.run_path(str(ROOT / "tests/mutants/nearest.py"))["NEAREST"]
    missing = [test for tests in nearest.values() for test in tests if not (ROOT / test).exists()]
    sources = [relative(path) for path in [*PYTHON_FILES, *C_FILES]]
    missing += [prefix for prefix in nearest if not any(source.startswith(prefix) for source in sources)]
    assert not missing, f"`make mutants` would decide nothing with {missing}"
