"""The commands that revoke, suspend and resume a device."""

from __future__ import annotations

from typing import Any

import click

from commands.context import DEVICE_ID, Command, Portal, confirm, require_confirmable
from commands.output import moment, state, text

REASONS = (
    "unspecified",
    "key_compromise",
    "affiliation_changed",
    "superseded",
    "cessation_of_operation",
    "privilege_withdrawn",
)


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


@click.command(
    "revoke",
    cls=Command,
    examples=[
        "portal revoke 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --reason key_compromise",
        "portal revoke 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --yes",
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.option("--reason", type=click.Choice(REASONS), help="Why (RFC 5280); it is published in the CRL.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def revoke(portal: Portal, device_id: str, reason: str | None, yes: bool) -> None:
    """Put a device out, for good.

    Its certificate is revoked, its session at the broker is cut. This cannot be undone.
    """
    name = ""
    if not yes:
        require_confirmable()
        device = portal.client.get(f"/devices/{device_id}")
        name = str(device.get("name") or "")
        if device.get("status") != "revoked":
            portal.out.question({"Name": text(name), "Id": text(device_id)})
            confirm("Revoke this device? It cannot be undone.", yes=False)
    with portal.out.working("Revoking, until the broker obeys…"):
        answer = portal.client.call("POST", f"/revoke/{device_id}", body={"reason": reason} if reason else {}).json()
    if portal.out.as_json:
        portal.out.json(answer)
    else:
        portal.out.done(f"Revoked {name or device_id}")
        portal.out.fields(
            {
                "device_id": text(answer.get("device_id")),
                "status": state(answer.get("status")),
                "revoked_at": moment(answer.get("revoked_at")),
                "reason": text(answer.get("reason")),
                "broker": state(answer.get("broker")),
            }
        )
    if answer.get("broker") != "enforced":
        if answer.get("broker_problem"):
            portal.out.warning(str(answer["broker_problem"]))
        portal.out.warning(
            "THE BROKER DOES NOT ENFORCE THIS YET: the device may still be connected. "
            "The portal goes on trying; see what keeps it with: portal status"
        )
    else:
        portal.out.note("The broker has cut its session, and refuses its certificate.")
