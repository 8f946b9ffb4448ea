"""What is counted is what is there: parameters, saved tensors, optimizer state, operations."""

from dataclasses import replace

import pytest
import torch

from gpt import estimate
from gpt.batches.data import Batch, take
from gpt.batches.metrics import class_loss_sum, lm_loss_sum
from gpt.estimate import ACCELERATORS, Counts, Memory, Shape
from gpt.model.attention import causal_attention
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.device import autocast
from gpt.model.loss import linear_cross_entropy
from gpt.model.model import GPT, GPTClassifier
from gpt.train.recipe import TrainParams, make_optimizers
from gpt.tune.lora import LoraParams, wrap
from gpt.tune.preference import PreferenceDataset, PreferenceLoss
from stages.finetune_classifier import freeze

BASE = {"vocab_size": 500, "context_length": 96, "n_layer": 3, "n_head": 4, "n_embd": 64}
CPU = torch.device("cpu")
ARCHITECTURES = [
    {},
    {"dropout": 0.1},
    {"tie_weights": False, "qkv_bias": False},
    {"context_length": 300},  # more than one block of queries, the last one smaller
    {"n_layer": 1},
]
LORAS = {
    "lora": LoraParams(rank=4),
    "lora of some": LoraParams(rank=4, layers=("query", "value"), dropout=0.1),
    "lora of the last": LoraParams(rank=8, layers=("attn.c_attn", "mlp.c_fc", "head"), blocks=1),
    "lora of the head": LoraParams(rank=8, layers=("head",)),
}
CHOICES = {
    "all": (None, None),
    "last_block": (1, None),
    "last_blocks": (2, None),
    "head": (0, None),
    **{name: (None, lora) for name, lora in LORAS.items()},
}
RECIPE = TrainParams(steps=1)


def language_model(config, trained="all"):
    """A model and its counts; `lora` is without an adapter of the head, which is tied here."""
    model = GPT(config)
    if trained != "all":
        lora = LORAS[trained]
        layers = tuple(name for name in lora.layers if name != "head")
        wrap(model, replace(lora, layers=layers))
    return model, Counts(model)


def classifier(config, trained, pooling="last"):
    """A model, how many blocks come before what is trained, and its counts."""
    model = GPTClassifier(config, ["ham", "spam"], pooling)
    depth = freeze(model, *CHOICES[trained])
    return model, depth, Counts(model)


