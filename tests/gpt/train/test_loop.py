"""One loop: its steps are those of the formula, and stopping changes nothing."""

import errno
import gc
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt.base.errors import InputError, RunError
from gpt.base.events import Message, Metrics, Text
from gpt.batches.data import IGNORED, Batch, InstructionDataset, WindowDataset
from gpt.batches.metrics import lm_loss_sum, mean_loss
from gpt.model.parallel import SharedModel
from gpt.train import checkpoint
from gpt.train.checkpoint import Checkpoints
from gpt.train.loop import Interrupted, Pass, accumulate, fit, update
from gpt.train.recipe import TrainParams, make_optimizers

# A key's bias has no gradient but rounding, which Adam would blow up to a full step at its usual
# eps: where two ways of computing are compared, it is kept from doing so.
EPS = 1e-5


def _tokens(n=2000):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(3))


def _fit(model, params, train=None, **options):
    data = WindowDataset(_tokens(), 16, 16) if train is None else train
    loss = {"validation_loss": 0.0}

    def validate(model):
        loss["validation_loss"] = mean_loss(model, [data.collate([data[0], data[1]])])
        return dict(loss)

    options.setdefault("validate", validate)
    return fit(model, params=params, train=data, loss=lm_loss_sum, **options)


def _end_of_process():
    """A process ends after its last state is on the disk; these tests do not end."""
    for each in gc.get_objects():
        if type(each) is ThreadPoolExecutor:
            each.shutdown()


def _killed_at(step, make_model, params, state):
    """A run that ends, without a chance to save, right after `step`."""

    class KilledError(BaseException):
        pass

    def kill(event):
        if isinstance(event, Metrics) and event.step == step:
            raise KilledError

    with pytest.raises(KilledError):
        _fit(make_model(), params, state=state, log=kill)
    _end_of_process()


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_is_adamw_of_the_clipped_gradient_of_the_mean_loss(make_model):
    model, reference = make_model(), make_model()
    params = TrainParams(
        steps=1, batch_size=4, learning_rate=1e-2, grad_clip=0.5, eps=EPS, keep="last"
    )
    data = WindowDataset(_tokens(16 * 4 + 1), 16, 16)  # four windows: one batch of all
    _fit(model, params, data)
    batch = data.collate([data[i] for i in range(4)])
    loss = F.cross_entropy(reference(batch.inputs).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=EPS,
    )
    optimizer.step()
    for name, value in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5), name


