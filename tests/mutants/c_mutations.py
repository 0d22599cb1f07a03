"""The small changes that can be made to a C file.

Theory of operation.  Comments, strings and preprocessor lines are blanked, so that only code is found, at the same
offsets.  The rest is regular expressions: the sources are formatted, with one statement on a line and spaces around
every binary operator.  A mutation that does not compile is not counted; one that a linter would reject is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mutation import Mutation, at

SWAPS: list[tuple[str, str, dict[str, str]]] = [
    (
        "comparison",
        r"(?<= )(<|<=|>|>=|==|!=)(?= )",
        {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    ),
    ("connective", r"(?<= )(&&|\|\|)(?= )", {"&&": "||", "||": "&&"}),
    (
        "operator",
        r"(?<= )(\+|-|\*|/|%|&|\||<<|>>|\+=|-=|\|=|&=)(?= )",
        {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
        | {"+=": "-=", "-=": "+=", "|=": "&=", "&=": "|="},
    ),
    ("step", r"(\+\+|--)(?=[;)\w])", {"++": "--", "--": "++"}),
    ("negation", r"(!)(?=[\w(])", {"!": ""}),
]
CONSTANT = re.compile(r"(?<![\w.])(0x[0-9a-f]+|\d+)(u?)(?![\w.])")
# A call, an assignment to something that is already declared, or a jump, up to its semicolon.
STATEMENT = re.compile(
    r"(?<=[;{})\n])(\s*)((?:\*?\w+(?:->\w+|\.\w+|\[[^]\n]*\])* (?:[-+|&]?=) [^;{}]+|\w+\([^;{}]*\)"
    r"|\w+(?:->\w+)*(?:\+\+|--)|break|continue|goto \w+|return(?: [^;{}]+)?);)"
)
CONDITION = re.compile(r"\b(?:if|while) \(([^\n]+)\)(?: \{)?$", re.MULTILINE)
BLANKED = re.compile(
    r"/\*[\s\S]*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
    re.MULTILINE,
)


def blanked(source: str) -> str:
    """The source with spaces where no code is."""
    return BLANKED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def in_braces(code: str) -> list[bool]:
    """For each offset, whether it is inside a function, an enumeration or a table."""
    depth, inside = 0, []
    for letter in code:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        inside.append(depth > 0)
    return inside


def mutations(path: str, source: bytes) -> list[Mutation]:
    text = source.decode("ascii")  # so that offsets in text are offsets in bytes
    code = blanked(text)
    inside = in_braces(code)

    def candidates() -> Iterator[tuple[int, int, str, str]]:
        for kind, pattern, swaps in SWAPS:
            for match in re.finditer(pattern, code):
                yield match.start(1), match.end(1), swaps[match[1]], kind
        for match in CONSTANT.finditer(code):
            yield match.start(), match.end(), str(int(match[1], 0) + 1) + match[2], "constant"
        for match in STATEMENT.finditer(code):
            yield match.start(2), match.end(2), ";", "removal"
        for match in CONDITION.finditer(code):
            yield match.start(1), match.end(1), f"!({text[match.start(1) : match.end(1)]})", "condition"

    return [at(path, source, start, end, new.encode(), kind) for start, end, new, kind in candidates() if inside[start]]
