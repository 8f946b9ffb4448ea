import json
import random
import shutil
import time

import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gpt.base.errors import InputError
from gpt.tokens import tokenizer as module
from gpt.tokens.tokenizer import END_OF_TEXT, byte_tokenizer, load_tokenizer, train_bpe

PROSE = (
    "The ferry left at six, as it always did, and the town went on without it.\n"
    "She counted 1, 2, 3 … 12 gulls; they'd come for the bread, hadn't they?\n\n"
    "    Naïve café: “déjà vu”, 東京, привет, 🚢🚢🚢 ---------- ==========\n"
) * 3


@pytest.fixture(scope="module")
def trained():
    return train_bpe([PROSE, PROSE.upper()], 400)


@pytest.fixture(scope="module")
def gpt2(mirror):
    return load_tokenizer(mirror / "gpt2")


@given(st.text())
def test_bytes_give_any_text_back(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_trained_bpe_gives_any_text_back(trained, text):
    assert trained.decode(trained.encode(text)) == text
    assert trained.decode_bytes(trained.encode(text)) == text.encode()


@given(text=st.text())
def test_gpt2_gives_any_text_back(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_ids_are_those_of_the_published_tokenizer(gpt2, mirror):
    ours = gpt2.encode((mirror / "the-verdict.txt").read_text("utf-8"))
    assert len(ours) == 5145
    assert gpt2.vocab_size == 50257
    assert gpt2.eot == 50256
    # Values that OpenAI's own encoder gives.
    assert gpt2.encode("Hello, I am") == [15496, 11, 314, 716]
    assert gpt2.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]

    theirs = transformers.GPT2TokenizerFast(
        vocab=str(mirror / "gpt2/encoder.json"), merges=str(mirror / "gpt2/vocab.bpe")
    )
    assert theirs(PROSE)["input_ids"] == gpt2.encode(PROSE)


def test_ids_equal_raw_tiktoken(gpt2, mirror):
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    raw = tiktoken.Encoding(
        "raw",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(mirror / "gpt2/vocab.bpe"),
            encoder_json_file=str(mirror / "gpt2/encoder.json"),
        ),
        special_tokens={END_OF_TEXT: 50256},
    )
    text = (mirror / "tinyshakespeare.txt").read_text("utf-8")[:200_000] + PROSE
    assert gpt2.encode(text) == raw.encode_ordinary(text)


def test_saved_and_read_back_it_is_the_same(trained, tmp_path):
    for tokenizer in (trained, byte_tokenizer()):
        tokenizer.save(tmp_path / "a")
        again = load_tokenizer(tmp_path / "a")
        again.save(tmp_path / "b")
        assert again.hash == tokenizer.hash
        assert again.eot == tokenizer.eot
        assert again.encode(PROSE) == tokenizer.encode(PROSE)
        for name in ("vocab.json", "merges.txt"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert trained.hash != byte_tokenizer().hash


def test_files_under_their_first_names_are_read(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    assert load_tokenizer(tmp_path).hash == trained.hash


@pytest.mark.parametrize("kind", ["trained", "bytes"])
def test_hugging_face_reads_the_saved_files_and_gives_the_same_ids(kind, trained, tmp_path):
    tokenizer = trained if kind == "trained" else byte_tokenizer()
    tokenizer.save(tmp_path)
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.eot
    random_ = random.Random(1)
    words = PROSE.split(" ")
    alphabet = sorted(set(PROSE))
    for _ in range(200):
        text = " ".join(random_.choices(words, k=8)) + "".join(random_.choices(alphabet, k=30))
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


def test_tokens_that_can_be_built_in_two_ways_stay_loadable(tmp_path):
    # Runs of one character make the same token from different pairs.
    text = " ".join("-" * n for n in range(1, 40)) * 3 + "abab ababab aabb bbaa " * 20
    tokenizer = train_bpe([text], 300)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)
    theirs = tokenizers.ByteLevelBPETokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    )
    assert theirs.encode(text).ids == tokenizer.encode(text)


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe([PROSE], 350).hash == train_bpe(iter([PROSE]), 350).hash