def kept_bytes(model, batch, loss, precision):
    """The storages that autograd keeps of a forward pass, each once, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    model.train()
    with (
        autocast(CPU, precision),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


def windows(config, rows=4):
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, config.context_length + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def texts(config):
    T = config.context_length
    lengths = torch.tensor([T, T // 2, T // 3, T // 2])
    batch = Batch(windows(config).inputs, torch.tensor([0, 1, 0, 1]), lengths)
    return batch, Shape(rows=4, length=T, tokens=int(lengths.sum()), targets=4)


@pytest.mark.parametrize("trained", CHOICES)
def test_what_is_frozen_and_what_is_adapted_is_told_apart(trained):
    model, depth, counts = classifier(GPTConfig(**BASE), trained)
    assert counts.depth == depth
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.block == Counts(GPT(model.config)).block
    assert (counts.adapters > 0) == (trained in LORAS)


def test_the_published_sizes_are_those_of_their_names():
    with torch.device("meta"):
        counts = {name: Counts(GPT(config)) for name, config in GPT2_SIZES.items()}
        untied = Counts(GPT(replace(GPT2_SIZES["124M"], tie_weights=False)))
    for name, each in counts.items():
        assert each.parameters / 1e6 == pytest.approx(float(name[:-1]), rel=0.01)
    # what is only looked up is in no product
    assert untied.multiplied == counts["124M"].multiplied


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_activations_of_a_language_model_are_those_that_autograd_keeps(changes, precision):
    config = GPTConfig(**{**BASE, **changes})
    batch = windows(config)
    shape = Shape.full(4, config.context_length)
    bf16 = precision == "bf16"
    model, counts = language_model(config)
    memory = estimate.lm_memory(counts, shape, train=RECIPE, bf16=bf16, kernel="blocked")
    counted = memory.activations + memory.copies + estimate.lm_loss_kept(counts, shape.targets)
    measured = kept_bytes(model, batch, lm_loss_sum, precision)
    assert counted == pytest.approx(measured, rel=0.05)


def test_targets_that_do_not_count_cost_no_logits():
    config = GPTConfig(**BASE)
    batch = windows(config)
    batch.targets[:, :80] = -100
    shape = replace(Shape.full(4, 96), targets=4 * 16)
    model, counts = language_model(config)
    counted = estimate.lm_activations(counts, shape, bf16=False, kernel="blocked")
    counted += estimate.lm_loss_kept(counts, shape.targets)
    assert counted == pytest.approx(kept_bytes(model, batch, lm_loss_sum, "fp32"), rel=0.05)


def pairs(config):
    """Two pairs whose prompts are 80 tokens; the last answer is shorter by half."""
    prompts = [list(range(80))] * 2
    chosen = [list(range(100, 115))] * 2
    rejected = [list(range(200, 200 + n)) for n in (15, 7)]
    data = PreferenceDataset(prompts, chosen, rejected, end=499)
    batch = take(data, [0, 1])
    return batch, Shape(rows=4, length=95, tokens=batch.n_tokens, targets=3 * 16 + 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trained", ["all", "lora", "lora of some", "lora of the last"])
@pytest.mark.parametrize("vocab_size", [500, 5000])
def test_what_preference_tuning_keeps_is_counted(trained, precision, vocab_size):
    config = GPTConfig(**{**BASE, "vocab_size": vocab_size})
    model, counts = language_model(config, trained)
    batch, shape = pairs(config)
    bf16 = precision == "bf16"
    memory = estimate.lm_memory(
        counts, shape, train=RECIPE, bf16=bf16, kernel="blocked", pairs=True
    )
    counted = memory.activations + estimate.pair_loss_kept(counts, shape.targets, bf16=bf16)
    counted += memory.copies
    measured = kept_bytes(model, batch, PreferenceLoss(), precision)
    assert counted == pytest.approx(measured, rel=0.1)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.gradients == 4 * own
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_pairs_takes_no_more_than_what_is_counted_for_it(precision):
    config = GPTConfig(**{**BASE, "vocab_size": 20_000, "n_layer": 1})
    model = GPT(config)
    batch, shape = pairs(config)
    with autocast(CPU, precision):
        loss, _ = PreferenceLoss()(model, batch)
    with torch.profiler.profile(profile_memory=True) as profiled, autocast(CPU, precision):
        again, _ = PreferenceLoss()(model, batch)
        again.backward()
    allocated = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    assert loss.item() == again.item()
    memory = estimate.lm_memory(
        Counts(model), shape, train=RECIPE, bf16=precision == "bf16", kernel="blocked", pairs=True
    )
    # the gradients come while it is freed; a tied head's is added to that of the embedding
    assert 0.9 * (memory.loss + memory.activations) < peak
    assert peak < memory.loss + memory.activations + 2 * memory.gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trained", CHOICES)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_activations_of_a_classifier_are_those_that_autograd_keeps(
    trained, precision, kept, pooling
):
    config = GPTConfig(**{**BASE, "n_layer": 3})
    model, depth, counts = classifier(config, trained, pooling)
    batch, shape = texts(config)
    top = model
    if kept and depth:
        with torch.no_grad(), autocast(CPU, precision):
            batch = replace(batch, inputs=model.trunk(batch.inputs, batch.lengths, depth))
        top = model.top(depth)
    bf16 = precision == "bf16"
    memory = estimate.classifier_memory(counts, shape, train=RECIPE, bf16=bf16, kernel="blocked")
    counted = memory.activations + (0 if "head" in trained else memory.copies)
    assert counted == pytest.approx(kept_bytes(top, batch, class_loss_sum, precision), rel=0.1)


@pytest.mark.parametrize(("vocab_size", "targets"), [(500, 384), (50257, 1500)])
def test_the_loss_takes_no_more_than_what_is_counted_for_it(vocab_size, targets):
    config = GPTConfig(**{**BASE, "vocab_size": vocab_size})
    C = config.n_embd
    hidden = torch.randn(targets, C, requires_grad=True)
    weight = torch.randn(vocab_size, C, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profiled:
        linear_cross_entropy(hidden, weight, torch.randint(vocab_size, (targets,)))
    allocated = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    counted = estimate.lm_loss_bytes(Counts(GPT(config)), targets, bf16=False)
    assert counted == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_is_two_numbers_a_parameter_and_one_for_muons_matrices(optimizer):
    config = GPTConfig(**BASE)
    model = GPT(config)
    recipe = replace(RECIPE, optimizer=optimizer)
    made = make_optimizers(model, recipe)
    lm_loss_sum(model, windows(config))[0].backward()
    state = 0
    for each in made:
        each.step()
        held = [value for kept in each.state.values() for value in kept.values()]
        state += sum(value.nbytes for value in held if value.numel() > 1)
    assert estimate.optimizer_bytes(Counts(model), recipe) == state


def test_a_cache_takes_what_it_is_counted_for():
    config = GPTConfig(**BASE)
    model, counts = language_model(config)
    cache = model.new_cache(3, 40)
    assert estimate.kv_cache_bytes(counts, 3, 40) == cache.keys.nbytes + cache.values.nbytes
    assert estimate.kv_cache_bytes(counts, 1, 500) == estimate.kv_cache_bytes(counts, 1, 96)


def test_the_kernel_of_a_graphics_card_keeps_no_probabilities():
    config = GPTConfig(**{**BASE, "context_length": 1024})
    shape = Shape.full(4, 1024)
    _, counts = language_model(config)
    blocked, fused = (
        estimate.lm_activations(counts, shape, bf16=False, kernel=kernel)
        for kernel in ("blocked", "fused")
    )
    probabilities = 4 * 3 * 4 * 4 * estimate.attention_probabilities(1024)
    logarithms = 4 * 3 * 4 * 4 * 1024
    assert blocked - fused == probabilities - logarithms
    qkv = torch.randn(1, 300, 3 * 64, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        causal_attention(qkv, 4)
    counted = 3 * qkv.nbytes // 3 + 4 * 4 * estimate.attention_probabilities(300)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == counted


# --- FLOPs ----------------------------------------------------------------------------------------


def test_flops_of_a_full_batch_are_the_usual_six_a_parameter_and_attention():
    _, counts = language_model(GPTConfig(**BASE))
    shape = Shape.full(4, 96)
    usual = 6 * counts.multiplied + 12 * 3 * 64 * 96
    assert estimate.step_flops(counts, shape) == pytest.approx(usual * shape.tokens, rel=0.001)


def test_flops_of_a_forward_pass_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(**BASE)
    model = GPT(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(windows(config).inputs)
    attention = 3 * 4 * 64 * 96 * 4 * 96  # of the fused kernel, which the counter passes over
    counted = estimate.forward_flops(Counts(model), Shape.full(4, 96)) - attention
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("trained", ["all", "lora of some", "lora of the last"])
def test_flops_of_a_training_step_are_those_that_torch_counts(trained):
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(**{**BASE, "n_layer": 4})
    model, counts = language_model(config, trained)
    with FlopCounterMode(display=False) as counter:
        model(windows(config).inputs).sum().backward()
    counted = estimate.step_flops(counts, Shape.full(4, 96))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_what_is_frozen_costs_a_forward_pass_or_nothing():
    config = GPTConfig(**BASE)
    shape = Shape(rows=4, length=96, tokens=300, targets=4)

    def flops(trained, kept):
        return estimate.classifier_flops(classifier(config, trained)[2], shape, kept=kept)

    frozen = estimate.trunk_flops(classifier(config, "all")[2], shape, 2)
    assert flops("last_block", kept=False) - flops("last_block", kept=True) == frozen
    assert flops("head", kept=True) < flops("last_block", kept=True) / 100
    assert flops("all", kept=False) > 3 * frozen


# --- devices --------------------------------------------------------------------------------------


def test_what_does_not_fit_on_one_device_is_spread_over_several():
    card = ACCELERATORS["h100"]
    parts = {"weights": 30, "gradients": 30, "optimizer": 60, "activations": 20, "best": 30}
    memory = Memory(**{name: size * 10**9 for name, size in parts.items()})
    assert memory.total == 170 * 10**9
    assert memory.sharded(2).total == 95 * 10**9
    assert estimate.devices_needed(memory, card) == 3
    assert estimate.devices_needed(Memory(weights=10**9), card) == 1
    # batches are not spread: no number of devices helps
    assert estimate.devices_needed(Memory(activations=90 * 10**9), card) is None


def test_a_device_without_bf16_works_in_fp32():
    assert ACCELERATORS["t4"].peak(bf16=True) == ACCELERATORS["t4"].fp32
    assert ACCELERATORS["h100"].peak(bf16=True) == 989.4e12
    assert ACCELERATORS["h100"].peak(bf16=False) == 67e12


def test_every_device_names_where_its_figures_come_from():
    for card in ACCELERATORS.values():
        assert card.source.startswith("https://")
        assert card.bf16 is None or card.bf16 > card.fp32
        assert 8e9 < card.memory < 200e9
