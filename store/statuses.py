"""The database's answers to whether certificates are good."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import ON_CRL
from store.tables import Certificate

SERIAL_NUMBER_DIGITS = 40  # no certificate has more


@dataclass(frozen=True, slots=True)
class RevocationState:
    """What is recorded of a certificate: ``revoked_at`` is ``None`` for one that is neither revoked nor held."""

    revoked_at: datetime | None
    reason: str | None


_COLUMNS = Certificate.serial_number, Certificate.status, Certificate.revoked_at, Certificate.revocation_reason
# The question for one certificate stands apart because nearly all are that, and it is quicker.
_OF_ONE = sa.select(*_COLUMNS).where(
    Certificate.issuer_id == sa.bindparam("issuer_id"), Certificate.serial_number == sa.bindparam("serial_number")
)
_OF_SEVERAL = sa.select(*_COLUMNS).where(
    Certificate.issuer_id == sa.bindparam("issuer_id"),
    Certificate.serial_number.in_(sa.bindparam("serial_numbers", expanding=True)),
)


def certificate_statuses(tx: Connection, issuer_id: int, serial_numbers: Collection[str]) -> dict[str, RevocationState]:
    """What is recorded of an issuer's certificates by serial number (lower-case hex); one never issued is left out."""
    wanted = sorted({number for number in serial_numbers if len(number) <= SERIAL_NUMBER_DIGITS})
    if not wanted:
        return {}
    if len(wanted) == 1:
        rows = tx.execute(_OF_ONE, {"issuer_id": issuer_id, "serial_number": wanted[0]})
    else:
        rows = tx.execute(_OF_SEVERAL, {"issuer_id": issuer_id, "serial_numbers": wanted})
    return {
        serial_number: RevocationState(revoked_at, reason) if status in ON_CRL else _GOOD
        for serial_number, status, revoked_at, reason in rows
    }


_GOOD = RevocationState(None, None)
