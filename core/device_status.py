"""The states a device can be in with the moves allowed between them, and when it may renew."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum

from core.errors import StateConflict


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


def renewable_from(not_before: datetime, not_after: datetime, *, from_percent: int) -> datetime:
    """When a device may begin to renew a certificate with these dates by itself: ``from_percent`` of its life over."""
    return not_before + (not_after - not_before) * from_percent / 100


def check_renewal(
    not_before: datetime, not_after: datetime, now: datetime, *, from_percent: int, grace: timedelta
) -> None:
    """Raise ``StateConflict`` unless a device may renew a certificate with these dates by itself.

    It may once ``from_percent`` of the certificate's life are over, until ``grace`` after its end.
    """
    opens = renewable_from(not_before, not_after, from_percent=from_percent)
    if now < opens:
        raise StateConflict(f"It is too early to renew this certificate; try again from {opens:%Y-%m-%dT%H:%M:%SZ} on.")
    if now >= not_after + grace:
        raise StateConflict("The certificate has expired; an operator must give the device a new one.")
