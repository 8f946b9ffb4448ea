"""`gpt-pipeline compare`: what differs between two versions of a model, or two runs of a stage.

First what they were made of (parameters, data, code, machine), then their results and their
answers. MLflow has nearly all of it, with the runs and their files; the models are only asked now
where no evaluation kept their answers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

import pandas as pd
from rich.console import Console
from rich.text import Text

from gpt.base.errors import InputError, RunError, first_few
from pipeline.dag.code import code_of
from pipeline.history.names import find_run
from pipeline.history.runs import Execution, RunHistory, run_history
from pipeline.project.git import git
from pipeline.project.params import PARAMS_FILE, load_section
from pipeline.project.stage_table import MODELS, STAGES
from pipeline.show.console import report_console
from pipeline.show.documents import fill_text
from pipeline.show.markdown import NOTHING
from pipeline.show.terminal import say_json
from pipeline.tracking.connection import PAGES, named_failure, run_url
from pipeline.tracking.differences import OF_MODELS, Change, changed_code, changes, profile
from pipeline.tracking.keys import is_result, machine_of, present_metrics
from pipeline.tracking.provenance import PATCH
from pipeline.tracking.registry import CANDIDATE, CHAMPION, MD5_TAG, files_of

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

_T = TypeVar("_T")

ANSWER_PAIRS = 4
"""The default number of answers shown side by side."""

_INTERVAL = ("_low", "_high")
_NOT_TEST = ("validation_", "train_", "base_")  # scores of other parts, or of another model


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of the two.

    Attributes:
        name: `classifier/3`, or `run #4` where a run was asked for.
        version: the registered one; None where a run was asked for.
        run: the one that made it, or that was asked for.
        evaluation: the run of `evaluate` that scored it; None where none did.
    """

    name: str
    version: ModelVersion | None
    run: Execution
    evaluation: Execution | None = None


def compare(
    root: Path, one: str, other: str | None = None, *, answers: int = ANSWER_PAIRS
) -> dict[str, Any]:
    """What differs between two versions of a model, or two runs of a stage.

    Args:
        root: the project.
        one: `classifier/3`, `models:/classifier/3`, `classifier@champion`, `classifier` (the newest
            version), or the beginning of a run's id.
        other: the same; without it the champion is compared with `one`, or with the candidate
            where `one` is a model's name.
        answers: the number shown side by side.

    Returns:
        What `--json` prints. `stage`: the one that made both. `equal`: whether nothing differs.
        `before` and `after`: the two. `params`, `data` (inputs by their md5, with `words` that say
        what differs), `code` and `machine`: what they were made of. `metrics` of both runs and
        `scores` on the test data, equal ones too. `answers`: some of those that differ. `asked`: in
        one line where the answers are from, or why there are none; None for stages that answer
        nothing. `links`: MLflow's pages of the `comparison`, `before` and `after`.

    Raises:
        InputError: there is no such thing, or the two are of different stages.
        RunError: MLflow cannot be reached.
    """
    from pipeline.tracking.mlflow_classes import MlflowException

    history = run_history(root)
    if history.client is None:
        raise history.not_known("nothing can be compared")
    with named_failure(root, "does not tell what is compared", MlflowException):
        if other is None:
            one, other = _against_champion(history, one)
        sides = _side(history, one), _side(history, other)
        stage = sides[0].run.stage
        if sides[1].run.stage != stage:
            raise InputError(
                f"{sides[0].name} is made by {stage} and {sides[1].name} by {sides[1].run.stage}; "
                "compare two of one stage"
            )
        before, after = _evaluated(history, stage, sides)
        first, second = before.run, after.run
        shown, asked = _answers(history, stage, before, after, answers)
        found: dict[str, Any] = {
            "params": [asdict(e) for e in changes(first.logged, second.logged, OF_MODELS)],
            "data": _data(history, first, second),
            "code": _code(history, before, after),
            "machine": [
                asdict(e) for e in changes(machine_of(first.tags), machine_of(second.tags))
            ],
            "metrics": _side_by_side(_figures(first), _figures(second)),
            "scores": _side_by_side(_scores(stage, before), _scores(stage, after)),
            "answers": shown,
        }
    made = found["params"] or found["data"] or found["code"]["differs"] or found["machine"]
    figures = any(each["difference"] != 0 for each in (*found["metrics"], *found["scores"]))
    return {
        "stage": stage,
        "equal": not (made or figures or shown),
        "before": _side_as_dict(history, before),
        "after": _side_as_dict(history, after),
        **found,
        "asked": asked or None,
        "links": _links(root, before, after),
    }


