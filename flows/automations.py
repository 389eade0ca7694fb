"""What the Prefect server watches by itself: runs that failed, runs that went silent, and how many may train at once."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from prefect.automations import Automation
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from flows.prefect_call import GPU_TAG

if TYPE_CHECKING:
    from uuid import UUID

TAG = "t2i"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
WEBHOOK = "t2i-failures"
MESSAGE = (
    '{"text": "{{ flow.name }} run {{ flow_run.name }} is {{ flow_run.state.name }}", "run": "{{ flow_run|ui_url }}"}'
)
OURS: Any = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
ANY_RUN: Any = {"prefect.resource.id": "prefect.flow-run.*"}


def provision(gpu_slots: int, notify: str | None, silent_seconds: float = 600.0) -> None:
    """Make the server's limits and automations what they should be; asking twice changes nothing."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(f"tag:{GPU_TAG}", gpu_slots)
    _replace(silence(silent_seconds))
    if notify is not None:
        saved: Any = Webhook(url=notify).save(WEBHOOK, overwrite=True)
        _replace(notification(saved))


def silence(seconds: float) -> Automation:
    """A run whose heartbeat stops without an end has lost its process: call it crashed, so that it can be retried."""
    trigger = EventTrigger(
        after={HEARTBEAT}, expect={HEARTBEAT, *ENDED}, match=ANY_RUN, match_related=OURS,
        for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1, within=timedelta(seconds=seconds),
    )  # fmt: skip
    crashed = ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {seconds:.0f} s; retry is safe")
    return Automation(name="t2i: silent runs are crashed", trigger=trigger, actions=[crashed])


def notification(webhook: UUID) -> Automation:
    """Post to a webhook when a run fails or crashes."""
    trigger = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, match=ANY_RUN, match_related=OURS,
        for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1,
    )  # fmt: skip
    call = CallWebhook(block_document_id=webhook, payload=MESSAGE)
    return Automation(name="t2i: failures are told", trigger=trigger, actions=[call])


def _replace(automation: Automation) -> None:
    """One automation of a name, with today's settings."""
    try:
        found: Any = Automation.read(name=automation.name)
    except (ObjectNotFound, ValueError):
        automation.create()
        return
    found.model_copy(update={"trigger": automation.trigger, "actions": automation.actions}).update()
