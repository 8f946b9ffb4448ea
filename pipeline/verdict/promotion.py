"""Is this version better than the champion? If it is by the rule, it takes its place.

The stage `evaluate` has scored the models at hand. The champion is asked the same test examples
here, and both are compared by a paired bootstrap (`gpt.scores.bootstrap.compare`). The registry's
aliases
move: `champion` to what is better, `previous` to what was the champion. The decisions stand in
`.pipeline/promotion.json`, on the versions as tags, and in the report. What a person chose stands
on the registered model as a tag, so that it holds for every checkout and machine of this registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from gpt.base.errors import InputError, first_problem
from gpt.base.files import read_json, whole_file, write_json
from gpt.scores.bootstrap import Comparison, Score, accuracy, compare, macro_f1, mean, mean_loss
from pipeline.dag.dvc_files import LOCK_FILE
from pipeline.dag.lock import read_lock
from pipeline.project.file_locks import stage_lock
from pipeline.project.settings import PromotionParams
from pipeline.tracking.connection import connect, named_failure
from pipeline.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, files_of, version_of

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.mlflow_classes import MlflowClient, ModelVersion
    from stages.evaluate import EvaluateParams

BY_HAND = "by_hand"
"""The tag of a registered model that says which version a person chose, and over which."""
DECISIONS = Path(".pipeline/promotion.json")
ANSWERS = Path(".pipeline/champion")
"""What the champion answered where it was compared, for the report: `assistant.csv`."""

MODELS = {
    "base": Path("models/pretrain"),
    "classifier": Path("models/classifier"),
    "assistant": Path("models/assistant"),
}
"""The registered models that are compared, and where their newest versions lie."""

_REMEDY = "remove it, and run `gpt-pipeline promote`"
_ALREADY, _BY_HAND = "as before", "by hand"
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


def read_decisions(root: Path) -> list[Decision]:
    """The last decisions; none where nothing was decided yet.

    Raises:
        InputError: the file holds something else.
    """
    return _parsed(root, _said(root), "decisions")


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
    from pipeline.tracking.mlflow_classes import MlflowException

    client = connect(root)
    with _alone(root), named_failure(root, "failed in the promotion", MlflowException):
        evaluated = _evaluated(root)
        said = _said(root)
        known = _known(root, said, rule, evaluated)
        asked = _Asked(root, client, rule, params, known, said.get(BY_HAND, {}))
        found = [_decide(asked, name, md5) for name, md5 in evaluated.models.items()]
        decisions: list[Decision] = []
        for decision in (each for each in found if each is not None):
            _carry_out(client, decision)
            _keep(root, decision, asked.answers.get(decision.model))
            decisions.append(decision)
            # none is lost if the next fails; without the models it is not the whole of them
            _write(root, {**said, **_key(rule, evaluated), "models": None}, decisions, known)
        _write(root, {**said, **_key(rule, evaluated)}, decisions, known)
    return decisions


def is_decided(root: Path, rule: PromotionParams) -> bool:
    """Whether the models at hand have been compared by this rule; MLflow is not asked.

    Raises:
        InputError: there is no evaluation, or the file of decisions holds something else.
    """
    said = _said(root)
    return {key: said.get(key) for key in _KEY} == _key(rule, _evaluated(root))


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
    from pipeline.tracking.mlflow_classes import MlflowException

    client = connect(root)
    with _alone(root), named_failure(root, "failed in the promotion", MlflowException):
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
    from pipeline.tracking.mlflow_classes import MlflowException

    client = connect(root)
    with _alone(root), named_failure(root, "failed in the rollback", MlflowException):
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
    """That a model has no such version, or that there is no such model and which there are."""
    names = sorted(each.name for each in client.search_registered_models())
    if name in names:
        return InputError(f"{name}: no {asked} is registered; see its versions in `make ui`")
    told = f"use one of {', '.join(names)}" if names else "none is registered; run `make run` first"
    return InputError(f"{name}: no such model; {told}")


def _choose(
    root: Path, client: MlflowClient, name: str, version: int, over: int | None = None
) -> None:
    """Crown a version by hand: over the one at hand, and over another one that was rejected."""
    rejected = {over} if over is not None else set()
    with contextlib.suppress(InputError):  # nothing was evaluated: nothing is at hand
        md5 = _evaluated(root).models.get(name, "")
        here = version_of(client, name, md5=md5) if md5 else None
        rejected |= {int(here.version)} if here is not None else set()
    said = _said(root)
    decisions = [each for each in read_decisions(root) if each.model != name]
    decision = Decision(model=name, version=version, score="", promoted=True, why=_BY_HAND)
    # the reason first: an alias that moves without it would be moved back
    chosen = json.dumps({"version": version, "over": sorted(rejected)})
    client.set_registered_model_tag(name, BY_HAND, chosen)
    _carry_out(client, decision)
    _keep(root, decision, None)
    earlier = _parsed(root, said, "earlier")
    known = {(each.model, each.version): each for each in earlier}
    noted = {key: value for key, value in said.get(BY_HAND, {}).items() if key != name}
    state = {**said, "models": None, BY_HAND: noted}
    _write(root, state, [*decisions, decision], known)


# --- what was decided -----------------------------------------------------------------------------

_KEY = ("rule", "data", "models")
"""What decisions stand for: other ones, and all is asked again."""


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """What `evaluate` read, as `dvc.lock` has it: the md5 of each compared model, and of the rest,
    its parameters and its code together."""

    models: dict[str, str]
    data: str


def _evaluated(root: Path) -> _Evaluated:
    try:
        entry = read_lock(root)["evaluate"]
        read = entry.inputs | entry.code
        models = {name: read.pop(path.as_posix()) for name, path in MODELS.items()}
    except KeyError:
        raise InputError(
            f"{root / LOCK_FILE}: holds no run of evaluate, so there is nothing to compare; run "
            "`gpt-pipeline run`"
        ) from None
    rest = json.dumps([read, entry.params], sort_keys=True)
    return _Evaluated(models, hashlib.md5(rest.encode(), usedforsecurity=False).hexdigest())


def _key(rule: PromotionParams, evaluated: _Evaluated) -> dict[str, Any]:
    return dict(zip(_KEY, (asdict(rule), evaluated.data, evaluated.models), strict=True))


def _known(
    root: Path, said: dict[str, Any], rule: PromotionParams, evaluated: _Evaluated
) -> dict[tuple[str, int], Decision]:
    """The decisions that were made by this rule on these examples, by model and version."""
    if (said.get("rule"), said.get("data")) != (asdict(rule), evaluated.data):
        return {}
    made = [*_parsed(root, said, "earlier"), *_parsed(root, said, "decisions")]
    return {(each.model, each.version): each for each in made}


def _said(root: Path) -> dict[str, Any]:
    if not (root / DECISIONS).is_file():
        return {}
    return read_json(root / DECISIONS, missing="no such file", remedy=_REMEDY)


def _parsed(root: Path, said: dict[str, Any], key: str) -> list[Decision]:
    try:
        return TypeAdapter(list[Decision]).validate_python(said.get(key, []))
    except ValidationError as error:
        problem = first_problem(error, key)
        raise InputError(f"{root / DECISIONS}: {problem}; {_REMEDY}") from None


def _write(
    root: Path,
    of: dict[str, Any],
    decisions: list[Decision],
    known: dict[tuple[str, int], Decision],
) -> None:
    now = {(each.model, each.version) for each in decisions}
    earlier = [asdict(each) for key, each in known.items() if key not in now]
    made = [asdict(each) for each in decisions]
    write_json(root / DECISIONS, {**of, "decisions": made, "earlier": earlier})


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Within the block nobody else promotes, and no evaluation changes what is compared."""
    (root / ".pipeline").mkdir(exist_ok=True)
    with FileLock(root / ".pipeline" / "promotion.lock"), stage_lock(root, "evaluate"):
        yield


