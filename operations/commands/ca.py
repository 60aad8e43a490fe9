"""The commands for the CAs: list them, let one follow another, retire one."""

from __future__ import annotations

import click

from core.states import IssuerKind
from operations import authority
from operations.commands.plain import plainly, settings_here
from operations.wiring import open_portal
from store import issuers as store_issuers
from workflows import audit
from workflows.authority import rollover as authority_rollover


@click.group("ca")
def ca_group() -> None:
    """Look after the certificate authorities."""


@ca_group.command("list")
@plainly
def list_cas() -> None:
    """List root and issuing CAs: what each does, its end, its CRL, certificates of devices that are good."""
    portal = open_portal(settings_here())
    try:
        now = portal.clock()
        with portal.database.snapshot() as tx:
            issuers = portal.authority.seen_by(tx)
            records = {record.id: record for record in store_issuers.list_issuers(tx, retired=True)}
            for recorded in issuers.issuers:
                crl = store_issuers.get_crl(tx, recorded.id)
                if recorded.kind == IssuerKind.ROOT:
                    does = "root, key here" if portal.keys.exists(recorded.issuer.name) else "root, key elsewhere"
                elif recorded.retired:
                    does = "retired"
                else:
                    does = "issues" if recorded.id == issuers.issuing.id else "is trusted"
                ends = f"until {recorded.issuer.not_after:%Y-%m-%d}"
                listed = "no CRL yet" if crl is None else f"CRL {crl.number} until {crl.next_update:%Y-%m-%d %H:%M} UTC"
                count = (
                    authority_rollover.in_use(tx, recorded.id, now=now) if recorded.kind == IssuerKind.ISSUING else 0
                )
                used = f"{count} device certificates" if recorded.kind == IssuerKind.ISSUING else ""
                name = records[recorded.id].name
                click.echo(f"{name:<12}  {does:<20}  {ends}  {listed}  {used}".rstrip())
    finally:
        portal.close()


@ca_group.command("rollover")
@click.option("--again", is_flag=True, help="Though the last rollover is younger than a day.")
@plainly
def rollover(again: bool) -> None:
    """Make another issuing CA and let it issue from now on; the one before stays trusted.

    Needs the root's key. The portal may serve meanwhile. A rollover that was cut off is gone on with by the next call.
    """
    portal = open_portal(settings_here())
    try:
        name = authority.roll_over(portal, audit.system_actor(portal.tenant_id), click.echo, again=again)
    finally:
        portal.close()
    click.echo(f"Done. Devices get certificates of {name}; move the root's key away again.")


@ca_group.command("retire")
@click.argument("name")
@plainly
def retire(name: str) -> None:
    """Trust a CA no more of which no device has a good certificate; it would happen by itself, too."""
    portal = open_portal(settings_here())
    try:
        authority.retire(portal, audit.system_actor(portal.tenant_id), name)
    finally:
        portal.close()
    click.echo(f"{name} is retired. Its CRL is still published.")
