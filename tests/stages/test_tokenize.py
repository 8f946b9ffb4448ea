import json

import numpy as np
import pytest
from pydantic import ValidationError

from gpt.data import open_tokens, read_manifest
from gpt.errors import InputError
from gpt.events import Progress
from gpt.files import sha256_of
from gpt.text import RawFile, write_sources
from gpt.tokenizer import load_tokenizer
from stages.tokenize import TokenizeParams, tokenize

BYTES = TokenizeParams(tokenizer="bytes", validation=0.3)
DOCUMENTS = [f"Document number {i} says «{'é' * (i % 5)}» twice." for i in range(40)]


def write_corpus(folder, *sources):
    """A raw folder with one source of JSON lines for each list of documents."""
    folder.mkdir(parents=True)
    files = []
    for number, documents in enumerate(sources):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        files.append(
            RawFile(
                name=f"source {number}",
                file=path.name,
                format="jsonl",
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
                records=len(documents),
            )
        )
    write_sources(folder, files)
    return folder


def run(tmp_path, params, corpus, vocabulary=None, name="tokens", **options):
    figures = tokenize(
        params,
        corpus=corpus,
        vocabulary=vocabulary,
        out=tmp_path / name,
        metrics=tmp_path / f"{name}.json",
        **options,
    )
    assert json.loads((tmp_path / f"{name}.json").read_text()) == figures
    return tmp_path / name, figures


