"""The compiled step computes what the model computes, and is used only where it does."""

import random

import pytest
import torch

from gpt.base.errors import RunError
from gpt.engine import compiling, decode
from gpt.engine.int8 import quantize
from gpt.generation import Sampling, complete
from gpt.inference import generate
from gpt.model.model import GPT

AUTO = decode.ENGINES["auto"]
SHAPES = [
    # vectors hold 4, 8 or 16 numbers: widths that are a multiple, and widths that are not
    {"n_embd": 32, "n_head": 4},
    {"n_embd": 33, "n_head": 3, "vocab_size": 131},
    {"n_embd": 20, "n_head": 20, "tie_weights": False},
    {"n_embd": 7, "n_head": 1, "qkv_bias": False, "vocab_size": 3},
    {"n_embd": 150, "n_head": 2, "qkv_bias": False, "tie_weights": False, "n_layer": 1},
    {"n_embd": 1, "n_head": 1, "n_layer": 3},
]


def both(model, n_rows, steps=6, padded=True, threads=1):
    """Logits (steps, B, V) of the model, and of the compiled step, on the same random tokens."""
    random.seed(n_rows)
    V = model.config.vocab_size
    prompts = [
        [random.randrange(V) for _ in range(random.randint(1, 12) if padded else 12)]
        for _ in range(n_rows)
    ]
    longest = max(map(len, prompts))
    missing = [longest - len(prompt) for prompt in prompts]
    idx = torch.tensor([[0] * n + prompt for n, prompt in zip(missing, prompts, strict=True)])
    padding = torch.tensor(missing) if any(missing) else None
    torch.set_num_threads(threads)
    with torch.inference_mode():
        caches = [model.new_cache(n_rows, longest + steps) for _ in range(2)]
        for cache in caches:
            model.hidden(idx, cache=cache, padding=padding)
        decode.require(model)
        step = decode.CompiledStep(model, caches[1], missing)
        plain, compiled = [], []
        for _ in range(steps):
            tokens = [random.randrange(V) for _ in range(n_rows)]
            new = torch.tensor(tokens)[:, None]
            plain.append(model(new, cache=caches[0], padding=padding)[:, -1])
            compiled.append(step(list(range(n_rows)), tokens).clone())
    assert caches[0].used == caches[1].used
    return torch.stack(plain), torch.stack(compiled)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']}x{shape['n_head']}")
def test_the_logits_are_the_models_for_any_shape_and_batch(compiled, make_model, shape):
    model = make_model(**shape)
    for n_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        for padded in (False, True):
            plain, ours = both(model, n_rows, padded=padded)
            assert torch.allclose(ours, plain, atol=1e-4, rtol=1e-4), (n_rows, padded)


def test_bf16_weights_are_read_as_they_are(compiled, make_model):
    """Against the same rounded weights in fp32, without a prompt: keys and values alone differ.

    Rounding to bf16 moves a number by up to 1/512, and so attention's means; two layers and their
    norms make 1/60 of the logits' spread of it (the worst of six seeds). The bound is 1/40, which
    activations rounded to bf16, as the plain engine's are, do not keep.
    """
    for shape in SHAPES[:3]:
        model = make_model(**shape).to(torch.bfloat16)
        tokens = torch.randint(model.config.vocab_size, (8, 5))
        cache = model.new_cache(5, 8)
        step = decode.CompiledStep(model, cache, [0] * 5)
        ours = torch.stack([step(range(5), each.tolist()).clone() for each in tokens])  # (8, 5, V)
        with torch.inference_mode():
            truth = model.float()(tokens.t()).transpose(0, 1)
        assert (ours[0] - truth[0]).abs().max() < truth.std() / 40
        assert (ours - truth).abs().max() < truth.std() / 40


def test_bf16_is_nearer_to_the_truth_than_the_plain_engine(compiled, make_model):
    model = make_model(n_embd=64).to(torch.bfloat16)
    plain, ours = both(model, 3)
    truth, _ = both(model.float(), 3)
    assert (ours - truth).abs().mean() < (plain - truth).abs().mean()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']}x{shape['n_head']}")
def test_weights_of_8_bits_give_the_logits_of_the_model_that_holds_them(
    compiled, make_model, shape
):
    model = quantize(make_model(**shape))
    for n_rows in (1, 2, 3, 5, 8, 17):
        plain, ours = both(model, n_rows)
        assert torch.allclose(ours, plain, atol=1e-4, rtol=1e-4), n_rows


def test_auto_decodes_8_bits_with_the_compiled_step(compiled, make_model):
    model = quantize(make_model(n_embd=64))
    assert decode.why_not(model) is None
    sampling = Sampling(max_new_tokens=12)
    prompts = [[1, 2, 3], [4]]
    assert complete(model, prompts, sampling, engine=AUTO) == complete(model, prompts, sampling)


def test_8_bits_in_another_layout_are_not_read(compiled, make_model):
    model = quantize(make_model())
    model.h[0].mlp.c_fc.scale = model.h[0].mlp.c_fc.scale[:5]
    assert "h.0.mlp.c_fc.scale is no plain tensor" in decode.why_not(model)
    assert "wpe.weight is laid out" in decode.why_not(quantize(make_model()).bfloat16())
    model = quantize(make_model())
    model.h[1].mlp.c_proj = make_model().h[1].mlp.c_proj
    assert "h.1.mlp.c_proj.scale" in decode.why_not(model)


