"""`gpt-pipeline compare`: what differs between two versions of a model, or two runs of a stage.

What they were made of comes first (parameters, data, code, machine), then what they came to, and
what both answered. Nearly all of it stands in MLflow already, with the runs and their files; only
where no evaluation kept the answers are both models asked now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gpt.base.errors import InputError, RunError, first_few
from pipeline.dag.code import code_of, md5_of_code
from pipeline.history.names import find, version_name
from pipeline.history.runs import Execution, Known, known
from pipeline.project.git import git
from pipeline.project.params import PARAMS_FILE, load_section
from pipeline.project.stage_table import MODELS, STAGES
from pipeline.show.console import n_of, report_console
from pipeline.show.markdown import NOTHING, visible
from pipeline.show.terminal import say_json
from pipeline.tracking.connection import PAGES, named_failure, run_url
from pipeline.tracking.differences import OF_MODELS, Change, changes
from pipeline.tracking.keys import is_result, machine_of, present_metrics
from pipeline.tracking.provenance import CODE, PATCH
from pipeline.tracking.registry import CANDIDATE, CHAMPION, MD5_TAG, files_of
from pipeline.tracking.version_page import profile

if TYPE_CHECKING:
    import torch

    from pipeline.tracking.mlflow_classes import ModelVersion
    from stages.evaluate import EvaluateParams

_T = TypeVar("_T")

ANSWERS = 4
"""So many answers are shown side by side."""

_EVALUATE = "evaluate"
_INTERVAL = ("_low", "_high")
_NOT_TEST = ("validation_", "train_", "base_")  # scores of other parts, or of another model
_COMMITS = 10  # of a log
_DIGITS = 10  # of a commit, a checksum
_EXCERPT = 300  # characters of an answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One of both.

    Attributes:
        name: `classifier/3`, or `run #4` where a run was asked for.
        version: the registered one; None where a run was asked for.
        aliases: that stand at it.
        run: that made it, or that was asked for.
        evaluation: the run of `evaluate` that scored it; None where nothing did.
    """

    name: str
    version: ModelVersion | None
    aliases: tuple[str, ...]
    run: Execution
    evaluation: Execution | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """An input that differs: its md5 on both sides, and in words what is other about it."""

    path: str
    before: str | None
    after: str | None
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """What differs in the code.

    Attributes:
        commits: of both; empty where none is known.
        dirty: by side whether the tree had edits.
        log: commits that only the second has, `git log --oneline`.
        back: commits that only the first has.
        files: of those that the stage runs, what differs; None where that cannot be told.
        known_by: how that is known: `runs` recorded it, or `git` has both commits.
        notes: what cannot be told, and what else matters.
    """

    commits: tuple[str, str]
    dirty: tuple[bool, bool]
    log: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    files: tuple[str, ...] | None = None
    known_by: str = ""
    notes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Something in the code is other, or may be."""
        return self.files != () or (self.known_by == "git" and any(self.dirty))


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure on both sides; None where one has none."""

    name: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """The second less the first."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What both said to the same thing; `right` is empty where nothing is."""

    asked: str
    right: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that differs.

    Attributes:
        stage: that made both.
        sides: the first and the second.
        params: that differ.
        data: inputs that differ.
        code: the code of both.
        machine: packages and the machine, as far as they differ.
        metrics: of both runs, equal ones too.
        scores: of both evaluations on the test data, equal ones too.
        answers: some of those that differ.
        asked: in one line where the answers are from, or why there are none; empty for stages that
            answer nothing.
        links: MLflow's pages: `comparison`, and of both sides `before` and `after`.
    """

    stage: str
    sides: tuple[Side, Side]
    params: list[Change]
    data: list[Data]
    code: Code
    machine: list[Change]
    metrics: list[Metric]
    scores: list[Metric]
    answers: list[Answer]
    asked: str
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Nothing differs."""
        figures = (*self.metrics, *self.scores)
        equal = all(each.before == each.after for each in figures)
        made = self.params or self.data or self.code.differs or self.machine
        return equal and not made and not self.answers


