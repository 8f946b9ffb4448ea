"""Several processes that train one model do what one would do alone."""

import contextlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from gpt.base.errors import InputError
from gpt.base.events import Message, Metrics
from gpt.batches.data import InstructionDataset, WindowDataset, batches
from gpt.batches.metrics import lm_loss_sum, mean_loss
from gpt.model import parallel
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.train.loop import FitResult, Interrupted, fit
from gpt.train.recipe import TrainParams
from gpt.tune.lora import LoraParams, merge, wrap
from gpt.tune.preference import PreferenceDataset, PreferenceLoss, preference_scores

# A key's bias has no gradient but rounding, which Adam would blow up to a full step at its usual
# eps: where two ways of computing are compared, it is kept from doing so.
COMMON = {"batch_size": 4, "accumulation": 2, "eval_interval": 10, "eps": 1e-5, "threads": 1}


@dataclass
class Run:
    """What one process saw of a training."""

    losses: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    result: FitResult | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    interrupted: bool = False


def train(
    params: TrainParams,
    state: Path | None = None,
    stop_at: int = 0,
    lora: LoraParams | None = None,
) -> Run:
    """A small model on tokens; `stop_at` sends this process SIGTERM at that step.

    With `lora` adapters alone are trained, beside weights that are the same in every process, and
    merged in the end.
    """
    torch.set_num_threads(1)
    # only the first process's weights must count
    torch.manual_seed(3 + parallel.world().rank)
    model = GPT(
        GPTConfig(vocab_size=64, context_length=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    )
    if lora:
        wrap(model, lora)
    tokens = torch.arange(2000) * 7 % 61  # soon learnt
    data = WindowDataset(tokens, 16, 16)
    validation = WindowDataset(tokens[:200], 16, 16)  # an odd number of batches
    seen = Run()

    def log(event):
        if isinstance(event, Message):
            seen.messages.append(event.text)
        if isinstance(event, Metrics) and "train_loss" in event.values:
            seen.losses.append(event.values["train_loss"])
            if event.step == stop_at:
                os.kill(os.getpid(), 15)

    try:
        seen.result = fit(
            model,
            params=params,
            train=data,
            loss=lm_loss_sum,
            validate=lambda m: {"validation_loss": mean_loss(m, batches(validation, 4))},
            sample=lambda m: str(m(tokens[None, :8]).argmax().item()),
            state=state,
            log=log,
        )
    except Interrupted:
        seen.interrupted = True
    if lora and not seen.interrupted:
        merge(model)
    seen.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return seen


def tune(params: TrainParams) -> Run:
    """The same model tuned towards the better of two answers, the second of which is shorter."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=64, context_length=16, n_layer=2, n_head=2, n_embd=32))
    prompts = [[i % 50, 3, 1 + i % 7][: 1 + i % 3] for i in range(40)]
    data, held_out = (
        PreferenceDataset(
            prompts[some], [[50, 51, 52]] * 20, [[60, 61]] * 20, end=63, max_length=16
        )
        for some in (slice(0, 20), slice(20, 40))
    )
    for each in (data, held_out):
        list(each.set_references(model, 7))
    loss = PreferenceLoss(beta=0.5)

    def validate(model: GPT) -> dict[str, float]:
        scores = preference_scores(model, batches(held_out, 3), loss)
        return {f"validation_{name}": value for name, value in scores.items()}

    seen = Run()
    seen.result = fit(model, params=params, train=data, loss=loss, validate=validate)
    seen.weights = {name: value.clone() for name, value in model.state_dict().items()}
    return seen


def _serve(rank: int, size: int, pipe) -> None:
    """A process that does one piece of work after another with its like."""
    while True:
        place, work, arguments = pipe.recv()
        parallel.join(parallel.World(rank, size, rank, size), "cpu", place)
        try:
            result = work(*arguments)
        except parallel.Dismissed:
            result = parallel.Dismissed
        except Exception as error:
            result = error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        pipe.send(result)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Runs a function in two processes; what it gave in each."""
    with _processes(2, tmp_path_factory.mktemp("meetings")) as run:
        yield run


@contextlib.contextmanager
def _processes(size: int, folder: Path):
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, size, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    numbers = itertools.count()

    def run(work, *arguments) -> list:
        place = (folder / str(next(numbers))).as_uri()
        for pipe in pipes:
            pipe.send((place, work, arguments))
        assert all(pipe.poll(120) for pipe in pipes), "a process is stuck"
        return [pipe.recv() for pipe in pipes]

    try:
        yield run
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_give_the_curve_of_one(together, mode, optimizer):
    params = TrainParams(steps=50, parallel=mode, optimizer=optimizer, learning_rate=3e-3, **COMMON)
    alone = train(params)
    found = together(train, params)
    both, other = found
    assert other is parallel.Dismissed, "only the first process goes on after the training"
    assert len(both.losses) == 50
    assert alone.losses[-1] < alone.losses[0] - 0.3, "nothing was learnt: nothing is compared"
    assert both.losses == pytest.approx(alone.losses, abs=1e-4)
    for ours, theirs in zip(both.result.history, alone.result.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for name, value in alone.weights.items():
        assert (both.weights[name] - value).abs().max() < 1e-3, name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_tune_towards_preferences_as_one_does(together, mode):
    params = TrainParams(
        steps=12, parallel=mode, learning_rate=1e-3, **{**COMMON, "eval_interval": 4}
    )
    alone, both = tune(params), together(tune, params)[0]
    margins = [row["validation_reward_margin"] for row in alone.result.history]
    assert 0.05 < margins[0] < margins[-1], "nothing was learnt: nothing is compared"
    for ours, theirs in zip(both.result.history, alone.result.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    for name, value in alone.weights.items():
        assert (both.weights[name] - value).abs().max() < 1e-3, name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_adapters_as_one_does_also_when_they_were_stopped(
    together, tmp_path, mode
):
    lora = LoraParams(rank=4, dropout=0.1, layers=("query", "value", "attn.c_proj", "mlp.c_fc"))
    params = TrainParams(steps=20, parallel=mode, learning_rate=3e-2, **COMMON)
    alone = train(params, lora=lora)
    straight = together(train, params, None, 0, lora)[0]
    assert alone.losses[-1] < alone.losses[0] - 0.05, "nothing was learnt: nothing is compared"
    assert straight.losses == pytest.approx(alone.losses, abs=1e-4)
    for name, value in alone.weights.items():
        assert (straight.weights[name] - value).abs().max() < 1e-3, name
    stopped = together(train, params, tmp_path / "state", 8, lora)[0]
    assert stopped.interrupted
    second = together(train, params, tmp_path / "state", 0, lora)[0]
    assert [*stopped.losses, *second.losses] == straight.losses
    for name, value in straight.weights.items():
        assert torch.equal(second.weights[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_three_processes_that_were_stopped_come_to_the_bytes_of_three_that_were_not(tmp_path, mode):
    """With two a sum is the same in any order; with three DDP's buckets must be what they were."""
    params = TrainParams(steps=30, parallel=mode, **{**COMMON, "accumulation": 3})
    with _processes(3, tmp_path) as run:
        first = run(train, params, tmp_path / "state", 13)
        second = run(train, params, tmp_path / "state")[0]
        straight = run(train, params)[0]
    assert [*first[0].losses, *second.losses] == straight.losses
    for name, value in straight.weights.items():
        assert torch.equal(second.weights[name], value), name


def _uneven(params: TrainParams) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=64, context_length=48, n_layer=1, n_head=2, n_embd=32))
    responses = [[5] * n for n in (1, 30, 2, 3, 25, 1, 1, 40)] * 2
    data = InstructionDataset([[([1, 2, 3], each)] for each in responses], end=0)
    validate = lambda _: {"validation_loss": 0.0}  # noqa: E731
    fit(model, params=params, train=data, loss=lm_loss_sum, validate=validate)
    return model.state_dict()


def test_rows_with_very_uneven_counts_of_targets_weigh_as_in_one_process(together):
    """The mean is over the targets of all, not over the processes' means."""
    params = TrainParams(steps=10, keep="last", **COMMON)
    alone = _uneven(params)
    both, _ = together(_uneven, params)
    for name, value in alone.items():
        assert (both[name] - value).abs().max() < 1e-6, name


@pytest.mark.slow
def test_processes_part_every_time(together):
    """DDP closing the connections with Python's lock held was stuck once in some twenty times."""
    params = TrainParams(steps=1, keep="last", **COMMON)
    for _ in range(80):  # finds it in 98 runs of a hundred
        together(_uneven, params)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("then", [1, 2])
def test_a_run_stopped_with_two_processes_goes_on_with_one_or_two(together, tmp_path, mode, then):
    params = TrainParams(steps=30, parallel=mode, **COMMON)
    alone = train(params)
    state = tmp_path / "state"
    first = together(train, params, state, 13)
    assert first[0].interrupted
    assert first[1].interrupted, "all stop where one was told to"
    done = len(first[0].losses)
    assert done in (13, 14)
    second = train(params, state) if then == 1 else together(train, params, state)[0]
    assert second.messages == [f"train: continuing from step {done} of 30"]
    assert [*first[0].losses, *second.losses] == pytest.approx(alone.losses, abs=1e-4)
    if then == 2:  # and byte for byte that of two that never stopped
        straight = together(train, params)[0]
        assert [*first[0].losses, *second.losses] == straight.losses
        for name, value in straight.weights.items():
            assert torch.equal(second.weights[name], value), name


def test_a_step_too_small_for_the_devices_is_refused(together):
    params = TrainParams(steps=1, batch_size=1)
    found = together(train, params)
    assert all(isinstance(error, InputError) for error in found)
    assert "a step of 1 rows cannot be shared by 2 devices" in str(found[0])


def _nan(params: TrainParams) -> None:
    model = GPT(
        GPTConfig(
            vocab_size=64, context_length=16, n_layer=1, n_head=2, n_embd=32, tie_weights=False
        )
    )
    items = [[1, 2, 3]] * 7 + [[5, 6]]
    data = InstructionDataset([[(each, each)] for each in items], end=0, mask_prompt=False)
    with torch.no_grad():
        model.wte.weight[6] = torch.nan
    fit(
        model,
        params=params,
        train=data,
        loss=lm_loss_sum,
        validate=lambda _: {},
        origin="item {}".format,
    )


def test_a_loss_that_is_not_finite_names_the_row_whichever_process_had_it(together):
    params = TrainParams(steps=1, batch_size=1, accumulation=8)
    found = together(_nan, params)
    assert len(found) == 2
    for error in found:
        assert "at step 1, on item 7;" in str(error)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "batch"), [(8, 8), (8, 4), (8, 2), (7, 3), (12, 5)])
def test_the_passes_of_all_processes_are_the_rows_of_the_step(monkeypatch, size, n, batch):
    rows = list(range(100, 100 + n))
    found, counts = [], set()
    for rank in range(size):
        monkeypatch.setattr(parallel, "_world", parallel.World(rank, size, rank, size))
        mine = parallel.passes(rows, batch)
        counts.add(len(mine))
        for place, some in mine:
            assert rows[place] == some[0]
            assert 0 < len(some) <= batch
            found += some
    assert found == rows
    assert len(counts) == 1, "every process takes part in as many passes"


def test_items_are_shared_out_in_rounds_that_all_take_part_in(monkeypatch):
    counted, lengths = [], set()
    for rank in range(3):
        monkeypatch.setattr(parallel, "_world", parallel.World(rank, 3, rank, 3))
        shares = list(parallel.share_out(range(7)))
        lengths.add(len(shares))
        counted += [item for item, counts in shares if counts]
    assert sorted(counted) == list(range(7))
    assert lengths == {3}
