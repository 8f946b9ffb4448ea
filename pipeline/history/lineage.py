"""`gpt-pipeline lineage`: from a model, file, run or commit back to its sources, and on to its use.

The links are joined by the md5 of the bytes, as MLflow's runs and `dvc.lock` name them
(`pipeline.history.runs`). A link that is missing is reported where it is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from gpt.base.errors import first_few
from gpt.base.files import sha256_of
from gpt.text.records import SOURCES
from pipeline.dag.cache import DvcCache, md5_now
from pipeline.dag.code import md5_of_code
from pipeline.dag.lock import parse_lock
from pipeline.history.names import Commit, ProjectPath, find, version_name
from pipeline.history.runs import Execution, RunHistory, run_history
from pipeline.project.git import commit_of_path, git, is_changed
from pipeline.project.secrets import without_secrets
from pipeline.show.console import report_console
from pipeline.show.terminal import say_json
from pipeline.tracking.provenance import CODE
from pipeline.tracking.registry import MD5_TAG

if TYPE_CHECKING:
    from pipeline.tracking.mlflow_classes import ModelVersion

_RAW_DATA = "data/raw/"
_NODE_STYLES = {
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
        key: identifies it.
        kind: what it is.
        title: its name.
        facts: what is known of it, for a person; empty ones are left out.
        missing: what should be known or there and is not; empty if nothing.
        data: the same for a program.
    """

    key: str
    kind: Literal["version", "file", "run", "source", "commit"]
    title: str
    facts: tuple[str, ...] = ()
    missing: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Lineage:
    """The chain of one thing.

    Attributes:
        asked: its key.
        nodes: history in the chain by its key.
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
    root: Path, what: str, *, up: bool = True, down: bool = True, folder: Path | None = None
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
    history = run_history(root)
    asked = find(history, what, folder)
    with contextlib.closing(DvcCache(root)) as cache:
        tracer = _Tracer(history, cache, asked)
        if up:
            tracer.follow(asked, tracer.chain.up, tracer.came_from)
        if down:
            tracer.follow(asked, tracer.chain.down, tracer.made_of)
        return tracer.chain


_Thing: TypeAlias = "ModelVersion | Execution | ProjectPath | Commit | Node"


class _Tracer:
    """Follows the links; a node is looked at once in each direction."""

    def __init__(self, history: RunHistory, cache: DvcCache, asked: _Thing) -> None:
        self._history = history
        self._cache = cache
        self._root = history.root
        self._asked = asked
        self._code: dict[str, Mapping[str, str]] = {}
        self._md5s: dict[str, str] = {}
        self.chain = Lineage("", notes=[history.without] if history.without else [])
        self.chain.asked = self._node(asked)

    def follow(
        self,
        thing: _Thing,
        links: dict[str, list[str]],
        next_of: Callable[[_Thing], Iterator[_Thing]],
    ) -> str:
        """Link a thing to what comes next, and so on; its key."""
        key = self._node(thing)
        if key not in links:
            links[key] = []
            following = [self.follow(each, links, next_of) for each in next_of(thing)]
            links[key] = list(dict.fromkeys(following))
        return key

    def came_from(self, thing: _Thing) -> Iterator[_Thing]:
        """What a version, run, file or commit came from."""
        match thing:
            case Commit():
                yield from self._recorded_at(thing.sha)
            case Execution():
                for path, md5 in thing.inputs.items():
                    yield ProjectPath(path, md5, read_at=thing.started)
            case ProjectPath() if thing.member and not thing.path.startswith(_RAW_DATA):
                yield replace(thing, member="")
            case ProjectPath():
                maker = self._history.maker(thing.path, thing.md5, thing.read_at)
                if maker is not None:
                    yield maker
                if thing.path.startswith(_RAW_DATA):
                    yield from self._sources(thing, maker)
            case Node():
                pass  # a source: nothing is before it
            case version:
                yield from self._makers(version)

    def made_of(self, thing: _Thing) -> Iterator[_Thing]:
        """What was made of a version, run, file or commit."""
        match thing:
            case Commit():
                yield from self._runs_at(thing.sha)
            case Execution():
                yield from (ProjectPath(path, md5) for path, md5 in thing.outputs.items())
            case ProjectPath() if thing.member:
                yield replace(thing, member="")
            case ProjectPath() if thing.is_code:
                yield from (e for e in self._history.executions[::-1] if self._ran(e, thing))
            case ProjectPath():
                yield from self._history.readers(thing.path, thing.md5)
                yield from reversed(self._history.registered(thing.md5))
            case Node():
                pass  # a source: it is followed upwards only
            case version:
                if thing is self._asked:  # another one is beside the readers of its bytes
                    md5, makers = version.tags.get(MD5_TAG, ""), self._makers(version)
                    paths = (p for e in makers for p, each in e.outputs.items() if each == md5)
                    yield from self._history.readers(next(paths, ""), md5)

    def _makers(self, version: ModelVersion) -> list[Execution]:
        """The run that made a version; if it is gone, another one that made the same bytes."""
        if run := self._history.by_run(version.run_id):
            return [run]
        md5 = version.tags.get(MD5_TAG, "")
        return [e for e in self._history.executions if md5 in e.outputs.values()][:1]

    def _recorded_at(self, sha: str) -> Iterator[Execution]:
        """The runs that the `dvc.lock` of a commit records."""
        names = git(self._root, "ls-tree", "-r", "--name-only", sha, "dvc.lock", "optional")
        for name in names.splitlines():
            if Path(name).name == "dvc.lock":
                entries = parse_lock(git(self._root, "show", f"{sha}:{name}"))
                for stage, entry in entries.items():
                    made = (stage, entry.outputs)
                    alike = [e for e in self._history.executions if (e.stage, e.outputs) == made]
                    yield from [e for e in alike if e.inputs.items() <= entry.inputs.items()][:1]

    def _runs_at(self, sha: str) -> list[Execution]:
        return [e for e in self._history.executions if e.tags.get("git.commit") == sha]

    def _ran(self, run: Execution, file: ProjectPath) -> bool:
        """Whether a run used the code as it is here; a `dvc.lock` may only know its folder."""
        code, path = self._code_of(run), file.path
        if not md5_of_code(code, path):
            path = next((each for each in code if path.startswith(f"{each}/")), path)
        return md5_of_code(code, path) == self._md5_here(path) != ""

    def _code_of(self, run: Execution) -> Mapping[str, str]:
        """Path -> md5 of the code of a run: of its files, or as `dvc.lock` has it."""
        digest = run.tags.get("code", "")
        if digest and digest not in self._code:
            content = self._history.kept(run, f"lineage/{CODE}")
            self._code[digest] = json.loads(content) if content else run.code
        return self._code.get(digest, run.code)

    def _md5_here(self, path: str) -> str:
        """The md5 of what lies at a path; of a directory that `dvc.lock` records, as recorded."""
        if path not in self._md5s:
            here = self._root / path
            recorded = (
                e.outputs[path] for e in self._history.executions if e.here and path in e.outputs
            )
            told = next(recorded, "") if here.is_dir() else ""
            self._md5s[path] = told or (md5_now(self._root, path) if here.exists() else "")
        return self._md5s[path]

    def _sources(self, folder: ProjectPath, maker: Execution | None) -> Iterator[Node]:
        """Where a raw folder's files came from: as it says itself, or as its parameters say."""
        download = (maker.params if maker else {}).get("download") or {}
        section = download.get(folder.path.removeprefix(_RAW_DATA)) or ()
        params = {str(each.get("name")): each for each in section}
        content = self._cache.read(folder.md5, SOURCES)
        here = self._root / folder.path / SOURCES
        if content is None and here.is_file() and self._md5_here(folder.path) == folder.md5:
            content = here.read_bytes()
        listed = json.loads(content) if content else [{"name": name} for name in params]
        for each in listed:
            if folder.member in ("", each.get("file")):
                own = params.get(each["name"], {})
                yield _source(folder.path, each, own, str(download.get("local") or ""))
        if not listed:
            yield Node(
                key=f"source:{folder.path}@{folder.md5}",
                kind="source",
                title="its sources",
                missing=f"not known: {SOURCES} is neither here nor in DVC's cache, and no dvc.lock "
                "has the parameters of its download",
            )

    # --- nodes ---

    def _node(self, thing: _Thing) -> str:
        """Add the node of a thing, unless it is there already; its key."""
        key = _key(thing)
        if key not in self.chain.nodes:
            self.chain.nodes[key] = self._described(key, thing)
        return key

    def _described(self, key: str, thing: _Thing) -> Node:
        match thing:
            case Node():
                return thing
            case Commit():
                return self._commit_node(key, thing.sha)
            case Execution():
                return _run_node(key, thing, self._others(thing), bool(self._history.without))
            case ProjectPath() if thing.member:
                return self._member_node(key, thing)
            case ProjectPath():
                return self._file_node(key, thing)
            case version:
                return self._version_node(key, version)

    def _commit_node(self, key: str, sha: str) -> Node:
        runs, recorded = self._runs_at(sha), any(self._recorded_at(sha))
        missing = [
            "" if runs else "no run is known that was made at it",
            "" if recorded else "it has no dvc.lock",
        ]
        return Node(
            key=key,
            kind="commit",
            title=f"commit {sha[:10]}",
            facts=(git(self._root, "log", "-1", "--format=%cs %s", sha),),
            missing="; ".join(filter(None, missing)),
            data={"commit": sha},
        )

    def _member_node(self, key: str, file: ProjectPath) -> Node:
        place, inside = self._root / file.whole_path, f"{file.member}/"
        sha256 = f"sha256 {sha256_of(place)}" if place.is_file() else ""
        members = self._cache.members(file.md5) or ()
        there = place.exists() or any(f"{each}/".startswith(inside) for each in members)
        return Node(
            key=key,
            kind="file",
            title=file.whole_path,
            facts=(f"in {file.path}", sha256),
            missing="" if there else "no such file is in it here or in DVC's cache",
            data={"path": file.whole_path, "in": file.path},
        )

    def _file_node(self, key: str, file: ProjectPath) -> Node:
        is_output = any(file.path in each.outputs for each in self._history.executions)
        facts, missing = self._output_state(file) if is_output else self._source_state(file)
        return Node(
            key=key,
            kind="file",
            title=file.path,
            facts=(f"md5 {file.md5}" if file.md5 else "", *facts),
            missing="; ".join(filter(None, missing)),
            data={"path": file.path, "md5": file.md5},
        )

    def _output_state(self, file: ProjectPath) -> tuple[list[str], list[str]]:
        """Where the bytes that a stage wrote are now, and what is missing."""
        in_cache = "in DVC's cache" if self._cache.has(file.md5) else ""
        place = "here" if self._md5_here(file.path) == file.md5 else in_cache
        is_made = self._history.makers(file.path, file.md5)
        missing = [
            "" if place else "these bytes are neither here nor in DVC's cache",
            "" if is_made else "nothing is known that made these bytes",
        ]
        tables = self._cache.members(file.md5) if file.path.endswith("/predictions") else None
        return [place, f"with {', '.join(sorted(tables))}" if tables else ""], missing

    def _source_state(self, file: ProjectPath) -> tuple[list[str], list[str]]:
        """The same of what no stage makes: git keeps it, or nothing does."""
        if not (self._root / file.path).exists():
            return [], ["it is not here any more"]
        if self._md5_here(file.path) != file.md5:
            return [], ["what is here now is not what was read then"]
        commit = commit_of_path(self._root, file.path)
        facts = [f"last changed in commit {commit[:10]}"] if commit else []
        missing = "" if commit else "git does not keep it"
        if commit and is_changed(self._root, file.path):
            missing = "it has edits that no commit has"
        return facts, [missing]

    def _others(self, run: Execution) -> list[Execution]:
        """Runs of the stage that read and wrote just the same."""
        same = (run.stage, run.outputs, run.inputs)
        return [
            each
            for each in self._history.executions
            if run.run
            and run.outputs
            and each.run
            and each.run_id != run.run_id
            and (each.stage, each.outputs, each.inputs) == same
        ]

    def _version_node(self, key: str, version: ModelVersion) -> Node:
        aliases, tags = sorted(self._history.aliases_of(version)), version.tags
        gone = not self._history.by_run(version.run_id)
        return Node(
            key=key,
            kind="version",
            title=key,
            facts=(
                ", ".join(aliases),
                f"md5 {tags[MD5_TAG]}" if MD5_TAG in tags else "",
                f"registered {_when(int(version.creation_timestamp))}",
                f"reproduced {tags['reproduced']}" if "reproduced" in tags else "",
            ),
            missing=f"the run {version.run_id} that made it is gone from MLflow" if gone else "",
            data={
                "model": version.name,
                "version": int(version.version),
                "aliases": aliases,
                "md5": tags.get(MD5_TAG),
                "run_id": version.run_id,
            },
        )


