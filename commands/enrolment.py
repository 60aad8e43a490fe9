"""The commands about enrolment: enrolment tokens, expected devices, approval; what an enrolment profile consists of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from commands.completing import Listed
from commands.context import (
    EXTERNAL_ID,
    GROUPS,
    PROFILE,
    YES,
    Number,
    Remote,
    command,
    confirm,
    create_with_secret,
    group,
    metadata_from,
    option_group,
    require,
    require_confirmable,
    short_id,
    topics_from,
)
from commands.errors import Misused
from commands.files import read_input, read_pem
from commands.names import DEVICE, device_argument
from commands.output import Cell, date_of, moment, status_of, text
from commands.times import VALIDITY, Span
from commands.vocabulary import KEY_TYPES

ENROLMENT_TOKEN_ID = short_id(
    "portal enrolment list", Listed("/enrolment-tokens", "enrolment_tokens", "enrolment_token_id", "name")
)
PROFILE_FIELDS = (
    "type",
    "location",
    "firmware",
    "name_template",
    "profile",
    "validity_days",
    "approval",
    "repeated_serial",
)

ATTESTATION_HELP = "Appraisal policy for devices' evidence (JSON, see docs/attestation.md); - for standard input."


# The enrolment profile: what is recorded of a device that enrols, and which certificate it gets.
KEY_TYPES_OPTION = click.option(
    "--key-type",
    "key_types",
    type=click.Choice(KEY_TYPES),
    multiple=True,
    help="Allowed type of key. Repeatable.",
)


def profile_options(*, new: bool) -> Callable[[Any], Any]:
    """Return the options of an enrolment profile; those of a ``new`` one have defaults."""

    def default(value: str) -> str:
        return f"  [default: {value}]" if new else ""

    return option_group(
        click.option("--type", metavar="TYPE", help="Type of the devices." + default("device")),
        click.option("--location", metavar="PLACE", help="Location of the devices."),
        click.option("--firmware", metavar="VERSION", help="Firmware version of the devices."),
        click.option(
            "--name-template",
            metavar="NAME",
            help="Name of the devices; {serial} is replaced by the serial number, {number} by a count.",
        ),
        KEY_TYPES_OPTION,
        VALIDITY,
        PROFILE,
        click.option(
            "--approval",
            type=click.Choice(("at_once", "operator")),
            help="Who approves a device." + default("at_once"),
        ),
        click.option(
            "--repeated-serial",
            type=click.Choice(("operator", "same_device", "new_device")),
            help="What a known serial number with another key means; operator: an operator decides."
            + default("operator"),
        ),
        click.option("--attestation", metavar="FILE", help=ATTESTATION_HELP),
    )


def given_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request: the options that were used."""
    fields = {name: value for name, value in options.items() if value not in (None, ())}
    if "key_types" in fields:
        fields["key_types"] = list(fields["key_types"])
    if "attestation" in fields:
        fields["attestation"] = policy_from(fields["attestation"])
    return fields


def policy_from(path: str) -> dict[str, Any]:
    """Read an appraisal policy; an anchor that is not PEM is the name of a file beside that of the policy."""
    try:
        policy = json.loads(read_input(path))
        anchors = policy.get("anchors", [])
        policy["anchors"] = [_anchor(one, Path(path).parent) for one in anchors]
    except (ValueError, AttributeError, TypeError):
        raise Misused(f"{path} is not an appraisal policy in JSON; see docs/attestation.md.") from None
    return dict(policy)


def _anchor(anchor: Any, folder: Path) -> Any:
    text_ = anchor.get("pem") if isinstance(anchor, dict) else anchor
    if not isinstance(text_, str) or "-----BEGIN" in text_:
        return anchor
    pem = read_pem(str(folder / Path(text_).expanduser()))
    return {**anchor, "pem": pem} if isinstance(anchor, dict) else pem


def profile_cells(answer: dict[str, Any]) -> dict[str, Cell]:
    """Return how an enrolment profile in an answer is shown."""
    fields = {name: text(answer.get(name)) for name in PROFILE_FIELDS}
    policy = answer.get("attestation")
    if isinstance(policy, dict):
        words = (policy.get("mode"), f"version {policy.get('version')}", policy.get("policy_id"))
        fields["attestation"] = text(", ".join(map(str, words)))
    return fields | {"key_types": text(" ".join(map(str, answer.get("key_types") or ())))}


@group("enrolment")
def enrolment() -> None:
    """Enrolment tokens for devices: list, create, update, revoke."""


