"""Many trainings of the classifier that differ in a few parameters, as one command.

Each row of a table is the project's `params.yaml` with some of `finetune_classifier` changed. A row
is a run of the MLflow experiment `gpt-pipeline/ablation`, with its parameters, its inputs by md5
and its scores, and a DVC experiment of the commit at hand, with its parameters and its model. It is
trained beside the pipeline: no output of a stage and no registered model changes, and rows that are
done, in whichever table, are not trained again.
"""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from gpt.base.errors import InputError, RunError
from gpt.base.events import Event, Log, Message, Progress, Text
from gpt.base.files import remove, whole_file, write_json
from pipeline.dag.experiments import check_git, save_experiment
from pipeline.project.file_locks import stage_lock
from pipeline.project.overrides import params_with
from pipeline.project.params import PARAMS_FILE, read_params
from pipeline.project.stage_table import STAGES
from pipeline.project.yaml_files import read_yaml
from pipeline.show.markdown import NOTHING
from pipeline.show.markdown import table as in_markdown

STAGE = "finetune_classifier"
FOLDER = Path(".pipeline") / "ablation"
TAG = "ablation"
"""`ablation.TABLE` of a run is the row that it is of that table, `ablation.set` what it changes."""
EVALUATION = Path("reports") / "evaluation" / "metrics.json"
_MOST_ROWS = 200
_LONGEST_NAME = 100
_ROWS_AT_ONCE = 16
"""Messages that are scored together; it changes no score."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training: its name, what it is a choice of, its changes by path, and its parameters."""

    name: str
    choice: str
    """The name but for the seed: what the trainings of a row with several seeds share."""
    changes: dict[str, Any]
    params: Any

    def experiment(self, table: str) -> str:
        """The name of its DVC experiment."""
        return f"{_word(table)}-{_word(self.name)}"


def read_rows(root: Path, table: Path) -> list[Row]:
    """The rows of a table, each checked as `params.yaml` is, before any work.

    Args:
        root: the project; its `params.yaml` is what the rows change.
        table: YAML: `rows`, a list of `name` and `set`, a path below `finetune_classifier`
            (`train.learning_rate`) to its value; and perhaps `seeds`, with each of which every row
            is trained.

    Raises:
        InputError: the table cannot be read, or a row is impossible; each named.
    """
    raw, base = read_yaml(table), read_params(root / PARAMS_FILE)
    entries = raw.get("rows") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_ROWS:
        raise InputError(f"{table}: must hold `rows`, a list of 1 to {_MOST_ROWS}; see docs")
    if unknown := sorted(map(str, set(raw) - {"rows", "seeds"})):
        raise InputError(f"{table}: {unknown[0]} is neither `rows` nor `seeds`; take it away")
    seeds = raw.get("seeds", [])
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{table}: seeds: must be a list of whole numbers")
    rows: list[Row] = []
    for number, entry in enumerate(entries, 1):
        if not (isinstance(entry, dict) and set(entry) <= {"name", "set"} and entry.get("name")):
            raise InputError(f"{table}: row {number}: must hold `name` and `set`, and nothing else")
        choice, changes = str(entry["name"]), entry.get("set") or {}
        taken = {_word(row.choice) for row in rows}
        named = _word(choice) not in {"", *taken} and len(choice) <= _LONGEST_NAME
        if not isinstance(changes, dict) or not named:
            raise InputError(
                f"{table}: row {number}: give it a name of its own, of letters or digits and at "
                f"most {_LONGEST_NAME} characters, and a `set`"
            )
        for seed in dict.fromkeys(seeds) or [None]:
            name = choice if seed is None else f"{choice}, seed {seed}"
            own = {str(path): value for path, value in changes.items()}
            own |= {} if seed is None else {"train.seed": seed}
            rows.append(Row(name, choice, own, _params(table, name, base, own)))
    return rows


def _params(table: Path, name: str, base: Any, changes: dict[str, Any]) -> Any:
    """The stage's parameters with a row's changes."""
    try:
        whole = params_with(base, {f"{STAGE}.{path}": value for path, value in changes.items()})
    except InputError as error:
        raise InputError(f"{table}: row {name!r}: {error}") from None
    params = getattr(whole, STAGE)
    if params.train.devices != 1:
        raise InputError(
            f"{table}: row {name!r}: rows are trained one by one on one device; set train.devices "
            "to 1"
        )
    return params


