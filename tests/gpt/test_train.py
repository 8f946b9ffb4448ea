"""One loop: its steps are those of the formula, and stopping changes nothing."""

import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt.checkpoint import load_state
from gpt.data import IGNORED, Batch, InstructionDataset, WindowDataset
from gpt.errors import InputError, RunError
from gpt.events import Message, Metrics, Text
from gpt.metrics import lm_loss_sum, mean_loss
from gpt.train import (
    Interrupted,
    TrainParams,
    fit,
    learning_rate_at,
    make_optimizer,
    train_step,
)

# A key's bias has no gradient but rounding, which Adam would blow up to a full step at its usual
# eps: where two ways of computing are compared, it is kept from doing so.
EPS = 1e-5


def _tokens(n=2000):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(3))


def _fit(model, params, train=None, **options):
    data = WindowDataset(_tokens(), 16, 16) if train is None else train
    loss = {"validation_loss": 0.0}

    def validate():
        loss["validation_loss"] = mean_loss(model, [data.collate([data[0], data[1]])])
        return dict(loss)

    options.setdefault("validate", validate)
    return fit(model, params=params, train=data, loss=lm_loss_sum, **options)


def _weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    params = TrainParams(steps=110, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate_at(step, params, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[109] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 49 / 99))
    assert rates[59] == pytest.approx(middle)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_a_constant_schedule_stays():
    params = TrainParams(steps=9, learning_rate=0.5, schedule="constant", warmup_steps=2)
    assert [learning_rate_at(s, params, 9) for s in (0, 1, 2, 8)] == [0.25, 0.5, 0.5, 0.5]


def test_only_matrices_decay_and_only_what_is_trainable_is_optimized(make_model):
    model = make_model()
    model.h[0].requires_grad_(False)
    decay, rest = make_optimizer(model, TrainParams(steps=1, weight_decay=0.3)).param_groups
    assert decay["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in rest["params"])
    optimized = {id(p) for p in decay["params"] + rest["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


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
    data = InstructionDataset([[1, 2, 3]] * 64, responses, end=256, max_length=48)
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
        train_step(model, make_optimizer(model, params), passes, lm_loss_sum, params)
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
        optimizer = make_optimizer(model, params)
        measured.append(train_step(model, optimizer, passes, lm_loss_sum, params))
        assert all(p.grad is None for p in model.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*measured, rtol=1e-2)
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    moved = (weights[0] - start).norm()
    assert (weights[0] - weights[1]).norm() < 0.1 * moved


def test_the_run_ends_with_the_weights_that_validate_best(make_model):
    model = make_model()
    seen = []

    def validate():
        seen.append(_weights(model))
        return {"validation_loss": [3.0, 1.0, 2.0][len(seen) - 1]}

    params = TrainParams(steps=6, batch_size=4, eval_interval=2)
    result = _fit(model, params, validate=validate)
    assert result.best["step"] == 4
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
        steps = [e.step for e in heard if isinstance(e, Metrics) and "loss/train" in e.values]
        assert steps == list(range(stop_at + 1, 13))


def test_a_run_that_was_killed_continues_from_its_last_state(make_model, tmp_path):
    params = TrainParams(steps=9, batch_size=2, eval_interval=4)
    straight = make_model()
    _fit(straight, params)

    class KilledError(Exception):
        pass

    def kill(event):
        if isinstance(event, Metrics) and event.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        _fit(make_model(), params, state=tmp_path, log=kill)
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 4
    again = make_model(seed=5)
    _fit(again, params, state=tmp_path)
    assert _equal(_weights(again), _weights(straight))


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(make_model):
    model = make_model()
    with torch.no_grad():
        model.wte.weight[3] = math.inf
    with pytest.raises(RunError, match=r"the loss is nan .* at step 0; lower the learning rate"):
        _fit(model, TrainParams(steps=3, batch_size=8))


def test_each_step_and_each_evaluation_is_heard(make_model):
    heard = []
    _fit(
        make_model(),
        TrainParams(steps=4, batch_size=2, eval_interval=2),
        log=heard.append,
        sample=lambda: "words",
    )
    train = [e for e in heard if isinstance(e, Metrics) and "loss/train" in e.values]
    assert [e.step for e in train] == [1, 2, 3, 4]
    assert set(train[0].values) == {
        "loss/train",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
    }
    assert [e.values["tokens"] for e in train] == [32, 64, 96, 128]
    assert [e.step for e in heard if isinstance(e, Metrics) and "loss/validation" in e.values] == [
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "steps, epochs: give exactly one"),
        ({"steps": 1, "epochs": 1}, "steps, epochs: give exactly one"),
        ({"steps": 1, "learning_rate": 1e-4, "min_learning_rate": 1e-3}, "is above learning_rate"),
        ({"steps": 1, "learning_rate": 0}, "greater than 0"),
        ({"steps": 1, "batch_size": 0}, "greater than 0"),
        ({"steps": 1, "learn_rate": 1}, "[Uu]nexpected keyword"),
    ],
)
def test_an_impossible_recipe_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainParams(**values)


def test_no_rows_are_refused(make_model):
    with pytest.raises(InputError, match="there are no training rows"):
        _fit(make_model(), TrainParams(steps=1), WindowDataset(_tokens(10), 16, 16))
