"""Documents to tokens, a block at a time: what worker processes do, and what they leave on disk.

A block is a run of documents whose extent depends on the text alone, so it does not matter which
process encodes it. It is one file with the ids of its documents (each after an `<|endoftext|>`) and
a table of them, written whole or not at all; its checksums find later damage.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt.clean.cleaning import Cleaner, CleanParams
from gpt.text.records import hash_position
from gpt.tokens.token_files import token_dtype
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer

BLOCK = 1 << 22
"""Characters of text that are encoded together: what a worker has in memory at a time."""

_EXAMPLES_KEPT = 3
"""Examples of each cleaning step and filter that are kept."""


def cut_blocks(
    documents: Iterable[tuple[int, str]],
) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
    """Cut documents, each with the number of its source, into blocks of about `BLOCK` characters.

    Yields:
        The numbers and the texts of the documents of each block.
    """
    size = 0
    sources: list[int] = []
    texts: list[str] = []
    for source, text in documents:
        sources.append(source)
        texts.append(text)
        size += len(text)
        if size >= BLOCK:
            yield sources, texts
            size, sources, texts = 0, [], []
    if texts:
        yield sources, texts


@dataclass(frozen=True, slots=True)
class Table:
    """The documents of all blocks, a row each.

    Attributes:
        source: the number of its source in the corpus, (n,).
        length: its tokens, `<|endoftext|>` before it among them, (n,); 0 if a filter removed it.
        bytes: of its cleaned text, (n,).
        hash: the position of the text in the hash's range, (n,) uint64.
        signature: for finding near-duplicates, (n, m); m is 0 if they are not looked for.
        kept: whether it passed the filters, (n,).
        block: the number of its block, (n,).
        offset: where its ids begin in that block, (n,).
    """

    source: np.ndarray
    length: np.ndarray
    bytes: np.ndarray
    hash: np.ndarray
    signature: np.ndarray
    kept: np.ndarray
    block: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


@dataclass(slots=True)
class Cleaning:
    """What cleaning did: for each `changed` step or `removed` by filter, source and name.

    Attributes:
        counts: how many documents.
        examples: the first ones, as (what, source, name, texts).
    """

    counts: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    examples: list[tuple[str, int, str, Sequence[str]]] = field(default_factory=list)

    def add(self, what: str, source: int, name: str, n: int, texts: Sequence[str] = ()) -> None:
        """Count `n` documents."""
        self.counts[what, source, name] += n
        if texts:
            known = sum(each[:3] == (what, source, name) for each in self.examples)
            if known < _EXAMPLES_KEPT:
                self.examples.append((what, source, name, texts))

    def of_source(self, what: str, source: int) -> dict[str, int]:
        """The counts of one source by step or filter."""
        return {
            name: n for (kind, of, name), n in self.counts.items() if (kind, of) == (what, source)
        }


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
    _coder = Coder(tokenizer, Cleaner(clean), dtype, seed, clean.near_duplicates is not None)


def tokenizer() -> Tokenizer:
    """The tokenizer of this process."""
    assert _coder is not None, "prepare comes first"
    return _coder.tokenizer


def encode(
    folder: Path, number: int, sources: Sequence[int], texts: Sequence[str]
) -> tuple[int, bool]:
    """Write a block into `folder`.

    Returns:
        How many documents are in it, and whether it was already there.
    """
    assert _coder is not None, "prepare comes first"
    path = _path(folder, number)
    if _is_undamaged(path):
        return len(texts), True
    tokenizer, dtype = _coder.tokenizer, _coder.dtype
    cleaning = Cleaning()
    rows: list[tuple[int, int, int]] = []  # tokens, bytes, hash
    ids = [np.empty(0, dtype)]
    signatures: list[np.ndarray] = []
    for source, text in zip(sources, texts, strict=True):
        cleaned = _coder.clean(text)
        for step, *around in cleaned.changed:
            cleaning.add("changed", source, step, 1, around)
        if cleaned.removed is not None:
            cleaning.add("removed", source, cleaned.removed, 1, [text[:200]])
            rows.append((0, 0, 0))
        else:
            own = tokenizer.encode_array(cleaned.text)
            ids += [np.array([tokenizer.eot], dtype), own.astype(dtype)]
            n_bytes = len(cleaned.text.encode())
            rows.append((len(own) + 1, n_bytes, hash_position(cleaned.text, _coder.seed)))
        if _coder.signatures:
            from gpt.clean.duplicates import signature

            signatures.append(signature(cleaned.text))
    lengths, sizes, hashes = zip(*rows, strict=True)
    said = [[*key, n] for key, n in cleaning.counts.items()], cleaning.examples
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:  # no fsync: what a loss of power spoils, the checksums find
        np.savez(
            file,
            allow_pickle=False,
            source=np.array(sources, np.int32),
            length=np.array(lengths, np.int64),
            bytes=np.array(sizes, np.int64),
            hash=np.array(hashes, np.uint64),
            signature=np.array(signatures, np.uint32).reshape(len(rows), -1),
            cleaning=np.frombuffer(json.dumps(said).encode(), np.uint8),
            ids=np.concatenate(ids),
        )
    partial.replace(path)
    return len(rows), False


def _is_undamaged(path: Path) -> bool:
    try:
        with np.load(path) as block:
            return len(dict(block)["ids"]) == int(block["length"].sum())
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return False


# --- what they left -------------------------------------------------------------------------------


def block_ids(folder: Path, number: int) -> np.ndarray:
    """The ids of a block, (n,)."""
    with np.load(_path(folder, number)) as block:
        ids: np.ndarray = block["ids"]
    return ids


def document_ids(folder: Path, table: Table, row: int) -> np.ndarray:
    """The ids of a document, the first of them the `<|endoftext|>` before it."""
    ids = block_ids(folder, int(table.block[row]))
    return ids[table.offset[row] : table.offset[row] + table.length[row]]


def read_tables(folder: Path, n_blocks: int) -> tuple[Table, Cleaning]:
    """The documents of all blocks, and what cleaning did."""
    names = ("source", "length", "bytes", "hash", "signature")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "block", "offset")}
    cleaning = Cleaning()
    for number in range(n_blocks):
        with np.load(_path(folder, number)) as block:
            for name in names:
                columns[name].append(block[name])
            counts, examples = json.loads(block["cleaning"].tobytes())
        length = columns["length"][-1]
        columns["block"].append(np.full(len(length), number))
        columns["offset"].append(np.cumsum(length) - length)
        for what, source, name, n in counts:
            cleaning.add(what, source, name, n)
        for what, source, name, texts in examples:
            cleaning.add(what, source, name, 0, texts)
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Table(**whole, kept=whole["length"] > 0), cleaning


def _path(folder: Path, number: int) -> Path:
    return folder / f"block-{number:08}.npz"
