"""What the report of a run tells: scores, verdicts, answers, where it all came from, what it cost.

Facts of `reports/`, `.pipeline/`, `data/raw/`, each `dvc.lock`, git and MLflow. Where MLflow cannot
be asked, what it alone knows is None, and `Facts.tracking` says why.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.base.errors import InputError, RunError, first_problem, in_one_line
from gpt.base.files import sha256_of, write_json
from gpt.base.labels import class_of
from pipeline.dag.lock import LockEntry, read_lock
from pipeline.data.facts import RAW, RawSource, raw_sources
from pipeline.project.secrets import without_credentials
from pipeline.project.stage_table import STAGES
from pipeline.tracking.connection import connect, run_that_made, tracking_uri
from pipeline.tracking.database import database_file
from pipeline.tracking.keys import flatten_metrics, present_metrics
from pipeline.tracking.provenance import git_state
from pipeline.tracking.registry import MD5_TAG
from pipeline.tracking.run import PEAK_MEMORY
from pipeline.tracking.run_notes import last_run
from pipeline.verdict.promotion import ANSWERS, Decision, read_decisions

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.mlflow_classes import MlflowClient, Run

EVALUATION = Path("reports/evaluation/metrics.json")
PREDICTIONS = Path("reports/evaluation/predictions")
JUDGE = Path("reports/judge/summary.json")

SHOWN_WRONG = 10
"""So many of the messages are shown that the classifier was most wrong about."""

_ANSWERS = Path(".pipeline/tracked.json")
"""What MLflow said, and of which runs."""

# a field that a later version adds is no mistake
_CONFIG = ConfigDict(extra="ignore")


# --- scores ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """A score, and the ends of its 95 % interval where one was measured."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured of one model, as `reports/evaluation/metrics.json` has it."""

    figures: Mapping[str, float]

    def get(self, name: str) -> Score | None:
        """A score by its name; None where it was not measured."""
        if name not in self.figures:
            return None
        figures = self.figures
        return Score(figures[name], figures.get(f"{name}_low"), figures.get(f"{name}_high"))

    def parts(self, name: str) -> list[str]:
        """Of what a score was measured apart: `a` and `b` where there are `NAME/a` and `NAME/b`."""
        start = f"{name}/"
        return [key.removeprefix(start) for key in self.figures if key.startswith(start)]

    @property
    def labels(self) -> list[str]:
        """The classes of a classifier."""
        keys = (key.removeprefix("recall_") for key in self.figures if key.startswith("recall_"))
        return sorted(label for label in map(class_of, keys) if label is not None)


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Judged:
    """What a judge gave to one model's answers.

    `mean` is over the `judged` ones of all `n`; None where no answer could be judged.
    """

    mean: float | None = None
    judged: int
    unparsable: int
    failed: int
    n: int


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Judge:
    """Who judged, and the sha256 of what it was asked."""

    model: str
    prompt: str


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)
class Judgement:
    """`reports/judge/summary.json`: the judge, and its summary by whose answers they are."""

    answers: str
    """The sha256 of the table of answers."""
    judge: Judge
    summaries: dict[str, Judged]


