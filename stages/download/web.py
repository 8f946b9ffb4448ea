"""One file from the web: within its time and size, resumed where an attempt broke off."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from gpt.base.events import Log, Message, Progress
from stages.download.cache import Cache, Note
from stages.download.transfer import (
    READ_SIZE,
    CancelledDownloadError,
    TransientError,
    UnavailableError,
    too_large,
)

CONNECT_SECONDS, READ_SECONDS = 10, 30
ATTEMPTS, BACK_OFF_SECONDS = 4, 0.5
"""So many attempts in a row may bring no new byte, with a pause between them that doubles."""

RETRY_AFTER_SECONDS = 60
"""The longest pause that a server may ask for."""

_PACKED = (".gz", ".tgz", ".zst", ".bz2", ".xz")  # such a file may be said to be encoded so
_AGENT = "gpt-pipeline"
_BUSY = (408, 425, 429)


@dataclass(slots=True)
class Download:
    """A file to download into `cache` as a beginning that is complete; its lock must be held.

    Attributes:
        url: of http or https.
        sha256: of the file, if known: then a download can be resumed even if the server states no
            version, and the result is checked.
        cache: where earlier attempts left their beginning.
        limit: the most bytes of the file.
        ends: when to give up, in seconds of `time.monotonic`.
        stop: set to cancel.
        task: the name of the progress.
        log: receives the progress and the faults.
    """

    url: str
    sha256: str | None
    cache: Cache
    limit: int
    ends: float
    stop: threading.Event
    task: str
    log: Log
    _size: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def run(self) -> tuple[Path, str, bool]:
        """Download the file.

        Returns:
            The path of the file in the cache; its sha256, which may still differ from the one
            wanted; and whether it was downloaded now.

        Raises:
            UnavailableError: it cannot be had here.
            CancelledDownloadError: `stop` is set.
        """
        fruitless, furthest = 0, 0
        while True:
            try:
                return self._attempt()
            except TransientError as fault:
                fruitless = 0 if self._size > furthest else fruitless + 1
                furthest = max(furthest, self._size)
                if fruitless == ATTEMPTS:
                    raise UnavailableError(f"{fault}, {ATTEMPTS} times") from None
                self.log(Message(f"{self.task}: {self.url}: {fault}; trying again"))
                pause = max(BACK_OFF_SECONDS * 2 ** max(fruitless - 1, 0), fault.seconds)
                self.stop.wait(min(pause, self._seconds_left()))

    def _attempt(self) -> tuple[Path, str, bool]:
        note = self._load()
        if self._size and self._digest.hexdigest() == self.sha256:
            return self._complete()
        known = self.cache.get(note.sha256) if note.sha256 and not self.sha256 else None
        left = self._seconds_left()
        headers: dict[str, str | None] = {"Accept-Encoding": "identity", "User-Agent": _AGENT}
        if self._size:
            headers |= {"Range": f"bytes={self._size}-", "If-Range": note.version}
        elif known:
            headers |= {"If-None-Match": note.etag, "If-Modified-Since": note.modified}
        try:
            with requests.get(
                self.url,
                headers=headers,
                stream=True,
                hooks={"response": _refuse_long_redirect},
                timeout=(min(CONNECT_SECONDS, left), min(READ_SECONDS, left)),
            ) as response:
                self._seconds_left()
                if response.status_code == 304 and known:
                    return known, str(note.sha256), False
                note = self._accept(response, note)
                resumed = self._size > 0
                self._receive(response, note)
        except requests.exceptions.SSLError:
            raise UnavailableError("its certificate cannot be verified") from None
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError):
            raise TransientError("no answer in time") from None
        except (requests.ConnectionError, urllib3.exceptions.HTTPError):
            raise TransientError("the connection failed") from None
        except (requests.RequestException, ValueError) as error:
            raise UnavailableError(f"{error}"[:200]) from None
        wrong = self.sha256 is not None and self._digest.hexdigest() != self.sha256
        if wrong and resumed:  # its beginning may be another file's
            self.cache.forget(self.url)
            raise TransientError(f"its sha256 is {self._digest.hexdigest()}, not {self.sha256}")
        if wrong if note.bytes is None else self._size < note.bytes:
            raise TransientError("the connection failed")
        return self._complete()

    def _load(self) -> Note:
        """Read the beginning that is there, if its version is known; return its note."""
        note = self.cache.note(self.url)
        partial = self.cache.partial(self.url)
        self._size, self._digest = 0, hashlib.sha256()
        if not (self.sha256 or note.version):
            partial.unlink(missing_ok=True)
        if partial.is_file():
            self._size = partial.stat().st_size
            with partial.open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256")
        return note

    def _accept(self, response: requests.Response, note: Note) -> Note:
        """Check the head of a response; return what it states of the file."""
        ways = [each.url.startswith("https:") for each in (*response.history, response)]
        if self.sha256 is None and ways[0] and not all(ways):
            raise UnavailableError(
                "redirected from https to http; give its sha256 if that is right"
            )
        status, headers = response.status_code, response.headers
        if status == 206 and self._size:
            total = r"(\d+|\*)" if note.bytes is None else rf"({note.bytes}|\*)"
            said = headers.get("Content-Range", "").strip()
            other = note.etag and headers.get("ETag", note.etag) != note.etag
            if other or not re.fullmatch(rf"bytes {self._size}-\d+/{total}", said):
                self.cache.forget(self.url)
                raise TransientError(f"asked for bytes from {self._size} on, it sent {said[:80]!r}")
        elif status == 200:  # it knows no ranges, or has another version
            encoding = headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity") and not urlsplit(self.url).path.endswith(_PACKED):
                raise UnavailableError(f"sent in the encoding {encoding[:20]!r}, not asked for")
            self.cache.forget(self.url)
            self._size, self._digest = 0, hashlib.sha256()
            etag, length = headers.get("ETag", "W/"), headers.get("Content-Length", "")
            note = Note(
                self.url,
                etag=None if etag.startswith("W/") else etag,
                modified=headers.get("Last-Modified"),
                bytes=int(length) if length.isdecimal() else None,
            )
            self.cache.write_note(note)
        elif status in (*_BUSY, 416) or status >= 500:
            if status == 416:  # there is nothing behind the beginning
                self.cache.forget(self.url)
            raise TransientError(f"HTTP {status}", retry_after(headers, RETRY_AFTER_SECONDS))
        else:
            raise UnavailableError(f"HTTP {status}")
        if note.bytes is not None and note.bytes > self.limit:
            raise UnavailableError(
                f"{note.bytes} bytes announced, more than the {self.limit} allowed"
            )
        return note

    def _receive(self, response: requests.Response, note: Note) -> None:
        with self.cache.partial(self.url).open("ab") as file:
            # read1, for waiting until a whole block is there would make the deadline wait too
            while block := response.raw.read1(READ_SIZE, decode_content=False):
                self._seconds_left()  # first: once cancelled, nothing is written any more
                self._size += len(block)
                if self._size > self.limit:
                    file.close()
                    self.cache.forget(self.url)
                    raise too_large(self.limit)
                file.write(block)
                self._digest.update(block)
                if note.bytes:
                    done = min(self._size, note.bytes)
                    self.log(Progress(self.task, done, note.bytes, unit="B"))

    def _complete(self) -> tuple[Path, str, bool]:
        if self._size:
            self.log(Progress(self.task, self._size, self._size, "B"))
        partial = self.cache.partial(self.url)
        partial.touch()
        return partial, self._digest.hexdigest(), True

    def _seconds_left(self) -> float:
        if self.stop.is_set():
            raise CancelledDownloadError
        left = self.ends - time.monotonic()
        if left <= 0:
            raise UnavailableError(
                "not complete in the time allowed; set download.timeout_seconds higher if it "
                "needs longer"
            )
        return left


def _refuse_long_redirect(response: requests.Response, **_: Any) -> None:
    """Requests reads the body of a redirect to its end, into memory."""
    if response.is_redirect and len(response.raw.read(READ_SIZE)) == READ_SIZE:
        raise UnavailableError("redirected with a long body")


def retry_after(headers: Mapping[str, str], at_most: float) -> float:
    """The pause in seconds that a server asks for in `Retry-After`, a number or a date.

    Args:
        headers: of its response.
        at_most: the longest pause.
    """
    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return min(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0")), at_most)
    return 0.0
