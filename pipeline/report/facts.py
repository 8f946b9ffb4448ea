"""What the report of a run tells: scores, verdicts, answers, where it all came from, what it cost.

Facts of `reports/`, `.pipeline/`, `data/raw/`, each `dvc.lock`, git and MLflow. Where MLflow cannot
be asked, what it alone knows is None, and `Facts.tracking` says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.base.errors import InputError, RunError, in_one_line
from gpt.base.files import read_json, sha256_of
from pipeline.dag.lock import LockEntry, read_lock
from pipeline.data.facts import DATA_SETS, RAW, RawSource, raw_sources
from pipeline.project.secrets import without_credentials
from pipeline.project.stage_table import STAGES
from pipeline.tracking.connection import connect, run_that_made, tracking_uri
from pipeline.tracking.database import database_file
from pipeline.tracking.differences import Change, changes
from pipeline.tracking.keys import flatten_metrics, present_metrics
from pipeline.tracking.provenance import git_state
from pipeline.tracking.registry import MD5_TAG
from pipeline.tracking.run import PEAK_MEMORY
from pipeline.tracking.run_notes import last_run
from pipeline.verdict.promotion import CHAMPION_ANSWERS, PREDICTIONS, Decision, read_decisions

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.mlflow_classes import MlflowClient, Run

JUDGE = Path("reports/judge/summary.json")

_SHOWN_ANSWERS = 6
_SHOWN_MISTAKES = 10
_EVALUATE_AGAIN = "run `gpt-pipeline run --force evaluate`"


@dataclass(frozen=True, kw_only=True, slots=True)
class LastRun:
    """The run that made what a stage's outputs are; what is not known is None.

    Attributes:
        run_id: its MLflow run.
        seconds: how long it took.
        ended: when it ended.
        commit: of the code.
        dirty: the code differed from that commit.
        peak_memory: the most memory its process had, in megabytes.
        tokens: how many it processed.
        params: its parameters, default values included.
        before: the name of the run before it; None where it was the first.
        differences: from that run, in parameters, inputs and code.
    """

    run_id: str | None = None
    seconds: float | None = None
    ended: datetime | None = None
    commit: str | None = None
    dirty: bool = False
    peak_memory: float | None = None
    tokens: float | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    before: str | None = None
    differences: Sequence[Change] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that the report tells.

    Attributes:
        made: when the facts were gathered.
        commit: the one checked out; empty where there is no git repository.
        dirty: tracked files differ from it, apart from what the pipeline writes.
        license: the first line of the project's licence.
        results: the final metrics of each stage.
        decisions: by registered model; one that is missing was not compared with a champion yet.
        judgement: `reports/judge/summary.json`; None where no judge scored these answers.
        n_answers: records of the assistant's test part.
        answers: some of them, at equal distances: the `task`, and the answers by `whose` they are.
        mistakes: the test messages that the classifier got most wrong, the worst first: `text`,
            `actual` and `predicted` class, `probability_actual`.
        sources: the sources of each raw folder that has any.
        recorded: the stages that `dvc.lock` has, in its order.
        runs: of the stages that ended well when they last ran.
        versions: of the registered models, those with the bytes that `dvc.lock` has.
        tracking: what MLflow could not be asked, and why; empty where it could.
    """

    made: datetime
    commit: str
    dirty: bool
    license: str
    results: Mapping[str, Mapping[str, float]]
    decisions: Mapping[str, Decision]
    judgement: Mapping[str, Any] | None
    n_answers: int
    answers: Sequence[Mapping[str, Any]]
    mistakes: Sequence[Mapping[str, Any]]
    sources: Mapping[str, Sequence[RawSource]]
    recorded: Mapping[str, LockEntry]
    runs: Mapping[str, LastRun]
    versions: Mapping[str, int]
    tracking: str

    def scores(self, model: str) -> dict[str, float]:
        """What the evaluation measured of `pretrain`, `gpt2`, `classifier` or `assistant`."""
        start = f"{model}/"
        measured = self.results["evaluate"].items()
        return {key.removeprefix(start): n for key, n in measured if key.startswith(start)}

    def base_of(self, stage: str) -> str | None:
        """The base that a stage fine-tuned; None if it has none, or it is not recorded."""
        section = self.recorded[stage].params.get(stage) if stage in self.recorded else None
        return section.get("base") if isinstance(section, dict) else None


