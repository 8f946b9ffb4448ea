import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.batches import data
from gpt.batches.data import (
    IGNORED,
    Batch,
    ClassificationDataset,
    InstructionDataset,
    RandomWindowDataset,
    WindowDataset,
    batch_indices,
    batches,
    epoch_order,
    spread,
    take,
)
from gpt.tokens.tokenizer import load_tokenizer


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


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 9))
def test_a_computed_order_holds_each_item_once_and_is_a_pure_function(n, seed, epoch):
    order = data._permuted(range(n), n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert data._permuted(range(n // 2, n), n, seed, epoch) == order[n // 2 :]


def test_more_items_than_an_order_is_held_of_come_in_an_order_too(monkeypatch):
    monkeypatch.setattr(data, "_LISTED", 999)
    seen = [i for b in range(125) for i in batch_indices(1000, 8, 5, b)]
    assert sorted(seen) == list(range(1000))
    again = [i for b in range(125, 250) for i in batch_indices(1000, 8, 5, b)]
    assert sorted(again) == list(range(1000))
    orders = np.array([range(1000), seen, seen[1:] + seen[:1], again])
    assert np.abs(np.corrcoef(orders) - np.eye(4)).max() < 0.15  # five standard deviations


def test_a_batch_of_ten_thousand_million_items_takes_no_time_and_memory():
    rows = batch_indices(10**10, 512, 1, 10**6)
    assert len(set(rows)) == 512
    assert 10**9 < np.std(rows) < 10**10 > max(rows)


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


def test_random_windows_start_anywhere_and_each_is_drawn_by_itself():
    tokens = torch.arange(104)
    windows = RandomWindowDataset(tokens, 4, length=5000, seed=7)
    assert len(windows) == 5000
    starts = np.array([windows.start(i) for i in range(5000)])
    counts = np.bincount(starts, minlength=100)  # 0 … 99: the last target is the last token
    assert len(counts) == 100
    assert ((counts - 50) ** 2 / 50).sum() < 160  # chi-square of 99 degrees: 1 in 10,000
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.05
    for i in (0, 17, 4999):
        inputs, targets = windows[i]
        assert inputs.tolist() == list(range(starts[i], starts[i] + 4))
        assert torch.equal(targets, inputs + 1)


def test_where_a_random_window_starts_depends_on_seed_and_number_only():
    def starts(seed, length=50):
        windows = RandomWindowDataset(torch.arange(1000), 8, length=length, seed=seed)
        return [windows.start(i) for i in range(50)]

    assert starts(1) == starts(1, length=99)
    assert starts(1) != starts(2)
    # written down: a resumed run must find them again whatever the version of NumPy
    assert starts(1)[:4] == [301, 893, 404, 730]


def test_there_are_as_many_random_windows_as_were_asked_for_or_none():
    windows = RandomWindowDataset(torch.arange(5), 4, length=3, seed=0)
    assert [windows.start(i) for i in range(3)] == [0, 0, 0]
    with pytest.raises(IndexError):
        windows[3]
    assert len(RandomWindowDataset(torch.arange(4), 4, length=3, seed=0)) == 0


def test_the_end_of_a_text_opens_the_next_document():
    text = torch.tensor([5, 6, 0, 7, 0, 0, 8, 9, 0, 1, 2])
    windows = WindowDataset(text, context_length=5, stride=5, end=0)
    batch = take(windows, [0, 1])
    assert batch.inputs.tolist() == [[5, 6, 0, 7, 0], [0, 8, 9, 0, 1]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 1, 1, 2], [1, 1, 1, 2, 2]]
    assert batch.documents.dtype == torch.int64
    assert batch.n_targets == batch.n_tokens == 10
    drawn = RandomWindowDataset(text, 5, length=1, seed=0, end=0)
    assert take(drawn, [0]).documents is not None
    assert take(WindowDataset(text, 5, 5), [0]).documents is None


def test_a_batch_is_moved_with_all_that_it_holds():
    batch = Batch(*torch.zeros(4, 2, 3, dtype=torch.int64).unbind(0))
    moved = batch.to(torch.device("meta"))
    for name in ("inputs", "targets", "lengths", "documents"):
        assert getattr(moved, name).device.type == "meta"
    assert Batch(batch.inputs, batch.targets).to(torch.device("meta")).documents is None


def test_texts_are_padded_on_the_right_and_their_lengths_known():
    texts = ClassificationDataset([[1, 2, 3, 4], [5], []], [0, 1, 1], padding=9, max_length=3)
    batch = take(texts, [0, 1, 2])
    assert batch.inputs.tolist() == [[1, 2, 3], [5, 9, 9], [9, 9, 9]]
    assert batch.targets.tolist() == [0, 1, 1]
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [3, 1, 1]
    assert batch.inputs.dtype == batch.targets.dtype == batch.lengths.dtype == torch.int64


def test_only_the_response_and_its_end_are_learnt():
    records = InstructionDataset([[([1, 2, 3], [4, 5])], [([1], [6])]], end=0)
    batch = take(records, [0, 1])
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0]]
    assert batch.n_targets == 5
    assert batch.targets.tolist() == [
        [IGNORED, IGNORED, 4, 5, 0],
        [6, 0, IGNORED, IGNORED, IGNORED],
    ]


def test_without_the_mask_the_prompt_is_learnt_too():
    records = InstructionDataset([[([1, 2, 3], [4])]], end=0, mask_prompt=False)
    assert take(records, [0]).targets.tolist() == [[2, 3, 4, 0]]


def test_long_records_are_cut():
    records = InstructionDataset([[([1, 2], [3, 4, 5])], [([1, 2, 3], [6])]], end=0, max_length=3)
    batch = take(records, [0, 1])
    assert batch.inputs.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert batch.targets.tolist() == [[IGNORED, 3, 4], [IGNORED, IGNORED, 6]]
