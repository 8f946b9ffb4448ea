"""The loss without logits is the loss with them, in value, gradients and precision."""

import pytest
import torch
from torch.nn import functional as F

from gpt.model import loss as loss_module
from gpt.model.loss import linear_cross_entropy


def _tensors(n=50, width=24, vocab=101):
    torch.manual_seed(0)
    hidden = torch.randn(n, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (n,))


def _plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 1 << 20], ids=["rows", "chunks", "whole"])
@pytest.mark.parametrize("vocab", [2, 64, 101])
def test_loss_and_gradients_are_those_of_cross_entropy(monkeypatch, chunk_bytes, vocab):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets = _tensors(vocab=vocab)
    ours, theirs = (f(hidden, weight, targets) for f in (linear_cross_entropy, _plain))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    scale = 0.37  # what comes from above counts
    for mine, reference in zip(
        torch.autograd.grad(ours * scale, (hidden, weight)),
        torch.autograd.grad(theirs * scale, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_half_precision_is_that_of_autocast_and_many_chunks_lose_nothing(monkeypatch):
    hidden, weight, targets = _tensors(n=512)
    exact = torch.autograd.grad(_plain(hidden, weight, targets), (hidden, weight))
    errors = {}
    for name, function, chunk_bytes in (
        ("autocast", _plain, 0),
        ("whole", linear_cross_entropy, 1 << 20),
        ("chunks", linear_cross_entropy, 4_000),
    ):
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
        with torch.autocast("cpu", torch.bfloat16):
            value = function(hidden, weight, targets)
        assert value.dtype == torch.float32
        gradients = torch.autograd.grad(value, (hidden, weight))
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        errors[name] = [
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(gradients, exact, strict=True)
        ]
    for name in ("whole", "chunks"):
        for ours, theirs in zip(errors[name], errors["autocast"], strict=True):
            assert ours < 1.2 * theirs, errors


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, targets = _tensors()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    expected = torch.autograd.grad(_plain(hidden, weight, targets), hidden)[0]
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None
    assert torch.allclose(hidden.grad, expected, atol=1e-5)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_taken_none_are_made(monkeypatch, without):
    """A parameter wants one, and a `Function` is told so, even under `no_grad`."""
    asked = []
    real = loss_module._loss_and_gradients
    monkeypatch.setattr(
        loss_module, "_loss_and_gradients", lambda *a: asked.append(a[-1]) or real(*a)
    )
    hidden, weight, targets = _tensors()
    with without():
        value = linear_cross_entropy(hidden, weight, targets)
    assert asked == [False]
    assert value.item() == linear_cross_entropy(hidden, weight, targets).item()


def test_no_targets_are_no_loss():
    hidden, weight, targets = _tensors(n=0)
    value = linear_cross_entropy(hidden, weight, targets)
    value.backward()
    assert value.item() == 0
    assert weight.grad.abs().sum() == 0


def test_nothing_larger_than_a_chunk_is_held():
    """Of the logits: the largest tensor that is made has the chunk's size, not that of all rows."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes())
            return out

    hidden, weight, targets = _tensors(n=2000, width=8, vocab=1000)
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(loss_module, "CHUNK_BYTES", 1 << 20)
        linear_cross_entropy(hidden, weight, targets).backward()
    assert 1 << 18 < max(sizes) <= 1 << 20
