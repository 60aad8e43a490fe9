"""The server's commands for several nodes: of the portal on one database, and of a RabbitMQ cluster."""

from __future__ import annotations

import sys

import click

from operations import authority, node_settings, nodes
from operations.command_base import opened_portal, print_table, settings_of_app, without_traceback
from operations.wiring import utc_now
from store import audit
from store import nodes as store_nodes
from store.scope import ALL_TENANTS


@click.command("invite")
@without_traceback
def invite() -> None:
    """Print a code with which another machine joins once.

    It is valid for an hour. Run portal-server join there, with the same PORTAL_DATABASE_URL.
    """
    with opened_portal() as portal:
        actor = audit.system_actor(portal.first_tenant)
        code, ends = nodes.invite(portal.settings, portal.database, actor, now=portal.clock())
    click.echo(f"Code           {code}")
    click.echo(f"Valid          once, until {ends:%Y-%m-%d %H:%M} UTC")


@click.command("join")
@click.option("--name", metavar="NAME", default="", help="The node's name; else that of the machine.")
@click.option("--code", metavar="CODE", help="The code; asked for, or read from standard input, if it is not given.")
@without_traceback
def join(name: str, code: str | None) -> None:
    """Let this machine be a node of an installation.

    The data folder must be empty, and PORTAL_DATABASE_URL that of the other nodes. The secrets of the installation come
    with the code: the keys of links, the CA keys but for the root's. A passphrase that is a setting does not.
    """
    settings = settings_of_app()
    node = nodes.join(settings, (code or _ask_code()).strip(), name, now=utc_now())
    click.echo(f"Node           {node.name}, with {settings.data_dir}")
    click.echo("Next           start the portal here, and the broker beside it")


def _ask_code() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Code", hide_input=True, err=True))
    code = sys.stdin.readline()
    if not code.strip():
        raise click.UsageError("The code is missing; add --code, or give it on standard input.")
    return code


@click.command("nodes")
@click.option("--remove", metavar="NAME", help="Forget a node that works no more, with the broker beside it.")
@click.option(
    "--change",
    metavar="SETTING",
    help="Let nodes start with different values of a setting for an hour, to change it at one after another.",
)
@without_traceback
def show_nodes(remove: str | None, change: str | None) -> None:
    """List nodes and settings that differ; or forget one."""
    with opened_portal() as portal:
        if change is not None:
            actor = audit.system_actor(portal.first_tenant)
            ends = node_settings.let_change(portal.database, actor, change, now=portal.clock())
            click.echo(f"May differ     until {ends:%Y-%m-%d %H:%M} UTC: restart each node with the new value by then")
            return
        if remove is not None:
            nodes.remove(portal.database, audit.system_actor(portal.first_tenant), remove, now=portal.clock())
            click.echo(f"Removed        {remove}")
            return
        with portal.database.snapshot(sees=ALL_TENANTS) as tx:
            found = [(one, store_nodes.works(tx, one)) for one in store_nodes.list_nodes(tx)]
            differing = node_settings.differences(tx)
    rows = [
        (
            one.name,
            "works" if works else "does not work",
            "" if one.seen_at is None else f"{one.seen_at:%Y-%m-%d %H:%M:%S}",
            one.version or "",
            f"{one.joined_at:%Y-%m-%d %H:%M}",
        )
        for one, works in found
    ]
    print_table(("name", "state", "last seen", "version", "joined"), rows)
    if differing:
        click.echo(node_settings.sentence_about(differing), err=True)


@click.group("rabbitmq")
def rabbitmq_group() -> None:
    """Look after the nodes of a RabbitMQ cluster."""


@rabbitmq_group.command("new-certificate")
@click.argument("node")
@without_traceback
def new_certificate(node: str) -> None:
    """Revoke a node's certificates, and give it a new one.

    They are those by which it asks the portal about its clients: for a node whose key somebody else may have. It
    is called as in PORTAL_RABBITMQ_NODES; one that is not there any more gets none. The portal may serve meanwhile.
    """
    with opened_portal() as portal:
        revoked = portal.questioners.revoke(audit.system_actor(portal.first_tenant), node)
        authority.renew_certificates(portal)
        given = any(one.name == node for one in portal.settings.rabbitmq_nodes)
    click.echo(f"Revoked        {revoked} of {node}, which are refused within a second")
    if given:
        click.echo("Next           it reads the new one within minutes, or at once when it is restarted")