def test_neither_threads_nor_the_rows_beside_change_a_bit(compiled, make_model):
    for change in (torch.nn.Module.float, torch.nn.Module.bfloat16, quantize):
        model = change(make_model(n_embd=96, vocab_size=301))
        _, one = both(model, 9)
        for threads in (2, 3, 5):
            assert torch.equal(both(model, 9, threads=threads)[1], one)

    model = make_model(n_embd=96)
    logits = []
    for rows in ([0], [0, 1, 2, 3, 4, 5, 6, 7, 8]):
        cache = model.new_cache(9, 4)
        step = decode.CompiledStep(model, cache, [0] * 9)
        for token in (3, 4, 5):
            step(rows, [token] * len(rows))
        logits.append(step.logits[0].clone())
    assert torch.equal(*logits)


def test_a_row_that_is_left_out_changes_no_other(compiled, make_model):
    model = make_model()
    kept = []
    for rows in ([0, 1, 2], [0, 2]):
        cache = model.new_cache(3, 8)
        step = decode.CompiledStep(model, cache, [0, 0, 0])
        step([0, 1, 2], [1, 2, 3])
        for token in (5, 6, 7):
            step(rows, [token + row for row in rows])
        kept.append(step.logits[[0, 2]].clone())
    assert torch.equal(*kept)


def test_the_weights_are_read_where_they_lie_and_outlive_the_model(compiled, make_model):
    model = make_model()
    cache = model.new_cache(1, 8)
    step = decode.CompiledStep(model, cache, [0])
    before = step([0], [1]).clone()
    with torch.no_grad():
        model.wte.weight.mul_(2)
    cache.used = 0
    assert not torch.equal(step([0], [1]), before)
    with torch.no_grad():
        model.wte.weight.div_(2)
    del model
    cache.used = 0
    assert torch.equal(step([0], [1]), before)


def test_it_is_not_used_for_what_it_does_not_compute(compiled, make_model):
    def reason(model):
        found = decode.why_not(model)
        assert decode.ready(model) == (found is None)
        if found is not None:
            with pytest.raises(RunError, match="cannot serve this model"):
                decode.require(model)
        return found

    assert reason(make_model()) is None
    assert reason(make_model().train()) is None  # without dropout it is the same
    assert "dropout" in reason(make_model(dropout=0.1).train())
    assert reason(make_model(dropout=0.1)) is None
    assert "float16" in reason(make_model().half())
    assert "meta" in reason(make_model().to("meta"))

    class Other(GPT):
        pass

    assert "Other" in reason(Other(make_model().config).eval())

    model = make_model()
    model.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(model)

    model = make_model()
    model.h[1].attn.c_proj = torch.nn.Bilinear(32, 32, 32)
    assert "Bilinear" in reason(model)

    model = make_model()
    model.h[1].attn.c_proj = torch.nn.Linear(32, 32, bias=False)
    assert "h.1.attn.c_proj.bias" in reason(model)

    model = make_model()
    model.wpe.weight = torch.nn.Parameter(model.wpe.weight[:10])
    assert "wpe.weight" in reason(model)

    model = make_model()
    model.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.randn(32, 128).t())
    assert "laid out" in reason(model)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in reason(make_model())


def test_auto_serves_what_the_compiled_step_does_not(compiled, make_model):
    model = make_model()
    model.h[0].register_forward_hook(lambda *_: None)
    sampling = Sampling(max_new_tokens=5)
    assert complete(model, [[1]], sampling, engine=AUTO) == complete(model, [[1]], sampling)


def test_auto_takes_the_library_that_is_there(compiled, make_model, monkeypatch):
    used = []
    real = decode.CompiledStep.__call__
    monkeypatch.setattr(
        decode.CompiledStep, "__call__", lambda *args: used.append(1) or real(*args)
    )
    complete(make_model(), [[1]], Sampling(max_new_tokens=5), engine=AUTO)
    assert len(used) == 4  # the first token is the prompt's own pass
    complete(make_model(), [[1]], Sampling(max_new_tokens=5))
    assert len(used) == 4
    generate(make_model(), torch.tensor([[1]]), 5)  # without a word on engines
    assert len(used) == 8


def test_auto_compiles_in_the_background_and_takes_it_next_time(
    compiled_cache, make_model, tmp_path, monkeypatch
):
    decode._library.cache_clear()
    monkeypatch.setattr(decode, "_started", False)
    started = []
    monkeypatch.setattr(compiling, "compile_in_background", started.append)
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "empty"))
    model, sampling = make_model(), Sampling(max_new_tokens=5)
    plain = complete(model, [[1]], sampling, engine=AUTO)
    complete(model, [[1]], sampling, engine=AUTO)
    assert started == [decode.SOURCE]  # once is enough
    assert decode.why_not(model) == "not compiled yet"
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(compiled_cache))
    assert decode.why_not(model) is None
    assert complete(model, [[1]], sampling, engine=AUTO) == plain
