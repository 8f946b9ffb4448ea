import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile

import pytest
from pydantic import TypeAdapter, ValidationError

from gpt.errors import InputError
from gpt.events import Progress
from gpt.text import Split, read_documents, read_instructions, read_messages, split_messages
from stages.download import DownloadParams, download, fetch
from stages.download.python_docs import python_docs

STORY = b"Once upon a time.\n\n\nAnd then.\n"
MESSAGES = b"".join(b"%s\tmessage %d\n" % (b"ham" if i % 3 else b"spam", i) for i in range(30))
RECORDS = json.dumps([{"instruction": f"Do {i}.", "input": "", "output": "ok"} for i in range(9)])
FOLDERS = ("corpus", "messages", "instructions", "gpt2")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def local(tmp_path):
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


# --- local sources --------------------------------------------------------------------------------


def test_local_sources_fill_the_four_folders_and_are_counted(tmp_path, local):
    figures = run(tmp_path, params())
    raw = tmp_path / "raw"
    assert [text for _, text in read_documents(raw / "corpus")] == [
        "Once upon a time.",
        "And then.",
    ]
    assert len(read_messages(raw / "messages")) == 30
    assert len(read_instructions(raw / "instructions")) == 9
    assert (raw / "gpt2" / "config.json").read_bytes() == b"{}"
    assert figures == {
        "corpus_files": 1,
        "corpus_bytes": len(STORY),
        "corpus_documents": 2,
        "messages_files": 1,
        "messages_bytes": len(MESSAGES),
        "messages_rows": 30,
        "messages_rows_ham": 20,
        "messages_rows_spam": 10,
        "instructions_files": 1,
        "instructions_bytes": len(RECORDS),
        "instructions_records": 9,
        "gpt2_files": 1,
        "gpt2_bytes": 2,
    }
    assert json.loads((tmp_path / "metrics.json").read_text()) == figures


def test_the_same_sources_give_the_same_bytes_wherever_they_are(tmp_path, local):
    run(tmp_path, params())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    local.rename(elsewhere / "samples")
    run(elsewhere, params())
    for path in sorted((tmp_path / "raw").rglob("*")):
        if path.is_file():
            there = elsewhere / path.relative_to(tmp_path)
            assert there.read_bytes() == path.read_bytes()
            assert str(tmp_path).encode() not in path.read_bytes()


def test_labelled_data_enters_the_corpus_with_its_training_part_only(tmp_path, local):
    split = {"train": 0.6, "validation": 0.2}
    corpus = [
        {
            "name": "messages",
            "file": "messages.tsv",
            "format": "messages",
            "split": split,
            "part": "train",
            "balance": "undersample",
        },
        {
            "name": "instructions",
            "file": "instructions.json",
            "format": "instructions",
            "split": split,
            "part": "train",
        },
    ]
    figures = run(tmp_path, params(corpus=corpus))
    texts = [text for name, text in read_documents(tmp_path / "raw/corpus") if name == "messages"]
    frame = read_messages(tmp_path / "raw/messages")
    train = split_messages(frame, Split(**split), "undersample")["train"]
    assert texts == train["text"].tolist()
    assert figures["corpus_documents"] == len(train) + 5


def test_python_docs_are_long_distinct_and_in_a_fixed_order(tmp_path, local):
    corpus = [{"name": "python-docs", "builtin": "python-docs"}]
    figures = run(tmp_path, params(corpus=corpus))
    texts = [text for _, text in read_documents(tmp_path / "raw/corpus")]
    assert len(texts) == len(set(texts)) == figures["corpus_documents"]
    assert min(map(len, texts)) >= 40
    assert 1_500_000 < figures["corpus_bytes"] < 3_500_000
    assert texts[:300] == [text for text, _ in zip(python_docs(), range(300), strict=False)]


def test_importing_the_stage_brings_in_neither_torch_nor_network_tools():
    code = "import sys, stages.download; print('torch' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("stories.txt", b" \n\n", "holds no text; a corpus cannot be empty"),
        ("stories.txt", b"One.\nTw\xff.", "line 2: byte 0xff is not UTF-8"),
        ("messages.tsv", b"ham\ta\nham\tb\n", r"1 class \('ham'\); a classifier needs two"),
        ("messages.tsv", b"ham\ta\nspam b\n", "line 2: not a label, a tab and a text"),
        ("messages.tsv", b"ham\ta\nspam\t\xe9\n", "line 2: byte 0xe9 is not UTF-8"),
        ("instructions.json", b"[{", "line 1: not valid JSON"),
        ("instructions.json", b"[]", "holds no record"),
        (
            "instructions.json",
            b'[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a"}]',
            "record 2: field 'input' is missing",
        ),
    ],
)
def test_bad_data_is_refused_in_one_line_that_names_the_file(
    tmp_path, local, file, content, complaint
):
    (local / file).write_bytes(content)
    assert file in refused(tmp_path, params(), complaint)


