"""A small project that was built several times: git, DVC's cache, MLflow and the registry are real,
its stages take no time, and each is told its work by a `pipeline` of the project's own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from pipeline.dag.cache import dvc_md5
from pipeline.tracking.connection import connect
from pipeline.tracking.provenance import MadeOf
from pipeline.tracking.run import StageRun

URL = "https://example.org/books/the-verdict.txt"
SHA256 = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
MODELS = {"pretrain": "base", "finetune_instruct": "assistant"}

# what `python -m pipeline stage NAME` does there
STAGE = """\
import json, os, pathlib, sys, time
import yaml
name = sys.argv[2]
stage = yaml.safe_load(open("dvc.yaml"))["stages"][name]
params = yaml.safe_load(open("params.yaml"))
with open("ran", "a") as ran:
    ran.write(name + "\\n")
if params[name].get("fails"):
    sys.exit("error: " + name + ": no good; mend it")
if "reproduced" in os.getcwd():
    time.sleep(params[name].get("seconds_again", 0))
told = [name, json.dumps(params[name], sort_keys=True), open("gpt/words.py").read()]
for dep in stage["deps"]:
    files = sorted(pathlib.Path(dep).rglob("*")) if os.path.isdir(dep) else []
    told += [each.read_text() for each in files if each.is_file()]
if params[name].get("chance"):
    told.append(str(time.time_ns()))
for out in stage["outs"]:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True)
    text = "answer,\\n" if out.endswith("predictions") else "".join(told)
    (folder / ("assistant.csv" if out.endswith("predictions") else "data.txt")).write_text(text)
    if out.startswith("data/raw"):
        source = params["download"][out.rpartition("/")[2]][0]
        listed = {"name": source["name"], "file": "data.txt", "kind": "documents",
                  "format": "text", "bytes": len(text), "sha256": source["sha256"],
                  "url": source["urls"][0]}
        (folder / "sources.json").write_text(json.dumps([listed]))
