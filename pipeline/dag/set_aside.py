"""Keeps a stage's previous outputs, which DVC removes before the stage runs, until it succeeds.

Outputs are set aside as hard links, which take no space, and put back if the stage fails. DVC's
cache is not enough: objects may be missing there, or an output may have been edited since.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gpt.base.errors import RunError
from gpt.base.files import remove
from pipeline.dag.graph import Dag


class Earlier:
    """The outputs of stages as they are now.

    Args:
        dag: the project.
        names: the names of the stages.
        folder: an empty folder for the copies.

    Raises:
        RunError: they cannot be set aside.
    """

    def __init__(self, dag: Dag, names: Sequence[str], folder: Path) -> None:
        self._dag, self._names, self._folder = dag, names, folder
        self._recorded: dict[str, dict[str, str]] = {}
        with contextlib.suppress(BlockingIOError), dag.unwritten(names):
            for path in (path for name in names for path in dag.stages[name].outputs):
                try:
                    _set_aside(dag.root / path, folder / path)
                except OSError as error:
                    reason = error.strerror or "its files cannot be read, or there is no room"
                    raise RunError(
                        f"{path}: cannot be kept until it is made anew ({reason}); mend that, or "
                        "remove it"
                    ) from None
            self._recorded = dag.recorded_outputs(names)

    def put_back(self, replacing: bool) -> bool:
        """After a failure, put the previous outputs back; whether that changed any.

        Outputs that another process is writing, or has written since, are left alone.

        Args:
            replacing: replace existing outputs; otherwise only missing ones are put back.
        """
        changed = False
        with contextlib.suppress(BlockingIOError), self._dag.unwritten(self._names):
            recorded = self._dag.recorded_outputs(self._names)
            for name, before in self._recorded.items():
                if recorded[name] != before:
                    continue
                for path in self._dag.stages[name].outputs:
                    place, aside = self._dag.root / path, self._folder / path
                    if replacing and os.path.lexists(place):
                        remove(place)
                        changed = True
                    if os.path.lexists(aside) and not os.path.lexists(place):
                        place.parent.mkdir(parents=True, exist_ok=True)
                        shutil.move(aside, place)
                        changed = True
        return changed


def _set_aside(place: Path, aside: Path) -> None:
    aside.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.copytree(place, aside, symlinks=True, copy_function=_link)
    elif os.path.lexists(place):
        _link(place, aside)


def _link(place: str | Path, aside: str | Path) -> None:
    try:
        os.link(place, aside, follow_symlinks=False)
    except OSError:  # on another disk, or one without hard links
        shutil.copy2(place, aside, follow_symlinks=False)
