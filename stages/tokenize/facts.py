"""What there is to say of the corpus: facts for the data report, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gpt.text.records import RawFile
from gpt.tokens.token_files import Counts, Manifest, Tokens
from gpt.tokens.tokenizer import Tokenizer
from stages.tokenize.blocks import Cleaning, Table, ids_of
from stages.tokenize.contamination import Overlap
from stages.tokenize.draw import Share

_EXCERPT = 200  # characters
_SHOWN = 5
_JUDGED_TOKENS = 16
"""Shorter documents are not looked at for the oddest: a single rare character makes them odd."""


class Documents:
    """The texts of documents, read back from their blocks."""

    def __init__(
        self, table: Table, counts: np.ndarray, folder: Path, tokenizer: Tokenizer, dtype: str
    ) -> None:
        self.table = table
        self._folder, self._tokenizer, self._dtype = folder, tokenizer, dtype
        self._block = np.repeat(np.arange(len(counts)), counts)
        begins = np.cumsum(table.length) - table.length
        self._offset = begins - begins[(np.cumsum(counts) - counts)[self._block]]

    def ids(self, row: int) -> np.ndarray:
        """The ids of a document, the `<|endoftext|>` before it the first."""
        ids = ids_of(self._folder, int(self._block[row]), self._dtype)
        return ids[self._offset[row] : self._offset[row] + self.table.length[row]]

    def excerpt(self, row: int) -> str:
        """How a document begins."""
        return self._tokenizer.decode(self.ids(row)[1 : 1 + _EXCERPT].tolist())[:_EXCERPT]


def facts(
    files: Sequence[RawFile],
    names: Sequence[str],
    documents: Documents,
    cleaning: Cleaning,
    manifest: Manifest,
    shares: Mapping[str, Share] | None,
    overlap: tuple[int, Overlap, Tokens] | None,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The facts as JSON has them: by source, of the mixture, and examples.

    Args:
        files: of the raw folder.
        names: of the sources, in order.
        documents: all that were read.
        cleaning: what was changed and removed, duplicates among it.
        manifest: of the token files.
        shares: what a mixture came to.
        overlap: the length of an n-gram, what validation and training share, and the validation
            ids; None where it was not looked for.
        tokenizer: of the token files.
    """
    table = documents.table
    contaminated = _by_source(overlap[1], manifest, names) if overlap else {}
    sources = []
    for number, name in enumerate(names):
        own = [file for file in files if file.name == name]
        rows = np.flatnonzero(table.kept & (table.source == number))
        sources.append(
            {
                "name": name,
                "url": own[0].url,
                "files": len(own),
                "bytes": sum(file.bytes for file in own),
                "sha256": own[0].sha256 if len(own) == 1 else None,
                "read": int((table.source == number).sum()),
                "kept": len(rows),
                "text_bytes": int(table.bytes[rows].sum()),
                "tokens": int((table.length[rows] - 1).sum()),
                "removed": cleaning.removed.get(number, {}),
                "changed": cleaning.changed.get(number, {}),
                **{
                    split: asdict(manifest.splits[split].sources.get(name, Counts()))
                    for split in ("train", "validation")
                },
                "lengths": _lengths(table.length[rows] - 1),
                "contamination": contaminated.get(name),
            }
        )
    return {
        "vocab_size": tokenizer.vocab_size,
        "sources": sources,
        "mixture": None
        if shares is None
        else {
            "tokens": sum(share.tokens for share in shares.values()),
            "sources": {name: asdict(share) for name, share in shares.items()},
        },
        "contamination": _contamination(*overlap, manifest, tokenizer) if overlap else None,
        "examples": {
            "changed": [
                {"source": names[source], "step": step, "before": before, "after": after}
                for source, step, before, after in cleaning.changes
            ],
            "removed": [
                {"source": names[source], "filter": name, "text": text}
                for source, name, text in cleaning.removals
            ],
        },
        "longest": [
            {
                "source": names[table.source[row]],
                "tokens": int(table.length[row] - 1),
                "bytes": int(table.bytes[row]),
                "text": documents.excerpt(row),
            }
            for row in _first(-table.length, table.kept, table.hash)
        ],
        "oddest": _oddest(documents, names),
    }


def _first(keys: np.ndarray, allowed: np.ndarray, hashes: np.ndarray) -> list[int]:
    """Of the rows that are allowed those of the lowest keys, of equal texts the first only."""
    _, firsts = np.unique(hashes, return_index=True)
    rows = np.sort(firsts[allowed[firsts]])
    chosen: list[int] = rows[np.argsort(keys[rows], kind="stable")][:_SHOWN].tolist()
    return chosen


def _oddest(documents: Documents, names: Sequence[str]) -> list[dict[str, Any]]:
    table = documents.table
    judged = table.kept & (table.length > _JUDGED_TOKENS)
    density = table.bytes / np.maximum(table.length - 1, 1)
    return [
        {
            "source": names[table.source[row]],
            "bytes_per_token": round(float(density[row]), 3),
            "tokens": int(table.length[row] - 1),
            "text": documents.excerpt(row),
        }
        for row in _first(density, judged, table.hash)
    ]


def _lengths(tokens: np.ndarray) -> dict[str, Any]:
    """A summary of lengths in tokens, with counts between powers of two."""
    if not len(tokens):
        none = dict.fromkeys(("min", "median", "mean", "p95", "max"), 0)
        return {"edges": [0, 1], "counts": [0], **none}
    edges = [0] + [1 << power for power in range(int(tokens.max()).bit_length() + 1)]
    counts, _ = np.histogram(tokens, edges)
    return {
        "edges": edges,
        "counts": counts.tolist(),
        "min": int(tokens.min()),
        "median": float(np.median(tokens)),
        "mean": round(float(tokens.mean()), 2),
        "p95": float(np.percentile(tokens, 95)),
        "max": int(tokens.max()),
    }


def _owners(overlap: Overlap, manifest: Manifest) -> list[str]:
    """The source of each document that shares something."""
    counts = manifest.splits["validation"].sources
    ends = np.cumsum([each.tokens for each in counts.values()])
    places = np.searchsorted(ends, overlap.longest[:, 0], side="right")
    return [list(counts)[place] for place in places.tolist()]


def _by_source(
    overlap: Overlap, manifest: Manifest, names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Shared documents and tokens by source."""
    shared = {name: {"documents": 0, "tokens": 0} for name in names}
    for name, tokens in zip(_owners(overlap, manifest), overlap.tokens.tolist(), strict=True):
        shared[name]["documents"] += 1
        shared[name]["tokens"] += tokens
    return shared


def _contamination(
    n: int, overlap: Overlap, ids: Tokens, manifest: Manifest, tokenizer: Tokenizer
) -> dict[str, Any]:
    owners = _owners(overlap, manifest)
    examples: dict[str, str] = {}  # text -> source
    for index in np.argsort(-overlap.tokens, kind="stable").tolist():
        run = ids[slice(*overlap.longest[index].tolist())]
        examples.setdefault(tokenizer.decode(run.tolist())[:_EXCERPT], owners[index])
        if len(examples) == _SHOWN:
            break
    return {
        "ngram": n,
        "documents": len(overlap.documents),
        "of": overlap.of,
        "tokens": int(overlap.tokens.sum()),
        "examples": [{"source": source, "text": text} for text, source in examples.items()],
    }
