"""What a run is told: schedules, optimizers, and what is refused."""

import math
from itertools import pairwise

import pytest
import torch

from gpt.train.recipe import TrainParams, learning_rate_at, make_optimizers, set_learning_rate


def rates(steps, **options):
    params = TrainParams(steps=steps, **options)
    return [learning_rate_at(step, params, steps) for step in range(steps)]


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    found = rates(110, learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert found[109] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 49 / 99))
    assert found[59] == pytest.approx(middle)
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_a_constant_schedule_stays():
    found = rates(9, learning_rate=0.5, schedule="constant", warmup_steps=2)
    assert found == [0.25, *[0.5] * 8]


def test_a_linear_schedule_falls_in_equal_steps():
    options = {"learning_rate": 1.0, "min_learning_rate": 0.5, "warmup_steps": 1}
    assert rates(6, schedule="linear", **options) == pytest.approx(
        [1.0, 1.0, 0.875, 0.75, 0.625, 0.5]
    )


def test_warm_up_stable_decay_is_flat_and_then_falls_in_equal_steps():
    found = rates(
        20,
        schedule="wsd",
        learning_rate=1.0,
        min_learning_rate=0.2,
        warmup_steps=4,
        decay_share=0.2,
    )
    assert found == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 13, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_short_run_has_rates_too(schedule, steps):
    found = rates(steps, schedule=schedule, learning_rate=1.0, min_learning_rate=0.1)
    assert all(0.1 - 1e-9 <= rate <= 1.0 for rate in found)
    assert found[-1] == pytest.approx(0.1) or steps == 1


def test_only_matrices_decay_and_only_what_is_trainable_is_optimized(make_model):
    model = make_model()
    model.h[0].requires_grad_(False)
    (adamw,) = make_optimizers(model, TrainParams(steps=1, weight_decay=0.3))
    decay, rest = adamw.param_groups
    assert decay["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in rest["params"])
    optimized = {id(p) for p in decay["params"] + rest["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(make_model):
    model = make_model()
    adamw, muon = make_optimizers(model, TrainParams(steps=1, optimizer="muon", weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert of_muon == {
        f"h.{layer}.{matrix}.weight"
        for layer in range(len(model.h))
        for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert sorted([*of_muon, *of_adamw]) == sorted(names.values())
    assert muon.param_groups[0]["weight_decay"] == 0.3


def test_each_optimizer_gets_its_share_of_the_rate(make_model):
    params = TrainParams(steps=1, optimizer="muon", learning_rate=1e-3, muon_learning_rate=4e-3)
    adamw, muon = optimizers = make_optimizers(make_model(), params)
    set_learning_rate(optimizers, 5e-4)
    assert {group["lr"] for group in adamw.param_groups} == {5e-4}
    assert muon.param_groups[0]["lr"] == pytest.approx(2e-3)


def test_a_step_of_muon_is_as_large_as_one_of_adamw(make_model):
    """Which is why one learning rate serves both (Liu et al., 2025)."""
    model = make_model()
    _, muon = make_optimizers(model, TrainParams(steps=1, optimizer="muon", weight_decay=0.0))
    before = [p.detach().clone() for p in muon.param_groups[0]["params"]]
    set_learning_rate([muon], 1e-3)
    generator = torch.Generator().manual_seed(0)
    for p in muon.param_groups[0]["params"]:
        p.grad = torch.randn(p.shape, generator=generator)
    muon.step()
    for p, old in zip(muon.param_groups[0]["params"], before, strict=True):
        assert 0.1e-3 < (p - old).square().mean().sqrt() < 0.3e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "steps, epochs: give exactly one"),
        ({"steps": 1, "epochs": 1}, "steps, epochs: give exactly one"),
        ({"steps": 1, "learning_rate": 1e-4, "min_learning_rate": 1e-3}, "is above learning_rate"),
        ({"steps": 1, "learning_rate": 0}, "greater than 0"),
        ({"steps": 1, "batch_size": 0}, "greater than 0"),
        ({"steps": 1, "devices": 0}, "greater than 0"),
        ({"steps": 1, "devices": "all"}, "auto"),
        ({"steps": 1, "schedule": "step"}, "'cosine', 'linear', 'constant' or 'wsd'"),
        ({"steps": 1, "optimizer": "sgd"}, "'adamw' or 'muon'"),
        ({"steps": 1, "decay_share": 0}, "greater than 0"),
        ({"steps": 1, "patience": 0}, "greater than 0"),
        ({"steps": 1, "learn_rate": 1}, "[Uu]nexpected keyword"),
    ],
)
def test_an_impossible_recipe_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainParams(**values)
