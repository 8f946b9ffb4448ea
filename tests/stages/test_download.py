import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading

import pytest
from downloads import (
    FOLDERS,
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
    sha256,
    story,
)
from pydantic import ValidationError

from gpt.base.errors import InputError
from gpt.base.events import Message
from gpt.text.records import Split, read_documents, read_instructions, read_messages, split_messages
from stages.download import texts, web
from stages.download.sources import format_of
from stages.download.texts import python_docs


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path)


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
            "kind": "messages",
            "split": split,
            "part": "train",
            "balance": "undersample",
        },
        {
            "name": "instructions",
            "file": "instructions.json",
            "kind": "instructions",
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
            "record 2: input: Field required",
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


def test_a_folder_gives_every_file_below_it_in_order_under_the_sources_name(tmp_path, local):
    for name in ("b.txt", "deep/a.jsonl", "deep/er/c.txt", ".hidden", ".git/config", "B.txt"):
        path = local / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "in lines"}\n' if name.endswith("l") else f"one--two {name}")
    corpus = [{"name": "mine", "folder": "texts", "separator": "--"}]
    figures = run(tmp_path, params(corpus=corpus))
    names = ["B.txt", "b.txt", "deep/a.jsonl", "deep/er/c.txt"]
    files = listed(tmp_path)
    assert [file["file"] for file in files] == [f"mine/{name}" for name in names]
    assert {file["name"] for file in files} == {"mine"}
    assert [file["format"] for file in files] == ["text", "text", "jsonl", "text"]
    assert [file["records"] for file in files] == [2, 2, 1, 2]
    assert list(corpus_files(tmp_path)) == [file["file"] for file in files]
    assert figures["corpus_files"] == 4
    assert figures["corpus_documents"] == 7


def test_a_glob_gives_the_files_that_fit_it(tmp_path, local):
    for name in ("a/1.txt", "a/2.txt", "a/x/3.txt", "b/4.txt", "a/.5.txt", "a/6.md"):
        path = local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for glob, expected in (
        ("a/*.txt", ["a/1.txt", "a/2.txt"]),
        ("a/**/*.txt", ["a/1.txt", "a/2.txt", "a/x/3.txt"]),
        ("?/[34].txt", ["b/4.txt"]),
        ("**/4.txt", ["b/4.txt"]),
    ):
        run(tmp_path, params(corpus=[{"name": "g", "glob": glob}]))
        assert list(corpus_files(tmp_path)) == [f"g/{name}" for name in expected]


def test_many_files_are_counted_and_synced_together(tmp_path, local, monkeypatch):
    """Their sizes say nothing, and a disk is asked once for all of them."""
    (local / "many").mkdir()
    for i in range(300):
        (local / "many" / f"{i}.txt").write_text(str(i))
    asked, heard = [], []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: asked.append(fsync(descriptor)))
    monkeypatch.setattr(os, "sync", lambda: asked.append("all"))
    run(tmp_path, params(corpus=[{"name": "mine", "folder": "many"}]), log=heard.append)
    assert asked.count("all") == 1
    assert len(asked) < 50
    progress = [each for each in heard if getattr(each, "task", "") == "download mine"]
    assert {(each.total, each.unit) for each in progress} == {(300, "file")}
    assert [each.done for each in progress] == list(range(301))


def many_texts(local, monkeypatch, n=300):
    """A folder `many` of more texts than are kept apart; return their number."""
    monkeypatch.setattr(texts, "MOST_APART", n - 1)
    for i in range(n):
        path = local / "many" / str(i % 7) / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"\ufeffone {i}\r\n--\r\n \r\n--\n\u2028\x00 two \U0001f600\n".encode())
    return n


@pytest.mark.parametrize("separator", [None, "--\n"])
def test_very_many_texts_are_one_file_with_the_same_documents(
    tmp_path, local, monkeypatch, separator
):
    n = many_texts(local, monkeypatch, 30)
    with tarfile.open(local / "all.tar", "w") as pack:
        pack.add(local / "many", "many")
    read = {}
    for source in ({"folder": "many"}, {"glob": "many/**"}, {"file": "all.tar", "members": "**"}):
        for most in (n, n - 1):
            monkeypatch.setattr(texts, "MOST_APART", most)
            corpus = [{"name": "mine", **source, "separator": separator, "format": "text"}]
            figures = run(tmp_path, params(corpus=corpus))
            folder = tmp_path / "raw" / "corpus"
            read[most] = list(read_documents(folder))
            assert figures["corpus_documents"] == len(read[most]) == n * (1 + bool(separator))
        assert read[n] == read[n - 1]
        assert [path.name for path in folder.rglob("*") if path.is_file()] == [
            "sources.json",
            "texts.jsonl",
        ]


