"""The credential of a device that enrols: an enrolment token, or a certificate of its manufacturer's CA."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

import db
from core.errors import EnrolmentRefused, FieldProblem, Forbidden, ProfileRefused, StateConflict
from core.roles import Role
from core.states import Approval, DeviceStatus, ManufacturerStatus, RepeatedSerial
from pki import client_certificates
from pki.est import EnrolmentRequest
from pki.profiles import DEFAULT, CertificateTerms
from store import audit, enrolment
from store.audit import Actor
from store.database import Database
from store.enrolment import EnrolmentProfile, EnrolmentRecord, EnrolmentTokenRecord, ManufacturerRecord
from store.profiles import unknown
from store.scope import ALL_TENANTS
from workflows.attestation import policies
from workflows.attestation.appraisal import NOT_APPRAISED, Appraised
from workflows.attestation.nonces import NonceHolder
from workflows.attestation.policies import PolicyRequest, check_policy, set_policy
from workflows.credentials import CredentialIssuer, CredentialRequest, IssuedCredentials
from workflows.delivery import KeptAnswers, MadeSecret
from workflows.enrolment.clients import ManufacturedClient
from workflows.memberships import with_life
from workflows.profiles import find_profiles
from workflows.tenants import TenantTerms

TOKEN_PREFIX = "en_"  # noqa: S105 - lets secret scanners find a token that leaked; no secret itself
MAX_LISTED = 1000
# What the role operator may make: an enrolment token admits devices after its maker has lost the operator token, too.
OPERATOR_MAX_USES = 1000
OPERATOR_MAX_LIFE = timedelta(days=30)
MAX_SERIAL = 64  # characters: ub-serial-number of RFC 5280 appendix A.1
RETRY_AFTER = 60  # seconds after which a device that waits for an operator is to ask again


@dataclass(frozen=True, slots=True)
class EnrolmentCredential:
    """What a device shows to be admitted.

    ``profile`` says what becomes of the device; ``identity`` tells it from the others that come with the same token,
    or with a factory certificate of any manufacturer. With another key it is known by ``serial_hash``, if its profile
    has that.
    """

    tenant_id: str
    profile: EnrolmentProfile
    identity: str
    serial: str
    label: str  # for the audit record
    token_id: str | None = None
    manufacturer_id: str | None = None
    device_id: str | None = None  # of the one device that a token is for
    serial_hash: str | None = None

    @property
    def nonce_holder(self) -> NonceHolder:
        """Return whose nonces the device may present."""
        if self.token_id is not None:
            return NonceHolder.of_token(self.tenant_id, self.token_id, is_one_device=self.device_id is not None)
        return NonceHolder.of_factory_key(self.tenant_id, self.identity)

    @property
    def replaces_at_once(self) -> bool:
        """Return whether no operator is to decide about another key of the device."""
        profile = self.profile
        return profile.repeated_serial is RepeatedSerial.SAME_DEVICE and profile.approval is Approval.AT_ONCE

    def find_enrolment(self, tx: Connection) -> EnrolmentRecord | None:
        """Return the earlier enrolment of the same device, if there is one."""
        return enrolment.find_enrolment(
            tx, self.tenant_id, token_id=self.token_id, identity=self.identity, serial_hash=self.serial_hash
        )

    @property
    def recorded_serial(self) -> str | None:
        """Return the serial number that the device shows, as it is recorded for its certificates."""
        return self.serial if 0 < len(self.serial) <= MAX_SERIAL else None

    def identity_of(self, key_fingerprint: str) -> dict[str, Any]:
        """Return the columns of an enrolment that change with the key to be certified, by which a token knows it."""
        values = {"key_fingerprint": key_fingerprint}
        return values if self.token_id is None else values | {"identity": self.identity}

    def accept(self, tx: Connection, known: EnrolmentRecord) -> None:
        """Have a device that was known by its serial number be known by its factory key from now on, too."""
        if self.manufacturer_id is not None and known.identity != self.identity:
            enrolment.add_factory_key(tx, self.tenant_id, self.identity, known.id)

    def lock(self, tx: Connection) -> EnrolmentTokenRecord | None:
        """Keep other devices from enrolling with the same token or manufacturer until the transaction ends.

        Returns the token, to be checked with ``check_token``. Raises ``EnrolmentRefused`` for a manufacturer that is
        not registered any more, and for the factory key of a device that was revoked.
        """
        if self.token_id is not None:
            return enrolment.lock_enrolment_token(tx, self.tenant_id, self.token_id)
        record = enrolment.get_manufacturer(tx, self.tenant_id, self.manufacturer_id or "", for_update=True)
        if record.status is not ManufacturerStatus.REGISTERED:
            raise EnrolmentRefused("The CA of the client certificate is not registered here any more.")
        if enrolment.is_blocked(tx, self.tenant_id, self.identity):
            raise EnrolmentRefused("The device of this factory certificate was revoked; ask an operator.")
        return None

    def check_not_revoked(self, tx: Connection) -> None:
        """Raise ``EnrolmentRefused`` for a token that was revoked."""
        if self.token_id is not None:
            check_token(enrolment.get_enrolment_token(tx, self.tenant_id, self.token_id), None)


def check_token(token: EnrolmentTokenRecord, now: datetime | None) -> None:
    """Raise ``EnrolmentRefused`` for a token that was revoked, or has expired at ``now``."""
    if token.revoked_at is not None:
        raise EnrolmentRefused("The enrolment token was revoked; ask an operator for another one.")
    if now is not None and token.expires_at <= now:
        raise EnrolmentRefused("The enrolment token has expired; ask an operator for another one.")


def nonce_holder(token: EnrolmentTokenRecord) -> NonceHolder:
    """Return whose nonces a device with the token may present; raises ``EnrolmentRefused`` if it was revoked."""
    check_token(token, None)
    return NonceHolder.of_token(token.tenant_id, token.id, is_one_device=token.device_id is not None)


def by_token(token: EnrolmentTokenRecord, request: EnrolmentRequest) -> EnrolmentCredential:
    """Return the credential of a device with an enrolment token: it is identified by the key of its CSR.

    With another key it is known by its serial number, if it has one, unless the token takes it for a new device. A
    token for one device counts once.
    """
    a_batch = token.device_id is None
    return EnrolmentCredential(
        token.tenant_id,
        token.profile,
        request.key_fingerprint,
        request.name,
        f"enrolment token {token.name} ({token.id})",
        token_id=token.id,
        device_id=token.device_id,
        serial_hash=_serial_hash(token.profile, request.name) if a_batch else None,
    )


def by_manufacturer(client: ManufacturedClient) -> EnrolmentCredential:
    """Return the credential of a device that has shown its factory certificate (IDevID).

    It is known by the key in that, or else by its serial number among those of this CA, which has one key however often
    its certificate is renewed.
    """
    maker, serial = client.manufacturer, client.certificate.serial
    return EnrolmentCredential(
        client.tenant_id,
        maker.profile,
        client.certificate.key_fingerprint,
        serial,
        f"manufacturer {maker.name} ({maker.id})",
        manufacturer_id=maker.id,
        serial_hash=_serial_hash(maker.profile, serial, client_certificates.key_fingerprint_of_ca(maker.der)),
    )


def _serial_hash(profile: EnrolmentProfile, serial: str, of: str = "") -> str | None:
    """Return what a device is known by beside its key; ``None`` if it has no serial number, or its profile none."""
    if not serial or profile.repeated_serial is RepeatedSerial.NEW_DEVICE:
        return None
    return hashlib.sha256(f"{of}{serial}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device has its certificate, DER, with its key (PKCS#8, DER) if the portal made that.

    The certificate works once the broker has reached ``generation``.
    """

    device_id: str
    certificate: bytes = field(repr=False)
    generation: int
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """An operator has yet to decide; the device is to ask again, with the same key, in ``retry_after`` seconds."""

    device_id: str
    retry_after: int = RETRY_AFTER


