"""Two recipes for one architecture: how well, and how soon.

The stage `pretrain` as the presets `shakespeare` and `shakespeare-adamw` have it, from the tokens
to the model directory, with its evaluations. The text is Shakespeare's, by the byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.harness import Comparison, Machine, Settings, compare_in_workers, seconds_of
from bench.stages.base import real_file, write_raw_file
from bench.worker import Alternative, Job, as_ours
from pipeline.project.params import Params, load_params
from stages.pretrain import pretrain
from stages.tokenize import tokenize

PRESETS = Path(__file__).parents[2] / "presets"
RECIPES = {"muon": "shakespeare", "adamw": "shakespeare-adamw"}


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """Ours against the recipe of nanoGPT's example for a CPU."""
    file = real_file(settings, "tinyshakespeare.txt", "stories.txt")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_raw_file(file, "documents", "text", folder / "corpus")
        tokenize(
            _params("shakespeare").tokenize,
            corpus=folder / "corpus",
            vocabulary=None,
            out=folder / "tokens",
            metrics=folder / "metrics.json",
            report=folder / "report.json",
        )
        runs = compare_in_workers(
            {
                name: Alternative(train_job, (preset, folder, settings.quick), as_ours)
                for name, preset in RECIPES.items()
            },
            settings,
            warm_up=False,  # a run is long, and the same bytes each time
        )
    yield Comparison(
        title="Pretraining on Shakespeare's bytes, 4 layers, 4 heads, width 128, context 64",
        seconds=seconds_of(runs),
        columns={
            "steps": {name: f"{done[0].result['steps']:.0f}" for name, done in runs.items()},
            "tokens seen": {
                name: f"{done[0].result['tokens']:,.0f}" for name, done in runs.items()
            },
            "validation loss": {
                name: f"{done[0].result['validation_loss']:.4f}" for name, done in runs.items()
            },
        },
        note="Nats a byte over the whole last tenth of the text, of the best weights.",
    )


def _params(preset: str) -> Params:
    return load_params(PRESETS / f"{preset}.yaml")


# --- in the workers -------------------------------------------------------------------------------


def train_job(preset: str, folder: Path, quick: bool) -> Job:
    """The whole stage."""
    params = _params(preset).pretrain
    if quick:
        params = replace(params, train=replace(params.train, steps=4, warmup_steps=1))
    out = folder / preset

    def run() -> dict[str, float]:
        return pretrain(
            params,
            tokens=folder / "tokens",
            out=out / "model",
            metrics=out / "metrics.json",
            history=out / "history.csv",
        )

    return Job(run=run)
