"""The flow over a small real project, on a real Prefect API, through real DVC."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

import pipeline
from pipeline.flow.prefect_api import LocalServer
from pipeline.flow.prefect_api import environment as server_environment

# Runs the flow as often as there are contents for params.yaml, or once with what stands there.
SCRIPT = """
import json, pathlib, sys
from pipeline.dag.graph import Dag
from pipeline.flow.flow import exit_code, gpt_pipeline
arguments, params = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for content in params or [None]:
    if content is not None:
        pathlib.Path("params.yaml").write_text(content)
    code = exit_code(gpt_pipeline(**arguments, return_state=True))
    if code:
        sys.exit(code)
    dag = Dag(pathlib.Path.cwd())
    assert not any(dag.changes(dag.plan(arguments.get("targets", []))).values())
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    root = tmp_path_factory.mktemp("prefect")
    with LocalServer(root) as server:
        yield server.url


@pytest.fixture
def start(api, tmp_path):
    """Starts the flow in a process of its own, as the command line does."""

    def begin(
        root: Path,
        fail: str = "",
        params: Sequence[str] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        **arguments,
    ):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(arguments), json.dumps(params)],
            cwd=root,
            env={
                **os.environ,
                **server_environment(tmp_path),
                "PREFECT_API_URL": api,
                **environment,
                "PYTHONPATH": str(Path(pipeline.__file__).parent.parent),
                "FAIL": fail,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


@pytest.fixture
def run(start):
    """Runs the flow to its end: exit code and what the terminal showed."""

    def whole(root: Path, *targets: str, **arguments) -> tuple[int, str]:
        process = start(root, targets=targets, **arguments)
        shown, _ = process.communicate(timeout=300)
        return process.returncode, shown

    return whole


def ask(api: str, path: str, body: dict | None = None):
    request = urllib.request.Request(
        f"{api}/{path}",
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def task_runs(api: str) -> dict[str, dict]:
    """The task runs of the newest flow run, by name; their last states arrive a moment later."""
    (newest,) = ask(api, "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    until = time.monotonic() + 20
    while True:
        found = ask(
            api, "task_runs/filter", {"flow_runs": {"id": {"any_": [newest["id"]]}}, "limit": 50}
        )
        if all(each["state"]["type"] != "RUNNING" for each in found) or time.monotonic() > until:
            return {each["name"]: each for each in found}
        time.sleep(0.2)


def executions(root: Path, name: str) -> list[list[float]]:
    path = root / f"ran-{name}"
    if not path.exists():
        return []
    return [[float(part) for part in line.split()] for line in path.read_text().splitlines()]


def counts(root: Path) -> dict[str, int]:
    return {name: len(executions(root, name)) for name in ("first", "left", "right", "last")}


def test_after_the_flow_dvc_has_nothing_to_do_and_wrote_the_same_lock(make_project, run, dvc):
    root = make_project()
    code, shown = run(root)
    assert code == 0, shown
    assert counts(root) == {"first": 1, "left": 1, "right": 1, "last": 1}
    by_flow = (root / "dvc.lock").read_bytes()
    assert dvc("status", "--json").strip() == "{}"
    dvc("repro", "-q")
    assert counts(root) == {"first": 1, "left": 1, "right": 1, "last": 1}

    (root / "dvc.lock").unlink()
    dvc("repro", "-q", "--force")
    assert (root / "dvc.lock").read_bytes() == by_flow


@pytest.mark.slow
def test_an_optional_stage_runs_when_it_is_asked_for_and_is_a_task_of_its_own(
    project, add_optional, run, api, dvc
):
    add_optional(project)
    code, shown = run(project)
    assert code == 0, shown
    assert "extra" not in task_runs(api)
    assert executions(project, "extra") == []
    code, shown = run(project, "extra")
    assert code == 0, shown
    states = {name: each["state"]["name"] for name, each in task_runs(api).items()}
    assert states == {"first": "Cached", "left": "Cached", "extra": "Completed"}
    by_flow = (project / "optional" / "dvc.lock").read_bytes()
    dvc("repro", "-q", "--force", "optional/dvc.yaml:extra")
    assert (project / "optional" / "dvc.lock").read_bytes() == by_flow
    assert run(project, "extra")[0] == 0
    assert task_runs(api)["extra"]["state"]["name"] == "Cached"
    # without its section it does not begin, and its outputs stay
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("extra: {a: 1}\n", ""))
    code, shown = run(project, "extra")
    assert code == 2
    assert "params.yaml: extra: missing, and extra needs it; add the section" in shown
    assert (project / "extra.txt").exists()


def test_prefect_shows_stages_dependencies_logs_and_metrics(project, run, api):
    assert run(project)[0] == 0
    runs = task_runs(api)
    assert {name: each["state"]["name"] for name, each in runs.items()} == dict.fromkeys(
        ("first", "left", "right", "last"), "Completed"
    )
    by_id = {each["id"]: name for name, each in runs.items()}
    upstream = {
        name: {by_id[each["id"]] for each in task["task_inputs"]["wait_for"]}
        for name, task in runs.items()
        if task["task_inputs"].get("wait_for")
    }
    assert upstream == {"left": {"first"}, "right": {"first"}, "last": {"left", "right"}}

    of_left = {"task_run_id": {"any_": [runs["left"]["id"]]}}
    said = [each["message"] for each in ask(api, "logs/filter", {"logs": of_left})]
    assert "hello from left" in said
    assert "printed by left" in said
    assert not [line for line in said if "git add" in line]
    (artifact,) = ask(api, "artifacts/filter", {"artifacts": of_left})
    assert artifact["key"] == "left"
    assert "| deep/pi | 3.14159 |" in artifact["data"]

    code, shown = run(project)
    assert code == 0
    assert shown.count("| cached") == 4
    assert "4 of 4 stages are up to date" in shown
    assert {(each["state"]["name"], each["state"]["type"]) for each in task_runs(api).values()} == {
        ("Cached", "COMPLETED")
    }


def test_a_changed_parameter_runs_its_stage_and_what_follows_and_back_restores(project, run, api):
    run(project)
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("0.001", "0.002"))
    code, shown = run(project)
    assert code == 0
    assert "left | started: left.train.rate: 0.001 → 0.002" in shown
    # the toy's output does not depend on the parameter, so what follows has nothing to do
    assert counts(project) == {"first": 1, "left": 2, "right": 1, "last": 1}

    params.write_text(before)
    code, shown = run(project)
    assert code == 0
    assert "left | cached: restored from DVC's run cache" in shown
    assert counts(project) == {"first": 1, "left": 2, "right": 1, "last": 1}
    assert {each["state"]["name"] for each in task_runs(api).values()} == {"Cached"}


@pytest.mark.slow
def test_stages_side_by_side_end_well_again_and_again(make_project, run, dvc):
    # some 40 MB each, so that hashing and writing dvc.lock overlap too
    root = make_project(size=20_000)
    # each waits until the other has begun: side by side, however busy the machine is
    meeting = {"MEETS_left": "right", "MEETS_right": "left"}
    params = [
        f"first: {{}}\nleft: {{turn: {turn}}}\nright: {{turn: {turn}}}\nlast: {{}}\n"
        for turn in range(6)
    ]
    code, shown = run(root, params=params[:5], environment=meeting)
    assert code == 0, shown
    assert counts(root) == {"first": 1, "left": 5, "right": 5, "last": 1}
    turns = zip(executions(root, "left"), executions(root, "right"), strict=True)
    for (left_began, left_ended), (right_began, right_ended) in turns:
        assert left_began < right_ended
        assert right_began < left_ended
    assert dvc("status", "--json").strip() == "{}"

    assert run(root, jobs=1, params=params[5:])[0] == 0
    one, other = sorted(executions(root, name)[-1] for name in ("left", "right"))
    assert one[1] <= other[0]


def test_a_failed_stage_fails_with_its_line_and_code_and_stops_what_follows(project, run, api):
    code, shown = run(project, fail="left")
    assert code == 2
    assert shown.count("left | error: left.txt: no good; mend it") == 1
    assert "failed to reproduce" not in shown
    assert "Traceback" not in shown
    assert counts(project) == {"first": 1, "left": 0, "right": 1, "last": 0}
    states = {name: each["state"] for name, each in task_runs(api).items()}
    assert states["left"]["type"] == "FAILED"
    assert states["left"]["message"] == "left.txt: no good; mend it"
    assert states["right"]["type"] == "COMPLETED"
    assert states["last"]["type"] == "PENDING"
    assert not (project / "left.txt").exists()

    code, shown = run(project)
    assert code == 0
    assert counts(project) == {"first": 1, "left": 1, "right": 1, "last": 1}


def test_a_failure_of_dvc_itself_is_told_in_its_words(project, run):
    (project / "seed.txt").unlink()
    code, shown = run(project)
    assert code == 1
    assert "first | error: " in shown
    assert "seed.txt" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["network", "killed", "killed-in-a-shell"])
