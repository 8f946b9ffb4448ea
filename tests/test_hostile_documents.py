"""Whatever stands in a settings file of ours, it is read, or refused in one line that names it.

`pytest --hypothesis-profile=thorough tests/test_hostile_documents.py` tries ten thousand of each.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hostile import read_within_bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hostile_tables import SPELLED, damaged, hostile

from gpt.base.errors import InputError
from gpt.base.files import read_json, sha256_of
from gpt.model.config import GPTConfig
from gpt.model.model import GPTClassifier
from gpt.model.weights import load_model, save_model
from gpt.tokens.token_files import open_tokens
from gpt.tokens.tokenizer import byte_tokenizer
from pipeline.project.params import load_params
from pipeline.project.yaml_files import read_yaml

PRESET = Path(__file__).resolve().parent.parent / "presets" / "smoke.yaml"
SMOKE = PRESET.read_text(encoding="utf-8")
load_params(PRESET)  # imports the stages, which takes its time


def check(read, path, content):
    """Read `content`, which lies at `path` then."""
    path.write_bytes(content)
    read_within_bounds(read, path.name)


def put(document, path, text):
    """The document as JSON, with `text` in the place of what is at `path`."""
    changed = copy.deepcopy(document)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = "@"
    return json.dumps(changed).replace('"@"', text)


def places(document, path=()):
    """The paths of all values in a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutated(document):
    """A document with another value at some place, or with damaged bytes."""
    at = st.sampled_from(list(places(document)))
    one = st.builds(lambda path, text: put(document, path, text), at, SPELLED)
    return damaged(one.map(lambda text: text.encode("utf-8", "surrogatepass")))


# --- YAML -----------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(
        [
            *("2026-02-30", "!!int abc", "9" * 5000, "1" + ":1" * 3000, "0x" + "f" * 5000),
            *(
                "{a: " * 2000 + "1" + "}" * 2000,
                "[" * 5000,
                "&a [*a]",
                "*a",
                "&a",
                "<<: *a",
                ".nan",
            ),
            *("!!set {a, b}", "!!binary é", "!!timestamp x", "!!python/name:os.system", "? x", "|"),
            *("1e999", "yes", "~", "'", '"\\ud800"', "\t", "---", "...", "%YAML 9", "2001-01-01"),
            *("!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "=", "{[1]: 2}", "{1: 2}", "x" * 5000, "0"),
        ]
    ),
    SPELLED,
    st.text(max_size=20),
)


@st.composite
def yaml_documents(draw):
    """The smoke preset with other values, other lines or other bytes."""
    lines = SMOKE.splitlines()
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[number].partition(":")
        how = draw(st.sampled_from(["value", "line", "again", "none"]))
        if how == "value":
            lines[number] = f"{key}{colon} {draw(VALUES)}"
        elif how == "line":
            lines.insert(number, draw(VALUES))
        elif how == "again":
            lines.insert(number, lines[number])
        else:
            del lines[number]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@settings(hostile, max_examples=settings().max_examples // 2)  # each reads all of the parameters
@given(content=st.one_of(damaged(yaml_documents()), yaml_documents()))
def test_params(tmp_path, content):
    path = tmp_path / "params.yaml"
    check(lambda: load_params(path), path, content)


@hostile
@given(content=st.one_of(st.binary(), st.lists(VALUES).map(" ".join).map(str.encode)))
def test_yaml(tmp_path, content):
    path = tmp_path / "some.yaml"
    check(lambda: read_yaml(path), path, content)


# --- JSON -----------------------------------------------------------------------------------------


@hostile
@given(
    content=st.one_of(
        st.binary(), mutated({"a": {"b": [1, {"c": None}], "d": "é"}, "e": 1.5, "f": True})
    )
)
def test_json_objects(tmp_path, content):
    path = tmp_path / "some.json"

    def read():
        value = read_json(path, missing="not there", remedy="make it again")
        assert isinstance(value, dict)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()

    check(read, path, content)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, context_length=8, n_layer=1, n_head=2, n_embd=8
    )
    save_model(GPTClassifier(config, ["ham", "spam"], "mean"), folder, tokenizer=tokenizer)
    return folder


CONFIG = {
    **{"model_type": "gpt2", "vocab_size": 257, "n_positions": 8, "n_layer": 1, "n_head": 2},
    **{"n_embd": 8, "n_inner": None, "activation_function": "gelu_new", "resid_pdrop": 0.0},
    **{"layer_norm_epsilon": 1e-05, "qkv_bias": True, "tie_word_embeddings": True},
    **{"scale_attn_weights": True, "pooling": "mean", "id2label": {"0": "ham", "1": "spam"}},
}


@hostile
@given(content=mutated(CONFIG))
def test_config(model, content):
    path = model / "config.json"

    def read():
        try:
            load_model(model)
        except InputError as error:  # sizes that are fine in themselves, but not the weights'
            if "model.safetensors" not in str(error):
                raise

    check(read, path, content)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    np.arange(6, dtype="<u2").tofile(folder / "a.bin")
    return folder


SHARD = {
    **{"file": "a.bin", "source": "a", "sha256": ""},
    "counts": {"documents": 1, "bytes": 6, "tokens": 6},
}
MANIFEST = {
    **{"dtype": "uint16", "vocab_size": 257, "tokenizer": "0" * 64},
    "splits": {"train": {"shards": [SHARD]}, "validation": {"shards": []}},
}


@hostile
@given(content=mutated(MANIFEST))
def test_manifest(tokens, content):
    sha256 = sha256_of(tokens / "a.bin").encode()
    content = content.replace(b'"sha256": ""', b'"sha256": "%s"' % sha256)

    def read():
        try:
            open_tokens(tokens, "train")[:]
        except InputError as error:  # a shard that is not as the manifest has it is named itself
            if "manifest.json" in str(error):
                raise

    check(read, tokens / "manifest.json", content)
