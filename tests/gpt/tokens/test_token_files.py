"""Token folders: what was written is read, a piece at a time, and damage is told in one line."""

import json
import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.base.errors import InputError
from gpt.base.files import sha256_of
from gpt.batches.data import WindowDataset, take
from gpt.tokens.token_files import Counts, Tokens, map_ids, open_tokens, read_manifest, token_dtype


def test_ids_take_two_bytes_up_to_65536_entries_and_four_above():
    assert token_dtype(65_536) == "uint16"
    assert token_dtype(65_537) == "uint32"


def test_a_file_gives_its_ids(tmp_path):
    for dtype in ("uint16", "uint32"):
        path = tmp_path / dtype
        np.arange(65_000, 65_010, dtype=dtype).tofile(path)
        assert map_ids(path, dtype).tolist() == list(range(65_000, 65_010))
        tokens = Tokens([map_ids(path, dtype)])
        assert tokens[2:5].dtype == np.int64
        assert tokens[2:5].tolist() == [65_002, 65_003, 65_004]
    (tmp_path / "empty").touch()
    assert len(map_ids(tmp_path / "empty", "uint16")) == 0


@given(
    sizes=st.lists(st.integers(0, 5), max_size=6),
    start=st.none() | st.integers(-20, 40),
    stop=st.none() | st.integers(-20, 40),
)
def test_tokens_are_their_parts_one_behind_the_other_however_they_are_cut(sizes, start, stop):
    whole = np.arange(sum(sizes))
    tokens = Tokens(np.split(whole.astype("<u2"), np.cumsum(sizes))[:-1])
    assert len(tokens) == len(whole)
    assert tokens[start:stop].tolist() == whole[start:stop].tolist()
    assert tokens[start:stop].dtype == np.int64


def test_tokens_are_not_read_with_gaps():
    with pytest.raises(ValueError, match="in order"):
        Tokens([np.arange(9)])[::2]


def write_folder(folder, **splits):
    """A token folder of (file, source, ids) by split."""
    entries = {}
    for split, shards in splits.items():
        entries[split] = {"shards": []}
        for file, source, ids in shards:
            np.array(ids, dtype="<u2").tofile(folder / file)
            counts = {"documents": 1, "bytes": 3 * len(ids), "tokens": len(ids)}
            sha256 = sha256_of(folder / file)
            shard = {"file": file, "source": source, "sha256": sha256, "counts": counts}
            entries[split]["shards"].append(shard)
    manifest = {"dtype": "uint16", "vocab_size": 257, "tokenizer": "0" * 64, "splits": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change(folder, **fields):
    """Other fields for the first shard of the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0] |= fields
    (folder / "manifest.json").write_text(json.dumps(manifest))


SHARDS = [
    ("a-0.bin", "a", [0, 1, 2]),
    ("b-0.bin", "b", [3, 4]),
    ("a-1.bin", "a", [5]),
    ("c-0.bin", "c", []),
]


def test_a_split_is_the_shards_of_its_manifest_in_their_order(tmp_path):
    write_folder(tmp_path, train=SHARDS, validation=SHARDS[1:2])
    assert open_tokens(tmp_path, "train")[:].tolist() == [0, 1, 2, 3, 4, 5]
    assert open_tokens(tmp_path, "validation")[:].tolist() == [3, 4]


def test_a_source_is_its_own_shards(tmp_path):
    write_folder(tmp_path, train=SHARDS)
    of = {source: open_tokens(tmp_path, "train", source)[:].tolist() for source in "abcd"}
    assert of == {"a": [0, 1, 2, 5], "b": [3, 4], "c": [], "d": []}


def test_what_is_in_a_split_is_counted_by_source_and_in_all(tmp_path):
    write_folder(tmp_path, train=SHARDS)
    split = read_manifest(tmp_path).splits["train"]
    assert split.sources == {
        "a": Counts(documents=2, bytes=12, tokens=4),
        "b": Counts(documents=1, bytes=6, tokens=2),
        "c": Counts(documents=1, bytes=0, tokens=0),
    }
    assert split.total == Counts(documents=4, bytes=18, tokens=6)


def test_a_large_folder_is_opened_and_read_at_a_few_places_without_its_memory(tmp_path):
    """400 MB; the shards are holes, so that the disk has no part in it either."""
    each = 100 << 20
    write_folder(tmp_path, train=[(f"{i}.bin", "a", []) for i in range(4)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        os.truncate(tmp_path / shard["file"], each)
        shard["counts"]["tokens"] = each // 2
        shard["sha256"] = "20492a4d0d84f8beb1767f6616229f85d44c2827b64bdbfb260ee12fa1109e0e"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    # the process's resident memory would count pages of the system's cache, which it may take back
    tracemalloc.start()
    windows = WindowDataset(open_tokens(tmp_path, "train"), 1024, 1024)
    assert len(windows) == 4 * each // 2 // 1024 - 1
    batch = take(windows, list(range(0, len(windows), len(windows) // 8)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.inputs.shape == (9, 1024)
    assert peak < 20 << 20


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "manifest.json").unlink(), "run the stage tokenize first"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"dtype": "int8"}'), "dtype"),
        (lambda f: (f / "b-0.bin").unlink(), "b-0.bin: no such file"),
        (lambda f: (f / "b-0.bin").write_bytes(b"123"), "b-0.bin: truncated"),
        (lambda f: (f / "b-0.bin").write_bytes(b"12"), "1 tokens where the manifest has 2"),
        (lambda f: (f / "b-0.bin").write_bytes(b"\3\0\5\0"), r"b-0.bin: damaged .*tokenize again"),
        (
            lambda f: write_folder(f, train=[("b-0.bin", "b", [3, 257])]),
            r"b-0.bin: holds the token 257, and the vocabulary ends at 256",
        ),
        (lambda f: change(f, counts={"tokens": -1}), r"manifest.json: .*tokens"),
        (lambda f: change(f, counts={"tokens": "3"}), r"manifest.json: .*tokens"),
        (lambda f: change(f, file="../b-0.bin"), r"manifest.json: .*file"),
        (lambda f: change(f, sha256=None), r"manifest.json: .*sha256"),
    ],
)
def test_damaged_token_folders_are_refused_in_one_line(tmp_path, damage, complaint):
    write_folder(tmp_path, train=SHARDS)
    damage(tmp_path)
    with pytest.raises(InputError, match=complaint) as caught:
        open_tokens(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_named(tmp_path):
    write_folder(tmp_path, train=SHARDS)
    with pytest.raises(InputError, match="no split 'validation'"):
        open_tokens(tmp_path, "validation")
