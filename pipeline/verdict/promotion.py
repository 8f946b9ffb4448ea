"""Is this version better than the champion? If it is by the rule, it takes its place.

The stage `evaluate` has scored the models at hand. The champion is asked the same test examples
(`pipeline.verdict.same_examples`), and both are compared by a paired bootstrap. The registry's
aliases move: `champion` to the better version, `previous` to the former champion. The decisions are
kept in `.pipeline/promotion.json`, in tags of the versions, and in the report. What a person chose
is kept in a tag of the registered model, so that it holds for every checkout and machine of this
registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from filelock import FileLock
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from gpt.base.errors import InputError, first_problem
from gpt.base.files import read_json, whole_file, write_json
from gpt.scores.bootstrap import Comparison, compare
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.dag.lock import read_lock
from pipeline.project.file_locks import stage_lock
from pipeline.project.folders import shared_folder
from pipeline.project.settings import PromotionParams
from pipeline.tracking.connection import connect, named_failure
from pipeline.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, files_of, version_of

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import MlflowClient, ModelVersion
    from stages.evaluate import EvaluateParams

BY_HAND = "by_hand"
"""The tag of a registered model that says which version a person chose, and over which."""
DECISIONS = Path(".pipeline/promotion.json")
CHAMPION_ANSWERS = Path(".pipeline/champion")
"""What the champion answered where it was compared, for the report: `assistant.csv`."""

COMPARED = {
    "base": Path("models/pretrain"),
    "classifier": Path("models/classifier"),
    "assistant": Path("models/assistant"),
}
"""The registered models that are compared, and where their newest versions lie."""

_REMOVE_IT = "remove it, and run `gpt-pipeline promote`"
_AS_BEFORE, _CHOSEN = "as before", "by hand"
_ROUNDING = 1e-5
"""A smaller difference is one of rounding: the champion's scores are computed anew, perhaps on
another processor than those of the version at hand."""
PREDICTIONS = Path("reports/evaluation/predictions")
_SMALLER_IS_BETTER = ("loss",)


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


def _as_list(over: Any) -> Any:
    return [over] if isinstance(over, int) else over or []


@dataclass(frozen=True, slots=True)
class _ByHand:
    """The version that a person chose, and the versions over which (former releases: one)."""

    version: int
    over: Annotated[list[int], BeforeValidator(_as_list)]


@dataclass(kw_only=True, slots=True)
class _Record:
    """What `.pipeline/promotion.json` holds: the decisions, and what they were made from."""

    rule: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    """The md5 of what `evaluate` read besides the models."""
    models: dict[str, str] | None = None
    """The md5 of each model at hand; None until all of them are decided on."""
    decisions: list[Decision] = field(default_factory=list)
    """The last on each model."""
    earlier: list[Decision] = field(default_factory=list)
    """Those on other versions, under the same rule and data."""
    by_hand: dict[str, _ByHand] = field(default_factory=dict)
    """Of former releases: what the tag says now."""

    def of(self, model: str, version: int) -> Decision | None:
        """The decision on a version."""
        made = [*self.decisions, *self.earlier]
        return next((d for d in made if (d.model, d.version) == (model, version)), None)

    def add(self, root: Path, decision: Decision) -> None:
        """Put a decision in the place of the last one on its model, and write the file."""
        key = (decision.model, decision.version)
        self.earlier = [each for each in self.earlier if (each.model, each.version) != key]
        others = [each for each in self.decisions if each.model != decision.model]
        self.decisions = [*others, decision]
        write_json(root / DECISIONS, asdict(self))


def _read_record(root: Path) -> _Record:
    path = root / DECISIONS
    if not path.is_file():
        return _Record()
    said = read_json(path, missing="no such file", remedy=_REMOVE_IT)
    try:
        return TypeAdapter(_Record).validate_python(said)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}; {_REMOVE_IT}") from None


def read_decisions(root: Path) -> list[Decision]:
    """The last decision on each model; none where nothing was decided yet.

    Raises:
        InputError: the file holds something else.
    """
    return _read_record(root).decisions


def promote_the_better(root: Path, rule: PromotionParams, params: EvaluateParams) -> list[Decision]:
    """Compare what was evaluated with the champions, and let what is better take their places.

    A version that was decided on before, against the same champion and by the same rule, is not
    asked again: its decision stands. All comparisons are made before any alias moves.

    Args:
        root: the project, all its stages up to date.
        rule: when a version is better.
        params: how the evaluated models were asked.

    Returns:
        A decision for each model that this MLflow has registered.

    Raises:
        InputError: a champion cannot be asked; no alias has moved then.
        RunError: MLflow cannot be reached.
    """
    with _registry(root, "promotion") as client:
        models, data = _evaluated(root)
        record = _read_record(root)
        if (record.rule, record.data) != (asdict(rule), data):
            record = _Record(rule=asdict(rule), data=data, by_hand=record.by_hand)
        choice = _Choice(root, client, rule, params, record)
        decisions = [each for each in map(choice.decide, models, models.values()) if each]
        earlier = [*record.earlier, *record.decisions]
        record.models, record.decisions, record.earlier = None, [], earlier
        for decision in decisions:
            _carry_out(root, client, decision)
            record.add(root, decision)  # none is lost if the next fails
        record.models = models
        write_json(root / DECISIONS, asdict(record))
    return decisions


def is_decided(root: Path, rule: PromotionParams) -> bool:
    """Whether the models at hand have been compared by this rule; MLflow is not asked.

    Raises:
        InputError: there is no evaluation, or the file of decisions holds something else.
    """
    record = _read_record(root)
    return (record.rule, record.models, record.data) == (asdict(rule), *_evaluated(root))


def promote_by_hand(root: Path, name: str, version: int | None = None) -> int:
    """Make a version the champion whatever its scores, and whether or not the last one is there.

    It stays the champion until a version that was not at hand now is better.

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
    with _registry(root, "promotion") as client:
        found = version_of(client, name, CANDIDATE if version is None else version)
        if found is None:
            asked = "candidate" if version is None else f"version {version}"
            raise _none_registered(client, name, asked)
        _choose(root, client, name, int(found.version))
    return int(found.version)