# --- one model ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every decision is made from.

    Attributes:
        root: the project.
        client: of the registry.
        rule: when a version is better.
        params: how the evaluated models were asked.
        known: the decisions that stand, by model and version.
        noted: what a person chose before the registry kept it: by model the version, and over
            which.
        answers: filled: what a champion answered that writes texts, a table a model.
    """

    root: Path
    client: MlflowClient
    rule: PromotionParams
    params: EvaluateParams
    known: dict[tuple[str, int], Decision]
    noted: dict[str, dict[str, int | None]]
    answers: dict[str, pd.DataFrame] = field(default_factory=dict)


def _decide(asked: _Asked, name: str, md5: str) -> Decision | None:
    new = version_of(asked.client, name, md5=md5)
    if new is None:  # made elsewhere, and only its files came here
        return None
    version = int(new.version)
    champion = version_of(asked.client, name, CHAMPION)
    before = asked.known.get((name, version))
    score = asked.rule.score(name)
    if champion is None:
        why = "the first version" if version == 1 else "there was no champion"
        return Decision(model=name, version=version, score=score, promoted=True, why=why)
    number = int(champion.version)
    if number == version:
        if before is not None and before.promoted:
            return before
        return Decision(model=name, version=version, score=score, promoted=True, why=_ALREADY)
    kept = Decision(
        model=name, version=version, champion=number, score=score, promoted=False, why=""
    )
    if version in _rejected(asked, name, number):
        return replace(kept, why=f"version {number} was chosen by hand")
    if before is not None and before.champion == number and before.score == score:
        if not before.promoted:
            return before
        return replace(before, promoted=False, why=f"version {number} was chosen again by hand")
    compared = _compare(asked, name, champion)
    if isinstance(compared, str):
        return replace(kept, why=compared)
    found, values, n = compared
    promoted, why = _judged(found, asked.rule, score, number)
    return replace(
        kept,
        new=values[0],
        old=values[1],
        difference=found.value,
        low=found.low,
        high=found.high,
        examples=n,
        promoted=promoted,
        why=why,
    )


def _rejected(asked: _Asked, name: str, champion: int) -> list[int]:
    """The versions over which a person chose the champion; none where nobody chose it."""
    tag = asked.client.get_registered_model(name).tags.get(BY_HAND)
    if tag is None:  # an earlier version of this program noted it in the file of decisions
        noted = asked.noted.get(name, {})
        over = noted.get("over")
        return [over] if noted.get("version") == champion and over is not None else []
    try:
        said = TypeAdapter(_ByHand).validate_json(tag)
    except ValidationError:
        raise InputError(
            f"{name}: its tag {BY_HAND} in MLflow is not what a promotion writes there; remove the "
            f"tag, or choose again: `gpt-pipeline promote {name} --version {champion}`"
        ) from None
    return said.over if said.version == champion else []


@dataclass(frozen=True, slots=True)
class _ByHand:
    """What the tag says."""

    version: int
    over: list[int]


def _judged(
    found: Comparison, rule: PromotionParams, score: str, champion: int
) -> tuple[bool, str]:
    """Whether the rule is met, and why or why not."""
    gain, low, high = found.value, found.low, found.high
    if score in _SMALLER_IS_BETTER:
        gain, low, high = -gain, -high, -low
    promoted = (low if rule.sure else gain) > max(rule.at_least, _ROUNDING)
    said = (
        f"{score} {found.value:+.4f} on version {champion}'s, {rule.level * 100:.4g} % interval "
        f"{found.low:+.4f} to {found.high:+.4f}"
    )
    if promoted:
        return True, f"better: {said}"
    if max(map(abs, (found.value, found.low, found.high))) <= _ROUNDING:
        return False, f"equal to version {champion} on every example"
    if found.worse:
        return False, f"worse: {said}"
    return False, f"not better by the rule: {said}"


def _carry_out(client: MlflowClient, decision: Decision) -> None:
    if decision.why != _ALREADY:  # else the version says since when and why
        verdict = f"{'champion' if decision.promoted else 'not promoted'}: {decision.why}"
        client.set_model_version_tag(decision.model, str(decision.version), "verdict", verdict)
    if decision.promoted:
        _crown(client, decision.model, decision.version, by_hand=decision.why == _BY_HAND)


def _crown(client: MlflowClient, name: str, version: int, by_hand: bool) -> None:
    """Move the aliases, unless the version has them already; what was chosen by hand is past."""
    champion = version_of(client, name, CHAMPION)
    if champion is not None and int(champion.version) == version:
        return
    if not by_hand:
        client.delete_registered_model_tag(name, BY_HAND)
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(champion.version))
    client.set_registered_model_alias(name, CHAMPION, str(version))


# --- what both make of the same examples ----------------------------------------------------------

_Compared = tuple[Comparison, tuple[float, float], int]
"""The comparison, the new and the old score, and how many examples there were."""

_OTHER_SPLIT = (
    "the champion learnt from another split and may know the test examples; promote by hand"
)


def _compare(asked: _Asked, name: str, version: ModelVersion) -> _Compared | str:
    """The model at hand and the champion on the same examples; or why that cannot be."""
    scores = {"base": _bases, "classifier": _classifiers, "assistant": _assistants}
    rule = asked.rule
    remedy = (
        ", so nothing can be compared with it; bring them back, or name another champion: "
        f"`gpt-pipeline promote {name}`"
    )
    with files_of(version, "the champion's", remedy) as champion:
        try:
            pair = scores[name](asked, champion)
        except OSError as error:
            where = error.filename or asked.root / PREDICTIONS
            raise InputError(
                f"{where}: {error.strerror or error}; run `gpt-pipeline run` and promote again"
            ) from None
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
    from gpt.model.device import prepare_device

    return prepare_device(params.device, params.threads)


def _same_tokenizer(asked: _Asked, name: str, champion: Path) -> bool:
    from gpt.tokens.tokenizer import load_tokenizer

    here, there = (load_tokenizer(each) for each in (asked.root / MODELS[name], champion))
    return here.hash == there.hash


def _same_split(asked: _Asked, name: str, champion: Path) -> bool:
    from stages.training_file import read_training

    here, there = (read_training(each) for each in (asked.root / MODELS[name], champion))
    return (here.split, here.balance) == (there.split, there.balance)


def _bases(asked: _Asked, champion: Path) -> tuple[Score, Score] | str:
    import pandas as pd

    from stages.evaluate.bases import window_losses

    root, params = asked.root, asked.params
    different = (
        "its tokenizer or context is another than the champion's, so they read no equal windows; "
        "compare their bits a byte, and promote by hand"
    )
    if not _same_tokenizer(asked, "base", champion):
        return different
    new = pd.read_csv(
        root / PREDICTIONS / "pretrain.csv", keep_default_na=False, dtype={"source": str}
    )
    old = window_losses(champion, root / "data/tokens", _device(params), params.batch_size)
    where = ["window", "source", "tokens"]
    if not new[where].equals(old[where]):
        return different
    sums = [each.groupby("window")[["loss", "tokens"]].sum() for each in (new, old)]
    one, other = (mean_loss(each["loss"], each["tokens"]) for each in sums)
    return one, other


def _classifiers(asked: _Asked, champion: Path) -> tuple[Score, Score] | str:
    from stages.evaluate.classifier import messages_by_part, predict_classes

    root, params = asked.root, asked.params
    if not _same_split(asked, "classifier", champion):
        return _OTHER_SPLIT
    labels, parts = messages_by_part(root / MODELS["classifier"], root / "data/raw/messages")
    new = _read(root, "classifier")
    if new["actual"].nunique() < 2:
        return (
            f"the test part has messages of one class alone, {new['actual'].iloc[0]!r}, so its "
            "scores say nothing; add messages, or promote by hand"
        )
    old, _ = predict_classes(champion, parts["test"], _device(params), params.batch_size)
    # a class that only the champion knows is wrong wherever it says so, and no class of the mean
    number = {label: i for i, label in enumerate(dict.fromkeys([*labels, *old["predicted"]]))}
    actual, one, other = (
        [number[label] for label in column]
        for column in (new["actual"], new["predicted"], old["predicted"])
    )
    if asked.rule.classifier == "accuracy":
        return accuracy(actual, one), accuracy(actual, other)
    n = len(labels)
    return macro_f1(actual, one, n), macro_f1(actual, other, n, others=len(number) - n)


def _assistants(asked: _Asked, champion: Path) -> tuple[Score, Score] | str:
    import pandas as pd

    from gpt.scores.text_scores import score_texts
    from stages.evaluate.assistant import answer_records, records_by_part

    root, params, score = asked.root, asked.params, asked.rule.assistant
    if not _same_split(asked, "assistant", champion):
        return _OTHER_SPLIT
    different = (
        "its tokenizer or context is another than the champion's, so their losses are of other "
        "tokens; set promotion.assistant to rouge_l or chrf"
    )
    if score == "loss" and not _same_tokenizer(asked, "assistant", champion):
        return different
    test = records_by_part(root / MODELS["assistant"], root / "data/raw/instructions")["test"]
    new = _read(root, "assistant")
    old, _ = answer_records(
        champion, test, _device(params), params.batch_size, params.max_new_tokens
    )
    answers = {"asked": new["instruction"], "answer": old["answer"].to_numpy()}
    asked.answers["assistant"] = pd.DataFrame(answers).rename_axis("example").reset_index()
    if score == "loss":
        tokens = new["tokens"].astype(int)
        if tokens.tolist() != old["tokens"].tolist():
            return different
        held = tokens > 0
        one, other = (
            mean_loss(each["loss"].astype(float)[held], tokens[held]) for each in (new, old)
        )
        return one, other
    scored = score_texts(old["answer"].tolist(), [record.output.strip() for record in test])
    return mean(new[score].astype(float)), mean(getattr(scored, score))


def _read(root: Path, name: str) -> pd.DataFrame:
    import pandas as pd

    path = root / PREDICTIONS / f"{name}.csv"
    return pd.read_csv(path, keep_default_na=False, dtype=str)


def _keep(root: Path, decision: Decision, answers: pd.DataFrame | None) -> None:
    """The champion's answers, for the report to show beside the others."""
    path = root / ANSWERS / f"{decision.model}.csv"
    if answers is not None:
        with whole_file(path) as partial:
            answers.assign(champion=decision.champion).to_csv(partial, index=False)
    elif decision.difference is None:  # nothing was compared
        path.unlink(missing_ok=True)
