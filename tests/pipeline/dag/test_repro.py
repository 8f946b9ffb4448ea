"""DVC's word is not taken: what it restored or kept is compared with what it recorded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.dag.cache import Flaws, mend
from pipeline.dag.graph import Dag
from pipeline.dag.repro import Ended, Processes, failure
from pipeline.dag.set_aside import Earlier


@pytest.fixture
def repro(project):
    """Runs `first` through DVC; how that ended and what it warned of."""

    def run(**arguments) -> tuple[Ended, list[str]]:
        told: list[str] = []
        done = Processes().repro(
            Dag(project),
            ["first"],
            show=lambda event: None,
            say=lambda text, executed: None,
            warn=told.append,
            **arguments,
        )
        return done, told

    return run


def contents(root: Path) -> dict[str, bytes]:
    files = [*sorted((root / "first").iterdir()), root / "first.txt", root / "first.json"]
    return {each.name: each.read_bytes() for each in files}


def remove_outputs(root: Path) -> None:
    shutil.rmtree(root / "first")
    (root / "first.txt").unlink()


def stored(root: Path, output: str, member: str = "") -> Path:
    """Where DVC's cache keeps an output of `first`, or a file of it."""
    md5 = Dag(root).recorded_outputs(["first"])["first"][output]
    objects = root / ".dvc" / "cache" / "files" / "md5"
    if member:
        listed = json.loads((objects / md5[:2] / md5[2:]).read_text())
        (md5,) = [each["md5"] for each in listed if each["relpath"] == member]
    return objects / md5[:2] / md5[2:]


