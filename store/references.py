"""Devices by what people call them: an id, a name, an external id, or the beginning of an id."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import ClientKind
from core.topics import is_device_id
from store.tables import Device

MAX_CANDIDATES = 20  # devices that one text may mean, of each kind
_PREFIX = re.compile("[0-9a-f]{4,8}|[0-9a-f]{8}-[0-9a-f-]{0,27}")
_CANDIDATES = (
    sa.select(Device.id, Device.name, Device.external_id)
    .where(Device.tenant_id == sa.bindparam("of_tenant"), Device.kind == ClientKind.DEVICE)
    .limit(MAX_CANDIDATES)
)
_BY_ID = _CANDIDATES.where(Device.id == sa.bindparam("text"))
_BY_EXTERNAL_ID = _CANDIDATES.where(Device.external_id == sa.bindparam("text"))
_BY_NAME = _CANDIDATES.where(Device.name == sa.bindparam("text"))
_BY_PREFIX = _CANDIDATES.where(Device.id >= sa.bindparam("text"), Device.id < sa.bindparam("end"))


_ANY_KIND = (
    sa.select(Device.id, Device.name, Device.external_id)
    .where(Device.tenant_id == sa.bindparam("of_tenant"), Device.kind == sa.bindparam("of_kind"))
    .order_by(Device.id)
    .limit(MAX_CANDIDATES)
)
_IDENTIFIED = {
    "name": _ANY_KIND.where(Device.name == sa.bindparam("text")),
    "external_id": _ANY_KIND.where(Device.external_id == sa.bindparam("text")),
    "id": _ANY_KIND.where(Device.id >= sa.bindparam("text"), Device.id < sa.bindparam("end")),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that a text may mean."""

    id: str
    name: str
    external_id: str | None


def candidates(tx: Connection, tenant_id: str, text: str) -> list[Candidate]:
    """Return the devices that ``text`` may mean, ``MAX_CANDIDATES`` of each kind at most, by their ids.

    A whole id means the device with that id alone, whatever others are called. Each of the others counts as much as
    the next: who names a device as another's external id makes the text ambiguous, and does not take its place.
    """
    lowered = text.lower()
    if is_device_id(lowered):
        rows = tx.execute(_BY_ID, {"of_tenant": tenant_id, "text": lowered}).all()
        return [Candidate(*row) for row in rows]
    found: dict[str, Candidate] = {}
    for query in (_BY_EXTERNAL_ID, _BY_NAME):
        found |= {row.id: Candidate(*row) for row in tx.execute(query, {"of_tenant": tenant_id, "text": text})}
    if _PREFIX.fullmatch(lowered):
        span = {"of_tenant": tenant_id, "text": lowered, "end": lowered + "g"}  # g follows every hexadecimal digit
        found |= {row.id: Candidate(*row) for row in tx.execute(_BY_PREFIX, span)}
    return [found[device_id] for device_id in sorted(found)]


def identified(tx: Connection, tenant_id: str, kind: ClientKind, by: str, text: str) -> list[Candidate]:
    """Return the devices, or applications, with this ``name`` or ``external_id``, or whose ``id`` begins so.

    There are ``MAX_CANDIDATES`` at most, by their ids; ``by`` says which of the three counts.
    """
    parameters = {"of_tenant": tenant_id, "of_kind": kind, "text": text}
    if by == "id":
        parameters["end"] = text + "g"  # which follows every hexadecimal digit
    return [Candidate(*row) for row in tx.execute(_IDENTIFIED[by], parameters)]
