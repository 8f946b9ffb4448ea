"""Executes one stage: its parameters, paths, MLflow run and exit code.

`dvc repro`, the Prefect flow and users all call it as `python -m pipeline stage NAME`. Everything
from the environment, the registry, git or the clock is read here, so that the stage itself is a
function of its arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from gpt.base.errors import InputError, RunError, lacks_memory
from gpt.base.events import Event, Log, Message
from gpt.base.files import write_json
from pipeline.dag.cache import dvc_md5
from pipeline.dag.code import note_of_code
from pipeline.project.file_locks import BusyError, stage_lock, state_lock
from pipeline.project.folders import shared_folder
from pipeline.project.params import PARAMS_FILE, load_params, section
from pipeline.project.secrets import without_secrets
from pipeline.project.settings import TrackingParams
from pipeline.project.stage_table import STAGES, StageSpec
from pipeline.run import launch
from pipeline.run.resume import FOLDER as STATES
from pipeline.run.resume import older_states, remove_state, state_folder
from pipeline.show.console import EVENTS_VARIABLE, make_log
from pipeline.show.terminal import say
from pipeline.tracking.provenance import MadeOf
from pipeline.tracking.run import StageRun, Status
from pipeline.tracking.run_notes import write_note
from pipeline.tracking.sender import send_quietly

MIRROR_VARIABLE = "GPT_PIPELINE_MIRROR"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_DISK_ERRORS = (*_DISK_FULL, errno.EACCES, errno.EPERM)
_FILES_OPEN = (errno.EMFILE, errno.ENFILE)
EXIT_OK, EXIT_FAILED, EXIT_INPUT = 0, 1, 2
EXIT_SIGNAL = 128
EXIT_TERMINATED = EXIT_SIGNAL + signal.SIGTERM


def run_stage(name: str, root: Path) -> int:
    """Execute one stage in `root`, with tracking; errors are reported in one line on stderr.

    Returns:
        The exit code: 0 for success, 2 for unusable input, 1 for a failed run, 130 or 143 if
        Ctrl-C or SIGTERM ended it. The code and the error line are also written to
        `.pipeline/exit/NAME.json` for the flow. If another process is running the stage in this
        checkout, the code is 2, returned at once and without side effects on that process.
    """
    if not launch.is_first():
        return _follow(name, root)
    with contextlib.ExitStack() as held:
        try:
            if not launch.is_launched():  # otherwise the launcher holds it
                held.enter_context(stage_lock(root, name))
        except InputError as error:
            say(f"error: {error}", file=sys.stderr)
            return EXIT_INPUT
        return _run_alone(name, root)


def _run_alone(name: str, root: Path) -> int:
    """`run_stage` while the stage's lock is held."""
    verdict = _verdict_path(root, name)
    if launch.restarts() and (said := _verdict(root, name)) and said["code"] < EXIT_SIGNAL:
        return int(said["code"])  # a retry would not change it
    verdict.unlink(missing_ok=True)
    code, error, kind, told = EXIT_OK, "", "", False
    try:
        with _terminable():
            if not launch.is_launched():
                _end_with_the_flow()
            if n := _processes(name, root):
                launch.launch(name, root, n)
            else:
                _run(name, root)
    except InputError as caught:
        code, error, kind = EXIT_INPUT, str(caught), _kind(caught)
    except RunError as caught:
        code, error, kind = EXIT_FAILED, str(caught), _kind(caught)
    except _Terminated:
        code, error = EXIT_TERMINATED, f"{name} was stopped by SIGTERM"
    except KeyboardInterrupt as caught:
        # a training sets the signal number; without one it was Ctrl-C
        code = EXIT_SIGNAL + getattr(caught, "signal", signal.SIGINT)
        error = str(caught) or f"{name} was interrupted"
    except Exception as caught:
        if launch.is_worker() and launch.is_lost(caught):
            say(f"{name}: another process of the training is gone", file=sys.stderr)
            return EXIT_FAILED  # no exit note: all workers are restarted
        fault = system_fault(caught)
        code, error = EXIT_FAILED, f"{name}: {fault}"
        if not fault:  # a bug: show the full traceback
            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}"
    error = without_secrets(error)  # a URL in the message may contain some
    if code and not launch.is_worker() and (said := _verdict(root, name)):
        code, error = int(said["code"]), str(said["error"])
        told = code < EXIT_SIGNAL
    if code:
        # the process that launched the workers reports the stop once
        if not told and not (launch.is_launched() and code >= EXIT_SIGNAL):
            say(f"error: {error}", file=sys.stderr)
        write_json(verdict, {"code": code, "error": error, **({"kind": kind} if kind else {})})
    return code