class EnrolledMeanwhile(Exception):
    """Another request of the same device was recorded since this one looked."""


@dataclass(frozen=True, slots=True)
class EnrolmentAttempt:
    """A device that asks for a certificate: who the audit record says it is, what it shows, the key, its evidence."""

    actor: Actor
    credential: EnrolmentCredential
    request: EnrolmentRequest
    appraised: Appraised = NOT_APPRAISED

    @property
    def key_fingerprint(self) -> str:
        """Return the SHA-256 of the key to be certified, in hex."""
        return self.request.key_fingerprint

    @property
    def wanted(self) -> CredentialRequest:
        """Return what the device asks for, by its enrolment profile."""
        return CredentialRequest(csr=self.request.csr, validity_days=self.credential.profile.validity_days)

    def issue(
        self,
        credentials: CredentialIssuer,
        tenant: TenantTerms,
        device_id: str,
        terms: CertificateTerms | None,
        now: datetime,
        *,
        life: int | None = None,
    ) -> IssuedCredentials:
        """Certify the key of the CSR, or a new key of the kind that ``csrattrs`` names.

        ``life`` is for how many days a group of the device says, which counts unless the profile says it. Raises
        ``ProfileRefused``, or a kind of ``AttestationRefused`` if the profile requires other evidence.
        """
        self.appraised.check()
        wanted = with_life(self.wanted, life, terms)
        if self.request.csr is None:
            kinds = self.credential.profile.key_types
            kind = kinds[0] if terms is None else terms.usual_key(*kinds)
            return credentials.issue_with_key(tenant, device_id, kind, wanted.validity_days, now=now, terms=terms)
        return credentials.issue(tenant, device_id, wanted, None, now=now, terms=terms)

    def audit_detail(self) -> dict[str, Any]:
        """Return what the audit entry says of the key of a device that was given a certificate."""
        return {"key": "made here"} if self.request.csr is None else {"key_fingerprint": self.key_fingerprint}