def read_back(tokens, split):
    """The documents of a split: its token file, cut at end-of-text."""
    tokenizer = load_tokenizer(tokens)
    ids = open_tokens(tokens, split)[:].numpy()
    pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    return [tokenizer.decode([i for i in piece.tolist() if i != tokenizer.eot]) for piece in pieces]


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_is_in_one_split_with_end_of_text_between(tmp_path, kind):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS[:25], DOCUMENTS[25:])
    params = TokenizeParams(tokenizer=kind, vocab_size=300, validation=0.3)
    tokens, figures = run(tmp_path, params, corpus)
    train, validation = read_back(tokens, "train"), read_back(tokens, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in train]
    assert figures["documents"] == 40
    assert figures["train_documents"] == len(train) == 40 - len(validation)
    assert figures["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert figures["tokens"] == figures["train_tokens"] + figures["validation_tokens"]
    assert figures["bytes_per_token"] == figures["bytes"] / figures["tokens"]


def test_the_manifest_counts_and_pins_what_is_in_the_files(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS[:25], DOCUMENTS[25:])
    tokens, figures = run(tmp_path, BYTES, corpus)
    manifest = read_manifest(tokens)
    assert manifest.tokenizer == load_tokenizer(tokens).hash
    assert manifest.vocab_size == 257
    for name, split in manifest.splits.items():
        assert split.sha256 == sha256_of(tokens / split.file)
        assert split.total.tokens == len(open_tokens(tokens, name)) == figures[f"{name}_tokens"]
        for key in ("documents", "bytes", "tokens"):
            parts = [getattr(counts, key) for counts in split.sources.values()]
            assert sum(parts) == getattr(split.total, key)


def test_new_documents_never_move_old_ones(tmp_path):
    params = BYTES
    before, _ = run(tmp_path, params, write_corpus(tmp_path / "a", DOCUMENTS), name="before")
    more = [f"A new one, {i}." for i in range(100)]
    after, _ = run(tmp_path, params, write_corpus(tmp_path / "b", more, DOCUMENTS), name="after")
    old = set(DOCUMENTS)
    for split in ("train", "validation"):
        assert {text for text in read_back(after, split) if text in old} == set(
            read_back(before, split)
        )


def test_the_seed_draws_another_validation_split(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    one, _ = run(tmp_path, BYTES, corpus, name="one")
    other = TokenizeParams(tokenizer="bytes", validation=0.3, seed=7)
    two, _ = run(tmp_path, other, corpus, name="two")
    assert read_back(one, "validation") != read_back(two, "validation")


def test_a_tail_is_the_last_share_of_each_source(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["abcdefghij"], ["klm", "nopqrs", "t"])
    params = TokenizeParams(tokenizer="bytes", validation=0.3, split="tail")
    tokens, _ = run(tmp_path, params, corpus)
    assert read_back(tokens, "train") == ["abcdefg", "klm", "nopq"]
    assert read_back(tokens, "validation") == ["hij", "rs", "t"]


def test_a_tail_begins_with_a_word(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["seven plain words stand in this text"])
    params = TokenizeParams(tokenizer="bytes", validation=0.5, split="tail")
    tokens, figures = run(tmp_path, params, corpus)
    assert read_back(tokens, "train") == ["seven plain words stand"]
    assert read_back(tokens, "validation") == [" in this text"]
    assert figures["documents"] == 1


def test_threads_and_chunks_change_no_byte(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    params = {"tokenizer": "bpe", "vocab_size": 300, "validation": 0.3}
    one, _ = run(tmp_path, TokenizeParams(**params, threads=1), corpus, name="one")
    monkeypatch.setattr("stages.tokenize._CHUNK", 100)
    two, _ = run(tmp_path, TokenizeParams(**params, threads=3), corpus, name="two")
    assert everything(one) == everything(two)


def test_the_verdict_has_5145_gpt2_tokens(tmp_path, mirror):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "v.txt").write_bytes((mirror / "the-verdict.txt").read_bytes())
    raw = RawFile(name="v", file="v.txt", format="text", bytes=20479, sha256="0" * 64, records=1)
    write_sources(folder, [raw])
    params = TokenizeParams(tokenizer="gpt2", validation=0.1, split="tail")
    tokens, figures = run(tmp_path, params, folder, mirror / "gpt2")
    assert figures["tokens"] == figures["train_tokens"] + figures["validation_tokens"] == 5145
    assert figures["documents"] == 1
    assert figures["vocab_size"] == 50257
    # The published notebook's nine training batches of 2 x 256 and one for validation.
    assert (figures["train_tokens"] - 1) // 512 == 9
    assert (figures["validation_tokens"] - 1) // 512 == 1
    assert load_tokenizer(tokens).hash == load_tokenizer(mirror / "gpt2").hash


def test_a_trained_vocabulary_has_not_seen_the_validation_split(tmp_path):
    documents = [f"plain words number {i}" for i in range(30)]
    params = TokenizeParams(tokenizer="bpe", vocab_size=600, validation=0.3)
    before, _ = run(tmp_path, params, write_corpus(tmp_path / "a", documents), name="before")
    held_out = read_back(before, "validation")
    kept = [text for text in documents if text not in held_out]
    # Other validation documents, same training documents: same vocabulary.
    others = [f"zzqzz {i}" for i in range(60)]
    drawn, _ = run(tmp_path, BYTES, write_corpus(tmp_path / "b", others), name="drawn")
    mixed = kept + read_back(drawn, "validation")
    after, _ = run(tmp_path, params, write_corpus(tmp_path / "c", mixed), name="after")
    assert load_tokenizer(after).hash == load_tokenizer(before).hash


def test_progress_counts_documents_to_the_end(tmp_path):
    events = []
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    run(tmp_path, BYTES, corpus, log=events.append)
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[-1].done == steps[-1].total == 40


@pytest.mark.parametrize(
    ("documents", "params", "complaint"),
    [
        ([], BYTES, "the corpus is empty; add a source of text"),
        ([], TokenizeParams(tokenizer="bytes", split="tail"), "the corpus is empty"),
        (["Only one."], BYTES, "none of the 1 documents falls into the validation split"),
        (DOCUMENTS, TokenizeParams(tokenizer="gpt2"), "needs the folder of its vocabulary"),
    ],
)
def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing(
    tmp_path, documents, params, complaint
):
    corpus = write_corpus(tmp_path / "corpus", documents)
    with pytest.raises(InputError, match=complaint) as caught:
        run(tmp_path, params, corpus)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    "wrong",
    [{"tokenizer": "words"}, {"vocab_size": 256}, {"validation": 0}, {"validation": 1}, {"x": 1}],
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        TokenizeParams(**wrong)
