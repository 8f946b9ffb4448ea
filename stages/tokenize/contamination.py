"""Validation text that stands in the training text too: n-grams of tokens that both have.

GPT-3's authors looked for shared runs of 13 words (Brown et al., 2020, appendix C); the same is
done here over tokens, which needs no other cutting into words for other languages. Every run of
training tokens is looked at: each gets a 64-bit hash, put together from those of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_TOKENS = 1 << 21
"""So many validation tokens are looked for at most, those of whole documents from the first on."""

_CHUNK = 1 << 20
_FILTER_BITS = 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits spread: the golden ratio's


@dataclass(frozen=True, slots=True)
class Overlap:
    """What validation and training text share.

    Attributes:
        of: the validation documents that were looked at.
        documents: those with an n-gram that training has too, as numbers from 0, in order.
        tokens: how many tokens of each lie in such n-grams.
        longest: where in the validation ids the longest such run of each begins and ends.
    """

    of: int
    documents: np.ndarray
    tokens: np.ndarray
    longest: np.ndarray


class Held:
    """The n-grams of held-out text, to be found elsewhere.

    Args:
        ids: the held-out ids, `end` between the documents; what goes beyond `MOST_TOKENS` is left
            out.
        end: the id of `<|endoftext|>`; no n-gram reaches over it.
        n: tokens of an n-gram.
    """

    def __init__(self, ids: np.ndarray, end: int, n: int) -> None:
        if len(ids) > MOST_TOKENS:
            ends = np.flatnonzero(ids[:MOST_TOKENS] == end)
            ids = ids[: ends[-1]] if len(ends) else ids[:MOST_TOKENS]
        self._n = n
        self._document = np.cumsum(ids == end, dtype=np.int32)
        self._places = _whole_ngrams(ids, end, n)
        self._own = ngram_hashes(ids, n)[self._places]
        self.hashes = np.unique(self._own)

    def save(self, path: Path) -> None:
        """Write what `found` needs."""
        np.save(path, self.hashes, allow_pickle=False)

    def overlap(self, found: np.ndarray) -> Overlap:
        """What the held-out text shares, from which of `hashes` were found, (m,) bool."""
        of = int(self._document[-1]) + 1 if len(self._document) else 0
        shared = np.zeros(len(self._document) + 1, np.int32)
        starts = self._places[found[np.searchsorted(self.hashes, self._own)]]
        np.add.at(shared, starts, 1)
        np.add.at(shared, starts + self._n, -1)
        covered = np.cumsum(shared[:-1]) > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], covered, [False]])))
        runs = edges.reshape(-1, 2)
        owner = self._document[runs[:, 0]] if len(runs) else np.empty(0, np.int64)
        documents, tokens = np.unique(self._document[covered], return_counts=True)
        longest = np.empty((len(documents), 2), np.int64)
        # the last written of each document stays: its longest
        order = np.argsort(runs[:, 1] - runs[:, 0], kind="stable")
        longest[np.searchsorted(documents, owner[order])] = runs[order]
        return Overlap(of, documents, tokens, longest)


def found(hashes: Path, shard: Path, dtype: str, n: int) -> np.ndarray:
    """Which of the sorted `hashes` a shard's n-grams have: their places in it, unique."""
    wanted = np.load(hashes, mmap_mode="r", allow_pickle=False)
    # a hash's upper bits tell most of what is not wanted apart, without a search
    maybe = np.zeros(1 << _FILTER_BITS, bool)
    shift = np.uint64(64 - _FILTER_BITS)
    maybe[wanted >> shift] = True
    hits: list[np.ndarray] = [np.empty(0, np.int64)]
    for ids in _overlapping_chunks(shard, np.dtype(dtype).newbyteorder("<"), n):
        candidates = ngram_hashes(ids, n)
        likely = np.flatnonzero(maybe[candidates >> shift])
        place = np.searchsorted(wanted, candidates[likely])
        place[place == len(wanted)] = 0
        hit = wanted[place] == candidates[likely] if len(wanted) else np.zeros(len(place), bool)
        hits.append(np.unique(place[hit]))
    return np.unique(np.concatenate(hits))


def ngram_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A hash of every run of `n` ids, (len(ids) - n + 1,) uint64.

    Runs of a power of two are put together from their halves, one of another length from two that
    overlap: a few passes over the ids, however long the run.
    """
    if len(ids) < n:
        return np.empty(0, np.uint64)
    hashes = (ids.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    length = 1
    while length < n:
        step = min(length, n - length)
        joined = hashes[:-step] * _MULTIPLIER
        joined ^= joined >> np.uint64(29)
        joined += hashes[step:]
        hashes = joined
        length += step
    hashes *= _MULTIPLIER
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIER
    return hashes


def _whole_ngrams(ids: np.ndarray, end: int, n: int) -> np.ndarray:
    """Where the n-grams begin that hold no end of text."""
    if len(ids) < n:
        return np.empty(0, np.int64)
    ends = np.cumsum(np.concatenate([[0], ids == end]))
    return np.flatnonzero(ends[n:] == ends[:-n])


def _overlapping_chunks(shard: Path, dtype: np.dtype[Any], n: int) -> Iterator[np.ndarray]:
    # read, not mapped: pages that were looked at would stay in memory
    n_ids = shard.stat().st_size // dtype.itemsize
    for start in range(0, max(n_ids - n + 1, 0), _CHUNK):
        yield np.fromfile(shard, dtype, count=_CHUNK + n - 1, offset=start * dtype.itemsize)
