"""Causal self-attention: PyTorch's fused kernel, and our own kernel for training on a CPU.

`scaled_dot_product_attention` is optimized for graphics cards. Its CPU kernel multiplies in small
tiles and leaves the processor's bf16 instructions half used; with dropout it is not used at all.
`BlockedAttention` processes the queries in blocks of rows: scores against the keys up to the
block's end, softmax, product with the values. Both products are batched matrix products of the
library. Scores to the right of a block's end are never computed. The probabilities are kept for
the backward pass, which takes four more products per block (Vaswani et al., 2017, section 3.2.1).

Documents that share a row are separated by a mask of minus infinity, and keys that no query of a
block sees are skipped (`Documents`).

Shapes: B rows, T positions, H heads of D channels, C = H D.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128
"""Rows of scores per block, as measured: fewer mean more calls, more mean more masked scores."""
DOCUMENT_BLOCK = 64
"""The same if documents share a row: larger blocks then have more keys of other documents."""


class _Block(NamedTuple):
    """A block of query rows, the slices of their keys (one or two), and the mask."""

    rows: slice
    keys: tuple[slice, ...]
    mask: Tensor
    """(rows, keys) or (B, 1, rows, keys): minus infinity where a query does not see a key,
    otherwise 0. It is added to the scores: `masked_fill` on every head takes twice as long."""


class Documents:
    """Which positions see each other in rows of several documents; shared by all layers.

    Args:
        numbers: the document number of each position, (B, T) int64, equal numbers adjacent. A
            document sees only itself. A negative number, at a row's beginning, marks the opening
            that all documents of the row continue and see.
    """

    def __init__(self, numbers: Tensor) -> None:
        places = torch.arange(numbers.shape[1], device=numbers.device)
        begins = numbers.diff(dim=1, prepend=numbers[:, :1]) != 0
        opening = (numbers < 0).sum(1, keepdim=True)  # (B, 1)
        self._numbers = numbers
        self._first = torch.where(begins, places, 0).cummax(1).values  # (B, T)
        self.positions = places - self._first + torch.where(numbers < 0, 0, opening)
        """The position within its document, the row's opening included: (B, T) int64."""
        self._blocks: dict[torch.dtype, list[_Block]] = {}
        # on a graphics card computed here, before code that may be compiled
        if numbers.device.type != "cpu":
            self.seen = self._visible()

    @functools.cached_property
    def seen(self) -> Tensor:
        """(B, 1, T, T) bool: the query, in its row, sees the key."""
        return self._visible()

    def blocks(self, dtype: torch.dtype) -> list[_Block]:
        """The scores of the rows in parts."""
        if dtype not in self._blocks:
            opening = int((self._numbers < 0).sum(1).max())
            rows = _rows(self._numbers.shape[1], DOCUMENT_BLOCK)
            self._blocks[dtype] = [self._block(each, opening, dtype) for each in rows]
        return self._blocks[dtype]

    def _block(self, rows: slice, opening: int, dtype: torch.dtype) -> _Block:
        begin = int(self._first[:, rows.start].min())  # of the block's first document
        keys: tuple[slice, ...] = (slice(begin, rows.stop),)
        if begin <= opening:
            keys = (slice(0, rows.stop),)
        elif opening:
            keys = (slice(0, opening), *keys)
        seen = self._visible(rows, keys)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return _Block(rows, keys, mask)

    def _visible(
        self, rows: slice = slice(None), keys: tuple[slice, ...] = (slice(None),)
    ) -> Tensor:
        places = torch.arange(self._numbers.shape[1], device=self._numbers.device)
        of_key = _take(self._numbers, keys)[:, None]  # (B, 1, keys)
        own = (self._numbers[:, rows, None] == of_key) | (of_key < 0)  # (B, rows, keys)
        return (own & (places[rows, None] >= _take(places[None], keys)))[:, None]


def causal_attention(
    qkv: Tensor, n_head: int, dropout: float = 0.0, documents: Documents | None = None
) -> Tensor:
    """Causal scaled dot-product attention.

    Args:
        qkv: queries, keys and values side by side, (B, T, 3C).
        n_head: H; the heads lie side by side in each third.
        dropout: the share of the probabilities that is dropped.
        documents: the rows' documents, which do not see each other; None if each row is one.

    Returns:
        (B, T, C), the heads side by side.
    """
    if qkv.device.type == "cpu" and (qkv.requires_grad or qkv.dtype == torch.bfloat16):
        return BlockedAttention.apply(qkv, n_head, dropout, documents)  # type: ignore[no-any-return, no-untyped-call]
    q, k, v = heads(qkv, 3, n_head)
    if documents is None:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=documents.seen, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


