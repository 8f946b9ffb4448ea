"""A model with its matrices in 8 bits is the same model but for rounding."""

import pytest
import torch
from torch import nn

from gpt.base.errors import InputError
from gpt.batches.data import Batch
from gpt.batches.metrics import lm_loss_sum
from gpt.engine.int8 import Int8Embedding, Int8Linear, quantize, widened
from gpt.generation import Sampling, complete


def test_a_weight_is_the_nearest_of_its_rows_255_steps():
    torch.manual_seed(0)
    weight = torch.randn(40, 70) * torch.logspace(-6, 3, 40)[:, None]  # rows of any size
    weight[7] = 0
    module = Int8Linear(weight, None)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((widened(module) - weight).abs() <= step * 0.5001).all()
    assert module.weight.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(40)]
    x = torch.randn(3, 70)
    assert torch.allclose(module(x), x @ widened(module).T)
    table = Int8Embedding(weight)
    assert torch.equal(table(torch.tensor([[4, 7]]))[0], widened(table)[[4, 7]])


def test_next_to_nothing_does_not_overflow():
    tiny = torch.tensor([[1e-45, -1e-45], [2.5e-43, -2e-43], [1e-30, 3e38]])
    assert (widened(Int8Linear(tiny, None)) - tiny).abs()[:2].max() < 1e-43


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_model_computes_what_its_rounded_weights_say(make_model, tie_weights, qkv_bias):
    shape = {"tie_weights": tie_weights, "qkv_bias": qkv_bias}
    small, rounded, whole = quantize(make_model(**shape)), make_model(**shape), make_model(**shape)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear) or name == "wte":
                module.weight.copy_(widened(small.get_submodule(name)))
    idx = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        assert torch.allclose(small(idx), rounded(idx), atol=1e-5, rtol=1e-5)
        spread = whole(idx).std()
        assert 0 < (small(idx) - whole(idx)).std() < spread / 20
    batch = Batch(idx[:, :-1], idx[:, 1:])
    ours, theirs = (lm_loss_sum(model, batch)[0].item() for model in (small, rounded))
    assert ours == pytest.approx(theirs)
    sampling = Sampling(max_new_tokens=8)
    assert complete(small, [[1, 2]], sampling) == complete(rounded, [[1, 2]], sampling)


def test_the_weights_take_a_quarter_of_the_memory(make_model):
    model = make_model(n_embd=128, context_length=8)
    n_params = model.n_params
    before = sum(each.nbytes for each in model.parameters())
    small = quantize(model)
    after = sum(each.nbytes for each in (*small.parameters(), *small.buffers()))
    assert small.n_params == n_params
    assert after < before * 0.27


def test_bf16_weights_are_rounded_and_the_rest_is_widened(make_model):
    small = quantize(make_model().bfloat16())
    assert {each.dtype for each in small.parameters()} == {torch.float32}
    assert {each.dtype for each in small.buffers()} == {torch.float32, torch.int8}
    assert not small.training


def test_a_damaged_weight_is_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.h[1].attn.c_proj.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"h\.1\.attn\.c_proj\.weight: holds what is no finite"):
        quantize(model)
