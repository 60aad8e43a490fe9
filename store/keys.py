"""The public keys of devices: whose each is, and which were compromised and are certified for nobody any more."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import KeyCompromised, KeyInUse, PortalError
from core.states import DeviceStatus
from store import audit
from store.database import columns_of
from store.prepared import Prepared, Question
from store.tables import Device, DeviceKey

_BATCH = 500
_INSERT = Prepared(sa.insert(DeviceKey))


@dataclass(frozen=True, slots=True)
class _Known:
    """A key that was recorded, with the status of its device, ``None`` if there is none."""

    tenant_id: str
    key_fingerprint: str
    device_id: str | None
    compromised_at: datetime | None
    status: DeviceStatus | None


def _known_where(wanted: sa.ColumnElement[bool]) -> sa.Select[*tuple[Any, ...]]:
    return (
        sa.select(*columns_of(_Known, DeviceKey, status=Device.status.expression))
        .outerjoin(Device, sa.and_(Device.tenant_id == DeviceKey.tenant_id, Device.id == DeviceKey.device_id))
        .where(
            sa.or_(  # each has an index of its own
                sa.and_(DeviceKey.tenant_id == sa.bindparam("of_tenant"), wanted),
                sa.and_(DeviceKey.compromised_at.is_not(None), wanted),
            )
        )
    )


_KNOWN_ONE = Question(_known_where(DeviceKey.key_fingerprint == sa.bindparam("wanted")))
_KNOWN = _known_where(DeviceKey.key_fingerprint.in_(sa.bindparam("wanted", expanding=True)))


@dataclass(frozen=True, slots=True)
class KeyClaim:
    """A key, by the SHA-256 of its SubjectPublicKeyInfo in hex, that is to be certified for a device.

    ``is_new`` says that the portal has just made it, so that nobody else can have it.
    """

    key_fingerprint: str
    device_id: str
    is_new: bool = False


def refusals(tx: Connection, tenant_id: str, claims: Sequence[KeyClaim]) -> dict[str, PortalError]:
    """Return why keys are not certified, ``KeyCompromised`` or ``KeyInUse`` by the id of the device that wants one.

    A key is one device's of the tenant until that is revoked; one that was compromised in any tenant is in all of them,
    and which tenant that was is not said. In a transaction that certifies, call ``lock`` first.
    """
    wanted = [claim for claim in claims if not claim.is_new]
    return _refusals(wanted, *_known(tx, tenant_id, [claim.key_fingerprint for claim in wanted]))


def _refusals(
    wanted: Sequence[KeyClaim], known: Mapping[str, _Known], compromised: Collection[str]
) -> dict[str, PortalError]:
    refused: dict[str, PortalError] = {}
    taken: dict[str, str | None] = {}
    for claim in wanted:
        row = known.get(claim.key_fingerprint)
        if claim.key_fingerprint in compromised:
            refused[claim.device_id] = KeyCompromised("This key was revoked as compromised; make a new key.")
            continue
        in_use = row is not None and row.status != DeviceStatus.REVOKED
        owner = taken.setdefault(claim.key_fingerprint, row.device_id if row and in_use else claim.device_id)
        if owner != claim.device_id:
            refused[claim.device_id] = KeyInUse(f"This key is that of device {owner}; make a new key for this device.")
    return refused


def check_key(tx: Connection, tenant_id: str, key_fingerprint: str, device_id: str) -> None:
    """Raise ``KeyCompromised`` or ``KeyInUse`` if a device may not have this key."""
    for error in refusals(tx, tenant_id, [KeyClaim(key_fingerprint, device_id)]).values():
        raise error


def lock(tx: Connection, tenant_id: str) -> None:
    """Let no other transaction claim or block a key that a client has, until this one ends."""
    audit.lock_audit_head(tx, tenant_id)  # which every such transaction takes: another lock could make two wait


def claim_keys(tx: Connection, tenant_id: str, claims: Sequence[KeyClaim], *, locked: bool = False) -> None:
    """Record keys as those of the devices that are given certificates for them now.

    ``locked`` says that the transaction has the lock of ``lock`` already. Raises ``KeyCompromised`` or ``KeyInUse``;
    the primary key refuses a second owner, whatever was looked up here.
    """
    of_clients = [claim for claim in claims if not claim.is_new]
    known: Mapping[str, _Known] = {}
    if of_clients:
        if not locked:
            lock(tx, tenant_id)
        known, compromised = _known(tx, tenant_id, [claim.key_fingerprint for claim in of_clients])
        for error in _refusals(of_clients, known, compromised).values():
            raise error
    for claim in of_clients:
        if claim.key_fingerprint in known:
            tx.execute(sa.update(DeviceKey).where(*_key(tenant_id, claim)).values(device_id=claim.device_id))
    new = [claim for claim in claims if claim.key_fingerprint not in known]
    if new:
        _INSERT.run(tx, [_values(tenant_id, claim.key_fingerprint, claim.device_id) for claim in new])


def block_keys(
    tx: Connection, tenant_id: str, device_id: str | None, key_fingerprints: Collection[str], *, at: datetime
) -> None:
    """Have keys certified for nobody from now on; one that is blocked already keeps its time."""
    lock(tx, tenant_id)
    known, _ = _known(tx, tenant_id, list(key_fingerprints))
    free = [fingerprint for fingerprint, row in known.items() if row.compromised_at is None]
    for some in _batches(free):
        own = (DeviceKey.tenant_id == tenant_id, DeviceKey.key_fingerprint.in_(some))
        tx.execute(sa.update(DeviceKey).where(*own).values(compromised_at=at))
    new = [fingerprint for fingerprint in key_fingerprints if fingerprint not in known]
    if new:
        _INSERT.run(tx, [_values(tenant_id, fingerprint, device_id, at) for fingerprint in new])


def _known(tx: Connection, tenant_id: str, key_fingerprints: Sequence[str]) -> tuple[dict[str, _Known], set[str]]:
    """Return the rows of a tenant's keys by their fingerprints, and which keys were compromised in any tenant."""
    own, compromised = dict[str, _Known](), set[str]()
    for some in _batches(key_fingerprints):
        if len(some) == 1:
            rows = _KNOWN_ONE.rows(tx, {"of_tenant": tenant_id, "wanted": some[0]})
        else:
            rows = tx.execute(_KNOWN, {"of_tenant": tenant_id, "wanted": some}).all()
        for row in (_Known(*row) for row in rows):
            if row.tenant_id == tenant_id:
                own[row.key_fingerprint] = row
            if row.compromised_at is not None:
                compromised.add(row.key_fingerprint)
    return own, compromised


def _batches(key_fingerprints: Sequence[str]) -> Iterator[Sequence[str]]:
    return (key_fingerprints[start : start + _BATCH] for start in range(0, len(key_fingerprints), _BATCH))


def _key(tenant_id: str, claim: KeyClaim) -> tuple[sa.ColumnElement[bool], ...]:
    return DeviceKey.tenant_id == tenant_id, DeviceKey.key_fingerprint == claim.key_fingerprint


def _values(
    tenant_id: str, key_fingerprint: str, device_id: str | None, compromised_at: datetime | None = None
) -> dict[str, str | datetime | None]:
    return {
        "tenant_id": tenant_id,
        "key_fingerprint": key_fingerprint,
        "device_id": device_id,
        "compromised_at": compromised_at,
    }
