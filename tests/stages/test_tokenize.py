import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from gpt.base.errors import InputError, RunError
from gpt.base.events import Message, Progress
from gpt.base.files import sha256_of
from gpt.clean.cleaning import CleanParams
from gpt.text.records import RawFile, write_sources
from gpt.tokens.token_files import open_tokens, read_manifest
from gpt.tokens.tokenizer import load_tokenizer
from stages.tokenize import TokenizeParams, tokenize
from stages.tokenize.contamination import Held, found
from stages.tokenize.splits import Mixture

BPE_VALUES = {"tokenizer": "bpe", "vocab_size": 400, "validation": 0.1}
BPE = TokenizeParams(**BPE_VALUES)
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
                kind="documents",
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
        report=tmp_path / f"{name}.report.json",
        **options,
    )
    assert json.loads((tmp_path / f"{name}.json").read_text()) == figures
    return tmp_path / name, figures


def read_back(tokens, split):
    """The documents of a split: its token file, cut at end-of-text."""
    tokenizer = load_tokenizer(tokens)
    ids = open_tokens(tokens, split)[:]
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
        for shard in split.shards:
            assert shard.sha256 == sha256_of(tokens / shard.file)
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


def test_workers_and_blocks_change_no_byte(tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    params = {"tokenizer": "bpe", "vocab_size": 300, "validation": 0.3}
    found = [everything(run(tmp_path, TokenizeParams(**params), corpus, name="in one block")[0])]
    monkeypatch.setattr("stages.tokenize._SMALL", 0)
    monkeypatch.setattr("stages.tokenize.blocks.BLOCK", 100)
    for workers in (1, 2, 4):
        params = {**params, "workers": workers}
        tokens, _ = run(tmp_path, TokenizeParams(**params), corpus, name=f"{workers} workers")
        found.append(everything(tokens))
    assert all(each == found[0] for each in found[1:])


def test_the_verdict_has_5145_gpt2_tokens(tmp_path, mirror):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "v.txt").write_bytes((mirror / "the-verdict.txt").read_bytes())
    raw = RawFile(
        name="v", file="v.txt", kind="documents", format="text", bytes=20479, sha256="0" * 64
    )
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


def test_a_vocabulary_is_learnt_from_a_sample_of_the_mixture(tmp_path):
    """Of each source as much as its share of training, whatever its size."""
    small = [f"zebra zebra zebra {i}" for i in range(60)]
    large = [f"qqqq wwww qqqq wwww {i}" for i in range(3000)]
    corpus = write_corpus(tmp_path / "corpus", small, large)
    words = {}
    for name, weights in (("small", (50, 1)), ("large", (1, 500))):
        params = TokenizeParams(
            tokenizer="bpe",
            vocab_size=262,
            bpe_sample=1500,
            mixture=Mixture(weights={"source 0": weights[0], "source 1": weights[1]}),
        )
        tokens, _ = run(tmp_path, params, corpus, name=name)
        vocabulary = json.loads((tokens / "vocab.json").read_text())
        words[name] = {token for token in vocabulary if len(token) > 1 and "<" not in token}
    assert any("z" in token for token in words["small"])
    assert not any("q" in token or "w" in token for token in words["small"])
    assert not any("z" in token for token in words["large"])


def test_progress_counts_documents_to_the_end(tmp_path):
    events = []
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    run(tmp_path, BYTES, corpus, log=events.append)
    steps = [e for e in events if isinstance(e, Progress) and e.task == "tokenize"]
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


# --- mixtures -------------------------------------------------------------------------------------


def _three_sources(tmp_path, words=(30_000, 200_000, 60_000)):
    """Three sources of documents of very different lengths."""
    sources = []
    for number, n in enumerate(words):
        texts = np.random.default_rng(number)
        documents = []
        while n > 0:
            length = int(texts.integers(5, 400))
            documents.append(" ".join(f"w{number}{i}" for i in texts.integers(0, 999, length)))
            n -= length
        sources.append(documents)
    return write_corpus(tmp_path / "corpus", *sources)


