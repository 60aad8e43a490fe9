"""The commands that suspend, resume and revoke a device."""

from __future__ import annotations

from typing import Any

import click

from commands.context import YES, Remote, command, confirm, require_confirmable
from commands.names import device_argument
from commands.output import moment, state, status_of, text

REASONS = (
    "unspecified",
    "key_compromise",
    "affiliation_changed",
    "superseded",
    "cessation_of_operation",
    "privilege_withdrawn",
)


REASON = click.option("--reason", type=click.Choice(REASONS), help="Reason (RFC 5280), which is published in the CRL.")


@command("suspend", examples=["portal suspend sensor-7"])
@device_argument()
@click.option("--yes", "-y", is_flag=True, expose_value=False, help="Accepted as by revoke; nothing is asked here.")
def suspend(portal: Remote, device_id: str) -> None:
    """Suspend a device until it is resumed.

    Its certificate is put on hold and its broker session is disconnected. portal resume reverses this, so there is no
    confirmation.
    """
    with portal.out.working("Suspending; waiting for the broker…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/suspend").json()
    show_outcome(portal, f"Suspended {device_id}", answer, "suspended_at")
    say_whether_enforced(portal, answer, "The broker has disconnected it, and refuses its certificate until resumed.")


@command("resume", examples=["portal resume sensor-7"])
@device_argument()
def resume(portal: Remote, device_id: str) -> None:
    """Resume a suspended device with its existing certificate."""
    with portal.out.working("Resuming; waiting for the broker…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/resume").json()
    show_outcome(portal, f"Resumed {device_id}", answer)
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))
    if answer.get("broker") != "enforced":
        portal.out.warning("The broker does not accept the device yet. The portal keeps trying; see: portal status")


@command(
    "revoke",
    examples=[
        "portal revoke sensor-7 --reason key_compromise",
        "portal revoke sensor-7 --yes",
    ],
)
@device_argument()
@REASON
@YES
def revoke(portal: Remote, device_id: str, reason: str | None, yes: bool) -> None:
    """Revoke a device permanently.

    Its certificate is revoked and its broker session is disconnected. This cannot be undone.
    """
    name = "" if yes else confirmed(portal, f"/devices/{device_id}")
    with portal.out.working("Revoking; waiting for the broker…"):
        answer = portal.client.call("POST", f"/revoke/{device_id}", body={"reason": reason} if reason else {}).json()
    show_outcome(portal, f"Revoked {name or device_id}", answer, "revoked_at", "reason")
    say_whether_changed(portal, answer, reason)
    say_whether_enforced(portal, answer, "The broker has disconnected it, and refuses its certificate.")


def confirmed(portal: Remote, path: str, *, kind: str = "device") -> str:
    """Ask whether to revoke the device, or other client, at ``path``, unless it is revoked; returns its name."""
    require_confirmable()
    client = portal.client.get(path)
    name = str(client.get("name") or "")
    if client.get("status") != "revoked":
        portal.out.question({"Name": text(name), "Id": text(path.rpartition("/")[2])})
        confirm(f"Revoke this {kind}? This cannot be undone.", yes=False)
    return name


def show_outcome(portal: Remote, done: str, answer: dict[str, Any], *more: str, about: str = "device_id") -> None:
    """Show the answer to a change that the broker has to obey, with the fields ``more``."""
    fields = {about: text(answer.get(about)), "status": status_of(answer)}
    for name in more:
        value = answer.get(name)
        fields[name] = moment(value) if name.endswith("_at") else text(value)
    portal.out.result(answer, fields | {"broker": state(answer.get("broker"))}, done=done)


def say_whether_changed(portal: Remote, answer: dict[str, Any], reason: str | None) -> None:
    """Say that a client which was revoked before keeps its reason, if another one was asked for."""
    kept = str(answer.get("reason") or "unspecified")
    if reason is not None and reason != kept:
        portal.out.note(f"It was revoked before, and the reason stays {kept}: only a worse one takes its place.")


def say_whether_enforced(portal: Remote, answer: dict[str, Any], enforced: str, *, kind: str = "device") -> None:
    """Say ``enforced``, or warn that a device, or other client, may still be connected."""
    if answer.get("broker") == "enforced":
        portal.out.note(enforced)
        return
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))
    portal.out.warning(
        f"THE BROKER DOES NOT ENFORCE THIS YET: the {kind} may still be connected. "
        "The portal keeps trying; for the cause, see: portal status"
    )
