"""A sweep's file: which stages, which metric, and the points: a grid, a search, or a list.

Every point is the project's `params.yaml` with other values at some paths. An ablation is a sweep
over a list of choices of what is trained of the classifier, each perhaps with several seeds.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, first_problem, shown
from gpt.base.files import read_json
from pipeline.dag.graph import Dag
from pipeline.project.overrides import params_with
from pipeline.project.params import PARAMS_FILE, SECTIONS, read_params
from pipeline.project.yaml_files import read_yaml
from pipeline.tracking.keys import flatten_metrics

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_MOST_POINTS = 500
_NO_OTHERS = ConfigDict(extra="forbid")
_CLASSIFIER = "finetune_classifier"


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class SweepMetric:
    """What the points are compared by."""

    file: str
    """A metrics file of a stage, relative to the project."""
    name: str
    """In the file; of nested ones joined by a slash."""
    goal: Literal["minimize", "maximize"]


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class Point:
    """One combination of values."""

    name: str
    """`learning_rate=0.0003, batch_size=8`, or as the file says."""
    set: dict[str, Any] = field(default_factory=dict)
    """Path in `params.yaml` -> value."""
    choice: str = ""
    """The name without the seed: points of one choice are averaged."""

    @property
    def key(self) -> str:
        """Equal for equal values."""
        return json.dumps(self.set, sort_keys=True, default=str)

    @property
    def word(self) -> str:
        """The name as it may stand in a git reference."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


_Number = int | FiniteFloat


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class Dimension:
    """A parameter of a search: from `low` to `high`, whole if all is whole, or one of `choices`."""

    low: _Number = 0
    high: _Number = 0
    log: bool = False
    step: _Number | None = None
    choices: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if bool(self.choices) == (self.low < self.high):
            raise ValueError("must hold `low` and a larger `high`, or `choices`")
        self.distribution()  # Optuna refuses what cannot be

    def distribution(self) -> BaseDistribution:
        """For Optuna; of choices it sees the index only, as they may be lists or mappings."""
        from optuna import distributions as kinds

        if self.choices:
            return kinds.CategoricalDistribution(range(len(self.choices)))
        low, high, step = self.low, self.high, self.step
        if isinstance(low, int) and isinstance(high, int) and not isinstance(step, float):
            return kinds.IntDistribution(low, high, self.log, step or 1)
        return kinds.FloatDistribution(low, high, self.log, step)

    def value(self, proposed: Any) -> Any:
        """What Optuna proposed, as a parameter; four digits are enough."""
        if self.choices:
            return self.choices[proposed]
        if isinstance(proposed, int):
            return proposed
        return min(max(float(f"{proposed:.4g}"), self.low), self.high)


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class Sweep:
    """A sweep's file, checked."""

    name: str
    file: Path
    stages: Annotated[list[str], Field(min_length=1)]
    metric: SweepMetric
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = field(default_factory=dict)
    points: Annotated[list[Point], Field(max_length=_MOST_POINTS)] = field(default_factory=list)
    search: dict[str, Dimension] = field(default_factory=dict)
    trials: Annotated[int, Field(ge=0, le=_MOST_POINTS)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    test_scores: bool = False
    """Whether the classifier of each point is also scored on the test messages."""

    def __post_init__(self) -> None:
        if [bool(self.grid), bool(self.points), bool(self.search)].count(True) != 1:
            raise ValueError("must hold one of `grid`, `search` and `points`")
        if bool(self.search) != bool(self.trials):
            raise ValueError("must hold `trials` with a search, and with nothing else")
        number = math.prod(map(len, self.grid.values()))
        if number > _MOST_POINTS:
            raise ValueError(f"grid: {number} points, and at most {_MOST_POINTS} are possible")
        words = [point.word for point in self.points]
        if "" in words or len({*words}) < len(words) or max(map(len, words), default=0) > 100:
            raise ValueError(
                "each point needs a name of its own, of letters or digits and at most 100 "
                "characters"
            )

    @property
    def paths(self) -> list[str]:
        """The swept parameters."""
        listed = dict.fromkeys(path for point in self.points for path in point.set)
        return list(self.search or self.grid or listed)

    def known_points(self) -> list[Point]:
        """All points; of a search those at the ends of its ranges, and with each choice."""
        if self.points:
            return self.points
        if self.grid:
            return [self.point(values) for values in itertools.product(*self.grid.values())]
        # the values between the ends of a range are right if these are
        ends = {path: each.choices or [each.low, each.high] for path, each in self.search.items()}
        first = {path: values[0] for path, values in ends.items()}
        every = [{**first, path: value} for path, values in ends.items() for value in values]
        return [self.point(list(values.values())) for values in every]

    def point(self, values: Sequence[Any]) -> Point:
        """The point with these values of the swept parameters, named after them."""
        ends = [path.rpartition(".")[2] for path in self.paths]
        said = (
            f"{end if ends.count(end) == 1 else path}={'none' if value is None else value}"
            for path, end, value in zip(self.paths, ends, values, strict=True)
        )
        return Point(", ".join(said), dict(zip(self.paths, values, strict=True)))


def proposals(
    sweep: Sweep, at_once: int, result: Callable[[Point], float | None]
) -> Iterator[list[Point]]:
    """The points in groups, each of which may be worked at in any order.

    A search hears of the results of a whole group at once, so what it proposes never depends on
    which point ends first.

    Args:
        sweep: what is swept.
        at_once: so many points are worked at together.
        result: asked for each point of a group before the next one: its value, None if it failed.
    """
    if not sweep.search:
        yield sweep.known_points()
        return
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction=sweep.metric.goal, sampler=optuna.samplers.TPESampler(seed=sweep.seed)
    )
    space = {path: each.distribution() for path, each in sweep.search.items()}
    for start in range(0, sweep.trials, at_once):
        trials = [study.ask(space) for _ in range(min(at_once, sweep.trials - start))]
        points = [
            sweep.point([each.value(trial.params[path]) for path, each in sweep.search.items()])
            for trial in trials
        ]
        yield points
        for trial, point in zip(trials, points, strict=True):
            value = result(point)
            study.tell(trial, value, optuna.trial.TrialState.FAIL if value is None else None)


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class _Row:
    name: str
    set: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, config=_NO_OTHERS)
