"""The rows of devices as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.device_status import DeviceStatus
from store.tables import Device


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A row of ``devices``."""

    id: str
    tenant_id: str
    external_id: str | None
    name: str
    type: str
    location: str
    firmware: str
    metadata: dict[str, Any]
    own_topics: bool
    status: DeviceStatus
    created_at: datetime
    updated_at: datetime
    revoked_at: datetime | None
    revocation_reason: str | None
    generation: int


DEVICE_COLUMNS = tuple(Device.__table__.c[name] for name in (
    "id", "tenant_id", "external_id", "name", "type", "location", "firmware", "metadata", "own_topics", "status",
    "created_at", "updated_at", "revoked_at", "revocation_reason", "generation",
))  # fmt: skip


def device_record(row: Sequence[Any]) -> DeviceRecord:
    """Read a row of ``DEVICE_COLUMNS``."""
    return DeviceRecord(*row)


def update_device(tx: Connection, tenant_id: str, device_id: str, values: dict[str, Any]) -> None:
    """Set columns of a device, by the columns' names."""
    tx.execute(sa.update(Device).where(Device.tenant_id == tenant_id, Device.id == device_id).values(values))
