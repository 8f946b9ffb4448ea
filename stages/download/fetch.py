"""The files of one source brought here: from a folder, a mirror or the web; right or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar
from urllib.parse import quote

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, Progress
from gpt.base.files import sha256_of
from stages.download.archives import is_archive, is_hidden, matches, unpack
from stages.download.blocks import GENERAL_LIMIT, blocks_of, shown, write_blocks
from stages.download.cache import Cache, place
from stages.download.faults import (
    NotHadError,
    StoppedError,
    TryAgainError,
    WrongFileError,
    errors_at,
)
from stages.download.joined import JOINED, is_joined, lines_of
from stages.download.sources import Source, inside_path
from stages.download.web import Bounds, fetch_web

T = TypeVar("T")
Via = Literal["here", "mirror", "cache", "web"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look, and for how long.

    Attributes:
        local: the folder of local sources.
        mirror: a folder or a web address that is asked before a source's own addresses.
        offline: never open a connection.
        cache: what came from the web before.
        seconds: for one file from one address.
        stop: set when there is no use in going on.
    """

    local: Path
    mirror: str | None
    offline: bool
    cache: Cache
    seconds: float
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that came.

    Attributes:
        file: its path in the output folder, with / between the parts.
        bytes: its size.
        sha256: of its bytes.
        origin: where from, for messages, never for an output.
        via: through what, likewise.
        pin: the sha256 that tells its source apart: its own, or its archive's.
        joined: so many plain texts are in it, as lines of JSON; 0 where it is as it came.
    """

    file: str
    bytes: int
    sha256: str
    origin: str
    via: Via
    pin: str
    joined: int = 0


@dataclass(frozen=True, slots=True)
class _Found:
    """What a place gives, as a file: the one wanted or the archive it is in.

    Attributes:
        path: where it lies.
        origin: where it is from, as messages call it.
        via: through what it came.
        sha256: of its bytes, if known.
        is_member: it is no archive, but what was to be taken out of one.
    """

    path: Path
    origin: str
    via: Via
    sha256: str | None = None
    is_member: bool = False


def fetch_source(
    source: Source, folder: Path, places: Places, task: str, log: Log
) -> list[Fetched]:
    """Write the files of `source` into `folder`, in the order of their paths.

    Args:
        source: with anything but `builtin`.
        folder: goes away if this fails.
        places: where to look.
        task: what the progress is called.
        log: told of the progress.

    Raises:
        InputError: they are nowhere to be had, or what a folder or the mirror has is not them.
    """
    return _Fetch(source, folder, places, task, log).run()


@dataclass(frozen=True, slots=True)
class _Fetch:
    source: Source
    folder: Path
    places: Places
    task: str
    log: Log

    def run(self) -> list[Fetched]:
        if self.source.urls:
            return self._published()
        if self.source.file is not None:
            return self._local_file(self.source.file)
        return self._local_files()

    # --- from the local folder --------------------------------------------------------------------

    def _local_file(self, file: str) -> list[Fetched]:
        path, name = self.places.local / file, self.source.name
        if not path.is_file():
            raise InputError(
                f"{path}: no such file (source {name!r}); correct its file or download.local"
            )
        self._refuse_outside(path)
        try:
            return self._take(_Found(path, str(path), "here"))
        except WrongFileError as error:
            raise InputError(
                f"{path}: {error} (source {name!r}); correct the file or the source"
            ) from None
        except NotHadError as error:
            raise InputError(f"{path}: {error} (source {name!r}); correct either") from None

    def _local_files(self) -> list[Fetched]:
        """Those of a folder or a glob."""
        name, pattern = self.source.name, self.source.glob
        start = self.places.local / (self.source.folder or _fixed_part(str(pattern)))
        if self.source.folder and not start.is_dir():
            raise InputError(
                f"{start}: no such folder (source {name!r}); correct its folder or download.local"
            )
        root = self.places.local if pattern else start
        self._refuse_outside(start)  # os.walk follows it
        files = [
            (path, relative)
            for path in (self._walk(start) if start.is_dir() else ())
            if (relative := path.relative_to(root).as_posix())
            and (pattern is None or matches(relative, pattern))
            and not is_hidden(relative)
        ]
        plain = []
        for path, relative in sorted(files, key=lambda file: file[1]):
            try:  # first, for no line of ours may have two
                saved = f"{name}/{inside_path(relative)}"
            except ValueError as error:
                raise InputError(f"{root}: {error} (source {name!r}); rename it") from None
            if path.is_symlink():  # no folder is one, so nothing else leads out
                self._refuse_outside(path)
            if path.is_file():  # no device or pipe
                plain.append((path, saved))
        if not plain:
            wanted = f"no file fits {pattern!r}" if pattern else "no file in it or below it"
            raise InputError(
                f"{root}: {wanted} (source {name!r}); put files there or correct the source"
            )
        if is_joined(self.source, [saved for _, saved in plain]):
            return [self._join([(path, str(path)) for path, _ in plain], "here")]
        fetched = []
        for path, saved in self._counted(plain):
            try:
                fetched.append(self._copy(_Found(path, str(path), "here"), saved, None))
            except NotHadError as error:
                raise InputError(f"{path}: {error} (source {name!r}); correct it") from None
        return fetched

    def _join(self, texts: Sequence[tuple[Path, str]], via: Via, pin: str = "") -> Fetched:
        """Texts, each with where it is from, as one file."""

        def lines() -> Iterator[bytes]:
            for path, origin in self._counted(texts):
                if self.places.stop.is_set():
                    raise StoppedError
                with errors_at(path, origin):
                    try:
                        yield from lines_of(path, self.source)
                    except OSError as error:
                        raise InputError(f"{path}: cannot be read: {error.strerror}") from None

        saved = f"{self.source.name}/{JOINED}"
        target = self.folder / saved
        target.parent.mkdir(exist_ok=True)
        size, sha256 = write_blocks(target, lines())
        return Fetched(saved, size, sha256, saved, via, pin or sha256, joined=len(texts))

    def _counted(self, files: Sequence[T]) -> Iterator[T]:
        """The files, while the progress is told."""
        for n, file in enumerate(files):
            self.log(Progress(self.task, n, len(files), "file"))
            yield file
        self.log(Progress(self.task, len(files), len(files), "file"))

    def _walk(self, start: Path) -> Iterator[Path]:
        """All that is no folder below `start`, but what is hidden."""

        def unreadable(error: OSError) -> None:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror}); make it so")

        for at, folders, names in os.walk(start, onerror=unreadable):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                if (path := Path(at, name)).is_symlink():
                    raise InputError(
                        f"{path}: a link to a folder (source {self.source.name!r}); put the "
                        "folder itself there"
                    )
            yield from (Path(at, name) for name in names if not name.startswith("."))

    def _refuse_outside(self, path: Path) -> None:
        if not path.resolve().is_relative_to(self.places.local.resolve()):
            raise InputError(
                f"{path}: leads out of its folder (source {self.source.name!r}); put the file "
                "itself there"
            )

    # --- from the mirror and the web --------------------------------------------------------------

    def _published(self) -> list[Fetched]:
        if kept := self._kept():
            return kept
        source = self.source
        tried: list[str] = []
        passing: NotHadError | None = None
        for take, origin, from_mirror in self._origins(tried):
            try:
                fetched = take(origin)
            except WrongFileError as error:
                if from_mirror:  # the user's own: an error in it should not be passed over
                    raise InputError(
                        f"{origin}: {error} (source {source.name!r}); put the published file "
                        "there, or correct the source's sha256 and bytes"
                    ) from None
                tried.append(f"{origin} ({error})")
            except NotHadError as error:
                tried.append(f"{origin} ({error})")
                if isinstance(error.__context__, TryAgainError):
                    passing = error
            else:
                self._tell_unpinned(fetched)
                return fetched
        sought = (source.sought_names or (source.name,))[0]
        raise InputError(
            f"source {source.name!r} could not be fetched; tried {'; '.join(tried) or 'no place'}; "
            f"put {sought} into a folder and set download.mirror or "
            "GPT_PIPELINE_MIRROR to it" + (", or set download.offline: false" * self.places.offline)
        ) from passing

    def _origins(
        self, tried: list[str]
    ) -> Iterator[tuple[Callable[[str], list[Fetched]], str, bool]]:
        """The places to look, each with how to take from it and whether it is the mirror; asked
        lazily.
        """
        mirror, source = self.places.mirror, self.source
        if mirror is not None and not _is_web(mirror):
            folder = Path(mirror).expanduser()
            if not folder.is_dir():
                raise InputError(
                    f"mirror: {folder} is not a folder; set download.mirror or GPT_PIPELINE_MIRROR "
                    "to one, or to an address with https://"
                )
            found = [folder / name for name in source.sought_names if (folder / name).is_file()]
            if found:
                yield self._from_mirror, str(found[0]), True
            else:
                tried.append(f"{folder} (no {' or '.join(source.sought_names)} there)")
        if self.places.offline:
            for url in source.urls:
                if source.sha256 is None and self.places.cache.note(url).sha256:
                    yield self._from_last_time, url, False
            tried.append("no address, because offline is true")
            return
        if mirror is not None and _is_web(mirror):
            for name in source.sought_names:
                yield self._from_web_mirror, f"{mirror.rstrip('/')}/{quote(name)}", True
        for url in source.urls:
            yield self._from_web, url, False

    def _from_mirror(self, path: str) -> list[Fetched]:
        found = _Found(Path(path), path, "mirror")
        return self._take(self._perhaps_member(found))

    def _from_web_mirror(self, url: str) -> list[Fetched]:
        return self._download(url, "mirror")

    def _from_web(self, url: str) -> list[Fetched]:
        return self._download(url, "web")

    def _from_last_time(self, url: str) -> list[Fetched]:
        sha256 = str(self.places.cache.note(url).sha256)
        path = self.places.cache.get(sha256)
        if path is None:
            raise NotHadError("what came from it last is damaged")
        return self._take(_Found(path, url, "cache", sha256))

    def _kept(self) -> list[Fetched] | None:
        """What the cache has of a source whose sha256 is known."""
        source = self.source
        path = self.places.cache.get(source.sha256) if source.sha256 else None
        if path is None:
            return None
        is_member = source.member is not None
        found = _Found(path, source.urls[0], "cache", source.sha256, is_member=is_member)
        try:
            return self._take(found)
        except NotHadError:
            return None  # the source's bytes or members are wrong: let what it is from say so

    def _download(self, url: str, via: Via) -> list[Fetched]:
        source, cache = self.source, self.places.cache
        limit = source.bytes or GENERAL_LIMIT
        if source.member or source.members:  # of an archive no size is known
            limit = max(limit, GENERAL_LIMIT)
        sha256 = None if source.member else source.sha256
        bounds = Bounds(limit, self.places.seconds, self.places.stop)
        with cache.lock(url):
            if kept := self._kept():  # another source had it from there meanwhile
                return kept
            came = fetch_web(url, sha256, cache, bounds, self.task, self.log)
            found = _Found(came.path, url, via if came.fetched else "cache", came.sha256)
            try:
                fetched = self._take(self._perhaps_member(found) if via == "mirror" else found)
            except NotHadError:
                cache.forget(url)
                raise
            if source.member and source.sha256:  # asked for by its sha256 next time
                cache.add(self.folder / fetched[0].file, source.sha256)
                cache.forget(url)
            elif came.fetched:
                cache.keep(url, came.sha256)
        return fetched

    def _perhaps_member(self, found: _Found) -> _Found:
        """A mirror may keep the member itself in place of the archive."""
        is_member = self.source.member is not None and not is_archive(found.path)
        return replace(found, is_member=is_member)

    def _tell_unpinned(self, fetched: list[Fetched]) -> None:
        if self.source.sha256 is None:
            self.log(
                Message(
                    f"{self.task}: {fetched[0].origin} is not checked; to have the same bytes "
                    f"always, give the source sha256: {fetched[0].pin}",
                    "warning",
                )
            )

    # --- into the output folder -------------------------------------------------------------------

    def _take(self, found: _Found) -> list[Fetched]:
        """Write what is wanted of `found`, and nothing if it is not that."""
        source = self.source
        target = self.folder / source.saved_name
        try:
            if source.members:
                return self._members(found)
            if source.member and not found.is_member:
                fetched = self._member(found)
            else:
                fetched = self._copy(found, source.saved_name, found.sha256)
            self._check(fetched)
        except BaseException:
            if source.gives_several:
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink(missing_ok=True)
            raise
        return [fetched]

    def _copy(self, found: _Found, saved: str, sha256: str | None) -> Fetched:
        """The file as it is; `sha256` if it is known and the file nobody's who may change it."""
        target = self.folder / saved
        target.parent.mkdir(parents=True, exist_ok=True)
        if sha256 is not None:
            place(found.path, target)
            size = target.stat().st_size
        else:
            try:
                file = found.path.open("rb")
            except OSError as error:
                raise NotHadError(f"cannot be read: {error.strerror}") from None
            with file:
                total = os.fstat(file.fileno()).st_size
                blocks = blocks_of(file, self.places.stop)
                if not self.source.gives_several:  # of several it is the files that are counted
                    blocks = shown(blocks, self.task, total, self.log)
                size, sha256 = write_blocks(target, blocks)
        return Fetched(saved, size, sha256, found.origin, found.via, pin=sha256)

    def _member(self, found: _Found) -> Fetched:
        source, target = self.source, self.folder / self.source.saved_name
        unpacked = unpack(
            found.path,
            lambda name: PurePosixPath(name) == PurePosixPath(str(source.member)),
            lambda name: target,
            source.bytes,
            self.places.stop,
        )
        if not unpacked:
            raise NotHadError(f"the archive has no member {source.member!r}")
        size, sha256 = unpacked[0].bytes, unpacked[0].sha256
        origin = f"{found.origin}, member {source.member}"
        return Fetched(source.saved_name, size, sha256, origin, found.via, pin=sha256)

    def _members(self, found: _Found) -> list[Fetched]:
        source, pattern = self.source, str(self.source.members)
        sha256 = found.sha256 or sha256_of(found.path)
        if source.sha256 not in (None, sha256):
            raise WrongFileError(f"its sha256 is {sha256}, not {source.sha256}")
        unpacked = unpack(
            found.path,
            lambda name: matches(name, pattern) and not is_hidden(name),
            lambda name: self.folder / source.name / name,
            source.bytes,
            self.places.stop,
        )
        if not unpacked:
            raise NotHadError(f"no member of the archive fits {pattern!r}")
        members = [
            Fetched(
                f"{source.name}/{member.name}",
                member.bytes,
                member.sha256,
                f"{found.origin}, member {member.name}",
                found.via,
                pin=sha256,
            )
            for member in sorted(unpacked, key=lambda member: member.name)
        ]
        if not is_joined(source, [member.file for member in members]):
            return members
        apart = self.folder / f".{source.name}.members"
        apart.mkdir()
        (self.folder / source.name).rename(apart / source.name)
        texts = [(apart / member.file, member.origin) for member in members]
        joined = self._join(texts, found.via, sha256)
        shutil.rmtree(apart)
        return [joined]

    def _check(self, fetched: Fetched) -> None:
        """Refuse another file than the one wanted."""
        source = self.source
        if source.sha256 not in (None, fetched.sha256):
            raise WrongFileError(f"its sha256 is {fetched.sha256}, not {source.sha256}")
        if source.bytes not in (None, fetched.bytes):
            raise WrongFileError(f"it has {fetched.bytes} bytes, not {source.bytes}")


def _fixed_part(pattern: str) -> str:
    """The folder that a pattern's paths are all in."""
    parts = PurePosixPath(pattern).parts[:-1]
    n = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return "/".join(parts[:n])


def _is_web(place: str) -> bool:
    return place.startswith(("http://", "https://"))
