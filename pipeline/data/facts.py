"""What the data report tells: the stage tokenize's facts of the corpus, and what the rows are like.

Facts of what lies under `data/` and `reports/tokenize/`, and of nothing else: no clock, no host.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.base.errors import InputError, first_problem
from gpt.text.records import (
    SOURCES,
    Instruction,
    RawFile,
    instructions_in,
    messages_in,
    read_sources,
)
from gpt.tokens.token_files import Counts
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer

RAW = Path("data/raw")
TOKENS = Path("data/tokens")
CORPUS_FACTS = Path("reports/tokenize/corpus.json")

EXCERPT = 200
"""Characters of a text that is shown."""
SHOWN = 5
"""So many of the longest and of the oddest rows are shown."""
_FEWEST_CHARACTERS = 20
"""Shorter rows are odd to a tokenizer, all of them, and to nobody else."""
_BATCH = 4096  # rows whose tokens are in memory together

# a field that a later version adds is no mistake
_CONFIG = ConfigDict(extra="ignore")


# --- the corpus, as the stage tokenize found it ---------------------------------------------------


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Lengths:
    """How long texts are.

    Attributes:
        edges: of the bars; the last bar may have no upper edge.
        counts: `counts[i]` texts of a length of `edges[i]` or more, below `edges[i + 1]`.
        min: the shortest; None, as all that follow, where there is no text.
        median: half of the texts are no longer.
        mean: the arithmetic mean.
        p95: 95 % of the texts are no longer.
        max: the longest.
    """

    edges: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    min: float | None = None
    median: float | None = None
    mean: float | None = None
    p95: float | None = None
    max: float | None = None


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Shared:
    """Validation documents that share an n-gram with the training split, and the shared tokens."""

    documents: int
    tokens: int


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class CorpusSource:
    """What the stage tokenize found in one source; documents, bytes and tokens of what it kept."""

    name: str
    url: str | None = None
    files: int
    bytes: int
    sha256: str | None = None
    read: int
    kept: int
    text_bytes: int
    tokens: int
    removed: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    train: Counts
    validation: Counts
    lengths: Lengths
    contamination: Shared | None = None


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class MixtureShare:
    """What a source was to be of the mixture, and what it is."""

    weight: float
    share: float
    tokens: int
    epochs: float
    max_epochs: float | None = None


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Mixture:
    """The training split as a mixture of so many tokens."""

    tokens: int
    sources: dict[str, MixtureShare]


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Excerpt:
    """The beginning of a document, and why it is shown; what does not apply is empty."""

    source: str
    text: str = ""
    filter: str = ""
    step: str = ""
    before: str = ""
    after: str = ""
    tokens: int = 0
    bytes: int = 0
    bytes_per_token: float = 0.0


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Contamination:
    """Validation documents of which training documents hold `ngram` words or tokens in a row."""

    ngram: int
    documents: int
    of: int
    tokens: int
    examples: tuple[Excerpt, ...] = ()


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Examples:
    """Documents that a step changed and that a filter removed."""

    changed: tuple[Excerpt, ...] = ()
    removed: tuple[Excerpt, ...] = ()


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Corpus:
    """`reports/tokenize/corpus.json`; what is None was not asked for.

    `clean` are the parameters of the cleaning; None where they are not told.
    """

    tokenizer: str
    vocab_size: int
    sources: tuple[CorpusSource, ...]
    mixture: Mixture | None = None
    contamination: Contamination | None = None
    clean: dict[str, Any] | None = None
    examples: Examples = field(default_factory=Examples)
    longest: tuple[Excerpt, ...] = ()
    oddest: tuple[Excerpt, ...] = ()

    def looked_for(self, parameter: str, step: str) -> bool | None:
        """Whether the cleaning did something; None if that is not told, and it found nothing.

        Args:
            parameter: its name in `clean`.
            step: its name, or how it begins, among what was removed.
        """
        if self.clean is not None:
            return bool(self.clean.get(parameter))
        found = any(name.startswith(step) for each in self.sources for name in each.removed)
        return found or None


def read_corpus(path: Path) -> Corpus:
    """The facts that the stage tokenize wrote.

    Raises:
        InputError: they are missing or cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage tokenize first")
    try:
        return TypeAdapter(Corpus).validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; run the stage tokenize again") from None


# --- raw data sets --------------------------------------------------------------------------------


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
    def urls(self) -> list[str]:
        """Where it is published."""
        return list(dict.fromkeys(file.url for file in self.files if file.url))


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


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """A message or an instruction record that is shown."""

    source: str
    label: str
    """A message's class; empty for a record."""
    text: str
    """Its beginning."""
    characters: int
    tokens: int | None
    figure: float
    """Bytes per token where tokens were counted, else the share of letters."""


