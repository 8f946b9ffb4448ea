"""What is wrong is told apart from what is our mistake."""

import numpy as np
import pytest
import torch

from gpt.base.errors import first_few, in_one_line, lacks_memory, shown


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(1 << 55),
        lambda: torch.empty(1 << 62),
        lambda: np.empty(1 << 55),
        lambda: bytearray(1 << 55),
    ],
)
def test_memory_that_is_not_there_is_told_from_other_failures(ask):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    assert lacks_memory(caught.value)
    assert not lacks_memory(RuntimeError("The size of tensor a (2) must match"))


def test_a_long_value_is_shown_on_one_short_line():
    assert shown("a\n" * 5000) == repr("a\n" * 5000)[:59] + "…"
    assert in_one_line(ValueError("a\n  b")) == "a b"
    assert in_one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert first_few([*range(5)]) == "0, 1, 2 and 2 more"
