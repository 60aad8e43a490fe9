"""The use cases of an operator: register a device or an application, and change what is known of it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import EllipsisType
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import db
from config import Settings
from core import metrics
from core.errors import AttestationRefused, FieldProblem, InputInvalid, StateConflict
from core.failpoints import failpoint
from core.states import METADATA_BYTES, ClientKind, DeviceStatus
from core.topics import Access, Topic, default_topics, reads_less
from pki.profiles import CertificateTerms
from store import audit, groups
from store.audit import Actor
from store.database import Database
from store.devices import device_topics, update_device
from store.groups import GroupRecord
from store.profiles import hold_profile
from workflows.admission import Admission, admit, broker_must_learn, check_external_id, checked_topics
from workflows.attestation.appraisal import NOT_APPRAISED, Appraised, DeviceAttestations
from workflows.attestation.nonces import NonceHolder
from workflows.changes import ActionRefused, Changes, write_in_batches
from workflows.credentials import CredentialAnswer, CredentialIssuer, DeviceRequest
from workflows.delivery import KeptAnswers, Sealed
from workflows.events import EventType
from workflows.memberships import find_groups, life_among, topics_in_groups, topics_of_new, with_life
from workflows.profiles import find_profiles, terms_of
from workflows.reconciliation import Reconciler
from workflows.tenants import TenantDirectory, TenantRates, TenantTerms

log = logging.getLogger("portal.registrations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(CredentialAnswer):
    """The answer to a registration; ``generation`` is the one that the broker must reach, 0 if it need not learn."""

    issued_at: datetime
    name: str
    status: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Updated:
    """A device of which something was changed; ``enforced`` is ``None`` if the broker had nothing to learn."""

    device_id: str
    enforced: bool | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class _New:
    """What is to be admitted: a device or an application with the answer to the client that registers it."""

    tenant: TenantTerms
    admission: Admission
    external_id: str | None
    at: datetime
    answer: Registered
    sealed: Sealed | None


@dataclass(eq=False, repr=False)
class Registrations:
    """Registers devices and applications, one at a time, and changes what is known of them."""

    _settings: Settings
    _database: Database
    _tenants: TenantDirectory
    _reconciler: Reconciler
    _credentials: CredentialIssuer
    _answers: KeptAnswers
    _attestations: DeviceAttestations
    _rates: TenantRates
    _clock: Callable[[], datetime]

    # --- Register

    def register(self, actor: Actor, request: DeviceRequest, idempotency_key: str | None = None) -> Registered:
        """Register a device or an application; requests with one ``idempotency_key`` within 24 hours register one.

        Raises ``InputInvalid`` (``CsrInvalid``, ``TopicRefused``, ``ProfileRefused``), ``IdempotencyConflict``,
        ``ExternalIdTaken``, ``NameInUse``, ``GuardNeeded``, ``QuotaReached``, ``TooManyRegistrations``,
        ``GroupsDisagree``, ``StateConflict`` if a group is changed meanwhile, ``Forbidden``, ``Unavailable``.
        """
        try:
            if idempotency_key:
                sealed = self._answers.seal(actor, idempotency_key, _canonical(request))
                answer, generation = self._answers.once(
                    sealed, Registered.from_json, lambda: self._register(actor, request, sealed)
                )
            else:
                answer, generation = self._register(actor, request, None)
        except IntegrityError:
            with self._database.snapshot() as tx:
                check_external_id(tx, actor.tenant_id, request.external_id)
            raise
        if answer.certificate is not None:
            self._reconciler.wait_until_granted(generation)
        elif generation:
            self._reconciler.wake()
        failpoint("register.before_answer")
        return dataclasses.replace(answer, generation=generation) if generation else answer

    def _register(self, actor: Actor, request: DeviceRequest, sealed: Sealed | None) -> tuple[Registered, int]:
        with self._database.preparing():
            return self._prepare_and_write(actor, request, sealed)

    def _prepare_and_write(self, actor: Actor, request: DeviceRequest, sealed: Sealed | None) -> tuple[Registered, int]:
        now = self._clock()
        device_id = db.new_device_id(now)
        tenant = self._tenants.of(actor.tenant_id)
        own = checked_topics(self._settings, tenant, request.topics, device_id, kind=request.kind)
        terms, of_device = self._terms(actor, device_id, request)
        topics, topics_group_id = topics_of_new(own, of_device)
        appraised = self._appraised(actor, request)
        self._rates.take_registration(tenant)
        wanted = with_life(request, life_among(of_device), terms)
        issued = self._credentials.issue(tenant, device_id, wanted, topics, now=now, terms=terms)
        with_csr = issued.bundle is None
        answer = Registered.of(issued, issued_at=now, name=request.name, status=DeviceStatus.ACTIVE)
        admission = Admission(
            actor=actor,
            credentials=issued,
            name=request.name,
            event=EventType.REGISTERED,
            action=f"{request.kind}:register",
            detail={"key": "csr" if with_csr else "made here"},
            kind=request.kind,
            request=request,
            topics=topics,
            groups=of_device,
            topics_group_id=topics_group_id,
            attestation=appraised,
        )
        new = _New(tenant, admission, request.external_id, now, answer, sealed)
        generation = self._database.write_together(self._admit, new)
        metrics.counts.registrations.labels("device" if with_csr else "portal").inc()
        failpoint("register.after_commit")
        return answer, generation

    def _admit(self, tx: Connection, new: Sequence[_New]) -> Sequence[int]:
        """Write what several clients have asked for, all of a tenant at once.

        Return the generation that the broker must reach for each, 0 if it need not learn of it.
        """
        generations: dict[str, int] = {}
        for tenant_id in dict.fromkeys(one.tenant.id for one in new):
            generations |= self._admit_of_tenant(tx, [one for one in new if one.tenant.id == tenant_id])
        failpoint("register.before_commit")
        return [generations[one.answer.device_id] for one in new]

    def _admit_of_tenant(self, tx: Connection, new: Sequence[_New]) -> Mapping[str, int]:
        for one in new:
            check_external_id(tx, one.tenant.id, one.external_id)
        style, now = self._settings.granting_style, max(one.at for one in new)
        most = new[-1].tenant.quotas.devices
        admitted = admit(tx, [one.admission for one in new], style=style, most=most, now=now)
        generations: dict[str, int] = {}
        for one in new:
            device_id, must_learn = one.answer.device_id, broker_must_learn(one.admission.topics, style)
            generation = generations[device_id] = admitted.generation if must_learn else 0
            if one.sealed is not None:
                self._answers.keep(tx, one.sealed, one.answer.to_json(), device_id=device_id, generation=generation)
        return generations

    def _appraised(self, actor: Actor, request: DeviceRequest) -> Appraised:
        """Appraise the evidence that an operator passes on; raises a kind of ``AttestationRefused``."""
        if request.evidence is None or request.csr is None:
            return NOT_APPRAISED
        holder = NonceHolder.of_operator(actor.tenant_id, actor.token_id or "")
        key = request.csr.public_key
        appraised = self._attestations.appraise(request.policy_id, request.evidence, holder=holder, key=key)
        try:
            appraised.check()
        except AttestationRefused:
            self._attestations.record_refusal(actor, appraised, None)
            raise
        return appraised

    def _terms(
        self, actor: Actor, device_id: str, request: DeviceRequest
    ) -> tuple[CertificateTerms | None, Sequence[GroupRecord]]:
        """Return the terms by the device's certificate profile, ``None`` for the default one, and its groups."""
        if request.profile is None and not request.groups:
            return None, ()
        with self._database.snapshot() as tx:
            profiles = find_profiles(tx, actor.tenant_id, [request.profile])
            of_device = find_groups(tx, actor, request.groups)
        return terms_of(profiles, request.profile, device_id, request), of_device

    # --- Update

    def free_external_id(self, actor: Actor, device_id: str) -> None:
        """Free the external id of a revoked device for its successor; the device keeps a record of what it was.

        A repeat changes nothing. Raises ``DeviceNotFound``, ``StateConflict`` for a device that is not revoked.
        """
        now = self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            if device.status is not DeviceStatus.REVOKED:
                raise StateConflict(f"The device is {device.status}; only a revoked one can give up its external_id.")
            if device.external_id is None:
                return
            values = {"external_id": None, "former_external_id": device.external_id, "updated_at": now}
            update_device(tx, actor.tenant_id, device_id, values)
            of, freed = f"device:{device_id}", device.external_id
            audit.record(tx, actor, "device:free_external_id", of, at=now, external_id=freed)

    def update(
        self,
        actor: Actor,
        device_id: str,
        values: Mapping[str, Any],
        topics: Sequence[tuple[str, str]] | EllipsisType | None = ...,
        *,
        kind: ClientKind = ClientKind.DEVICE,
    ) -> None:
        """Change what is known of a device or application; ``topics`` as in a registration, left out to keep them.

        A device without topics of its own has those of its group, if one sets some, else the default ones. A
        ``profile``, by its name, counts from the next certificate on, as do other values that are in it. Raises
        ``DeviceNotFound``, ``ApplicationNotFound``, ``StateConflict`` for one that is revoked, ``TopicRefused``,
        ``ProfileRefused``, ``GuardNeeded``, ``ExternalIdTaken``, ``InputInvalid`` if it would have too much metadata.
        """
        now, update = self._clock(), _Update(self._settings, self._tenants.of(actor.tenant_id), values, topics, kind)
        update.check(device_id)
        with self._database.transaction() as tx:
            changes = Changes(tx, actor, now)
            update.hold_groups(changes, [device_id])
            generation = update.write(changes, device_id)
            changes.end()
        if generation:
            self._reconciler.apply_everywhere(generation)  # taking topics away is a revocation: it does not lag
            self._reconciler.wait_for_restart()

    def update_many(
        self,
        actor: Actor,
        device_ids: Sequence[str],
        values: Mapping[str, Any],
        topics: Sequence[tuple[str, str]] | EllipsisType | None = ...,
    ) -> Iterator[Updated | ActionRefused]:
        """Change the same of many devices, with one reconciliation for all; yield an answer for each, in their order.

        One that is refused keeps none of the others from it; to repeat it all does no harm. Raises ``TopicRefused``.
        """
        now = self._clock()
        update = _Update(self._settings, self._tenants.of(actor.tenant_id), values, topics, ClientKind.DEVICE)
        update.check(None)
        written, refused = write_in_batches(
            self._database, actor, now, device_ids, update.write, before=update.hold_groups
        )
        outcome = None
        if newest := max(written.values(), default=0):
            outcome = self._reconciler.apply_everywhere(newest)
            self._reconciler.wait_for_restart()
        for device_id in device_ids:
            if device_id in refused:
                yield refused[device_id]
            elif outcome is None:
                yield Updated(device_id)
            else:
                enforced = outcome.covers(written[device_id])
                yield Updated(device_id, enforced, None if enforced else outcome.problem)


