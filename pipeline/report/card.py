"""The card of a registered model: what it is, what it was made from, how good it is, and for what.

The sections are those of Mitchell et al. 2019, "Model Cards for Model Reporting"
(https://arxiv.org/abs/1810.03993), in short.
"""

from __future__ import annotations

from gpt.base.errors import InputError
from pipeline.project.stage_table import MODELS, STAGES
from pipeline.report.facts import Facts, LastRun
from pipeline.report.page import REPORT_TEMPLATES, values
from pipeline.show.documents import fill
from pipeline.tracking.version_page import LONGEST


def model_card(facts: Facts, name: str) -> str:
    """The card of a model's version in Markdown.

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
    stage = next(stage for stage, spec in STAGES.items() if spec.model == MODELS[name])
    run = facts.runs.get(stage, LastRun())
    inputs = facts.recorded[stage].inputs if stage in facts.recorded else {}
    decision = facts.decisions.get(name)
    read = {path.removeprefix("data/raw/") for path in STAGES[stage].inputs.values()}
    if "data/tokens" in read:
        read.add("corpus")
    described = {
        "name": name,
        "version": facts.versions.get(name, decision.version if decision else None),
        "model": MODELS[name],
        "stage": stage,
        "run": run,
        "results": facts.results.get(stage, {}),
        "inputs": inputs,
        "sources": [each for of, found in facts.sources.items() if of in read for each in found],
        **values(facts),
    }
    told = ", ".join(f"{key} {value}" for key, value in sorted(run.params.items()))
    for parameters in (told or "in params.yaml; MLflow was not asked", "in MLflow, with the run"):
        card = fill(REPORT_TEMPLATES / "card.md", parameters=parameters, **described)
        if len(card) <= LONGEST:
            break
    return card[:LONGEST]
