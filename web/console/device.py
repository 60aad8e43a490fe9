"""A device: what it is, its certificates, its topics, whether it is connected."""

from __future__ import annotations

from core.roles import Permission
from core.topics import expand
from web.console.pages import Pages, Shown, Visit

PAGES = Pages()


@PAGES.add("GET", "/ui/devices/{device_id}", Permission.READ)
def device(visit: Visit, device_id: str) -> Shown:
    """Show a device."""
    inventory, tenant_id = visit.portal.inventory, visit.actor.tenant_id
    details = inventory.device(tenant_id, device_id)
    values = {
        "details": details,
        "device": details.device,
        "certificates": inventory.certificates(tenant_id, device_id),
        "topics": [(expand(topic, device_id), topic.access.value) for topic in details.topics],
    }
    return Shown("device.html", values)
