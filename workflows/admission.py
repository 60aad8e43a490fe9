"""Admits devices and applications: the one write path of registration, upload and enrolment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

import db
from broker.files.acl import check_style
from broker.rabbitmq.answers import check_filter
from config import Settings
from core.broker_control import AclStyle, ControlKind
from core.errors import ExternalIdTaken, GuardNeeded
from core.states import ClientKind, DeviceStatus
from core.topics import Access, Topic, check_application_topics, check_topics, default_topics
from pki.profiles import DEFAULT
from store import audit, deliveries, keys, names
from store.audit import Actor, Head
from store.deliveries import NewDelivery
from store.devices import device_with_external_id, update_device
from store.groups import GroupRecord
from store.keys import KeyClaim
from store.names import NameClaim
from store.profiles import hold_profile
from store.quotas import count_clients
from workflows import events, memberships
from workflows.attestation.appraisal import NOT_APPRAISED, Appraised, outdate_result, record_result
from workflows.credentials import DeviceRequest, IssuedCredentials
from workflows.events import EventType
from workflows.tenants import TenantTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuance:
    """Credentials that a device is given, with what event and audit entry say of them.

    ``actor`` is the client that has asked for them. ``name`` is the device's; ``action`` is that of the audit entry,
    and ``detail`` is in it beside the serial number. The credentials can be those of an application, by its ``kind``.
    ``attestation`` is what came of the evidence for their key.
    """

    actor: Actor
    credentials: IssuedCredentials
    name: str
    event: EventType
    action: str
    detail: Mapping[str, Any] = field(default_factory=dict)
    kind: ClientKind = ClientKind.DEVICE
    attestation: Appraised = NOT_APPRAISED


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission(Issuance):
    """A device that becomes active with its first credentials.

    ``request`` and ``topics`` (``None`` for the default ones) are those of a new device; a device that is in the
    database already, as pending, has no ``request``. A new one is put into its ``groups``, which were read before;
    ``topics_group_id`` is the one that its topics are those of.
    """

    request: DeviceRequest | None
    topics: Sequence[Topic] | None = None
    groups: Sequence[GroupRecord] = ()
    topics_group_id: str | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    """The generation that the broker must reach, 0 if it need not learn of it, and the row ids of the certificates."""

    generation: int
    certificate_ids: Sequence[int]


def admit(
    tx: Connection,
    admissions: Sequence[Admission],
    *,
    style: AclStyle,
    most: int | None,
    now: datetime,
    advanced_to: int = 0,
) -> Admitted:
    """Write device, topics, certificate, bundle, event, audit entry and the broker's next generation.

    The devices are those of one tenant. It is all in the caller's transaction: release no credentials before that is
    durable. Under the pattern style of the ACL the broker need not learn of a new device with the default topics.
    ``most`` is how many clients the tenant may have; raises ``QuotaReached``, and ``StateConflict`` if a group has been
    changed since it was read. A transaction that has advanced the generation already says by ``advanced_to`` to which.
    """
    tenant_id = admissions[0].actor.tenant_id
    members = {admission.credentials.device_id: admission.groups for admission in admissions if admission.groups}
    for error in memberships.refusals(tx, tenant_id, members).values():
        raise error
    must_learn = [admission.request is None or broker_must_learn(admission.topics, style) for admission in admissions]
    generation = (advanced_to or db.next_generation(tx, at=now)) if any(must_learn) else 0
    # Before the audit head, as whoever removes a profile does: else the two could wait for each other.
    profile_ids = _held_profiles(tx, tenant_id, [admission.request for admission in admissions])
    requests = [admission.request for admission in admissions if admission.request is not None]
    head: Head | None = None
    if any(one.external_id for one in requests) or any(one.credentials.is_for_csr for one in admissions):
        # Else two transactions with the same external ids or keys could wait for each other: for a row, and for the
        # audit head.
        head = count_clients(tx, tenant_id, len(requests), most=most)
    new: list[db.NewDevice] = []
    for admission, is_new_there in zip(admissions, must_learn, strict=True):
        device_id, since = admission.credentials.device_id, generation if is_new_there else 0
        if admission.request is None:
            values = {"status": DeviceStatus.ACTIVE, "generation": since, "updated_at": now}
            update_device(tx, tenant_id, device_id, values)
        else:
            profile_id = profile_ids.get(admission.request.profile)
            row = _new_device(tenant_id, device_id, admission.request, admission.topics, profile_id, now)
            of_group = admission.topics_group_id
            new.append({**row, "status": DeviceStatus.ACTIVE, "generation": since, "topics_group_id": of_group})
    db.add_devices(tx, new)
    memberships.put_into_groups(tx, tenant_id, members, now=now)
    ids = record_issuances(tx, admissions, new_clients=len(new), most=most, now=now, head=head)
    for actor in dict.fromkeys(admission.actor for admission in admissions if admission.groups):
        own = {one.credentials.device_id: one.groups for one in admissions if one.groups and one.actor == actor}
        memberships.record_put(tx, actor, own, now=now)
    return Admitted(generation, ids)


def broker_must_learn(topics: Sequence[Topic] | None, style: AclStyle) -> bool:
    """Return whether the broker must learn of a new device with these topics, ``None`` for the default ones."""
    return topics is not None or style is AclStyle.PER_DEVICE


def add_pending(
    tx: Connection,
    tenant_id: str,
    device_id: str,
    request: DeviceRequest,
    topics: Sequence[Topic] | None,
    *,
    most: int | None,
    now: datetime,
    topics_group_id: str | None = None,
) -> None:
    """Add a device that has no certificate yet; ``admit`` makes it active later.

    ``topics_group_id`` is the group that its topics are those of. Raises ``ExternalIdTaken``, ``ProfileRefused``, and
    ``QuotaReached`` beyond ``most`` clients.
    """
    profile_id = hold_profile(tx, tenant_id, request.profile)
    if request.external_id is not None:
        audit.lock_audit_head(tx, tenant_id)  # as in an admission
        check_external_id(tx, tenant_id, request.external_id)
    row = _new_device(tenant_id, device_id, request, topics, profile_id, now)
    db.add_devices(tx, [{**row, "topics_group_id": topics_group_id}])
    count_clients(tx, tenant_id, 1, most=most)


def check_external_id(tx: Connection, tenant_id: str, external_id: str | None) -> None:
    """Raise ``ExternalIdTaken`` if there is a device with this external id, ``None`` for none."""
    device_id = None if external_id is None else device_with_external_id(tx, tenant_id, external_id)
    if device_id is None:
        return
    if db.get_device(tx, tenant_id, device_id).status is DeviceStatus.REVOKED:
        raise ExternalIdTaken(
            f"The external_id is that of device {device_id}, which is revoked; free it for a successor by PATCH of that"
            " device with external_id null (portal update --free-external-id), or give another."
        )
    raise ExternalIdTaken(f"The external_id is that of device {device_id}; leave it out or give another.")


def record_issuances(
    tx: Connection,
    issuances: Sequence[Issuance],
    *,
    now: datetime,
    new_clients: int = 0,
    most: int | None = None,
    head: Head | None = None,
) -> Sequence[int]:
    """Write certificate, bundle, event and audit entry of each; returns the row ids of the certificates.

    They are of devices of one tenant. Call it late in a transaction: from here on others wait for the audit record.
    ``head`` is that of the record, if the transaction has counted the new clients, which locks it. Raises
    ``KeyCompromised``, ``KeyInUse``, ``NameInUse``, ``QuotaReached``.
    """
    tenant_id = issuances[0].actor.tenant_id
    of_devices = [issuance.credentials for issuance in issuances]
    keys.claim_keys(tx, tenant_id, [key_claim(one) for one in of_devices], locked=head is not None)
    certificates = [_new_certificate(tenant_id, credentials) for credentials in of_devices]
    ids = db.add_certificates(tx, certificates)
    claims = [(name_claim(one), row_id) for one, row_id in zip(of_devices, ids, strict=True) if one.names]
    if claims:
        names.claim_names(tx, tenant_id, claims, now=now)
    deliveries.add_deliveries(
        tx,
        [
            delivery
            for issuance, certificate_id in zip(issuances, ids, strict=True)
            for delivery in _new_deliveries(tenant_id, issuance.credentials, certificate_id, now)
        ],
    )
    _record_events(tx, tenant_id, issuances, now)
    for issuance in issuances:
        record_result(tx, tenant_id, issuance.credentials.device_id, issuance.name, issuance.attestation, now=now)
        if not isinstance(issuance, Admission):
            outdate_result(tx, tenant_id, issuance.credentials.device_id, issuance.credentials.key_fingerprint)
    head = head or count_clients(tx, tenant_id, new_clients, most=most)
    audit.record_all(tx, [_act(issuance) for issuance in issuances], at=now, head=head)
    return ids


def _act(issuance: Issuance) -> audit.Act:
    """Return the entry for the audit record."""
    detail = {
        "serial_number": issuance.credentials.serial_number,
        **issuance.detail,
        **_of_profile(issuance),
        **issuance.attestation.audit_detail(),
    }
    return issuance.actor, issuance.action, f"{issuance.kind}:{issuance.credentials.device_id}", detail


def key_claim(credentials: IssuedCredentials) -> KeyClaim:
    """Return the key of new credentials as one to be recorded."""
    return KeyClaim(credentials.key_fingerprint, credentials.device_id, is_new=not credentials.is_for_csr)


def name_claim(credentials: IssuedCredentials) -> NameClaim:
    """Return the names in a new certificate as those to be claimed for its device."""
    return NameClaim(credentials.device_id, credentials.names)


def _of_profile(issuance: Issuance) -> dict[str, Any]:
    """Return what the audit entry says of a certificate that was not issued under the default profile."""
    credentials = issuance.credentials
    if credentials.profile == DEFAULT:
        return {}
    return {"profile": credentials.profile, **({"names": list(credentials.names)} if credentials.names else {})}


def _held_profiles(
    tx: Connection, tenant_id: str, requests: Sequence[DeviceRequest | None]
) -> Mapping[str | None, str | None]:
    """Return the ids of the profiles of new devices, which are not removed before the transaction ends, by name."""
    wanted = {request.profile for request in requests if request is not None and request.profile is not None}
    return {name: hold_profile(tx, tenant_id, name) for name in sorted(wanted)}


def checked_topics(
    settings: Settings,
    tenant: TenantTerms,
    topics: Sequence[tuple[str, str]] | None,
    device_id: str | None,
    *,
    kind: ClientKind = ClientKind.DEVICE,
) -> tuple[Topic, ...] | None:
    """Check the topics that a device is to have as its own, pairs of filter and access; ``None`` for the default ones.

    ``device_id`` is ``None`` for those of a group. An application, by its ``kind``, has no default ones. Raises
    ``TopicRefused``; ``GuardNeeded`` for an application where the broker has files, which grant every SUBSCRIBE.
    """
    wanted = [Topic(pattern, Access(access)) for pattern, access in topics or ()]
    if settings.broker_control is ControlKind.RABBITMQ:
        for topic in wanted:
            check_filter(topic.filter)
    if kind is ClientKind.APPLICATION:
        if not settings.broker_control.by_journal:
            raise GuardNeeded(
                "Applications need the guard in the broker, which alone can hold them to their topics: set"
                " PORTAL_BROKER_CONTROL=guard."
            )
        return check_application_topics(wanted, prefixes=tenant.application_prefixes)
    if topics is None:
        return None
    checked = check_topics(wanted, device_id=device_id, prefix=tenant.topic_prefix)
    check_style(checked, settings.granting_style, tenant.topic_prefix)
    return None if checked == default_topics(tenant.topic_prefix) else checked


# --- Rows ---------------------------------------------------------------------------------------------------------


def _new_device(
    tenant_id: str,
    device_id: str,
    request: DeviceRequest,
    topics: Sequence[Topic] | None,
    profile_id: str | None,
    now: datetime,
) -> db.NewDevice:
    """Return the row of a pending device."""
    return {
        "tenant_id": tenant_id,
        "device_id": device_id,
        "external_id": request.external_id,
        "kind": request.kind,
        "profile_id": profile_id,
        "name": request.name,
        "type": request.type,
        "location": request.location,
        "firmware": request.firmware,
        "metadata": dict(request.metadata),
        "status": DeviceStatus.PENDING,
        "topics": None if topics is None else [(topic.filter, topic.access) for topic in topics],
        "created_at": now,
        "generation": 0,
    }


def _new_certificate(tenant_id: str, credentials: IssuedCredentials) -> db.NewCertificate:
    return {
        "tenant_id": tenant_id,
        "issuer_id": credentials.issuer_id,
        "device_id": credentials.device_id,
        "purpose": "device",
        "serial_number": credentials.serial_number,
        "fingerprint": credentials.fingerprint,
        "der": credentials.der,
        "not_before": credentials.not_before,
        "not_after": credentials.not_after,
        "issued_at": credentials.issued_at,
    }


def _new_deliveries(
    tenant_id: str, credentials: IssuedCredentials, certificate_id: int, now: datetime
) -> Sequence[NewDelivery]:
    bundle = credentials.bundle
    if bundle is None:
        return ()
    delivery: NewDelivery = {
        "id": bundle.delivery_id,
        "tenant_id": tenant_id,
        "device_id": credentials.device_id,
        "certificate_id": certificate_id,
        "bundle": bundle.content,
        "sealed": bundle.sealed,
        "format": bundle.format,
        "created_at": now,
        "expires_at": bundle.expires_at,
    }
    return (delivery,)


def _record_events(tx: Connection, tenant_id: str, issuances: Sequence[Issuance], now: datetime) -> None:
    if not events.has_subscribers(tx, tenant_id):
        return
    for issuance in issuances:
        credentials = issuance.credentials
        events.record(
            tx,
            tenant_id,
            issuance.event,
            credentials.device_id,
            kind=issuance.kind,
            at=now,
            name=issuance.name,
            serial_number=credentials.serial_number,
            fingerprint=credentials.fingerprint,
            expires_at=credentials.not_after,
        )
