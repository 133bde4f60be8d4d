"""What packc says to people: the sentences among the string constants of its sources, ``…`` for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
HOLE = "…"
# The command line's own texts.
_OTHERS = {"cli.py", "explain_command.py"}
_FOLDERS = ("packc/*.py", "packc/frontends/*.py", "passes/*.py", "passes/forms/*.py", "passes/rules/*.py")
_UNSAID = re.compile(r"log\.|AssertionError$|.*\.define$")  # calls of which people read nothing, or nothing here


def messages() -> Iterator[tuple[str, str]]:
    """(message, where it stands)."""
    for pattern in _FOLDERS:
        for file in sorted(REPOSITORY.glob(pattern)):
            if file.name not in _OTHERS:
                for node, text in _texts(ast.parse(file.read_text())):
                    if sum(word.strip(",:;.()").replace("'", "").isalpha() for word in text.split()) > 1:
                        yield text, f"{file.relative_to(REPOSITORY)}:{node.lineno}"


def _texts(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            continue
        if isinstance(node, (ast.Assert, ast.arguments)) or _is_unsaid(node):
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else HOLE for part in node.values]
            yield node, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value
        else:
            yield from _texts(node)


def _is_unsaid(node: ast.AST) -> bool:
    if isinstance(node, ast.ClassDef):
        return any("Enum" in ast.unparse(base) for base in node.bases)
    return isinstance(node, ast.Call) and _UNSAID.match(ast.unparse(node.func)) is not None
