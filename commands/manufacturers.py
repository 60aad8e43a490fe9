"""The commands about manufacturers, whose devices enrol by their factory certificates."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import click

from commands.completing import Listed
from commands.context import YES, Remote, command, confirm, group, require, short_id
from commands.enrolment import given_fields, profile_cells, profile_options
from commands.files import read_input, read_pem
from commands.output import Cell, date_of, moment, status_of, text

MANUFACTURER_ID = short_id(
    "portal manufacturer list", Listed("/manufacturers", "manufacturers", "manufacturer_id", "name")
)


@group("manufacturer")
def manufacturer() -> None:
    """Manufacturer CAs: list, show, add, update, prove, remove."""


@command("list", manufacturer, examples=["portal manufacturer list"])
def manufacturer_list(portal: Remote) -> None:
    """List manufacturers, newest first.

    When piped, prints tab-separated lines: id, name, status, approval, expiry and fingerprint of the CA certificate.
    """
    answer = portal.client.get("/manufacturers")
    portal.out.table(
        answer,
        "manufacturers",
        {
            "id": "manufacturer_id",
            "name": "name",
            "status": status_of,
            "approval": "approval",
            "expires": date_of("not_after", expiry=True),
            "fingerprint": "fingerprint",
        },
        empty="No manufacturers yet.",
        spare=("approval", "fingerprint"),
        whole=("status",),
    )


@command("show", manufacturer, examples=["portal manufacturer show 1e66977361d81fe2"])
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The full manufacturer id.")
def manufacturer_show(portal: Remote, manufacturer_id: str) -> None:
    """Show a manufacturer and the nonce that its CA must sign."""
    _show_manufacturer(portal, portal.client.get(f"/manufacturers/{manufacturer_id}"))


@command(
    "add",
    manufacturer,
    examples=["portal manufacturer add acme --certificate acme-ca.pem --type pump --name-template 'pump {serial}'"],
)
@click.argument("name", help="Name of the manufacturer, shown in the audit record.")
@click.option("--certificate", metavar="FILE", required=True, help="CA certificate (PEM); - for standard input.")
@profile_options(new=True)
def manufacturer_add(portal: Remote, /, certificate: str, **options: Any) -> None:
    """Add a manufacturer CA; it must be proven before use.

    Devices with a factory certificate of this CA can enrol once portal manufacturer prove has succeeded.
    """
    body = given_fields(options) | {"certificate": read_pem(certificate)}
    answer = portal.client.call("POST", "/manufacturers", body=body).json()
    require(answer, "manufacturer_id", "nonce")
    _show_manufacturer(portal, answer, done=f"Added {body['name']}; devices can enrol once its CA is proven")
    portal.out.note("Sign the nonce with the key of the CA:")
    portal.out.note(f"  printf %s {answer['nonce']} | openssl dgst -sha256 -sign ca.key -out nonce.sig")
    portal.out.next_step(f"portal manufacturer prove {answer['manufacturer_id']} --signature nonce.sig")


@command(
    "update",
    manufacturer,
    examples=[
        "portal manufacturer update 1e66977361d81fe2 --approval operator --location 'Hall 2'",
        "portal manufacturer update 1e66977361d81fe2 --certificate acme-ca-2031.pem",
    ],
)
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The full manufacturer id.")
@click.option("--name", metavar="NAME", help="New name.")
@click.option("--certificate", metavar="FILE", help="Renewed certificate of the same CA (PEM); - for standard input.")
@profile_options(new=False)
def manufacturer_update(portal: Remote, /, manufacturer_id: str, certificate: str | None, **options: Any) -> None:
    """Change a manufacturer's name, CA certificate or profile.

    It applies to devices that enrol from then on. A renewed certificate has the key and the subject of the old one.
    """
    changes = given_fields(options)
    if certificate is not None:
        changes["certificate"] = read_pem(certificate)
    if not changes:
        raise click.UsageError("Nothing to change: use at least one of --name, --type, --location, --firmware, …")
    answer = portal.client.call("PATCH", f"/manufacturers/{manufacturer_id}", body=changes).json()
    _show_manufacturer(portal, answer, done=f"Changed {', '.join(changes)} of {answer.get('name') or manufacturer_id}")


@command(
    "prove",
    manufacturer,
    examples=[
        "portal manufacturer prove 1e66977361d81fe2 --signature nonce.sig",
        "portal manufacturer prove 1e66977361d81fe2 --certificate nonce.pem",
    ],
)
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The full manufacturer id.")
@click.option("--signature", metavar="FILE", help="Signature of the nonce, as openssl dgst -sign writes it.")
@click.option("--certificate", metavar="FILE", help="Certificate (PEM) issued by the CA, with the nonce as its CN.")
def manufacturer_prove(portal: Remote, manufacturer_id: str, signature: str | None, certificate: str | None) -> None:
    """Prove possession of a manufacturer's CA key."""
    if (signature is None) == (certificate is None):
        raise click.UsageError("Use either --signature or --certificate.")
    body = (
        {"certificate": read_pem(certificate)} if certificate is not None else {"signature": _base64(signature or "")}
    )
    answer = portal.client.call("POST", f"/manufacturers/{manufacturer_id}/proof", body=body, repeatable=True).json()
    _show_manufacturer(portal, answer, done=f"Registered {answer.get('name') or manufacturer_id}")


@command("remove", manufacturer, examples=["portal manufacturer remove 1e66977361d81fe2"])
@click.argument("manufacturer_id", metavar="ID", type=MANUFACTURER_ID, help="The full manufacturer id.")
@YES
def manufacturer_remove(portal: Remote, manufacturer_id: str, yes: bool) -> None:
    """Remove a manufacturer CA; enrolled devices stay active."""
    confirm(f"Remove the manufacturer {manufacturer_id}? No more devices can enrol with its CA.", yes=yes)
    answer = portal.client.call("DELETE", f"/manufacturers/{manufacturer_id}").json()
    portal.out.result(answer, done=f"Removed {answer.get('name') or manufacturer_id}")


def _base64(path: str) -> str:
    content = read_input(path)
    try:
        base64.b64decode(b"".join(content.split()), validate=True)
    except (ValueError, binascii.Error):
        return base64.b64encode(content).decode()
    return b"".join(content.split()).decode()


def _show_manufacturer(portal: Remote, answer: dict[str, Any], *, done: str = "") -> None:
    fields: dict[str, Cell] = {name: text(answer.get(name)) for name in ("manufacturer_id", "name")}
    fields |= {"status": status_of(answer), "fingerprint": text(answer.get("fingerprint"))}
    fields |= {"not_after": moment(answer.get("not_after"), expiry=True)} | profile_cells(answer)
    if answer.get("nonce"):
        fields |= {"nonce": text(answer["nonce"]), "nonce_expires_at": moment(answer.get("nonce_expires_at"))}
    portal.out.result(answer, fields, done=done)