@dataclass(frozen=True, slots=True)
class Messages:
    """The labelled messages.

    Attributes:
        rows: rows by source and class.
        characters: lengths by class.
        tokens: lengths by class; None where there is no tokenizer.
        n_tokens: of all rows.
        exact: rows whose label and text an earlier row has.
        folded: rows whose text an earlier row has, but for case and white space.
        contradictions: texts, but for case and white space, that rows of several classes have.
        longest: the longest rows.
        oddest: the rows with the lowest figure.
    """

    rows: Mapping[str, Mapping[str, int]]
    characters: Mapping[str, Lengths]
    tokens: Mapping[str, Lengths] | None
    n_tokens: int | None
    exact: int
    folded: int
    contradictions: int
    longest: Sequence[Row]
    oddest: Sequence[Row]

    @property
    def classes(self) -> dict[str, int]:
        """Rows by class, the largest first."""
        total: Counter[str] = Counter()
        for rows in self.rows.values():
            total.update(rows)
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class Instructions:
    """The instruction records.

    Attributes:
        rows: records by source.
        turns: records by their number of turns; the last one's answer is what is learnt.
        without_input: records with an empty input, by source.
        characters: lengths of the instruction, the input (where there is one) and the answer.
        tokens: the same in tokens; None where there is no tokenizer.
        answers: lengths of the answers by source, in characters.
        n_tokens: of all records.
        exact: records that are equal to an earlier one.
        folded: records whose task (all that is asked) an earlier one has, but for case and white
            space.
        contradictions: tasks, but for case and white space, to which records answer differently.
        longest: the longest records.
        oddest: the records with the lowest figure.
    """

    rows: Mapping[str, int]
    turns: Mapping[int, int]
    without_input: Mapping[str, int]
    characters: Mapping[str, Lengths]
    tokens: Mapping[str, Lengths] | None
    answers: Mapping[str, Lengths]
    n_tokens: int | None
    exact: int
    folded: int
    contradictions: int
    longest: Sequence[Row]
    oddest: Sequence[Row]


def message_facts(folder: Path, tokenizer: Tokenizer | None) -> Messages | None:
    """Look at every message of a raw folder; None where there is none.

    Raises:
        InputError: a file is not what its format says.
    """
    sources: list[str] = []
    labels: list[str] = []
    texts: list[str] = []
    for source in raw_sources(folder):
        for file in source.files:
            frame = messages_in(folder / file.file, file)
            sources += [source.name] * len(frame)
            labels += frame["label"].tolist()
            texts += frame["text"].tolist()
    if not texts:
        return None
    rows: dict[str, Counter[str]] = {}
    for name, label in zip(sources, labels, strict=True):
        rows.setdefault(name, Counter())[label] += 1
    folded = [_folded(text) for text in texts]
    sizes = _token_counts(texts, tokenizer)
    shown = _Shown(sources, labels, texts, sizes)
    return Messages(
        rows=rows,
        characters=_by_group(labels, map(len, texts)),
        tokens=_by_group(labels, sizes) if sizes is not None else None,
        n_tokens=sum(sizes) if sizes is not None else None,
        exact=_repeated(zip(labels, texts, strict=True)),
        folded=_repeated(folded),
        contradictions=_contradicted(folded, labels),
        longest=shown.longest(),
        oddest=shown.oddest(),
    )


def instruction_facts(folder: Path, tokenizer: Tokenizer | None) -> Instructions | None:
    """Look at every instruction record of a raw folder; None where there is none.

    Raises:
        InputError: a file is not what its format says.
    """
    sources: list[str] = []
    records: list[Instruction] = []
    for source in raw_sources(folder):
        for file in source.files:
            found = instructions_in(folder / file.file, file)
            sources += [source.name] * len(found)
            records += found
    if not records:
        return None
    tasks = [_folded(record.task) for record in records]
    texts = [record.text for record in records]
    sizes = _token_counts(texts, tokenizer)
    parts: dict[str, list[str]] = {
        "instruction": [record.instruction for record in records],
        "input": [record.input for record in records if record.input.strip()],
        "answer": [record.output for record in records],
    }
    shown = _Shown(sources, [""] * len(records), texts, sizes)
    return Instructions(
        rows=Counter(sources),
        turns=Counter(len(record.earlier) + 1 for record in records),
        without_input=Counter(
            name for name, record in zip(sources, records, strict=True) if not record.input.strip()
        ),
        characters={name: lengths_of(map(len, part)) for name, part in parts.items()},
        tokens=(
            {name: lengths_of(_token_counts(part, tokenizer) or ()) for name, part in parts.items()}
            if tokenizer
            else None
        ),
        answers=_by_group(sources, (len(record.output) for record in records)),
        n_tokens=sum(sizes) if sizes is not None else None,
        exact=_repeated(records),
        folded=_repeated(tasks),
        contradictions=_contradicted(tasks, (_folded(record.output) for record in records)),
        longest=shown.longest(),
        oddest=shown.oddest(),
    )


