"""Decoding gives the reference's tokens, with the cache and without, alone and in batches.

What holds for one engine holds for the other: such tests run with both.
"""

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt import generation as module
from gpt.base.errors import InputError, RunError
from gpt.engine.decode import ENGINES
from gpt.generation import (
    Completion,
    Sampling,
    Token,
    choose,
    complete,
    complete_texts,
    completions,
    stream,
    stream_text,
)
from gpt.inference import generate
from gpt.model.weights import save_model
from gpt.tokens.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
IDS = {BYTES.decode_bytes([i])[0]: i for i in range(256)}


@pytest.fixture(params=["plain", "compiled"])
def engine_name(request):
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    return request.param


@pytest.fixture
def engine(engine_name):
    return ENGINES[engine_name]


def greedy(n, **settings):
    return Sampling(max_new_tokens=n, **settings)


@pytest.fixture
def pair(make_model, tmp_path):
    """A model and the reference's, of the same weights."""
    model = make_model(context_length=160)
    save_model(model, tmp_path / "m", tokenizer=BYTES)
    return model, GPT2LMHeadModel.from_pretrained(tmp_path / "m").eval()


def reference(theirs, prompts, new, **settings):
    """The new tokens of the reference; prompts are padded on the left."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[256] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    settings = {"eos_token_id": None, "pad_token_id": 256} | settings
    added = theirs.generate(
        idx, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings
    )
    return added[:, longest:].tolist()


# --- the reference's tokens -----------------------------------------------------------------------


def test_100_greedy_tokens_equal_the_reference(pair, engine_name):
    model, theirs = pair
    idx = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(reference(theirs, idx.tolist(), 100))
    assert torch.equal(generate(model, idx, 100, engine=engine_name)[:, 20:], expected)
    assert torch.equal(generate(model, idx[:1], 100, engine=engine_name)[:, 20:], expected[:1])


def test_100_greedy_tokens_after_unequal_prompts_equal_the_reference(pair, engine):
    model, theirs = pair
    prompts = [[7], [2, 3, 4, 5, 6, 7, 8], list(range(40, 70)), [9, 9]]
    assert complete(model, prompts, greedy(100), engine=engine) == reference(theirs, prompts, 100)


def test_a_repetition_penalty_gives_the_references_tokens(pair, engine):
    model, theirs = pair
    prompt = list(range(60, 80))
    for penalty in (1.3, 0.8):
        ours = complete(model, [prompt], greedy(60, repetition_penalty=penalty), engine=engine)
        assert ours == reference(theirs, [prompt], 60, repetition_penalty=penalty)
    free = complete(model, [prompt], greedy(60), engine=engine)
    assert ours != free


def test_a_least_length_forbids_stop_tokens_as_the_reference_does(pair, engine):
    model, theirs = pair
    prompt = list(range(60, 80))
    free = complete(model, [prompt], greedy(20), engine=engine)[0]
    stop = free[2]
    (ours,) = completions(
        model, [prompt], greedy(20, stop=(stop,), min_new_tokens=8), engine=engine
    )
    (theirs_,) = reference(theirs, [prompt], 20, eos_token_id=stop, min_new_tokens=8)
    kept = theirs_[: theirs_.index(stop)] if stop in theirs_ else theirs_
    assert ours.tokens == kept
    assert len(ours.tokens) >= 8
    assert stop not in ours.tokens


def test_log_probabilities_are_those_of_the_model_itself(pair, engine):
    model, theirs = pair
    prompts = [[5, 6, 7], [8] * 9]
    sampling = Sampling(max_new_tokens=12, temperature=0.7, top_k=9, repetition_penalty=1.4, seed=3)
    for prompt, done in zip(
        prompts,
        completions(model, prompts, sampling, log_probs=True, engine=engine),
        strict=True,
    ):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + done.tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(done.log_probs), expected, atol=1e-4)
    (step,) = stream(model, [[5]], greedy(1), log_probs=True, engine=engine)
    assert step[0].log_prob < 0
    assert next(stream(model, [[5]], greedy(1), engine=engine))[0].log_prob is None


# --- cache, context, batches ----------------------------------------------------------------------


def test_a_batch_of_unequal_prompts_gives_each_its_own_tokens_past_the_context_too(
    make_model, engine
):
    model = make_model()
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], list(range(30)), list(range(60))]
    alone = [complete(model, [prompt], greedy(80), engine=engine)[0] for prompt in prompts]
    assert complete(model, prompts, greedy(80), engine=engine) == alone
    assert complete(model, prompts[:3], greedy(80), engine=engine) == alone[:3]


def test_the_cache_changes_no_token_past_the_context_too(make_model, engine):
    model = make_model()
    prompts = [[1, 2, 3], list(range(20))]
    without = list(stream(model, prompts, greedy(70), cached=False))
    assert list(stream(model, prompts, greedy(70), engine=engine)) == without


def test_past_the_context_the_model_sees_the_last_tokens_only(make_model, engine_name):
    model = make_model()
    context = model.config.context_length
    long = torch.arange(100)[None]
    new = generate(model, long, 3, engine=engine_name)[:, 100:]
    assert torch.equal(new, generate(model, long[:, -context:], 3, engine=engine_name)[:, -3:])
    # what is generated moves the window too: each token is what its own window says
    rows = generate(model, long[:, :40], 30, engine=engine_name)[0].tolist()
    for end in range(40, 70):
        window = torch.tensor([rows[max(0, end - context) : end]])
        with torch.no_grad():
            assert rows[end] == model(window)[0, -1].argmax()


def test_each_row_ends_at_its_own_stop_token(make_model, engine_name, engine):
    model = make_model()
    prompts = [[1, 2, 3], [9, 8, 7], [50]]
    free = complete(model, prompts, greedy(12), engine=engine)
    stop = free[0][4]  # ends the first row at its first appearance there
    cut = [row[: row.index(stop)] if stop in row else row for row in free]
    done = completions(model, prompts, greedy(12, stop=(stop,)), engine=engine)
    assert [each.tokens for each in done] == cut
    assert [each.stopped for each in done] == [stop in row for row in free]
    rows = generate(model, torch.tensor(prompts[:2]), 12, stop={stop}, engine=engine_name)
    assert rows[0, 3 + len(cut[0]) :].eq(stop).all()
    assert torch.equal(rows, generate(model, torch.tensor(prompts[:2]), 12, stop=stop))


def test_a_row_that_starts_to_end_stops_the_work(make_model, engine):
    model = make_model()
    first = complete(model, [[1, 2]], greedy(1), engine=engine)[0][0]
    assert len(list(stream(model, [[1, 2]], greedy(50, stop=(first,)), engine=engine))) == 1


def test_no_new_tokens_is_a_length_like_any_other(make_model, engine_name):
    model = make_model()
    idx = torch.tensor([[1, 2]])
    assert torch.equal(generate(model, idx, 0, engine=engine_name), idx)
    assert completions(model, [[1]], greedy(0)) == [
        Completion(tokens=[], log_probs=[], stopped=False)
    ]


# --- sampling -------------------------------------------------------------------------------------


def test_a_seed_repeats_a_sample_and_another_gives_another(make_model, engine_name):
    model = make_model()
    idx = torch.tensor([[1, 2, 3]])
    one, same, other = (
        generate(model, idx, 30, temperature=1.0, seed=seed, engine=engine_name)
        for seed in (7, 7, 8)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    unseeded = [generate(model, idx, 30, temperature=1.0, engine=engine_name) for _ in range(2)]
    assert not torch.equal(*unseeded)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(make_model, engine_name):
    model = make_model()
    idx = torch.tensor([[5, 6]])
    likeliest = generate(model, idx, 20, engine=engine_name)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(
            generate(model, idx, 20, temperature=2.0, engine=engine_name, **limits), likeliest
        )


def test_sampling_follows_the_restricted_distribution():
    logits = torch.log(torch.tensor([[0.05, 0.3, 0.5, 0.15]])).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        tokens = choose(logits, Sampling(max_new_tokens=1, **settings), generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    def close(found, expected):
        return torch.allclose(found, torch.tensor(expected), atol=0.015, rtol=0.0)

    assert close(shares(temperature=1.0), [0.05, 0.3, 0.5, 0.15])
    assert close(shares(temperature=1.0, top_k=2), [0, 0.375, 0.625, 0])
    # 0.5 + 0.3 do not reach 0.9: the third is needed, the fourth is not
    assert close(shares(temperature=1.0, top_p=0.9), [0, 0.3 / 0.95, 0.5 / 0.95, 0.15 / 0.95])
    # the share is that of what top_k left: 0.625 of the two reaches 0.6
    assert close(shares(temperature=1.0, top_k=2, top_p=0.6), [0.0, 0.0, 1.0, 0.0])
    hot = torch.softmax(logits[0] / 2, 0).tolist()
    assert close(shares(temperature=2.0), hot)


@pytest.mark.parametrize("peaked", [False, True])
def test_top_p_is_exact_where_a_vocabulary_is_large(peaked):
    """A flat distribution needs more tokens than are looked at first, a peaked one fewer."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5000, generator=generator) * (4 if peaked else 1)
    probabilities, order = logits.softmax(1)[0].sort(descending=True)
    needed = int((probabilities.cumsum(0) - probabilities < 0.9).sum())
    assert (needed > module._LIKELY[0]) != peaked
    sampling = Sampling(max_new_tokens=1, temperature=1.0, top_p=0.9)
    for _ in range(10):
        chosen = choose(logits.expand(1000, -1), sampling, generator)
        assert set(chosen.tolist()) <= set(order[:needed].tolist())
        shares = torch.bincount(chosen, minlength=5000)[order[:3]] / 1000
        assert torch.allclose(shares, probabilities[:3] / 0.9, atol=0.07)


