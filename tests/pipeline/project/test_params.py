"""Whatever is wrong in params.yaml is named by its path, in one line, before any work."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from gpt.base.errors import InputError
from pipeline.project.params import (
    SECTIONS,
    Params,
    load_params,
    load_section,
    params_class,
    section,
)

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.fixture
def smoke():
    return yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def refuse(tmp_path):
    """Writes a params file and returns the one line with which it is refused."""

    def line(content: dict | str | bytes) -> str:
        path = tmp_path / "params.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(InputError) as caught:
            load_params(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return line


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_shipped_file_is_accepted(path):
    params = load_params(path)
    for name in SECTIONS:
        own = getattr(params, name)
        optional = name == "tune_preferences"
        assert isinstance(own, params_class(name)) or (optional and own is None)


def test_one_section_alone_is_read_and_refused_by_itself(smoke, tmp_path):
    path = tmp_path / "params.yaml"
    smoke["finetune_classifier"]["base"] = "nonsense"  # another section's mistake
    path.write_text(yaml.safe_dump(smoke))
    assert load_section(path, "promotion") is None
    path.write_text(yaml.safe_dump({**smoke, "promotion": {"at_least": 0.5}}))
    assert load_section(path, "promotion").at_least == 0.5
    for wrong in ({"at_least": -1}, {"at_last": 1}):
        path.write_text(yaml.safe_dump({**smoke, "promotion": wrong}))
        with pytest.raises(InputError, match=r"params.yaml: promotion\.at_l[^\n]*$"):
            load_section(path, "promotion")


def test_numbers_in_scientific_notation_are_numbers(smoke, tmp_path):
    text = yaml.safe_dump(smoke).replace("learning_rate: 0.003", "learning_rate: 5e-4")
    assert "5e-4" in text
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").pretrain.train.learning_rate == 5e-4


def test_an_impossible_value_is_named_with_its_path(smoke, refuse):
    smoke["finetune_classifier"]["train"]["learning_rate"] = -1
    assert refuse(smoke) == (
        "params.yaml: finetune_classifier.train.learning_rate: should be greater than 0 (got -1)"
    )


def test_a_wrong_type_is_named_with_its_path(smoke, refuse):
    smoke["pretrain"]["train"]["steps"] = "many"
    line = refuse(smoke)
    assert line.startswith("params.yaml: pretrain.train.steps: should be a valid integer")
    assert line.endswith("(got 'many')")


@pytest.mark.parametrize("value", [True, 3.5, [1], None])
def test_what_is_no_whole_number_is_not_taken_for_one(smoke, refuse, value):
    smoke["pretrain"]["model"]["n_layer"] = value
    assert "pretrain.model.n_layer: " in refuse(smoke)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_finite_number_is_refused(smoke, refuse, value):
    smoke["pretrain"]["train"]["learning_rate"] = value
    line = refuse(smoke)
    assert "pretrain.train.learning_rate: " in line
    assert line.endswith(f"(got {value})")


def test_an_unknown_parameter_is_named_with_the_nearest_known_one(smoke, refuse):
    smoke["finetune_instruct"]["train"]["learning_rat"] = 1
    assert refuse(smoke) == (
        "params.yaml: finetune_instruct.train.learning_rat: unknown parameter; "
        "did you mean learning_rate?"
    )


def test_an_unknown_parameter_like_no_other_is_answered_with_all(smoke, refuse):
    smoke["load_gpt2"]["zzz"] = 1
    assert "load_gpt2.zzz: unknown parameter; known here: size, sample_prompt" in refuse(smoke)


def test_an_unknown_parameter_in_a_list_is_named_with_its_place(smoke, refuse):
    smoke["download"]["corpus"][0]["seperator"] = "x"
    assert "download.corpus[0].seperator: unknown parameter; did you mean separator?" in refuse(
        smoke
    )


def test_an_unknown_section_is_named(smoke, refuse):
    smoke["pretrian"] = smoke.pop("pretrain")
    assert refuse(smoke) == (
        "params.yaml: pretrian: unknown parameter; did you mean pretrain?; "
        "pretrain: missing; each stage has a section"
    )


def test_an_optional_stage_needs_a_section_only_when_it_runs(smoke, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(smoke))
    params = load_params(path)
    assert section(params, "tune_preferences") is params.tune_preferences
    del smoke["tune_preferences"]
    path.write_text(yaml.safe_dump(smoke))
    assert section(load_params(path), "pretrain") == params.pretrain
    with pytest.raises(InputError, match=r"^params\.yaml: tune_preferences: missing, and "):
        section(load_params(path), "tune_preferences")


def test_a_section_that_is_there_is_checked_also_of_an_optional_stage(smoke, refuse):
    smoke["tune_preferences"]["beta"] = 0
    assert refuse(smoke) == ("params.yaml: tune_preferences.beta: should be greater than 0 (got 0)")
    smoke["tune_preferences"] = {"max_length": 129, "train": {"steps": 1}}
    assert refuse(smoke).startswith(
        "params.yaml: tune_preferences.max_length: at most the base's context of 128 tokens"
    )
    smoke["tune_preferences"] = {}
    assert refuse(smoke) == "params.yaml: tune_preferences.train: is missing; add it"


def test_a_missing_parameter_is_named(smoke, refuse):
    del smoke["pretrain"]["train"]
    assert refuse(smoke) == "params.yaml: pretrain.train: is missing; add it"


def test_heads_that_do_not_divide_the_width_are_named(smoke, refuse):
    smoke["pretrain"]["model"]["n_head"] = 5
    line = refuse(smoke)
    assert line.startswith("params.yaml: pretrain.model: n_head: 5 heads do not divide the width")


def test_all_problems_are_named_at_once_but_not_endlessly(smoke, refuse):
    smoke["tokenize"]["validation"] = 2
    smoke["evaluate"]["batch_size"] = 0
    line = refuse(smoke)
    assert "tokenize.validation: " in line
    assert "evaluate.batch_size: " in line
    smoke["evaluate"] |= dict.fromkeys("abcdefgh", 1)
    assert refuse(smoke).endswith("; and 5 more")


def test_a_text_longer_than_the_bases_context_is_refused(smoke, refuse):
    smoke["finetune_classifier"]["max_length"] = 129
    assert refuse(smoke) == (
        "params.yaml: finetune_classifier.max_length: at most the base's context of 128 tokens "
        "(pretrain.model.context_length) is possible (got 129)"
    )
    smoke["finetune_classifier"] |= {"base": "gpt2", "max_length": 1025}
    smoke["load_gpt2"] = {"size": "124M"}
    assert "context of 1024 tokens (load_gpt2.size)" in refuse(smoke)


def test_gpt2_that_is_never_fetched_is_refused(smoke, refuse):
    smoke["download"]["gpt2"] = []
    smoke["finetune_instruct"]["base"] = "gpt2"
    assert refuse(smoke) == (
        "params.yaml: finetune_instruct.base: gpt2 needs the published model's files; "
        "list them in download.gpt2"
    )


@pytest.mark.parametrize("other", [{"train": 0.8, "validation": 0.1}, None])
def test_pretraining_on_rows_that_the_classifier_is_tested_on_is_refused(smoke, refuse, other):
    source = {"name": "m", "file": "messages.tsv", "kind": "messages", "balance": "undersample"}
    if other:
        source |= {"split": other, "part": "train"}
    else:
        del source["balance"]
    smoke["download"]["corpus"].append(source)
    assert "download.corpus[1]: holds rows that finetune_classifier is tested on" in refuse(smoke)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("pretrain:\n  model: {a: 1\ntokenize: 2\n", "line 3, column 9: "),
        (
            "pretrain: {}\npretrain: {}\n",
            'line 2, column 1: while constructing a mapping, found duplicate key "pretrain";',
        ),
        ("a: \x07\n", "not YAML (unacceptable character"),
        ("- 1\n", "must hold the sections download, tokenize"),
        ("", "must hold the sections download, tokenize"),
        ("pretrain: 3\n", "pretrain: must hold parameters, each with its name (got 3)"),
        (b"a: \xff\n", "byte 3 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_params_file_is_refused_with_the_place(refuse, content, expected):
    assert expected in refuse(content)


def test_a_missing_file_is_answered_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"params\.yaml: not there; .*gpt-pipeline preset NAME"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", [field.name for field in fields(Params)])
def test_every_whole_number_has_an_upper_bound(name):
    def unbounded(schema, path):
        if isinstance(schema, dict):
            if schema.get("type") == "integer" and not {"maximum", "exclusiveMaximum"} & set(
                schema
            ):
                yield path
            for key, below in schema.items():
                yield from unbounded(below, f"{path}.{key}")
        elif isinstance(schema, list):
            for below in schema:
                yield from unbounded(below, path)

    assert list(unbounded(TypeAdapter(params_class(name)).json_schema(), name)) == []
