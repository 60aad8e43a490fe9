"""The use cases of a device that enrols by itself: let in by a token, or by the certificate it was born with."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import audit
import db
import db_enrolment
import db_manufacturers
import events
import metrics
from audit import Actor
from ca_enrolment import EnrolmentRequest
from config import Settings
from config_values import AclStyle
from db import CertificateRecord, Database
from db_enrolment import EnrolmentRecord, EnrolmentTokenRecord, Terms
from errors import EnrolmentRefused, KeyRefused, StateConflict, Unavailable
from events import EventType
from failpoints import failpoint
from lifecycle import DeviceStatus, advance
from onboarding import Onboarding
from onboarding_clients import ManufacturedClient
from onboarding_credentials import CredentialMaker, Made, Wanted

RETRY_AFTER = 60  # seconds after which a device that waits for an operator is to ask again
_TRIES = 3
_UNFIT_FOR_A_NAME = re.compile(r"[^A-Za-z0-9._:/+-]+")
_REVOKED = "The enrolment token was revoked; ask an operator for another one."


@dataclass(frozen=True, slots=True)
class Means:
    """What lets a device in. ``identity`` tells it from the others that come by the same token or manufacturer."""

    tenant_id: str
    terms: Terms
    identity: str
    serial: str
    label: str  # for the audit record
    token_id: str | None = None
    manufacturer_id: str | None = None
    device_id: str | None = None  # of the one device that a token is for


def by_token(token: EnrolmentTokenRecord, request: EnrolmentRequest) -> Means:
    """Let in by an enrolment token: the device is whoever has the key of the CSR."""
    return Means(
        token.tenant_id,
        token.terms,
        request.key_fingerprint,
        request.name,
        f"enrolment token {token.name} ({token.id})",
        token_id=token.id,
        device_id=token.device_id,
    )


def by_manufacturer(client: ManufacturedClient) -> Means:
    """Let in by the certificate that the device was born with."""
    return Means(
        client.tenant_id,
        client.manufacturer.terms,
        client.certificate.key_fingerprint,
        client.certificate.serial,
        f"manufacturer {client.manufacturer.name} ({client.manufacturer.id})",
        manufacturer_id=client.manufacturer.id,
    )


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device has its certificate, DER; the broker lets it in."""

    device_id: str
    certificate: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """An operator has yet to decide; the device is to ask again, with the same key, in ``retry_after`` seconds."""

    device_id: str
    retry_after: int = RETRY_AFTER


@dataclass(frozen=True, slots=True)
class _Issued:
    """A certificate, with the generation at which it works."""

    device_id: str
    certificate: bytes
    generation: int


class _AskedMeanwhile(Exception):
    """The same device has asked in another request since this one looked."""


