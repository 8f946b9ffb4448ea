"""What a run keeps of its making: parameters, code, uncommitted changes, and no credentials."""

import json
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import stand_in

from gpt.base.errors import RunError
from pipeline.dag.cache import dvc_md5
from pipeline.run.stage import run_stage
from pipeline.tracking import provenance as module
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import MadeOf, Provenance, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ("git", "-C", str(folder), *identity, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed project whose stages run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stand_in.install(monkeypatch)
    root = tmp_path / "project"
    root.mkdir()
    stand_in.make_project(root)
    (root / ".gitignore").write_text("/data\n/models\n/.pipeline\n/mlflow.db\n/mlartifacts\n")
    (root / "picture.bin").write_bytes(bytes(range(256)))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def provenance(project: Path, stage: str, inputs: Iterable[str] = ()) -> Provenance:
    return MadeOf.now(project, stage, None, inputs).kept()


def run_of(project: Path, stage: str) -> Any:
    noted = json.loads((project / ".pipeline" / "runs" / f"{stage}.json").read_text())
    return connect(project).get_run(noted["run_id"])


def kept(project: Path, stage: str, tmp_path: Path) -> Path:
    run_id = run_of(project, stage).info.run_id
    return Path(connect(project).download_artifacts(run_id, "lineage", str(tmp_path)))


def test_a_run_keeps_the_parameters_file_and_the_codes_checksums(
    project: Path, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    assert run_stage("prepare", project) == 0
    folder = kept(project, "prepare", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["code.json", "params.yaml"]
    assert (folder / "params.yaml").read_bytes() == (project / "params.yaml").read_bytes()
    code = json.loads((folder / "code.json").read_text())
    assert code == {"code.py": dvc_md5(project / "code.py")}
    tags = run_of(project, "prepare").data.tags
    assert tags["code"] == dvc_md5(folder / "code.json")
    assert tags["git.dirty"] == "false"
    assert "git.patch" not in tags


def test_tags_say_what_changed_against_the_last_run_that_ended_well(
    project: Path, empty_database: Path
) -> None:
    shutil.copy(empty_database, project / "mlflow.db")

    def changed(**values: object) -> dict[str, str]:
        stand_in.set_params(project, learn=values)
        run_stage("learn", project)
        tags = run_of(project, "learn").data.tags
        return {key: value for key, value in tags.items() if key.startswith("changed.")}

    assert run_stage("prepare", project) == 0
    assert changed() == {}
    assert changed(fail_at=3) == {"changed.fail_at": "-1 → 3"}
    # that one failed: what is compared with is the one before
    assert changed(train={"steps": 10}) == {"changed.train.steps": "20 → 10"}
    assert changed(train={"steps": 10}) == {}


def test_what_git_does_not_have_is_kept_as_a_patch_that_applies(
    project: Path, tmp_path: Path
) -> None:
    (project / "code.py").write_text("x = 2  # ünïcode\n")
    (project / "picture.bin").write_bytes(bytes(range(255, -1, -1)))
    stand_in.set_params(project, learn={"pause": 1.0})
    (project / "dvc.lock").write_text("made by a run")
    git(project, "add", "dvc.lock")
    found = provenance(project, "prepare")
    assert found.tags["git.dirty"] == "true"
    assert found.tags["git.patch"] == "kept"
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(project), str(other))
    (tmp_path / "patch").write_bytes(found.files["changes.patch"])
    git(other, "apply", str(tmp_path / "patch"))
    for name in ("code.py", "picture.bin"):
        assert (other / name).read_bytes() == (project / name).read_bytes()
    assert (other / "params.yaml").read_text() == "{}"
    assert not (other / "dvc.lock").exists()


def test_changed_parameters_alone_are_no_changed_code(project: Path) -> None:
    stand_in.set_params(project, learn={"pause": 1.0})
    found = provenance(project, "prepare")
    assert found.tags["git.dirty"] == "false"
    assert "changes.patch" not in found.files


def test_what_came_to_a_folder_of_code_or_left_it_meanwhile_is_a_change(project: Path) -> None:
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("[source.txt, code.py]", "[source.txt, gpt]"))
    shutil.copy(Path(__file__).parents[3] / ".dvcignore", project)
    (project / "gpt").mkdir()
    (project / "gpt" / "train.py").touch()
    made_of = MadeOf.now(project, "prepare", None)
    assert list(made_of.code) == ["gpt/train.py"]
    (project / "gpt" / ".train.py.swp").touch()
    made_of.check_unchanged()
    (project / "gpt" / "model.py").touch()
    with pytest.raises(RunError, match=r"^prepare: gpt/model\.py changed while it ran"):
        made_of.check_unchanged()
    (project / "gpt" / "train.py").unlink()
    with pytest.raises(RunError, match=r"^prepare: gpt/train\.py, gpt/model\.py changed"):
        made_of.check_unchanged()


def test_git_tags_say_whether_the_code_was_changed(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {}
    git(tmp_path, "init", "-q")
    (tmp_path / "optional").mkdir()
    for name in ("code.py", "params.yaml", "dvc.lock", "optional/dvc.lock"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert git_state(tmp_path)["git.dirty"] == "false"
    # what a run itself changes, and what it keeps by itself
    for name in ("params.yaml", "dvc.lock", "optional/dvc.lock"):
        (tmp_path / name).write_text("2")
    assert git_state(tmp_path)["git.dirty"] == "false"
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path)["git.dirty"] == "true"


def test_a_patch_that_is_too_large_is_named_and_not_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATCH_LIMIT", 100_000)
    (project / "code.py").write_text("x = 1\n" * 200_000)
    found = provenance(project, "prepare")
    assert found.tags["git.patch"] == "too large (1.4 MB)"
    assert "changes.patch" not in found.files


def test_what_a_stage_reads_and_git_does_not_have_is_named(project: Path) -> None:
    assert "git.untracked" not in provenance(project, "prepare", ["source.txt"]).tags
    own = project / "my-data" / "sub"
    own.mkdir(parents=True)
    (own / "text").write_text("1")
    git(project, "rm", "-q", "--cached", "code.py")
    (project / "data" / "prepared").mkdir(parents=True)
    (project / "data" / "prepared" / "text").write_text("made by a stage")
    found = provenance(project, "learn", ["data/prepared", "my-data"])
    assert found.tags["git.untracked"] == "code.py, my-data/"


def test_no_credentials_are_kept(project: Path, empty_database: Path, tmp_path: Path) -> None:
    shutil.copy(empty_database, project / "mlflow.db")
    mirror = "https://me:secret@host.example/a?download=1&access_token=secret"
    stand_in.set_params(project, prepare={"mirror": mirror})
    (project / "code.py").write_text('URL = "https://me:secret@host.example/b"\n')
    assert run_stage("prepare", project) == 0
    folder = kept(project, "prepare", tmp_path)
    run = run_of(project, "prepare")
    for path in folder.iterdir():
        assert b"secret" not in path.read_bytes(), path.name
    assert "secret" not in str(run.to_dictionary())
    assert run.data.params["mirror"] == "https://host.example/a?download=1&access_token=***"
    assert run.data.tags["lineage.redacted"] == "params.yaml, changes.patch"


def test_a_project_without_git_keeps_parameters_and_code(project: Path) -> None:
    shutil.rmtree(project / ".git")
    found = provenance(project, "prepare", ["source.txt"])
    assert set(found.tags) == {"code"}
    assert set(found.files) == {"params.yaml", "code.json"}
