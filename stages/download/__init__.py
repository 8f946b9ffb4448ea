"""Fetch the raw data: check every byte, keep it as it came, and say what it is."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, first_few
from gpt.base.events import Log, Message, discard
from gpt.base.files import whole_directory, write_json
from gpt.text.records import (
    RawFile,
    instructions_in,
    messages_in,
    read_messages,
    write_sources,
)
from stages.download.blocks import write_blocks
from stages.download.cache import Cache
from stages.download.faults import errors_at
from stages.download.fetch import Fetched, Places, Via, fetch_source
from stages.download.joined import line_of, some_documents
from stages.download.python_docs import python_docs
from stages.download.sources import (
    CorpusSource,
    InstructionsSource,
    MessagesSource,
    ModelSource,
    Source,
    TextSource,
)
from stages.download.together import run_together


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class DownloadParams:
    """What to fetch, and from where.

    Attributes:
        local: the folder that sources with `file`, `folder` and `glob` are in.
        mirror: a folder or web address that is asked before a source's own addresses.
        offline: never open a connection.
        parallel: how many sources are fetched at the same time.
        timeout_seconds: for one file from one address, all attempts together.
        corpus: text to pretrain on.
        messages: labelled messages for the classifier.
        instructions: records for the assistant.
        gpt2: the files of the published model; may be empty where it is not used.
    """

    local: str
    mirror: str | None = None
    offline: bool = False
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    timeout_seconds: Annotated[float, Field(gt=0, le=1_000_000)] = 3600.0
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
    cache: Path | None = None,
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
        cache: kept from one call to the next: what came from the web, so that it need not come
            again, and the beginnings of what was cut off; no output depends on it.
        log: told of the progress.

    Returns:
        Files and bytes of each data set, with its documents, rows (in all and per class) or
        records.

    Raises:
        InputError: a source cannot be had, is not the file it should be, or cannot be read.
    """
    with contextlib.ExitStack() as folders:
        into = {
            path: folders.enter_context(whole_directory(path))
            for path in (corpus, messages, instructions, gpt2)
        }
        scratch = into[corpus] / ".web"
        places = Places(
            local=local,
            mirror=params.mirror,
            offline=params.offline,
            cache=Cache(cache or scratch),
            seconds=params.timeout_seconds,
            stop=threading.Event(),
        )
        corpus_files, messages_files, instructions_files, gpt2_files = _fetch_all(
            (
                _DataSet("corpus", params.corpus, into[corpus]),
                _DataSet("messages", params.messages, into[messages]),
                _DataSet("instructions", params.instructions, into[instructions]),
                _DataSet("gpt2", params.gpt2, into[gpt2]),
            ),
            places,
            params.parallel,
            log,
        )
        if scratch.is_dir():
            shutil.rmtree(scratch)
        counts: dict[str, float] = {
            f"{name}_{key}": value
            for name, figures in (
                ("corpus", _corpus(corpus_files, into[corpus])),
                ("messages", _messages(messages_files, into[messages])),
                ("instructions", _instructions(instructions_files, into[instructions])),
                ("gpt2", _model(gpt2_files, into[gpt2])),
            )
            for key, value in figures.items()
        }
    write_json(metrics, counts)
    return counts


# --- fetching -------------------------------------------------------------------------------------


@plain_dataclass(frozen=True, slots=True)
class _DataSet:
    name: str
    sources: Sequence[Source]
    folder: Path


@plain_dataclass(frozen=True, slots=True)
class _File:
    """A file that came: what `sources.json` is to say of it, and where it is from."""

    raw: RawFile
    origin: str