# --- answers and messages -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked of the assistant, and what it and others answered; None: was not asked."""

    task: str
    reference: str
    base: str
    champion: str | None
    assistant: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A test message that the classifier took for another class."""

    text: str
    actual: str
    predicted: str
    probability: float
    """That the classifier gave the actual class."""


# --- where it came from, and what it cost ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """A parameter, an input or the code of a stage's run that was another in the run before."""

    what: str
    before: str | None
    now: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """The last run of a stage that ended well; what is not known is None.

    Attributes:
        run_id: its MLflow run.
        seconds: how long it took.
        ended: when it ended.
        commit: of the code.
        dirty: the code differed from that commit.
        peak_memory: the most memory its process had, in megabytes.
        tokens: how many it processed.
        params: its parameters, those by default too.
        before: the name of the run before it; None where it was the first.
        differences: from that run.
    """

    run_id: str | None = None
    seconds: float | None = None
    ended: datetime | None = None
    commit: str | None = None
    dirty: bool | None = None
    peak_memory: float | None = None
    tokens: int | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    before: str | None = None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """All that the report tells.

    Attributes:
        made: when the facts were gathered.
        commit: that is checked out; empty where there is no git repository.
        dirty: tracked files differ from it, beside what the pipeline writes.
        license: the first line of the project's licence.
        evaluation: what was measured, by `pretrain`, `gpt2`, `classifier` and `assistant`.
        results: the final metrics of each stage.
        decisions: by registered model; one that is missing was not compared with a champion yet.
        judgement: None where no judge was asked.
        answers: all records of the assistant's test part, in order.
        wrong: the test messages that the classifier was most wrong about, the worst first.
        sources: the sources of each raw folder.
        recorded: the stages that `dvc.lock` has, in its order.
        executions: the stages that ended well when they last ran.
        versions: of the registered models, those with the bytes that `dvc.lock` has.
        tracking: what MLflow could not be asked, and why; empty where it could.
        histories: the training curves of each stage that has them.
        confusion: the table of which classes were taken for which; None where there is none.
    """

    made: datetime
    commit: str
    dirty: bool
    license: str
    evaluation: Mapping[str, Scores]
    results: Mapping[str, Mapping[str, float]]
    decisions: Mapping[str, Decision]
    judgement: Judgement | None
    answers: Sequence[Answer]
    wrong: Sequence[Wrong]
    sources: Mapping[str, Sequence[RawSource]]
    recorded: Mapping[str, LockEntry]
    executions: Mapping[str, Execution]
    versions: Mapping[str, int]
    tracking: str
    histories: Mapping[str, Path]
    confusion: Path | None


def report_facts(root: Path, *, ask: bool = True) -> Facts:
    """Gather what there is to tell of the project's last results.

    Args:
        root: the project.
        ask: ask MLflow even if it said all there is to know of the same runs before.

    Raises:
        InputError: the pipeline has not been run to its end, or a file cannot be read.
    """
    predictions = root / PREDICTIONS
    if not (root / EVALUATION).is_file() or not (predictions / "assistant.csv").is_file():
        raise InputError(
            f"{root / EVALUATION.parent}: nothing to report yet; run `gpt-pipeline run`"
        )
    again = "run `gpt-pipeline run --force evaluate`"
    figures: dict[str, dict[str, float]] = _read(
        root / EVALUATION, TypeAdapter(dict[str, dict[str, float]]), again
    )
    git = git_state(root)
    recorded = read_lock(root)
    judgement: Judgement | None = _read(root / JUDGE, TypeAdapter(Judgement))
    if judgement and judgement.answers != sha256_of(predictions / "assistant.csv"):
        judgement = None  # it is of an earlier version's answers
    tracked = _tracked(root, recorded, ask)
    decisions = {each.model: each for each in read_decisions(root)}
    histories = {name: root / "reports" / name / "history.csv" for name in STAGES}
    confusion = predictions / "classifier_confusion.csv"
    return Facts(
        made=datetime.now().astimezone(),
        commit=git.get("git.commit", ""),
        dirty=git.get("git.dirty") == "true",
        license=_first_line(root / "LICENSE"),
        evaluation={name: Scores(each) for name, each in figures.items()},
        results=_results(root),
        decisions=decisions,
        judgement=judgement,
        answers=_answers(
            predictions / "assistant.csv",
            root / ANSWERS / "assistant.csv",
            decisions.get("assistant"),
        ),
        wrong=_most_wrong(predictions / "classifier_most_wrong.csv"),
        sources=_sources(root),
        recorded=recorded,
        executions=tracked.executions,
        versions=tracked.versions,
        tracking=tracked.missing,
        histories={name: path for name, path in histories.items() if path.is_file()},
        confusion=confusion if confusion.is_file() else None,
    )


