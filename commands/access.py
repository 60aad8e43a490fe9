"""The commands about who may use the portal."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import click

from commands.client import Client
from commands.context import (
    ROLES,
    TOKEN_ID,
    VERSION,
    Command,
    Portal,
    ask_secret,
    confirm,
    make_with_secret,
    new_secret_file,
)
from commands.errors import Misused
from commands.output import Cell, moment, text
from commands.settings import Login, Settings, login_path, read_login, remove_login, resolve, save_login

CA_HERE = Path("data/ca.pem")  # of a portal that is run from this folder


@click.command(
    "login",
    cls=Command,
    examples=[
        "portal login --url https://portal.example.com:8443 --ca-file ca.pem",
        "portal login --token-file token.txt",
    ],
)
@click.pass_obj
def login(portal: Portal) -> None:
    """Remember the portal, its CA file, your token.

    What is not given by option or environment is asked for. The token is tried at the portal first, then saved in a
    file that only you can read.
    """
    settings = _asked(portal)
    Client(settings, version=VERSION).get("/devices", limit=1)
    path = login_path(os.environ)
    ca_file = str(settings.ca_file) if settings.ca_file else None
    save_login(path, Login(settings.url, ca_file, settings.token or ""))
    if portal.out.as_json:
        portal.out.json({"url": settings.url, "ca_file": ca_file, "saved": str(path)})
        return
    portal.out.done(f"The token works at {settings.url}; saved in {path}")
    portal.out.next_step("portal list")


def _asked(portal: Portal) -> Settings:
    # An earlier login is what this one replaces, so its token is not used, but its portal is offered.
    given = portal.given
    url = given.url or os.environ.get("PORTAL_URL") or None
    ca_file = given.ca_file or os.environ.get("PORTAL_CA") or None
    if url is None and sys.stdin.isatty():
        saved = _saved()
        url = click.prompt("Portal", default=saved.url if saved else "https://127.0.0.1:8443", err=True)
        if ca_file is None:
            default = saved.ca_file if saved and saved.url == url else "data/ca.pem" if CA_HERE.is_file() else ""
            ca_file = click.prompt("CA file (none for the system's CAs)", default=default or "", err=True)
    given = dataclasses.replace(given, url=url, ca_file=ca_file or None)
    if given.token or given.token_file or os.environ.get("PORTAL_TOKEN"):
        return resolve(given, os.environ, use_login=False)
    secret = ask_secret("Token", instead="add --token-file FILE, or set PORTAL_TOKEN")
    settings = resolve(dataclasses.replace(given, token=secret), os.environ, use_login=False)
    return dataclasses.replace(settings, token_source="the terminal")  # noqa: S106 - where it came from


def _saved() -> Login | None:
    try:
        return read_login(login_path(os.environ))
    except Misused:
        return None


@click.command("logout", cls=Command, connects=False, examples=["portal logout"])
@click.pass_obj
def logout(portal: Portal) -> None:
    """Forget what login saved.

    The token itself stays valid; see: portal token revoke.
    """
    removed = remove_login(login_path(os.environ))
    if portal.out.as_json:
        portal.out.json({"removed": removed})
    elif removed:
        portal.out.done("Logged out.")
        portal.out.note("The token itself is still valid; portal token revoke ends it.")
    else:
        portal.out.note("There was no saved login.")


@click.group("token")
def token() -> None:
    """Operator tokens: list, create, revoke."""


def _expiry(row: dict[str, Any]) -> Cell:
    return moment(row["expires_at"], expiry=True, short=True) if row.get("expires_at") else Cell("", "never", "dim")


@token.command("list", cls=Command, examples=["portal token list"])
@click.pass_obj
def token_list(portal: Portal) -> None:
    """List operator tokens, newest first.

    Piped, each is a line: id, name, role, created, expiry, revoked.
    """
    answer = portal.client.get("/tokens")
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.table(
        ("id", "name", "role", "created", "expires", "revoked"),
        [
            (
                text(row.get("token_id")),
                text(row.get("name")),
                text(row.get("role")),
                moment(row.get("created_at"), short=True),
                _expiry(row),
                moment(row.get("revoked_at"), short=True),
            )
            for row in answer.get("tokens") or ()
            if isinstance(row, dict)
        ],
        empty="There is no operator token.",
    )


@token.command(
    "create",
    cls=Command,
    examples=[
        "portal token create factory --role operator --days 90",
        "portal token create audit --role auditor --token-out audit.token",
    ],
)
@click.argument("name", help="What it is for, as the record will show it.")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What it may do.")
@click.option(
    "--days", type=click.IntRange(1, 3650), metavar="DAYS", help="How long it lasts; until revoked if not given."
)
@click.option("--token-out", metavar="FILE", help="New file (0600) for the token.")
@click.pass_obj
def token_create(portal: Portal, name: str, role: str, days: int | None, token_out: str | None) -> None:
    """Make an operator token, which is shown once."""
    path = new_secret_file(token_out, "--token-out", "token", out=portal.out)
    body = {"name": name, "role": role} | ({"expires_in_days": days} if days else {})
    answer = make_with_secret(portal, "/tokens", body, shown_once="token", into=path)
    if portal.out.as_json:
        portal.out.json(answer)
        return
    portal.out.done(f"Made the token {name}")
    fields = {
        "token_id": text(answer.get("token_id")),
        "role": text(answer.get("role")),
        "expires_at": _expiry(answer),
    }
    if path is None:
        fields["token"] = Cell(str(answer["token"]), style="bold")
    portal.out.fields(fields)
    portal.out.note(f"It is in {path}." if path else "The token is shown this once.")


@token.command("revoke", cls=Command, examples=["portal token revoke 1e66977361d81fe2"])
@click.argument("token_id", metavar="ID", type=TOKEN_ID, help="The token's id, in full (portal token list).")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_obj
def token_revoke(portal: Portal, token_id: str, yes: bool) -> None:
    """End an operator token at once."""
    confirm(f"Revoke the token {token_id}? Whoever uses it is shut out at once.", yes=yes)
    answer = portal.client.call("DELETE", f"/tokens/{token_id}").json()
    if portal.out.as_json:
        portal.out.json(answer or {"token_id": token_id, "revoked": True})
        return
    portal.out.done(f"Revoked the token {answer.get('name') or token_id}")
