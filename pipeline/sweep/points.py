"""A sweep's file: which stages, which metric, and the points, of a grid or of a search.

Every point is the project's `params.yaml` with other values at some paths.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpt.base.errors import InputError, shown
from gpt.base.files import read_json
from pipeline.dag.graph import Dag
from pipeline.project.overrides import params_with
from pipeline.project.params import PARAMS_FILE, SECTIONS, read_params
from pipeline.project.yaml_files import read_yaml
from pipeline.tracking.keys import flatten_metrics

if TYPE_CHECKING:
    from optuna import Study, Trial

GOALS = ("minimize", "maximize")
_MOST_POINTS = 500
_DIGITS = 4
"""Of a number that a search proposes: more say nothing, and make a file hard to read."""

_KEYS = ("stages", "metric", "grid", "search", "trials", "seed")


@dataclass(frozen=True, slots=True)
class Metric:
    """What the points are compared by."""

    file: str
    """A metrics file of a stage, relative to the project."""
    name: str
    """In the file; of nested ones joined by a slash."""
    goal: str


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of values."""

    name: str
    """`learning_rate=0.0003, batch_size=8`"""
    values: dict[str, Any]
    """Path in `params.yaml` -> value."""

    @property
    def key(self) -> str:
        """Equal for equal values."""
        return json.dumps(self.values, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both among them; whole ones if both are whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggest(self, trial: Trial, path: str) -> Any:
        """The value of a trial."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = int(self.step or 1)
            return trial.suggest_int(path, self.low, self.high, step=step, log=self.log)
        value = trial.suggest_float(path, self.low, self.high, step=self.step, log=self.log)
        rounded = float(f"{value:.{_DIGITS}g}")
        return min(max(rounded, float(self.low)), float(self.high))

    def ends(self) -> list[Any]:
        """What is checked before any work: the values between are right if these are."""
        return [self.low, self.high]


@dataclass(frozen=True, slots=True)
class Choices:
    """One of some values."""

    choices: list[Any]

    def suggest(self, trial: Trial, path: str) -> Any:
        """The value of a trial; Optuna sees its place only, as it may be a list or a mapping."""
        return self.choices[trial.suggest_categorical(path, range(len(self.choices)))]

    def ends(self) -> list[Any]:
        """All of them."""
        return self.choices


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's file, checked."""

    name: str
    file: Path
    stages: tuple[str, ...]
    metric: Metric
    grid: list[Point] = field(default_factory=list)
    """Empty where `search` is given."""
    search: dict[str, Range | Choices] = field(default_factory=dict)
    trials: int = 0
    seed: int = 0

    @property
    def paths(self) -> list[str]:
        """The swept parameters."""
        return list(self.search or self.grid[0].values)

    def source(self, at_once: int) -> Source:
        """Gives the points.

        Args:
            at_once: so many points are worked at together: a search proposes that many before it
                hears of their results, so what it proposes never depends on which ends first.
        """
        return _Search(self, at_once) if self.search else _Grid(self)


class Source(Protocol):
    """Where the points come from."""

    def ask(self) -> list[Point]:
        """The next points, which may be worked at in any order; none at the end."""

    def tell(self, results: Sequence[float | None]) -> None:
        """What the points of the last `ask` came to, in their order; None for one that failed."""


class _Grid:
    def __init__(self, sweep: Sweep) -> None:
        self._points = sweep.grid

    def ask(self) -> list[Point]:
        points, self._points = self._points, []
        return points

    def tell(self, results: Sequence[float | None]) -> None:
        pass


class _Search:
    def __init__(self, sweep: Sweep, at_once: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep = sweep
        self._at_once = at_once
        self._left = sweep.trials
        self._asked: list[Trial] = []
        self._study: Study = optuna.create_study(
            direction=sweep.metric.goal, sampler=optuna.samplers.TPESampler(seed=sweep.seed)
        )

    def ask(self) -> list[Point]:
        number = min(self._at_once, self._left)
        self._left -= number
        self._asked = [self._study.ask() for _ in range(number)]
        names = _short_names(list(self._sweep.search))
        return [
            _point(
                names, {path: of.suggest(trial, path) for path, of in self._sweep.search.items()}
            )
            for trial in self._asked
        ]

    def tell(self, results: Sequence[float | None]) -> None:
        from optuna.trial import TrialState

        for trial, value in zip(self._asked, results, strict=True):
            if value is None:
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._study.tell(trial, value)


def read_sweep(root: Path, file: Path) -> Sweep:
    """Read a sweep; every point is checked as `params.yaml` is, before any work.

    Of a search the ends of every range and all choices are checked.

    Args:
        root: the project; its `params.yaml` is what the points change.
        file: YAML: `stages`, `metric` (`file`, `name`, `goal`), and `grid` (path -> values), or
            `search` (path -> `low`, `high` and perhaps `log` and `step`, or `choices`) with
            `trials` and perhaps `seed`.

    Raises:
        InputError: the file cannot be read, or a point is impossible; each named.
    """
    raw, base = read_yaml(file), read_params(root / PARAMS_FILE)
    try:
        return _sweep(root, file, raw, base)
    except _FileError as error:
        raise InputError(f"{file}: {error}") from None


class _FileError(Exception):
    """What is wrong in a sweep's file."""


def _sweep(root: Path, file: Path, raw: Any, base: Any) -> Sweep:
    if not isinstance(raw, dict) or ("grid" in raw) == ("search" in raw):
        raise _FileError(
            "must hold `stages`, `metric` and either `grid` or `search`; see docs/sweeps.md"
        )
    if unknown := [str(key) for key in raw if key not in _KEYS]:
        raise _FileError(f"{unknown[0]}: unknown; known here: {', '.join(_KEYS)}")
    if "grid" in raw and (extra := [key for key in ("trials", "seed") if key in raw]):
        raise _FileError(f"{extra[0]}: is a search's; take it away, or write `search` for `grid`")
    stages = _stages(raw.get("stages"))
    metric = _metric(raw.get("metric"))
    name = re.sub(r"[^\w.-]+", "-", file.stem)
    if "grid" in raw:
        points = _grid(raw["grid"])
        sweep = Sweep(name, file, stages, metric, grid=points)
    else:
        points, search = _search(raw["search"])
        trials, seed = raw.get("trials"), raw.get("seed", 0)
        if type(trials) is not int or not 0 < trials <= _MOST_POINTS:
            raise _FileError(
                f"trials: must be a whole number from 1 to {_MOST_POINTS} (got {trials})"
            )
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise _FileError(f"seed: must be a whole number from 0 (got {seed})")
        sweep = Sweep(name, file, stages, metric, search=search, trials=trials, seed=seed)
    for path in sweep.paths:
        _check_section(path)
    for point in points:
        try:
            params_with(base, point.values)
        except InputError as error:
            raise _FileError(f"point {point.name}: {error}") from None
    _check_stages(root, sweep)
    return sweep


def _stages(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not raw:
        raise _FileError("stages: must be a list of the stages to bring up to date in each point")
    for each in raw:
        if each not in SECTIONS:
            raise _FileError(f"stages: {each}: no such stage; use one of {', '.join(SECTIONS)}")
    return tuple(dict.fromkeys(raw))


def _metric(raw: Any) -> Metric:
    if not isinstance(raw, dict) or set(raw) != {"file", "name", "goal"}:
        raise _FileError("metric: must hold `file`, `name` and `goal`, and nothing else")
    metric = Metric(str(raw["file"]), str(raw["name"]), str(raw["goal"]))
    if metric.goal not in GOALS:
        raise _FileError(f"metric.goal: must be {' or '.join(GOALS)} (got {metric.goal})")
    return metric


def _check_stages(root: Path, sweep: Sweep) -> None:
    """Refuse a metric that the stages do not write, and a parameter that none of them reads."""
    dag = Dag(root)
    plan = dag.plan(sweep.stages)
    files = [path for stage in plan for path in dag.stages[stage].metrics]
    if sweep.metric.file not in files:
        raise _FileError(
            f"metric.file: {sweep.metric.file} is no metrics file of these stages; use one of "
            f"{', '.join(files)}"
        )
    _check_metric(root, sweep.metric)
    # with `base` swept, which stages are upstream differs from point to point
    edges_differ = any(path.rpartition(".")[2] == "base" for path in sweep.paths)
    for path in sweep.paths:
        if path.partition(".")[0] not in plan and not edges_differ:
            raise _FileError(
                f"{path}: none of the stages reads it ({', '.join(plan)}); add the one that does "
                "to `stages`"
            )


def _check_metric(root: Path, metric: Metric) -> None:
    """Refuse a name that the stage did not write when it ran last, while nothing is trained yet."""
    if not (root / metric.file).is_file():
        return
    remedy = "`git checkout` it, or run its stage again"
    names = list(flatten_metrics(read_json(root / metric.file, missing="", remedy=remedy)))
    if metric.name not in names:
        near = difflib.get_close_matches(metric.name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:20])}"
        raise _FileError(
            f"metric.name: {metric.file} has no {shown(metric.name)}; {hint} (if it is new with "
            "the parameters as they are now, run the stage once)"
        )


def _check_section(path: str) -> None:
    section = path.partition(".")[0]
    if section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(SECTIONS)}"
        raise _FileError(f"{path}: no stage has the section {section}; {hint}")


