"""A copy of the project in a folder of its own, as a user has it after cloning."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock

pytest.register_assert_rewrite("story")

ROOT = Path(__file__).parents[2]
_LEFT_OUT = {".venv", ".git", "data", "models", "mlartifacts", "__pycache__", ".dvc/cache"}


@dataclass(frozen=True)
class Project:
    """A project folder and the commands of its user."""

    root: Path
    said: list[str] = field(default_factory=list)
    """What each command printed."""

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        """Run a command in the project; its output, standard error included.

        Names are looked up beside the running Python first, as with an activated environment.
        """
        beside = Path(sys.executable).parent
        done = subprocess.run(
            command,
            cwd=self.root,
            env={
                **{
                    k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))
                },
                "PATH": os.pathsep.join([str(beside), os.environ["PATH"]]),
                # the copy, not the checkout that is installed
                "PYTHONPATH": str(self.root),
                "COLUMNS": "120",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        self.said.append(done.stdout)
        assert done.returncode == code, done.stdout
        return done.stdout

    def set(self, path: str, value: str) -> None:
        """Change one value of params.yaml, named like `finetune_classifier.train.learning_rate`."""
        import yaml

        file = self.root / "params.yaml"
        params = yaml.safe_load(file.read_text())
        *parents, last = path.split(".")
        section = params
        for name in parents:
            section = section[name]
        section[last] = yaml.safe_load(value)
        file.write_text(yaml.safe_dump(params, sort_keys=False))

    def outputs(self) -> dict[str, str]:
        """Every output in dvc.lock with its md5."""
        import yaml

        lock = yaml.safe_load((self.root / "dvc.lock").read_text())
        return {
            out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]
        }


def _copy_project(to: Path) -> Project:
    for path in (
        subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        if (ROOT / ".git").exists()
        else [
            str(p.relative_to(ROOT))
            for p in ROOT.rglob("*")
            if p.is_file() and not any(str(p.relative_to(ROOT)).startswith(x) for x in _LEFT_OUT)
        ]
    ):
        if path and (ROOT / path).is_file():
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, to / path)
    shutil.copy(to / "presets" / "smoke.yaml", to / "params.yaml")
    return Project(to)


def _under_git(root: Path) -> Project:
    made = _copy_project(root)
    made.run("git", "init", "-q")
    made.run("git", "config", "user.name", "Test")  # DVC commits each experiment
    made.run("git", "config", "user.email", "test@localhost")
    made.run("git", "add", "-A")
    made.run("git", "commit", "-qm", "The project")
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A copy of the project under git, with the preset `smoke` in place."""
    return _under_git(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Project:
    """A copy of the project under git after `gpt-pipeline run`, which all modules share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers of one session share its folder
        folder = folder.parent
    shared = folder / "finished-project"
    with FileLock(shared.with_suffix(".lock")):
        if not shared.exists():
            made = _under_git(tmp_path_factory.mktemp("finished"))
            made.run("gpt-pipeline", "run")
            made.root.rename(shared)
    root = tmp_path_factory.mktemp("project") / "copy"
    shutil.copytree(shared, root, ignore=shutil.ignore_patterns("tmp", "__pycache__"))
    return Project(root)


@pytest.fixture
def archive(tmp_path) -> Project:
    """A copy of the project without git, as a source archive has it."""
    made = _copy_project(tmp_path)
    made.run("dvc", "config", "--local", "core.no_scm", "true")
    return made
