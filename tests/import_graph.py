"""What the project's files import, read from their source."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gpt", "stages", "pipeline")
_IMPORTERS = ("import_module", "__import__")


def module_file(name: str) -> Path | None:
    """The file of a module of this project; None for a name that is no module."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def modules() -> frozenset[str]:
    """Every module of the three packages, the packages themselves too."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return frozenset(".".join(each[:-1] if each[-1] == "__init__" else each) for each in parts)


def imports_of(source: str, *, types: bool = False) -> set[str]:
    """Every module that a source imports, inside functions too.

    Args:
        source: of a file.
        types: what is imported for type checkers only, too.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.update(
                submodule
                if module_file(submodule := f"{node.module}.{alias.name}")
                else str(node.module)
                for alias in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(_IMPORTERS):
            found.update(each.value for each in node.args[:1] if isinstance(each, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def named_in(source: str) -> set[str]:
    """Every module of the project whose name is a string of a source: what `python -m` starts, or
    `module:function` calls."""
    strings = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
    names = {each.partition(":")[0] for each in strings if isinstance(each, str)}
    return {name for name in names & modules() if "." in name}


def imported(path: Path) -> set[str]:
    """Every module that a file imports when it runs."""
    return imports_of(path.read_text(encoding="utf-8"))