def compare(
    root: Path, one: str, other: str | None = None, *, answers: int = ANSWERS
) -> Comparison:
    """What differs between two versions of a model, or two runs of a stage.

    Args:
        root: the project.
        one: `classifier/3`, `models:/classifier/3`, `classifier@champion`, `classifier` (the newest
            version), or the beginning of a run's id.
        other: the same; without it the champion is compared with `one`, or with the candidate
            where `one` is a model's name.
        answers: so many are shown side by side.

    Raises:
        InputError: there is no such thing, or the two are of different stages.
        RunError: MLflow cannot be reached.
    """
    from pipeline.tracking.mlflow_classes import MlflowException

    everything = known(root)
    if everything.client is None:
        raise everything.not_known("nothing can be compared")
    with named_failure(root, "does not tell what is compared", MlflowException):
        if other is None:
            one, other = _against_champion(everything, one)
        sides = _side(everything, one), _side(everything, other)
        stage = sides[0].run.stage
        if sides[1].run.stage != stage:
            raise InputError(
                f"{sides[0].name} is made by {stage} and {sides[1].name} by {sides[1].run.stage}; "
                "compare two of one stage"
            )
        before, after = _evaluated(everything, stage, sides)
        first, second = before.run, after.run
        shown, asked = _answers(everything, stage, before, after, answers)
        return Comparison(
            stage=stage,
            sides=(before, after),
            params=changes(_params(first), _params(second), OF_MODELS),
            data=_data(everything, first, second),
            code=_code(everything, first, second),
            machine=changes(machine_of(first.tags), machine_of(second.tags)),
            metrics=_metrics(_figures(first), _figures(second)),
            scores=_metrics(_scores(stage, before), _scores(stage, after)),
            answers=shown,
            asked=asked,
            links=_links(root, before, after),
        )


# --- the two --------------------------------------------------------------------------------------


def _against_champion(everything: Known, one: str) -> tuple[str, str]:
    asked = _version_or_run(everything, one)
    if isinstance(asked, Execution):
        raise InputError(f"{one}: with which run? name two: gpt-pipeline compare {one} OTHER")
    name = asked.name
    if one.removeprefix("models:/") == name:
        one = f"{name}@{CANDIDATE}"
    if not any(CHAMPION in everything.aliases_of(v) for v in everything.versions if v.name == name):
        raise InputError(
            f"{name}: has no champion to compare with; name two versions: "
            f"gpt-pipeline compare {name}/1 {name}/2"
        )
    return f"{name}@{CHAMPION}", one


def _version_or_run(everything: Known, what: str) -> ModelVersion | Execution:
    from pipeline.tracking.mlflow_classes import ModelVersion

    found = find(everything, what)
    if isinstance(found, Execution) and found.run is None:
        raise InputError(f"{what}: is known by its dvc.lock alone; MLflow has no run of it")
    if not isinstance(found, ModelVersion | Execution):
        raise InputError(
            f"{what}: is no version of a model and no run; name two such as classifier/2 and "
            "classifier@champion"
        )
    return found


def _side(everything: Known, what: str) -> Side:
    found = _version_or_run(everything, what)
    if isinstance(found, Execution):
        name = f"run #{found.tags.get('number', found.run_id[:8])}"
        return Side(name=name, version=None, aliases=(), run=found)
    run = everything.by_run(found.run_id or "")
    if run is None:
        raise InputError(f"{version_name(found)}: MLflow has not the run that made it any more")
    aliases = tuple(sorted(everything.aliases_of(found)))
    name = f"{found.name}/{found.version}"
    return Side(name=name, version=found, aliases=aliases, run=run)


