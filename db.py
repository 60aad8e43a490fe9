"""Devices and their certificates in the database: add, get and revoke them, within the caller's transaction."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NotRequired, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import ApplicationNotFound, DeviceNotFound
from core.states import CertificateStatus, ClientKind, DeviceStatus
from pki.algorithms import certificate_key_fingerprint
from pki.issuers import Reason
from store import keys, webhooks
from store.advances import ADVANCED
from store.certificates import OF_DEVICE
from store.database import UtcDateTime
from store.deliveries import DeliveryRevocation, empty_answers
from store.devices import DEVICE_COLUMNS, CertificateChange, DeviceRecord, update_device
from store.listening import TOLD
from store.prepared import Prepared
from store.presences import add_presences
from store.tables import AclEntry, BrokerState, Certificate, Delivery, Device

# --- Devices ------------------------------------------------------------------------------------------------------

_INSERT_DEVICES = Prepared(sa.insert(Device))


def new_device_id(now: datetime) -> str:
    """Return a UUID that begins with the time (version 7, RFC 9562 section 5.7) and has 74 random bits.

    Devices that are registered one after the other are then neighbours in every index: a commit writes fewer pages.
    """
    milliseconds = int(now.timestamp() * 1000) & (1 << 48) - 1
    random = secrets.randbits(74)
    bits = milliseconds << 80 | 7 << 76 | random >> 62 << 64 | 2 << 62 | random & (1 << 62) - 1
    return str(uuid.UUID(int=bits))


class NewDevice(TypedDict):
    """A device to insert; ``topics`` are pairs of filter and access, or ``None`` for the default ones."""

    tenant_id: str
    device_id: str
    name: str
    type: str
    location: str
    firmware: str
    metadata: dict[str, Any]
    status: DeviceStatus
    topics: Sequence[tuple[str, str]] | None
    created_at: datetime
    generation: int
    external_id: NotRequired[str | None]
    kind: NotRequired[ClientKind]
    profile_id: NotRequired[str | None]
    topics_group_id: NotRequired[str | None]


def add_device(tx: Connection, **device: Unpack[NewDevice]) -> None:
    """Insert a device with its topics."""
    add_devices(tx, [device])


def add_devices(tx: Connection, devices: Sequence[NewDevice]) -> None:
    """Insert devices with their topics, all by one statement each."""
    rows = [_device_row(device) for device in devices]
    if rows:
        _INSERT_DEVICES.run(tx, rows)
        add_presences(tx, [(row["tenant_id"], row["id"], row["created_at"]) for row in rows])
    topics: list[dict[str, Any]] = []
    for device in devices:
        topics += _topic_rows(device["tenant_id"], device["device_id"], device["topics"])
    if topics:
        tx.execute(_INSERT_TOPICS, topics)


def _device_row(device: NewDevice) -> dict[str, Any]:
    unset = {"external_id": None, "kind": ClientKind.DEVICE, "profile_id": None, "topics_group_id": None}
    row: dict[str, Any] = {**unset, **device}
    row["id"] = row.pop("device_id")
    row["own_topics"] = row.pop("topics") is not None
    row["updated_at"] = row["created_at"]
    return row


_DEVICE = sa.select(*DEVICE_COLUMNS).where(
    Device.tenant_id == sa.bindparam("of_tenant"), Device.id == sa.bindparam("of_device")
)
_LOCK_DEVICE = _DEVICE.with_for_update()  # no effect on SQLite, where one writer excludes all others


def get_device(
    tx: Connection,
    tenant_id: str,
    device_id: str,
    *,
    kind: ClientKind | None = ClientKind.DEVICE,
    for_update: bool = False,
) -> DeviceRecord:
    """Read a device, or what else is of ``kind`` (``None``: of any).

    ``for_update`` keeps others from changing it until the transaction ends. Raises ``DeviceNotFound``,
    ``ApplicationNotFound``.
    """
    query = _LOCK_DEVICE if for_update else _DEVICE
    row = tx.execute(query, {"of_tenant": tenant_id, "of_device": device_id}).one_or_none()
    if row is not None and kind in (None, row.kind):
        return DeviceRecord(*row)
    if kind is ClientKind.APPLICATION:
        hint = "check the id with GET /applications" if row is None else "that is a device, see GET /devices/{id}"
        raise ApplicationNotFound(f"There is no application {device_id}; {hint}.")
    hint = "check the id with GET /devices" if row is None else "that is an application, see GET /applications/{id}"
    raise DeviceNotFound(f"There is no device {device_id}; {hint}.")


def replace_topics(
    tx: Connection,
    tenant_id: str,
    device_id: str,
    topics: Sequence[tuple[str, str]] | None,
    *,
    generation: int,
    narrowed: bool,
    group_id: str | None = None,
) -> None:
    """Replace a device's own topics, or with ``None`` return to the default ones.

    ``narrowed`` if it can read less than before, so that its session must end; ``group_id`` is the group whose topics
    they are.
    """
    tx.execute(sa.delete(AclEntry).where(AclEntry.tenant_id == tenant_id, AclEntry.device_id == device_id))
    if rows := _topic_rows(tenant_id, device_id, topics):
        tx.execute(_INSERT_TOPICS, rows)
    values = {"own_topics": topics is not None, "topics_group_id": group_id, "generation": generation}
    update_device(tx, tenant_id, device_id, values | ({"narrowed_generation": generation} if narrowed else {}))


_INSERT_TOPICS = sa.insert(AclEntry)


def _topic_rows(tenant_id: str, device_id: str, topics: Sequence[tuple[str, str]] | None) -> list[dict[str, Any]]:
    return [
        {"tenant_id": tenant_id, "device_id": device_id, "position": position, "filter": pattern, "access": access}
        for position, (pattern, access) in enumerate(topics or ())
    ]


_REVOKE_CERTIFICATES = CertificateChange(
    *OF_DEVICE,
    Certificate.status != CertificateStatus.REVOKED,
    status=CertificateStatus.REVOKED,
    revoked_at=sa.bindparam("at"),
    revocation_reason=sa.bindparam("reason"),
    generation=sa.bindparam("changed_at"),
)
_DESTROY_BUNDLES = DeliveryRevocation(
    Delivery.tenant_id == sa.bindparam("of_tenant"), Delivery.device_id == sa.bindparam("of_device")
)


def revoke_device(
    tx: Connection, tenant_id: str, device_id: str, *, revoked_at: datetime, reason: str, generation: int
) -> None:
    """Revoke a device and all its certificates not revoked yet; destroy its bundles and the answers about it.

    With the reason ``key_compromise`` the keys of all its certificates are certified for nobody any more.
    """
    if reason == Reason.KEY_COMPROMISE:
        _block_keys(tx, tenant_id, device_id, revoked_at)
    values = {"revoked_at": revoked_at, "revocation_reason": reason, "generation": generation}
    update_device(tx, tenant_id, device_id, {"status": DeviceStatus.REVOKED, "updated_at": revoked_at, **values})
    own = {"of_tenant": tenant_id, "of_device": device_id}
    _REVOKE_CERTIFICATES.run(tx, generation=generation, at=revoked_at, reason=reason, **own)
    _DESTROY_BUNDLES.run(tx, **own)
    empty_answers(tx, tenant_id, device_id)


_CHANGE_REASON = CertificateChange(
    *OF_DEVICE,
    Certificate.status == CertificateStatus.REVOKED,
    Certificate.revoked_at == sa.bindparam("at"),
    revocation_reason=sa.bindparam("reason"),
    generation=sa.bindparam("changed_at"),
)


def change_reason(tx: Connection, device: DeviceRecord, reason: str, *, at: datetime, generation: int) -> None:
    """Change the reason of a device that is revoked, and of the certificates that were revoked with it.

    Their time stays; certificates that had ended before keep their reason. With ``key_compromise`` the keys of all its
    certificates are certified for nobody any more.
    """
    if reason == Reason.KEY_COMPROMISE:
        _block_keys(tx, device.tenant_id, device.id, at)
    update_device(tx, device.tenant_id, device.id, {"revocation_reason": reason, "generation": generation})
    own = {"of_tenant": device.tenant_id, "of_device": device.id}
    _CHANGE_REASON.run(tx, generation=generation, at=device.revoked_at, reason=reason, **own)


def _block_keys(tx: Connection, tenant_id: str, device_id: str, at: datetime) -> None:
    own = (Certificate.tenant_id == tenant_id, Certificate.device_id == device_id)
    ders = tx.execute(sa.select(Certificate.der).where(*own)).scalars()
    keys.block_keys(tx, tenant_id, device_id, {certificate_key_fingerprint(der) for der in ders}, at=at)


# --- Certificates -------------------------------------------------------------------------------------------------

_INSERT_CERTIFICATE = Prepared(sa.insert(Certificate).returning(Certificate.id))
_INSERT_CERTIFICATES = Prepared(sa.insert(Certificate))
_NEXT_CERTIFICATE_ID = "SELECT coalesce(max(id), 0) + 1 FROM certificates"
_CERTIFICATE_IDS = sa.select(Certificate.fingerprint, Certificate.id).where(
    Certificate.tenant_id == sa.bindparam("of_tenant"),
    Certificate.fingerprint.in_(sa.bindparam("wanted", expanding=True)),
)


class NewCertificate(TypedDict):
    """A certificate to insert: active, or already revoked if it has ``revoked_at`` and ``reason``."""

    tenant_id: str
    issuer_id: int
    purpose: str
    serial_number: str
    fingerprint: str
    der: bytes
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    device_id: NotRequired[str | None]
    revoked_at: NotRequired[datetime | None]
    reason: NotRequired[str | None]
    generation: NotRequired[int]


def add_certificate(tx: Connection, **certificate: Unpack[NewCertificate]) -> int:
    """Record a certificate, and return its row's id.

    The database refuses a second active one of the same device, and a serial number that its issuer has used.
    """
    return add_certificates(tx, [certificate])[0]


def add_certificates(tx: Connection, certificates: Sequence[NewCertificate]) -> list[int]:
    """Record certificates of one tenant by one statement, and return their rows' ids in the same order."""
    rows = [_certificate_row(certificate) for certificate in certificates]
    if len(rows) == 1:
        return [int(_INSERT_CERTIFICATE.row(tx, rows[0])[0])]
    if not rows:
        return []
    if tx.dialect.name == "sqlite":  # where nobody else writes meanwhile, and ids are given in this order in any case
        first = int(tx.exec_driver_sql(_NEXT_CERTIFICATE_ID).scalar_one())
        ids = list(range(first, first + len(rows)))
        _INSERT_CERTIFICATES.run(tx, [{**row, "id": row_id} for row, row_id in zip(rows, ids, strict=True)])
        return ids
    tx.execute(sa.insert(Certificate), rows)
    fingerprints = [row["fingerprint"] for row in rows]
    parameters = {"of_tenant": rows[0]["tenant_id"], "wanted": fingerprints}
    found = {row.fingerprint: row.id for row in tx.execute(_CERTIFICATE_IDS, parameters)}
    return [found[fingerprint] for fingerprint in fingerprints]


