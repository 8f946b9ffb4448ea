"""Documents written as lines of JSON: Python's documentation, and many plain texts as one file.

Very many files are slow for DVC and for the disk, so plain texts are joined.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt.base.errors import InputError
from gpt.text.formats import LONGEST_LINE
from gpt.text.records import RawFile, documents_in
from stages.download.sources import CorpusSource, Source

MOST_APART = 1000
"""More plain texts of a source than these are joined."""
JOINED = "texts.jsonl"
"""The file's name, in the folder of the source."""


def is_joined(source: Source, names: Sequence[str]) -> bool:
    """Whether the files of these names are kept as one: more than `MOST_APART`, all plain texts."""
    return (
        len(names) > MOST_APART
        and isinstance(source, CorpusSource)
        and source.kind == "documents"
        and all(source.format_of(name) == "text" for name in names)
    )


def some_documents(path: Path, file: RawFile) -> Iterator[str]:
    """The documents of a file of a corpus.

    Raises:
        InputError: there is none, or as `gpt.text.records.read_documents`.
    """
    documents = documents_in(path, file)
    first = next(documents, None)
    if first is None:
        raise InputError(f"{path}: holds no text; a corpus cannot be empty")
    yield first
    yield from documents


def lines_of(path: Path, source: Source) -> Iterator[bytes]:
    """The documents of one of the texts of a source, as lines of JSON.

    Raises:
        InputError: as `some_documents`, or a line is longer than may be read.
    """
    separator = source.separator if isinstance(source, CorpusSource) else None
    file = RawFile(
        name=source.name,
        file=JOINED,
        kind="documents",
        format="text",
        bytes=path.stat().st_size,
        sha256="",
        separator=separator,
    )
    for line in map(line_of, some_documents(path, file)):
        if len(line) > LONGEST_LINE:
            raise InputError(
                f"{path}: longer than {LONGEST_LINE >> 20} MiB as a line of JSON; give it a source "
                "of its own, apart from the many"
            )
        yield line


def line_of(text: str) -> bytes:
    """A document as a line of JSON."""
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


# --- Python's documentation -----------------------------------------------------------------------

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
