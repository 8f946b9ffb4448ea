"""`gpt-pipeline reproduce`: a model version made again, and every byte of it compared.

The stage is executed in a workspace of its own (`pipeline.dag.workspace`) with the run's commit,
parameters, edits and inputs, without DVC's run cache and resume states, and tracked in an MLflow
that is removed with the workspace. Nothing of the project changes but the version's tag
`reproduced`. What may make the bytes differ is reported first.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from gpt.base.errors import InputError, RunError
from gpt.base.events import Event, Message
from gpt.base.files import remove
from pipeline.dag.cache import DvcCache, dvc_md5
from pipeline.dag.objects import md5_of
from pipeline.dag.workspace import make_workspace
from pipeline.history.names import find_run, version_name
from pipeline.history.runs import Execution, RunHistory, run_history
from pipeline.project.file_locks import locked
from pipeline.project.folders import HOME_VARIABLE, shared_folder
from pipeline.project.git import commit_of, git
from pipeline.project.params import PARAMS_FILE
from pipeline.show.console import (
    EVENTS_VARIABLE,
    Display,
    following,
    make_display,
    report_console,
    seconds_in_words,
)
from pipeline.show.markdown import table
from pipeline.tracking.connection import connect, named_failure
from pipeline.tracking.database import database_uri
from pipeline.tracking.differences import changes
from pipeline.tracking.keys import machine_of
from pipeline.tracking.provenance import CODE, PATCH
from pipeline.tracking.run import machine

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

WORKSPACES = Path(".pipeline") / "reproduced"
REPRODUCED_TAG = "reproduced"
"""Of a registered version: when and on what it was made again, and with which result."""

_DOUBTS = {
    "git.untracked": "it used files that git does not have",
    "lineage.redacted": "secrets were taken out of what it kept",
}
"""What is not certain about a run that has the tag."""
_KEPT = Path(".pipeline") / "kept"
_DOWNLOADS = Path(".pipeline") / "downloads"
_OTHERS_MLFLOW = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID")


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """The md5 of an output: as recorded and as made now, None where it was not made."""

    stage: str
    path: str
    recorded: str
    now: str | None

    @property
    def same(self) -> bool:
        """Whether every byte is the same."""
        return self.recorded == self.now

    @property
    def verdict(self) -> str:
        """In words."""
        return "same" if self.same else f"differs: now {self.now or 'not made'}"


@dataclass(slots=True)
class _Job:
    """What is to be made again, and where."""

    root: Path
    history: RunHistory
    run: Execution
    version: ModelVersion | None
    commit: str
    folder: Path
    doubts: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return version_name(self.version) if self.version else f"run {self.run.run_id}"


def reproduce(
    root: Path,
    what: str,
    *,
    keep: bool = False,
    whole: bool = False,
    console: Console | None = None,
) -> list[OutputCheck]:
    """Make a model version, or whatever a run made, again, and compare it byte by byte.

    Args:
        root: the project, the top of a git repository.
        what: a model version or a run: see `pipeline.history.names.find`.
        keep: leave the workspace.
        whole: execute every stage before it anew too, in the place of fetching its outputs.
        console: where to print.

    Returns:
        The outputs, all of them the same.

    Raises:
        InputError: there is no such thing, it cannot be made again, or another process does so.
        RunError: a stage failed, or an output differs from the recorded one.
    """
    console = report_console(console)
    job = _job(root.resolve(), what)
    alone = locked(
        shared_folder(job.root),
        f"reproduce-{job.folder.name}",
        job.name,
        "makes it again right now",
    )
    with alone, contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _stop))
        if (job.folder / _KEPT).exists():
            raise InputError(
                f"{os.path.relpath(job.folder)}: is kept from an earlier `reproduce --keep`; "
                "remove it, and try again"
            )
        remove(job.folder)  # of a process that was killed
        began = time.monotonic()
        try:
            with make_display() as display:
                _prepare(job, display)
                if keep:
                    (job.folder / _KEPT).parent.mkdir(exist_ok=True)
                    (job.folder / _KEPT).touch()
                for doubt in job.doubts:
                    display.line("", f"cannot be promised: {doubt}", "warning")
                compared = _make(job, whole, display)
        finally:
            if (job.folder / _KEPT).exists():
                console.print(Text(f"kept: {os.path.relpath(job.folder)}"), soft_wrap=True)
            else:
                shutil.rmtree(job.folder, ignore_errors=True)
        differing = [each.path for each in compared if not each.same]
        rows = [(each.stage, each.path, each.recorded, each.verdict) for each in compared]
        shown = table(("stage", "output", "md5", ""), rows, "llll")
        console.print(Text(shown), soft_wrap=True)  # first: not lost where MLflow is gone
        _mark(job, differing)
        took = seconds_in_words(time.monotonic() - began)
        if differing:
            doubts = f"; not promised was: {'; '.join(job.doubts)}" if job.doubts else ""
            raise RunError(
                f"{job.name} does not come out the same: {', '.join(differing)} "
                f"{'differ' if len(differing) > 1 else 'differs'}{doubts}"
            )
        console.print(Text(f"{job.name}: the same bytes, in {took}", style="green"))
    return compared


# --- what is to be made ---------------------------------------------------------------------------


def _job(root: Path, what: str) -> _Job:
    history = run_history(root)
    version, run = find_run(history, what, Path.cwd())
    name = f"{version.name}-{version.version}" if version else f"run-{run.run_id[:12]}"
    if version is None:
        version = next((each for each in history.versions if each.run_id == run.run_id), None)
    if not run.outputs:
        status = run.run.info.status if run.run else "unknown"
        raise InputError(
            f"{what}: its run ended {status} and recorded no outputs; there is nothing to compare"
        )
    commit = run.tags.get("git.commit", "")
    if not commit:
        raise InputError(f"{what}: no commit is recorded with its run, so its code is not known")
    return _Job(
        root,
        history,
        run,
        version,
        commit_of(root, commit),
        shared_folder(root) / WORKSPACES / name,
    )


class _Stopped(KeyboardInterrupt):
    """SIGTERM arrived."""

    signal = signal.SIGTERM


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind the stack as Ctrl-C does, so that nothing is left."""
    raise _Stopped