@command("list", enrolment, examples=["portal enrolment list"])
def enrolment_list(portal: Remote) -> None:
    """List enrolment tokens, newest first.

    When piped, prints tab-separated lines: id, name, device (if for one device), uses, allowed uses, approval, expiry,
    revoked, the operator token that made it.
    """
    answer = portal.client.get("/enrolment-tokens")
    portal.out.table(
        answer,
        "enrolment_tokens",
        {
            "id": "enrolment_token_id",
            "name": "name",
            "device": "device_id",
            "used": "uses",
            "of": "count",
            "approval": "approval",
            "expires": date_of("expires_at", expiry=True),
            "revoked": date_of("revoked_at"),
            "made by": "operator_token_id",
        },
        empty="No enrolment tokens yet.",
        spare=("device", "approval", "made by"),
    )


@command(
    "create",
    enrolment,
    examples=[
        "portal enrolment create pump-9 --device 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --token-out pump-9.token",
        "portal enrolment create line-4 --count 500 --expires-in 72h --type pump --name-template 'pump {serial}'",
    ],
)
@click.argument("name", help="Name of the token, shown in the audit record.")
@click.option("--device", "device_id", metavar="DEVICE", type=DEVICE, help="The expected device that the token is for.")
@click.option("--count", type=Number(1, 1_000_000), metavar="N", help="Number of new devices.  [default: 1]")
@click.option(
    "--expires-in",
    "--hours",
    "expires_in_hours",
    type=Span("h", 8760),
    metavar="DURATION",
    help="Validity of the token, such as 72h.  [default: 24h]",
)
@profile_options(new=True)
@click.option("--token-out", metavar="FILE", help="Write the token to FILE (new, 0600).")
def enrolment_create(portal: Remote, /, token_out: str | None, **options: Any) -> None:
    """Create an enrolment token, which is shown once.

    It is valid for one expected device (--device, see portal expect), or for new devices.
    """
    body = given_fields(options)

    def fields(answer: dict[str, Any]) -> dict[str, Cell]:
        scope = "device_id" if answer.get("device_id") else "count"
        known = {name: text(answer.get(name)) for name in ("enrolment_token_id", scope)}
        return known | profile_cells(answer) | {"expires_at": moment(answer.get("expires_at"), expiry=True)}

    create_with_secret(
        portal,
        "/enrolment-tokens",
        body,
        shown_once="token",
        save_in=token_out,
        done=f"Created the enrolment token {body['name']}",
        fields=fields,
        needs=("enrolment_token_id",),
    )


@command("update", enrolment, examples=["portal enrolment update 1e66977361d81fe2 --attestation policy.json"])
@click.argument("token_id", metavar="ID", type=ENROLMENT_TOKEN_ID, help="The full id (see: portal enrolment list).")
@click.option("--attestation", metavar="FILE", required=True, help=ATTESTATION_HELP)
def enrolment_update(portal: Remote, token_id: str, attestation: str) -> None:
    """Change the evidence that the devices of a token must show.

    What is known of devices that have enrolled with it is appraised again: portal list --attested outdated shows those
    that would be refused now.
    """
    body = {"attestation": policy_from(attestation)}
    answer = portal.client.call("PATCH", f"/enrolment-tokens/{token_id}", body=body).json()
    fields = {name: text(answer.get(name)) for name in ("enrolment_token_id", "name")} | profile_cells(answer)
    portal.out.result(answer, fields, done=f"Changed the enrolment token {answer.get('name') or token_id}")


@command("revoke", enrolment, examples=["portal enrolment revoke 1e66977361d81fe2"])
@click.argument("token_id", metavar="ID", type=ENROLMENT_TOKEN_ID, help="The full id (see: portal enrolment list).")
@YES
def enrolment_revoke(portal: Remote, token_id: str, yes: bool) -> None:
    """Revoke an enrolment token; enrolled devices stay active."""
    confirm(f"Revoke the enrolment token {token_id}? No more devices can enrol with it.", yes=yes)
    answer = portal.client.call("DELETE", f"/enrolment-tokens/{token_id}").json()
    portal.out.result(answer, done=f"Revoked the enrolment token {answer.get('name') or token_id}")


