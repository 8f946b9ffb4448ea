"""Whether a training run is well: what its numbers should not do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW = 64
"""Steps that a loss is compared with."""
_ENOUGH = 16
_TIMES = 3.0


def spike(loss: float, before: Sequence[float]) -> float | None:
    """How many times the usual the loss of a step is, if it stands out from those before it.

    It does if it lies more than three times as far above the highest of them as that lies above
    their median: a rule without a scale, so that neither the noise of small batches nor the fall
    of the first steps sets it off.

    Args:
        loss: of this step.
        before: those of the steps before, at most `WINDOW` of them.

    Returns:
        loss / median, or None where nothing stands out.
    """
    if len(before) < _ENOUGH:
        return None
    usual, highest = statistics.median(before), max(before)
    if loss <= highest + _TIMES * (highest - usual) or loss <= usual:
        return None
    return loss / usual if usual > 0 else None
