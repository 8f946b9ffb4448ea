"""One file from the web: in time, within its bound, and going on where an attempt broke off."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from gpt.base.events import Log, Message, Progress
from stages.download.blocks import BLOCK, too_many
from stages.download.cache import Cache, Note
from stages.download.faults import NotHadError, StoppedError, TryAgainError

CONNECT_SECONDS, READ_SECONDS = 10, 30
ATTEMPTS, BACK_OFF_SECONDS = 4, 0.5
"""So many attempts in a row may bring nothing new, with a pause that doubles between them."""

RETRY_AFTER_SECONDS = 60
"""The longest pause that a server may ask for."""

REDIRECTS = 10
_BUSY = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Came:
    """A whole file: where it lies in the cache, its size, its sha256, and whether it was there."""

    path: Path
    bytes: int
    sha256: str
    fetched: bool = True


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a download may take, and what ends it.

    Attributes:
        bytes: the most bytes of the file.
        seconds: for all attempts together.
        stop: set when there is no use in going on.
    """

    bytes: int
    seconds: float
    stop: threading.Event


def fetch_web(
    url: str, sha256: str | None, cache: Cache, bounds: Bounds, task: str, log: Log
) -> Came:
    """Bring the file at `url` into `cache`, as a beginning that is whole; its lock must be held.

    Args:
        url: of http or https.
        sha256: of the file, if known: then attempts can go on without a word from the server on
            versions, and what comes is as good as checked.
        cache: where earlier attempts left their beginning.
        bounds: of size and time.
        task: what the progress is called.
        log: told of the progress and of the faults.

    Returns:
        The file; its sha256 may still be another than the one wanted.

    Raises:
        NotHadError: it does not come.
        StoppedError: there was no use in going on.
    """
    return _Download(url, sha256, cache, bounds, task, log).run()


