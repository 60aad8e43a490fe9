"""The rows of certificates as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from core.states import CertificateStatus
from store.tables import Certificate


@dataclass(frozen=True, slots=True)
class CertificateRecord:
    """A row of ``certificates``: serial number in lower-case hex, fingerprint SHA-256 in lower-case hex."""

    id: int
    issuer_id: int
    device_id: str | None
    purpose: str
    serial_number: str
    fingerprint: str
    der: bytes
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    status: CertificateStatus
    revoked_at: datetime | None
    revocation_reason: str | None


CERTIFICATE_COLUMNS = tuple(Certificate.__table__.c[name] for name in (
    "id", "issuer_id", "device_id", "purpose", "serial_number", "fingerprint", "der", "not_before", "not_after",
    "issued_at", "status", "revoked_at", "revocation_reason",
))  # fmt: skip


def certificate_record(row: Sequence[Any]) -> CertificateRecord:
    """Read a row of ``CERTIFICATE_COLUMNS``."""
    return CertificateRecord(*row)
