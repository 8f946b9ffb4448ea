"""A checkout of its own beside the project; nothing else is touched."""

import subprocess
import sys

import pytest
from dvc.repo import Repo

from gpt.base.errors import RunError
from pipeline.dag.workspace import make_workspace


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    project = tmp_path / "project"
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is there already"):
        make_workspace(project, "HEAD", tmp_path / "letters")
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["Zoë, 50 % [x] #1 $?", 'it\'s "quoted"', "-x"])
def test_a_project_at_any_path_shares_its_cache_and_its_own_remotes_with_a_workspace(
    name, tmp_path
):
    project = tmp_path / name
    project.mkdir()
    for command in (
        ("git", "init", "-q"),
        (sys.executable, "-m", "dvc", "init", "-q"),
        ("git", "add", "-A"),
        ("git", "-c", "user.name=Test", "-c", "user.email=test@localhost", "commit", "-qm", "x"),
    ):
        subprocess.run(command, cwd=project, check=True)
    own = "['remote \"team\"']\n    url = /srv/Zoë\n"
    (project / ".dvc" / "config.local").write_text(own, encoding="utf-8")

    folder = make_workspace(project, "HEAD", tmp_path / f"{name} beside")

    with Repo(str(project)) as theirs, Repo(str(folder)) as ours:
        assert ours.cache.local_cache_dir == theirs.cache.local_cache_dir
        assert ours.config["remote"]["team"]["url"] == "/srv/Zoë"
