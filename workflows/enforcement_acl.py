"""Gives each device the place in the broker's ACL that the database says."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from broker.acl import Acl
from broker_provisioning import add_device_acl, remove_device_acl
from core.device_status import DeviceStatus
from core.topics import Access, Topic
from store import generations

# In pattern style a device that is out is denied by name for longer than a connection can live that is half-way in
# (95 s), and on for as long as its denial is among the newest: each one more makes the broker's reloads slower.
DENIED_FOR = timedelta(minutes=3)
DENIALS_KEPT = 500


def denials(tx: Connection, tenant_id: str, *, applied: int, now: datetime) -> Sequence[generations.AclChange]:
    """The devices that an ACL with a pattern must deny, because it may still have to keep them out (``Acl.thin``)."""
    return generations.newest_denied(tx, tenant_id, newest=DENIALS_KEPT, applied=applied, since=now - DENIED_FOR)


def put_into_acl(acl: Acl, change: generations.AclChange, now: datetime) -> None:
    """Give a device the place in the ACL that the database says."""
    if change.status in (DeviceStatus.REVOKED, DeviceStatus.SUSPENDED):
        remove_device_acl(acl, change.device_id, now)
    elif change.status is DeviceStatus.ACTIVE:
        own = None
        if change.topics is not None:
            own = tuple(Topic(pattern, Access(access)) for pattern, access in change.topics)
        add_device_acl(acl, change.device_id, own)
    else:
        acl.forget(change.device_id)
