"""A device: its life, its certificates, its topics, its connection, and how a revocation takes hold, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise

from core.roles import Permission
from core.states import CertificateStatus, DeviceStatus
from core.topics import expand
from store.audit import AuditRecord
from store.certificates import CertificateRecord
from web.console.pages import Moved, Pages, Shown, Visit
from web.console.registration import new_once
from web.console.watching import steps_of
from workflows.devices import DeviceDetails

PAGES = Pages()
PATH = "/ui/devices/{device_id}"
CERTIFICATES, EVENTS, MOMENTS, RENEWALS = 20, 12, 9, 3  # that are shown at most
_FOLLOWS = timedelta(seconds=2)  # a certificate that is issued so soon after a device is part of its registration
_OF_RECORD = {"device:suspend": ("Suspended", "warn"), "device:resume": ("Resumed", "good")}


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in a device's life; ``kind`` is that of a badge."""

    at: datetime
    title: str
    kind: str = "idle"
    note: str = ""


def path_of(device_id: str) -> str:
    """Return the path of a device's page."""
    return f"/ui/devices/{device_id}"


@PAGES.add("GET", PATH, Permission.READ)
def device(visit: Visit, device_id: str) -> Shown:
    """Show a device."""
    inventory, tenant_id = visit.portal.inventory, visit.actor.tenant_id
    details = inventory.device(tenant_id, device_id)
    certificates = inventory.certificates(tenant_id, device_id)
    entries = _entries(visit, details)
    values = {
        "details": details,
        "device": details.device,
        "certificates": certificates[:CERTIFICATES],
        "certificates_left": max(0, len(certificates) - CERTIFICATES),
        "topics": [(expand(topic, device_id), topic.access.value) for topic in details.topics],
        "life": life_of(details, certificates, entries or ()),
        "entries": None if entries is None else entries[:EVENTS],
        "once": new_once(),
        **_enforcement(visit, details),
    }
    return Shown("device.html", values)


@PAGES.add("GET", f"{PATH}/enforcement", Permission.READ)
def enforcement(visit: Visit, device_id: str) -> Shown | Moved:
    """Show how far a revocation or suspension has taken hold, for the page that watches it."""
    if not visit.wants_fragment:
        return Moved(path_of(device_id))
    details = visit.portal.inventory.device(visit.actor.tenant_id, device_id)
    shown = {"details": details, "device": details.device, "oob": True}
    return Shown("device_enforcement.html", shown | _enforcement(visit, details))


def _enforcement(visit: Visit, details: DeviceDetails) -> dict[str, object]:
    """Return what is shown of a revocation or suspension, which is watched until the device is seen to be gone, too.

    The broker reports who is connected some seconds later than it proves that it has cut the session.
    """
    device_id = details.device.id
    found = visit.portal.enforcements.of(visit.actor.tenant_id, device_id)
    if found is None:
        return {"enforcement": None, "device_id": device_id}
    is_connected = details.connection is not None and details.connection.connected is True
    watched = is_connected or not found.is_enforced
    return {"enforcement": found, "steps": steps_of(found), "device_id": device_id, "watched": watched}


# --- Its life -----------------------------------------------------------------------------------------------------


def _entries(visit: Visit, details: DeviceDetails) -> Sequence[AuditRecord] | None:
    """Return the newest audit entries about a device, for those who may read the record."""
    if not visit.may(Permission.AUDIT):
        return None
    filters = {"object": details.device.name_in_audit}
    return visit.portal.operators.audit(visit.actor.tenant_id, limit=50, before=None, filters=filters)[0]


def life_of(
    details: DeviceDetails, certificates: Sequence[CertificateRecord], entries: Sequence[AuditRecord]
) -> list[Moment]:
    """Return the points of a device's life in the order of time, of many the first ones and the last."""
    found = [Moment(details.device.created_at, "Registered", "good")]
    found += _issued(details, certificates[::-1])
    told = [(entry.at, *_OF_RECORD[entry.action]) for entry in entries if _is_told(entry)]
    if not told and details.device.status is DeviceStatus.SUSPENDED:
        held = [one.revoked_at for one in certificates if one.status is CertificateStatus.HELD and one.revoked_at]
        told = [(max(held), *_OF_RECORD["device:suspend"])] if held else []
    found += [Moment(*moment) for moment in told]
    found += _seen(details)
    if details.device.revoked_at is not None:
        reason = (details.device.revocation_reason or "").replace("_", " ")
        found.append(Moment(details.device.revoked_at, "Revoked", "bad", reason))
    elif details.certificate is not None:
        found.append(Moment(details.certificate.not_after, "Certificate ends", "idle"))
    found.sort(key=lambda moment: moment.at)
    return found if len(found) <= MOMENTS else [*found[:2], *found[2 - MOMENTS :]]


def _is_told(entry: AuditRecord) -> bool:
    return entry.outcome == "done" and entry.action in _OF_RECORD


def _issued(details: DeviceDetails, certificates: Sequence[CertificateRecord]) -> Iterator[Moment]:
    """Yield a moment for the first certificate, if the device came without one, and for the newest renewals."""
    if certificates and certificates[0].issued_at - details.device.created_at > _FOLLOWS:
        yield Moment(certificates[0].issued_at, "Enrolled", "good")
    renewed = [later for _, later in pairwise(certificates)]
    left = len(renewed) - RENEWALS
    for number, one in enumerate(renewed[-RENEWALS:]):
        yield Moment(one.issued_at, "Renewed", "busy", f"after {left} earlier ones" if left > 0 and not number else "")


def _seen(details: DeviceDetails) -> Iterator[Moment]:
    seen = details.connection
    if seen is None:
        return
    if seen.connected and seen.since is not None:
        # The broker reports whole seconds: no device is connected before it is known.
        yield Moment(max(seen.since, details.device.created_at), "Connected", "good")
    elif seen.last_seen is not None:
        yield Moment(seen.last_seen, "Last seen")
