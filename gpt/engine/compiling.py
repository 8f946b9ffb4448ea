"""Compiles C++ once on the machine that runs it, and keeps the library in the user's cache folder.

A library's name is the sha256 of all its inputs: the source, the compiler's version, its flags
and the CPU's name and features. So an outdated library is never found. This module does not
import torch, so that the background process that compiles starts quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from gpt.base.errors import RunError
from gpt.base.files import sha256_of, whole_directory

if os.name != "nt":
    import fcntl

CACHE_VARIABLE = "GPT_PIPELINE_CACHE"
"""The environment variable that names another cache folder."""

# No -ffast-math: it would let the compiler undo the rounding tricks of `exp` and remove NaN
# checks. Vectors and the order of sums are explicit in the source, so there is nothing to gain.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-ffp-contract=fast"),
)
_COMPILERS = ("c++", "g++", "clang++")
_LIBRARY, _CHECKSUM, _FAILED = "library.so", "library.sha256", "failed.txt"
_RETRY_AFTER_SECONDS = 24 * 3600.0
"""How long to wait after a failed compilation before trying again: the cause may be temporary,
such as a full disk."""
_LIMIT_SECONDS = 300.0


class UnavailableError(RuntimeError):
    """No library is available now; the message is a clause that says why."""


def cache_folder() -> Path:
    """The folder of the libraries; it may not exist yet.

    Raises:
        UnavailableError: the user has no home folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).absolute()
    folder = platformdirs.user_cache_path("gpt-pipeline")
    if not folder.is_absolute():
        raise UnavailableError(f"no home folder for a cache ({folder})")
    return folder


def find(source: Path) -> ctypes.CDLL:
    """The compiled library of `source`, if it is in the cache; never waits for a compiler.

    Raises:
        UnavailableError: it is missing, or others could have written it.
    """
    return _load(_place(source))


def compile_in_background(source: Path) -> None:
    """Start a process of low priority that compiles `source` and may outlive this one.

    Raises:
        UnavailableError: compiling is impossible, or failed recently.
    """
    place = _place(source)
    failed = place / _FAILED
    with contextlib.suppress(OSError):
        if time.time() - failed.stat().st_mtime < _RETRY_AFTER_SECONDS:
            raise UnavailableError(f"the compiler failed before, see {failed}")
    _own(place.parent)
    # A new interpreter may not find the package by itself.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from gpt.engine.compiling import _child; _child()"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent.parent.parent), str(source)]
    try:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C and a closed terminal do not reach it
        )
    except OSError as error:
        raise UnavailableError(f"no process to compile in ({error})") from None


def compile_and_wait(source: Path) -> ctypes.CDLL:
    """The library of `source`, compiled now if it is not in the cache.

    Raises:
        RunError: it cannot be compiled or loaded.
    """
    try:
        return _build(source)
    except UnavailableError as error:
        raise RunError(
            f"{source.name}: cannot be compiled here: {error}; install a C++ compiler "
            "(g++ or clang++, with OpenMP), or leave the engine at auto"
        ) from None


def _child() -> None:
    """The background process: it uses only idle CPU time and prints nothing."""
    os.nice(19)
    if sys.platform == "linux":  # niceness alone would still let it preempt threads
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(UnavailableError):
        _build(Path(sys.argv[2]), wait=False)


def _build(source: Path, wait: bool = True) -> ctypes.CDLL:
    place = _place(source)
    with contextlib.suppress(UnavailableError):
        return _load(place)
    _own(place.parent)
    try:
        with _locked(place.with_suffix(".lock"), wait):
            with contextlib.suppress(UnavailableError):
                return _load(place)  # another process compiled it in the meantime
            _compile(source, place)
            return _load(place)
    except OSError as error:
        raise UnavailableError(f"{place.parent}: {error.strerror or error}") from None


def _compile(source: Path, place: Path) -> None:
    compiler = _compiler()
    with whole_directory(place) as partial:
        library = partial / _LIBRARY
        command = [*compiler, *_FLAGS, "-o", str(library), str(source)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"{compiler[0]}: {error}") from None
        if done.returncode == 0:
            for path in (partial, library):  # whatever the umask
                path.chmod(0o700)
            (partial / _CHECKSUM).write_text(sha256_of(library) + "\n", encoding="ascii")
            return
    first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
    with whole_directory(place) as partial:
        said = f"{shlex.join(command)}\n{done.stderr}"
        (partial / _FAILED).write_text(said, encoding="utf-8")
    raise UnavailableError(f"{compiler[0]}: {first}")


def _load(place: Path) -> ctypes.CDLL:
    library = place / _LIBRARY
    try:
        for path in (place.parent, place, library):
            _check_own(path)
        # loading a truncated library would not raise an error but crash the process
        whole = (place / _CHECKSUM).read_text(encoding="ascii").strip() == sha256_of(library)
    except (FileNotFoundError, NotADirectoryError):
        raise UnavailableError("not compiled yet") from None
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{library}: {error}") from None
    if not whole:
        raise UnavailableError(f"{library}: damaged")
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnavailableError(f"{library}: {error}") from None


def _check_own(path: Path) -> None:
    """Refuse to load `path` if another user could have written it."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise UnavailableError(f"{path}: belongs to someone else")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnavailableError(f"{path}: others may write there")


def _own(folder: Path) -> None:
    """Make the cache folder, private to the user; refuse one that others can write to."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_own(folder)
    except OSError as error:
        raise UnavailableError(f"{folder}: {error.strerror}") from None


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[None]:
    """A lock: one process compiles, the others wait or give up. It is released when the process
    ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UnavailableError("being compiled") from None
        yield


def _place(source: Path) -> Path:
    """The folder of the library of `source`, whether or not it exists.

    Raises:
        UnavailableError: no compiler, or no cache folder. A cached library cannot be found without
            a compiler, whose version is part of the name.
    """
    if os.name == "nt":
        raise UnavailableError("not on Windows")
    folder = cache_folder()
    try:
        content = source.read_bytes()
    except OSError as error:
        raise UnavailableError(f"{source}: {error.strerror}") from None
    made_of = "\0".join([_version(tuple(_compiler())), *_FLAGS, _cpu()])
    key = hashlib.sha256(content + made_of.encode()).hexdigest()
    return folder / f"{source.stem}-{key[:32]}"


def _compiler() -> list[str]:
    """The command that compiles C++: $CXX, or the first that is found.

    Raises:
        UnavailableError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise UnavailableError(f"no C++ compiler ({' '.join(named) or ', '.join(_COMPILERS)})")


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(f"{compiler[0]}: {error}") from None
    return " ".join(compiler) + "\n" + done.stdout


@functools.cache
def _cpu() -> str:
    """The CPU's name and features, which `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.release()}"
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return "\n".join([platform.machine(), *sorted(kept)])