def _kind(error: BaseException) -> str:
    """`busy` or `network` if a retry may succeed, otherwise empty."""
    if isinstance(error, BusyError):
        return "busy"
    from requests import ConnectionError as NoConnection
    from requests import Timeout

    from stages.download.transfer import TransientError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NoConnection | Timeout | TransientError | ConnectionError):
            return "network"
        cause = cause.__cause__ or cause.__context__
    return ""


def _follow(name: str, root: Path) -> int:
    """Run any worker but the first: it takes part in the training, without output or files."""
    from gpt.model.parallel import Dismissed

    spec = STAGES[name]
    if launch.restarts() and (said := _verdict(root, name)) and said["code"] < EXIT_SIGNAL:
        return int(said["code"])
    try:
        with _terminable():
            params = section(load_params(root / PARAMS_FILE), name)
            launch.meet(params.train)
            spec.load()(
                params,
                **_inputs(name, root, params),
                **{keyword: root / path for keyword, path in spec.outputs.items()},
                state=shared_folder(root) / STATES / name,
            )
    except Dismissed:
        return EXIT_OK
    except InputError:
        return EXIT_INPUT
    except RunError:
        return EXIT_FAILED
    except _Terminated:
        return EXIT_TERMINATED
    except KeyboardInterrupt as caught:
        return EXIT_SIGNAL + int(getattr(caught, "signal", signal.SIGINT))
    except Exception as caught:
        if not launch.is_lost(caught):
            traceback.print_exc()
        return EXIT_FAILED
    raise AssertionError("the training dismisses all processes but the first")


def _processes(name: str, root: Path) -> int:
    """How many workers the stage starts on this machine; 0 if it runs in this process."""
    if launch.is_worker() or not STAGES[name].trains:
        return 0
    n = launch.n_processes(section(load_params(root / PARAMS_FILE), name).train)
    return n if n > 1 or launch.n_machines() > 1 else 0


def _verdict_path(root: Path, name: str) -> Path:
    return root / ".pipeline" / "exit" / f"{name}.json"


def _verdict(root: Path, name: str) -> dict[str, Any] | None:
    """The exit note that the stage's last process left; None after a success."""
    try:
        said: dict[str, Any] = json.loads(_verdict_path(root, name).read_text())
    except (OSError, ValueError):
        return None
    return said


def system_fault(error: Exception) -> str:
    """A message for a fault of the system, such as a full disk: what, where, what to do.

    Empty for any other error, which is a bug.
    """
    if lacks_memory(error):
        return (
            "out of memory; lower batch_size (a training takes as many rows a step with a higher "
            "accumulation), lengths or the model's sizes, and run again"
        )
    if not isinstance(error, OSError):
        # libraries that write files wrap the system's message in their own errors
        said = str(error)
        reason = next((each for each in map(os.strerror, _DISK_FULL) if each in said), "")
        if "readonly database" in said:
            reason = "a database cannot be written"
        where = ""
    else:
        reason, where = error.strerror or "", f" ({error.filename})" if error.filename else ""
        if error.errno in _FILES_OPEN:
            return f"{reason}{where}; allow more (`ulimit -n 4096`), and try again"
        if reason.startswith("No usable temporary directory"):
            return f"{reason}; set TMPDIR to a folder that can be written"
        if error.errno not in _DISK_ERRORS:
            reason = ""
    if not reason:
        return ""
    return f"{reason}{where}; make room there or make it writable, and try again"


