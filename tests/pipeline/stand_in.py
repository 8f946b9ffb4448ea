"""Two small stages in place of the real ones, so that what runs a stage is tested by itself.

`python stand_in.py NAME ROOT` runs one of them in a process that a test may kill.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from gpt.base.errors import InputError, RunError
from gpt.base.events import Log, Message, Metrics, Progress, Text, discard
from gpt.base.files import whole_directory, write_json
from pipeline.project.settings import TrackingParams
from pipeline.project.stage_table import StageSpec
from pipeline.run.stage import run_stage


@dataclasses.dataclass(frozen=True)
class PrepareParams:
    mirror: str | None = None
    fail: str = ""


@dataclasses.dataclass(frozen=True)
class TrainParams:
    learning_rate: float = 0.5
    steps: int = 20
    checkpoint_seconds: float = 60.0
    devices: int = 1


@dataclasses.dataclass(frozen=True)
class LearnParams:
    train: TrainParams = TrainParams()
    sources: tuple[dict[str, str], ...] = ({"name": "a"}, {"name": "b"})
    pause: float = 0.0
    fail_at: int = -1
    hold: str = ""
    """At step 10 wait until this file is gone."""


@dataclasses.dataclass(frozen=True)
class Params:
    prepare: PrepareParams
    learn: LearnParams
    copy: PrepareParams = PrepareParams()
    third: PrepareParams = PrepareParams()
    tracking: TrackingParams | None = None


def prepare(
    params: PrepareParams, *, source: Path, out: Path, metrics: Path, log: Log = discard
) -> dict[str, float]:
    match params.fail:
        case "input":
            raise InputError("source.txt: line 3 is bad; correct it")
        case "secret":
            raise InputError("https://host/file?token=abc123 (403); correct it")
        case "run":
            raise RunError("the disk is full; free some")
        case "bug":
            raise ZeroDivisionError("a mistake")
    text = source.read_text()
    log(Message(f"mirror {params.mirror}"))
    with whole_directory(out) as partial:
        (partial / "text").write_text(text)
        (partial / "sub").mkdir()
        (partial / "sub" / "bytes").write_bytes(bytes(range(256)))
    values = {"bytes": len(text), "by_source": {"a": 1, "b": 2}}
    write_json(metrics, values)
    return values


def learn(
    params: LearnParams,
    *,
    data: Path,
    out: Path,
    metrics: Path,
    history: Path,
    state: Path | None = None,
    log: Log = discard,
) -> dict[str, float]:
    saved = state / "step.json" if state else None
    done = json.loads(saved.read_text()) if saved and saved.exists() else 0
    steps = params.train.steps
    for step in range(done + 1, steps + 1):
        if step == params.fail_at:
            raise RunError(f"the loss is nan at step {step}; lower the learning rate")
        time.sleep(params.pause)
        while step == 10 and params.hold and Path(params.hold).exists():
            time.sleep(0.05)
        log(Metrics(step, {"train_loss": 1 / step, "learning_rate": params.train.learning_rate}))
        log(Progress("learn", step, steps))
        if step % 5 == 0:
            log(Metrics(step, {"validation_loss": 2 / step}))
            log(Text(f"samples/step-{step:06d}.txt", f"sample {step}"))
            if saved:
                write_json(saved, step)
    rows = [f"{s},{1 / s},{2 / s},{params.train.learning_rate}" for s in range(5, steps + 1, 5)]
    history.parent.mkdir(parents=True, exist_ok=True)
    header = "step,train_loss,validation_loss,learning_rate"
    history.write_text("\n".join([header, *rows]) + "\n")
    with whole_directory(out) as partial:
        (partial / "model").write_text(f"{params.train} {data.name}")
    values = {"validation_loss": 2 / steps}
    write_json(metrics, values)
    return values


STAGES = {
    **{
        name: StageSpec(
            title=name,
            function="stand_in:prepare",
            inputs={"source": "source.txt"},
            outputs={"out": f"data/{out}", "metrics": f"reports/{name}/metrics.json"},
        )
        for name, out in (("prepare", "prepared"), ("copy", "copy"), ("third", "third"))
    },
    "learn": StageSpec(
        title="Learning",
        function="stand_in:learn",
        inputs={"data": "data/prepared"},
        outputs={
            "out": "models/learnt",
            "metrics": "reports/learn/metrics.json",
            "history": "reports/learn/history.csv",
        },
        trains=True,
        continues=True,
    ),
}


def load_params(path: Path) -> Params:
    values = json.loads(path.read_text())
    learn_values = values.get("learn", {})
    train = TrainParams(**learn_values.pop("train", {}))
    tracking = TrackingParams(**values["tracking"]) if "tracking" in values else None
    return Params(
        PrepareParams(**values.get("prepare", {})),
        LearnParams(train, **learn_values),
        tracking=tracking,
    )


def set_params(root: Path, **sections: dict[str, object]) -> None:
    """Write `params.yaml` (JSON is YAML)."""
    (root / "params.yaml").write_text(json.dumps(sections))


def make_project(root: Path) -> Path:
    """A folder with all that a stage needs."""
    (root / "source.txt").write_text("some text\n")
    (root / "code.py").write_text("x = 1\n")
    (root / "dvc.yaml").write_text(
        "stages:\n"
        + "".join(
            f"  {stage}:\n    cmd: none\n    deps: [{data}, code.py]\n    outs: [{out}]\n"
            for stage, data, out in (
                ("prepare", "source.txt", "data/prepared"),
                ("copy", "source.txt", "data/copy"),
                ("third", "source.txt", "data/third"),
                ("learn", "data/prepared", "models/learnt"),
            )
        )
    )
    set_params(root)
    return root


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("project.stage_table", "run.stage"):
        monkeypatch.setattr(f"pipeline.{module}.STAGES", STAGES)
    monkeypatch.setattr("pipeline.run.stage.load_params", load_params)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        raise SystemExit(run_stage(sys.argv[1], Path(sys.argv[2])))
