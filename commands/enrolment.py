"""The commands about devices that enrol by themselves: tokens, manufacturers, expected and waiting devices."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any

import click

from commands.context import (
    DEVICE_ID,
    Command,
    Portal,
    confirm,
    make_with_secret,
    metadata_from,
    new_secret_file,
    require,
    require_confirmable,
    topics_from,
)
from commands.errors import Misused
from commands.files import read_input
from commands.output import Cell, moment, state, text
from commands.registration import KEY_TYPES

_ID = re.compile("[0-9a-f]{16}")


class MeansId(click.ParamType[str]):
    """The id of an enrolment token or of a manufacturer, in full."""

    name = "id"

    def __init__(self, listed_by: str) -> None:
        self.listed_by = listed_by

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the id, without showing a value that is none: it may be a secret."""
        text = value.strip().lower()
        if _ID.fullmatch(text) is None:
            self.fail(f"an id is given in full, as {self.listed_by} shows it.", param, ctx)
        return text


_OPTIONS = (
    click.option("--type", "type_", metavar="TYPE", help="What kind of device it is; device if not given."),
    click.option("--location", metavar="PLACE", help="Where it stands."),
    click.option("--firmware", metavar="VERSION", help="The firmware that it runs."),
    click.option(
        "--name-template",
        metavar="NAME",
        help="Its name; {serial} stands for its own number, {number} counts the devices of a token.",
    ),
    click.option("--key-type", "key_types", type=click.Choice(KEY_TYPES), multiple=True, help="Allowed. Repeatable."),
    click.option("--days", type=click.IntRange(1, 36500), metavar="DAYS", help="Life of its certificate."),
    click.option("--approval", type=click.Choice(("at_once", "operator")), help="Who decides; at_once if not given."),
)


