"""YAML as a person or git may have left it: read within bounds, and refused with file and place.

All YAML comes in here: parameters, presets, tables of ablations and sweeps, `dvc.yaml`, `dvc.lock`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from gpt.base.errors import InputError, shown
from gpt.base.files import refuse_conflict

_LONGEST = 1 << 20
"""Bytes of a file; the project's own `dvc.lock` has 26,000."""
_MOST_VALUES = 50_000
_DEEPEST = 64
"""Both with an alias taken for all that it stands for."""
_LONGEST_NUMBER = 100
"""Characters of a number: with any more it fits no float."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

if TYPE_CHECKING:
    _Base = yaml.SafeLoader
elif yaml.__with_libyaml__:

    class _Base(Composer, yaml.CSafeLoader):
        """libyaml reads, PyYAML puts together: libyaml's own way knows no bounds."""

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)

else:
    _Base = yaml.SafeLoader


class _Loader(_Base):
    """Bounds what it walks, and refuses a key given twice, as YAML itself does.

    Raises:
        yaml.YAMLError: nothing else, and with a place.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = self._reached = 0
        self._extent: dict[Node, tuple[int, int]] = {}
        """Of each whole node: how many values it holds, itself among them, and how deep."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """The next node; an alias is the node that it names."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        alias = self.check_event(yaml.AliasEvent)
        outside, values = self._reached, self._values
        self._depth += 1
        self._reached = self._depth
        self._values += not alias
        if self._depth > _DEEPEST:  # before the nodes below, each of which is a call
            raise _problem(f"nested more than {_DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        assert node is not None  # an unknown alias is refused
        if alias:
            if node not in self._extent:
                raise _problem("an alias of what it stands in", mark)
            self._values += self._extent[node][0]
            self._reached += self._extent[node][1]
        else:
            self._extent[node] = (self._values - values, self._reached - self._depth)
        if self._values > _MOST_VALUES:
            raise _problem(f"more than {_MOST_VALUES:,} values, aliases followed", mark)
        if self._reached > _DEEPEST:
            raise _problem(f"nested more than {_DEEPEST} deep, aliases followed", mark)
        self._depth -= 1
        self._reached = max(outside, self._reached)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """A mapping whose keys differ."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _problem(f"the key {shown(key.value)} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """The value of a node."""
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise _problem(f"a number of {len(node.value):,} characters", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of int(), float(), date() and others: `!!int abc`, 2026-02-30
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            value = shown(node.value) if isinstance(node, ScalarNode) else "this"
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{value} is no {kind}{reason}", node.start_mark) from None


def _problem(what: str, mark: Any) -> ConstructorError:
    return ConstructorError(None, None, what, mark)


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
        content = path.read_bytes() if size <= _LONGEST else b""
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); make it a file that can"
        ) from None
    if size > _LONGEST:
        raise InputError(f"{name or path}: {size:,} bytes are no such file's size; correct it")
    return parse_yaml(content, name or str(path))


def parse_yaml(content: bytes, name: str) -> Any:
    """What the content of a YAML file says; nothing in it is shared, whatever its aliases.

    Args:
        content: of a file.
        name: what messages call it.

    Raises:
        InputError: it is no YAML, one of its values is none, a key is given twice, it is unusually
            large or deep, or git left it with a conflict; with the line.
    """
    refuse_conflict(content, name)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        return _unshared(yaml.load(text, _Loader))
    except yaml.reader.ReaderError as error:
        line = content[: error.position].count(b"\n") + 1
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: line {line}: not YAML ({reason}); correct it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        reason = _shortened(", ".join(filter(None, (error.context, error.problem))))
        line_there = "".join(text.split("\n")[mark.line : mark.line + 1])
        if line_there.lstrip(" ").startswith("\t"):
            reason = "the line begins with a tab, and YAML takes none; use spaces"
        raise InputError(f"{name}: {place}: {reason}; correct the YAML there") from None
    except yaml.YAMLError as error:
        reason = _shortened(str(error))
        raise InputError(f"{name}: not YAML ({reason}); correct it") from None


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def _unshared(value: Any) -> Any:
    """Each alias a value of its own: what is put into one appears in no other."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_unshared(each) for each in value]
    return value
