"""The commands about access to the portal: login, logout, operator tokens."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.completing import saved_names
from commands.connection import (
    OVERRIDDEN,
    SAVED_LOGIN,
    ConnectionOptions,
    ConnectionSettings,
    chosen_profile,
    resolve,
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
    group,
    require,
)
from commands.errors import Misused
from commands.logins import (
    DEFAULT_PROFILE,
    DEFAULT_TENANT,
    Login,
    login_path,
    read_login,
    read_logins,
    remove_login,
    save_login,
    saved_profiles,
)
from commands.output import Cell, Column, clean, date_of, moment, text
from commands.sign_on import log_in
from commands.times import Span
from onboarding_portal import VERSION

if TYPE_CHECKING:
    from commands.client import Client

LOCAL_CA = Path("data/ca.pem")  # of a portal that runs in this folder
_PROFILE = click.option(
    "--profile", metavar="NAME", help="Name of the login.  [default: default]", shell_complete=saved_names
)


@command(
    "login",
    examples=[
        "portal login --url https://portal.example.com:8443 --ca-file ca.pem",
        "portal login --token-file token.txt",
        "portal login --profile factory --url https://10.0.0.5:8443 --token-file token.txt",
        "portal login --oidc",
        "portal login --list",
    ],
)
@_PROFILE
@click.option("--oidc", is_flag=True, help="Log in by your company's identity provider, in a browser.")
@click.option("--list", "lists", is_flag=True, help="List what is saved, without the tokens.")
def login(portal: Remote, profile: str | None, oidc: bool, lists: bool) -> None:
    """Save the portal's URL, CA file and your token.

    Asks for what is not given by options or the environment. The token is tested at the portal and then saved in a
    file that only you can read. Logins at several portals are saved under names: portal --profile NAME list, or
    PORTAL_PROFILE, uses one of them. With tokens of several tenants of a portal, portal --tenant NAME chooses.

    With --oidc the token is made for you, for eight hours, and --tenant chooses among the tenants of your groups.
    """
    if lists:
        _list_logins(portal)
        return
    profile = profile or chosen_profile(portal.given, os.environ)
    path = login_path(os.environ, profile)
    settings = _by_provider(portal, path) if oidc else _asked(portal, path)
    client = _client(settings)
    client.get("/devices", limit=1)
    tenant = _tenant_of(client)
    if portal.given.tenant not in (None, tenant):
        raise Misused(f"The token is one of the tenant {tenant}. Nothing was saved.")
    ca_file = str(settings.ca_file) if settings.ca_file else None
    save_login(path, Login(settings.url, ca_file, settings.token or "", tenant))
    answer = {"url": settings.url, "ca_file": ca_file, "saved": str(path)}
    inside = ""
    if tenant != DEFAULT_TENANT:
        answer["tenant"], inside = tenant, f" in the tenant {tenant}"
    if profile != DEFAULT_PROFILE:
        answer["profile"] = profile
    portal.out.result(answer, done=f"The token works at {settings.url}{inside}; saved in {path}")
    if portal.given.tenant is not None or portal.given.login_profile is not None:
        portal.out.next_step("portal list")
    elif profile != DEFAULT_PROFILE:
        portal.out.next_step(f"portal --profile {profile} list")
    else:
        portal.out.next_step(_first_use(tenant, settings.token))


def _list_logins(portal: Remote) -> None:
    """Print the saved logins, without their tokens, and which one commands use now; a bad file is a warning."""
    used, settings, problem = chosen_profile(portal.given, os.environ), None, ""
    try:
        settings = portal.settings
    except Misused as error:
        problem = error.sentence
        portal.out.warning(problem)
        for hint in error.hints:
            portal.out.note(hint)
    rows: list[dict[str, Any]] = []
    for name in saved_profiles(os.environ):
        try:
            known = read_logins(login_path(os.environ, name))
        except Misused as error:
            if error.sentence != problem:
                portal.out.warning(error.sentence)
            known = ()
        for one in known:
            chosen = name == used and settings is not None and settings.is_of(one)
            facts = {"url": one.url, "tenant": one.tenant, "ca_file": one.ca_file}
            rows.append({"profile": name, "chosen": chosen, **facts})
    portal.out.table(
        {"logins": rows},
        "logins",
        {
            "profile": "profile",
            "url": "url",
            "tenant": "tenant",
            "ca file": lambda row: Cell(str(row["ca_file"] or ""), "" if row["ca_file"] else "the system's"),
            "chosen": lambda row: Cell("yes" if row["chosen"] else "", "" if row["chosen"] else "-"),
        },
        empty="There is no saved login.",
        spare=("tenant", "ca file"),
    )
    if settings is not None and settings.token_source != SAVED_LOGIN:
        token = f"the token of {settings.token_source}" if settings.token else "no token"
        portal.out.note(f"Commands use no saved login, but {token} at {settings.url}.")
        if rows and (names := [name for name in OVERRIDDEN if os.environ.get(name)]):
            portal.out.note(f"To use a saved login, run: unset {' '.join(names)}")


def _first_use(tenant: str, token: str | None) -> str:
    """Return a command that uses the login, whatever token the environment has."""
    overridden = (os.environ.get("PORTAL_TOKEN") or token) != token
    return f"portal --tenant {tenant} list" if overridden or tenant != DEFAULT_TENANT else "portal list"


def _client(settings: ConnectionSettings) -> Client:
    from commands.client import Client  # imported by what makes a call

    return Client(settings, version=VERSION)


def _tenant_of(client: Client) -> str:
    """Return the tenant of the token; an older portal has one only."""
    answer = client.call("GET", "/whoami", accept=(404,))
    if answer.status == 404:
        return DEFAULT_TENANT
    known = answer.json()
    require(known, "tenant")
    return clean(known["tenant"])


def _by_provider(portal: Remote, path: Path) -> ConnectionSettings:
    """Return the settings with a token for whoever has logged in at the identity provider."""
    if portal.given.token is not None or portal.given.token_file is not None:
        raise Misused("Use either --oidc, which makes a token, or a token.")
    settings = resolve(_addressed(portal, path), {}, use_login=False)
    token = log_in(_client(settings), portal.out, portal.given.tenant)
    return dataclasses.replace(settings, token=token, token_source="the identity provider")  # noqa: S106 - its origin


def _asked(portal: Remote, path: Path) -> ConnectionSettings:
    given = _addressed(portal, path)
    if given.token or given.token_file or os.environ.get("PORTAL_TOKEN"):
        return resolve(given, os.environ, use_login=False)
    secret = ask_secret("Token", instead="add --token-file FILE, or set PORTAL_TOKEN")
    settings = resolve(dataclasses.replace(given, token=secret), os.environ, use_login=False)
    return dataclasses.replace(settings, token_source="the terminal")  # noqa: S106 - where it came from


def _addressed(portal: Remote, path: Path) -> ConnectionOptions:
    """Return the options with the portal's address and CA file, which are asked for if they are not given."""
    # This replaces an earlier login, so its token is not used, but its portal is the default.
    given = portal.given
    url = given.url or os.environ.get("PORTAL_URL") or None
    ca_file = given.ca_file or os.environ.get("PORTAL_CA") or None
    saved = _saved(path) if url is None else None
    if saved is not None and not sys.stdin.isatty():
        url, ca_file = saved.url, ca_file or saved.ca_file
    elif url is None and sys.stdin.isatty():
        url = click.prompt("Portal", default=saved.url if saved else "https://127.0.0.1:8443", err=True)
        if ca_file is None:
            default = saved.ca_file if saved and saved.url == url else "data/ca.pem" if LOCAL_CA.is_file() else ""
            ca_file = click.prompt("CA file (empty: the CAs of this system)", default=default or "", err=True)
    return dataclasses.replace(given, url=url, ca_file=ca_file or None)


