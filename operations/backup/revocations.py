"""Applies to a restored database everything that was revoked after the backup was made."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

import sqlalchemy as sa
from cryptography import x509
from sqlalchemy.engine import Connection

import db
from core.states import ON_CRL, CertificateStatus, DeviceStatus, ManufacturerStatus
from core.tenants import TenantStatus
from operations.backup.tenant_states import ended_since
from pki.algorithms import certificate_key_fingerprint
from pki.issuers import CLOCK_SKEW, Reason
from store import audit, devices, enrolment, keys, sessions, tenant_rows, tenants, webhooks
from store import issuers as store_issuers
from store.enrolment_tables import EnrolmentToken, Manufacturer
from store.issuers import IssuerRecord
from store.tables import DEFAULT_TENANT, AclEntry, Certificate, Device, DeviceKey, IssuerRow, Token, Webhook

T = TypeVar("T")
# The database being replaced: yields the rows of a table.
Tables = Callable[[str], Iterator[dict[str, Any]]]
_BATCH = 500
HOLD = Reason.CERTIFICATE_HOLD.value
_TOPICS_OF = (Device.id, Device.tenant_id, Device.name, Device.own_topics, Device.kind)
# For a valid certificate that the backup does not have, so that the portal could never revoke it later.
UNKNOWN_REASON = Reason.CESSATION_OF_OPERATION.value


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that was valid in the backup and was revoked again; ``what`` is such as ``device <id> (<name>)``.

    ``unknown`` is set for a certificate that the backup does not have.
    """

    what: str
    reason: str
    at: datetime
    unknown: bool = False