# --- the two --------------------------------------------------------------------------------------


def _against_champion(history: RunHistory, one: str) -> tuple[str, str]:
    version, _ = find_run(history, one)
    if version is None:
        raise InputError(f"{one}: with which run? name two: gpt-pipeline compare {one} OTHER")
    name = version.name
    if one.removeprefix("models:/") == name:
        one = f"{name}@{CANDIDATE}"
    if not any(CHAMPION in history.aliases_of(v) for v in history.versions if v.name == name):
        raise InputError(
            f"{name}: has no champion to compare with; name two versions: "
            f"gpt-pipeline compare {name}/1 {name}/2"
        )
    return f"{name}@{CHAMPION}", one


def _side(history: RunHistory, what: str) -> Side:
    version, run = find_run(history, what)
    if version is None:
        return Side(name=f"run {run.number}", version=None, run=run)
    return Side(name=f"{version.name}/{version.version}", version=version, run=run)


def _evaluated(history: RunHistory, stage: str, sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """Both with the newest runs that scored them, on the same data if there are such runs."""
    directory = STAGES[stage].outputs.get("out", "") if stage in STAGES else ""
    first, second = (_evaluations(history, directory, side) for side in sides)
    pairs = [(a, b) for a in first for b in second if _test_data(a) == _test_data(b)]
    one, other = pairs[0] if pairs else (next(iter(first), None), next(iter(second), None))
    return replace(sides[0], evaluation=one), replace(sides[1], evaluation=other)


def _evaluations(history: RunHistory, directory: str, side: Side) -> list[Execution]:
    tags = side.version.tags if side.version else {}
    md5 = tags.get(MD5_TAG) or side.run.outputs.get(directory)
    runs = [each for each in history.executions if each.stage == "evaluate" and each.outputs]
    return [each for each in runs if each.inputs.get(directory, "") == md5]


def _test_data(evaluation: Execution) -> dict[str, str]:
    return {path: md5 for path, md5 in evaluation.inputs.items() if path.startswith("data/")}


# --- what they were made of -----------------------------------------------------------------------


def _data(history: RunHistory, before: Execution, after: Execution) -> list[dict[str, Any]]:
    return [
        {
            "path": each.what,
            "before": each.before,
            "after": each.after,
            "words": list(_data_in_words(history, each, before, after)),
        }
        for each in changes(before.inputs, after.inputs)
    ]


def _data_in_words(
    history: RunHistory, change: Change, before: Execution, after: Execution
) -> Iterator[str]:
    if change.before is None or change.after is None:
        yield f"only {'the second' if change.before is None else 'the first'} reads it"
        return
    first, second = (profile(each.run, change.what) if each.run else {} for each in (before, after))
    yield from (str(each) for each in changes(first, second))
    one = history.maker(change.what, change.before, before.started)
    other = history.maker(change.what, change.after, after.started)
    if one is None or other is None:
        return
    yield from _sources_in_words(one, other, change.what)
    if one.number != other.number:
        params = changes(one.logged, other.logged, OF_MODELS)
        changed = f" ({first_few(params)})" if params else ""
        yield f"made by {one.stage} {one.number} → {other.number}{changed}"


def _sources_in_words(before: Execution, after: Execution, folder: str) -> Iterator[str]:
    """Which raw sources of a folder differ."""

    def sources(run: Execution) -> dict[str, str]:
        inputs = run.run.inputs.dataset_inputs if run.run and run.run.inputs else ()
        origins = {each.dataset.name: json.loads(each.dataset.source) for each in inputs}
        # a source from the web names its address and not its folder
        return {
            name: str(source["sha256"])[:10]
            for name, source in origins.items()
            if "sha256" in source and source.get("uri", folder) == folder
        }

    for each in changes(sources(before), sources(after)):
        yield f"sha256 of the source {each}"


def _code(history: RunHistory, before: Side, after: Side) -> dict[str, Any]:
    """What differs in the code: `log` and `back`, the commits that only the second and only the
    first has; `files` that the stage runs, None where that is not known, and what they are
    `known_by`."""
    runs = before.run, after.run
    first, second = (run.tags.get("git.commit", "") for run in runs)
    dirty = [run.tags.get("git.dirty") == "true" for run in runs]
    log: list[str] = []
    back: list[str] = []
    kept = f"kept with its run as lineage/{PATCH}"
    notes = [
        f"{side.name} ran with uncommitted changes, "
        f"{kept if side.run.tags.get('git.patch') == 'kept' else 'which are not kept'}"
        for side in (before, after)
        if side.run.tags.get("git.dirty") == "true"
    ]
    files, known_by = changed_code(history.client, before.run.run, after.run.run), "runs"
    if first and second and first != second:
        try:
            log, back = (
                git(history.root, "log", "--oneline", f"{a}..{b}").splitlines()
                for a, b in ((first, second), (second, first))
            )
        except RunError:
            notes.append("git here does not have both commits; `git fetch` may bring them")
        if files is None:
            with contextlib.suppress(InputError, RunError):
                code = code_of(history.root, before.run.stage)
                changed = git(history.root, "diff", "--name-only", first, second, "--", *code)
                files, known_by = changed.splitlines(), "git"
    if files is None:
        notes.append("which files differ is not known: the runs did not record it")
    return {
        "differs": files != [] or (known_by == "git" and any(dirty)),
        "commits": [first, second],
        "dirty": dirty,
        "log": log,
        "back": back,
        "files": files,
        "known_by": known_by if files is not None else "",
        "notes": notes,
    }


# --- their results --------------------------------------------------------------------------------


def _figures(run: Execution) -> dict[str, float]:
    """A run's results: not what its metrics say of the machine and the course of the training."""
    metrics = present_metrics(run.run.data.metrics) if run.run else {}
    return {key: value for key, value in sorted(metrics.items()) if is_result(key)}


def _scores(stage: str, side: Side) -> dict[str, float]:
    if side.evaluation is None:
        return {}
    start = Path(STAGES[stage].outputs["out"]).name + "/"
    figures = _figures(side.evaluation)
    return {k.removeprefix(start): v for k, v in figures.items() if k.startswith(start)}


def _side_by_side(before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "before": before.get(name),
            "after": after.get(name),
            "difference": after[name] - before[name] if name in before.keys() & after else None,
        }
        for name in dict.fromkeys((*after, *before))
    ]


