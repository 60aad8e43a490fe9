"""The commands about devices that enrol by themselves: expected, waiting, approved, rejected."""

from __future__ import annotations

import re
from typing import Any

import click

from commands.context import (
    DEVICE_ID,
    Command,
    Portal,
    confirm,
    metadata_from,
    require,
    require_confirmable,
    topics_from,
)
from commands.output import moment, state, text

_FINGERPRINT = re.compile("[0-9a-f]{64}")


@click.command(
    "expect",
    cls=Command,
    examples=["portal expect pump-9 --type pump --location 'Hall 2' --firmware 1.0"],
)
@click.argument("name", help="What people call it.")
@click.option("--type", "type_", metavar="TYPE", required=True, help="What kind of device it is.")
@click.option("--location", metavar="PLACE", required=True, help="Where it stands.")
@click.option("--firmware", metavar="VERSION", required=True, help="The firmware that it runs.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="More about it; may be repeated.")
@click.option("--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="In place of its own; may be repeated.")
@click.pass_obj
def expect(
    portal: Portal,
    name: str,
    type_: str,
    location: str,
    firmware: str,
    metadata: tuple[str, ...],
    topics: tuple[str, ...],
) -> None:
    """Make a device known that enrols by itself later."""
    body: dict[str, Any] = {"name": name, "type": type_, "location": location, "firmware": firmware}
    body["metadata"] = metadata_from(metadata)
    if topics:
        body["topics"] = topics_from(topics)
    # Not repeated where the connection breaks: that would make a second device.
    answer = portal.client.call("POST", "/devices", body=body, repeatable=False).json()
    require(answer, "device_id")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Expecting {name} as {answer['device_id']}")
    portal.out.fields({"device_id": text(answer["device_id"]), "status": state(answer.get("status"))})
    portal.out.next_step(f"portal enrolment create NAME --device {answer['device_id']}")


@click.command("waiting", cls=Command, examples=["portal waiting"])
@click.pass_obj
def waiting(portal: Portal) -> None:
    """List the devices that wait for an operator, longest first.

    Piped, each is a line: device id, name, whether it is in and brings another key (again) or is new, since when,
    enrolment token or manufacturer, fingerprint of its key.
    """
    answer = portal.client.get("/enrolments")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    rows = [row for row in answer.get("enrolments") or () if isinstance(row, dict)]
    portal.out.table(
        ("id", "name", "asks", "since", "by", "key"),
        [
            (
                text(row.get("device_id")),
                text(row.get("name")),
                text("again" if row.get("again") else "new"),
                moment(row.get("asked_at"), short=True),
                text(row.get("enrolment_token_id") or row.get("manufacturer_id")),
                text(row.get("key_fingerprint")),
            )
            for row in rows
        ],
        empty="No device waits for an operator.",
        spare=("by", "key"),
    )
    if rows:
        portal.out.next_step("portal approve ID")


class Fingerprint(click.ParamType[str]):
    """The SHA-256 of a device's key."""

    name = "fingerprint"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return 64 lower-case hex digits; colons, as openssl has them, are left out."""
        digits = value.strip().lower().replace(":", "")
        if _FINGERPRINT.fullmatch(digits) is None:
            self.fail("a key's fingerprint has 64 hexadecimal digits.", param, ctx)
        return digits


@click.command(
    "approve",
    cls=Command,
    examples=[
        "portal approve 0f9d2c4e-5b1a-4c7d-9e8f-102030405060",
        'portal approve 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --key "$(cat key.sha256)"',
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full (portal waiting).")
@click.option("--key", type=Fingerprint(), metavar="SHA256", help="Only this key, with no question.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def approve(portal: Portal, device_id: str, key: str | None, yes: bool) -> None:
    """Let a device in that has asked, with the key you have seen.

    Compare the fingerprint with the device: it is the SHA-256 of its public key (SubjectPublicKeyInfo, DER).
    """
    if key is None:
        key = _looked_at(portal, device_id, yes=yes)
    answer = portal.client.call("POST", f"/devices/{device_id}/approve", body={"key_fingerprint": key}).json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Approved {device_id}")
    portal.out.note("It gets its certificate when it asks again.")


def _looked_at(portal: Portal, device_id: str, *, yes: bool) -> str:
    """The key that a device has asked with, once somebody has said yes to it: no other key is approved then."""
    if not yes:
        require_confirmable()
    asked = portal.client.get(f"/devices/{device_id}/enrolment")
    require(asked, "key_fingerprint")
    if not yes:
        fields = {"Device id": text(device_id), "Key": text(asked["key_fingerprint"])}
        fields["By"] = text(asked.get("enrolment_token_id") or asked.get("manufacturer_id"))
        portal.out.question(fields)
        if asked.get("again"):
            portal.out.warning("The device is in. Its certificates end once it has one for this key.")
        confirm("Is this the device's key?", yes=False)
    return str(asked["key_fingerprint"])


@click.command("reject", cls=Command, examples=["portal reject 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --yes"])
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full (portal waiting).")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def reject(portal: Portal, device_id: str, yes: bool) -> None:
    """Turn down a device that waits, or its other key, for good."""
    confirm(f"Reject {device_id}? A pending device is out for good; one that is in keeps what it has.", yes=yes)
    answer = portal.client.call("POST", f"/devices/{device_id}/reject").json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    if answer.get("status") == "revoked":
        portal.out.done(f"Rejected {device_id}, for good")
    else:
        portal.out.done(f"Rejected the other key of {device_id}, which stays in")