def _mixed(weights, **others):
    names = [f"source {number}" for number in range(len(weights))]
    return TokenizeParams(
        tokenizer="bytes",
        validation=0.05,
        mixture=Mixture(weights=dict(zip(names, weights, strict=True)), **others),
        contamination_ngram=0,
    )


def test_a_mixture_is_drawn_by_its_weights(tmp_path):
    corpus = _three_sources(tmp_path)
    tokens, figures = run(tmp_path, _mixed((0.6, 0.3, 0.1), tokens=1_000_000, max_epochs=8), corpus)
    drawn = read_manifest(tokens).splits["train"].sources
    for (name, counts), weight in zip(drawn.items(), (0.6, 0.3, 0.1), strict=True):
        assert counts.tokens / 1_000_000 == pytest.approx(weight, rel=0.005), name
    assert figures["train_tokens"] == pytest.approx(1_000_000, rel=1e-4)
    said = json.loads((tmp_path / "tokens.report.json").read_text())["mixture"]["sources"]
    for name, each in said.items():
        assert each["tokens"] == drawn[name].tokens
    assert said["source 0"]["epochs"] > 1 > said["source 1"]["epochs"]


def test_no_document_is_seen_more_often_than_the_epochs_say(tmp_path):
    """Every document is seen as often as another of its source, or once more."""
    corpus = _three_sources(tmp_path, words=(3_000, 20_000, 6_000))
    tokens, _ = run(tmp_path, _mixed((0.6, 0.3, 0.1), tokens=100_000, max_epochs=5), corpus)
    said = json.loads((tmp_path / "tokens.report.json").read_text())["mixture"]["sources"]
    times = Counter(read_back(tokens, "train"))
    validation = set(read_back(tokens, "validation"))
    for number in range(3):
        seen = [n for text, n in times.items() if text.startswith(f"w{number}")]
        epochs = said[f"source {number}"]["epochs"]
        assert max(seen) <= np.ceil(epochs) <= 5
        # all but the one that was cut are seen in each whole epoch
        assert sorted(seen)[1] >= np.floor(epochs)
    assert not validation & set(times)
    assert sum(text in validation for text in read_back(tokens, "validation")) == len(validation)


@pytest.mark.parametrize("cap", [0.5, 1, 2.5])
def test_the_cap_on_epochs_is_kept_and_so_are_the_weights(tmp_path, cap):
    corpus = _three_sources(tmp_path, words=(3_000, 20_000, 6_000))
    events = []
    params = _mixed((0.6, 0.3, 0.1), tokens=10_000_000, max_epochs=cap)
    _, figures = run(tmp_path, params, corpus, log=events.append)
    said = json.loads((tmp_path / "tokens.report.json").read_text())["mixture"]["sources"]
    assert max(each["epochs"] for each in said.values()) <= cap
    assert max(each["epochs"] for each in said.values()) == pytest.approx(cap, rel=0.01)
    shares = [each["share"] for each in said.values()]
    assert shares == pytest.approx([0.6, 0.3, 0.1], rel=0.005)
    (warning,) = [e.text for e in events if isinstance(e, Message) and e.level == "warning"]
    assert f"{figures['train_tokens']:,.0f} training tokens instead of 10,000,000" in warning


def test_a_mixture_is_the_same_every_time_and_another_with_another_seed(tmp_path):
    corpus = _three_sources(tmp_path, words=(3_000, 20_000, 6_000))
    params = _mixed((0.2, 0.3, 0.5), tokens=60_000)
    one, _ = run(tmp_path, params, corpus, name="one")
    two, _ = run(tmp_path, params, corpus, name="two")
    assert everything(one) == everything(two)
    three, _ = run(tmp_path, replace(params, seed=5), corpus, name="three")
    assert everything(one) != everything(three)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"source 0": 1.0}, "the source 'source 1' has none"),
        ({"source 0": 1.0, "source 1": 2.0, "x": 1.0}, "'x' is no source of download.corpus"),
    ],
)
def test_weights_of_other_sources_are_refused(tmp_path, weights, complaint):
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS[:20], DOCUMENTS[20:])
    params = replace(BYTES, mixture=Mixture(weights=weights))
    with pytest.raises(InputError, match=complaint):
        run(tmp_path, params, corpus)


