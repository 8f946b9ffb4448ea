"""Whatever a server does, a download ends whole and verified, or in one line; a second is none."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from downloads import (
    MESSAGES,
    RECORDS,
    STORY,
    UNREACHABLE,
    corpus_files,
    listed,
    make_local,
    params,
    refused,
    run,
    running_server,
    sha256,
    story,
    wait_until,
)

from gpt.base.events import Message, Progress
from stages.download import cache as cache_module
from stages.download import web

BOOK = b"".join(b"Line %06d of a book.\n" % i for i in range(20_000))  # 460 kB


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(web, "BACK_OFF_SECONDS", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as running:
        yield running


def book(url, **changes):
    """A corpus of one source, the book."""
    return params(corpus=story(BOOK, urls=[url], save_as="book.txt"), **changes)


def has_book(tmp_path):
    return corpus_files(tmp_path) == {"book.txt": BOOK}


# --- faults that pass -----------------------------------------------------------------------------


def test_a_download_is_shown_in_bytes(tmp_path, local, server):
    events = []
    run(tmp_path, book(server.serve("b", BOOK)), log=events.append)
    shown = [e for e in events if isinstance(e, Progress) and e.task == "download story"]
    assert shown[-1].done == shown[-1].total == len(BOOK)
    assert [e.done for e in shown] == sorted(e.done for e in shown)


@pytest.mark.parametrize("seed", range(4))
def test_connections_that_break_off_at_random_bytes_cost_no_byte_twice(
    tmp_path, local, server, seed
):
    draw = random.Random(seed)
    url = server.serve("b", BOOK, cuts=[draw.randrange(1, 60_000) for _ in range(12)])
    run(tmp_path, book(url))
    assert has_book(tmp_path)
    assert len(server.asked) > 5
    assert server.sent == len(BOOK)


@pytest.mark.parametrize(
    "how",
    [
        {"ranges": False, "cuts": [1000]},
        {"version": None, "cuts": [1000, 20_000]},
        {"version": 'W/"weak"', "cuts": [1000]},
        {"version": None, "ranges": False, "cuts": [1000]},
        {"cuts": [1000], "content_range": "bytes 0-99/460000"},
        {"cuts": [1000], "content_range": "bytes 1000-999999/1000000"},
        {"cuts": [1000], "content_range": "nonsense"},
        {"announced": len(BOOK) + 10},
        {"announced": "none"},
        {"announced": "none", "cuts": [1000], "version": None},
        {"announced": "nonsense"},
        {"status": [(503, {}), (500, {}), (429, {})]},
        {"status": [(408, {}), (425, {}), (502, {})]},
        {"status": [(302, {"Location": "/b"})] * 3},
    ],
)
def test_a_download_ends_whole_though_the_server_errs(tmp_path, local, server, how):
    run(tmp_path, book(server.serve("b", BOOK, **how)))
    assert has_book(tmp_path)


@pytest.mark.parametrize(
    "said", [f"bytes 0-9/{len(BOOK)}", "bytes 1000-999999/1000000", "bytes */9"]
)
def test_a_wrong_range_is_refused_and_all_of_it_asked_for_again(tmp_path, local, server, said):
    url = server.serve("b", BOOK, cuts=[1000], content_range=said)
    unpinned = params(corpus=[{"name": "story", "urls": [url], "save_as": "book.txt"}])
    run(tmp_path, unpinned)
    assert has_book(tmp_path)
    assert server.ranges == [None, "bytes=1000-", None]


def test_more_bytes_than_announced_do_no_harm(tmp_path, local, server):
    url = server.serve("b", BOOK + b"more" * 100, announced=len(BOOK))
    run(tmp_path, book(url))
    assert has_book(tmp_path)


@pytest.mark.parametrize(("old", "new"), [('"old"', '"new"'), (None, None)])
def test_another_version_is_not_glued_to_the_beginning_of_the_last(
    tmp_path, local, server, old, new
):
    other = BOOK.replace(b"book", b"tome")
    cache = tmp_path / "cache"
    url = server.serve("b", other, cuts=[50_000, *[0] * 50], version=old)
    unpinned = params(corpus=[{"name": "story", "urls": [url], "save_as": "book.txt"}])
    refused(tmp_path, unpinned, "the connection failed, 4 times", cache=cache)
    server.serve("b", BOOK, version=new)
    run(tmp_path, unpinned, cache=cache)
    assert has_book(tmp_path)
    assert server.if_ranges[-1] == old


def test_a_beginning_of_something_else_is_found_out_by_the_hash(tmp_path, local, server):
    other = BOOK.replace(b"book", b"tome")
    cache = tmp_path / "cache"
    url = server.serve("b", other, cuts=[50_000, *[0] * 50], version=None)
    refused(tmp_path, book(url), "the connection failed, 4 times", cache=cache)
    server.serve("b", BOOK, version=None)
    run(tmp_path, book(url), cache=cache)
    assert has_book(tmp_path)
    assert server.ranges[-2:] == ["bytes=50000-", None]


def test_a_stalled_server_is_left_and_asked_again(tmp_path, local, server, monkeypatch):
    monkeypatch.setattr(web, "READ_SECONDS", 0.2)
    url = server.serve("b", BOOK, pace=(200_000, 60))
    events = []
    run(tmp_path, book(url), log=events.append)
    assert has_book(tmp_path)
    faults = [e.text for e in events if isinstance(e, Message) and "no answer in time" in e.text]
    assert len(faults) == 2
    assert server.ranges == [None, "bytes=200000-", "bytes=400000-"]


@pytest.mark.parametrize("after", ["86400", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_server_that_asks_for_a_pause_gets_it_within_a_bound(
    tmp_path, local, server, monkeypatch, after
):
    monkeypatch.setattr(web, "RETRY_AFTER_SECONDS", 0.3)
    url = server.serve("b", BOOK, status=[(503, {"Retry-After": after})])
    began = time.monotonic()
    run(tmp_path, book(url))
    assert 0.3 <= time.monotonic() - began < 10


def test_addresses_are_tried_in_order_until_one_has_the_file(tmp_path, local, server):
    for name, content in (("wrong", STORY + b"!"), ("story", STORY), ("other", STORY)):
        server.serve(name, content)
    names = ["missing", "wrong", "story", "other"]
    urls = [f"{server.address}/{name}" for name in names]
    run(tmp_path, params(corpus=story(urls=urls, save_as="a")))
    assert server.asked == ["/missing", "/wrong", "/story"]


# --- faults that stay -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "bytes_", "complaint"),
    [
        ({"status": [(404, {})]}, None, r"/b \(HTTP 404\)"),
        ({"status": [(403, {})]}, None, r"/b \(HTTP 403\)"),
        ({"status": [(503, {})] * 9}, None, "HTTP 503, 4 times"),
        ({"status": [(206, {})]}, None, "HTTP 206"),
        ({"cuts": [10] * 99, "ranges": False}, None, "the connection failed, 4 times"),
        ({"status": [(302, {"Location": "/b"})] * 99}, None, "Exceeded 30 redirects"),
        ({"status": [(302, {"Location": "file:///etc/passwd"})]}, None, "No connection adapters"),
        ({"status": [(302, {"Location": "http://[bad"})]}, None, "Invalid IPv6 URL"),
        ({"announced": "none"}, 30, "more than 30 bytes"),
        ({}, 30, f"{len(BOOK)} bytes announced, more than the 30 allowed"),
        ({"announced": 30}, None, "its sha256 is [0-9a-f]{64}, not"),
    ],
)
def test_a_download_that_cannot_end_well_is_one_line(
    tmp_path, local, server, how, bytes_, complaint
):
    url = server.serve("b", BOOK, **how)
    corpus = story(BOOK, urls=[url], bytes=bytes_)
    refused(tmp_path, params(corpus=corpus), complaint)


def test_a_wrong_file_is_refused_with_both_hashes(tmp_path, local, server):
    line = refused(tmp_path, book(server.serve("b", STORY)), "sha256")
    assert sha256(STORY) in line
    assert sha256(BOOK) in line


@pytest.mark.parametrize("pace", [(1, 0.02), (1000, 60)])
def test_a_file_that_does_not_come_in_time_is_one_line(tmp_path, local, server, pace):
    url = server.serve("b", BOOK, pace=pace)
    began = time.monotonic()
    refused(
        tmp_path, book(url, timeout_seconds=0.5), "(not complete in the time allowed)|(4 times)"
    )
    assert time.monotonic() - began < 5


# --- a mirror on the web --------------------------------------------------------------------------


def test_a_mirror_on_the_web_is_asked_first(tmp_path, local, server):
    server.serve("files/story.txt", STORY)
    corpus = story(urls=[UNREACHABLE], mirror_names=["deep/tale.txt"])
    run(tmp_path, params(corpus=corpus, mirror=f"{server.address}/files/"))
    assert server.asked == ["/files/deep/tale.txt", "/files/story.txt"]


def test_a_wrong_file_on_a_web_mirror_is_not_passed_over(tmp_path, local, server):
    server.serve("wrong.txt", STORY + b"!")
    corpus = story(urls=[server.serve("story.txt", STORY)], mirror_names=["wrong.txt"])
    line = refused(tmp_path, params(corpus=corpus, mirror=server.address), "put the published file")
    assert sha256(STORY + b"!") in line


# --- the second time ------------------------------------------------------------------------------


def archive_of_the_book(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/book.txt", BOOK)
        archive.writestr("in/story.txt", STORY)
    return path.read_bytes()


def test_the_second_download_of_the_same_bytes_fetches_nothing(tmp_path, local, server):
    packed = archive_of_the_book(tmp_path / "all.zip")
    archive = server.serve("all.zip", packed)
    corpus = [
        {"name": "plain", "urls": [server.serve("b", BOOK)], "sha256": sha256(BOOK)},
        {"name": "one", "urls": [archive], "member": "in/story.txt", "sha256": sha256(STORY)},
        {"name": "all", "urls": [archive], "members": "in/*", "sha256": sha256(packed)},
    ]
    messages = [
        {"name": "m", "urls": [server.serve("m.tsv", MESSAGES)], "sha256": sha256(MESSAGES)}
    ]
    wanted, cache = params(corpus=corpus, messages=messages), tmp_path / "cache"
    figures = run(tmp_path, wanted, cache=cache)
    files, sources = corpus_files(tmp_path), (tmp_path / "raw/corpus/sources.json").read_bytes()
    assert files == {
        "b": BOOK,
        "story.txt": STORY,
        "all/in/book.txt": BOOK,
        "all/in/story.txt": STORY,
    }
    server.asked.clear()
    for _ in range(2):
        events = []
        assert run(tmp_path, wanted, cache=cache, log=events.append) == figures
        assert corpus_files(tmp_path) == files
        assert (tmp_path / "raw/corpus/sources.json").read_bytes() == sources
        assert events[-1].text.endswith("5 fetched before")
    assert server.asked == []
    assert not list(cache.glob("*.partial"))


def test_what_is_not_checked_is_told_and_asked_for_only_if_it_changed(tmp_path, local, server):
    url, cache = server.serve("b", BOOK), tmp_path / "cache"
    unpinned = params(corpus=[{"name": "story", "urls": [url], "save_as": "book.txt"}])
    for _ in range(2):
        events = []
        run(tmp_path, unpinned, cache=cache, log=events.append)
        (warning,) = [e.text for e in events if isinstance(e, Message) and e.level == "warning"]
        assert f"sha256: {sha256(BOOK)}" in warning
        assert has_book(tmp_path)
    assert server.sent == len(BOOK)
    server.serve("b", STORY, version='"2"')
    run(tmp_path, unpinned, cache=cache)
    assert corpus_files(tmp_path) == {"book.txt": STORY}


def test_two_sources_of_one_file_fetch_it_once(tmp_path, local, server):
    url = server.serve("m.tsv", MESSAGES)
    source = {"name": "m", "urls": [url], "sha256": sha256(MESSAGES)}
    corpus = [{**source, "kind": "messages"}]
    events = []
    run(
        tmp_path,
        params(corpus=corpus, messages=[source]),
        cache=tmp_path / "cache",
        log=events.append,
    )
    assert server.asked == ["/m.tsv"]
    tasks = {e.task for e in events if isinstance(e, Progress) and e.task.endswith(" m")}
    assert tasks <= {"download corpus m", "download messages m"}


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path, local, server):
    url, cache = server.serve("b", BOOK), tmp_path / "cache"
    run(tmp_path, book(url), cache=cache)
    (tmp_path / "raw/corpus/book.txt").unlink()  # the same file on the disk, perhaps
    kept = cache / sha256(BOOK)
    kept.write_bytes(BOOK[:-1] + b"!")
    run(tmp_path, book(url), cache=cache)
    assert has_book(tmp_path)
    assert kept.read_bytes() == BOOK
    assert server.asked == ["/b", "/b"]


def test_a_file_in_the_cache_that_others_share_is_copied(tmp_path, local, server):
    cache = tmp_path / "cache"
    wanted = book(server.serve("b", BOOK))
    run(tmp_path, wanted, cache=cache)
    kept, output = cache / sha256(BOOK), tmp_path / "raw/corpus/book.txt"
    assert output.samefile(kept)
    os.link(kept, tmp_path / "of-another-tool")
    kept.chmod(0o444)
    run(tmp_path, wanted, cache=cache)
    assert not output.samefile(kept)
    assert os.access(output, os.W_OK)


def test_old_beginnings_are_dropped_and_fresh_ones_stay(tmp_path, local):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in (("url-old", cache_module.PARTIAL_SECONDS + 60), ("url-new", 60)):
        for suffix in (".partial", ".json"):
            path = cache / (name + suffix)
            path.write_text("{}")
            os.utime(path, (time.time() - age,) * 2)
    run(tmp_path, params(), cache=cache)
    assert sorted(path.name for path in cache.iterdir()) == ["url-new.json", "url-new.partial"]


def test_offline_opens_no_socket_and_uses_what_is_in_the_cache(
    tmp_path, local, server, monkeypatch
):
    cache = tmp_path / "cache"
    pinned = story(BOOK, urls=[server.serve("b", BOOK)])
    unpinned = {"name": "other", "urls": [server.serve("s", STORY)]}
    corpus = [*pinned, unpinned]
    run(tmp_path, params(corpus=corpus), cache=cache)

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    with monkeypatch.context() as patch:
        for name in ("socket", "create_connection", "getaddrinfo"):
            patch.setattr(f"socket.{name}", refuse)
        run(tmp_path, params(corpus=corpus, offline=True, mirror="http://m.invalid"), cache=cache)
    assert corpus_files(tmp_path) == {"b": BOOK, "s": STORY}


# --- at the same time, and cut off ----------------------------------------------------------------


def test_downloads_go_on_at_the_same_time(tmp_path, local, server):
    """Each waits until all have been asked for; one after the other they would wait for ever."""
    together = threading.Barrier(4)
    waited = []

    def log(event):
        pass

    class Slow(dict):
        def get(self, path):
            waited.append(together.wait(10))
            return dict.get(self, path)

    urls = [server.serve(str(i), b"%d " % i + STORY) for i in range(4)]
    server.files = Slow(server.files)
    corpus = [
        {"name": f"n{i}", "urls": [url], "sha256": sha256(b"%d " % i + STORY)}
        for i, url in enumerate(urls)
    ]
    run(tmp_path, params(corpus=corpus, parallel=4), log=log)
    assert sorted(waited) == [0, 1, 2, 3]


def test_one_failure_stops_the_other_downloads(tmp_path, local, server):
    slow = server.serve("slow", BOOK, pace=(10, 0.1))
    corpus = [*story(BOOK, urls=[slow]), {**story(STORY)[0], "name": "x", "file": "none.txt"}]
    began = time.monotonic()
    refused(tmp_path, params(corpus=corpus), r"none\.txt: no such file")
    assert time.monotonic() - began < 10


PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from downloads import params, run
run(Path(sys.argv[2]), params(**json.loads(sys.argv[3])), cache=Path(sys.argv[2]) / "cache")
"""


