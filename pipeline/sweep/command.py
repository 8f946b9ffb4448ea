"""Many trainings that differ in parameters, as one command: run, compared, the best one taken.

Each point of a sweep (`pipeline.sweep.points`) is the project under other parameters, brought up to
date beside it (`pipeline.sweep.flow`) and kept in MLflow (`pipeline.sweep.runs`). Of the project's
own files only `params.yaml` changes, and only on request.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from gpt.base.errors import InputError, RunError
from gpt.base.files import whole_file
from pipeline.project.file_locks import stage_lock
from pipeline.project.git import commit_of
from pipeline.project.overrides import is_kept, text_with, write_params
from pipeline.project.params import PARAMS_FILE, check_sections
from pipeline.project.stage_table import STAGES
from pipeline.show.console import make_display, n_of, seconds_in_words
from pipeline.show.markdown import NOTHING, label_of, table
from pipeline.show.terminal import say
from pipeline.sweep.points import Sweep, read_sweep

if TYPE_CHECKING:
    from pipeline.sweep.runs import Outcome, SweepRuns

WORKSPACES = Path(".pipeline") / "sweep"
SWEEP_PAGES = Path("reports") / "sweep"
TEST_SCORES = tuple(
    f"classifier/{name}" for name in ("accuracy", "f1_macro", "roc_auc", "calibration_error")
)
"""The scores on the test messages that a page shows, by the names that `evaluate` gives them."""


def run_sweep(
    root: Path, file: Path, *, jobs: int = 1, promote: bool = False, apply: bool = False
) -> int:
    """Bring every point of a sweep up to date and print what they came to, the best first.

    After an interruption the same command resumes the sweep: finished work is not repeated, and the
    same MLflow runs are used.

    Args:
        root: the project.
        file: the sweep: see `read_sweep`.
        jobs: so many points are worked at together.
        promote: make the best point's version the champion.
        apply: put the best point's values into `params.yaml`.

    Returns:
        The exit code: 0, or that of the signal which stopped it.

    Raises:
        InputError: the file or the request is invalid; nothing has been changed.
        RunError: points failed, or MLflow or Prefect cannot be reached.
    """
    from pipeline.flow.prefect_api import prefect_told, use_api

    commit_of(root, "HEAD")
    check_sections(root / PARAMS_FILE)
    sweep = read_sweep(root, file)
    model = _promotable(sweep) if promote else ""
    if apply and not is_kept(root):
        raise InputError(
            f"--apply: {PARAMS_FILE} holds edits that are kept nowhere else; commit them, or copy "
            "the file into presets/, and try again"
        )
    with stage_lock(root, "sweep"):
        server = use_api(root)

        from pipeline.sweep.flow import Snapshot, run_points
        from pipeline.sweep.runs import SweepRuns

        snapshot = Snapshot(root, root / WORKSPACES / sweep.name)
        whole = snapshot.key.encode() + sweep.name.encode() + file.read_bytes()
        if server:
            server.wait()
        runs = SweepRuns(root, sweep, hashlib.sha256(whole).hexdigest())
        status, stopped = "FAILED", 0
        outcomes: list[Outcome] = []
        try:
            with make_display() as display, prefect_told():
                points = n_of(sweep.trials or len(sweep.known_points()), "point")
                display.line("", f"{file}: {points}; {runs.told} in MLflow")
                outcomes, stopped = run_points(sweep, snapshot, runs, display, jobs)
            if stopped:
                status = "KILLED"
            elif not any(each.error for each in outcomes):
                status = "FINISHED"
        finally:
            snapshot.remove()
            runs.close(status, best_of(sweep, outcomes), markdown(sweep, outcomes))
    if stopped:
        say("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + stopped
    _tell(root, sweep, outcomes, runs, model, apply, snapshot.params)
    return 0


def _promotable(sweep: Sweep) -> str:
    """The registered model that the sweep is about."""
    of_metric = [
        spec.model for spec in STAGES.values() if sweep.metric.file in spec.outputs.values()
    ]
    swept = [STAGES[path.partition(".")[0]].model for path in sweep.paths]
    for models in ({each.name for each in found if each} for found in (of_metric, swept)):
        if len(models) == 1:
            return models.pop()
    raise InputError(
        "--promote: it cannot be told which model; compare by the metrics of the stage that makes "
        "it, or promote by hand: gpt-pipeline promote MODEL --version N"
    )


def best_of(sweep: Sweep, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best point, the first one in a tie; None if there is none."""
    return next((each for each in _sorted(sweep, outcomes) if each.value is not None), None)