class _Table:
    rows: Annotated[list[_Row], Field(min_length=1)]
    seeds: list[int] = field(default_factory=list)


def _as_sweep(raw: Any) -> dict[str, Any]:
    """The sweep that a table of rows stands for, as its file would have it.

    Args:
        raw: `rows`, each with a `name` and what it changes below `finetune_classifier`, and
            perhaps `seeds`, with each of which every row is trained.

    Raises:
        pydantic.ValidationError: it is no such table.
    """
    table = TypeAdapter(_Table).validate_python(raw)
    points = []
    for row in table.rows:
        changes = {f"{_CLASSIFIER}.{path}": value for path, value in (row.set or {}).items()}
        points += [
            {
                "name": f"{row.name}, seed {seed}",
                "set": {**changes, f"{_CLASSIFIER}.train.seed": seed},
                "choice": row.name,
            }
            for seed in table.seeds
        ] or [{"name": row.name, "set": changes}]
    metric = {"name": "validation_accuracy", "goal": "maximize"}
    return {
        "stages": [_CLASSIFIER],
        "metric": {"file": f"reports/{_CLASSIFIER}/metrics.json", **metric},
        "points": points,
        "test_scores": True,
    }


def read_sweep(root: Path, file: Path) -> Sweep:
    """Read a sweep; every point is checked as `params.yaml` is, before any work.

    Of a search the ends of every range and all choices are checked.

    Args:
        root: the project; its `params.yaml` is what the points change.
        file: YAML: see docs/sweeps.md; or the table of an ablation.

    Raises:
        InputError: the file cannot be read, or a point is impossible; each named.
    """
    raw, base = read_yaml(file), read_params(root / PARAMS_FILE)
    try:
        if not isinstance(raw, dict):
            raise InputError("must hold `stages`, `metric` and the points")
        named = {"name": re.sub(r"[^\w.-]+", "-", file.stem).strip(".") or "sweep", "file": file}
        sweep = TypeAdapter(Sweep).validate_python(
            (_as_sweep(raw) if "rows" in raw else raw) | named
        )
        _check(root, sweep)
        for point in sweep.known_points():
            try:
                params_with(base, point.set)
            except InputError as error:
                raise InputError(f"point {point.name}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}; see docs/sweeps.md") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return sweep


def _check(root: Path, sweep: Sweep) -> None:
    """Refuse a metric that the stages do not write, and a parameter that none of them reads."""
    for each in sweep.stages:
        if each not in SECTIONS:
            raise InputError(f"stages: {each}: no such stage; use one of {', '.join(SECTIONS)}")
    dag = Dag(root)
    plan = dag.plan(sweep.stages)
    files = [path for stage in plan for path in dag.stages[stage].metrics]
    metric = sweep.metric
    if metric.file not in files:
        raise InputError(
            f"metric.file: {metric.file} is no metrics file of these stages; use one of "
            f"{', '.join(files)}"
        )
    if (root / metric.file).is_file():  # as the last run wrote it: a typing error is told at once
        remedy = "`git checkout` it, or run its stage again"
        names = list(flatten_metrics(read_json(root / metric.file, missing="", remedy=remedy)))
        if metric.name not in names:
            near = difflib.get_close_matches(metric.name, names, n=1) or names[:20]
            raise InputError(
                f"metric.name: {metric.file} has no {shown(metric.name)}; it has "
                f"{', '.join(near)} (if it is new with the parameters as they are now, run the "
                "stage once)"
            )
    # with `base` swept, which stages are upstream differs from point to point
    read = SECTIONS if any(path.endswith(".base") for path in sweep.paths) else plan
    for path in sweep.paths:
        if path.partition(".")[0] not in read:
            raise InputError(
                f"{path}: none of the stages reads it ({', '.join(plan)}); correct it, or add the "
                "stage that does to `stages`"
            )
