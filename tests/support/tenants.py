"""Tenants beside the first one, as tests add them: with the CA that signs for their devices."""

from __future__ import annotations

from operations.wiring import Portal
from store import audit, tenants
from workflows.authority.creation import create_tenant_issuer


def add_tenant(portal: Portal, tenant_id: str, *, own_root: bool = False) -> None:
    """Add a tenant with an issuing CA."""
    with portal.database.transaction() as tx:
        tenants.add_tenant(tx, tenant_id, created_at=portal.clock())
    assert add_issuer(portal, tenant_id, own_root=own_root) is None


def add_issuer(portal: Portal, tenant_id: str, *, own_root: bool = False) -> str | None:
    """Create the issuing CA of a tenant that is recorded already."""
    return create_tenant_issuer(
        portal.database,
        portal.authority,
        portal.keys,
        portal.settings,
        audit.system_actor(tenant_id),
        own_root=own_root,
        now=portal.clock(),
    )
