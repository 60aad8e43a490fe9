"""What devices and applications may do on the broker, and which certificates it refuses, as the database says it."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from sqlalchemy.engine import Connection

from broker.control import DeviceAccess, Draft
from broker_provisioning import add_device_acl, remove_device_acl
from core.states import ClientKind, DeviceStatus
from core.topics import Access, Topic, is_device_id
from pki.client_certificates import common_name
from store import generations
from workflows.authority.issuers import Issuers


def complete_draft(draft: Draft, tx: Connection, issuers: Issuers, now: datetime) -> None:
    """Add to the broker's next generation all that has changed since the one that it is based on."""
    since, every = draft.since, draft.lists_every_device
    for change in generations.acl_changes(tx, since=since, defaults=every):
        update_access(draft, change)
    if draft.lists_certificates:
        names = {recorded.id: recorded.issuer.certificate.subject.public_bytes() for recorded in issuers.issuers}
        for revoked in generations.certificate_changes(tx, since=since, now=now):
            _revoke_certificate(draft, names[revoked.issuer_id], revoked)


def update_access(access: DeviceAccess, change: generations.AclChange) -> None:
    """Let a device use its topics, or deny it everything, as its status says."""
    own = None
    if change.topics is not None:
        own = tuple(Topic(pattern, Access(allowed)) for pattern, allowed in change.topics)
    suspended = change.status is DeviceStatus.SUSPENDED
    if change.status is DeviceStatus.REVOKED or (suspended and not access.keeps_suspended):
        remove_device_acl(access, change.device_id)
    elif suspended or change.status is DeviceStatus.ACTIVE:
        if change.kind is ClientKind.APPLICATION:
            access.grant_application(change.device_id, own or ())
        else:
            add_device_acl(access, change.device_id, own)
    else:
        access.forget(change.device_id)


def _revoke_certificate(draft: Draft, issuer: bytes, revoked: generations.RevokedShown) -> None:
    """Refuse a revoked certificate, and one that is no device's by the identity in it, too."""
    identity = revoked.device_id or _identity_in(revoked.der)
    draft.revoke_certificate(issuer, revoked.serial_number, identity, is_probe=revoked.purpose == "canary")
    if revoked.device_id is None and identity is not None:
        remove_device_acl(draft, identity)


def _identity_in(der: bytes) -> str | None:
    """Return the identity in a certificate; ``None`` if a restore knew only the serial number."""
    try:
        identity = common_name(x509.load_der_x509_certificate(der))
    except ValueError:
        return None
    return identity if is_device_id(identity) else None