@dataclass(slots=True)
class _Known:
    """The devices of the replaced database: the revoked and suspended ones, and the others."""

    denied: dict[str, tuple[str, datetime, str]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class GuardRefusals:
    """What the guard's journal says at its end: identities, tenants, and certificates by issuer's hash and number."""

    denied: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    certificates: frozenset[tuple[str, str]] = frozenset()
    suspended: frozenset[str] = frozenset()  # tenants


class RevocationReplay:
    """Works in the transaction that restores a backup, of all tenants or of one.

    The rows of the replaced database are of that tenant alone, too.
    """

    def __init__(self, tx: Connection, *, generation: int, now: datetime, tenant_id: str | None = None) -> None:
        self._tx = tx
        self._generation = generation
        self._now = now
        own = store_issuers.list_issuers(tx, retired=True, tenant_id=tenant_id)
        self._issuers = {issuer.id: issuer for issuer in own}
        self._tenants = frozenset(tenants.tenant_ids(tx) if tenant_id is None else [tenant_id])
        self.kept: list[Kept] = []

    def keep(
        self, crls: Mapping[int, x509.CertificateRevocationList], replaced: Tables | None, refused: GuardRefusals
    ) -> None:
        """Revoke what ``crls`` (by the issuer's id), the replaced database and the guard's journal have as revoked.

        Certificates that the backup does not have stay on the CRL: those that are on it, and, if the replaced database
        could be read, those of devices registered after the backup.
        """
        known = _Known()
        for tenant_id in self._tenants:
            sessions.end_sessions_of_tenant(self._tx, tenant_id)  # one that was ended since would let somebody in
        self._ended_tenants(replaced, refused)
        if replaced is not None:
            known = self._devices(replaced)
            self._certificates(replaced, known)
            self._keys(replaced)
            self._tokens(replaced)
            self._enrolment_tokens(replaced)
            self._manufacturers(replaced)
            self._factory_keys(replaced, known)
            self._topics(replaced)
            self._webhooks(replaced)
        else:
            known.others |= refused.allowed
        for issuer_id, crl in crls.items():
            for entries in _batches(crl):
                self._crl_entries(self._issuers[issuer_id], entries, known)
        self._refused(refused, known)
        for issuer_id in self._issuers:
            store_issuers.touch_issuer(self._tx, issuer_id, generation=self._generation)

    def revoke_blocked(self, tenant_id: str) -> None:
        """Revoke the devices of a tenant whose keys are blocked in any, as of devices that a backup did not have."""
        blocked = sa.alias(DeviceKey.__table__)
        query = (
            sa.select(DeviceKey.key_fingerprint, Device.id, Device.name, blocked.c.compromised_at)
            .join(Device, Device.id == DeviceKey.device_id)
            .join(blocked, blocked.c.key_fingerprint == DeviceKey.key_fingerprint)
            .where(DeviceKey.tenant_id == tenant_id, DeviceKey.compromised_at.is_(None))
            .where(blocked.c.tenant_id != tenant_id, blocked.c.compromised_at.is_not(None))
        )
        for key, device_id, name, at in self._tx.execute(query).all():
            self._revoke_device(tenant_id, device_id, name, at, Reason.KEY_COMPROMISE.value)
            keys.block_keys(self._tx, tenant_id, device_id, [key], at=at)

    # --- From the replaced database

    def _ended_tenants(self, replaced: Tables | None, refused: GuardRefusals) -> None:
        """Serve no tenant that was suspended or removed since the backup; the job revokes what a removed one has."""
        here = [record for record in tenants.list_tenants(self._tx) if record.id in self._tenants]
        for record in list(ended_since(here, replaced, refused.suspended, now=self._now)):
            at, action = record.changed_at or self._now, "tenant:suspend"
            tenants.update_tenant(self._tx, dataclasses.replace(record, generation=self._generation))
            if record.status is TenantStatus.REMOVED:
                tenant_rows.end_access(self._tx, record.id, at=at)
                action = "tenant:remove"
            self._keep(record.id, f"tenant:{record.id}", action, f"tenant {record.id}, {record.status}", "", at)

    def _devices(self, replaced: Tables) -> _Known:
        known = _Known()
        for row in replaced("devices"):
            status = row["status"]
            if status == DeviceStatus.REVOKED:
                known.denied[row["id"]] = (status, row["revoked_at"], row["revocation_reason"])
            elif status == DeviceStatus.SUSPENDED:
                known.denied[row["id"]] = (status, row["updated_at"], HOLD)
            else:
                known.others.add(row["id"])
        for ids in _batches(known.denied):
            query = sa.select(Device.id, Device.tenant_id, Device.name, Device.status).where(Device.id.in_(ids))
            for device_id, tenant_id, name, status in self._tx.execute(query).all():
                wanted, at, reason = known.denied[device_id]
                if wanted == DeviceStatus.REVOKED and status != DeviceStatus.REVOKED:
                    self._revoke_device(tenant_id, device_id, name, at, reason)
                elif wanted == DeviceStatus.REVOKED:
                    self._change_reason(tenant_id, device_id, reason)
                elif wanted == DeviceStatus.SUSPENDED and status == DeviceStatus.ACTIVE:
                    self._suspend_device(tenant_id, device_id, name, at)
        return known

    def _certificates(self, replaced: Tables, known: _Known) -> None:
        by_fingerprint = {issuer.fingerprint: issuer.id for issuer in self._issuers.values()}
        ours = {row["id"]: by_fingerprint.get(row["fingerprint"]) for row in replaced("issuers")}
        living = (row for row in replaced("certificates") if row["not_after"] > self._now and ours[row["issuer_id"]])
        for rows in _batches(living):
            for row in rows:
                row["issuer_id"] = ours[row["issuer_id"]]
            here = self._here([row["serial_number"] for row in rows])
            for row in rows:
                found = here.get((row["issuer_id"], row["serial_number"]))
                if found is None:
                    self._carry_over(row)
                elif row["status"] in ON_CRL:
                    self._revoke(found, row["revoked_at"], row["revocation_reason"], known)

    def _carry_over(self, row: dict[str, Any]) -> None:
        """Copy a certificate that the backup does not have; a device's is put on the CRL."""
        values = {name: value for name, value in row.items() if name != "id"}
        if row["purpose"] in ("device", "lost"):
            revoked = row["status"] == CertificateStatus.REVOKED
            at, reason = (row["revoked_at"], row["revocation_reason"]) if revoked else (self._now, UNKNOWN_REASON)
            values |= {"purpose": "lost", "device_id": None, "status": CertificateStatus.REVOKED}
            values |= {"revoked_at": at, "revocation_reason": reason}
            owner = f" of device {row['device_id']}" if row["device_id"] else ""
            what = f"certificate {row['serial_number']}{owner}"
            target = f"certificate:{row['serial_number']}"
            self._keep(row["tenant_id"], target, "certificate:revoke", what, reason, at, unknown=True)
        self._tx.execute(sa.insert(Certificate), values)

    def _keys(self, replaced: Tables) -> None:
        """Block keys that were revoked as compromised, also of devices and tenants that the backup does not have."""
        compromised = (row for row in replaced("device_keys") if row["compromised_at"] is not None)
        for rows in _batches(compromised):
            for row in rows:
                # One that was compromised in any tenant is certified in none.
                owner = row["tenant_id"] if row["tenant_id"] in self._tenants else DEFAULT_TENANT
                keys.block_keys(self._tx, owner, None, [row["key_fingerprint"]], at=row["compromised_at"])

    def _tokens(self, replaced: Tables) -> None:
        revoked = ((row["id"], row["revoked_at"]) for row in replaced("tokens") if row["revoked_at"] is not None)
        for token_id, at in revoked:
            ours = (Token.id == token_id, Token.revoked_at.is_(None))
            row = self._tx.execute(
                sa.update(Token).where(*ours).values(revoked_at=at).returning(Token.tenant_id, Token.name)
            ).one_or_none()
            if row is not None:
                self._keep(row.tenant_id, f"token:{token_id}", "token:revoke", f"operator token {row.name}", "", at)

    def _enrolment_tokens(self, replaced: Tables) -> None:
        # Uses since the backup are counted too: a forgotten use would admit one more device.
        for row in replaced("enrolment_tokens"):
            ours = (EnrolmentToken.id == row["id"], EnrolmentToken.uses < row["uses"])
            self._tx.execute(sa.update(EnrolmentToken).where(*ours).values(uses=row["uses"]))
            if row["revoked_at"] is None:
                continue
            valid = (EnrolmentToken.id == row["id"], EnrolmentToken.revoked_at.is_(None))
            done = self._tx.execute(sa.update(EnrolmentToken).where(*valid).values(revoked_at=row["revoked_at"]))
            if done.rowcount:
                target, what = f"enrolment_token:{row['id']}", f"enrolment token {row['name']}"
                self._keep(row["tenant_id"], target, "enrolment_token:revoke", what, "", row["revoked_at"])

    def _manufacturers(self, replaced: Tables) -> None:
        for row in replaced("manufacturers"):
            if row["status"] != ManufacturerStatus.REMOVED:
                continue
            ours = (Manufacturer.id == row["id"], Manufacturer.status != ManufacturerStatus.REMOVED)
            values = {"status": ManufacturerStatus.REMOVED, "removed_at": row["removed_at"]}
            if self._tx.execute(sa.update(Manufacturer).where(*ours).values(values)).rowcount:
                target, what = f"manufacturer:{row['id']}", f"manufacturer {row['name']}"
                self._keep(row["tenant_id"], target, "manufacturer:remove", what, "", row["removed_at"])

    def _factory_keys(self, replaced: Tables, known: _Known) -> None:
        """Block the factory keys of revoked devices that the backup does not have: they would be new devices."""
        revoked = {device_id for device_id, (status, *_) in known.denied.items() if status == DeviceStatus.REVOKED}
        theirs = set()
        for row in self._of_tenants(replaced("enrolments")):
            if row["device_id"] in revoked and row["factory_key"] is not None:
                theirs.add(row["id"])
                enrolment.add_factory_key(self._tx, row["tenant_id"], row["factory_key"], None)
        for row in self._of_tenants(replaced("factory_keys")):
            if row["enrolment_id"] is None or row["enrolment_id"] in theirs:
                enrolment.add_factory_key(self._tx, row["tenant_id"], row["factory_key"], None)

    def _of_tenants(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Return the rows without those of tenants that the backup does not have."""
        return (row for row in rows if row["tenant_id"] in self._tenants)

    def _topics(self, replaced: Tables) -> None:
        """Give a device the topics that it has in the replaced database if it has lost any of the backup's there."""
        own: dict[str, list[tuple[str, str]]] = {}
        for row in replaced("acl_entries"):  # in the order of their positions
            own.setdefault(row["device_id"], []).append((row["filter"], row["access"]))
        changed = {row["id"]: row["updated_at"] for row in replaced("devices") if row["updated_at"] is not None}
        with_own = {row["id"] for row in replaced("devices") if row["own_topics"]}
        here = set(self._tx.execute(sa.select(Device.id).where(Device.own_topics)).scalars())
        for ids in _batches((here | with_own) & changed.keys()):
            for device in self._tx.execute(sa.select(*_TOPICS_OF).where(Device.id.in_(ids))).all():
                before = self._topics_of(device.id) if device.own_topics else None
                since = own.get(device.id, []) if device.id in with_own else None
                if before == since or (before is not None and since is not None and set(before) <= set(since)):
                    continue
                db.replace_topics(
                    self._tx, device.tenant_id, device.id, since, generation=self._generation, narrowed=True
                )
                of, what = f"{device.kind}:{device.id}", f"topics of {device.kind} {device.id} ({device.name})"
                self._keep(device.tenant_id, of, f"{device.kind}:update", what, "", changed[device.id])

    def _topics_of(self, device_id: str) -> list[tuple[str, str]]:
        query = sa.select(AclEntry.filter, AclEntry.access).where(AclEntry.device_id == device_id)
        return [(row.filter, row.access) for row in self._tx.execute(query.order_by(AclEntry.position))]

    def _webhooks(self, replaced: Tables) -> None:
        """Delete the webhooks that were deleted since, by the audit record: that one is missing there may be a loss."""
        deleted = {row["object"]: row["at"] for row in replaced("audit_entries") if row["action"] == "webhook:delete"}
        query = sa.select(Webhook.id, Webhook.tenant_id, Webhook.name)
        for webhook_id, tenant_id, name in self._tx.execute(query).all():
            target = f"webhook:{webhook_id}"
            if target in deleted:
                webhooks.remove_webhook(self._tx, tenant_id, webhook_id)
                self._keep(tenant_id, target, "webhook:delete", f"webhook {name}", "", deleted[target])

    # --- From the broker's CRLs

    def _crl_entries(self, issuer: IssuerRecord, entries: Sequence[x509.RevokedCertificate], known: _Known) -> None:
        here = self._here([f"{entry.serial_number:x}" for entry in entries])
        for entry in entries:
            serial_number, reason = f"{entry.serial_number:x}", _reason(entry)
            at = min(entry.revocation_date_utc + CLOCK_SKEW, self._now)
            found = here.get((issuer.id, serial_number))
            if found is not None:
                self._revoke(found, at, reason, known)
            elif issuer.not_after > self._now:
                self._add_lost(issuer, serial_number, at, reason)

    def _add_lost(self, issuer: IssuerRecord, serial_number: str, at: datetime, reason: str) -> None:
        # Only the serial number is known. It expires with its issuer at the latest.
        certificate = x509.load_der_x509_certificate(issuer.der)
        tenant_id = self._tx.execute(sa.select(IssuerRow.tenant_id).where(IssuerRow.id == issuer.id)).scalar_one()
        db.add_certificate(
            self._tx,
            tenant_id=tenant_id,
            issuer_id=issuer.id,
            purpose="lost",
            serial_number=serial_number,
            fingerprint=sha256(f"lost {issuer.fingerprint} {serial_number}".encode()).hexdigest(),
            der=b"",
            not_before=certificate.not_valid_before_utc,
            not_after=issuer.not_after,
            issued_at=certificate.not_valid_before_utc,
            revoked_at=at,
            reason=reason,
        )
        target, what = f"certificate:{serial_number}", f"certificate {serial_number}"
        self._keep(tenant_id, target, "certificate:revoke", what, reason, at, unknown=True)

    # --- From the guard's journal

    def _refused(self, refused: GuardRefusals, known: _Known) -> None:
        """Revoke and suspend what the guard refuses and no CRL here has yet; why is not known."""
        names = {issuer.id: x509.load_der_x509_certificate(issuer.der).subject for issuer in self._issuers.values()}
        by_name = {sha256(name.public_bytes()).hexdigest(): self._issuers[number] for number, name in names.items()}
        for certificates in _batches(sorted(refused.certificates)):
            here = self._here([serial_number for _, serial_number in certificates])
            for issuer_hash, serial_number in certificates:
                issuer = by_name.get(issuer_hash)
                found = here.get((issuer.id, serial_number)) if issuer is not None else None
                if found is not None:
                    self._revoke(found, self._now, Reason.UNSPECIFIED.value, known)
                elif issuer is not None and issuer.not_after > self._now:
                    self._add_lost(issuer, serial_number, self._now, Reason.UNSPECIFIED.value)
        for ids in _batches(sorted(refused.denied - known.others)):
            query = sa.select(Device.id, Device.tenant_id, Device.name).where(Device.id.in_(ids))
            for device_id, tenant_id, name in self._tx.execute(query.where(Device.status == DeviceStatus.ACTIVE)).all():
                if tenant_id in self._tenants:
                    self._suspend_device(tenant_id, device_id, name, self._now)

    # --- Of both

    def _here(self, serial_numbers: Sequence[str]) -> dict[tuple[int, str], sa.Row[Any]]:
        query = (
            sa.select(
                Certificate.id, Certificate.issuer_id, Certificate.serial_number, Certificate.tenant_id,
                Certificate.device_id, Certificate.status, Certificate.der, Device.name,
                Device.status.label("device_status"),
            )
            .outerjoin_from(Certificate, Device, Device.id == Certificate.device_id)
            .where(Certificate.serial_number.in_(serial_numbers))
        )  # fmt: skip
        rows: list[Any] = list(self._tx.execute(query))
        return {(row.issuer_id, row.serial_number): row for row in rows}

    def _revoke(self, found: sa.Row[Any], at: datetime, reason: str, known: _Known) -> None:
        """Revoke a certificate of the backup, and its device unless the device is known to have a newer one."""
        if found.status == CertificateStatus.REVOKED or (found.status == CertificateStatus.HELD and reason == HOLD):
            return
        device_admitted = found.device_status not in (None, DeviceStatus.REVOKED)
        is_current = (
            found.status in (CertificateStatus.ACTIVE, CertificateStatus.HELD) and found.device_id not in known.others
        )
        if device_admitted and is_current and reason == HOLD:
            self._suspend_device(found.tenant_id, found.device_id, found.name, at)
        elif device_admitted and is_current and found.device_id not in known.denied:
            self._revoke_device(found.tenant_id, found.device_id, found.name, at, reason)
        settled = ON_CRL if reason == HOLD else (CertificateStatus.REVOKED,)
        values = {
            "status": CertificateStatus.REVOKED,
            "revoked_at": at,
            "revocation_reason": reason,
            "generation": self._generation,
        }
        done = self._tx.execute(
            sa.update(Certificate).where(Certificate.id == found.id, Certificate.status.not_in(settled)).values(values)
        )
        if reason == Reason.KEY_COMPROMISE and found.device_id:
            key = certificate_key_fingerprint(found.der)
            keys.block_keys(self._tx, found.tenant_id, found.device_id, [key], at=at)
        if done.rowcount:
            what = f"certificate {found.serial_number}" + (f" of device {found.device_id}" if found.device_id else "")
            self._keep(found.tenant_id, f"certificate:{found.serial_number}", "certificate:revoke", what, reason, at)

    def _revoke_device(self, tenant_id: str, device_id: str, name: str, at: datetime, reason: str) -> None:
        status = self._tx.execute(sa.select(Device.status).where(Device.id == device_id)).scalar_one()
        if status == DeviceStatus.REVOKED:
            return
        db.revoke_device(self._tx, tenant_id, device_id, revoked_at=at, reason=reason, generation=self._generation)
        kind = devices.kind_of(self._tx, tenant_id, device_id)
        what = f"{kind} {device_id} ({name})"
        self._keep(tenant_id, f"{kind}:{device_id}", f"{kind}:revoke", what, reason, at)

    def _change_reason(self, tenant_id: str, device_id: str, reason: str) -> None:
        """Give a device that the backup has revoked the worse reason that it got since."""
        device = db.get_device(self._tx, tenant_id, device_id, kind=None)
        if Reason(reason).is_worse_than(device.revocation_reason or Reason.UNSPECIFIED):
            db.change_reason(self._tx, device, reason, at=self._now, generation=self._generation)
            what = f"{device.kind} {device_id} ({device.name})"
            target, action = device.name_in_audit, f"{device.kind}:revoke"
            self._keep(tenant_id, target, action, what, reason, device.revoked_at or self._now)

    def _suspend_device(self, tenant_id: str, device_id: str, name: str, at: datetime) -> None:
        devices.suspend_device(self._tx, tenant_id, device_id, suspended_at=at, generation=self._generation)
        self._keep(tenant_id, f"device:{device_id}", "device:suspend", f"device {device_id} ({name})", HOLD, at)

    def _keep(
        self, tenant_id: str, target: str, action: str, what: str, reason: str, at: datetime, *, unknown: bool = False
    ) -> None:
        self.kept.append(Kept(what, reason, at, unknown))
        detail = {"reason": reason} if reason else {}
        detail |= {"because": "the backup that was restored did not have it", "revoked_at": at.isoformat()}
        audit.record(self._tx, audit.system_actor(tenant_id), action, target, at=self._now, **detail)


def _reason(entry: x509.RevokedCertificate) -> str:
    try:
        return Reason(entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.name).value
    except (x509.ExtensionNotFound, ValueError):
        return Reason.UNSPECIFIED.value


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch
