"""The card of a registered model: what it is, what it was made from, how good it is, and for what.

The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting"
(https://arxiv.org/abs/1810.03993), in short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpt.base.errors import InputError
from pipeline.project.stage_table import MODELS, STAGES
from pipeline.report.content import (
    assistant_in_short,
    base_of,
    bases,
    before_and_after,
    checksum,
    classes,
    classifier_in_short,
    origin,
    what_fine_tuning_buys,
)
from pipeline.report.facts import Facts
from pipeline.show.markdown import Cell, escaped, label_of, name_of, table
from pipeline.tracking.version_page import LONGEST

_MOST_ROWS = 8  # of the tables of classes and of sources

_STAGES = {spec.model.name: stage for stage, spec in STAGES.items() if spec.model}


def model_card(facts: Facts, name: str) -> str:
    """The card of a model's version in Markdown; labels and names in it are escaped.

    Args:
        facts: what the report tells; scores and checksums are of the last run.
        name: of the registered model.

    Returns:
        At most `LONGEST` characters: the parameters are left out where there are too many.

    Raises:
        InputError: there is no such model.
    """
    if name not in MODELS:
        raise InputError(f"{name}: no such model; use one of {', '.join(MODELS)}")
    stage = _STAGES[name]
    card = _card(facts, name, _parameters(facts, stage))
    if len(card) > LONGEST:
        card = _card(facts, name, "In MLflow, with the run.")
    return card[:LONGEST]


def _card(facts: Facts, name: str, parameters: str) -> str:
    stage = _STAGES[name]
    model = MODELS[name]
    version = _version(facts, name)
    parts = [
        f"# {name}" + (f", version {version}" if version else ""),
        "## Model details",
        model.what,
        _bullets(_details(facts, stage)),
        f'Load it: `mlflow.pyfunc.load_model("models:/{name}/{version or "VERSION"}")`',
        "## Intended use",
        model.use,
        "## Metrics",
        "In brackets: 95 % bootstrap intervals over the test examples.",
        *(_SCORES[name](facts) if name in _SCORES else _by_its_stage(facts, stage)),
        "## Evaluation data",
        _evaluated_on(facts, name),
        "## Training data",
        _training_data(facts, stage),
        "## Caveats",
        _bullets(_caveats(facts, stage)),
        "## Parameters",
        parameters,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _version(facts: Facts, name: str) -> int | None:
    decision = facts.decisions.get(name)
    return facts.versions.get(name, decision.version if decision else None)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _details(facts: Facts, stage: str) -> list[str]:
    run = facts.executions.get(stage)
    lines = [f"Made by the stage {escaped(stage)}"]
    if base := base_of(facts, stage):
        lines.append(f"Base: models/{escaped(base)}")
    if run and run.ended:
        lines.append(f"Trained: {run.ended:%Y-%m-%d}")
    if run and run.commit:
        lines.append(f"Code: commit {run.commit}{', with uncommitted changes' * bool(run.dirty)}")
    lines.append(f"License: {escaped(facts.license) or 'none given'}")
    return lines


def _base(facts: Facts) -> list[str]:
    grid = bases(facts)
    return [table(grid.columns, grid.rows)]


def _classifier(facts: Facts) -> list[str]:
    grids = (what_fine_tuning_buys(facts), classes(facts, _MOST_ROWS))
    return [
        escaped(classifier_in_short(facts)),
        *(table(grid.columns, grid.rows) for grid in grids),
    ]


def _assistant(facts: Facts) -> list[str]:
    grid = before_and_after(facts)
    return [escaped(assistant_in_short(facts)), table(grid.columns, grid.rows)]


def _by_its_stage(facts: Facts, stage: str) -> list[str]:
    """Of a model that the evaluation does not ask: what its own stage measured."""
    figures = facts.results.get(stage, {})
    rows: list[list[Cell]] = [[label_of(name), f"{value:.4g}"] for name, value in figures.items()]
    return [table(["metric", "value"], rows)] if rows else []


_SCORES: Mapping[str, Callable[[Facts], list[str]]] = {
    "base": _base,
    "classifier": _classifier,
    "assistant": _assistant,
}


def _evaluated_on(facts: Facts, name: str) -> str:
    if name == "base":
        return "The validation split of data/tokens, which training did not see."
    shared = facts.results.get(_STAGES[name], {}).get("contaminated_test")
    text = "The test part of its data: drawn by a hash of each text, and kept out of training."
    if shared is not None:
        text += f" {shared:,.0f} of its examples share text with the training part."
    return text


def _training_data(facts: Facts, stage: str) -> str:
    recorded = facts.recorded.get(stage)
    if recorded is None:
        return "Not recorded in dvc.lock."
    rows: list[list[Cell]] = [[path, md5] for path, md5 in recorded.inputs.items()]
    folder = STAGES[stage].inputs
    made = table(["input", "md5 (DVC)"], rows, "ll")
    wanted = [name for name in facts.sources if f"data/raw/{name}" in folder.values()]
    if "data/tokens" in folder.values():
        wanted.append("corpus")
    found = [source for name in wanted for source in facts.sources.get(name, ())]
    sources: list[list[Cell]] = [
        [name_of(source.name), checksum(source), origin(source)] for source in found[:_MOST_ROWS]
    ]
    if not sources:
        return made
    more = f"\n\nAnd {len(found) - _MOST_ROWS} more." if len(found) > _MOST_ROWS else ""
    return f"{made}\n\n{table(['source', 'sha256', 'from'], sources, 'lll')}{more}"


def _caveats(facts: Facts, stage: str) -> list[str]:
    figures = facts.results
    lines = []
    if rows := figures.get(stage, {}).get(
        "rows_train", figures.get(stage, {}).get("records_train")
    ):
        lines.append(f"It learnt from {rows:,.0f} examples: other kinds of text may go wrong.")
    elif tokens := figures.get(stage, {}).get("tokens"):
        lines.append(f"It learnt from {tokens:,.0f} tokens, of the sources above alone.")
    lines += [
        "Whatever is wrong, one-sided or offensive in its data or its base may come out of it; "
        "it was not tested for that.",
        "The intervals hold for texts drawn like the test part, and for no others.",
    ]
    return lines


def _parameters(facts: Facts, stage: str) -> str:
    run = facts.executions.get(stage)
    if run is None or not run.params:
        return "In params.yaml; MLflow was not asked."
    return escaped(", ".join(f"{key} {value}" for key, value in sorted(run.params.items())))
