"""Causal self-attention: PyTorch's fused kernel, and on the CPU one of its own for training.

`scaled_dot_product_attention` is written for graphics cards. Its CPU kernel multiplies in small
tiles and leaves the processor's bf16 instructions half used; with dropout it is not used at all.
`BlockedAttention` goes through the queries in blocks of rows: scores of a block against the keys
up to its end, softmax, product with the values, each one batched matrix product of the library.
What lies to the right of a block's end is never computed, and the probabilities are kept for the
backward pass, which is four more products a block (Vaswani et al., 2017, section 3.2.1).

Documents that share a row are kept apart by minus infinity between them.

Shapes: B rows, T positions, H heads of D channels, C = H D.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
"""Rows of scores at a time, as measured: fewer cost calls, more what lies past the diagonal."""


def causal_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, documents: Tensor | None = None
) -> Tensor:
    """Each position's mean of the values up to it, weighed by how its query meets their keys.

    Args:
        qkv: queries, keys and values side by side, (B, T, 3C).
        n_head: H; the heads lie side by side in each third.
        dropout: the share of the probabilities that is dropped.
        documents: the number of the document of each position, (B, T) int64, which then sees no
            other; None where a row is all one.

    Returns:
        (B, T, C), the heads side by side.
    """
    if qkv.device.type == "cpu" and (qkv.requires_grad or qkv.dtype == torch.bfloat16):
        return BlockedAttention.apply(qkv, n_head, dropout, documents)  # type: ignore[no-any-return, no-untyped-call]
    q, k, v = heads(qkv, 3, n_head)
    if documents is None:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    else:
        seen = (documents[:, :, None] == documents[:, None]).tril()[:, None]  # (B, 1, T, T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def heads(x: Tensor, parts: int, n_head: int) -> tuple[Tensor, ...]:
    """(B, T, parts x C) as `parts` tensors (B, H, T, D); views, nothing is copied."""
    B, T, width = x.shape
    return x.view(B, T, parts, n_head, width // (parts * n_head)).permute(2, 0, 3, 1, 4).unbind(0)


@functools.lru_cache(maxsize=8)
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """(length, length): minus infinity where a key comes after the query, else 0."""
    return torch.full((length, length), -torch.inf, dtype=dtype).triu(1)


class BlockedAttention(torch.autograd.Function):
    """`causal_attention` in blocks of queries; call `apply(qkv, n_head, dropout, documents)`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, n_head: int, dropout: float, documents: Tensor | None = None
    ) -> Tensor:
        """(B, T, 3C) to (B, T, C)."""
        B, T, width = qkv.shape
        D = width // (3 * n_head)
        # one copy, after which each head's rows lie together: (3, B H, T, D)
        parts = torch.stack(heads(qkv, 3, n_head)).view(3, B * n_head, T, D)
        q, k, v = parts.unbind(0)
        future = _future(T, qkv.dtype)
        y = torch.empty_like(v)
        kept: list[Tensor] = []
        for rows in _blocks(T):
            end = rows.stop
            scores = torch.baddbmm(  # (B H, rows, end)
                future[rows, :end], q[:, rows], k[:, :end].transpose(1, 2), alpha=D**-0.5
            )
            if documents is not None:
                scores.view(B, n_head, -1, end).add_(_others(documents, rows, qkv.dtype))
            weights = scores.softmax(-1)
            kept.append(weights)
            if dropout:
                weights, mask = torch.native_dropout(weights, dropout, True)
                kept.append(mask)
            # not out=: the library's product is slower into rows that do not lie together
            y[:, rows] = torch.bmm(weights, v[:, :end])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(parts, *kept)
            ctx.n_head, ctx.dropout = n_head, dropout
        return y.view(B, n_head, T, D).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of `qkv` from that of the result."""
        parts, *kept = ctx.saved_tensors
        q, k, v = parts.unbind(0)
        (gradient,) = gradients
        B, T, C = gradient.shape
        D = C // ctx.n_head
        (dy,) = heads(gradient, 1, ctx.n_head)
        dy = dy.reshape(B * ctx.n_head, T, D)
        d_parts = torch.empty_like(parts)
        dq, dk, dv = d_parts.unbind(0)
        for rows in reversed(_blocks(T)):
            end = rows.stop
            mask = kept.pop() if ctx.dropout else None
            weights = used = kept.pop()  # (B H, rows, end)
            d_weights = torch.bmm(dy[:, rows], v[:, :end].transpose(1, 2))
            if mask is not None:
                scaled = mask.to(weights.dtype) * (1 / (1 - ctx.dropout))
                d_weights *= scaled
                used = weights * scaled
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores *= D**-0.5
            dq[:, rows] = torch.bmm(d_scores, k[:, :end])
            d_keys = torch.bmm(d_scores.transpose(1, 2), q[:, rows])
            d_values = torch.bmm(used.transpose(1, 2), dy[:, rows])
            if end == T:  # the first block seen fills what the others add to
                dk.copy_(d_keys)
                dv.copy_(d_values)
            else:
                dk[:, :end] += d_keys
                dv[:, :end] += d_values
        d_qkv = d_parts.view(3, B, ctx.n_head, T, D).permute(1, 3, 0, 2, 4)
        return d_qkv.reshape(B, T, 3 * C), None, None, None


def _others(documents: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """(B, 1, rows, end): minus infinity where a key is of another document, else 0.

    Added, as measured: filling the scores of every head takes twice as long.
    """
    other = documents[:, rows, None] != documents[:, None, : rows.stop]
    return torch.zeros(other.shape, dtype=dtype).masked_fill_(other, -torch.inf)[:, None]


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(length, start + BLOCK)) for start in range(0, length, BLOCK)]
