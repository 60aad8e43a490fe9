"""How many devices and applications each tenant has, kept in the row that whoever changes them locks in any case."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import QuotaReached
from core.states import DeviceStatus
from store.audit import Head, lock_audit_head
from store.prepared import Prepared
from store.tables import AuditHead, Device

_COUNT = Prepared(
    sa.update(AuditHead)
    .where(AuditHead.tenant_id == sa.bindparam("of_tenant"))
    .values(clients=AuditHead.clients + sa.bindparam("more", type_=sa.BigInteger))
    .returning(AuditHead.clients, AuditHead.number, AuditHead.hash, AuditHead.edge)
)
_LOCKED = sa.select(AuditHead.clients).where(AuditHead.tenant_id == sa.bindparam("of_tenant")).with_for_update()


def count_clients(tx: Connection, tenant_id: str, more: int, *, most: int | None = None) -> Head:
    """Count clients that are added, or with a negative number revoked; raise ``QuotaReached`` beyond ``most``.

    Return the head of the audit record, which is locked by the same statement: call it late in a transaction, as
    ``store/audit.py:record``, because until its end others of the tenant wait.
    """
    if not more:
        return lock_audit_head(tx, tenant_id)
    clients, *head = _COUNT.row(tx, {"of_tenant": tenant_id, "more": more})
    if most is not None and more > 0 and clients > most:
        raise quota_reached(most)
    return Head(*head)


def room_for_clients(tx: Connection, tenant_id: str, most: int) -> int:
    """Return how many more a tenant may have that may have ``most``; nobody else adds any until the end."""
    return max(0, most - int(tx.execute(_LOCKED, {"of_tenant": tenant_id}).scalar_one()))


def quota_reached(most: int) -> QuotaReached:
    """Return the refusal of a tenant that has as many as it may."""
    return QuotaReached(
        f"The tenant has as many devices and applications as its quota allows ({most}); revoke some, or ask an"
        " operator of the role system for more."
    )


def recount_clients(tx: Connection) -> None:
    """Count the clients of every tenant anew, after a restore."""
    own = sa.select(sa.func.count()).where(
        Device.tenant_id == AuditHead.tenant_id, Device.status != DeviceStatus.REVOKED
    )
    tx.execute(sa.update(AuditHead).values(clients=own.correlate(AuditHead).scalar_subquery()))
