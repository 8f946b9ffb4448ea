"""Muon: the momentum of a matrix, orthogonalized, is its step.

Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks"; the step's size as
in Liu et al. (2025), "Muon is Scalable for LLM Training".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpt.model.parallel import part, put_together

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Muon):
    """PyTorch's Muon, whose step does not depend on how many processes or which processor take it.

    Two things differ. On a CPU the iteration runs in float32, not in bfloat16, which cuts a
    gradient's last digits where their sum in another order would fall elsewhere (and which most
    CPUs compute slowly). And of a matrix that lies in parts (FSDP2) the whole is orthogonalized by
    every process: one exchange a matrix, where the products of parts would take fifteen.

    `adjust_lr_fn` is `match_rms_adamw`: a step is as large as one of AdamW's.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step(matrix, matrix.grad, group)

    def _step(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
        update = orthogonalized(put_together(update))
        rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(part(update, matrix), alpha=-rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought near 1 by a Newton-Schulz iteration.

    They end between about 0.7 and 1.2: the coefficients are chosen for few iterations. In float32
    on a CPU, in bfloat16 elsewhere.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    wide = x.size(0) <= x.size(1)
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x if wide else x.T
