"""The model gives what the reference implementation gives."""

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt.base.errors import InputError
from gpt.batches.data import Batch
from gpt.batches.metrics import lm_loss_sum
from gpt.model.config import GPT2_SIZES, GPTConfig
from gpt.model.model import GPT, GPTClassifier

SHAPES = [
    GPTConfig(vocab_size=97, context_length=32, n_layer=2, n_head=2, n_embd=16),
    GPTConfig(vocab_size=300, context_length=48, n_layer=3, n_head=4, n_embd=48),
    GPTConfig(vocab_size=64, context_length=16, n_layer=1, n_head=1, n_embd=8, tie_weights=False),
]


def _reference(model: GPT | GPTClassifier, **extra: object) -> torch.nn.Module:
    """The same weights in `transformers`, carried over by name without our own file format."""
    config = model.config
    reference_config = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        tie_word_embeddings=config.tie_weights,
        **extra,
    )
    kind = GPT2LMHeadModel if isinstance(model, GPT) else GPT2ForSequenceClassification
    reference = kind(reference_config)
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            value = ours[name.removeprefix("transformer.")]
            matrix = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and value.dim() == 2
            parameter.copy_(value.t() if matrix else value)
    return reference.eval()


def _random_config(seed: int) -> GPTConfig:
    draw = random.Random(seed)
    n_head = draw.choice([1, 2, 3, 4, 6])
    return GPTConfig(
        vocab_size=draw.randrange(5, 400),
        # past the attention's block of 128 rows, at times
        context_length=draw.choice([draw.randrange(1, 40), draw.randrange(129, 300)]),
        n_layer=draw.randrange(1, 4),
        n_head=n_head,
        n_embd=n_head * draw.choice([1, 3, 8, 16]),
        tie_weights=draw.random() < 0.7,
    )


