"""Failure notices: Prefect's automations send a message through a notification block (Slack,
e-mail, a webhook, …) when a flow run fails or is lost.

Import this module only when `pipeline.flow.prefect_api.environment` is in place: Prefect reads its
settings when it is imported.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from gpt.base.errors import InputError

NAME = "gpt-pipeline: a run failed"
_SUBJECT = "{{ flow.name }}: {{ flow_run.name }} {{ flow_run.state.name | lower }}"
_BODY = "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}"


def notify(block: str) -> bool:
    """Send a notification through a block whenever a flow run of the pipeline fails or crashes.

    A later call with another block replaces the first one.

    Args:
        block: `TYPE/NAME` of a block on the server, for example `slack-webhook/ops`.

    Returns:
        Whether the automation was created; otherwise an existing one was changed.

    Raises:
        InputError: there is no such block.
    """
    from prefect.client.orchestration import get_client
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    with get_client(sync_client=True) as client:
        try:
            document: Any = client.read_block_document_by_name(name, kind)
        except ObjectNotFound:
            raise InputError(
                f"{block}: the Prefect server has no such block; `prefect block ls` lists those it "
                "has, and its page Blocks makes one"
            ) from None
        automation = AutomationCore(
            name=NAME,
            description="Made by `gpt-pipeline notify`.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=[
                    {"prefect.resource.role": "flow", "prefect.resource.name": "gpt-pipeline*"}
                ],
                for_each={"prefect.resource.id"},
                posture=Posture.Reactive,
                threshold=1,
                within=timedelta(0),
            ),
            actions=[SendNotification(block_document_id=document.id, subject=_SUBJECT, body=_BODY)],
        )
        known = client.read_automations_by_name(NAME)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
    return not known
