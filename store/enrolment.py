"""The database's record of enrolment tokens with the devices that have asked to be let in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from core.errors import NotFound
from core.states import Approval, EnrolmentStatus
from store.certificates import CERTIFICATE_COLUMNS, CertificateRecord, certificate_record
from store.tables import Certificate, Device
from store.tables_enrolment import Enrolment, EnrolmentToken


@dataclass(frozen=True, slots=True)
class Terms:
    """What becomes of a device that is let in.

    ``name_template`` is its name with ``{number}`` and ``{serial}`` to be filled in; ``approval`` is ``at_once`` or
    ``operator``; ``validity_days`` is ``None`` for what the settings say.
    """

    type: str
    location: str
    firmware: str
    name_template: str
    key_types: tuple[str, ...]
    validity_days: int | None
    approval: Approval


TERMS = ("type", "location", "firmware", "name_template", "key_types", "validity_days", "approval")


def terms_of(row: Sequence[Any]) -> Terms:
    """Read the columns ``TERMS``."""
    values = dict(zip(TERMS, row, strict=True))
    return Terms(**{**values, "key_types": tuple(values["key_types"])})


def terms_values(terms: Terms) -> dict[str, Any]:
    """The columns ``TERMS`` as they are stored."""
    return {name: getattr(terms, name) for name in TERMS} | {"key_types": list(terms.key_types)}


# --- Tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnrolmentTokenRecord:
    """An enrolment token, without its secret; ``device_id`` is that of the one device it is for."""

    id: str
    tenant_id: str
    name: str
    device_id: str | None
    uses_allowed: int
    uses: int
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    terms: Terms


_PLAIN = ("id", "tenant_id", "name", "device_id", "uses_allowed", "uses", "created_at", "expires_at", "revoked_at")
_TOKEN_COLUMNS = tuple(EnrolmentToken.__table__.c[name] for name in (*_PLAIN, *TERMS))


def _token(row: Sequence[Any]) -> EnrolmentTokenRecord:
    plain = dict(zip(_PLAIN, row, strict=False))
    return EnrolmentTokenRecord(**plain, terms=terms_of(row[len(_PLAIN) :]))


def add_enrolment_token(tx: Connection, record: EnrolmentTokenRecord, *, secret_hash: str) -> None:
    """Record a token by the SHA-256 of its secret, in lower-case hex."""
    values = {name: getattr(record, name) for name in _PLAIN} | terms_values(record.terms)
    tx.execute(sa.insert(EnrolmentToken), values | {"secret_hash": secret_hash})


def find_enrolment_token(tx: Connection, secret_hash: str) -> EnrolmentTokenRecord | None:
    """Look a token up by the SHA-256 of its secret; it may be used up, expired or revoked."""
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(EnrolmentToken.secret_hash == secret_hash)).one_or_none()
    return None if row is None else _token(row)


def lock_enrolment_token(tx: Connection, tenant_id: str, token_id: str) -> EnrolmentTokenRecord:
    """Read a token that nobody else may use until the transaction ends."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    return _token(tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own).with_for_update()).one())


def get_enrolment_token(tx: Connection, tenant_id: str, token_id: str) -> EnrolmentTokenRecord:
    """Read a token."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    return _token(tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one())


def count_use(tx: Connection, tenant_id: str, token_id: str) -> None:
    """Count one use of a token; the database refuses more than are allowed."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    tx.execute(sa.update(EnrolmentToken).where(*own).values(uses=EnrolmentToken.uses + 1))


def list_enrolment_tokens(tx: Connection, tenant_id: str, *, limit: int) -> Sequence[EnrolmentTokenRecord]:
    """The newest tokens, newest first."""
    query = sa.select(*_TOKEN_COLUMNS).where(EnrolmentToken.tenant_id == tenant_id)
    rows = tx.execute(query.order_by(EnrolmentToken.created_at.desc(), EnrolmentToken.id).limit(limit))
    return [_token(row) for row in rows]