def roll_back(root: Path, name: str) -> tuple[int, int]:
    """Make the previous champion the champion again; what was the champion is `previous` then.

    It stays the champion until a version is better that is neither the one that it replaces nor at
    hand now.

    Args:
        root: the project.
        name: a registered model.

    Returns:
        The version that is the champion now, and the one that was.

    Raises:
        InputError: there is no such model, or no other version that was its champion.
        RunError: MLflow cannot be reached.
    """
    with _registry(root, "rollback") as client:
        now, before = (version_of(client, name, alias) for alias in (CHAMPION, PREVIOUS))
        if now is None:
            raise _none_registered(client, name, "champion")
        was, number = int(now.version), int(before.version) if before is not None else 0
        if number in (0, was):
            raise InputError(
                f"{name}: no version but {was} was its champion, so there is nothing to go back "
                f"to; `gpt-pipeline promote {name} --version N` makes another one the champion"
            )
        _choose(root, client, name, number, over=was)
    return number, was


def _none_registered(client: MlflowClient, name: str, asked: str) -> InputError:
    """That a model has no such version, and which models there are."""
    names = sorted(each.name for each in client.search_registered_models())
    return InputError(
        f"{name}: no {asked} is registered; there are {', '.join(names) or 'no models'}: see their "
        "versions in `make ui`"
    )


def _choose(
    root: Path, client: MlflowClient, name: str, version: int, over: int | None = None
) -> None:
    """Crown a version by hand: over the one at hand, and over another one that was rejected."""
    rejected = {over} if over is not None else set()
    with contextlib.suppress(InputError):  # nothing was evaluated: nothing is at hand
        md5 = _evaluated(root)[0].get(name)  # none of a model that evaluate does not ask
        here = version_of(client, name, md5=md5) if md5 else None
        rejected |= {int(here.version)} if here is not None else set()
    record = _read_record(root)
    decision = Decision(model=name, version=version, score="", promoted=True, why=_CHOSEN)
    # the reason first: an alias that moves without it would be moved back
    chosen = asdict(_ByHand(version, sorted(rejected)))
    client.set_registered_model_tag(name, BY_HAND, json.dumps(chosen))
    _carry_out(root, client, decision)
    record.by_hand.pop(name, None)
    record.models = None
    record.add(root, decision)


