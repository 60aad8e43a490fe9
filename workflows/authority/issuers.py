"""The portal's CAs as the database knows them, with the keys that sign."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

import ca
from config import Settings
from core.errors import CaKeyUnavailable, PortalError
from core.states import IssuerKind, IssuerStatus
from pki.algorithms import KeyType, PrivateKey
from pki.issuers import Issuer
from pki.keys.contract import CaKeys
from pki.outer_chain import decode_above
from store import issuers as store_issuers
from store.database import Database
from store.issuers import IssuerRecord
from store.tables import DEFAULT_TENANT
from workflows.authority.crls import RevokedEntries, next_crl

log = logging.getLogger("portal.authority")

ROOT = "root"
FIRST_ISSUING = "issuing-1"
SECONDS_BETWEEN_LOOKS = 1.0
# The root's key is meant to be kept elsewhere, so its CRL, which lists issuing CAs only, is valid for long.
ROOT_CRL_DAYS = 365


@dataclass(frozen=True, slots=True)
class RecordedIssuer:
    """An issuer with its row's id and its certificate, DER; a ``retired`` one issues no certificates any more.

    A retired root has no CA below it that is trusted, and is not trusted itself.
    """

    id: int
    kind: IssuerKind
    der: bytes
    issuer: Issuer
    retired: bool = False
    tenant_id: str = DEFAULT_TENANT

    def chain_pem(self, certificate_pem: str) -> str:
        """Return a certificate that it signed, with those of the CAs above it but the root's: what a TLS client sends.

        RFC 8446 section 4.4.2.
        """
        return certificate_pem + ca.chain_pem(self.issuer.certificate, *self.issuer.above[:-1])


@dataclass(frozen=True, slots=True)
class Issuers:
    """All issuers at one moment, with the retired ones, whose CRLs are still published.

    ``root`` is the portal's own, ``issuing`` the one that signs new certificates, ``servers`` the one that signs those
    of portal and broker, ``trusted`` and ``ca_pem`` what clients are to trust. ``tenants`` are as in
    ``broker.crl.Trust``.
    """

    root: RecordedIssuer
    issuing: RecordedIssuer
    servers: RecordedIssuer
    issuers: tuple[RecordedIssuer, ...]
    trusted: tuple[x509.Certificate, ...]
    ca_pem: str
    tenants: Mapping[str, str] = field(default_factory=dict)

    @property
    def anchors(self) -> tuple[x509.Certificate, ...]:
        """Return the roots that clients are to trust: the portal's own, a company's, or for a time both."""
        return tuple(one for one in self.trusted if one.subject == one.issuer)

    @property
    def trusted_der(self) -> list[bytes]:
        """Return what clients are to trust, each certificate in DER."""
        return [one.public_bytes(Encoding.DER) for one in self.trusted]

    def anchor(self, recorded: RecordedIssuer) -> x509.Certificate:
        """Return the root above an issuing CA."""
        return recorded.issuer.above[-1] if recorded.issuer.above else self.root.issuer.certificate

    def with_crl(self) -> tuple[RecordedIssuer, ...]:
        """Return the issuers whose CRLs the broker needs: those of devices' certificates that are still trusted."""
        return tuple(
            recorded for recorded in self.issuers if recorded.kind == IssuerKind.ISSUING and not recorded.retired
        )


