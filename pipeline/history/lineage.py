"""`gpt-pipeline lineage`: from a model, file, run or commit back to its sources, and on to its use.

What joins the links is the md5 of the bytes, as MLflow's runs and `dvc.lock` name them
(`pipeline.history.runs`). A link that is missing is said where it is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from gpt.base.errors import first_few
from gpt.text.records import SOURCES
from pipeline.dag.cache import DvcCache, dvc_md5, md5_now
from pipeline.dag.code import md5_of_code
from pipeline.history.names import Commit, File, find, version_name
from pipeline.history.runs import Execution, Known, in_lock, known
from pipeline.project.git import commit_of_path, git, is_changed
from pipeline.project.secrets import without_secrets
from pipeline.show.console import report_console
from pipeline.show.terminal import say_json
from pipeline.tracking.provenance import CODE
from pipeline.tracking.registry import MD5_TAG

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

Kind = Literal["version", "file", "run", "source", "commit"]

_RAW = "data/raw/"
_STYLES: dict[str, str] = {
    "version": "bold magenta",
    "file": "bold",
    "run": "bold cyan",
    "source": "green",
    "commit": "bold yellow",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Something in the chain.

    Attributes:
        key: tells it from others.
        kind: what it is.
        title: what it is called.
        facts: what there is to say of it, for a person.
        missing: what should be known or there and is not; empty if nothing.
        data: the same for a program.
    """

    key: str
    kind: Kind
    title: str
    facts: tuple[str, ...] = ()
    missing: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Lineage:
    """The chain of one thing.

    Attributes:
        asked: its key.
        nodes: everything in the chain by its key.
        up: key -> what it came from.
        down: key -> what was made of it.
        notes: what is not known at all.
    """

    asked: str
    nodes: dict[str, Node] = field(default_factory=dict)
    up: dict[str, list[str]] = field(default_factory=dict)
    down: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- the chain ------------------------------------------------------------------------------------


def lineage(
    root: Path,
    what: str,
    *,
    up: bool = True,
    down: bool = True,
    folder: Path | None = None,
) -> Lineage:
    """The chain of a thing, from its raw sources to what was made of it.

    Args:
        root: the project.
        what: see `pipeline.history.names.find`.
        up: where it came from.
        down: what was made of it.
        folder: the one that paths are relative to, beside the project's own.

    Raises:
        InputError: there is no such thing, or there are several.
    """
    everything = known(root)
    asked = find(everything, what, folder)
    cache = DvcCache(root)
    try:
        return _Tracer(everything, cache).trace(asked, up=up, down=down)
    finally:
        cache.close()


