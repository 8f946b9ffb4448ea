"""The worker of an agent: Prefect's process worker, restricted to one command.

Anyone with access to the Prefect server can create deployments, flow runs, work pools and blocks,
and Prefect's own worker starts any command that they name. This worker takes no command,
environment or folder from the server, and loads no flow: `pipeline.flow.agent_start` runs what the
commit's `prefect.yaml` defines, and refuses anything else.

Import this module only in a separate process: Prefect reads its settings when it is imported.
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
        """A fixed configuration: that of the work pool, deployment and flow run is ignored."""
        return cls(command=COMMAND)


class AgentWorker(ProcessWorker):  # type: ignore[misc]
    """Starts the agent's own command for each flow run."""

    job_configuration = _Configuration

    @classmethod
    def __dispatch_key__(cls) -> str:
        return "gpt-pipeline"  # registers beside Prefect's own type, without replacing it


async def _flow_without_hooks(_: object) -> Flow[[], None]:
    return Flow(lambda: None, name="gpt-pipeline")


def work(pool: str, name: str, runs: int) -> None:
    """Take flow runs from the work pool until this process ends.

    Args:
        pool: the work pool.
        name: the name of the worker.
        runs: how many flow runs are executed at the same time.
    """
    # a worker that outlived its agent would compete with the next agent's worker
    watch_parent(os.getppid(), lambda: os._exit(1))
    # to run the hooks of a crashed or cancelled flow run, Prefect's worker would load the
    # deployment's flow, pull steps included, in this process
    process.load_flow_from_flow_run = _flow_without_hooks
    anyio.run(AgentWorker(pool, name=name, limit=runs).start)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