def test_a_fault_that_may_pass_is_tried_again_with_longer_and_longer_waits(project, run, kind):
    with (project / "params.yaml").open("a") as params:
        params.write("flow: {retries: 3, wait: 0.2}\n")
    code, shown = run(project, environment={"FAULT_left": f"{kind} 2"})
    assert code == 0, shown
    assert "tried again in 0.2 s (3 left)" in shown
    assert "tried again in 0.4 s (2 left)" in shown
    assert counts(project) == {"first": 1, "left": 1, "right": 1, "last": 1}
    # more often than it may pass, it has failed
    for name in ("left", "tries-left"):
        (project / name).unlink() if name == "tries-left" else shutil.rmtree(project / name)
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("retries: 3", "retries: 1")
    )
    code, shown = run(project, environment={"FAULT_left": f"{kind} 2"}, force=True)
    assert code == 1
    assert shown.count("tried again") == 1


@pytest.fixture
def small_cache(make_project):
    """A project whose cache has no room for what `left` and `right` make; and how to make room."""
    root = make_project(size=10_000)
    cache = root / ".dvc" / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")

    def make_room() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(cache)], check=True)

    yield root, make_room
    subprocess.run(["umount", "-l", str(cache)], check=True)


@pytest.mark.slow
def test_what_a_full_disk_keeps_out_of_the_cache_is_not_made_again(small_cache, run, dvc):
    root, make_room = small_cache
    for _ in range(2):  # the second time it is still full
        code, shown = run(root)
        assert code == 1
        for name in ("left", "right"):
            assert (
                f"{name}: is made, but DVC could not take its outputs into .dvc/cache ("
            ) in shown
        assert "[Errno 28] No space left on device); make room there" in shown
        assert "make room there, and `gpt-pipeline run` takes them in without making them" in shown
        assert "Traceback" not in shown
    make_room()
    code, shown = run(root)
    assert code == 0, shown
    assert shown.count("made before: DVC takes it in") == 2
    assert counts(root) == {"first": 1, "left": 1, "right": 1, "last": 1}
    assert dvc("status", "--json").strip() == "{}"


