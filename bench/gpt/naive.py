"""A GPT-2 as a textbook builds it, to measure against: every step of it spelt out.

Queries, keys and values are three layers, attention is a product, an explicit mask, a softmax and
another product, layer norm and GELU are written in elementary operations. The parameters are
those of `gpt.GPT`, the head tied as there, so that both do the same work. To classify, the head is
replaced, as the book does it: every position gets logits, and one of them is looked at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt.model.config import GPTConfig
from gpt.model.model import GPT, LAYER_NORM_EPS, GPTClassifier


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + LAYER_NORM_EPS) + self.shift


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + torch.tanh(inner))


class Attention(nn.Module):
    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        future = torch.ones(config.context_length, config.context_length).triu(diagonal=1)
        self.register_buffer("mask", future.bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        # three times (B, T, C) -> (B, H, T, D)
        queries, keys, values = (
            layer(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = queries @ keys.transpose(2, 3)  # (B, H, T, T)
        scores = scores.masked_fill(self.mask[:T, :T], -torch.inf)
        weights = torch.softmax(scores / math.sqrt(C // self.n_head), dim=-1)
        mixed = self.dropout(weights) @ values  # (B, H, T, D)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, C))
        return joined


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.norm_1 = LayerNorm(width)
        self.attention = Attention(config)
        self.norm_2 = LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.bend = GELU()
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        added: Tensor = self.dropout(self.narrow(self.bend(self.widen(self.norm_2(x)))))
        return x + added


class NaiveGPT(nn.Module):
    """With a language-model head, or one of `classes` outputs."""

    def __init__(self, config: GPTConfig, classes: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.norm = LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, classes or config.vocab_size, bias=False)
        if classes is None:
            self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) to logits (B, T, V), or (B, T, classes)."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.dropout(self.tokens(idx) + self.positions(positions))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def naive_copy(model: GPT | GPTClassifier) -> NaiveGPT:
    """A `NaiveGPT` with the weights of `model`, whose head is tied or classifies."""
    labels = model.labels if isinstance(model, GPTClassifier) else None
    copy = NaiveGPT(model.config, len(labels) if labels else None)
    weights = model.state_dict()
    taken: dict[str, Tensor] = {
        "tokens.weight": weights["wte.weight"],
        "head.weight": weights["score.weight" if labels else "wte.weight"],
        "positions.weight": weights["wpe.weight"],
        "norm.scale": weights["ln_f.weight"],
        "norm.shift": weights["ln_f.bias"],
    }
    for i in range(model.config.n_layer):
        theirs, ours = f"blocks.{i}", f"h.{i}"
        for number in (1, 2):
            taken[f"{theirs}.norm_{number}.scale"] = weights[f"{ours}.ln_{number}.weight"]
            taken[f"{theirs}.norm_{number}.shift"] = weights[f"{ours}.ln_{number}.bias"]
        for kind in ("weight", "bias"):
            parts = weights[f"{ours}.attn.c_attn.{kind}"].chunk(3)
            for layer, part in zip(("query", "key", "value"), parts, strict=True):
                taken[f"{theirs}.attention.{layer}.{kind}"] = part
            taken[f"{theirs}.attention.out.{kind}"] = weights[f"{ours}.attn.c_proj.{kind}"]
            taken[f"{theirs}.widen.{kind}"] = weights[f"{ours}.mlp.c_fc.{kind}"]
            taken[f"{theirs}.narrow.{kind}"] = weights[f"{ours}.mlp.c_proj.{kind}"]
    copy.load_state_dict(taken)
    return copy
