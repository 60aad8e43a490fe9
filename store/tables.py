"""The tables of the database, with the constraints that have the last word."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from core import states
from store import (  # noqa: F401 - all in METADATA
    agent_tables,
    attestation_tables,
    broker_tables,
    enrolment_tables,
    group_tables,
    mail_tables,
    node_tables,
    profile_tables,
    session_tables,
)
from store.columns import BigId, OfTenant, one_of, partial_index
from store.database import Base

DEFAULT_TENANT = "default"


# --- Tenants ---------------------------------------------------------------------------------------------------------


class Tenant(Base):
    """An owner of rows; at first there is one, ``default``.

    ``topic_prefix`` is ``NULL`` for the first one, for which the settings have it. ``generation`` is that with which
    the broker must learn what has changed, ``changed_at`` when the status last did.
    """

    __tablename__ = "tenants"
    __table_args__ = (
        sa.CheckConstraint(one_of("status", "active", "suspended", "removed"), name="status"),
        sa.CheckConstraint("topic_prefix IS NOT NULL OR id = 'default'", name="topic_prefix"),
        sa.Index("uq_tenants_topic_prefix", "topic_prefix", unique=True),
        partial_index("ix_tenants_generation", "generation", where="generation > 0"),
    )

    id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    created_at: Mapped[datetime]
    status: Mapped[str] = mapped_column(sa.String(16), server_default="active")
    topic_prefix: Mapped[str | None] = mapped_column(sa.String(256))
    choices: Mapped[dict[str, Any]] = mapped_column(sa.JSON, server_default="{}")
    quotas: Mapped[dict[str, Any]] = mapped_column(sa.JSON, server_default="{}")
    generation: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    changed_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """The sealed answer to a request that may be repeated, by a hash of its idempotency key.

    ``made_by`` is the actor that may repeat it, as in the audit record (``NULL``: nobody). The answer is empty once
    its device is revoked.
    """

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        sa.Index("ix_idempotency_keys_expiry", "expires_at"),
        partial_index("ix_idempotency_keys_device", "device_id", where="device_id IS NOT NULL"),
    )

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    key_hash: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    request_hash: Mapped[str] = mapped_column(sa.String(64))
    sealed_answer: Mapped[bytes]
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    made_by: Mapped[str | None] = mapped_column(sa.String(128))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))


class Token(OfTenant, Base):
    """An operator's token, by its secret's hash; an admin's of the first tenant can have the role ``system``.

    One that comes from a login by the identity provider has the person's ``subject``, and the hash of the login, which
    cannot be repeated.
    """

    __tablename__ = "tokens"
    __table_args__ = (
        sa.CheckConstraint(f"NOT is_system OR (role = 'admin' AND tenant_id = '{DEFAULT_TENANT}')", name="is_system"),
        sa.CheckConstraint(one_of("role", "admin", "operator", "auditor"), name="role"),
        sa.UniqueConstraint("token_hash"),
        partial_index("uq_tokens_login_hash", "login_hash", where="login_hash IS NOT NULL", unique=True),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    role: Mapped[str] = mapped_column(sa.String(16))
    is_system: Mapped[bool] = mapped_column(server_default=sa.false())
    token_hash: Mapped[str] = mapped_column(sa.String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    subject: Mapped[str | None] = mapped_column(sa.String(128))
    login_hash: Mapped[str | None] = mapped_column(sa.String(64))


class AuditEntry(OfTenant, Base):
    """Who did what, to what, when, from where, with which outcome; never changed, never removed."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        sa.CheckConstraint(one_of("outcome", "done", "refused"), name="outcome"),
        sa.UniqueConstraint("tenant_id", "number"),
        sa.Index("ix_audit_entries_object", "tenant_id", "object", "id"),
        sa.Index("ix_audit_entries_at", "tenant_id", "at", "id"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(sa.String(128))
    action: Mapped[str] = mapped_column(sa.String(64))
    object: Mapped[str] = mapped_column(sa.String(128))
    outcome: Mapped[str] = mapped_column(sa.String(16))
    request_id: Mapped[str] = mapped_column(sa.String(64))
    address: Mapped[str] = mapped_column(sa.String(64))
    detail: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    # From 1 on without a gap; each entry holds the hash of the previous one: see store/audit.py.
    number: Mapped[int] = mapped_column(sa.BigInteger)
    previous_hash: Mapped[str] = mapped_column(sa.String(64))
    hash: Mapped[str] = mapped_column(sa.String(64))


class AuditHead(Base):
    """The number and hash of the last audit entry, so that a missing entry is noticed, and the tree's edge.

    ``clients`` counts the tenant's devices and applications that are not revoked: whoever changes their number has to
    lock this row in any case.
    """

    __tablename__ = "audit_heads"

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    number: Mapped[int] = mapped_column(sa.BigInteger)
    hash: Mapped[str] = mapped_column(sa.String(64))
    # The right edge of the Merkle tree over all entries, 32 bytes for each subtree: see core/merkle.py.
    edge: Mapped[bytes]
    clients: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")


class BrokerState(Base):
    """The generation that every broker must reach, and the newest one that all which count were seen to enforce.

    It has one row for the whole installation, and belongs to no tenant. ``store/brokers.py`` writes the second.
    """

    __tablename__ = "broker_state"
    __table_args__ = (
        sa.CheckConstraint("applied_generation <= generation", name="applied_generation"),
        sa.CheckConstraint("generation >= 0", name="generation"),
        sa.CheckConstraint("id = 1", name="single"),
    )

    id: Mapped[int] = mapped_column(sa.SmallInteger, primary_key=True, autoincrement=False)
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    applied_generation: Mapped[int] = mapped_column(sa.BigInteger)
    applied_at: Mapped[datetime | None]
    # Since when the two have differed.
    pending_since: Mapped[datetime | None]
    # The greatest that ``applied_generation`` ever was, which falls when a broker joins or comes back.
    announced_generation: Mapped[int] = mapped_column(sa.BigInteger, server_default="0")
    # Random, another one after each change of the CAs, so that each transaction sees by it whether there was one.
    issuers_version: Mapped[str] = mapped_column(sa.String(32), default="", server_default="")


# --- Devices, certificates and their issuers -------------------------------------------------------------------------


class Device(OfTenant, Base):
    """A device, under the UUID that is its identity everywhere; or an application, as its ``kind`` says for good.

    An application is admitted, renewed and revoked as a device is. It has no type, location and firmware (empty), and
    always topics of its own.
    """

    __tablename__ = "devices"
    __table_args__ = (
        sa.UniqueConstraint("tenant_id", "id"),  # what composite foreign keys refer to
        sa.UniqueConstraint("tenant_id", "external_id"),
        sa.CheckConstraint(one_of("status", *states.DeviceStatus), name="status"),
        sa.CheckConstraint("(status = 'revoked') = (revoked_at IS NOT NULL)", name="revoked_at"),
        sa.CheckConstraint("(status = 'revoked') = (revocation_reason IS NOT NULL)", name="revocation_reason"),
        sa.CheckConstraint("length(id) = 36", name="id_is_uuid"),
        sa.CheckConstraint(one_of("kind", *states.ClientKind), name="kind"),
        sa.CheckConstraint("kind = 'device' OR own_topics", name="application_topics"),
        partial_index("ix_devices_topics_group", "topics_group_id", where="topics_group_id IS NOT NULL"),
        sa.Index("ix_devices_newest", "tenant_id", "created_at", "id"),
        sa.Index("ix_devices_name", "tenant_id", "name", "created_at", "id"),
        sa.Index("ix_devices_status", "tenant_id", "status", "created_at", "id"),
        sa.Index("ix_devices_type", "tenant_id", "type", "created_at", "id"),
        sa.Index("ix_devices_location", "tenant_id", "location", "created_at", "id"),
        # What the broker must enforce is read for all tenants at once.
        partial_index("ix_devices_generation", "generation", where="generation > 0"),
        partial_index("ix_devices_narrowed", "narrowed_generation", where="narrowed_generation > 0"),
        partial_index("ix_devices_own_topics", "generation", where="own_topics"),
        partial_index("ix_devices_out", "generation", where="status IN ('revoked', 'suspended')"),
        partial_index("ix_devices_applications", "tenant_id", "created_at", "id", where="kind = 'application'"),
        partial_index("ix_devices_attested", "tenant_id", "attested", "created_at", "id", where="attested IS NOT NULL"),
        partial_index(
            "ix_devices_profile", "tenant_id", "profile_id", "created_at", "id", where="profile_id IS NOT NULL"
        ),
    )

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    external_id: Mapped[str | None] = mapped_column(sa.String(128))
    name: Mapped[str] = mapped_column(sa.String(128))
    type: Mapped[str] = mapped_column(sa.String(64))
    location: Mapped[str] = mapped_column(sa.String(128))
    firmware: Mapped[str] = mapped_column(sa.String(64))
    # SQLAlchemy reserves the attribute "metadata"; the column is named so.
    device_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", sa.JSON)
    own_topics: Mapped[bool] = mapped_column(default=False)
    status: Mapped[states.DeviceStatus]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    revocation_reason: Mapped[str | None] = mapped_column(sa.String(32))
    # The generation at which its ACL entry last changed; 0 if the broker need not learn of it.
    generation: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    # The generation at which it last lost topics that it could read; 0 if it never did.
    narrowed_generation: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")
    # The external id that a revoked device had, once it was freed for a successor.
    former_external_id: Mapped[str | None] = mapped_column(sa.String(128))
    kind: Mapped[states.ClientKind] = mapped_column(
        default=states.ClientKind.DEVICE, server_default=states.ClientKind.DEVICE.value
    )
    # The certificate profile; ``NULL`` for the default one.
    profile_id: Mapped[str | None] = mapped_column(sa.String(32), sa.ForeignKey("certificate_profiles.id"))
    # The group whose topics it has; ``NULL`` if it has its own, or the default ones.
    topics_group_id: Mapped[str | None] = mapped_column(sa.String(16), sa.ForeignKey("device_groups.id"))
    # The verdict of its attestation, beside its row in ``attestations`` so that lists have an index for it.
    attested: Mapped[states.AttestationVerdict | None]


class Presence(OfTenant, Base):
    """Whether an identity, a device's id, was last seen connected to a broker, and to which.

    It has a table of its own because it is written often: no row of ``devices`` is locked or copied for it. The broker
    is no foreign key: its removal does not wait for as many rows as it has clients.
    """

    __tablename__ = "presences"
    __table_args__ = (
        sa.CheckConstraint(f"state BETWEEN {min(states.PresenceState)} AND {max(states.PresenceState)}", name="state"),
        sa.Index("ix_presences_seen", "tenant_id", "state", "since", "identity"),
    )

    identity: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    state: Mapped[int] = mapped_column(sa.SmallInteger)  # a PresenceState
    # Since when it is connected; when it was seen last, if it is offline; when it was added, if it was never seen.
    since: Mapped[datetime]
    # Of that connection; NULL also if that was at a broker which is not of this installation.
    broker_id: Mapped[int | None] = mapped_column(sa.Integer, info={"names": "brokers"})
    # When a connection at another broker ended that was newer than this one, if one did.
    left_at: Mapped[datetime | None]
    # Further connections, by the id of the broker: each since when, in Unix time. NULL for none.
    also_at: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))


