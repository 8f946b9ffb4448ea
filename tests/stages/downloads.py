"""What the tests of the stage download share: small sources, a run of it, a server of faults."""

import contextlib
import hashlib
import http.server
import json
import threading
import time

import pytest
from pydantic import TypeAdapter

from gpt.base.errors import InputError
from stages.download import download
from stages.download.sources import DownloadParams

STORY = b"Once upon a time.\n\n\nAnd then.\n"
MESSAGES = b"".join(b"%s\tmessage %d\n" % (b"ham" if i % 3 else b"spam", i) for i in range(30))
RECORDS = json.dumps([{"instruction": f"Do {i}.", "input": "", "output": "ok"} for i in range(9)])
FOLDERS = ("corpus", "messages", "instructions", "gpt2")
UNREACHABLE = "https://data.invalid/some/story.txt"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_local(tmp_path):
    """The folder of local sources, `samples`."""
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "stories.txt").write_bytes(STORY)
    (folder / "messages.tsv").write_bytes(MESSAGES)
    (folder / "instructions.json").write_text(RECORDS)
    (folder / "nano").mkdir()
    (folder / "nano" / "config.json").write_bytes(b"{}")
    return folder


def params(**changes):
    return TypeAdapter(DownloadParams).validate_python(
        {
            "local": "samples",
            "corpus": [{"name": "stories", "file": "stories.txt", "separator": "\n\n\n"}],
            "messages": [{"name": "messages", "file": "messages.tsv"}],
            "instructions": [{"name": "instructions", "file": "instructions.json"}],
            "gpt2": [{"name": "config", "file": "nano/config.json"}],
            **changes,
        }
    )


def run(tmp_path, params, local=None, **options):
    raw = tmp_path / "raw"
    return download(
        params,
        local=local or tmp_path / "samples",
        **{name: raw / name for name in FOLDERS},
        metrics=tmp_path / "metrics.json",
        **options,
    )


def story(content=STORY, **where):
    """A corpus of one source with the hash of `content`."""
    return [{"name": "story", "sha256": sha256(content), **where}]


def refused(tmp_path, params, complaint, **options):
    """Run, see it refused in one line that matches, and nothing left; return the line."""
    with pytest.raises(InputError, match=complaint) as caught:
        run(tmp_path, params, **options)
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)
    raw = tmp_path / "raw"
    assert not raw.exists() or not list(raw.iterdir())
    assert not (tmp_path / "metrics.json").exists()
    return str(caught.value)


def corpus_files(tmp_path):
    """The corpus as it came: path in its folder -> bytes, without `sources.json`."""
    folder = tmp_path / "raw/corpus"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sources.json"
    }


def listed(tmp_path, name="corpus"):
    """What `sources.json` says."""
    return json.loads((tmp_path / "raw" / name / "sources.json").read_text())


# --- a server -------------------------------------------------------------------------------------


class Served:
    """A file that a server has, and how it serves it.

    Args:
        content: the bytes that it has.
        version: an ETag; none is said if it is None.
        ranges: whether it answers a range; else it sends all again.
        announced: the Content-Length; by default the right one, "none" for none.
        cuts: after so many bytes of each answer the connection breaks off; then no more.
        pace: (bytes, seconds): so many at a time, then a rest.
        status: answers before the right ones: (status, headers).
        content_range: what is said in the place of the right one.
        headers: more of them.
    """

    def __init__(self, content, **how):
        self.content = content
        self.version = how.pop("version", '"1"')
        self.ranges = how.pop("ranges", True)
        self.announced = how.pop("announced", None)
        self.cuts = list(how.pop("cuts", ()))
        self.pace = how.pop("pace", None)
        self.status = list(how.pop("status", ()))
        self.content_range = how.pop("content_range", None)
        self.headers = how.pop("headers", {})
        assert not how


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        with server.counting:
            server.asked.append(self.path)
            server.ranges.append(self.headers.get("Range"))
            server.if_ranges.append(self.headers.get("If-Range"))
        served = server.files.get(self.path)
        if served is None:
            self.send_error(404)
        elif served.status:
            status, headers = served.status.pop(0)
            self._head(status, {"Content-Length": "0", **headers})
        elif served.version and self.headers.get("If-None-Match") == served.version:
            self._head(304, {})
        else:
            with contextlib.suppress(ConnectionError):
                self._give(served)

    def _give(self, served):
        body, said = served.content, self.headers.get("Range")
        headers = {"ETag": served.version} if served.version else {}
        status = 200
        if (
            said
            and served.ranges
            and self.headers.get("If-Range", served.version) == served.version
        ):
            start, size = int(said.removeprefix("bytes=").rstrip("-")), len(body)
            if start >= size:
                self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            body, status = body[start:], 206
            headers["Content-Range"] = served.content_range or f"bytes {start}-{size - 1}/{size}"
        if served.announced != "none":
            headers["Content-Length"] = str(served.announced or len(body))
        self._head(status, {**headers, **served.headers})
        if served.cuts:
            body = body[: served.cuts.pop(0)]
        size, rest = served.pace or (1 << 20, 0)
        for start in range(0, len(body), size):
            self.wfile.write(body[start : start + size])
            with self.server.counting:
                self.server.sent += len(body[start : start + size])
            if self.server.closing.wait(rest):
                return

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `asked` are the paths that were asked for, `sent` the bytes of bodies."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.asked, self.ranges, self.if_ranges, self.sent = {}, [], [], [], 0
        self.counting, self.closing = threading.Lock(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def serve(self, name, content, **how):
        """Serve a file; return its address."""
        self.files[f"/{name}"] = Served(content, **how)
        return f"{self.address}/{name}"

    def handle_error(self, *args):
        pass


@contextlib.contextmanager
def running_server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def wait_until(true, seconds=20):
    """Wait for something that another process does."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)
