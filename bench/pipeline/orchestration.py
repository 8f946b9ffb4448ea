"""What a flow costs over plain DVC and where nothing is to do, and what stages side by side save.

Everything is measured from outside, as commands in a clone of the project: with the interpreter's
start, the imports, the promotion and the report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bench.harness import Comparison, Machine, Settings, alternate, seconds_of
from bench.worker import Ran
from gpt.base.errors import RunError
from pipeline.flow.prefect_api import LocalServer

ROOT = Path(__file__).resolve().parent.parent.parent
FINE_TUNINGS = ("finetune_classifier", "finetune_instruct")
_OF_A_SESSION = ("GPT_PIPELINE_", "MLFLOW_", "PREFECT_", "DVC_")

# What anyone's flow does who has DVC decide: ask it what changed, run a task a stage, say so.
EMPTY_FLOW = """
from dvc.repo import Repo
from prefect import flow, task

@flow
def pipeline(names):
    states = {}
    for name, upstream in names.items():
        states[name] = task(name=name)(lambda: None).submit(wait_for=[states[u] for u in upstream])
    for state in states.values():
        state.wait()

repo = Repo(".")
repo.status()
graph = repo.index.graph
stages = [each for each in repo.index.stages if each.relpath == "dvc.yaml"]
names = {each.name: [u.name for u in graph.successors(each)] for each in stages}
wanted = {}
def visit(name):
    for upstream in names[name]:
        visit(upstream)
    wanted[name] = names[name]
for name in names:
    visit(name)
pipeline(wanted)
"""


def compare(settings: Settings, machine: Machine) -> Iterator[Comparison]:
    """A flow of all the work, a flow without work, and the two fine-tunings of one."""
    with tempfile.TemporaryDirectory(prefix="gpt-pipeline-bench-") as folder:
        project = _clone(Path(folder) / "project", settings)
        _run(project, "run")  # MLflow's tables are made, the models registered: for all that follow
        yield _all_the_work(project, settings)
        yield _nothing_to_do(project, settings)
        yield _side_by_side(project, settings)


def _nothing_to_do(project: Path, settings: Settings) -> Comparison:
    with LocalServer(project) as server:
        empty = [sys.executable, "-c", EMPTY_FLOW]
        up = {"PREFECT_API_URL": server.url}
        times = _times(
            {
                "gpt-pipeline run": lambda: _run(project, "run"),
                "an empty flow, after `dvc status`": lambda: _execute(project, empty),
                "gpt-pipeline run, a server up": lambda: _run(project, "run", variables=up),
                "an empty flow, a server up": lambda: _execute(project, empty, up),
                "dvc repro": lambda: _dvc(project, "repro"),
            },
            settings,
        )
    names = list(times)
    own = [
        median(mine - theirs for mine, theirs in zip(times[one], times[other], strict=True))
        for one, other in (names[:2], names[2:4])
    ]
    return Comparison(
        title="Nothing to do",
        seconds=times,
        note=f"Of the first, {own[0]:+.1f} s are not Prefect's and DVC's own; "
        f"where a server is up, {own[1]:+.1f} s.",
    )


def _all_the_work(project: Path, settings: Settings) -> Comparison:
    with LocalServer(project) as server:
        up = {"PREFECT_API_URL": server.url}

        def flow(*arguments: str) -> None:
            _run(project, "run", "--force", *arguments, variables=up)

        times = _times(
            {
                "gpt-pipeline run": flow,
                "gpt-pipeline run --jobs 1": lambda: flow("--jobs", "1"),
                "dvc repro": lambda: _dvc(project, "repro", "--force"),
            },
            replace(settings, rounds=(settings.rounds + 2) // 3),
        )
    *ours, plain = times.values()
    over = [median(a / b for a, b in zip(each, plain, strict=True)) - 1 for each in ours]
    return Comparison(
        title="All stages, a server up",
        seconds=times,
        note=f"As it is the flow takes {over[0]:+.1%} over `dvc repro`; with one stage at a time "
        f"{over[1]:+.1%}: its tasks, a DVC process for each, the promotion, the report.",
    )


def _side_by_side(project: Path, settings: Settings) -> Comparison:
    other = project.with_name("other")
    shutil.copytree(project, other, symlinks=True)
    seeds = {project: 1000, other: 1000}  # each run has a seed that DVC has never seen

    def run(folder: Path, jobs: int) -> Ran:
        seeds[folder] += 1
        _set_seed(folder, seeds[folder])
        before = time.perf_counter()
        _run(folder, "run", *FINE_TUNINGS, "--jobs", str(jobs), variables=up)
        return Ran(seconds=time.perf_counter() - before, result=_made(folder))

    with LocalServer(project) as server:
        up = {"PREFECT_API_URL": server.url}
        runs = alternate(
            {"side by side": lambda: run(project, 2), "one after the other": lambda: run(other, 1)},
            settings.rounds,
            agree=lambda one, two: bool(one == two),
            warm_up=False,
        )
    for one, two in zip(*runs.values(), strict=True):
        if one.result != two.result:
            raise RunError("side by side, the fine-tunings made other bytes")
    times = seconds_of(runs)
    share = median(a / b for a, b in zip(*times.values(), strict=True))
    return Comparison(
        title="Both fine-tunings",
        seconds=times,
        note=f"Side by side they take {share:.0%} of the time, and make the same bytes.",
    )


# --- the project ----------------------------------------------------------------------------------


def _clone(folder: Path, settings: Settings) -> Path:
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    if settings.quick:
        shutil.copy(folder / "presets" / "smoke.yaml", folder / "params.yaml")
    return folder


def _set_seed(project: Path, seed: int) -> None:
    path = project / "params.yaml"
    params: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in FINE_TUNINGS:
        params[name]["train"]["seed"] = seed
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def _made(project: Path) -> dict[str, Any]:
    """The hashes of what the fine-tunings made, as `dvc.lock` has them."""
    lock: dict[str, Any] = yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))
    return {
        f"{name} {out['path']}": out["md5"]
        for name in FINE_TUNINGS
        for out in lock["stages"][name]["outs"]
        if out["path"].startswith("models/")
    }


# --- commands -------------------------------------------------------------------------------------


def _times(
    commands: Mapping[str, Callable[[], None]], settings: Settings
) -> dict[str, list[float]]:
    def timed(command: Callable[[], None]) -> Callable[[], Ran]:
        def run() -> Ran:
            before = time.perf_counter()
            command()
            return Ran(seconds=time.perf_counter() - before, result=None)

        return run

    alternatives = {name: timed(command) for name, command in commands.items()}
    return seconds_of(alternate(alternatives, settings.rounds, warm_up=False))


def _run(project: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
    _execute(project, [sys.executable, "-m", "pipeline", *arguments], variables)


def _dvc(project: Path, *arguments: str) -> None:
    _execute(project, [sys.executable, "-m", "dvc", *arguments])


def _execute(project: Path, command: list[str], variables: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=project,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(_OF_A_SESSION)},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(project / ".prefect"),
            "PREFECT_LOGGING_LEVEL": "ERROR",
            "DVC_NO_ANALYTICS": "true",
            "DO_NOT_TRACK": "true",
            **(variables or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{' '.join(command)[:80]} failed: {(done.stdout + done.stderr)[-2000:]}")
