"""The states of devices, certificates and all else that the database keeps, and the moves between them.

Their texts are what the database and the REST interface show.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import IntEnum, StrEnum

from core.errors import StateConflict


class ClientKind(StrEnum):
    """What a client of the broker is: a device, or an application such as a back end, which is none."""

    DEVICE = "device"
    APPLICATION = "application"


class BrokerEngine(StrEnum):
    """What program a broker is."""

    MOSQUITTO = "mosquitto"
    RABBITMQ = "rabbitmq"


class BrokerKind(StrEnum):
    """Who tells a broker what it must enforce: the portal's node that runs beside it, or an agent elsewhere."""

    NODE = "node"
    AGENT = "agent"


class DeviceStatus(StrEnum):
    """State of a device; ``MOVES`` lists how it may change."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"


class CertificateStatus(StrEnum):
    """State of a certificate.

    A renewal makes the previous certificate ``replaced``: it keeps working until its overlap has ended. A suspension
    puts a certificate on hold (``held``, RFC 5280 section 5.3.1), from which it can return.
    """

    ACTIVE = "active"
    REPLACED = "replaced"
    HELD = "held"
    REVOKED = "revoked"


class DeliveryStatus(StrEnum):
    """State of a bundle and its download link; only in the first two is there still a bundle."""

    READY = "ready"
    FETCHING = "fetching"
    DELIVERED = "delivered"
    EXPIRED = "expired"
    REVOKED = "revoked"


class IssuerKind(StrEnum):
    """Which certificates a CA signs: those of CAs, or those of devices and servers."""

    ROOT = "root"
    ISSUING = "issuing"


class IssuerStatus(StrEnum):
    """State of a CA of the portal; a retired one signs CRLs and OCSP answers until its certificates have expired."""

    ACTIVE = "active"
    RETIRED = "retired"


class EnrolmentStatus(StrEnum):
    """State of a device's request for a certificate; ``waiting`` for an operator's decision."""

    WAITING = "waiting"
    APPROVED = "approved"
    ISSUED = "issued"
    REJECTED = "rejected"


class Approval(StrEnum):
    """Who decides about a device that enrols: its credential alone, or an operator."""

    AT_ONCE = "at_once"
    OPERATOR = "operator"


class RepeatedSerial(StrEnum):
    """What becomes of a device that enrols with a serial number that has enrolled with the same token before."""

    OPERATOR = "operator"  # an operator decides whether it is the same device with another key
    SAME_DEVICE = "same_device"  # it is, and its older certificates end
    NEW_DEVICE = "new_device"  # it is another device


class ManufacturerStatus(StrEnum):
    """State of a manufacturer CA, which counts once its key was proven to be in the sender's hands."""

    UNPROVEN = "unproven"
    REGISTERED = "registered"
    REMOVED = "removed"


class AttestationVerdict(StrEnum):
    """What the evidence of a device has shown.

    ``outdated``: it satisfied the appraisal policy when it was shown, and would not satisfy that of today, or it was
    for another key than that of the device's newest certificate.
    """

    PASSED = "passed"
    FAILED = "failed"
    OUTDATED = "outdated"


class EventDeliveryStatus(StrEnum):
    """State of an event on its way to one webhook; ``dead`` after the last attempt failed."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    DEAD = "dead"


class PresenceState(IntEnum):
    """Whether an identity was last seen connected to the broker; the values are in the order of lists."""

    NEVER_SEEN = 0
    OFFLINE = 1
    CONNECTED = 2


METADATA_BYTES = 8192  # of the metadata of a device, as JSON
PENDING_DELIVERY = (DeliveryStatus.READY, DeliveryStatus.FETCHING)
ON_CRL = (CertificateStatus.HELD, CertificateStatus.REVOKED)

MOVES: dict[DeviceStatus, frozenset[DeviceStatus]] = {
    DeviceStatus.PENDING: frozenset({DeviceStatus.ACTIVE, DeviceStatus.REVOKED}),
    DeviceStatus.ACTIVE: frozenset({DeviceStatus.SUSPENDED, DeviceStatus.REVOKED}),
    DeviceStatus.SUSPENDED: frozenset({DeviceStatus.ACTIVE, DeviceStatus.REVOKED}),
    DeviceStatus.REVOKED: frozenset(),
}


def advance(current: DeviceStatus, wanted: DeviceStatus) -> DeviceStatus:
    """Return ``wanted`` if the move is allowed, else raise ``StateConflict``; revoked is final."""
    if wanted not in MOVES[current]:
        raise StateConflict(f"A device that is {current} cannot become {wanted}.")
    return wanted


def renewable_from(not_before: datetime, not_after: datetime, *, from_percent: int) -> datetime:
    """Return when a device may renew a certificate by itself: once ``from_percent`` of its lifetime have passed."""
    return not_before + (not_after - not_before) * from_percent / 100


def check_renewal(
    not_before: datetime, not_after: datetime, now: datetime, *, from_percent: int, grace: timedelta
) -> None:
    """Raise ``StateConflict`` unless a device may renew a certificate with these dates by itself.

    It may from ``renewable_from`` on, until ``grace`` after the certificate has expired.
    """
    opens = renewable_from(not_before, not_after, from_percent=from_percent)
    if now < opens:
        raise StateConflict(
            f"It is too early to renew this certificate; try again after {opens:%Y-%m-%d %H:%M:%S} UTC."
        )
    if now >= not_after + grace:
        raise StateConflict("The certificate has expired; an operator must give the device a new one.")
