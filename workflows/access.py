"""What devices and applications may do on the broker, and which certificates it refuses, as the database says it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from sqlalchemy.engine import Connection

from broker.control import DeviceAccess, Draft
from broker_provisioning import add_device_acl, remove_device_acl
from core.states import ClientKind, DeviceStatus
from core.tenants import TenantOnBroker, TenantStatus
from core.topics import Access, Topic, is_device_id
from pki.client_certificates import common_name
from store import generations, tenants
from store.tables import DEFAULT_TENANT
from store.tenants import TenantRecord
from workflows.authority.issuers import Issuers


class BrokerTenants:
    """The tenants as a transaction sees them and the broker must know them, each read once."""

    def __init__(self, tx: Connection) -> None:
        self._tx = tx
        self._known: dict[str, TenantOnBroker] = {}

    def of(self, tenant_id: str) -> TenantOnBroker | None:
        """Return a tenant, ``None`` for the first one; raises ``NotFound``."""
        if tenant_id == DEFAULT_TENANT:
            return None
        if tenant_id not in self._known:
            self._known[tenant_id] = on_broker(tenants.get_tenant(self._tx, tenant_id))
        return self._known[tenant_id]

    def changed(self, since: int) -> Sequence[TenantOnBroker]:
        """Return the tenants, but the first, of which the broker must learn since a generation; from 0 on, all."""
        rows = tenants.changed_tenants(self._tx, since=since) if since > 0 else tenants.tenants_to_tell(self._tx)
        return [on_broker(row) for row in rows if row.id != DEFAULT_TENANT]


def on_broker(record: TenantRecord) -> TenantOnBroker:
    """Return what the broker must know of a tenant that is not the first."""
    return TenantOnBroker(record.id, record.topic_prefix or record.id, record.status is not TenantStatus.ACTIVE)


def complete_draft(
    draft: Draft,
    tx: Connection,
    issuers: Issuers,
    now: datetime,
    known: BrokerTenants | None = None,
    until: int | None = None,
) -> None:
    """Add to the broker's next generation all that has changed since the one that it is based on.

    ``known`` are the tenants as this transaction sees them, if others need them, too. What clients may do after
    generation ``until`` is left out, and certificates that were revoked after it.
    """
    since, every, known = draft.since, draft.lists_every_device, known or BrokerTenants(tx)
    # Most often only devices have changed, and one question that is prepared costs less than to read nothing twice.
    of_tenants, of_certificates = generations.changed_besides_devices(tx, since) if since > 0 else (True, True)
    if draft.lists_tenants:
        for tenant in known.changed(since) if of_tenants else ():
            draft.tell_tenant(tenant)
        for tenant_id in sorted(draft.unknown_tenants(issuers.tenants.values())):
            if (owner := known.of(tenant_id)) is not None:
                draft.tell_tenant(owner)
    for change in generations.acl_changes(tx, since=since, defaults=every, until=until):
        update_access(draft, change, known.of(change.tenant_id))
    if draft.lists_certificates and of_certificates:
        names: dict[int, bytes] = {}
        for revoked in generations.certificate_changes(tx, since=since, now=now, until=until):
            if revoked.issuer_id not in names:
                names[revoked.issuer_id] = issuers.by_id[revoked.issuer_id].issuer.certificate.subject.public_bytes()
            _revoke_certificate(draft, names[revoked.issuer_id], revoked)


def update_access(access: DeviceAccess, change: generations.AclChange, tenant: TenantOnBroker | None = None) -> None:
    """Let a device use its topics, or deny it everything, as its status says; ``tenant`` as in ``DeviceAccess``."""
    own = None
    if change.topics is not None:
        own = tuple(Topic(pattern, Access(allowed)) for pattern, allowed in change.topics)
    suspended = change.status is DeviceStatus.SUSPENDED
    if change.status is DeviceStatus.REVOKED or (suspended and not access.keeps_suspended):
        remove_device_acl(access, change.device_id, tenant)
    elif suspended or change.status is DeviceStatus.ACTIVE:
        if change.kind is ClientKind.APPLICATION:
            access.grant_application(change.device_id, own or (), tenant)
        else:
            add_device_acl(access, change.device_id, own, tenant)
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