# --- cleaning -------------------------------------------------------------------------------------


def test_removed_documents_and_duplicates_are_counted_and_not_written(tmp_path):
    long = " ".join(f"word{i}" for i in range(200))
    near = long.replace("word77", "other")
    documents = [*DOCUMENTS, "short", DOCUMENTS[3], long, near, "  "]
    corpus = write_corpus(tmp_path / "corpus", documents)
    clean = CleanParams(min_chars=10, exact_duplicates=True, near_duplicates=0.7)
    tokens, figures = run(tmp_path, replace(BYTES, clean=clean), corpus)
    kept = read_back(tokens, "train") + read_back(tokens, "validation")
    assert sorted(kept) == sorted([*DOCUMENTS, long])
    said = json.loads((tmp_path / "tokens.report.json").read_text())
    assert said["sources"][0]["removed"] == {
        "min_chars": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert said["sources"][0]["read"] == len(documents) - 1  # blank lines are no documents
    assert said["sources"][0]["kept"] == 41
    assert figures["removed_documents"] == 3
    assert {"source": "source 0", "filter": "min_chars", "text": "short"} in said["examples"][
        "removed"
    ]


def test_changes_are_counted_and_shown(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [*DOCUMENTS, "It\u00e2\u20ac\u2122s broken, this."])
    run(tmp_path, replace(BYTES, clean=CleanParams(mojibake=True)), corpus)
    said = json.loads((tmp_path / "tokens.report.json").read_text())
    assert said["sources"][0]["changed"] == {"mojibake": 1}
    (example,) = said["examples"]["changed"]
    assert "\u00e2\u20ac\u2122" in example["before"]
    assert "\u00e2\u20ac" not in example["after"]


# --- contamination --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 50])
def test_shared_ngrams_are_found_and_no_others(tmp_path, n):
    """Against a slow search for every run of tokens."""
    random = np.random.default_rng(n)
    shared = random.integers(1, 99, 60)
    documents = [random.integers(1, 99, int(random.integers(1, 120))) for _ in range(30)]
    documents[4] = shared[:55]
    documents[20] = np.concatenate([documents[20][:7], shared, documents[20][:3]])
    documents[25] = shared[:n]
    end = np.array([0])
    split = [
        np.concatenate([d for e in part for d in (end, e)])[1:].astype("<u2")
        for part in (documents[:15], documents[15:])
    ]
    split[1].tofile(tmp_path / "train.bin")
    held = Held(split[0], 0, n)
    held.save(tmp_path / "held.npy")
    places = found(tmp_path / "held.npy", tmp_path / "train.bin", "uint16", n)
    hits = np.zeros(len(held.hashes), bool)
    hits[places] = True
    overlap = held.overlap(hits)
    theirs = {tuple(d[i : i + n]) for d in documents[15:] for i in range(len(d) - n + 1)}
    expected = {}
    for number, d in enumerate(documents[:15]):
        covered = np.zeros(len(d), bool)
        for i in range(len(d) - n + 1):
            if tuple(d[i : i + n]) in theirs:
                covered[i : i + n] = True
        if covered.any():
            expected[number] = int(covered.sum())
    assert dict(zip(overlap.documents.tolist(), overlap.tokens.tolist(), strict=True)) == expected
    assert overlap.of == 15
    if len(documents[4]) >= n:
        begin, stop = overlap.longest[overlap.documents.tolist().index(4)]
        assert split[0][begin:stop].tolist() == documents[4].tolist()


def test_no_ngram_reaches_over_an_end_of_text(tmp_path):
    """Two short documents in both splits, in the same order, are no long one."""
    ids = np.array([5, 6, 7, 0, 8, 9, 4, 0, 3], "<u2")
    ids.tofile(tmp_path / "train.bin")
    for n, shared in ((3, 6), (4, 0), (7, 0)):
        held = Held(ids, 0, n)
        held.save(tmp_path / "held.npy")
        hits = np.zeros(len(held.hashes), bool)
        hits[found(tmp_path / "held.npy", tmp_path / "train.bin", "uint16", n)] = True
        assert held.overlap(hits).tokens.sum() == shared


def test_chunks_change_nothing_that_is_found(tmp_path, monkeypatch):
    ids = np.random.default_rng(1).integers(0, 7, 5000).astype("<u2")
    ids.tofile(tmp_path / "train.bin")
    Held(ids[300:900], 0, 6).save(tmp_path / "held.npy")
    whole = found(tmp_path / "held.npy", tmp_path / "train.bin", "uint16", 6)
    monkeypatch.setattr("stages.tokenize.contamination._CHUNK", 77)
    assert found(tmp_path / "held.npy", tmp_path / "train.bin", "uint16", 6).tolist() == (
        whole.tolist()
    )
    assert len(whole) > 100


def test_planted_contamination_stands_in_figures_and_report(tmp_path):
    text = "A sentence long enough that nobody would write it twice by chance alone."
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    clean, _ = run(tmp_path, replace(BYTES, contamination_ngram=60), corpus, name="clean")
    held_out = read_back(clean, "validation")[0]
    documents = [d + " " + text if d == held_out else d for d in DOCUMENTS]
    documents += [f"{i} {text}" for i in range(9)]
    planted = write_corpus(tmp_path / "planted", documents)
    tokens, figures = run(tmp_path, replace(BYTES, contamination_ngram=60), planted)
    held = [d for d in read_back(tokens, "validation") if text in d]
    assert figures["contaminated_documents"] == len(held) > 0
    said = json.loads((tmp_path / "tokens.report.json").read_text())
    assert said["contamination"]["documents"] == len(held)
    assert text in said["contamination"]["examples"][0]["text"]
    assert sum(each["contamination"]["documents"] for each in said["sources"]) == len(held)


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_ten_moments_it_comes_to_the_same_bytes(tmp_path):
    """Ten kills in one run, each continued, with workers that end with their parent."""
    documents = [f"{DOCUMENTS[i % 40]} {i} " * 40 for i in range(4000)]
    corpus = write_corpus(tmp_path / "corpus", documents)
    whole, _ = run(tmp_path, replace(BPE, workers=2), corpus, name="whole")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "import stages.tokenize as t\n"
        "if __name__ == '__main__':\n"
        "    t._SMALL = 0; t.blocks.BLOCK = 50_000\n"
        f"    h = Path({str(tmp_path)!r})\n"
        f"    t.tokenize(t.TokenizeParams(**{BPE_VALUES!r}, workers=2), corpus=h / 'corpus',\n"
        "        vocabulary=None, out=h / 'out', metrics=h / 'm.json', report=h / 'r.json',\n"
        "        state=h / 'state')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    random = np.random.default_rng(3)
    there = lambda: len([*(tmp_path / "state").glob("block-*.npz")])  # noqa: E731
    seen = []
    for more in random.integers(0, 8, 10).tolist():
        blocks_before = there() + more
        process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
        while process.poll() is None and there() < blocks_before:
            time.sleep(0.001)
        time.sleep(float(random.uniform(0, 0.03)))
        process.kill()
        process.wait()
        seen.append(there())
        assert not (tmp_path / "out").exists()
    assert len(set(seen)) > 5, "the kills did not come at different moments"
    assert subprocess.run([sys.executable, str(script)], check=False).returncode == 0
    assert everything(tmp_path / "out") == everything(whole)


def test_a_damaged_block_is_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.tokenize.blocks.BLOCK", 300)
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    state = tmp_path / "state"
    first, _ = run(tmp_path, BYTES, corpus, name="first", state=state)
    flipped, cut, gone = (state / f"block-0000000{i}.npz" for i in range(3))
    data = bytearray(flipped.read_bytes())
    data[-1000] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, 100)
    gone.unlink()
    (state / "block-00000003.partial").write_bytes(b"half")
    events = []
    second, _ = run(tmp_path, BYTES, corpus, name="second", state=state, log=events.append)
    assert everything(first) == everything(second)
    assert not [*state.glob("*.partial")]


