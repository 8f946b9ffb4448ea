"""Documents that repeat others: exactly, by a hash; nearly, by MinHash.

MinHash (Broder, "On the resemblance and containment of documents", 1997) reduces each document to
a signature, a row of numbers. The share of equal numbers in two signatures estimates the Jaccard
similarity of the documents' sets of shingles (runs of five words). Locality-sensitive hashing
then finds the pairs worth comparing.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from datasketch import MinHash  # type: ignore[import-untyped]

PERMUTATIONS = 128
"""Length of a signature: at a similarity of 0.8, the standard deviation of estimates is 0.035."""

_SHINGLE = 5  # words
# Chinese and Japanese put no spaces between words: each character counts as a word.
_CJK = "぀-ヿ㐀-䶿一-鿿豈-﫿𠀀-𲎯"
_WORDS = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")
_ROWS_AT_ONCE = 1024  # shingles whose permutations fit the processor's cache
_RECALL = 0.97  # of pairs just at the threshold
_LEADERS = 32


# --- exact ----------------------------------------------------------------------------------------


def content_hash(text: str) -> int:
    """A 64-bit hash (XXH3). Among a million different texts, the probability of any collision is
    3e-8."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


def duplicates(hashes: np.ndarray) -> np.ndarray:
    """Which documents repeat an earlier one.

    Args:
        hashes: the documents' content hashes in their order, (n,) uint64.

    Returns:
        The index of the first document with the same hash; -1 for that one itself. (n,) int64.
    """
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[group].astype(np.int64)  # (n,)
    return np.where(earlier == np.arange(len(hashes)), -1, earlier)


# --- near -----------------------------------------------------------------------------------------


def signature(text: str) -> np.ndarray:
    """The MinHash of a text's runs of five words, (PERMUTATIONS,) uint32.

    Upper case, punctuation and white space are ignored; a text of fewer words is one run.
    The same text has the same signature in every process and on every machine.
    """
    minhash = _empty().copy()
    shingles = _shingle_hashes(text).tolist()
    for start in range(0, len(shingles), _ROWS_AT_ONCE):
        minhash.update_batch(shingles[start : start + _ROWS_AT_ONCE])
    return minhash.hashvalues  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _empty() -> MinHash:
    from datasketch import MinHash

    # the shingles are hashed already: hashing each word once and combining the hashes is faster
    # than hashing every run
    return MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme="affine32")


def _shingle_hashes(text: str) -> np.ndarray:
    """A hash of every run of five words, (max(1, words - 4),) uint32."""
    lower = text.lower()
    words = _WORDS.findall(lower)
    if not words:
        return np.array([content_hash(lower) >> 32], np.uint32)
    hash_of = {word: content_hash(word) for word in set(words)}
    hashes = np.fromiter(map(hash_of.__getitem__, words), np.uint64, len(words))
    n = min(_SHINGLE, len(words))
    runs = np.zeros(len(words) - n + 1, np.uint64)
    for start in range(n):
        runs = _mix(runs ^ hashes[start : start + len(runs)])
    return (runs >> np.uint64(32)).astype(np.uint32)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64, so that combined hashes depend on the order of the words."""
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)  # 2**64 / phi
    return values ^ (values >> np.uint64(29))  # type: ignore[no-any-return]


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Which documents are nearly the same as an earlier one.

    Documents are near-duplicates if at least the share `threshold` of their signatures agrees. A
    document is removed only if it is a near-duplicate of an earlier one that is kept; so of a
    chain, in which each is near the next, every second one may be kept. A document is compared
    with those that share a whole band of its signature, at most the first 32 per band, so that
    the time grows linearly with the number of documents.

    Args:
        signatures: of the documents in their order, (n, permutations).
        threshold: the Jaccard similarity, above 0 and below 1; at 0.8, practically all pairs of 0.9
            are found and none of 0.3.

    Returns:
        The index of the earliest kept document that each is near to; -1 if it is kept. (n,) int64.
    """
    n, permutations = signatures.shape
    bands, shared = _bands(signatures, _rows_per_band(threshold, permutations))
    least = threshold * permutations - 1e-9  # 0.7 * 10 is more than 7
    near = np.full(n, -1, np.int64)
    leaders: dict[int, list[int]] = {}  # of each band: the documents that stay, in order
    # datasketch's MinHashLSH holds every document in a Python set for every band, and returns all
    # copies of a text for each copy; this holds only kept documents and shared bands
    for document in np.flatnonzero(shared.any(axis=1)).tolist():
        keys = bands[document, shared[document]].tolist()
        candidates = sorted({leader for key in keys for leader in leaders.get(key, ())})
        if candidates:
            agreeing = (signatures[candidates] == signatures[document]).sum(axis=1)
            found = np.flatnonzero(agreeing >= least)
            if len(found):
                near[document] = candidates[found[0]]
                continue
        for key in keys:
            known = leaders.setdefault(key, [])
            if len(known) < _LEADERS:
                known.append(document)
    return near


def _rows_per_band(threshold: float, permutations: int) -> int:
    """The longest bands, and so the fewest comparisons, that still find a pair at the threshold."""
    for rows in range(1, permutations):
        missed = (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1))
        if 1 - missed < _RECALL:
            return rows
    return permutations


def _bands(signatures: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every band of every signature, and whether another signature has it too.

    Both (n, bands); uint64 and bool.
    """
    n, permutations = signatures.shape
    count = permutations // rows
    bands = np.empty((n, count), np.uint64)
    shared = np.zeros((n, count), np.bool_)
    for band in range(count):
        keys = np.full(n, band + 1, np.uint64)  # equal numbers in different bands mean nothing
        for column in range(band * rows, (band + 1) * rows):
            keys = _mix(keys ^ signatures[:, column].astype(np.uint64))
        bands[:, band] = keys
        in_order = np.argsort(keys)
        same = keys[in_order[1:]] == keys[in_order[:-1]]  # (n - 1,)
        shared[in_order[1:], band] |= same
        shared[in_order[:-1], band] |= same
    return bands, shared
