"""The server's own commands for its CAs, ``portal-server ca …``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from datetime import datetime
from pathlib import Path

import click
from sqlalchemy.engine import Connection

from config import CA_KEY_TYPES
from core.errors import CaChainRefused, CaKeyUnavailable
from core.states import IssuerKind
from operations import authority
from operations.backup.backup import open_database
from operations.command_base import opened_portal, print_table, settings_of_app, without_traceback
from operations.wiring import Portal
from pki.algorithms import KeyType
from pki.keys.contract import Origin
from pki.keys.stores import ROOT
from pki.outer_chain import MAX_CHAIN_BYTES, named
from store import audit, tenants
from store import issuers as store_issuers
from store.audit import Actor
from store.tables import DEFAULT_TENANT
from workflows.authority import rollover as authority_rollover
from workflows.authority.issuers import Issuers, RecordedIssuer
from workflows.authority.keys import listed_keys, open_keys
from workflows.authority.outer import pending_requests


@click.group("ca")
def ca_group() -> None:
    """Look after the certificate authorities."""


_of_tenant = click.option(
    "--tenant", default=DEFAULT_TENANT, metavar="NAME", help="The tenant whose CAs are meant, if not the first one."
)


def _actor(portal: Portal, tenant: str) -> Actor:
    """Return the actor for a command about a tenant's CAs; raise ``NotFound`` if there is no such tenant."""
    with portal.database.snapshot() as tx:
        return audit.system_actor(tenants.get_tenant(tx, tenant).id)


@ca_group.command("list")
@_of_tenant
@without_traceback
def list_cas(tenant: str) -> None:
    """List root and issuing CAs.

    With role, end, CRL, and the number of valid device certificates.
    """
    with opened_portal() as portal:
        now = portal.clock()
        _actor(portal, tenant)
        with portal.database.snapshot() as tx:
            issuers = portal.authority.seen_by(tx)
            records = {record.id: record for record in store_issuers.list_issuers(tx, retired=True)}
            rows = [
                (records[one.id].name, *_row_of(portal, tx, issuers, one, now)) for one in issuers.of_tenant(tenant)
            ]
        requests = pending_requests(settings_of_app(), list(records.values()), tenant)
    rows += [(request.name, "requested", "", "", "", "", "", str(request.path)) for request in requests]
    print_table(("name", "role", "until", "CRL", "CRL until", "devices", "below", "request"), rows)


def _row_of(
    portal: Portal, tx: Connection, issuers: Issuers, recorded: RecordedIssuer, now: datetime
) -> tuple[str, ...]:
    used = ""
    if recorded.kind == IssuerKind.ISSUING:
        used = str(authority_rollover.in_use(tx, recorded.id, now=now))
    crl = store_issuers.get_crl(tx, recorded.id)
    return (
        _role_of(portal, issuers, recorded),
        f"{recorded.issuer.not_after:%Y-%m-%d}",
        "none yet" if crl is None else str(crl.number),
        "" if crl is None else f"{crl.next_update:%Y-%m-%d %H:%M} UTC",
        used,
        named(recorded.issuer.above[-1]) if recorded.issuer.above else "",
        "",
    )


def _role_of(portal: Portal, issuers: Issuers, recorded: RecordedIssuer) -> str:
    if recorded.kind == IssuerKind.ROOT:
        where = "key here" if portal.keys.exists(recorded.issuer.name) else "key elsewhere"
        return f"retired root, {where}" if recorded.retired else f"root, {where}"
    if recorded.retired:
        return "retired"
    tenant = recorded.tenant_id
    issues = issuers.has_issuing(tenant) and recorded.id == issuers.issuing_of(tenant).id
    return "issues" if issues else "is trusted"


@ca_group.command("rollover")
@click.option("--again", is_flag=True, help="Allow it within a day of the last rollover.")
@click.option("--own-root", is_flag=True, help="Return from another root to the portal's own, which signs the next CA.")
@_of_tenant
@without_traceback
def rollover(again: bool, own_root: bool, tenant: str) -> None:
    """Create another issuing CA, which issues from now on.

    The previous one stays trusted. A tenant that has none gets its first one.

    Needs the root's key, unless a CA was installed that is to issue later. The portal may serve meanwhile. After an
    interruption, run the command again: it continues.
    """
    with opened_portal() as portal:
        actor = _actor(portal, tenant)
        name = authority.roll_over(portal, actor, click.echo, again=again, own_root=own_root)
        away = _root_to_be_taken_away(portal)
    click.echo(f"Done. Devices get certificates of {name}{away}.")