def _run(name: str, root: Path) -> None:
    with contextlib.ExitStack() as held:
        _run_held(name, root, held)


def _run_held(name: str, root: Path, held: contextlib.ExitStack) -> None:
    """Execute the stage; `held` is an ExitStack of the locks released at the end."""
    spec = STAGES[name]
    # check the whole file: an error in a later stage's section should stop the run before any work
    whole = load_params(root / PARAMS_FILE)
    params = section(whole, name)
    tracking = whole.tracking or TrackingParams()
    inputs = _inputs(name, root, params)
    function = spec.load()
    # read now: the files may change while the stage runs
    made_of = _made_of(name, root, params, inputs)
    kept = made_of.kept()
    state, notice = None, None
    if spec.continues:
        state = state_folder(made_of)
        held.enter_context(state_lock(root, name, state))
        notice = older_states(root, name, state)
        # fails now, before MLflow has a run, if the folder is not writable
        if spec.trains:
            from gpt.train.checkpoint import Checkpoints

            Checkpoints(state)
        else:
            state.mkdir(parents=True, exist_ok=True)

    if launch.is_worker():
        # before the work that only this process does: from here on the others learn of its end
        launch.meet(params.train)
    from pipeline.data.sets import input_sets

    data_sets = input_sets(root, made_of.inputs, trains=spec.trains)
    started = time.monotonic()
    notices = [notice] if notice else []
    notices += send_quietly(root)
    description = (sys.modules[function.__module__].__doc__ or "").partition("\n")[0]
    run = StageRun(
        root,
        name,
        params,
        made_of.inputs,
        state=state,
        description=description,
        data_sets=data_sets,
        made_of=kept,
        unreachable=tracking.unreachable,
    )
    write_note(root, name, run.facts, "RUNNING", 0.0)
    try:
        with make_log(name) as log:
            for each in notices:
                log(each)
            _tell(run, log)
            outputs = {keyword: root / path for keyword, path in spec.outputs.items()}
            metrics = function(
                _with_mirror(params),
                **inputs,
                **outputs,
                **{keyword: shared_folder(root) / path for keyword, path in spec.scratch.items()},
                **({"state": state} if state else {}),
                log=_to_both(log, run),
            )
            made_of.check_unchanged()
            write_json(note_of_code(root, name), dict(made_of.code))
            made = _finish(root, name, spec, run, outputs, metrics, log)
            _tell(run, log)
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt | SystemExit | _Terminated)
        status: Status = "KILLED" if killed else "FAILED"
        with contextlib.suppress(RunError):  # the first failure is the one to report
            run.close(status, error=_one_line(error))
        write_note(root, name, run.facts, status, time.monotonic() - started)
        raise
    write_note(root, name, run.facts, "FINISHED", time.monotonic() - started, made)
    if state:
        remove_state(state)


def next_states(root: Path) -> Callable[[str], Path]:
    """A function: a training stage's name -> the state that a run would resume from, if it exists.

    Raises:
        InputError: `params.yaml` is invalid. The function raises it if an input of the stage is
            missing.
    """
    params = load_params(root / PARAMS_FILE)

    def next_state(name: str) -> Path:
        own = section(params, name)
        return state_folder(_made_of(name, root, own, _inputs(name, root, own)))

    return next_state


def _made_of(name: str, root: Path, params: Any, inputs: Mapping[str, Path]) -> MadeOf:
    return MadeOf.now(root, name, params, [_relative(root, path) for path in inputs.values()])


def _inputs(name: str, root: Path, params: Any) -> dict[str, Path]:
    """The inputs of a stage with these parameters, checked to exist."""
    inputs = {keyword: root / path for keyword, path in STAGES[name].input_paths(params).items()}
    for path in inputs.values():
        if not path.exists():
            raise InputError(
                f"{path.relative_to(root)} is missing; `gpt-pipeline run` makes whatever {name} "
                "needs"
            )
    return inputs