def _grid(raw: Any) -> list[Point]:
    if not isinstance(raw, dict) or not raw:
        raise _FileError("grid: must hold parameters by their paths, each with a list of values")
    for path, values in raw.items():
        if not isinstance(values, list) or not values:
            raise _FileError(f"grid: {path}: must be a list of values")
    number = math.prod(map(len, raw.values()))
    if number > _MOST_POINTS:
        raise _FileError(f"grid: {number} points, and at most {_MOST_POINTS} are possible")
    names = _short_names(list(map(str, raw)))
    points = [
        _point(names, dict(zip(map(str, raw), values, strict=True)))
        for values in itertools.product(*raw.values())
    ]
    if len({point.key for point in points}) < len(points):
        raise _FileError("grid: a parameter has the same value twice; take one away")
    return points


def _search(raw: Any) -> tuple[list[Point], dict[str, Range | Choices]]:
    """The points at the ends of the space, and the space."""
    if not isinstance(raw, dict) or not raw:
        raise _FileError("search: must hold parameters by their paths, each with what to try")
    space = {str(path): _dimension(str(path), given) for path, given in raw.items()}
    first = {path: each.ends()[0] for path, each in space.items()}
    names = _short_names(list(space))
    corners = [{**first, path: end} for path, each in space.items() for end in each.ends()]
    return [_point(names, values) for values in corners], space


