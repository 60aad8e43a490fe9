"""The states a device can be in with the moves allowed between them."""

from __future__ import annotations

from enum import StrEnum

from errors import StateConflict


class DeviceStatus(StrEnum):
    """State of a device; the text is what the database and the REST interface show."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"


MOVES: dict[DeviceStatus, frozenset[DeviceStatus]] = {
    DeviceStatus.PENDING: frozenset({DeviceStatus.ACTIVE, DeviceStatus.REVOKED}),
    DeviceStatus.ACTIVE: frozenset({DeviceStatus.SUSPENDED, DeviceStatus.REVOKED}),
    DeviceStatus.SUSPENDED: frozenset({DeviceStatus.ACTIVE, DeviceStatus.REVOKED}),
    DeviceStatus.REVOKED: frozenset(),
}


def advance(current: DeviceStatus, wanted: DeviceStatus) -> DeviceStatus:
    """Return ``wanted`` where the move is allowed, else raise ``StateConflict``; revoked is final."""
    if wanted not in MOVES[current]:
        raise StateConflict(f"A device that is {current} cannot become {wanted}.")
    return wanted
