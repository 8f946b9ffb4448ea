"""The decoder-only transformer of GPT-2, with a language-model head or a classification head.

Architecture: Radford et al. (2019). Parameters carry GPT-2's names (`wte`, `h.0.attn.c_attn`, …)
in `nn.Linear` layout; GPT-2's transposed files are `gpt.model.weights`' concern alone.

Shapes: B rows, T positions, C = n_embd channels, H heads of D = C / H channels, V = vocab_size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.base.errors import InputError
from gpt.model.attention import Documents, causal_attention, heads
from gpt.model.config import GPTConfig

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02

Pooling = Literal["last", "mean"]
"""The input of a classifier's head: a text's last real position, or the mean over all of them."""


class KVCache:
    """The keys and values of the positions seen so far, so that each is computed once.

    Holds up to `length` positions for `batch` rows: two tensors (n_layer, B, H, length, D).
    `used` counts the positions that are filled; every row fills the same number, shorter
    prompts being padded on the left.
    """

    def __init__(
        self, config: GPTConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (
            config.n_layer,
            batch,
            config.n_head,
            length,
            config.n_embd // config.n_head,
        )
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.used = 0

    @property
    def length(self) -> int:
        """The number of positions that fit."""
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, H, T, D); return all of that layer."""
        end = self.used + keys.shape[2]
        self.keys[layer, :, :, self.used : end] = keys
        self.values[layer, :, :, self.used : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class QueryKeyValue(nn.Linear):
    """One projection for queries, keys and values, which can also compute only some of them."""

    def some(self, x: Tensor, outputs: slice) -> Tensor:
        """What `forward` gives at these outputs, and nothing else."""
        bias = None if self.bias is None else self.bias[outputs]
        return F.linear(x, self.weight[outputs], bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = QueryKeyValue(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C); `mask` is True where a query sees a key.

        `documents` are for rows without a mask and a cache.
        """
        qkv = self.c_attn(x)  # (B, T, 3C)
        dropout = self.dropout if self.training else 0.0
        if mask is None and cache is None:
            y = causal_attention(qkv, self.n_head, dropout, documents)
        else:
            q, k, v = heads(qkv, 3, self.n_head)  # (B, H, T, D) each
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                # one query against a cache sees everything in it; more of them come with a mask
                is_causal=mask is None and x.shape[1] > 1,
            )
            y = y.transpose(1, 2).flatten(2)  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What `forward` gives at each row's last position, and nothing else.

        Args:
            x: the rows concatenated, without padding, (N, C).
            lengths: of each, (B,) int64; N in all.

        Returns:
            (B, C).
        """
        C = x.shape[1]
        ends = lengths.cumsum(0) - 1  # (B,)
        q = self.c_attn.some(x[ends], slice(0, C))  # (B, C)
        kv = self.c_attn.some(x, slice(C, 3 * C))  # (N, 2C)
        k, v = heads(pad(kv, lengths), 2, self.n_head)  # (B, H, T, D) each
        (query,) = heads(q[:, None], 1, self.n_head)  # (B, H, 1, D)
        seen = torch.arange(k.shape[2], device=x.device) < lengths[:, None]  # (B, T)
        y = F.scaled_dot_product_attention(
            query,
            k,
            v,
            attn_mask=seen[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return F.dropout(self.c_proj(y.flatten(1)), self.dropout, self.training)


def pad(rows: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated rows (N, C) as (B, T, C), T the longest, padded on the right with 0."""
    return nn.utils.rnn.pad_sequence(list(torch.split(rows, lengths.tolist())), batch_first=True)


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, C), padded on the right, as concatenated rows without padding (N, C)."""
    real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]  # (B, T)
    return padded[real]


class MLP(nn.Module):
    """Linear (C to 4C), GELU (the tanh approximation, as in GPT-2), linear (4C to C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each with a layer norm before it and a residual connection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, cache, documents)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What `forward` gives at each row's last position: see `CausalSelfAttention.last`.

        That takes the keys and values of all positions, but only one query and one MLP per row.
        """
        y = x[lengths.cumsum(0) - 1] + self.attn.last(self.ln_1(x), lengths)  # (B, C)
        return y + self.mlp(self.ln_2(y))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: from token ids to one vector per position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.wte.weight.device

    @property
    def n_params(self) -> int:
        """The number of parameters; a tied head is counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def hidden(
        self,
        idx: Tensor,
        *,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The final hidden states.

        Args:
            idx: token ids, (B, T) int64.
            cache: positions seen before these; the new ones are added to it.
            padding: the number of padding positions on each row's left, (B,) int64; their outputs
                are meaningless, and no real position sees them.
            documents: the document number of each position, (B, T) int64, for rows of several
                documents. Each is computed as if it were alone, its positions counted from 0.
                Equal numbers are adjacent. A negative number, at a row's beginning, marks the
                opening of all its documents: they see it, and their positions continue after
                it. Not with a cache or padding.

        Returns:
            (B, T, C).

        Raises:
            InputError: more positions than the context holds.
        """
        assert documents is None or (cache is None and padding is None)
        T = idx.shape[1]
        past = cache.used if cache is not None else 0
        self.check_length(past + T)
        positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        mask = apart = None
        if padding is not None or (past and T > 1):
            seen = torch.arange(past + T, device=idx.device)
            mask = (seen <= positions[:, None])[None, None]  # (1, 1, T, past + T)
        if padding is not None:
            assert mask is not None
            visible = mask & (seen >= padding[:, None])[:, None, None]  # (B, 1, T, past + T)
            # padding sees itself: the softmax over no keys would be 0 / 0
            mask = visible | (seen == positions[:, None])
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, T)
        if documents is not None:
            apart = Documents(documents)
            positions = apart.positions  # (B, T)
        x = self.embed(idx, positions)
        for block in self.h:
            x = block(x, mask, cache, apart)
        if cache is not None:
            cache.used += T
        return self.ln_f(x)  # type: ignore[no-any-return]

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Token ids (B, T) at `positions`, (T,) or (B, T), as vectors (B, T, C)."""
        x = self.wte(idx) + self.wpe(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def check_length(self, length: int) -> None:
        """Refuse more positions than the context holds.

        Raises:
            InputError: there are more.
        """
        if length > self.config.context_length:
            raise InputError(
                f"the text is {length} tokens long but the model's context holds "
                f"{self.config.context_length}; shorten it or use a model with a longer context"
            )

    def new_cache(self, batch: int, length: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions (default: the context)."""
        return KVCache(
            self.config,
            batch,
            length or self.config.context_length,
            self.device,
            self.wpe.weight.dtype,  # never int8, unlike the other weights
        )

    def _init_weights(self) -> None:
        """As GPT-2: normal of 0.02, residual output layers scaled by 1/sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                scale = 1 / math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(parameter, std=INIT_STD * scale)


class GPT(Decoder):
    """The decoder with a language-model head; the head is `wte` itself where weights are tied.

    >>> model = gpt.GPT(gpt.GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    >>> model(torch.tensor([[1, 2, 3]])).shape  # (B, T) to (B, T, V)
    torch.Size([1, 3, 257])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.lm_head = (
            None if config.tie_weights else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        )
        self._init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, C)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) to logits over the next token (..., V)."""
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        idx: Tensor,
        *,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) int64 to logits (B, T, V); the arguments are those of `hidden`."""
        return self.head(self.hidden(idx, cache=cache, padding=padding, documents=documents))


class GPTClassifier(Decoder):
    """The decoder with a linear classification head on one vector of each row.

    >>> config = gpt.GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=8)
    >>> model = gpt.GPTClassifier(config, ["ham", "spam"])
    >>> model(torch.tensor([[1, 2, 3]])).shape  # (B, T) to (B, classes)
    torch.Size([1, 2])

    Args:
        config: the architecture.
        labels: the classes.
        pooling: `last` is the last real position, as `transformers` has it; `mean` the mean of
            the final hidden states of all real positions, which `transformers` does not know.
    """

    def __init__(self, config: GPTConfig, labels: list[str], pooling: Pooling = "last") -> None:
        super().__init__(config)
        self.labels = labels
        self.pooling = pooling
        self.score = nn.Linear(config.n_embd, len(labels), bias=False)
        self._init_weights()

    def forward(self, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class logits.

        Args:
            idx: token ids, (B, T) int64, padded on the right with anything.
            lengths: real tokens in each row, (B,) int64; None where nothing is padded.

        Returns:
            (B, number of classes).
        """
        if lengths is None:
            lengths = torch.full((len(idx),), idx.shape[1], device=idx.device)
        depth = len(self.h) - 1
        return self.top(depth)(self.trunk(idx, lengths, depth), lengths)  # type: ignore[no-any-return]

    def trunk(self, idx: Tensor, lengths: Tensor, depth: int) -> Tensor:
        """The output of the first `depth` blocks, which is the input of `top(depth)`.

        Args:
            idx: token ids, (B, T) int64, padded on the right with anything.
            lengths: real tokens in each row, (B,) int64.
            depth: 0 … n_layer.

        Returns:
            The vectors of the real positions, the rows concatenated: (N, C). After the last block,
            if the last position is pooled, only that position of each row: (B, C).

        Raises:
            InputError: more positions than the context holds.
        """
        T = idx.shape[1]
        self.check_length(T)
        x = self.embed(idx, torch.arange(T, device=idx.device))  # (B, T, C)
        within = depth if self.pooling == "mean" else min(depth, len(self.h) - 1)
        for block in self.h[:within]:
            x = block(x, None, None)  # causal: no real position sees the padding on its right
        x = unpad(x, lengths)  # (N, C)
        return x if within == depth else self.h[-1].last(x, lengths)  # type: ignore[operator]

    def top(self, depth: int) -> ClassifierTop:
        """The part after the first `depth` blocks; parameters are shared with this model."""
        return ClassifierTop(self, depth)


class ClassifierTop(nn.Module):
    """The end of a `GPTClassifier`: its blocks from `depth` on, the final norm and the head.

    If everything before it is frozen, `trunk` is computed only once per text, and only this part
    is trained.
    """

    def __init__(self, model: GPTClassifier, depth: int) -> None:
        super().__init__()
        self.pooling = model.pooling
        self.h = model.h[depth:]
        self.ln_f = model.ln_f
        self.score = model.score

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Class logits (B, classes) from what `GPTClassifier.trunk` returned for these lengths."""
        x = features
        whole = self.h if self.pooling == "mean" else self.h[:-1]
        if len(whole) > 0:
            x = pad(x, lengths)  # (B, T, C)
            for block in whole:
                x = block(x, None, None)
            x = unpad(x, lengths)  # (N, C)
        if self.pooling == "mean":
            x = pad(self.ln_f(x), lengths).sum(1) / lengths[:, None]  # (B, C)
            return self.score(x)  # type: ignore[no-any-return]
        if len(self.h) > 0:
            x = self.h[-1].last(x, lengths)  # type: ignore[operator]
        return self.score(self.ln_f(x))  # type: ignore[no-any-return]
