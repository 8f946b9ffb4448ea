"""Fixtures that every test may use."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

# No test finds a compiled engine that happens to be there, or leaves one in the user's own cache:
# this is no folder. Those that want one name another (tests/gpt/conftest.py).
os.environ["GPT_PIPELINE_CACHE"] = os.devnull

# Git is set up in another way on each machine, and some know no user: here none does, and none is
# guessed from the host's name.
os.environ["GIT_CONFIG_GLOBAL"] = os.devnull
os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
os.environ["GIT_CONFIG_COUNT"] = "1"
os.environ["GIT_CONFIG_KEY_0"] = "user.useConfigOnly"
os.environ["GIT_CONFIG_VALUE_0"] = "true"

# `pytest --hypothesis-profile=thorough tests/test_hostile_*.py`: minutes, and no two runs alike.
hypothesis.settings.register_profile("thorough", max_examples=10_000, print_blob=True)

# Started in the background (by a CI, say), this process ignores Ctrl-C, and so would every process
# that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests are small: threads cost more than they give, and one thread is the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mirror() -> Path:
    """The folder of real data; a test that needs it is skipped where there is none."""
    folder = os.environ.get("GPT_PIPELINE_MIRROR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real data: set GPT_PIPELINE_MIRROR to a folder that holds it")
    return Path(folder)