# --- what they answered ---------------------------------------------------------------------------


def _answers(
    history: RunHistory, stage: str, before: Side, after: Side, most: int
) -> tuple[list[dict[str, str]], str]:
    """Some of the answers that differ, and a line: where they are from, or why there are none."""
    model = STAGES[stage].model if stage in STAGES else None
    if model is None:
        return [], ""
    if model.serves == "base":
        texts, origin = _samples(history, before, after)
        return texts[:most], origin
    kept = [_kept_answers(history, model.name, side) for side in (before, after)]
    (first, _), (second, _) = kept
    origin, doubt = "", ""
    if not first.keys() & second.keys():
        why = next((reason for _, reason in kept if reason), "they were asked different things")
        if not most:
            return [], f"none to compare: {why}"
        try:
            first, second, origin, doubt = _asked_now(history, model.name, (before, after), most)
        except InputError as error:
            return [], f"none to compare: {why}, and {error}"
    asked = [text for text in first if text in second]
    differ = [
        {
            "asked": text,
            "right": second[text].right,
            "before": first[text].answer,
            "after": second[text].answer,
        }
        for text in asked
        if first[text].compared != second[text].compared
    ]
    origin = origin or f"{len(asked):,} test {_ASKED_OF_MODELS[model.serves]} that both were asked"
    origin += f"; they differ on {len(differ):,}{doubt}"
    return _spread(differ, most), origin


