"""Which held-out examples a model has seen in training, whole or in part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import xxhash

from gpt.base.events import Log, Message

N_WORDS = 13
"""Words in a row that are no coincidence (Brown et al., 2020, appendix C)."""

_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"\w+")


def contaminated(held_out: Sequence[Sequence[str]], training: Iterable[Sequence[str]]) -> int:
    """How many held-out examples share text with a training example.

    Two texts share text if they are equal but for case, white space and the values of numbers; or
    if `N_WORDS` words in a row are in both, whatever stands between the words.

    Args:
        held_out: the texts of each example, one or several.
        training: the same of those that were trained on; gone through once.

    Texts are compared by fingerprints of 64 bits, of which the held-out ones are held. With a
    million examples of a hundred words on either side, the chance of one false match is 1 in 2000.
    """
    wanted = {mark for texts in held_out for mark in _fingerprints(texts)}
    seen: set[int] = set()
    for texts in training:
        seen.update(wanted.intersection(_fingerprints(texts)))
    return sum(not seen.isdisjoint(_fingerprints(texts)) for texts in held_out)


def count_contaminated(
    parts: Mapping[str, Sequence[Sequence[str]]], stage: str, log: Log
) -> dict[str, float]:
    """How many examples of the parts `validation` and `test` share text with `train`.

    Args:
        parts: the texts of every example of each part.
        stage: whose parts they are.
        log: told of those that do.

    Returns:
        `contaminated_validation` and `contaminated_test`. Nothing is removed.
    """
    counts = {}
    for name in ("validation", "test"):
        n = contaminated(parts[name], parts["train"])
        counts[f"contaminated_{name}"] = float(n)
        if n:
            text = f"{n} of {len(parts[name])} {name} examples share text with the training part"
            log(Message(f"{stage}: {text}"))
    return counts


def _fingerprints(texts: Sequence[str]) -> set[int]:
    """Of each text as a whole, and of every `N_WORDS` words in a row in it."""
    marks = set()
    for text in texts:
        plain = _DIGITS.sub("0", " ".join(text.casefold().split()))
        marks.add(_hash(plain))
        words = _WORD.findall(plain)
        for start in range(len(words) - N_WORDS + 1):
            marks.add(_hash(" ".join(words[start : start + N_WORDS])))
    return marks


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