# --- Tokens -------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class EnrolmentTokens:
    """Secrets with which devices enrol; the database holds their hashes only."""

    _database: Database
    _clock: Callable[[], datetime]
    _answers: KeptAnswers

    def create(
        self,
        actor: Actor,
        name: str,
        profile: EnrolmentProfile,
        *,
        device_id: str | None,
        count: int,
        life: timedelta,
        attestation: PolicyRequest | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[str, EnrolmentTokenRecord]:
        """Create a token for one pending device, or for ``count`` new ones; returns its secret with its record.

        With ``attestation`` its devices have to show evidence. Requests with one ``idempotency_key`` create one. Raises
        ``DeviceNotFound``, ``StateConflict`` for a device that is not pending, ``Forbidden`` for more than the role may
        make, ``ProfileRefused`` for a profile that nobody could enrol under, ``AttestationPolicyInvalid``.
        """
        _check_limits(actor, count, life)
        now, secret = self._clock(), TOKEN_PREFIX + secrets.token_urlsafe(32)
        if attestation is not None:
            check_policy(actor, attestation, now=now)
        unused = _unused(actor, name, profile, device_id=device_id, count=count, now=now, ends=now + life)

        def write(tx: Connection) -> None:
            _check_pending(tx, actor.tenant_id, device_id)
            check_enrolment_profile(tx, actor.tenant_id, profile)
            record = with_policy(tx, actor, unused, attestation, now=now)
            enrolment.add_enrolment_token(tx, record, secret=secret)
            detail = {"name": name, **in_audit(profile), **policies.in_audit(attestation, now=now)}
            detail |= {"device_id": device_id} if device_id else {"count": count}
            audit.record(tx, actor, "enrolment_token:create", f"enrolment_token:{record.id}", at=now, **detail)

        new, wanted = (
            MadeSecret("enrolment_token", unused.id, secret),
            [name, profile, device_id, count, life, attestation],
        )
        made = self._answers.secret_once(actor, idempotency_key, wanted, new, write)
        with self._database.snapshot() as tx:
            return made.secret, enrolment.get_enrolment_token(tx, actor.tenant_id, made.id)

    def revoke(self, actor: Actor, token_id: str) -> EnrolmentTokenRecord:
        """Revoke a token at once; devices that have enrolled with it keep working. Raises ``NotFound``."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = enrolment.revoke_enrolment_token(tx, actor.tenant_id, token_id, revoked_at=now)
            if record.revoked_at == now:
                audit.record(tx, actor, "enrolment_token:revoke", f"enrolment_token:{token_id}", at=now)
        return record

    def set_attestation(self, actor: Actor, token_id: str, wanted: PolicyRequest) -> EnrolmentTokenRecord:
        """Set what evidence the devices of a token have to show; what was kept of evidence is appraised again by a job.

        Raises ``NotFound``, ``Forbidden``, ``AttestationPolicyInvalid``.
        """
        now = self._clock()
        check_policy(actor, wanted, now=now)
        with self._database.transaction() as tx:
            record = enrolment.lock_enrolment_token(tx, actor.tenant_id, token_id)
            record = with_policy(tx, actor, record, wanted, now=now)
            enrolment.set_token_policy(tx, actor.tenant_id, token_id, record.profile.attestation_policy_id)
            of, detail = f"enrolment_token:{token_id}", policies.in_audit(wanted, now=now)
            audit.record(tx, actor, "enrolment_token:update", of, at=now, **detail)
        return record

    def tokens(self, tenant_id: str) -> Sequence[EnrolmentTokenRecord]:
        """Return the newest thousand tokens, newest first."""
        with self._database.snapshot() as tx:
            return enrolment.list_enrolment_tokens(tx, tenant_id, limit=MAX_LISTED)

    def find(self, secret: str) -> EnrolmentTokenRecord | None:
        """Return the token with this secret, in any state: whether it admits devices is checked where it is used."""
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            return enrolment.find_enrolment_token(tx, secret)


def _unused(
    actor: Actor,
    name: str,
    profile: EnrolmentProfile,
    *,
    device_id: str | None,
    count: int,
    now: datetime,
    ends: datetime,
) -> EnrolmentTokenRecord:
    return EnrolmentTokenRecord(
        id=secrets.token_hex(8),
        tenant_id=actor.tenant_id,
        name=name,
        device_id=device_id,
        uses_allowed=count,
        uses=0,
        created_at=now,
        expires_at=ends,
        revoked_at=None,
        operator_token_id=actor.token_id,
        profile=profile,
    )


def _check_limits(actor: Actor, count: int, life: timedelta) -> None:
    if actor.role == Role.OPERATOR and (count > OPERATOR_MAX_USES or life > OPERATOR_MAX_LIFE):
        raise Forbidden(
            f"The role operator makes enrolment tokens for at most {OPERATOR_MAX_USES} devices and"
            f" {OPERATOR_MAX_LIFE.days * 24} hours; ask for less, or ask an admin."
        )


def _check_pending(tx: Connection, tenant_id: str, device_id: str | None) -> None:
    if device_id is None:
        return
    device = db.get_device(tx, tenant_id, device_id, for_update=True)
    if device.status is not DeviceStatus.PENDING:
        raise StateConflict(f"The device is {device.status}; only a pending one can enrol with a token.")


_Record = TypeVar("_Record", EnrolmentTokenRecord, ManufacturerRecord)


def with_policy(
    tx: Connection, actor: Actor, record: _Record, wanted: PolicyRequest | None, *, now: datetime
) -> _Record:
    """Return a token or a manufacturer with an attestation policy that was checked, which is recorded."""
    if wanted is None:
        return record
    policy_id = set_policy(tx, actor, record.profile.attestation_policy_id, wanted, now=now)
    profile = dataclasses.replace(record.profile, attestation_policy_id=policy_id)
    return dataclasses.replace(record, profile=profile)


# --- Certificate profiles -----------------------------------------------------------------------------------------


def check_enrolment_profile(tx: Connection, tenant_id: str, profile: EnrolmentProfile) -> None:
    """Raise ``ProfileRefused`` if the certificate profile does not exist, or nobody could enrol under it."""
    name = profile.certificate_profile
    if name == DEFAULT:
        return
    found = find_profiles(tx, tenant_id, [name]).get(name)
    if found is None:
        raise unknown(name)
    terms = CertificateTerms(found, {})
    if profile.validity_days is not None:
        terms.days(profile.validity_days, profile.validity_days)
    if not set(profile.key_types) & set(found.key_types):
        raise ProfileRefused(
            f"The certificate profile {name} allows none of these key_types; it allows {', '.join(found.key_types)}.",
            [FieldProblem("key_types", "has none that the certificate profile allows")],
        )
    if "{number}" in profile.name_template and found.uses("name"):
        raise ProfileRefused(
            f"The certificate profile {name} puts the device's name into certificates, and names with {{number}} are"
            " not known before these are signed; use {serial} in name_template.",
            [FieldProblem("name_template", "has {number}, and the certificate profile uses {name}")],
        )


def in_audit(profile: EnrolmentProfile) -> dict[str, str]:
    """Return what an audit entry says of the certificate profile of a token or a manufacturer."""
    name = profile.certificate_profile
    return {} if name == DEFAULT else {"profile": name}
