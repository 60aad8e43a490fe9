"""The use cases: register, update, revoke, deliver."""

from __future__ import annotations

import dataclasses
import hmac
import json
import logging
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

import audit
import ca
import credential_delivery as delivery
import db
import db_deliveries
import metrics
from audit import Actor
from authority import Authority
from broker_provisioning import check_style
from config import AclStyle, Settings
from db import Database
from enforcement import Enforcement
from errors import FieldProblem, IdempotencyConflict, InputInvalid, LinkRevoked, StateConflict, Unavailable
from failpoints import failpoint
from lifecycle import DeviceStatus, advance
from onboarding_terms import Bundle, Registered, Registration, Revoked
from topics import Access, Topic, check_topics, default_topics, expand

log = logging.getLogger("portal.onboarding")

ANSWERS_KEPT = timedelta(hours=24)
# A fetch holds its link for this long; a portal that dies meanwhile leaves the link to be fetched again after it.
FETCH_LEASE = timedelta(seconds=30)


class Onboarding:
    """What is done to devices; every way in (REST, later EST, bulk, web) goes through here."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authority: Authority,
        enforcement: Enforcement,
        *,
        link_keys: Sequence[str],
        pepper: bytes,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._database = database
        self._authority = authority
        self._enforcement = enforcement
        self._link_keys = link_keys
        self._pepper = pepper
        self._clock = clock

    # --- Register

    def register(self, actor: Actor, wanted: Registration, idempotency_key: str | None = None) -> Registered:
        """Register a device, once however often the same ``idempotency_key`` comes within 24 hours.

        Raises ``InputInvalid`` (``CsrInvalid``, ``TopicRefused``), ``IdempotencyConflict``, ``Unavailable``.
        """
        seal = delivery.AnswerSeal.of(idempotency_key, pepper=self._pepper) if idempotency_key else None
        repeated = seal and self._repeated(actor, wanted, seal)
        if repeated:
            answer, generation = repeated
        else:
            try:
                answer, generation = self._register(actor, wanted, seal)
            except IntegrityError:
                # Of two first requests with one key the database let one through: its answer is both's.
                repeated = seal and self._repeated(actor, wanted, seal)
                if not repeated:
                    raise
                answer, generation = repeated
        if answer.certificate is not None:
            self.wait_until_granted(generation)
        elif generation:
            self._enforcement.wake()
        failpoint("register.before_answer")
        return answer

    def _repeated(self, actor: Actor, wanted: Registration, seal: delivery.AnswerSeal) -> tuple[Registered, int] | None:
        with self._database.snapshot() as tx:
            kept = db_deliveries.find_answer(tx, actor.tenant_id, seal.key_hash, now=self._clock())
        if kept is None:
            return None
        if not hmac.compare_digest(kept.request_hash, seal.request_hash(_canonical(wanted))):
            raise IdempotencyConflict(
                "This Idempotency-Key was used with another body in the last 24 hours; use a new key."
            )
        return Registered.from_json(seal.open(kept.sealed)), kept.generation

    def _register(self, actor: Actor, wanted: Registration, seal: delivery.AnswerSeal | None) -> tuple[Registered, int]:
        device_id = str(uuid.uuid4())
        topics = self.check_topics(wanted.topics, device_id)
        days = wanted.validity_days or self._settings.device_days
        key: ca.PrivateKey | None = None
        if wanted.csr is None:
            key = ca.generate_keypair(ca.KeyType(wanted.key_type or self._settings.key_type))
            public_key = key.public_key()
        elif wanted.key_type or wanted.bundle_password:
            raise InputInvalid(
                "With a csr the device has its own key: leave out key_type and bundle_password.",
                [FieldProblem("csr", "goes with neither key_type nor bundle_password")],
            )
        else:
            public_key = ca.read_csr(wanted.csr)
        now = self._clock()
        signer = self._authority.issuing
        issued = ca.sign_certificate(
            signer.issuer, public_key, device_id=device_id, now=now, days=days, pki_url=self._settings.pki_url
        )
        answer = Registered(
            device_id=device_id,
            name=wanted.name,
            status=advance(DeviceStatus.PENDING, DeviceStatus.ACTIVE),
            fingerprint=issued.fingerprint,
            serial_number=issued.serial_number,
            issued_at=now,
            expires_at=issued.not_after,
        )
        bundle: bytes | None = None
        delivery_id = secrets.token_hex(16)
        if key is None:
            answer = dataclasses.replace(answer, certificate=issued.pem, chain=self._authority.chain_pem(issued.pem))
        else:
            password = wanted.bundle_password or delivery.new_bundle_password()
            bundle = self._package(device_id, key, issued, topics, password, now)
            answer = dataclasses.replace(
                answer,
                download_url=delivery.generate_download_link(
                    delivery_id, self._link_keys, public_url=self._settings.public_url, now=now
                ),
                download_expires_at=now + timedelta(hours=self._settings.link_hours),
                bundle_password=password,
            )

        def record(tx: Connection) -> int:
            # Under the pattern style a device with the default topics is let in with no word to the broker.
            told = topics is not None or self._settings.acl_style is AclStyle.PER_DEVICE
            generation = db.next_generation(tx, actor.tenant_id, at=now) if told else 0
            db.add_device(
                tx,
                tenant_id=actor.tenant_id,
                device_id=device_id,
                name=wanted.name,
                type=wanted.type,
                location=wanted.location,
                firmware=wanted.firmware,
                metadata=dict(wanted.metadata),
                status=DeviceStatus.ACTIVE,
                topics=None if topics is None else [(topic.filter, topic.access) for topic in topics],
                created_at=now,
                generation=generation,
            )
            certificate_id = db.add_certificate(
                tx,
                tenant_id=actor.tenant_id,
                issuer_id=signer.id,
                device_id=device_id,
                purpose="device",
                serial_number=issued.serial_number,
                fingerprint=issued.fingerprint,
                der=issued.der,
                not_before=issued.not_before,
                not_after=issued.not_after,
                issued_at=now,
            )
            if bundle is not None and answer.download_expires_at is not None:
                db_deliveries.add_delivery(
                    tx,
                    tenant_id=actor.tenant_id,
                    delivery_id=delivery_id,
                    device_id=device_id,
                    certificate_id=certificate_id,
                    bundle=bundle,
                    created_at=now,
                    expires_at=answer.download_expires_at,
                )
            if seal is not None:
                db_deliveries.add_answer(
                    tx,
                    tenant_id=actor.tenant_id,
                    key_hash=seal.key_hash,
                    request_hash=seal.request_hash(_canonical(wanted)),
                    sealed=seal.seal(answer.to_json()),
                    generation=generation,
                    created_at=now,
                    expires_at=now + ANSWERS_KEPT,
                )
            audit.record(
                tx,
                actor,
                "device:register",
                f"device:{device_id}",
                at=now,
                serial_number=issued.serial_number,
                key="csr" if key is None else "made here",
            )
            failpoint("register.before_commit")
            return generation

        generation = self._database.write(record)
        metrics.registered(with_csr=key is None)
        failpoint("register.after_commit")
        return answer, generation

    def _package(
        self,
        device_id: str,
        key: ca.PrivateKey,
        issued: ca.Issued,
        topics: Sequence[Topic] | None,
        password: str,
        now: datetime,
    ) -> bytes:
        example = (topics or default_topics(self._settings.topic_prefix))[0]
        credentials = delivery.Credentials(
            device_id=device_id,
            key_pem=ca.private_key_pem(key),
            certificate_pem=issued.pem,
            chain_pem=self._authority.chain_pem(issued.pem),
            ca_pem=self._authority.ca_pem,
            broker_host=self._settings.mqtt_host,
            broker_port=self._settings.mqtt_port,
            example_topic=expand(example, device_id).replace("#", "hello").replace("+", "hello"),
        )
        return delivery.package_credentials(credentials, password, now=now)

    def check_topics(self, topics: Sequence[tuple[str, str]] | None, device_id: str) -> tuple[Topic, ...] | None:
        """Check topics that a device is to have as its own; ``None`` stands for the default ones.

        Raises ``TopicRefused``.
        """
        if topics is None:
            return None
        wanted = [Topic(pattern, Access(access)) for pattern, access in topics]
        checked = check_topics(wanted, device_id=device_id, prefix=self._settings.topic_prefix)
        check_style(checked, self._settings.acl_style, self._settings.topic_prefix)
        return None if checked == default_topics(self._settings.topic_prefix) else checked

    # --- Update

    def update(self, actor: Actor, device_id: str, values: Mapping[str, Any], topics: Any = ...) -> None:
        """Change what is known of a device; ``topics`` as in a registration, left out to keep them.

        Raises ``DeviceNotFound``, ``StateConflict`` for a revoked device, ``TopicRefused``.
        """
        now = self._clock()
        checked = None if topics is ... else self.check_topics(topics, device_id)
        generation = 0
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            if device.status is DeviceStatus.REVOKED:
                raise StateConflict("The device is revoked, which is final; register it anew to change it.")
            db.update_device(tx, actor.tenant_id, device_id, {**values, "updated_at": now})
            if topics is not ...:
                generation = db.next_generation(tx, actor.tenant_id, at=now)
                pairs = None if checked is None else [(topic.filter, topic.access) for topic in checked]
                db.replace_topics(tx, actor.tenant_id, device_id, pairs, generation=generation)
            changed = sorted(values) + ([] if topics is ... else ["topics"])
            audit.record(tx, actor, "device:update", f"device:{device_id}", at=now, changed=changed)
        if generation:
            self._enforcement.apply(generation)  # taking topics away is a revocation: it does not lag

    # --- Revoke

    def revoke(self, actor: Actor, device_id: str, reason: str) -> Revoked:
        """Put a device out for good; a repeat gives the first answer's time and reason.

        Returns once the broker was seen to refuse it, or once that failed. Raises ``DeviceNotFound``.
        """
        started, now = time.monotonic(), self._clock()
        with self._database.transaction() as tx:
            device = db.get_device(tx, actor.tenant_id, device_id, for_update=True)
            repeated = device.status is DeviceStatus.REVOKED
            if repeated:
                generation, revoked_at, reason = (
                    device.generation,
                    device.revoked_at,
                    device.revocation_reason or reason,
                )
            else:
                advance(device.status, DeviceStatus.REVOKED)
                generation, revoked_at = db.next_generation(tx, actor.tenant_id, at=now), now
                db.revoke_device(tx, actor.tenant_id, device_id, revoked_at=now, reason=reason, generation=generation)
                audit.record(tx, actor, "device:revoke", f"device:{device_id}", at=now, reason=reason)
            failpoint("revoke.before_commit")
        failpoint("revoke.after_commit")
        if not repeated:
            metrics.revoked()
        outcome = self._enforcement.apply(generation)
        enforced = outcome.covers(generation)
        if enforced and not repeated:
            metrics.enforced(time.monotonic() - started)
        if not enforced:
            log.error(
                "a revocation is not enforced by the broker yet",
                extra={"device_id": device_id, "problem": outcome.problem},
            )
        return Revoked(device_id, revoked_at or now, reason, enforced, None if enforced else outcome.problem)

    # --- Deliver

    def wait_until_granted(self, generation: int) -> None:
        """Return once credentials made at ``generation`` will work; raises ``Unavailable`` where that takes too long.

        A broker that is not running will read the files at its start, so for it they are enough.
        """
        outcome = self._enforcement.apply(generation)
        if outcome.covers(generation):
            return
        if outcome.installed >= generation and not self._enforcement.broker_answers():
            return
        raise Unavailable("The device is registered, but the broker does not know it yet; try again in a few seconds.")

    def check_download(self, token: str) -> db_deliveries.DeliveryRecord:
        """Look at what a link's token stands for and spend nothing.

        Raises ``LinkUnknown``, ``LinkUsed``, ``LinkExpired``, ``LinkRevoked``.
        """
        now = self._clock()
        # The signature's own age limit is the longest a link can live; what counts is the time in the database.
        delivery_id = delivery.read_download_token(
            token, self._link_keys, now=now, max_age=timedelta(hours=self._settings.link_hours) + timedelta(days=1)
        )
        with self._database.snapshot() as tx:
            return db_deliveries.get_delivery(tx, delivery_id, now=now)

    def claim_download(self, actor: Actor, token: str) -> Bundle:
        """Take the bundle behind a link for one fetch; call ``end_download`` before its end goes out.

        Call ``finish_download`` or ``release_download`` afterwards.

        Raises as ``check_download`` does, and ``Unavailable`` while the broker does not know the device.
        """
        record = self.check_download(token)
        self.wait_until_granted(record.generation)
        now = self._clock()
        grace = timedelta(seconds=self._settings.link_grace)
        with self._database.transaction() as tx:
            content = db_deliveries.claim_delivery(tx, record.id, now=now, lease=FETCH_LEASE, grace=grace)
            audit.record(tx, actor, "bundle:fetch", f"device:{record.device_id}", at=now, delivery=record.id)
        failpoint("deliver.after_claim")
        return Bundle(record.id, record.device_id, content)

    def end_download(self, bundle: Bundle) -> None:
        """Call before the end of the bundle goes out: from here on a crash leaves the link used, not open again.

        Raises ``LinkRevoked`` where the device was revoked meanwhile; the end must not go out then.
        """
        if not self._database.write(lambda tx: db_deliveries.close_delivery(tx, bundle.delivery_id)):
            raise LinkRevoked("The device of this link has been revoked, so its bundle was destroyed.")
        failpoint("deliver.after_end")

    def finish_download(self, actor: Actor, bundle: Bundle) -> None:
        """The bundle has arrived: destroy it."""
        failpoint("deliver.before_finish")
        now = self._clock()
        with self._database.transaction() as tx:
            if db_deliveries.finish_delivery(tx, bundle.delivery_id, delivered_at=now):
                audit.record(
                    tx, actor, "bundle:deliver", f"device:{bundle.device_id}", at=now, delivery=bundle.delivery_id
                )

    def release_download(self, bundle: Bundle) -> None:
        """The fetch broke off: the same link may be used again within the grace time."""
        with self._database.transaction() as tx:
            db_deliveries.release_delivery(tx, bundle.delivery_id, now=self._clock())


def _canonical(wanted: Registration) -> bytes:
    return json.dumps(dataclasses.asdict(wanted), sort_keys=True, default=list).encode()
