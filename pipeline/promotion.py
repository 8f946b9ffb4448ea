"""Is this version better than the champion? If it is by the rule, it takes its place.

The stage `evaluate` has scored the models at hand. The champion is asked the same test examples
here, and both are compared by a paired bootstrap (`gpt.bootstrap.compare`). The registry's aliases
move: `champion` to what is better, `previous` to what was the champion. The decisions stand in
`.pipeline/promotion.json`, on the versions as tags, and in the report.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from filelock import FileLock
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from gpt.bootstrap import Comparison, Score, accuracy, compare, macro_f1, mean, mean_loss
from gpt.errors import InputError, first_problem
from gpt.files import read_json, whole_file, write_json
from pipeline.models import CANDIDATE, version_of
from pipeline.tracking import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from stages.evaluate import EvaluateParams

CHAMPION, PREVIOUS = "champion", "previous"
DECISIONS = Path(".pipeline/promotion.json")
ANSWERS = Path(".pipeline/champion")
"""What the champions answered, a table a model, for the report."""

MODELS = {
    "base": Path("models/pretrain"),
    "classifier": Path("models/classifier"),
    "assistant": Path("models/assistant"),
}
"""The registered models that are compared, and where their newest versions lie."""

_REMEDY = "remove it, and run `gpt-pipeline promote`"
_PREDICTIONS = Path("reports/evaluation/predictions")
_SMALLER_IS_BETTER = ("loss",)


@checked_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class PromotionParams:
    """The rule: by which score a model is compared, and how much better it must be."""

    classifier: Literal["accuracy", "f1_macro"] = "accuracy"
    assistant: Literal["loss", "rouge_l", "chrf"] = "loss"
    at_least: Annotated[float, Field(ge=0)] = 0.0
    """The difference to the champion must be larger than this, in the score's unit."""
    sure: bool = True
    """The whole interval of the difference must be, not the difference alone."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: Annotated[int, Field(gt=0)] = 2000
    seed: Annotated[int, Field(ge=0)] = 123

    def score(self, model: str) -> str:
        """The score that a model is compared by; a base by its loss on the validation text."""
        return "loss" if model == "base" else str(getattr(self, model))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What became of a version, and why.

    Attributes:
        model: its registered name.
        version: the one in question.
        champion: the one that it was compared with; None where there was none.
        score: by which.
        new: its score.
        old: the champion's on the same examples.
        difference: new less old.
        low: of the difference's interval.
        high: of the difference's interval.
        examples: how many were compared.
        promoted: whether it is the champion now.
        why: in one line.
    """

    model: str
    version: int
    champion: int | None = None
    score: str
    new: float | None = None
    old: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    examples: int | None = None
    promoted: bool
    why: str

    def __str__(self) -> str:
        what = "is the champion" if self.promoted else "is not promoted"
        return f"{self.model} version {self.version} {what}: {self.why}"


def read_decisions(root: Path) -> list[Decision]:
    """The last decisions; none where nothing was decided yet.

    Raises:
        InputError: the file holds something else.
    """
    try:
        return TypeAdapter(list[Decision]).validate_python(_said(root).get("decisions", []))
    except ValidationError as error:
        problem = first_problem(error, "decisions")
        raise InputError(f"{root / DECISIONS}: {problem}; {_REMEDY}") from None


def promote_the_better(root: Path, rule: PromotionParams, params: EvaluateParams) -> list[Decision]:
    """Compare what was evaluated with the champions, and let what is better take their places.

    A version that was decided on before, against the same champion and by the same rule, is not
    asked again: its decision stands. All comparisons are made before any alias moves.

    Args:
        root: the project, all its stages up to date.
        rule: when a version is better.
        params: how the evaluated models were asked.

    Returns:
        A decision a model that this MLflow has registered.

    Raises:
        InputError: a champion cannot be asked; no alias has moved then.
        RunError: MLflow cannot be reached.
    """
    client = connect(root)
    with FileLock(root / ".pipeline" / "promotion.lock"):
        md5s = _evaluated(root)
        known = _known(root, rule)
        found = [_decide(root, client, name, md5s[name], rule, params, known) for name in md5s]
        decisions = [each for each in found if each is not None]
        for decision in decisions:
            _carry_out(client, decision)
        _write(root, {"rule": asdict(rule), "models": md5s}, decisions)
    return decisions


def is_decided(root: Path, rule: PromotionParams) -> bool:
    """Whether the models at hand have been compared by this rule; MLflow is not asked."""
    said = _said(root)
    return (said.get("rule"), said.get("models")) == (asdict(rule), _evaluated(root))


