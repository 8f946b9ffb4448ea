"""Whatever a YAML file holds, it is read or refused in one line with its place, and at once."""

import time

import pytest

from gpt.base.errors import InputError
from pipeline.project.yaml_files import parse_yaml, read_yaml

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
TOWER = "".join(f"a{i}: &a{i} {'[' * 30}{f'*a{i - 1}' if i else 1}{']' * 30}\n" for i in range(500))

MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a:\n  b: 2026-02-30", "not YAML (day is out of range"),
        ("a: !!int abc", "not YAML (invalid literal"),
        ('a: !!int ""', "not YAML ("),
        ("a: !!bool foo", "not YAML ("),
        ("? [a, [b]]\n: 1", "not YAML ("),
        ("a: 0x" + "f" * 4000, "not YAML (Exceeds the limit"),
        ("a: " + "9" * 5000, "not YAML (Exceeds the limit"),
        ("a: " + "[" * 5000, "line 1, column 67: more than 50,000 values or 64 levels"),
        ("? " * 50_000, "line 1, column 129: more than 50,000 values or 64 levels"),
        (TOWER, "more than 50,000 values or 64 levels"),
        (BOMB, "line 14, column 18: more than 50,000 values or 64 levels"),
        (MERGED, "more than 50,000 values or 64 levels, aliases followed"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: [" + "1, " * 60_000 + "]", "more than 50,000 values"),
        (
            "a: 1\nb: {c: 1, c: 2}",
            "line 2, column 11: while constructing a mapping, found duplicate",
        ),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: could not determine a"),
        ("a:\n\tb: 1", "line 2, column 1: the line begins with a tab"),
        ("\ta: 1", "line 1, column 1: the line begins with a tab"),
        ("a: [", ": while parsing a flow node, "),
        ("a: 1\nb: \x00", "not YAML (unacceptable character"),
        (
            "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n",
            "line 2: an unresolved merge conflict ('<<<<<<< HEAD'); keep one of the two versions",
        ),
        ("x" * (1 << 21), "2,097,152 bytes are no such file's size"),
    ],
)
def test_what_is_no_yaml_is_refused_at_once_with_its_place(tmp_path, content, expected):
    path = tmp_path / "some.yaml"
    path.write_text(content)
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_yaml(path, path.name)
    assert time.monotonic() - started < 10  # it is far less, on whatever machine
    assert str(caught.value).startswith("some.yaml: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_anchors_and_merges_are_read_and_nothing_is_shared():
    raw = parse_yaml(b"a: &a {b: {c: 1}}\nd: *a\ne: {<<: *a, f: 2}\n", "some.yaml")
    assert raw == {"a": {"b": {"c": 1}}, "d": {"b": {"c": 1}}, "e": {"b": {"c": 1}, "f": 2}}
    raw["a"]["b"]["c"] = 3
    assert raw["d"] == {"b": {"c": 1}}
    assert raw["e"]["b"] == {"c": 1}


def test_values_are_those_of_yaml_1_2_as_dvc_reads_them():
    assert parse_yaml(b"{a: 5e-4, b: 1_000, c: 010, d: no}", "some.yaml") == {
        "a": 0.0005,
        "b": 1000,
        "c": 10,
        "d": "no",
    }


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file$"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r": cannot be read \(Is a directory\); make it a"):
        read_yaml(tmp_path)
