"""The small changes that can be made to a Python file.

Theory of operation.  `ast` gives the byte range of each expression and statement, and the change is made to the text,
so that the rest of the file stays as it is.  Inside functions statements are removed or change places; everywhere
comparisons, operators, conditions and constants change to their neighbours.  Annotations, docstrings and the words of
messages are left alone: they change no behaviour.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from mutation import Mutation, at

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: (r"is", "is not"),
    ast.IsNot: (r"is\s+not", "is"),
    ast.In: (r"in", "not in"),
    ast.NotIn: (r"not\s+in", "in"),
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: (r"\*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitOr: (r"\|", "&"),
    ast.BitAnd: ("&", "|"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
REMOVABLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break, ast.Return)


class Finder:
    """Walks one file's tree and yields its mutations."""

    def __init__(self, path: str, source: bytes) -> None:
        self._path, self._source = path, source
        self._line_starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]

    def mutations(self) -> Iterator[Mutation]:
        for node in ast.parse(self._source).body:
            yield from self._node(node, in_function=False)

    def _start(self, node: ast.expr | ast.stmt) -> int:
        return self._line_starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.expr | ast.stmt) -> bytes:
        return self._source[self._start(node) : self._end(node)]

    def _at(self, start: int, end: int, replacement: bytes, kind: str) -> Mutation:
        return at(self._path, self._source, start, end, replacement, kind)

    def _between(
        self, left: ast.expr, right: ast.expr, pattern: str, replacement: str, kind: str
    ) -> Iterator[Mutation]:
        """The operator between two expressions: the last match, since a comment before it may hold the same text."""
        start = self._end(left)
        found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)".encode(), self._source[start : self._start(right)]))
        for match in found[-1:]:
            yield self._at(start + match.start(), start + match.end(), replacement.encode(), kind)

    def _node(self, node: ast.AST, in_function: bool) -> Iterator[Mutation]:
        if isinstance(node, ast.JoinedStr):  # its parts have no place of their own before Python 3.12
            return
        if isinstance(node, ast.expr):
            yield from self._expression(node)
        elif isinstance(node, ast.stmt) and in_function:
            yield from self._statement(node)
        in_function = in_function or isinstance(node, ast.FunctionDef)
        for name, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            if in_function and name in ("body", "orelse", "finalbody"):
                yield from self._order(children)
            for child in children:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns", "decorator_list", "msg", "exc"):
                    yield from self._node(child, in_function)

    def _expression(self, node: ast.expr) -> Iterator[Mutation]:
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for left, operator, right in zip(operands, node.ops, node.comparators, strict=False):
                    yield from self._between(left, right, *COMPARISONS[type(operator)], "comparison")
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in itertools.pairwise(node.values):
                    yield from self._between(left, right, old, new, "connective")
            case ast.BinOp() if type(node.op) in OPERATORS:
                old, new = OPERATORS[type(node.op)]
                start = self._end(node.left)
                if found := re.search(old.encode(), self._source[start : self._start(node.right)]):
                    yield self._at(start + found.start(), start + found.end(), new.encode(), "operator")
            case ast.UnaryOp(op=ast.Not()):
                yield self._at(self._start(node), self._start(node.operand), b"", "negation")
            case ast.Constant(value=bool(flag)):
                yield self._at(self._start(node), self._end(node), str(not flag).encode(), "constant")
            case ast.Constant(value=int(number)):
                yield self._at(self._start(node), self._end(node), str(number + 1).encode(), "constant")
            case ast.Call(args=[_, _, *_]):
                for first, second in itertools.pairwise(node.args):
                    if isinstance(first, ast.Name | ast.Attribute) and isinstance(second, ast.Name | ast.Attribute):
                        swapped = self._text(second) + b", " + self._text(first)
                        yield self._at(self._start(first), self._end(second), swapped, "arguments")
            case ast.IfExp():
                yield from self._negated(node.test)

    def _negated(self, test: ast.expr) -> Iterator[Mutation]:
        yield self._at(self._start(test), self._end(test), b"not (" + self._text(test) + b")", "condition")

    def _statement(self, node: ast.stmt) -> Iterator[Mutation]:
        start, end = self._start(node), self._end(node)
        # Removing the assignment that makes a local name gives a NameError in any test that runs the line.
        binds = isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets)
        if isinstance(node, REMOVABLE) and not is_text(node) and not binds:
            yield self._at(start, end, b"pass", "removal")
        match node:
            case ast.If() | ast.While():
                yield from self._negated(node.test)
            case ast.With() if all(item.optional_vars is None for item in node.items):
                last = node.items[-1].context_expr
                colon = self._source.index(b":", self._end(last))
                yield self._at(start, colon, b"if True", "context")
            case ast.Try(finalbody=[first, *_]):
                final = self._start(first), self._end(node.finalbody[-1])
                yield self._at(*final, b"pass", "cleanup")
        if isinstance(node, ast.Try):
            for handler in node.handlers:  # as if nothing had caught it
                yield self._at(self._start(handler.body[0]), self._end(handler.body[-1]), b"raise", "handler")

    def _order(self, statements: list[ast.stmt]) -> Iterator[Mutation]:
        for first, second in itertools.pairwise(statements):
            plain = isinstance(first, ast.Expr | ast.Assign) and isinstance(second, ast.Expr | ast.Assign)
            if plain and not is_text(first) and self._source[self._end(first) : self._start(second)].isspace():
                middle = self._source[self._end(first) : self._start(second)]
                swapped = self._text(second) + middle + self._text(first)
                yield self._at(self._start(first), self._end(second), swapped, "order")


def is_text(node: ast.stmt) -> bool:
    """A docstring, or `...`."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def mutations(path: str, source: bytes) -> list[Mutation]:
    return [found for found in Finder(path, source).mutations() if found.apply(source) != source]
