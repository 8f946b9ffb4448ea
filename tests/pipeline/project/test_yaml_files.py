"""Whatever a YAML file holds, it is read or refused in one line with its place, and at once."""

import time

import pytest

from gpt.base.errors import InputError
from pipeline.project.yaml_files import parse_yaml, read_yaml

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
TOWER = "".join(f"a{i}: &a{i} {'[' * 30}{f'*a{i - 1}' if i else 1}{']' * 30}\n" for i in range(500))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a:\n  b: 2026-02-30", "line 2, column 6: '2026-02-30' is no timestamp (day is out of"),
        ("a: !!int abc", "line 1, column 4: 'abc' is no int (invalid literal"),
        ("a: !!bool abc", "line 1, column 4: 'abc' is no bool"),
        ("a: !!timestamp abc", "line 1, column 4: 'abc' is no timestamp"),
        ("a: " + "9" * 5000, "line 1, column 4: a number of 5,000 characters"),
        ("a: 1" + ":1" * 5000, "line 1, column 4: a number of 10,001 characters"),
        ("a: 0x" + "f" * 5000, "line 1, column 4: a number of 5,002 characters"),
        ("a: " + "[" * 5000, "line 1, column 67: nested more than 64 deep"),
        ("? " * 50_000, "line 1, column 129: nested more than 64 deep"),
        (TOWER, "line 3, column 39: nested more than 64 deep, aliases followed"),
        (BOMB, "line 14, column 18: more than 50,000 values, aliases followed"),
        ("a: &a [*a]", "line 1, column 8: an alias of what it stands in"),
        ("a: &a\n  <<: *a", "line 2, column 7: an alias of what it stands in"),
        ("a: [" + "1, " * 60_000 + "]", "more than 50,000 values"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: the key 'c' is given twice"),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: could not determine a"),
        ("a:\n\tb: 1", "line 2, column 1: the line begins with a tab"),
        ("\ta: 1", "line 1, column 1: the line begins with a tab"),
        ("a: [", ": while parsing a flow node, "),
        ("a: 1\nb: \x00", "line 2: not YAML (unacceptable character"),
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


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file$"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r": cannot be read \(Is a directory\); make it a"):
        read_yaml(tmp_path)
