"""Where a project keeps what several checkouts of it share: DVC's experiments, sweeps, an agent.

Resume states, downloads and MLflow's database belong to the project and not to one checkout, so
that a training that was stopped in one goes on in another, and all runs stand in one place.
"""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "GPT_PIPELINE_HOME"
_DVC_ROOT = "DVC_ROOT"


def shared_folder(root: Path) -> Path:
    """The folder with the shared things of the checkout `root`: mostly `root` itself.

    `GPT_PIPELINE_HOME` names another one. Within a stage that DVC starts it is the folder that DVC
    was started in: an experiment (`dvc exp run --queue`) runs in a copy that is removed afterwards.
    """
    named = os.environ.get(HOME_VARIABLE) or os.environ.get(_DVC_ROOT)
    return Path(named).resolve() if named else root.resolve()


def workspace_environment(project: Path, folder: Path) -> dict[str, str]:
    """Variables for a process that works in a workspace: its code, and what it shares."""
    others = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), others])),
        HOME_VARIABLE: str(shared_folder(project)),
    }
