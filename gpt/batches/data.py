"""The datasets: windows over a text, labelled texts, instructions.

A dataset is a sequence of items that knows how to `collate` some of them into a `Batch`. Which
items come at which step is a pure function (`batch_indices`), so a loop can start at any step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from gpt.tokens.token_files import Tokens

IGNORED = -100
"""The target that no loss counts (PyTorch's `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model sees in one forward pass.

    Attributes:
        inputs: token ids (B, T), int64; or the vectors of a frozen trunk, the rows concatenated,
            (N, C).
        targets: the next token at each position (B, T), `IGNORED` where none is learnt; or the
            class of each text (B,). int64.
        lengths: the number of real tokens of each row (B,), int64; None if every row is full.
        documents: the document number of each position (B, T), int64, equal numbers adjacent.
            Documents do not attend to each other; a negative number marks the opening that all
            documents share (`gpt.model.model.Decoder.hidden`). None if each row is one document.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None
    documents: Tensor | None = None

    @property
    def n_targets(self) -> int:
        """The number of targets that count in a loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def n_tokens(self) -> int:
        """The number of real tokens in the batch."""
        return self.inputs.numel() if self.lengths is None else int(self.lengths.sum())

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: t.to(device) for n, t in tensors.items() if t is not None})


class Dataset(Protocol):
    """Items by index, and how to stack some of them."""

    @property
    def lengths(self) -> np.ndarray | None:
        """The number of tokens of each item; None if all have the same number."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def collate(self, items: Sequence[Any]) -> Batch:
        """Stack items into a batch."""
        ...


# --- the order of items ---------------------------------------------------------------------------


_POOL = 32
"""Items are sorted by length within pools of this many batches."""
_LISTED = 1 << 24
"""Above this number of items the order is not held in memory (134 MB) but computed on demand."""


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
        batch_size: items per batch, at most `n`.
        seed: picks the permutation of every epoch.
        index: the batch, counted over all epochs. An epoch has n // batch_size; the items left
            over at its end are dropped.
        lengths: the length of each item, (n,). With it the items of a batch are of like length,
            so that little is padded: the epoch's permutation is cut into pools of `_POOL`
            batches, each pool is sorted by length, and the batches are shuffled again.
    """
    epoch, within = divmod(index, n // batch_size)
    start = within * batch_size
    if lengths is None and n > _LISTED:
        return _permuted(range(start, start + batch_size), n, seed, epoch)
    order = (
        epoch_order(n, seed, epoch)
        if lengths is None
        else _order_by_length(tuple(lengths.tolist()), batch_size, seed, epoch)
    )
    return order[start : start + batch_size].tolist()  # type: ignore[no-any-return]


def _permuted(places: range, n: int, seed: int, epoch: int) -> list[int]:
    """The values of a permutation of 0 … n - 1 at `places`, without computing the rest of it.

    The permutation steps through the items with a fixed stride, modulo n. Stride and n are
    coprime, so each item occurs once.
    """
    random = np.random.default_rng([seed, epoch])
    first, step = random.integers(n, size=2).tolist()
    while math.gcd(step, n) > 1:
        step = (step + 1) % n
    return [(first + step * place) % n for place in places]


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

    In the dataset's order; with `by_length` the longest first, which pads the least.
    """
    end = len(dataset) - (len(dataset) % batch_size if drop_last else 0)
    order = range(len(dataset))
    if by_length and dataset.lengths is not None:
        order = np.argsort(-dataset.lengths, kind="stable").tolist()
    for start in range(0, end, batch_size):
        yield take(dataset, order[start : min(start + batch_size, end)])


def spread(dataset: Dataset, n: int) -> Dataset:
    """At most `n` items, evenly spaced over the dataset and including the first."""
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


# --- datasets -------------------------------------------------------------------------------------


class WindowDataset:
    """A long text cut into windows, each with the same window one token later as its target.

    Args:
        tokens: the ids of a split, or an int64 tensor.
        context_length: the length T of a window.
        stride: the distance between the starts of two windows; T means no overlap.
        end: the id of `<|endoftext|>`, which belongs to the document after it. If it is given,
            batches have `documents`, so that documents do not attend to each other.

    A text that is not longer than one context has no windows: `len` is 0.
    """

    lengths = None

    def __init__(
        self,
        tokens: Tokens | Tensor | np.ndarray,
        context_length: int,
        stride: int,
        *,
        end: int | None = None,
    ) -> None:
        self._tokens = tokens
        self._context_length = context_length
        self._end = end
        self._starts = range(0, len(tokens) - context_length, stride)

    def __len__(self) -> int:
        return len(self._starts)

    def start(self, index: int) -> int:
        """The place in the text where window `index` begins."""
        return self._starts[index]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of window `index`, (T,) each."""
        start = self.start(index)
        window = torch.as_tensor(self._tokens[start : start + self._context_length + 1])
        return window[:-1], window[1:]

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Inputs (B, T) and targets (B, T); all windows have one length, nothing is padded."""
        inputs, targets = (torch.stack(rows) for rows in zip(*items, strict=True))
        documents = None if self._end is None else (inputs == self._end).cumsum(1)
        return Batch(inputs, targets, documents=documents)


class RandomWindowDataset(WindowDataset):
    """Windows with independent random starts, as in nanoGPT.

    The start of window i is drawn from block i of Philox, a counter-based generator (Salmon et
    al., 2011, "Parallel random numbers: as easy as 1, 2, 3"). So it is a pure function of the
    text's length, `seed` and i.

    Args:
        tokens: the ids of a split, or an int64 tensor.
        context_length: the length T of a window.
        length: the number of windows. It should cover the whole training, since a second epoch
            would repeat the same windows.
        seed: picks the starts.
        end: as for `WindowDataset`.

    A text that is not longer than one context has no windows: `len` is 0.
    """

    def __init__(
        self,
        tokens: Tokens | Tensor | np.ndarray,
        context_length: int,
        *,
        length: int,
        seed: int,
        end: int | None = None,
    ) -> None:
        super().__init__(tokens, context_length, 1, end=end)
        self._numbers = range(length if self._starts else 0)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._numbers)

    def start(self, index: int) -> int:
        """The place in the text where window `index` begins."""
        number = self._numbers[index]
        # raw numbers: they are the same in every version of NumPy
        drawn = int(np.random.Philox(key=self._seed, counter=number).random_raw())
        return self._starts[drawn * len(self._starts) >> 64]


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
    """The outputs of a frozen trunk for the texts, with their classes.

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
        """The concatenated vectors of the texts (N, C), classes (B,) and lengths (B,)."""
        features, labels = zip(*items, strict=True)
        return Batch(
            torch.cat(features),
            torch.tensor(labels),
            torch.tensor([len(vectors) for vectors in features]),
        )


class InstructionDataset:
    """Prompts with the responses to be learnt; each response ends in `<|endoftext|>`.

    Args:
        records: the turns of each conversation, one or several; all responses are learnt. A turn
            is the token ids of the rendered prompt and of the response without its end token.
        end: the id of `<|endoftext|>`; learnt as the end of a response, and used as padding.
        mask_prompt: learn the response only; otherwise every token counts, as in pretraining.
        max_length: inputs are cut to this many tokens. If the prompt alone fills them, nothing is
            left to learn.
        row_length: the records of a batch are packed into rows of at most this many tokens and do
            not attend to each other; with None each has a row of its own, padded on the right.
            The losses are the same.
    """

    def __init__(
        self,
        records: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
        *,
        end: int,
        mask_prompt: bool = True,
        max_length: int | None = None,
        row_length: int | None = None,
    ) -> None:
        self._end = end
        self._row_length = row_length
        self._items = [self._item(turns, mask_prompt, max_length) for turns in records]
        self.lengths = np.array([len(inputs) for inputs, _ in self._items])

    def _item(
        self,
        turns: Sequence[tuple[Sequence[int], Sequence[int]]],
        mask_prompt: bool,
        max_length: int | None,
    ) -> tuple[Tensor, Tensor]:
        ids: list[int] = []
        learnt: list[int] = []
        for prompt, response in turns:
            answer = [*response, self._end]
            ids += [*prompt, *answer]
            learnt += [*([IGNORED] * len(prompt) if mask_prompt else prompt), *answer]
        # A prompt's last token predicts the first of its response: that one is learnt.
        return torch.tensor(ids)[:-1][:max_length], torch.tensor(learnt)[1:][:max_length]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of record `index`, (T_i,) each."""
        return self._items[index]

    def collate(self, items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Inputs (B, T) and targets (B, T), padded on the right; padding is never learnt.

        A packed batch has fewer rows than items, and `documents` gives the record of each
        position. The unlearnt tokens that all records begin with, the words of the template,
        occur once per row as a shared opening, and each record continues from there.
        """
        if self._row_length is not None:
            return self._packed(items, self._row_length)
        inputs, targets = zip(*items, strict=True)
        lengths = torch.tensor([len(ids) for ids in inputs])
        return Batch(_pad(inputs, self._end), _pad(targets, IGNORED), lengths)

    def _packed(self, items: Sequence[tuple[Tensor, Tensor]], row_length: int) -> Batch:
        shared = _shared(items)
        opening, _ = items[0]
        opened = [(opening[:shared], opening.new_full((shared,), IGNORED))]
        rows = _even_rows([len(inputs) - shared for inputs, _ in items], row_length - shared)
        inputs, targets, documents = [], [], []
        for row in rows:
            own = [(ids[shared:], learnt[shared:]) for ids, learnt in (items[i] for i in row)]
            parts = [*opened, *own]
            inputs.append(torch.cat([ids for ids, _ in parts]))
            targets.append(torch.cat([learnt for _, learnt in parts]))
            numbers = torch.arange(-1, len(own))  # -1 marks the shared opening
            sizes = torch.tensor([len(ids) for ids, _ in parts])
            documents.append(numbers.repeat_interleave(sizes))
        return Batch(
            _pad(inputs, self._end),
            _pad(targets, IGNORED),
            torch.tensor([len(ids) for ids in inputs]),
            _pad(documents, len(items)),  # padding is a document of its own
        )


def _shared(items: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The length of the inputs' common prefix, up to the first position with a learnt target."""
    shortest = min(len(inputs) for inputs, _ in items)
    inputs = torch.stack([inputs[:shortest] for inputs, _ in items])  # (items, shortest)
    targets = torch.stack([targets[:shortest] for _, targets in items])
    same = (inputs == inputs[0]).all(0) & (targets == IGNORED).all(0)
    return int(same.cumprod(0).sum())


def _even_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Item indices packed into few rows of at most `room` tokens and of about equal length.

    Items are placed by length, the longest first, each into the emptiest row (Graham, 1969,
    "Bounds on multiprocessing timing anomalies"). If it does not fit there, a new row is begun.
    """
    rows: list[list[int]] = [[] for _ in range(max(1, -(-sum(lengths) // max(1, room))))]
    filled = [0] * len(rows)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = min(range(len(rows)), key=filled.__getitem__)
        if filled[emptiest] + lengths[index] > room and filled[emptiest]:
            emptiest = len(rows)
            rows.append([])
            filled.append(0)
        rows[emptiest].append(index)
        filled[emptiest] += lengths[index]
    return [row for row in rows if row]


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    """Stack rows (T_i,) into (B, max T_i), filled on the right with `value`."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
