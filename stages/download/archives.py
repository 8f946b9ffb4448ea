"""Members of an archive, extracted one after the other: bounded, and none outside its folder.

An archive comes from outside: its names, sizes and links are not trusted. No link is ever created,
and only members that were asked for are written.
"""

from __future__ import annotations

import errno
import lzma
import posixpath
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self, cast

from gpt.base.errors import InputError, in_one_line
from gpt.text.formats import open_raw
from gpt.text.records import inside_path
from stages.download.transfer import (
    GENERAL_LIMIT,
    READ_SIZE,
    UnavailableError,
    blocks_of,
    write_blocks,
)

EXPANSION, EXPANSION_FLOOR = 200, 1 << 26
"""An archive may expand to so many times its size, or to so many bytes, whichever is more."""

MEMBERS_LIMIT = 200_000
_HEADERS_LIMIT = 1 << 20  # bytes of the headers of one member of a tar, which are held in memory
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, RuntimeError, ValueError, OverflowError, LookupError),
)


def matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern: `*` within a name, `**` for any folders or none."""
    return _fits(name.split("/"), PurePosixPath(pattern).parts)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return any(_fits(parts[i:], rest) for i in range(len(parts) + 1)) if rest else True
    return bool(parts) and fnmatchcase(parts[0], first) and _fits(parts[1:], rest)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, has a name that begins with a dot."""
    return any(part.startswith(".") and part != ".." for part in name.split("/"))


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, or a tar, plain or compressed by gzip, bzip2, xz or zstd."""
    return _is_tar(path) or zipfile.is_zipfile(path)


def unpack(
    archive: Path,
    wanted: Callable[[str], bool],
    target_of: Callable[[str], Path],
    limit: int | None,
    stop: threading.Event,
) -> list[tuple[str, int, str]]:
    """Write the wanted members of `archive`, in its order.

    Args:
        archive: the file.
        wanted: which paths in the archive to write.
        target_of: where the member with this path goes.
        limit: the most bytes of all members together; by default a general bound.
        stop: set to cancel.

    Returns:
        Of each member its path in the archive, its size and its sha256.

    Raises:
        UnavailableError: it is not an archive or damaged, expands to more bytes than it may, or a
            wanted member has a path out of its folder, is there twice, or is a link or device.
    """
    ordinary = max(EXPANSION * archive.stat().st_size, EXPANSION_FLOOR)
    left = limit = limit or min(GENERAL_LIMIT, ordinary)
    written: list[tuple[str, int, str]] = []
    name = ""
    try:
        for count, (path, open_member) in enumerate(_members(archive), start=1):
            if count > MEMBERS_LIMIT:
                raise UnavailableError(f"the archive has more than {MEMBERS_LIMIT} members")
            name = posixpath.normpath(path)
            if not wanted(name):
                continue
            if open_member is None:
                raise UnavailableError(f"member {name!r} of the archive is not a plain file")
            target = target_of(inside_path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as stream:
                size, sha256 = write_blocks(target, blocks_of(stream, stop), left, limit)
            left -= size
            written.append((name, size, sha256))
    except _DAMAGE as error:
        if getattr(error, "errno", None) in _DISK_ERRORS:  # not the archive's fault
            raise
        reason = getattr(error, "strerror", None) or str(error).replace(f"{archive}: ", "")
        at = f" at member {name!r}" if name else ""
        raise UnavailableError(f"cannot be unpacked{at}: {in_one_line(reason)}") from None
    return written


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]] | None]]:
    """The members but folders: paths, and how to open each before the next is asked for.

    What is not a plain file (a link, a device) cannot be opened.
    """
    if not _is_tar(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if not info.is_dir():
                    plain = kind in (0, stat.S_IFREG)
                    yield info.filename, partial(opened.open, info) if plain else None
        return
    with open_raw(archive) as expanded:
        file = _BoundedHeaders(expanded)
        with tarfile.open(
            fileobj=cast(Any, file), mode="r|", tarinfo=_Member, errors="surrogateescape"
        ) as tar:
            for member in tar:
                cast(Any, tar).members.clear()  # it keeps all, with their headers
                # not the size it states: a link or a sparse file has fewer bytes here
                file.allowance = tar.offset - member.offset_data + _HEADERS_LIMIT
                if not member.isdir():
                    plain = member.isreg() and not member.issparse()
                    yield (
                        member.name,
                        cast(Any, partial(tar.extractfile, member)) if plain else None,
                    )
        for _ in iter(partial(expanded.read, READ_SIZE), b""):  # a checksum may come last
            pass


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """The next member.

        Raises:
            tarfile.EOFHeaderError: a block of zeros, the end.
            tarfile.ReadError: there is neither a member nor the end.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # undocumented
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class _BoundedHeaders:
    """The file that tarfile reads, which holds headers of any length in memory.

    Attributes:
        allowance: bytes that may be read up to the end of the next member's headers.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.allowance = _HEADERS_LIMIT

    def read(self, size: int) -> bytes:
        """At most `size` bytes, fewer at the end."""
        self.allowance -= size
        if self.allowance < 0:
            raise UnavailableError(
                f"a member's headers in the archive have more than {_HEADERS_LIMIT} bytes"
            )
        return self._file.read(size)


def _is_tar(path: Path) -> bool:
    try:
        with open_raw(path) as file:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except (tarfile.HeaderError, InputError):
        return False
    return True
