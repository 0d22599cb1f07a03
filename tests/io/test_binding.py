"""The typed stub of the compiled module agrees with the header, and a module of another version is refused."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.io.binding import lib

ROOT = Path(__file__).parents[2]

# The stub's type for each C type that is not a pointer.
TYPES = {"int": "int", "int32_t": "int", "uint32_t": "int", "uint64_t": "int", "void": "None", "eng_hash": "Hash"}


def header() -> str:
    """The C interface without its comments."""
    text = (ROOT / "native/engine_native.h").read_text(encoding="utf-8")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def stub_class(name: str) -> ast.ClassDef:
    tree = ast.parse((ROOT / "engine/_native.pyi").read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def test_every_function_has_the_parameters_and_the_result_of_the_header() -> None:
    declared = {}
    for result, name, parameters in re.findall(r"^((?:const )?\w+ \*?)(eng_\w+)\(([^;]*)\);", header(), re.MULTILINE):
        words = [" ".join(each.split()) for each in parameters.split(",")]
        types = ["Pointer" if "*" in each else TYPES[each.rpartition(" ")[0]] for each in words]
        names = [re.split(r"[ *]", each)[-1] for each in words]
        declared[name] = (list(zip(names, types, strict=True)), "Pointer" if "*" in result else TYPES[result.strip()])
    typed = {}
    for node in stub_class("Lib").body:
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None
            arguments = [
                (each.arg, ast.unparse(each.annotation)) for each in node.args.posonlyargs[1:] if each.annotation
            ]
            typed[node.name] = (arguments, ast.unparse(node.returns))
    assert typed == declared and declared


def test_every_constant_is_there() -> None:
    declared = set(re.findall(r"^\s*(?:enum \{ ?)?(ENG_[A-Z_]+)|(?<=, )(ENG_[A-Z_]+)(?= =)", header(), re.MULTILINE))
    names = {first or second for first, second in declared} - {""}
    typed = {ast.unparse(node.target) for node in stub_class("Lib").body if isinstance(node, ast.AnnAssign)}
    assert typed == names == {name for name in dir(lib) if name.startswith("ENG_")}


# The version of the interface, and the digest of the header without comments and white space.
INTERFACE = (6, "dda59096efcb11e2")


def test_a_changed_interface_has_another_version() -> None:
    digest = hashlib.sha256("".join(header().split()).encode()).hexdigest()[:16]
    assert (lib.ENG_VERSION, digest) == INTERFACE, (
        "raise ENG_VERSION, and _VERSION in io/binding.py, and update INTERFACE"
    )


MODULE = """
import sys, types
import engine._native as real
lib = types.SimpleNamespace(**{name: getattr(real.lib, name) for name in dir(real.lib)})
ffi = types.SimpleNamespace(sizeof=real.ffi.sizeof)
"""

REBUILD = "run `make setup` in a source tree, or install the package again"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("", None),
        ("lib = None", "_native.abi3.so has version None of the native interface, and not "),
        ("lib.ENG_VERSION += 1", "_native.abi3.so has version "),
        ("ffi.sizeof = lambda name: 24", "_native.abi3.so differs from the Python files in eng_source"),
        ("lib.ENG_ALIGNMENT = 512", "_native.abi3.so differs from the Python files in ENG_ALIGNMENT"),
        ("sys.modules['engine._native'] = None", "the compiled module engine._native is missing ("),
    ],
)
def test_a_module_that_is_missing_or_stale_is_refused(change: str, cause: str | None) -> None:
    """Without assertions too: what they guard is what native code reads."""
    code = f"{MODULE}\n{change}\nreal.lib, real.ffi = lib, ffi\nimport engine.io.packing"
    result = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    if cause is None:
        assert result.returncode == 0, result.stderr
    else:
        last = result.stderr.splitlines()[-1]
        assert last.startswith("ImportError: ") and cause in last and REBUILD in last, result.stderr