@dataclass(eq=False)
class _Update:
    """A change of what is known of devices: the same for each of them."""

    settings: Settings
    tenant: TenantTerms
    values: Mapping[str, Any]
    topics: Sequence[tuple[str, str]] | EllipsisType | None
    kind: ClientKind
    held: dict[str, GroupRecord | None] = field(default_factory=dict)

    def check(self, device_id: str | None) -> tuple[Topic, ...] | None:
        """Return the topics that a device, or with ``None`` any, would have as its own; raises ``TopicRefused``."""
        if isinstance(self.topics, EllipsisType):
            return None
        return checked_topics(self.settings, self.tenant, self.topics, device_id, kind=self.kind)

    def hold_groups(self, changes: Changes, device_ids: Sequence[str]) -> None:
        """Keep others from changing the groups whose topics devices have that give up their own."""
        if self.topics is ... or self.kind is ClientKind.APPLICATION:
            return
        found = {device_id: topics_in_groups(changes.tx, changes.tenant_id, device_id) for device_id in device_ids}
        locked: dict[str, GroupRecord] = {}
        for name in sorted({group.name for group in found.values() if group is not None}):
            locked[name] = groups.get_group(changes.tx, changes.tenant_id, name, for_update=True)
        self.held = {one: None if group is None else locked[group.name] for one, group in found.items()}

    def write(self, changes: Changes, device_id: str) -> int:
        """Write the change of a device; return the generation that the broker must reach, 0 if it need not learn of it.

        Raises before anything is written.
        """
        tx, tenant_id, values, checked = changes.tx, changes.tenant_id, self.values, self.check(device_id)
        device = db.get_device(tx, tenant_id, device_id, kind=self.kind, for_update=True)
        if device.status is DeviceStatus.REVOKED:
            raise StateConflict(f"The {self.kind} is revoked, which is final; register it again instead.")
        group = self.held.get(device_id) if checked is None else None
        if self.topics is not ... and checked is None and topics_in_groups(tx, tenant_id, device_id) != group:
            raise StateConflict("The device's groups have been changed meanwhile; try again.")
        columns = {name: value for name, value in values.items() if name not in ("profile", "metadata_changes")}
        if values.get("external_id") not in (None, device.external_id):
            if device.external_id is not None:  # whoever uploads it again must not make a second device
                raise StateConflict("The device has an external_id already, which stays its own until it is revoked.")
            audit.lock_audit_head(tx, tenant_id)  # so that nobody else takes it meanwhile
            check_external_id(tx, tenant_id, values["external_id"])
        if "metadata_changes" in values:
            columns["metadata"] = _merged(device.metadata, values["metadata_changes"])
        if "profile" in values:
            columns["profile_id"] = hold_profile(tx, tenant_id, values["profile"])
        update_device(tx, tenant_id, device_id, {**columns, "updated_at": changes.now})
        generation = 0 if self.topics is ... else self._write_topics(changes, device_id, checked, group)
        changed = sorted(values) + ([] if self.topics is ... else ["topics"])
        to = {name: values[name] for name in ("profile", "external_id") if name in values}
        changes.record(f"{self.kind}:update", device.name_in_audit, changed=changed, **to)
        return generation

    def _write_topics(
        self, changes: Changes, device_id: str, checked: Sequence[Topic] | None, group: GroupRecord | None
    ) -> int:
        tx, tenant_id, generation = changes.tx, changes.tenant_id, changes.generation()
        if group is not None:
            checked = [Topic(pattern, Access(access)) for pattern, access in group.pairs or ()]
        pairs = None if checked is None else [(topic.filter, topic.access) for topic in checked]
        narrowed = _reads_less(self.tenant, device_topics(tx, tenant_id, device_id), checked)
        of_group = None if group is None else group.id
        db.replace_topics(tx, tenant_id, device_id, pairs, generation=generation, narrowed=narrowed, group_id=of_group)
        return generation


