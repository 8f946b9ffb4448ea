"""A sweep's file: every point is checked before any work, and proposed the same way again."""

from pathlib import Path

import pytest
import yaml

from gpt.base.errors import InputError
from pipeline.project.overrides import params_with, text_with
from pipeline.sweep.command import _promotable, best_of, markdown
from pipeline.sweep.points import Point, Sweep, proposals, read_sweep
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
    return Outcome(sweep.known_points()[index], value, metrics, 65.0, error=error)


# --- the file -------------------------------------------------------------------------------------


def test_the_shipped_sweeps_can_be_run_under_the_default_parameters():
    found = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert "classifier" in [path.stem for path in found]
    for path in found:
        read_sweep(ROOT, path)
    sweep = read_sweep(ROOT, ROOT / "sweeps" / "classifier.yaml")
    assert len({point.key for point in sweep.known_points()}) == 6
    assert sweep.stages == ["finetune_classifier"]


def test_a_grid_is_all_combinations_under_names_that_tell_them_apart(tmp_path):
    grid = {**GRID, "pretrain.train.learning_rate": [0.1]}
    stages = ["pretrain", "finetune_classifier"]
    points = read_sweep(ROOT, write(tmp_path, grid=grid, stages=stages)).known_points()
    assert [point.name for point in points] == [
        f"finetune_classifier.train.learning_rate={rate}, batch_size={size}, "
        "pretrain.train.learning_rate=0.1"
        for rate in (0.0001, 0.001)
        for size in (8, 16)
    ]
    assert points[1].set == {RATE: 1e-4, SIZE: 16, "pretrain.train.learning_rate": 0.1}


