"""How Python itself is set up in the processes of the pipeline."""

from __future__ import annotations

import atexit
import gc


def collect_seldom() -> None:
    """Let Python look for unreachable cycles after 50,000 new objects, not 700, nor at its end.

    For who imports PyTorch, MLflow or Prefect, whose million objects all stay. Each look goes
    through them: a fifth of the time that the imports take, and a second when the process ends.
    What is in no cycle, a tensor for one, is freed at once as ever.
    """
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
