"""The commands for a device's way through its life."""

from __future__ import annotations

from typing import Any

import click

from cli_context import DEVICE_ID, Command, Portal
from cli_output import moment, state, text


@click.command("suspend", cls=Command, examples=["portal suspend 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def suspend(portal: Portal, device_id: str) -> None:
    """Put a device out until it is resumed.

    Its certificate is put on hold, its session at the broker is cut. portal resume undoes it.
    """
    with portal.out.working("Suspending, until the broker obeys…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/suspend").json()
    _show(portal, answer, done="Suspended")
    if answer.get("broker") == "enforced":
        portal.out.note("The broker has cut its session, and refuses its certificate until you resume it.")
    else:
        portal.out.warning(
            "THE BROKER DOES NOT ENFORCE THIS YET: the device may still be connected. "
            "The portal goes on trying; see what keeps it with: portal status"
        )


@click.command("resume", cls=Command, examples=["portal resume 0f9d2c4e-5b1a-4c7d-9e8f-102030405060"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.pass_obj
def resume(portal: Portal, device_id: str) -> None:
    """Let a suspended device back in, with what it has."""
    with portal.out.working("Resuming, until the broker knows…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/resume").json()
    _show(portal, answer, done="Resumed")
    if answer.get("broker") != "enforced":
        portal.out.warning("The broker does not know this yet; the portal goes on trying. See: portal status")


def _show(portal: Portal, answer: dict[str, Any], *, done: str) -> None:
    if portal.out.as_json:
        portal.out.json(answer)
    else:
        portal.out.done(f"{done} {answer.get('device_id')}")
        fields = {"device_id": text(answer.get("device_id")), "status": state(answer.get("status"))}
        if answer.get("suspended_at"):
            fields["suspended_at"] = moment(answer.get("suspended_at"))
        portal.out.fields(fields | {"broker": state(answer.get("broker"))})
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))