class _Download:
    def __init__(
        self, url: str, sha256: str | None, cache: Cache, bounds: Bounds, task: str, log: Log
    ) -> None:
        self._url, self._sha256, self._cache = url, sha256, cache
        self._bounds, self._task, self._log = bounds, task, log
        self._partial = cache.partial(url)
        self._ends = time.monotonic() + bounds.seconds
        self._size, self._digest = 0, hashlib.sha256()  # of the beginning that is here
        self._resumed = False

    def run(self) -> Came:
        fruitless, furthest, anew = 0, 0, False
        while True:
            try:
                with requests.Session() as session:
                    came = self._attempt(session)
            except TryAgainError as fault:
                fruitless = 0 if self._size > furthest else fruitless + 1
                furthest = max(furthest, self._size)
                if fruitless == ATTEMPTS:
                    raise NotHadError(f"{fault}, {ATTEMPTS} times") from None
                self._log(Message(f"{self._task}: {self._url}: {fault}; trying again"))
                self._pause(max(BACK_OFF_SECONDS * 2 ** max(fruitless - 1, 0), fault.seconds))
                continue
            if came.sha256 == self._sha256 or self._sha256 is None or not self._resumed or anew:
                return came
            anew = True  # the beginning was of something else
            self._cache.forget(self._url)

    def _attempt(self, session: requests.Session) -> Came:
        note = self._load()
        if self._size and self._digest.hexdigest() == self._sha256:
            return self._whole()
        known = self._cache.get(note.sha256) if note.sha256 and not self._sha256 else None
        with self._broken_off_told(), self._ask(session, self._headers(note, known)) as response:
            status = response.status_code
            if status == 304 and known:
                return Came(known, known.stat().st_size, str(note.sha256), fetched=False)
            if status == 206 and self._size:
                note = self._going_on(response, note)
            elif status == 200:
                note = self._from_the_start(response)
            else:
                raise self._no_file(response)
            self._resumed = self._size > 0
            self._receive(response, note)
        if note.bytes is not None and self._size < note.bytes and not self._is_wanted():
            raise TryAgainError("the connection broke off")
        if note.bytes is None and self._sha256 and not self._is_wanted():
            raise TryAgainError(  # nothing else tells a connection that broke off from the end
                f"no size announced, and its sha256 is {self._digest.hexdigest()}, "
                f"not {self._sha256}"
            )
        return self._whole()

    def _load(self) -> Note:
        """Take up the beginning that is here, if it is known of what, and what is known of it."""
        note = self._cache.note(self._url)
        self._size, self._digest = 0, hashlib.sha256()
        if not (self._sha256 or note.version):
            self._partial.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError), self._partial.open("rb") as file:
            while block := file.read(BLOCK):
                self._size += len(block)
                self._digest.update(block)
        return note

    def _headers(self, note: Note, known: Path | None) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "gpt-pipeline"}
        if self._size:
            headers["Range"] = f"bytes={self._size}-"
            if note.version:
                headers["If-Range"] = note.version
        elif known and note.etag:
            headers["If-None-Match"] = note.etag
        elif known and note.modified:
            headers["If-Modified-Since"] = note.modified
        return headers

    # --- the answer -------------------------------------------------------------------------------

    def _ask(self, session: requests.Session, headers: dict[str, str]) -> requests.Response:
        """The answer, its body still to come, from wherever the address leads."""
        url = self._url
        for _ in range(REDIRECTS + 1):
            response = self._in_time(partial(self._get, session, url, headers))
            if not response.is_redirect:
                return response
            response.close()
            url = self._next(url, response.headers["location"])
        raise NotHadError(f"redirected in a loop, or more than {REDIRECTS} times")

    def _get(
        self, session: requests.Session, url: str, headers: dict[str, str]
    ) -> requests.Response:
        left = self._seconds_left()
        try:
            request = session.prepare_request(requests.Request("GET", url, headers))
            settings: Any = session.merge_environment_settings(request.url, {}, True, None, None)
            # Not session.get: of a redirection it reads the body, however long that is.
            return session.get_adapter(str(request.url)).send(
                request,
                timeout=(min(CONNECT_SECONDS, left), min(READ_SECONDS, left)),
                **settings,
            )
        except requests.Timeout:
            raise TryAgainError("no answer in time") from None
        except requests.exceptions.SSLError:
            raise NotHadError("its certificate cannot be verified") from None
        except requests.ConnectionError:
            raise TryAgainError("the connection failed") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise NotHadError(type(error).__name__) from None

    def _in_time(self, ask: Callable[[], requests.Response]) -> requests.Response:
        """`ask`, or a fault: no time limit of a socket ends an answer of one byte at a time."""
        answers: queue.SimpleQueue[requests.Response | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                answers.put(ask())
            except BaseException as error:
                answers.put(error)

        threading.Thread(target=work, name="download-answer", daemon=True).start()
        try:
            answer = answers.get(timeout=min(CONNECT_SECONDS + READ_SECONDS, self._seconds_left()))
        except queue.Empty:
            self._seconds_left()
            raise TryAgainError("no answer in time") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _next(self, url: str, location: str) -> str:
        with contextlib.suppress(UnicodeError):
            location = location.encode("latin-1").decode("utf-8")
        try:
            target = urljoin(url, location)
            scheme, host = urlsplit(target).scheme, urlsplit(target).hostname
        except ValueError:
            scheme, host = "", None
        if scheme not in ("http", "https") or not host:
            raise NotHadError(f"redirected to {location[:200]!r}, which is no address of https")
        if scheme == "http" and urlsplit(url).scheme == "https" and self._sha256 is None:
            raise NotHadError("redirected from https to http; give its sha256 if that is right")
        return target

    def _no_file(self, response: requests.Response) -> Exception:
        status = response.status_code
        if status == 416 and self._size:
            self._cache.forget(self._url)
            return TryAgainError(f"nothing behind the {self._size} bytes that came before")
        if status in _BUSY or status >= 500:
            return TryAgainError(
                f"HTTP {status}", retry_after(response.headers, RETRY_AFTER_SECONDS)
            )
        return NotHadError(f"HTTP {status}")

    def _from_the_start(self, response: requests.Response) -> Note:
        """All of it, whatever is here: the server knows no ranges, or has another version."""
        self._cache.forget(self._url)
        self._size, self._digest = 0, hashlib.sha256()
        etag = response.headers.get("ETag")
        length = response.headers.get("Content-Length", "")
        note = Note(
            self._url,
            etag=None if etag is None or etag.startswith("W/") else etag,
            modified=response.headers.get("Last-Modified"),
            bytes=int(length) if length.isdecimal() else None,
        )
        self._refuse(response, note)
        self._cache.write_note(note)
        return note

    def _going_on(self, response: requests.Response, note: Note) -> Note:
        """The rest of what is here; anything else is refused and all of it asked for again."""
        said = response.headers.get("Content-Range", "")
        span = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", said.strip())
        total = int(span[3]) if span and span[3] != "*" else note.bytes
        etag = response.headers.get("ETag")
        if (
            span is None
            or int(span[1]) != self._size
            or (total is not None and int(span[2]) >= total)
            or (note.bytes is not None and total != note.bytes)
            or (note.etag and etag and etag != note.etag)
        ):
            self._cache.forget(self._url)
            raise TryAgainError(
                f"bytes from {self._size} on were asked for, and its Content-Range is {said[:80]!r}"
            )
        note = replace(note, bytes=total)
        self._refuse(response, note)
        return note

    def _refuse(self, response: requests.Response, note: Note) -> None:
        """Refuse what is too large or packed in a way that was not asked for."""
        if note.bytes is not None and note.bytes > self._bounds.bytes:
            raise NotHadError(
                f"{note.bytes} bytes announced, more than the {self._bounds.bytes} allowed"
            )
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        # Some servers say of a file that is packed itself that it was packed for the journey.
        if encoding not in ("", "identity") and not urlsplit(self._url).path.endswith(
            (".gz", ".tgz", ".zst", ".bz2", ".xz")
        ):
            raise NotHadError(f"sent in the encoding {encoding[:20]!r}, which was not asked for")

    # --- its body ---------------------------------------------------------------------------------

    def _receive(self, response: requests.Response, note: Note) -> None:
        with self._partial.open("ab") as file:
            for block in self._blocks(response):
                self._size += len(block)
                if self._size > self._bounds.bytes:
                    file.close()
                    self._cache.forget(self._url)
                    raise too_many(self._bounds.bytes)
                file.write(block)
                self._digest.update(block)
                if note.bytes:
                    self._log(
                        Progress(self._task, min(self._size, note.bytes), note.bytes, unit="B")
                    )

    def _blocks(self, response: requests.Response) -> Iterator[bytes]:
        """What has come, as it comes: waiting for a whole block would make the clock wait too."""
        while block := response.raw.read1(BLOCK, decode_content=False):
            self._seconds_left()  # first: once stopped, nothing is written any more
            yield block

    @contextlib.contextmanager
    def _broken_off_told(self) -> Iterator[None]:
        """A body that breaks off is a fault, unless what came is the file that is wanted."""
        try:
            yield
        except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
            fault = "no answer in time"
        except urllib3.exceptions.HTTPError:
            fault = "the connection broke off"
        else:
            return
        if not self._is_wanted():
            raise TryAgainError(fault)

    def _is_wanted(self) -> bool:
        return self._digest.hexdigest() == self._sha256

    def _whole(self) -> Came:
        if self._size:
            self._log(Progress(self._task, self._size, self._size, "B"))
        self._partial.touch()
        return Came(self._partial, self._size, self._digest.hexdigest())

    # --- time -------------------------------------------------------------------------------------

    def _seconds_left(self) -> float:
        if self._bounds.stop.is_set():
            raise StoppedError
        left = self._ends - time.monotonic()
        if left <= 0:
            raise NotHadError(
                f"not whole after {self._bounds.seconds:g} seconds; set download.timeout_seconds "
                "higher if it needs longer"
            )
        return left

    def _pause(self, seconds: float) -> None:
        self._bounds.stop.wait(min(seconds, self._seconds_left()))
        self._seconds_left()


def retry_after(headers: Mapping[str, str], at_most: float) -> float:
    """For how many seconds a server asks to be left alone: its `Retry-After`, a number or a date.

    Args:
        headers: of its response, by any case of their names.
        at_most: what is heeded of it.
    """
    said = headers.get("Retry-After", "").strip()
    if said.isdecimal():
        seconds = float(said[:9])
    else:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            seconds = 0.0
    return min(max(seconds, 0.0), at_most)
