"""Which documents stand where: the splits, and how much of each source is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, cast

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.base.errors import InputError
from gpt.tokens.token_files import SplitName
from stages.tokenize.blocks import Table


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Mixture:
    """How much of the training tokens comes from which source.

    Attributes:
        weights: a share for each source of the corpus, by name; they are brought to a sum of 1.
        tokens: of training, in all; None is as many as the sources have.
        max_epochs: no source is gone through more often. Up to four epochs are almost as good as
            new text (Muennighoff et al., 2023, "Scaling Data-Constrained Language Models").

    As in table 2.2 of GPT-3's paper (Brown et al., 2020) weights need not follow size: a small
    source is seen several times, a large one in part. The weights are kept whatever the caps: where
    a source has too little for its share, there are fewer tokens in all.
    """

    weights: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    tokens: Annotated[int, Field(gt=0, le=1 << 50)] | None = None
    max_epochs: Annotated[float, Field(gt=0)] = 4.0


@dataclass(frozen=True, slots=True)
class Part:
    """Documents of one source that follow each other in a split.

    Attributes:
        split: which one.
        source: its place in the corpus.
        rows: of the table, (n,).
        start: the first token of each that is taken, (n,); 0 is the `<|endoftext|>` before it.
        stop: one past the last token of each that is taken, (n,).
        lead: an `<|endoftext|>` stands before the first, which begins within its document.
    """

    split: SplitName
    source: int
    rows: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    lead: bool = False

    @property
    def n_tokens(self) -> int:
        """Its length in the split."""
        return int((self.stop - self.start).sum()) + self.lead


@dataclass(frozen=True, slots=True)
class Share:
    """What a mixture came to for one source."""

    weight: float
    share: float
    tokens: int
    epochs: float
    max_epochs: float


def by_hash(table: Table, n_sources: int, validation: float) -> list[Part]:
    """Whole documents, drawn by the hash of their text: no other document moves one."""
    held_out = table.hash < np.uint64(int(validation * 2**64))
    parts: list[Part] = []
    for mask, split in ((~held_out, "train"), (held_out, "validation")):
        for source in range(n_sources):
            rows = np.flatnonzero(table.kept & (table.source == source) & mask)
            parts.append(_whole(cast(SplitName, split), source, rows, table))
    return [part for part in parts if len(part.rows)]


def by_tail(
    table: Table,
    n_sources: int,
    validation: float,
    word_start: Callable[[int, int], int],
) -> list[Part]:
    """The last tokens of each source.

    Args:
        table: the documents.
        n_sources: of the corpus.
        validation: the share of each source's tokens.
        word_start: of a row and a place in it, the place from there on where a word begins.
    """
    parts: list[Part] = []
    for source in range(n_sources):
        rows = np.flatnonzero(table.kept & (table.source == source))
        if not len(rows):
            continue
        lengths = table.length[rows]
        ends = np.cumsum(lengths - 1)  # without the <|endoftext|> before each
        cut = int((1 - validation) * ends[-1])
        at = int(np.searchsorted(ends, cut, side="right"))  # the document that the tail begins in
        place = 0
        if at < len(rows) and (within := cut - int(ends[at] - lengths[at] + 1)):
            place = word_start(int(rows[at]), within + 1)
        halved = at < len(rows) and bool(0 < place < lengths[at])
        head = _whole("train", source, rows[: at + halved], table)
        tail = replace(_whole("validation", source, rows[at:], table), lead=halved)
        if halved:
            head.stop[-1] = tail.start[0] = place
        parts += [head, tail]
    return sorted((part for part in parts if len(part.rows)), key=lambda part: part.split)


def _whole(split: SplitName, source: int, rows: np.ndarray, table: Table) -> Part:
    return Part(split, source, rows, np.zeros(len(rows), np.int64), table.length[rows].copy())


def without_first_end(parts: Sequence[Part]) -> list[Part]:
    """The same, without an `<|endoftext|>` before the first document of each split."""
    result = list(parts)
    for split in ("train", "validation"):
        first = next(i for i, part in enumerate(parts) if part.split == split)
        start = parts[first].start.copy()
        start[0] = max(start[0], 1)
        result[first] = replace(parts[first], start=start, lead=False)
    return result


def mix(
    parts: Sequence[Part], names: Sequence[str], mixture: Mixture, table: Table, seed: int
) -> tuple[list[Part], dict[str, Share]]:
    """Draw the training part by weights, to the token; what is held out stays as it is.

    Whole epochs of a source stand first, each in the order of its documents; the rest is drawn from
    it by a hash of the texts, so that a document is not seen more often than another by more than
    once. The last document is cut where its source's share ends.

    Returns:
        The parts as `without_first_end` gives them, and what each source came to.

    Raises:
        InputError: a source has nothing to train on.
    """
    train = {names[part.source]: part for part in parts if part.split == "train"}
    missing = [name for name in names if name not in train]
    if missing:
        raise InputError(
            f"tokenize.mixture: the source {missing[0]!r} has no text to train on; "
            "leave it out of download.corpus, or clean less"
        )
    total_weight = sum(mixture.weights.values())
    weights = {name: mixture.weights[name] / total_weight for name in names}
    available = {name: train[name].n_tokens for name in names}
    caps = {name: int(mixture.max_epochs * available[name]) for name in names}
    wanted = mixture.tokens or sum(available.values())
    total = min(wanted, *(int(caps[name] / weights[name]) for name in names))
    drawn: list[Part] = []
    for name in names:
        part = train[name]
        target = min(round(total * weights[name]), caps[name])
        epochs, rest = divmod(target, available[name])
        drawn += [part] * epochs
        if rest:
            drawn.append(_some(part, rest, table, seed + epochs))
    drawn = without_first_end([*drawn, *(part for part in parts if part.split != "train")])
    tokens = [0] * len(names)
    for part in drawn:
        tokens[part.source] += part.n_tokens if part.split == "train" else 0
    return drawn, {
        name: Share(weights[name], n / sum(tokens), n, n / available[name], mixture.max_epochs)
        for name, n in zip(names, tokens, strict=True)
    }


def weights_problem(weights: Mapping[str, float], names: Sequence[str]) -> str | None:
    """How the names of the weights differ from those of the sources, in words; None if not."""
    if missing := [name for name in names if name not in weights]:
        return f"the source {missing[0]!r} has none; each source of download.corpus needs one"
    if unknown := [name for name in weights if name not in names]:
        return f"{unknown[0]!r} is no source of download.corpus ({', '.join(names)})"
    return None


def _some(part: Part, n_tokens: int, table: Table, seed: int) -> Part:
    """`n_tokens` of a part: documents by the order of a hash, in their own order, the last cut."""
    order = np.argsort(_scrambled(table.hash[part.rows], seed), kind="stable")
    ends = np.cumsum((part.stop - part.start)[order])
    last = int(np.searchsorted(ends, n_tokens))
    stop = part.stop.copy()
    stop[order[last]] -= ends[last] - n_tokens
    chosen = np.sort(order[: last + 1])
    return replace(part, rows=part.rows[chosen], start=part.start[chosen], stop=stop[chosen])


def _scrambled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Another order for each seed: splitmix64's last steps (Steele et al., 2014)."""
    z = hashes + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