class Enrolment:
    """Answers the same however often a device asks, so that an answer that was lost costs it nothing."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        onboarding: Onboarding,
        credentials: CredentialMaker,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._onboarding = onboarding
        self._credentials = credentials
        self._clock = clock

    def enrol(self, actor: Actor, means: Means, request: EnrolmentRequest) -> Enrolled | Waiting:
        """Certify the key of a device's CSR, or have it wait for an operator, as the terms of its ``means`` say.

        Raises ``EnrolmentRefused``, ``KeyRefused``, ``StateConflict``, ``Unavailable``.
        """
        if request.key_type not in means.terms.key_types:
            allowed = ", ".join(means.terms.key_types)
            raise KeyRefused(f"The CSR is for a key of the kind {request.key_type}; make one of: {allowed}.")
        outcome = self._once(actor, means, request)
        if isinstance(outcome, Waiting):
            return outcome
        failpoint("enrol.after_commit")
        self._onboarding.wait_until_granted(outcome.generation)
        return Enrolled(outcome.device_id, outcome.certificate)

    def _once(self, actor: Actor, means: Means, request: EnrolmentRequest) -> _Issued | Waiting:
        for _ in range(_TRIES):
            with self._database.snapshot() as tx:
                known = self._find(tx, means)
            try:
                if known is None:
                    return self._first(actor, means, request)
                return self._again(actor, means, request, known)
            except (IntegrityError, _AskedMeanwhile):
                continue  # of two requests of one device the database let one through: look at what that has made
        raise Unavailable("The device has asked several times at once; try again in a few seconds.")

    def _find(self, tx: Connection, means: Means) -> EnrolmentRecord | None:
        return db_enrolment.find_enrolment(
            tx,
            means.tenant_id,
            token_id=means.token_id,
            manufacturer_id=means.manufacturer_id,
            identity=means.identity,
        )

    # --- The first time

    def _first(self, actor: Actor, means: Means, request: EnrolmentRequest) -> _Issued | Waiting:
        now = self._clock()
        device_id = means.device_id or str(uuid.uuid4())
        at_once = means.terms.approval == "at_once"
        made = self._make(device_id, means, request, now) if at_once else None

        def record(tx: Connection) -> int:
            number = self._admit(tx, means, now)
            if means.device_id is None:
                self._add_device(tx, means, device_id, number, now)
            elif db.get_device(tx, means.tenant_id, device_id, for_update=True).status is not DeviceStatus.PENDING:
                raise EnrolmentRefused("The device that the enrolment token is for is not waiting to enrol any more.")
            generation, certificate_id = 0, None
            if made is not None:
                # Under the pattern style a new device with the default topics is let in with no word to the broker.
                told = means.device_id is not None or self._settings.acl_style is AclStyle.PER_DEVICE
                generation, certificate_id = self._let_in(tx, means, device_id, made, now, told=told)
            db_enrolment.add_enrolment(
                tx,
                means.tenant_id,
                device_id=device_id,
                token_id=means.token_id,
                manufacturer_id=means.manufacturer_id,
                identity=means.identity,
                key_fingerprint=request.key_fingerprint,
                status="waiting" if made is None else "issued",
                created_at=now,
                decided_at=None if made is None else now,
                certificate_id=certificate_id,
            )
            self._record(tx, actor, device_id, request, made, now)
            failpoint("enrol.before_commit")
            return generation

        generation = self._database.write(record)
        if made is None:
            return Waiting(device_id)
        metrics.registered(with_csr=True)
        return _Issued(device_id, made.issued.der, generation)

    def _admit(self, tx: Connection, means: Means, now: datetime) -> int:
        """Check that the token or manufacturer still lets devices in, and count; returns the device's number.

        From here on no other device can come by the same one until the transaction ends.
        """
        if means.token_id is None:
            self._check_manufacturer(tx, means)
        else:
            token = db_enrolment.lock_enrolment_token(tx, means.tenant_id, means.token_id)
        if self._find(tx, means) is not None:
            raise _AskedMeanwhile
        if means.token_id is None:
            return 0
        if token.revoked_at is not None:
            raise EnrolmentRefused(_REVOKED)
        if token.expires_at <= now:
            raise EnrolmentRefused("The enrolment token has expired; ask an operator for another one.")
        if token.uses >= token.uses_allowed:
            raise EnrolmentRefused("The enrolment token is used up; ask an operator for another one.")
        db_enrolment.count_use(tx, means.tenant_id, means.token_id)
        return token.uses + 1

    def _check_manufacturer(self, tx: Connection, means: Means) -> None:
        record = db_manufacturers.get_manufacturer(tx, means.tenant_id, means.manufacturer_id or "", for_update=True)
        if record.status != "registered":
            raise EnrolmentRefused("The CA of the client certificate is not registered here any more.")

    def _add_device(self, tx: Connection, means: Means, device_id: str, number: int, now: datetime) -> None:
        serial = _UNFIT_FOR_A_NAME.sub("-", means.serial).strip("-") or means.identity[:12]
        name = means.terms.name_template.replace("{number}", str(number)).replace("{serial}", serial)
        db.add_device(
            tx,
            tenant_id=means.tenant_id,
            device_id=device_id,
            name=name[:128].rstrip(),
            type=means.terms.type,
            location=means.terms.location,
            firmware=means.terms.firmware,
            metadata={},
            status=DeviceStatus.PENDING,
            topics=None,
            created_at=now,
            generation=0,
        )

    # --- Again

    def _again(
        self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord
    ) -> _Issued | Waiting:
        with self._database.snapshot() as tx:
            if means.token_id is not None:
                token = db_enrolment.get_enrolment_token(tx, means.tenant_id, means.token_id)
                if token.revoked_at is not None:
                    raise EnrolmentRefused(_REVOKED)
            device = db.get_device(tx, means.tenant_id, known.device_id)
            certificate = None
            if known.certificate_id is not None:
                certificate = db_enrolment.get_certificate(tx, means.tenant_id, known.certificate_id)
        if known.status == "rejected" or device.status in (DeviceStatus.REVOKED, DeviceStatus.SUSPENDED):
            raise EnrolmentRefused("The device has been rejected, revoked or suspended by an operator.")
        if certificate is not None:
            self._check_unchanged(request, known, certificate)
            return _Issued(device.id, certificate.der, device.generation)
        if known.status == "approved":
            return self._issue_approved(actor, means, request, known)
        if known.key_fingerprint != request.key_fingerprint:
            with self._database.transaction() as tx:
                key = request.key_fingerprint
                db_enrolment.update_enrolment(tx, means.tenant_id, known.id, key_fingerprint=key)
        return Waiting(device.id)

    def _check_unchanged(
        self, request: EnrolmentRequest, known: EnrolmentRecord, certificate: CertificateRecord
    ) -> None:
        if known.key_fingerprint != request.key_fingerprint:
            raise StateConflict(
                "The device has enrolled with another key; let it renew with that one's certificate, or revoke it."
            )
        if certificate.revoked_at is not None or certificate.not_after <= self._clock():
            raise EnrolmentRefused("The certificate that was issued for this key is over; enrol with a new key.")

    def _issue_approved(
        self, actor: Actor, means: Means, request: EnrolmentRequest, known: EnrolmentRecord
    ) -> _Issued | Waiting:
        now = self._clock()
        if known.key_fingerprint != request.key_fingerprint:
            raise StateConflict("An operator has approved another key of this device; ask with that one.")
        made = self._make(known.device_id, means, request, now)

        def record(tx: Connection) -> int:
            device = db.get_device(tx, means.tenant_id, known.device_id, for_update=True)
            if means.manufacturer_id is not None:
                self._check_manufacturer(tx, means)
            if device.status is not DeviceStatus.PENDING:
                raise EnrolmentRefused("The device is not waiting to enrol any more.")
            generation, certificate_id = self._let_in(tx, means, known.device_id, made, now, told=True)
            db_enrolment.update_enrolment(tx, means.tenant_id, known.id, status="issued", certificate_id=certificate_id)
            self._record(tx, actor, known.device_id, request, made, now)
            return generation

        generation = self._database.write(record)
        metrics.registered(with_csr=True)
        return _Issued(known.device_id, made.issued.der, generation)

    # --- What both do

    def _make(self, device_id: str, means: Means, request: EnrolmentRequest, now: datetime) -> Made:
        wanted = Wanted(csr=request.pem, validity_days=means.terms.validity_days)
        return self._credentials.make(device_id, wanted, None, now=now)

    def _let_in(
        self, tx: Connection, means: Means, device_id: str, made: Made, now: datetime, *, told: bool
    ) -> tuple[int, int]:
        """Make a pending device active with its certificate; returns the generation and the certificate's id."""
        generation = db.next_generation(tx, means.tenant_id, at=now) if told else 0
        status = advance(DeviceStatus.PENDING, DeviceStatus.ACTIVE)
        values = {"status": status, "generation": generation, "updated_at": now}
        db.update_device(tx, means.tenant_id, device_id, values)
        return generation, self._credentials.record(tx, means.tenant_id, device_id, made, now=now)

    def _record(
        self, tx: Connection, actor: Actor, device_id: str, request: EnrolmentRequest, made: Made | None, now: datetime
    ) -> None:
        facts: dict[str, str] = {}
        if made is not None:
            facts["serial_number"] = made.issued.serial_number
            expires_at = made.issued.not_after
            fingerprint = made.issued.fingerprint
            events.record(
                tx,
                actor.tenant_id,
                EventType.ENROLLED,
                device_id,
                at=now,
                **facts,
                fingerprint=fingerprint,
                expires_at=expires_at,
            )
        facts["key_fingerprint"] = request.key_fingerprint
        action = "device:ask" if made is None else "device:enrol"
        audit.record(tx, actor, action, f"device:{device_id}", at=now, **facts)
