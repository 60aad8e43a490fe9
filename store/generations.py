"""The generation that the brokers must reach, the one that all have reached, and the changes since, of all tenants.

It is one for the installation: what a broker must enforce is read whoever owns it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import CertificateStatus, ClientKind, DeviceStatus
from store.database import columns_of
from store.devices import TOPICS, topics_by_device
from store.prepared import Question
from store.tables import AclEntry, BrokerState, Certificate, Device, Tenant


@dataclass(frozen=True, slots=True)
class BrokerStateRecord:
    """The generation that a broker must reach, and the last one that it, or every one, was seen to enforce.

    ``pending_since`` is since when the two have differed, ``None`` where they do not.
    """

    generation: int
    applied_generation: int
    applied_at: datetime | None
    pending_since: datetime | None


_BROKER_STATE = sa.select(*columns_of(BrokerStateRecord, BrokerState))


def get_broker_state(tx: Connection) -> BrokerStateRecord:
    """Return the generation that the brokers must reach, and the one that every broker which counts has reached."""
    return BrokerStateRecord(*tx.execute(_BROKER_STATE).one())


# --- What has changed ------------------------------------------------------------------------------------------------

_DENIED = sa.text("devices.status IN ('revoked', 'suspended')")
_ON_A_CRL = sa.text("certificates.generation > 0")
_CHANGED = sa.text("devices.generation > 0")
_OWN_TOPICS = sa.text("devices.own_topics")


@dataclass(frozen=True, slots=True)
class AclChange:
    """A device or application as the broker's control needs it.

    ``topics`` are pairs of filter and access, ``None`` for the default ones.
    """

    tenant_id: str
    device_id: str
    status: DeviceStatus
    topics: tuple[tuple[str, str], ...] | None
    generation: int
    kind: ClientKind = ClientKind.DEVICE


_DEVICES = (
    sa.select(Device.tenant_id, Device.id, Device.status, Device.own_topics, Device.generation, Device.kind)
    .order_by(Device.generation)
    .execution_options(yield_per=5000)
)
_DEVICES_WITH_TOPICS = _DEVICES.where(_OWN_TOPICS)
_SINCE, _UNTIL = Device.generation > sa.bindparam("since"), Device.generation <= sa.bindparam("until")
_CHANGED_DEVICES = _DEVICES.where(_SINCE, _CHANGED)
_OF_DEVICES = TOPICS.where(AclEntry.device_id.in_(sa.bindparam("ids", expanding=True)))


def acl_changes(tx: Connection, *, since: int, defaults: bool, until: int | None = None) -> Iterator[AclChange]:
    """Yield every device whose ACL entry changed after generation ``since``, in the order of the changes.

    From generation 0 on this is the whole ACL, if ``defaults`` includes devices with the default topics. Without these,
    which a pattern line covers, it is the devices with their own topics. Later changes than ``until`` are left out.
    A part of them is in memory at a time.
    """
    parameters = {"since": since} if since > 0 else {}
    devices = _CHANGED_DEVICES if since > 0 else _DEVICES if defaults else _DEVICES_WITH_TOPICS
    if until is not None:
        parameters["until"] = until
        devices = devices.where(_UNTIL)
    for part in tx.execute(devices, parameters).partitions():
        with_topics = [row.id for row in part if row.own_topics]
        topics = topics_by_device(tx, _OF_DEVICES, ids=with_topics) if with_topics else {}
        for tenant_id, device_id, status, has_topics, generation, kind in part:
            own = tuple(topics.get(device_id, ())) if has_topics else None
            yield AclChange(tenant_id, device_id, status, own, generation, kind)


_BESIDES_DEVICES = Question(
    sa.select(
        sa.exists().where(Tenant.generation > sa.bindparam("since"), Tenant.generation > 0),
        sa.exists().where(Certificate.generation > sa.bindparam("since"), _ON_A_CRL),
    )
)


def changed_besides_devices(tx: Connection, since: int) -> tuple[bool, bool]:
    """Return whether a tenant has changed after generation ``since``, and whether a certificate was revoked."""
    row = _BESIDES_DEVICES.within(tx, {"since": since})
    return (True, True) if row is None else (bool(row[0]), bool(row[1]))


def end_of_page(tx: Connection, since: int, size: int) -> int | None:
    """Return the generation of the device that is changed as the ``size``-th after one; ``None`` if there are fewer."""
    later = sa.select(Device.generation).where(Device.generation > since, _CHANGED)
    return tx.execute(later.order_by(Device.generation).offset(size - 1).limit(1)).scalar_one_or_none()


@dataclass(frozen=True, slots=True)
class RevokedShown:
    """A revoked certificate that a client may still show: DER is for those that are no device's."""

    issuer_id: int
    serial_number: str
    device_id: str | None
    purpose: str
    der: bytes