def test_end_of_text_is_the_last_id_and_never_comes_from_text(trained):
    assert trained.vocab_size == 400
    assert trained.eot == 399
    assert trained.eot not in trained.encode(f"a {END_OF_TEXT} b")
    assert trained.decode([trained.eot]) == END_OF_TEXT


def test_batches_and_threads_change_nothing(trained):
    texts = [PROSE[i:] for i in range(0, 60)]
    one = trained.encode_batch(texts)
    assert one == trained.encode_batch(texts, threads=3) == [trained.encode(t) for t in texts]


@given(
    text=st.text(st.sampled_from(" \n\t\u00a0\u3000\x1c\x85\ufeff'sab1٣-.é🚢\0"), max_size=200),
    part=st.integers(1, 30),
)
def test_a_text_in_parts_has_the_ids_that_it_has_in_one(trained, text, part):
    whole = trained._encoding.encode_ordinary(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PART", part)
        assert trained.encode(text) == trained.encode_array(text).tolist() == whole


@pytest.mark.parametrize("unit", [" ", "\n", "\u3000", " \t"])
def test_a_gap_of_a_million_blanks_is_encoded(unit, trained):
    text = f"before{unit * 1_000_001}after"
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert ids == trained.encode_array(text).tolist() == trained.encode_batch([text])[0]


@pytest.mark.parametrize("unit", ["-", "acgt", "\u0301", " "])
def test_learning_from_one_long_word_takes_no_time(unit):
    start = time.process_time()
    tokenizer = train_bpe([unit * 200_000 + "."], 300)
    assert time.process_time() - start < 5  # a tenth of it; without a bound, a minute
    assert tokenizer.decode(tokenizer.encode(unit * 100)) == unit * 100


def test_words_that_are_cut_for_learning_change_no_ordinary_vocabulary(monkeypatch):
    text = PROSE + " " + "longest" * 140
    before = train_bpe([text], 400).hash
    monkeypatch.setattr(module, "_LONGEST_WORD", 1_000_000)
    monkeypatch.setattr(module, "_PART", 1)
    assert train_bpe([text], 400).hash == before


def test_half_a_surrogate_pair_is_encoded_as_a_replacement(trained):
    ids = trained.encode("a\udce9b")
    assert ids == trained.encode("a\ufffdb") == trained.encode_array("a\udce9b").tolist()
    assert train_bpe(["a\udce9b"], 300).hash == train_bpe(["a\ufffdb"], 300).hash


def test_half_a_character_is_shown_as_a_replacement():
    assert byte_tokenizer().decode([0xE2, 0x82]) == "\ufffd"


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(InputError, match="256 bytes"):
        train_bpe([PROSE], 256)


def test_files_with_a_byte_order_mark_and_windows_line_ends_are_read(trained, tmp_path):
    trained.save(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).hash == trained.hash


@pytest.fixture
def whole(trained, tmp_path):
    """The trained tokenizer as `transformers` saves it: one file."""
    trained.save(tmp_path / "gpt2")
    theirs = transformers.GPT2TokenizerFast(
        vocab=str(tmp_path / "gpt2/vocab.json"), merges=str(tmp_path / "gpt2/merges.txt")
    )
    theirs.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole/vocab.json").exists()
    return tmp_path / "whole/tokenizer.json"


def test_a_tokenizer_in_one_file_is_read(trained, whole):
    assert load_tokenizer(whole.parent).hash == trained.hash
    said = json.loads(whole.read_text("utf-8"))
    said["model"]["merges"] = [" ".join(pair) for pair in said["model"]["merges"]]  # as before 0.20
    del said["model"]["vocab"][END_OF_TEXT]  # an added token need not be in both places
    whole.write_text(json.dumps(said))
    assert load_tokenizer(whole.parent).hash == trained.hash


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("model.type", "WordPiece", "model.type is 'WordPiece'; only a byte-level BPE"),
        ("model.byte_fallback", True, "model.byte_fallback is True"),
        ("pre_tokenizer.add_prefix_space", True, "pre_tokenizer.add_prefix_space is True"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer.type is 'Metaspace'"),
        ("pre_tokenizer", None, "pre_tokenizer.type is None"),
        ("normalizer", {"type": "NFC"}, "normalizer"),
        ("added_tokens", [{"content": "<pad>", "id": 9}], "adds the token '<pad>'"),
        ("added_tokens", [{"content": END_OF_TEXT, "id": None}], "not a table of tokens"),
        ("added_tokens", [None], "not a table of tokens"),
        ("added_tokens", {"a": 1}, "not a table of tokens"),
        ("model.merges", [["a"]], "not a table of tokens and pairs"),
        ("model.merges", 7, "not a table of tokens"),
        ("model.vocab", [], "not a table of tokens"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(whole, place, value, complaint):
    said = json.loads(whole.read_text("utf-8"))
    *above, key = place.split(".")
    (said[above[0]] if above else said)[key] = value
    whole.write_text(json.dumps(said))
    with pytest.raises(InputError, match=complaint) as caught:
        load_tokenizer(whole.parent)
    assert str(caught.value).startswith(f"{whole}: ")


def _edit_vocab(folder, change):
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text("utf-8"))
    change(vocab)
    path.write_text(json.dumps(vocab), "utf-8")


def _edit_merges(folder, change):
    path = folder / "merges.txt"
    lines = path.read_text("utf-8").split("\n")
    change(lines)
    path.write_text("\n".join(lines), "utf-8")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "merges.txt").unlink(), "no merges.txt or vocab.bpe"),
        (lambda f: shutil.rmtree(f), "no vocab.json or encoder.json"),
        (lambda f: (f / "vocab.json").write_bytes(b'{"a": 1'), "not JSON"),
        (lambda f: (f / "vocab.json").write_bytes(b"\xff"), "not JSON"),
        (lambda f: (f / "vocab.json").write_text("[1]"), "not a JSON object"),
        (lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "not a table"),
        (lambda f: (f / "merges.txt").write_bytes(b"\xff \xfe"), "not UTF-8"),
        (lambda f: _edit_merges(f, lambda lines: lines.insert(3, "a b c")), "line 4"),
        (lambda f: _edit_merges(f, lambda lines: lines.insert(1, "q q")), "not in the vocabulary"),
        (lambda f: _edit_merges(f, lambda lines: lines.reverse()), "order of ids|line"),
        (lambda f: _edit_merges(f, lambda lines: lines.__delitem__(slice(1, 60))), "no merge"),
        (lambda f: _edit_vocab(f, lambda v: v.pop("a")), "0 to"),
        (lambda f: _edit_vocab(f, lambda v: v.update(zz=len(v))), "no merge makes 'zz'"),
        (lambda f: _edit_vocab(f, lambda v: v.update({"zz": v.pop(END_OF_TEXT)})), "has no id"),
    ],
)
def test_damaged_files_are_refused_in_one_line(trained, tmp_path, damage, complaint):
    trained.save(tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(InputError, match=complaint) as caught:
        load_tokenizer(tmp_path / "t")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_word_without_an_end_is_cut(monkeypatch):
    """Encoding takes much memory for each of its letters."""
    monkeypatch.setattr(module, "_PART", 8)
    monkeypatch.setattr(module, "_LONGEST_PART", 32)
    for text in ("x" * 100, "one two " + "é" * 70 + " three four five", " " * 33, "a" * 32):
        parts = list(module._parts(text))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 32


def test_of_endless_words_only_the_first_are_learnt_from(monkeypatch):
    """A trainer keeps every word: of a gigabyte without a blank it would keep it all."""
    monkeypatch.setattr(module, "_PART", 1000)
    monkeypatch.setattr(module, "_LONGEST_PART", 4000)
    monkeypatch.setattr(module, "_ENDLESS_TO_LEARN", 6000)
    seen = list(module._to_learn(["a word or two. " * 1000, "a" * 50_000, "b" * 9000, "the end"]))
    assert "".join(seen).startswith("a word or two. " * 1000)
    assert sum(part.count("a") for part in seen if " " not in part) == 6000 + 50_000 % 4000
    assert sum(part.count("b") for part in seen) == 9000 % 4000, "the end of a word is a word"
