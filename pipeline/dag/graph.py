"""The DAG as DVC knows it: stages, edges, and what is out of date and why.

`dvc.yaml`, `dvc.lock` and the files are read through DVC itself, in this process; nothing is
decided here that DVC does not decide. Stages of `optional/dvc.yaml` only run when they are asked
for.
"""

from __future__ import annotations

import contextlib
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
from pipeline.dag.code import files_of_code, is_code, md5_of_code, missing_code, note_of_code
from pipeline.dag.dvc_files import LOCK_FILE, PIPELINE_FILE, lock_files, pipeline_files, read_stages
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
    """Those of the outputs that hold metrics."""
    file: str = PIPELINE_FILE
    """The pipeline file that it stands in."""

    @property
    def optional(self) -> bool:
        """It only runs when it is asked for."""
        return self.file != PIPELINE_FILE

    @property
    def address(self) -> str:
        """What DVC calls it, in the project's root."""
        return f"{self.file}:{self.name}" if self.optional else self.name


@dataclass(frozen=True, slots=True)
class Recorded:
    """An output as `dvc.lock` has it."""

    path: str
    """Relative to the project's root."""
    md5: str
    cached: bool
    """DVC keeps it; else git does."""


@dataclass(frozen=True, slots=True)
class Change:
    """One reason why a stage is out of date."""

    what: str
    """A file or a parameter (`pretrain.train.steps`)."""
    how: str

    def __str__(self) -> str:
        return f"{self.what}: {self.how}"

    @property
    def not_in_cache(self) -> bool:
        """The output may be as it was: DVC's cache only has not got it."""
        return self.how == f"output {_WORDS['not in cache']}"