def test_very_many_texts_are_each_opened_once_and_written_to_one_file(tmp_path, local, monkeypatch):
    """Nothing else would be in proportion to the work: a disk may take 3 ms to drop one file."""
    n = many_texts(local, monkeypatch)
    opened, heard, plain_open = [], [], io.open

    def counting(file, mode="r", *arguments, **options):
        opened.append(mode)
        return plain_open(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", counting)
    run(tmp_path, params(corpus=[{"name": "mine", "folder": "many"}]), log=heard.append)
    assert n < len(opened) < n + 50
    progress = [each for each in heard if getattr(each, "task", "") == "download mine"]
    assert [each.done for each in progress] == list(range(n + 1))
    assert [each.text for each in heard if isinstance(each, Message)] == [
        f"download: {n + 3} files: {n + 3} from this machine"
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"\xff", "line 1: byte 0xff is not UTF-8"), (b" \n", "holds no text")],
)
def test_one_bad_text_of_very_many_is_named(tmp_path, local, monkeypatch, content, complaint):
    many_texts(local, monkeypatch, 30)
    (local / "many" / "0" / "14.txt").write_bytes(content)
    with tarfile.open(local / "all.tar", "w") as pack:
        pack.add(local / "many", "many")
    for source, place in (
        ({"folder": "many"}, "samples/many/0/14.txt: "),
        ({"file": "all.tar", "members": "**"}, "samples/all.tar, member many/0/14.txt: "),
    ):
        line = refused(tmp_path, params(corpus=[{"name": "mine", **source}]), complaint)
        assert place in line


def test_a_very_long_text_is_not_written_where_it_could_not_be_read(tmp_path, local, monkeypatch):
    many_texts(local, monkeypatch, 30)
    monkeypatch.setattr(texts, "LONGEST_LINE", 1 << 12)
    (local / "many" / "0" / "14.txt").write_text("x" * (1 << 12))
    corpus = [{"name": "mine", "folder": "many"}]
    refused(tmp_path, params(corpus=corpus), r"0/14\.txt: .*a source of its own")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ({"folder": "empty"}, "samples/empty: no file in it or below it"),
        ({"folder": "nothing"}, "samples/nothing: no such folder"),
        ({"folder": "stories.txt"}, r"stories\.txt: no such folder"),
        ({"glob": "*.none"}, r"samples: no file fits '\*\.none'"),
        ({"glob": "nothing/*"}, r"samples: no file fits 'nothing/\*'"),
    ],
)
def test_a_folder_or_glob_without_files_is_one_line(tmp_path, local, source, complaint):
    (local / "empty").mkdir()
    (local / "empty" / ".hidden").write_text("x")
    refused(tmp_path, params(corpus=[{"name": "mine", **source}]), complaint)


def test_no_link_leads_out_of_a_folder(tmp_path, local):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    folder = local / "texts"
    folder.mkdir()
    (folder / "own.txt").write_text("own")
    link = folder / "link.txt"
    for target, complaint in (
        (tmp_path / "outside" / "secret.txt", "leads out of its folder"),
        (tmp_path / "nothing", "leads out of its folder"),
        (tmp_path / "outside", "a link to a folder"),
    ):
        link.symlink_to(target)
        for source in ({"folder": "texts"}, {"glob": "texts/*"}):
            line = refused(tmp_path, params(corpus=[{"name": "mine", **source}]), complaint)
            assert "link.txt" in line
        link.unlink()
    (local / "away").symlink_to(tmp_path / "outside")
    for source in ({"folder": "away"}, {"glob": "away/*.txt"}):
        refused(tmp_path, params(corpus=[{"name": "mine", **source}]), "leads out of its folder")
    link.symlink_to(folder / "own.txt")  # one that stays inside is as good as its file
    run(tmp_path, params(corpus=[{"name": "mine", "folder": "texts"}]))
    assert corpus_files(tmp_path) == {"mine/link.txt": b"own", "mine/own.txt": b"own"}


@pytest.mark.parametrize("name", ["two\nlines.txt", "C:x.txt", "back\\slash.txt", b"\xff.txt"])
def test_a_file_name_that_not_every_system_has_is_one_line(tmp_path, local, name):
    (local / "texts").mkdir()
    (local / "texts" / os.fsdecode(name)).write_text("x")
    refused(tmp_path, params(corpus=[{"name": "mine", "folder": "texts"}]), "rename it")


def test_kinds_formats_and_fields_reach_the_readers(tmp_path, local):
    (local / "m.csv").write_text("kind,words\n" + "ham,a\nspam,b\n" * 5)
    (local / "i.jsonl.gz").write_bytes(
        gzip.compress(b'{"instruction": "a", "input": "", "output": "b"}\n' * 3)
    )
    (local / "d.ndjson").write_text('{"body": "one"}\n{"body": "two"}\n')
    fields = {"text_field": "words", "label_field": "kind"}
    figures = run(
        tmp_path,
        params(
            corpus=[
                {"name": "d", "file": "d.ndjson", "text_field": "body"},
                {"name": "m", "file": "m.csv", "kind": "messages", **fields},
                {"name": "i", "file": "i.jsonl.gz", "kind": "instructions"},
            ],
            messages=[{"name": "m", "file": "m.csv", **fields}],
            instructions=[{"name": "i", "file": "i.jsonl.gz"}],
        ),
    )
    assert [(f["kind"], f["format"], f["records"]) for f in listed(tmp_path)] == [
        ("documents", "jsonl", 2),
        ("messages", "csv", 10),
        ("instructions", "jsonl", 3),
    ]
    assert figures["messages_rows_ham"] == figures["messages_rows_spam"] == 5
    assert figures["instructions_records"] == 3