def _word(name: str) -> str:
    """As it may stand in a git reference."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def ablate(root: Path, table: Path, log: Log) -> list[dict[str, Any]]:
    """Train and score every row, or take up what was scored before, be it of another table.

    A row that fails is told, and the others are trained all the same.

    Args:
        root: the project, its inputs of `finetune_classifier` in place.
        table: the rows: see `read_rows`.
        log: hears what goes on.

    Returns:
        A record a row: `name`, `choice`, `run` (of MLflow), `experiment` (of DVC) and the scores.
        They are also written as Markdown, `reports/ablation/NAME.md`, each when it is there.

    Raises:
        InputError: the table or an input cannot be used, or the project is in no git repository.
        RunError: rows failed; MLflow cannot be reached.
    """
    from pipeline.tracking.connection import connect

    rows = read_rows(root, table)
    check_git(root)
    connect(root)  # what every row would fail at, fails once
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    page = Path("reports") / "ablation" / f"{table.stem}.md"
    with stage_lock(root, "ablation"):
        for number, row in enumerate(rows, 1):
            log(Message(f"ablation: {number} of {len(rows)}: {row.name}"))
            try:
                records.append(_row(root, table.stem, row, log))
            except Exception as error:
                if not isinstance(error, InputError | RunError):  # a mistake of ours
                    traceback.print_exc()
                failed.append(row.name)
                log(Message(f"ablation: {row.name} failed: {_one_line(error)}", "warning"))
                continue
            with whole_file(root / page) as partial:
                partial.write_text(markdown(records), encoding="utf-8")
    if failed:
        rest = f"the others are in {page}" if records else "there is no other"
        raise RunError(
            f"{len(failed)} of {len(rows)} rows failed ({'; '.join(failed)}), as was said above; "
            f"{rest}; correct what was said and run the same command again"
        )
    return records


def _one_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, InputError | RunError) else f"{type(error).__name__}: {line}"


def _row(root: Path, table: str, row: Row, log: Log) -> dict[str, Any]:
    from pipeline.data.sets import input_sets
    from pipeline.tracking.connection import connect
    from pipeline.tracking.mlflow_classes import MlflowException
    from pipeline.tracking.provenance import MadeOf
    from pipeline.tracking.run import StageRun

    relative = STAGES[STAGE].input_paths(row.params)
    inputs = {keyword: root / path for keyword, path in relative.items()}
    for keyword, path in inputs.items():
        if not path.exists():
            raise InputError(f"{relative[keyword]} is missing; `gpt-pipeline run {STAGE}` makes it")
    made_of = MadeOf.now(root, STAGE, row.params, relative.values())
    folder = root / FOLDER / made_of.fingerprint()
    done = folder / "result.json"
    tag = f"{TAG}.{table}"
    if done.is_file():
        record: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        with contextlib.suppress(MlflowException):  # someone has deleted the run
            connect(root).set_tag(record["run"], tag, row.name)
        return {**record, "name": row.name, "choice": row.choice}
    state = folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    description = " ".join((__doc__ or "").split())
    sets = input_sets(root, made_of.inputs, trains=True)
    run = StageRun(
        root,
        "ablation",
        row.params,
        made_of.inputs,
        state=state,
        description=description,
        data_sets=sets,
    )
    try:
        tags = {
            "mlflow.runName": row.name,
            "mlflow.source.name": "gpt-pipeline ablate",
            "dvc.stage": STAGE,
            "dvc.experiment": row.experiment(table),
            tag: row.name,
            f"{TAG}.set": json.dumps(row.changes),
        }
        for key, value in tags.items():
            run.client.set_tag(run.id, key, value)

        def add_picture(path: Path) -> None:
            run.add_file(path, f"plots/{path.name}")

        final, scores = _train(row, inputs, folder, _to_both(row, log, run), add_picture)
        _save(root, table, row, folder, relative, scores)
    except BaseException as error:
        with contextlib.suppress(RunError):  # the first failure is the one to tell
            run.close(
                "FAILED" if isinstance(error, Exception) else "KILLED", error=_one_line(error)
            )
        raise
    run.close("FINISHED", metrics={**final, "classifier": scores})
    record = {
        "name": row.name,
        "choice": row.choice,
        "run": run.id,
        "experiment": row.experiment(table),
        "scores": scores,
    }
    write_json(done, record)
    for each in folder.iterdir():  # the model is in DVC's cache
        if each != done:
            remove(each)
    return record


def _train(
    row: Row, inputs: dict[str, Path], folder: Path, log: Log, add_picture: Callable[[Path], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """The final figures of the training, and the scores of what it made on every part."""
    from gpt.model.device import prepare_device
    from pipeline.show.plots import draw_confusion, draw_curves
    from stages.evaluate import EvaluateParams
    from stages.evaluate.classifier import measure_classifier
    from stages.evaluate.intervals import bounds
    from stages.finetune_classifier import finetune_classifier

    final = finetune_classifier(
        row.params,
        **inputs,
        **_outputs(folder),
        state=folder / "state",
        log=log,
    )
    device = prepare_device(row.params.train.device, row.params.train.threads)
    of = bounds(EvaluateParams().resamples, EvaluateParams().seed)
    scores, tables = measure_classifier(
        folder / "out", inputs["messages"], device, _ROWS_AT_ONCE, of
    )
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    confusion = pictures / "confusion.csv"
    tables["classifier_confusion"].to_csv(confusion, index=False)
    drawn = draw_curves(folder / "history", STAGES[STAGE].title, pictures)
    for picture in [*drawn, *draw_confusion(confusion, pictures)]:
        add_picture(picture)
    wrong: str = tables["classifier_most_wrong"].to_csv(index=False)
    log(Text("classifier_most_wrong.csv", wrong))
    return final, scores


def _outputs(folder: Path) -> dict[str, Path]:
    """Where a row's outputs are until DVC has them, by the stage's keywords."""
    return {keyword: folder / keyword for keyword in STAGES[STAGE].outputs}


def _save(
    root: Path,
    table: str,
    row: Row,
    folder: Path,
    inputs: dict[str, str],
    scores: dict[str, float],
) -> None:
    try:
        evaluation = json.loads((root / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        evaluation = {}
    save_experiment(
        root,
        row.experiment(table),
        STAGE,
        row.changes,
        inputs={path: root / path for path in inputs.values()},
        outputs={STAGES[STAGE].outputs[keyword]: at for keyword, at in _outputs(folder).items()},
        # what `evaluate` would say of it; the other models are the same
        metrics={EVALUATION.as_posix(): {**evaluation, "classifier": scores}},
    )


def _to_both(row: Row, log: Log, run: Log) -> Log:
    """To the terminal under the row's name, since every row does the same; and to its run."""

    def both(event: Event) -> None:
        match event:
            case Message(text, level):
                log(Message(text.replace(STAGE, row.name, 1), level))
            case Progress(task=task):
                log(replace(event, task=task.replace(STAGE, row.name, 1)))
            case Text():  # a table is for the page
                pass
            case _:
                log(event)
        run(event)

    return both


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The scores as a Markdown table, a row a choice; of several seeds the mean and the lowest.

    All are on the test part but `validation`, by which a choice is made.
    """
    choices: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        choices.setdefault(record["choice"], []).append(record)
    several = any(len(each) > 1 for each in choices.values())
    titles = {
        "validation_accuracy": "validation",
        "accuracy": "test accuracy",
        "f1_macro": "macro F1",
        "roc_auc": "ROC-AUC",
        "calibration_error": "calibration error",
    }
    columns = ["row", *titles.values(), "MLflow run"]
    if several:
        columns.insert(columns.index("macro F1"), "lowest")
    rows: list[list[str]] = []
    for choice, own in choices.items():
        cells = [choice]
        for key in titles:
            values = [each["scores"][key] for each in own if key in each["scores"]]
            cells.append(f"{mean(values):.4f}" if values else NOTHING)
            if several and key == "accuracy":
                cells.append(f"{min(values):.4f}")
        rows.append([*cells, ", ".join(each["run"][:8] for each in own)])
    return in_markdown(columns, rows, "l" + "r" * (len(columns) - 2) + "l") + "\n"
