"""What the data report tells: the stage tokenize's facts of the corpus, and what the rows are like.

Facts of what is under `data/` and `reports/tokenize/` only: no clock and no host.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.base.errors import InputError, first_few
from gpt.base.files import read_json
from gpt.text.records import SOURCES, RawFile, instructions_in, messages_in, read_sources
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer
from pipeline.project.secrets import without_credentials

if TYPE_CHECKING:
    import pandas as pd

RAW = Path("data/raw")
CORPUS_FACTS = Path("reports/tokenize/corpus.json")
DATA_SETS = {
    "corpus": "pretraining text (documents)",
    "messages": "messages (rows)",
    "instructions": "instructions (records)",
    "gpt2": "published model (files)",
}
"""The raw folders, and what they hold."""

_TOKENS = Path("data/tokens")
_SHOWN_ROWS = 5  # of the longest and of the oddest
_SHORTEST_ODD_ROW = 20  # characters; every shorter row is odd to a tokenizer
_TOKENIZED_AT_ONCE = 4096  # whose tokens are in memory together


@dataclass(frozen=True, slots=True)
class RawSource:
    """One source of a raw folder, all its files together."""

    name: str
    files: tuple[RawFile, ...]

    @property
    def bytes(self) -> int:
        """On disk, as they were fetched."""
        return sum(file.bytes for file in self.files)

    @property
    def records(self) -> int:
        """The documents, messages or instruction records."""
        return sum(file.records or 0 for file in self.files)

    @property
    def sha256(self) -> str | None:
        """Of its only file; None where it has several."""
        return self.files[0].sha256 if len(self.files) == 1 else None

    @property
    def urls(self) -> list[str]:
        """Where it is published."""
        return list(dict.fromkeys(file.url for file in self.files if file.url))

    @property
    def origin(self) -> str:
        """Where it is published, in words."""
        urls = [without_credentials(url) for url in self.urls]
        return first_few(urls, 1) or "local or built in"


def raw_sources(folder: Path) -> list[RawSource]:
    """The sources of a raw folder in their order; none where nothing was downloaded into it.

    Raises:
        InputError: the folder cannot be read.
    """
    if not (folder / SOURCES).is_file():
        return []
    by_name: dict[str, list[RawFile]] = {}
    for file in read_sources(folder):
        by_name.setdefault(file.name, []).append(file)
    return [RawSource(name, tuple(files)) for name, files in by_name.items()]


@dataclass(frozen=True, slots=True)
class DataFacts:
    """All that the report tells.

    Attributes:
        raw: the sources of each raw folder.
        corpus: as `reports/tokenize/corpus.json` has it; None where the corpus was not tokenized,
            or downloaded anew since.
        outdated: it was tokenized, but that was another corpus.
        messages: as `_rows` has them, with `classes`, rows by class, the largest first; None where
            there are none.
        instructions: as `_rows` has them, with `turns`, records by their number of turns, and
            `answers`, the lengths of the answers by source; None where there are none.
    """

    raw: Mapping[str, Sequence[RawSource]]
    corpus: dict[str, Any] | None
    outdated: bool
    messages: dict[str, Any] | None
    instructions: dict[str, Any] | None


def data_facts(root: Path) -> DataFacts:
    """Look at the data of a project.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    raw = {name: raw_sources(root / RAW / name) for name in DATA_SETS}
    if not any(raw.values()):
        raise InputError(
            f"{root / RAW}: nothing was downloaded yet; run `gpt-pipeline run tokenize` first"
        )
    corpus, tokenizer = None, None
    if (root / CORPUS_FACTS).is_file():
        corpus = read_json(
            root / CORPUS_FACTS, missing="no such file", remedy="run the stage tokenize again"
        )
    outdated = corpus is not None and not _of_these_files(corpus, raw["corpus"])
    if outdated:
        corpus = None
    if corpus is not None and (root / _TOKENS / "vocab.json").is_file():
        tokenizer = load_tokenizer(root / _TOKENS)
    return DataFacts(
        raw=raw,
        corpus=corpus,
        outdated=outdated,
        messages=_messages(root / RAW / "messages", tokenizer),
        instructions=_instructions(root / RAW / "instructions", tokenizer),
    )


def _of_these_files(corpus: Mapping[str, Any], raw: Sequence[RawSource]) -> bool:
    """Whether the facts are of the files that are there now."""
    told = {
        tuple(map(each.get, ("name", "files", "bytes", "sha256"))) for each in corpus["sources"]
    }
    found = {(each.name, len(each.files), each.bytes, each.sha256) for each in raw}
    return told == found


# --- rows -----------------------------------------------------------------------------------------


