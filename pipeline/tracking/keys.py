"""Names and values as MLflow takes them: keys, flat parameters and flat metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gpt.base.errors import shortened
from pipeline.project.secrets import without_secrets

EXPERIMENT_PREFIX = "gpt-pipeline/"
VALUE_LENGTH = 500  # of a parameter; MLflow takes 6,000, a person reads less
NAME_LENGTH = 250  # of a run; a database on a server takes no longer one
_KEY_LENGTH = 250  # characters
_KEY = re.compile(r"[/\w.\- :]+")  # of what a key of MLflow's may be made
_DIGEST = re.compile(r"__[0-9a-f]{8}\Z")  # at the end of a key that differs from its name

_MACHINE = ("python", "machine", "machine.cores", "machine.threads")  # tags
_DURING_TRAINING = {  # metrics that describe the training and not what it achieved
    "learning_rate",
    "grad_norm",
    "param_norm",
    "update_ratio",
    "loss_spike",
    "tokens_per_second",
}
_FORMER = re.compile(
    r"(?:result|optimizer|health|throughput)/(.+)|(loss|accuracy|reward_[a-z]+)/(train|validation)"
)


def is_result(name: str) -> bool:
    """Whether a metric says what a stage achieved, not how the machine and the training did."""
    return not name.startswith("system/") and name not in _DURING_TRAINING


def present_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A run's metrics under the names of `metrics.json` and `history.csv`.

    Older runs have groups (`result/perplexity`, `optimizer/grad_norm`) and both `loss/validation`,
    the curve, and `result/validation_loss`, the final value, which is taken.
    """
    final_last = sorted(metrics, key=lambda key: key.startswith("result/"))
    return {_present_name(key): metrics[key] for key in final_last}


def _present_name(key: str) -> str:
    former = _FORMER.fullmatch(key)
    if not former:
        return key
    name, measure, split = former.groups()
    return name or f"{split}_{measure}"


def machine_of(tags: Mapping[str, str]) -> dict[str, str]:
    """What a run's tags say of its machine and Python, and package -> version."""
    pairs = (each.rpartition(" ") for each in tags.get("packages", "").split(", ") if " " in each)
    known = {key: tags[key] for key in _MACHINE if key in tags}
    return known | {name: version for name, _, version in pairs}


def flatten(params: Any) -> dict[str, str]:
    """A stage's parameters as MLflow's flat strings: `train.learning_rate` -> `0.0005`.

    Lists stay one entry: scalars joined by commas, records by their name or their first value.
    """
    flat = _flatten(dataclasses.asdict(params))
    return {key_of(key): shortened(without_secrets(text), VALUE_LENGTH) for key, text in flat}


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        yield path, ", ".join(_summary(item) for item in value)
    else:
        yield path, str(value)


def _summary(item: Any) -> str:
    if isinstance(item, Mapping):
        return str(item.get("name") or next(iter(item.values()), ""))
    return str(item)


def key_of(name: str) -> str:
    """The key under which MLflow keeps what has this name: a metric, a parameter or a tag.

    Labels, sources and paths may hold any character, and have any length. A name that MLflow takes
    is its own key. Of another one, what MLflow refuses is replaced, and a digest of the name keeps
    names apart that then look alike: one name has one key, in every run.
    """
    taken = _KEY.fullmatch(name) and not _DIGEST.search(name)
    if taken and len(name) <= _KEY_LENGTH and not any(map(_is_path, name.split("/"))):
        return name
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    shown = "/".join(f"_{part}" if _is_path(part) else part for part in parts)
    digest = f"__{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return shown[: _KEY_LENGTH - len(digest)] + digest


def _is_path(part: str) -> bool:
    """Whether a part between slashes leads elsewhere: `a//b`, `./a`, `../a`."""
    return part in ("", ".") or part.startswith("..")


def flatten_metrics(metrics: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Final metrics as flat numbers: nested keys joined by a slash; what is no number, left out."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            flat |= flatten_metrics(value, name)
        elif isinstance(value, int | float):  # a truth value counts as 0 or 1
            flat[name] = float(value)
    return flat
