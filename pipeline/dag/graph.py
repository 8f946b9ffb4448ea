"""The DAG as DVC knows it: stages, edges, and what is out of date and why.

`dvc.yaml`, `dvc.lock` and the files are read through DVC's API in this process; all decisions are
DVC's. Stages of `optional/dvc.yaml` run only on request.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.base.errors import InputError, RunError, in_one_line, shortened
from gpt.base.files import whole_file
from pipeline.dag.code import files_of_code, is_code, md5_of_code, missing_code, note_of_code
from pipeline.dag.dvc_files import LOCK_FILE, PIPELINE_FILE, lock_files, pipeline_files, read_stages
from pipeline.dag.lock import read_lock
from pipeline.dag.objects import Objects, md5_of
from pipeline.dag.repository import mend_rwlock, open_repo
from pipeline.project.params import PARAMS_FILE, read_params

if TYPE_CHECKING:
    from dvc.stage import PipelineStage


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a `dvc.yaml`; its paths are relative to the project's root."""

    name: str
    upstream: tuple[str, ...]
    """The stages whose outputs it reads."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metrics: tuple[str, ...]
    """The outputs that are metrics."""
    uncached: tuple[str, ...]
    """The outputs that are tracked by git instead of DVC."""
    file: str = PIPELINE_FILE
    """The pipeline file that defines it."""

    @property
    def optional(self) -> bool:
        """Whether it runs only on request."""
        return self.file != PIPELINE_FILE

    @property
    def address(self) -> str:
        """DVC's address of the stage, from the project's root."""
        return f"{self.file}:{self.name}" if self.optional else self.name


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why a stage is out of date."""

    what: str
    """A file or a parameter (`pretrain.train.steps`)."""
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}"

    @property
    def not_in_cache(self) -> bool:
        """Whether the output is only missing from DVC's cache and may be unchanged."""
        return self.how == f"output {_DVC_WORDS['not in cache']}"