def _evaluated(everything: Known, stage: str, sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """Both with the runs that scored them: on the same data where there are such, the newest."""
    directory = STAGES[stage].outputs.get("out", "") if stage in STAGES else ""
    first, second = (list(_evaluations(everything, directory, side)) for side in sides)
    pairs = [(a, b) for a in first for b in second if _test_data(a) == _test_data(b)]
    one, other = pairs[0] if pairs else (next(iter(first), None), next(iter(second), None))
    return _with(sides[0], one), _with(sides[1], other)


def _with(side: Side, evaluation: Execution | None) -> Side:
    return Side(
        name=side.name,
        version=side.version,
        aliases=side.aliases,
        run=side.run,
        evaluation=evaluation,
    )


def _evaluations(everything: Known, directory: str, side: Side) -> Iterator[Execution]:
    tags = side.version.tags if side.version else {}
    md5 = tags.get(MD5_TAG) or side.run.outputs.get(directory)
    for each in everything.executions:
        if each.stage == _EVALUATE and each.outputs and md5 == each.inputs.get(directory, ""):
            yield each


def _test_data(evaluation: Execution) -> dict[str, str]:
    return {path: md5 for path, md5 in evaluation.inputs.items() if path.startswith("data/")}


# --- what they were made of -----------------------------------------------------------------------


def _params(run: Execution) -> Mapping[str, str]:
    return run.run.data.params if run.run else {}


def _data(everything: Known, before: Execution, after: Execution) -> list[Data]:
    return [
        Data(
            path=each.what,
            before=each.before,
            after=each.after,
            words=tuple(_data_in_words(everything, each, before, after)),
        )
        for each in changes(before.inputs, after.inputs)
    ]


def _data_in_words(
    everything: Known, change: Change, before: Execution, after: Execution
) -> Iterator[str]:
    if change.before is None or change.after is None:
        yield f"only {'the second' if change.before is None else 'the first'} reads it"
        return
    first, second = (profile(each.run, change.what) if each.run else {} for each in (before, after))
    yield from (str(each) for each in changes(first, second))
    makers = [
        everything.maker(change.what, md5, run.started)
        for md5, run in ((change.before, before), (change.after, after))
    ]
    if not makers[0] or not makers[1]:
        return
    yield from _sources_in_words(makers[0], makers[1], change.what)
    one, other = (f"#{each.tags.get('number', '?')}" for each in makers if each)
    params = [str(each) for each in changes(_params(makers[0]), _params(makers[1]), OF_MODELS)]
    told = f" ({first_few(params)})" if params else ""
    if one != other:
        yield f"made by {makers[0].stage} {one} → {other}{told}"


def _sources_in_words(before: Execution, after: Execution, folder: str) -> Iterator[str]:
    """Which raw sources of a folder are others."""

    def sources(run: Execution) -> dict[str, str]:
        told = {each.name: json.loads(each.source) for each in _data_sets(run)}
        # a source from the web names its address and not its folder
        return {
            name: str(source["sha256"])[:_DIGITS]
            for name, source in told.items()
            if "sha256" in source and source.get("uri", folder) == folder
        }

    for each in changes(sources(before), sources(after)):
        if each.before is None or each.after is None:
            yield f"source {each.what} is {'new' if each.before is None else 'gone'}"
        else:
            yield f"source {each.what}: sha256 {each.before}… → {each.after}…"


def _data_sets(run: Execution) -> list[Any]:
    inputs = run.run.inputs if run.run else None
    return [each.dataset for each in (inputs.dataset_inputs if inputs else ())]


def _code(everything: Known, before: Execution, after: Execution) -> Code:
    commits = before.tags.get("git.commit", ""), after.tags.get("git.commit", "")
    first, second = (run.tags.get("git.dirty") == "true" for run in (before, after))
    log: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    notes = []
    if all(commits) and commits[0] != commits[1]:
        try:
            log, back = (
                tuple(git(everything.root, "log", "--oneline", f"{a}..{b}").splitlines())
                for a, b in (commits, commits[::-1])
            )
        except RunError:
            notes.append("git here has not both commits; `git fetch` may bring them")
    files, known_by, why = _files(everything, before, after, commits)
    if why:
        notes.append(why)
    return Code(
        commits=commits,
        dirty=(first, second),
        log=log,
        back=back,
        files=files,
        known_by=known_by,
        notes=tuple(notes),
    )


def _files(
    everything: Known, before: Execution, after: Execution, commits: tuple[str, str]
) -> tuple[tuple[str, ...] | None, str, str]:
    """The stage's files of code that differ, how that is known, and why it is not."""
    first, second = (_recorded_code(everything, run) for run in (before, after))
    if first and second:
        # a `dvc.lock` alone may know of a folder what a run knows of its files
        folders = [path for path, md5 in {**first, **second}.items() if md5.endswith(".dir")]
        first, second = (_folded(code, folders) for code in (first, second))
        return tuple(sorted(each.what for each in changes(first, second))), "runs", ""
    if not all(commits):
        return None, "", "which files differ cannot be told: no commit is known"
    try:
        code = code_of(everything.root, before.stage)
        changed = git(everything.root, "diff", "--name-only", *commits, "--", *code)
    except (InputError, RunError):
        return None, "", "which files differ cannot be told: the runs did not record it"
    return tuple(changed.splitlines()), "git", ""


def _recorded_code(everything: Known, run: Execution) -> Mapping[str, str]:
    """Path -> md5 of the code that a stage ran, as its run or a `dvc.lock` has it."""
    content = everything.kept(run, f"lineage/{CODE}")
    return json.loads(content) if content else run.code


def _folded(code: Mapping[str, str], folders: Sequence[str]) -> Mapping[str, str]:
    """The code with one md5 for all that is in each of these folders."""
    alone = {
        path: md5
        for path, md5 in code.items()
        if not any(path.startswith(f"{folder}/") for folder in folders)
    }
    return alone | {path: md5 for path in folders if (md5 := md5_of_code(code, path))}


# --- what they came to ----------------------------------------------------------------------------


def _figures(run: Execution) -> dict[str, float]:
    """The last values of a run, without those of the machine and of the training's course."""
    metrics = present_metrics(run.run.data.metrics) if run.run else {}
    return {key: value for key, value in sorted(metrics.items()) if is_result(key)}


def _scores(stage: str, side: Side) -> dict[str, float]:
    if side.evaluation is None:
        return {}
    start = Path(STAGES[stage].outputs["out"]).name + "/"
    figures = _figures(side.evaluation)
    return {k.removeprefix(start): v for k, v in figures.items() if k.startswith(start)}


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> list[Metric]:
    names = dict.fromkeys((*after, *before))
    return [Metric(name=name, before=before.get(name), after=after.get(name)) for name in names]


# --- what they answered ---------------------------------------------------------------------------


def _answers(
    everything: Known, stage: str, before: Side, after: Side, most: int
) -> tuple[list[Answer], str]:
    """Some of the answers that differ, and a line: where they are from, or why there are none."""
    registered = STAGES[stage].model if stage in STAGES else None
    if registered is None:
        return [], ""
    model = registered.name
    if registered.serves == "base":
        texts, told = _samples(everything, before, after)
        return texts[:most], told
    (first, why), (second, why_too) = (
        _kept_answers(everything, model, side) for side in (before, after)
    )
    if not any(asked in second for asked in first):
        why = why or why_too or "both were asked other things"
        if not most:
            return [], f"none to compare: {why}"
        try:
            return _asked_now(everything, model, (before, after), most)
        except InputError as error:
            return [], f"none to compare: {why}, and {error}"
    asked = [text for text in first if text in second]
    differ = [
        Answer(asked=text, right=row.right, before=first[text].answer, after=row.answer)
        for text, row in ((text, second[text]) for text in asked)
        if first[text].said != row.said
    ]
    told = (
        f"{len(asked):,} test {_ASKED[registered.serves]} that both were asked; "
        f"they differ on {len(differ):,}"
    )
    alone = len(first) - len(asked), len(second) - len(asked)
    if any(alone):
        told += f" ({alone[0]:,} asked of the first alone, {alone[1]:,} of the second)"
    return _spread(differ, most), told


def _spread(things: Sequence[_T], most: int) -> list[_T]:
    """At most so many of them, at equal distances."""
    n = min(most, len(things))
    return [things[len(things) * i // n] for i in range(n)]


def _kept_answers(everything: Known, model: str, side: Side) -> tuple[dict[str, _Row], str]:
    """What a version answered to `evaluate`, by what it was asked; or why that is not kept."""
    if model not in _ROWS:
        return {}, f"evaluate asks {model} for no texts"
    if side.evaluation is None:
        return {}, f"no run of evaluate asked {side.name}"
    content = everything.kept(side.evaluation, f"predictions/{model}.csv")
    if content is None:
        return {}, f"MLflow keeps none of {side.name}'s evaluation"
    table = pd.read_csv(BytesIO(content), keep_default_na=False, dtype=str)
    return {row.asked: row for row in map(_ROWS[model], table.to_dict("records"))}, ""


def _asked_now(
    everything: Known, model: str, sides: tuple[Side, Side], most: int
) -> tuple[list[Answer], str]:
    """Both are fetched from the registry and asked of the test part that the second held out.

    Raises:
        InputError: one of them or the data cannot be had; in one line.
    """
    from gpt.model.device import prepare_device
    from stages.evaluate import EvaluateParams
    from stages.evaluate.training import read_training

    serves = MODELS[model].serves
    data = everything.root / "data/raw" / _ASKED[serves]
    if not data.is_dir():
        raise InputError(f"data/raw/{_ASKED[serves]} is not here; `dvc pull` brings it")
    versions = [_registered(everything, side) for side in sides]
    params = load_section(everything.root / PARAMS_FILE, "evaluate")
    params = params or EvaluateParams()
    device = prepare_device(params.device, params.threads)
    with files_of(versions[0]) as first, files_of(versions[1]) as second:
        ask = _classified if serves == "classifier" else _answered
        answers, told = ask(first, second, data, device, params, most)
        splits = [(each.split, each.balance) for each in map(read_training, (first, second))]
    if splits[0] != splits[1]:
        told += f"; {sides[0].name} learnt from another split and may know them"
    return answers, told


def _registered(everything: Known, side: Side) -> ModelVersion:
    if side.version is not None:
        return side.version
    directory = STAGES[side.run.stage].outputs["out"]
    found = everything.registered(side.run.outputs.get(directory, ""))
    if not found:
        raise InputError(f"the model of {side.name} is not registered")
    return found[0]


def _classified(
    first: Path, second: Path, data: Path, device: torch.device, params: EvaluateParams, most: int
) -> tuple[list[Answer], str]:
    from stages.evaluate.classifier import messages_by_part, predict_classes

    test = messages_by_part(second, data)[1]["test"]
    rows = [
        [_classifiers(row) for row in table.astype(str).to_dict("records")]
        for table, _ in (
            predict_classes(each, test, device, params.batch_size) for each in (first, second)
        )
    ]
    differ = [
        Answer(asked=other.asked, right=other.right, before=one.answer, after=other.answer)
        for one, other in zip(*rows, strict=True)
        if one.said != other.said
    ]
    told = f"{len(test):,} test messages, asked of both now; they differ on {len(differ):,}"
    return _spread(differ, most), told


def _answered(
    first: Path, second: Path, data: Path, device: torch.device, params: EvaluateParams, most: int
) -> tuple[list[Answer], str]:
    from stages.evaluate.assistant import answer_records, records_by_part

    test = records_by_part(second, data)["test"]
    asked = _spread(test, most)  # each answer takes its time: no more than are shown
    one, other = (
        answer_records(each, asked, device, params.batch_size, params.max_new_tokens)[0]["answer"]
        for each in (first, second)
    )
    answers = [
        Answer(
            asked="\n".join(filter(None, (record.instruction, record.input))),
            right=record.output.strip(),
            before=before,
            after=after,
        )
        for record, before, after in zip(asked, one, other, strict=True)
        if before != after
    ]
    told = f"{len(asked):,} of {len(test):,} test instructions, asked of both now; "
    return answers, f"{told}they differ on {len(answers):,}"


@dataclass(frozen=True, slots=True)
class _Row:
    """Of a table of predictions: what is shown of an answer, and what it is compared by."""

    asked: str
    right: str
    answer: str
    said: str


def _assistants(row: Mapping[Any, str]) -> _Row:
    asked = "\n".join(filter(None, (row["instruction"], row["input"])))
    return _Row(asked, row["reference"], row["answer"], row["answer"])


def _classifiers(row: Mapping[Any, str]) -> _Row:
    label = row["predicted"]
    share = row.get(f"probability_{label}")
    sure = f" ({float(share):.1%})" if share else ""
    return _Row(row["text"], row["actual"], f"{label}{sure}", label)


_ROWS = {"assistant": _assistants, "classifier": _classifiers}
_ASKED = {"assistant": "instructions", "classifier": "messages"}
"""What a model is asked, by how it is served."""


def _samples(everything: Known, before: Side, after: Side) -> tuple[list[Answer], str]:
    """The last texts that both wrote in training: those whom no evaluation asks for texts."""
    assert everything.client is not None
    texts = []
    for side in (before, after):
        listed = everything.client.list_artifacts(side.run.run_id, "samples")
        names = sorted(each.path for each in listed if not each.is_dir)
        content = everything.kept(side.run, names[-1]) if names else None
        if content is None:
            return [], f"none to compare: MLflow keeps no texts of {side.name}'s training"
        texts.append(content.decode(errors="replace"))
    said = "the last texts that both wrote in training"
    if texts[0] == texts[1]:
        return [], f"{said} are equal"
    return [Answer(asked="", right="", before=texts[0], after=texts[1])], said


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
    answers: int = ANSWERS,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print what differs, or all of it as JSON. Arguments and errors are those of `compare`."""
    found = compare(root, one, other, answers=answers)
    if as_json:
        say_json(as_dict(found))
        return
    console = report_console(console)
    for side in found.sides:
        console.print(_heading(side))
    if found.is_empty:
        same = found.sides[0].run.run_id == found.sides[1].run.run_id
        console.print()
        console.print(Text("Nothing differs" + (": both are the same run." if same else ".")))
    for title, said, parts in () if found.is_empty else _parts(found):
        console.print()
        console.print(Text(title, style="bold") + Text(f": {said}" if said else ""))
        for part in parts:
            console.print(Padding(part, (0, 0, 0, 2), expand=False))
    console.print()
    for name, address in found.links.items():
        label = {"before": found.sides[0].name, "after": found.sides[1].name}.get(name, name)
        console.print(Text(f"{label}: {address}"), soft_wrap=True)


def as_dict(found: Comparison) -> dict[str, Any]:
    """A comparison for a program."""
    metrics = {
        key: [{**asdict(each), "difference": each.difference} for each in figures]
        for key, figures in (("metrics", found.metrics), ("scores", found.scores))
    }
    return {
        "stage": found.stage,
        "equal": found.is_empty,
        "before": _side_for_program(found.sides[0]),
        "after": _side_for_program(found.sides[1]),
        "params": [asdict(each) for each in found.params],
        "data": [asdict(each) for each in found.data],
        "code": asdict(found.code),
        "machine": [asdict(each) for each in found.machine],
        **metrics,
        "answers": [asdict(each) for each in found.answers],
        "asked": found.asked or None,
        "links": dict(found.links),
    }


def _side_for_program(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "version": int(side.version.version) if side.version else None,
        "aliases": list(side.aliases),
        "run_id": side.run.run_id,
        "evaluation": side.evaluation.run_id if side.evaluation else None,
    }


def _heading(side: Side) -> Text:
    line = Text(side.name, style="bold magenta")
    if side.aliases:
        line += Text(f" ({', '.join(side.aliases)})")
    tags = side.run.tags
    number = tags.get("mlflow.runName") or f"#{tags.get('number', '?')}"
    when = f"{datetime.fromtimestamp(side.run.started / 1000):%Y-%m-%d %H:%M}"
    return line + Text(f"  {side.run.stage} {visible(number)}, {when}", style="dim")


def _parts(found: Comparison) -> Iterator[tuple[str, str, list[RenderableType]]]:
    """What is printed: a title, what is said beside it, and what is below."""
    same = "the same"
    params = [Text(_visible(str(each))) for each in found.params]
    yield "Parameters", "" if params else same, [*params]
    yield "Data", "" if found.data else same, list(_data_lines(found.data))
    yield "Code", "" if found.code.differs else same, list(_code_lines(found.code, found.sides))
    machine = [Text(_visible(str(each))) for each in found.machine]
    yield "Machine and packages", "" if machine else same, [*machine]
    names = found.sides[0].name, found.sides[1].name
    yield "Metrics of the runs", *_figures_shown(found.metrics, names)
    if any(side.evaluation for side in found.sides):
        scores = [each for each in found.scores if not each.name.startswith(_NOT_TEST)]
        yield "Scores on the test data", *_figures_shown(scores, names)
    if found.asked:
        yield "Answers", found.asked, list(_answer_lines(found.answers, names))


def _data_lines(data: Sequence[Data]) -> Iterator[Text]:
    for each in data:
        first, second = (
            (md5 or "none")[:_DIGITS] + ("…" if md5 else "") for md5 in (each.before, each.after)
        )
        yield Text(f"{each.path}: md5 {first} → {second}")
        yield from (Text(f"  {_visible(words)}", style="dim") for words in each.words)


def _code_lines(code: Code, sides: tuple[Side, Side]) -> Iterator[Text]:
    if all(code.commits):
        first, second = (commit[:_DIGITS] for commit in code.commits)
        yield Text(f"commit {first}" if first == second else f"commits {first} → {second}")
    for which, log in (("second", code.log), ("first", code.back)):
        if log:
            n = n_of(len(log), "commit")
            yield Text(f"{n} only in the {which}:")
        yield from (Text(f"  {_visible(line)}", style="dim") for line in log[:_COMMITS])
        if log[_COMMITS:]:
            yield Text(f"  and {len(log) - _COMMITS} more", style="dim")
    if code.files:
        yield Text(f"of what the stage runs, other: {', '.join(code.files)}")
    elif code.files == () and code.commits[0] != code.commits[1]:
        yield Text("of what the stage runs, nothing is other")
    for dirty, side in zip(code.dirty, sides, strict=True):
        if dirty:
            kept = side.run.tags.get("git.patch") == "kept"
            where = f", kept with its run as lineage/{PATCH}" if kept else ", which are not kept"
            yield Text(f"{side.name} ran with uncommitted changes{where}", style="yellow")
    yield from (Text(note, style="yellow") for note in code.notes)


def _figures_shown(
    metrics: Sequence[Metric], names: tuple[str, str]
) -> tuple[str, list[RenderableType]]:
    """A table of the figures that differ; how many do not."""
    ends = {f"{each.name}{end}" for each in metrics for end in _INTERVAL}
    shown = [each for each in metrics if each.name not in ends]
    differ = [each for each in shown if each.before != each.after]
    if not metrics:
        return "none", []
    equal = len(shown) - len(differ)
    if not differ:
        return "the same", []
    by_name, none = {each.name: each for each in metrics}, Metric(name="", before=None, after=None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("", *names, "difference"):
        table.add_column(column, justify="left" if not column else "right")
    for each in differ:
        low, high = (by_name.get(f"{each.name}{end}", none) for end in _INTERVAL)
        before = _figure(each.before, low.before, high.before)
        after = _figure(each.after, low.after, high.after)
        difference = NOTHING if each.difference is None else f"{each.difference:+.4g}"
        table.add_row(*map(Text, (visible(each.name), before, after, difference)))
    more = f"{equal} more {'is' if equal == 1 else 'are'} equal" if equal else ""
    return more, [table]


def _figure(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return NOTHING
    figure = f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return figure if low is None or high is None else f"{figure} ({low:.4g} to {high:.4g})"


def _answer_lines(answers: Sequence[Answer], names: tuple[str, str]) -> Iterator[Text]:
    width = max(map(len, names))
    for each in answers:
        if each.asked:
            yield Text(visible(each.asked, _EXCERPT), style="bold")
        rows = [("right", each.right)] if each.right else []
        for name, text in (*rows, (names[0], each.before), (names[1], each.after)):
            said = visible(text, _EXCERPT) or "(nothing)"
            yield Text(f"  {name:<{width}}  ", style="dim") + Text(said)


def _visible(text: str) -> str:
    return visible(text, limit=None)