def report_facts(root: Path) -> Facts:
    """Gather what there is to tell of the project's last results.

    Raises:
        InputError: the pipeline has not been run to its end, or a file cannot be read.
    """
    answers = root / PREDICTIONS / "assistant.csv"
    paths = {name: spec.outputs.get("metrics") for name, spec in STAGES.items()}
    metrics = {name: root / path for name, path in paths.items() if path}
    if not metrics["evaluate"].is_file() or not answers.is_file():
        raise InputError(
            f"{metrics['evaluate'].parent}: nothing to report yet; run `gpt-pipeline run`"
        )
    results = {
        name: read_json(path, missing="", remedy=f"run `gpt-pipeline run --force {name}`")
        for name, path in metrics.items()
        if path.is_file()
    }
    judgement = None
    if (root / JUDGE).is_file():
        judgement = read_json(root / JUDGE, missing="", remedy="remove it")
        if judgement.get("answers") != sha256_of(answers):
            judgement = None  # it is of an earlier version's answers
    decisions = {each.model: each for each in read_decisions(root)}
    sources = {name: raw_sources(root / RAW / name) for name in DATA_SETS}
    recorded = read_lock(root)
    runs, versions, tracking = _tracked(root, recorded)
    git = git_state(root)
    table = _table(answers, ("instruction", "input", "reference", "answer", "base_answer"))
    return Facts(
        made=datetime.now().astimezone(),
        commit=git.get("git.commit", ""),
        dirty=git.get("git.dirty") == "true",
        license=_first_line(root / "LICENSE"),
        results={name: flatten_metrics(each) for name, each in results.items()},
        decisions=decisions,
        judgement=judgement,
        n_answers=len(table),
        answers=_answers(
            table, root / CHAMPION_ANSWERS / "assistant.csv", decisions.get("assistant")
        ),
        mistakes=_mistakes(root / PREDICTIONS / "classifier_most_wrong.csv"),
        sources={name: found for name, found in sources.items() if found},
        recorded=recorded,
        runs=runs,
        versions=versions,
        tracking=tracking,
    )


# --- files ----------------------------------------------------------------------------------------


def _first_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return next(filter(None, map(str.strip, lines)), "")


def _answers(
    table: pd.DataFrame, champion: Path, decision: Decision | None
) -> list[dict[str, Any]]:
    others: dict[tuple[str, str], str] = {}
    if champion.is_file() and decision is not None:
        rows = _table(champion, ("example", "asked", "answer", "champion"))
        rows = rows[rows["champion"] == str(decision.champion)]  # otherwise of another champion
        asked = zip(rows["example"], rows["asked"], strict=True)
        others = dict(zip(asked, rows["answer"], strict=True))
    shown = min(_SHOWN_ANSWERS, len(table))
    found = []
    for i in (len(table) * n // shown for n in range(shown)):
        row = {str(key): value for key, value in table.iloc[i].items()}
        whose = {"reference": row["reference"], "before fine-tuning": row["base_answer"]}
        # the record that the champion answered may be another one
        if decision is not None and (str(i), row["instruction"]) in others:
            words = f"previous champion, version {decision.champion}"
            whose[words] = others[str(i), row["instruction"]]
        found.append({"task": _task(row), "whose": {**whose, "this version": row["answer"]}})
    return found


def _task(row: Mapping[str, str]) -> str:
    """All that was asked; `earlier` holds the turns before it, as JSON messages."""
    earlier = json.loads(row.get("earlier") or "[]")
    turns = [f"{message['role']}: {message['content']}" for message in earlier]
    return "\n".join(filter(None, [*turns, row["instruction"], row["input"]]))


def _mistakes(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = _table(path, ("part", "text", "actual", "predicted", "probability_actual"))
    rows["probability_actual"] = rows["probability_actual"].astype(float)
    worst = rows[rows["part"] == "test"].head(_SHOWN_MISTAKES)
    return [{str(key): value for key, value in row.items()} for row in worst.to_dict("records")]


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({in_one_line(error)}); {_EVALUATE_AGAIN}"
        ) from None
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path}: has no column {missing[0]}; {_EVALUATE_AGAIN}")
    return table


