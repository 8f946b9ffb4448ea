"""Fine-tuning an assistant: what masking, packing and adapters change of its loss and its time.

The stage `finetune_instruct` from the samples' base, or the one that is named, to the model
directory, on the instructions of "Build a Large Language Model (From Scratch)".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.stages.base import real_file, write_base, write_raw_file
from bench.worker import Alternative, Job, as_ours
from gpt.batches.data import InstructionDataset, batches
from gpt.batches.metrics import mean_loss
from gpt.model.weights import load_base
from gpt.prompts import encode_turns
from gpt.text.records import read_instructions, split_instructions
from gpt.train.recipe import TrainParams
from gpt.tune.lora import IN_BLOCKS, LoraParams
from stages.finetune_instruct import FinetuneInstructParams, finetune_instruct

SAMPLE_BASE = Path(__file__).parents[2] / "samples" / "gpt2-nano"
LEARNING_RATE, LORA_LEARNING_RATE = 1e-3, 5e-3
QUICK_RECORDS = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of the table."""

    trainable: str
    mask_prompt: bool
    rows: str
    by_length: bool = False

    def __str__(self) -> str:
        loss = "answers" if self.mask_prompt else "prompts too"
        rows = f"{self.rows}, like lengths together" if self.by_length else self.rows
        return f"{'LoRA' if self.trainable == 'lora' else 'full'}, {loss}, {rows}"


PACKED, PADDED = Choice("all", True, "packed"), Choice("all", True, "padded")
CHOICES = (
    PACKED,
    PADDED,
    replace(PADDED, by_length=True),
    *(replace(each, mask_prompt=False) for each in (PACKED, PADDED)),
    *(
        replace(each, trainable="lora", mask_prompt=mask)
        for mask in (True, False)
        for each in (PACKED, PADDED)
    ),
)


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Every choice beside the stage's own."""
    file = real_file(settings, "instruction-data.json", "instructions.json")
    settings = replace(settings, weights=settings.weights or SAMPLE_BASE)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        name = write_base(settings, home / "base")
        if settings.quick:
            some = json.loads(file.read_text("utf-8"))[:QUICK_RECORDS]
            file = home / "records.json"
            file.write_text(json.dumps(some), encoding="utf-8")
        write_raw_file(file, "instructions", "json", home / "instructions")
        runs = compare_in_workers(
            {
                str(choice): Alternative(train_job, (choice, home, settings), as_ours)
                for choice in CHOICES
            },
            settings,
            warm_up=False,  # a run is long, and the same bytes each time
        )
    results = {choice: done[0].result for choice, done in runs.items()}
    params = recipe(PACKED, settings)
    yield Comparison(
        title=(
            f"Instruction fine-tuning from {name}, {results[str(PACKED)]['records_train']:.0f} "
            f"records, {_long(params)} in batches of {params.train.batch_size}"
        ),
        seconds=seconds_of(runs),
        columns={
            "parameters trained": {
                choice: f"{found['parameters_trained']:,.0f}" for choice, found in results.items()
            },
            "held-out loss before": {
                choice: f"{found['held_out_before']:.4f}" for choice, found in results.items()
            },
            "after": {choice: f"{found['held_out']:.4f}" for choice, found in results.items()},
        },
        note=(
            "The whole stage, in seconds. Losses in nats a token of the answers of the "
            f"{results[str(PACKED)]['records_test']:.0f} test records, which no choice was made "
            f"by; learning rate {LEARNING_RATE:g}, with LoRA (rank {_LORA.rank}, every layer of "
            f"the blocks) {LORA_LEARNING_RATE:g}."
        ),
    )


def _long(params: FinetuneInstructParams) -> str:
    train = params.train
    return f"{train.epochs} epochs" if train.epochs else f"{train.steps} steps"


_LORA = LoraParams(rank=16, alpha=16, layers=IN_BLOCKS)


def recipe(choice: Choice, settings: Settings) -> FinetuneInstructParams:
    """How a choice is trained."""
    adapters = choice.trainable == "lora"
    return FinetuneInstructParams(
        trainable="lora" if adapters else "all",
        lora=_LORA if adapters else None,
        mask_prompt=choice.mask_prompt,
        rows="packed" if choice.rows == "packed" else "padded",
        train=TrainParams(
            device="cpu",
            threads=settings.threads,
            batch_size=8,
            group_by_length=choice.by_length,
            **({"steps": 4} if settings.quick else {"epochs": 3}),  # type: ignore[arg-type]
            learning_rate=LORA_LEARNING_RATE if adapters else LEARNING_RATE,
            warmup_steps=2 if settings.quick else 20,
            weight_decay=0.1,
            eval_interval=1_000_000,  # at the end alone
        ),
    )


# --- in the workers -------------------------------------------------------------------------------


def train_job(choice: Choice, home: Path, settings: Settings) -> Job:
    """The whole stage; then, untimed, the loss on the test part."""
    params = recipe(choice, settings)
    out = home / str(choice)

    def run() -> dict[str, float]:
        return finetune_instruct(
            params,
            base=home / "base",
            instructions=home / "instructions",
            out=out / "model",
            metrics=out / "metrics.json",
            history=out / "history.csv",
        )

    def report(figures: dict[str, float]) -> dict[str, float]:
        before, after = (
            held_out_loss(each, home, params) for each in (home / "base", out / "model")
        )
        return {**figures, "held_out_before": before, "held_out": after}

    return Job(run=run, report=report)


def held_out_loss(directory: Path, home: Path, params: FinetuneInstructParams) -> float:
    """Nats a token of the answers of the test part."""
    model, tokenizer = load_base(directory)
    records = split_instructions(read_instructions(home / "instructions"), params.split)["test"]
    data = InstructionDataset(
        encode_turns(tokenizer, params.template, records),
        end=tokenizer.eot,
        max_length=model.config.context_length,
    )
    return mean_loss(model, batches(data, 8))