class Authority:
    """The current issuers; a change made by another process is seen within a second.

    Read it at the moment of use, and only once if two uses must agree.
    """

    def __init__(self, database: Database, keys: CaKeys) -> None:
        """Load the issuers from a database that has them; raises ``CaKeyUnavailable``."""
        self._database = database
        self._keys = keys
        self._lock = threading.Lock()
        with database.snapshot() as tx:
            self._seen = tuple(store_issuers.list_issuers(tx, retired=True))
        self._current = self._load(self._seen, None)
        self._looked_at = time.monotonic()

    @property
    def current(self) -> Issuers:
        """Return the issuers, at most a second old, or older if the database or a new key cannot be read."""
        if time.monotonic() - self._looked_at >= SECONDS_BETWEEN_LOOKS and self._lock.acquire(blocking=False):
            try:
                self._looked_at = time.monotonic()
                with self._database.snapshot() as tx:
                    self._refresh(tx)
            except PortalError as error:
                log.error("the issuers cannot be read; the known ones stay in use", extra={"problem": error.detail})
            finally:
                self._lock.release()
        return self._current

    def seen_by(self, tx: Connection) -> Issuers:
        """Return the issuers exactly as a transaction sees them; raises ``CaKeyUnavailable`` if a key is missing."""
        with self._lock:
            return self._refresh(tx)

    def root_with_key(self) -> RecordedIssuer | None:
        """Return the root with its key, ``None`` if that is kept elsewhere; it can be moved while the portal runs.

        Raises ``CaKeyUnavailable`` if it cannot be decrypted.
        """
        root = self.current.root
        if not self._keys.exists(ROOT):
            return None
        issuer = Issuer(ROOT, root.issuer.certificate, self._keys.load(ROOT))
        return dataclasses.replace(root, issuer=issuer)

    @property
    def root(self) -> RecordedIssuer:
        """Return the portal's own root, which may be retired."""
        return self.current.root

    @property
    def issuing(self) -> RecordedIssuer:
        """Return the issuer that signs new certificates."""
        return self.current.issuing

    @property
    def servers(self) -> RecordedIssuer:
        """Return the issuer that signs the certificates of portal and broker."""
        return self.current.servers

    @property
    def issuers(self) -> tuple[RecordedIssuer, ...]:
        """Return all issuers, with the retired ones."""
        return self.current.issuers

    @property
    def ca_pem(self) -> str:
        """Return what clients are to trust: issuing CAs and the CAs above them, PEM."""
        return self.current.ca_pem

    def with_crl(self) -> tuple[RecordedIssuer, ...]:
        """Return the issuers whose CRLs the broker needs."""
        return self.current.with_crl()

    def _refresh(self, tx: Connection) -> Issuers:
        records = tuple(store_issuers.list_issuers(tx, retired=True))
        if [_identity(record) for record in records] != [_identity(record) for record in self._seen]:
            self._current = self._load(records, self._current)
            log.info("the issuers have changed", extra={"issuing": self._current.issuing.issuer.name})
        self._seen = records
        return self._current

    def _load(self, records: Sequence[IssuerRecord], known: Issuers | None) -> Issuers:
        before = {} if known is None else {recorded.id: recorded for recorded in known.issuers}
        loaded = [self._recorded(record, before.get(record.id)) for record in records]
        root = next(recorded for recorded in loaded if recorded.kind == IssuerKind.ROOT)
        trusted = [recorded for recorded in loaded if recorded.kind == IssuerKind.ISSUING and not recorded.retired]
        begun = {record.id for record in records if record.issuing_since is not None}
        issuing = [recorded for recorded in trusted if recorded.id in begun]
        if not issuing:
            raise CaKeyUnavailable("The database names no CA that issues certificates; restore it from a backup.")
        since = {record.id: record.servers_since for record in records if record.servers_since is not None}
        serving = sorted((one for one in trusted if one.id in since), key=lambda one: since[one.id])
        certificates = trusted_certificates(records)
        return Issuers(
            root=root,
            issuing=issuing[-1],
            servers=serving[-1] if serving else issuing[-1],
            issuers=tuple(loaded),
            trusted=certificates,
            ca_pem=ca.chain_pem(*certificates),
            tenants={one.fingerprint: one.tenant_id for one in records if one.tenant_id != DEFAULT_TENANT},
        )

    def _recorded(self, record: IssuerRecord, known: RecordedIssuer | None) -> RecordedIssuer:
        retired = record.status == IssuerStatus.RETIRED
        if known is not None and known.der == record.der:
            return dataclasses.replace(known, retired=retired)
        certificate = x509.load_der_x509_certificate(record.der)
        key = self._key_of(record)
        if key is not None and key.public_key() != certificate.public_key():
            raise CaKeyUnavailable(
                f"The key of {record.name} does not belong to its certificate; restore the right key file."
            )
        issuer = Issuer(record.name, certificate, key, decode_above(record.above))
        return RecordedIssuer(record.id, record.kind, record.der, issuer, retired, record.tenant_id)

    def _key_of(self, record: IssuerRecord) -> PrivateKey | None:
        """Return the key of an issuer; it may be missing if it is the root's, or that of a CA that has retired."""
        if record.kind == IssuerKind.ROOT:
            return self._keys.load(record.name) if self._keys.exists(record.name) else None
        try:
            return self._keys.load(record.name)
        except CaKeyUnavailable:
            if record.status == IssuerStatus.RETIRED:  # as after the loss of its token
                return None
            raise


