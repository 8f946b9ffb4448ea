"""The worker of an agent: Prefect's for processes, which starts one command only.

Anyone with access to the Prefect server can write deployments, flow runs, the work pool and blocks
there, and Prefect's own worker starts any command that they name. This one takes no command,
environment or folder from the server, and loads no flow: `pipeline.flow.agent_start` does what the
commit's `prefect.yaml` holds, or refuses.

Import this module only in a process of its own: Prefect reads its settings when it is imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Self

import anyio
from prefect import Flow
from prefect.workers import process
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from pipeline.flow.agent_start import COMMAND
from pipeline.project.processes import watch_parent


class _Configuration(ProcessJobConfiguration):  # type: ignore[misc]
    @classmethod
    async def from_template_and_values(cls, *_: Any, **__: Any) -> Self:
        """The same, whatever the work pool, the deployment and the flow run say."""
        return cls(command=COMMAND)


class AgentWorker(ProcessWorker):  # type: ignore[misc]
    """Starts the agent's own command for each flow run."""

    job_configuration = _Configuration

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "gpt-pipeline"  # in Prefect's table of workers, not in the place of its own


async def _flow_without_hooks(_: object) -> Flow[[], None]:
    return Flow(lambda: None, name="gpt-pipeline")


def work(pool: str, name: str, runs: int) -> None:
    """Take flow runs until this process is ended.

    Args:
        pool: the work pool.
        name: of the worker.
        runs: flow runs at the same time.
    """
    # a worker without its agent would compete with that of the next agent
    watch_parent(os.getppid(), lambda: os._exit(1))
    # for the hooks of a flow run that crashed or was cancelled, a worker would load the flow of the
    # deployment, with its pull steps, in its own process
    process.load_flow_from_flow_run = _flow_without_hooks
    anyio.run(AgentWorker(pool, name=name, limit=runs).start)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
