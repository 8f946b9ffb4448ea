"""Documents to tokens, a block at a time: what worker processes do, and what they leave on disk.

A block is a run of documents whose extent depends on the text alone, so that it does not matter who
encodes it. Its ids (each document's after an `<|endoftext|>`) and a table of its documents are two
files; the table, written last, holds the digest of the ids: a block is there whole, or not at all.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from gpt.clean.cleaning import Cleaner, CleanParams
from gpt.text.records import hash_position
from gpt.tokens.token_files import map_ids, token_dtype
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer

BLOCK = 1 << 22
"""Characters of text that are encoded together: what a worker has in memory at a time."""

_EXAMPLES = 3
"""So many examples of each cleaning step and filter are kept of a block."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some documents, one behind the other, each with the place of its source in the corpus."""

    number: int
    sources: Sequence[int]
    texts: Sequence[str]


def blocks(documents: Iterable[tuple[int, str]]) -> Iterator[Block]:
    """Cut the documents of a corpus into blocks of about `BLOCK` characters."""
    number, size = 0, 0
    sources: list[int] = []
    texts: list[str] = []
    for source, text in documents:
        sources.append(source)
        texts.append(text)
        size += len(text)
        if size >= BLOCK:
            yield Block(number, sources, texts)
            number, size, sources, texts = number + 1, 0, [], []
    if texts:
        yield Block(number, sources, texts)


@dataclass(frozen=True, slots=True)
class Table:
    """What is known of the documents of one block, or of all blocks; a row a document.

    Attributes:
        source: the place of its source in the corpus, (n,).
        length: its tokens, `<|endoftext|>` before it among them, (n,); 0 if a filter removed it.
        bytes: of its cleaned text, (n,).
        hash: where the text lies in the hash's range, (n,) uint64.
        kept: whether it passed the filters, (n,).
        signature: for finding near-duplicates, (n, m); m is 0 where they are not asked for.
    """

    source: np.ndarray
    length: np.ndarray
    bytes: np.ndarray
    hash: np.ndarray
    kept: np.ndarray
    signature: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


@dataclass(slots=True)
class Cleaning:
    """What cleaning did, by source.

    Attributes:
        changed: how many documents each step changed.
        removed: how many documents each filter removed.
        changes: some examples, as (source, step, before, after).
        removals: some examples, as (source, filter, text).
    """

    changed: dict[int, dict[str, int]] = field(default_factory=dict)
    removed: dict[int, dict[str, int]] = field(default_factory=dict)
    changes: list[tuple[int, str, str, str]] = field(default_factory=list)
    removals: list[tuple[int, str, str]] = field(default_factory=list)

    def change(self, source: int, step: str, before: str, after: str) -> None:
        """Count a change, and keep it as an example if there are few."""
        count = _count(self.changed, source, step)
        if count <= _EXAMPLES:
            self.changes.append((source, step, before, after))

    def remove(self, source: int, name: str, text: str) -> None:
        """Count a removal, and keep it as an example if there are few."""
        count = _count(self.removed, source, name)
        if count <= _EXAMPLES:
            self.removals.append((source, name, text[:200]))

    def add(self, other: Cleaning) -> None:
        """Take over the counts of another block, and of its examples as many as are wanted."""
        for mine, theirs in ((self.changed, other.changed), (self.removed, other.removed)):
            for source, counts in theirs.items():
                for name, count in counts.items():
                    _count(mine, source, name, count)
        for change in other.changes:
            if sum(each[:2] == change[:2] for each in self.changes) < _EXAMPLES:
                self.changes.append(change)
        for removal in other.removals:
            if sum(each[:2] == removal[:2] for each in self.removals) < _EXAMPLES:
                self.removals.append(removal)


def _count(counts: dict[int, dict[str, int]], source: int, name: str, n: int = 1) -> int:
    of_source = counts.setdefault(source, {})
    of_source[name] = of_source.get(name, 0) + n
    return of_source[name]


# --- in the workers -------------------------------------------------------------------------------


@dataclass(slots=True)
class Coder:
    """What a process encodes with."""

    tokenizer: Tokenizer
    clean: Cleaner
    dtype: np.dtype[Any]
    seed: int
    signatures: bool


_coder: Coder | None = None


def prepare(vocabulary: Path, clean: CleanParams, seed: int) -> None:
    """Let this process encode with the tokenizer in `vocabulary`."""
    global _coder
    tokenizer = load_tokenizer(vocabulary)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    signatures = clean.near_duplicates is not None
    _coder = Coder(tokenizer, Cleaner(clean), dtype, seed, signatures)


