"""The architecture: one small frozen dataclass, saved beside the weights."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

# Numbers beyond these are typos or from damaged files; products of sizes fit 64 bits.
Positive = Annotated[int, Field(gt=0, le=1 << 31)]
NotNegative = Annotated[int, Field(ge=0, le=1 << 31)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
"""PyTorch takes no larger ones."""
Threads = Annotated[int, Field(ge=0, le=1024)]
"""0 is every core."""
Batch = Annotated[int, Field(gt=0, le=1 << 20)]
_Layers = Annotated[int, Field(gt=0, le=10_000)]
_Width = Annotated[int, Field(gt=0, le=1 << 17)]
_Rows = Annotated[int, Field(gt=0, le=1 << 24)]
"""Of an embedding: positions or tokens."""


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Architecture:
    """The parameters of a GPT that do not depend on its vocabulary; the defaults are GPT-2 124M.

    Raises:
        pydantic.ValidationError (a ValueError): a size is not positive, or beyond any model's;
            or heads do not divide the width.
    """

    context_length: _Rows = 1024
    n_layer: _Layers = 12
    n_head: _Width = 12
    n_embd: _Width = 768
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    qkv_bias: bool = True
    tie_weights: bool = True

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head: {self.n_head} heads do not divide the width n_embd = {self.n_embd}; "
                "choose a divisor"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class GPTConfig(Architecture):
    """A GPT-2 decoder.

    Radford et al. (2019), "Language Models are Unsupervised Multitask Learners".

    >>> gpt.GPTConfig().n_embd  # without arguments it is GPT-2 124M
    768
    """

    vocab_size: _Rows = 50257


GPT2_SIZES: dict[str, GPTConfig] = {
    "124M": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "355M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1558M": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
"""The published GPT-2 models by their number of parameters (tied head, qkv bias, context 1,024)."""
