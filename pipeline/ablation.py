"""Many trainings of the classifier that differ in a few parameters, as one command.

Each row of a table is the project's `params.yaml` with some of `finetune_classifier` changed. A row
is a run of the MLflow experiment `gpt-pipeline/ablation`, with its parameters, its inputs by md5
and its scores on the test part. It is trained beside the pipeline: no output of a stage and no
registered model changes, and rows that are done are not trained again.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gpt.errors import InputError
from gpt.events import Log
from gpt.files import whole_file, write_json
from pipeline.params import PARAMS_FILE, load_params

STAGE = "finetune_classifier"
FOLDER = Path(".pipeline") / "ablation"
_MOST_ROWS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One training: its name, its changes by path, and the parameters that they make."""

    name: str
    changes: dict[str, Any]
    params: Any


def read_rows(root: Path, table: Path) -> list[Row]:
    """The rows of a table, each checked as `params.yaml` is, before any work.

    Args:
        root: the project; its `params.yaml` is what the rows change.
        table: YAML: `rows`, a list of `name` and `set`, a path below `finetune_classifier`
            (`train.learning_rate`) to its value.

    Raises:
        InputError: the table cannot be read, or a row is impossible; each named.
    """
    try:
        raw = yaml.safe_load(table.read_text(encoding="utf-8"))
        base = yaml.safe_load((root / PARAMS_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{table}: cannot be read ({reason}); correct it") from None
    entries = raw.get("rows") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not 0 < len(entries) <= _MOST_ROWS:
        raise InputError(f"{table}: must hold `rows`, a list of 1 to {_MOST_ROWS}; see docs")
    rows: list[Row] = []
    for number, entry in enumerate(entries, 1):
        if not (isinstance(entry, dict) and set(entry) <= {"name", "set"} and entry.get("name")):
            raise InputError(f"{table}: row {number}: must hold `name` and `set`, and nothing else")
        name, changes = str(entry["name"]), entry.get("set") or {}
        if not isinstance(changes, dict) or name in [row.name for row in rows]:
            raise InputError(f"{table}: row {number}: give it a name of its own and a `set`")
        section = json.loads(json.dumps(base[STAGE]))
        for path, value in changes.items():
            _set(section, str(path), value)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / PARAMS_FILE
            file.write_text(yaml.safe_dump({**base, STAGE: section}), encoding="utf-8")
            try:
                params = getattr(load_params(file), STAGE)
            except InputError as error:
                raise InputError(f"{table}: row {name!r}: {error}") from None
        rows.append(Row(name, {str(k): v for k, v in changes.items()}, params))
    return rows


def _set(section: dict[str, Any], path: str, value: Any) -> None:
    """Put a value at its path; None takes the parameter away."""
    *owners, leaf = path.split(".")
    for each in owners:
        section = section.setdefault(each, {})
    if value is None:
        section.pop(leaf, None)
    else:
        section[leaf] = value


def ablate(root: Path, table: Path, log: Log) -> list[dict[str, Any]]:
    """Train and score every row, or take up what was scored before.

    Args:
        root: the project, its inputs of `finetune_classifier` in place.
        table: the rows: see `read_rows`.
        log: hears what goes on.

    Returns:
        A record a row: `name`, `run` (of MLflow) and the scores. They are also written as
        Markdown, `reports/ablation/NAME.md`.

    Raises:
        InputError: a row or an input cannot be used.
        RunError: a training failed, or MLflow cannot be reached.
    """
    rows = read_rows(root, table)
    records = [_row(root, table.stem, row, log) for row in rows]
    with whole_file(root / "reports" / "ablation" / f"{table.stem}.md") as partial:
        partial.write_text(markdown(records), encoding="utf-8")
    return records


def _row(root: Path, table: str, row: Row, log: Log) -> dict[str, Any]:
    from gpt.device import prepare
    from pipeline.runner import STAGES
    from pipeline.states import fingerprint
    from pipeline.tracking import StageRun, dvc_md5
    from stages.evaluate import measure_classifier
    from stages.finetune_classifier import finetune_classifier

    relative = STAGES[STAGE].input_paths(row.params)
    inputs = {keyword: root / path for keyword, path in relative.items()}
    for keyword, path in inputs.items():
        if not path.exists():
            raise InputError(f"{relative[keyword]} is missing; `gpt-pipeline run {STAGE}` makes it")
    md5 = {path: dvc_md5(root / path) for path in relative.values()}
    folder = root / FOLDER / table / fingerprint(root, STAGE, row.params, md5)
    done = folder / "result.json"
    if done.is_file():
        record: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return {**record, "name": row.name}
    state = folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    run = StageRun(root, "ablation", row.params, md5, state=state, description=__doc__ or "")

    def both(event: Any) -> None:
        log(event)
        run(event)

    try:
        final = finetune_classifier(
            row.params,
            **inputs,
            out=folder / "model",
            metrics=folder / "metrics.json",
            history=folder / "history.csv",
            state=state,
            log=both,
        )
        device = prepare(row.params.train.device, row.params.train.threads)
        scores, _ = measure_classifier(folder / "model", inputs["messages"], device, 16)
    except BaseException as error:
        run.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", error=str(error))
        raise
    run.client.set_tag(run.id, "ablation", table)
    run.client.set_tag(run.id, "ablation.row", row.name)
    run.close("FINISHED", metrics={"result": final, "test": scores})
    record = {"name": row.name, "run": run.id, "scores": scores}
    write_json(done, record)
    return record


def markdown(records: list[dict[str, Any]]) -> str:
    """The scores on the test part as a Markdown table, a row a training."""
    columns = ("accuracy", "f1_macro", "roc_auc", "calibration_error")
    lines = ["| row | accuracy | macro F1 | ROC-AUC | calibration error | MLflow run |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for record in records:
        found = (record["scores"].get(name) for name in columns)
        cells = [f"{value:.4f}" if value is not None else "" for value in found]
        lines.append(f"| {record['name']} | {' | '.join(cells)} | `{record['run'][:8]}` |")
    return "\n".join(lines) + "\n"
