"""The files of one source, from a folder, a mirror or the web: complete and verified, or none."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import quote

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, Progress
from gpt.base.files import remove, sha256_of
from gpt.text.records import inside_path
from stages.download.archives import is_archive, is_hidden, matches, unpack
from stages.download.cache import Cache, place
from stages.download.sources import DownloadParams, Source
from stages.download.texts import JOINED, is_joined, line_of, lines_of, python_docs
from stages.download.transfer import (
    GENERAL_LIMIT,
    CancelledDownloadError,
    TransientError,
    UnavailableError,
    WrongFileError,
    blocks_of,
    errors_at,
    write_blocks,
)
from stages.download.web import Download

Via = Literal["here", "mirror", "cache", "web"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that was fetched.

    Attributes:
        file: its path in the output folder, with / between the parts.
        bytes: its size.
        sha256: of its bytes.
        origin: where it is from, for messages, never for an output.
        via: by which way, likewise.
        pin: the sha256 to check its source by: its own, or its archive's.
        joined: how many plain texts it holds as lines of JSON; 0 if it is as it was published.
    """

    file: str
    bytes: int
    sha256: str
    origin: str
    via: Via
    pin: str
    joined: int = 0


@dataclass(frozen=True, slots=True)
class SourceFetch:
    """Fetching one source.

    Attributes:
        source: what to fetch.
        folder: where its files go; removed if this fails.
        params: where to look, and for how long.
        local: the folder of local sources.
        cache: earlier downloads.
        stop: set to cancel.
        task: the name of the progress.
        log: receives the progress.
    """

    source: Source
    folder: Path
    params: DownloadParams
    local: Path
    cache: Cache
    stop: threading.Event
    task: str
    log: Log

    def run(self) -> list[Fetched]:
        """Write the files of the source, and return them in the order of their paths.

        Raises:
            InputError: they cannot be had anywhere, or a folder or the mirror has other files.
        """
        if self.source.builtin:
            return [self._python_docs()]
        if self.source.urls:
            return self._published()
        if self.source.file is None:
            return self._local_files()
        path = self.local / self.source.file
        where = f"(source {self.source.name!r}); correct"
        if not path.is_file():
            raise InputError(f"{path}: no such file {where} its file or download.local")
        self._refuse_outside(path)
        try:
            return self._take(path, str(path), "here")
        except UnavailableError as error:
            raise InputError(f"{path}: {error} {where} the file or the source") from None

    def _python_docs(self) -> Fetched:
        text = "reading the documentation inside the running Python"
        self.log(Message(f"download {self.source.builtin}: {text}"))
        saved = self.source.saved_name
        size, sha256 = write_blocks(self.folder / saved, map(line_of, python_docs()))
        return Fetched(saved, size, sha256, "the documentation inside Python", "here", sha256)

    # --- a folder or a glob -----------------------------------------------------------------------

    def _local_files(self) -> list[Fetched]:
        name, pattern = self.source.name, self.source.glob
        start = self.local / (self.source.folder or _fixed_part(str(pattern)))
        if self.source.folder and not start.is_dir():
            raise InputError(
                f"{start}: no such folder (source {name!r}); correct its folder or download.local"
            )
        root = self.local if pattern else start
        self._refuse_outside(start)  # os.walk follows it
        files = dict(sorted(self._files_below(start, root)))
        if not files:
            wanted = f"no file fits {pattern!r}" if pattern else "no file in it or below it"
            raise InputError(
                f"{root}: {wanted} (source {name!r}); put files there or correct the source"
            )
        if is_joined(self.source, list(files)):
            return [self._join([(path, str(path)) for path in files.values()], "here")]
        fetched = []
        for done, (saved, path) in enumerate(files.items()):
            self.log(Progress(self.task, done, len(files), "file"))
            try:
                fetched.append(self._copy(path, str(path), "here", saved))
            except UnavailableError as error:
                raise InputError(f"{path}: {error} (source {name!r}); correct it") from None
        self.log(Progress(self.task, len(files), len(files), "file"))
        return fetched

    def _files_below(self, start: Path, root: Path) -> Iterator[tuple[str, Path]]:
        """The visible files that the source names, each with its path in the output folder."""
        source = self.source

        def unreadable(error: OSError) -> None:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it so")

        for at, folders, names in os.walk(start, onerror=unreadable) if start.is_dir() else ():
            folders[:] = [name for name in folders if not is_hidden(name)]
            for path in (Path(at, name) for name in (*folders, *names)):
                relative = path.relative_to(root).as_posix()
                if is_hidden(relative):
                    continue
                if path.is_symlink() and path.is_dir():
                    raise InputError(
                        f"{path}: a link to a folder (source {source.name!r}); put the folder "
                        "itself there"
                    )
                if source.glob is not None and not matches(relative, source.glob):
                    continue
                try:  # before a message shows the path, which may have two lines
                    saved = f"{source.name}/{inside_path(relative)}"
                except ValueError as error:
                    raise InputError(
                        f"{root}: {error} (source {source.name!r}); rename it"
                    ) from None
                if path.is_symlink():
                    self._refuse_outside(path)
                if path.is_file():  # not a folder, device or pipe
                    yield saved, path

    def _join(self, texts: Sequence[tuple[Path, str]], via: Via, pin: str = "") -> Fetched:
        """Texts, each with its origin, as one file."""

        def lines() -> Iterator[bytes]:
            for done, (path, origin) in enumerate(texts):
                self.log(Progress(self.task, done, len(texts), "file"))
                if self.stop.is_set():
                    raise CancelledDownloadError
                with errors_at(path, origin):
                    try:
                        yield from lines_of(path, self.source)
                    except OSError as error:
                        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            self.log(Progress(self.task, len(texts), len(texts), "file"))

        saved = f"{self.source.name}/{JOINED}"
        (self.folder / saved).parent.mkdir(exist_ok=True)
        size, sha256 = write_blocks(self.folder / saved, lines())
        return Fetched(saved, size, sha256, saved, via, pin or sha256, joined=len(texts))

    def _refuse_outside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.local.resolve()):
            raise InputError(
                f"{path}: leads out of its folder (source {self.source.name!r}); put the file "
                "itself there"
            )

    # --- the mirror and the web -------------------------------------------------------------------

    def _published(self) -> list[Fetched]:
        source = self.source
        if kept := self._kept():
            return kept
        tried: list[str] = []
        passing: UnavailableError | None = None
        for origin, via in self._origins(tried):
            try:
                if via == "cache":
                    fetched = self._take_cached(origin)
                elif _is_web(origin):
                    fetched = self._download(origin, via)
                else:
                    fetched = self._take(Path(origin), origin, via)
            except UnavailableError as error:
                if via == "mirror" and isinstance(error, WrongFileError):
                    raise InputError(  # the user's own: an error in it should not be passed over
                        f"{origin}: {error} (source {source.name!r}); put the published file "
                        "there, or correct the source's sha256 and bytes"
                    ) from None
                tried.append(f"{origin} ({error})")
                if isinstance(error.__context__, TransientError):
                    passing = error
                continue
            if source.sha256 is None:
                text = f"{fetched[0].origin} is not checked; to have the same bytes always, give"
                pin = f"{text} the source sha256: {fetched[0].pin}"
                self.log(Message(f"{self.task}: {pin}", "warning"))
            return fetched
        raise InputError(
            f"source {source.name!r} could not be fetched; tried {'; '.join(tried) or 'no place'}; "
            f"put {(source.sought_names or (source.name,))[0]} into a folder and set "
            "download.mirror or GPT_PIPELINE_MIRROR to it"
            + (", or set download.offline: false" * self.params.offline)
        ) from passing

    def _origins(self, tried: list[str]) -> Iterable[tuple[str, Via]]:
        """The places to look, in order, and by which way; `tried` receives those ruled out."""
        source, mirror, offline = self.source, self.params.mirror, self.params.offline
        origins: list[tuple[str, Via]] = []
        if mirror is not None and not _is_web(mirror):
            folder = Path(mirror).expanduser()
            if not folder.is_dir():
                raise InputError(
                    f"mirror: {folder} is not a folder; set download.mirror or GPT_PIPELINE_MIRROR "
                    "to one, or to an address with https://"
                )
            names = [name for name in source.sought_names if (folder / name).is_file()]
            origins += [(str(folder / name), "mirror") for name in names[:1]]
            if not names:
                tried.append(f"{folder} (no {' or '.join(source.sought_names)} there)")
        elif mirror is not None and not offline:
            for name in source.sought_names:
                origins.append((f"{mirror.rstrip('/')}/{quote(name)}", "mirror"))
        if not offline:
            return [*origins, *((url, "web") for url in source.urls)]
        tried.append("no address, because offline is true")
        if source.sha256 is None:
            origins += [(url, "cache") for url in source.urls if self.cache.note(url).sha256]
        return origins

    def _take_cached(self, url: str) -> list[Fetched]:
        """The last download of an unpinned source."""
        sha256 = str(self.cache.note(url).sha256)
        path = self.cache.get(sha256)
        if path is None:
            raise UnavailableError("its last download is damaged")
        return self._take(path, url, "cache", sha256)

    def _kept(self) -> list[Fetched] | None:
        """What the cache has of a source whose sha256 is known."""
        source = self.source
        path = self.cache.get(source.sha256) if source.sha256 else None
        if path is None:
            return None
        try:
            return self._take(path, source.urls[0], "cache", source.sha256)
        except UnavailableError:
            return None  # the source's bytes or members are wrong: let its origin say so

    def _download(self, url: str, via: Via) -> list[Fetched]:
        source, cache = self.source, self.cache
        limit = source.bytes or GENERAL_LIMIT
        if source.member or source.members:  # the size of an archive is not known
            limit = max(limit, GENERAL_LIMIT)
        sha256 = None if source.member else source.sha256
        ends = time.monotonic() + self.params.timeout_seconds
        with cache.lock(url):
            if kept := self._kept():  # another source has just downloaded it
                return kept
            download = Download(url, sha256, cache, limit, ends, self.stop, self.task, self.log)
            path, found, is_new = download.run()
            try:
                fetched = self._take(path, url, via if is_new else "cache", found)
            except UnavailableError:
                cache.forget(url)
                raise
            if source.member and source.sha256:  # the next run asks for it by its sha256
                cache.add(self.folder / fetched[0].file, source.sha256)
                cache.forget(url)
            elif is_new:
                cache.keep(url, found)
        return fetched

    # --- into the output folder -------------------------------------------------------------------

    def _take(self, path: Path, origin: str, via: Via, sha256: str | None = None) -> list[Fetched]:
        """Write what is wanted of a file: itself, or members of the archive that it is.

        A mirror may have a member itself in place of its archive, as the cache has.

        Args:
            path: the file.
            origin: where it is from.
            via: by which way.
            sha256: its hash, if it is known and nobody else may change the file.

        Raises:
            UnavailableError: it is not what is wanted; nothing of it was written then.
        """
        source = self.source
        is_member = source.sha256 is not None and source.sha256 == sha256
        try:
            if source.members:
                return self._members(path, origin, via, sha256 or sha256_of(path))
            if source.member and not is_member and (via in ("here", "web") or is_archive(path)):
                fetched = self._member(path, origin, via)
            else:
                fetched = self._copy(path, origin, via, source.saved_name, sha256)
            if source.sha256 not in (None, fetched.sha256):
                raise WrongFileError(f"its sha256 is {fetched.sha256}, not {source.sha256}")
            if source.bytes not in (None, fetched.bytes):
                raise WrongFileError(f"it has {fetched.bytes} bytes, not {source.bytes}")
        except BaseException:
            remove(self.folder / source.saved_name)
            raise
        return [fetched]

    def _copy(
        self, path: Path, origin: str, via: Via, saved: str, sha256: str | None = None
    ) -> Fetched:
        target = self.folder / saved
        target.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is not None:
            place(path, target)
            return Fetched(saved, target.stat().st_size, sha256, origin, via, pin=sha256)
        try:
            file = path.open("rb")
        except OSError as error:
            raise UnavailableError(f"cannot be read: {error.strerror}") from None
        with file:
            total = 0 if self.source.gives_several else os.fstat(file.fileno()).st_size
            blocks = blocks_of(file, self.stop, self.log, self.task, total)
            size, sha256 = write_blocks(target, blocks)
        return Fetched(saved, size, sha256, origin, via, pin=sha256)

    def _member(self, path: Path, origin: str, via: Via) -> Fetched:
        member, saved = PurePosixPath(str(self.source.member)), self.source.saved_name
        unpacked = unpack(
            path,
            lambda name: PurePosixPath(name) == member,
            lambda name: self.folder / saved,
            self.source.bytes,
            self.stop,
        )
        if not unpacked:
            raise UnavailableError(f"the archive has no member {self.source.member!r}")
        _, size, sha256 = unpacked[0]
        return Fetched(saved, size, sha256, f"{origin}, member {member}", via, pin=sha256)

    def _members(self, path: Path, origin: str, via: Via, sha256: str) -> list[Fetched]:
        source, pattern = self.source, str(self.source.members)
        folder = self.folder / source.name
        if source.sha256 not in (None, sha256):
            raise WrongFileError(f"its sha256 is {sha256}, not {source.sha256}")
        unpacked = unpack(
            path,
            lambda name: matches(name, pattern) and not is_hidden(name),
            lambda name: folder / name,
            source.bytes,
            self.stop,
        )
        if not unpacked:
            raise UnavailableError(f"no member of the archive fits {pattern!r}")
        unpacked.sort()
        if is_joined(source, [name for name, _, _ in unpacked]):
            apart = folder.rename(self.folder / f".{source.name}.members")
            texts = [(apart / name, f"{origin}, member {name}") for name, _, _ in unpacked]
            joined = self._join(texts, via, sha256)
            shutil.rmtree(apart)
            return [joined]
        return [
            Fetched(f"{source.name}/{name}", size, own, f"{origin}, member {name}", via, pin=sha256)
            for name, size, own in unpacked
        ]


def _fixed_part(pattern: str) -> str:
    """The folder that all paths of a pattern are in."""
    parts = PurePosixPath(pattern).parts[:-1]
    n = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return "/".join(parts[:n])


def _is_web(place: str) -> bool:
    return place.startswith(("http://", "https://"))
