"""dvc.yaml, and that of the optional stages, say what the code does: dependencies, paths,
parameters, floors."""

import ast
import importlib
import inspect
import os
from pathlib import Path

import pytest
import yaml

from gpt import decode, native
from pipeline.dag import code_of, is_code
from pipeline.params import SECTIONS, load_params
from pipeline.stage_table import STAGES

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS = {"gpt": 0, "stages": 1, "pipeline": 2}
TOOLS = {"mlflow", "prefect", "dvc", "yaml"}
FILES = {
    folder: yaml.safe_load((ROOT / folder / "dvc.yaml").read_text(encoding="utf-8"))
    for folder in (".", "optional")
}
DVC = {name: stage for file in FILES.values() for name, stage in file["stages"].items()}


def module_file(name: str) -> Path | None:
    """The file of a module of this project; None for a name that is no module."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not for type checkers only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.update(
                submodule
                if module_file(submodule := f"{node.module}.{alias.name}")
                else node.module
                for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def closure(module: str) -> set[str]:
    """The project's files that run when a stage runs.

    The packages' own `gpt/__init__.py` and `stages/__init__.py` are left out: they do nothing
    (another test holds them to it), and depending on them would tie every stage to every name.
    """
    files: set[Path] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if name.split(".")[0] not in ("gpt", "stages") or path is None or path in files:
            continue
        files.add(path)
        imports = imported(path)
        assert not imports & {"gpt", "stages"}, f"{path}: import from the module, not the package"
        waiting |= imports
        if name.count(".") > 1:
            waiting.add(name.rpartition(".")[0])
    return {path.relative_to(ROOT).as_posix() for path in files}


def deps(stage: str) -> set[str]:
    return set(DVC[stage]["deps"])


def names(entries: list) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def test_the_stages_of_dvc_yaml_params_yaml_and_the_runner_are_the_same():
    assert set(DVC) == set(STAGES) == set(SECTIONS)
    for name, stage in DVC.items():
        assert stage["cmd"] == f"python -m pipeline stage {name}"
        assert stage["params"] == [name]


def test_every_stage_runs_in_the_projects_root():
    for folder, file in FILES.items():
        for stage in file["stages"].values():
            place = os.path.normpath(Path(folder, stage.get("wdir", ".")))
            assert place == "."


def test_no_other_stage_needs_an_optional_one():
    made = {path for name in FILES["optional"]["stages"] for path in STAGES[name].outputs.values()}
    for name in FILES["."]["stages"]:
        assert not made & set(STAGES[name].inputs.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs_and_on_no_other(stage):
    listed = set(code_of(ROOT, stage))
    runs = closure(STAGES[stage].function.partition(":")[0])
    assert sorted(runs - listed) == [], "missing in dvc.yaml"
    assert sorted(listed - runs) == [], "in dvc.yaml, but never imported"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_paths_that_it_is_given(stage):
    inputs = {path.replace("{", f"${{{stage}.") for path in STAGES[stage].inputs.values()}
    assert {path for path in deps(stage) if not is_code(path)} == inputs


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_what_dvc_takes(stage):
    definition = DVC[stage]
    outputs = names(definition["outs"]) | names(definition["metrics"])
    assert outputs == set(STAGES[stage].outputs.values())
    assert definition["metrics"] == [{STAGES[stage].outputs["metrics"]: {"cache": False}}]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_called_with_the_names_that_it_knows(stage):
    spec = STAGES[stage]
    keywords = {*spec.inputs, *spec.outputs, *spec.scratch, "log"}
    keywords |= {"state"} if spec.continues else set()
    signature = inspect.signature(spec.load())
    assert keywords == {
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def test_the_compiled_engine_makes_no_stage_run_again():
    """A stage writes the same with a compiler and without: it goes without."""
    engine = {Path(module.__file__).relative_to(ROOT).as_posix() for module in (decode, native)}
    assert not engine & {path for name in STAGES for path in deps(name)}


def test_a_prompt_template_never_retrains_the_base_model():
    for stage in ("pretrain", "tokenize", "load_gpt2"):
        assert "gpt/prompts.py" not in code_of(ROOT, stage)
    assert "gpt/prompts.py" in code_of(ROOT, "finetune_instruct")


def test_plots_show_files_that_stages_write():
    written = {path for spec in STAGES.values() for path in spec.outputs.values()}
    for folder, definition in FILES.items():
        for plot in definition["plots"]:
            (name, options), *_ = plot.items()
            files = options["y"] if isinstance(options["y"], dict) else [name]
            for each in files:
                file = os.path.normpath(Path(folder, each))
                assert any(file == path or file.startswith(f"{path}/") for path in written), file


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor):
    for path in sorted((ROOT / floor).rglob("*.py")):
        packages = {name.split(".")[0] for name in imported(path)}
        above = {name for name in packages if FLOORS.get(name, -1) > FLOORS[floor]}
        assert not above, f"{path} imports {above}"
        if floor != "pipeline":
            assert not packages & TOOLS, f"{path} imports {packages & TOOLS}"


def test_the_packages_do_nothing_when_they_are_imported():
    assert imported(ROOT / "stages" / "__init__.py") == set()
    assert imported(ROOT / "gpt" / "__init__.py") <= {"__future__", "importlib", "typing"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_in_dvc_yaml_is_a_parameter(stage):
    if not stage.startswith("finetune_"):
        return
    assert f"models/${{{stage}.base}}" in deps(stage)
    assert getattr(load_params(ROOT / "params.yaml"), stage).base in ("pretrain", "gpt2")


def test_every_stage_module_can_be_imported_alone():
    for spec in STAGES.values():
        importlib.import_module(spec.function.partition(":")[0])
