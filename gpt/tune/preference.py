"""Preference tuning: a model learns to prefer the better of two answers, without a reward model.

Rafailov et al. (2023), "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model": the reward of an answer y to a prompt x is how much likelier the model has become to give
it, beta (log pi(y | x) - log ref(y | x)), and the loss of a pair is -log sigmoid of the chosen
answer's reward minus the rejected one's. The reference is the model before tuning. Its
log-probabilities of the pairs are computed once and stored, so that only one model is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt.batches.data import IGNORED, Batch, InstructionDataset, take
from gpt.model.model import GPT
from gpt.model.parallel import add_up, share_out

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class PairBatch(Batch):
    """B pairs as 2 B rows: first the chosen answers, then the rejected ones in the same order.

    Only the answers' tokens are targets. `references` (2, B), fp32, is the reference's
    log-probability of the chosen and of the rejected answers (`log_probs`).
    """

    references: Tensor = field(kw_only=True)

    @property
    def n_targets(self) -> int:
        """How many pairs a loss counts."""
        return self.references.shape[1]


Item = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]


class PreferenceDataset:
    """Pairs of answers to a prompt, each of which ends in `<|endoftext|>`.

    Args:
        prompts: token ids of each prompt as rendered.
        chosen: token ids of the better answer to each, without an end.
        rejected: likewise of the worse one.
        end: the id of `<|endoftext|>`.
        max_length: inputs are cut to this many tokens. Pairs whose answers are equal after the
            cut are left out.

    Attributes:
        kept: which of the pairs are in it, by their places in the arguments.
        references: (n, 2) fp32, what the reference says of the chosen and the rejected answer of
            each pair; zeros until `set_references`.
        lengths: the tokens of the longer answer of each pair with its prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Ids],
        chosen: Sequence[Ids],
        rejected: Sequence[Ids],
        *,
        end: int,
        max_length: int | None = None,
    ) -> None:
        better, worse = (
            InstructionDataset(
                [[turn] for turn in zip(prompts, answers, strict=True)],
                end=end,
                max_length=max_length,
            )
            for answers in (chosen, rejected)
        )
        both = [(better[i], worse[i]) for i in range(len(prompts))]
        self.kept = [i for i, pair in enumerate(both) if not all(map(torch.equal, *pair))]
        self._pairs = [both[i] for i in self.kept]
        self._stack: Callable[[Sequence[tuple[Tensor, Tensor]]], Batch] = better.collate
        self.lengths = np.array([max(len(ids) for ids, _ in pair) for pair in self._pairs], int)
        self.references = torch.zeros(len(self._pairs), 2)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Item:
        """Inputs and targets of the chosen and of the rejected answer; the references (2,)."""
        return *self._pairs[index], self.references[index]

    def collate(self, items: Sequence[Item]) -> PairBatch:
        """Both answers of B pairs in one batch of 2 B rows, padded on the right."""
        chosen, rejected, references = zip(*items, strict=True)
        rows = self._stack([*chosen, *rejected])
        return PairBatch(
            rows.inputs, rows.targets, rows.lengths, references=torch.stack(references, 1)
        )

    def set_references(
        self, model: GPT, batch_size: int, *, by_token: bool = False
    ) -> Iterator[int]:
        """Make `model` the reference, and store its log-probabilities of every pair.

        Args:
            model: on its device, in evaluation mode.
            batch_size: pairs at a time; those of like length together.
            by_token: as `log_probs` takes it.

        Yields:
            The number of pairs done so far.
        """
        order = np.argsort(-self.lengths, kind="stable").tolist()
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            batch = take(self, some).to(model.device)
            with torch.no_grad():
                self.references[some] = log_probs(model, batch, by_token=by_token).T.cpu()
            yield start + len(some)


def log_probs(model: GPT, batch: Batch, *, by_token: bool = False) -> Tensor:
    """The log-probability of each pair's answers, in nats.

    Args:
        model: the policy or the reference.
        batch: of 2 B rows, a `PairBatch` on the model's device.
        by_token: divide each by the number of the answer's tokens, its end among them.

    Returns:
        (2, B) in fp32: the chosen answers, the rejected ones. Prompts and padding are not in it,
        and cost no head.
    """
    hidden = model.hidden(batch.inputs)  # (2 B, T, C)
    counts = batch.targets != IGNORED  # (2 B, T)
    logits = model.head(hidden[counts]).float()  # (n, V)
    each = -F.cross_entropy(logits, batch.targets[counts], reduction="none")  # (n,)
    rows = counts.nonzero()[:, 0]  # (n,), which row each is of
    n_rows = len(batch.targets)
    sums = each.new_zeros(n_rows).index_add(0, rows, each)  # (2 B,)
    if by_token:
        sums = sums / counts.sum(1).clamp(min=1)
    return sums.view(2, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceLoss:
    """The loss of DPO: what `gpt.train.loop.fit` wants of a loss.

    Attributes:
        beta: the strength of the penalty for deviating from the reference: rewards are beta times
            the change in log-probability.
        label_smoothing: the share of pairs that are taken to be labelled the wrong way round
            (Mitchell, 2023, "A note on DPO with noisy preferences & relationship to IPO").
        by_token: rewards are of the mean over an answer's tokens, so that its length does not
            count (Lambert et al., 2024, "Tulu 3", 5.1.2); `beta` is larger then.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    by_token: bool = False

    def __call__(self, model: GPT, batch: Batch) -> tuple[Tensor, int]:
        """The summed loss of a `PairBatch` in nats, and the number of pairs."""
        return self.of_rewards(self.rewards(model, batch)).sum(), batch.n_targets

    def rewards(self, model: GPT, batch: Batch) -> Tensor:
        """beta (log pi - log ref) of the chosen and the rejected answers, (2, B) in fp32."""
        assert isinstance(batch, PairBatch)
        return self.beta * (log_probs(model, batch, by_token=self.by_token) - batch.references)

    def of_rewards(self, rewards: Tensor) -> Tensor:
        """The loss of each pair, (B,), from `rewards` (2, B)."""
        margin = rewards[0] - rewards[1]
        right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong


@torch.no_grad()
def preference_scores(
    model: GPT, batches: Iterable[Batch], loss: PreferenceLoss
) -> dict[str, float]:
    """How well a model tells the better answers of `batches`, in the mean over all pairs.

    Processes that train together share the batches, and all get the same.

    Returns:
        `loss` in nats a pair; `reward_margin`, the chosen answer's reward less the rejected one's;
        `reward_accuracy`, the share of pairs in which it is above 0, one of exactly 0 counted half;
        `reward_chosen` and `reward_rejected`.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for batch, counts in share_out(batches):
        rewards = loss.rewards(model, batch.to(model.device))  # (2, B)
        if counts:
            margin = rewards[0] - rewards[1]
            right = (margin > 0).double() + 0.5 * (margin == 0)
            found = (loss.of_rewards(rewards), margin, right, *rewards)
            sums[:5] += torch.stack([each.double().sum() for each in found]).cpu()
            sums[5] += batch.n_targets
    *sums_of, pairs = add_up(sums).tolist()
    names = ("loss", "reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
    return {name: value / pairs for name, value in zip(names, sums_of, strict=True)}