def terms_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what becomes of the devices that are let in; ``terms_from`` reads them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def terms_from(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request for the options that were given."""
    names = {"type_": "type", "days": "validity_days"}
    given = {names.get(name, name): value for name, value in options.items() if value not in (None, ())}
    if "key_types" in given:
        given["key_types"] = list(given["key_types"])
    return given


def terms_fields(answer: dict[str, Any]) -> dict[str, Cell]:
    """The same as an answer has them, to be shown."""
    plain = ("type", "location", "firmware", "name_template", "validity_days", "approval")
    fields = {name: text(answer.get(name)) for name in plain}
    return fields | {"key_types": text(" ".join(map(str, answer.get("key_types") or ())))}


ENROLMENT_TOKEN_ID = MeansId("portal enrolment list")


@click.group("enrolment")
def enrolment() -> None:
    """Enrolment tokens for devices: list, create, revoke."""


@enrolment.command("list", cls=Command, examples=["portal enrolment list"])
@click.pass_obj
def enrolment_list(portal: Portal) -> None:
    """List enrolment tokens, newest first.

    Piped, each is a line: id, name, the one device it is for, uses, uses allowed, approval, expiry, revoked.
    """
    answer = portal.client.get("/enrolment-tokens")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.table(
        ("id", "name", "device", "used", "of", "approval", "expires", "revoked"),
        [
            (
                text(row.get("enrolment_token_id")),
                text(row.get("name")),
                text(row.get("device_id")),
                text(row.get("uses")),
                text(row.get("count")),
                text(row.get("approval")),
                moment(row.get("expires_at"), expiry=True, short=True),
                moment(row.get("revoked_at"), short=True),
            )
            for row in answer.get("enrolment_tokens") or ()
            if isinstance(row, dict)
        ],
        empty="There is no enrolment token yet.",
        spare=("device", "approval"),
    )


@enrolment.command(
    "create",
    cls=Command,
    examples=[
        "portal enrolment create pump-9 --device 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --token-out pump-9.token",
        "portal enrolment create line-4 --count 500 --hours 72 --type pump --name-template 'pump {serial}'",
    ],
)
@click.argument("name", help="What it is for, as the record will show it.")
@click.option("--device", "device_id", metavar="ID", type=DEVICE_ID, help="The pending device that it is for.")
@click.option("--count", type=click.IntRange(1, 1000000), metavar="N", help="For so many new devices; 1 if not given.")
@click.option("--hours", type=click.IntRange(1, 8760), metavar="HOURS", help="How long it lasts; 24 if not given.")
@terms_options
@click.option("--token-out", metavar="FILE", help="New file (0600) for the token.")
@click.pass_obj
def enrolment_create(
    portal: Portal,
    /,
    name: str,
    device_id: str | None,
    count: int | None,
    hours: int | None,
    token_out: str | None,
    **terms: Any,
) -> None:
    """Make an enrolment token, which is shown once.

    For one device that portal expect has made known (--device), or for new ones.
    """
    path = new_secret_file(token_out, "--token-out", "token", out=portal.out)
    given = {"name": name, "device_id": device_id, "count": count, "expires_in_hours": hours}
    body = {field: value for field, value in given.items() if value is not None} | terms_from(terms)
    answer = make_with_secret(
        portal, "/enrolment-tokens", body, shown_once="token", into=path, needs=("enrolment_token_id",)
    )
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Made the enrolment token {name}")
    whom = "device_id" if answer.get("device_id") else "count"
    fields = {name: text(answer.get(name)) for name in ("enrolment_token_id", whom)}
    fields |= terms_fields(answer) | {"expires_at": moment(answer.get("expires_at"), expiry=True)}
    if path is None:
        fields["token"] = Cell(str(answer["token"]), style="bold")
    portal.out.fields(fields)
    portal.out.note(f"It is in {path}." if path else "The token is shown this once.")


@enrolment.command("revoke", cls=Command, examples=["portal enrolment revoke 1e66977361d81fe2"])
@click.argument("token_id", metavar="ID", type=ENROLMENT_TOKEN_ID, help="The token's id (portal enrolment list).")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def enrolment_revoke(portal: Portal, token_id: str, yes: bool) -> None:
    """End an enrolment token; who has enrolled by it stays in."""
    confirm(f"Revoke the enrolment token {token_id}? No device enrols by it any more.", yes=yes)
    answer = portal.client.call("DELETE", f"/enrolment-tokens/{token_id}").json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Revoked the enrolment token {answer.get('name') or token_id}")


MANUFACTURER_ID = MeansId("portal manufacturer list")


@click.group("manufacturer")
def manufacturer() -> None:
    """Manufacturers' CAs: list, show, add, prove, remove."""


@manufacturer.command("list", cls=Command, examples=["portal manufacturer list"])
@click.pass_obj
def manufacturer_list(portal: Portal) -> None:
    """List manufacturers, newest first.

    Piped, each is a line: id, name, status, approval, end of the CA, fingerprint of its certificate.
    """
    answer = portal.client.get("/manufacturers")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.table(
        ("id", "name", "status", "approval", "expires", "fingerprint"),
        [
            (
                text(row.get("manufacturer_id")),
                text(row.get("name")),
                state(row.get("status")),
                text(row.get("approval")),
                moment(row.get("not_after"), expiry=True, short=True),
                text(row.get("fingerprint")),
            )
            for row in answer.get("manufacturers") or ()
            if isinstance(row, dict)
        ],
        empty="There is no manufacturer yet.",
        spare=("approval", "fingerprint"),
        whole=("status",),
    )


@manufacturer.command("show", cls=Command, examples=["portal manufacturer show 1e66977361d81fe2"])
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The manufacturer's id.")
@click.pass_obj
def manufacturer_show(portal: Portal, manufacturer_id: str) -> None:
    """Show a manufacturer, with the nonce that its CA is to sign."""
    _show(portal, portal.client.get(f"/manufacturers/{manufacturer_id}"))


@manufacturer.command(
    "add",
    cls=Command,
    examples=["portal manufacturer add acme --certificate acme-ca.pem --type pump --name-template 'pump {serial}'"],
)
@click.argument("name", help="What it is called, as the record will show it.")
@click.option("--certificate", metavar="FILE", required=True, help="Its CA's certificate, PEM; - for standard input.")
@terms_options
@click.pass_obj
def manufacturer_add(portal: Portal, /, name: str, certificate: str, **terms: Any) -> None:
    """Add a manufacturer's CA; it lets nobody in before its proof."""
    body = {"name": name, "certificate": _pem(certificate)} | terms_from(terms)
    answer = portal.client.call("POST", "/manufacturers", body=body, repeatable=False).json()
    require(answer, "manufacturer_id", "nonce")
    _show(portal, answer, done=f"Added {name}, which lets nobody in yet")
    portal.out.note("Have the CA sign the nonce:")
    portal.out.note(f"  printf %s {answer['nonce']} | openssl dgst -sha256 -sign ca.key -out nonce.sig")
    portal.out.next_step(f"portal manufacturer prove {answer['manufacturer_id']} --signature nonce.sig")


@manufacturer.command(
    "prove",
    cls=Command,
    examples=[
        "portal manufacturer prove 1e66977361d81fe2 --signature nonce.sig",
        "portal manufacturer prove 1e66977361d81fe2 --certificate nonce.pem",
    ],
)
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The manufacturer's id.")
@click.option("--signature", metavar="FILE", help="The CA's signature of the nonce, as openssl dgst -sign writes it.")
@click.option("--certificate", metavar="FILE", help="A certificate, PEM, that the CA has made with the nonce as CN.")
@click.pass_obj
def manufacturer_prove(portal: Portal, manufacturer_id: str, signature: str | None, certificate: str | None) -> None:
    """Show that somebody has the CA's key, so that it counts."""
    if (signature is None) == (certificate is None):
        raise click.UsageError("Give either --signature or --certificate.")
    body = {"certificate": _pem(certificate)} if certificate is not None else {"signature": _base64(signature or "")}
    answer = portal.client.call("POST", f"/manufacturers/{manufacturer_id}/proof", body=body).json()
    _show(portal, answer, done=f"Registered {answer.get('name') or manufacturer_id}")


@manufacturer.command("remove", cls=Command, examples=["portal manufacturer remove 1e66977361d81fe2"])
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The manufacturer's id.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def manufacturer_remove(portal: Portal, manufacturer_id: str, yes: bool) -> None:
    """Let nobody in by a CA any more; who has enrolled stays in."""
    confirm(f"Remove the manufacturer {manufacturer_id}? No device enrols by its CA any more.", yes=yes)
    answer = portal.client.call("DELETE", f"/manufacturers/{manufacturer_id}").json()
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Removed {answer.get('name') or manufacturer_id}")


def _pem(path: str) -> str:
    try:
        return read_input(path).decode("ascii")
    except UnicodeDecodeError:
        raise Misused(f"{path} is not PEM; convert it with: openssl x509 -inform DER -in FILE") from None


def _base64(path: str) -> str:
    content = read_input(path)
    try:
        base64.b64decode(b"".join(content.split()), validate=True)
    except (ValueError, binascii.Error):
        return base64.b64encode(content).decode()
    return b"".join(content.split()).decode()


def _show(portal: Portal, answer: dict[str, Any], *, done: str = "") -> None:
    if portal.out.as_json:
        portal.out.json(answer)
        return
    if done:
        portal.out.done(done)
    fields: dict[str, Cell] = {name: text(answer.get(name)) for name in ("manufacturer_id", "name")}
    fields |= {"status": state(answer.get("status")), "fingerprint": text(answer.get("fingerprint"))}
    fields |= {"not_after": moment(answer.get("not_after"), expiry=True)} | terms_fields(answer)
    if answer.get("nonce"):
        fields |= {"nonce": text(answer["nonce"]), "nonce_expires_at": moment(answer.get("nonce_expires_at"))}
    portal.out.fields(fields)


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
