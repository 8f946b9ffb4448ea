"""Names and values in the form that MLflow accepts: keys, flat parameters and flat metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gpt.base.errors import shortened
from pipeline.project.secrets import without_secrets

EXPERIMENT_PREFIX = "gpt-pipeline/"
VALUE_LENGTH = 500  # of a parameter; MLflow allows 6,000, too long to read
NAME_LENGTH = 250  # of a run; the limit of a database server
_KEY_LENGTH = 250  # characters
_KEY = re.compile(r"[/\w.\- :]+")  # the characters that MLflow allows in a key
_DIGEST = re.compile(r"__[0-9a-f]{8}\Z")  # at the end of a key that differs from its name

_MACHINE = ("python", "machine", "machine.cores", "machine.threads")  # tags
_DURING_TRAINING = {  # metrics of the training process, not of its result
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
    """Whether a metric is a result of the stage, not a measurement of machine or training."""
    return not name.startswith("system/") and name not in _DURING_TRAINING


def present_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """A run's metrics under the names of `metrics.json` and `history.csv`.

    Older runs have groups (`result/perplexity`, `optimizer/grad_norm`), and both a curve,
    `loss/validation`, and a final value, `result/validation_loss`; the final value is used.
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
    """The machine and Python of a run, from its tags, and package -> version."""
    pairs = (each.rpartition(" ") for each in tags.get("packages", "").split(", ") if " " in each)
    known = {key: tags[key] for key in _MACHINE if key in tags}
    return known | {name: version for name, _, version in pairs}


def flatten(params: Any) -> dict[str, str]:
    """A stage's parameters as flat strings for MLflow: `train.learning_rate` -> `0.0005`.

    A list is one entry: its scalars, or the name or first value of each record, joined by commas.
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
    """The MLflow key for the name of a metric, a parameter or a tag.

    Labels, sources and paths may hold any character and have any length. A name that MLflow accepts
    is used unchanged. In any other name the refused characters are replaced, and a digest of the
    name is appended to keep the key unique. A name has the same key in every run.
    """
    taken = _KEY.fullmatch(name) and not _DIGEST.search(name)
    if taken and len(name) <= _KEY_LENGTH and not any(map(_is_path, name.split("/"))):
        return name
    parts = re.sub(r"[^/\w.\- ]", "_", name).split("/")
    shown = "/".join(f"_{part}" if _is_path(part) else part for part in parts)
    digest = f"__{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return shown[: _KEY_LENGTH - len(digest)] + digest


def _is_path(part: str) -> bool:
    """Whether a part between slashes changes the path: `a//b`, `./a`, `../a`."""
    return part in ("", ".") or part.startswith("..")


def flatten_metrics(metrics: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Final metrics as flat numbers: nested keys joined by a slash, other values left out."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            flat |= flatten_metrics(value, name)
        elif isinstance(value, int | float):  # booleans become 0 or 1
            flat[name] = float(value)
    return flat
