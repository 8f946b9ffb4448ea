"""Run as a program: the stage load_gpt2 on a small model, then on a folder; say what that took."""

import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from loading import peak_bytes

from stages.load_gpt2 import LoadGPT2Params, load_gpt2


def run(weights):
    with tempfile.TemporaryDirectory(dir=weights.parent) as folder:
        here = Path(folder)
        return load_gpt2(
            LoadGPT2Params(), weights=weights, out=here / "model", metrics=here / "metrics.json"
        )


if __name__ == "__main__":
    small, weights = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    run(small)  # what the libraries touch when they are first used is not the model's
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    figures = run(weights)
    seconds = time.perf_counter() - start
    grown = peak_bytes() - before
    n_bytes = 4 * figures["parameters"]
    print(json.dumps({"seconds": seconds, "ratio": grown / n_bytes}))
