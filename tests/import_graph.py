"""What the project's files import, read from their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gpt", "stages", "pipeline")


def module_file(name: str) -> Path | None:
    """The file of a module of this project; None for a name that is no module."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def modules() -> Iterator[str]:
    """Every module of the three packages, the packages themselves too."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def imported(path: Path) -> set[str]:
    """Every module that a file imports when it runs."""
    return imports_of(path.read_text(encoding="utf-8"))
