"""A sweep's file: every point is checked before any work, and proposed the same way again."""

from pathlib import Path

import pytest
import yaml

from gpt.base.errors import InputError
from pipeline.project.overrides import params_with, text_with
from pipeline.sweep.command import _promotable, best_of, markdown
from pipeline.sweep.points import Sweep, read_sweep
from pipeline.sweep.runs import Outcome

ROOT = Path(__file__).resolve().parent.parent.parent.parent
METRIC = {
    "file": "reports/finetune_classifier/metrics.json",
    "name": "validation_loss",
    "goal": "minimize",
}
RATE = "finetune_classifier.train.learning_rate"
SIZE = "finetune_classifier.train.batch_size"
GRID = {RATE: [1e-4, 1e-3], SIZE: [8, 16]}
SEARCH = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}, SIZE: {"choices": [8, 16]}}


def write(folder: Path, **values: object) -> Path:
    """A sweep's file; what is None is left out."""
    whole = {"stages": ["finetune_classifier"], "metric": METRIC, **values}
    file = folder / "mine.yaml"
    file.write_text(
        yaml.safe_dump({k: v for k, v in whole.items() if v is not None}, sort_keys=False)
    )
    return file


def outcome(sweep: Sweep, index: int, value: float | None, error: str = "") -> Outcome:
    """Of a point of the grid."""
    metrics = {} if value is None else {"validation_loss": value, "validation_accuracy": 0.5}
    return Outcome(sweep.grid[index], value, metrics, 65.0, error=error)


# --- the file -------------------------------------------------------------------------------------


def test_the_shipped_sweeps_can_be_run_under_the_default_parameters():
    found = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert "classifier" in [path.stem for path in found]
    for path in found:
        read_sweep(ROOT, path)
    sweep = read_sweep(ROOT, ROOT / "sweeps" / "classifier.yaml")
    assert len({point.key for point in sweep.grid}) == 6
    assert sweep.stages == ("finetune_classifier",)


def test_a_grid_is_all_combinations_under_names_that_tell_them_apart(tmp_path):
    grid = {**GRID, "pretrain.train.learning_rate": [0.1]}
    stages = ["pretrain", "finetune_classifier"]
    points = read_sweep(ROOT, write(tmp_path, grid=grid, stages=stages)).grid
    assert [point.name for point in points] == [
        f"finetune_classifier.train.learning_rate={rate}, batch_size={size}, "
        "pretrain.train.learning_rate=0.1"
        for rate in (0.0001, 0.001)
        for size in (8, 16)
    ]
    assert points[1].values == {RATE: 1e-4, SIZE: 16, "pretrain.train.learning_rate": 0.1}


