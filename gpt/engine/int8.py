"""Weights in 8 bits, for decoding on a CPU, where reading the weights takes most of the time.

Every row of a matrix, that is every output, has its own scale: its largest absolute weight
divided by 127. A weight is an integer multiple of it (symmetric, absolute-maximum quantization, as
described by Dettmers et al. (2022), "LLM.int8()"). Activations stay in fp32, as do biases, norms
and position embeddings.

The compiled step (`gpt.engine.decode`) reads the 8-bit weights directly. Everything else, the
pass over a prompt and the plain engine, widens a matrix temporarily for each product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.base.errors import InputError
from gpt.model.model import GPT

_GREATEST = 127


class _Int8Matrix(nn.Module):
    """A matrix (out, in): `weight`, int8, times `scale` (out,), fp32."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rounded, scale = _rounded(weight)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)


class Int8Linear(_Int8Matrix):
    """An `nn.Linear` with its weight in 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), fp32."""
        return F.linear(x, widened(self), self.bias)


class Int8Embedding(_Int8Matrix):
    """An `nn.Embedding` with its weight (n, C) in 8 bits."""

    def forward(self, idx: Tensor) -> Tensor:
        """Indices (...) to vectors (..., C), fp32."""
        return self.weight[idx] * self.scale[idx][..., None]


class Int8GPT(GPT):
    """A language model with its matrices in 8 bits; made by `quantize`."""

    def __init__(self, model: GPT) -> None:
        nn.Module.__init__(self)  # not GPT's, which would make new parts
        self.config = model.config
        self.wte, self.wpe, self.h = model.wte, model.wpe, model.h
        self.ln_f, self.lm_head = model.ln_f, model.lm_head

    @property
    def n_params(self) -> int:
        """The number of parameters; scales are not counted."""
        return super().n_params + sum(
            buffer.numel() for buffer in self.buffers() if buffer.dtype == torch.int8
        )

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, C), widened."""
        return widened(self.wte if self.lm_head is None else self.lm_head)


def quantize(model: GPT) -> Int8GPT:
    """The model with its matrices in 8 bits.

    One matrix at a time, so that only one is held twice in memory. The other parts are moved to
    the new model, so the given model must not be used afterwards.

    Args:
        model: a language model, in any precision.

    Raises:
        InputError: a weight is not finite.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) or module is model.wte:
            owner, _, leaf = name.rpartition(".")
            try:
                new = (
                    Int8Linear(module.weight, module.bias)
                    if isinstance(module, nn.Linear)
                    else Int8Embedding(module.weight)
                )
            except InputError as error:
                raise InputError(f"{name}.weight: {error}") from None
            setattr(model.get_submodule(owner), leaf, new)
    return Int8GPT(model).float().train(model.training)


def widened(module: nn.Module) -> Tensor:
    """The dequantized matrix of an `Int8Linear` or `Int8Embedding`, (out, in) fp32."""
    assert isinstance(module, _Int8Matrix)
    return module.weight.float().mul_(module.scale[:, None])


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as integers -127 … 127 and the scale of each row."""
    wide = weight.detach().float()  # (out, in)
    greatest = wide.abs().amax(1)  # (out,)
    if not greatest.isfinite().all():
        raise InputError("holds what is no finite number; the model is damaged")
    scale = greatest / _GREATEST
    steps = torch.where(scale > 0, scale, 1)  # a row of zeros, or of tiny values, becomes 0
    numbers = (wide / steps[:, None]).round_().clamp_(-_GREATEST, _GREATEST)
    return numbers.to(torch.int8), scale
