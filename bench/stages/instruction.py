"""Fine-tuning on instructions for one epoch: our loop against that of a textbook."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpt.naive import naive_copy
from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.stages.base import real_file, write_base, write_raw_file
from bench.worker import Alternative, Job, Ran, as_ours
from gpt.batches.data import IGNORED, InstructionDataset, batch_indices, batches, take
from gpt.batches.metrics import lm_loss_sum
from gpt.model.device import Precision
from gpt.model.model import GPT
from gpt.model.weights import load_base
from gpt.prompts import encode_turns
from gpt.text.records import read_instructions
from gpt.train.loop import fit
from gpt.train.recipe import TrainParams

RECORDS = 200
OURS, PADDED, NAIVE = "ours", "ours, padded", "naive padded loop, fp32"
GROUPED = "ours, padded, like lengths together"
CLOSE, NEAR = 0.01, 0.05
"""How far final losses may be apart, as a share: of the same batches, and of others."""


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """`gpt.train.loop.fit` in each precision against the naive loop in fp32."""
    file = real_file(settings, "instruction-data.json", "instructions.json")
    n_records = 32 if settings.quick else RECORDS
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        name = write_base(settings, home / "base")
        records = json.loads(file.read_text("utf-8"))[:n_records]
        some = home / "records.json"
        some.write_text(json.dumps(records), encoding="utf-8")
        write_raw_file(some, "instructions", "json", home / "instructions")
        for precision in settings.precisions:
            runs = compare_in_workers(
                {
                    OURS: _ours(home, precision, settings),
                    PADDED: _ours(home, precision, settings, packed=False),
                    GROUPED: _ours(home, precision, settings, packed=False, group_by_length=True),
                    NAIVE: Alternative(_naive_job, (home, _train_params("fp32", settings))),
                },
                settings,
                agree=_agree,
                warm_up=False,
            )
            yield _table(name, len(records), precision, runs)


def _ours(
    home: Path,
    precision: Precision,
    settings: Settings,
    packed: bool = True,
    group_by_length: bool = False,
) -> Alternative:
    params = replace(_train_params(precision, settings), group_by_length=group_by_length)
    return Alternative(_our_job, (home, params, packed), as_ours)


def _agree(ours: tuple[bool, float], theirs: tuple[bool, float]) -> bool:
    return math.isclose(ours[1], theirs[1], rel_tol=CLOSE if ours[0] == theirs[0] else NEAR)


def _table(
    name: str, n_records: int, precision: Precision, runs: Mapping[str, list[Ran]]
) -> Comparison:
    seconds = seconds_of(runs)
    grouped = median(
        naive / ours for ours, naive in zip(seconds[GROUPED], seconds[NAIVE], strict=True)
    )
    n_rounds = len(seconds[OURS])
    return Comparison(
        title=(
            f"Instruction fine-tuning, {name}, {n_records} records, 1 epoch in batches of 8, "
            f"ours in {precision}"
        ),
        seconds=seconds,
        columns={"final loss": {row: f"{done[0].result[1]:.4f}" for row, done in runs.items()}},
        note=(
            f"Rounds: {n_rounds}, each of them the whole epoch. With like lengths together "
            f"{grouped:.2f}x the naive loop, on other batches than it."
        ),
    )


def _train_params(precision: Precision, settings: Settings) -> TrainParams:
    return TrainParams(
        device="cpu",
        precision=precision,
        threads=settings.threads,
        batch_size=8,
        epochs=1,
        learning_rate=5e-5,
        schedule="constant",
        weight_decay=0.1,
        grad_clip=0,
        eval_interval=1_000_000,  # the loss is measured outside of what is timed
        keep="last",
    )


# --- in the workers -------------------------------------------------------------------------------


def _start(home: Path, packed: bool = False) -> tuple[GPT, InstructionDataset]:
    """The same weights and the same records in every worker."""
    model, tokenizer = load_base(home / "base")
    records = read_instructions(home / "instructions")
    data = InstructionDataset(
        encode_turns(tokenizer, "alpaca", records),
        end=tokenizer.eot,
        mask_prompt=True,
        max_length=model.config.context_length,
        row_length=model.config.context_length if packed else None,
    )
    return model, data


def _our_job(home: Path, params: TrainParams, packed: bool) -> Job:
    model, data = _start(home, packed)

    def run() -> None:
        fit(
            model,
            params=params,
            train=data,
            loss=lm_loss_sum,
            validate=lambda _: {"validation_loss": 0.0},
        )

    _, padded = _start(home)
    return _job(run, model, padded, params)


def _naive_job(home: Path, params: TrainParams) -> Job:
    model, data = _start(home)
    peer = naive_copy(model)
    return _job(lambda: naive_epoch(peer, data, params), peer, data, params)


def naive_epoch(model: nn.Module, data: InstructionDataset, params: TrainParams) -> None:
    """A textbook's loop: batches padded to their longest, logits of every position."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
    )
    model.train()
    for number in range(len(data) // params.batch_size):
        # the batches of ours, but where that puts like lengths together
        batch = take(data, batch_indices(len(data), params.batch_size, params.seed, number))
        optimizer.zero_grad()
        logits = model(batch.inputs)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        optimizer.step()


def _job(
    run: Callable[[], None], model: nn.Module, data: InstructionDataset, params: TrainParams
) -> Job:
    """Each run starts from the first weights; told are the kind of its batches and its last loss.

    That is measured once only: it takes long, and every run ends alike.
    """
    first = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses: list[float] = []

    def before() -> None:
        model.load_state_dict(first)

    def report(_: None) -> tuple[bool, float]:
        if not losses:
            losses.append(mean_loss(model, data))
        return params.group_by_length, losses[0]

    return Job(run=run, before=before, report=report)


@torch.no_grad()
def mean_loss(model: nn.Module, data: InstructionDataset) -> float:
    """Over all targets in fp32, by what the model gives for every position."""
    model.eval()
    total, targets = 0.0, 0
    for batch in batches(data, 8):
        logits: Tensor = model(batch.inputs).float()  # (B, T, V)
        total += F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        targets += batch.n_targets
    return total / targets