def test_a_stage_that_only_some_points_start_from_may_be_swept(tmp_path):
    grid = {"finetune_classifier.base": ["pretrain", "gpt2"], "pretrain.train.steps": [1, 2]}
    assert len(read_sweep(ROOT, write(tmp_path, grid=grid)).grid) == 4
    del grid["finetune_classifier.base"]
    with pytest.raises(InputError, match="none of the stages reads it"):
        read_sweep(ROOT, write(tmp_path, grid=grid))


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    file = write(tmp_path, grid={RATE: [1]})
    file.write_text(file.read_text().replace("- 1\n", "- 5e-4\n"))
    assert read_sweep(ROOT, file).grid[0].values == {RATE: 0.0005}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "either `grid` or `search`"),
        ({"grid": GRID, "search": SEARCH}, "either `grid` or `search`"),
        ({"grid": GRID, "trails": 3}, "trails: unknown"),
        ({"grid": GRID, "trials": 3}, "trials: is a search's"),
        ({"grid": {}}, "grid: must hold parameters"),
        ({"grid": {RATE: 0.1}}, f"grid: {RATE}: must be a list"),
        ({"grid": {RATE: [0.1, 0.1]}}, "has the same value twice"),
        ({"grid": {SIZE: list(range(1, 502))}}, "grid: 501 points, and at most 500"),
        (
            {"grid": {SIZE: [8, -1]}},
            r"point batch_size=-1: params\.yaml: finetune_classifier\.train\.batch_size: ",
        ),
        (
            {"grid": {"finetune_classifier.train.learning_rat": [1]}},
            r"point learning_rat=1: .*\.learning_rat: unknown parameter; did you mean learning_ra",
        ),
        (
            {"grid": {"finetune_classifier.base.x": [1]}},
            r"finetune_classifier\.base\.x is no param",
        ),
        ({"grid": {"finetune_clasifier.x": [1]}}, "did you mean finetune_classifier"),
        ({"grid": {"promotion.at_least": [1]}}, "no stage has the section promotion"),
        ({"grid": {"evaluate.batch_size": [1]}}, r"none of the stages reads it \(.*add the one"),
        ({"grid": GRID, "stages": []}, "stages: must be a list"),
        ({"grid": GRID, "stages": ["finetune"]}, "stages: finetune: no such stage; use one of"),
        ({"grid": GRID, "metric": {"name": "x"}}, "metric: must hold `file`, `name` and `goal`"),
        ({"grid": GRID, "metric": {**METRIC, "goal": "less"}}, "must be minimize or maximize"),
        ({"grid": GRID, "metric": {**METRIC, "file": "m.json"}}, r"m\.json is no metrics file of"),
        (
            {"grid": GRID, "metric": {**METRIC, "name": "validation_los"}},
            "did you mean validation_",
        ),
        ({"grid": GRID, "metric": {**METRIC, "name": "x" * 5000}}, r"has no 'xx.*it has [a-z_]+, "),
        ({"search": SEARCH}, "trials: must be a whole number"),
        ({"search": SEARCH, "trials": 0}, "trials: must be a whole number"),
        ({"search": SEARCH, "trials": 2, "seed": -1}, "seed: must be a whole number"),
        ({"search": {SIZE: {"low": 2}}, "trials": 2}, "must hold `low`, `high` and perhaps"),
        ({"search": {SIZE: {"low": 2, "high": 2}}, "trials": 2}, "low must be less than high"),
        (
            {"search": {SIZE: {"low": "a", "high": 2}}, "trials": 2},
            r"low must be a number \(got a\)",
        ),
        (
            {"search": {SIZE: {"low": 0, "high": 2, "log": True}}, "trials": 2},
            "low must be above 0",
        ),
        ({"search": {SIZE: {"low": 1, "high": 9, "step": 0.5}}, "trials": 2}, "step must fit"),
        ({"search": {SIZE: {"choices": []}}, "trials": 2}, "choices must be a list"),
        ({"search": {SIZE: {"low": -4, "high": 8}}, "trials": 2}, "point batch_size=-4: "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, values, complaint):
    file = write(tmp_path, **values)
    with pytest.raises(InputError, match=complaint) as caught:
        read_sweep(ROOT, file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


# --- a search -------------------------------------------------------------------------------------


def proposed(sweep: Sweep, at_once: int) -> list[dict[str, object]]:
    """The points of a search in which low rates are better, and one in five trials fails."""
    source, points = sweep.source(at_once), []
    while found := source.ask():
        assert len(found) <= at_once
        points += found
        source.tell(
            [None if len(points) % 5 == 0 else point.values[RATE] for point in found]  # type: ignore[misc]
        )
    return [point.values for point in points]


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_same_results_give_the_same_points(tmp_path, at_once):
    sweep = read_sweep(ROOT, write(tmp_path, search=SEARCH, trials=25, seed=4))
    points = proposed(sweep, at_once)
    assert len(points) == 25
    assert points == proposed(sweep, at_once)
    other = read_sweep(ROOT, write(tmp_path, search=SEARCH, trials=25, seed=5))
    assert points != proposed(other, at_once)
    assert all(1e-4 <= values[RATE] <= 1e-2 for values in points)
    assert {values[SIZE] for values in points} == {8, 16}
    late = sorted(values[RATE] for values in points[-10:])
    assert late[5] < 1e-3, "it learns from the results"


def test_whole_numbers_stay_whole_and_choices_may_be_anything(tmp_path):
    search = {
        SIZE: {"low": 4, "high": 16, "step": 4},
        "finetune_classifier.trainable": {"choices": ["all", "lora"]},
        "finetune_classifier.lora": {"choices": [{"rank": 2}, {"rank": 4}]},
    }
    sweep = read_sweep(ROOT, write(tmp_path, search={SIZE: search[SIZE]}, trials=9))
    source = sweep.source(9)
    assert {point.values[SIZE] for point in source.ask()} <= {4, 8, 12, 16}
    values = {"finetune_classifier.trainable": "lora", "finetune_classifier.lora": {"rank": 2}}
    base = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert params_with(base, values).finetune_classifier.lora.rank == 2
    # `all` with adapters is impossible, and said before any work
    with pytest.raises(InputError, match="point batch_size=4, trainable=all, "):
        read_sweep(ROOT, write(tmp_path, search=search, trials=9))


# --- what comes out -------------------------------------------------------------------------------


def test_the_best_stands_first_and_what_failed_last(tmp_path):
    sweep = read_sweep(ROOT, write(tmp_path, grid=GRID))
    values = [0.5, None, 0.25, 0.75]
    outcomes = [outcome(sweep, i, v, "" if v else "no good") for i, v in enumerate(values)]
    assert best_of(sweep, outcomes) is outcomes[2]
    lines = markdown(sweep, outcomes).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[0] == ["point", "validation loss", "validation accuracy", "took", "MLflow run"]
    assert [row[1] for row in rows[2:]] == ["0.25", "0.5", "0.75", "failed"]
    assert lines[-1] == "Best: learning_rate=0.001, batch_size=8"
    high = read_sweep(ROOT, write(tmp_path, grid=GRID, metric={**METRIC, "goal": "maximize"}))
    assert best_of(high, outcomes) is outcomes[3]
    assert best_of(sweep, [outcomes[1]]) is None


def test_which_model_is_promoted_is_told_by_the_metric_or_by_what_is_swept(tmp_path):
    assert _promotable(read_sweep(ROOT, write(tmp_path, grid=GRID))) == "classifier"
    evaluated = {"file": "reports/evaluation/metrics.json", "name": "classifier/accuracy"}
    evaluated["goal"] = "maximize"
    of_evaluate = {"stages": ["evaluate"], "metric": evaluated}
    assert _promotable(read_sweep(ROOT, write(tmp_path, grid=GRID, **of_evaluate))) == "classifier"
    both = {RATE: [1], "pretrain.train.learning_rate": [1]}
    with pytest.raises(InputError, match="--promote: it cannot be told which model"):
        _promotable(read_sweep(ROOT, write(tmp_path, grid=both, **of_evaluate)))


def test_values_are_put_among_the_comments():
    before = (ROOT / "params.yaml").read_bytes()
    after = text_with(before, {RATE: 0.002, "finetune_classifier.max_length": 48})
    lines = set(after.decode().splitlines()) ^ set(before.decode().splitlines())
    assert [line for line in lines if "#" in line] == []
    assert yaml.safe_load(after)["finetune_classifier"]["train"]["learning_rate"] == 0.002
    assert yaml.safe_load(text_with(after, {"finetune_classifier.max_length": None})) == (
        yaml.safe_load(text_with(before, {RATE: 0.002}))
    )