class _Tracer:
    """Follows the links; a node is looked at once."""

    def __init__(self, everything: Known, cache: DvcCache) -> None:
        self._known = everything
        self._cache = cache
        self._root = everything.root
        self._chain = Lineage("")
        self._code: dict[str, Mapping[str, str]] = {}

    def trace(
        self, asked: ModelVersion | Execution | File | Commit, *, up: bool, down: bool
    ) -> Lineage:
        chain = self._chain
        chain.notes = [self._known.without] if self._known.without else []
        if isinstance(asked, Commit):
            chain.asked = self._commit(asked, up=up, down=down)
        elif isinstance(asked, Execution):
            chain.asked = self._run(asked)
            if up:
                self._run_up(asked)
            if down:
                self._run_down(asked)
        elif isinstance(asked, File):
            chain.asked = self._asked_file(asked, up=up, down=down)
        else:
            chain.asked = self._asked_version(asked, up=up, down=down)
        return chain

    # --- the beginning ---

    def _asked_version(self, version: ModelVersion, *, up: bool, down: bool) -> str:
        run = self._known.by_run(version.run_id) if version.run_id else None
        md5 = version.tags.get(MD5_TAG, "")
        if run is not None:
            made_by, gone = [run], ""
        else:
            # the version still says which bytes it is: whoever else made them is told
            made_by = [e for e in self._known.executions if md5 in e.outputs.values()][:1]
            gone = f"the run {version.run_id} that made it is gone from MLflow"
        key = self._version(version, missing=gone)
        path = next((p for each in made_by for p, m in each.outputs.items() if m == md5), "")
        if up:
            for each in made_by:
                self._link(self._chain.up, key, self._run_up(each))
        if down and path:
            self._readers(key, path, md5)
        return key

    def _asked_file(self, file: File, *, up: bool, down: bool) -> str:
        key = self._artifact(file.path, file.md5)
        own = ""
        if file.member:
            own = f"{file.path}/{file.member}@{file.md5}"
            self._add(
                Node(
                    key=own,
                    kind="file",
                    title=f"{file.path}/{file.member}",
                    facts=(f"in {file.path}", *self._member_facts(file)),
                    missing=self._member_missing(file),
                    data={"path": f"{file.path}/{file.member}", "in": file.path},
                )
            )
            if up:
                self._link(self._chain.up, own, key)
            if down:
                self._link(self._chain.down, own, key)
        if up:
            only = file.member if file.path.startswith(_RAW) else ""
            self._artifact_up(file.path, file.md5, only=only)
        if down:
            if file.is_code:
                for each in self._runs_of_code(file):
                    self._link(self._chain.down, key, self._run_down(each))
            else:
                self._artifact_down(file.path, file.md5)
        return own or key

    def _member_facts(self, file: File) -> Iterator[str]:
        place = self._root / file.path / file.member
        if place.is_file():
            with place.open("rb") as opened:
                yield f"sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()}"

    def _member_missing(self, file: File) -> str:
        there = (self._root / file.path / file.member).exists()
        members = self._cache.members(file.md5) or {}
        inside = any(m == file.member or m.startswith(f"{file.member}/") for m in members)
        return "" if there or inside else "no such file is in it here or in DVC's cache"

    def _commit(self, commit: Commit, *, up: bool, down: bool) -> str:
        subject = git(self._root, "log", "-1", "--format=%cs %s", commit.sha)
        runs = [e for e in self._known.executions if e.tags.get("git.commit") == commit.sha]
        recorded = list(self._locks_at(commit.sha))
        missing = []
        if not runs:
            missing.append("no run is known that was made at it")
        if not recorded:
            missing.append("it has no dvc.lock")
        key = f"commit:{commit.sha}"
        self._add(
            Node(
                key=key,
                kind="commit",
                title=f"commit {commit.sha[:10]}",
                facts=(subject,),
                missing="; ".join(missing),
                data={"commit": commit.sha},
            )
        )
        if up:
            for record in recorded:
                made = self._same(record)
                node = self._run(made)
                self._link(self._chain.up, key, node)
                for path, md5 in made.outputs.items():
                    self._link(self._chain.up, node, self._artifact(path, md5))
        if down:
            for each in runs:
                node = self._run(each)
                self._link(self._chain.down, key, node)
                for path, md5 in each.outputs.items():
                    self._link(self._chain.down, node, self._artifact(path, md5))
                    self._versions_of(md5, self._artifact(path, md5))
        return key

    def _locks_at(self, sha: str) -> Iterator[Execution]:
        names = git(self._root, "ls-tree", "-r", "--name-only", sha, "dvc.lock", "optional")
        for name in names.splitlines():
            if Path(name).name == "dvc.lock":
                yield from in_lock(git(self._root, "show", f"{sha}:{name}"))

    def _same(self, record: Execution) -> Execution:
        """The execution that a record in a `dvc.lock` is of."""
        for each in self._known.executions:
            same = each.stage == record.stage and each.outputs == record.outputs
            if same and all(record.inputs.get(p) == md5 for p, md5 in each.inputs.items()):
                return each
        return record

    # --- upward ---

    def _artifact_up(self, path: str, md5: str, before: int = 0, only: str = "") -> str:
        key = self._artifact(path, md5)
        if key in self._chain.up:
            return key
        self._chain.up[key] = []
        maker = self._known.maker(path, md5, before)
        if maker is not None:
            self._link(self._chain.up, key, self._run_up(maker))
        if path.startswith(_RAW):
            for node in self._sources(path, md5, maker):
                if only and node.data.get("file") not in (None, only):
                    continue
                self._add(node)
                self._link(self._chain.up, key, node.key)
        return key

    def _run_up(self, run: Execution) -> str:
        key = self._run(run)
        if key not in self._chain.up:
            self._chain.up[key] = []
            for path, md5 in run.inputs.items():
                self._link(self._chain.up, key, self._artifact_up(path, md5, run.started))
        return key

    def _sources(self, path: str, md5: str, maker: Execution | None) -> Iterator[Node]:
        """Where a raw folder's files came from: as it says itself, else as its run says."""
        section = path.removeprefix(_RAW)
        listed = self._cache.read(md5, SOURCES)
        if listed is None and (self._root / path / SOURCES).is_file():
            here = self._root / path
            listed = (here / SOURCES).read_bytes() if dvc_md5(here) == md5 else None
        params = (maker.params if maker else {}).get("download") or {}
        local = str(params.get("local") or "")
        asked = {str(each.get("name")): each for each in params.get(section) or ()}
        if listed is not None:
            yield from _listed_sources(path, json.loads(listed), asked, local)
            return
        names = [*asked]
        told: dict[str, dict[str, Any]] = {}
        if maker and maker.run:
            names = names or list(filter(None, maker.run.data.params.get(section, "").split(", ")))
            for used in maker.run.inputs.dataset_inputs if maker.run.inputs else ():
                told[used.dataset.name] = json.loads(used.dataset.source)
        for name in names:
            own, run = asked.get(name, {}), told.get(name, {})
            yield _source(
                path,
                name,
                url=next(iter(own.get("urls") or ()), run.get("url") or ""),
                file=_local_place(own, local),
                sha256=str(run.get("sha256") or own.get("sha256") or ""),
                told="as the run says" if run else "as its parameters say",
            )
        if not names:
            yield Node(
                key=f"source:{path}@{md5}",
                kind="source",
                title="its sources",
                missing=f"not known: {SOURCES} is neither here nor in DVC's cache, and no run "
                "names them",
            )

    # --- downward ---

    def _artifact_down(self, path: str, md5: str) -> str:
        key = self._artifact(path, md5)
        if key not in self._chain.down:
            self._chain.down[key] = []
            self._readers(key, path, md5)
            self._versions_of(md5, key)
        return key

    def _readers(self, key: str, path: str, md5: str) -> None:
        for each in self._known.readers(path, md5):
            self._link(self._chain.down, key, self._run_down(each))

    def _versions_of(self, md5: str, key: str) -> None:
        for version in reversed(self._known.registered(md5)):
            self._link(self._chain.down, key, self._version(version))

    def _run_down(self, run: Execution) -> str:
        key = self._run(run)
        if key not in self._chain.down:
            self._chain.down[key] = []
            for path, md5 in run.outputs.items():
                self._link(self._chain.down, key, self._artifact_down(path, md5))
        return key

    def _runs_of_code(self, file: File) -> list[Execution]:
        """The executions that ran the code as it is here, the oldest first."""
        now = {file.path: file.md5}

        def ran(code: Mapping[str, str]) -> bool:
            path = file.path
            if not md5_of_code(code, path):  # of what `dvc.lock` alone knows it has the folder
                path = next((each for each in code if path.startswith(f"{each}/")), path)
            if path not in now:
                now[path] = md5_now(self._root, path)
            return md5_of_code(code, path) == now[path] != ""

        return [e for e in self._known.executions if ran(self._code_of(e))][::-1]

    def _code_of(self, run: Execution) -> Mapping[str, str]:
        """Path -> md5 of the code that it ran; its own list names files, `dvc.lock` folders too."""
        whole = run.code and not any(md5.endswith(".dir") for md5 in run.code.values())
        if whole or not (told := run.tags.get("code")):
            return run.code
        if told not in self._code:
            content = self._known.kept(run, f"lineage/{CODE}")
            self._code[told] = json.loads(content) if content else run.code
        return self._code[told]

    # --- nodes ---

    def _add(self, node: Node) -> None:
        self._chain.nodes.setdefault(node.key, node)

    @staticmethod
    def _link(links: dict[str, list[str]], key: str, other: str) -> None:
        if other not in links.setdefault(key, []):
            links[key].append(other)

    def _artifact(self, path: str, md5: str) -> str:
        key = f"{path}@{md5}"
        if key not in self._chain.nodes:
            place, missing = self._place(path, md5)
            self._add(
                Node(
                    key=key,
                    kind="file",
                    title=path,
                    facts=(f"md5 {md5}" if md5 else "", *place),
                    missing=missing,
                    data={"path": path, "md5": md5},
                )
            )
        return key

    def _place(self, path: str, md5: str) -> tuple[list[str], str]:
        """Where the bytes are now, and what is missing about them."""
        made = self._known.makers(path, md5)
        output = made or any(path in each.outputs for each in self._known.executions)
        here = self._root / path
        if not output:
            return self._place_in_git(path, md5)
        locked = any(each.here for each in made) and here.is_dir()  # of a file it costs nothing
        place: list[str] = []
        missing: list[str] = []
        if locked or (here.is_file() and dvc_md5(here) == md5):
            place.append("here")
        elif self._cache.has(md5):
            place.append("in DVC's cache")
        elif here.is_dir() and dvc_md5(here) == md5:
            place.append("here")
        else:
            missing.append("these bytes are neither here nor in DVC's cache")
        if not made:
            missing.append("nothing is known that made these bytes")
        if names := self._answers(path, md5):
            place.append(f"with {names}")
        return place, "; ".join(missing)

    def _place_in_git(self, path: str, md5: str) -> tuple[list[str], str]:
        """The same of what no stage makes: git keeps it, or nobody."""
        here = self._root / path
        if not here.exists():
            return [], "it is not here any more"
        if md5_now(self._root, path) != md5:
            return [], "what is here now is not what was read then"
        commit = commit_of_path(self._root, path)
        if not commit:
            return [], "git does not keep it"
        edited = is_changed(self._root, path)
        return [f"last changed in commit {commit[:10]}"], (
            "it has edits that no commit has" if edited else ""
        )

    def _answers(self, path: str, md5: str) -> str:
        """The names of the tables of predictions."""
        if not path.endswith("/predictions"):
            return ""
        return ", ".join(sorted(self._cache.members(md5) or ()))

    def _run(self, run: Execution) -> str:
        key = f"run:{run.run_id}" if run.run else _record_key(run)
        if key not in self._chain.nodes:
            self._add(_run_node(key, run, self._others(run), bool(self._known.without)))
        return key

    def _others(self, run: Execution) -> list[Execution]:
        """Runs of the stage that read and wrote just the same."""
        if not run.run or not run.outputs:
            return []
        return [
            each
            for each in self._known.executions
            if each.run
            and each.run_id != run.run_id
            and (each.stage, each.outputs, each.inputs) == (run.stage, run.outputs, run.inputs)
        ]

    def _version(self, version: ModelVersion, missing: str = "") -> str:
        key = version_name(version)
        aliases = self._known.aliases_of(version)
        tags = version.tags
        facts = [
            ", ".join(sorted(aliases)),
            f"md5 {tags[MD5_TAG]}" if MD5_TAG in tags else "",
            f"registered {_when(int(version.creation_timestamp))}",
            f"reproduced {tags['reproduced']}" if "reproduced" in tags else "",
        ]
        self._add(
            Node(
                key=key,
                kind="version",
                title=key,
                facts=tuple(facts),
                missing=missing,
                data={
                    "model": version.name,
                    "version": int(version.version),
                    "aliases": sorted(aliases),
                    "md5": tags.get(MD5_TAG),
                    "run_id": version.run_id,
                },
            )
        )
        return key


