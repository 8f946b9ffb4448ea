"""The data sets of a stage's run, as MLflow lists them on the run's page.

MLflow identifies a data set by its name and digest and keeps what the first run recorded of it, so
the digest covers everything that is recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gpt.text.records import SOURCES
from gpt.tokens.token_files import Counts, read_manifest
from pipeline.data.facts import RawSource, raw_sources
from pipeline.tracking.run import DataSet

_SHA256_DIGITS = 16  # in a digest: MLflow keeps at most 36 characters
_COUNTED = {"documents": "documents", "messages": "rows", "instructions": "records"}
"""What is counted in files that hold data, by their kind."""
_MANIFEST = "manifest.json"


def input_sets(root: Path, inputs: Mapping[str, str], trains: bool) -> list[DataSet]:
    """The inputs of a stage.

    Args:
        root: the project.
        inputs: path relative to `root` -> md5 as DVC computes it.
        trains: the stage learns from those of them that are data.
    """
    return [
        _local_set(root, path, md5, "training" if trains and path.startswith("data/") else "input")
        for path, md5 in inputs.items()
    ]


def made_sets(root: Path, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> list[DataSet]:
    """The data sets of a stage that makes data: every raw source, and the tokens to train on.

    Args:
        root: the project.
        inputs: path relative to `root` -> md5 as DVC computes it.
        outputs: the same of what it made.
    """
    raw = [
        _raw_set(path, source)
        for path in {**inputs, **outputs}
        for source in raw_sources(root / path)
        if _is_data(source)
    ]
    tokens = {path: md5 for path, md5 in outputs.items() if (root / path / _MANIFEST).is_file()}
    return raw + [_local_set(root, path, md5, "train") for path, md5 in tokens.items()]


def _local_set(
    root: Path, path: str, md5: str, context: Literal["train", "training", "input"]
) -> DataSet:
    return DataSet(
        name=path,
        digest=md5,
        context=context,
        source_type="local",
        source={"uri": path},
        profile=_profile(root / path),
    )


def _is_data(source: RawSource) -> bool:
    return source.files[0].kind in _COUNTED


def _raw_set(folder: str, source: RawSource) -> DataSet:
    sums = "".join(file.sha256 for file in source.files)
    sha256 = source.sha256 or hashlib.sha256(sums.encode()).hexdigest()
    place: dict[str, Any] = {"url": source.urls[0]} if source.urls else {"uri": folder}
    if len(source.urls) > 1:
        place["urls"] = source.urls
    return DataSet(
        name=source.name,
        # the same bytes are other documents where another separator or split is given
        digest=f"{sha256[:_SHA256_DIGITS]}-{source.records}",
        context="raw",
        source_type="http" if source.urls else "local",
        source={**place, "sha256": sha256},
        profile=_raw_profile([source]),
    )


def _profile(path: Path) -> dict[str, Any]:
    """What is in a folder of data; empty for any other path."""
    if (path / SOURCES).is_file():
        return _raw_profile([source for source in raw_sources(path) if _is_data(source)])
    return _token_profile(path) if (path / _MANIFEST).is_file() else {}


def _raw_profile(sources: Sequence[RawSource]) -> dict[str, Any]:
    if not sources:
        return {}
    counted: Counter[str] = Counter()
    for source in sources:
        counted[_COUNTED[source.files[0].kind]] += source.records
    return {
        **counted,
        "files": sum(len(source.files) for source in sources),
        "bytes": sum(source.bytes for source in sources),
    }


def _token_profile(path: Path) -> dict[str, Any]:
    splits = read_manifest(path).splits
    total = sum((split.total for split in splits.values()), Counts())
    figures = dataclasses.asdict(total)
    for name, split in splits.items():  # flat: MLflow's page does not show what is nested
        figures |= {f"{name}_{key}": n for key, n in dataclasses.asdict(split.total).items()}
    return figures
