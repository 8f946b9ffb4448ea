"""Run as a program: load a folder of published weights and say what it took."""

import json
import resource
import sys
import time
from pathlib import Path

import psutil
import torch

from gpt.published.load import open_published


def peak_bytes():
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one, too
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    torch.set_num_threads(2)
    if next(Path(sys.argv[1]).glob("*.ckpt.index"), None):
        import tensorflow  # noqa: F401 - seconds and hundreds of MB that are no model's
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    model = open_published(Path(sys.argv[1])).load()
    seconds = time.perf_counter() - start
    grown = peak_bytes() - before
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"seconds": seconds, "ratio": grown / n_bytes}))
