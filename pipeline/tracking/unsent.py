"""Where a run is kept that MLflow did not take yet: in a small MLflow database of its own.

`.pipeline/unsent/STAGE-…` holds one run: the database, its artifacts, and what must be known to
send it later. Whoever writes or sends it holds its lock, which ends with the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gpt.base.files import write_json
from pipeline.project.folders import shared_folder
from pipeline.tracking.database import database_uri

FOLDER = Path(".pipeline") / "unsent"
_ABOUT = "unsent.json"
_GONE = ".sent-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsent:
    """A run that MLflow did not take yet.

    Attributes:
        folder: where it is.
        root: the checkout that it was made in.
        stage: of it.
        state: where the stage keeps its state, if it does.
        continues: the run in MLflow that it belongs to; None if it was begun here.
        model_id: the model that MLflow had taken of it by then.
        begun: when, in seconds since the epoch.
    """

    folder: Path
    root: Path
    stage: str
    state: Path | None
    continues: str | None
    model_id: str | None
    begun: float

    @property
    def database(self) -> Path:
        """The file of its database."""
        return self.folder / "mlflow.db"

    @property
    def uri(self) -> str:
        """The database, for MLflow."""
        return database_uri(self.database)

    @property
    def artifacts(self) -> Path:
        """The folder of its files."""
        return self.folder / "artifacts"

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Hold the run within the block; False while another process does, or if it has gone."""
        lock = None
        with contextlib.suppress(Timeout):
            lock = self.take(0)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def take(self, wait: float) -> FileLock | None:
        """Hold the run, as who writes or sends it does; None if it has gone.

        Raises:
            Timeout: another process still holds it after `wait` seconds.
        """
        lock = FileLock(self.folder / "lock", thread_local=False)
        try:
            lock.acquire(timeout=wait)
        except FileNotFoundError:
            return None
        if (self.folder / _ABOUT).is_file():
            return lock
        shutil.rmtree(self.folder, ignore_errors=True)  # sent meanwhile; the lock made it again
        lock.release()
        return None

    def remove(self) -> None:
        """It is sent: nothing is left, and a kill in between leaves nothing that looks unsent."""
        gone = self.folder.with_name(f"{_GONE}{self.folder.name}")
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def begin(
    root: Path, stage: str, state: Path | None, continues: str | None, model_id: str | None = None
) -> Unsent:
    """A place for a run; arguments are as the attributes of `Unsent`."""
    folder = shared_folder(root) / FOLDER / f"{stage}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True)
    made = Unsent(
        folder=folder,
        root=root.resolve(),
        stage=stage,
        state=state,
        continues=continues,
        model_id=model_id,
        begun=time.time(),
    )
    about = dataclasses.asdict(made) | {"folder": folder.name, "root": str(made.root)}
    about |= {"state": str(state) if state else None, "home": str(shared_folder(root))}
    write_json(folder / _ABOUT, about)
    return made


def unsent_runs(root: Path) -> list[Unsent]:
    """What is to be sent, as it was begun one after the other; what a kill left is removed."""
    folder = shared_folder(root) / FOLDER
    found = []
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        if each.name.startswith(_GONE):
            shutil.rmtree(each, ignore_errors=True)
        elif (run := find(root, each.name)) is not None:
            found.append(run)
    return sorted(found, key=lambda run: run.begun)


def find(root: Path, name: str) -> Unsent | None:
    """The run in the folder of that name; None if there is none, any more or yet."""
    folder = shared_folder(root) / FOLDER / name
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    made_in, state = Path(about["root"]), Path(about["state"]) if about["state"] else None
    # a state lies three folders below; of what was made before homes were noted it is the best hint
    was = Path(about.pop("home", state.parents[2] if state else made_in))

    def here(path: Path) -> Path:
        """The place since the project was moved or copied."""
        return shared_folder(root) / path.relative_to(was) if path.is_relative_to(was) else path

    places = {"folder": folder, "root": here(made_in), "state": state and here(state)}
    return Unsent(**{**about, **places})