def _reference_name_and_value(name: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A tensor of the reference under our name and in our layout."""
    matrix = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and value.dim() == 2
    return name.removeprefix("transformer."), value.t() if matrix else value


def _adamw_in_the_middle_of_a_run(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with moments as after 100 steps, equal for equal gradients.

    Its first step of all is lr x sign(gradient), also where a gradient is nothing but rounding.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        mean_square = parameter.grad.square().mean().item()
        optimizer.state[parameter] = {
            "step": torch.tensor(100.0),
            "exp_avg": torch.full_like(parameter, mean_square**0.5 / 2),
            "exp_avg_sq": torch.full_like(parameter, mean_square + 1e-16),
        }
    return optimizer


def _assert_a_step_equals_the_reference(config: GPTConfig, rows: int, length: int) -> None:
    """Logits, loss, every gradient, and the weights after a step of AdamW."""
    model = GPT(config)
    reference = _reference(model)
    idx = torch.randint(0, config.vocab_size, (rows, length))
    targets = torch.randint(0, config.vocab_size, (rows, length))
    logits = reference(idx).logits
    with torch.no_grad():
        assert torch.allclose(model(idx), logits, atol=1e-4)
    summed, n = lm_loss_sum(model, Batch(idx, targets))
    loss = summed / n
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    expected.backward()
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        name, theirs = _reference_name_and_value(name, parameter.grad)
        # a gradient that is nothing but rounding has no relative error
        scale = max(theirs.abs().max().item(), 1e-6)
        assert (ours[name].grad - theirs).abs().max().item() <= 1e-4 * scale, name
    _adamw_in_the_middle_of_a_run(model).step()
    _adamw_in_the_middle_of_a_run(reference).step()
    for name, parameter in reference.named_parameters():
        name, theirs = _reference_name_and_value(name, parameter)
        assert torch.allclose(ours[name], theirs, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("seed", range(12))
def test_logits_loss_gradients_and_a_step_equal_the_reference(seed):
    torch.manual_seed(seed)
    config = _random_config(seed)
    _assert_a_step_equals_the_reference(config, 3, config.context_length)


def test_at_124m_logits_loss_gradients_and_a_step_equal_the_reference():
    torch.manual_seed(0)
    _assert_a_step_equals_the_reference(GPT2_SIZES["124M"], 2, 140)


@pytest.mark.parametrize("seed", range(6))
def test_classifier_logits_equal_the_reference_on_right_padded_rows(seed):
    torch.manual_seed(seed)
    config = _random_config(seed)
    model = GPTClassifier(config, ["a", "b", "c"]).eval()
    padding = config.vocab_size - 1
    reference = _reference(model, num_labels=3, pad_token_id=padding)
    longest = config.context_length
    lengths = torch.tensor([longest, 1, *torch.randint(1, longest + 1, (3,)).tolist()])
    idx = torch.randint(0, padding, (5, longest))
    for row, length in zip(idx, lengths, strict=True):
        row[length:] = padding
    assert torch.allclose(model(idx, lengths), reference(idx).logits, atol=1e-4)


def test_at_124m_the_classifier_equals_the_reference():
    torch.manual_seed(0)
    model = GPTClassifier(GPT2_SIZES["124M"], ["ham", "spam"]).eval()
    reference = _reference(model, num_labels=2, pad_token_id=50256)
    lengths = torch.tensor([60, 11, 1])
    idx = torch.randint(0, 50256, (3, 60))
    for row, length in zip(idx, lengths, strict=True):
        row[length:] = 50256
    with torch.no_grad():
        assert torch.allclose(model(idx, lengths), reference(idx).logits, atol=1e-4)


def _padded(config: GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([9, 20, 1, 14])
    return torch.randint(0, config.vocab_size, (4, 20)), lengths


@pytest.mark.parametrize("depth", range(4))
def test_trunk_and_top_are_the_whole_classifier_wherever_it_is_cut(depth):
    """Its logits, and the gradients of what is above the cut."""
    torch.manual_seed(7)
    model = GPTClassifier(SHAPES[1], ["a", "b", "c"])
    idx, lengths = _padded(SHAPES[1])
    whole = model(idx, lengths)
    top = model.top(depth)
    ids_of_top = {id(parameter) for parameter in top.parameters()}
    above = [name for name, parameter in model.named_parameters() if id(parameter) in ids_of_top]
    parameters = [dict(model.named_parameters())[name] for name in above]
    expected = torch.autograd.grad(whole.square().sum(), parameters)
    with torch.no_grad():
        features = model.trunk(idx, lengths, depth)
    assert len(features) == (4 if depth == 3 else lengths.sum())
    here = top(features, lengths if depth < 3 else torch.ones(4, dtype=torch.int64))
    assert torch.allclose(here, whole, atol=1e-5)
    for name, ours, theirs in zip(
        above, torch.autograd.grad(here.square().sum(), parameters), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4), name


def test_the_last_position_alone_is_what_the_whole_block_gives_there():
    torch.manual_seed(8)
    model = GPTClassifier(SHAPES[1], ["a", "b"])
    block = model.h[0]
    x = torch.randn(4, 20, 48)
    _, lengths = _padded(SHAPES[1])
    whole = block(x, None, None)[torch.arange(4), lengths - 1]
    real = torch.cat([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)])
    assert torch.allclose(block.last(real, lengths), whole, atol=1e-5)


def test_padding_on_the_right_changes_no_class():
    torch.manual_seed(3)
    model = GPTClassifier(SHAPES[0], ["a", "b"]).eval()
    idx = torch.randint(0, 97, (1, 9))
    padded = F.pad(idx, (0, 11), value=5)
    assert torch.allclose(model(idx), model(padded, torch.tensor([9])), atol=1e-6)


def test_a_position_never_sees_what_follows_it():
    torch.manual_seed(4)
    model = GPT(SHAPES[0]).eval()
    idx = torch.randint(0, 97, (1, 20))
    changed = idx.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 97
    assert torch.equal(model(idx)[:, :12], model(changed)[:, :12])


LONG = 160
"""A context longer than a block of the attention."""


def _packed() -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """A row of three documents, the number of each position's, and where they are."""
    sizes = [50, 90, 20]
    documents = torch.repeat_interleave(torch.tensor([3, 0, 7]), torch.tensor(sizes))[None]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return torch.randint(0, 97, (1, 160)), documents, places


@pytest.mark.parametrize("gradients", [True, False], ids=["blocks", "fused"])
def test_no_position_sees_another_document(make_model, gradients):
    model = make_model(context_length=LONG)
    idx, documents, (first, *others) = _packed()
    changed = idx.clone()
    changed[0, first] = (changed[0, first] + 1) % 97
    with torch.set_grad_enabled(gradients):
        logits, after = model(idx, documents=documents), model(changed, documents=documents)
        for place in others:
            assert torch.equal(logits[:, place], after[:, place])
            assert not torch.allclose(model(idx)[:, place], model(changed)[:, place], atol=1e-4)


def test_a_later_document_sends_no_gradient_to_an_earlier_ones_tokens(make_model):
    model = make_model(context_length=LONG)
    model.wte.weight.register_hook(lambda gradient: seen.append(gradient.abs().sum(1) > 0))
    seen: list[torch.Tensor] = []
    _, documents, (_, second, _) = _packed()
    idx = documents * 10  # each document has a token of its own: 30, 0, 70
    model.hidden(idx, documents=documents)[0, second].square().sum().backward()
    assert seen[0].nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("gradients", [True, False], ids=["blocks", "fused"])
def test_a_packed_document_has_the_logits_that_it_has_alone(make_model, gradients):
    model = make_model(context_length=LONG)
    idx, documents, places = _packed()
    with torch.set_grad_enabled(gradients):
        packed = model(idx, documents=documents)
        for place in places:
            assert torch.allclose(packed[:, place], model(idx[:, place]), atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False], ids=["blocks", "fused"])
