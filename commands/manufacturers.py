"""The commands about manufacturers, whose CAs let devices in that are born with a certificate."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import click

from commands.context import Command, Portal, confirm, require
from commands.enrolment_terms import MeansId, terms_fields, terms_from, terms_options
from commands.errors import Misused
from commands.files import read_input
from commands.output import Cell, moment, state, text

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