def promote_by_hand(root: Path, name: str, version: int | None = None) -> int:
    """Make a version the champion whatever its scores, and whether or not the last one is there.

    Args:
        root: the project.
        name: a registered model.
        version: which; by default the candidate.

    Returns:
        The version.

    Raises:
        InputError: there is no such model or version.
        RunError: MLflow cannot be reached.
    """
    client = connect(root)
    with FileLock(root / ".pipeline" / "promotion.lock"):
        found = version_of(client, name, CANDIDATE if version is None else version)
        if found is None:
            asked = "candidate" if version is None else f"version {version}"
            raise InputError(f"{name}: no {asked} is registered; see the models in `make ui`")
        number = int(found.version)
        decisions = [each for each in read_decisions(root) if each.model != name]
        decision = Decision(model=name, version=number, score="", promoted=True, why="by hand")
        _carry_out(client, decision)
        _write(root, {**_said(root), "models": None}, [*decisions, decision])
    return number


def _known(root: Path, rule: PromotionParams) -> dict[tuple[str, int], Decision]:
    """The decisions that were made by this rule, by model and version."""
    if _said(root).get("rule") != asdict(rule):
        return {}
    return {(each.model, each.version): each for each in read_decisions(root)}


def _said(root: Path) -> dict[str, Any]:
    if not (root / DECISIONS).is_file():
        return {}
    return read_json(root / DECISIONS, missing="no such file", remedy=_REMEDY)


def _write(root: Path, of: dict[str, Any], decisions: list[Decision]) -> None:
    write_json(root / DECISIONS, {**of, "decisions": [asdict(each) for each in decisions]})


def _evaluated(root: Path) -> dict[str, str]:
    """The md5 of each model directory that `evaluate` read, as `dvc.lock` has it."""
    import yaml

    try:
        locked = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))
        read = {each["path"]: each["md5"] for each in locked["stages"]["evaluate"]["deps"]}
        return {name: read[path.as_posix()] for name, path in MODELS.items()}
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        raise InputError(
            f"{root / 'dvc.lock'}: holds no run of evaluate, so there is nothing to compare; run "
            "`gpt-pipeline run`"
        ) from None


# --- one model ------------------------------------------------------------------------------------


def _decide(
    root: Path,
    client: MlflowClient,
    name: str,
    md5: str,
    rule: PromotionParams,
    params: EvaluateParams,
    known: dict[tuple[str, int], Decision],
) -> Decision | None:
    new = version_of(client, name, md5=md5)
    if new is None:  # made elsewhere, and only its files came here
        return None
    version = int(new.version)
    champion = version_of(client, name, CHAMPION)
    before = known.get((name, version))
    score = rule.score(name)
    if champion is None:
        return Decision(
            model=name, version=version, score=score, promoted=True, why="the first version"
        )
    number = int(champion.version)
    if number == version:
        if before is not None and before.promoted:
            return before
        why = "it is the champion already"
        return Decision(model=name, version=version, score=score, promoted=True, why=why)
    if before is not None and before.champion == number and before.score == score:
        return before
    with _files_of(root, champion, name) as directory:
        compared = _compare(root, name, directory, rule, params)
    if isinstance(compared, str):
        return Decision(
            model=name,
            version=version,
            champion=number,
            score=score,
            promoted=False,
            why=compared,
        )
    found, values, n = compared
    promoted, why = _judged(found, rule, score, number)
    return Decision(
        model=name,
        version=version,
        champion=number,
        score=score,
        new=values[0],
        old=values[1],
        difference=found.value,
        low=found.low,
        high=found.high,
        examples=n,
        promoted=promoted,
        why=why,
    )


def _judged(
    found: Comparison, rule: PromotionParams, score: str, champion: int
) -> tuple[bool, str]:
    """Whether the rule is met, and why or why not."""
    gain, low, high = found.value, found.low, found.high
    if score in _SMALLER_IS_BETTER:
        gain, low, high = -gain, -high, -low
    promoted = (low if rule.sure else gain) > rule.at_least
    said = (
        f"{score} {found.value:+.4f} on version {champion}'s, {rule.level:.0%} interval "
        f"{found.low:+.4f} to {found.high:+.4f}"
    )
    if promoted:
        return True, f"better: {said}"
    if found.value == found.low == found.high == 0:
        return False, f"equal to version {champion} on every example"
    if high < 0:
        return False, f"worse: {said}"
    return False, f"not better by the rule: {said}"


def _carry_out(client: MlflowClient, decision: Decision) -> None:
    if decision.promoted:
        _crown(client, decision.model, decision.version)
    verdict = f"{'champion' if decision.promoted else 'not promoted'}: {decision.why}"
    client.set_model_version_tag(decision.model, str(decision.version), "verdict", verdict)


def _crown(client: MlflowClient, name: str, version: int) -> None:
    """Move the aliases, unless the version has them already."""
    champion = version_of(client, name, CHAMPION)
    if champion is not None and int(champion.version) == version:
        return
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(champion.version))
    client.set_registered_model_alias(name, CHAMPION, str(version))