@command("expect", examples=["portal expect pump-9 --type pump --location 'Hall 2' --firmware 1.0"])
@click.argument("name", help="Name of the device.")
@click.option("--type", metavar="TYPE", required=True, help="Type of the device.")
@click.option("--location", metavar="PLACE", required=True, help="Location of the device.")
@click.option("--firmware", metavar="VERSION", required=True, help="Firmware version of the device.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Additional information. Repeatable.")
@click.option(
    "--topic", "topics", metavar="FILTER:ACCESS", multiple=True, help="Replaces the default topics. Repeatable."
)
@PROFILE
@GROUPS
@EXTERNAL_ID
def expect(
    portal: Remote, /, metadata: tuple[str, ...], topics: tuple[str, ...], groups: tuple[str, ...], **options: Any
) -> None:
    """Add a device that will enrol by itself later."""
    body: dict[str, Any] = {**given_fields(options), "metadata": metadata_from(metadata)}
    if topics:
        body["topics"] = topics_from(topics)
    if groups:
        body["groups"] = list(groups)
    # Not repeated if the connection breaks: that would create a second device.
    answer = portal.client.call("POST", "/devices", body=body).json()
    require(answer, "device_id")
    fields = {"device_id": text(answer["device_id"]), "status": status_of(answer)}
    portal.out.result(answer, fields, done=f"Expecting {options['name']} as {answer['device_id']}")
    portal.out.next_step(f"portal enrolment create NAME --device {answer['device_id']}")


@command("waiting", examples=["portal waiting"])
def waiting(portal: Remote) -> None:
    """List devices that wait for approval, longest first.

    When piped, prints tab-separated lines: device id, name, new or again (an enrolled device with another key), waiting
    since, enrolment token or manufacturer, key fingerprint.
    """
    answer = portal.client.get("/enrolments")
    portal.out.table(
        answer,
        "enrolments",
        {
            "id": "device_id",
            "name": "name",
            "asks": lambda row: text("again" if row.get("again") else "new"),
            "since": date_of("asked_at"),
            "by": lambda row: text(row.get("enrolment_token_id") or row.get("manufacturer_id")),
            "key": "key_fingerprint",
        },
        empty="No devices wait for approval.",
        spare=("by", "key"),
    )
    if answer.get("enrolments"):
        portal.out.next_step("portal approve ID")


class Fingerprint(click.ParamType[str]):
    """The SHA-256 fingerprint of a device's public key."""

    name = "fingerprint"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return 64 lower-case hex digits; accepts colons between them, as openssl prints them."""
        digits = value.strip().lower().replace(":", "")
        if re.fullmatch("[0-9a-f]{64}", digits) is None:
            self.fail("the fingerprint of a key has 64 hexadecimal digits.", param, ctx)
        return digits


@command(
    "approve",
    examples=[
        "portal approve 0f9d2c4e-5b1a-4c7d-9e8f-102030405060",
        'portal approve 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --key "$(cat key.sha256)"',
    ],
)
@device_argument("Name, id or external id of the device (see: portal waiting).")
@click.option(
    "--key", "key_fingerprint", type=Fingerprint(), metavar="SHA256", help="Approve only this key, without a question."
)
@YES
def approve(portal: Remote, device_id: str, key_fingerprint: str | None, yes: bool) -> None:
    """Approve a waiting device and its key.

    Compare the fingerprint with the device: it is the SHA-256 of its public key (SubjectPublicKeyInfo, DER).
    """
    key = key_fingerprint or _confirmed_key(portal, device_id, yes=yes)
    answer = portal.client.call(
        "POST", f"/devices/{device_id}/approve", body={"key_fingerprint": key}, repeatable=True
    ).json()
    portal.out.result(answer, done=f"Approved {device_id}")
    portal.out.note("It gets its certificate with its next request.")


def _confirmed_key(portal: Remote, device_id: str, *, yes: bool) -> str:
    """Ask whether the key of the waiting device is right; returns its fingerprint, so that no other is approved."""
    if not yes:
        require_confirmable()
    asked = portal.client.get(f"/devices/{device_id}/enrolment")
    require(asked, "key_fingerprint")
    if not yes:
        fields = {"Device id": text(device_id), "Key": text(asked["key_fingerprint"])}
        fields["By"] = text(asked.get("enrolment_token_id") or asked.get("manufacturer_id"))
        portal.out.question(fields)
        if asked.get("again"):
            portal.out.warning(
                "The device is enrolled already. Its certificates are revoked once it has one for this key."
            )
        confirm("Is this the key of the device?", yes=False)
    return str(asked["key_fingerprint"])


@command("reject", examples=["portal reject 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --why 'not ours' --yes"])
@device_argument("Name, id or external id of the device (see: portal waiting).")
@click.option("--why", metavar="TEXT", help="Why, for the audit record.")
@YES
def reject(portal: Remote, device_id: str, why: str | None, yes: bool) -> None:
    """Reject a waiting device, or its new key, permanently."""
    confirm(f"Reject {device_id}? A new device is revoked permanently; an enrolled one keeps its present key.", yes=yes)
    body = None if why is None else {"why": why}
    answer = portal.client.call("POST", f"/devices/{device_id}/reject", body=body).json()
    kept = f"Rejected the new key of {device_id}, which stays active"
    portal.out.result(answer, done=f"Rejected {device_id} permanently" if answer.get("status") == "revoked" else kept)
