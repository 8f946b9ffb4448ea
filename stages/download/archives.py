"""Files out of an archive, one after the other: bounded, and none of them outside its folder.

An archive is somebody else's: its names, sizes and links are believed in nothing.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import lzma
import posixpath
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from bz2 import BZ2File
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Self, cast

import zstandard

from stages.download.blocks import BLOCK, GENERAL_LIMIT, blocks_of, too_many, write_blocks
from stages.download.faults import NotHadError
from stages.download.sources import inside_path

EXPANSION, EXPANSION_FLOOR = 200, 1 << 26
"""An archive may become so many times its size, or so many bytes, whichever is more."""

MEMBERS_LIMIT = 200_000
_HEADERS_LIMIT = 1 << 20  # bytes of the headers of one of a tar's members, held in memory
_XZ_MEMORY = 1 << 29
_LINK_LIMIT = 4096  # bytes of a link's target
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A member that was written: its path in the archive, its size and its sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """What an archive says of a member; `target` is where a link leads, in the archive."""

    name: str
    kind: Literal["a file", "a folder", "a link", "an encrypted file", "a special file"]
    open: Callable[[], IO[bytes]]
    target: str | None = None


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
    """Whether a file, or a folder on the way to it, has a name that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def is_archive(path: Path) -> bool:
    """Whether a file is a zip, or a tar as it is or in gz, bz2, xz or zst."""
    return _is_tar(path) or zipfile.is_zipfile(path)