"""

CHAIN = {
    "download": (["samples"], ["data/raw/corpus", "data/raw/instructions"]),
    "tokenize": (["data/raw/corpus"], ["data/tokens"]),
    "pretrain": (["data/tokens"], ["models/pretrain"]),
    "finetune_instruct": (["models/pretrain", "data/raw/instructions"], ["models/assistant"]),
    "evaluate": (["models/assistant"], ["reports/evaluation/predictions"]),
}
CODE = ["pipeline/__main__.py", "gpt"]


@dataclass(frozen=True)
class _Params:
    values: dict[str, Any] = field(default_factory=dict)


class SmallProject:
    """The project, and the run of each stage that was executed, by its name and number."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: dict[str, str] = {}
        self.made: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        (root / "samples").mkdir(parents=True)
        (root / "samples" / "stories.txt").write_text("Once.\n")
        for folder in ("pipeline", "gpt"):
            (root / folder).mkdir()
        (root / "pipeline" / "__init__.py").touch()
        (root / "pipeline" / "__main__.py").write_text(STAGE)
        (root / "gpt" / "words.py").write_text('WORDS = "as committed"\n')
        (root / ".gitignore").write_text(
            "/data/\n/models/\n/reports/\n/.pipeline/\n/mlflow.db\n/mlartifacts/\n/ran\n__pycache__/\n"
        )
        stages = {
            name: {
                "cmd": f"python -m pipeline stage {name}",
                "deps": [*inputs, *CODE],
                "params": [name],
                "outs": list(outputs),
            }
            for name, (inputs, outputs) in CHAIN.items()
        }
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        source = {"name": "the-verdict", "urls": [URL], "sha256": SHA256}
        self.params: dict[str, Any] = {
            name: {"seed": 1} for name in CHAIN if name != "download"
        } | {"download": {"local": "samples", "corpus": [source], "instructions": [source]}}
        self.write_params()
        self.git("init", "-q")
        Repo.init(str(root)).close()
        self.commit("The project")

    def git(self, *arguments: str) -> str:
        """What git says."""
        user = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
        done = subprocess.run(
            ["git", *user, *arguments], cwd=self.root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit(self, message: str) -> str:
        """Commit all that git may have; the commit."""
        self.git("add", "-A")
        self.git("commit", "-qm", message)
        return self.git("rev-parse", "HEAD")

    def write_params(self) -> None:
        """Put the parameters into their file."""
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params))

    def set(self, stage: str, **values: Any) -> None:
        """Change parameters of a stage."""
        self.params[stage] |= values
        self.write_params()

    def build(self, *stages: str) -> None:
        """Execute stages, by default all, as the pipeline does: tracked, registered, in DVC."""
        for name in stages or CHAIN:
            self._execute(name)
        with Repo(str(self.root)) as repo:
            for name in stages or CHAIN:
                repo.commit(target=name, force=True)

    def _execute(self, name: str) -> None:
        inputs, outputs = CHAIN[name]
        for path in outputs:
            shutil.rmtree(self.root / path, ignore_errors=True)
        params = _Params(self.params[name])
        made_of = MadeOf.now(self.root, name, params, inputs)
        run = StageRun(self.root, name, params, made_of.inputs, made_of=made_of.kept())
        subprocess.run(
            [sys.executable, "-m", "pipeline", "stage", name],
            cwd=self.root,
            check=True,
            env={**os.environ, "PYTHONPATH": str(self.root)},
        )
        written = {path: dvc_md5(self.root / path) for path in outputs}
        if name in MODELS:
            self._register(run, MODELS[name], written[outputs[0]])
        run.close("FINISHED", outputs=written)
        number = run.client.get_run(run.id).data.tags["number"]
        self.runs[f"{name} {number}"] = run.id
        self.made[run.id] = (made_of.inputs, written)

    @staticmethod
    def _register(run: StageRun, model: str, md5: str) -> None:
        client = run.client
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        source = client.get_run(run.id).info.artifact_uri
        made = client.create_model_version(model, source, run.id, tags={"md5": md5})
        client.set_registered_model_alias(model, "candidate", made.version)

    def client(self) -> Any:
        """Of the project's MLflow."""
        return connect(self.root)

    def executed(self) -> list[str]:
        """The stages that ran in the project's own folder."""
        return (self.root / "ran").read_text().split()

    def state(self) -> dict[str, Any]:
        """All of the project that a reproduction must not touch."""
        client = self.client()
        runs = {
            run.info.run_id: (dict(run.data.tags), run.info.status)
            for each in client.search_experiments()
            for run in client.search_runs([each.experiment_id])
        }
        aliases = {m.name: dict(m.aliases) for m in client.search_registered_models()}
        files = {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
            and not str(path.relative_to(self.root)).startswith(
                (".git/", ".dvc/tmp", ".pipeline/", "mlflow.db")
            )
        }
        return {"runs": runs, "aliases": aliases, "files": files}

    @contextlib.contextmanager
    def without(self, path: Path) -> Iterator[None]:
        """Within the block there is nothing at the path."""
        aside = path.with_name(f"{path.name}-aside")
        path.rename(aside)
        try:
            yield
        finally:
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)

    def artifacts(self, run: str) -> Path:
        """Where MLflow keeps the files of a run, which is named as `pretrain 1`."""
        uri = self.client().get_run(self.runs[run]).info.artifact_uri
        return Path(uri.removeprefix("file://"))


@contextlib.contextmanager
def first_results(root: Path, empty_database: Path) -> Iterator[SmallProject]:
    """A new project that was built once and committed; within the block it is the current one."""
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("DVC_NO_ANALYTICS", "true")
        patch.setenv("DVC_SITE_CACHE_DIR", str(root.parent / "site"))
        patch.chdir(root)
        project = SmallProject(root)
        project.build()
        project.commit("The first results")
        yield project
