"""The server's commands about the nodes of a RabbitMQ cluster, ``portal-server rabbitmq …``."""

from __future__ import annotations

import click

from operations import authority
from operations.command_base import opened_portal, without_traceback
from store import audit


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
