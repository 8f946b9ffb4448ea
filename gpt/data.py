"""Token files and the datasets: windows over a text, labelled texts, instructions.

A dataset is a sequence of items that knows how to `collate` some of them into a `Batch`. Which
items come at which step is a pure function (`batch_indices`), so a loop can start at any step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from gpt.errors import InputError

IGNORED = -100
"""The target that no loss counts (PyTorch's `ignore_index`)."""

SplitName = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model sees in one forward pass.

    Attributes:
        inputs: token ids (B, T), int64; or the vectors of a frozen trunk, one row behind the
            other, (N, C).
        targets: the next token at each place (B, T), `IGNORED` where none is learnt; or the
            class of each text (B,). int64.
        lengths: the number of real tokens of each row (B,), int64; None where every row is full.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None

    @property
    def n_targets(self) -> int:
        """How many targets a loss counts."""
        return int((self.targets != IGNORED).sum())

    @property
    def n_tokens(self) -> int:
        """How many real tokens are in it."""
        return self.inputs.numel() if self.lengths is None else int(self.lengths.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), lengths)


class Dataset(Protocol):
    """Items by index, and how to stack some of them."""

    @property
    def lengths(self) -> np.ndarray | None:
        """The tokens of each item; None where all have as many."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, items: Sequence[Any]) -> Batch:
        """Stack items into a batch."""
        ...


# --- the order of items ---------------------------------------------------------------------------


_POOL = 32
"""Batches of like length are made within so many batches' worth of items."""