def test_a_token_without_weight_is_never_picked():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1e-30, 0.0, 3.0, 0.0, 1.0, 0.0]).expand(50_000, -1)
    picked = module._pick(weights, generator)[:, 0]
    shares = torch.bincount(picked, minlength=7) / len(picked)
    assert torch.allclose(shares, torch.tensor([0, 0, 0, 0.75, 0, 0.25, 0]), atol=0.01)
    assert set(picked.tolist()) <= {1, 3, 5}


def test_no_token_outside_the_vocabulary_comes_from_logits_that_are_not_finite():
    """The compiled step reads memory at the token's place: it must be one."""
    logits = torch.full((2, 5), torch.nan)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 3}):
        sampling = Sampling(max_new_tokens=1, **settings)
        assert choose(logits, sampling, torch.Generator()).lt(5).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_finite_chooses_nothing(make_model, temperature, engine):
    model = make_model()
    with torch.no_grad():
        model.wte.weight[5] = 3e38
    sampling = Sampling(max_new_tokens=3, temperature=temperature)
    with pytest.raises(RunError, match="not finite numbers"):
        complete(model, [[1, 2], [5]], sampling, engine=engine)


# --- text -----------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Makes the model write these texts, a byte a token, one for each prompt."""

    def script(*texts: bytes):
        def steps(model, prompts, sampling, ended, log_probs=False, engine=None):
            assert len(prompts) == len(texts)
            for n in range(min(sampling.max_new_tokens, max(map(len, texts)))):
                if all(ended):
                    return
                yield [
                    None if over or n >= len(text) else Token(IDS[text[n]], None)
                    for over, text in zip(ended, texts, strict=True)
                ]

        monkeypatch.setattr(module, "_steps", steps)

    return script