# --- the workspace --------------------------------------------------------------------------------


def _prepare(job: _Job, display: Display) -> None:
    """Make the workspace with the run's code and parameters; note what is not certain."""
    params, patch, code = (
        job.history.kept(job.run, f"lineage/{name}") for name in (PARAMS_FILE, PATCH, CODE)
    )
    display.line("", f"{job.name}: {job.run.stage} at commit {job.commit[:10]}")
    make_workspace(job.root, job.commit, job.folder, params=params)
    tags = job.run.tags
    if patch:
        _apply(job, patch)
        display.line("", "the edits that were in its tree are put in")
    elif tags.get("git.dirty") == "true":
        job.doubts.append("its tree had edits that no commit has, and they were not kept")
    for tag, words in _DOUBTS.items():
        if value := tags.get(tag):
            job.doubts.append(f"{words} ({value})")
    if params is None:
        job.doubts.append("its params.yaml was not kept, and that of its commit is used")
    if code is None:
        job.doubts.append("which code it ran is known by its commit alone")
    else:
        recorded = json.loads(code).items()
        differing = [path for path, md5 in recorded if md5_of(job.folder / path) != md5]
        if differing:
            job.doubts.append(f"the code is not what it ran: {', '.join(differing)}")
    job.doubts += _other_machine(job.run)


def _apply(job: _Job, patch: bytes) -> None:
    file = job.folder / ".git" / PATCH  # no file of the workspace
    file.write_bytes(patch)
    try:
        git(job.folder, "apply", "--binary", "--whitespace=nowarn", str(file))
    except RunError as error:
        raise RunError(
            f"{job.name}: the edits kept with its run do not fit its commit ({error})"
        ) from None


def _other_machine(run: Execution) -> Iterator[str]:
    """What of the machine and its packages differs from the run's."""
    before, here = machine_of(run.tags), machine_of(machine())
    cores, threads = before.pop("machine.cores", None), before.pop("machine.threads", None)
    if differing := changes(before, {key: here.get(key, "missing") for key in before}):
        yield f"its machine and packages were others: {', '.join(map(str, differing))}"
    fixed = run.logged.get("train.threads", "None") != "None"
    if threads and not fixed and cores != here["machine.cores"]:
        yield (
            f"it computed in {threads} threads on {cores} cores; here are {here['machine.cores']}"
        )


# --- making it ------------------------------------------------------------------------------------


def _make(job: _Job, whole: bool, display: Display) -> list[OutputCheck]:
    """Execute the stage anew, before it those whose outputs are needed; compare all of them."""
    checks = []
    with contextlib.closing(DvcCache(job.root)) as cache:
        for run in _plan(job, cache, whole):
            # every stage works on what was recorded, so that each is compared for itself
            for path, md5 in run.inputs.items():
                _bring(job, cache, path, md5)
            for path in run.outputs:
                remove(job.folder / path)
            _execute(job, run.stage, display)
            for path, md5 in run.outputs.items():
                made = job.folder / path
                now = dvc_md5(made) if made.exists() else None
                checks.append(OutputCheck(run.stage, path, md5, now))
    return checks