# --- files ----------------------------------------------------------------------------------------


def _read(path: Path, adapter: TypeAdapter[Any], remedy: str = "remove it") -> Any:
    """What a JSON file holds, checked; None where there is none."""
    if not path.is_file():
        return None
    try:
        return adapter.validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; {remedy}") from None


def _results(root: Path) -> dict[str, dict[str, float]]:
    adapter = TypeAdapter(dict[str, Any])
    found = {
        name: _read(
            root / "reports" / name / "metrics.json", adapter, f"run the stage {name} again"
        )
        for name in STAGES
    }
    return {name: flatten_metrics(metrics) for name, metrics in found.items() if metrics}


def _first_line(path: Path) -> str:
    with contextlib.suppress(OSError, StopIteration), path.open(encoding="utf-8") as file:
        return next(line.strip() for line in file if line.strip())
    return ""


def _answers(path: Path, champion: Path, decision: Decision | None) -> list[Answer]:
    frame = _table(path, ("instruction", "input", "reference", "answer", "base_answer"))
    others: dict[tuple[int, str], str] = {}
    if champion.is_file() and decision is not None:
        answers = _table(champion, ("example", "asked", "answer", "champion"))
        answers = answers[answers["champion"] == str(decision.champion)]  # else of another's
        asked = zip(answers["example"].astype(int), answers["asked"], strict=True)
        others = dict(zip(asked, answers["answer"], strict=True))
    return [
        Answer(
            _task(row),
            row["reference"],
            row["base_answer"],
            others.get((i, row["instruction"])),  # what was asked before may be another
            row["answer"],
        )
        for i, row in enumerate(frame.to_dict("records"))
    ]


def _task(row: Mapping[Hashable, Any]) -> str:
    """All that was asked; `earlier` holds what was said before it, as JSON messages."""
    earlier = json.loads(row.get("earlier") or "[]")
    said = [f"{message['role']}: {message['content']}" for message in earlier]
    return "\n".join(filter(None, [*said, row["instruction"], row["input"]]))


def _most_wrong(path: Path) -> list[Wrong]:
    if not path.is_file():
        return []
    frame = _table(path, ("part", "text", "actual", "predicted", "probability_actual"))
    rows = frame[frame["part"] == "test"].head(SHOWN_WRONG).to_dict("records")
    return [
        Wrong(row["text"], row["actual"], row["predicted"], float(row["probability_actual"]))
        for row in rows
    ]


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    remedy = "run `gpt-pipeline run --force evaluate`"
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except (OSError, ValueError) as error:
        why = in_one_line(error)
        raise InputError(f"{path}: cannot be read ({why}); {remedy}") from None
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path}: has no column {missing[0]}; {remedy}")
    return table


def _sources(root: Path) -> dict[str, list[RawSource]]:
    names = ("corpus", "messages", "instructions", "gpt2")
    return {name: found for name in names if (found := raw_sources(root / RAW / name))}


# --- MLflow ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tracked:
    """Executions by stage, versions by model, and what MLflow could not be asked and why."""

    executions: dict[str, Execution]
    versions: dict[str, int] = field(default_factory=dict)
    missing: str = ""


def _tracked(root: Path, recorded: Mapping[str, LockEntry], ask: bool) -> _Tracked:
    notes = {name: last_run(root, name) for name in STAGES}
    notes = {name: note for name, note in notes.items() if note.get("status") == "FINISHED"}
    outputs = {name: dict(each.outputs) for name, each in recorded.items()}
    # seconds go by until MLflow answers, and of a run that has ended it says what it said
    of = [without_credentials(tracking_uri(root)), notes, outputs]
    adapter = TypeAdapter(_Tracked)
    if not ask:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((root / _ANSWERS).read_text(encoding="utf-8"))
            if kept["of"] == of:
                return adapter.validate_python(kept["answers"])
    found = _asked(root, recorded, notes)
    answers = adapter.dump_python(found, mode="json")
    if not found.missing:
        write_json(root / _ANSWERS, {"of": of, "answers": answers})
    return adapter.validate_python(answers)  # the same whether it was read or asked