def written(**settings):
    sampling = Sampling(**{"max_new_tokens": 99} | settings)
    return list(stream_text(None, BYTES, "p", sampling))


def test_a_stream_is_the_text_of_the_tokens(make_model, engine):
    model = make_model(seed=3)
    sampling = greedy(40, stop=(BYTES.eot,))
    (ids,) = complete(model, [BYTES.encode("Once")], sampling, engine=engine)
    text = "".join(stream_text(model, BYTES, "Once", greedy(40), engine=engine))
    whole = BYTES.decode(ids)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # a character that the length cut does not come
    assert complete_texts(model, BYTES, ["Once"], greedy(40), engine=engine) == [text]


def test_a_character_of_many_tokens_comes_whole(scripted):
    text = "né — ✓ 🦉"
    scripted(text.encode())
    pieces = written()
    assert "".join(pieces) == text
    assert pieces == list(text)


def test_a_character_that_the_length_cuts_does_not_come(scripted):
    scripted("ab🦉".encode())
    for length in (3, 4, 5):
        assert "".join(written(max_new_tokens=length)) == "ab"
    assert "".join(written(max_new_tokens=6)) == "ab🦉"


def test_bytes_that_are_no_text_are_marked_and_never_break_what_follows(scripted):
    scripted(b"a\xff\xf0b")
    assert "".join(written()) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "one END two"),
        (("END",), "one "),
        (("two", " END"), "one"),
        (("ENDE",), "one END two"),
        (("one END two!", "EN"), "one "),
        (("two",), "one END "),
        (("o",), ""),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(scripted, stop, expected):
    scripted(b"one END two")
    assert "".join(written(stop_texts=stop)) == expected