def _revoked_shown(*first: sa.ColumnElement[bool] | sa.TextClause) -> sa.Select[Any]:
    columns = (Certificate.issuer_id, Certificate.serial_number, Certificate.device_id, Certificate.purpose)
    der = sa.case((Certificate.device_id.is_(None), Certificate.der), else_=sa.literal(b"", sa.LargeBinary))
    query = sa.select(*columns, der).where(
        *first,
        Certificate.status == CertificateStatus.REVOKED,
        Certificate.not_after > sa.bindparam("now"),
    )
    return query.execution_options(yield_per=5000)


_REVOKED_SHOWN = _revoked_shown()
_REVOKED_SHOWN_SINCE = _revoked_shown(Certificate.generation > sa.bindparam("since"), _ON_A_CRL)


def certificate_changes(
    tx: Connection, *, since: int, now: datetime, until: int | None = None
) -> Iterator[RevokedShown]:
    """Yield the certificates revoked after generation ``since`` that have not expired at ``now``; from 0 on, all.

    Those that were revoked after ``until`` are left out.
    """
    query = _REVOKED_SHOWN_SINCE if since > 0 else _REVOKED_SHOWN
    if until is not None:
        query = query.where(Certificate.generation <= until)
    for row in tx.execute(query, {"since": since, "now": now}):
        yield RevokedShown(*row)


_TO_DISCONNECT: sa.CompoundSelect[Any] = sa.union(
    sa.select(Device.id).where(
        Device.generation > sa.bindparam("since"), Device.generation <= sa.bindparam("upto"), _DENIED
    ),
    sa.select(Certificate.device_id).where(
        Certificate.generation > sa.bindparam("since"),
        Certificate.generation <= sa.bindparam("upto"),
        _ON_A_CRL,
        Certificate.status == CertificateStatus.REVOKED,
        Certificate.device_id.is_not(None),
    ),
)


_NEWEST = (1 << 63) - 1


def devices_to_disconnect(tx: Connection, *, since: int, upto: int = _NEWEST) -> list[str]:
    """Return the devices whose sessions must end because of a change after generation ``since``, and up to ``upto``.

    They were revoked or suspended, or one of their certificates was revoked, with which the session may have begun; a
    device that has another certificate connects again.
    """
    found = tx.execute(_TO_DISCONNECT, {"since": since, "upto": upto}).scalars()
    return [device_id for device_id in found if device_id]


_NARROWED = sa.select(Device.id).where(
    Device.narrowed_generation > sa.bindparam("since"),
    sa.text("devices.narrowed_generation > 0"),
)


@dataclass(frozen=True, slots=True)
class SessionToEnd:
    """A client whose session must end: ``is_narrowed`` if it has lost topics only, else ``is_revoked`` if for good."""

    tenant_id: str
    device_id: str
    is_revoked: bool = False
    is_narrowed: bool = False


