"""Enrolment tokens, manufacturer CAs, and the requests of the devices that enrol by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound, StateConflict
from core.states import Approval, DeviceStatus, EnrolmentStatus, ManufacturerStatus, RepeatedSerial
from store.database import columns_of, hash_of
from store.enrolment_tables import EnrolmentRow, EnrolmentToken, FactoryKey, Manufacturer, ReenrolmentRow
from store.profiles import DEFAULT, hold_profile, name_of
from store.tables import Device


@dataclass(frozen=True, slots=True)
class EnrolmentProfile:
    """The data that a device is registered with when it enrols, and the conditions for it.

    ``name_template`` is its name with ``{number}`` and ``{serial}`` to be filled in; ``approval`` is ``at_once`` or
    ``operator``; ``validity_days`` is ``None`` for what the certificate profile says, which is given by its name;
    ``repeated_serial`` says what becomes of a device with another key whose serial number has enrolled before;
    ``attestation_policy_id`` is ``None`` if evidence is not looked at.
    """

    type: str
    location: str
    firmware: str
    name_template: str
    key_types: tuple[str, ...]
    validity_days: int | None
    approval: Approval
    repeated_serial: RepeatedSerial
    certificate_profile: str = DEFAULT
    attestation_policy_id: str | None = None


_PROFILE_FIELDS = len(dataclasses.fields(EnrolmentProfile))
Record = TypeVar("Record", "EnrolmentTokenRecord", "ManufacturerRecord")


def _columns(record: type[Record], table: type[EnrolmentToken | Manufacturer]) -> tuple[Any, ...]:
    """Return the columns of a record, with those of its profile, its last field, at the end."""
    names = [field.name for part in (record, EnrolmentProfile) for field in dataclasses.fields(part)]
    return tuple(
        name_of(table.profile_id) if name == "certificate_profile" else table.__table__.c[name]
        for name in names
        if name != "profile"
    )


def _record(kind: type[Record], row: Sequence[Any]) -> Record:
    """Read a row of such columns."""
    profile = EnrolmentProfile(*row[-_PROFILE_FIELDS:])
    profile = dataclasses.replace(profile, key_types=tuple(profile.key_types))
    values: Sequence[Any] = (*row[:-_PROFILE_FIELDS], profile)
    return kind(*values)


def _values(tx: Connection, record: EnrolmentTokenRecord | ManufacturerRecord) -> dict[str, Any]:
    """Return such columns with their values; raises ``ProfileRefused``."""
    values = dataclasses.asdict(record)
    profile: dict[str, Any] = values.pop("profile")
    return _with_profile_id(tx, record.tenant_id, {**values, **profile})


def _with_profile_id(tx: Connection, tenant_id: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the id of a certificate profile in place of its name."""
    if "certificate_profile" in values:
        values["profile_id"] = hold_profile(tx, tenant_id, values.pop("certificate_profile"))
    return values


# --- Tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnrolmentTokenRecord:
    """An enrolment token, without its secret; one for a single device has its ``device_id``.

    ``operator_token_id`` is the token of the operator who made it.
    """

    id: str
    tenant_id: str
    name: str
    device_id: str | None
    uses_allowed: int
    uses: int
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    operator_token_id: str | None
    profile: EnrolmentProfile


_TOKEN_COLUMNS = _columns(EnrolmentTokenRecord, EnrolmentToken)


def add_enrolment_token(tx: Connection, record: EnrolmentTokenRecord, *, secret: str) -> None:
    """Record a token with the hash of its secret; raises ``ProfileRefused`` for a profile that does not exist."""
    tx.execute(sa.insert(EnrolmentToken), _values(tx, record) | {"secret_hash": hash_of(secret)})


def find_enrolment_token(tx: Connection, secret: str) -> EnrolmentTokenRecord | None:
    """Return a token by its secret; it may be used up, expired or revoked."""
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(EnrolmentToken.secret_hash == hash_of(secret))).one_or_none()
    return None if row is None else _record(EnrolmentTokenRecord, row)


