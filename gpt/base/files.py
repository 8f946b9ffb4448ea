"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.base.errors import InputError

_LONGEST_JSON = 16 << 20
_MANY = 200  # files of a directory, above which the system writes all at once


def sync_directory(path: Path) -> None:
    """Sync a directory, so that its current entries survive a power loss."""
    if os.name == "nt":  # a directory cannot be opened for fsync there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Sync a file, so that its content survives a power loss."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; renamed to `path` if the block succeeds, otherwise deleted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory; renamed to `path` if the block succeeds, otherwise deleted.

    An existing directory at `path` is replaced as a whole: it must be one that the project wrote,
    or one that the caller knows to hold nothing else. A symbolic link to a directory is kept, and
    its target is replaced. Leftovers of a killed process are removed on the next call.

    Raises:
        InputError: `path` exists and is not a directory.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is there and no directory; move it away or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = _partial(path), path.with_name(f".{path.name}.replaced.partial")

    def clear() -> None:
        if replaced.is_dir() and not path.exists():  # stopped between the two renames below
            replaced.replace(path)
        for left in (partial, replaced):
            remove(left)

    clear()
    partial.mkdir()
    try:
        yield partial
        files = [file for file in partial.rglob("*") if file.is_file()]
        if len(files) > _MANY and hasattr(os, "sync"):
            os.sync()  # all that the system has to write: much faster than so many files in turn
        else:
            for file in files:
                sync_file(file)
        if path.exists():
            path.replace(replaced)
        partial.replace(path)
        sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            clear()


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a directory with its content, if it exists.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys and a final newline, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(
            json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(
    path: Path, *, missing: str, remedy: str, longest: int = _LONGEST_JSON
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        missing: the message, after the path, if there is no such file.
        remedy: what to do about a file with other content.
        longest: the largest size in bytes; by default 16 MiB, far more than any of a model's
            small files has.

    Raises:
        InputError: there is no such file, or as `parse_json`.
    """
    try:
        size = path.stat().st_size
        if size > longest:
            raise InputError(f"{path}: {size:,} bytes are no such file's size; {remedy}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    return parse_json(content, str(path), remedy)


def parse_json(content: bytes, name: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file's content.

    Args:
        content: the file's bytes.
        name: the file's name in messages.
        remedy: what to do about other content.

    Raises:
        InputError: it is not a JSON object, it has a git merge conflict, or JSON readers disagree
            on it: a duplicate key, a number outside the range of floats, half a surrogate pair,
            lists that are nested too deeply.
    """
    refuse_conflict(content, name)
    try:
        value = json.loads(content, object_pairs_hook=unique_keys, parse_int=_finite_int)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}: not a JSON object; {remedy}")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of an object's pairs, for `json`'s `object_pairs_hook`.

    Raises:
        ValueError: a key occurs twice.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} is given twice")
    return value


def _finite_int(digits: str) -> int:
    if math.isinf(float(digits)):
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_CONFLICT = re.compile(rb"^(?:<{7}|>{7})(?: .{0,60}|$)", re.MULTILINE)


def refuse_conflict(content: bytes, name: str) -> None:
    """Refuse a file with an unresolved `git merge` conflict.

    Raises:
        InputError: it has one; the message names the line of the first marker and the remedy.
    """
    if found := _CONFLICT.search(content):
        line = content.count(b"\n", 0, found.start()) + 1
        marker = found[0].decode("utf-8", "replace").strip()
        raise InputError(
            f"{name}: line {line}: an unresolved merge conflict ({marker!r}); keep one of the two "
            f"versions (`git checkout --ours {name}`, or --theirs) or join them without the lines "
            "<<<<<<<, ======= and >>>>>>>, and `git add` the file"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
