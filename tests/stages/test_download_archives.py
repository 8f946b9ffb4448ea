"""Archives are somebody else's: what is well-meant comes out of them, and nothing else."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import stat
import tarfile
import threading
import zipfile

import pytest
import zstandard
from downloads import (
    STORY,
    corpus_files,
    listed,
    make_local,
    params,
    refused,
    run,
    sha256,
    story,
)

from gpt.text import formats
from stages.download import archives
from stages.download.transfer import UnavailableError

PACKERS = {
    "zip": None,
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
FILES = {"in/b.txt": b"bee", "in/a.txt": STORY, "in/deep/c.txt": b"sea", "in/.hidden": b"x"}


@pytest.fixture
def local(tmp_path):
    return make_local(tmp_path)


def make_archive(path, files, form="zip"):
    """Write an archive of (name, content) pairs; a content may be a prepared header instead."""
    content = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files:
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name, data in files:
                header = name
                if isinstance(name, str):
                    header = tarfile.TarInfo(name)
                    header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    packed = content.getvalue()
    path.write_bytes(packed if form == "zip" else PACKERS[form](packed))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def zip_link(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize("form", PACKERS)
def test_one_member_is_taken_from_every_form_of_archive(tmp_path, local, form):
    make_archive(local / f"all.{form}", FILES.items(), form)
    run(tmp_path, params(corpus=story(file=f"all.{form}", member="in/a.txt")))
    assert corpus_files(tmp_path) == {"a.txt": STORY}


@pytest.mark.parametrize("form", PACKERS)
def test_members_that_fit_a_pattern_are_taken_in_order(tmp_path, local, form):
    path = make_archive(local / f"all.{form}", FILES.items(), form)
    checked = {"sha256": sha256(path.read_bytes())}
    for pattern, expected in (
        ("in/*.txt", ["in/a.txt", "in/b.txt"]),
        ("**/*.txt", ["in/a.txt", "in/b.txt", "in/deep/c.txt"]),
        ("**", ["in/a.txt", "in/b.txt", "in/deep/c.txt"]),
    ):
        source = {"name": "books", "file": path.name, "members": pattern, **checked}
        run(tmp_path, params(corpus=[source]))
        assert corpus_files(tmp_path) == {f"books/{name}": FILES[name] for name in expected}
        assert [file["file"] for file in listed(tmp_path)] == [f"books/{n}" for n in expected]
        assert [file["sha256"] for file in listed(tmp_path)] == [sha256(FILES[n]) for n in expected]


def test_a_tars_own_way_of_writing_paths_is_understood(tmp_path, local):
    files = {f"./{name}": content for name, content in FILES.items()}
    make_archive(local / "all.tar", [("./in/", b""), *files.items()], "tar")
    run(tmp_path, params(corpus=[{"name": "x", "file": "all.tar", "members": "in/*.txt"}]))
    assert list(corpus_files(tmp_path)) == ["x/in/a.txt", "x/in/b.txt"]


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("../outside.txt", "must be a path inside its folder"),
        ("in/../../outside.txt", "must be a path inside its folder"),
        ("/tmp/outside.txt", "must be a path inside its folder"),
        ("in\\..\\outside.txt", "must be a path inside its folder"),
        ("C:/outside.txt", "must be a path inside its folder"),
        ("in/a.txt", "'in/a.txt': File exists"),
        ("./in/a.txt", "'in/a.txt': File exists"),
        ("in/a.txt/b.txt", "cannot be unpacked at member"),
        ("in/new\nline.txt", "no file name should have"),
        ("in/" + "n" * 300, "n': File name too long"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_name_is_refused(tmp_path, local, form, name, complaint):
    make_archive(local / f"all.{form}", [("in/a.txt", STORY), (name, b"evil")], form)
    source = {"name": "x", "file": f"all.{form}", "members": "**"}
    refused(tmp_path, params(corpus=[source]), complaint)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "raw") == ["samples"]


@pytest.mark.parametrize(
    "header",
    [
        link("in/b.txt", "/etc/passwd"),
        link("in/b.txt", "a.txt"),
        link("in/b.txt", "in/a.txt", tarfile.LNKTYPE),
        link("in/b.txt", "", tarfile.CHRTYPE),
        link("in/b.txt", "", tarfile.FIFOTYPE),
    ],
)
def test_a_tars_links_and_devices_are_refused(tmp_path, local, header):
    make_archive(local / "all.tar", [("in/a.txt", STORY), (header, b"")], "tar")
    source = {"name": "x", "file": "all.tar", "members": "in/*"}
    refused(tmp_path, params(corpus=[source]), "'in/b.txt' of the archive is not a plain file")


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO])
def test_a_zips_links_and_devices_are_refused(tmp_path, local, mode):
    make_archive(local / "all.zip", [("in/a.txt", STORY), (zip_link("in/b.txt", mode), "/etc")])
    source = {"name": "x", "file": "all.zip", "members": "in/*"}
    refused(tmp_path, params(corpus=[source]), "'in/b.txt' of the archive is not a plain file")


def test_a_harmless_link_that_nobody_asked_for_is_passed_over(tmp_path, local):
    files = [("in/a.txt", STORY), (link("latest", "in"), b"")]
    make_archive(local / "all.tar", files, "tar")
    run(tmp_path, params(corpus=[{"name": "x", "file": "all.tar", "members": "in/*"}]))
    assert corpus_files(tmp_path) == {"x/in/a.txt": STORY}


def test_an_encrypted_member_is_refused(tmp_path, local):
    make_archive(local / "all.zip", [("a.txt", STORY)])
    content = bytearray((local / "all.zip").read_bytes())
    for marker, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(marker) + at] |= 1
    (local / "secret.zip").write_bytes(content)
    source = {"name": "x", "file": "secret.zip", "member": "a.txt"}
    refused(tmp_path, params(corpus=[source]), "at member 'a.txt': File .* is encrypted")


@pytest.mark.parametrize("form", PACKERS)
def test_a_bomb_stops_at_the_sources_bytes_or_at_the_general_bound(
    tmp_path, local, form, monkeypatch
):
    monkeypatch.setattr(archives, "EXPANSION_FLOOR", 1 << 20)
    monkeypatch.setattr(archives, "EXPANSION", 20)
    bomb = b"0" * (1 << 21)
    make_archive(local / f"all.{form}", [("a.txt", bomb)], form)
    corpus = story(file=f"all.{form}", member="a.txt", bytes=1000)
    refused(tmp_path, params(corpus=corpus), "more than 1000 bytes")
    if form != "tar":  # which expands to nothing
        for source in ({"member": "a.txt"}, {"members": "*"}):
            corpus = [{"name": "x", "file": f"all.{form}", **source}]
            refused(tmp_path, params(corpus=corpus), f"more than {1 << 20} bytes")
    half = bomb[: len(bomb) // 2]
    make_archive(local / f"two.{form}", [("a.txt", half), ("b.txt", half)], form)
    corpus = [{"name": "x", "file": f"two.{form}", "members": "*", "bytes": len(half) + 1}]
    refused(tmp_path, params(corpus=corpus), f"more than {len(half) + 1} bytes")


def test_a_bomb_beside_the_member_that_is_wanted_is_found_too(tmp_path, local, monkeypatch):
    monkeypatch.setattr(formats, "_SMALL", 1 << 20)
    monkeypatch.setattr(formats, "_SWELLING", 20)
    make_archive(local / "all.tar.gz", [("a.txt", STORY), ("b", b"0" * (1 << 22))], "tar.gz")
    corpus = story(file="all.tar.gz", member="a.txt")
    refused(tmp_path, params(corpus=corpus), "swells to more than 20 times its size")


def extended(kind=tarfile.XHDTYPE, size=1 << 26):
    """A header that says that so many bytes of headers follow."""
    header = link("x", "", kind)
    header.size = size
    return header.tobuf()


def endless_sparse_map():
    """A header in GNU's form for files with holes, whose list of holes goes on and on."""
    header = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482] = tarfile.GNUTYPE_SPARSE, 1
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    more = bytearray(tarfile.BLOCKSIZE)
    more[504] = 1
    return bytes(header) + bytes(more) * 5000