def _messages(folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    import pandas as pd

    frames = [
        messages_in(folder / file.file, file).assign(source=source.name)
        for source in raw_sources(folder)
        for file in source.files
    ]
    if not sum(map(len, frames)):
        return None
    rows = pd.concat(frames, ignore_index=True).astype(object)
    rows["row"] = list(zip(rows["label"], rows["text"], strict=True))
    rows["asked"] = rows["text"].map(_folded)
    rows["answered"] = rows["label"]
    count = Counter(rows["label"])
    classes = dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))
    by_class = {str(label): texts.tolist() for label, texts in rows.groupby("label")["text"]}
    return {"classes": classes, **_rows(rows, by_class, tokenizer)}


def _instructions(folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    import pandas as pd

    records = [
        (source.name, record)
        for source in raw_sources(folder)
        for file in source.files
        for record in instructions_in(folder / file.file, file)
    ]
    if not records:
        return None
    rows = pd.DataFrame(records, columns=["source", "row"], dtype=object).assign(label="")
    rows["text"] = [record.text for _, record in records]
    rows["asked"] = [_folded(record.task) for _, record in records]
    rows["answered"] = [_folded(record.output) for _, record in records]
    parts = {
        "instruction": [record.instruction for _, record in records],
        "input": [record.input for _, record in records if record.input.strip()],
        "answer": [record.output for _, record in records],
    }
    answers: dict[str, list[int]] = {}
    for source, record in records:
        answers.setdefault(source, []).append(len(record.output))
    return {
        "turns": dict(sorted(Counter(len(record.earlier) + 1 for _, record in records).items())),
        "without_input": Counter(name for name, record in records if not record.input.strip()),
        "answers": {source: lengths_of(sizes) for source, sizes in answers.items()},
        **_rows(rows, parts, tokenizer),
    }


def _rows(
    rows: pd.DataFrame, parts: Mapping[str, Sequence[str]], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """What is told of messages and of instructions alike.

    Args:
        rows: `source`, `label`, `row` (which exact duplicates share), `text`, `asked` and
            `answered` (both without case and repeated white space).
        parts: the texts whose lengths are told, by what they are.
        tokenizer: None: tokens are not counted.

    Returns:
        `by_source` (rows of each), `exact` (rows equal to an earlier one), `folded` (rows that ask
        what an earlier one asks), `contradictions` (what is asked with several answers), `tokens`
        (None, or of all rows), `characters` and `token_lengths` (lengths by part; the latter may be
        None), `longest` and `oddest` (rows with the fewest bytes per token, or without a tokenizer
        with the smallest share of letters: their `figure`).
    """
    texts = rows["text"].tolist()
    rows["characters"] = list(map(len, texts))
    if tokenizer is None:
        rows["tokens"] = None
        rows["figure"] = [sum(map(str.isalpha, text)) / max(len(text), 1) for text in texts]
    else:
        rows["tokens"] = _token_counts(texts, tokenizer)
        rows["figure"] = [len(text.encode()) for text in texts] / rows["tokens"].clip(lower=1)
    answers = rows.groupby("asked")["answered"].nunique()
    distinct = rows.drop_duplicates("text")
    longest = distinct.sort_values("characters", ascending=False, kind="stable")
    oddest = distinct[distinct["characters"] >= _SHORTEST_ODD_ROW].sort_values(
        "figure", kind="stable"
    )
    return {
        "by_source": Counter(rows["source"]),
        "exact": int(rows["row"].duplicated().sum()),
        "folded": int(rows["asked"].duplicated().sum()),
        "contradictions": int((answers > 1).sum()),
        "tokens": None if tokenizer is None else int(rows["tokens"].sum()),
        "characters": {name: lengths_of(map(len, part)) for name, part in parts.items()},
        "token_lengths": tokenizer
        and {name: lengths_of(_token_counts(part, tokenizer)) for name, part in parts.items()},
        "longest": longest.head(_SHOWN_ROWS).to_dict("records"),
        "oddest": oddest.head(_SHOWN_ROWS).to_dict("records"),
    }


def lengths_of(sizes: Iterable[int]) -> dict[str, Any]:
    """Lengths as the stage tokenize tells them of documents: in bars that double (1, 2 and 3, 4 to
    7, …; a length of 0 is in the first), and in figures."""
    values = np.fromiter(sizes, dtype=np.int64)
    if not len(values):
        return dict.fromkeys(("min", "median", "mean", "p95", "max")) | {"edges": (), "counts": ()}
    n_bars = max(int(values.max()).bit_length(), 1)
    edges = [1 << i for i in range(n_bars + 1)]
    # exact where logarithms would round
    bars = np.searchsorted(edges, np.maximum(values, 1), side="right") - 1
    return {
        "edges": edges,
        "counts": np.bincount(bars, minlength=n_bars).tolist(),
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": int(np.percentile(values, 95, method="inverted_cdf")),
        "max": int(values.max()),
    }


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _token_counts(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    threads = os.cpu_count() or 1
    batches = (texts[i : i + _TOKENIZED_AT_ONCE] for i in range(0, len(texts), _TOKENIZED_AT_ONCE))
    return [len(ids) for batch in batches for ids in tokenizer.encode_batch(batch, threads)]