def revoke_enrolment_token(
    tx: Connection, tenant_id: str, token_id: str, *, revoked_at: datetime
) -> EnrolmentTokenRecord:
    """Revoke a token; one that is revoked already keeps its time. Raises ``NotFound``."""
    own = (EnrolmentToken.tenant_id == tenant_id, EnrolmentToken.id == token_id)
    still = EnrolmentToken.revoked_at.is_(None)
    tx.execute(sa.update(EnrolmentToken).where(*own, still).values(revoked_at=revoked_at))
    row = tx.execute(sa.select(*_TOKEN_COLUMNS).where(*own)).one_or_none()
    if row is None:
        raise NotFound("There is no enrolment token with this id; list them with GET /enrolment-tokens.")
    return _token(row)


# --- Enrolments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnrolmentRecord:
    """A device that has asked to be let in."""

    id: int
    device_id: str
    token_id: str | None
    manufacturer_id: str | None
    identity: str
    key_fingerprint: str
    status: EnrolmentStatus
    certificate_id: int | None


_ENROLMENT = ("id", "device_id", "token_id", "manufacturer_id", "identity", "key_fingerprint", "status",
              "certificate_id")  # fmt: skip
_ENROLMENT_COLUMNS = tuple(Enrolment.__table__.c[name] for name in _ENROLMENT)


def find_enrolment(
    tx: Connection, tenant_id: str, *, token_id: str | None, manufacturer_id: str | None, identity: str
) -> EnrolmentRecord | None:
    """What a device has asked for by this token or manufacturer, ``None`` the first time."""
    means = Enrolment.token_id == token_id if token_id else Enrolment.manufacturer_id == manufacturer_id
    own = (Enrolment.tenant_id == tenant_id, means, Enrolment.identity == identity)
    row = tx.execute(sa.select(*_ENROLMENT_COLUMNS).where(*own)).one_or_none()
    return None if row is None else EnrolmentRecord(*row)


def undecided_enrolment(tx: Connection, tenant_id: str, device_id: str) -> EnrolmentRecord | None:
    """The request of a device that waits for an operator."""
    own = (
        Enrolment.tenant_id == tenant_id,
        Enrolment.device_id == device_id,
        Enrolment.status == EnrolmentStatus.WAITING,
    )
    row = tx.execute(sa.select(*_ENROLMENT_COLUMNS).where(*own).order_by(Enrolment.id).limit(1)).one_or_none()
    return None if row is None else EnrolmentRecord(*row)


def last_enrolment(tx: Connection, tenant_id: str, device_id: str) -> EnrolmentRecord | None:
    """The newest request of a device."""
    own = (Enrolment.tenant_id == tenant_id, Enrolment.device_id == device_id)
    row = tx.execute(sa.select(*_ENROLMENT_COLUMNS).where(*own).order_by(Enrolment.id.desc()).limit(1)).one_or_none()
    return None if row is None else EnrolmentRecord(*row)


def add_enrolment(tx: Connection, tenant_id: str, **values: Any) -> None:
    """Record a device's request; ``values`` are the columns of ``Enrolment`` but for id and tenant."""
    tx.execute(sa.insert(Enrolment), {"tenant_id": tenant_id, **values})


def update_enrolment(tx: Connection, tenant_id: str, enrolment_id: int, **values: Any) -> None:
    """Set columns of a request."""
    own = (Enrolment.tenant_id == tenant_id, Enrolment.id == enrolment_id)
    tx.execute(sa.update(Enrolment).where(*own).values(values))


# --- Certificates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """A certificate of this portal that a client has shown, with the state of its device."""

    tenant_id: str
    certificate: CertificateRecord
    device_status: DeviceStatus


def find_device_certificate(tx: Connection, fingerprint: str) -> ShownCertificate | None:
    """A device's certificate by the SHA-256 of its DER, in whatever state."""
    query = (
        sa.select(Certificate.tenant_id, Device.status, *CERTIFICATE_COLUMNS)
        .join(Device, sa.and_(Device.tenant_id == Certificate.tenant_id, Device.id == Certificate.device_id))
        .where(Certificate.fingerprint == fingerprint, Certificate.purpose == "device")
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else ShownCertificate(row[0], certificate_record(row[2:]), row[1])


def get_certificate(tx: Connection, tenant_id: str, certificate_id: int) -> CertificateRecord:
    """A certificate by its row's id."""
    own = (Certificate.tenant_id == tenant_id, Certificate.id == certificate_id)
    return certificate_record(tx.execute(sa.select(*CERTIFICATE_COLUMNS).where(*own)).one())