class Dag:
    """The stages in the order in which `dvc repro` would run them, optional ones last.

    Safe to use from several threads and alongside `dvc` processes: it waits for DVC's own lock and
    reads under it.

    Raises:
        InputError: `dvc.yaml`, `dvc.lock` or `params.yaml` cannot be read.
    """

    def __init__(self, root: Path) -> None:
        from dvc.exceptions import DvcException

        # DVC reads them too, but its error messages are less precise
        read_params(root / PARAMS_FILE)
        for file in (*pipeline_files(root), *lock_files(root)):
            read_stages(file)
        self._repo = open_repo(root)
        mend_rwlock(root)
        self.root = root
        self._thread_lock = threading.RLock()
        self.objects = Objects(self._repo.cache.local)
        # with a damaged file list of a folder DVC would restore wrong names, or fail
        self.objects.drop_damaged_lists()
        try:
            self.stages: dict[str, Stage] = self._load()
        except DvcException as error:
            reason = in_one_line(error)
            wrong = LOCK_FILE if LOCK_FILE in reason else PIPELINE_FILE
            remedy = f"bring it back (`git checkout {wrong}`)"
            remedy += ", or remove it" if wrong == LOCK_FILE else ""
            raise InputError(f"{wrong}: {reason}; {remedy}") from None

    def plan(self, targets: Iterable[str] = ()) -> list[str]:
        """The targets and their dependencies, in order; without targets all but the optional.

        Raises:
            InputError: a target is not a stage, code that a stage depends on is missing, or an
                output folder is a link.
        """
        targets = list(targets)
        for target in targets:
            if target not in self.stages:
                raise InputError(f"{target}: no such stage; use one of {', '.join(self.stages)}")
        wanted = set(targets or [name for name, each in self.stages.items() if not each.optional])
        for name in reversed(self.stages):
            if name in wanted:
                wanted.update(self.stages[name].upstream)
        plan = [name for name in self.stages if name in wanted]
        for name in plan:
            for path in filter(is_code, self.stages[name].inputs):
                if not (self.root / path).exists():  # DVC's own error says no more
                    raise missing_code(path, name)
        for path in dict.fromkeys(path for name in plan for path in self.stages[name].outputs):
            self._refuse_links(path)
        return plan

    def _refuse_links(self, output: str) -> None:
        """Refuse outputs behind a link: DVC would, but only after they are made."""
        for folder in list(Path(output).parents)[:-1]:
            path = self.root / folder
            if path.is_symlink():
                raise InputError(
                    f"{folder}: a link to {path.readlink()}, and DVC keeps no outputs behind a "
                    "link; make it a folder, and have DVC's cache on the other disk: `dvc cache "
                    "dir --local FOLDER`, then `dvc config --local cache.type symlink`"
                )

    def changes(self, names: Iterable[str] | None = None) -> dict[str, list[Reason]]:
        """Why each stage (by default all) is out of date; empty if it is up to date."""
        try:
            with self._held_still() as stages:
                wanted = list(stages) if names is None else names
                return {name: list(_changes(stages[name], self.root)) for name in wanted}
        except NotADirectoryError as error:
            raise InputError(
                f"{self.cache}: DVC's cache is no folder ({error.strerror}); remove it, or name "
                "another: `dvc cache dir --local FOLDER`"
            ) from None

    def missing_params(self, name: str) -> list[str]:
        """Parameters that a stage depends on but `params.yaml` lacks: DVC would not run it."""
        from dvc.dependency.param import ParamsDependency

        with self._held_still() as stages:
            return [
                param
                for dep in stages[name].deps
                if isinstance(dep, ParamsDependency)
                for param in dep.params
                if param not in dep.read_params()
            ]

    def note_made(self, name: str) -> None:
        """Note that the stage made the current outputs, although DVC has not cached them."""
        path = self._made_note(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(self._fingerprint(name), encoding="utf-8")

    def is_noted_as_made(self, name: str) -> bool:
        """Whether `note_made` was called for the current outputs and dependencies."""
        try:
            return self._made_note(name).read_text(encoding="utf-8") == self._fingerprint(name)
        except OSError:
            return False

    def _made_note(self, name: str) -> Path:
        return self.root / ".pipeline" / "uncommitted" / name

    def _fingerprint(self, name: str) -> str:
        """A digest of all that `dvc.lock` would record for a stage now."""
        from dvc.dependency.param import ParamsDependency

        with self._held_still() as stages:
            stage = stages[name]
            files = [
                (each.fs_path, each.get_hash().value if each.exists else None)
                for each in (*stage.deps, *stage.outs)
                if not isinstance(each, ParamsDependency)
            ]
            params = [dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)]
        content = json.dumps([stage.cmd, params, files], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def recorded_outputs(self, names: Iterable[str] | None = None) -> dict[str, dict[str, str]]:
        """Path -> md5 of the outputs of each stage (by default all) as in `dvc.lock`; empty for a
        stage without an entry."""
        with self._locked():
            entries = read_lock(self.root)
        wanted = self.stages if names is None else names
        return {name: entries[name].outputs if name in entries else {} for name in wanted}

    def check_cache(self) -> None:
        """Check that DVC's cache is writable, before a stage makes outputs to store there.

        Raises:
            RunError: it is not writable.
        """
        objects = Path(self._repo.cache.local.path)
        try:
            objects.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=objects):
                pass
        except OSError as error:
            raise RunError(
                f"{self.cache}: DVC's cache cannot be written ({error.strerror}); make it a folder "
                "that can be written, or name another: `dvc cache dir --local FOLDER`"
            ) from None

    @contextmanager
    def unwritten(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block no DVC command, in any process, writes the outputs of these stages.

        Raises:
            BlockingIOError: a command is writing them.
        """
        from dvc.lock import LockError
        from dvc.rwlock import rwlock

        with self._held_still() as stages:
            outputs = [out.fs_path for name in names for out in stages[name].outs]
        hardlink = self._repo.config["core"].get("hardlink_lock", False)
        command = " ".join(sys.argv)
        try:
            with rwlock(self._repo.tmp_dir, self._repo.fs, command, outputs, [], hardlink):
                yield
        except LockError as error:
            raise BlockingIOError(str(error)) from None

    @property
    def cache(self) -> str:
        """The folder of DVC's cache, as a path for messages."""
        path = Path(self._repo.cache.local.path)
        cache = path.parents[1] if path.parts[-2:] == ("files", "md5") else path
        return os.path.relpath(cache, self.root) if cache.is_relative_to(self.root) else str(cache)

    def sort_lock(self) -> None:
        """Sort the entries of each `dvc.lock` in the order in which `dvc repro` writes them.

        DVC appends a new stage's entry when the stage ends, and parallel stages end in any order.
        """
        from dvc.utils.serialize import modify_yaml

        with self._locked():
            for lock in lock_files(self.root):
                now = list(read_stages(lock))
                order = [name for name in (*self.stages, *now) if name in now]
                order = list(dict.fromkeys(order))
                if order != now:
                    with modify_yaml(str(lock)) as content:
                        content["stages"] = {name: content["stages"][name] for name in order}

    def _load(self) -> dict[str, Stage]:
        from dvc.repo.reproduce import get_active_graph, plan_repro

        with self._locked():
            graph = get_active_graph(self._repo.index.graph)
            order = [stage for stage in plan_repro(graph) if hasattr(stage, "name")]
            # stable: other entries stay in DVC's order
            order.sort(key=lambda stage: _file(stage, self.root) != PIPELINE_FILE)
            return {
                stage.name: Stage(
                    name=stage.name,
                    upstream=tuple(each.name for each in order if graph.has_edge(stage, each)),
                    inputs=tuple(_relative(dep, self.root) for dep in stage.deps),
                    outputs=tuple(_relative(out, self.root) for out in stage.outs),
                    metrics=tuple(_relative(out, self.root) for out in stage.outs if out.metric),
                    uncached=tuple(
                        _relative(out, self.root) for out in stage.outs if not out.use_cache
                    ),
                    file=_file(stage, self.root),
                )
                for stage in order
            }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Within the block no other thread or process changes the files that DVC reads."""
        from dvc.repo import lock_repo

        with self._thread_lock, lock_repo(self._repo):
            yield

    @contextmanager
    def _held_still(self) -> Iterator[dict[str, PipelineStage]]:
        """The stages, reloaded from disk, under the lock."""
        with self._locked():
            stages = (stage for stage in self._repo.index.stages if hasattr(stage, "name"))
            yield {stage.name: stage for stage in stages}


def _file(stage: PipelineStage, root: Path) -> str:
    """The pipeline file of a stage."""
    return Path(os.path.relpath(stage.path, root)).as_posix()


def _relative(entry: Any, root: Path) -> str:
    return Path(os.path.relpath(entry.fs_path, root)).as_posix()


_DVC_WORDS = {
    "deleted": "is missing",
    "modified": "changed",
    "new": "is new",
    "not in cache": "is not in DVC's cache",
}


def _changes(stage: PipelineStage, root: Path) -> Iterator[Reason]:
    from dvc.dependency.param import ParamsDependency

    file = Path(_file(stage, root))
    if not any(entry.hash_info for entry in (*stage.deps, *stage.outs)):
        yield Reason(file.with_name(LOCK_FILE).as_posix(), "no run of this stage is recorded")
        return
    if stage.cmd_changed:
        yield Reason(file.as_posix(), "the command changed")
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            before, now = dep.hash_info.value or {}, dep.read_params()
            for name in dep.params or sorted({*before, *now}):
                yield from _compare(before.get(name, _ABSENT), now.get(name, _ABSENT), name)
        else:
            for status in dep.status().values():
                path, md5 = _relative(dep, root), str(dep.hash_info.value)
                yield from _changes_below(root, stage.name, path, md5) or [
                    Reason(path, _DVC_WORDS.get(status, str(status)))
                ]
    for out in stage.outs:
        for status in out.status().values():
            yield Reason(_relative(out, root), f"output {_DVC_WORDS.get(status, status)}")


def _changes_below(root: Path, stage: str, folder: str, md5: str) -> list[Reason]:
    """The changed files of a code folder, if the files behind this md5 were noted."""
    try:
        before = json.loads(note_of_code(root, stage).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(before, dict) or folder in before or md5_of_code(before, folder) != md5:
        return []
    now = {path: md5_of(root / path) for path in files_of_code(root, folder)}
    return [
        Reason(path, _DVC_WORDS["modified" if path in before else "new"])
        for path in now
        if now[path] != before.get(path)
    ] + [
        Reason(path, _DVC_WORDS["deleted"])
        for path in before
        if path.startswith(f"{folder}/") and path not in now
    ]


_ABSENT = object()


def _compare(old: Any, new: Any, path: str) -> Iterator[Reason]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _compare(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}")
    elif old is _ABSENT:
        yield Reason(path, f"added: {shortened(str(new), 60)}")
    elif new is _ABSENT:
        yield Reason(path, f"removed, was {shortened(str(old), 60)}")
    elif old != new:
        yield Reason(path, f"{shortened(str(old), 60)} → {shortened(str(new), 60)}")