@contextlib.contextmanager
def _files_of(root: Path, version: ModelVersion, name: str) -> Iterator[Path]:
    """The model directory of a registered version, for as long as the block lasts.

    Raises:
        InputError: it cannot be fetched whole.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = f"models:/{name}/{version.version}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder))
            (directory,) = (fetched / "artifacts").iterdir()
        except (MlflowException, OSError, ValueError):
            raise InputError(
                f"{uri}: the champion's files are gone, so nothing can be compared with it; bring "
                f"them back, or name another champion: `gpt-pipeline promote {name}`"
            ) from None
        yield directory


# --- what both make of the same examples ----------------------------------------------------------

_Compared = tuple[Comparison, tuple[float, float], int]
"""The comparison, the new and the old score, and how many examples there were."""


def _compare(
    root: Path, name: str, champion: Path, rule: PromotionParams, params: EvaluateParams
) -> _Compared | str:
    """The model at hand and the champion on the same examples; or why that cannot be."""
    scores = {"base": _bases, "classifier": _classifiers, "assistant": _assistants}
    pair = scores[name](root, champion, rule, params)
    if isinstance(pair, str):
        return pair
    new, old = pair
    found = compare(
        new,
        old,
        smaller_is_better=rule.score(name) in _SMALLER_IS_BETTER,
        resamples=rule.resamples,
        level=rule.level,
        seed=rule.seed,
    )
    return found, (new.value, old.value), new.n


def _device(params: EvaluateParams) -> Any:
    from gpt.device import prepare

    return prepare(params.device, params.threads)


def _bases(
    root: Path, champion: Path, rule: PromotionParams, params: EvaluateParams
) -> tuple[Score, Score] | str:
    from stages.evaluate.bases import window_losses

    new = pd.read_csv(root / _PREDICTIONS / "pretrain.csv", keep_default_na=False)
    old = window_losses(champion, root / "data/tokens", _device(params), params.batch_size)
    where = ["window", "source", "tokens"]
    if not new[where].equals(old[where]):
        return (
            "its tokenizer or context is another than the champion's, so they read no equal "
            "windows; compare their bits a byte, and promote by hand"
        )
    sums = [each.groupby("window")[["loss", "tokens"]].sum() for each in (new, old)]
    one, other = (mean_loss(each["loss"], each["tokens"]) for each in sums)
    return one, other


def _classifiers(
    root: Path, champion: Path, rule: PromotionParams, params: EvaluateParams
) -> tuple[Score, Score]:
    from stages.evaluate.classifier import messages_by_part, predict_classes

    labels, parts = messages_by_part(root / MODELS["classifier"], root / "data/raw/messages")
    new = _read(root, "classifier")
    old, _ = predict_classes(champion, parts["test"], _device(params), params.batch_size)
    _keep(root, "classifier", old["predicted"])
    # a class that only the champion knows is one more
    number = {label: i for i, label in enumerate(dict.fromkeys([*labels, *old["predicted"]]))}
    actual, one, other = (
        [number[label] for label in column]
        for column in (new["actual"], new["predicted"], old["predicted"])
    )
    if rule.classifier == "accuracy":
        return accuracy(actual, one), accuracy(actual, other)
    return macro_f1(actual, one, len(number)), macro_f1(actual, other, len(number))


def _assistants(
    root: Path, champion: Path, rule: PromotionParams, params: EvaluateParams
) -> tuple[Score, Score] | str:
    from gpt.text_scores import score_texts
    from stages.evaluate.assistant import answer_records, records_by_part

    test = records_by_part(root / MODELS["assistant"], root / "data/raw/instructions")["test"]
    new = _read(root, "assistant")
    old, _ = answer_records(
        champion, test, _device(params), params.batch_size, params.max_new_tokens
    )
    _keep(root, "assistant", old["answer"])
    if rule.assistant == "loss":
        tokens = new["tokens"].astype(int)
        if tokens.tolist() != old["tokens"].tolist():
            return (
                "its tokenizer, template or context is another than the champion's, so their "
                "losses are of other tokens; set promotion.assistant to rouge_l or chrf"
            )
        held = tokens > 0
        one, other = (
            mean_loss(each["loss"].astype(float)[held], tokens[held]) for each in (new, old)
        )
        return one, other
    scored = score_texts(old["answer"].tolist(), [record.output.strip() for record in test])
    return mean(new[rule.assistant].astype(float)), mean(getattr(scored, rule.assistant))


def _read(root: Path, name: str) -> pd.DataFrame:
    path = root / _PREDICTIONS / f"{name}.csv"
    return pd.read_csv(path, keep_default_na=False, dtype=str)


def _keep(root: Path, name: str, answers: pd.Series) -> None:
    """The champion's answers, for the report to show beside the others."""
    table = pd.DataFrame({"example": range(len(answers)), "answer": answers.to_numpy()})
    with whole_file(root / ANSWERS / f"{name}.csv") as partial:
        table.to_csv(partial, index=False)