def _identity(record: IssuerRecord) -> tuple[object, ...]:
    return record.id, record.fingerprint, record.status, record.issuing_since, record.servers_since


def trusted_certificates(records: Sequence[IssuerRecord]) -> tuple[x509.Certificate, ...]:
    """Return what clients are to trust: the active issuing CAs, the newest first, the CAs above them, the own root."""
    active = [record for record in records if record.status == IssuerStatus.ACTIVE]
    issuing = [record for record in active if record.kind == IssuerKind.ISSUING]
    own = [x509.load_der_x509_certificate(record.der) for record in reversed(issuing)]
    above = [certificate for record in reversed(issuing) for certificate in decode_above(record.above)]
    roots = [x509.load_der_x509_certificate(record.der) for record in active if record.kind == IssuerKind.ROOT]
    return tuple(dict.fromkeys((*own, *above, *roots)))


def open_authority(database: Database, keys: CaKeys, settings: Settings, tenant_id: str, *, now: datetime) -> Authority:
    """Load the issuers; the first start creates root and issuing CA.

    Raises ``CaKeyUnavailable`` if an issuing key is missing or cannot be decrypted; the root's may be elsewhere.
    """
    with database.snapshot() as tx:
        there = bool(store_issuers.list_issuers(tx))
    if not there:
        _create(database, keys, settings, tenant_id, now)
    return Authority(database, keys)


def _create(database: Database, keys: CaKeys, settings: Settings, tenant_id: str, now: datetime) -> None:
    # A key file may exist already, if an earlier first start was cut off before its commit.
    root_key, issuing_key = (
        keys.load(name) if keys.exists(name) else keys.create(name, KeyType(kind))
        for name, kind in ((ROOT, settings.root_key_type), (FIRST_ISSUING, settings.issuing_key_type))
    )
    root = ca.create_root(root_key, common_name=f"{settings.ca_name} Root CA", now=now, days=settings.root_days)
    root_issuer = Issuer(ROOT, root.certificate, root_key)
    issuing = ca.create_issuing(
        root_issuer,
        issuing_key.public_key(),
        common_name=f"{settings.ca_name} Issuing CA 1",
        now=now,
        days=settings.issuing_days,
        pki_url=settings.pki_url,
    )
    with database.transaction() as tx:
        for name, kind, issued in ((ROOT, IssuerKind.ROOT, root), (FIRST_ISSUING, IssuerKind.ISSUING, issuing)):
            row_id = store_issuers.add_issuer(
                tx,
                tenant_id=tenant_id,
                name=name,
                kind=kind,
                der=issued.der,
                fingerprint=issued.fingerprint,
                not_after=issued.not_after,
                created_at=now,
                issuing_since=None if name == ROOT else now,
            )
            if name == ROOT:
                crl = next_crl(
                    tx, row_id, root_issuer, None, RevokedEntries(), days=ROOT_CRL_DAYS, generation=0, now=now
                )
                store_issuers.put_crl(tx, tenant_id, crl)
