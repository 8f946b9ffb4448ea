"""Values in the place of some that `params.yaml` holds: an ablation's rows, a sweep's points.

A value is named by its path (`finetune_classifier.train.learning_rate`). None takes it away, so
that the default holds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gpt.base.errors import InputError
from gpt.base.files import whole_file
from pipeline.project.git import git
from pipeline.project.params import PARAMS_FILE, Params, load_params, read_params
from pipeline.project.yaml_files import parse_yaml, read_yaml


def read_beside_params(root: Path, file: Path) -> tuple[Any, Any]:
    """A file that names values, and the project's `params.yaml`, as YAML has them.

    Raises:
        InputError: one of them cannot be read.
    """
    return read_yaml(file), read_params(root / PARAMS_FILE)


def set_value(section: Any, path: str, value: Any) -> None:
    """Put a value at its path in nested mappings; None takes it away."""
    *owners, leaf = path.split(".")
    for each in owners:
        section = section.setdefault(each, {})
    if value is None:
        section.pop(leaf, None)
    else:
        section[leaf] = value


def params_with(base: Any, values: Mapping[str, Any]) -> Params:
    """The parameters under other values, checked as `params.yaml` is.

    Args:
        base: what `params.yaml` holds.
        values: path -> value.

    Raises:
        InputError: a path leads nowhere, or a value is impossible.
    """
    changed = copy.deepcopy(base)
    for path, value in values.items():
        try:
            set_value(changed, path, value)
        except (AttributeError, TypeError):  # below something that is no section
            raise InputError(f"{path} is no parameter of {PARAMS_FILE}") from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PARAMS_FILE
        file.write_text(yaml.safe_dump(changed), encoding="utf-8")
        return load_params(file)


def text_with(params: bytes, values: Mapping[str, Any]) -> bytes:
    """The bytes of a `params.yaml` under other values; its comments stay.

    Raises:
        InputError: a value stands under an anchor, so that others would change with it.
    """
    from dvc.utils.serialize import modify_yaml  # as `dvc exp run --set-param` does

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PARAMS_FILE
        file.write_bytes(params)
        with modify_yaml(str(file)) as content:
            for path, value in values.items():
                set_value(content, path, value)
        changed = file.read_bytes()
    before, after = (parse_yaml(each, PARAMS_FILE) for each in (params, changed))
    for path in values:
        set_value(before, path, None)
        set_value(after, path, None)
    if before != after:
        raise InputError(
            f"{PARAMS_FILE}: {', '.join(values)}: other parameters would change with it, as the "
            "file shares values by an anchor and aliases (&, *); write them out there"
        )
    return changed


def is_kept(root: Path) -> bool:
    """Whether `params.yaml` is as the last commit or a preset has it: then it can be written over.

    Of a project in git.
    """
    now = (root / PARAMS_FILE).read_bytes()
    presets = (path.read_bytes() for path in (root / "presets").glob("*.yaml"))
    return not git(root, "diff", "--name-only", "HEAD", "--", PARAMS_FILE) or now in presets


def write_params(root: Path, params: bytes) -> None:
    """Put `params.yaml` in place, whole or not at all."""
    with whole_file(root / PARAMS_FILE) as partial:
        partial.write_bytes(params)
