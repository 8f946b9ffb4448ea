"""Fetch the raw data: check every byte, keep it as it came, and say what it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from gpt.errors import InputError
from gpt.events import Log, Message, discard
from gpt.files import sha256_of, whole_directory, write_json
from gpt.text import (
    RawFile,
    documents_in,
    instructions_in,
    messages_in,
    read_messages,
    write_sources,
)
from stages.download.fetch import Fetched, Places, fetch_source
from stages.download.python_docs import python_docs
from stages.download.sources import (
    CorpusSource,
    InstructionsSource,
    MessagesSource,
    ModelSource,
    Source,
)


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class DownloadParams:
    """What to fetch, and from where.

    Attributes:
        local: the folder that sources with `file` are in.
        mirror: a folder or web address that is asked before a source's own addresses.
        offline: never open a connection.
        corpus: text to pretrain on.
        messages: labelled messages for the classifier.
        instructions: records for the assistant.
        gpt2: the files of the published model; may be empty where it is not used.
    """

    local: str
    mirror: str | None = None
    offline: bool = False
    corpus: Annotated[tuple[CorpusSource, ...], Field(min_length=1)]
    messages: Annotated[tuple[MessagesSource, ...], Field(min_length=1)]
    instructions: Annotated[tuple[InstructionsSource, ...], Field(min_length=1)]
    gpt2: tuple[ModelSource, ...] = ()

    @field_validator("corpus", "messages", "instructions", "gpt2")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        for kind, names in (
            ("name", [source.name for source in sources]),
            ("file name", [source.saved_name for source in sources]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two sources have the {kind} {twice!r}; set another for one")
        return sources


def download(
    params: DownloadParams,
    *,
    local: Path,
    corpus: Path,
    messages: Path,
    instructions: Path,
    gpt2: Path,
    metrics: Path,
    log: Log = discard,
) -> dict[str, float]:
    """Fill the four raw folders, all of them or none.

    Args:
        params: the sources.
        local: the folder of local sources, `params.local` made a path.
        corpus: written: documents.
        messages: written: labelled messages.
        instructions: written: instruction records.
        gpt2: written: the published model's files.
        metrics: written: the figures that are returned, as JSON.
        log: told of the progress.

    Returns:
        Files and bytes of each data set, with its documents, rows (in all and per class) or
        records.

    Raises:
        InputError: a source cannot be had, is not the file it should be, or cannot be read.
    """
    places = Places(local, params.mirror, params.offline)
    with contextlib.ExitStack() as folders:
        into = {
            path: folders.enter_context(whole_directory(path))
            for path in (corpus, messages, instructions, gpt2)
        }
        counts: dict[str, float] = {
            f"{name}_{key}": value
            for name, figures in (
                ("corpus", _corpus(params.corpus, into[corpus], places, log)),
                ("messages", _messages(params.messages, into[messages], places, log)),
                (
                    "instructions",
                    _instructions(params.instructions, into[instructions], places, log),
                ),
                ("gpt2", _model(params.gpt2, into[gpt2], places, log)),
            )
            for key, value in figures.items()
        }
    write_json(metrics, counts)
    return counts


def _corpus(
    sources: Sequence[CorpusSource], folder: Path, places: Places, log: Log
) -> dict[str, int]:
    def n_documents(path: Path, file: RawFile) -> int:
        n = sum(1 for _ in documents_in(path, file))
        if n == 0:
            raise InputError(f"{path}: holds no text; a corpus cannot be empty")
        return n

    files = _fetch_all(sources, folder, places, log, n_documents)
    return {**_size(files), "documents": _records(files)}


def _messages(
    sources: Sequence[MessagesSource], folder: Path, places: Places, log: Log
) -> dict[str, int]:
    files = _fetch_all(sources, folder, places, log, lambda path, _: len(messages_in(path)))
    with _errors_at(folder, f"download.messages ({', '.join(file.file for file in files)})"):
        rows = read_messages(folder)["label"].value_counts()
    classes = {f"rows_{label}": int(n) for label, n in sorted(rows.items())}
    return {**_size(files), "rows": _records(files), **classes}


def _instructions(
    sources: Sequence[InstructionsSource], folder: Path, places: Places, log: Log
) -> dict[str, int]:
    def n_records(path: Path, file: RawFile) -> int:
        n = len(instructions_in(path))
        if n == 0:
            raise InputError(f"{path}: holds no record; the assistant needs some to learn from")
        return n

    files = _fetch_all(sources, folder, places, log, n_records)
    return {**_size(files), "records": _records(files)}


def _model(
    sources: Sequence[ModelSource], folder: Path, places: Places, log: Log
) -> dict[str, int]:
    return _size(_fetch_all(sources, folder, places, log, lambda path, file: None))


def _fetch_all(
    sources: Sequence[Source],
    folder: Path,
    places: Places,
    log: Log,
    count: Callable[[Path, RawFile], int | None],
) -> list[RawFile]:
    """Fetch the files of one data set, count the records in each, and list them."""
    files = []
    for source in sources:
        path = folder / source.saved_name
        fetched = (
            _write_python_docs(path, log)
            if source.builtin
            else fetch_source(source, path, places, log)
        )
        file = RawFile(
            name=source.name,
            file=path.name,
            format=source.read_as,
            bytes=fetched.bytes,
            sha256=fetched.sha256,
            url=source.urls[0] if source.urls else None,
        )
        if isinstance(source, CorpusSource):
            file = replace(
                file, separator=source.separator, split=source.split, balance=source.balance
            )
        with _errors_at(path, fetched.origin):
            files.append(replace(file, records=count(path, file)))
    write_sources(folder, files)
    return files


def _write_python_docs(path: Path, log: Log) -> Fetched:
    log(Message("download python-docs: reading the documentation inside the running Python"))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in python_docs():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return Fetched(path.stat().st_size, sha256_of(path), "the documentation inside Python")


def _size(files: Sequence[RawFile]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(file.bytes for file in files)}


def _records(files: Sequence[RawFile]) -> int:
    return sum(file.records or 0 for file in files)


@contextlib.contextmanager
def _errors_at(path: Path, origin: str) -> Iterator[None]:
    """Let errors name where a file came from: `path` is gone once they are read."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(path), origin)) from None
