"""The rule of the house: a wing imports lower floors only. docs/architecture.md has the picture."""

import importlib
import re
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

import pytest
from import_graph import PACKAGES, ROOT, imports_of, module_file, modules, named_in

FLOORS = (
    ("gpt.base",),
    ("gpt.text", "gpt.clean", "gpt.tokens"),
    ("gpt.model",),
    ("gpt.batches", "gpt.published", "gpt.generation", "gpt.prompts"),
    ("gpt.train", "gpt.tune", "gpt.scores", "gpt.engine"),
    ("gpt.inference", "gpt.estimate"),
    ("gpt",),
    ("stages",),
    ("pipeline.show", "pipeline.project"),
    ("pipeline.dag", "pipeline.use"),
    ("pipeline.tracking",),
    ("pipeline.history", "pipeline.verdict", "pipeline.data"),
    ("pipeline.run", "pipeline.report"),
    ("pipeline.flow", "pipeline.estimate"),
    ("pipeline.sweep",),
    ("pipeline.cli", "pipeline.agent_flow", "pipeline.agent_worker"),
    ("pipeline",),
)
"""From the lowest: folders, and files that stand alone; a package has what is in no other one."""

FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
TOOLS = {
    "dvc": {"pipeline.dag"},
    "mlflow": {"pipeline.tracking"},
    "prefect": {"pipeline.flow", "pipeline.sweep"},
    "yaml": {"pipeline.dag", "pipeline.project"},
}
"""Each tool, with its parts (`dvc_data`), and the only wings that import it."""

Graph = Mapping[str, Set[str]]


@cache
def the_project() -> dict[str, set[str]]:
    """Module -> what it imports, for type checkers or by its name too."""
    graph = {}
    for module in modules():
        path = module_file(module)
        assert path is not None
        source = path.read_text(encoding="utf-8")
        graph[module] = (imports_of(source, types=True) | named_in(source)) - {module}
    return graph


def wing_of(module: str) -> str:
    while module not in FLOOR_OF:
        module = module.rpartition(".")[0]
    return module


def against_the_rule(graph: Graph) -> Iterator[str]:
    for module, imports in graph.items():
        wing = wing_of(module)
        for other in sorted(imports):
            package = other.partition(".")[0]
            tool = package.partition("_")[0]
            if wing not in TOOLS.get(tool, {wing}):
                yield f"{module} imports {other}: only {', '.join(sorted(TOOLS[tool]))} may"
            elif package in PACKAGES and (its := wing_of(other)) != wing:
                if FLOOR_OF[its] > FLOOR_OF[wing]:
                    yield f"{module} imports {other}, which is on a higher floor"
                elif FLOOR_OF[its] == FLOOR_OF[wing]:
                    yield f"{module} imports {other}, a neighbour"


def circles(graph: Graph) -> list[set[str]]:
    """Sets of modules of which each imports itself by way of the others."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other in graph and other not in found:
                    found.add(other)
                    waiting.append(other)
        reached[module] = found
    return [
        {module} | {other for other in reached[module] if module in reached[other]}
        for module in graph
        if module in reached[module]
    ]


def test_a_wing_imports_lower_floors_only_and_each_tool_has_its_wing():
    assert list(against_the_rule(the_project())) == []


def test_no_file_imports_itself_by_way_of_others():
    assert circles(the_project()) == []


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("pipeline.dag.graph", "import pipeline.run.stage", "on a higher floor"),
        ("gpt.model.loss", "from gpt.train.loop import fit", "on a higher floor"),
        ("stages.pretrain", "from pipeline.project.params import Params", "on a higher floor"),
        ("pipeline.history.runs", "from pipeline.verdict import judge", "a neighbour"),
        ("gpt.train.loop", "def later():\n    import gpt.engine.decode", "a neighbour"),
        ("pipeline.report.page", "import mlflow.entities", "only pipeline.tracking may"),
        ("pipeline.run.stage", "from dvc.repo import Repo", "only pipeline.dag may"),
        ("gpt.model.weights", "import prefect", "only pipeline.flow"),
        ("pipeline.run.stage", "import dvc_data.hashfile", "only pipeline.dag may"),
        ("stages.pretrain", "import_module('mlflow')", "only pipeline.tracking may"),
        ("gpt.text.formats", "__import__('gpt.clean.cleaning')", "a neighbour"),
        ("pipeline.dag.repro", "run(['-m', 'pipeline.flow.agent_worker'])", "on a higher floor"),
        ("gpt.base.files", "CALLED = 'stages.download:download'", "on a higher floor"),
    ],
)
def test_the_rule_is_seen_to_be_broken(module, line, said):
    imports = the_project()[module] | imports_of(line) | named_in(line)
    (broken,) = against_the_rule({module: imports})
    assert broken.startswith(module)
    assert said in broken


def test_a_circle_is_seen():
    line = "if TYPE_CHECKING:\n    from pipeline.project.file_locks import stage_lock"
    graph = {
        "pipeline.project.git": imports_of(line, types=True),
        "pipeline.project.file_locks": {"pipeline.project.git"},
    }
    assert circles(graph) == [set(graph)] * 2


def test_every_wing_has_a_folder_that_says_what_it_is_for():
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in ("gpt", "pipeline")
        for path in (ROOT / package).rglob("*.py")
    }
    files = {wing for wing in FLOOR_OF if module_file(wing) == alone(wing)}
    assert folders == set(FLOOR_OF) - files - {"stages"}
    for folder in folders:
        assert importlib.import_module(folder).__doc__


def alone(wing: str) -> Path:
    return ROOT.joinpath(*wing.split(".")).with_suffix(".py")


def test_few_files_stand_at_the_top_of_the_pipeline():
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 6


def test_the_walks_name_functions_that_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.]+)`\s\(([\w/]+\.py)\)", text)
    assert len(named) > 15
    for name, file in named:
        found = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)


def test_the_page_names_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for wing in FLOOR_OF:
        package, _, name = wing.partition(".")
        assert f"`{package}/{name}" in text or re.search(rf"\[\"{name}(\.py)? · ", text), wing