@pytest.mark.parametrize(
    ("kind", "formats"),
    [
        ("documents", {"a.txt": "text", "a": "text", "a.json": "jsonl", "A.JSONL.gz": "jsonl"}),
        ("documents", {"a.parquet": "parquet", "a.ndjson.zst": "jsonl", "a.md.gz": "text"}),
        ("messages", {"a": "tsv", "a.CSV.GZ": "csv", "a.json": "json", "a.parquet": "parquet"}),
        ("instructions", {"a": "json", "a.json.xz": "json", "a.jsonl": "jsonl", "a.csv": "csv"}),
        ("file", {"a.json": "file"}),
    ],
)
def test_a_files_name_tells_its_format(kind, formats):
    assert {name: format_of(kind, name) for name in formats} == formats


def test_a_failure_ends_the_others_and_no_event_comes_from_another_thread(tmp_path, local):
    heard = set()
    corpus = [{"name": f"s{i}", "file": "stories.txt", "save_as": f"{i}.txt"} for i in range(20)]
    broken = [*corpus[:10], {**corpus[10], "sha256": "0" * 64}, *corpus[11:]]
    with pytest.raises(InputError, match="source 's10'"):
        run(tmp_path, params(corpus=broken), log=lambda _: heard.add(threading.get_ident()))
    assert not list((tmp_path / "raw").iterdir())
    run(tmp_path, params(corpus=corpus), log=lambda _: heard.add(threading.get_ident()))
    assert heard == {threading.get_ident()}


# --- a folder as mirror ---------------------------------------------------------------------------


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
    (file,) = listed(tmp_path)
    assert file["file"] == source.get("save_as", "story.txt")
    assert file["url"] == UNREACHABLE
    assert file["sha256"] == sha256(STORY)


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
    monkeypatch.setattr(web, "BACK_OFF_SECONDS", 0)
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
        ({"corpus": [{"name": "a"}]}, "give one of file, folder, glob, urls and builtin"),
        ({"corpus": [{"name": "a", "file": "b", "builtin": "python-docs"}]}, "give one of"),
        ({"corpus": [{"name": "a", "file": "../b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "file": "/b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "file": "b", "save_as": "c/d"}]}, "name of a data file"),
        ({"corpus": [{"name": "a", "file": "b", "save_as": "sources.json"}]}, "name of a data"),
        ({"corpus": [{"name": "a", "file": "b", "folder": "c"}]}, "give one of"),
        ({"corpus": [{"name": "a", "folder": "../b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "glob": "/b/*"}]}, "inside its folder"),
        ({"corpus": [{"name": "a", "glob": "b/a**"}]}, "stands for folders"),
        ({"corpus": [{"name": "../a", "folder": "b"}]}, "inside its folder"),
        ({"corpus": [{"name": "a/b", "folder": "b"}]}, "name of a data file"),
        ({"corpus": [{"name": "a", "folder": "b", "sha256": "0" * 64}]}, "take no sha256"),
        ({"corpus": [{"name": "a", "glob": "b/*", "save_as": "c"}]}, "only a single file"),
        ({"corpus": [{"name": "a", "file": "b.zip"}]}, "is an archive; name its member"),
        ({"corpus": [{"name": "a", "urls": ["https://a.b/c.tar.gz"]}]}, "is an archive"),
        (
            {"corpus": [{"name": "a", "file": "b.zip", "member": "c", "members": "*"}]},
            "either member or members",
        ),
        ({"corpus": [{"name": "a", "file": "b\n"}]}, "no file name should have"),
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
        ({"corpus": [{"name": "a", "file": "b", "format": "messages"}]}, "format"),
        ({"corpus": [{"name": "a", "file": "b", "format": "tsv"}]}, "documents have one of"),
        ({"messages": [{"name": "a", "file": "b", "format": "text"}]}, "messages have one of"),
        ({"messages": [{"name": "a", "file": "b", "kind": "documents"}]}, "kind"),
        ({"corpus": [{"name": "a", "file": "b", "text_field": "x"}]}, "have a text_field"),
        ({"corpus": [{"name": "a", "file": "b.jsonl", "label_field": "x"}]}, "label_field"),
        ({"messages": [{"name": "a", "file": "b.tsv", "label_field": "x"}]}, "label_field"),
        ({"instructions": [{"name": "a", "file": "b", "text_field": "x"}]}, "text_field"),
        ({"corpus": [{"name": "a", "file": "b.jsonl", "separator": "x"}]}, "have a separator"),
        ({"parallel": 0}, "parallel"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
    ],
)
def test_impossible_parameters_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        params(**changes)
