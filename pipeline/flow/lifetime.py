"""Flow runs that last as long as their process.

Each is noted in a scratch folder of its process. Of one that was killed the server that it had
started, or the next run, ends the flow run in Prefect.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import shutil
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from gpt.base.files import write_json
from pipeline.project.scratch import abandoned, scratch

_FLOW_RUN = "flow-run.json"


def note_flow_run(root: Path, run_id: str, api: str) -> None:
    """Let others know of a flow run that goes on as long as this process, and settle earlier ones.

    Args:
        root: the project.
        run_id: Prefect's.
        api: the address of its API.
    """
    settle(root, api)
    held = contextlib.ExitStack()
    with contextlib.suppress(OSError):  # it serves only a run that is killed
        folder = held.enter_context(scratch(root))
        write_json(folder / _FLOW_RUN, {"id": run_id, "api": api})
    atexit.register(held.close)  # not sooner: Prefect hears how it ended after all is done


def settle(root: Path, api: str) -> None:
    """End the flow runs of killed processes in Prefect, and remove what the processes left.

    What Prefect cannot be told now is left for the next time.

    Args:
        root: the project.
        api: the address of Prefect's API.
    """
    for folder in abandoned(root):
        try:
            note = json.loads((folder / _FLOW_RUN).read_text(encoding="utf-8"))
            settled = _end(note["id"], api) if _same_server(note["api"], api) else False
        except (OSError, ValueError, KeyError, TypeError):  # no flow run's
            settled = True
        if settled:
            shutil.rmtree(folder, ignore_errors=True)


def _same_server(one: str, other: str) -> bool:
    """The project's own server has another port each time."""
    return urlsplit(one).hostname == urlsplit(other).hostname


def _end(run_id: str, api: str) -> bool:
    """Let a flow run and its tasks that have no final state crash; whether Prefect took it."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Crashed

    crashed = Crashed(message="the process that ran it was killed")
    try:
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(uuid.UUID(run_id))
            if flow_run.state and flow_run.state.is_final():
                return True
            of_it = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
            for each in client.read_task_runs(flow_run_filter=of_it):
                if each.state and not each.state.is_final():
                    client.set_task_run_state(each.id, crashed, force=True)
            client.set_flow_run_state(flow_run.id, crashed, force=True)
    except ObjectNotFound:  # its history was removed
        return True
    except (httpx.HTTPError, RuntimeError):
        return False
    return True
