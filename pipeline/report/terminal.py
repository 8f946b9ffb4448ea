"""The report at the end of a run: what was built, how good it is, and what to do next.

Written as one HTML page and as Markdown (`pipeline.report.page`); the terminal shows it in short.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from rich.console import Console

from gpt.base.errors import InputError, RunError, in_one_line
from gpt.base.files import read_json, write_json
from pipeline.report.card import model_card
from pipeline.report.facts import Facts, report_facts
from pipeline.report.page import (
    HTML,
    MARKDOWN,
    REPORT_PLOTS,
    REPORT_TEMPLATES,
    values,
    write_report,
)
from pipeline.show.console import safe_console
from pipeline.show.documents import fill, print_markdown
from pipeline.tracking.connection import connect, tracking_uri
from pipeline.tracking.provenance import git_state

_LAST_SUMMARY = Path(".pipeline/report.json")
"""The summary that was printed last, and a digest of what it was made from."""
_MADE_FROM = (
    "LICENSE",
    "dvc.lock",
    "*/dvc.lock",
    "data/raw/*/sources.json",
    "reports/*/*.json",
    "reports/*/history.csv",
    "reports/evaluation/predictions/*.csv",
    ".pipeline/runs/*.json",
    ".pipeline/promotion.json",
    ".pipeline/champion/*.csv",
)
"""The files that the report is made from."""


def print_report(root: Path, console: Console | None = None, *, always: bool = True) -> None:
    """Print the report of the project's last results in short, and rewrite it.

    MLflow keeps what was written with the run of `evaluate`, and the card of each registered
    version.

    Args:
        root: the project.
        console: where to print.
        always: ask MLflow and write the report even if nothing ran since it was written.

    Raises:
        InputError: the pipeline has not been run to its end.
    """
    console = safe_console(console)
    made_from = _digest(root)
    summary = None if always else _last_summary(root, made_from)
    if summary is None:
        facts = report_facts(root)
        write_report(root, facts)
        summary = fill(REPORT_TEMPLATES / "summary.md", **values(facts))
        if refused := _keep_in_mlflow(root, facts):
            console.print(refused, style="yellow", soft_wrap=True)
        if not facts.tracking and not refused:  # otherwise the next call tries MLflow again
            write_json(root / _LAST_SUMMARY, {"made_from": made_from, "summary": summary})
    print_markdown(console, summary)


def _digest(root: Path) -> str:
    """Of everything that the report is made from; what MLflow says of a run does not change."""
    digest = sha256(repr((git_state(root), tracking_uri(root))).encode())
    for pattern in _MADE_FROM:
        for path in sorted(root.glob(pattern)):
            digest.update(
                f"{path.relative_to(root)} {sha256(path.read_bytes()).hexdigest()}".encode()
            )
    return digest.hexdigest()


def _last_summary(root: Path, made_from: str) -> str | None:
    """The summary of the report if that is still there, and what it was made from."""
    if not all((root / path).exists() for path in (HTML, MARKDOWN, REPORT_PLOTS)):
        return None
    try:
        last = read_json(root / _LAST_SUMMARY, missing="", remedy="")
        return str(last["summary"]) if last["made_from"] == made_from else None
    except (InputError, KeyError):
        return None


def _keep_in_mlflow(root: Path, facts: Facts) -> str:
    """Log the report and the cards to MLflow; return the error, empty on success."""
    run_id = facts.runs["evaluate"].run_id if "evaluate" in facts.runs else None
    if run_id is None and not facts.versions:
        return ""  # the report says why
    from pipeline.tracking.mlflow_classes import MlflowException

    try:
        client = connect(root)
        for name, version in facts.versions.items():
            client.update_model_version(name, str(version), model_card(facts, name))
        if run_id is not None:
            client.log_artifact(run_id, str(root / HTML), "report")
    except (RunError, MlflowException, OSError) as error:
        why = in_one_line(error)
        return f"MLflow did not take the report; `gpt-pipeline report` tries again: {why}"
    return ""
