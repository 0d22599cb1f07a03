"""The rules of construction, held against the sources.

Theory of operation.  Nothing here imports the engine: Python is read with `ast`, C with a brace counter, the
rest as text; git says what is committed.  Which package may import which is a contract of import-linter's, in
pyproject.toml.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Peers of the benchmark: what they do is measured, and that is to pickle.
PICKLING_PEERS = {"bench/savers.py", "bench/loaders.py"}

# What a person can hold in view at once (TigerBeetle, docs/TIGER_STYLE.md).
FUNCTION_LINES_MAX = 70

# Modules and functions that turn bytes into running code, or arbitrary objects into bytes.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_TORCH = {"load", "save", "serialization", "package", "jit"}

# Names that say nothing about what is inside.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "manager", "data2", "misc"}

PYTHON_FILES = sorted((ROOT / "engine").rglob("*.py"))
NATIVE_FILES = sorted(path for path in (ROOT / "native").rglob("*") if path.is_file())
C_FILES = sorted([*(ROOT / "native").rglob("*.c"), *(ROOT / "native").rglob("*.h")])
SOURCE_DIRECTORIES = ("engine", "native", "tests", "fuzz", "docs", ".ci")
TOP_FILES = {
    *("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt", ".gitignore"),
}
TEXT_SUFFIXES = {"", ".py", ".c", ".h", ".md", ".toml", ".txt", ".sh", ".json", ".svg", ".typed"}


def relative(path: Path) -> str:
    """The path as a person would say it, for test ids and messages."""
    return path.relative_to(ROOT).as_posix()


def committed_files() -> Iterator[Path]:
    """The files at the top and in the source directories, without what builds and runs leave there."""
    candidates = [path for path in ROOT.iterdir() if path.is_file()]
    for directory in SOURCE_DIRECTORIES:
        candidates += [path for path in (ROOT / directory).rglob("*") if path.is_file()]
    for path in candidates:
        if path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
            yield path


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """The name and length in lines of every function defined in C source."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"/\*[\s\S]*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", blank, text)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.MULTILINE)
    depth = 0
    start = 0  # where the declaration begins that a brace at depth 0 would belong to
    head = ""
    for match in re.finditer(r"[{};]", text):
        if match[0] == "{":
            if depth == 0:
                head = text[start : match.start()].strip()
            depth += 1
        elif match[0] == "}":
            depth -= 1
        assert depth >= 0, "the braces do not match"
        if depth == 0:
            if match[0] == "}" and head.endswith(")"):
                body = text[start : match.end()].lstrip()
                name = re.search(r"(\w+)\s*\(", head)
                assert name is not None, head
                yield name[1], body.count("\n") + 1
            start, head = match.end(), ""
    assert depth == 0, "the braces do not match"


def opening_comment(text: str) -> str:
    """The block comment or docstring, or the run of # lines, that a file opens with; empty if there is none."""
    match = re.match(r"/\*[\s\S]*?\*/|\"\"\"[\s\S]*?\"\"\"|(?:#[^\n]*\n)+", text)
    return match[0] if match else ""


@pytest.mark.parametrize(
    "path",
    [path for path in PYTHON_FILES if path.relative_to(ROOT / "engine").as_posix() not in PICKLING_PEERS],
    ids=relative,
)
def test_nothing_is_pickled_or_evaluated(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {alias.name for alias in node.names}
            if node.module.split(".")[0] in UNSAFE_MODULES:
                found.add(node.module)
            elif node.module == "torch":
                found |= names & UNSAFE_TORCH
            elif node.module.startswith("torch."):
                found |= {node.module} if node.module.split(".")[1] in UNSAFE_TORCH else set()
        elif isinstance(node, ast.Name) and node.id in UNSAFE_NAMES:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found |= {node.attr} & UNSAFE_TORCH
    assert not found, f"{relative(path)} uses {sorted(found)}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{relative(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", C_FILES, ids=relative)
def test_c_functions_are_short(path: Path) -> None:
    functions = list(c_functions(path.read_text(encoding="utf-8")))
    assert functions or path.suffix == ".h", f"{relative(path)} defines no function"
    for name, lines in functions:
        assert lines <= FUNCTION_LINES_MAX, f"{relative(path)}: {name} has {lines} lines"


def test_c_functions_are_counted_right() -> None:
    source = """
    #define LOOP(x) do { \\
        x; } while (0)
    struct pair { int a; };          /* { not a function */
    static const int table[] = { 1, 2 };
    static int first(struct pair p)
    {
        if (p.a) { return '{'; }     // }
        return "}"[0];
    }
    void second(void) { }
    """
    assert list(c_functions(source)) == [("first", 5), ("second", 1)]


def test_no_native_file_is_dead() -> None:
    build = (ROOT / "native/CMakeLists.txt").read_text(encoding="utf-8")
    # The word before ".c" is the whole name: ring.c must not be found in spring.c.
    dead = [path.name for path in C_FILES if path.suffix == ".c" and not re.search(rf"(?<!\w){path.name}\b", build)]
    includes = "".join(path.read_text(encoding="utf-8") for path in C_FILES)
    dead += [path.name for path in C_FILES if path.suffix == ".h" and f'{path.name}"' not in includes]
    assert not dead, f"nothing builds or includes {dead}"


def test_nothing_is_committed_by_accident() -> None:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], check=True, capture_output=True, text=True).stdout
    tops = {name.split("/")[0] for name in listed.splitlines()}
    assert tops == TOP_FILES | set(SOURCE_DIRECTORIES), "what a run has left behind is committed, or a file is missing"


def test_every_decision_is_linked() -> None:
    pages = [ROOT / "README.md", ROOT / "docs/architecture.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert decisions, "docs/decisions has no record"
    unlinked = [path.name for path in decisions if f"decisions/{path.name}" not in text]
    assert not unlinked, f"README.md and docs/architecture.md link none of {unlinked}"


@pytest.mark.parametrize("path", [*PYTHON_FILES, *NATIVE_FILES], ids=relative)
def test_every_file_opens_with_its_theory(path: Path) -> None:
    if path.is_dir() or path.suffix not in TEXT_SUFFIXES:
        pytest.fail(f"{relative(path)} is no source; native/ holds sources only")
    comment = opening_comment(path.read_text(encoding="utf-8"))
    assert len(comment.splitlines()) >= 3, f"{relative(path)} opens with no comment of three lines or more"


def test_file_names_say_something() -> None:
    for path in committed_files():
        words = set(re.split(r"[_.-]", path.name.lower()))
        assert not words & EMPTY_NAMES, f"{relative(path)}: name it after what it does"


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    home = re.compile(r"(?<![\w.$}/-])/(?:home|root|work|tmp)(?![\w-])")
    registry = re.compile(r"pypi\.org|pythonhosted\.org|pytorch\.org/whl|index[-_]url|find[-]links", re.IGNORECASE)
    for path in committed_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not home.search(line), f"{relative(path)}:{number} holds a path of one machine: {line.strip()}"
            assert not registry.search(line), f"{relative(path)}:{number} names a package registry: {line.strip()}"
