"""The outbox: a stage's run on disk until it has been sent to MLflow.

`.pipeline/outbox/STAGE-ID` holds one run: `about.json` its initial data, `journal.jsonl` the events
since then, one per line, and `files` its files, laid out as on the run's page.
`pipeline.tracking.sender` replays it to MLflow, while the stage is running or later.
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
    """One run. Only the process that holds its lock (`held`) writes to it or sends it.

    Attributes:
        folder: its folder; the folder's name identifies the run, in MLflow too.
        root: the checkout that the stage runs in.
        stage: the stage's name in `dvc.yaml`.
        begun: the run's start time in milliseconds.
        description: what the stage does.
        params: the run's parameters.
        tags: the run's tags.
        data_sets: the arguments of MLflow's `Dataset` and the `context`, for each data set.
        run_id: the MLflow run that it continues, if that run is not tagged with the outbox's name.
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
        """The identifier of the run: `STAGE-ID`."""
        return self.folder.name

    @property
    def project(self) -> Path:
        """The project whose MLflow the run belongs to; `root` may be another checkout."""
        return self.folder.parents[2]

    @property
    def journal(self) -> Path:
        """The file of events, one per line, in order."""
        return self.folder / "journal.jsonl"

    @property
    def files(self) -> Path:
        """The folder of the run's files; relative paths are those on the run's page."""
        return self.folder / "files"

    @property
    def model(self) -> Path:
        """The folder of the model to register."""
        return self.folder / "model"

    def save(self) -> None:
        """Write `about.json`, which makes the folder an outbox."""
        # relative, so that it stays valid when the project is moved
        place = os.path.relpath(self.root, self.folder)
        about = dataclasses.asdict(self) | {"root": place}
        del about["folder"]
        write_json(self.folder / _ABOUT, about)

    def write(self, event: str, *values: Any) -> None:
        """Append an event to the journal; from then on it survives the end of the process."""
        line = f"\n{json.dumps([event, *values])}\n"  # not glued to a line that was cut off
        with self.journal.open("ab", buffering=0) as file:  # a single write keeps lines intact
            file.write(line.encode())

    def remove(self) -> None:
        """Remove the outbox once everything is sent."""
        (self.folder / _ABOUT).unlink()  # first: what remains is no outbox
        shutil.rmtree(self.folder)


def remove_leftovers(root: Path) -> None:
    """Remove what killed processes left of outboxes: folders without `about.json`."""
    for folder in (shared_folder(root) / FOLDER).glob("*"):
        if folder.is_dir() and not (folder / _ABOUT).exists():
            with held(root, folder.name) as free:
                if free and not (folder / _ABOUT).exists():
                    shutil.rmtree(folder)


def place_of(root: Path, name: str) -> Path:
    """The folder of the outbox of that name, whether it exists or not."""
    return shared_folder(root) / FOLDER / name


def read_outbox(root: Path, name: str) -> Outbox | None:
    """The outbox of that name; None if it was sent completely or never existed."""
    folder = place_of(root, name)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    checkout = Path(os.path.normpath(folder / about.pop("root")))
    return Outbox(folder=folder, root=checkout, **about)


def outboxes(root: Path) -> list[str]:
    """The names of all outboxes, in the order in which their runs started."""
    names = [path.parent.name for path in (shared_folder(root) / FOLDER).glob(f"*/{_ABOUT}")]
    found = [each for name in names if (each := read_outbox(root, name)) is not None]
    return [each.name for each in sorted(found, key=lambda each: each.begun)]


@contextlib.contextmanager
def held(root: Path, name: str, wait: float = 0.0) -> Iterator[bool]:
    """Lock an outbox, existing or not, within the block; yields False if another process has it.

    Args:
        root: the project.
        name: the outbox's name.
        wait: how many seconds to wait for the other process.
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
