"""The model gives what the reference implementation gives."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt.config import GPT2_SIZES, GPTConfig
from gpt.errors import InputError
from gpt.model import GPT, GPTClassifier

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


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_logits_loss_and_every_gradient_equal_the_reference(config):
    torch.manual_seed(1)
    model = GPT(config)
    reference = _reference(model)
    idx = torch.randint(0, config.vocab_size, (3, config.context_length))
    logits, theirs = model(idx), reference(idx).logits
    assert torch.allclose(logits, theirs, atol=1e-4)

    def loss(values: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(values[:, :-1].flatten(0, 1), idx[:, 1:].flatten())

    assert abs(loss(logits).item() - loss(theirs).item()) < 1e-5
    loss(logits).backward()
    loss(theirs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        ours = gradients[name.removeprefix("transformer.")]
        theirs_grad = parameter.grad.t() if ours.shape != parameter.grad.shape else parameter.grad
        if ours.dim() == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
            theirs_grad = parameter.grad.t()
        scale = theirs_grad.abs().max().item() or 1.0
        assert (ours - theirs_grad).abs().max().item() <= 1e-4 * scale, name


def test_classifier_logits_equal_the_reference_on_right_padded_rows():
    torch.manual_seed(2)
    config = SHAPES[1]
    model = GPTClassifier(config, ["a", "b", "c"]).eval()
    padding = config.vocab_size - 1
    reference = _reference(model, num_labels=3, pad_token_id=padding)
    lengths = torch.tensor([20, 7, 1])
    idx = torch.randint(0, padding, (3, 20))
    for row, length in zip(idx, lengths, strict=True):
        row[length:] = padding
    assert torch.allclose(model(idx, lengths), reference(idx).logits, atol=1e-4)


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