def test_what_stood_there_before_stays_when_a_download_fails(tmp_path, local):
    run(tmp_path, params())
    (local / "instructions.json").write_text("[{")
    with pytest.raises(InputError):
        run(tmp_path, params())
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == sorted(FOLDERS)
    assert len(read_instructions(tmp_path / "raw/instructions")) == 9


def test_a_missing_file_is_named(tmp_path, local):
    (local / "stories.txt").unlink()
    refused(tmp_path, params(), r"samples/stories\.txt: no such file .*download\.local")


def test_a_wrong_local_file_is_refused_with_both_hashes(tmp_path, local):
    corpus = story(b"other", file="stories.txt")
    line = refused(tmp_path, params(corpus=corpus), "sha256")
    assert sha256(STORY) in line
    assert sha256(b"other") in line


def test_a_link_cannot_lead_out_of_the_local_folder(tmp_path, local):
    (tmp_path / "secret").write_text("secret")
    (local / "link.txt").symlink_to(tmp_path / "secret")
    corpus = [{"name": "a", "file": "link.txt"}]
    refused(tmp_path, params(corpus=corpus), "leads out of its folder")


# --- a folder as mirror ---------------------------------------------------------------------------

UNREACHABLE = "https://data.invalid/some/story.txt"


@pytest.fixture
def no_socket(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("kept_as", "source"),
    [
        ("story.txt", {}),
        ("saved.txt", {"save_as": "saved.txt"}),
        ("deep/tale.txt", {"mirror_names": ["deep/tale.txt"]}),
        ("tale.txt", {"mirror_names": ["deep/tale.txt"]}),
    ],
)
def test_a_mirror_is_asked_by_each_of_a_files_names(tmp_path, local, no_socket, kept_as, source):
    path = tmp_path / "mirror" / kept_as
    path.parent.mkdir(parents=True)
    path.write_bytes(STORY)
    corpus = story(urls=[UNREACHABLE], **source)
    run(tmp_path, params(mirror=str(tmp_path / "mirror"), corpus=corpus))
    listed = json.loads((tmp_path / "raw/corpus/sources.json").read_text())
    assert [file["file"] for file in listed] == [source.get("save_as", "story.txt")]
    assert listed[0]["url"] == UNREACHABLE
    assert listed[0]["sha256"] == sha256(STORY)


def test_a_wrong_mirror_file_is_refused_with_both_hashes(tmp_path, local, no_socket):
    (local / "story.txt").write_bytes(STORY + b"!")
    corpus = story(urls=[UNREACHABLE])
    line = refused(tmp_path, params(mirror=str(local), corpus=corpus), "source 'story'")
    assert sha256(STORY) in line
    assert sha256(STORY + b"!") in line


def test_offline_opens_no_connection_and_says_what_to_do(tmp_path, local, no_socket):
    corpus = story(urls=[UNREACHABLE])
    for mirror in (None, str(local), "http://mirror.invalid/"):
        line = refused(
            tmp_path, params(mirror=mirror, corpus=corpus, offline=True), "offline is true"
        )
        assert "download.mirror" in line
        assert "GPT_PIPELINE_MIRROR" in line


def test_without_network_and_mirror_the_line_says_what_was_tried(tmp_path, local, monkeypatch):
    monkeypatch.setattr(fetch, "BACK_OFF_SECONDS", 0)
    closed = f"http://127.0.0.1:{_free_port()}/story.txt"
    line = refused(tmp_path, params(corpus=story(urls=[closed])), "source 'story'")
    assert f"{closed} (the connection failed, 4 times)" in line
    assert "set download.mirror or GPT_PIPELINE_MIRROR" in line


def test_a_mirror_that_is_not_there_is_named(tmp_path, local):
    refused(
        tmp_path,
        params(mirror=str(tmp_path / "nothing"), corpus=story(urls=[UNREACHABLE])),
        "nothing is not a folder; set download.mirror",
    )


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- archives -------------------------------------------------------------------------------------


