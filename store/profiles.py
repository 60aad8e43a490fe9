"""Certificate profiles in the database, and who has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.errors import FieldProblem, NotFound, ProfileRefused
from core.states import DeviceStatus, ManufacturerStatus
from store.database import columns_of
from store.enrolment_tables import EnrolmentToken, Manufacturer
from store.profile_tables import CertificateProfileRow
from store.tables import Device

DEFAULT = "default"  # the name of the profile that is built in: it has no row


@dataclass(frozen=True, slots=True)
class ProfileRecord:
    """A certificate profile that is not removed, with its rules (``pki/profiles.py``)."""

    id: str
    name: str
    default_days: int | None
    max_days: int | None
    key_types: Sequence[str]
    extended_key_usage: Sequence[str]
    dns_names: Sequence[str]
    ip_addresses: Sequence[str]
    organization: str | None
    organizational_unit: str | None
    serial_number: str | None
    created_at: datetime
    updated_at: datetime


_row = CertificateProfileRow
_SELECT = sa.select(*columns_of(ProfileRecord, _row)).where(
    _row.tenant_id == sa.bindparam("of_tenant"), _row.removed_at.is_(None)
)
_BY_NAME = _SELECT.where(_row.name == sa.bindparam("of_name"))
_HOLD = (
    sa.select(_row.id)
    .where(_row.tenant_id == sa.bindparam("of_tenant"), _row.name == sa.bindparam("of_name"), _row.removed_at.is_(None))
    .with_for_update(read=True)
)


def name_of(profile_id: Any) -> sa.Label[str]:
    """Return the expression for the name of a profile by a column with its id, ``default`` where that is ``NULL``."""
    name = sa.select(_row.name).where(_row.id == profile_id).scalar_subquery()
    return sa.func.coalesce(name, sa.literal_column(f"'{DEFAULT}'")).label("certificate_profile")


def id_of(tenant_id: str, name: str) -> Any:
    """Return the expression for the id of a profile, ``NULL`` if none has the name."""
    named = (_row.tenant_id == tenant_id, _row.name == name, _row.removed_at.is_(None))
    return sa.select(_row.id).where(*named).scalar_subquery()


def find_profile(tx: Connection, tenant_id: str, name: str) -> ProfileRecord | None:
    """Return a profile by its name, ``None`` if there is none, or it is the built-in one."""
    row = tx.execute(_BY_NAME, {"of_tenant": tenant_id, "of_name": name}).one_or_none()
    return None if row is None else ProfileRecord(*row)


def list_profiles(tx: Connection, tenant_id: str) -> Sequence[ProfileRecord]:
    """Return every profile but the built-in one, by name."""
    return [ProfileRecord(*row) for row in tx.execute(_SELECT.order_by(_row.name), {"of_tenant": tenant_id})]


def hold_profile(tx: Connection, tenant_id: str, name: str | None) -> str | None:
    """Return the id of a profile that is to be given to something, ``None`` for the default one.

    It is not removed before the transaction ends. Raises ``ProfileRefused`` for a name that no profile has.
    """
    if name is None or name == DEFAULT:
        return None
    found: str | None = tx.execute(_HOLD, {"of_tenant": tenant_id, "of_name": name}).scalar_one_or_none()
    if found is None:
        raise unknown(name)
    return found


def unknown(name: str) -> ProfileRefused:
    """Return the error for a request that names a profile which does not exist."""
    problem = FieldProblem("profile", "is not the name of a certificate profile")
    return ProfileRefused(f"There is no certificate profile {name}; list them with GET /profiles.", [problem])


def lock_profile(tx: Connection, tenant_id: str, name: str) -> ProfileRecord:
    """Read a profile, and keep others from giving it to something until the transaction ends; raises ``NotFound``."""
    row = tx.execute(_BY_NAME.with_for_update(), {"of_tenant": tenant_id, "of_name": name}).one_or_none()
    if row is None:
        raise NotFound(f"There is no certificate profile {name}; list them with GET /profiles.")
    return ProfileRecord(*row)


def add_profile(tx: Connection, tenant_id: str, profile_id: str, values: Mapping[str, Any], *, now: datetime) -> None:
    """Record a profile with its rules; a unique index refuses a second one of its name."""
    own = {"id": profile_id, "tenant_id": tenant_id, "created_at": now, "updated_at": now}
    tx.execute(sa.insert(_row), {**values, **own})


def update_profile(tx: Connection, profile_id: str, values: Mapping[str, Any], *, now: datetime) -> None:
    """Change rules of a profile."""
    tx.execute(sa.update(_row).where(_row.id == profile_id).values({**values, "updated_at": now}))


def remove_profile(tx: Connection, profile_id: str, *, now: datetime) -> None:
    """Mark a profile as removed; its name is free for another one."""
    tx.execute(sa.update(_row).where(_row.id == profile_id).values(removed_at=now))


def users_of(tx: Connection, tenant_id: str, profile_id: str, *, now: datetime) -> dict[str, int]:
    """Return how many devices, enrolment tokens and manufacturers have a profile, and may need it still."""
    token = EnrolmentToken
    queries = {
        "device": sa.select(Device.id).where(
            Device.tenant_id == tenant_id, Device.profile_id == profile_id, Device.status != DeviceStatus.REVOKED
        ),
        "enrolment token": sa.select(token.id).where(
            token.profile_id == profile_id,
            token.revoked_at.is_(None),
            token.expires_at > now,
            token.uses < token.uses_allowed,
        ),
        "manufacturer": sa.select(Manufacturer.id).where(
            Manufacturer.profile_id == profile_id, Manufacturer.status != ManufacturerStatus.REMOVED
        ),
    }
    counts = {
        what: int(tx.execute(sa.select(sa.func.count()).select_from(query.subquery())).scalar_one())
        for what, query in queries.items()
    }
    return {what: count for what, count in counts.items() if count}
