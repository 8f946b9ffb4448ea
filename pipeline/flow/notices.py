"""Failure notices through Prefect's own notifications: a flow run that failed or was lost is told
to a block of the server (Slack, e-mail, a webhook, …).

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
    """Let a notification block hear of every flow run of the pipeline that fails or crashes.

    Called again with another block, that one hears of it instead.

    Args:
        block: `TYPE/NAME` of a block that the server has, as `slack-webhook/ops`.

    Returns:
        Whether this is new; else what was there was changed.

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