def test_a_killed_worker_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.tokenize._SMALL", 0)
    monkeypatch.setattr("stages.tokenize.blocks.encode", _die)
    corpus = write_corpus(tmp_path / "corpus", DOCUMENTS)
    with pytest.raises(RunError, match="a worker process was killed") as caught:
        run(tmp_path, replace(BYTES, workers=2), corpus)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


# --- shards ---------------------------------------------------------------------------------------


def test_shards_make_up_the_same_row_of_ids(tmp_path):
    documents = [text * 30 for text in DOCUMENTS]
    corpus = write_corpus(tmp_path / "corpus", documents[:25], documents[25:])
    whole, _ = run(tmp_path, BYTES, corpus, name="whole")
    cut, _ = run(tmp_path, replace(BYTES, shard_tokens=2048), corpus, name="cut")
    for split in ("train", "validation"):
        ids = open_tokens(whole, split)[:]
        assert open_tokens(cut, split)[:].tolist() == ids.tolist()
        shards = read_manifest(cut).splits[split].shards
        assert len(shards) > len(read_manifest(whole).splits[split].shards) == 2
        assert sum(shard.counts.documents for shard in shards) == len(read_back(whole, split))
        for name in ("source 0", "source 1"):
            own = open_tokens(cut, split, name)[:]
            assert len(own) == read_manifest(whole).splits[split].sources[name].tokens