@pytest.mark.parametrize(
    "bomb",
    [
        extended() + bytes(1 << 26),
        extended(tarfile.XGLTYPE) + bytes(1 << 26),
        extended(tarfile.GNUTYPE_LONGNAME) + bytes(1 << 26),
        (extended(tarfile.GNUTYPE_LONGNAME, 1 << 19) + bytes(1 << 19)) * 3,
        endless_sparse_map(),
    ],
    ids=["one file's", "all files'", "a name", "three names", "a sparse file's"],
)
def test_a_bomb_in_a_tars_own_headers_is_refused(tmp_path, local, bomb):
    (local / "all.tar.gz").write_bytes(gzip.compress(bomb))
    corpus = story(file="all.tar.gz", member="a.txt")
    refused(tmp_path, params(corpus=corpus), "headers in the archive have more than 1048576 bytes")


def test_a_tar_whose_later_header_is_damaged_is_not_read_as_if_it_ended_there(tmp_path, local):
    path = make_archive(local / "all.tar", [("a.txt", STORY), ("b.txt", STORY)], "tar")
    content = bytearray(path.read_bytes())
    content[content.index(b"b.txt")] = ord("c")  # its checksum is another now
    path.write_bytes(content)
    source = {"name": "x", "file": "all.tar", "members": "*"}
    refused(tmp_path, params(corpus=[source]), "cannot be unpacked")


