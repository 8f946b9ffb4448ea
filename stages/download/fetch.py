"""Bringing one file here: from a folder, a mirror or the web; bounded, checked, or not at all."""

from __future__ import annotations

import hashlib
import lzma
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

import requests

from gpt.errors import InputError
from gpt.events import Log, Message, Progress
from stages.download.sources import Source

GENERAL_LIMIT = 1 << 30
"""The most bytes of a file whose size the source does not tell."""

CONNECT_SECONDS, READ_SECONDS = 10, 30
ATTEMPTS, BACK_OFF_SECONDS = 4, 0.5
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look.

    Attributes:
        local: the folder of local sources.
        mirror: a folder or a web address that is asked before a source's own addresses.
        offline: never open a connection.
    """

    local: Path
    mirror: str | None
    offline: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came: its size, its sha256, and where from (for messages, never for an output)."""

    bytes: int
    sha256: str
    origin: str


class _NotHadError(Exception):
    """One place does not give the file; others may."""


class _TryAgainError(Exception):
    """A fault that may pass: a lost connection, a busy server."""


def fetch_source(source: Source, target: Path, places: Places, log: Log) -> Fetched:
    """Write the file of `source` to `target`.

    Args:
        source: with `file` or `urls`.
        target: in a folder that goes away if this fails.
        places: where to look.
        log: told of the progress.

    Raises:
        InputError: it is nowhere to be had, or what a folder or the mirror has is not it.
    """
    if source.file is not None:
        return _fetch_local(source, source.file, target, places, log)
    tried: list[str] = []
    for origin, from_mirror in _origins(source, places, tried):
        try:
            fetched = _take(source, origin, target, log)
        except _NotHadError as error:
            tried.append(f"{origin} ({error})")
            continue
        wrong = _difference(source, fetched)
        if wrong is None:
            return fetched
        if from_mirror:  # the mirror is the user's own: an error in it should not be passed over
            raise InputError(
                f"{origin}: {wrong} (source {source.name!r}); put the published file there, "
                "or correct the source's sha256"
            )
        tried.append(f"{origin} ({wrong})")
    raise InputError(
        f"source {source.name!r} could not be fetched; tried {'; '.join(tried) or 'no place'}; "
        f"put {source.sought_names[0]} into a folder and set download.mirror or "
        "GPT_PIPELINE_MIRROR to it" + (", or set download.offline: false" * places.offline)
    )


def _origins(source: Source, places: Places, tried: list[str]) -> Iterator[tuple[str, bool]]:
    """The places to look for `source`, each with whether it is the mirror; asked lazily."""
    if places.mirror is not None and not _is_web(places.mirror):
        folder = Path(places.mirror).expanduser()
        if not folder.is_dir():
            raise InputError(
                f"mirror: {folder} is not a folder; set download.mirror or GPT_PIPELINE_MIRROR "
                "to one, or to an address with https://"
            )
        found = [folder / name for name in source.sought_names if (folder / name).is_file()]
        if found:
            yield str(found[0]), True
        else:
            tried.append(f"{folder} (has none of {', '.join(source.sought_names)})")
    if places.offline:
        tried.append("nothing on the web (download.offline is true)")
        return
    if places.mirror is not None and _is_web(places.mirror):
        base = places.mirror.rstrip("/")
        yield from ((f"{base}/{quote(name, safe='/+')}", True) for name in source.sought_names)
    yield from ((url, False) for url in source.urls)


def _fetch_local(source: Source, file: str, target: Path, places: Places, log: Log) -> Fetched:
    path = places.local / file
    if not path.is_file():
        raise InputError(
            f"{path}: no such file (source {source.name!r}); correct its file or download.local"
        )
    if not path.resolve().is_relative_to(places.local.resolve()):
        raise InputError(f"{path}: leads out of its folder; put the file itself there")
    try:
        fetched = _take(source, str(path), target, log)
    except _NotHadError as error:
        raise InputError(f"{path}: {error} (source {source.name!r}); correct either") from None
    wrong = _difference(source, fetched)
    if wrong is not None:
        raise InputError(
            f"{path}: {wrong} (source {source.name!r}); correct the file or the source"
        )
    return fetched