def _record_key(run: Execution) -> str:
    commit = run.commits[0] if run.commits else "here"
    return f"record:{run.stage}:{commit}:{_digest(run.outputs)[:12]}"


def _digest(value: Mapping[str, Any]) -> str:
    told = json.dumps(dict(value), sort_keys=True, default=str)
    return hashlib.md5(told.encode(), usedforsecurity=False).hexdigest()


def _when(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")


def _run_node(key: str, run: Execution, others: list[Execution], without: bool) -> Node:
    tags = run.tags
    commit = tags.get("git.commit", "")
    changed = {k.removeprefix("changed."): v for k, v in tags.items() if k.startswith("changed.")}
    params = _digest(run.run.data.params if run.run else run.params)
    if run.run:
        # its name begins with its number, and says in short what changed
        title = f"{run.stage} {tags.get('mlflow.runName') or '#' + tags.get('number', '?')}"
        when = datetime.fromtimestamp(run.started / 1000).astimezone().isoformat()
    else:
        at = f"in dvc.lock of commit {run.commits[0][:10]}" if run.commits else "in dvc.lock"
        title, when = f"{run.stage} {at}", None
    return Node(
        key=key,
        kind="run",
        title=title,
        facts=(
            *_run_facts(run),
            f"changed: {first_few([f'{k} {v}' for k, v in changed.items()])}" if changed else "",
            f"params {params[:8]}",
            f"in dvc.lock since commit {run.commits[0][:10]}" if run.run and run.commits else "",
            f"the same bytes came from {first_few([_number(e) for e in others])}" if others else "",
        ),
        missing="; ".join(_run_missing(run, without)),
        data={
            "stage": run.stage,
            "run_id": run.run_id or None,
            "number": int(tags["number"]) if "number" in tags else None,
            "status": run.run.info.status if run.run else None,
            "started": when,
            "commit": commit or None,
            "dirty": tags.get("git.dirty") == "true" if commit else None,
            "params_md5": params,
            "changed": changed,
            "recorded_by": list(run.commits),
        },
    )


def _run_facts(run: Execution) -> Iterator[str]:
    if not run.run:
        return
    yield _when(run.started)
    yield f"run {run.run_id}"
    if commit := run.tags.get("git.commit"):
        edits = "with edits, which are kept" if _keeps_edits(run) else "with edits"
        yield f"commit {commit[:10]}, {edits if run.tags.get('git.dirty') == 'true' else 'clean'}"


def _run_missing(run: Execution, without: bool) -> Iterator[str]:
    if not run.run:
        yield "its run is not known here" if without else "no run is known"
        return
    status = run.run.info.status
    if status == "RUNNING":
        yield "it is still running, or was killed"
    elif status != "FINISHED":
        yield f"it ended {status}"
    if run.deleted:
        yield "the run is deleted in MLflow"
    if not run.tags.get("git.commit"):
        yield "no commit is known"
    elif run.tags.get("git.dirty") == "true" and not _keeps_edits(run):
        yield "the edits of its code are kept nowhere"


def _keeps_edits(run: Execution) -> bool:
    return run.tags.get("git.patch") == "kept"


def _number(run: Execution) -> str:
    return f"#{run.tags.get('number', '?')}"


def _listed_sources(
    path: str,
    files: Iterable[Mapping[str, Any]],
    asked: Mapping[str, Mapping[str, Any]],
    local: str,
) -> Iterator[Node]:
    """The sources that a raw folder lists."""
    for each in files:
        params = asked.get(each["name"], {})
        yield _source(
            path,
            each["name"],
            url=each.get("url") or "",
            file=each["file"],
            local=_local_place(params, local),
            sha256=each["sha256"],
            size=each.get("bytes"),
        )


def _local_place(source: Mapping[str, Any], folder: str) -> str:
    """Where a source that is not from the web lies: a path, or `python-docs`; empty if unknown."""
    if file := source.get("file"):
        return f"{folder}/{file}"
    return str(source.get("builtin") or "")


def _source(
    path: str,
    name: str,
    *,
    url: str,
    file: str,
    sha256: str,
    local: str = "",
    size: int | None = None,
    told: str = "",
) -> Node:
    url = without_secrets(url)
    return Node(
        key=f"source:{path}/{name}/{file}",
        kind="source",
        title=f"{name}: {url or local or file}",
        facts=(
            f"sha256 {sha256}" if sha256 else "",
            f"{size:,} bytes" if size is not None else "",
            told,
        ),
        missing="" if sha256 else "its sha256 is not known",
        data={
            "name": name,
            "url": url or None,
            "file": file or None,
            "sha256": sha256 or None,
            "bytes": size,
        },
    )


# --- shown ----------------------------------------------------------------------------------------


def print_lineage(
    root: Path,
    what: str,
    *,
    up: bool = True,
    down: bool = True,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print the chain as trees, or as JSON. Arguments and errors are those of `lineage`."""
    chain = lineage(root, what, up=up, down=down, folder=Path.cwd())
    if as_json:
        say_json(as_dict(chain))
        return
    console = report_console(console)
    asked = chain.nodes[chain.asked]
    console.print(_label(asked))
    for note in chain.notes:
        console.print(Text(note, style="yellow"))
    commit = asked.kind == "commit"
    parts = (
        (up, "what its dvc.lock records" if commit else "where it came from", chain.up, "nothing"),
        (down, "runs made at it" if commit else "what was made of it", chain.down, "nothing yet"),
    )
    for wanted, heading, links, none in parts:
        if wanted:
            tree = Tree(Text(heading, style="italic"), guide_style="dim")
            _grow(tree, chain, links, chain.asked, shown={chain.asked})
            if not tree.children:
                tree.add(Text(f"{none} that is known", style="dim"))
            console.print()
            console.print(tree)


def as_dict(chain: Lineage) -> dict[str, Any]:
    """The chain for a program: nodes, and links as pairs of their keys."""
    return {
        "asked": chain.asked,
        "nodes": [
            {"key": node.key, "kind": node.kind, **node.data, "missing": node.missing or None}
            for node in chain.nodes.values()
        ],
        "came_from": [[key, other] for key, others in chain.up.items() for other in others],
        "made_of_it": [[key, other] for key, others in chain.down.items() for other in others],
        "notes": chain.notes,
    }


def _grow(
    tree: Tree, chain: Lineage, links: Mapping[str, list[str]], key: str, shown: set[str]
) -> None:
    """Add what is linked to a node below it; what was shown already is only named."""
    small = []
    for other in links.get(key, ()):
        node = chain.nodes[other]
        of_run = node.kind == "file" and chain.nodes[key].kind == "run" and links is chain.down
        if of_run and not links.get(other) and not _matters(node):
            small.append(node.title)
            continue
        if other in shown and links.get(other):
            tree.add(_title(node) + Text(" (shown above)", style="dim"))
            continue
        shown.add(other)
        _grow(tree.add(_label(node)), chain, links, other, shown)
    if small:
        tree.add(Text(f"and {', '.join(small)}", style="dim"))


def _matters(node: Node) -> bool:
    """An output that nothing reads yet and that is what a stage is for all the same."""
    return node.title.startswith(("models/", "data/", "reports/evaluation/"))


def _title(node: Node) -> Text:
    return Text(node.title, style=_STYLES[node.kind])


def _label(node: Node) -> Text:
    label = _title(node)
    if facts := list(filter(None, node.facts)):
        label += Text("  " + " · ".join(facts), style="dim")
    if node.missing:
        label += Text(f"  ({node.missing})", style="yellow")
    return label
