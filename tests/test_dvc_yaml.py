"""dvc.yaml, and that of the optional stages, say what the code does: dependencies, paths and
parameters."""

import ast
import inspect
import os
from pathlib import Path

import pytest
import yaml
from import_graph import ROOT, imported, module_file

from pipeline.dag.code import code_of, is_code
from pipeline.project.params import SECTIONS, load_params
from pipeline.project.stage_table import STAGES

FILES = {
    folder: yaml.safe_load((ROOT / folder / "dvc.yaml").read_text(encoding="utf-8"))
    for folder in (".", "optional")
}
DVC = {name: stage for file in FILES.values() for name, stage in file["stages"].items()}

BY_FOLDER = {
    "load_gpt2": {
        "gpt/base/labels.py",
        "gpt/model/device.py",
        "gpt/model/parallel.py",
        "gpt/published/gguf.py",
        "gpt/tokens/token_files.py",
    },
}
"""Stage -> code in a folder that `dvc.yaml` lists which the stage does not run."""


def is_docstring(path: Path) -> bool:
    """A file that holds a docstring and nothing else."""
    return [type(each) for each in ast.parse(path.read_text("utf-8")).body] == [ast.Expr]


def closure(module: str) -> set[str]:
    """The project's files that run when a stage runs.

    `gpt/__init__.py` and `stages/__init__.py` are left out: they do nothing (another test holds
    them to it), and depending on them would tie every stage to every name. So is what holds a
    docstring alone.
    """
    files: set[Path] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        path = module_file(name)
        if name.split(".")[0] not in ("gpt", "stages") or path is None or path in files:
            continue
        if not is_docstring(path):
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


def test_the_stages_of_dvc_yaml_params_yaml_and_the_table_are_the_same_in_one_order():
    assert list(DVC) == list(STAGES) == list(SECTIONS)
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
    listed = {path for path in code_of(ROOT, stage) if not is_docstring(ROOT / path)}
    runs = closure(STAGES[stage].function.partition(":")[0])
    assert sorted(runs - listed) == [], "missing in dvc.yaml"
    assert listed - runs == BY_FOLDER.get(stage, set()), "in dvc.yaml, but never imported"


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
    engine = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gpt" / "engine").iterdir()}
    assert "gpt/engine/decode.cpp" in engine
    assert not engine & {path for name in STAGES for path in code_of(ROOT, name)}


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


def test_the_packages_do_nothing_when_they_are_imported():
    assert imported(ROOT / "stages" / "__init__.py") == set()
    assert imported(ROOT / "gpt" / "__init__.py") <= {"__future__", "importlib", "sys", "typing"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_base_in_dvc_yaml_is_a_parameter(stage):
    if not stage.startswith("finetune_"):
        return
    assert f"models/${{{stage}.base}}" in deps(stage)
    assert getattr(load_params(ROOT / "params.yaml"), stage).base in ("pretrain", "gpt2")
