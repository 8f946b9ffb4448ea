"""The data sets of a stage's run, as MLflow lists them on its page.

A data set in MLflow is told by its name and its digest, and keeps what the first run said of it: so
the digest has all in it that is said of the set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt.text.records import SOURCES
from gpt.tokens.token_files import Counts, read_manifest
from pipeline.data.facts import RawSource, raw_sources
from pipeline.tracking.run import DataSet

_DATA = "data/"
_DIGEST = 16  # hexadecimal digits


def input_sets(root: Path, inputs: Mapping[str, str], trains: bool) -> list[DataSet]:
    """The inputs of a stage.

    Args:
        root: the project.
        inputs: path relative to `root` -> md5 as DVC computes it.
        trains: the stage learns from those of them that are data.
    """
    return [
        DataSet(
            name=path,
            digest=md5,
            context="training" if trains and path.startswith(_DATA) else "input",
            source_type="local",
            source={"uri": path},
            profile=_profile(root / path),
        )
        for path, md5 in inputs.items()
    ]


def made_sets(root: Path, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> list[DataSet]:
    """The data sets of a stage that makes data: every raw source, and the tokens to train on.

    Args:
        root: the project.
        inputs: path relative to `root` -> md5 as DVC computes it.
        outputs: the same of what it made.
    """
    found = []
    for path, md5 in {**inputs, **outputs}.items():
        found += [_raw_set(path, source) for source in raw_sources(root / path) if _is_data(source)]
        if path in outputs and (root / path / "manifest.json").is_file():
            found.append(
                DataSet(
                    name=path,
                    digest=md5,
                    context="train",
                    source_type="local",
                    source={"uri": path},
                    profile=_profile(root / path),
                )
            )
    return found


def _is_data(source: RawSource) -> bool:
    return any(file.kind != "file" for file in source.files)


def _raw_set(folder: str, source: RawSource) -> DataSet:
    sums = [file.sha256 for file in source.files]
    one = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    urls = source.urls
    place: dict[str, Any] = {"url": urls[0]} if urls else {"uri": folder}
    if len(urls) > 1:
        place["urls"] = urls
    place["sha256"] = one
    return DataSet(
        name=source.name,
        # the same bytes are other documents where another separator or split is given
        digest=f"{one[:_DIGEST]}-{source.records}",
        context="raw",
        source_type="http" if urls else "local",
        source=place,
        profile=_raw_profile([source]),
    )


def _profile(path: Path) -> dict[str, Any]:
    """What is in a folder of data; nothing of what is none."""
    if (path / SOURCES).is_file():
        return _raw_profile(source for source in raw_sources(path) if _is_data(source))
    if (path / "manifest.json").is_file():
        return _token_profile(path)
    return {}


def _raw_profile(sources: Iterable[RawSource]) -> dict[str, Any]:
    sources = list(sources)
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


_COUNTED = {"documents": "documents", "messages": "rows", "instructions": "records"}


def _token_profile(path: Path) -> dict[str, Any]:
    splits = read_manifest(path).splits
    total = sum((split.total for split in splits.values()), Counts())
    figures = dataclasses.asdict(total)
    for name, split in splits.items():  # flat: MLflow's page does not show what is nested
        figures |= {f"{name}_{key}": n for key, n in dataclasses.asdict(split.total).items()}
    return figures
