"""Many texts kept as one file of JSON lines: DVC and the disk take their time for each file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpt.base.errors import InputError
from gpt.text.formats import LONGEST_LINE
from gpt.text.records import RawFile, documents_in
from stages.download.sources import CorpusSource, Source

MANY = 1000
JOINED = "texts.jsonl"
"""The file's name, in the folder of the source."""


def is_joined(source: Source, names: Sequence[str]) -> bool:
    """Whether the files of these names are kept as one: more than `MANY`, all plain texts."""
    return (
        len(names) > MANY
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
