"""YAML 1.2 as a person or git may have left it: bounded, and refused with its file and line.

Every YAML file is read here, by the library that DVC reads its own with: parameters, presets,
tables of ablations and sweeps, `dvc.yaml`, `dvc.lock`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from gpt.base.errors import InputError, in_one_line, shortened
from gpt.base.files import refuse_conflict

_MOST_BYTES = 1 << 20
"""Of a file; the project's own `dvc.lock` has 14,000."""
_MOST_VALUES = 50_000
"""In a file, counting what an alias stands for each time."""
_DEEPEST = 64


def read_yaml(path: Path, name: str = "", *, missing: str = "no such file") -> Any:
    """What a YAML file holds.

    Args:
        path: the file.
        name: what messages call it; by default its path.
        missing: what to say, after the path, where there is no such file.

    Raises:
        InputError: as `parse_yaml`; or it is missing or cannot be read.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _MOST_BYTES else b""
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); make it a file that can"
        ) from None
    if size > _MOST_BYTES:
        raise InputError(f"{name or path}: {size:,} bytes are no such file's size; correct it")
    return parse_yaml(content, name or str(path))


def parse_yaml(content: bytes, name: str) -> Any:
    """What the content of a YAML file says; nothing in it is shared, whatever its aliases.

    Args:
        content: of a file.
        name: what messages call it.

    Raises:
        InputError: it is not YAML, one of its values is impossible, a key is given twice, it is
            unusually large or deep, or git left it with a conflict; with the line where known.
    """
    refuse_conflict(content, name)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        _check_bounds(text)
        return _without_sharing(YAML(typ="safe").load(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(filter(None, (error.context, error.problem)))
        reason = reason.partition(" with value ")[0]  # of a key that is given twice
        line = "".join(text.split("\n")[mark.line : mark.line + 1])
        if line.lstrip(" ").startswith("\t"):
            reason = "the line begins with a tab, and YAML takes none; use spaces"
        reason = f"line {mark.line + 1}, column {mark.column + 1}: {reason}"
    except RecursionError:
        reason = "nested too deeply"
    # ruamel lets pass what int(), float(), date() and a dict say of an impossible value or key
    except (YAMLError, ValueError, LookupError, TypeError) as error:
        reason = f"not YAML ({in_one_line(error)})"
    raise InputError(f"{name}: {shortened(in_one_line(reason), 200)}; correct the YAML there")


def _check_bounds(text: str) -> None:
    """Refuse what would take all memory or crash the parser when it is loaded.

    Raises:
        YAMLError: it is nested too deeply, or holds too many values.
    """
    values = 0
    started: list[tuple[str | None, int]] = []
    sizes: dict[str | None, int] = {}
    for event in YAML(typ="safe").parse(text):
        if isinstance(event, AliasEvent):
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, NodeEvent):
            values += 1
        if isinstance(event, CollectionStartEvent):
            started.append((event.anchor, values))
        elif isinstance(event, CollectionEndEvent):
            anchor, before = started.pop()
            sizes[anchor] = values - before + 1
        if values > _MOST_VALUES or len(started) > _DEEPEST:
            problem = f"more than {_MOST_VALUES:,} values or {_DEEPEST} levels, aliases followed"
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _without_sharing(value: Any) -> Any:
    """Copy the value of each alias, so that changing one does not change the others."""
    if isinstance(value, dict):
        return {key: _without_sharing(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_sharing(each) for each in value]
    if isinstance(value, int):
        str(value)  # a ValueError if it has too many digits to be shown
    return value
