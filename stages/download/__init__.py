"""Fetch the raw data: check every byte, keep it as it was published, and describe it."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError, first_few
from gpt.base.events import Log, Message, discard
from gpt.base.files import whole_directory, write_json
from gpt.text.records import RawFile, instructions_in, messages_in, read_messages, write_sources
from stages.download.cache import Cache
from stages.download.fetch import Fetched, SourceFetch, Via
from stages.download.sources import CorpusSource, DownloadParams, Source
from stages.download.texts import some_documents
from stages.download.threads import run_in_threads
from stages.download.transfer import errors_at

_WAYS: dict[Via, str] = {
    "here": "from this machine",
    "mirror": "from the mirror",
    "cache": "fetched before",
    "web": "from the web",
}


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
    outputs = {"corpus": corpus, "messages": messages, "instructions": instructions, "gpt2": gpt2}
    stop = threading.Event()
    figures: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        folders = {
            name: stack.enter_context(whole_directory(path)) for name, path in outputs.items()
        }
        scratch = folders["corpus"] / ".web"
        kept = Cache(cache or scratch)
        pairs = [(name, source) for name in outputs for source in getattr(params, name)]
        names = Counter(source.name for _, source in pairs)

        def fetch(name: str, source: Source, log: Log) -> list[Fetched]:
            task = f"{name} {source.name}" if names[source.name] > 1 else source.name
            folder, task = folders[name], f"download {task}"
            return SourceFetch(source, folder, params, local, kept, stop, task, log).run()

        tasks = [partial(fetch, name, source) for name, source in pairs]
        fetched = run_in_threads(tasks, params.parallel, stop, log)
        if scratch.is_dir():
            shutil.rmtree(scratch)
        ways: Counter[Via] = Counter()
        for file in (file for files in fetched for file in files):
            ways[file.via] += file.joined or 1
        n = ways.total()
        said = ", ".join(f"{ways[via]} {words}" for via, words in _WAYS.items() if ways[via])
        log(Message(f"download: {n} file{'s' * (n != 1)}: {said}"))
        for name, folder in folders.items():
            own = [
                (source, file)
                for (of, source), files in zip(pairs, fetched, strict=True)
                for file in files
                if of == name
            ]
            for key, value in _describe(name, folder, own).items():
                figures[f"{name}_{key}"] = value
    write_json(metrics, figures)
    return figures


def _describe(name: str, folder: Path, files: Sequence[tuple[Source, Fetched]]) -> dict[str, float]:
    """Read the files of a data set, write its `sources.json`, and return its figures."""
    listed = []
    for source, file in files:
        raw, path = _raw_file(source, file), folder / file.file
        with errors_at(path, file.origin):
            listed.append(replace(raw, records=_n_records(name, path, raw)))
    write_sources(folder, listed)
    figures: dict[str, float] = {"files": len(files), "bytes": sum(file.bytes for file in listed)}
    if name != "gpt2":
        unit = {"corpus": "documents", "messages": "rows", "instructions": "records"}[name]
        figures[unit] = sum(file.records or 0 for file in listed)
    if name == "messages":
        names = first_few([file.file for file in listed], 5)
        with errors_at(folder, f"download.messages ({names})"):
            rows = read_messages(folder)["label"].value_counts()
        figures |= {f"rows_{label}": int(n) for label, n in sorted(rows.items())}
    return figures


def _n_records(name: str, path: Path, file: RawFile) -> int | None:
    """How many records of its data set a file holds; None for a file of a model."""
    if name == "corpus":
        return sum(1 for _ in some_documents(path, file))
    if name == "messages":
        return len(messages_in(path, file))
    if name == "gpt2":
        return None
    n = len(instructions_in(path, file))
    if n == 0:
        raise InputError(f"{path}: holds no record; the assistant needs some to learn from")
    return n


def _raw_file(source: Source, file: Fetched) -> RawFile:
    """The entry of a file in `sources.json`, without the number of its records."""
    format_ = "jsonl" if file.joined else source.format_of(file.file)
    options: dict[str, Any] = {}
    if not file.joined:
        fields = {name: getattr(source, name, None) for name in ("text_field", "label_field")}
        options |= {name: value for name, value in fields.items() if value}
    if isinstance(source, CorpusSource):
        options |= {"split": source.split, "balance": source.balance}
        options["separator"] = source.separator if format_ == "text" else None
    return RawFile(
        name=source.name,
        file=file.file,
        kind=source.read_as,
        format=format_,
        bytes=file.bytes,
        sha256=file.sha256,
        url=source.urls[0] if source.urls else None,
        **options,
    )