def overwrite(path: Path, content: bytes) -> None:
    """As a disk does it: neither the mode nor the time says so."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 16
    overwrite(path, content)


def truncate(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-5])


def rename(path: Path) -> None:
    overwrite(path, path.read_bytes().replace(b"7.bin", b"x.bin"))


def test_what_dvc_restores_from_a_damaged_cache_is_made_again_and_said(project, repro):
    done, told = repro()
    assert (done.executed, told) == (True, [])
    made = contents(project)
    # a list that is JSON all the same would have DVC restore files under other names
    for output, member, damage in (("first", "7.bin", flip), ("first", "", rename)):
        damage(stored(project, output, member))
        remove_outputs(project)
        done, told = repro()
        assert (done.executed, done.code) == (True, 0)
        said = "first: not what dvc.lock says: removed, here and from DVC's cache; made again"
        assert told == ([said] if member else [])
        assert contents(project) == made
        assert mend(Dag(project), ["first"]) == Flaws()
    remove_outputs(project)
    done, told = repro()
    assert (done.executed, told) == (False, []), "a sound cache restores"
    assert contents(project) == made


def test_what_a_remote_brings_damaged_is_made_again_and_its_copy_there_named(
    project, repro, dvc, tmp_path
):
    repro()
    made, object = contents(project), stored(project, "first.txt")
    dvc("remote", "add", "-q", "-d", "there", str(tmp_path / "remote"))
    dvc("push", "-q")
    objects = object.parent.parent
    flip(tmp_path / "remote" / "files" / "md5" / object.relative_to(objects))
    shutil.rmtree(project / ".dvc" / "cache")
    remove_outputs(project)
    done, told = repro()
    assert (done.executed, done.code) == (True, 0)
    assert contents(project) == made
    assert f"remove files/md5/{object.relative_to(objects)} there, and `gpt-pip" in told[-1]


def test_all_that_can_be_damaged_is_found_and_removed(project, dvc):
    dvc("repro", "-q", "first")
    dag = Dag(project)
    made, whole = contents(project), shutil.copytree(project, project.parent / "whole")
    for output, member, damage in [
        ("first", "7.bin", flip),
        ("first", "7.bin", truncate),
        ("first", "7.bin", Path.unlink),
        ("first", "", truncate),
        ("first", "", rename),
        ("first", "", lambda path: overwrite(path, b"[1, 2]")),
        ("first", "", lambda path: overwrite(path, b"\xff\xfe\x00")),
        ("first", "", Path.unlink),
        ("first.txt", "", flip),
        ("first.json", "", truncate),
    ]:
        object = stored(project, output, member)
        place = project / output / member
        dropped = [] if damage is Path.unlink else [object.parent.name + object.name]
        damage(object)
        if place.is_file():
            damage(place)
            expected = Flaws([output], [], dropped)
        else:  # the outputs are sound, so DVC can take them in
            expected = Flaws([], [output], dropped)
        assert mend(dag, ["first"]) == expected, (output, member, damage)
        assert not object.exists()
        assert (project / output).exists() == (not expected.damaged)
        shutil.copytree(whole, project, dirs_exist_ok=True)
        assert mend(dag, ["first"]) == Flaws()
    assert contents(project) == made


def test_a_damaged_list_of_files_stops_no_look_at_what_changed(project, dvc):
    dvc("repro", "-q", "first")
    overwrite(stored(project, "first"), b"[1, 2]")
    (change,) = Dag(project).changes(["first"])["first"]
    assert change.not_in_cache


def test_outputs_that_dvc_says_it_keeps_and_does_not_are_a_failure(project, dvc, monkeypatch):
    dvc("repro", "-q", "first")
    shutil.rmtree(project / ".dvc" / "cache")
    processes = Processes()

    def full(root: Path, arguments: list[str], done: Ended, *_: object) -> None:
        line = "ERROR: failed to transfer '1/2' - [Errno 28] No space left on device: '/x'"
        done.executed, done.output = True, [line]

    monkeypatch.setattr(processes, "_dvc", full)
    quiet = {"show": print, "say": print, "warn": print}
    done = processes.repro(Dag(project), ["first"], **quiet)
    assert done.code == 1
    assert done.lacking == ["first", "first.txt"]
    error = failure(project, ["first"], done)
    assert (error.kind, str(error)) == ("cache", "[Errno 28] No space left on device: '/x'")


def test_a_run_waits_for_the_process_that_dvc_names_and_says_for_which(project, dvc, monkeypatch):
    dvc("repro", "-q", "first")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", "repro"])
    blocked = Ended(
        code=255,
        output=[
            "ERROR: failed to reproduce 'first': '/x' is busy, it is being blocked by:",
            f"  (PID {other.pid}): -c repro",
            "If there are no processes with such PIDs, you can manually remove '/x/rwlock'",
        ],
    )
    error = failure(project, ["first"], blocked)
    who = f"process {other.pid} (-c repro)"
    assert str(error) == f"first: {who} works on the same files; wait for it or stop it"

    tries, told, processes = [], [], Processes()

    def dvc_itself(root: Path, arguments: list[str], done: Ended, *_: object) -> None:
        tries.append(arguments)
        if len(tries) == 1:
            done.code, done.output = blocked.code, blocked.output

    def warn(text: str) -> None:
        told.append(text)
        other.kill()
        other.wait()

    monkeypatch.setattr(processes, "_dvc", dvc_itself)
    done = processes.repro(Dag(project), ["first"], show=print, say=print, warn=warn)
    assert (done.code, len(tries)) == (0, 2)
    assert told == [f"waits for {who}, which works on the same files"]


def test_after_a_failed_stage_the_outputs_are_as_before_it(project, repro, dvc):
    repro()
    shutil.rmtree(project / ".dvc" / "cache")  # it need not have them
    (project / "first.json").write_text("edited")
    before = contents(project)
    whole = (project / "dvc.yaml").read_text()
    (command,) = [line for line in whole.splitlines() if "stage.py first" in line]
    half = "mkdir first && echo half > first/7.bin && echo half > first.txt"
    status = dvc("status", "first")
    # it fails, is stopped, DVC itself is killed, and an output is not there
    for end in ("exit 2", "exec sleep 60", "kill -9 $PPID", "true"):
        (project / "dvc.yaml").write_text(whole.replace(command, f"    cmd: {half} && {end}"))
        done, _ = repro(seconds=8 if "sleep" in end else None)
        assert (done.executed, done.undone, bool(done.code)) == (True, True, True), end
        assert contents(project) == before
        assert before["first.json"] == b"edited"
    (project / "dvc.yaml").write_text(whole)
    assert dvc("status", "first") == status
    done, _ = repro()
    assert (done.executed, done.undone, done.code) == (True, False, 0)
    assert contents(project) != before, "what is made anew stays"
    assert not list(project.glob(".pipeline/tmp/*/*"))


def test_after_an_error_of_who_listens_the_stage_is_ended_and_its_outputs_are_as_before(
    project, repro
):
    """As of a pipe that is closed: `gpt-pipeline run | head`."""
    repro()
    before = contents(project)
    whole = (project / "dvc.yaml").read_text()
    (command,) = [line for line in whole.splitlines() if "stage.py first" in line]
    half = "mkdir first && echo half > first.txt && echo begun && sleep 60"
    (project / "dvc.yaml").write_text(whole.replace(command, f"    cmd: {half}"))
    processes = Processes()

    def say(text: str, executed: bool) -> None:
        if text == "begun":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        processes.repro(
            Dag(project), ["first"], show=lambda event: None, say=say, warn=lambda text: None
        )
    assert contents(project) == before
    assert not processes._running


def test_outputs_that_another_process_makes_or_made_are_left_alone(project, repro):
    repro()
    dag, text = Dag(project), project / "first.txt"
    earlier = Earlier(dag, ["first"], project.parent / "aside")
    text.write_text("half of the other's")
    table = project / ".dvc" / "tmp" / "rwlock"
    other = {"pid": os.getppid(), "cmd": "dvc repro"}
    table.write_text(json.dumps({"write": {str(text): other}, "read": {}}))
    assert not earlier.put_back(replacing=True)
    assert not Earlier(dag, ["first"], project.parent / "half").put_back(replacing=True)
    table.write_text("{}")
    (project / "seed.txt").write_text("another seed")
    repro()
    made = contents(project)
    assert not earlier.put_back(replacing=True)
    assert contents(project) == made
