"""Preference tuning: the loss is that of the paper, the reference is asked once, rewards move."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt.batches.data import IGNORED, batches, take
from gpt.model.parallel import SharedModel
from gpt.train.loop import Pass, accumulate, fit
from gpt.train.recipe import TrainParams
from gpt.tune.lora import IN_BLOCKS, LoraParams, adapters, merge, wrap
from gpt.tune.preference import PreferenceDataset, PreferenceLoss, log_probs, preference_scores

END = 256
PROMPTS = [list(range(5 + i, 8 + 2 * i)) for i in range(8)]
"""Of unlike lengths."""
CHOSEN = [[100 + i, 101, 102][: 1 + i % 3] for i in range(8)]
REJECTED = [[200, 201 + i, 202, 203][: 2 + i % 3] for i in range(8)]


def pairs(**options):
    return PreferenceDataset(PROMPTS, CHOSEN, REJECTED, end=END, **options)


def all_of(data):
    return take(data, range(len(data)))


def with_references(data, model, **options):
    assert list(data.set_references(model, 3, **options)) == [3, 6, 8]
    return data


def naive(model, prompt, answer):
    """log p(answer and its end | prompt) a token at a time, from whole logits, in double."""
    ids = [*prompt, *answer, END]
    logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(logits[place - 1, ids[place]] for place in range(len(prompt), len(ids)))


@pytest.fixture
def policy(make_model):
    """Another model than the reference."""
    return make_model(seed=1)


@pytest.fixture
def reference(make_model):
    return make_model(seed=0)


# --- what is computed -----------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_answers_and_their_ends_alone(policy):
    with torch.no_grad():
        found = log_probs(policy, all_of(pairs()))
        by_token = log_probs(policy, all_of(pairs()), by_token=True)
        expected = torch.tensor(
            [
                [naive(policy, p, a) for p, a in zip(PROMPTS, answers, strict=True)]
                for answers in (CHOSEN, REJECTED)
            ]
        )
    assert found.shape == (2, 8)
    assert torch.allclose(found, expected.float(), atol=1e-4)
    lengths = torch.tensor([[len(a) + 1 for a in CHOSEN], [len(a) + 1 for a in REJECTED]])
    assert torch.allclose(by_token, expected.float() / lengths, atol=1e-4)


def test_only_the_answers_are_targets():
    batch = all_of(pairs())
    for row, (prompt, answer) in enumerate(zip(PROMPTS * 2, [*CHOSEN, *REJECTED], strict=True)):
        learnt = (batch.targets[row] != IGNORED).nonzero()[:, 0].tolist()
        first = len(prompt) - 1  # its last token predicts the first of the answer
        assert learnt == list(range(first, first + len(answer) + 1))
        assert batch.targets[row][learnt].tolist() == [*answer, END]
        assert batch.lengths[row] == len(prompt) + len(answer)


def test_padding_gets_no_gradient(make_model):
    """Of the embeddings those alone that a prompt or an answer asks for; `END` pads and asks."""
    model = make_model(tie_weights=False)
    loss, _ = PreferenceLoss()(model, all_of(with_references(pairs(), model)))
    loss.backward()
    moved = set(model.wte.weight.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert moved <= {token for row in (*PROMPTS, *CHOSEN, *REJECTED) for token in row}
    assert END not in moved


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("by_token", [False, True])
def test_the_loss_is_that_of_the_paper(policy, reference, label_smoothing, by_token):
    """Equation 7 of Rafailov et al. (2023), pair by pair; with smoothing equation 3 of cDPO."""
    beta = 0.3
    data = with_references(pairs(), reference, by_token=by_token)
    loss = PreferenceLoss(beta=beta, label_smoothing=label_smoothing, by_token=by_token)
    total, n = loss(policy, all_of(data))
    expected = 0.0
    with torch.no_grad():
        for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
            ratios = []
            for answer in (chosen, rejected):
                ratio = naive(policy, prompt, answer) - naive(reference, prompt, answer)
                ratios.append(ratio / (len(answer) + 1) if by_token else ratio)
            margin = beta * (ratios[0] - ratios[1])
            expected -= (1 - label_smoothing) * F.logsigmoid(margin)
            expected -= label_smoothing * F.logsigmoid(-margin)
    assert n == 8
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_naive_loss(policy, reference):
    data = with_references(pairs(), reference)
    total, _ = PreferenceLoss(beta=0.5)(policy, all_of(data))
    total.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    expected = 0.0
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        with torch.no_grad():
            before = naive(reference, prompt, chosen) - naive(reference, prompt, rejected)
        now = naive(policy, prompt, chosen) - naive(policy, prompt, rejected)
        expected = expected - F.logsigmoid(0.5 * (now - before))
    expected.backward()
    for name, parameter in policy.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-4), name


def test_scores_are_the_means_over_all_pairs(policy, reference):
    data = with_references(pairs(), reference)
    loss = PreferenceLoss(beta=0.3)
    scores = preference_scores(policy, batches(data, 3, by_length=True), loss)
    with torch.no_grad():
        rewards = loss.rewards(policy, all_of(data))
    margin = rewards[0] - rewards[1]
    assert scores == pytest.approx(
        {
            "loss": -F.logsigmoid(margin).mean().item(),
            "reward_margin": margin.mean().item(),
            "reward_accuracy": (margin > 0).float().mean().item(),
            "reward_chosen": rewards[0].mean().item(),
            "reward_rejected": rewards[1].mean().item(),
        },
        abs=1e-5,
    )
    assert 0 < scores["reward_accuracy"] < 1


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
def test_the_loss_starts_at_ln_2(make_model, by_token):
    """Whatever the batches are; dropout has no say where a model is measured."""
    model = make_model(dropout=0.3)
    data = with_references(pairs(), model, by_token=by_token)
    loss = PreferenceLoss(beta=0.5, by_token=by_token)
    for size in (1, 2, 8):
        scores = preference_scores(model, batches(data, size), loss)
        assert scores["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert scores["reward_margin"] == pytest.approx(0, abs=1e-5)


def test_the_reference_is_asked_once_and_not_at_every_step(make_model):
    """A step is one pass through one model, both answers of its pairs in it."""
    model = make_model()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append("a whole forward"))
    model.h[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    data = with_references(pairs(), model)
    assert seen == [6, 6, 4]  # rows: two a pair
    del seen[:]
    kept = data.references.clone()
    train(model, data, steps=5, eval_interval=100)
    assert seen == [8] * 5
    assert torch.equal(data.references, kept)


def train(model, data, log=lambda event: None, **changes):
    """On `data`, which is validated on too."""
    recipe = {"batch_size": 4, "steps": 30, "learning_rate": 1e-3, "threads": 1, "device": "cpu"}
    loss = PreferenceLoss(beta=0.1)
    # validation has no pass of its own here: what is counted is the steps'
    return fit(
        model,
        params=TrainParams(**{**recipe, **changes}),
        train=data,
        loss=loss,
        validate=lambda _: {"validation_loss": 0.0},
        log=log,
    )


# --- training -------------------------------------------------------------------------------------


def polite(i):
    """A prompt, a good answer and a bad one, which differ in the same way in every pair."""
    return [10 + i % 40, 60 + i // 40], [100 + i % 50, 7], [100 + i % 50, 9]


def test_the_margin_grows_on_pairs_that_are_held_out(make_model):
    model = make_model()
    train_part, held_out = (
        PreferenceDataset(*zip(*map(polite, rows), strict=True), end=END)
        for rows in (range(0, 64), range(64, 80))
    )
    for data in (train_part, held_out):
        list(data.set_references(model, 8))
    loss = PreferenceLoss(beta=0.1)

    def scores(model):
        return preference_scores(model, batches(held_out, 8), loss)

    curve = [scores(model)]
    fit(
        model,
        params=TrainParams(
            batch_size=8, steps=24, eval_interval=8, learning_rate=1e-3, threads=1, device="cpu"
        ),
        train=train_part,
        loss=loss,
        validate=lambda model: curve.append(scores(model)) or {"validation_loss": 0.0},
    )
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    margins = [each["reward_margin"] for each in curve]
    assert margins == sorted(margins)
    assert margins[-1] > 0.1 > abs(margins[0])
    assert curve[-1]["reward_accuracy"] == 1
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.05


def test_many_small_passes_give_the_gradient_of_one_large_one(policy, reference):
    data = with_references(pairs(), reference)
    params = TrainParams(steps=1, precision="fp32", device="cpu")
    gradients = []
    for size in (8, 3):
        policy.zero_grad()
        passes = [Pass(batch) for batch in batches(data, size)]
        losses = accumulate(SharedModel(policy), passes, PreferenceLoss(), params)
        gradients.append((losses.sum(), [p.grad.clone() for p in policy.parameters()]))
    (one, large), (other, small) = gradients
    assert one.item() == pytest.approx(other.item(), rel=1e-5)
    for a, b in zip(large, small, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_adapters_alone_are_trained_and_merged_afterwards(make_model):
    model = make_model()
    data = with_references(pairs(), model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrap(model, LoraParams(rank=4, layers=IN_BLOCKS))
    assert PreferenceLoss()(model, all_of(data))[0].item() / 8 == pytest.approx(math.log(2), 1e-6)
    PreferenceLoss()(model, all_of(data))[0].backward()
    with_gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradients == set(adapters(model))
    model.zero_grad()
    train(model, data)
    with torch.no_grad():
        apart = log_probs(model, all_of(data))
        merge(model)
        merged = log_probs(model, all_of(data))
    assert torch.allclose(apart, merged, atol=1e-4)
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert changed == {f"h.{i}.{name}" for i in range(2) for name in linear}


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_that_are_the_same_once_they_are_cut_are_left_out():
    prompts = [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1]]
    chosen = [[4], [4, 5, 6, 7], [4], [9, 9]]
    rejected = [[5], [4, 5, 6, 8], [5], [9, 9]]
    data = PreferenceDataset(prompts, chosen, rejected, end=END, max_length=5)
    # the second differs in its last token only, the third's prompt fills the row, the last is equal
    assert data.kept == [0]
    assert len(data) == len(data.lengths) == len(data.references) == 1


def test_both_answers_of_a_pair_are_in_one_batch():
    data = pairs()
    batch = data.collate([data[2], data[5]])
    for row, (i, answer) in enumerate([(2, CHOSEN), (5, CHOSEN), (2, REJECTED), (5, REJECTED)]):
        ids = [*PROMPTS[i], *answer[i]]
        assert batch.inputs[row, : len(ids)].tolist() == ids
    assert (batch.n_targets, batch.n_tokens) == (2, sum(batch.lengths.tolist()))
    assert data.lengths[2] == len(PROMPTS[2]) + max(len(CHOSEN[2]), len(REJECTED[2]))