def test_text_is_held_back_only_while_a_stop_text_may_have_begun(scripted):
    scripted(b"a END EN.")
    assert written(stop_texts=("ENDING",)) == ["a", " ", "END ", "EN."]


def test_a_stop_text_before_the_least_length_does_not_end(scripted):
    scripted(b"stop and stop")
    assert "".join(written(stop_texts=("stop",), min_new_tokens=6)) == "stop and "


def test_each_text_of_a_batch_ends_by_itself(scripted):
    scripted(b"one END two", b"three", "✓END".encode(), b"EN")
    sampling = Sampling(max_new_tokens=99, stop_texts=("END",))
    texts = complete_texts(None, BYTES, ["a", "", "c", "d"], sampling)
    assert texts == ["one ", "three", "✓", "EN"]


def test_a_stop_text_ends_a_row_of_the_real_model_and_leaves_the_others(make_model, engine):
    model = make_model(seed=3)
    prompts = ["Once", "A longer prompt"]
    free = complete_texts(model, BYTES, prompts, greedy(30), engine=engine)
    stop = free[0][3:5]
    cut = [text.partition(stop)[0] for text in free]
    sampling = greedy(30, stop_texts=(stop,))
    assert complete_texts(model, BYTES, prompts, sampling, engine=engine) == cut
    assert "".join(stream_text(model, BYTES, "Once", sampling, engine=engine)) == cut[0]


# --- what is refused or left alone ----------------------------------------------------------------


def test_the_model_is_left_in_the_mode_it_was_in(make_model, engine_name):
    model = make_model(dropout=0.5).train()
    before = torch.get_rng_state()
    idx = torch.tensor([[1]])
    one, other = (generate(model, idx, 9, engine=engine_name) for _ in range(2))
    assert torch.equal(one, other)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as if nothing had been


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is negative"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0 leaves no token"),
        ({"top_p": 0.0}, "top_p: 0.0 is no share"),
        ({"top_p": 1.5}, "top_p: 1.5 is no share"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not positive"),
        ({"min_new_tokens": 4}, "min_new_tokens: 4 is not between 0 and max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens: -1 is not between"),
    ],
)
def test_impossible_settings_are_refused(make_model, settings, message):
    with pytest.raises(InputError, match=message):
        generate(make_model(), torch.tensor([[1]]), 3, **settings)


def test_impossible_ends_are_refused(make_model):
    with pytest.raises(InputError, match="max_new_tokens: -1 is negative"):
        Sampling(max_new_tokens=-1)
    with pytest.raises(InputError, match="stop: an empty text"):
        Sampling(max_new_tokens=1, stop_texts=("",))
    with pytest.raises(InputError, match="stop_texts: tokens have no text"):
        complete(make_model(), [[1]], Sampling(max_new_tokens=1, stop_texts=("x",)))


def test_an_empty_prompt_is_refused(make_model):
    for prompts in ([[1], []], []):
        with pytest.raises(InputError, match="nothing to continue"):
            complete(make_model(), prompts, greedy(3))


def test_without_the_library_the_compiled_engine_is_an_error_and_auto_is_not(make_model):
    model = make_model()
    with pytest.raises(RunError, match=r"decode\.cpp: cannot be compiled here: .*engine at auto"):
        complete(model, [[1]], greedy(3), engine=ENGINES["compiled"])
    assert complete(model, [[1]], greedy(3), engine=ENGINES["auto"]) == complete(
        model, [[1]], greedy(3)
    )