def lengths_of(sizes: Iterable[int]) -> Lengths:
    """Lengths, in bars that double: 1, 2 and 3, 4 to 7, … (a length of 0 is in the first)."""
    values = np.fromiter(sizes, dtype=np.int64)
    if not len(values):
        return Lengths()
    n_bars = max(int(values.max()).bit_length(), 1)
    edges = [1 << i for i in range(n_bars + 1)]
    # exact where logarithms would round
    bars = np.searchsorted(edges, np.maximum(values, 1), side="right") - 1
    return Lengths(
        edges=tuple(edges),
        counts=tuple(np.bincount(bars, minlength=n_bars).tolist()),
        min=int(values.min()),
        median=float(np.median(values)),
        mean=float(values.mean()),
        p95=int(np.percentile(values, 95, method="inverted_cdf")),
        max=int(values.max()),
    )


@dataclass(frozen=True, slots=True)
class _Shown:
    """Picks the rows that are worth a look."""

    sources: Sequence[str]
    labels: Sequence[str]
    texts: Sequence[str]
    tokens: Sequence[int] | None

    def longest(self) -> list[Row]:
        return self._first(lambda i: -len(self.texts[i]), range(len(self.texts)))

    def oddest(self) -> list[Row]:
        long_enough = [i for i, text in enumerate(self.texts) if len(text) >= _FEWEST_CHARACTERS]
        return self._first(self._figure, long_enough)

    def _figure(self, i: int) -> float:
        text = self.texts[i]
        if self.tokens is None:
            return sum(map(str.isalpha, text)) / max(len(text), 1)
        return len(text.encode()) / max(self.tokens[i], 1)

    def _first(self, key: Callable[[int], float], rows: Iterable[int]) -> list[Row]:
        picked: dict[str, int] = {}  # a text that comes often is shown once
        for i in sorted(rows, key=lambda i: (key(i), i)):
            picked.setdefault(self.texts[i], i)
            if len(picked) == SHOWN:
                break
        return [self._row(i) for i in picked.values()]

    def _row(self, i: int) -> Row:
        return Row(
            source=self.sources[i],
            label=self.labels[i],
            text=self.texts[i][:EXCERPT],
            characters=len(self.texts[i]),
            tokens=None if self.tokens is None else self.tokens[i],
            figure=self._figure(i),
        )


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _repeated(values: Iterable[object]) -> int:
    """How many of the values an earlier one is equal to."""
    return sum(n - 1 for n in Counter(values).values())


def _contradicted(keys: Iterable[str], values: Iterable[str]) -> int:
    """How many keys come with more than one value."""
    found: dict[str, set[str]] = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, set()).add(value)
    return sum(len(each) > 1 for each in found.values())


def _by_group(groups: Sequence[str], sizes: Iterable[int]) -> dict[str, Lengths]:
    found: dict[str, list[int]] = {}
    for group, size in zip(groups, sizes, strict=True):
        found.setdefault(group, []).append(size)
    return {group: lengths_of(sizes) for group, sizes in found.items()}


def _token_counts(texts: Sequence[str], tokenizer: Tokenizer | None) -> list[int] | None:
    if tokenizer is None:
        return None
    threads = os.cpu_count() or 1
    return [len(ids) for batch in _batches(texts) for ids in tokenizer.encode_batch(batch, threads)]


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _BATCH):
        yield texts[start : start + _BATCH]


# --- all of it ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataFacts:
    """All that the report tells.

    Attributes:
        raw: the sources of each raw folder (`corpus`, `messages`, `instructions`, `gpt2`).
        corpus: None where the corpus was not tokenized, or downloaded anew since.
        outdated: it was tokenized, but that was another corpus.
        messages: None where there are none.
        instructions: None where there are none.
    """

    raw: Mapping[str, Sequence[RawSource]]
    corpus: Corpus | None
    outdated: bool
    messages: Messages | None
    instructions: Instructions | None


def data_facts(root: Path) -> DataFacts:
    """Look at the data of a project.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    raw = {
        name: raw_sources(root / RAW / name)
        for name in ("corpus", "messages", "instructions", "gpt2")
    }
    if not any(raw.values()):
        raise InputError(
            f"{root / RAW}: nothing was downloaded yet; run `gpt-pipeline run tokenize` first"
        )
    corpus = read_corpus(root / CORPUS_FACTS) if (root / CORPUS_FACTS).is_file() else None
    outdated = corpus is not None and not _same_sources(corpus, raw["corpus"])
    if outdated:
        corpus = None
    tokenizer = None
    if corpus is not None and (root / TOKENS / "vocab.json").is_file():
        tokenizer = load_tokenizer(root / TOKENS)
    return DataFacts(
        raw=raw,
        corpus=corpus,
        outdated=outdated,
        messages=message_facts(root / RAW / "messages", tokenizer),
        instructions=instruction_facts(root / RAW / "instructions", tokenizer),
    )


def _same_sources(corpus: Corpus, raw: Sequence[RawSource]) -> bool:
    """Whether the facts are of the files that are there now."""
    told = {each.name: (each.files, each.bytes, each.sha256) for each in corpus.sources}
    found = {
        each.name: (
            len(each.files),
            each.bytes,
            each.files[0].sha256 if len(each.files) == 1 else None,
        )
        for each in raw
    }
    return told == found