def _certificate_row(certificate: NewCertificate) -> dict[str, Any]:
    row: dict[str, Any] = {"device_id": None, "revoked_at": None, "reason": None, "generation": 0, **certificate}
    row["revocation_reason"] = row.pop("reason")
    row["status"] = CertificateStatus.ACTIVE if row["revoked_at"] is None else CertificateStatus.REVOKED
    return row


# --- The generation that the broker must reach ---------------------------------------------------------------------

_ADVANCE = (
    sa.update(BrokerState)
    .values(
        generation=BrokerState.generation + 1,
        pending_since=sa.func.coalesce(BrokerState.pending_since, sa.bindparam("at", type_=UtcDateTime)),
    )
    .returning(BrokerState.generation)
)


_ADVANCE_AND_TELL: sa.UpdateBase = _ADVANCE.returning(TOLD, webhooks.ANY)
_ADVANCE_ALONE = Prepared(_ADVANCE)


def next_generation(tx: Connection, *, at: datetime) -> int:
    """Advance the generation that the broker must reach, in the transaction of the change, and return the new one.

    It is one for all tenants, as the broker is: else it would not learn of the changes of some. Other nodes hear of it
    at the commit, where there are several brokers.
    """
    tx.info[ADVANCED] = True
    if tx.dialect.name == "sqlite":
        return int(_ADVANCE_ALONE.row(tx, {"at": at})[0])
    generation, _, any_webhook = tx.execute(_ADVANCE_AND_TELL, {"at": at}).one()
    webhooks.note_subscriptions(tx, are_there=any_webhook)
    return int(generation)