def test_what_tails_share_is_found_in_the_source_that_it_is_of(tmp_path):
    """Also where a document lies in both splits."""
    shared = " ".join(f"said{i}" for i in range(40))
    one = "a beginning " * 30 + shared + " and an end" * 20
    two = "other words " * 60 + shared
    corpus = write_corpus(tmp_path / "corpus", [one], ["filler " * 20, two], ["plain text " * 90])
    params = replace(BYTES, split="tail", validation=0.2, contamination_ngram=60)
    _, figures = run(tmp_path, params, corpus)
    assert figures["documents"] == 4
    assert figures["train_documents"] == 4
    assert figures["validation_documents"] == 3
    said = json.loads((tmp_path / "tokens.report.json").read_text())
    found_in = {each["name"]: each["contamination"]["documents"] for each in said["sources"]}
    assert found_in["source 1"] == 1
    assert said["contamination"]["of"] == 3
    assert {"source 1", "source 2"} >= {e["source"] for e in said["contamination"]["examples"]}


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_an_interrupt_ends_it_quietly_and_the_next_run_goes_on(tmp_path):
    """Ctrl-C reaches parent and workers at once, here while the workers start and later."""
    corpus = write_corpus(
        tmp_path / "corpus", [f"{DOCUMENTS[i % 40]} {i} " * 40 for i in range(2000)]
    )
    whole, _ = run(tmp_path, replace(BYTES, workers=2), corpus, name="whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "import stages.tokenize as t\n"
        "if __name__ == '__main__':\n"
        "    t._SMALL = 0; t.blocks.BLOCK = 20_000\n"
        f"    h = Path({str(tmp_path)!r})\n"
        "    say = lambda event: print(event, flush=True)\n"
        "    try:\n"
        "        t.tokenize(t.TokenizeParams(tokenizer='bytes', validation=0.3, workers=2),\n"
        "            corpus=h / 'corpus', vocabulary=None, out=h / 'out', metrics=h / 'm.json',\n"
        "            report=h / 'r.json', state=h / 'state', log=say)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    state = tmp_path / "state"
    for blocks_before in (0, 5):
        process = subprocess.Popen(
            [sys.executable, str(script)],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (state / "tokenizer").exists() or len([*state.glob("*.npz")]) < blocks_before:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=30)
        assert errors == ""
        assert said.endswith("interrupted\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "tokenize: continuing after" in done.stdout
    assert everything(tmp_path / "out") == everything(whole)
