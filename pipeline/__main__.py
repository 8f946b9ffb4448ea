"""`python -m pipeline`: the command line.

`dvc repro` runs its stages with whatever `python` the shell finds first. Where that one lacks the
project's packages (`.venv/bin/dvc repro` from a shell without the environment), the project's own
environment takes over.
"""

import importlib.util
import os
import sys
from pathlib import Path


def start() -> None:
    """Run the command line, in the project's environment if this Python is another one."""
    if importlib.util.find_spec("typer") is None:
        environment = Path(__file__).resolve().parent.parent / ".venv"
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if Path(sys.prefix) != environment and python.exists():
            os.execv(python, [str(python), "-m", "pipeline", *sys.argv[1:]])
        sys.exit("error: this Python lacks the project's packages; `make run` installs them")

    from pipeline.cli import main

    main()


if __name__ == "__main__":
    start()