class Dag:
    """The stages in the order in which `dvc repro` would run them, optional ones behind the others.

    Safe to use from several threads and beside running `dvc` processes: it reads under DVC's own
    lock and waits for it.

    Raises:
        InputError: `dvc.yaml`, `dvc.lock` or `params.yaml` cannot be read.
    """

    def __init__(self, root: Path) -> None:
        from dvc.exceptions import DvcException
        from dvc.lock import make_lock

        # DVC reads them, too, but says less of what is wrong in them
        read_params(root / PARAMS_FILE)
        for file in (*pipeline_files(root), *lock_files(root)):
            read_stages(file)
        self._repo = open_repo(root)
        mend_rwlock(root)
        self.root = root
        self._thread_lock = threading.RLock()
        try:
            # DVC's own lock, but without its message on the terminal, and patient.
            self._repo.lock = make_lock(
                self._repo.lock.lockfile,
                tmp_dir=self._repo.tmp_dir,
                hardlink_lock=self._repo.config["core"].get("hardlink_lock", False),
                wait=True,
            )
            self.stages: dict[str, Stage] = self._load()
        except DvcException as error:
            reason = in_one_line(error)
            wrong = LOCK_FILE if LOCK_FILE in reason else PIPELINE_FILE
            remedy = f"bring it back (`git checkout {wrong}`)"
            remedy += ", or remove it" if wrong == LOCK_FILE else ""
            raise InputError(f"{wrong}: {reason}; {remedy}") from None

    def plan(self, targets: Iterable[str] = ()) -> list[str]:
        """The targets and all that they depend on, in order; without targets all but the optional.

        Raises:
            InputError: a target is no stage, code that a stage depends on is missing, or a folder
                that outputs go to is a link.
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
                if not (self.root / path).exists():  # DVC would say no more than that
                    raise missing_code(path, name)
        for path in dict.fromkeys(path for name in plan for path in self.stages[name].outputs):
            self._refuse_links(path)
        return plan

    def _refuse_links(self, output: str) -> None:
        """DVC takes no output from behind a link, and says so when it has been made."""
        for folder in list(Path(output).parents)[:-1]:
            path = self.root / folder
            if path.is_symlink():
                raise InputError(
                    f"{folder}: a link to {path.readlink()}, and DVC keeps no outputs behind a "
                    "link; make it a folder, and have DVC's cache on the other disk: `dvc cache "
                    "dir --local FOLDER`, then `dvc config --local cache.type symlink`"
                )

    def changes(self, names: Iterable[str] | None = None) -> dict[str, list[Change]]:
        """Why each stage (by default all) is out of date; an empty list is up to date."""
        names = names if names is None else list(names)
        try:
            return self._changes(names)
        except NotADirectoryError as error:
            raise InputError(
                f"{self.cache}: DVC's cache is no folder ({error.strerror}); remove it, or name "
                "another: `dvc cache dir --local FOLDER`"
            ) from None
        except (AttributeError, KeyError, TypeError):
            # DVC does not expect a damaged list of a directory's files that is JSON all the same
            if not self.objects.drop_damaged_lists():
                raise
            return self._changes(names)

    def _changes(self, names: Iterable[str] | None) -> dict[str, list[Change]]:
        with self._held_still() as stages:
            return {name: list(_changes(stages[name], self.root)) for name in names or list(stages)}

    def missing_params(self, name: str) -> list[str]:
        """The parameters that a stage depends on and `params.yaml` lacks: DVC would not run it."""
        from dvc.dependency.param import ParamsDependency

        with self._held_still() as stages:
            return [
                param
                for dep in stages[name].deps
                if isinstance(dep, ParamsDependency)
                for param in dep.params
                if param not in dep.read_params()
            ]

    def fingerprint(self, name: str) -> str:
        """Of all that `dvc.lock` would record of a stage now: equal while nothing of it changes."""
        from dvc.dependency.param import ParamsDependency

        with self._held_still() as stages:
            stage = stages[name]
            entry = {
                "cmd": stage.cmd,
                "params": [
                    dep.read_params() for dep in stage.deps if isinstance(dep, ParamsDependency)
                ],
                "files": {
                    each.fs_path: each.get_hash().value if each.exists else None
                    for each in (*stage.deps, *stage.outs)
                    if not isinstance(each, ParamsDependency)
                },
            }
        content = json.dumps(entry, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def recorded_outputs(self, names: Iterable[str] | None = None) -> dict[str, list[Recorded]]:
        """The outputs of each stage (by default of all) as `dvc.lock` has them; none where it has
        no entry."""
        with self._held_still() as stages:
            return {
                name: [
                    Recorded(_relative(out, self.root), str(out.hash_info.value), out.use_cache)
                    for out in stages[name].outs
                    if out.hash_info and out.hash_info.name == "md5"
                ]
                for name in names or list(stages)
            }

    def check_cache(self) -> None:
        """Whether DVC's cache can be written is known before there is something to keep.

        Raises:
            RunError: it cannot.
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
        """Within the block no DVC command, of any process, makes the outputs of stages.

        Raises:
            BlockingIOError: one is at it.
        """
        from dvc.lock import LockError
        from dvc.rwlock import rwlock

        with self._held_still() as stages:
            outputs = [out.fs_path for name in names for out in stages[name].outs]
        held = contextlib.ExitStack()
        try:
            held.enter_context(
                rwlock(
                    self._repo.tmp_dir,
                    self._repo.fs,
                    " ".join(sys.argv),
                    outputs,
                    [],
                    self._repo.config["core"].get("hardlink_lock", False),
                )
            )
        except LockError as error:
            raise BlockingIOError(str(error)) from None
        with held:
            yield

    @property
    def objects(self) -> Objects:
        """What DVC's cache holds."""
        return Objects(self._repo.cache.local)

    @property
    def cache(self) -> str:
        """The folder of DVC's cache, as the user would name it here."""
        path = Path(self._repo.cache.local.path)
        cache = path.parents[1] if path.parts[-2:] == ("files", "md5") else path
        return os.path.relpath(cache, self.root) if cache.is_relative_to(self.root) else str(cache)

    def recorded(self) -> list[str]:
        """The stages that have an entry in a `dvc.lock`, in its order."""
        with self._locked():
            return [name for lock in lock_files(self.root) for name in read_stages(lock)]

    def sort_lock(self, recorded: Iterable[str]) -> None:
        """Put the entries of each `dvc.lock` in the order that `dvc repro` gives them.

        DVC appends the entry of a stage that has none yet when it ends, and stages that run side
        by side end in any order. `recorded` is what stood there before they ran.
        """
        from dvc.utils.serialize import modify_yaml

        recorded = list(recorded)
        with self._locked():
            for lock in lock_files(self.root):
                now = read_stages(lock)
                order = [name for name in recorded if name in now]
                order += [name for name in self.stages if name in now and name not in order]
                if order == list(now) or set(order) != set(now):
                    continue
                with modify_yaml(str(lock)) as content:
                    entries = content["stages"]
                    content["stages"] = {name: entries[name] for name in order}

    def _load(self) -> dict[str, Stage]:
        from dvc.repo.reproduce import get_active_graph, plan_repro

        with self._locked():
            graph = get_active_graph(self._repo.index.graph)
            order = [stage for stage in plan_repro(graph) if hasattr(stage, "name")]
            # stable: the others stay in DVC's order
            order.sort(key=lambda stage: _file(stage, self.root) != PIPELINE_FILE)
            return {
                stage.name: Stage(
                    name=stage.name,
                    upstream=tuple(each.name for each in order if graph.has_edge(stage, each)),
                    inputs=tuple(_relative(dep, self.root) for dep in stage.deps),
                    outputs=tuple(_relative(out, self.root) for out in stage.outs),
                    metrics=tuple(_relative(out, self.root) for out in stage.outs if out.metric),
                    file=_file(stage, self.root),
                )
                for stage in order
            }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Within the block no other thread or process changes what DVC reads."""
        from dvc.repo import lock_repo

        with self._thread_lock, lock_repo(self._repo):
            yield

    @contextmanager
    def _held_still(self) -> Iterator[dict[str, PipelineStage]]:
        """The stages as they are now, read anew."""
        with self._locked():
            stages = (stage for stage in self._repo.index.stages if hasattr(stage, "name"))
            yield {stage.name: stage for stage in stages}


def _file(stage: PipelineStage, root: Path) -> str:
    """The pipeline file of a stage."""
    return Path(os.path.relpath(stage.path, root)).as_posix()


def _relative(entry: Any, root: Path) -> str:
    return Path(os.path.relpath(entry.fs_path, root)).as_posix()


_WORDS = {
    "deleted": "is missing",
    "modified": "changed",
    "new": "is new",
    "not in cache": "is not in DVC's cache",
}


def _changes(stage: PipelineStage, root: Path) -> Iterator[Change]:
    from dvc.dependency.param import ParamsDependency

    file = Path(_file(stage, root))
    if not any(entry.hash_info for entry in (*stage.deps, *stage.outs)):
        yield Change(file.with_name(LOCK_FILE).as_posix(), "no run of this stage is recorded")
        return
    if stage.cmd_changed:
        yield Change(file.as_posix(), "the command changed")
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            before, now = dep.hash_info.value or {}, dep.read_params()
            for name in dep.params or sorted({*before, *now}):
                yield from _compare(before.get(name, _ABSENT), now.get(name, _ABSENT), name)
        else:
            for status in dep.status().values():
                path, md5 = _relative(dep, root), str(dep.hash_info.value)
                yield from _changes_below(root, stage.name, path, md5) or [
                    Change(path, _WORDS.get(status, str(status)))
                ]
    for out in stage.outs:
        for status in out.status().values():
            yield Change(_relative(out, root), f"output {_WORDS.get(status, status)}")


def _changes_below(root: Path, stage: str, folder: str, md5: str) -> list[Change]:
    """What differs in a folder of code, where it is noted which files had this md5 together."""
    try:
        before = json.loads(note_of_code(root, stage).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(before, dict) or folder in before or md5_of_code(before, folder) != md5:
        return []
    now = {path: md5_of(root / path) for path in files_of_code(root, folder)}
    return [
        Change(path, _WORDS["modified" if path in before else "new"])
        for path in now
        if now[path] != before.get(path)
    ] + [
        Change(path, _WORDS["deleted"])
        for path in before
        if path.startswith(f"{folder}/") and path not in now
    ]


_ABSENT = object()


def _compare(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _compare(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}")
    elif old is _ABSENT:
        yield Change(path, f"added: {shortened(str(new), 60)}")
    elif new is _ABSENT:
        yield Change(path, f"removed, was {shortened(str(old), 60)}")
    elif old != new:
        yield Change(path, f"{shortened(str(old), 60)} → {shortened(str(new), 60)}")
