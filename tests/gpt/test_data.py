import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.data import (
    IGNORED,
    ClassificationDataset,
    InstructionDataset,
    TokenFile,
    WindowDataset,
    batch_indices,
    batches,
    epoch_order,
    open_tokens,
    spread,
    take,
    token_dtype,
)
from gpt.errors import InputError
from gpt.tokenizer import load_tokenizer


def test_windows_are_shifted_by_one_and_follow_the_stride():
    windows = WindowDataset(torch.arange(11), context_length=4, stride=3)
    assert [windows[i][0].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    for i in range(len(windows)):
        inputs, targets = windows[i]
        assert torch.equal(targets, inputs + 1)


def test_a_text_no_longer_than_a_context_has_no_window():
    assert len(WindowDataset(torch.arange(4), context_length=4, stride=4)) == 0
    assert len(WindowDataset(torch.arange(5), context_length=4, stride=4)) == 1


def test_the_verdict_gives_nine_training_batches_and_one_for_validation(mirror):
    text = (mirror / "the-verdict.txt").read_text("utf-8")
    tokenizer = load_tokenizer(mirror / "gpt2")
    cut = int(0.9 * len(text))
    train, validation = (
        WindowDataset(torch.tensor(tokenizer.encode(part)), 256, 256)
        for part in (text[:cut], text[cut:])
    )
    in_train = list(batches(train, 2, drop_last=True))
    in_validation = list(batches(validation, 2))
    assert len(in_train) == len(train) // 2 == 9
    assert sum(batch.inputs.numel() for batch in in_train) == 4608
    assert len(in_validation) == 1
    assert sum(batch.inputs.numel() for batch in in_validation) == 512


@given(n=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_an_epoch_sees_each_item_at_most_once_and_drops_only_the_rest(n, size, seed):
    size = min(size, n)
    per_epoch = n // size
    for epoch in (0, 1, 5):
        first = epoch * per_epoch
        seen = [i for b in range(first, first + per_epoch) for i in batch_indices(n, size, seed, b)]
        assert len(set(seen)) == len(seen) == per_epoch * size
        assert seen == epoch_order(n, seed, epoch)[: len(seen)].tolist()


def test_the_order_is_a_pure_function_of_size_seed_and_epoch():
    first = epoch_order(100, 7, 3).tolist()
    epoch_order.cache_clear()
    assert epoch_order(100, 7, 3).tolist() == first
    assert sorted(first) == list(range(100))
    assert epoch_order(100, 7, 4).tolist() != first
    assert epoch_order(100, 8, 3).tolist() != first


def _padding(lengths, batches):
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches)
    return padded / sum(lengths[i] for rows in batches for i in rows) - 1


def test_batches_of_like_length_hold_each_item_once_an_epoch_and_little_padding():
    lengths = np.random.default_rng(0).geometric(1 / 40, size=1000)
    size, per_epoch = 8, 125

    def epoch(number, **options):
        first = number * per_epoch
        return [batch_indices(1000, size, 5, b, **options) for b in range(first, first + per_epoch)]

    like = epoch(0, lengths=lengths)
    assert sorted(i for rows in like for i in rows) == list(range(1000))
    assert like != epoch(1, lengths=lengths)
    assert like == epoch(0, lengths=lengths)
    assert _padding(lengths, like) < 0.1 < 1 < _padding(lengths, epoch(0))
    # long and short batches come in no order
    means = [float(lengths[rows].mean()) for rows in like]
    assert abs(np.corrcoef(means, range(per_epoch))[0, 1]) < 0.3


def test_what_is_left_over_at_an_epochs_end_is_dropped_by_length_too():
    lengths = np.arange(30)
    seen = [i for b in range(3) for i in batch_indices(30, 8, 1, b, lengths)]
    assert len(set(seen)) == 24
    assert sorted(seen) == sorted(epoch_order(30, 1, 0)[:24].tolist())


def test_evaluation_reads_everything_in_order():
    windows = WindowDataset(torch.arange(22), context_length=3, stride=3)
    read = [batch.inputs for batch in batches(windows, 4)]
    assert [len(rows) for rows in read] == [4, 3]
    assert torch.cat(read).flatten().tolist() == list(range(21))


def test_a_sample_is_spread_evenly_over_a_dataset():
    windows = WindowDataset(torch.arange(21), context_length=1, stride=1)
    part = spread(windows, 4)
    assert [part[i][0].item() for i in range(len(part))] == [0, 5, 10, 15]
    assert len(spread(windows, 100)) == len(windows)
    assert take(part, [1, 2]).inputs.flatten().tolist() == [5, 10]


def test_texts_are_padded_on_the_right_and_their_lengths_known():
    texts = ClassificationDataset([[1, 2, 3, 4], [5], []], [0, 1, 1], padding=9, max_length=3)
    batch = take(texts, [0, 1, 2])
    assert batch.inputs.tolist() == [[1, 2, 3], [5, 9, 9], [9, 9, 9]]
    assert batch.targets.tolist() == [0, 1, 1]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3, 1, 1]
    assert batch.inputs.dtype == batch.targets.dtype == batch.lengths.dtype == torch.int64