class AclEntry(Base):
    """A topic of a device that has its own topics; a device without any has the default ones."""

    __tablename__ = "acl_entries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("device_id", "filter"),
        sa.CheckConstraint(one_of("access", "read", "write", "readwrite"), name="access"),
    )

    device_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.String(64))
    filter: Mapped[str] = mapped_column(sa.String(256))
    access: Mapped[str] = mapped_column(sa.String(16))


class IssuerRow(OfTenant, Base):
    """A CA of the portal; its key is in the key store."""

    __tablename__ = "issuers"
    __table_args__ = (
        sa.CheckConstraint(one_of("kind", *states.IssuerKind), name="kind"),
        sa.CheckConstraint(one_of("status", *states.IssuerStatus), name="status"),
        sa.UniqueConstraint("name"),
        sa.UniqueConstraint("fingerprint"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    kind: Mapped[states.IssuerKind]
    status: Mapped[states.IssuerStatus]
    der: Mapped[bytes]
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    not_after: Mapped[datetime]
    created_at: Mapped[datetime]
    # The active issuer with the latest time signs; NULL if it is trusted but does not sign yet.
    issuing_since: Mapped[datetime | None]
    # The generation of the last change to the list of its revoked certificates.
    revoked_generation: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    # The CAs above it, if the portal's own root has not signed it: a DER SEQUENCE OF Certificate, its issuer first.
    above: Mapped[bytes | None]
    # The active CA with the latest time signs the certificates of portal and broker; the one that issues if none has.
    servers_since: Mapped[datetime | None]


class Crl(OfTenant, Base):
    """The newest CRL of an issuer."""

    __tablename__ = "crls"
    __table_args__ = (
        sa.CheckConstraint("number > 0", name="number"),
        sa.CheckConstraint("this_update < next_update", name="validity"),
    )

    issuer_id: Mapped[int] = mapped_column(sa.ForeignKey("issuers.id"), primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(sa.BigInteger)
    this_update: Mapped[datetime]
    next_update: Mapped[datetime]
    generation: Mapped[int] = mapped_column(sa.BigInteger)
    der: Mapped[bytes]


# A device has at most one such certificate.
_CURRENT = "status IN ('active', 'held') AND replaced_until IS NULL"


class Certificate(OfTenant, Base):
    """A certificate that the portal issued: to a device, to its probe (``canary``), or to a ``server``.

    The last are the portal's own, those of brokers, and of the agents beside them.

    A ``lost`` one was issued after the copy that a restore has put back: it stays on the CRL.
    """

    __tablename__ = "certificates"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.UniqueConstraint("issuer_id", "serial_number"),
        sa.UniqueConstraint("fingerprint"),
        sa.CheckConstraint(one_of("purpose", "device", "server", "agent", "canary", "lost"), name="purpose"),
        sa.CheckConstraint("(purpose = 'device') = (device_id IS NOT NULL)", name="owner"),
        sa.CheckConstraint(one_of("status", *states.CertificateStatus), name="status"),
        sa.CheckConstraint("(status IN ('held', 'revoked')) = (revoked_at IS NOT NULL)", name="revoked_at"),
        sa.CheckConstraint("(revoked_at IS NULL) = (revocation_reason IS NULL)", name="revocation_reason"),
        sa.CheckConstraint("not_before < not_after", name="validity"),
        sa.CheckConstraint(
            "status IN ('held', 'revoked') OR (status = 'replaced') = (replaced_until IS NOT NULL)",
            name="replaced_until",
        ),
        partial_index("uq_certificates_one_active_a_device", "device_id", where=_CURRENT, unique=True),
        partial_index("ix_certificates_generation", "generation", where="generation > 0"),
        partial_index("ix_certificates_replaced", "replaced_until", where="status = 'replaced'"),
        sa.Index("ix_certificates_device", "device_id", "id"),
        partial_index("ix_certificates_end", "tenant_id", "not_after", "device_id", where=_CURRENT),
        # with the id, so that the row ids are read from the index alone
        partial_index(
            "ix_certificates_crl", "issuer_id", "status", "not_after", "id", where="status IN ('held', 'revoked')"
        ),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    issuer_id: Mapped[int] = mapped_column(sa.ForeignKey("issuers.id"))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    purpose: Mapped[str] = mapped_column(sa.String(16))
    serial_number: Mapped[str] = mapped_column(sa.String(40))
    fingerprint: Mapped[str] = mapped_column(sa.String(64))
    der: Mapped[bytes]
    not_before: Mapped[datetime]
    not_after: Mapped[datetime]
    issued_at: Mapped[datetime]
    status: Mapped[states.CertificateStatus]
    revoked_at: Mapped[datetime | None]
    revocation_reason: Mapped[str | None] = mapped_column(sa.String(32))
    # For a replaced one: until when it keeps working, or until its successor was used if that comes first.
    replaced_until: Mapped[datetime | None]
    ends_when_used: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    # The generation at which it was last put on its issuer's CRL or removed from it; 0 if it never was on one.
    generation: Mapped[int] = mapped_column(sa.BigInteger, default=0, server_default="0")


class DeviceKey(Base):
    """A public key that the portal has certified, by its SHA-256, with the device whose it is.

    A compromised one is certified for nobody any more, in no tenant; a trigger keeps it so. ``device_id`` is ``None``
    for one whose device a restored backup did not have.
    """

    __tablename__ = "device_keys"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.CheckConstraint("device_id IS NOT NULL OR compromised_at IS NOT NULL", name="owner"),
        partial_index("ix_device_keys_compromised", "key_fingerprint", where="compromised_at IS NOT NULL"),
    )

    tenant_id: Mapped[str] = mapped_column(sa.ForeignKey("tenants.id"), primary_key=True)
    key_fingerprint: Mapped[str] = mapped_column(sa.String(64), primary_key=True)  # of its SubjectPublicKeyInfo
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    compromised_at: Mapped[datetime | None]


class Delivery(OfTenant, Base):
    """A bundle that waits for its one download; it is removed, and the row kept, once delivered, expired or revoked.

    If ``sealed``, the bundle is what it will be made of: key and password, sealed under a secret in the link.
    """

    __tablename__ = "deliveries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "device_id"], ["devices.tenant_id", "devices.id"]),
        sa.CheckConstraint(one_of("status", *states.DeliveryStatus), name="status"),
        sa.CheckConstraint("(status IN ('ready', 'fetching')) = (bundle IS NOT NULL)", name="bundle"),
        sa.CheckConstraint(one_of("format", "zip", "p12", "pem"), name="format"),
        sa.CheckConstraint("(status = 'fetching') = (lease_until IS NOT NULL)", name="lease"),
        sa.Index("ix_deliveries_device", "device_id"),
        partial_index("ix_deliveries_expiry", "expires_at", where="status IN ('ready', 'fetching')"),
    )

    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    device_id: Mapped[str] = mapped_column(sa.String(36))
    certificate_id: Mapped[int] = mapped_column(sa.ForeignKey("certificates.id"))
    status: Mapped[states.DeliveryStatus]
    bundle: Mapped[bytes | None]
    sealed: Mapped[bool] = mapped_column(server_default=sa.false())
    format: Mapped[str] = mapped_column(sa.String(8), server_default="zip")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    lease_until: Mapped[datetime | None]
    delivered_at: Mapped[datetime | None]


class KeptBundle(OfTenant, Base):
    """A delivered bundle that may be fetched again for a while, by the idempotency key of its first fetch alone.

    The bundle is sealed under that key, of which there is only a hash.
    """

    __tablename__ = "kept_bundles"
    __table_args__ = (sa.Index("ix_kept_bundles_expiry", "expires_at"),)

    delivery_id: Mapped[str] = mapped_column(sa.ForeignKey("deliveries.id"), primary_key=True)
    key_hash: Mapped[str] = mapped_column(sa.String(64))
    sealed_bundle: Mapped[bytes]
    length: Mapped[int]  # of the bundle, in bytes
    expires_at: Mapped[datetime]


# --- Events ----------------------------------------------------------------------------------------------------------


class Webhook(OfTenant, Base):
    """A subscription: the address that events are sent to, with its sealed secret."""

    __tablename__ = "webhooks"
    __table_args__ = (sa.UniqueConstraint("tenant_id", "id"),)

    id: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(64))
    url: Mapped[str] = mapped_column(sa.String(2048))
    # The subscribed types with a comma on either side of each, or * for all, including those of later versions.
    events: Mapped[str] = mapped_column(sa.String(512))
    sealed_secret: Mapped[bytes]
    created_at: Mapped[datetime]