def _fetch_all(
    sets: Sequence[_DataSet], places: Places, parallel: int, log: Log
) -> list[list[_File]]:
    """Fetch the sources of all data sets, several at a time; return the files of each data set."""
    pairs = [(each, source) for each in sets for source in each.sources]
    names = Counter(source.name for _, source in pairs)
    tasks = [
        partial(
            _fetch,
            source,
            each.folder,
            places,
            f"download {each.name} {source.name}"
            if names[source.name] > 1
            else f"download {source.name}",
        )
        for each, source in pairs
    ]
    fetched = run_together(tasks, parallel, places.stop, log)
    ways: Counter[Via] = Counter()
    for file in chain.from_iterable(fetched):
        ways[file.via] += file.joined or 1
    n = ways.total()
    log(
        Message(
            f"download: {n} file{'s' * (n != 1)}: "
            + ", ".join(f"{ways[via]} {words}" for via, words in _WAYS.items() if ways[via])
        )
    )
    files: dict[str, list[_File]] = {each.name: [] for each in sets}
    for (each, source), came in zip(pairs, fetched, strict=True):
        files[each.name] += [_File(_raw_file(source, file), file.origin) for file in came]
    return list(files.values())


_WAYS: dict[Via, str] = {
    "here": "from this machine",
    "mirror": "from the mirror",
    "cache": "fetched before",
    "web": "from the web",
}


def _fetch(source: Source, folder: Path, places: Places, task: str, log: Log) -> list[Fetched]:
    if source.builtin:
        return [_write_python_docs(folder, source.saved_name, log)]
    return fetch_source(source, folder, places, task, log)


def _write_python_docs(folder: Path, name: str, log: Log) -> Fetched:
    log(Message("download python-docs: reading the documentation inside the running Python"))
    path = folder / name
    size, sha256 = write_blocks(path, map(line_of, python_docs()))
    return Fetched(name, size, sha256, "the documentation inside Python", "here", pin=sha256)


def _raw_file(source: Source, file: Fetched) -> RawFile:
    """What `sources.json` is to say of a file, but for the records in it."""
    raw = RawFile(
        name=source.name,
        file=file.file,
        kind=source.read_as,
        format="jsonl" if file.joined else source.format_of(file.file),
        bytes=file.bytes,
        sha256=file.sha256,
        url=source.urls[0] if source.urls else None,
    )
    if isinstance(source, TextSource) and not file.joined:
        raw = replace(
            raw,
            text_field=source.text_field or raw.text_field,
            label_field=source.label_field or raw.label_field,
        )
    if isinstance(source, CorpusSource):
        raw = replace(
            raw,
            separator=source.separator if raw.format == "text" else None,
            split=source.split,
            balance=source.balance,
        )
    return raw


# --- counting -------------------------------------------------------------------------------------


def _corpus(files: Sequence[_File], folder: Path) -> dict[str, int]:
    n = _count(files, folder, lambda path, file: sum(1 for _ in some_documents(path, file)))
    return {**_size(files), "documents": n}


def _messages(files: Sequence[_File], folder: Path) -> dict[str, int]:
    n = _count(files, folder, lambda path, file: len(messages_in(path, file)))
    with errors_at(folder, f"download.messages ({_names(files)})"):
        rows = read_messages(folder)["label"].value_counts()
    classes = {f"rows_{label}": int(n) for label, n in sorted(rows.items())}
    return {**_size(files), "rows": n, **classes}


def _instructions(files: Sequence[_File], folder: Path) -> dict[str, int]:
    def n_records(path: Path, file: RawFile) -> int:
        n = len(instructions_in(path, file))
        if n == 0:
            raise InputError(f"{path}: holds no record; the assistant needs some to learn from")
        return n

    return {**_size(files), "records": _count(files, folder, n_records)}


def _model(files: Sequence[_File], folder: Path) -> dict[str, int]:
    write_sources(folder, [file.raw for file in files])
    return _size(files)


def _count(files: Sequence[_File], folder: Path, count: Callable[[Path, RawFile], int]) -> int:
    """Count the records in each file of a data set, list the files, and return the sum."""
    counted = []
    for file in files:
        path = folder / file.raw.file
        with errors_at(path, file.origin):
            counted.append(replace(file.raw, records=count(path, file.raw)))
    write_sources(folder, counted)
    return sum(file.records or 0 for file in counted)


def _size(files: Sequence[_File]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(file.raw.bytes for file in files)}


def _names(files: Sequence[_File]) -> str:
    """The files' names, the first ones of many."""
    return first_few([file.raw.file for file in files], 5)