def lock_enrolment_token(tx: Connection, tenant_id: str, token_id: str) -> EnrolmentTokenRecord:
    """Read a token and lock it, so that nobody else uses it until the transaction ends; raises ``NotFound``."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own).with_for_update()).one_or_none()
    if row is None:
        raise _no_token()
    return _record(EnrolmentTokenRecord, row)


def get_enrolment_token(tx: Connection, tenant_id: str, token_id: str) -> EnrolmentTokenRecord:
    """Read a token."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    return _record(EnrolmentTokenRecord, tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one())


def set_token_policy(tx: Connection, tenant_id: str, token_id: str, policy_id: str | None) -> None:
    """Set the attestation policy of a token."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    tx.execute(sa.update(EnrolmentToken).where(*own).values(attestation_policy_id=policy_id))


def _no_token() -> NotFound:
    return NotFound("There is no enrolment token with this id; list them with GET /enrolment-tokens.")


def count_use(tx: Connection, tenant_id: str, token_id: str) -> None:
    """Count one use of a token; a constraint refuses more uses than are allowed."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    tx.execute(sa.update(EnrolmentToken).where(*own).values(uses=EnrolmentToken.uses + 1))


def list_enrolment_tokens(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[EnrolmentTokenRecord]:
    """Return the newest ``limit`` tokens, newest first."""
    query = sa.select(*_TOKEN_COLUMNS).where(EnrolmentToken.tenant_id == tenant_id)
    rows = tx.execute(query.order_by(EnrolmentToken.created_at.desc(), EnrolmentToken.id).limit(limit))
    return [_record(EnrolmentTokenRecord, row) for row in rows]


def revoke_enrolment_token(
    tx: Connection, tenant_id: str, token_id: str, *, revoked_at: datetime
) -> EnrolmentTokenRecord:
    """Revoke a token; one that is revoked already keeps its time. Raises ``NotFound``."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    still = EnrolmentToken.revoked_at.is_(None)
    tx.execute(sa.update(EnrolmentToken).where(*own, still).values(revoked_at=revoked_at))
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one_or_none()
    if row is None:
        raise _no_token()
    return _record(EnrolmentTokenRecord, row)


def usable_tokens_made_by(
    tx: Connection, tenant_id: str, operator_token_id: str, *, now: datetime
) -> Sequence[EnrolmentTokenRecord]:
    """Return the enrolment tokens that an operator's token has made and that still admit devices."""
    query = sa.select(*_TOKEN_COLUMNS).where(
        EnrolmentToken.tenant_id == tenant_id,
        EnrolmentToken.operator_token_id == operator_token_id,
        EnrolmentToken.revoked_at.is_(None),
        EnrolmentToken.expires_at > now,
        EnrolmentToken.uses < EnrolmentToken.uses_allowed,
    )
    return [_record(EnrolmentTokenRecord, row) for row in tx.execute(query.order_by(EnrolmentToken.id))]


# --- Manufacturers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManufacturerRecord:
    """A manufacturer's CA: ``unproven`` until its key has signed ``nonce``, then ``registered``, then ``removed``."""

    id: str
    tenant_id: str
    name: str
    der: bytes = field(repr=False)
    fingerprint: str
    not_after: datetime
    status: ManufacturerStatus
    nonce: str
    nonce_expires_at: datetime
    created_at: datetime
    proven_at: datetime | None
    removed_at: datetime | None
    profile: EnrolmentProfile


_MANUFACTURER_COLUMNS = _columns(ManufacturerRecord, Manufacturer)


def add_manufacturer(tx: Connection, record: ManufacturerRecord) -> None:
    """Record a manufacturer; a unique index refuses a second one with the same CA. Raises ``ProfileRefused``."""
    tx.execute(sa.insert(Manufacturer), _values(tx, record))


def get_manufacturer(
    tx: Connection, tenant_id: str, manufacturer_id: str, *, for_update: bool = False
) -> ManufacturerRecord:
    """Read a manufacturer, with ``for_update`` locked until the transaction ends. Raises ``NotFound``."""
    own = (Manufacturer.tenant_id == tenant_id, Manufacturer.id == manufacturer_id)
    query = sa.select(*_MANUFACTURER_COLUMNS).where(*own)
    row = tx.execute(query.with_for_update() if for_update else query).one_or_none()
    if row is None:
        raise NotFound("There is no manufacturer with this id; list them with GET /manufacturers.")
    return _record(ManufacturerRecord, row)


def update_manufacturer(tx: Connection, tenant_id: str, manufacturer_id: str, **values: Any) -> None:
    """Set columns of a manufacturer; a ``certificate_profile`` by its name. Raises ``ProfileRefused``."""
    own = (Manufacturer.tenant_id == tenant_id, Manufacturer.id == manufacturer_id)
    tx.execute(sa.update(Manufacturer).where(*own).values(_with_profile_id(tx, tenant_id, values)))


def list_manufacturers(tx: Connection, tenant_id: str) -> Sequence[ManufacturerRecord]:
    """Return every manufacturer, newest first, including removed ones."""
    query = sa.select(*_MANUFACTURER_COLUMNS).where(Manufacturer.tenant_id == tenant_id)
    return [
        _record(ManufacturerRecord, row)
        for row in tx.execute(query.order_by(Manufacturer.created_at.desc(), Manufacturer.id))
    ]


def registered_manufacturers(tx: Connection, *, tenant_id: str | None = None) -> Sequence[ManufacturerRecord]:
    """Return the registered manufacturers of a tenant, or of all, because a TLS connection does not name its tenant."""
    query = sa.select(*_MANUFACTURER_COLUMNS).where(Manufacturer.status == ManufacturerStatus.REGISTERED)
    query = query if tenant_id is None else query.where(Manufacturer.tenant_id == tenant_id)
    return [_record(ManufacturerRecord, row) for row in tx.execute(query.order_by(Manufacturer.id))]


# --- First requests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnrolmentRecord:
    """A device's first request for a certificate, and what became of it."""

    id: int
    device_id: str
    token_id: str | None
    manufacturer_id: str | None
    identity: str
    key_fingerprint: str
    status: EnrolmentStatus
    certificate_id: int | None
    serial: str | None


_ENROLMENT_COLUMNS = columns_of(EnrolmentRecord, EnrolmentRow)


def find_enrolment(
    tx: Connection, tenant_id: str, *, token_id: str | None, identity: str, serial_hash: str | None = None
) -> EnrolmentRecord | None:
    """Return the request of a device by this token, or without one by its factory key; ``None`` if there is none yet.

    A factory key is looked for over all manufacturers, removed ones too: no device comes back by another one. A device
    is known by its key, or else by the ``serial_hash`` if that is given.
    """
    if token_id is not None:
        of_all: sa.ColumnElement[bool] = EnrolmentRow.token_id == token_id
        ways = [EnrolmentRow.identity == identity]
    else:
        of_all = EnrolmentRow.manufacturer_id.is_not(None)
        further = (FactoryKey.tenant_id == tenant_id, FactoryKey.factory_key == identity)
        ways = [
            EnrolmentRow.factory_key == identity,
            EnrolmentRow.id == sa.select(FactoryKey.enrolment_id).where(*further).scalar_subquery(),
        ]
    if serial_hash is not None:
        ways.append(EnrolmentRow.serial_hash == serial_hash)
    query = sa.select(*_ENROLMENT_COLUMNS).where(EnrolmentRow.tenant_id == tenant_id, of_all)
    rows = (tx.execute(query.where(way)).one_or_none() for way in ways)
    return next((EnrolmentRecord(*row) for row in rows if row is not None), None)


def last_enrolment(tx: Connection, tenant_id: str, device_id: str) -> EnrolmentRecord | None:
    """Return the newest request of a device."""
    own = (EnrolmentRow.tenant_id == tenant_id, EnrolmentRow.device_id == device_id)
    row = tx.execute(sa.select(*_ENROLMENT_COLUMNS).where(*own).order_by(EnrolmentRow.id.desc()).limit(1)).one_or_none()
    return None if row is None else EnrolmentRecord(*row)


def profile_of_device(tx: Connection, tenant_id: str, device_id: str) -> EnrolmentProfile | None:
    """Return the profile by which a device has enrolled last, as it is now; ``None`` if it never did."""
    enrolled = last_enrolment(tx, tenant_id, device_id)
    if enrolled is None:
        return None
    if enrolled.token_id is not None:
        return get_enrolment_token(tx, tenant_id, enrolled.token_id).profile
    return get_manufacturer(tx, tenant_id, enrolled.manufacturer_id or "").profile


def add_enrolment(tx: Connection, tenant_id: str, **values: Any) -> None:
    """Record a device's request; ``values`` are the columns of ``EnrolmentRow`` except id, tenant and factory key."""
    factory_key = None if values["manufacturer_id"] is None else values["identity"]
    tx.execute(sa.insert(EnrolmentRow), {"tenant_id": tenant_id, "factory_key": factory_key, **values})


def add_factory_key(tx: Connection, tenant_id: str, factory_key: str, enrolment_id: int | None) -> None:
    """Have a device be known by another factory key, too; without an enrolment the key admits nobody any more.

    A key that is known already stays as it is.
    """
    own = (FactoryKey.tenant_id == tenant_id, FactoryKey.factory_key == factory_key)
    first = (EnrolmentRow.tenant_id == tenant_id, EnrolmentRow.factory_key == factory_key)
    known = sa.select(sa.exists().where(*own) | sa.exists().where(*first))
    if not tx.execute(known).scalar_one():
        values = {"tenant_id": tenant_id, "factory_key": factory_key, "enrolment_id": enrolment_id}
        tx.execute(sa.insert(FactoryKey), values)


def is_blocked(tx: Connection, tenant_id: str, factory_key: str) -> bool:
    """Return whether a factory key is that of a revoked device that a restored backup did not have."""
    own = (FactoryKey.tenant_id == tenant_id, FactoryKey.factory_key == factory_key)
    return tx.execute(sa.select(sa.exists().where(*own, FactoryKey.enrolment_id.is_(None)))).scalar_one()


def update_enrolment(tx: Connection, tenant_id: str, enrolment_id: int, **values: Any) -> None:
    """Set columns of a request."""
    own = (EnrolmentRow.tenant_id == tenant_id, EnrolmentRow.id == enrolment_id)
    tx.execute(sa.update(EnrolmentRow).where(*own).values(values))


# --- Requests with another key ---------------------------------------------------------------------------------------

# As text, like the conditions of the partial indexes, so that the database uses these.
_FIRST_WAITS = sa.text("enrolments.status = 'waiting'")
_AGAIN_WAITS = sa.text("reenrolments.status = 'waiting'")


@dataclass(frozen=True, slots=True)
class ReenrolmentRecord:
    """The request of an enrolled device for another key; ``status`` is ``waiting``, ``approved`` or ``rejected``."""

    enrolment_id: int
    key_fingerprint: str
    status: EnrolmentStatus


def find_reenrolment(tx: Connection, tenant_id: str, enrolment_id: int) -> ReenrolmentRecord | None:
    """Return the pending request of an enrolled device for another key, ``None`` if there is none."""
    own = (ReenrolmentRow.tenant_id == tenant_id, ReenrolmentRow.enrolment_id == enrolment_id)
    row = tx.execute(sa.select(*columns_of(ReenrolmentRecord, ReenrolmentRow)).where(*own)).one_or_none()
    return None if row is None else ReenrolmentRecord(*row)


def add_reenrolment(
    tx: Connection, tenant_id: str, enrolment_id: int, *, key_fingerprint: str, asked_at: datetime
) -> None:
    """Record a request for a key; it replaces an earlier request, decided or not."""
    own = (ReenrolmentRow.tenant_id == tenant_id, ReenrolmentRow.enrolment_id == enrolment_id)
    tx.execute(sa.delete(ReenrolmentRow).where(*own))
    values = {"key_fingerprint": key_fingerprint, "status": EnrolmentStatus.WAITING, "asked_at": asked_at}
    tx.execute(sa.insert(ReenrolmentRow), {"tenant_id": tenant_id, "enrolment_id": enrolment_id, **values})


def decide_reenrolment(
    tx: Connection,
    tenant_id: str,
    enrolment_id: int,
    *,
    key_fingerprint: str,
    status: EnrolmentStatus,
    decided_at: datetime,
) -> bool:
    """Record a decision about a key; return whether the request was still waiting for it."""
    own = (ReenrolmentRow.tenant_id == tenant_id, ReenrolmentRow.enrolment_id == enrolment_id)
    waits = (ReenrolmentRow.key_fingerprint == key_fingerprint, ReenrolmentRow.status == EnrolmentStatus.WAITING)
    values = {"status": status, "decided_at": decided_at}
    return tx.execute(sa.update(ReenrolmentRow).where(*own, *waits).values(values)).rowcount == 1


def use_reenrolment(tx: Connection, tenant_id: str, enrolment_id: int, key_fingerprint: str) -> None:
    """Use up the approval of a key; raises ``StateConflict`` if it is gone."""
    own = (ReenrolmentRow.tenant_id == tenant_id, ReenrolmentRow.enrolment_id == enrolment_id)
    approved = (ReenrolmentRow.key_fingerprint == key_fingerprint, ReenrolmentRow.status == EnrolmentStatus.APPROVED)
    if tx.execute(sa.delete(ReenrolmentRow).where(*own, *approved)).rowcount != 1:
        raise StateConflict("The device has asked with another key meanwhile; ask again.")


@dataclass(frozen=True, slots=True)
class WaitingDevice:
    """A device about which an operator must decide; ``again`` if it is enrolled and asks for another key."""

    device_id: str
    name: str
    again: bool
    key_fingerprint: str
    token_id: str | None
    manufacturer_id: str | None
    asked_at: datetime
    serial: str | None


_CREDENTIAL = (EnrolmentRow.token_id, EnrolmentRow.manufacturer_id)
_DEVICE_OF_ENROLMENT = sa.and_(Device.tenant_id == EnrolmentRow.tenant_id, Device.id == EnrolmentRow.device_id)


def waiting_enrolments(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[WaitingDevice]:
    """Return the devices whose first request waits, the longest waiting first."""
    query = (
        sa.select(
            Device.id, Device.name, sa.false(), EnrolmentRow.key_fingerprint, *_CREDENTIAL, EnrolmentRow.created_at,
            EnrolmentRow.serial,
        )
        .join(Device, _DEVICE_OF_ENROLMENT)
        .where(EnrolmentRow.tenant_id == tenant_id, _FIRST_WAITS, Device.status == DeviceStatus.PENDING)
    )  # fmt: skip
    rows = tx.execute(query.order_by(EnrolmentRow.created_at, EnrolmentRow.id).limit(limit))
    return [WaitingDevice(*row) for row in rows]


def waiting_reenrolments(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[WaitingDevice]:
    """Return the active devices whose request for another key waits, the longest waiting first."""
    query = (
        sa.select(
            Device.id, Device.name, sa.true(), ReenrolmentRow.key_fingerprint, *_CREDENTIAL, ReenrolmentRow.asked_at,
            EnrolmentRow.serial,
        )
        .select_from(ReenrolmentRow)
        .join(EnrolmentRow, EnrolmentRow.id == ReenrolmentRow.enrolment_id)
        .join(Device, _DEVICE_OF_ENROLMENT)
        .where(ReenrolmentRow.tenant_id == tenant_id, _AGAIN_WAITS, Device.status == DeviceStatus.ACTIVE)
    )  # fmt: skip
    rows = tx.execute(query.order_by(ReenrolmentRow.asked_at, ReenrolmentRow.enrolment_id).limit(limit))
    return [WaitingDevice(*row) for row in rows]