def test_only_the_named_member_of_an_archive_is_taken(tmp_path, local):
    with zipfile.ZipFile(local / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside.txt", "escaped")
        archive.writestr("inner/story.txt", STORY)
    corpus = story(file="all.zip", member="inner/story.txt")
    run(tmp_path, params(corpus=corpus))
    names = sorted(path.name for path in (tmp_path / "raw/corpus").iterdir())
    assert names == ["sources.json", "story.txt"]
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_mirror_may_keep_the_member_or_an_archive_of_its_own(tmp_path, local, no_socket):
    corpus = story(urls=["https://data.invalid/all.zip"], member="inner/story.txt")
    (local / "story.txt").write_bytes(STORY)
    run(tmp_path, params(corpus=corpus, mirror=str(local)))
    (local / "story.txt").unlink()
    with zipfile.ZipFile(local / "all.zip", "w") as archive:
        archive.writestr("inner/story.txt", STORY)
    run(tmp_path, params(corpus=corpus, mirror=str(local)))
    assert (tmp_path / "raw/corpus/story.txt").read_bytes() == STORY


def test_a_zip_bomb_stops_at_the_bound(tmp_path, local):
    with zipfile.ZipFile(local / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("story.txt", b"0" * 5_000_000)
    corpus = story(file="all.zip", member="story.txt", bytes=1000)
    refused(tmp_path, params(corpus=corpus), "more than 1000 bytes")


def test_a_missing_member_or_a_broken_archive_is_named(tmp_path, local):
    with zipfile.ZipFile(local / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("story.txt", os.urandom(1000))
    corpus = story(file="all.zip", member="other.txt")
    refused(tmp_path, params(corpus=corpus), "no member 'other.txt'")
    content = bytearray((local / "all.zip").read_bytes())
    content[300] ^= 1
    (local / "all.zip").write_bytes(content)
    corpus = story(file="all.zip", member="story.txt")
    refused(tmp_path, params(corpus=corpus), "not an archive that can be read")


# --- the web, a server of our own -----------------------------------------------------------------


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if name == "loop.txt":
            self.send_response(302)
            self.send_header("Location", "/loop.txt")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "busy.txt" and self.server.asked.count(self.path) < 3:
            self.send_error(503)
        elif name == "broken.txt" and self.server.asked.count(self.path) < 2:
            self._give(STORY, announced=len(STORY) + 10)
        elif name == "truncated.txt":
            self._give(STORY[:10], announced=len(STORY))
        elif name == "endless.txt":
            self._give(STORY * 100, announced=None)
        elif name == "wrong.txt":
            self._give(STORY + b"!", announced=len(STORY) + 1)
        elif name in ("story.txt", "busy.txt", "broken.txt", "a+b c.txt", "a+b%20c.txt"):
            self._give(STORY, announced=len(STORY))
        else:
            self.send_error(404)

    def _give(self, content, announced):
        self.send_response(200)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "BACK_OFF_SECONDS", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        running.asked = []
        running.address = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["story.txt", "busy.txt", "broken.txt", "a+b%20c.txt"])
def test_a_download_ends_whole_though_the_server_stumbles(tmp_path, local, server, name):
    events = []
    corpus = story(urls=[f"{server.address}/{name}"], save_as="saved.txt")
    run(tmp_path, params(corpus=corpus), log=events.append)
    assert (tmp_path / "raw/corpus/saved.txt").read_bytes() == STORY
    shown = [e for e in events if isinstance(e, Progress) and e.task == "download story"]
    assert shown[-1].done == shown[-1].total == len(STORY)


def test_addresses_are_tried_in_order_until_one_has_the_file(tmp_path, local, server):
    names = ["missing.txt", "wrong.txt", "story.txt", "busy.txt"]
    corpus = story(urls=[f"{server.address}/{name}" for name in names])
    run(tmp_path, params(corpus=corpus))
    assert server.asked == ["/missing.txt", "/wrong.txt", "/story.txt"]


@pytest.mark.parametrize(
    ("name", "bytes_", "complaint"),
    [
        ("missing.txt", None, r"missing\.txt \(HTTP 404\)"),
        ("truncated.txt", None, "the connection broke off, 4 times"),
        ("loop.txt", None, "TooManyRedirects"),
        ("endless.txt", len(STORY), "more than 30 bytes"),
        ("wrong.txt", len(STORY), "31 bytes announced, more than the 30 allowed"),
    ],
)
def test_a_download_that_cannot_end_well_is_one_line(
    tmp_path, local, server, name, bytes_, complaint
):
    corpus = story(urls=[f"{server.address}/{name}"], bytes=bytes_)
    refused(tmp_path, params(corpus=corpus), complaint)


def test_a_wrong_download_is_refused_with_both_hashes(tmp_path, local, server):
    line = refused(tmp_path, params(corpus=story(urls=[f"{server.address}/wrong.txt"])), "sha256")
    assert sha256(STORY) in line
    assert sha256(STORY + b"!") in line


def test_a_mirror_on_the_web_is_asked_first(tmp_path, local, server):
    corpus = story(urls=[UNREACHABLE], mirror_names=["deep/tale.txt"])
    run(tmp_path, params(corpus=corpus, mirror=f"{server.address}/files/"))
    assert server.asked == ["/files/deep/tale.txt", "/files/story.txt"]


def test_a_wrong_file_on_a_web_mirror_is_not_passed_over(tmp_path, local, server):
    corpus = story(urls=[f"{server.address}/story.txt"], mirror_names=["wrong.txt"])
    line = refused(tmp_path, params(corpus=corpus, mirror=server.address), "put the published file")
    assert sha256(STORY + b"!") in line


# --- the published data ---------------------------------------------------------------------------

PUBLISHED = {
    "corpus": {
        "name": "the-verdict",
        "urls": ["https://data.invalid/the-verdict.txt"],
        "sha256": "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
    },
    "messages": {
        "name": "sms",
        "urls": ["https://data.invalid/228/sms+spam+collection.zip"],
        "member": "SMSSpamCollection",
        "sha256": "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
    },
    "instructions": {
        "name": "instruction-data",
        "urls": ["https://data.invalid/instruction-data.json"],
        "sha256": "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    },
    "gpt2": {
        "name": "merges",
        "urls": ["https://data.invalid/gpt2/resolve/main/merges.txt"],
        "sha256": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "mirror_names": ["gpt2/vocab.bpe"],
    },
}


def test_published_data_comes_through_the_mirror(tmp_path, mirror, no_socket):
    published = {name: [source] for name, source in PUBLISHED.items()}
    figures = run(tmp_path, params(mirror=str(mirror), **published))
    assert figures["corpus_bytes"] == 20_479
    assert figures["messages_rows_ham"] == 4827
    assert figures["messages_rows_spam"] == 747
    assert figures["instructions_records"] == 1100
    assert (tmp_path / "raw/gpt2/merges.txt").is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_wrong_byte_in_published_data_is_refused_with_both_hashes(
    tmp_path, local, mirror, no_socket, name
):
    kept_as = {
        "corpus": "the-verdict.txt",
        "messages": "SMSSpamCollection",
        "instructions": "instruction-data.json",
        "gpt2": "gpt2/vocab.bpe",
    }[name]
    content = bytearray((mirror / kept_as).read_bytes())
    content[len(content) // 2] ^= 1
    ours = tmp_path / "mirror" / kept_as
    ours.parent.mkdir(parents=True)
    ours.write_bytes(content)
    line = refused(
        tmp_path, params(mirror=str(tmp_path / "mirror"), **{name: [PUBLISHED[name]]}), "sha256"
    )
    assert sha256(content) in line
    assert PUBLISHED[name]["sha256"] in line


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"corpus": []}, "corpus"),
        ({"unknown": 1}, "unknown"),
        ({"corpus": [{"name": "a"}]}, "give one of file, urls and builtin"),
        ({"corpus": [{"name": "a", "file": "b", "builtin": "python-docs"}]}, "give one of"),
        ({"corpus": [{"name": "a", "file": "../b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "file": "/b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "file": "b", "save_as": "c/d"}]}, "name of a data file"),
        ({"corpus": [{"name": "a", "file": "b", "save_as": "sources.json"}]}, "name of a data"),
        ({"corpus": [{"name": "a", "urls": ["https://a.b/c"]}]}, "needs its sha256"),
        ({"corpus": [{"name": "a", "urls": ["https://a.b"], "sha256": "0" * 64}]}, "inside its"),
        ({"corpus": story(urls=["file:///etc/passwd"])}, "must begin with https"),
        ({"corpus": [{"name": "a", "file": "b", "sha256": "xyz"}]}, "sha256"),
        ({"corpus": [{"name": "a", "file": "x/b"}, {"name": "a", "file": "c"}]}, "the name 'a'"),
        ({"corpus": [{"name": "a", "file": "b"}, {"name": "c", "file": "x/b"}]}, "file name 'b'"),
        ({"corpus": [{"name": "a", "file": "b", "format": "jsonl", "separator": "x"}]}, "separ"),
        ({"corpus": [{"name": "a", "file": "b", "part": "train"}]}, "go together"),
        (
            {
                "corpus": [
                    {
                        "name": "a",
                        "file": "b",
                        "part": "train",
                        "split": {"train": 0.5, "validation": 0.1},
                    }
                ]
            },
            "only messages and instructions",
        ),
        ({"corpus": [{"name": "a", "file": "b", "balance": "undersample"}]}, "balance"),
        ({"messages": [{"name": "a", "builtin": "python-docs"}]}, "builtin"),
    ],
)
def test_impossible_parameters_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        params(**changes)
