"""The commands that suspend, resume and revoke a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.context import Remote, command, confirm, require_confirmable
from commands.many import Act, act_on_many, many_devices, single
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


@command(
    "suspend",
    examples=["portal suspend sensor-7", "portal suspend --location 'Hall 2' --results suspended.ndjson"],
)
@many_devices
def suspend(portal: Remote, /, devices: tuple[str, ...], results: Path | None, yes: bool, **filters: Any) -> None:
    """Suspend devices until they are resumed.

    The certificates are put on hold and the broker sessions are disconnected. portal resume reverses this, so there is
    no confirmation for a single one.
    """
    device_id = single(portal, devices, filters, results)
    if device_id is None:
        act = Act("suspend", "Suspend", "Suspending", "Suspended", "suspended")
        act_on_many(portal, act, devices, filters, results, yes=yes)
        return
    with portal.out.working("Suspending; waiting for the broker…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/suspend", repeatable=True).json()
    show_outcome(portal, f"Suspended {devices[0]}", answer, "suspended_at")
    say_whether_enforced(portal, answer, "The broker has disconnected it, and refuses its certificate until resumed.")


@command("resume", examples=["portal resume sensor-7", "portal resume --status suspended --location 'Hall 2'"])
@many_devices
def resume(portal: Remote, /, devices: tuple[str, ...], results: Path | None, yes: bool, **filters: Any) -> None:
    """Resume suspended devices with their existing certificates."""
    device_id = single(portal, devices, filters, results)
    if device_id is None:
        act = Act("resume", "Resume", "Resuming", "Resumed", "active")
        act_on_many(portal, act, devices, filters, results, yes=yes)
        return
    with portal.out.working("Resuming; waiting for the broker…"):
        answer = portal.client.call("POST", f"/devices/{device_id}/resume", repeatable=True).json()
    show_outcome(portal, f"Resumed {devices[0]}", answer)
    if answer.get("broker_problem"):
        portal.out.warning(str(answer["broker_problem"]))
    if answer.get("broker") != "enforced":
        portal.out.warning("The broker does not accept the device yet. The portal keeps trying; see: portal status")


@command(
    "revoke",
    examples=[
        "portal revoke sensor-7 --reason key_compromise",
        "portal revoke sensor-7 --yes",
        "portal revoke --type meter --metadata site=north --results revoked.ndjson",
        "cut -f1 stolen.txt | portal revoke - --reason key_compromise --yes",
    ],
)
@many_devices
@REASON
def revoke(
    portal: Remote,
    /,
    devices: tuple[str, ...],
    results: Path | None,
    yes: bool,
    reason: str | None,
    **filters: Any,
) -> None:
    """Revoke devices permanently.

    The certificates are revoked and the broker sessions are disconnected. This cannot be undone.
    """
    device_id = single(portal, devices, filters, results)
    if device_id is None:
        act = Act("revoke", "Revoke", "Revoking", "Revoked", "revoked", {"reason": reason} if reason else {})
        act_on_many(portal, act, devices, filters, results, yes=yes)
        return
    name = "" if yes else confirmed(portal, f"/devices/{device_id}")
    with portal.out.working("Revoking; waiting for the broker…"):
        answer = portal.client.call(
            "POST", f"/revoke/{device_id}", body={"reason": reason} if reason else {}, repeatable=True
        ).json()
    show_outcome(portal, f"Revoked {name or devices[0]}", answer, "revoked_at", "reason")
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
        fields[name] = moment(value) if name.endswith(("_at", "_after")) else text(value)
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