def _saved(path: Path) -> Login | None:
    try:
        return read_login(path)
    except Misused:
        return None


@command("logout", connects=False, examples=["portal logout", "portal logout --profile factory"])
@_PROFILE
@click.option("--all", "all_", is_flag=True, help="Delete all that are saved, under whatever name.")
def logout(portal: Remote, profile: str | None, all_: bool) -> None:
    """Delete the saved login.

    The token itself stays valid; to revoke it, use portal token revoke.
    """
    if all_ and profile is not None:
        raise Misused("Use either --all or --profile.")
    chosen = profile or chosen_profile(portal.given, os.environ)
    names = saved_profiles(os.environ) if all_ else [chosen]
    removed = [name for name in names if remove_login(login_path(os.environ, name))]
    portal.out.result({"removed": bool(removed)}, done="Logged out." if removed else "")
    there_is_none = "There is no saved login." if chosen == DEFAULT_PROFILE else f"There is no login profile {chosen}."
    portal.out.note("The token is still valid; to revoke it: portal token revoke ID" if removed else there_is_none)


@group("token")
def token() -> None:
    """Operator tokens: list, create, revoke."""


def _expiry(row: Mapping[str, Any]) -> Cell:
    return moment(row["expires_at"], expiry=True, short=True) if row.get("expires_at") else Cell("", "never", "dim")


@command("list", token, examples=["portal token list"])
def token_list(portal: Remote) -> None:
    """List operator tokens, newest first.

    When piped, prints tab-separated lines: id, name, role, created, expiry, revoked, person.

    A token from a login by the identity provider has the name of the person, and as person what the provider calls it.
    """
    answer = portal.client.get("/tokens")
    columns: dict[str, Column] = {
        "id": "token_id",
        "name": "name",
        "role": "role",
        "created": date_of("created_at"),
        "expires": _expiry,
        "revoked": date_of("revoked_at"),
    }
    rows = answer.get("tokens")
    if not portal.out.for_people or (isinstance(rows, list) and any(_is_of_person(row) for row in rows)):
        columns["person"] = "subject"
    spare = [name for name in ("person",) if name in columns]
    portal.out.table(answer, "tokens", columns, empty="No operator tokens.", spare=spare)


def _is_of_person(row: object) -> bool:
    return isinstance(row, dict) and bool(row.get("subject"))


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
    made = create_with_secret(portal, "/tokens", body, shown_once="token", save_in=token_out, done=done, fields=fields)
    if not made.get("expires_at"):
        portal.out.note("It never expires; for one that does, add --expires-in 90d.")


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
