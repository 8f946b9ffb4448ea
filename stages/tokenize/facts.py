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
from stages.tokenize.blocks import Cleaning, Table, document_ids
from stages.tokenize.contamination import Overlap
from stages.tokenize.splits import Share

_EXCERPT = 200  # characters
_SHOWN = 5
_JUDGED_TOKENS = 16
"""Shorter documents are not looked at for the oddest: a single rare character makes them odd."""


def facts(
    files: Sequence[RawFile],
    names: Sequence[str],
    table: Table,
    state: Path,
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
        table: all documents that were read.
        state: the folder of their blocks.
        cleaning: what was changed and removed, duplicates among it.
        manifest: of the token files.
        shares: what a mixture came to.
        overlap: the length of an n-gram, what validation and training share, and the validation
            ids; None where it was not looked for.
        tokenizer: of the token files.
    """

    def described(row: int) -> dict[str, Any]:
        ids = document_ids(state, table, row)[1 : 1 + _EXCERPT]
        return {
            "source": names[table.source[row]],
            "tokens": int(table.length[row] - 1),
            "text": tokenizer.decode(ids.tolist())[:_EXCERPT],
        }

    density = table.bytes / np.maximum(table.length - 1, 1)
    judged = table.kept & (table.length > _JUDGED_TOKENS)
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
                "removed": cleaning.of_source("removed", number),
                "changed": cleaning.of_source("changed", number),
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
                {"source": names[source], "step": name, "before": texts[0], "after": texts[1]}
                for what, source, name, texts in cleaning.examples
                if what == "changed"
            ],
            "removed": [
                {"source": names[source], "filter": name, "text": texts[0]}
                for what, source, name, texts in cleaning.examples
                if what == "removed"
            ],
        },
        "longest": [
            described(row) | {"bytes": int(table.bytes[row])}
            for row in _first(-table.length, table.kept, table.hash)
        ],
        "oddest": [
            described(row) | {"bytes_per_token": round(float(density[row]), 3)}
            for row in _first(density, judged, table.hash)
        ],
    }


def _first(keys: np.ndarray, allowed: np.ndarray, hashes: np.ndarray) -> list[int]:
    """Of the rows that are allowed those of the lowest keys, of equal texts the first only."""
    _, firsts = np.unique(hashes, return_index=True)
    rows = np.sort(firsts[allowed[firsts]])
    chosen: list[int] = rows[np.argsort(keys[rows], kind="stable")][:_SHOWN].tolist()
    return chosen


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