@functools.lru_cache(maxsize=2)  # a batch needs the order of its whole epoch
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … n - 1 that depends on the arguments only; read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def batch_indices(
    n: int, batch_size: int, seed: int, index: int, lengths: np.ndarray | None = None
) -> list[int]:
    """The items of training batch `index` (from 0), a pure function of its arguments.

    Args:
        n: the number of items.
        batch_size: items a batch, at most `n`.
        seed: picks the permutation of every epoch.
        index: the batch, counted over all epochs. An epoch has n // batch_size; the items left
            over at its end are dropped.
        lengths: the length of each item, (n,). With it the items of a batch are of like length,
            so that little is padded: the epoch's permutation is cut into pools of `_POOL`
            batches, each pool is sorted by length, and the batches are shuffled again.
    """
    epoch, within = divmod(index, n // batch_size)
    if lengths is None:
        order = epoch_order(n, seed, epoch)
    else:
        order = _order_by_length(tuple(lengths.tolist()), batch_size, seed, epoch)
    chosen: list[int] = order[within * batch_size :][:batch_size].tolist()
    return chosen


@functools.lru_cache(maxsize=2)
def _order_by_length(
    lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    n = len(lengths)
    order = epoch_order(n, seed, epoch)[: n - n % batch_size]
    pools = np.split(order, range(_POOL * batch_size, len(order), _POOL * batch_size))
    of = np.asarray(lengths)
    # longest first: what was drawn first stays first among equals
    by_length = np.concatenate([pool[np.argsort(-of[pool], kind="stable")] for pool in pools])
    batches = by_length.reshape(-1, batch_size)
    shuffled = batches[np.random.default_rng([seed, epoch, 1]).permutation(len(batches))]
    return shuffled.ravel()


def take(dataset: Dataset, indices: Sequence[int]) -> Batch:
    """The batch of these items."""
    return dataset.collate([dataset[index] for index in indices])


def batches(
    dataset: Dataset, batch_size: int, *, drop_last: bool = False, by_length: bool = False
) -> Iterator[Batch]:
    """All items, as evaluation reads them; the last batch may be smaller.

    In their own order; `by_length` from the longest to the shortest, which pads the least.
    """
    end = len(dataset) - (len(dataset) % batch_size if drop_last else 0)
    order = range(len(dataset))
    if by_length and dataset.lengths is not None:
        order = np.argsort(-dataset.lengths, kind="stable").tolist()
    for start in range(0, end, batch_size):
        yield take(dataset, order[start : min(start + batch_size, end)])


def spread(dataset: Dataset, n: int) -> Dataset:
    """At most `n` of a dataset's items, evenly spread over it, the first among them."""
    indices = np.linspace(0, len(dataset), min(n, len(dataset)), endpoint=False).astype(int)
    return _Part(dataset, indices)


class _Part:
    """Some items of a dataset."""

    def __init__(self, dataset: Dataset, indices: np.ndarray) -> None:
        self._dataset = dataset
        self._indices = indices
        self.collate = dataset.collate
        every = dataset.lengths
        self.lengths = None if every is None else every[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[int(self._indices[index])]


# --- token files ----------------------------------------------------------------------------------


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Counts:
    """How much text a split, or one source's part of it, holds."""

    documents: int
    bytes: int
    tokens: int


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class SplitManifest:
    """One token file: its name, its sha256, and what is in it, in all and by source."""

    file: str
    sha256: str
    total: Counts
    sources: dict[str, Counts]


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """`manifest.json` of a folder of token files; the tokenizer lies beside it."""

    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer: str
    """The tokenizer's hash."""
    splits: dict[SplitName, SplitManifest]


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest of the two types that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a folder of token files.

    Raises:
        InputError: it is missing or not a manifest.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the stage tokenize first")
    try:
        return TypeAdapter(Manifest).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {where or 'file'}: {first['msg']}; run the stage tokenize again"
        ) from None


class TokenFile:
    """The ids of a split on disk, memory-mapped: only what is looked at is read.

    Slices are int64 tensors of their own.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file; run the stage tokenize first")
        little_endian = np.dtype(dtype).newbyteorder("<")
        if path.stat().st_size % little_endian.itemsize:
            raise InputError(f"{path}: truncated; run the stage tokenize again")
        # An empty file cannot be mapped.
        self._ids = (
            np.memmap(path, dtype=little_endian, mode="r")
            if path.stat().st_size
            else np.empty(0, little_endian)
        )

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, where: slice) -> Tensor:
        return torch.from_numpy(self._ids[where].astype(np.int64))


def open_tokens(directory: Path, split: SplitName) -> TokenFile:
    """The token file of one split of a folder that the stage tokenize wrote.

    Raises:
        InputError: the split is missing, or its size is not what the manifest says.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise InputError(f"{directory}: no split {split!r}; run the stage tokenize again")
    entry = manifest.splits[split]
    tokens = TokenFile(directory / entry.file, manifest.dtype)
    if len(tokens) != entry.total.tokens:
        raise InputError(
            f"{directory / entry.file}: {len(tokens)} tokens where the manifest has "
            f"{entry.total.tokens}; run the stage tokenize again"
        )
    return tokens


# --- datasets -------------------------------------------------------------------------------------


class WindowDataset:
    """A long text cut into windows, each with the same window one token later as its target.

    Args:
        tokens: anything whose slices are int64 tensors: a `TokenFile`, or a tensor.
        context_length: the length T of a window.
        stride: from the start of one window to the next; T means no overlap.

    A text that is not longer than one context has no windows: `len` is 0.
    """

    lengths = None

    def __init__(self, tokens: TokenFile | Tensor, context_length: int, stride: int) -> None:
        self._tokens = tokens
        self._context_length = context_length
        self._starts = range(0, len(tokens) - context_length, stride)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of window `index`, (T,) each."""
        start = self._starts[index]
        window = self._tokens[start : start + self._context_length + 1]
        return window[:-1], window[1:]

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Inputs (B, T) and targets (B, T); all windows have one length, nothing is padded."""
        inputs, targets = zip(*items, strict=True)
        return Batch(torch.stack(inputs), torch.stack(targets))


class ClassificationDataset:
    """Texts with their classes.

    Args:
        texts: token ids of each text; an empty text becomes a single `padding`.
        labels: the class of each text, 0 … n - 1.
        padding: the id (`<|endoftext|>`) that fills rows up to the longest of their batch.
        max_length: texts are cut to this many tokens.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        labels: Sequence[int],
        *,
        padding: int,
        max_length: int | None = None,
    ) -> None:
        self._texts = [torch.tensor(list(ids[:max_length]) or [padding]) for ids in texts]
        self._labels = [int(label) for label in labels]
        self._padding = padding
        self.lengths = np.array([len(ids) for ids in self._texts])
        if len(self._texts) != len(self._labels):
            raise ValueError(f"{len(self._texts)} texts but {len(self._labels)} labels")

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The ids (T_i,) and the class of text `index`."""
        return self._texts[index], self._labels[index]

    def collate(self, items: Sequence[tuple[Tensor, int]]) -> Batch:
        """Inputs (B, T) padded on the right, classes (B,) and real lengths (B,)."""
        texts, labels = zip(*items, strict=True)
        return Batch(
            _pad(texts, self._padding),
            torch.tensor(labels),
            torch.tensor([len(ids) for ids in texts]),
        )


class FeatureDataset:
    """What a frozen trunk makes of the texts, with their classes.

    Args:
        features: the vectors of each text's real positions, (T_i, C) each.
        labels: the class of each text.
    """

    def __init__(self, features: Sequence[Tensor], labels: Sequence[int]) -> None:
        self._features = features
        self._labels = labels
        self.lengths = np.array([len(vectors) for vectors in features])

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The vectors (T_i, C) and the class of text `index`."""
        return self._features[index], self._labels[index]

    def collate(self, items: Sequence[tuple[Tensor, int]]) -> Batch:
        """The vectors one text behind the other (N, C), classes (B,) and lengths (B,)."""
        features, labels = zip(*items, strict=True)
        return Batch(
            torch.cat(features),
            torch.tensor(labels),
            torch.tensor([len(vectors) for vectors in features]),
        )


class InstructionDataset:
    """Prompts with the responses to be learnt; each response ends in `<|endoftext|>`.

    Args:
        prompts: token ids of each rendered prompt.
        responses: token ids of each response, without an end.
        end: the id of `<|endoftext|>`; learnt as the end of a response, and the padding.
        mask_prompt: learn the response only; else every token counts, as in pretraining.
        max_length: inputs are cut to this many tokens. A prompt that fills them alone leaves
            nothing to learn.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        end: int,
        mask_prompt: bool = True,
        max_length: int | None = None,
    ) -> None:
        self._end = end
        self._items: list[tuple[Tensor, Tensor]] = []
        for prompt, response in zip(prompts, responses, strict=True):
            ids = torch.tensor([*prompt, *response, end])
            inputs, targets = ids[:-1], ids[1:].clone()
            if mask_prompt:
                # The prompt's last token predicts the response's first: that one is learnt.
                targets[: max(len(prompt) - 1, 0)] = IGNORED
            self._items.append((inputs[:max_length], targets[:max_length]))
        self.lengths = np.array([len(inputs) for inputs, _ in self._items])

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of record `index`, (T_i,) each."""
        return self._items[index]

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Inputs (B, T) and targets (B, T), padded on the right; padding is never learnt."""
        inputs, targets = zip(*items, strict=True)
        lengths = torch.tensor([len(ids) for ids in inputs])
        return Batch(_pad(inputs, self._end), _pad(targets, IGNORED), lengths)


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows (T_i,) into (B, max T_i), filled on the right with `value`."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
