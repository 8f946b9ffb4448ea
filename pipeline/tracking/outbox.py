"""What a stage's run has for MLflow, on disk until it has been sent.

`.pipeline/outbox/STAGE-ID` holds one run: `about.json` has what it begins with, `journal.jsonl`
what happened since, one event a line, and `files` its files, laid out as on the run's page.
`pipeline.tracking.sender` replays it to MLflow, while the stage is at work or later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.base.files import write_json
from pipeline.project.folders import shared_folder

FOLDER = Path(".pipeline") / "outbox"
_ABOUT = "about.json"


@dataclass(kw_only=True, slots=True)
class Outbox:
    """One run. Only the process that holds it (`held`) writes to it or sends it.

    Attributes:
        folder: where it is; its name identifies the run, in MLflow too.
        root: the checkout that the stage runs in.
        stage: its name in `dvc.yaml`.
        begun: when the run began, in milliseconds.
        description: what the stage does.
        params: the run's parameters.
        tags: the run's tags.
        data_sets: each as MLflow's `Dataset` takes it, and its `context`.
        run_id: of a run in MLflow that does not bear the outbox's name, if it continues one.
    """

    folder: Path
    root: Path
    stage: str
    begun: int
    description: str
    params: dict[str, str]
    tags: dict[str, str]
    data_sets: list[dict[str, Any]]
    run_id: str = ""

    @property
    def name(self) -> str:
        """What identifies the run: `STAGE-ID`."""
        return self.folder.name

    @property
    def journal(self) -> Path:
        """Events, one a line, in order."""
        return self.folder / "journal.jsonl"

    @property
    def files(self) -> Path:
        """The run's files: the path below it is the path on the run's page."""
        return self.folder / "files"

    @property
    def model(self) -> Path:
        """The model that is to be registered."""
        return self.folder / "model"

    def save(self) -> None:
        """Write `about.json`: from now on this is an outbox."""
        # relative, so that it holds after the project was moved
        place = os.path.relpath(self.root, self.folder)
        about = dataclasses.asdict(self) | {"root": place}
        del about["folder"]
        write_json(self.folder / _ABOUT, about)

    def write(self, event: str, *values: Any) -> None:
        """Add an event to the journal; it survives the end of the process from then on."""
        line = json.dumps([event, *values]) + "\n"
        with self.journal.open("ab", buffering=0) as file:  # one write: lines stay whole
            file.write(line.encode())

    def remove(self) -> None:
        """Everything is sent."""
        (self.folder / _ABOUT).unlink()  # half removed, it is no outbox any more
        shutil.rmtree(self.folder)


def place_of(root: Path, name: str) -> Path:
    """The folder of the outbox of that name, whether it is there or not."""
    return shared_folder(root) / FOLDER / name


def read_outbox(root: Path, name: str) -> Outbox | None:
    """The outbox of that name; None if there is none: all of it was sent, or it never was."""
    folder = place_of(root, name)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    checkout = Path(os.path.normpath(folder / about.pop("root")))
    return Outbox(folder=folder, root=checkout, **about)


def outboxes(root: Path) -> list[str]:
    """The names of all that is to be sent, in the order in which the runs began."""
    names = [path.parent.name for path in (shared_folder(root) / FOLDER).glob(f"*/{_ABOUT}")]
    found = [each for name in names if (each := read_outbox(root, name)) is not None]
    return [each.name for each in sorted(found, key=lambda each: each.begun)]


@contextlib.contextmanager
def held(root: Path, name: str, wait: float = 0.0) -> Iterator[bool]:
    """Hold an outbox within the block, be it there or not; False while another process does.

    Args:
        root: the project.
        name: the outbox's.
        wait: so many seconds for the other process.
    """
    place = place_of(root, name)
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_suffix(".lock"), thread_local=False)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        if not (place / _ABOUT).exists():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
