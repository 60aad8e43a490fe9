"""The use cases of manufacturer CAs: add, prove, update, list, remove."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from core.errors import Conflict, ProofInvalid
from core.states import ManufacturerStatus
from pki import client_certificates
from pki.client_certificates import ManufacturerCa
from store import audit, enrolment
from store.audit import Actor
from store.database import Database
from store.enrolment import EnrolmentProfile, ManufacturerRecord
from workflows.attestation import policies
from workflows.attestation.policies import PolicyRequest, check_policy
from workflows.enrolment.clients import TlsClients
from workflows.enrolment.credentials import check_enrolment_profile, in_audit, with_policy

NONCE_LIFE = timedelta(hours=24)


@dataclass(eq=False, repr=False)
class Manufacturers:
    """CAs that issue factory certificates (IDevIDs); each counts once the possession of its key was proven."""

    _database: Database
    _clients: TlsClients
    _clock: Callable[[], datetime]

    def add(
        self,
        actor: Actor,
        name: str,
        certificate: str,
        profile: EnrolmentProfile,
        attestation: PolicyRequest | None = None,
    ) -> ManufacturerRecord:
        """Add a CA (PEM), which admits no device before ``prove``; returns it with the nonce to be signed.

        With ``attestation`` its devices have to show evidence. Raises ``ManufacturerInvalid``, ``ProfileRefused``,
        ``AttestationPolicyInvalid``, and ``Conflict`` if the CA exists already or TLS could take it for another one.
        """
        now = self._clock()
        authority = client_certificates.read_manufacturer_ca(certificate, now=now)
        if attestation is not None:
            check_policy(actor, attestation, now=now)
        record = _unproven(actor.tenant_id, name, authority, profile, now=now)
        try:
            with self._database.transaction() as tx:
                self._clients.check_identifier(tx, record.der)
                self._clients.check_distinct(tx, actor.tenant_id, record.der)
                check_enrolment_profile(tx, actor.tenant_id, profile)
                record = with_policy(tx, actor, record, attestation, now=now)
                enrolment.add_manufacturer(tx, record)
                told: dict[str, Any] = {"name": name, "fingerprint": record.fingerprint, **in_audit(profile)}
                told |= policies.in_audit(attestation, now=now)
                audit.record(tx, actor, "manufacturer:add", f"manufacturer:{record.id}", at=now, **told)
        except IntegrityError:
            raise _exists() from None
        return record

    def prove(
        self, actor: Actor, manufacturer_id: str, *, certificate: str | None = None, signature: str | None = None
    ) -> ManufacturerRecord:
        """Register a CA by a certificate (PEM) of it that names the nonce, or its signature (Base64) of the nonce.

        One that is registered already stays so. Raises ``NotFound``, ``ProofInvalid``, ``Conflict`` for a removed one,
        and as ``add`` does.
        """
        now = self._clock()
        with self._database.snapshot() as tx:
            record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id)
        if record.status is ManufacturerStatus.UNPROVEN:
            if record.nonce_expires_at <= now:
                raise ProofInvalid("The nonce has expired; remove the manufacturer and add it again.")
            if certificate is not None:
                client_certificates.check_proof_by_certificate(record.der, record.nonce, certificate)
            else:
                client_certificates.check_proof_by_signature(record.der, record.nonce, signature or "")
        with self._database.transaction() as tx:
            record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id, for_update=True)
            if record.status is ManufacturerStatus.REMOVED:
                raise Conflict("The manufacturer was removed; add it again.")
            if record.status is ManufacturerStatus.UNPROVEN:
                self._clients.check_distinct(tx, actor.tenant_id, record.der)
                enrolment.update_manufacturer(
                    tx, actor.tenant_id, manufacturer_id, status=ManufacturerStatus.REGISTERED, proven_at=now
                )
                by = "certificate" if certificate is not None else "signature"
                audit.record(tx, actor, "manufacturer:prove", f"manufacturer:{manufacturer_id}", at=now, by=by)
                record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id)
        self._clients.write_authorities()
        return record

    def update(
        self,
        actor: Actor,
        manufacturer_id: str,
        values: Mapping[str, Any],
        *,
        certificate: str | None = None,
        attestation: PolicyRequest | None = None,
    ) -> ManufacturerRecord:
        """Change the name or enrolment profile, for the devices that enrol from now on, by the names of their columns.

        A ``certificate`` (PEM) is a renewed one of the same CA and replaces the one that it had. With ``attestation``
        what was kept of evidence is appraised again, by a job. Raises ``NotFound``, ``Conflict`` for a removed one and
        for another CA's certificate, ``ManufacturerInvalid``, ``ProfileRefused``, ``AttestationPolicyInvalid``.
        """
        now = self._clock()
        renewed = None if certificate is None else client_certificates.read_manufacturer_ca(certificate, now=now)
        if attestation is not None:
            check_policy(actor, attestation, now=now)
        try:
            with self._database.transaction() as tx:
                changed = self._update(tx, actor, manufacturer_id, values, renewed, attestation, now=now)
        except IntegrityError:
            raise _exists() from None
        if renewed is not None:
            self._clients.write_authorities()
        return changed

    def _update(
        self,
        tx: Connection,
        actor: Actor,
        manufacturer_id: str,
        values: Mapping[str, Any],
        renewed: ManufacturerCa | None,
        attestation: PolicyRequest | None,
        *,
        now: datetime,
    ) -> ManufacturerRecord:
        record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id, for_update=True)
        if record.status is ManufacturerStatus.REMOVED:
            raise Conflict("The manufacturer was removed; add it again.")
        policy_id = with_policy(tx, actor, record, attestation, now=now).profile.attestation_policy_id
        columns = {**values, "attestation_policy_id": policy_id}
        detail: dict[str, Any] = {}
        if renewed is not None:
            columns |= self._renewed(tx, record, renewed)
            detail |= {"fingerprint": renewed.fingerprint, "replaces": record.fingerprint}
        enrolment.update_manufacturer(tx, actor.tenant_id, manufacturer_id, **columns)
        changed = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id)
        check_enrolment_profile(tx, actor.tenant_id, changed.profile)
        detail |= in_audit(changed.profile) if "certificate_profile" in values else {}
        detail |= policies.in_audit(attestation, now=now)
        beside = {"attestation": attestation, "certificate": renewed}
        changes = sorted([*values, *(name for name, value in beside.items() if value is not None)])
        audit.record(tx, actor, "manufacturer:update", f"manufacturer:{record.id}", at=now, changed=changes, **detail)
        return changed

    def _renewed(self, tx: Connection, record: ManufacturerRecord, renewed: ManufacturerCa) -> dict[str, Any]:
        """Return the columns of a renewed certificate; its key is the one whose possession was proven."""
        problem = client_certificates.renewal_problem(renewed.der, record.der)
        if problem is not None:
            raise Conflict(
                f"This is not a renewed certificate of the manufacturer's CA: {problem}. Add that CA as another"
                " manufacturer."
            )
        self._clients.check_identifier(tx, renewed.der)
        self._clients.check_distinct(tx, record.tenant_id, renewed.der)
        return {"der": renewed.der, "fingerprint": renewed.fingerprint, "not_after": renewed.not_after}

    def remove(self, actor: Actor, manufacturer_id: str) -> ManufacturerRecord:
        """Remove a CA: it admits no device any more; those that have enrolled keep working. Raises ``NotFound``."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id, for_update=True)
            if record.status is not ManufacturerStatus.REMOVED:
                enrolment.update_manufacturer(
                    tx, actor.tenant_id, manufacturer_id, status=ManufacturerStatus.REMOVED, removed_at=now
                )
                audit.record(tx, actor, "manufacturer:remove", f"manufacturer:{manufacturer_id}", at=now)
                record = enrolment.get_manufacturer(tx, actor.tenant_id, manufacturer_id)
        self._clients.write_authorities()
        return record

    def manufacturers(self, tenant_id: str) -> Sequence[ManufacturerRecord]:
        """Return every manufacturer, newest first."""
        with self._database.snapshot() as tx:
            return enrolment.list_manufacturers(tx, tenant_id)

    def manufacturer(self, tenant_id: str, manufacturer_id: str) -> ManufacturerRecord:
        """Return one manufacturer; raises ``NotFound``."""
        with self._database.snapshot() as tx:
            return enrolment.get_manufacturer(tx, tenant_id, manufacturer_id)


def _exists() -> Conflict:
    return Conflict("This CA exists already; see GET /manufacturers, and remove it to add it again.")


def _unproven(
    tenant_id: str, name: str, authority: ManufacturerCa, profile: EnrolmentProfile, *, now: datetime
) -> ManufacturerRecord:
    return ManufacturerRecord(
        id=secrets.token_hex(8),
        tenant_id=tenant_id,
        name=name,
        der=authority.der,
        fingerprint=authority.fingerprint,
        not_after=authority.not_after,
        status=ManufacturerStatus.UNPROVEN,
        nonce=secrets.token_hex(32),
        nonce_expires_at=now + NONCE_LIFE,
        created_at=now,
        proven_at=None,
        removed_at=None,
        profile=profile,
    )