def test_many_small_batches_give_the_steps_of_one_big_one(make_model):
    """Also where rows have very uneven counts of targets."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 30, 2, 3, 25, 1, 1, 40] * 8
    responses = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    data = InstructionDataset([[([1, 2, 3], each)] for each in responses], end=256, max_length=48)
    big, small = make_model(), make_model()
    common = {"steps": 10, "learning_rate": 1e-3, "eps": EPS, "keep": "last"}
    _fit(big, TrainParams(batch_size=32, **common), data)
    _fit(small, TrainParams(batch_size=8, accumulation=4, **common), data)
    for name, value in big.state_dict().items():
        assert (small.state_dict()[name] - value).abs().max() < 1e-6, name


def test_a_weight_is_cast_once_a_step_however_many_passes_it_has(make_model):
    casts = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            to = (kwargs or {}).get("dtype")
            if func is torch.ops.aten._to_copy.default and to is torch.bfloat16:
                casts.append(id(args[0]))
            return func(*args, **(kwargs or {}))

    model = make_model().train()
    params = TrainParams(steps=1, precision="bf16")
    data = WindowDataset(_tokens(), 16, 16)
    passes = [data.collate([data[2 * i], data[2 * i + 1]]) for i in range(3)]
    with Watch():
        accumulate(SharedModel(model), [Pass(each) for each in passes], lm_loss_sum, params)
    of_blocks = {id(p) for p in model.h.parameters() if p.dim() == 2}
    assert len(of_blocks) == 8
    assert {casts.count(weight) for weight in of_blocks} == {1}


def test_in_half_precision_many_passes_give_the_step_of_one(make_model):
    params = TrainParams(steps=1, precision="bf16", learning_rate=1e-3, eps=EPS)
    data = WindowDataset(_tokens(), 16, 16)
    items = [data[i] for i in range(8)]
    measured, weights = [], []
    for size in (8, 2):
        model = make_model().train()
        passes = [data.collate(items[start : start + size]) for start in range(0, 8, size)]
        shared = SharedModel(model)
        losses = accumulate(shared, [Pass(each) for each in passes], lm_loss_sum, params)
        norm = update(shared, make_optimizers(model, params), params)
        measured.append(torch.stack((losses.sum(), norm)))
        assert all(p.grad is None for p in model.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*measured, rtol=1e-2)
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moved = (weights[0] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.1 * moved


def test_the_run_ends_with_the_weights_that_validate_best(make_model):
    model = make_model()
    seen = []

    def validate(model):
        seen.append(_weights(model))
        return {"validation_loss": [3.0, 1.0, 2.0][len(seen) - 1]}

    params = TrainParams(steps=6, batch_size=4, eval_interval=2)
    result = _fit(model, params, validate=validate)
    assert min(result.history, key=lambda row: row["validation_loss"])["step"] == 4
    assert _equal(_weights(model), seen[1])
    assert not model.training


def test_equal_runs_are_equal_to_the_bit_whatever_the_generators_held(make_model):
    params = TrainParams(steps=5, batch_size=4, keep="last")
    one, other = make_model(dropout=0.2), make_model(dropout=0.2)
    _fit(one, params)
    torch.rand(17)
    _fit(other, params)
    assert _equal(_weights(one), _weights(other))
    third = make_model(dropout=0.2)
    _fit(third, TrainParams(steps=5, batch_size=4, keep="last", seed=4))
    assert not _equal(_weights(one), _weights(third))


def test_each_pass_of_each_step_draws_numbers_of_its_own(make_model):
    draws = []

    def loss(model, batch):
        draws.append(torch.rand(()).item())
        return lm_loss_sum(model, batch)

    data = WindowDataset(_tokens(), 16, 16)
    params = TrainParams(steps=5, batch_size=2, accumulation=3, keep="last")
    options = {"train": data, "validate": lambda _: {"validation_loss": 0.0}}
    fit(make_model(), params=params, loss=loss, **options)
    assert len(set(draws)) == len(draws) == 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_continues_to_the_same_bits_and_the_same_curve(
    make_model, tmp_path, number, accumulation
):
    params = TrainParams(steps=12, batch_size=2, accumulation=accumulation, eval_interval=5)
    straight = make_model(dropout=0.1)
    expected = _fit(straight, params)

    for stop_at in (1, 5, 8):
        model = make_model(dropout=0.1)

        def interrupt(event, stop_at=stop_at):
            if isinstance(event, Metrics) and event.step == stop_at:
                os.kill(os.getpid(), number)

        folder = tmp_path / str(stop_at)
        with pytest.raises(Interrupted, match=f"stopped after step {stop_at} of 12") as stopped:
            _fit(model, params, state=folder, log=interrupt)
        assert stopped.value.signal == number
        heard = []
        again = make_model(seed=99, dropout=0.1)
        result = _fit(again, params, state=folder, log=heard.append)
        assert _equal(_weights(again), _weights(straight))
        assert result.history == expected.history
        assert Message(f"train: continuing from step {stop_at} of 12") in heard
        steps = [e.step for e in heard if isinstance(e, Metrics) and "train_loss" in e.values]
        assert steps == list(range(stop_at + 1, 13))


def test_a_run_that_was_killed_continues_from_its_last_state(make_model, tmp_path):
    params = TrainParams(steps=9, batch_size=2, eval_interval=4)
    straight = make_model()
    _fit(straight, params)

    _killed_at(7, make_model, params, tmp_path)
    assert Checkpoints(tmp_path).newest() == 4
    again = make_model(seed=5)
    _fit(again, params, state=tmp_path)
    assert _equal(_weights(again), _weights(straight))


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(make_model):
    model = make_model()
    with torch.no_grad():
        model.wte.weight[3] = math.inf
    with pytest.raises(RunError, match=r"the loss is nan .* at step 1, on row .*; lower the"):
        _fit(model, TrainParams(steps=3, batch_size=8))


def test_a_loss_that_is_not_finite_names_its_rows_and_keeps_the_last_good_state(
    make_model, tmp_path
):
    responses = [*[[3, 4]] * 15, [250, 251]]  # one row spoils whatever sees it
    data = InstructionDataset([[([1, 2], each)] for each in responses], end=256)
    model = make_model(tie_weights=False)
    with torch.no_grad():
        model.wte.weight[250] = math.nan
    params = TrainParams(steps=4, batch_size=2, accumulation=2, eval_interval=1, seed=2)
    with pytest.raises(RunError) as caught:
        _fit(model, params, data, state=tmp_path, origin="record {}".format)
    message = str(caught.value)
    step = int(message.partition("at step ")[2].partition(",")[0])
    assert step > 1, "another seed, please: there is no good state to be kept"
    assert "record 15" in message
    assert message.count("record") == 2, "the rows of the pass that is not finite, no others"
    assert message.endswith(f"The state of step {step - 1} is kept.")
    kept = Checkpoints(tmp_path).load()
    assert kept["loop"]["step"] == step - 1
    assert kept["model"]["lm_head.weight"].isfinite().all()


def test_a_step_of_many_passes_is_given_up_when_it_is_stopped(make_model, tmp_path):
    """A signal does not wait for the other passes; the step is taken anew, from its beginning."""
    params = TrainParams(steps=4, batch_size=2, accumulation=4, eval_interval=4)
    straight = make_model(dropout=0.1)
    _fit(straight, params)
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == 11:  # the third pass of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return lm_loss_sum(model, batch)

    data = WindowDataset(_tokens(), 16, 16)
    options = {"params": params, "train": data, "validate": lambda _: {"validation_loss": 0.0}}
    with pytest.raises(Interrupted, match="train stopped within step 3 of 4; its state is saved"):
        fit(make_model(dropout=0.1), loss=loss, state=tmp_path, **options)
    assert calls == 11
    heard = []
    again = make_model(seed=9, dropout=0.1)
    fit(again, loss=loss, state=tmp_path, log=heard.append, **options)
    assert heard[0] == Message("train: continuing from step 2 of 4")
    assert _equal(_weights(again), _weights(straight))


def test_pytorchs_generator_is_part_of_the_state(make_model, tmp_path):
    """A validation that draws numbers draws the same ones in a run that was stopped."""
    params = TrainParams(steps=6, batch_size=2, eval_interval=2)

    def validate(model):
        return {"validation_loss": 1.0, "drawn": torch.rand(()).item()}

    torch.manual_seed(1)
    expected = _fit(make_model(), params, validate=validate).history

    def interrupt(event):
        if isinstance(event, Metrics) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        _fit(make_model(), params, validate=validate, state=tmp_path, log=interrupt)
    assert _fit(make_model(), params, validate=validate, state=tmp_path).history == expected


def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_room(
    make_model, tmp_path, monkeypatch
):
    params = TrainParams(steps=8, batch_size=2, eval_interval=2)
    straight = make_model()
    _fit(straight, params)
    write = checkpoint._save
    written = []

    def full(state, file):
        written.append(state)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(state, file)

    monkeypatch.setattr(checkpoint, "_save", full)
    with pytest.raises(RunError, match=r"the state of step 6 could not .* goes on from step 4"):
        _fit(make_model(), params, state=tmp_path)
    again = make_model(seed=5)
    _fit(again, params, state=tmp_path)
    assert _equal(_weights(again), _weights(straight))


def test_the_best_weights_from_before_a_stop_are_those_it_ends_with(make_model, tmp_path):
    params = TrainParams(steps=8, batch_size=2, eval_interval=2)
    losses = iter([1.0, 2.0, 3.0, 2.5])
    options = {"validate": lambda _: {"validation_loss": next(losses)}, "state": tmp_path}
    best = {}

    def interrupt(event):
        if isinstance(event, Metrics) and event.step == 3:
            best.update(_weights(model))  # a step past the best: only what was kept can be right
            os.kill(os.getpid(), signal.SIGTERM)

    model = make_model()
    with pytest.raises(Interrupted):
        _fit(model, params, log=interrupt, **options)
    kept = Checkpoints(tmp_path).load()["best"]
    again = make_model(seed=5)
    history = _fit(again, params, **options).history
    assert min(history, key=lambda row: row["validation_loss"])["step"] == 2
    assert _equal(_weights(again), kept)
    assert not _equal(kept, best)


def test_a_state_that_is_slow_to_write_is_that_of_its_step(make_model, tmp_path, monkeypatch):
    """It is written beside the next step, which must not change it."""
    params = TrainParams(
        steps=8, batch_size=2, eval_interval=8, checkpoint_seconds=1e-9, learning_rate=1e-2
    )
    straight = make_model()
    _fit(straight, params)
    write = checkpoint._save

    def slow(state, file):
        time.sleep(0.1)
        write(state, file)

    monkeypatch.setattr(checkpoint, "_save", slow)
    _killed_at(5, make_model, params, tmp_path)
    assert Checkpoints(tmp_path).newest() == 4
    again = make_model(seed=5)
    _fit(again, params, state=tmp_path)
    assert _equal(_weights(again), _weights(straight))


def test_a_spike_warns_once(make_model):
    heard = []
    seen = 0

    def loss(model, batch):
        nonlocal seen
        seen += 1
        summed, n = lm_loss_sum(model, batch)
        return summed * (5 if seen == 31 else 1), n

    data = WindowDataset(_tokens(), 16, 16)
    params = TrainParams(steps=40, batch_size=2, learning_rate=1e-5)
    fit(
        make_model(),
        params=params,
        train=data,
        loss=loss,
        validate=lambda _: {"validation_loss": 0.0},
        log=heard.append,
    )
    (warning,) = [e for e in heard if isinstance(e, Message)]
    assert warning.level == "warning"
    assert re.fullmatch(
        r"train: the loss of step 31 is \d+\.\d+, [45]\.\d times the usual; if it does not come "
        "down again, lower the learning rate",
        warning.text,
    )
    assert [e.step for e in heard if isinstance(e, Metrics) and "loss_spike" in e.values] == [31]


def test_patience_ends_the_run_early_with_the_best_weights(make_model, tmp_path):
    losses = [3.0, 1.0, 2.0, 1.5, 0.5]
    params = TrainParams(steps=20, batch_size=2, eval_interval=2, patience=2)

    def run(model, log=lambda event: None, state=None):
        seen = []

        def validate(model):
            seen.append(_weights(model))
            return {"validation_loss": losses[len(seen) - 1]}

        return _fit(model, params, validate=validate, log=log, state=state), seen

    heard = []
    model = make_model()
    result, seen = run(model, heard.append, tmp_path)
    assert result.steps == 8
    assert [row["step"] for row in result.history] == [2, 4, 6, 8]
    assert _equal(_weights(model), seen[1])
    assert (
        Message(
            "train: no lower validation loss in 2 evaluations; stopped early, after step 8 of 20"
        )
        in heard
    )
    # one that was killed between its end and what comes after does not train on
    again, seen = run(make_model(seed=4), state=tmp_path)
    assert (again.steps, len(seen)) == (8, 0)


def test_norms_are_measured_at_each_evaluation(make_model):
    model = make_model()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    result = _fit(model, TrainParams(steps=1, batch_size=2, keep="last", learning_rate=1e-2))
    end = torch.cat([p.detach().flatten() for p in model.parameters()])
    (row,) = result.history
    assert row["param_norm"] == pytest.approx(end.norm().item(), rel=1e-5)
    assert row["update_ratio"] == pytest.approx(
        ((end - start).norm() / end.norm()).item(), rel=1e-4
    )


def test_compiled_blocks_learn_the_same(make_model, compiled):
    plain, translated = make_model(), make_model()
    params = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "eps": EPS, "keep": "last"}
    expected = _fit(plain, TrainParams(**params)).history
    torch.set_deterministic_debug_mode("warn")
    try:
        found = _fit(translated, TrainParams(**params, compile="on")).history
        assert torch._inductor.config.deterministic, "in the compiler too"
    finally:
        torch.use_deterministic_algorithms(False)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-3)
    for name, value in plain.state_dict().items():
        assert torch.allclose(translated.state_dict()[name], value, atol=1e-4), name
    assert all(block._compiled_call_impl is None for block in translated.h)


def test_each_step_and_each_evaluation_is_heard(make_model):
    heard = []
    _fit(
        make_model(),
        TrainParams(steps=4, batch_size=2, eval_interval=2),
        log=heard.append,
        sample=lambda _: "words",
    )
    train = [e for e in heard if isinstance(e, Metrics) and "train_loss" in e.values]
    assert [e.step for e in train] == [1, 2, 3, 4]
    assert set(train[0].values) == {
        "train_loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
    }
    assert [e.values["tokens"] for e in train] == [32, 64, 96, 128]
    assert [e.step for e in heard if isinstance(e, Metrics) and "validation_loss" in e.values] == [
        2,
        4,
    ]
    assert [e.name for e in heard if isinstance(e, Text)] == [
        "samples/step-000002.txt",
        "samples/step-000004.txt",
    ]


def test_ignored_targets_count_nothing(make_model):
    model = make_model()
    inputs = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(1))
    targets[0, :5] = IGNORED
    summed, n = lm_loss_sum(model, Batch(inputs, targets))
    expected = F.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert n == 7
    assert summed.item() == pytest.approx(expected.item(), abs=1e-4)


def test_no_rows_are_refused(make_model):
    with pytest.raises(InputError, match="there are no training rows"):
        _fit(make_model(), TrainParams(steps=1), WindowDataset(_tokens(10), 16, 16))
