"""The database's record of manufacturer CAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import NotFound
from core.states import ManufacturerStatus
from store.enrolment import TERMS, Terms, terms_of, terms_values
from store.tables_enrolment import Manufacturer


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
    terms: Terms


_PLAIN = ("id", "tenant_id", "name", "der", "fingerprint", "not_after", "status", "nonce", "nonce_expires_at",
          "created_at", "proven_at", "removed_at")  # fmt: skip
_COLUMNS = tuple(Manufacturer.__table__.c[name] for name in (*_PLAIN, *TERMS))


def _record(row: Sequence[Any]) -> ManufacturerRecord:
    plain = dict(zip(_PLAIN, row, strict=False))
    return ManufacturerRecord(**plain, terms=terms_of(row[len(_PLAIN) :]))


def add_manufacturer(tx: Connection, record: ManufacturerRecord) -> None:
    """Record a manufacturer; the database refuses a second one of the same CA."""
    values = {name: getattr(record, name) for name in _PLAIN} | terms_values(record.terms)
    tx.execute(sa.insert(Manufacturer), values)


def get_manufacturer(
    tx: Connection, tenant_id: str, manufacturer_id: str, *, for_update: bool = False
) -> ManufacturerRecord:
    """Read a manufacturer; ``for_update`` keeps others from changing it meanwhile. Raises ``NotFound``."""
    own = (Manufacturer.tenant_id == tenant_id, Manufacturer.id == manufacturer_id)
    query = sa.select(*_COLUMNS).where(*own)
    row = tx.execute(query.with_for_update() if for_update else query).one_or_none()
    if row is None:
        raise NotFound("There is no manufacturer with this id; list them with GET /manufacturers.")
    return _record(row)


def update_manufacturer(tx: Connection, tenant_id: str, manufacturer_id: str, **values: Any) -> None:
    """Set columns of a manufacturer."""
    own = (Manufacturer.tenant_id == tenant_id, Manufacturer.id == manufacturer_id)
    tx.execute(sa.update(Manufacturer).where(*own).values(values))


def list_manufacturers(tx: Connection, tenant_id: str) -> Sequence[ManufacturerRecord]:
    """Every manufacturer, newest first, those that were removed, too."""
    query = sa.select(*_COLUMNS).where(Manufacturer.tenant_id == tenant_id)
    return [_record(row) for row in tx.execute(query.order_by(Manufacturer.created_at.desc(), Manufacturer.id))]


def registered_manufacturers(tx: Connection) -> Sequence[ManufacturerRecord]:
    """Those of every tenant whose certificates count: a TLS connection does not tell yet whose portal it is for."""
    query = sa.select(*_COLUMNS).where(Manufacturer.status == ManufacturerStatus.REGISTERED)
    return [_record(row) for row in tx.execute(query.order_by(Manufacturer.id))]