def test_a_stage_that_only_some_points_start_from_may_be_swept(tmp_path):
    grid = {"finetune_classifier.base": ["pretrain", "gpt2"], "pretrain.train.steps": [1, 2]}
    assert len(read_sweep(ROOT, write(tmp_path, grid=grid)).known_points()) == 4
    del grid["finetune_classifier.base"]
    with pytest.raises(InputError, match="none of the stages reads it"):
        read_sweep(ROOT, write(tmp_path, grid=grid))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "must hold one of `grid`, `search` and `points`"),
        ({"grid": GRID, "search": SEARCH}, "must hold one of `grid`, `search` and `points`"),
        ({"grid": GRID, "trails": 3}, "trails: Unexpected"),
        ({"grid": GRID, "trials": 3}, "must hold `trials` with a search, and with nothing else"),
        ({"grid": {}}, "must hold one of"),
        ({"grid": {RATE: 0.1}}, f"grid.{RATE}: Input should be a valid list"),
        ({"points": [{"name": "a"}, {"name": "A!"}]}, "each point needs a name of its own"),
        ({"points": [{"name": "x" * 101}]}, "at most 100 characters"),
        ({"points": [{"set": {}}]}, "points.0.name: Field required"),
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
        ({"grid": {"finetune_clasifier.x": [1]}}, "none of the stages reads it"),
        ({"grid": {"promotion.at_least": [1]}}, "none of the stages reads it"),
        (
            {"grid": {"evaluate.batch_size": [1]}},
            "reads it .*, or add the stage",
        ),
        ({"grid": GRID, "stages": []}, "stages: .* at least 1 item"),
        ({"grid": GRID, "stages": ["finetune"]}, "stages: finetune: no such stage; use one of"),
        ({"grid": GRID, "metric": {"name": "x"}}, "metric.file: Field required"),
        (
            {"grid": GRID, "metric": {**METRIC, "goal": "less"}},
            "metric.goal: .*'minimize' or 'maximize'",
        ),
        ({"grid": GRID, "metric": {**METRIC, "file": "m.json"}}, r"m\.json is no metrics file of"),
        (
            {"grid": GRID, "metric": {**METRIC, "name": "validation_los"}},
            "it has validation_",
        ),
        ({"grid": GRID, "metric": {**METRIC, "name": "x" * 5000}}, r"has no 'xx.*it has [a-z_]+, "),
        ({"search": SEARCH}, "must hold `trials` with a search"),
        ({"search": SEARCH, "trials": 501}, "trials: .* less than or equal to 500"),
        ({"search": SEARCH, "trials": 2, "seed": -1}, "seed: .* greater than or equal to 0"),
        ({"search": {SIZE: {"low": 2}}, "trials": 2}, "must hold `low` and a larger `high`, or"),
        (
            {"search": {SIZE: {"low": 2, "high": 2}}, "trials": 2},
            "must hold `low` and a larger `high`, or",
        ),
        (
            {"search": {SIZE: {"low": "a", "high": 2}}, "trials": 2},
            rf"search\.{SIZE}\.low\.",
        ),
        (
            {"search": {SIZE: {"low": 0, "high": 2, "log": True}}, "trials": 2},
            "low >= 1",
        ),
        ({"search": {SIZE: {"choices": []}}, "trials": 2}, "or `choices`"),
        ({"search": {SIZE: {"low": -4, "high": 8}}, "trials": 2}, "point batch_size=-4: "),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, values, complaint):
    file = write(tmp_path, **values)
    with pytest.raises(InputError, match=complaint) as caught:
        read_sweep(ROOT, file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


# --- the table of an ablation ---------------------------------------------------------------------


def test_the_shipped_tables_have_rows_that_can_be_trained():
    for path in sorted((ROOT / "ablations").glob("*.yaml")):
        sweep = read_sweep(ROOT, path)
        assert len({point.key for point in sweep.points}) == len(sweep.points)
        assert (sweep.stages, sweep.test_scores) == (["finetune_classifier"], True)
    sweep = read_sweep(ROOT, ROOT / "ablations" / "sms.yaml")
    assert len(sweep.points) >= 8
    by_name = {point.name: point.set for point in sweep.points}
    assert by_name["LoRA, rank 4, last 2 blocks"]["finetune_classifier.lora.rank"] == 4
    assert by_name["all"] == {"finetune_classifier.trainable": "all"}, "a row changes no other"


def test_with_seeds_every_row_is_trained_with_each(tmp_path):
    (tmp_path / "t.yaml").write_text("seeds: [1, 2]\nrows: [{name: a}, {name: b}]")
    points = read_sweep(ROOT, tmp_path / "t.yaml").points
    assert [(each.name, each.choice, each.set) for each in points] == [
        (f"{name}, seed {seed}", name, {"finetune_classifier.train.seed": seed})
        for name in "ab"
        for seed in (1, 2)
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rows: []", "rows: .* at least 1 item"),
        ("- a", "must hold `stages`, `metric` and the points"),
        ("rows: [{set: {}}]", r"rows\.0\.name: Field required"),
        ("rows: [{name: a}, {name: A!}]", "a name of its own"),
        ("rows: [{name: '!'}]", "a name of its own, of letters or digits"),
        ("rows: [{name: a, set: {trainable: some}}]", r"point a: .*finetune_classifier\.trainable"),
        ("rows: [{name: a, set: {x: 1}}]", r"point a: .*finetune_classifier\.x: unknown parameter"),
        ("rows: [{name: a, set: {base.x: 1}}]", r"point a: finetune_classifier\.base\.x is no par"),
        ("rows: [{name: a}]\nseeds: 3", "seeds: Input should be a valid list"),
        ("rows: [{name: a}]\nseed: [3]", "seed: Unexpected"),
        ("rows: [", "line 2, column 1: .*; correct the YAML there"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, complaint):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_sweep(ROOT, tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def test_of_several_seeds_the_page_tells_the_mean_and_the_lowest(tmp_path):
    (tmp_path / "t.yaml").write_text("seeds: [1, 2]\nrows: [{name: a | b}, {name: b}]")
    sweep = read_sweep(ROOT, tmp_path / "t.yaml")
    outcomes = [
        Outcome(point, value, {"validation_accuracy": value, "classifier/accuracy": test})
        for point, value, test in zip(
            sweep.points, (0.9, 0.8, 0.5, 0.6), (0.96, 0.98, 0.5, 0.75), strict=True
        )
    ]
    _, _, means = markdown(sweep, outcomes).partition("Means over the seeds")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in means.splitlines()]
    assert rows[2] == ["choice", "validation accuracy", "classifier accuracy", "lowest"]
    assert rows[4] == ["a &#124; b", "0.8500", "0.9700", "0.9600"]
    assert rows[5] == ["b", "0.5500", "0.6250", "0.5000"]


# --- a search -------------------------------------------------------------------------------------


def proposed(sweep: Sweep, at_once: int) -> list[dict[str, object]]:
    """The points of a search in which low rates are better, and one in five trials fails."""
    points: list[Point] = []

    def result(point: Point) -> float | None:
        return None if points.index(point) % 5 == 0 else point.set[RATE]

    for found in proposals(sweep, at_once, result):
        assert len(found) <= at_once
        points += found
    return [point.set for point in points]


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
    (points,) = proposals(sweep, 9, lambda point: None)
    assert {point.set[SIZE] for point in points} <= {4, 8, 12, 16}
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