def unpack(
    archive: Path,
    wanted: Callable[[str], bool],
    place: Callable[[str], Path],
    limit: int | None,
    stop: threading.Event,
) -> list[Unpacked]:
    """Write the wanted members of `archive`, in its order.

    Args:
        archive: the file.
        wanted: which paths in the archive to write.
        place: where the member with this path goes.
        limit: the most bytes that they may have together; by default a general bound.
        stop: set when there is no use in going on.

    Raises:
        NotHadError: it is no archive, is damaged, or is one that nobody well-meaning made: a name
            or link that leads out of it, a member that is no file or there twice, more bytes than
            there should be.
        OSError: the disk is full, say.
    """
    with _faults_told():
        size = archive.stat().st_size
        ordinary = max(EXPANSION * size, EXPANSION_FLOOR)
        left = limit = limit or min(GENERAL_LIMIT, ordinary)
        written: dict[str, Unpacked] = {}
        for count, entry in enumerate(_entries(archive, max(limit, ordinary)), start=1):
            if count > MEMBERS_LIMIT:
                raise NotHadError(f"the archive has more than {MEMBERS_LIMIT} members")
            _refuse_a_way_out(entry)
            name = posixpath.normpath(entry.name)
            if entry.kind == "a folder" or not wanted(name):
                continue
            if entry.kind != "a file":
                raise NotHadError(f"member {name!r} of the archive is {entry.kind}, no plain one")
            if name in written:
                raise NotHadError(f"member {name!r} is in the archive twice")
            with _unfit_name_told(name):
                target = place(inside_path(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch(exist_ok=False)
                target.unlink()
            with entry.open() as stream:
                n, sha256 = write_blocks(target, _within(blocks_of(stream, stop), left, limit))
            left -= n
            written[name] = Unpacked(name, n, sha256)
    return list(written.values())


def _within(blocks: Iterator[bytes], left: int, limit: int) -> Iterator[bytes]:
    """Pass `blocks` on as long as they are `left` bytes at most."""
    for block in blocks:
        left -= len(block)
        if left < 0:
            raise too_many(limit)
        yield block


def _refuse_a_way_out(entry: _Entry) -> None:
    if _leads_out(entry.name):
        raise NotHadError(f"member {entry.name!r} leads out of the archive's folder")
    if entry.target is not None and _leads_out(entry.target):
        raise NotHadError(
            f"member {entry.name!r} is a link to {entry.target!r}, out of the archive's folder"
        )


def _leads_out(path: str) -> bool:
    path = path.replace("\\", "/")
    return path.startswith("/") or path[1:2] == ":" or ".." in path.split("/")


@contextlib.contextmanager
def _unfit_name_told(name: str) -> Iterator[None]:
    """A name that is no path, too long for the disk, or a file's and a folder's at once."""
    try:
        yield
    except ValueError as error:
        raise NotHadError(f"the archive's {error}") from None
    except OSError as error:
        raise NotHadError(f"member {name!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _faults_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Without a number it is a decoder's, with that of a bad argument an archive's false offset.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise _unreadable(error) from None
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, zstandard.ZstdError),
        *(EOFError, struct.error, RuntimeError, ValueError, OverflowError, LookupError),
    ) as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> NotHadError:
    return NotHadError(f"not an archive that can be read: {' '.join(str(error).split())}")


def _entries(archive: Path, limit: int) -> Iterator[_Entry]:
    """The members of an archive; each can be opened until the next one is asked for."""
    if _is_tar(archive):
        return _tar_entries(archive, limit)
    return _zip_entries(archive)


# --- zip ------------------------------------------------------------------------------------------


def _zip_entries(archive: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():

            def stream(info: zipfile.ZipInfo = info) -> IO[bytes]:
                if info.compress_type not in _ZIP_METHODS:
                    raise NotHadError(
                        f"member {info.filename!r} is packed by method {info.compress_type}; "
                        "pack the archive by deflate"
                    )
                return opened.open(info)

            yield _zip_entry(info, stream)


def _zip_entry(info: zipfile.ZipInfo, stream: Callable[[], IO[bytes]]) -> _Entry:
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode) and not info.flag_bits & 1:
        with stream() as content:
            target = content.read(_LINK_LIMIT).decode("utf-8", "surrogateescape")
        return _Entry(info.filename, "a link", stream, _from_root(info.filename, target))
    if info.is_dir() or stat.S_ISDIR(mode):
        return _Entry(info.filename, "a folder", stream)
    if info.flag_bits & 1:
        return _Entry(info.filename, "an encrypted file", stream)
    plain = stat.S_IFMT(mode) in (0, stat.S_IFREG)
    return _Entry(info.filename, "a file" if plain else "a special file", stream)


def _from_root(name: str, target: str) -> str:
    """Where a link leads, seen from the archive's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target.replace("\\", "/")))


# --- tar ------------------------------------------------------------------------------------------


class _Member(tarfile.TarInfo):
    """A member whose damaged header is told; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """The next member.

        Raises:
            tarfile.EOFHeaderError: a block of zeros, the end.
            tarfile.ReadError: there is neither a member nor the end.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # in none of its docs
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


class _Forwards:
    """Blocks as the file that tarfile reads, forwards only.

    `allowance`, where it is set, is how many bytes may still be read. What tarfile reads to find a
    member it keeps in memory, in pieces that differ between versions of Python: so the bound is
    here, below all of them.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._held = memoryview(b"")
        self._position = 0
        self.allowance: int | None = None

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.StreamError("its members are not one after the other")
        for _ in self._parts(position - self._position):
            pass

    def read(self, size: int) -> bytes:
        """At most `size` bytes, fewer at the end."""
        if self.allowance is not None:
            self.allowance -= size
            if self.allowance < 0:
                raise NotHadError(
                    f"a member's headers in the archive have more than {_HEADERS_LIMIT} bytes"
                )
        return b"".join(self._parts(size))

    def _parts(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            self._held = self._held or memoryview(next(self._blocks, b""))
            if not self._held:
                return
            part, self._held = self._held[:size], self._held[size:]
            size -= len(part)
            self._position += len(part)
            yield part


def _tar_entries(archive: Path, limit: int) -> Iterator[_Entry]:
    blocks = _within(_expanded(archive), limit, limit)
    file = _Forwards(blocks)
    file.allowance = _HEADERS_LIMIT
    with tarfile.TarFile(
        fileobj=cast(Any, file), tarinfo=_Member, errors="surrogateescape"
    ) as opened:
        for info in opened:

            def stream(info: tarfile.TarInfo = info) -> IO[bytes]:
                return cast(IO[bytes], opened.extractfile(info))

            file.allowance = None
            yield _tar_entry(info, stream)
            file.allowance = _HEADERS_LIMIT
        for _ in blocks:  # the checksum of what it is packed in comes last
            pass


def _tar_entry(info: tarfile.TarInfo, stream: Callable[[], IO[bytes]]) -> _Entry:
    if info.issym():
        return _Entry(info.name, "a link", stream, _from_root(info.name, info.linkname))
    if info.islnk():
        return _Entry(info.name, "a link", stream, info.linkname)
    if info.isdir():
        return _Entry(info.name, "a folder", stream)
    plain = info.isreg() and not info.issparse()
    return _Entry(info.name, "a file" if plain else "a special file", stream)


def _is_tar(path: Path) -> bool:
    start = b""
    try:
        for block in _expanded(path):
            start += block
            if len(start) >= tarfile.BLOCKSIZE:
                break
        tarfile.TarInfo.frombuf(start[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return len(start) >= tarfile.BLOCKSIZE and not any(start[: tarfile.BLOCKSIZE])
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError):
        return False
    return True


def _expanded(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if they are packed in gz, bz2, xz or zst; no block is empty."""
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(b"\xfd7zXZ\0"):
            yield from filter(None, _from_xz(file))
            return
        stream: Any = file
        if start.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)
        elif start.startswith(b"BZh"):
            stream = BZ2File(file)
        elif start.startswith(b"\x28\xb5\x2f\xfd"):
            stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        while block := stream.read(BLOCK):
            yield block


def _from_xz(file: IO[bytes]) -> Iterator[bytes]:
    """As LZMAFile reads, but for a bound on memory, which it lacks."""
    decoder = None
    while True:
        if decoder is None or decoder.eof:
            data = (decoder.unused_data if decoder else b"").lstrip(b"\0") or file.read(BLOCK)
            if not data.lstrip(b"\0"):
                return
            decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        elif not decoder.needs_input:
            data = b""
        elif not (data := file.read(BLOCK)):
            raise EOFError("it ends in the middle")
        yield decoder.decompress(data, BLOCK)