def test_only_the_response_and_its_end_are_learnt():
    records = InstructionDataset([[1, 2, 3], [1]], [[4, 5], [6]], end=0)
    batch = take(records, [0, 1])
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0]]
    assert batch.n_targets == 5
    assert batch.targets.tolist() == [
        [IGNORED, IGNORED, 4, 5, 0],
        [6, 0, IGNORED, IGNORED, IGNORED],
    ]


def test_without_the_mask_the_prompt_is_learnt_too():
    records = InstructionDataset([[1, 2, 3]], [[4]], end=0, mask_prompt=False)
    assert take(records, [0]).targets.tolist() == [[2, 3, 4, 0]]


def test_long_records_are_cut():
    records = InstructionDataset([[1, 2], [1, 2, 3]], [[3, 4, 5], [6]], end=0, max_length=3)
    batch = take(records, [0, 1])
    assert batch.inputs.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch.targets.tolist() == [[IGNORED, 3, 4], [IGNORED, IGNORED, 6]]


def test_ids_take_two_bytes_up_to_65536_entries_and_four_above():
    assert token_dtype(65_536) == "uint16"
    assert token_dtype(65_537) == "uint32"


def test_a_token_file_gives_its_ids(tmp_path):
    for dtype in ("uint16", "uint32"):
        path = tmp_path / dtype
        np.arange(65_000, 65_010, dtype=dtype).tofile(path)
        tokens = TokenFile(path, dtype)
        assert len(tokens) == 10
        assert tokens[2:5].dtype == torch.int64
        assert tokens[2:5].tolist() == [65_002, 65_003, 65_004]
    (tmp_path / "empty").touch()
    assert len(TokenFile(tmp_path / "empty", "uint16")) == 0


def _token_folder(folder):
    np.arange(5, dtype="<u2").tofile(folder / "train.bin")
    counts = {"documents": 1, "bytes": 5, "tokens": 5}
    split = {"file": "train.bin", "sha256": "0" * 64, "total": counts, "sources": {"a": counts}}
    manifest = {
        "dtype": "uint16",
        "vocab_size": 257,
        "tokenizer": "0" * 64,
        "splits": {"train": split},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_split_is_opened_through_its_manifest(tmp_path):
    _token_folder(tmp_path)
    assert open_tokens(tmp_path, "train")[:].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "manifest.json").unlink(), "run the stage tokenize first"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"dtype": "int8"}'), "dtype"),
        (lambda f: (f / "train.bin").unlink(), "train.bin: no such file"),
        (lambda f: (f / "train.bin").write_bytes(b"123"), "truncated"),
        (lambda f: (f / "train.bin").write_bytes(b"1234"), "2 tokens where the manifest has 5"),
    ],
)
def test_damaged_token_folders_are_refused_in_one_line(tmp_path, damage, complaint):
    _token_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=complaint) as caught:
        open_tokens(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_a_missing_split_is_named(tmp_path):
    _token_folder(tmp_path)
    with pytest.raises(InputError, match="no split 'validation'"):
        open_tokens(tmp_path, "validation")
