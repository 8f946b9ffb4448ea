"""A file or folder is whole under its name or not there; what is read is what it should be."""

from pathlib import Path

import pytest

from gpt.base.errors import InputError
from gpt.base.files import read_json, remove, sha256_of, whole_directory, whole_file, write_json


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("text")
        assert not path.exists()
    assert path.read_text() == "text"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "d"
    with whole_directory(path) as partial:
        (partial / "a").write_text("1")
    with whole_directory(path) as partial:
        (partial / "b").write_text("2")
        assert (path / "a").exists()
    assert [file.name for file in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_directory_and_no_other(tmp_path):
    path = tmp_path / "d"
    with whole_directory(path) as partial:
        (partial / "a").write_text("1")

    def fail():
        with whole_directory(path) as partial:
            (partial / "b").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_behind_is_cleared(tmp_path):
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "stale").write_text("x")
    with whole_directory(tmp_path / "d") as partial:
        assert not list(partial.iterdir())
    assert not list((tmp_path / "d").iterdir())


def test_a_link_to_a_directory_stays_and_leads_to_the_new_one(tmp_path):
    (tmp_path / "disk" / "d").mkdir(parents=True)
    (tmp_path / "d").symlink_to(tmp_path / "disk" / "d")
    with whole_directory(tmp_path / "d") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "d").is_symlink()
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["d", "a"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "d").write_text("dear")
    with (
        pytest.raises(InputError, match="no directory; move it away"),
        whole_directory(tmp_path / "d"),
    ):
        pass
    assert (tmp_path / "d").read_text() == "dear"


def test_a_directory_whose_replacement_was_killed_is_there_until_the_next_is_whole(tmp_path):
    (tmp_path / ".d.replaced.partial").mkdir()
    (tmp_path / ".d.replaced.partial" / "old").touch()
    with whole_directory(tmp_path / "d"):
        assert (tmp_path / "d" / "old").exists()
    assert not list((tmp_path / "d").iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_json_may_be_as_long_as_its_reader_says(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * (16 << 20) + b'{"a": 1}')
    assert read_json(path, missing="", remedy="", longest=20 << 20) == {"a": 1}


def test_a_directory_is_there_again_when_its_replacement_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").touch()
    replace = Path.replace

    def stopped(self, target):
        if self.name == ".d.partial":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "d"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "d", tmp_path / "d" / "old"]


def test_of_a_link_only_the_link_is_removed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for path in (tmp_path / "link", tmp_path / "nothing"):
        remove(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "precious"]


def test_equal_values_give_equal_json_bytes(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert sha256_of(tmp_path / "a.json") == sha256_of(tmp_path / "b.json")


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"name": "Zoë", "parts": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", missing="", remedy="") == value


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "not there; run the stage"),
        (b"{", "not JSON .*; make it again"),
        (b"\xff\xfe\xff", "not JSON .*; make it again"),
        (b"[" * 100_000, "not JSON .*; make it again"),
        (b"[]", "not a JSON object; make it again"),
        (b'{"a": 1, "b": 2, "a": 3}', r"not JSON \(the key 'a' is given twice\); make it again"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON .*; make it again"),
        (b'{"a": ' + b"9" * 400 + b"}", r"not JSON \(a number of 400 digits\); make it again"),
        (b'{"a": NaN}', "not JSON .*float values.*; make it again"),
        (b'{"a": [1e999]}', "not JSON .*float values.*; make it again"),
        (b'{"a": {"\\ud800": 1}}', "not JSON .*surrogates not allowed.*; make it again"),
        (b'{\n<<<<<<< HEAD\n"a": 1\n', "line 2: an unresolved merge conflict .*`git add` the file"),
        (b" " * (16 << 20) + b"{}", "16,777,218 bytes are no such file's size; make it again"),
    ],
)
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.json: {complaint}$") as caught:
        read_json(path, missing="not there; run the stage", remedy="make it again")
    assert "\n" not in str(caught.value)
