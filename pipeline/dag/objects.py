"""What DVC's cache holds, by md5, and whether it is what it should be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gpt.base.errors import RunError
from gpt.base.files import remove


class Objects:
    """The objects of DVC's cache by their md5.

    DVC takes one that it once protected for sound; here it is hashed before it is believed.
    """

    def __init__(self, odb: Any) -> None:
        self._odb = odb

    def path(self, md5: str) -> Path:
        """Where an object lies, if it is there."""
        return Path(self._odb.oid_to_path(md5))

    def is_sound(self, md5: str) -> bool:
        """Whether an object is there, and what its md5 says."""
        return md5_of(self.path(md5)) == md5.removesuffix(".dir")

    def drop_damaged(self, md5: str) -> bool:
        """Remove an object that is not what its md5 says; whether there was one.

        Raises:
            RunError: it cannot be removed.
        """
        path = self.path(md5)
        if not path.exists() or self.is_sound(md5):
            return False
        remove_damaged(path)
        return True

    def drop_damaged_lists(self) -> bool:
        """Remove each list of a directory's files that is damaged; whether there was one.

        Raises:
            RunError: it cannot be removed.
        """
        lists = list(Path(self._odb.path).glob("??/*.dir"))
        return sum(self.drop_damaged(each.parent.name + each.name) for each in lists) > 0

    def members(self, md5: str) -> dict[str, str] | None:
        """The files of a directory and their md5; None where no sound list of them is there."""
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.tree import Tree

        if not md5.endswith(".dir") or not self.is_sound(md5):
            return None
        tree = Tree.load(self._odb, HashInfo("md5", md5))
        return {"/".join(key): str(info.value) for key, _, info in tree}

    def read(self, md5: str, member: str = "") -> bytes | None:
        """A file, or one of a directory's; None where the cache has not got it."""
        if member:
            md5 = (self.members(md5) or {}).get(member, "")
        return self.path(md5).read_bytes() if md5 and self.is_sound(md5) else None

    def has(self, md5: str) -> bool:
        """Whether all of a file or directory is in the cache; files are not hashed."""
        files = self.members(md5)
        if files is None:
            return not md5.endswith(".dir") and bool(md5) and self._odb.exists(md5)
        return all(self._odb.exists(each) for each in {md5, *files.values()})


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes; empty where none can be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return ""


def remove_damaged(path: Path) -> None:
    """Remove a file or folder that is not what it should be, if it is there.

    Raises:
        RunError: it cannot be removed.
    """
    try:
        remove(path)
    except OSError as error:
        raise RunError(
            f"{path}: damaged, and cannot be removed ({error.strerror}); make it writable"
        ) from None