class WebhookDelivery(Base):
    """An event for one webhook; ``waiting`` until it is delivered, or ``dead`` after the last attempt failed."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        sa.ForeignKeyConstraint(["tenant_id", "webhook_id"], ["webhooks.tenant_id", "webhooks.id"]),
        sa.CheckConstraint("status IN ('waiting', 'delivered', 'dead')", name="status"),
        sa.CheckConstraint("(status = 'waiting') = (ended_at IS NULL)", name="ended_at"),
        sa.CheckConstraint("status = 'waiting' OR lease_until IS NULL", name="lease"),
        sa.CheckConstraint("attempts >= 0", name="attempts"),
        sa.Index("ix_webhook_deliveries_webhook", "webhook_id", "id"),
        sa.Index("ix_webhook_deliveries_event", "event_id"),
        sa.Index("ix_webhook_deliveries_ended", "ended_at"),
        partial_index("ix_webhook_deliveries_dead", "webhook_id", where="status = 'dead'"),
        partial_index("ix_webhook_deliveries_due", "webhook_id", "next_at", where="status = 'waiting'"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(sa.String(64))
    webhook_id: Mapped[str] = mapped_column(sa.String(16))
    event_id: Mapped[str] = mapped_column(sa.String(32))
    type: Mapped[str] = mapped_column(sa.String(32))
    device_id: Mapped[str | None] = mapped_column(sa.String(36))
    body: Mapped[str] = mapped_column(sa.Text)
    created_at: Mapped[datetime]
    status: Mapped[states.EventDeliveryStatus]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime]
    # The sender has until then; afterwards the event counts as not sent, and is sent again.
    lease_until: Mapped[datetime | None]
    last_problem: Mapped[str | None] = mapped_column(sa.String(256))
    ended_at: Mapped[datetime | None]


class ExpiryAnnouncement(OfTenant, Base):
    """A certificate whose expiry was announced, so that it is announced once."""

    __tablename__ = "expiry_announcements"

    certificate_id: Mapped[int] = mapped_column(sa.ForeignKey("certificates.id"), primary_key=True, autoincrement=False)
    announced_at: Mapped[datetime]


METADATA = Base.metadata
