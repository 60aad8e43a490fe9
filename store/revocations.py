"""The database's record of what the CRLs must list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from store.tables import Certificate, Crl

_AT_ONCE = 500  # ids in one query
# Literals, not parameters: a partial index serves a query only where the text of its condition is seen in it.
_REVOKED = (sa.text("certificates.status IN ('held', 'revoked')"), sa.text("certificates.status = 'revoked'"))
_HELD = (sa.text("certificates.status IN ('held', 'revoked')"), sa.text("certificates.status = 'held'"))
# Made once: every fetch of a CRL asks it.
_CRL_HEAD = sa.select(Crl.issuer_id, Crl.number, Crl.this_update, Crl.next_update, Crl.generation).where(
    Crl.issuer_id == sa.bindparam("of_issuer")
)


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """What a CRL says of the certificate of row ``id``: serial number in lower-case hex."""

    id: int
    serial_number: str
    revoked_at: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class CrlHead:
    """Number, times and generation of the newest CRL of an issuer."""

    issuer_id: int
    number: int
    this_update: datetime
    next_update: datetime
    generation: int


def get_crl_head(tx: Connection, issuer_id: int) -> CrlHead | None:
    """What the newest CRL of an issuer says of itself, without the CRL; ``None`` before the first."""
    row = tx.execute(_CRL_HEAD, {"of_issuer": issuer_id}).one_or_none()
    return None if row is None else CrlHead(*row)


def count_revoked(tx: Connection, issuer_id: int, *, now: datetime) -> int:
    """How many of the issuer's certificates are revoked for good and not expired at ``now``, from an index alone."""
    conditions = (Certificate.issuer_id == issuer_id, *_REVOKED, Certificate.not_after > now)
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*conditions)).scalar_one()


def revoked_ids(tx: Connection, issuer_id: int, *, after: datetime, until: datetime | None = None) -> Sequence[int]:
    """Rows of the issuer's certificates that are revoked for good and end after a time, from an index alone.

    With ``until``, only those that end then or before.
    """
    query = sa.select(Certificate.id).where(
        Certificate.issuer_id == issuer_id, *_REVOKED, Certificate.not_after > after
    )
    if until is not None:
        query = query.where(Certificate.not_after <= until)
    return tx.execute(query).scalars().all()


def revoked_since(tx: Connection, issuer_id: int, generation: int, *, now: datetime) -> Iterator[RevokedCertificate]:
    """What a CRL says of the issuer's certificates revoked after a generation and not expired at ``now``."""
    return _entries(
        tx,
        Certificate.generation > generation,  # before the next, by which SQLite would else read the index
        sa.text("certificates.generation > 0"),
        # An expression, so that no index of the issuer's serves it: that would be read from one end to the other.
        Certificate.issuer_id + 0 == issuer_id,
        sa.text("certificates.status = 'revoked'"),
        Certificate.not_after > now,
    )


def revoked_certificates(tx: Connection, ids: Sequence[int]) -> Iterator[RevokedCertificate]:
    """What a CRL says of the certificates of these rows."""
    for start in range(0, len(ids), _AT_ONCE):
        yield from _entries(tx, Certificate.id.in_(ids[start : start + _AT_ONCE]))


def held_certificates(tx: Connection, issuer_id: int, *, now: datetime) -> Iterator[RevokedCertificate]:
    """What a CRL says of the issuer's certificates that are on hold and not expired at ``now``."""
    return _entries(tx, Certificate.issuer_id == issuer_id, *_HELD, Certificate.not_after > now)


def _entries(tx: Connection, *conditions: sa.ColumnElement[bool] | sa.TextClause) -> Iterator[RevokedCertificate]:
    query = sa.select(
        Certificate.id, Certificate.serial_number, Certificate.revoked_at, Certificate.revocation_reason
    ).where(*conditions)
    for row_id, serial_number, revoked_at, reason in tx.execute(query):
        if revoked_at is not None:  # a constraint of the table says so
            yield RevokedCertificate(row_id, serial_number, revoked_at, reason or "unspecified")
