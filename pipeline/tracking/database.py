"""An MLflow database in a file: its URI, the paths stored in it, and its errors.

MLflow stores absolute paths in its tables. If the project's folder was moved, renamed or copied,
the paths are rewritten before MLflow opens the database.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipeline.tracking.keys import EXPERIMENT_PREFIX

_SCHEME = "sqlite:///"
_OURS = f"{EXPERIMENT_PREFIX}%"  # experiments by name
_WITHIN = re.compile(r"(file://.+?)/(?:mlartifacts/[^/]+|artifacts)/?")
"""Artifact folders of our experiments, relative to the database's folder."""
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_OF_DRIVER = re.compile(r"\((?:\w+\.)+\w*Error\) *(.+)")
"""Finds the database's own message in an error wrapped by SQLAlchemy and MLflow."""
_SCHEMA = re.compile(r"database schema \(found version (\w+), but expected \w+\)")
_REMEDIES = (
    ("locked", "another process holds it; try again when that has ended"),
    (
        "readonly|read-only|permission denied|unable to open",
        "let the file and the project's folder be written",
    ),
    (
        "malformed|not a database|file is encrypted",
        "put a copy of the file back, or move it away: the next run makes a new one",
    ),
    ("disk is full|no space left|quota", "make room on the disk"),
)
_WAIT_SECONDS = 30.0
"""How long to wait for another process that has locked the database."""


def database_uri(file: Path) -> str:
    """The URI of a database for MLflow, which decodes `%20` and ends the path at `?`."""
    path = str(file)
    if unquote(path) != path or "?" in path:
        path = path.replace("%", "%25").replace("?", "%3F")
    return _SCHEME + path


def database_file(uri: str) -> Path | None:
    """The file of such a URI; None for any other kind of URI."""
    if not uri.startswith(_SCHEME):
        return None
    return Path(unquote(uri.removeprefix(_SCHEME).partition("?")[0]))


def follow_move(database: Path) -> None:
    """Update the paths in a database that was moved or copied, so that they name its own files.

    The path of a file that still exists and was not moved along is kept. If the database is a copy,
    the original is not changed.

    Args:
        database: of a project or of an unsent run; no other process may change it meanwhile.

    Raises:
        sqlite3.Error: the file is not a database, or cannot be read or written.
    """
    if not database.exists():  # otherwise SQLite would create it
        return
    here = database.parent
    with contextlib.closing(sqlite3.connect(database, timeout=_WAIT_SECONDS)) as db, db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in tables:
            return
        query = "SELECT artifact_location FROM experiments WHERE name LIKE ?"
        matches = [_WITHIN.fullmatch(place or "") for (place,) in db.execute(query, [_OURS])]
        left = {_path(match[1]) for match in matches if match} - {here}
        for old in sorted(each for each in left if not _same(each, here)):
            for table, column in _PLACES:
                if table in tables:
                    _name_anew(db, table, column, old, here)


def reason_and_remedy(error: Exception, database: Path | None) -> tuple[str, str]:
    """The reason for an error, in one line, and a remedy; the remedy is empty if none is known.

    Args:
        error: the exception that MLflow or its database raised.
        database: the database file, if it is one.
    """
    text = str(error).strip()
    said = _OF_DRIVER.search(text)
    reason = said[1] if said else next(iter(text.splitlines()), type(error).__name__)
    if schema := _SCHEMA.search(text):
        return _of_schema(schema[1], database)
    if database is None:
        return reason, ""
    found = (help for words, help in _REMEDIES if re.search(words, reason, re.IGNORECASE))
    return reason, next(found, "see that the disk has room and the folder can be written")


def _of_schema(revision: str, database: Path | None) -> tuple[str, str]:
    import mlflow
    from mlflow.store import db_migrations

    known = Path(db_migrations.__path__[0], "versions").glob(f"{revision}_*.py")
    uri = database_uri(database) if database else "ITS_ADDRESS"
    if revision == "None" or any(known):
        how = f"copy it, then `mlflow db upgrade '{uri}'`"
        return f"an older MLflow than {mlflow.__version__} made it", how
    how = "install that MLflow, or take a database that this one made"
    return f"a newer MLflow than {mlflow.__version__} made it", how


def _name_anew(db: sqlite3.Connection, table: str, column: str, old: Path, here: Path) -> None:
    rows = list(db.execute(f"SELECT rowid, {column} FROM {table}"))
    for row, place in rows:
        for before, after in ((old.as_uri(), here.as_uri()), (str(old), str(here))):
            if not place or not place.startswith(f"{before}/"):
                continue
            new = after + place.removeprefix(before)
            left_behind = _path(place).exists() and not _path(new).exists()
            if table == "experiments" or not left_behind:
                db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [new, row])


def _path(place: str) -> Path:
    return Path(unquote(urlparse(place).path) if place.startswith("file:") else place)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same folder, through a link or a mount."""
    return one.is_dir() and one.samefile(other)
