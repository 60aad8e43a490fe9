"""The use cases of a renewal: a new certificate, and the end of the previous one."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import db
from config import Settings
from core import metrics
from core.errors import AttestationRefused, Conflict, InputInvalid, NotFound, StateConflict
from core.failpoints import failpoint
from core.states import ClientKind, DeviceStatus, check_renewal
from core.topics import Access, Topic
from store import audit, devices
from store import renewal as store_renewal
from store.audit import Actor
from store.database import Database
from store.devices import DeviceRecord
from workflows.admission import Issuance, record_issuances
from workflows.attestation.appraisal import NOT_APPRAISED, Appraised, DeviceAttestations
from workflows.attestation.evidence import ShownEvidence
from workflows.changes import ActionRefused
from workflows.credentials import CredentialAnswer, CredentialIssuer, CredentialRequest, IssuedCredentials
from workflows.delivery import KeptAnswers, Sealed
from workflows.events import EventType
from workflows.memberships import life_in_groups, with_life
from workflows.profiles import terms_of_device
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory

log = logging.getLogger("portal.renewals")

# A device whose answers are lost asks again and again, and each valid certificate makes a stolen key worth more.
MAX_VALID = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalRequest(CredentialRequest):
    """A renewal to be made.

    The previous certificate keeps working for ``overlap_hours`` (``None``: as the settings say), or, with
    ``when_used``, until the new one was seen in use, if that comes first. ``evidence`` is what a device has shown that
    renews by itself.
    """

    overlap_hours: int | None = None
    when_used: bool = False
    evidence: ShownEvidence | None = None

    def canonical(self, device_id: str) -> bytes:
        """Return the text that distinguishes one request from another under the same idempotency key."""
        values = dataclasses.asdict(dataclasses.replace(self, csr=None, evidence=None))
        values["csr"] = self.csr and self.csr.pem
        del values["evidence"]  # a repeat may come with other evidence, and has the same answer
        own = {"overlap_hours": values.pop("overlap_hours"), "when_used": values.pop("when_used")}
        return json.dumps(["renew", device_id, {"wanted": values, **own}], sort_keys=True).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed(CredentialAnswer):
    """The answer to a renewal, with the time until which the previous certificate keeps working.

    ``previous_valid_until`` is ``None`` where no older one does. Where older ones were to end at once (``ended``),
    ``problem`` says why the broker does not refuse them yet.
    """

    issued_at: datetime
    previous_valid_until: datetime | None
    ended: bool = False
    problem: str | None = None
    name: str = ""  # of the device or application; empty in answers that an older portal has kept


@dataclass(eq=False, repr=False)
class Renewals:
    """Gives active devices and applications a new certificate, whether an operator or they themselves ask."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _credentials: CredentialIssuer
    _answers: KeptAnswers
    _attestations: DeviceAttestations
    _clock: Callable[[], datetime]

    def renew(
        self,
        actor: Actor,
        device_id: str,
        renewal: RenewalRequest,
        idempotency_key: str | None = None,
        *,
        shown: str | None = None,
        kind: ClientKind = ClientKind.DEVICE,
    ) -> Renewed:
        """Give a device a new certificate, which works at once; the previous one keeps working until its overlap ends.

        An operator may renew at any time, an application by its ``kind``. A device or application may by itself in the
        window of the certificate that it has ``shown`` (the SHA-256 of the DER in hex), which need not be its newest:
        the answer that brought that may have been lost. The device's certificate profile counts as it is now. Raises
        ``DeviceNotFound``, ``ApplicationNotFound``, ``StateConflict`` if it is not active, has too many certificates
        or asks too early or too late, ``InputInvalid`` (``CsrInvalid``, ``ProfileRefused``), ``NameInUse``,
        ``IdempotencyConflict``, ``Unavailable``.
        """
        answer, generation = self._renew_once(actor, device_id, renewal, idempotency_key, shown=shown, kind=kind)
        return self._release(actor, answer, generation)

    def renew_many(
        self, actor: Actor, device_ids: Sequence[str], renewal: RenewalRequest, idempotency_key: str | None
    ) -> Iterator[Renewed | ActionRefused]:
        """Give many devices a new certificate, each for a key that the portal makes; yield an answer for each.

        With one ``idempotency_key`` within 24 hours each device is renewed once, whichever others are renewed with it.
        The broker learns at once of all that has ended. One that is refused keeps none of the others from it.
        """
        done: dict[str, Renewed | ActionRefused] = {}
        generations: dict[str, int] = {}
        for device_id in sorted(set(device_ids)):
            key = None if idempotency_key is None else f"{idempotency_key} {device_id}"
            try:
                done[device_id], generations[device_id] = self._renew_once(actor, device_id, renewal, key)
            except (NotFound, Conflict, InputInvalid) as error:
                done[device_id] = ActionRefused(device_id, error)
        ended = {one for one, answer in done.items() if isinstance(answer, Renewed) and answer.ended}
        if newest := max((generations[one] for one in ended), default=0):
            outcome = self._reconciler.apply_everywhere(newest)
            for device_id in ended:
                answer = done[device_id]
                if isinstance(answer, Renewed) and not outcome.covers(generations[device_id]):
                    done[device_id] = dataclasses.replace(answer, problem=outcome.problem)
        elif any(generations.values()):
            self._reconciler.wake()
        for device_id in device_ids:
            yield done[device_id]

    def _renew_once(
        self,
        actor: Actor,
        device_id: str,
        renewal: RenewalRequest,
        idempotency_key: str | None,
        *,
        shown: str | None = None,
        kind: ClientKind = ClientKind.DEVICE,
    ) -> tuple[Renewed, int]:
        """Write a renewal, or find what its idempotency key has made; returns the answer and its generation."""
        sealed = self._answers.seal(actor, idempotency_key, renewal.canonical(device_id))
        return self._answers.once(
            sealed,
            Renewed.from_json,
            lambda: self._renew(actor, device_id, renewal, sealed, shown=shown, kind=kind)[:2],
        )

    def renew_with_key(
        self, actor: Actor, device_id: str, key_type: str, *, shown: str, when_used: bool = False
    ) -> tuple[str, bytes]:
        """Renew with a new key that the portal makes; returns the certificate (PEM) and the key (PKCS#8, DER).

        The key is kept nowhere, so that a repeat returns another one. Raises as ``renew`` does.
        """
        renewal = RenewalRequest(key_type=key_type, when_used=when_used)
        answer, generation, key = self._renew(actor, device_id, renewal, None, shown=shown, hand_over=True)
        self._release(actor, answer, generation)
        if answer.certificate is None or key is None:
            raise AssertionError("a key that is handed over comes with its certificate")
        return answer.certificate, key

    def _release(self, actor: Actor, answer: Renewed, generation: int) -> Renewed:
        """Tell the broker what has ended, and return the answer once its certificate works."""
        if answer.ended:
            answer = dataclasses.replace(answer, problem=self._ended(answer.device_id, generation))
        elif generation:
            self._reconciler.wake()
        if answer.certificate is not None:
            with self._database.snapshot() as tx:
                device = db.get_device(tx, actor.tenant_id, answer.device_id, kind=None)
            self._reconciler.wait_until_granted(device.generation)
        return answer

    def _renew(
        self,
        actor: Actor,
        device_id: str,
        renewal: RenewalRequest,
        sealed: Sealed | None,
        *,
        shown: str | None,
        hand_over: bool = False,
        kind: ClientKind | None = ClientKind.DEVICE,
    ) -> tuple[Renewed, int, bytes | None]:
        now, kind = self._clock(), kind if shown is None else None
        with self._database.snapshot() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, kind=kind)
            self._check(tx, device, renewal, now=now, shown=shown)
            terms, life = terms_of_device(tx, device), life_in_groups(tx, actor.tenant_id, device_id)
            own = devices.device_topics(tx, actor.tenant_id, device_id)
        topics = [Topic(pattern, Access(access)) for pattern, access in own] or None
        appraised = NOT_APPRAISED if shown is None else self._appraised(actor, device, renewal)
        tenant, renewal = self._tenants.of(actor.tenant_id), with_life(renewal, life, terms)
        if hand_over:
            issued = self._credentials.issue_with_key(
                tenant, device_id, renewal.key_type or "", renewal.validity_days, now=now, terms=terms
            )
        else:
            issued = self._credentials.issue(tenant, device_id, renewal, topics, now=now, terms=terms)
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, kind=kind, for_update=True)
            self._check(tx, device, renewal, now=now, shown=shown)
            answer, generation = self._record(tx, actor, device, renewal, issued, appraised, now)
            if sealed is not None:
                self._answers.keep(tx, sealed, answer.to_json(), device_id=device_id, generation=generation)
            failpoint("renew.before_commit")
        failpoint("renew.after_commit")
        metrics.counts.renewals.labels("operator" if shown is None else "device").inc()
        return answer, generation, issued.key

    def _appraised(self, actor: Actor, device: DeviceRecord, renewal: RenewalRequest) -> Appraised:
        """Appraise what a device has shown that renews by itself; raises a kind of ``AttestationRefused``."""
        key = None if renewal.csr is None else renewal.csr.public_key
        appraised = self._attestations.appraise_renewal(actor.tenant_id, device.id, renewal.evidence, key)
        try:
            appraised.check()
        except AttestationRefused:
            self._attestations.record_refusal(actor, appraised, device.id)
            raise
        return appraised

    def _check(
        self, tx: Connection, device: DeviceRecord, renewal: RenewalRequest, *, now: datetime, shown: str | None
    ) -> None:
        if device.status is DeviceStatus.REVOKED:
            raise StateConflict(f"The {device.kind} is revoked, which is final; register it again.")
        if device.status is not DeviceStatus.ACTIVE:
            raise StateConflict(f"The {device.kind} is {device.status}; it can renew once it is active.")
        if shown is not None:
            dates = store_renewal.valid_dates(tx, device.tenant_id, device.id, shown)
            if dates is None:
                raise StateConflict(
                    f"The certificate that was shown is revoked or not the {device.kind}'s; use the newest."
                )
            check_renewal(
                *dates,
                now,
                from_percent=self._settings.renewal_from,
                grace=timedelta(days=self._settings.renewal_grace_days),
            )
        if self._overlap(renewal) and store_renewal.count_valid(tx, device.tenant_id, device.id, now=now) >= MAX_VALID:
            raise StateConflict(
                f"The {device.kind} has {MAX_VALID} valid certificates; wait until the overlap of one has ended, or"
                " renew with an overlap of 0."
            )

    def _record(
        self,
        tx: Connection,
        actor: Actor,
        device: DeviceRecord,
        renewal: RenewalRequest,
        issued: IssuedCredentials,
        appraised: Appraised,
        now: datetime,
    ) -> tuple[Renewed, int]:
        """Write the rows; returns the answer, with the generation at which something was revoked, 0 if nothing was."""
        tenant_id, device_id, overlap = actor.tenant_id, device.id, self._overlap(renewal)
        unfetched = store_renewal.unfetched_certificates(tx, tenant_id, device_id)
        # If nothing is revoked the broker need not learn of it: it knows the device by its id, not by its certificate.
        generation = db.next_generation(tx, at=now) if unfetched or not overlap else 0
        store_renewal.revoke_unfetched(tx, unfetched, now=now, generation=generation)
        store_renewal.replace_current(tx, tenant_id, device_id, until=now + overlap, ends_when_used=renewal.when_used)
        ended = (
            0 if overlap else store_renewal.revoke_replaced(tx, tenant_id, device_id, now=now, generation=generation)
        )
        goes_on_until = store_renewal.works_until(tx, tenant_id, device_id, now=now)
        with_csr = issued.bundle is None and issued.key is None
        issuance = Issuance(
            actor=actor,
            credentials=issued,
            name=device.name,
            event=EventType.RENEWED,
            action=f"{device.kind}:renew",
            detail={"key": "csr" if with_csr else "made here"},
            kind=device.kind,
            attestation=appraised,
        )
        record_issuances(tx, [issuance], now=now)
        answer = Renewed.of(
            issued, issued_at=now, previous_valid_until=goes_on_until, ended=ended > 0, name=device.name
        )
        return answer, generation

    def _overlap(self, renewal: RenewalRequest) -> timedelta:
        hours = renewal.overlap_hours
        return timedelta(hours=self._settings.renewal_overlap_hours if hours is None else hours)

    # --- The end of the previous certificate

    def used(self, actor: Actor, device_id: str, fingerprint: str) -> None:
        """Note that a device has proven in a TLS handshake with the portal that it has the key of a certificate.

        Revokes its previous certificates if the renewal asked for that. ``fingerprint`` is the SHA-256 of the
        DER in hex. Call it where the handshake was seen; it costs two look-ups where there is nothing to do.
        """
        with self._database.snapshot() as tx:
            if not store_renewal.ends_when_used(tx, actor.tenant_id, device_id):
                return
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, kind=None, for_update=True)
            if device.status is not DeviceStatus.ACTIVE:
                return
            if not store_renewal.is_current(tx, actor.tenant_id, device_id, fingerprint):
                return
            generation = db.next_generation(tx, at=now)
            ended = store_renewal.revoke_replaced(
                tx, actor.tenant_id, device_id, now=now, generation=generation, when_used=True
            )
            of = device.name_in_audit
            audit.record(tx, actor, "certificate:supersede", of, at=now, ended=ended, because="used")
        self._ended(device_id, generation)

    def end_overlaps(self) -> int:
        """Revoke certificates whose overlap has ended, and undo renewals that nobody fetched, some hundreds at a time.

        Returns how many: call it until there are none, and before expired bundles are destroyed.
        """
        now = self._clock()
        with self._database.snapshot() as tx:
            if not store_renewal.ended_overlaps(tx, now=now) and not store_renewal.unfetched_renewals(tx, now=now):
                return 0
        with self._database.transaction() as tx:
            generation = db.next_generation(tx, at=now)
            undone = store_renewal.unfetched_renewals(tx, now=now)
            owners = {renewal.tenant_id for renewal in undone}
            owners |= {owner for owner, _ in store_renewal.ended_overlaps(tx, now=now)}
            audit.lock_audit_heads(tx, owners)
            for renewal in undone:
                store_renewal.undo_renewal(tx, renewal, now=now, generation=generation)
                kind = devices.kind_of(tx, renewal.tenant_id, renewal.device_id)
                actor, of = audit.system_actor(renewal.tenant_id), f"{kind}:{renewal.device_id}"
                audit.record(tx, actor, f"{kind}:renew_undone", of, at=now)
            over = [one for one in store_renewal.ended_overlaps(tx, now=now) if one[0] in owners]
            for owner, device_id in over:
                ended = store_renewal.revoke_replaced(tx, owner, device_id, now=now, generation=generation)
                actor, of = audit.system_actor(owner), f"{devices.kind_of(tx, owner, device_id)}:{device_id}"
                audit.record(tx, actor, "certificate:supersede", of, at=now, ended=ended, because="overlap over")
        self._ended("", generation)
        return len(undone) + len(over)

    def _ended(self, device_id: str, generation: int) -> str | None:
        outcome = self._reconciler.apply_everywhere(generation)
        if outcome.covers(generation):
            return None
        log.error(
            "the broker does not refuse superseded certificates yet",
            extra={"device_id": device_id, "problem": outcome.problem},
        )
        return outcome.problem
