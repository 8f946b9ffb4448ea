"""The loss of a language-model head without holding all of its logits.

GPT-2's head has 50,257 outputs: the logits of 2,048 tokens are 412 MB in fp32, and a plain loss
reads them several times. Here the logits are computed in chunks of rows, and each chunk's
gradient is computed at once, so that no more than one chunk is ever held (the idea of "fused
linear cross-entropy", Hsu et al., 2024, "Liger Kernel", section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 128 << 20
"""The largest chunk of the logits."""
LANES = 64
"""Rows of the buffer are aligned to this many numbers: 50,257 is odd, and matrix products into
unaligned rows take up to a third longer."""
SOFTMAX_ROWS = 32
"""Rows per softmax on a CPU, so that they fit its cache."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of `hidden @ weight.T` against `targets`, in nats.

    Products use autocast's precision if it is on; softmax and sums are in fp32.

    Args:
        hidden: (N, C).
        weight: the head, (V, C).
        targets: classes, (N,) int64, every one counted.

    Returns:
        A scalar in fp32.
    """
    if not torch.is_grad_enabled():  # needs_input_grad would be true even so
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
            total, d_hidden, d_weight = _loss_and_gradients(
                hidden.to(dtype), weight.to(dtype), targets, gradients
            )
        if gradients:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = gradients  # in place: both are read once, here
        for_hidden, for_weight = ctx.dtypes
        return d_hidden.mul_(scale).to(for_hidden), d_weight.mul_(scale).to(for_weight), None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and if wanted the gradients of `hidden` (N, C) and of `weight` (V, C), in fp32."""
    N, C = hidden.shape
    V = weight.shape[0]
    width = -(-V // LANES) * LANES
    chunks = max(1, -(-N * width * hidden.element_size() // CHUNK_BYTES))
    rows = max(1, -(-N // chunks))
    buffer = hidden.new_zeros(min(rows, N), width)  # columns beyond V stay zero
    total = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = hidden.new_empty(N, C, dtype=torch.float32) if gradients else None
    d_weight: Tensor | None = None
    for start in range(0, N, rows):
        part = hidden[start : start + rows]
        padded = buffer[: len(part)]  # (n, width)
        logits = padded[:, :V]
        torch.mm(part, weight.t(), out=logits)
        total -= _softmax_gradient(logits, targets[start : start + rows], gradients)
        if d_hidden is None:
            continue
        d_hidden[start : start + rows] = torch.mm(logits, weight)
        if d_weight is None:
            d_weight = torch.mm(padded.t(), part).float()
        elif part.dtype == torch.float32:
            d_weight.addmm_(padded.t(), part)
        else:  # many chunks must not be summed in half precision
            d_weight += torch.mm(padded.t(), part)
    if d_hidden is not None and d_weight is None:  # no rows
        d_weight = hidden.new_zeros(width, C, dtype=torch.float32)
    return total, d_hidden, None if d_weight is None else d_weight[:V]


def _softmax_gradient(logits: Tensor, targets: Tensor, gradients: bool) -> Tensor:
    """The summed log-probability of the targets; `logits` (n, V) become their own gradient."""
    at_once = SOFTMAX_ROWS if logits.device.type == "cpu" else max(1, len(logits))
    sums = []
    for rows, targets_of in zip(
        torch.split(logits, at_once), torch.split(targets, at_once), strict=True
    ):
        chosen = targets_of[:, None]  # (n, 1)
        logs = rows.log_softmax(-1, dtype=torch.float32)
        sums.append(logs.gather(1, chosen).sum())
        if gradients:
            logs.exp_().scatter_add_(1, chosen, logs.new_full(chosen.shape, -1.0))
            rows.copy_(logs)
    return torch.stack(sums).sum() if sums else logits.new_zeros((), dtype=torch.float32)