def _difference(source: Source, fetched: Fetched) -> str | None:
    """What tells a file apart from the one wanted."""
    if source.sha256 is not None and fetched.sha256 != source.sha256:
        return f"its sha256 is {fetched.sha256}, not {source.sha256}"
    if source.bytes is not None and fetched.bytes != source.bytes:
        return f"it has {fetched.bytes} bytes, not {source.bytes}"
    return None


def _take(source: Source, origin: str, target: Path, log: Log) -> Fetched:
    """Bring what is at `origin` to `target`; out of a zip archive, the source's member."""
    limit = source.bytes or GENERAL_LIMIT
    if source.member is None:
        return _copy(source, origin, target, limit, log)
    archive = target.with_name(f".{target.name}.archive")
    try:
        whole = _copy(source, origin, archive, GENERAL_LIMIT, log)
        if not zipfile.is_zipfile(archive):  # a mirror may keep the member itself
            archive.replace(target)
            return whole
        with zipfile.ZipFile(archive) as opened, opened.open(source.member) as stream:
            size, sha256 = _write(target, _blocks(stream), limit)
        return Fetched(size, sha256, f"{origin}, member {source.member}")
    except KeyError:
        raise _NotHadError(f"the archive has no member {source.member!r}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise _NotHadError(f"not an archive that can be read: {error}") from None
    finally:
        archive.unlink(missing_ok=True)


def _copy(source: Source, origin: str, target: Path, limit: int, log: Log) -> Fetched:
    task = f"download {source.name}"
    if not _is_web(origin):
        path = Path(origin)
        try:
            with path.open("rb") as file:
                blocks = _shown(_blocks(file), task, path.stat().st_size, log)
                return Fetched(*_write(target, blocks, limit), origin)
        except OSError as error:
            raise _NotHadError(f"cannot be copied: {error.strerror}") from None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACK_OFF_SECONDS * 2 ** (attempt - 1))
        try:
            return _download(origin, target, limit, task, log)
        except _TryAgainError as error:
            fault = error
            log(Message(f"{task}: {origin}: {fault} (attempt {attempt + 1} of {ATTEMPTS})"))
    raise _NotHadError(f"{fault}, {ATTEMPTS} times")


def _download(url: str, target: Path, limit: int, task: str, log: Log) -> Fetched:
    try:
        with requests.get(
            url,
            stream=True,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            headers={"Accept-Encoding": "identity", "User-Agent": "gpt-pipeline"},
        ) as response:
            if response.status_code == 429 or response.status_code >= 500:
                raise _TryAgainError(f"HTTP {response.status_code}")
            if response.status_code != 200:
                raise _NotHadError(f"HTTP {response.status_code}")
            announced = response.headers.get("Content-Length", "")
            total = int(announced) if announced.isdecimal() else 0
            if total > limit:
                raise _NotHadError(f"{total} bytes announced, more than the {limit} allowed")
            blocks = _shown(response.iter_content(_BLOCK), task, total, log)
            return Fetched(*_write(target, blocks, limit), url)
    except requests.Timeout:
        raise _TryAgainError("no answer in time") from None
    except requests.exceptions.ChunkedEncodingError:
        raise _TryAgainError("the connection broke off") from None
    except requests.exceptions.SSLError:
        raise _NotHadError("its certificate cannot be verified") from None
    except requests.ConnectionError:
        raise _TryAgainError("the connection failed") from None
    except requests.RequestException as error:
        raise _NotHadError(type(error).__name__) from None


def _write(target: Path, blocks: Iterable[bytes], limit: int) -> tuple[int, str]:
    """Write `blocks`, at most `limit` bytes; return how many, and their sha256."""
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        for block in blocks:
            size += len(block)
            if size > limit:
                raise _NotHadError(
                    f"more than {limit} bytes; if that is right, set the source's bytes"
                )
            digest.update(block)
            file.write(block)
    return size, digest.hexdigest()


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _shown(blocks: Iterable[bytes], task: str, total: int, log: Log) -> Iterator[bytes]:
    """Pass `blocks` on and tell of the progress; without a known total there is none to tell."""
    done = 0
    for block in blocks:
        done += len(block)
        if total:
            log(Progress(task, done, total, "B"))
        yield block


def _is_web(place: str) -> bool:
    return place.startswith(("http://", "https://"))
