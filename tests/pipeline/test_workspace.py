"""A checkout of its own beside the project; nothing else is touched."""

import subprocess

import pytest

from gpt.errors import RunError
from pipeline.workspace import make_workspace


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    project = tmp_path / "project"
    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="is there already"):
        make_workspace(project, "HEAD", tmp_path / "letters")
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"