def start(tmp_path, corpus):
    arguments = [str(Path(__file__).parent), str(tmp_path), json.dumps({"corpus": corpus})]
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("pinned", [True, False])
def test_a_download_killed_in_the_middle_goes_on_where_it_was(tmp_path, local, server, pinned):
    url = server.serve("b", BOOK, pace=(20_000, 0.05))
    corpus = story(BOOK, urls=[url], save_as="book.txt")
    if not pinned:
        del corpus[0]["sha256"]
    process = start(tmp_path, corpus)
    # not what the server has sent: that may wait anywhere on the way
    wait_until(lambda: any(f.stat().st_size > 100_000 for f in tmp_path.glob("cache/*.partial")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "raw/corpus").exists()
    (beginning,) = (tmp_path / "cache").glob("*.partial")
    came = beginning.stat().st_size
    assert 100_000 < came < len(BOOK)
    wait_until(lambda: server.sent == server_settled(server))
    server.serve("b", BOOK)
    server.sent = 0
    run(tmp_path, params(corpus=corpus), cache=tmp_path / "cache")
    assert has_book(tmp_path)
    assert server.sent == len(BOOK) - came
    assert server.ranges[-1] == f"bytes={came}-"


def server_settled(server):
    """What it has sent once it has noticed that nobody listens any more."""
    before = server.sent
    time.sleep(0.3)
    return before if server.sent == before else -1


def test_a_download_that_is_interrupted_ends_at_once(tmp_path, local, server):
    url = server.serve("b", BOOK, pace=(20_000, 60))
    process = start(tmp_path, story(BOOK, urls=[url]))
    wait_until(lambda: server.sent > 0)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert time.monotonic() - began < 5  # not the 30 that the server may be silent
    assert not (tmp_path / "raw").exists() or not list((tmp_path / "raw").iterdir())


def test_a_packed_file_is_kept_packed_whatever_the_server_says_of_it(tmp_path, local, server):
    packed = gzip.compress(RECORDS.encode())
    url = server.serve("i.json.gz", packed, headers={"Content-Encoding": "gzip"})
    source = {"name": "i", "urls": [url], "sha256": sha256(packed)}
    figures = run(tmp_path, params(instructions=[source]))
    assert listed(tmp_path, "instructions")[0]["bytes"] == len(packed)
    assert figures["instructions_records"] == 9