def _key(thing: _Thing) -> str:
    match thing:
        case Node():
            return thing.key
        case Commit():
            return f"commit:{thing.sha}"
        case Execution() if thing.run:
            return f"run:{thing.run_id}"
        case Execution():
            return (
                f"record:{thing.stage}:{_commit_of(thing) or 'here'}:{_digest(thing.outputs)[:12]}"
            )
        case ProjectPath():
            return f"{thing.whole_path}@{thing.md5}"
        case version:
            return version_name(version)


def _commit_of(run: Execution) -> str:
    """The first commit whose `dvc.lock` records it; empty where none does."""
    return run.commits[0] if run.commits else ""


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(dict(value), sort_keys=True, default=str)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _when(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")


def _run_node(key: str, run: Execution, others: list[Execution], without: bool) -> Node:
    tags, recorded = run.tags, _commit_of(run)[:10]
    changed = {k.removeprefix("changed."): v for k, v in tags.items() if k.startswith("changed.")}
    params = _digest(run.run.data.params if run.run else run.params)
    commit, dirty = tags.get("git.commit", ""), tags.get("git.dirty") == "true"
    kept = tags.get("git.patch") == "kept"
    data = {
        "stage": run.stage,
        "run_id": run.run_id or None,
        "number": int(tags["number"]) if "number" in tags else None,
        "status": run.run.info.status if run.run else None,
        "started": None,
        "commit": commit or None,
        "dirty": dirty if commit else None,
        "params_md5": params,
        "changed": changed,
        "recorded_by": list(run.commits),
    }
    if not run.run:
        place = f"in dvc.lock of commit {recorded}" if recorded else "in dvc.lock"
        return Node(
            key=key,
            kind="run",
            title=f"{run.stage} {place}",
            facts=(f"params {params[:8]}",),
            missing="its run is not known here" if without else "no run is known",
            data=data,
        )
    data["started"] = datetime.fromtimestamp(run.started / 1000).astimezone().isoformat()
    status = run.run.info.status
    ended = {"FINISHED": "", "RUNNING": "it is still running, or was killed"}
    missing = (
        ended.get(status, f"it ended {status}"),
        "the run is deleted in MLflow" if run.deleted else "",
        "" if commit else "no commit is known",
        "the edits of its code are kept nowhere" if commit and dirty and not kept else "",
    )
    edits = f"with edits{', which are kept' if kept else ''}" if dirty else "clean"
    changes = [f"{name} {change}" for name, change in changed.items()]
    return Node(
        key=key,
        kind="run",
        # its name begins with its number, and says in short what changed
        title=f"{run.stage} {tags.get('mlflow.runName') or run.number}",
        facts=(
            _when(run.started),
            f"run {run.run_id}",
            f"commit {commit[:10]}, {edits}" if commit else "",
            f"changed: {first_few(changes)}" if changes else "",
            f"params {params[:8]}",
            f"in dvc.lock since commit {recorded}" if recorded else "",
            f"the same bytes came from {first_few([e.number for e in others])}" if others else "",
        ),
        missing="; ".join(filter(None, missing)),
        data=data,
    )


def _source(folder: str, listed: Mapping[str, Any], params: Mapping[str, Any], local: str) -> Node:
    """A source of a raw folder.

    Args:
        folder: the raw folder.
        listed: its entry in `sources.json`; where that is gone, its name alone.
        params: its entry in `params.yaml`.
        local: the folder of the sources that are not from the web.
    """
    name, size = listed["name"], listed.get("bytes")
    url = without_secrets(listed.get("url") or next(iter(params.get("urls") or ()), ""))
    place = f"{local}/{params['file']}" if params.get("file") else str(params.get("builtin") or "")
    file = listed.get("file") or place
    sha256 = str(listed.get("sha256") or params.get("sha256") or "")
    return Node(
        key=f"source:{folder}/{name}/{file}",
        kind="source",
        title=f"{name}: {url or place or file}",
        facts=(
            f"sha256 {sha256}" if sha256 else "",
            f"{size:,} bytes" if size is not None else "",
            "" if "file" in listed else "as its parameters say",
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
    return Text(node.title, style=_NODE_STYLES[node.kind])


def _label(node: Node) -> Text:
    label = _title(node)
    if facts := list(filter(None, node.facts)):
        label += Text("  " + " · ".join(facts), style="dim")
    if node.missing:
        label += Text(f"  ({node.missing})", style="yellow")
    return label
