"""Texts are classified and scored one by one, in batches, and past the context's end."""

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from gpt.base.errors import InputError, RunError
from gpt.inference import classify, generate, score
from gpt.model.config import GPTConfig
from gpt.model.model import GPTClassifier
from gpt.tokens.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
TEXTS = ["Once upon a time", "", "a", "x" * 48, "y" * 49, "The end of it. " * 9]


def test_a_score_is_what_the_model_gives_each_token_that_follows(make_model):
    model = make_model()
    T = model.config.context_length
    found = score(model, BYTES, TEXTS, batch_size=4)
    for text, each in zip(TEXTS, found, strict=True):
        ids = [BYTES.eot, *BYTES.encode(text)]
        total = 0.0
        for place in range(1, len(ids)):
            # the window that predicts it: T more targets each, the last as far back as it reaches
            end = min(-(-place // T) * T, len(ids) - 1)
            seen = torch.tensor([ids[max(0, end - T) : place]])
            total += F.log_softmax(model(seen)[0, -1], 0)[ids[place]].item()
        assert each.tokens == len(text)
        assert each.log_likelihood == pytest.approx(total, rel=1e-5)
    assert found[1].perplexity == 1
    assert found[0].perplexity == pytest.approx(2.718281828 ** (-found[0].log_likelihood / 16))
    assert score(model, BYTES, iter(TEXTS)) == score(model, BYTES, TEXTS)
    assert score(model, BYTES, []) == []


def test_texts_are_classified_alone_as_in_a_batch_and_are_cut():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=257, context_length=48, n_layer=2, n_head=2, n_embd=16)
    model = GPTClassifier(config, ["a", "b", "c"]).eval()
    together = classify(model, BYTES, TEXTS, batch_size=4)
    assert together.shape == (6, 3)
    assert torch.allclose(together.sum(1), torch.ones(6))
    for text, row in zip(TEXTS, together, strict=True):
        assert torch.allclose(classify(model, BYTES, [text])[0], row, atol=1e-6)
    cut = classify(model, BYTES, TEXTS, max_length=4)
    assert torch.allclose(cut, classify(model, BYTES, [text[:4] for text in TEXTS]), atol=1e-6)
    assert torch.equal(classify(model, BYTES, pd.Series(TEXTS)), classify(model, BYTES, TEXTS))
    assert classify(model, BYTES, []).shape == (0, 3)


def test_what_cannot_be_used_is_refused_in_one_line(make_model):
    model = make_model()
    with pytest.raises(InputError, match=r"texts: a single text; put it into a list"):
        score(model, BYTES, "one text")
    with pytest.raises(InputError, match=r"engine: 'quick' is not known; use one of auto, plain"):
        generate(model, torch.tensor([[1]]), 3, engine="quick")
    with torch.no_grad():
        model.wte.weight[ord("a")] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        score(model, BYTES, ["a"])
