"""The whole state of a training loop, saved atomically and read back exactly.

A state is one file `step-NNNNNNNN.pt` with its sha256 beside it in `step-NNNNNNNN.pt.sha256`.
The last two are kept; a damaged one is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from gpt.events import Log, Message, discard
from gpt.files import sha256_of, whole_file

_NAME = re.compile(r"step-(\d{8})\.pt")
KEEP = 2


def save_state(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, and lists and dicts of them) as that of `step`.

    Older states than the last two are removed.
    """
    path = folder / f"step-{step:08d}.pt"
    with whole_file(path) as partial:
        torch.save(state, partial)
        digest = sha256_of(partial)
        # the digest first: a state without one is never read
        with whole_file(_digest_path(path)) as digest_partial:
            digest_partial.write_text(digest + "\n")
    for old in _states(folder)[:-KEEP]:
        old.unlink()
        _digest_path(old).unlink(missing_ok=True)


def load_state(folder: Path, log: Log = discard) -> dict[str, Any] | None:
    """The newest whole state in `folder`; None if there is none.

    Nothing in the file is executed on reading (`weights_only`).
    """
    for path in reversed(_states(folder)):
        digest = _digest_path(path)
        if digest.is_file() and digest.read_text().strip() == sha256_of(path):
            return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        log(Message(f"{path.name} is damaged; going back to the one before", level="warning"))
    return None


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