def _sorted(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first, those without a value last."""
    sign = 1 if sweep.metric.goal == "minimize" else -1
    return sorted(
        outcomes, key=lambda each: (each.value is None, sign * (each.value or 0.0))
    )  # stable


def markdown(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The points as a page of Markdown, the best first; of several seeds also the mean."""
    names = [sweep.metric.name]
    for stage in sweep.stages:
        headline = STAGES[stage].headline if stage in STAGES else ()
        names += [known for name in headline for known in (name, f"{stage}/{name}")]
    if sweep.test_scores:
        names += TEST_SCORES
    shown = [n for n in dict.fromkeys(names) if any(n in each.metrics for each in outcomes)]
    models = list(dict.fromkeys(model for each in outcomes for model in each.versions))
    columns = ["point", *map(label_of, shown), "took", *models, "MLflow run"]
    rows: list[list[str]] = []
    choices: dict[str, list[Outcome]] = {}
    for each in _sorted(sweep, outcomes):
        figures = [f"{each.metrics[name]:.4g}" if name in each.metrics else "" for name in shown]
        rows.append(
            [
                each.point.name,
                *(["failed"] * len(shown) if each.error else figures),
                seconds_in_words(each.seconds) if each.seconds else NOTHING,
                *(f"v{each.versions[name]}" if name in each.versions else "" for name in models),
                ", ".join(run[:8] for run in each.runs.values()) or NOTHING,
            ]
        )
        if each.point.choice and not each.error:
            choices.setdefault(each.point.choice, []).append(each)
    align = "l" + "r" * (len(columns) - 2) + "l"
    lines = [f"# Sweep {sweep.name}", "", table(columns, rows, align)]
    if choices:
        lines += ["", "Means over the seeds, and the lowest test accuracy:", ""]
        lines.append(_means(choices, shown))
    if best := best_of(sweep, outcomes):
        lines += ["", f"Best: {best.point.name}"]
    return "\n".join(lines) + "\n"


def _means(choices: Mapping[str, Sequence[Outcome]], names: Sequence[str]) -> str:
    rows: list[list[str]] = []
    for choice, outcomes in choices.items():
        means = [mean(each.metrics.get(name, nan) for each in outcomes) for name in names]
        lowest = min(each.metrics.get(TEST_SCORES[0], nan) for each in outcomes)
        rows.append([choice, *(f"{value:.4f}" for value in (*means, lowest))])
    return table(["choice", *map(label_of, names), "lowest"], rows)


def _tell(
    root: Path,
    sweep: Sweep,
    outcomes: Sequence[Outcome],
    runs: SweepRuns,
    model: str,
    apply: bool,
    params: bytes,
) -> None:
    page = markdown(sweep, outcomes)
    path = SWEEP_PAGES / f"{sweep.name}.md"
    with whole_file(root / path) as partial_file:
        partial_file.write_text(page, encoding="utf-8")
    say(f"\n{page}")
    executed = n_of(sum(len(each.executed) for each in outcomes), "stage")
    say(f"{executed} executed; the table is in {path}, the runs are\n{runs.url}")
    best = best_of(sweep, outcomes)
    if best is not None and model:
        _promote(root, model, best)
    if best is not None and apply:
        if (root / PARAMS_FILE).read_bytes() != params or not is_kept(root):
            raise InputError(
                f"--apply: {PARAMS_FILE} was edited while the sweep ran, and is left as it is; "
                "run the same command again"
            )
        write_params(root, text_with(params, best.point.set))
        say(f"{PARAMS_FILE} now has {best.point.name}; `gpt-pipeline run` takes up what is there")
    if failed := [each.point.name for each in outcomes if each.error]:
        raise RunError(
            f"{len(failed)} of {len(outcomes)} points failed ({'; '.join(failed)}), as was said "
            "above; correct what was said and run the same command again"
        )


def _promote(root: Path, model: str, best: Outcome) -> None:
    from pipeline.verdict.promotion import promote_by_hand

    if model not in best.versions:
        raise RunError(
            f"--promote: MLflow has no version of {model} with the best point's files; "
            "`gpt-pipeline run` registers one once params.yaml has its values (--apply)"
        )
    version = promote_by_hand(root, model, best.versions[model])
    say(f"{model} version {version} is the champion")