def test_documents_go_on_from_the_opening_of_their_row(make_model, gradients):
    """And from nothing else: each has the logits that it has alone behind the opening."""
    model = make_model(context_length=LONG)
    idx, documents, (opening, *places) = _packed()
    documents = torch.where(documents == 3, -1, documents)
    alone = [model(torch.cat([idx[:, opening], idx[:, place]], 1)) for place in places]
    with torch.set_grad_enabled(gradients):
        packed = model(idx, documents=documents)
    assert torch.allclose(packed[:, opening], model(idx[:, opening]), atol=1e-5)
    for place, expected in zip(places, alone, strict=True):
        assert torch.allclose(packed[:, place], expected[:, opening.stop :], atol=1e-5)


def test_packed_documents_give_the_loss_and_the_gradients_that_they_give_alone(make_model):
    model = make_model(context_length=LONG)
    idx, documents, places = _packed()
    targets = torch.randint(0, 97, (1, 160))
    targets[0, 45:55] = -100
    parameters = list(model.parameters())
    packed, n = lm_loss_sum(model, Batch(idx, targets, documents=documents))
    alone = [lm_loss_sum(model, Batch(idx[:, place], targets[:, place])) for place in places]
    total = sum(loss for loss, _ in alone)
    assert n == sum(n for _, n in alone) == 150
    assert torch.allclose(packed, total, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(packed, parameters),
        torch.autograd.grad(total, parameters),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_one_document_is_a_row_without_documents(make_model):
    model = make_model(context_length=LONG)
    idx = torch.randint(0, 97, (2, 160))
    documents = torch.tensor([[4], [0]]).expand(2, 160)
    assert torch.allclose(model(idx, documents=documents), model(idx), atol=1e-5)


def test_the_cache_changes_no_logit():
    torch.manual_seed(5)
    model = GPT(SHAPES[1]).eval()
    idx = torch.randint(0, 300, (2, 30))
    cache = model.new_cache(2)
    parts = [model(piece, cache=cache) for piece in idx.split([12, 1, 9, 8], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), model(idx), atol=1e-5)


def test_padding_on_the_left_changes_no_logit():
    torch.manual_seed(6)
    model = GPT(SHAPES[1]).eval()
    idx = torch.randint(0, 300, (2, 10))
    padded = F.pad(idx, (4, 0))
    logits = model(padded, padding=torch.tensor([4, 4]))
    assert torch.allclose(logits[:, 4:], model(idx), atol=1e-5)
    assert not logits.isnan().any()


def test_text_longer_than_the_context_is_refused():
    model = GPT(SHAPES[0])
    with pytest.raises(InputError, match=r"33 tokens long .* holds 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"qkv_bias": False, "tie_weights": False}, 163_009_536),
        ({"qkv_bias": False}, 124_412_160),
        ({}, 124_439_808),
    ],
)
def test_124m_has_the_published_number_of_parameters(changes, parameters):
    from dataclasses import asdict

    # the book's counts are at a context of 1,024
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**asdict(GPT2_SIZES["124M"]), **changes}))
    assert model.n_params == parameters


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"5 heads do not divide the width n_embd = 16"):
        GPTConfig(n_head=5, n_embd=16)
