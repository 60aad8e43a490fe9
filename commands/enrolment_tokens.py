"""The commands about enrolment tokens, with which devices enrol by themselves."""

from __future__ import annotations

from typing import Any

import click

from commands.context import DEVICE_ID, Command, Portal, confirm, make_with_secret, new_secret_file
from commands.enrolment_terms import MeansId, terms_fields, terms_from, terms_options
from commands.output import Cell, moment, text

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