def _asked(
    root: Path, recorded: Mapping[str, LockEntry], notes: Mapping[str, Mapping[str, Any]]
) -> _Tracked:
    from pipeline.tracking.mlflow_classes import MlflowException

    executions = {name: Execution(seconds=note.get("seconds")) for name, note in notes.items()}
    local = database_file(tracking_uri(root))
    if local is not None and not local.is_file():
        return _Tracked(executions, missing=f"MLflow was not asked: there is no {local.name}")
    gone = []
    try:
        with _impatient():
            client = connect(root)
            for name, note in notes.items():
                wrote = recorded[name].outputs if name in recorded else {}
                if run := run_that_made(client, name, str(note["run_id"]), wrote):
                    executions[name] = _execution(client, run, note)
                else:
                    gone.append(name)
            versions = _versions(client, recorded)
    except (RunError, MlflowException) as error:
        why = without_credentials(in_one_line(error))
        return _Tracked(executions, missing=f"MLflow was not asked: {why}")
    missing = f"MLflow has no run of {', '.join(gone)} any more" if gone else ""
    return _Tracked(executions, versions, missing)


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Within the block MLflow does not try for minutes to reach a server that is gone."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    new = {name: value for name, value in limits.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _execution(client: MlflowClient, run: Run, note: Mapping[str, Any]) -> Execution:
    before = _run_before(client, run)
    metrics, tags = present_metrics(run.data.metrics), run.data.tags
    tokens = metrics.get("tokens")
    seconds = note.get("seconds")
    if run.info.run_id != note["run_id"] and run.info.end_time:
        seconds = (run.info.end_time - run.info.start_time) / 1000
    return Execution(
        run_id=run.info.run_id,
        seconds=seconds,
        ended=_time(run.info.end_time),
        commit=tags.get("git.commit"),
        dirty=tags["git.dirty"] == "true" if "git.dirty" in tags else None,
        peak_memory=metrics.get(PEAK_MEMORY),
        tokens=None if tokens is None else int(tokens),
        params=dict(run.data.params),
        before=before.info.run_name if before else None,
        differences=tuple(_differences(before, run)) if before else (),
    )


def _run_before(client: MlflowClient, run: Run) -> Run | None:
    """The last run of the same stage that ended well before this one began."""
    found = client.search_runs(
        [run.info.experiment_id],
        "attributes.status = 'FINISHED' and attributes.start_time < " + str(run.info.start_time),
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def _differences(before: Run, now: Run) -> Iterator[Difference]:
    tags = [
        {key: value for key, value in run.data.tags.items() if key.startswith("input.")}
        | {key: run.data.tags[key] for key in ("git.commit", "git.dirty") if key in run.data.tags}
        for run in (before, now)
    ]
    for old, new in ((before.data.params, now.data.params), tags):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield Difference(key, old.get(key), new.get(key))


def _time(milliseconds: int | None) -> datetime | None:
    return (
        None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000).astimezone()
    )


def _versions(client: MlflowClient, recorded: Mapping[str, LockEntry]) -> dict[str, int]:
    """By registered model: the version whose bytes were evaluated, or were written last."""
    versions = {}
    for stage, spec in STAGES.items():
        if spec.model is None or stage not in recorded:
            continue
        # what was evaluated: since then another one may have been trained
        out = spec.outputs["out"]
        evaluated = recorded["evaluate"].inputs if "evaluate" in recorded else {}
        md5 = evaluated.get(out) or recorded[stage].outputs.get(out, "")
        known = client.search_model_versions(
            f"name = '{spec.model.name}' and tags.`{MD5_TAG}` = '{md5}'"
        )
        if known:
            versions[spec.model.name] = max(int(each.version) for each in known)
    return versions