def test_too_many_members_are_refused(tmp_path, local, monkeypatch):
    monkeypatch.setattr(archives, "MEMBERS_LIMIT", 5)
    make_archive(local / "all.tar", [(f"{i}.txt", STORY) for i in range(6)], "tar")
    corpus = [{"name": "x", "file": "all.tar", "members": "*"}]
    refused(tmp_path, params(corpus=corpus), "more than 5 members")


@pytest.mark.parametrize("form", PACKERS)
def test_a_damaged_or_cut_off_archive_is_refused_and_a_missing_member_named(tmp_path, local, form):
    path = make_archive(local / f"all.{form}", [("a.txt", os.urandom(5000)), ("b", STORY)], form)
    whole = path.read_bytes()
    missing = [{"name": "x", "file": path.name, "member": "other.txt"}]
    refused(tmp_path, params(corpus=missing), r"no member 'other\.txt'")
    missing = [{"name": "x", "file": path.name, "members": "*.md"}]
    refused(tmp_path, params(corpus=missing), r"no member of the archive fits '\*\.md'")
    corpus = [{"name": "x", "file": path.name, "members": "*"}]
    for broken in (whole[:2000], whole[:-30] if form != "tar" else whole[:5700], b"<html>", b""):
        path.write_bytes(broken)
        refused(tmp_path, params(corpus=corpus), "cannot be unpacked")
    if form != "tar":  # which has no checksum of its members
        damaged = bytearray(whole)
        damaged[1000] ^= 1
        path.write_bytes(damaged)
        refused(tmp_path, params(corpus=corpus), "cannot be unpacked")


@pytest.mark.parametrize("form", PACKERS)
def test_no_damage_ends_in_anything_but_members_or_a_refusal(tmp_path, form):
    draw = random.Random(form)
    whole = make_archive(tmp_path / "whole", FILES.items(), form).read_bytes()
    for attempt in range(60):
        damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.choice([1, 3, 10])):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.choice([0, 255, draw.randrange(256)])
        path, out = tmp_path / "damaged", tmp_path / str(attempt)
        path.write_bytes(damaged)
        with contextlib.suppress(UnavailableError):
            archives.unpack(path, bool, out.joinpath, None, threading.Event())


def test_a_packed_file_that_is_no_archive_stays_as_it_came(tmp_path, local):
    packed = gzip.compress(STORY)
    (local / "story.txt.gz").write_bytes(packed)
    run(tmp_path, params(corpus=[{"name": "x", "file": "story.txt.gz"}]))
    assert corpus_files(tmp_path) == {"story.txt.gz": packed}
    assert listed(tmp_path)[0]["records"] == 1


def test_a_mirror_may_keep_the_member_or_an_archive_of_its_own(tmp_path, local):
    corpus = story(urls=["https://data.invalid/all.zip"], member="inner/story.txt")
    (local / "story.txt").write_bytes(STORY)
    run(tmp_path, params(corpus=corpus, mirror=str(local)))
    (local / "story.txt").unlink()
    make_archive(local / "all.zip", [("inner/story.txt", STORY)], "tar.xz")
    run(tmp_path, params(corpus=corpus, mirror=str(local)))
    assert corpus_files(tmp_path) == {"story.txt": STORY}