# --- MLflow ---------------------------------------------------------------------------------------


def _tracked(
    root: Path, recorded: Mapping[str, LockEntry]
) -> tuple[dict[str, LastRun], dict[str, int], str]:
    """The runs by stage, the versions by model, and why MLflow could not be asked."""
    from pipeline.tracking.mlflow_classes import MlflowException

    notes = {name: last_run(root, name) for name in STAGES}
    notes = {name: note for name, note in notes.items() if note.get("status") == "FINISHED"}
    runs = {name: LastRun(seconds=note.get("seconds")) for name, note in notes.items()}
    local = database_file(tracking_uri(root))
    if local is not None and not local.is_file():
        return runs, {}, f"MLflow was not asked: there is no {local.name}"
    gone = []
    try:
        client = connect(root)
        for name, note in notes.items():
            outputs = recorded[name].outputs if name in recorded else {}
            run = run_that_made(client, name, str(note["run_id"]), outputs)
            if run is None:
                gone.append(name)
            else:
                runs[name] = _last_run(client, run, note)
        versions = _versions(client, recorded)
    except (RunError, MlflowException) as error:
        return runs, {}, f"MLflow was not asked: {without_credentials(in_one_line(error))}"
    return runs, versions, f"MLflow has no run of {', '.join(gone)} any more" if gone else ""


def _last_run(client: MlflowClient, run: Run, note: Mapping[str, Any]) -> LastRun:
    metrics, tags = present_metrics(run.data.metrics), run.data.tags
    began, ended = run.info.start_time, run.info.end_time
    seconds = note.get("seconds")
    if run.info.run_id != note["run_id"] and ended:
        seconds = (ended - began) / 1000
    found = LastRun(
        run_id=run.info.run_id,
        seconds=seconds,
        ended=datetime.fromtimestamp(ended / 1000).astimezone() if ended else None,
        commit=tags.get("git.commit"),
        dirty=tags.get("git.dirty") == "true",
        peak_memory=metrics.get(PEAK_MEMORY),
        tokens=metrics.get("tokens"),
        params=dict(run.data.params),
    )
    before = client.search_runs(
        [run.info.experiment_id],
        f"attributes.status = 'FINISHED' and attributes.start_time < {began}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not before:
        return found
    differences = changes(_made_of(before[0]), _made_of(run))
    return replace(found, before=before[0].info.run_name, differences=differences)


def _made_of(run: Run) -> dict[str, str]:
    """Parameters, inputs and code of a run."""
    made_of = sorted(run.data.params.items()) + sorted(
        (key, value)
        for key, value in run.data.tags.items()
        if key.startswith("input.") or key in ("git.commit", "git.dirty")
    )
    return {key: without_credentials(value) for key, value in made_of}


def _versions(client: MlflowClient, recorded: Mapping[str, LockEntry]) -> dict[str, int]:
    """By registered model: the version whose bytes were evaluated, or were written last."""
    versions = {}
    evaluated = recorded["evaluate"].inputs if "evaluate" in recorded else {}
    for stage, spec in STAGES.items():
        if spec.model is None or stage not in recorded:
            continue
        # the evaluated one comes first: another may have been trained since
        out = spec.outputs["out"]
        md5 = evaluated.get(out) or recorded[stage].outputs.get(out, "")
        known = client.search_model_versions(
            f"name = '{spec.model.name}' and tags.`{MD5_TAG}` = '{md5}'"
        )
        if known:
            versions[spec.model.name] = max(int(each.version) for each in known)
    return versions
