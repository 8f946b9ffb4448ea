"""Decoding gives the reference's tokens, with the cache and without, alone and in batches."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt.errors import InputError
from gpt.generate import choose, complete, generate, stream
from gpt.tokenizer import byte_tokenizer
from gpt.weights import save_model


def test_100_greedy_tokens_equal_the_reference(make_model, tmp_path):
    model = make_model(context_length=128)
    save_model(model, tmp_path / "m", tokenizer=byte_tokenizer())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()
    idx = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=100,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generate(model, idx, 100), expected)


def test_a_batch_of_unequal_prompts_gives_each_its_own_tokens_past_the_context_too(make_model):
    model = make_model()
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], list(range(30)), list(range(60))]
    alone = [complete(model, [prompt], 80)[0] for prompt in prompts]
    assert complete(model, prompts, 80) == alone


def test_the_cache_changes_no_token_past_the_context_too(make_model):
    model = make_model()
    prompts = [[1, 2, 3], list(range(20))]
    with_cache = list(stream(model, prompts, 70))
    assert list(stream(model, prompts, 70, cached=False)) == with_cache


def test_past_the_context_the_model_sees_the_last_tokens_only(make_model):
    model = make_model()
    context = model.config.context_length
    long = torch.arange(100)[None]
    assert torch.equal(
        generate(model, long, 3)[:, 100:], generate(model, long[:, -context:], 3)[:, -3:]
    )


def test_each_row_ends_at_its_own_stop_token(make_model):
    model = make_model()
    prompts = [[1, 2, 3], [9, 8, 7]]
    free = complete(model, prompts, 12)
    stop = free[0][4]  # ends the first row at its first appearance there
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    assert complete(model, prompts, 12, stop=stop) == cut
    idx = torch.tensor(prompts)
    rows = generate(model, idx, 12, stop={stop})
    assert rows[0, 3 + len(cut[0]) :].eq(stop).all()


def test_a_row_that_starts_to_end_stops_the_work(make_model):
    model = make_model()
    first = complete(model, [[1, 2]], 1)[0][0]
    assert len(list(stream(model, [[1, 2]], 50, stop=first))) == 1


def test_a_seed_repeats_a_sample_and_another_gives_another(make_model):
    model = make_model()
    idx = torch.tensor([[1, 2, 3]])
    one, same, other = (generate(model, idx, 30, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(make_model):
    model = make_model()
    idx = torch.tensor([[5, 6]])
    greedy = generate(model, idx, 20)
    assert torch.equal(generate(model, idx, 20, temperature=2.0, top_k=1), greedy)
    assert torch.equal(generate(model, idx, 20, temperature=2.0, top_p=1e-6), greedy)


def test_sampling_follows_the_restricted_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**limits):
        tokens = choose(logits, 1.0, limits.get("top_k"), limits.get("top_p"), generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    close = {"atol": 0.015, "rtol": 0.0}
    assert torch.allclose(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), **close)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **close)
    # 0.5 + 0.3 do not reach 0.9: the third is needed, the fourth is not
    expected = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    assert torch.allclose(shares(top_p=0.9), expected, **close)
    hot = torch.softmax(logits[:1] / 2, 1)
    tokens = choose(logits, 2.0, None, None, generator)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / 20_000, hot[0], **close)


def test_the_model_is_left_in_the_mode_it_was_in(make_model):
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state()
    assert torch.equal(
        generate(model, torch.tensor([[1]]), 9), generate(model, torch.tensor([[1]]), 9)
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as if nothing had been


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is negative"),
        ({"top_k": 0}, "top_k: 0 leaves no token"),
        ({"top_p": 0.0}, "top_p: 0.0 is no share"),
        ({"top_p": 1.5}, "top_p: 1.5 is no share"),
    ],
)
def test_impossible_settings_are_refused(make_model, settings, message):
    with pytest.raises(InputError, match=message):
        generate(make_model(), torch.tensor([[1]]), 3, **settings)


def test_an_empty_prompt_is_refused(make_model):
    with pytest.raises(InputError, match="nothing to continue"):
        complete(make_model(), [[1], []], 3)
