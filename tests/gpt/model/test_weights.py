"""Model directories: read by others, read back, and refused by name when they are damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from gpt.base.errors import InputError
from gpt.model.model import GPT, GPTClassifier
from gpt.model.weights import load_base, load_model, save_model
from gpt.tokens.tokenizer import byte_tokenizer

VARIANTS = [{}, {"qkv_bias": False}, {"tie_weights": False}]


@pytest.fixture
def saved(make_model, tmp_path):
    """A small language model and the directory it was saved in."""
    model = make_model()
    save_model(model, tmp_path / "model", tokenizer=byte_tokenizer())
    return model, tmp_path / "model"


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_transformers_loads_a_language_model_as_it_stands(make_model, tmp_path, changes):
    model = make_model(**changes)
    save_model(model, tmp_path / "m", tokenizer=byte_tokenizer())
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    idx = torch.randint(0, 257, (2, 48))
    assert torch.allclose(theirs.eval()(idx).logits, model(idx), atol=1e-4)


def test_transformers_loads_a_classifier_as_it_stands(make_model, tmp_path):
    torch.manual_seed(1)
    model = GPTClassifier(make_model().config, ["ham", "spam"]).eval()
    save_model(model, tmp_path / "m", tokenizer=byte_tokenizer())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    lengths = torch.tensor([9, 3])
    idx = torch.randint(0, 256, (2, 9))
    idx[1, 3:] = byte_tokenizer().eot
    assert torch.allclose(theirs(idx).logits, model(idx, lengths), atol=1e-4)
    ours = load_model(tmp_path / "m")
    assert isinstance(ours, GPTClassifier)
    assert ours.labels == ["ham", "spam"]
    assert torch.equal(ours(idx, lengths), model(idx, lengths))


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_a_classifier_goes_to_transformers_and_back_with_identical_tensors(
    make_model, tmp_path, n_classes, pooling
):
    labels = [f"class {i}" for i in range(n_classes)]
    model = GPTClassifier(make_model().config, labels, pooling)
    save_model(model, tmp_path / "a", tokenizer=byte_tokenizer())
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b")
    assert isinstance(again, GPTClassifier)
    assert (again.labels, again.pooling) == (labels, pooling)
    save_model(again, tmp_path / "c", tokenizer=byte_tokenizer())
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    one, other = (load_file(tmp_path / folder / name) for folder in ("a", "b"))
    assert one.keys() == other.keys()
    for each in one:
        assert one[each].numpy().tobytes() == other[each].numpy().tobytes(), each


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_reading_back_gives_every_weight_and_the_same_bytes(make_model, tmp_path, changes):
    model = make_model(**changes)
    save_model(model, tmp_path / "a", tokenizer=byte_tokenizer())
    again, tokenizer = load_base(tmp_path / "a")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    save_model(again, tmp_path / "b", tokenizer=tokenizer)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_files_of_transformers_load_with_and_without_the_prefix(tmp_path, prefix):
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        prefix + name.removeprefix("transformer."): value for name, value in load_file(path).items()
    }
    # masks that the published files carry along
    tensors[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, path)
    idx = torch.randint(0, 257, (2, 32))
    assert torch.allclose(load_model(tmp_path)(idx), theirs(idx).logits, atol=1e-4)


def test_narrow_weights_are_widened(saved):
    model, directory = saved
    path = directory / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    again = load_model(directory)
    assert again.wte.weight.dtype == torch.float32
    assert torch.allclose(again.wte.weight, model.wte.weight, atol=1e-3)


def _change(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_1.bias"), r"lacks h\.1\.ln_1\.bias"),
        (lambda t: t.update(extra=torch.ones(1)), r"holds extra, which GPT-2's architecture"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(7, 32)}),
            r"transformer\.wpe\.weight has the shape \(7, 32\), the configuration asks for \(48,",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)}),
            r"transformer\.ln_f\.bias holds I8",
        ),
        (
            lambda t: t["transformer.wte.weight"][3].fill_(-torch.inf),
            r"transformer\.wte\.weight holds what is no finite number",
        ),
    ],
    ids=["missing", "unknown", "shape", "dtype", "infinite"],
)
def test_a_wrong_tensor_is_refused_by_name(saved, change, message):
    _, directory = saved
    _change(directory, change)
    with pytest.raises(InputError, match=message):
        load_model(directory)


def test_a_weight_beyond_a_precision_is_refused_with_one_that_holds_it(saved):
    _, directory = saved
    _change(directory, lambda t: t["transformer.wte.weight"][0].fill_(1e5))
    with pytest.raises(InputError, match=r"wte\.weight holds 100000, which float16 cannot; use bf"):
        load_model(directory, dtype=torch.float16)
    load_model(directory, dtype=torch.bfloat16)


@pytest.mark.parametrize("left", [0, 7, 100, 20_000])
def test_a_truncated_file_is_refused(saved, left):
    _, directory = saved
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or cut short .*again"):
        load_model(directory)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_function", "relu", "activation_function is 'relu'"),
        ("model_type", "llama", "model_type is 'llama'"),
        ("n_head", 5, "5 heads do not divide"),
        ("n_layer", None, "n_layer"),
    ],
)
def test_another_architecture_is_refused(saved, key, value, message):
    _, directory = saved
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=message) as error:
        load_model(directory)
    assert "\n" not in str(error.value)


ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    1e300,
    1 << 63,
    10**40,
    "",
    "32",
    "a" * 5000,
    [],
    [[1]],
    {},
    {"0": 1},
]


@pytest.mark.parametrize(
    ("key", "fine"),
    [
        ("vocab_size", []),
        ("n_positions", []),
        ("n_layer", []),
        ("n_head", []),
        ("n_embd", []),
        ("resid_pdrop", [0]),
        ("qkv_bias", [True]),
        ("tie_word_embeddings", [True]),
        ("n_inner", [None]),
        ("model_type", []),
        ("layer_norm_epsilon", []),
        ("scale_attn_weights", [True]),
        ("add_cross_attention", [0]),
        ("id2label", [None, {}]),
        ("pooling", []),
    ],
)
def test_an_odd_value_of_config_json_is_refused_by_its_name(make_model, tmp_path, key, fine):
    model = GPTClassifier(make_model().config, ["ham", "spam"])
    save_model(model, tmp_path, tokenizer=byte_tokenizer())
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for value in ODD:
        if value in fine:
            continue
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(InputError, match=rf"config\.json: [^\n]*{key}[^\n]*$") as error:
            load_model(tmp_path)
        assert len(str(error.value)) < 200 + len(str(path))


def test_two_classes_of_one_name_are_refused(make_model, tmp_path):
    save_model(
        GPTClassifier(make_model().config, ["ham", "ham"]), tmp_path, tokenizer=byte_tokenizer()
    )
    with pytest.raises(InputError, match=r"id2label gives two classes one name; rename one"):
        load_model(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/config\.json: no such file"):
        load_model(tmp_path / "nowhere")


def test_a_base_with_another_vocabulary_than_its_tokenizer_is_refused(saved, tmp_path):
    _, directory = saved
    vocab = json.loads((directory / "vocab.json").read_text())
    vocab["ab"] = len(vocab)
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError, match=r"the model has 257 tokens, its vocab\.json 258"):
        load_base(directory)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_rows_that_pad_a_vocabulary_are_cut_and_the_others_stay(make_model, tmp_path, changes):
    model = make_model(**{**changes, "vocab_size": 257})
    save_model(model, tmp_path, tokenizer=byte_tokenizer())
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.resize_token_embeddings(257, pad_to_multiple_of=64)
    theirs.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.vocab_size == 320
    again, _ = load_base(tmp_path)
    idx = torch.randint(0, 257, (2, 8))
    assert again(idx).shape[-1] == again.config.vocab_size == 257
    assert torch.allclose(again(idx), theirs(idx).logits[..., :257], atol=1e-4)


def test_a_classifier_is_no_base(make_model, tmp_path):
    model = GPTClassifier(make_model().config, ["a", "b"])
    save_model(model, tmp_path / "m", tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match="holds a classifier; a language model is needed"):
        load_base(tmp_path / "m")


def test_a_model_is_never_saved_with_a_foreign_tokenizer(make_model, tmp_path):
    model: GPT = make_model(vocab_size=300)
    with pytest.raises(InputError, match="300 tokens, its tokenizer 257"):
        save_model(model, tmp_path / "m", tokenizer=byte_tokenizer())
    assert not list(tmp_path.iterdir())
