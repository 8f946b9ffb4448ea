"""What is out of date, and why, is what DVC says."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pipeline
from gpt.base.errors import InputError, RunError
from pipeline.dag.cache import md5_now
from pipeline.dag.code import code_of, is_code, note_of_code
from pipeline.dag.dvc_files import find_root, read_stages
from pipeline.dag.graph import Dag, Reason
from pipeline.dag.repository import is_running, mend_rwlock

REPOSITORY = Path(__file__).resolve().parent.parent.parent.parent


def changed(dag, name):
    return [str(change) for change in dag.changes([name])[name]]


def test_stages_come_in_an_order_that_respects_the_edges(project):
    dag = Dag(project)
    names = list(dag.stages)
    assert sorted(names) == ["first", "last", "left", "right"]
    assert names[0] == "first"
    assert names[-1] == "last"
    assert dag.stages["first"].upstream == ()
    assert set(dag.stages["last"].upstream) == {"left", "right"}
    assert dag.stages["left"].inputs[:2] == ("stage.py", "first.txt")
    assert dag.stages["left"].outputs == ("left", "left.txt", "left.json")
    assert dag.stages["left"].metrics == ("left.json",)


def test_a_plan_is_the_targets_and_their_ancestors(project):
    dag = Dag(project)
    assert dag.plan() == list(dag.stages)
    assert dag.plan(["left"]) == ["first", "left"]
    assert set(dag.plan(["right", "left"])) == {"first", "left", "right"}
    with pytest.raises(InputError, match=r"middle: no such stage; use one of first, "):
        dag.plan(["middle"])


def test_code_that_dvc_yaml_names_and_nobody_has_is_told_before_any_work(project):
    (project / "stage.py").unlink()
    with pytest.raises(InputError, match=r"^stage\.py is missing, and first depends on it; .* own"):
        Dag(project).plan(["left"])


def test_the_reason_names_the_parameter_with_both_values(project, dvc):
    dag = Dag(project)
    assert changed(dag, "left") == ["dvc.lock: no run of this stage is recorded"]
    dvc("repro", "-q")
    assert all(not changes for changes in dag.changes().values())

    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("rate: 0.001, steps: 3", "rate: 0.002, warmup: 5"))
    assert dag.changes()["left"] == [
        Reason("left.train.rate", "0.001 → 0.002"),
        Reason("left.train.steps", "removed, was 3"),
        Reason("left.train.warmup", "added: 5"),
    ]
    assert not dag.changes()["right"]


def test_the_reason_names_the_file(project, dvc):
    dvc("repro", "-q")
    dag = Dag(project)
    (project / "seed.txt").write_text("another seed ")
    assert changed(dag, "first") == ["seed.txt: changed"]
    (project / "seed.txt").unlink()
    assert changed(dag, "first") == ["seed.txt: is missing"]
    (project / "right.txt").unlink()
    (project / "left" / "0.bin").unlink()
    assert changed(dag, "right") == ["right.txt: output is missing"]
    assert changed(dag, "left") == ["left: output changed"]
    assert changed(dag, "last") == ["right.txt: is missing"]


def test_the_reason_names_the_command(project, dvc):
    dvc("repro", "-q")
    dag = Dag(project)
    definition = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(definition.replace("stage.py right", "./stage.py right"))
    assert changed(dag, "right") == ["dvc.yaml: the command changed"]


def test_reasons_agree_with_dvc_status(project, dvc):
    dvc("repro", "-q")
    dag = Dag(project)
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("right: {a: 1}", "right: {a: 2}")
    )
    (project / "last.json").unlink()
    said = set(json.loads(dvc("status", "--json")))
    assert {name for name, changes in dag.changes().items() if changes} == said == {"right", "last"}


def test_the_lock_file_is_put_in_the_order_of_dvc_repro(project, dvc):
    dvc("repro", "-q")
    expected = (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").unlink()
    dag = Dag(project)
    for name in [*(n for n in reversed(dag.stages) if n not in ("first", "last"))]:
        dvc("repro", "-q", "--single-item", name)
    dvc("repro", "-q", "--single-item", "first")
    dvc("repro", "-q", "--single-item", "last")
    assert (project / "dvc.lock").read_bytes() != expected
    dag.sort_lock()
    assert (project / "dvc.lock").read_bytes() == expected


def test_an_optional_stage_comes_last_and_into_a_plan_only_when_it_is_asked_for(
    project, add_optional, dvc
):
    before = Dag(project)
    add_optional(project)
    dag = Dag(project)
    assert list(dag.stages) == [*before.stages, "extra"]
    assert [each.optional for each in dag.stages.values()] == [False] * 4 + [True]
    extra = dag.stages["extra"]
    assert extra.upstream == ("left",)
    assert extra.inputs[:2] == ("stage.py", "left.txt")
    assert extra.outputs == ("extra", "extra.txt", "extra.json")
    assert dag.plan() == before.plan()
    assert dag.plan(["extra"]) == ["first", "left", "extra"]
    assert {each.address for each in dag.stages.values()} == {
        *before.stages,
        "optional/dvc.yaml:extra",
    }
    assert changed(dag, "extra") == ["optional/dvc.lock: no run of this stage is recorded"]
    # DVC agrees
    dvc("repro", "-q")
    assert not (project / "extra.txt").exists()
    assert [name for name, changes in dag.changes().items() if changes] == ["extra"]
    dvc("repro", "-q", extra.address)
    assert not any(dag.changes().values())
    definition = (project / "optional/dvc.yaml").read_text()
    (project / "optional/dvc.yaml").write_text(definition.replace("stage.py ex", "./stage.py ex"))
    assert changed(dag, "extra") == ["optional/dvc.yaml: the command changed"]


def test_each_lock_file_is_put_in_order_by_itself(project, add_optional, dvc):
    add_optional(project)
    dvc("repro", "-q", "--all-pipelines")
    locks = [project / "dvc.lock", project / "optional" / "dvc.lock"]
    expected = [lock.read_bytes() for lock in locks]
    dag = Dag(project)
    locks[0].unlink()
    for name in ("right", "left", "first", "last"):
        dvc("repro", "-q", "--single-item", name)
    assert locks[0].read_bytes() != expected[0]
    dag.sort_lock()
    assert [lock.read_bytes() for lock in locks] == expected


def test_parameters_that_dvc_would_miss_are_named(project, add_optional):
    dag = Dag(project)
    assert dag.missing_params("left") == []
    add_optional(project)
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("extra: {a: 1}\n", ""))
    assert Dag(project).missing_params("extra") == ["extra"]


def test_it_works_in_a_source_archive_without_git(make_project, dvc):
    root = make_project(git=False)
    dag = Dag(root)
    dvc("repro", "-q")
    assert not any(dag.changes().values())
    assert "no_scm = true" in (root / ".dvc" / "config.local").read_text()


@pytest.mark.parametrize("git", [True, False])
def test_a_folder_of_code_stands_for_the_files_that_dvc_counts(make_project, dvc, git):
    root = make_project(git=git)
    shutil.copy(REPOSITORY / ".dvcignore", root)
    folder = root / "gpt"
    (folder / "deep").mkdir(parents=True)
    for name in ("one.py", "deep/two.cpp", "deep.py"):
        (folder / name).write_text(name)
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("- seed.txt\n", "- seed.txt\n      - gpt\n"))
    Dag(root)  # DVC is told where git is missing
    dvc("repro", "-q")
    code = code_of(root, "first")
    assert code == ["stage.py", "gpt/deep.py", "gpt/deep/two.cpp", "gpt/one.py"]
    deps = read_stages(root / "dvc.lock")["first"]["deps"]
    assert {e["path"]: e["md5"] for e in deps if is_code(e["path"])} == {
        path: md5_now(root, path) for path in ("gpt", "stage.py")
    }

    (folder / "__pycache__").mkdir()
    left = (".one.py.swp", "one.py~", "#one.py#", ".#one.py", ".DS_Store", "__pycache__/one.pyc")
    for name in left:
        (folder / name).write_text("left by an editor")
        (folder / "deep" / Path(name).name).write_text("left by an editor")
    assert code_of(root, "first") == code
    assert not any(Dag(root).changes().values())

    note_of_code(root, "first").parent.mkdir(parents=True, exist_ok=True)
    noted = {path: md5_now(root, path) for path in code}
    note_of_code(root, "first").write_text(json.dumps(noted))
    (folder / "one.py").write_text("edited")
    (folder / "three.py").touch()
    (folder / "deep.py").unlink()
    changes = {name: [*map(str, each)] for name, each in Dag(root).changes().items() if each}
    assert changes == {
        "first": ["gpt/one.py: changed", "gpt/three.py: is new", "gpt/deep.py: is missing"]
    }
    noted["gpt/deep.py"] = "of another run"
    note_of_code(root, "first").write_text(json.dumps(noted))
    assert changed(Dag(root), "first") == ["gpt: changed"]


def test_the_root_is_found_from_below(project, tmp_path):
    (project / "a" / "b").mkdir(parents=True)
    assert find_root(project / "a" / "b") == project.resolve()
    (project / "optional").mkdir()
    (project / "optional" / "dvc.yaml").write_text("stages: {}")
    assert find_root(project / "optional") == project.resolve()
    with pytest.raises(InputError, match=r"no dvc\.yaml here or above"):
        find_root(tmp_path)


def test_a_broken_dvc_yaml_is_one_line(project):
    (project / "dvc.yaml").write_text("stages: [")
    with pytest.raises(InputError, match=r"^dvc\.yaml: .*$"):
        Dag(project)


def test_it_is_quick_and_imports_no_torch(project):
    code = (
        "import sys, pathlib; from pipeline.dag.graph import Dag;"
        "Dag(pathlib.Path.cwd()).changes();"
        "print([m for m in ('torch', 'prefect', 'mlflow', 'pandas') if m in sys.modules])"
    )
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parent.parent)},
    )
    assert result.stdout.strip() == "[]"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("left", ["", '{"read": {"first.txt": ['])
def test_dvcs_own_table_is_mended_where_a_kill_cut_it(project, dvc, left):
    """DVC does not start then, and says nothing of what to do."""
    table = project / ".dvc" / "tmp" / "rwlock"
    dvc("repro", "-q")
    table.write_text(left)
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "-f"], capture_output=True, text=True, check=False
    )
    assert "Unable to read RWLock-file" in result.stderr, "DVC mends it itself: we need not"
    assert mend_rwlock(project)
    assert not mend_rwlock(project)
    dvc("repro", "-q")


def test_a_table_that_can_be_read_is_left_alone(project, dvc):
    dvc("repro", "-q")
    table = project / ".dvc" / "tmp" / "rwlock"
    before = table.read_bytes()
    Dag(project)
    assert table.read_bytes() == before


@pytest.mark.parametrize("file", ["params.yaml", "dvc.yaml", "dvc.lock"])
def test_a_merge_conflict_is_blamed_on_its_file_and_line(project, file):
    (project / file).write_text("<<<<<<< HEAD\na: 1\n=======\na: 2\n>>>>>>> other\n")
    with pytest.raises(InputError, match=rf"^{file}: line 1: an unresolved merge conflict .*$"):
        Dag(project)


@pytest.mark.parametrize(("content", "expected"), [(None, "not there"), ("", "must hold")])
def test_parameters_that_are_not_there_are_blamed_on_their_own_file(project, content, expected):
    path = project / "params.yaml"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=rf"params\.yaml: {expected}.*gpt-pipeline preset NAME"):
        Dag(project)


def test_a_process_that_is_gone_blocks_no_run_because_another_has_its_number(project, dvc):
    """As after a reboot, or in a container."""
    dvc("repro", "-q")
    table = project / ".dvc" / "tmp" / "rwlock"
    here = {"pid": os.getpid(), "cmd": " ".join(sys.argv)}
    gone = {"pid": os.getpid(), "cmd": "dvc/__main__.py repro that-was-killed"}
    table.write_text(
        json.dumps({"write": {"a": gone, "b": here}, "read": {"a": [gone], "b": [gone, here]}})
    )
    assert mend_rwlock(project)
    assert json.loads(table.read_text()) == {
        "write": {"b": here},
        "read": {"a": [], "b": [here]},
    }


def test_a_process_is_still_there_whatever_its_last_argument_holds():
    code = "print('ready', flush=True); input()"
    command = [sys.executable, "-c", code, "a b.yaml"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"ready\n"  # else it may still have our own words
        assert is_running(other.pid, "-c a b.yaml")
        assert not is_running(other.pid, "-c another.yaml")
        other.communicate(b"\n")


def test_a_folder_of_outputs_that_is_a_link_is_refused_before_any_work(project, dvc, tmp_path):
    pipeline = project / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("first.txt", "made/here/first.txt"))
    (tmp_path / "disk").mkdir()
    (project / "made").symlink_to(tmp_path / "disk")
    dag = Dag(project)
    with pytest.raises(InputError, match=rf"^made: a link to {tmp_path}/disk, .*dvc cache dir"):
        dag.plan(["left"])
    (project / "made").unlink()
    (project / "made").mkdir()
    assert dag.plan(["left"]) == ["first", "left"]


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        (".dvc/config", b"[core", r"\.dvc: DVC cannot open .*; mend it, or take it from git"),
        (".dvc/config", b"\xff\xfe", r"\.dvc: DVC cannot open .*; mend it, or take it from git"),
        (".dvc/tmp", b"", r"\.dvc: DVC cannot open .*make it a folder that can be written"),
        ("dvc.lock", b"", r"dvc\.lock: holds no stages; bring it back .*, or remove it"),
        ("dvc.lock", b"stages: {}", r"dvc\.lock: .*; bring it back .*, or remove it"),
        ("dvc.yaml", b"stages: {a: {cmdd: b}}", r"dvc\.yaml: .*; bring it back"),
    ],
)
def test_what_dvc_cannot_read_is_one_line_that_names_it_and_what_to_do(
    project, path, content, expected
):
    (project / path).write_bytes(content)
    with pytest.raises(InputError, match=rf"^{expected}") as raised:
        Dag(project)
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_told_before_there_is_something_to_keep(project, dvc):
    dvc("repro", "-q", "first")
    cache = project / ".dvc" / "cache"
    shutil.rmtree(cache)
    Dag(project).check_cache()
    shutil.rmtree(cache)
    cache.symlink_to("/nowhere/at/all")
    with pytest.raises(RunError, match=r"^\.dvc/cache: DVC's cache cannot be written "):
        Dag(project).check_cache()
    cache.unlink()
    cache.touch()
    with pytest.raises(InputError, match=r"^\.dvc/cache: DVC's cache is no folder "):
        Dag(project).changes()