def _dimension(path: str, raw: Any) -> Range | Choices:
    if isinstance(raw, dict) and set(raw) == {"choices"}:
        if not isinstance(raw["choices"], list) or not raw["choices"]:
            raise _FileError(f"search: {path}: choices must be a list of values")
        return Choices(list(raw["choices"]))
    if not isinstance(raw, dict) or not {"low", "high"} <= set(raw) <= {
        *("low", "high", "log", "step"),
    }:
        raise _FileError(
            f"search: {path}: must hold `low`, `high` and perhaps `log` and `step`, or `choices`"
        )
    low, high, step = raw["low"], raw["high"], raw.get("step")
    log = raw.get("log", False)
    for key, value in (("low", low), ("high", high), *((("step", step),) if "step" in raw else ())):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise _FileError(f"search: {path}: {key} must be a number (got {raw[key]})")
    if not isinstance(log, bool):
        raise _FileError(f"search: {path}: log must be true or false (got {log})")
    if low >= high:
        raise _FileError(f"search: {path}: low must be less than high")
    if log and (low <= 0 or step is not None):
        raise _FileError(f"search: {path}: with log, low must be above 0, and there is no step")
    whole = type(low) is int and type(high) is int
    if step is not None and (step <= 0 or step > high - low or (whole and type(step) is not int)):
        raise _FileError(f"search: {path}: step must fit between low and high, whole if they are")
    if not whole:
        low, high = float(low), float(high)
    return Range(low, high, log, step)


def _point(names: Mapping[str, str], values: dict[str, Any]) -> Point:
    said = ", ".join(f"{names[path]}={_shown(value)}" for path, value in values.items())
    return Point(said, values)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its end, as long as it takes to tell it from the others'."""

    def ends(path: str) -> Iterator[str]:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            yield ".".join(parts[-length:])

    def alone(path: str, end: str) -> bool:
        return not any(each != path and f".{each}".endswith(f".{end}") for each in paths)

    return {path: next((end for end in ends(path) if alone(path, end)), path) for path in paths}
