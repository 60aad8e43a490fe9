"""The server's own commands for operator tokens, for the owner of the machine: they need no token."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import click

from core.roles import Role
from operations.command_base import opened_portal, print_table, without_traceback
from operations.wiring import Portal
from store.audit import Actor, system_actor
from store.tenants import TokenRecord


class Life(click.ParamType[timedelta]):
    """How long a token is valid: days, as in ``90d`` or ``90``, or hours, as in ``12h``."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the duration; refuses less than an hour and more than ten years."""
        match = re.fullmatch(r"([0-9]{1,5})([dh]?)", value)
        life = timedelta(**{"hours" if match[2] == "h" else "days": int(match[1])}) if match else timedelta()
        if not timedelta(hours=1) <= life <= timedelta(days=3650):
            self.fail("use 1h to 3650d, such as 90d or 12h.", param, ctx)
        return life


@click.group("token")
def token_group() -> None:
    """Look after operator tokens, without needing one."""


def _actor(portal: Portal) -> Actor:
    return system_actor(portal.first_tenant)


def _until(record: TokenRecord) -> str:
    return "without end" if record.expires_at is None else f"until {record.expires_at:%Y-%m-%d %H:%M} UTC"


def _validity(record: TokenRecord, now: datetime) -> str:
    return _until(record) if record.is_valid(now) else "expired"


@token_group.command("list")
@without_traceback
def list_tokens() -> None:
    """List operator tokens, newest first."""
    with opened_portal() as portal:
        now = portal.clock()
        rows = [
            (record.id, record.role, "revoked" if record.revoked_at else _validity(record, now), record.name)
            for record in portal.operators.tokens(portal.first_tenant)
        ]
    print_table(("id", "role", "validity", "name"), rows)


@token_group.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice([str(role) for role in Role]), required=True)
@click.option(
    "--expires-in",
    "--days",
    "life",
    type=Life(),
    metavar="DURATION",
    help="Validity, such as 90d or 12h.  [default: no expiry]",
)
@without_traceback
def create_token(name: str, role: str, life: timedelta | None) -> None:
    """Create an operator token and print it.

    Standard output has the token alone. It is shown once, and its creation is in the audit record. The portal may serve
    meanwhile.
    """
    with opened_portal() as portal:
        secret, record = portal.operators.create(_actor(portal), name, Role(role), life)
    click.echo(secret)
    endless = "; for one that expires, add --expires-in 90d" if record.expires_at is None else ""
    click.echo(f"Token {record.id}, {record.role}, {_until(record)}{endless}", err=True)


@token_group.command("revoke")
@click.argument("token_id", metavar="ID")
@click.option("--force", is_flag=True, help="Revoke it even if it is the last valid admin token.")
@without_traceback
def revoke_token(token_id: str, force: bool) -> None:
    """Revoke an operator token immediately; ID is as listed."""
    with opened_portal() as portal:
        record = portal.operators.revoke(_actor(portal), token_id, force=force)
    click.echo(f"Revoked {record.id} ({record.name})")
