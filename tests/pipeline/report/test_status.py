"""`gpt-pipeline status`: what would run, why, what it would cost, what it last came to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.dag.graph import Dag
from pipeline.report.status import print_status, stage_statuses
from pipeline.tracking.run_notes import note_of_maker

HERE = Path(pipeline.__file__).parent.parent


def note(root: Path, stage: str, **values: object) -> None:
    """What a run of the stage leaves to be known."""
    file = root / ".pipeline" / "runs" / f"{stage}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def shown(root: Path, capsys, **options: bool) -> list[str]:
    """The printed lines."""
    print_status(root, **options)
    return capsys.readouterr().out.splitlines()


def set_rate(root: Path) -> None:
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("0.001", "0.002"))


@pytest.fixture
def changed(project, dvc):
    """The project after a run, with one parameter changed since."""
    dvc("repro", "-q")
    set_rate(project)
    run = {"run_id": "0123456789abcdef", "name": "#7 train.rate=0.001", "url": "http://x/7"}
    note(project, "left", seconds=65.2, status="FINISHED", **run)
    note(project, "right", seconds=2.0, status="FAILED", run_id="fedcba9876543210", url="")
    return project


def test_it_tells_what_would_run_why_what_it_costs_and_what_it_came_to(changed, capsys):
    lines = [" ".join(line.split()) for line in shown(changed, capsys)]
    assert lines == [
        "stage state took run metrics",
        "first up to date — — length 10",
        "left would run 1 min 05 s #7 01234567 length 14",
        "left.train.rate: 0.001 → 0.002",
        "right up to date 2.0 s fedcba98 length 15",
        "its last run is FAILED",
        "last may run — — length 33",
        "after left",
        "",
        "`gpt-pipeline run` brings 2 of 4 up to date; last time 1 of them took 1 min 05 s.",
    ]


def test_what_is_there_is_shown_with_the_run_that_made_it_and_not_with_the_last(
    project, dvc, capsys
):
    dvc("repro", "-q")
    outputs = Dag(project).recorded_outputs(["left"])["left"]
    made = note_of_maker(project, "left", outputs)
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps({"run_id": "0123456789", "name": "#3 a=1", "seconds": 4.0}))
    other = {"left": "0" * 32}
    note(project, "left", run_id="76543210", name="#4 a=2", status="FAILED", seconds=9.0)
    note(project, "right", run_id="76543210", name="#5 a=2", status="FINISHED", outputs=other)
    lines = [" ".join(line.split()) for line in shown(project, capsys)]
    assert "left up to date 4.0 s #3 01234567 length 14" in lines
    assert "its last run is FAILED" in lines
    assert "right up to date — — length 15" in lines, "by which run is not known"


def test_columns_stand_below_each_other(changed, capsys):
    heading, *rows = [line for line in shown(changed, capsys)[:-2] if not line.startswith("  ")]
    at = {len(row[: row.index("length")]) for row in rows}
    assert at == {heading.index("metrics")}
    assert not [line for line in shown(changed, capsys) if line != line.rstrip()]


def test_verbose_shows_every_reason_metric_and_address(changed, capsys):
    params = (changed / "params.yaml").read_text()
    added = ", ".join(f"p{i}: {i}" for i in range(8))
    (changed / "params.yaml").write_text(params.replace("{rate", "{" + added + ", rate"))
    short = shown(changed, capsys)
    assert "  and 4 more; --verbose shows all" in short
    lines = shown(changed, capsys, verbose=True)
    for i in range(8):
        assert f"  left.train.p{i}: added: {i}" in lines
    assert {"  http://x/7", "  #7 train.rate=0.001", "  deep/pi 3.142"} <= set(lines)


def test_json_holds_all_that_is_known(changed, capsys):
    stages = json.loads("\n".join(shown(changed, capsys, as_json=True)))["stages"]
    first, left, right, last = stages
    assert [each["state"] for each in stages] == [
        "up to date", "would run", "up to date", "may run",
    ]  # fmt: skip
    assert left == {
        "name": "left",
        "state": "would run",
        "optional": False,
        "reasons": [{"what": "left.train.rate", "how": "0.001 → 0.002"}],
        "after": [],
        "seconds": 65.2,
        "last_status": "FINISHED",
        "metrics": {"length": 14.0, "deep/pi": 3.14159265},
        "run": {
            "id": "0123456789abcdef", "name": "#7 train.rate=0.001", "status": "FINISHED",
            "url": "http://x/7",
        },
    }  # fmt: skip
    assert (first["run"], right["run"]["status"], last["after"]) == (None, "FAILED", ["left"])


def test_an_optional_stage_is_left_to_who_asks_for_it(project, dvc, add_optional, capsys):
    dvc("repro", "-q")
    add_optional(project)
    lines = shown(project, capsys)
    assert lines[5].split()[:2] == ["extra", "optional"]
    assert lines[6] == "  runs only when asked for: `gpt-pipeline run extra`"
    assert not [line for line in lines if "gpt-pipeline run` brings" in line]
    dvc("repro", "-q", "optional/dvc.yaml:extra")
    assert stage_statuses(project)[4].state == "up to date"


def test_it_loads_nothing_that_takes_long(project, dvc):
    heavy = "[m for m in ('torch', 'prefect', 'mlflow', 'pandas', 'numpy') if m in sys.modules]"
    code = (
        "import sys, pathlib; from pipeline.report.status import print_status;"
        f"print_status(pathlib.Path.cwd()); print({heavy})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(HERE), "PATH": ""},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "no run of this stage is recorded" in done.stdout
