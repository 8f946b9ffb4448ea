"""Fine-tuning a spam classifier, end to end: our stage against the loop of a textbook."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpt.naive import NaiveGPT, naive_copy
from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.stages.base import real_file, write_base, write_raw_file
from bench.worker import Alternative, Job, Ran, Worker, as_ours
from gpt.batches.data import batch_indices
from gpt.model.device import Precision
from gpt.model.model import GPTClassifier
from gpt.model.weights import load_base
from gpt.text.records import Split, read_messages, split_messages
from gpt.tokens.tokenizer import Tokenizer
from gpt.train.recipe import TrainParams
from stages.finetune_classifier import FinetuneClassifierParams, finetune_classifier

NAIVE, NAIVE_IN_FULL = "naive padded loop, fp32", "naive padded loop, fp32, in full"
EVALUATED = 5
"""Batches of each part that the naive loop looks at when it evaluates."""
TIMED = 5
"""Its steps, and its evaluated batches, in one round."""


def recipe(precision: Precision, settings: Settings) -> FinetuneClassifierParams:
    """What both learn by: the book's last block, final norm and head."""
    return FinetuneClassifierParams(
        split=Split(train=0.7, validation=0.1),
        balance="undersample",
        trainable="last_block",
        train=TrainParams(
            device="cpu",
            precision=precision,
            threads=settings.threads,
            batch_size=8,
            epochs=1 if settings.quick else 5,
            learning_rate=5e-5,
            schedule="constant",
            weight_decay=0.1,
            grad_clip=0,
            eval_interval=50,
            keep="last",
        ),
    )


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """The stage `finetune_classifier` in each precision against the naive loop in fp32."""
    messages = real_file(settings, "SMSSpamCollection", "messages.tsv")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        name = write_base(settings, home / "base")
        write_raw_file(messages, "messages", "tsv", home / "messages")
        naive = recipe("fp32", settings)
        # so long that it is run once, for both tables
        in_full = _run_in_full(naive, home, settings) if settings.full else None
        for precision in settings.precisions:
            runs = compare_in_workers(
                {
                    "ours": Alternative(
                        build=_our_job,
                        arguments=(recipe(precision, settings), home),
                        setting=as_ours,
                    ),
                    NAIVE: Alternative(build=_naive_job, arguments=(naive, home)),
                },
                settings,
                agree=lambda a, b: all(a[key] == b[key] for key in ("steps", "max_length")),
                warm_up=False,
            )
            yield _table(name, precision, runs, in_full)


def _run_in_full(params: FinetuneClassifierParams, home: Path, settings: Settings) -> Ran:
    alternative = Alternative(build=_full_naive_job, arguments=(params, home))
    worker = Worker(NAIVE_IN_FULL, alternative, settings.threads)
    try:
        return worker()
    finally:
        worker.close()


def _table(
    name: str, precision: Precision, runs: Mapping[str, list[Ran]], in_full: Ran | None
) -> Comparison:
    seconds = seconds_of(runs)
    seconds[NAIVE] = [_whole(ran.result) for ran in runs[NAIVE]]
    results: dict[str, dict[str, float]] = {"ours": runs["ours"][0].result}
    part = runs[NAIVE][0].result
    steps, batches = part["steps"], part["evaluated_batches"]
    note = (
        f"Rounds: {len(seconds['ours'])}. Of the naive loop {TIMED} steps and {TIMED} "
        f"evaluated batches were timed in each round and multiplied: {steps:,.0f} steps and "
        f"{batches:,.0f} batches, all of one shape."
    )
    if in_full is not None:
        seconds[NAIVE_IN_FULL] = [in_full.seconds] * len(seconds["ours"])
        results[NAIVE_IN_FULL] = in_full.result
        apart = (
            abs(results["ours"]["validation_accuracy"] - in_full.result["validation_accuracy"])
            * (part["rows_validation"])
        )
        note += f" In full it ran once; {apart:.0f} validation messages apart from ours."
    return Comparison(
        title=(
            f"Classification fine-tuning, {name}, {part['rows_train']:,.0f} messages of up to "
            f"{part['max_length']:.0f} tokens, {steps:,.0f} steps, ours in {precision}"
        ),
        seconds=seconds,
        columns={
            f"{part_name} accuracy": {
                row: f"{result[f'{part_name}_accuracy']:.2%}" for row, result in results.items()
            }
            for part_name in ("train", "validation")
        },
        note=note,
    )


def _whole(timed: Mapping[str, float]) -> float:
    """The seconds of a whole naive run, from those of a step and of an evaluated batch."""
    return (
        timed["steps"] * timed["step_seconds"] + timed["evaluated_batches"] * timed["batch_seconds"]
    )


# --- in the workers -------------------------------------------------------------------------------


def _our_job(params: FinetuneClassifierParams, home: Path) -> Job:
    def run() -> dict[str, float]:
        return finetune_classifier(
            params,
            base=home / "base",
            messages=home / "messages",
            out=home / "ours" / "classifier",
            metrics=home / "ours" / "metrics.json",
            history=home / "ours" / "history.csv",
        )

    return Job(run=run)