def heads(x: Tensor, parts: int, n_head: int) -> tuple[Tensor, ...]:
    """(B, T, parts x C) as `parts` tensors (B, H, T, D); views, nothing is copied."""
    B, T, width = x.shape
    return x.view(B, T, parts, n_head, width // (parts * n_head)).permute(2, 0, 3, 1, 4).unbind(0)


class BlockedAttention(torch.autograd.Function):
    """`causal_attention` in blocks of queries; call `apply(qkv, n_head, dropout, documents)`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, n_head: int, dropout: float, documents: Documents | None = None
    ) -> Tensor:
        """(B, T, 3C) to (B, T, C)."""
        B, T, width = qkv.shape
        D = width // (3 * n_head)
        # one copy, after which each head's rows lie together: (3, B H, T, D)
        parts = torch.stack(heads(qkv, 3, n_head)).view(3, B * n_head, T, D)
        q, k, v = parts.unbind(0)
        blocks = _causal(T, qkv.dtype, BLOCK) if documents is None else documents.blocks(qkv.dtype)
        scaled = q if documents is None else q * D**-0.5
        y = torch.empty_like(v)
        kept: list[Tensor] = []
        for rows, keys, mask in blocks:
            own = _take(k, keys).transpose(1, 2)  # (B H, D, keys)
            if mask.dim() == 2:
                scores = torch.baddbmm(mask, q[:, rows], own, alpha=D**-0.5)  # (B H, rows, keys)
            else:
                scores = torch.bmm(scaled[:, rows], own)
                scores.view(B, n_head, *mask.shape[2:]).add_(mask)
            weights = scores.softmax(-1)
            kept.append(weights)
            if dropout:
                weights, left = torch.native_dropout(weights, dropout, True)
                kept.append(left)
            # not out=: the library's product is slower with a non-contiguous output
            y[:, rows] = torch.bmm(weights, _take(v, keys))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(parts, *kept)
            ctx.n_head, ctx.dropout = n_head, dropout
            ctx.places = [(rows, keys) for rows, keys, _ in blocks]
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
        for index, (rows, keys) in enumerate(reversed(ctx.places)):
            left = kept.pop() if ctx.dropout else None
            weights = used = kept.pop()  # (B H, rows, keys)
            d_weights = torch.bmm(dy[:, rows], _take(v, keys).transpose(1, 2))
            if left is not None:
                scaled = left.to(weights.dtype) * (1 / (1 - ctx.dropout))
                d_weights *= scaled
                used = weights * scaled
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores *= D**-0.5
            dq[:, rows] = torch.bmm(d_scores, _take(k, keys))
            d_keys = torch.bmm(d_scores.transpose(1, 2), q[:, rows])
            d_values = torch.bmm(used.transpose(1, 2), dy[:, rows])
            if index == 0 and keys == (slice(0, T),):  # written first, the others are added
                dk.copy_(d_keys)
                dv.copy_(d_values)
                continue
            if index == 0:
                dk.zero_()
                dv.zero_()
            at = 0
            for each in keys:
                n = each.stop - each.start
                dk[:, each] += d_keys[:, at : at + n]
                dv[:, each] += d_values[:, at : at + n]
                at += n
        d_qkv = d_parts.view(3, B, ctx.n_head, T, D).permute(1, 3, 0, 2, 4)
        return d_qkv.reshape(B, T, 3 * C), None, None, None


def _take(x: Tensor, places: tuple[slice, ...]) -> Tensor:
    """x (n, T, ...) at these positions; a view if they are one slice."""
    parts = [x[:, each] for each in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@functools.lru_cache(maxsize=8)
def _causal(length: int, dtype: torch.dtype, size: int) -> list[_Block]:
    """The blocks of rows that are one document each."""
    future = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)
    return [
        _Block(rows, (slice(0, rows.stop),), future[rows, : rows.stop])
        for rows in _rows(length, size)
    ]


def _rows(length: int, size: int) -> list[slice]:
    return [slice(start, min(length, start + size)) for start in range(0, length, size)]
