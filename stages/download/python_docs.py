"""The documentation inside the running Python, as a corpus that every machine has."""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpt.base.errors import InputError

SHORTEST = 40
"""Documents of fewer characters say nothing."""

# Modules about Python's own making, jokes, and what `topics` already holds.
_LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_docs() -> Iterator[str]:
    """Python's help topics, then the docstrings of its standard library, each text once.

    Sources are parsed, never imported. The order is that of topics and of file names; so one
    Python version gives one sequence of documents.
    """
    seen = set()
    for text in _texts(Path(sysconfig.get_path("stdlib"))):
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            yield text


def _texts(library: Path) -> Iterator[str]:
    for statement in _parse(library / "pydoc_data" / "topics.py").body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            topics: dict[str, str] = ast.literal_eval(statement.value)
            yield from (text.strip("\n") for _, text in sorted(topics.items()))
    for path in sorted(
        library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()
    ):
        names = path.relative_to(library).with_suffix("").parts
        if names[0] not in sys.stdlib_module_names - _LEFT_OUT or {"test", "tests"} & {*names}:
            continue
        for node in ast.walk(_parse(path)):
            if isinstance(node, _DOCUMENTED):
                yield ast.get_docstring(node) or ""


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # about escapes in old docstrings
        try:
            return ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); use another corpus source than python-docs"
            ) from None