def _root_to_be_taken_away(portal: Portal) -> str:
    """Return what to do with the root's key after its use, as the end of a sentence."""
    if not portal.keys.exists(ROOT):
        return ""
    with contextlib.suppress(CaKeyUnavailable):  # no setting names its token
        if portal.keys.describe(ROOT).origin is Origin.FILE:
            return "; move the root's key away again"
        if portal.settings.root_keys != portal.settings.ca_keys:
            return "; take the root's token away again"
    return ""


@ca_group.command("request")
@click.option("--subject", default="", help="Name of the CA, as CN=Devices CA 1,O=Example Ltd,C=GB.")
@click.option(
    "--key-type", type=click.Choice(CA_KEY_TYPES), help="Kind of its key, if it is not PORTAL_ISSUING_KEY_TYPE."
)
@click.option("--another", is_flag=True, help="Make one more key, though a request waits for its certificate.")
@_of_tenant
@without_traceback
def request(subject: str, key_type: str | None, another: bool, tenant: str) -> None:
    """Make the key of an issuing CA, and print its request.

    The request is for its certificate (PKCS#10), by a CA of a company, or a root that is kept elsewhere; ca install
    takes what it answers. Until then the command prints the same request again.
    """
    kind = None if key_type is None else KeyType(key_type)
    with opened_portal() as portal:
        actor = _actor(portal, tenant)
        made = authority.request_ca(portal, actor, subject=subject, key_type=kind, another=another)
    click.echo(made.pem, nl=False)
    click.echo(f"The request of {made.name} is also in {made.path}.", err=True)


@ca_group.command("install")
@click.argument("chain", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--later", is_flag=True, help="Only trust it for now; ca rollover lets it issue.")
@_of_tenant
@without_traceback
def install(chain: Path, later: bool, tenant: str) -> None:
    """Take an issuing CA into service that another CA has signed.

    CHAIN has its certificate and those of the CAs above it up to the root, in PEM. The portal may serve meanwhile.
    After an interruption, run the command again: it continues.
    """
    content = _chain_of(chain)
    with opened_portal() as portal:
        name = authority.install_ca(portal, _actor(portal, tenant), content, click.echo, later=later)
    click.echo(
        f"Done. {name} is to issue after: ca rollover." if later else f"Done. Devices get certificates of {name}."
    )


def _chain_of(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # opening a FIFO would block
            return file.read(MAX_CHAIN_BYTES + 1) or b""
    except OSError as error:
        raise CaChainRefused(f"{path} cannot be read: {error.strerror}.") from error


@ca_group.command("retire")
@click.argument("name")
@_of_tenant
@without_traceback
def retire(name: str, tenant: str) -> None:
    """Stop trusting a CA that is not needed any more.

    No valid device certificate may need the CA NAME. The portal also does so by itself.
    """
    with opened_portal() as portal:
        authority.retire(portal, _actor(portal, tenant), name)
    click.echo(f"{name} is retired. Its CRL is still published.")


# --- Their keys -------------------------------------------------------------------------------------------------------


@ca_group.command("keys")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {name, role, origin, place}.")
@without_traceback
def keys(as_json: bool) -> None:
    """List where the keys of the CAs are, and how they came there.

    No token is asked: doctor does that, and tries the keys. The portal may serve meanwhile.
    """
    settings = settings_of_app()
    with contextlib.closing(open_database(settings)) as database, database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
    with contextlib.closing(open_keys(settings, make=False)) as stores:
        listed = list(listed_keys(issuers, stores))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(key) for key in listed], indent=1))
        return
    print_table(("name", "role", "how", "place"), [(key.name, key.role, key.origin, key.place) for key in listed])


@ca_group.command("move")
@click.argument("name")
@without_traceback
def move(name: str) -> None:
    """Bring the key of the CA NAME from its file into the token.

    The token is the first one of PORTAL_CA_KEYS, or PORTAL_ROOT_KEYS for the root. It signs with the key before the
    file is set aside. After an interruption, run the command again: it continues. A key that is born in the token is
    better, since a file may have been copied: ca rollover.
    """
    with opened_portal() as portal:
        described, aside = authority.move_key(portal, audit.system_actor(portal.first_tenant), name)
    click.echo(f"The key of {name} is at {described.place}, which has signed with it.")
    click.echo(f"Destroy its file, which is not used any more, and every copy and backup of it: shred -u {aside}")
    click.echo("Restart the portal: until then it signs with the key of the file, which it has in its memory.")
