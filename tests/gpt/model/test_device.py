"""The process is set up for tensor work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# 32 times a tensor of 64 MB: 16,384 pages of 4 KiB each
_PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "tuned":
    from gpt.model.device import prepare_device
    prepare_device("cpu", 1)
torch.set_num_threads(1)
for _ in range(32):  # until the blocks have found their places, which takes some of them a dozen
    torch.zeros(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(how: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_given_out_again_without_asking_the_system():
    if _page_faults("plain") < 100_000:
        pytest.skip("this system's allocator keeps freed memory by itself")
    assert _page_faults("tuned") < 1_000


def test_results_are_repeatable_and_the_compiler_is_not_imported_for_it():
    """Its import takes longer than an answer of a small model."""
    code = (
        "import sys, torch; from gpt.model.device import prepare_device; prepare_device('cpu', 1); "
        "print(torch.is_deterministic_algorithms_warn_only_enabled(), "
        "torch.are_deterministic_algorithms_enabled(), "
        "any(name.startswith(('torch._inductor', 'torch._dynamo')) for name in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["True", "True", "False"]