@dataclass(slots=True)
class NaiveRun:
    """A textbook's loop: all texts padded to the longest, all blocks computed for every step."""

    model: NaiveGPT
    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    """Of each part: texts (n, T), real lengths (n,), classes (n,)."""
    params: TrainParams
    optimizer: torch.optim.Optimizer

    @classmethod
    def read(cls, params: FinetuneClassifierParams, home: Path) -> NaiveRun:
        """Start where the stage starts: from the same weights, a head drawn alike, and rows."""
        trunk, tokenizer = load_base(home / "base")
        frame = read_messages(home / "messages")
        labels = sorted(frame["label"].unique())
        frames = split_messages(frame, params.split, params.balance)
        texts = {
            name: tokenizer.encode_batch(frames[name]["text"].tolist())
            for name in ("train", "validation")
        }
        longest = min(max(map(len, texts["train"])), trunk.config.context_length)
        parts = {
            name: (
                *padded(rows, longest, tokenizer),
                torch.tensor([labels.index(label) for label in frames[name]["label"]]),
            )
            for name, rows in texts.items()
        }
        torch.manual_seed(params.train.seed)
        classifier = GPTClassifier(trunk.config, labels)
        classifier.load_state_dict(
            {k: v for k, v in trunk.state_dict().items() if k != "lm_head.weight"}, strict=False
        )
        return cls.start(classifier, parts, params.train)

    @classmethod
    def start(
        cls,
        classifier: GPTClassifier,
        parts: Mapping[str, tuple[Tensor, Tensor, Tensor]],
        params: TrainParams,
    ) -> NaiveRun:
        """Train the last block, the final norm and the head of a copy of `classifier`."""
        model = naive_copy(classifier)
        model.requires_grad_(False)
        for module in (model.blocks[-1], model.norm, model.head):
            module.requires_grad_(True)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable, lr=params.learning_rate, weight_decay=params.weight_decay
        )
        return cls(model, parts, params, optimizer)

    @property
    def steps(self) -> int:
        """In all epochs; the rows left over at the end of one are dropped."""
        return (self.params.epochs or 1) * (self.rows("train") // self.params.batch_size)

    @property
    def evaluations(self) -> int:
        """While it trains, the one at the first step among them."""
        return -(-self.steps // self.params.eval_interval)

    @property
    def evaluated_batches(self) -> float:
        """In all: losses at intervals, accuracies after each epoch, and of all rows in the end."""
        size = self.params.batch_size
        some = sum(min(EVALUATED, -(-self.rows(part) // size)) for part in self.parts)
        at_the_end = sum(self.rows(part) / size for part in self.parts)
        return (self.evaluations + (self.params.epochs or 1)) * some + at_the_end

    def rows(self, part: str) -> int:
        """How many texts a part has."""
        return len(self.parts[part][0])

    def logits(self, part: str, rows: Any) -> Tensor:
        """Of the last real token of some texts, (B, classes)."""
        texts, lengths, _ = self.parts[part]
        logits: Tensor = self.model(texts[rows])  # (B, T, classes)
        return logits[torch.arange(len(logits)), lengths[rows] - 1]

    def step(self, number: int) -> float:
        """One training step, on the rows that the stage sees in it."""
        size = self.params.batch_size
        rows = torch.tensor(batch_indices(self.rows("train"), size, self.params.seed, number))
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.logits("train", rows), self.parts["train"][2][rows])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()

    def evaluate(self, part: str, n_batches: int | None = None) -> tuple[float, float]:
        """The mean loss and the accuracy on the first batches of a part, or on all."""
        size = self.params.batch_size
        end = self.rows(part) if n_batches is None else min(n_batches * size, self.rows(part))
        self.model.eval()
        loss, right = 0.0, 0
        with torch.no_grad():
            for start in range(0, end, size):
                rows = slice(start, min(start + size, end))
                logits, classes = self.logits(part, rows), self.parts[part][2][rows]
                loss += F.cross_entropy(logits, classes, reduction="sum").item()
                right += int((logits.argmax(1) == classes).sum())
        return loss / end, right / end

    def train(self) -> dict[str, float]:
        """All of it; the accuracies on all rows."""
        each = self.steps // (self.params.epochs or 1)
        for number in range(self.steps):
            self.step(number)
            if number % self.params.eval_interval == 0:
                self._look(EVALUATED)
            if (number + 1) % each == 0:
                self._look(EVALUATED)
        return {f"{part}_accuracy": self.evaluate(part)[1] for part in self.parts}

    def _look(self, n_batches: int) -> None:
        for part in self.parts:
            self.evaluate(part, n_batches)

    def figures(self) -> dict[str, float]:
        """What is worked through."""
        return {
            "steps": float(self.steps),
            "evaluated_batches": self.evaluated_batches,
            "max_length": float(self.parts["train"][0].shape[1]),
            "rows_train": float(self.rows("train")),
            "rows_validation": float(self.rows("validation")),
        }


def padded(rows: list[list[int]], length: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Texts (n, `length`), cut or filled up, and their real lengths (n,)."""
    cut = [ids[:length] or [tokenizer.eot] for ids in rows]
    texts = torch.tensor([ids + [tokenizer.eot] * (length - len(ids)) for ids in cut])
    return texts, torch.tensor([len(ids) for ids in cut])


def _naive_job(params: FinetuneClassifierParams, home: Path) -> Job:
    """Some steps and some evaluated batches of the naive loop, and the seconds of one of each."""
    naive = NaiveRun.read(params, home)
    # not counted: what is multiplied must not hold what happens once
    naive.step(0)
    naive.evaluate("train", 1)
    done = 1

    def run() -> dict[str, float]:
        nonlocal done
        started = time.perf_counter()
        for number in range(done, done + TIMED):
            naive.step(number)
        done += TIMED
        between = time.perf_counter()
        naive.evaluate("train", TIMED)
        return naive.figures() | {
            "step_seconds": (between - started) / TIMED,
            "batch_seconds": (time.perf_counter() - between) / TIMED,
        }

    return Job(run=run)


def _full_naive_job(params: FinetuneClassifierParams, home: Path) -> Job:
    """From the files to the accuracies."""

    def run() -> dict[str, float]:
        naive = NaiveRun.read(params, home)
        return naive.train() | naive.figures()

    return Job(run=run)
