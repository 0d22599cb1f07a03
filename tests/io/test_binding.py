"""The typed stub of the compiled module agrees with the header."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
    for result, name, parameters in re.findall(r"^(\w+) (eng_\w+)\(([^;]*)\);", header(), re.MULTILINE):
        words = [" ".join(each.split()) for each in parameters.split(",")]
        types = ["Pointer" if "*" in each else TYPES[each.rpartition(" ")[0]] for each in words]
        names = [re.split(r"[ *]", each)[-1] for each in words]
        declared[name] = (list(zip(names, types, strict=True)), TYPES[result])
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