def tokenizer() -> Tokenizer:
    """The tokenizer of this process."""
    assert _coder is not None, "prepare comes first"
    return _coder.tokenizer


def encode(folder: Path, number: int, sources: Sequence[int], texts: Sequence[str]) -> int:
    """Write the two files of a block into `folder`; return how many documents are in it."""
    assert _coder is not None, "prepare comes first"
    tokenizer, dtype = _coder.tokenizer, _coder.dtype
    end = np.array([tokenizer.eot], dtype)
    cleaning = Cleaning()
    rows: list[tuple[int, int, int]] = []  # tokens, bytes, hash
    ids: list[np.ndarray] = []
    signatures: list[np.ndarray] = []
    for source, text in zip(sources, texts, strict=True):
        cleaned = _coder.clean(text)
        for step, before, after in cleaned.changed:
            cleaning.change(source, step, before, after)
        if cleaned.removed is not None:
            cleaning.remove(source, cleaned.removed, text)
            rows.append((0, 0, 0))
        else:
            own = tokenizer.encode_array(cleaned.text)
            ids += [end, own.astype(dtype)]
            n_bytes = len(cleaned.text.encode())
            rows.append((len(own) + 1, n_bytes, hash_position(cleaned.text, _coder.seed)))
        if _coder.signatures:
            from gpt.clean.duplicates import signature

            signatures.append(signature(cleaned.text))
    path = _path(folder, number)
    written = np.concatenate(ids) if ids else np.empty(0, dtype)
    _write(path, ".ids", lambda partial: written.tofile(partial))
    length, n_bytes_, hash_ = (list(column) for column in zip(*rows, strict=True))
    table: dict[str, np.ndarray] = {
        "source": np.array(sources, np.int32),
        "length": np.array(length, np.int64),
        "bytes": np.array(n_bytes_, np.int64),
        "hash": np.array(hash_, np.uint64),
        "signature": np.array(signatures) if signatures else np.empty((len(rows), 0), np.uint32),
        "cleaning": np.frombuffer(json.dumps(asdict(cleaning)).encode(), np.uint8),
        "digest": np.array(_digest(written), np.uint64),
    }
    _write(path, ".npz", lambda partial: _save(partial, table))
    return len(rows)


def _save(path: Path, table: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **table)


def _write(path: Path, suffix: str, write: Any) -> None:
    # no fsync: what a loss of power spoils, the digest finds
    partial = path.with_suffix(f"{suffix}.partial")
    write(partial)
    partial.replace(path.with_suffix(suffix))


def _digest(ids: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(ids.view(np.uint8).data) if len(ids) else 0


# --- what they left -------------------------------------------------------------------------------


def ids_of(folder: Path, number: int, dtype: str) -> np.ndarray:
    """The ids of a block, (n,), memory-mapped."""
    return map_ids(_path(folder, number).with_suffix(".ids"), dtype)


def is_there(folder: Path, number: int, n_documents: int, dtype: str) -> bool:
    """Whether a block with so many documents lies in `folder`, undamaged."""
    try:
        with np.load(_path(folder, number).with_suffix(".npz")) as table:
            known = len(table["source"]), int(table["length"].sum()), int(table["digest"])
        ids = np.fromfile(_path(folder, number).with_suffix(".ids"), np.dtype(dtype))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return known == (n_documents, len(ids), _digest(ids))


def read_tables(folder: Path, n_blocks: int) -> tuple[Table, np.ndarray, Cleaning]:
    """The documents of all blocks, how many each block has (n_blocks,), and what cleaning did."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in Table.__slots__ if name != "kept"}
    cleaning = Cleaning()
    for number in range(n_blocks):
        with np.load(_path(folder, number).with_suffix(".npz")) as table:
            for name, parts in columns.items():
                parts.append(table[name])
            said = json.loads(table["cleaning"].tobytes())
        cleaning.add(
            Cleaning(
                changed={int(source): counts for source, counts in said["changed"].items()},
                removed={int(source): counts for source, counts in said["removed"].items()},
                changes=[tuple(example) for example in said["changes"]],
                removals=[tuple(example) for example in said["removals"]],
            )
        )
    counts = np.array([len(part) for part in columns["source"]], np.int64)
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Table(**whole, kept=whole["length"] > 0), counts, cleaning


def remove_partial(folder: Path) -> None:
    """Remove what a killed process was writing."""
    for path in folder.glob("*.partial"):
        path.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:08}"


def default_workers() -> int:
    """As many processes as this one may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
