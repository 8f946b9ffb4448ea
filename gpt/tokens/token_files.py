"""The folder of tokens: memory-mapped shards of ids, and a manifest of their content.

A split is one long row of ids, with `<|endoftext|>` between documents, cut into shard files. A
shard holds documents of one source. A file contains only the ids, little-endian, as uint16 if the
vocabulary allows it (like nanoGPT's `.bin` files).
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, first_problem
from gpt.base.files import read_json

SplitName = Literal["train", "validation"]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_CONFIG = ConfigDict(extra="forbid")
_CHUNK = 1 << 20
"""Bytes that are verified at a time; whole ids."""


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Counts:
    """How much text something holds."""

    documents: _Count = 0
    bytes: _Count = 0
    tokens: _Count = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            documents=self.documents + other.documents,
            bytes=self.bytes + other.bytes,
            tokens=self.tokens + other.tokens,
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Shard:
    """One file of ids.

    Attributes:
        file: its name in the folder.
        source: whose documents it holds.
        sha256: of its bytes.
        counts: of its documents (or parts of one), their bytes of text and its tokens.
    """

    file: Annotated[str, Field(pattern=r"^[^/\\\x00]{1,255}$")]
    source: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    counts: Counts


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class SplitManifest:
    """The shards of a split, in the order in which they make up its row of ids."""

    shards: tuple[Shard, ...] = ()

    @property
    def sources(self) -> dict[str, Counts]:
        """What is in it by source, in the order of the shards."""
        counts: dict[str, Counts] = {}
        for shard in self.shards:
            counts[shard.source] = counts.get(shard.source, Counts()) + shard.counts
        return counts

    @property
    def total(self) -> Counts:
        """What is in it in all."""
        return sum((shard.counts for shard in self.shards), Counts())


@dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Manifest:
    """`manifest.json` of a folder of tokens; the tokenizer lies beside it."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(gt=0, le=1 << 32)]
    tokenizer: str
    """The tokenizer's hash."""
    splits: dict[SplitName, SplitManifest]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest of the two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a folder of tokens.

    Raises:
        InputError: it is missing or not a manifest.
    """
    path = directory / "manifest.json"
    remedy = "run the stage tokenize again"
    raw = read_json(path, missing="no such file; run the stage tokenize first", remedy=remedy)
    try:
        return TypeAdapter(Manifest).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; {remedy}") from None


def map_ids(path: Path, dtype: str) -> np.ndarray:
    """The ids of a file, (n,), read-only and memory-mapped: only what is looked at is read.

    Raises:
        InputError: there is no such file, or it ends within an id.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage tokenize first")
    little_endian = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size % little_endian.itemsize:
        raise InputError(f"{path}: truncated; run the stage tokenize again")
    if size == 0:  # cannot be mapped
        return np.empty(0, little_endian)
    # a plain array: slicing a memmap costs several times as much
    return np.asarray(np.memmap(path, dtype=little_endian, mode="r"))


class Tokens:
    """A long row of ids, stored in consecutive arrays; a slice is an int64 array."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in order, one behind the other")
        pieces = [np.empty(0, np.int64)]
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[index] - len(self._parts[index])
            pieces.append(self._parts[index][start - first : stop - first].astype(np.int64))
            start += len(pieces[-1])
            index += 1
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)


def open_tokens(directory: Path, split: SplitName, source: str | None = None) -> Tokens:
    """The ids of one split of a folder that the stage tokenize wrote.

    Args:
        directory: the folder.
        split: which split.
        source: only what is from this source.

    Raises:
        InputError: the split or a shard is missing, or a shard is not what the manifest says: its
            size, its bytes, an id beyond the vocabulary. Every byte is read for it: a second a GB.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise InputError(f"{directory}: no split {split!r}; run the stage tokenize again")
    parts = []
    for shard in manifest.splits[split].shards:
        if source is not None and shard.source != source:
            continue
        ids = map_ids(directory / shard.file, manifest.dtype)
        if len(ids) != shard.counts.tokens:
            raise InputError(
                f"{directory / shard.file}: {len(ids)} tokens where the manifest has "
                f"{shard.counts.tokens}; run the stage tokenize again"
            )
        _verify(directory / shard.file, shard, ids, manifest.vocab_size)
        parts.append(ids)
    return Tokens(parts)


def _verify(path: Path, shard: Shard, ids: np.ndarray, vocab_size: int) -> None:
    """Refuse a shard whose bytes are not those that the stage tokenize wrote."""
    found, largest = hashlib.sha256(), 0
    with path.open("rb") as file:  # what is read by way of the map would count as our memory
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, ids.dtype).max()))
    if found.hexdigest() != shard.sha256:
        raise InputError(
            f"{path}: damaged or of another run (its sha256 is not the manifest's); run the stage "
            "tokenize again"
        )
    if largest >= vocab_size:
        raise InputError(
            f"{path}: holds the token {largest}, and the vocabulary ends at {vocab_size - 1}; run "
            "the stage tokenize again"
        )
