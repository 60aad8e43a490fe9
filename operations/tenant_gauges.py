"""Gauges of what each tenant has: by tenant, or of all together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from core.metrics import Gauge
from core.states import AttestationVerdict, ClientKind, DeviceStatus
from store.counts import Counts, total

EXPIRING = {"7d": timedelta(days=7), "30d": timedelta(days=30)}
_CONNECTED = "portal_devices_connected"
_Values = Iterable[tuple[tuple[str, ...], float]]  # the values of a gauge, by those of its labels


@dataclass(frozen=True, slots=True)
class _Fact:
    """A gauge, and how its values are read from the counts of a tenant."""

    name: str
    text: str
    values: Callable[[Counts, datetime], _Values]
    labels: tuple[str, ...] = ()


def tenant_gauges(
    by_tenant: Mapping[str, Counts], *, max_tenants: int, now: datetime, connections_known: bool
) -> list[Gauge]:
    """Return the gauges; a single tenant is not named, nor is any if there are more than ``max_tenants``."""
    named = 1 < len(by_tenant) <= max_tenants
    rows = by_tenant if named else {"": total(by_tenant.values())}
    found = []
    for fact in _FACTS:
        samples = [
            ([*key, tenant_id] if named else list(key), float(value))
            for tenant_id, counts in rows.items()
            for key, value in fact.values(counts, now)
            if connections_known or fact.name != _CONNECTED
        ]
        found.append(Gauge(fact.name, fact.text, [*fact.labels, "tenant"] if named else fact.labels, samples))
    return found


def _by_status(kind: ClientKind, *statuses: DeviceStatus) -> Callable[[Counts, datetime], _Values]:
    return lambda counts, _now: [((status,), counts.status[kind, status]) for status in statuses]


def _expiring(kind: ClientKind) -> Callable[[Counts, datetime], _Values]:
    return lambda counts, _now: [((name,), counts.expiring[kind, time]) for name, time in EXPIRING.items()]


def _number(number: Callable[[Counts], float]) -> Callable[[Counts, datetime], _Values]:
    return lambda counts, _now: [((), number(counts))]


def _verdicts(counts: Counts, _now: datetime) -> _Values:
    return [((verdict,), counts.attested[verdict]) for verdict in AttestationVerdict]


def _age(counts: Counts, now: datetime) -> _Values:
    oldest = counts.oldest_event
    return [((), 0.0 if oldest is None else max(0.0, (now - oldest).total_seconds()))]


_FACTS = (
    _Fact("portal_devices", "Devices by status.", _by_status(ClientKind.DEVICE, *DeviceStatus), ("status",)),
    _Fact("portal_devices_attested", "Devices by the verdict about their newest evidence.", _verdicts, ("verdict",)),
    _Fact(
        "portal_applications",
        "Applications by status.",
        _by_status(ClientKind.APPLICATION, DeviceStatus.ACTIVE, DeviceStatus.REVOKED),
        ("status",),
    ),
    _Fact(
        "portal_certificates_expiring",
        "Certificates in use by devices that expire within this time.",
        _expiring(ClientKind.DEVICE),
        ("within",),
    ),
    _Fact(
        "portal_application_certificates_expiring",
        "Certificates in use by applications that expire within this time.",
        _expiring(ClientKind.APPLICATION),
        ("within",),
    ),
    _Fact("portal_bundles_undelivered", "Bundles that wait for their download.", _number(lambda one: one.undelivered)),
    _Fact("portal_audit_entries", "Entries of the audit record.", _number(lambda one: one.audit_entries)),
    _Fact(_CONNECTED, "Devices connected to the broker; no value if not known.", _number(lambda one: one.connected)),
    _Fact("portal_events_waiting", "Events that wait to be sent.", _number(lambda one: one.events_waiting)),
    _Fact("portal_events_dead", "Events that were given up.", _number(lambda one: one.events_dead)),
    _Fact("portal_events_oldest_waiting_seconds", "Age of the oldest event that was not sent; 0 if none waits.", _age),
)
