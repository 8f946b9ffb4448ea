"""What is a spike, and what is noise."""

import math

import numpy as np
import pytest

from gpt.train.loop import WINDOW, spike

RANDOM = np.random.default_rng(0)


def noise(level, spread, n=WINDOW):
    return (level + spread * RANDOM.standard_normal(n)).tolist()


def test_a_loss_far_above_all_of_late_is_a_spike():
    assert spike(6.0, [3.0, 3.1, 2.9, 3.2] * 8) == pytest.approx(6.0 / 3.05)
    before = [3.0] * 30 + [3.2] * 2
    assert spike(3.79, before) is None
    assert spike(3.81, before) == pytest.approx(1.27)


@pytest.mark.parametrize("level", [1e-3, 1.0, 100.0])
def test_noise_of_any_scale_is_none(level):
    losses = noise(level, level / 10, 2000)
    found = [spike(losses[i], losses[max(0, i - WINDOW) : i]) for i in range(len(losses))]
    assert not any(found)


def test_small_batches_whose_loss_jumps_are_none():
    """A classifier that is sure, and now and then wrong."""
    losses = [0.01] * 10 + [0.5] + [0.01] * 20 + [0.9] + [0.01] * 20 + [1.2]
    assert not any(spike(losses[i], losses[:i][-WINDOW:]) for i in range(16, len(losses)))


def test_the_fall_of_the_first_steps_is_none():
    losses = [10 * math.exp(-i / 20) + 2 for i in range(200)]
    assert not any(spike(losses[i], losses[max(0, i - WINDOW) : i]) for i in range(200))


def test_nothing_is_said_before_there_is_enough_to_compare_with():
    assert spike(100.0, [1.0] * 8) is None


def test_what_stays_high_is_told_once():
    losses = [*noise(3.0, 0.05), *noise(9.0, 0.05)]
    found = [i for i in range(WINDOW, 2 * WINDOW) if spike(losses[i], losses[i - WINDOW : i])]
    assert found == [WINDOW]
