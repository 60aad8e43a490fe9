"""The DNS names and addresses in the certificates of devices: each is one device's of a tenant at a time.

Clients that trust several tenants' CAs take none of them for a server: those certificates are for clients alone, unless
a tenant's CA is below a root of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NameInUse
from core.states import CertificateStatus
from store import audit
from store.profile_tables import DeviceName
from store.tables import Certificate

_BATCH = 500


@dataclass(frozen=True, slots=True)
class NameClaim:
    """The names, in lower case, that a certificate is to give to a device."""

    device_id: str
    names: tuple[str, ...]


def lock(tx: Connection, tenant_id: str) -> None:
    """Let no other transaction of the tenant claim names until this one ends."""
    audit.lock_audit_head(tx, tenant_id)  # which every such transaction takes


def refusals(tx: Connection, tenant_id: str, claims: Sequence[NameClaim], *, now: datetime) -> dict[str, NameInUse]:
    """Return why certificates may not be issued, by the ids of the devices that they are for.

    In a transaction that issues, call ``lock`` first. Of several claims of one name the first counts.
    """
    owners = _living_owners(tx, tenant_id, [name for claim in claims for name in claim.names], now)
    refused: dict[str, NameInUse] = {}
    for claim in claims:
        others = {name: owners[name] for name in claim.names if owners.get(name, claim.device_id) != claim.device_id}
        if not others:
            owners |= dict.fromkeys(claim.names, claim.device_id)
            continue
        name, owner = next(iter(others.items()))
        refused[claim.device_id] = NameInUse(
            f"The name {name} is in a certificate of device {owner}, which is valid; revoke that device, or give this"
            " one other values."
        )
    return refused


def claim_names(tx: Connection, tenant_id: str, claims: Sequence[tuple[NameClaim, int]], *, now: datetime) -> None:
    """Record the names in new certificates, given by their rows' ids, as those of their devices.

    Raises ``NameInUse``; the primary key refuses a second owner, whatever was looked up here.
    """
    lock(tx, tenant_id)
    for error in refusals(tx, tenant_id, [claim for claim, _ in claims], now=now).values():
        raise error
    rows = {
        name: {"device_id": claim.device_id, "certificate_id": certificate_id}
        for claim, certificate_id in claims
        for name in claim.names
    }
    for name, values in sorted(rows.items()):
        own = (DeviceName.tenant_id == tenant_id, DeviceName.name == name)
        if tx.execute(sa.update(DeviceName).where(*own).values(values)).rowcount == 0:
            tx.execute(sa.insert(DeviceName), {"tenant_id": tenant_id, "name": name, **values})


def living_names(tx: Connection, like: Sequence[str], *, now: datetime) -> dict[str, str]:
    """Return the names in valid certificates, of any tenants, that are in ``like``, with the devices' ids.

    A name there may have ``*`` as its first label, which stands for anything.
    """
    matches = [
        DeviceName.name.endswith(name.removeprefix("*"), autoescape=True) if "*" in name else DeviceName.name == name
        for name in like
    ]
    query = sa.select(DeviceName.name, DeviceName.device_id).where(sa.or_(sa.false(), *matches), _is_living(now))
    return {row.name: row.device_id for row in tx.execute(query.order_by(DeviceName.name))}


def _is_living(now: datetime) -> sa.ColumnElement[bool]:
    """Return the condition that a name is in a valid certificate of its device."""
    # A later certificate need not have the name any more; an earlier one may have it and outlive the last that did.
    return (
        sa.select(sa.literal(1))
        .where(
            Certificate.device_id == DeviceName.device_id,
            Certificate.id <= DeviceName.certificate_id,
            Certificate.status != CertificateStatus.REVOKED,
            Certificate.not_after > now,
        )
        .exists()
    )


def _living_owners(tx: Connection, tenant_id: str, names: Sequence[str], now: datetime) -> dict[str, str]:
    owners = dict[str, str]()
    query = sa.select(DeviceName.name, DeviceName.device_id).where(DeviceName.tenant_id == tenant_id, _is_living(now))
    for start in range(0, len(names), _BATCH):
        for name, device_id in tx.execute(query.where(DeviceName.name.in_(names[start : start + _BATCH]))):
            owners[name] = device_id
    return owners