_DENIED_SINCE = sa.and_(Device.generation > sa.bindparam("since"), _DENIED)
_CERTIFICATE_REVOKED = sa.and_(
    Certificate.generation > sa.bindparam("since"), _ON_A_CRL, Certificate.status == CertificateStatus.REVOKED
)
_DENIED_SESSIONS = (
    sa.select(Device.tenant_id, Device.id, Device.status).where(_DENIED_SINCE).execution_options(yield_per=5000)
)
_REVOKED_SESSIONS = (
    sa.select(Certificate.tenant_id, Certificate.device_id)
    .distinct()
    .where(_CERTIFICATE_REVOKED, Certificate.device_id.is_not(None))
    .where(~sa.exists().where(Device.id == Certificate.device_id, _DENIED_SINCE))
    .execution_options(yield_per=5000)
)
_NARROWED_SESSIONS = (
    sa.select(Device.tenant_id, Device.id)
    .where(Device.narrowed_generation > sa.bindparam("since"), sa.text("devices.narrowed_generation > 0"))
    .where(~_DENIED_SINCE, ~sa.exists().where(Certificate.device_id == Device.id, _CERTIFICATE_REVOKED))
    .execution_options(yield_per=5000)
)


def sessions_to_end(tx: Connection, since: int) -> Iterator[SessionToEnd]:
    """Yield the clients of which something was taken away after generation ``since``, each once.

    They are those of ``devices_to_disconnect``, and those of ``narrowed_since`` that are not among them.
    """
    for tenant_id, device_id, status in tx.execute(_DENIED_SESSIONS, {"since": since}):
        yield SessionToEnd(tenant_id, device_id, is_revoked=status == DeviceStatus.REVOKED)
    for tenant_id, of_certificate in tx.execute(_REVOKED_SESSIONS, {"since": since}):
        yield SessionToEnd(tenant_id, of_certificate or "")
    for tenant_id, device_id in tx.execute(_NARROWED_SESSIONS, {"since": since}):
        yield SessionToEnd(tenant_id, device_id, is_narrowed=True)


_TAKES_AWAY = sa.select(
    sa.or_(
        sa.exists().where(Device.generation > sa.bindparam("since"), _DENIED),
        sa.exists().where(Certificate.generation > sa.bindparam("since"), _ON_A_CRL),
        sa.exists().where(
            Device.narrowed_generation > sa.bindparam("since"), sa.text("devices.narrowed_generation > 0")
        ),
    )
)


def takes_away(tx: Connection, since: int) -> bool:
    """Return whether anything was taken away from a client after generation ``since``, and not only granted."""
    return bool(tx.execute(_TAKES_AWAY, {"since": since}).scalar_one())


def narrowed_since(tx: Connection, since: int) -> list[str]:
    """Return the devices that lost topics which they could read after generation ``since``."""
    return list(tx.execute(_NARROWED, {"since": since}).scalars())


def revoked_since(tx: Connection, since: int) -> dict[str, str]:
    """Return the devices that were revoked after generation ``since``, each with its tenant."""
    columns = (Device.id, Device.tenant_id)
    query = sa.select(*columns).where(Device.generation > since, _DENIED, Device.status == DeviceStatus.REVOKED)
    return {row.id: row.tenant_id for row in tx.execute(query)}


def devices_denied_since(tx: Connection, since: datetime) -> list[str]:
    """Return devices revoked or suspended after a time; a connection of theirs may have been half open then."""
    query = sa.select(Device.id, Device.updated_at).where(_DENIED).order_by(Device.generation.desc())
    with tx.execute(query.execution_options(yield_per=1000)) as rows:
        return [device_id for device_id, _at in itertools.takewhile(lambda row: row.updated_at > since, rows)]


def superseded_between(tx: Connection, start: datetime, end: datetime) -> list[tuple[int, str]]:
    """Return certificates of active devices that were superseded in a span of time, as pairs of row id and device.

    Only the newest thousand revocations are examined.
    """
    newest = (
        sa.select(Certificate.id, Certificate.device_id, Certificate.revoked_at, Certificate.revocation_reason)
        .where(_ON_A_CRL, Certificate.status == CertificateStatus.REVOKED)
        .order_by(Certificate.generation.desc())
        .limit(1000)
        .subquery()
    )
    rows = tx.execute(
        sa.select(newest.c.id, newest.c.device_id)
        .join(Device, Device.id == newest.c.device_id)
        .where(
            newest.c.revocation_reason == "superseded",
            newest.c.revoked_at > start,
            newest.c.revoked_at <= end,
            Device.status == DeviceStatus.ACTIVE,
        )
    )
    return [(row.id, row.device_id) for row in rows]
