"""Bootstrap intervals hold what they say, and two models are compared on the same examples."""

import numpy as np
import pytest
from scipy import stats

from gpt.batches.metrics import classification_scores
from gpt.scores import bootstrap
from gpt.scores.bootstrap import (
    Comparison,
    Interval,
    Score,
    accuracy,
    compare,
    interval,
    macro_f1,
    mean,
    mean_loss,
)

N = 300


def drawn(seed=0):
    """Classes and what two models make of them, the second one right more often."""
    random = np.random.default_rng(seed)
    truths = random.choice(3, N, p=[0.6, 0.3, 0.1])
    old = np.where(random.random(N) < 0.6, truths, random.integers(0, 3, N))
    new = np.where(random.random(N) < 0.5, truths, old)
    return truths, new, old


def losses(seed=0):
    """Summed losses and numbers of tokens of unlike examples."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 60, N)
    return random.gamma(3, 1, N) * counts, counts


def scores():
    truths, new, _ = drawn()
    sums, counts = losses()
    return {
        "mean": mean(sums),
        "accuracy": accuracy(truths, new),
        "macro_f1": macro_f1(truths, new, 3),
        "mean_loss": mean_loss(sums, counts),
    }


# --- scores ---------------------------------------------------------------------------------------


def test_the_value_is_the_score_on_the_examples_as_they_are():
    truths, new, _ = drawn()
    sums, counts = losses()
    names = ["0", "1", "2"]
    expected = classification_scores([str(i) for i in truths], [str(i) for i in new], names)
    found = {name: interval(score).value for name, score in scores().items()}
    assert found == pytest.approx(
        {
            "mean": sums.mean(),
            "accuracy": expected["accuracy"],
            "macro_f1": expected["f1_macro"],
            "mean_loss": sums.sum() / counts.sum(),
        }
    )


def test_every_resample_is_scored_as_if_it_were_the_data():
    truths, new, _ = drawn()
    sums, counts = losses()
    places = np.random.default_rng(1).integers(0, N, (20, N))
    found = {name: score.of(places) for name, score in scores().items()}
    for row, at in enumerate(places):
        names = ["0", "1", "2"]
        said = [[str(i) for i in classes[at]] for classes in (truths, new)]
        expected = classification_scores(*said, names)
        assert found["accuracy"][row] == pytest.approx(expected["accuracy"])
        assert found["macro_f1"][row] == pytest.approx(expected["f1_macro"])
        assert found["mean"][row] == pytest.approx(sums[at].mean())
        assert found["mean_loss"][row] == pytest.approx(sums[at].sum() / counts[at].sum())


def test_a_class_that_no_example_has_counts_as_in_the_metrics():
    expected = classification_scores(["a", "b"], ["a", "a"], ["a", "b", "c"])["f1_macro"]
    assert interval(macro_f1([0, 1], [0, 0], 3)).value == pytest.approx(expected)


def test_classes_that_can_only_be_predicted_are_wrong_and_count_in_no_mean():
    truths = [0, 0, 1, 1]
    assert macro_f1(truths, truths, 2, others=1).value == 1
    once = macro_f1(truths, [0, 2, 1, 1], 2, others=1).value
    assert once == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="classes are not all in 0 … 2"):
        macro_f1(truths, [0, 3, 1, 1], 2, others=1)
    with pytest.raises(ValueError, match="classes are not all in 0 … 1"):
        macro_f1([0, 2], [0, 1], 2, others=1)


# --- intervals ------------------------------------------------------------------------------------


def test_an_interval_of_95_percent_holds_the_truth_that_often():
    random = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        found = interval(mean(random.random(200) < 0.7), resamples=500, seed=seed)
        held += found.low <= 0.7 <= found.high
    assert 0.92 <= held / 400 <= 0.975  # two standard errors around 0.95


def test_a_wider_level_gives_a_wider_interval():
    score = scores()["macro_f1"]
    narrow, wide = (interval(score, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_intervals_are_those_of_scipy():
    truths, new, _ = drawn()
    sums, counts = losses()

    def ratio(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    data = {"mean": (sums,), "mean_loss": (sums, counts), "accuracy": (truths == new,)}
    for name, columns in data.items():
        theirs = stats.bootstrap(
            columns,
            ratio if len(columns) == 2 else np.mean,
            n_resamples=20_000,
            method="percentile",
            paired=len(columns) == 2,
            vectorized=True,
            batch=1000,
            rng=np.random.default_rng(1),
        ).confidence_interval
        ours = interval(scores()[name], resamples=20_000)
        width = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.04 * width), name
        assert ours.high == pytest.approx(theirs.high, abs=0.04 * width), name


@pytest.mark.parametrize("name", list(scores()))
def test_intervals_depend_on_the_seed_alone_and_not_on_how_much_is_drawn_at_once(monkeypatch, name):
    score = scores()[name]
    first = interval(score, seed=3)
    assert interval(score, seed=3) == first
    if name != "accuracy":  # in steps of 1/300
        assert interval(score, seed=4) != first
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 7 * N)
    assert interval(score, seed=3) == first
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 1)  # fewer than there are examples
    assert interval(score, seed=3) == first


def test_many_examples_are_not_held_for_all_resamples_at_once():
    n, sizes = 100_000, []

    def of(places):
        sizes.append(places.size)
        return places[:, 0] / n

    interval(Score(n, of), resamples=50)
    assert max(sizes) <= bootstrap._AT_ONCE
    assert sum(sizes) == 51 * n  # the examples as they are, too


def test_one_example_has_no_width():
    assert interval(mean([0.25])) == Interval(0.25, 0.25, 0.25)
    assert interval(macro_f1([1], [1], 2)) == Interval(0.5, 0.5, 0.5)


def test_what_cannot_be_scored_is_refused():
    for make in (
        lambda: mean([]),
        lambda: accuracy([], []),
        lambda: macro_f1([], [], 2),
        lambda: mean_loss([], []),
    ):
        with pytest.raises(ValueError, match="one value for each"):
            make()
    for make in (
        lambda: accuracy([1, 0], [1]),
        lambda: macro_f1([1, 0], [1], 2),
        lambda: mean_loss([1.0], [1, 2]),
    ):
        with pytest.raises(ValueError, match="one value for each"):
            make()
    with pytest.raises(ValueError, match="one value for each"):
        mean([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="not all in 0 … 1"):
        macro_f1([0, 2], [0, 1], 2)
    with pytest.raises(ValueError, match="without tokens"):
        mean_loss([1.0, 0.0], [3, 0])
    with pytest.raises(ValueError, match="level: 1"):
        interval(mean([1, 2]), level=1)
    with pytest.raises(ValueError, match="resamples: 0"):
        interval(mean([1, 2]), resamples=0)


# --- comparisons ----------------------------------------------------------------------------------


def test_a_comparison_draws_the_same_examples_for_both():
    """What is hard for both cancels out: the interval is narrower than that of two draws."""
    random = np.random.default_rng(2)
    hard = random.normal(0, 1, N)
    old, new = hard + random.normal(0, 0.1, N), hard + random.normal(0.05, 0.1, N)
    paired = compare(mean(new), mean(old))
    apart = [interval(mean(values), seed=seed) for seed, values in enumerate((new, old))]
    unpaired = np.hypot(*(each.high - each.low for each in apart))
    assert paired.high - paired.low < unpaired / 5
    # and it is exactly that of the differences of the examples
    assert paired.value == pytest.approx((new - old).mean())
    differences = interval(mean(new - old))
    assert (paired.low, paired.high) == pytest.approx((differences.low, differences.high))


def test_a_model_compared_with_itself_differs_by_nothing():
    for score in scores().values():
        same = compare(score, score)
        assert same == Comparison(0, 0, 0, better=False, worse=False)
    # nor do two models with the same predictions, held twice
    truths, new, _ = drawn()
    twins = [macro_f1(truths.copy(), new.copy(), 3) for _ in range(2)]
    assert compare(*twins) == Comparison(0, 0, 0, better=False, worse=False)


def test_better_is_said_only_where_the_whole_interval_is():
    truths, new, old = drawn()
    clear = compare(macro_f1(truths, new, 3), macro_f1(truths, old, 3))
    assert clear.better
    assert not clear.worse
    assert 0 < clear.low < clear.value < clear.high
    back = compare(macro_f1(truths, old, 3), macro_f1(truths, new, 3))
    assert (back.better, back.worse) == (False, True)
    assert (back.value, back.low, back.high) == pytest.approx(
        (-clear.value, -clear.high, -clear.low)
    )
    # two more are right and one is wrong: that may be luck
    few = [[1, 1, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]]
    close = compare(*(accuracy([1] * 8, predicted) for predicted in few))
    assert close.value == pytest.approx(1 / 8)
    assert (close.better, close.worse) == (False, False)
    assert close.low < 0 < close.high


def test_of_losses_the_smaller_is_better():
    sums, counts = losses()
    lower = compare(mean_loss(sums * 0.9, counts), mean_loss(sums, counts), smaller_is_better=True)
    assert lower.value < 0
    assert (lower.better, lower.worse) == (True, False)


def test_scores_of_unlike_examples_are_not_compared():
    with pytest.raises(ValueError, match="2 examples but 3"):
        compare(mean([1, 2]), mean([1, 2, 3]))
