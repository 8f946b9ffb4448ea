"""The token files themselves: copied together from the blocks, a file at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.tokens.token_files import Counts, Shard, SplitName
from stages.tokenize.blocks import Table, block_ids, tokenizer
from stages.tokenize.splits import Part


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """What goes into one shard file.

    Attributes:
        file: its name.
        source: its source's name.
        documents: how many, or parts of one, are in it.
        runs: for each block in turn, where the runs of ids that are taken begin and end.
        lead: an `<|endoftext|>` stands before them.
    """

    file: str
    source: str
    documents: int
    runs: Sequence[tuple[int, np.ndarray, np.ndarray]]
    lead: bool


def plan(
    parts: Sequence[Part], table: Table, names: Sequence[str], shard_tokens: int
) -> Iterator[tuple[SplitName, ShardPlan]]:
    """Cut the parts into shards of about `shard_tokens`, whole documents each.

    Args:
        parts: what each split is made of.
        table: the documents.
        names: of the sources.
        shard_tokens: a document that begins beyond so many begins the next shard.

    Yields:
        The split and the plan of each shard.
    """
    numbers: Counter[str] = Counter()
    for part in parts:
        lengths = part.stop - part.start
        shard = (np.cumsum(lengths) - lengths) // shard_tokens
        for index, chosen in enumerate(np.split(np.arange(len(shard)), _steps(shard))):
            rows = part.rows[chosen]
            start = table.offset[rows] + part.start[chosen]
            stop = table.offset[rows] + part.stop[chosen]
            cuts = _steps(table.block[rows])
            runs = [
                (int(table.block[of[0]]), *_runs(begin, end))
                for of, begin, end in zip(
                    np.split(rows, cuts), np.split(start, cuts), np.split(stop, cuts), strict=True
                )
            ]
            yield (
                part.split,
                ShardPlan(
                    f"{part.split}-{numbers[part.split]:05}.bin",
                    names[part.source],
                    len(rows),
                    runs,
                    part.lead and index == 0,
                ),
            )
            numbers[part.split] += 1


def _steps(values: np.ndarray) -> np.ndarray:
    """Where the values change."""
    return np.flatnonzero(values[1:] != values[:-1]) + 1


def _runs(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same pieces, those that touch made one."""
    apart = np.flatnonzero(start[1:] != stop[:-1])
    return start[np.concatenate([[0], apart + 1])], stop[np.concatenate([apart, [len(stop) - 1]])]


# --- in the workers -------------------------------------------------------------------------------


def write(blocks: Path, dtype: str, folder: Path, plan: ShardPlan) -> Shard:
    """Write one shard into `folder`; return what the manifest says of it."""
    byte_lengths = tokenizer().byte_lengths
    little_endian = np.dtype(dtype).newbyteorder("<")
    digest = hashlib.sha256()
    n_tokens = n_bytes = 0
    with (folder / plan.file).open("wb") as file:
        pieces = [np.array([tokenizer().eot], little_endian)] if plan.lead else []
        for block, starts, stops in plan.runs:
            ids = block_ids(blocks, block)
            pieces += [ids[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
            joined = np.concatenate(pieces)
            pieces = []
            n_tokens += len(joined)
            n_bytes += int(byte_lengths[joined].sum(dtype=np.int64))
            data = joined.tobytes()
            digest.update(data)
            file.write(data)
    counts = Counts(documents=plan.documents, bytes=n_bytes, tokens=n_tokens)
    return Shard(file=plan.file, source=plan.source, sha256=digest.hexdigest(), counts=counts)
