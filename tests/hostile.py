"""What reading any document may end in: a value, or one line that names the file."""

import tracemalloc

from gpt.base.errors import InputError

BYTES = 64 << 20


def read_within_bounds(read, name):
    """Call `read`, which reads a file, and hold it to that; `name` is what the line calls it."""
    said = None
    tracemalloc.start()
    try:
        read()
    except InputError as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BYTES
    if said is not None:
        assert name in said
        assert len(said.splitlines()) == 1
        assert len(said.encode()) < 4000
