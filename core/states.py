"""The states of everything the database keeps; the texts are what the database and the REST interface show."""

from __future__ import annotations

from enum import StrEnum


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


class ManufacturerStatus(StrEnum):
    """State of a manufacturer CA, which counts once its key was proven to be in the sender's hands."""

    UNPROVEN = "unproven"
    REGISTERED = "registered"
    REMOVED = "removed"


class EventDeliveryStatus(StrEnum):
    """State of an event on its way to one webhook; ``dead`` after the last attempt failed."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    DEAD = "dead"


PENDING_DELIVERY = (DeliveryStatus.READY, DeliveryStatus.FETCHING)
ON_CRL = (CertificateStatus.HELD, CertificateStatus.REVOKED)
