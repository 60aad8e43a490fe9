"""What tenants are: their names, states, topic prefixes, choices and quotas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import StrEnum

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


_EST_OPERATIONS = frozenset({"cacerts", "csrattrs", "fullcmc", "serverkeygen", "simpleenroll", "simplereenroll"})


class TenantStatus(StrEnum):
    """State of a tenant: of a suspended one nobody is served, one that is being removed is revoked for good."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one tenant may take of what all share; ``None`` for no limit. Raises ``ValueError`` for less than one."""

    devices: int | None = None
    registrations_per_minute: int | None = None
    bulk_uploads: int | None = None
    webhook_deliveries_per_minute: int | None = None

    def __post_init__(self) -> None:
        """Refuse a limit that lets nothing through: a tenant is suspended instead."""
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and limit < 1:
                raise ValueError(f"{field.name} must be 1 or more, or null for no limit")


@dataclass(frozen=True, slots=True)
class TenantChoices:
    """What a tenant has decided otherwise than the installation's settings, which hold where it is ``None``.

    ``device_days`` is the life of a device's certificate, ``key_type`` the kind of a device's key, ``bundle_format``
    that of a bundle for which none was asked, ``link_hours`` the life of a download link.
    """

    device_days: int | None = None
    key_type: str | None = None
    bundle_format: str | None = None
    link_hours: int | None = None


@dataclass(frozen=True, slots=True)
class TenantOnBroker:
    """What the broker must know of a tenant: below ``prefix`` are the topics of its devices."""

    name: str
    prefix: str
    suspended: bool


def check_tenant_name(name: str) -> None:
    """Raise ``ValueError``, with the end of a sentence, unless ``name`` is a DNS label (RFC 1123 section 2.1).

    Nor may it be an operation of EST, whose label it is (RFC 7030 section 3.2.2).
    """
    if not _DNS_LABEL.fullmatch(name):
        raise ValueError("must be 1 to 63 lower-case letters, digits and hyphens, with no hyphen first or last")
    if name in _EST_OPERATIONS:
        raise ValueError("must not be the name of an operation of EST")


def overlapping(prefix: str, others: Iterable[str]) -> str | None:
    """Return the first of ``others`` below which ``prefix`` is, or which is below it; ``None`` if there is none.

    All are topic levels joined by ``/``, without wildcards.
    """
    levels = prefix.split("/")
    for other in others:
        theirs = other.split("/")
        shared = min(len(levels), len(theirs))
        if levels[:shared] == theirs[:shared]:
            return other
    return None