def _finish(
    root: Path,
    name: str,
    spec: StageSpec,
    run: StageRun,
    outputs: Mapping[str, Path],
    metrics: Mapping[str, Any],
    log: Log,
) -> dict[str, str]:
    """Log the results of a successful stage to its run: plots, the model, data sets, metrics.

    Returns:
        Path of each output, relative to the project -> md5.
    """
    output_md5 = _md5s(root, outputs)
    with tempfile.TemporaryDirectory() as folder:
        for picture in _pictures(name, outputs, Path(folder)):
            run.add_file(picture, f"plots/{picture.name}")
    if "predictions" in outputs:
        run.add_file(outputs["predictions"], "predictions")
    if spec.model:
        directory = outputs["out"]
        model, md5 = spec.model.name, output_md5[_relative(root, directory)]
        if version := run.add_model(model, directory, md5):
            log(Message(f"registered as models:/{model}/{version}"))
    if spec.makes_data:
        from pipeline.data.report import write_report
        from pipeline.data.sets import made_sets

        page, plots = write_report(root)
        run.add_data_sets(made_sets(root, run.inputs, output_md5))
        for file in (page, *plots):
            run.add_file(file, f"data/{file.relative_to(page.parent).as_posix()}")
        log(Message(f"the data report: {_relative(root, page)}"))
    run.close("FINISHED", metrics=metrics, outputs=output_md5)
    return output_md5


def _pictures(stage: str, outputs: Mapping[str, Path], folder: Path) -> list[Path]:
    from pipeline.show.plots import draw_confusion, draw_curves

    if "history" in outputs:
        return draw_curves(outputs["history"], STAGES[stage].title, folder)
    if "predictions" in outputs:
        return draw_confusion(outputs["predictions"] / "classifier_confusion.csv", folder)
    return []


def end_killed(root: Path, stage: str, project: Path) -> None:
    """Close the MLflow run of a stage whose process was killed, unless another process has it.

    Args:
        root: the checkout that the stage ran in.
        stage: its name.
        project: the project whose MLflow has the run.
    """
    with contextlib.suppress(InputError), stage_lock(root, stage):
        send_quietly(project)


def _to_both(console: Log, run: StageRun) -> Log:
    def log(event: Event) -> None:
        if isinstance(event, Message):  # a failed download is named by its URL
            event = dataclasses.replace(event, text=without_secrets(event.text))
        console(event)
        run(event)
        _tell(run, console)

    return log


def _tell(run: StageRun, console: Log) -> None:
    """Print notices about the MLflow run here rather than in the thread that received them."""
    while run.notices:
        console(run.notices.popleft())


def _with_mirror(params: Any) -> Any:
    """Replace `download.mirror` by `GPT_PIPELINE_MIRROR` if it is set.

    No output depends on the mirror: every download is checked against its sha256.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if mirror and any(f.name == "mirror" for f in dataclasses.fields(params)):
        return dataclasses.replace(params, mirror=mirror)
    return params


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _md5s(root: Path, paths: Mapping[str, Path]) -> dict[str, str]:
    return {_relative(root, path): dvc_md5(path) for path in paths.values()}


def _one_line(error: BaseException) -> str:
    lines = without_secrets(str(error)).strip().splitlines()
    if isinstance(error, InputError | RunError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _end_with_the_flow() -> None:
    """Inside the flow, stop as on SIGTERM when the flow ends: it holds the pipe to our stdin."""

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would block our exit
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(EVENTS_VARIABLE):
        threading.Thread(target=watch, name="flow-watch", daemon=True).start()


class _Terminated(BaseException):
    """SIGTERM was received."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block SIGTERM unwinds the stack as Ctrl-C does, so that the run is closed."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore repeats: the cleanup is short
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
