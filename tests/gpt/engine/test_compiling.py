"""A library is compiled once, kept whole, trusted only where nobody else could have written it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt.base.errors import RunError
from gpt.engine import compiling, decode

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(compiled_cache, tmp_path, monkeypatch):
    """An empty cache folder, on a machine that can compile."""
    folder = tmp_path / "cache" / "gpt-pipeline"
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("answer-*/library.so"))


def test_a_library_is_compiled_once_and_found_again(cache, source, monkeypatch):
    with pytest.raises(compiling.UnavailableError, match="not compiled yet"):
        compiling.find(source)
    assert compiling.compile_and_wait(source).answer() == 42
    monkeypatch.setattr(compiling, "_compile", None)
    assert compiling.compile_and_wait(source).answer() == 42
    assert compiling.find(source).answer() == 42
    assert len(libraries(cache)) == 1
    assert cache.stat().st_mode & 0o777 == 0o700


def test_another_source_compiler_flag_or_cpu_is_another_library(cache, source, monkeypatch):
    first = compiling._place(source)
    places = {first}
    for name in ("_version", "_cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(compiling, name, lambda *_: "another")
            places.add(compiling._place(source))
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "_FLAGS", (*compiling._FLAGS, "-g"))
        places.add(compiling._place(source))
    source.write_text(SOURCE.replace("42", "43"))
    places.add(compiling._place(source))
    assert len(places) == 5
    source.write_text(SOURCE)
    assert compiling._place(source) == first


def damage_cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])


def damage_empty(library: Path) -> None:
    library.write_bytes(b"")


def damage_text(library: Path) -> None:
    library.write_bytes(b"no library")


def damage_checksum(library: Path) -> None:
    (library.parent / "library.sha256").unlink()


def damage_whole(library: Path) -> None:
    """Something else, with its own right checksum."""
    library.write_bytes(b"no library")
    (library.parent / "library.sha256").write_text(compiling.sha256_of(library))


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_empty, damage_text, damage_checksum, damage_whole]
)
def test_a_damaged_library_is_passed_over_and_then_rebuilt(cache, source, damage):
    """In other processes: one that has loaded a library would be given it again."""
    code = f"""
import sys; from pathlib import Path; from gpt.engine import compiling
source = Path({str(source)!r})
if sys.argv[1] == "find":
    try:
        compiling.find(source)
    except compiling.UnavailableError as error:
        print("passed over:", error)
else:
    print(compiling.compile_and_wait(source).answer())
"""

    def run(what: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, what], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run("compile") == "42"
    (library,) = libraries(cache)
    damage(library)
    assert run("find").startswith("passed over:")
    assert run("compile") == "42"
    assert run("find") == ""


def test_a_cache_that_others_may_write_into_is_not_used(cache, source):
    compiling.compile_and_wait(source)
    (library,) = libraries(cache)
    for path in (cache, library.parent, library):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(compiling.UnavailableError, match="others may write there"):
            compiling.find(source)
        path.chmod(mode)
    cache.chmod(0o777)
    with pytest.raises(RunError, match="others may write there"):
        compiling.compile_and_wait(source)
    cache.chmod(0o700)
    assert compiling.find(source).answer() == 42


def test_a_cache_of_someone_else_is_not_used(cache, source, monkeypatch):
    compiling.compile_and_wait(source)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(compiling.UnavailableError, match="belongs to someone else"):
        compiling.find(source)
    with pytest.raises(RunError, match="belongs to someone else"):
        compiling.compile_and_wait(source)


def test_a_cache_that_cannot_be_made_is_a_reason_and_no_crash(source, monkeypatch, compiled_cache):
    monkeypatch.setenv(compiling.CACHE_VARIABLE, os.devnull)
    for call in (compiling.find, compiling.compile_in_background):
        with pytest.raises(compiling.UnavailableError):
            call(source)
    monkeypatch.setenv(compiling.CACHE_VARIABLE, f"{os.devnull}/below")
    for call in (compiling.find, compiling.compile_in_background):
        with pytest.raises(compiling.UnavailableError):
            call(source)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(compiling.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiling.cache_folder() == tmp_path / "xdg" / "gpt-pipeline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiling.cache_folder() == tmp_path / ".cache" / "gpt-pipeline"


def test_without_a_compiler_there_is_a_reason(cache, source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(compiling.UnavailableError, match=r"no C\+\+ compiler"):
        compiling.find(source)
    with pytest.raises(compiling.UnavailableError, match=r"no C\+\+ compiler"):
        compiling.compile_in_background(source)
    with pytest.raises(RunError, match=r"answer\.cpp: cannot be compiled here: no C\+\+ compiler"):
        compiling.compile_and_wait(source)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(compiling.UnavailableError, match="no-such-compiler -m64"):
        compiling.find(source)


def test_a_failed_compilation_is_told_once_and_not_tried_again_at_once(cache, source, monkeypatch):
    source.write_text("this is no C++\n")
    with pytest.raises(RunError, match=r"answer\.cpp:1:1: error"):
        compiling.compile_and_wait(source)
    (failed,) = cache.glob("answer-*/failed.txt")
    assert "this is no C++" in failed.read_text()
    monkeypatch.setattr(compiling.subprocess, "Popen", pytest.fail)
    with pytest.raises(compiling.UnavailableError, match="failed before, see"):
        compiling.compile_in_background(source)
    monkeypatch.undo()
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(cache))
    day_before = time.time() - 2 * 24 * 3600
    os.utime(failed, (day_before, day_before))
    started = []
    monkeypatch.setattr(compiling.subprocess, "Popen", lambda *a, **k: started.append(a))
    compiling.compile_in_background(source)
    assert started


def test_the_background_compilation_needs_nobody_to_wait(cache, source):
    began = time.monotonic()
    compiling.compile_in_background(source)
    assert time.monotonic() - began < 1
    while not libraries(cache):
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert compiling.find(source).answer() == 42


def test_two_that_compile_at_once_both_get_the_library(cache, source):
    code = f"""
from pathlib import Path; from gpt.engine import compiling
print(compiling.compile_and_wait(Path({str(source)!r})).answer())
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in both] == ["42\n"] * 3
    assert len(libraries(cache)) == 1
    left = {path.name for path in cache.iterdir()}
    place = libraries(cache)[0].parent.name
    assert left == {place, f"{place}.lock"}


def test_a_background_compilation_leaves_it_to_one_that_runs(cache, source):
    place = compiling._place(source)
    compiling._own(cache)
    with (
        compiling._locked(place.with_suffix(".lock"), wait=False),
        pytest.raises(compiling.UnavailableError, match="being compiled"),
    ):
        compiling._build(source, wait=False)
    assert not libraries(cache)


def test_a_compiler_that_was_killed_leaves_nothing_that_is_taken_for_a_library(
    cache, source, monkeypatch, tmp_path
):
    """Half an output and a failure: what is under the final name says that it failed."""
    fake = tmp_path / "fake"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        'while [ "$1" != -o ]; do shift; done\nhead -c 5000 /dev/zero > "$2"\nkill -9 $$\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(RunError, match="exit code -9"):
        compiling.compile_and_wait(source)
    assert not libraries(cache)


def test_the_engine_ships_with_the_package():
    """`decode.cpp` lies beside the module: MLflow copies the folder."""
    assert decode.SOURCE.is_file()
    assert decode.SOURCE.parent == Path(decode.__file__).parent