def _merged(metadata: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with the changes, of which ``None`` removes a key; raises ``InputInvalid`` if it is too long."""
    merged = {key: value for key, value in {**metadata, **changes}.items() if value is not None or key not in changes}
    if len(json.dumps(merged, ensure_ascii=False).encode()) > METADATA_BYTES:
        problem = FieldProblem("metadata_changes", f"make more than {METADATA_BYTES} bytes of JSON of the metadata")
        raise InputInvalid("The device would have too much metadata; remove some of it first.", [problem])
    return merged


def _reads_less(tenant: TenantTerms, before: Sequence[tuple[str, str]], after: Sequence[Topic] | None) -> bool:
    default = default_topics(tenant.topic_prefix)
    own = [Topic(pattern, Access(access)) for pattern, access in before]
    return reads_less(own or default, after or default)


def _canonical(request: DeviceRequest) -> bytes:
    values = dataclasses.asdict(dataclasses.replace(request, csr=None))
    values["csr"] = request.csr and request.csr.pem
    if values["external_id"] is None:
        del values["external_id"]  # as in answers kept by a portal that did not know the field
    if values["kind"] == ClientKind.DEVICE:
        del values["kind"]
    for name in ("profile", "groups", "evidence", "policy_id"):
        if values[name] in (None, ()):
            del values[name]
    return json.dumps(values, sort_keys=True, default=list).encode()