def _spread(things: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of them, at equal distances."""
    n = min(most, len(things))
    return [things[len(things) * i // n] for i in range(n)]


class _Said(NamedTuple):
    """An answer: the right one, the one given as shown, and what it is compared by."""

    right: str
    answer: str
    compared: str


def _kept_answers(history: RunHistory, model: str, side: Side) -> tuple[dict[str, _Said], str]:
    """What a version answered to `evaluate`, by what it was asked; or why that is not kept."""
    if model not in _KEPT_ANSWERS:
        return {}, f"evaluate asks {model} for no texts"
    if side.evaluation is None:
        return {}, f"no run of evaluate asked {side.name}"
    content = history.kept(side.evaluation, f"predictions/{model}.csv")
    if content is None:
        return {}, f"MLflow keeps none of {side.name}'s evaluation"
    return _KEPT_ANSWERS[model](pd.read_csv(BytesIO(content), keep_default_na=False, dtype=str)), ""


def _asked_now(
    history: RunHistory, model: str, sides: tuple[Side, Side], most: int
) -> tuple[dict[str, _Said], dict[str, _Said], str, str]:
    """Fetch both from the registry and ask them the test part that the second held out.

    Returns:
        The answers of both; what was asked, and a doubt about it, in words.

    Raises:
        InputError: one of them or the data cannot be had; in one line.
    """
    from gpt.model.device import prepare_device
    from stages.evaluate import EvaluateParams
    from stages.evaluate.assistant import answer_records, records_by_part
    from stages.evaluate.classifier import messages_by_part, predict_classes
    from stages.training_file import read_training

    what = _ASKED_OF_MODELS[MODELS[model].serves]
    data = history.root / "data/raw" / what
    if not data.is_dir():
        raise InputError(f"data/raw/{what} is not here; `dvc pull` brings it")
    versions = [_registered(history, side) for side in sides]
    params = load_section(history.root / PARAMS_FILE, "evaluate") or EvaluateParams()
    device = prepare_device(params.device, params.threads)
    with files_of(versions[0]) as first, files_of(versions[1]) as second:
        if what == "messages":
            test = messages_by_part(second, data)[1]["test"]
            tables = [
                predict_classes(each, test, device, params.batch_size)[0]
                for each in (first, second)
            ]
            n, rows = f"{len(test):,}", [_classified(table.astype(str)) for table in tables]
        else:
            records = records_by_part(second, data)["test"]
            asked = _spread(records, most)  # each answer takes its time: no more than are shown
            n = f"{len(asked):,} of {len(records):,}"
            texts = {
                "instruction": [each.instruction for each in asked],
                "input": [each.input for each in asked],
                "reference": [each.output.strip() for each in asked],
            }
            tables = [
                answer_records(each, asked, device, params.batch_size, params.max_new_tokens)[0]
                for each in (first, second)
            ]
            rows = [_answered(table.assign(**texts)) for table in tables]
        splits = [(each.split, each.balance) for each in map(read_training, (first, second))]
    same = splits[0] == splits[1]
    doubt = "" if same else f"; {sides[0].name} learnt from another split and may know them"
    return rows[0], rows[1], f"{n} test {what}, asked of both now", doubt


def _registered(history: RunHistory, side: Side) -> ModelVersion:
    if side.version is not None:
        return side.version
    directory = STAGES[side.run.stage].outputs["out"]
    found = history.registered(side.run.outputs.get(directory, ""))
    if not found:
        raise InputError(f"the model of {side.name} is not registered")
    return found[0]


def _answered(table: pd.DataFrame) -> dict[str, _Said]:
    """Instruction and input -> an assistant's answer."""
    return {
        "\n".join(filter(None, (row["instruction"], row["input"]))): _Said(
            row["reference"], row["answer"], row["answer"]
        )
        for row in table.to_dict("records")
    }


def _classified(table: pd.DataFrame) -> dict[str, _Said]:
    """Text -> a classifier's answer, with the probability that it gives it."""
    found = {}
    for row in table.to_dict("records"):
        label = row["predicted"]
        share = row.get(f"probability_{label}")
        sure = f" ({float(share):.1%})" if share else ""
        found[row["text"]] = _Said(row["actual"], f"{label}{sure}", label)
    return found


_KEPT_ANSWERS = {"assistant": _answered, "classifier": _classified}
_ASKED_OF_MODELS = {"assistant": "instructions", "classifier": "messages"}
"""What a model is asked, by how it is served."""


def _samples(history: RunHistory, before: Side, after: Side) -> tuple[list[dict[str, str]], str]:
    """The last texts that both wrote in training: those of models that no evaluation asks."""
    assert history.client is not None
    texts = []
    for side in (before, after):
        listed = history.client.list_artifacts(side.run.run_id, "samples")
        names = sorted(each.path for each in listed if not each.is_dir)
        content = history.kept(side.run, names[-1]) if names else None
        if content is None:
            return [], f"none to compare: MLflow keeps no texts of {side.name}'s training"
        texts.append(content.decode(errors="replace"))
    origin = "the last texts that both wrote in training"
    if texts[0] == texts[1]:
        return [], f"{origin} are equal"
    return [{"asked": "", "right": "", "before": texts[0], "after": texts[1]}], origin


# --- where to look on -----------------------------------------------------------------------------


def _links(root: Path, before: Side, after: Side) -> dict[str, str]:
    """MLflow's pages of both."""
    infos = [side.run.run.info for side in (before, after) if side.run.run]
    pages = [run_url(root, each.experiment_id, each.run_id) for each in infos]
    start = pages[0].partition("/#/")[0]
    runs = quote(json.dumps([each.run_id for each in infos], separators=(",", ":")))
    experiments = quote(json.dumps(sorted({each.experiment_id for each in infos})))
    links = {"comparison": f"{start}/#/compare-runs?runs={runs}&experiments={experiments}&{PAGES}"}
    for key, side, page in zip(("before", "after"), (before, after), pages, strict=True):
        version = side.version
        links[key] = (
            f"{start}/#/models/{quote(version.name)}/versions/{version.version}?{PAGES}"
            if version
            else page
        )
    return links


# --- shown ----------------------------------------------------------------------------------------


def print_comparison(
    root: Path,
    one: str,
    other: str | None = None,
    *,
    answers: int = ANSWER_PAIRS,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print what differs, or all of it as JSON. Arguments and errors are those of `compare`."""
    found = compare(root, one, other, answers=answers)
    if as_json:
        say_json(found)
        return
    tables = {
        "Metrics of the runs": _table(found["metrics"]),
        "Scores on the test data": _table(found["scores"], without=_NOT_TEST),
    }
    console = report_console(console)
    text = fill_text(Path(__file__).with_name("compare.txt"), **found, tables=tables)
    console.print(Text.from_markup(text, emoji=False), end="")
    for name, address in found["links"].items():
        label = found[name]["name"] if name in found else name
        console.print(Text(f"{label}: {address}"), soft_wrap=True)


def _side_as_dict(history: RunHistory, side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "version": int(side.version.version) if side.version else None,
        "aliases": sorted(history.aliases_of(side.version)) if side.version else [],
        "run": side.run.tags.get("mlflow.runName") or side.run.number,
        "run_id": side.run.run_id,
        "started": f"{datetime.fromtimestamp(side.run.started / 1000):%Y-%m-%d %H:%M}",
        "evaluation": side.evaluation.run_id if side.evaluation else None,
    }


def _table(figures: list[dict[str, Any]], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `rows` of figures that differ, each with its interval; how many are `equal`."""
    by_name = {each["name"]: each for each in figures}
    ends = {f"{name}{end}" for name in by_name for end in _INTERVAL}
    shown = [name for name in by_name if name not in ends and not name.startswith(without)]
    rows = [
        {
            **by_name[name],
            "before": _cell(by_name, name, "before"),
            "after": _cell(by_name, name, "after"),
        }
        for name in shown
        if by_name[name]["before"] != by_name[name]["after"]
    ]
    return {"rows": rows, "equal": len(shown) - len(rows)}


def _cell(figures: Mapping[str, Mapping[str, Any]], name: str, side: str) -> str:
    value = figures[name][side]
    if value is None:
        return NOTHING
    figure = f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.4g}"
    low, high = (figures.get(f"{name}{end}", {}).get(side) for end in _INTERVAL)
    return figure if low is None or high is None else f"{figure} ({low:.4g} to {high:.4g})"