def _evaluated(root: Path) -> tuple[dict[str, str], str]:
    """What `evaluate` read, as `dvc.lock` has it: the md5 of each compared model, and of the rest,
    its parameters and its code together."""
    try:
        entry = read_lock(root)["evaluate"]
        read = entry.inputs | entry.code
        models = {name: read.pop(path.as_posix()) for name, path in COMPARED.items()}
    except KeyError:
        raise InputError(
            f"{root / LOCK_FILE}: holds no run of evaluate, so there is nothing to compare; run "
            "`gpt-pipeline run`"
        ) from None
    rest = json.dumps([read, entry.params], sort_keys=True)
    return models, hashlib.md5(rest.encode(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _registry(root: Path, what: str) -> Iterator[MlflowClient]:
    """The registry; within the block nobody else promotes, and no evaluation changes anything."""
    from pipeline.tracking.mlflow_classes import MlflowException

    client = connect(root)
    place = shared_folder(root) / ".pipeline"  # an agent's flow runs have a checkout each
    place.mkdir(exist_ok=True)
    with (
        FileLock(place / "promotion.lock"),
        stage_lock(root, "evaluate"),
        named_failure(root, f"failed in the {what}", MlflowException),
    ):
        yield client


@dataclass(frozen=True, slots=True)
class _Choice:
    """Decides on one model after the other.

    Attributes:
        root: the project.
        client: of the registry.
        rule: when a version is better.
        params: how the evaluated models were asked.
        record: the decisions that stand.
    """

    root: Path
    client: MlflowClient
    rule: PromotionParams
    params: EvaluateParams
    record: _Record

    def decide(self, name: str, md5: str) -> Decision | None:
        """What becomes of the model at hand; None if it is not registered here."""
        new = version_of(self.client, name, md5=md5)
        if new is None:  # made elsewhere, and only its files came here
            return None
        version, score = int(new.version), self.rule.score(name)
        decision = Decision(model=name, version=version, score=score, promoted=True, why="")
        champion = version_of(self.client, name, CHAMPION)
        if champion is None:
            first = "the first version" if version == 1 else "there was no champion"
            return replace(decision, why=first)
        number = int(champion.version)
        before = self.record.of(name, version)
        if number == version:
            return before if before and before.promoted else replace(decision, why=_AS_BEFORE)
        decision = replace(decision, champion=number, promoted=False)
        if version in self._rejected(name, number):
            return replace(decision, why=f"version {number} was chosen by hand")
        if before is not None and (before.champion, before.score) == (number, score):
            if not before.promoted:
                return before
            return replace(before, promoted=False, why=f"version {number} was chosen again by hand")
        return self._compare(decision, champion)

    def _rejected(self, name: str, champion: int) -> list[int]:
        """The versions over which a person chose the champion; none where nobody chose it."""
        tag = self.client.get_registered_model(name).tags.get(BY_HAND)
        try:
            chosen = (
                TypeAdapter(_ByHand).validate_json(tag) if tag else self.record.by_hand.get(name)
            )
        except ValidationError:
            raise InputError(
                f"{name}: its tag {BY_HAND} in MLflow is not what a promotion writes there; remove "
                f"the tag, or choose again: `gpt-pipeline promote {name} --version {champion}`"
            ) from None
        return chosen.over if chosen and chosen.version == champion else []

    def _compare(self, decision: Decision, champion: ModelVersion) -> Decision:
        """The decision by the scores of both models on the same examples."""
        from pipeline.verdict.same_examples import NotComparableError, SameExamples

        name, rule = decision.model, self.rule
        remedy = (
            ", so nothing can be compared with it; bring them back, or name another champion: "
            f"`gpt-pipeline promote {name}`"
        )
        here = self.root / COMPARED[name]
        with files_of(champion, "the champion's", remedy) as there:
            try:
                pair = SameExamples(
                    self.root, self.root / PREDICTIONS, here, there, rule, self.params
                ).scores(name)
            except NotComparableError as error:
                return replace(decision, why=str(error))
            except OSError as error:
                where = error.filename or self.root / PREDICTIONS
                raise InputError(
                    f"{where}: {error.strerror or error}; run `gpt-pipeline run` and promote again"
                ) from None
        if pair.answers is not None:  # for the report to show beside the others
            with whole_file(self.root / CHAMPION_ANSWERS / f"{name}.csv") as partial:
                pair.answers.assign(champion=decision.champion).to_csv(partial, index=False)
        found = compare(
            pair.new,
            pair.old,
            smaller_is_better=decision.score in _SMALLER_IS_BETTER,
            resamples=rule.resamples,
            level=rule.level,
            seed=rule.seed,
        )
        promoted, why = _judged(found, rule, decision.score, int(champion.version))
        return replace(
            decision,
            new=pair.new.value,
            old=pair.old.value,
            difference=found.value,
            low=found.low,
            high=found.high,
            examples=pair.new.n,
            promoted=promoted,
            why=why,
        )


def _judged(
    found: Comparison, rule: PromotionParams, score: str, champion: int
) -> tuple[bool, str]:
    """Whether the rule is met, and why or why not."""
    sign = -1 if score in _SMALLER_IS_BETTER else 1
    gain = min(sign * found.low, sign * found.high) if rule.sure else sign * found.value
    said = (
        f"{score} {found.value:+.4f} on version {champion}'s, {rule.level * 100:.4g} % interval "
        f"{found.low:+.4f} to {found.high:+.4f}"
    )
    if gain > max(rule.at_least, _ROUNDING):
        return True, f"better: {said}"
    if max(map(abs, (found.value, found.low, found.high))) <= _ROUNDING:
        return False, f"equal to version {champion} on every example"
    if found.worse:
        return False, f"worse: {said}"
    return False, f"not better by the rule: {said}"


def _carry_out(root: Path, client: MlflowClient, decision: Decision) -> None:
    """Tag the version, and move the aliases if it is promoted and has them not already."""
    name, version = decision.model, str(decision.version)
    if decision.difference is None:  # nothing was compared
        (root / CHAMPION_ANSWERS / f"{name}.csv").unlink(missing_ok=True)
    if decision.why != _AS_BEFORE:  # else the version says since when and why
        verdict = f"{'champion' if decision.promoted else 'not promoted'}: {decision.why}"
        client.set_model_version_tag(name, version, "verdict", verdict)
    champion = version_of(client, name, CHAMPION)
    if not decision.promoted or (champion is not None and str(champion.version) == version):
        return
    if decision.why != _CHOSEN:  # what a person chose is past
        client.delete_registered_model_tag(name, BY_HAND)
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(champion.version))
    client.set_registered_model_alias(name, CHAMPION, version)
