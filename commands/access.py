"""The commands about access to the portal: login, logout, operator tokens."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from commands.client import Client
from commands.connection import (
    DEFAULT_TENANT,
    ConnectionSettings,
    Login,
    login_path,
    read_login,
    remove_login,
    resolve,
    save_login,
)
from commands.context import (
    ROLES,
    TOKEN_ID,
    YES,
    Remote,
    ask_secret,
    command,
    confirm,
    create_with_secret,
    require,
)
from commands.errors import Misused
from commands.output import Cell, clean, date_of, moment, text
from commands.times import Span
from onboarding_portal import VERSION

LOCAL_CA = Path("data/ca.pem")  # of a portal that runs in this folder


@command(
    "login",
    examples=[
        "portal login --url https://portal.example.com:8443 --ca-file ca.pem",
        "portal login --token-file token.txt",
    ],
)
def login(portal: Remote) -> None:
    """Save the portal's URL, CA file and your token.

    Asks for what is not given by options or the environment. The token is tested at the portal and then saved in a
    file that only you can read. With tokens of several tenants, portal --tenant NAME chooses one of those saved.
    """
    settings = _asked(portal)
    client = Client(settings, version=VERSION)
    client.get("/devices", limit=1)
    tenant = _tenant_of(client)
    if portal.given.tenant not in (None, tenant):
        raise Misused(f"The token is one of the tenant {tenant}. Nothing was saved.")
    path = login_path(os.environ)
    ca_file = str(settings.ca_file) if settings.ca_file else None
    save_login(path, Login(settings.url, ca_file, settings.token or "", tenant))
    answer = {"url": settings.url, "ca_file": ca_file, "saved": str(path)}
    inside = ""
    if tenant != DEFAULT_TENANT:
        answer["tenant"], inside = tenant, f" in the tenant {tenant}"
    portal.out.result(answer, done=f"The token works at {settings.url}{inside}; saved in {path}")
    portal.out.next_step("portal list" if portal.given.tenant is not None else _first_use(tenant, settings.token))


def _first_use(tenant: str, token: str | None) -> str:
    """Return a command that uses the login, whatever token the environment has."""
    overridden = (os.environ.get("PORTAL_TOKEN") or token) != token
    return f"portal --tenant {tenant} list" if overridden or tenant != DEFAULT_TENANT else "portal list"


def _tenant_of(client: Client) -> str:
    """Return the tenant of the token; an older portal has one only."""
    answer = client.call("GET", "/whoami", accept=(404,))
    if answer.status == 404:
        return DEFAULT_TENANT
    known = answer.json()
    require(known, "tenant")
    return clean(known["tenant"])


def _asked(portal: Remote) -> ConnectionSettings:
    # This replaces an earlier login, so its token is not used, but its portal is the default.
    given = portal.given
    url = given.url or os.environ.get("PORTAL_URL") or None
    ca_file = given.ca_file or os.environ.get("PORTAL_CA") or None
    if url is None and sys.stdin.isatty():
        saved = _saved()
        url = click.prompt("Portal", default=saved.url if saved else "https://127.0.0.1:8443", err=True)
        if ca_file is None:
            default = saved.ca_file if saved and saved.url == url else "data/ca.pem" if LOCAL_CA.is_file() else ""
            ca_file = click.prompt("CA file (empty: the CAs of this system)", default=default or "", err=True)
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


@command("logout", connects=False, examples=["portal logout"])
def logout(portal: Remote) -> None:
    """Delete the saved login.

    The token itself stays valid; to revoke it, use portal token revoke.
    """
    removed = remove_login(login_path(os.environ))
    portal.out.result({"removed": removed}, done="Logged out." if removed else "")
    portal.out.note(
        "The token is still valid; to revoke it, use portal token revoke." if removed else "There is no saved login."
    )


@click.group("token")
def token() -> None:
    """Operator tokens: list, create, revoke."""


def _expiry(row: Mapping[str, Any]) -> Cell:
    return moment(row["expires_at"], expiry=True, short=True) if row.get("expires_at") else Cell("", "never", "dim")


@command("list", token, examples=["portal token list"])
def token_list(portal: Remote) -> None:
    """List operator tokens, newest first.

    When piped, prints tab-separated lines: id, name, role, created, expiry, revoked.
    """
    answer = portal.client.get("/tokens")
    portal.out.table(
        answer,
        "tokens",
        {
            "id": "token_id",
            "name": "name",
            "role": "role",
            "created": date_of("created_at"),
            "expires": _expiry,
            "revoked": date_of("revoked_at"),
        },
        empty="No operator tokens.",
    )


@command(
    "create",
    token,
    examples=[
        "portal token create factory --role operator --expires-in 90d",
        "portal token create audit --role auditor --token-out audit.token",
    ],
)
@click.argument("name", help="Name of the token, shown in the audit record.")
@click.option("--role", type=click.Choice(ROLES), required=True, help="Permissions of the token.")
@click.option(
    "--expires-in",
    "--days",
    "expires_in_days",
    type=Span("d", 3650),
    metavar="DURATION",
    help="Validity, such as 90d.  [default: no expiry]",
)
@click.option("--token-out", metavar="FILE", help="Write the token to FILE (new, 0600).")
def token_create(portal: Remote, /, token_out: str | None, **options: Any) -> None:
    """Create an operator token, which is shown once."""
    body = {field: value for field, value in options.items() if value is not None}

    def fields(answer: dict[str, Any]) -> dict[str, Cell]:
        known = {name: text(answer.get(name)) for name in ("token_id", "role")}
        return known | {"expires_at": _expiry(answer)}

    done = f"Created the token {body['name']}"
    create_with_secret(portal, "/tokens", body, shown_once="token", save_in=token_out, done=done, fields=fields)


@command("revoke", token, examples=["portal token revoke 1e66977361d81fe2"])
@click.argument("token_id", metavar="ID", type=TOKEN_ID, help="The full token id (see: portal token list).")
@click.option("--force", is_flag=True, help="Revoke it even if it is the last valid admin token.")
@click.option("--with-enrolment-tokens", is_flag=True, help="Also revoke the enrolment tokens that it has made.")
@YES
def token_revoke(portal: Remote, token_id: str, force: bool, with_enrolment_tokens: bool, yes: bool) -> None:
    """Revoke an operator token immediately."""
    confirm(f"Revoke the token {token_id}? Clients that use it lose access immediately.", yes=yes)
    params = {"force": "true"} if force else {}
    params |= {"enrolment_tokens": "revoke"} if with_enrolment_tokens else {}
    answer = portal.client.call("DELETE", f"/tokens/{token_id}", params=params or None).json()
    done = f"Revoked the token {answer.get('name') or token_id}"
    portal.out.result(answer or {"token_id": token_id, "revoked": True}, done=done)
    if revoked := answer.get("enrolment_tokens_revoked"):
        portal.out.note(f"Enrolment tokens that it had made, and that are revoked with it: {revoked}")
    if left := answer.get("enrolment_tokens_left"):
        portal.out.note(f"Enrolment tokens that it has made, and with which devices can still enrol: {left}")
        portal.out.next_step(f"portal token revoke {token_id} --with-enrolment-tokens")
