"""The portal's issuers, as the database knows them, with the keys that sign."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from sqlalchemy.engine import Connection

import ca
import db_issuers
from ca_keys import CaKeys
from config import Settings
from db import Database
from db_issuers import CrlRecord
from errors import CaKeyUnavailable

ROOT = "root"
FIRST_ISSUING = "issuing-1"
# The root's key is meant to be moved away, so its CRL, which lists issuing CAs only, lives long.
ROOT_CRL_DAYS = 365
# Relying parties with slow clocks, and revocations that come faster than one a second, need room behind now.
CRL_BACKDATE = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class RecordedIssuer:
    """An issuer with its row's id and its certificate's DER."""

    id: int
    kind: str
    der: bytes
    issuer: ca.Issuer


@dataclass(frozen=True, slots=True)
class Authority:
    """All issuers; ``issuing`` is the one that signs new certificates, ``ca_pem`` what clients are to trust."""

    root: RecordedIssuer
    issuing: RecordedIssuer
    issuers: tuple[RecordedIssuer, ...]
    ca_pem: str

    def with_crl(self) -> tuple[RecordedIssuer, ...]:
        """The issuers whose CRLs the broker needs: those that certify devices."""
        return tuple(recorded for recorded in self.issuers if recorded.kind == "issuing")

    def chain_pem(self, certificate_pem: str) -> str:
        """A device's certificate followed by its issuer's: what a TLS client sends (RFC 8446 section 4.4.2)."""
        return certificate_pem + ca.chain_pem(self.issuing.issuer.certificate)


def open_authority(database: Database, keys: CaKeys, settings: Settings, tenant_id: str, *, now: datetime) -> Authority:
    """Load the issuers, making root and issuing CA at the first start.

    Raises ``CaKeyUnavailable`` where the issuing key is missing or does not open; the root's may be elsewhere.
    """
    with database.snapshot() as tx:
        records = db_issuers.list_issuers(tx)
    if not records:
        _create(database, keys, settings, tenant_id, now)
        with database.snapshot() as tx:
            records = db_issuers.list_issuers(tx)
    recorded: list[RecordedIssuer] = []
    for record in records:
        certificate = x509.load_der_x509_certificate(record.der)
        key = keys.load(record.name) if record.kind == "issuing" or keys.exists(record.name) else None
        if key is not None and key.public_key() != certificate.public_key():
            raise CaKeyUnavailable(
                f"The key of {record.name} does not belong to its certificate; restore the right key file."
            )
        recorded.append(RecordedIssuer(record.id, record.kind, record.der, ca.Issuer(record.name, certificate, key)))
    root = next(item for item in recorded if item.kind == "root")
    issuing = [item for item in recorded if item.kind == "issuing"]
    ca_pem = ca.chain_pem(*(item.issuer.certificate for item in (*reversed(issuing), root)))
    return Authority(root=root, issuing=issuing[-1], issuers=tuple(recorded), ca_pem=ca_pem)


def _create(database: Database, keys: CaKeys, settings: Settings, tenant_id: str, now: datetime) -> None:
    # A key file may be there already where an earlier first start was cut off before its commit.
    root_key = keys.load(ROOT) if keys.exists(ROOT) else keys.create(ROOT, ca.KeyType.EC_P384)
    issuing_key = (
        keys.load(FIRST_ISSUING) if keys.exists(FIRST_ISSUING) else keys.create(FIRST_ISSUING, ca.KeyType.EC_P256)
    )
    root = ca.create_root(root_key, common_name=f"{settings.ca_name} Root CA", now=now, days=settings.root_days)
    root_issuer = ca.Issuer(ROOT, root.certificate, root_key)
    issuing = ca.create_issuing(
        root_issuer,
        issuing_key.public_key(),
        common_name=f"{settings.ca_name} Issuing CA 1",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    with database.transaction() as tx:
        for name, kind, issued in ((ROOT, "root", root), (FIRST_ISSUING, "issuing", issuing)):
            row_id = db_issuers.add_issuer(
                tx,
                tenant_id=tenant_id,
                name=name,
                kind=kind,
                der=issued.der,
                fingerprint=issued.fingerprint,
                not_after=issued.not_after,
                created_at=now,
            )
            if name == ROOT:
                recorded = RecordedIssuer(row_id, kind, root.der, root_issuer)
                crl = next_crl(tx, recorded, None, days=ROOT_CRL_DAYS, generation=0, now=now)
                db_issuers.put_crl(tx, tenant_id, crl)


def crl_is_due(crl: CrlRecord | None, *, changed_at: int, now: datetime) -> bool:
    """Whether a new CRL is wanted: none yet, a change after its generation, half its life over, or the clock moved."""
    if crl is None or changed_at > crl.generation:
        return True
    half = crl.this_update + (crl.next_update - crl.this_update) / 2
    return not crl.this_update <= now < half


def next_crl(
    tx: Connection, recorded: RecordedIssuer, previous: CrlRecord | None, *, days: int, generation: int, now: datetime
) -> CrlRecord:
    """Sign the issuer's next CRL from what the transaction sees; expired certificates are left out.

    thisUpdate rises with each CRL as long as the clock lets it and is never in the future: a broker given one that
    is not yet valid refuses every connection.
    """
    now = now.replace(microsecond=0)
    this_update = now - CRL_BACKDATE
    if previous is not None:
        this_update = min(max(this_update, previous.this_update + timedelta(seconds=1)), now)
    next_update = now + timedelta(days=days)
    number = 1 if previous is None else previous.number + 1
    entries = (
        ca.revoke_certificate(entry.serial_number, entry.revoked_at, ca.Reason(entry.reason))
        for entry in db_issuers.revoked_certificates(tx, recorded.id, now=now)
    )
    der = ca.sign_crl(recorded.issuer, entries, number=number, this_update=this_update, next_update=next_update)
    return CrlRecord(recorded.id, number, this_update, next_update, generation, der)