@pytest.mark.slow
def test_what_a_full_disk_kept_out_of_the_cache_is_made_again_if_it_would_be_other(
    small_cache, run, dvc
):
    root, make_room = small_cache
    assert run(root)[0] == 1
    make_room()
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("0.001", "0.002"))
    (root / "right.txt").write_text("by hand")
    code, shown = run(root)
    assert code == 0, shown
    assert counts(root) == {"first": 1, "left": 2, "right": 2, "last": 1}
    assert (root / "right.txt").read_text() != "by hand"
    assert dvc("status", "--json").strip() == "{}"


def test_outputs_in_place_are_taken_into_a_cache_that_was_deleted(project, run, dvc):
    assert run(project, "left")[0] == 0
    shutil.rmtree(project / ".dvc" / "cache")
    overwritten = project / "left.txt"
    overwritten.write_text("by hand")
    code, shown = run(project, "left")
    assert code == 0, shown
    assert shown.count("made before: DVC takes it in") == 1
    assert counts(project) == {"first": 1, "left": 2, "right": 0, "last": 0}
    assert overwritten.read_text() != "by hand"
    assert dvc("status", "--json", "first", "left").strip() == "{}"


def test_bad_input_is_never_tried_again(project, run):
    code, shown = run(project, fail="left")
    assert code == 2
    assert "tried again" not in shown


def test_a_stage_is_stopped_at_its_time_limit_which_is_said(make_project, run):
    root = make_project(seconds=400)
    with (root / "params.yaml").open("a") as params:
        params.write("flow: {time_limits: {left: 0.05, right: 0.05}}\n")
    began = time.monotonic()
    code, shown = run(root)
    assert code == 1
    assert time.monotonic() - began < 200
    assert "left: stopped after 0.05 min, its time limit (flow.time_limits in" in shown
    assert not (root / "left.txt").exists()


def test_a_wrong_section_flow_is_one_line(project, run):
    with (project / "params.yaml").open("a") as params:
        params.write("flow: {retries: -1}\n")
    code, shown = run(project)
    assert code == 2
    assert "params.yaml: flow.retries: " in shown
    assert "Traceback" not in shown


def test_targets_run_with_their_ancestors_only(project, run, api):
    assert run(project, "left")[0] == 0
    assert counts(project) == {"first": 1, "left": 1, "right": 0, "last": 0}
    assert set(task_runs(api)) == {"first", "left"}
    assert run(project, "left", force=True)[0] == 0
    assert counts(project) == {"first": 2, "left": 2, "right": 0, "last": 0}


@pytest.mark.slow
def test_a_server_that_restarts_in_the_middle_is_told_the_end_all_the_same(
    make_project, start, prefect_server
):
    root = make_project(seconds=25)
    process = start(root, environment={"PREFECT_API_URL": prefect_server.api})
    until = time.monotonic() + 60
    while not (root / "ran-right").exists() and time.monotonic() < until:
        time.sleep(0.1)
    prefect_server.stop()
    time.sleep(2)
    prefect_server.start()
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 0, shown
    assert counts(root) == {"first": 1, "left": 1, "right": 1, "last": 1}
    runs = task_runs(prefect_server.api)
    assert {each["state"]["type"] for each in runs.values()} == {"COMPLETED"}, runs
    (flow_run,) = ask(prefect_server.api, "flow_runs/filter")
    assert flow_run["state"]["type"] == "COMPLETED"


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_stops_the_stages_and_says_how_to_go_on(make_project, start, number, expected):
    root = make_project(seconds=400)
    process = start(root)
    until = time.monotonic() + 60
    while not (root / "ran-left").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == expected, shown
    assert "`gpt-pipeline run` goes on from here" in shown
    assert "Traceback" not in shown
    assert not (root / "left.txt").exists()
