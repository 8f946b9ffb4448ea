"""The package as a library: every public name, as someone uses it who has nothing else of it."""

import doctest
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gpt

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "samples" / "gpt2-nano"


@pytest.mark.parametrize("name", gpt.__all__)
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = getattr(gpt, name)
    given = {"gpt": gpt, "torch": torch, "directory": str(NANO)}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(found, name, globs=given)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        assert example.examples
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0


def test_no_public_name_is_a_modules():
    """Once imported, `gpt/NAME.py` is the attribute NAME of the package, and hides the other."""
    assert not set(gpt.__all__) & {module.name for module in pkgutil.iter_modules(gpt.__path__)}
    assert set(gpt.__all__) == set(gpt._MODULE_OF) <= set(dir(gpt))


@pytest.mark.parametrize("name", gpt._MOVED)
def test_a_module_that_has_moved_says_where_it_is(name):
    importlib.import_module(gpt._MOVED[name])
    last = name.removeprefix("gpt.")  # `gpt.generate` is the function
    own = [] if last in gpt.__all__ else [f"from gpt import {last}"]
    for code in (f"import {name}", f"from {name} import x", *own):
        with pytest.raises(ModuleNotFoundError, match=rf"^{name} is {gpt._MOVED[name]} now; "):
            exec(code, {})
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'gpt\.nothing'$"):
        importlib.import_module("gpt.nothing")


def test_a_public_name_is_the_same_after_every_import():
    before = {name: getattr(gpt, name) for name in gpt.__all__}
    for module in pkgutil.walk_packages(gpt.__path__, "gpt."):
        importlib.import_module(module.name)
    assert {name: getattr(gpt, name) for name in gpt.__all__} == before
    ids = torch.tensor([[1, 2]])
    model = gpt.load_model(NANO)
    assert torch.equal(gpt.generate(model, ids, 3), gpt.generate(model, ids, 3))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_given_as_text_or_as_a_path(kind, tmp_path):
    tokenizer = gpt.load_tokenizer(kind(NANO))
    model = gpt.load_model(kind(NANO))
    gpt.save_model(model, kind(tmp_path / "model"), tokenizer=tokenizer)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(kind(tmp_path / "tokenizer"))
    for folder in ("model", "tokenizer"):
        assert gpt.load_tokenizer(kind(tmp_path / folder)).hash == tokenizer.hash


# --- installed from a wheel -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("gpt", "stages", "pipeline", "bench", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", source / "dist"]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


def run(*command, cwd):
    """What a command prints that finds this project nowhere but where it is installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_the_packages_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("gpt", "stages", "pipeline")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted


def test_the_wheel_serves_readme_s_lines_in_an_empty_folder(wheel, tmp_path):
    """In an environment of its own, which sees what is installed here but for this project."""
    home, empty = tmp_path / "venv", tmp_path / "empty"
    shutil.copytree(NANO, empty / "models" / "pretrain")
    tokenizer = gpt.load_tokenizer(NANO)
    config = gpt.GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=8)
    classifier = gpt.GPTClassifier(config, ["ham", "spam"])
    gpt.save_model(classifier, empty / "models" / "classifier", tokenizer=tokenizer)

    venv.create(home)
    scheme = {"base": str(home), "platbase": str(home), "installed_base": str(home)}
    own = Path(sysconfig.get_path("purelib", "venv", scheme))
    scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
    # the .pth files of these folders, an editable install's among them, are not read from there
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "others.pth").write_text("\n".join(installed))
    python = scripts / "python"
    options = ["--no-deps", "--no-index", "-q", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=empty)

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "import gpt" + readme.partition("```python\nimport gpt")[2].partition("```")[0]
    printed = run(python, "-c", f"{lines}\nprint(gpt.__file__)", cwd=empty)
    *text, perplexities, classes, file = printed.splitlines()
    assert text[0].startswith("The old clock")
    plain, turned = json.loads(perplexities)
    assert plain < turned
    assert classes.startswith("['ham', 'spam'] [[0.")
    assert Path(file).is_relative_to(own)
    assert "generate" in run(scripts / "gpt-pipeline", "--help", cwd=empty)
