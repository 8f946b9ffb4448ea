"""Overrides of values in `params.yaml`, for the rows of an ablation and the points of a sweep.

A value is named by its path (`finetune_classifier.train.learning_rate`). None removes it, so that
the default applies.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gpt.base.errors import InputError, RunError
from gpt.base.files import whole_file
from pipeline.project.git import git
from pipeline.project.params import PARAMS_FILE, Params, check_params, preset_files
from pipeline.project.yaml_files import parse_yaml


def set_value(section: Any, path: str, value: Any) -> None:
    """Put a value at its path in nested mappings; None removes it."""
    *owners, leaf = path.split(".")
    for each in owners:
        if section.get(each) is None:  # an empty section holds the defaults
            section[each] = {}
        section = section[each]
    if value is None:
        section.pop(leaf, None)
    else:
        section[leaf] = value


def params_with(base: Any, values: Mapping[str, Any]) -> Params:
    """The parameters with overrides, validated like `params.yaml`.

    Args:
        base: what `params.yaml` holds.
        values: path -> value.

    Raises:
        InputError: a path does not exist, or a value is invalid.
    """
    changed = copy.deepcopy(base)
    for path, value in values.items():
        try:
            set_value(changed, path, value)
        except (AttributeError, TypeError):  # the parent is not a section
            raise InputError(f"{path} is no parameter of {PARAMS_FILE}") from None
    return check_params(changed)


def text_with(params: bytes, values: Mapping[str, Any]) -> bytes:
    """The bytes of a `params.yaml` with overrides; its comments are kept.

    Raises:
        InputError: a value is below an anchor, so that changing it would change others.
    """
    yaml, changed = YAML(), io.BytesIO()
    content = yaml.load(params)
    for path, value in values.items():
        set_value(content, path, value)
    yaml.dump(content, changed)
    before, after = (parse_yaml(each, PARAMS_FILE) for each in (params, changed.getvalue()))
    for path in values:
        set_value(before, path, None)
        set_value(after, path, None)
    if before != after:
        raise InputError(
            f"{PARAMS_FILE}: {', '.join(values)}: other parameters would change with it, as the "
            "file shares values by an anchor and aliases (&, *); write them out there"
        )
    return changed.getvalue()


def is_kept(root: Path) -> bool:
    """Whether the last commit or a preset has the same `params.yaml`, so it may be overwritten."""
    now = (root / PARAMS_FILE).read_bytes()
    if now in map(Path.read_bytes, preset_files(root).values()):
        return True
    try:
        committed = git(root, "show", f"HEAD:./{PARAMS_FILE}")
    except RunError:
        return False
    return committed == now.decode(errors="replace").strip("\n")


def write_params(root: Path, params: bytes) -> None:
    """Write `params.yaml` atomically."""
    with whole_file(root / PARAMS_FILE) as partial:
        partial.write_bytes(params)