def _plan(job: _Job, cache: DvcCache, whole: bool) -> list[Execution]:
    """What is executed, in order: the run, and before it those that made its inputs.

    These are all of them with `whole`, otherwise those whose outputs are kept nowhere. Of their
    outputs only the ones count that are read on the way to the run.
    """
    planned: dict[str, Execution] = {}
    read: dict[str, dict[str, str]] = {}

    def plan(run: Execution) -> None:
        for path, md5 in run.inputs.items():
            maker = job.history.maker(path, md5, run.started)
            if maker is not None and (whole or not cache.fetch(md5)):
                read.setdefault(maker.stage, {})[path] = md5
                if maker.stage not in planned:
                    plan(maker)
        planned[run.stage] = run

    plan(job.run)
    return [replace(run, outputs=read.get(run.stage, run.outputs)) for run in planned.values()]


def _bring(job: _Job, cache: DvcCache, path: str, md5: str) -> None:
    """Put an input in place, if it is not there yet, and make sure that it is the recorded one."""
    target = job.folder / path
    if target.exists() and dvc_md5(target) == md5:
        return
    if cache.fetch(md5):
        cache.put(md5, target)
    if not target.exists():
        raise RunError(
            f"{job.name}: {path} (md5 {md5}) is neither in its commit nor in DVC's cache or "
            "remote; `dvc push` where it was made, or name a remote that has it"
        )
    now = dvc_md5(target)
    if now != md5:
        raise RunError(f"{job.name}: its input {path} was md5 {md5}, and here is only {now}")


def _execute(job: _Job, stage: str, display: Display) -> None:
    """Run a stage in the workspace, by itself: DVC, which could bring its outputs, has no part."""
    began = time.monotonic()
    display.line(stage, "started")
    output: list[str] = []

    def show(event: Event) -> None:
        # the registry that it tells of goes with the workspace
        if not (isinstance(event, Message) and event.text.startswith("registered as")):
            display.event(stage, event)

    with tempfile.TemporaryDirectory(prefix="gpt-pipeline-") as folder:
        events = Path(folder) / "events.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "stage", stage],
            cwd=job.folder,
            env=_environment(job, events),
            # the stage holds the other end of this: its end says that we are gone
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C comes to us, and we pass it on
        )
        try:
            with following(events, show):
                assert process.stdout is not None
                output += [line.rstrip() for line in process.stdout if line.strip()]
                code = process.wait()
        except BaseException:
            # nothing of the workspace is wanted any more, so nothing need be saved in it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            display.done(stage)
    if code:
        told = [line.removeprefix("error: ") for line in output if line.startswith("error: ")]
        reason = (told or output or ["no word why"])[-1]
        raise RunError(f"{job.name}: {stage} failed when it was made again: {reason}")
    display.line(stage, f"executed in {seconds_in_words(time.monotonic() - began)}", "good")


def _environment(job: _Job, events: Path) -> dict[str, str]:
    """Nothing of the project's is found by it: no state, no MLflow; but what was downloaded is."""
    downloads = job.folder / _DOWNLOADS
    shared = shared_folder(job.root) / _DOWNLOADS
    if shared.is_dir() and not downloads.exists():
        # the sha256 in the parameters decides what is taken, so nothing is fetched twice for this
        downloads.parent.mkdir(parents=True, exist_ok=True)
        downloads.symlink_to(shared.resolve(), target_is_directory=True)
    inherited = {key: v for key, v in os.environ.items() if key not in _OTHERS_MLFLOW}
    others = inherited.get("PYTHONPATH")
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(job.folder), others])),
        "PYTHONUNBUFFERED": "1",
        HOME_VARIABLE: str(job.folder),
        "MLFLOW_TRACKING_URI": database_uri(job.folder / "mlflow.db"),
        EVENTS_VARIABLE: str(events),
    }


# --- the verdict ----------------------------------------------------------------------------------


def _mark(job: _Job, differing: list[str]) -> None:
    """Say on the registered version what came of it."""
    if job.version is None:
        return
    came = f"differs in {', '.join(differing)}" if differing else "the same bytes"
    where = f"{platform.system()} {platform.machine()}"
    client = connect(job.root)
    with named_failure(job.root, "did not take what came of it"):
        client.set_model_version_tag(
            job.version.name,
            str(job.version.version),
            REPRODUCED_TAG,
            f"{date.today()} on {where}: {came}",
        )
