"""The portal's CAs as the database knows them, with the keys that sign, and their next CRLs (RFC 5280 section 5)."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

import ca
from config import Settings
from core.errors import CaKeyUnavailable, PortalError
from core.states import IssuerKind, IssuerStatus
from pki.algorithms import KeyType
from pki.crl import sign_crl
from pki.issuers import CLOCK_SKEW, Issuer, Reason
from pki.keys.contract import CaKeys
from pki.outer_chain import decode_above
from store import issuers as store_issuers
from store.database import Database
from store.issuers import CrlHead, CrlRecord, IssuerRecord, RevokedCertificate

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

    def chain_pem(self, certificate_pem: str) -> str:
        """Return a certificate that it signed, with those of the CAs above it but the root's: what a TLS client sends.

        RFC 8446 section 4.4.2.
        """
        return certificate_pem + ca.chain_pem(self.issuer.certificate, *self.issuer.above[:-1])


@dataclass(frozen=True, slots=True)
class Issuers:
    """All issuers at one moment, with the retired ones, whose CRLs are still published.

    ``root`` is the portal's own, ``issuing`` the one that signs new certificates, ``servers`` the one that signs those
    of portal and broker, ``trusted`` and ``ca_pem`` what clients are to trust.
    """

    root: RecordedIssuer
    issuing: RecordedIssuer
    servers: RecordedIssuer
    issuers: tuple[RecordedIssuer, ...]
    trusted: tuple[x509.Certificate, ...]
    ca_pem: str

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
        )

    def _recorded(self, record: IssuerRecord, known: RecordedIssuer | None) -> RecordedIssuer:
        retired = record.status == IssuerStatus.RETIRED
        if known is not None and known.der == record.der:
            return dataclasses.replace(known, retired=retired)
        certificate = x509.load_der_x509_certificate(record.der)
        needed = record.kind == IssuerKind.ISSUING and not retired
        key = self._keys.load(record.name) if needed or self._keys.exists(record.name) else None
        if key is not None and key.public_key() != certificate.public_key():
            raise CaKeyUnavailable(
                f"The key of {record.name} does not belong to its certificate; restore the right key file."
            )
        issuer = Issuer(record.name, certificate, key, decode_above(record.above))
        return RecordedIssuer(record.id, record.kind, record.der, issuer, retired)


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


# --- Certificate revocation lists ---------------------------------------------------------------------------------


class RevokedEntries:
    """The encoded CRL entries of certificates revoked for good, kept from one CRL to the next.

    What is revoked stays so, with its date and reason, until it expires: an entry is read and encoded once, and what
    is known here is never wrong, only incomplete. The database's count tells whether it is complete. A process that
    comes to it late, or missed something, reads what it lacks.
    Those on hold can return with another date after a resumption: they are read each time.
    """

    def __init__(self) -> None:
        self._of: dict[int, _Known] = {}  # by issuer

    @property
    def are_unread(self) -> bool:
        """Return whether no issuer's entries have been read yet."""
        return not self._of

    def listed(
        self, tx: Connection, issuer_id: int, *, generation: int, now: datetime
    ) -> Sequence[x509.RevokedCertificate]:
        """Return the entries of the issuer's CRL: revoked or on hold, not expired at ``now`` (RFC 5280 section 3.3).

        ``generation`` is that of the state which the transaction sees.
        """
        known = self._of.setdefault(issuer_id, _Known({}, 0, now))
        if known.generation and known.at <= now:
            for row_id in store_issuers.revoked_ids(tx, issuer_id, after=known.at, until=now):
                known.encoded.pop(row_id, None)
            for entry in store_issuers.revoked_since(tx, issuer_id, known.generation, now=now):
                known.encoded[entry.id] = _encode(entry)
        if len(known.encoded) != store_issuers.count_revoked(tx, issuer_id, now=now) or known.at > now:
            known.complete(tx, issuer_id, now)
        known.generation, known.at = generation, now
        held = store_issuers.held_certificates(tx, issuer_id, now=now)
        return [*known.encoded.values(), *map(_encode, held)]


@dataclass(slots=True)
class _Known:
    """Entries of one issuer by the certificates' rows, as of a generation (0: of none yet) and a time."""

    encoded: dict[int, x509.RevokedCertificate]
    generation: int
    at: datetime

    def complete(self, tx: Connection, issuer_id: int, now: datetime) -> None:
        """Read the entries that are missing, and drop those that have expired."""
        wanted = set(store_issuers.revoked_ids(tx, issuer_id, after=now))
        for row_id in self.encoded.keys() - wanted:
            del self.encoded[row_id]
        for entry in store_issuers.revoked_certificates(tx, sorted(wanted - self.encoded.keys())):
            self.encoded[entry.id] = _encode(entry)


def _encode(entry: RevokedCertificate) -> x509.RevokedCertificate:
    return ca.revoke_certificate(entry.serial_number, entry.revoked_at - CLOCK_SKEW, Reason(entry.reason))


def crl_is_due(crl: CrlHead | None, *, changed_at: int, now: datetime) -> bool:
    """Return whether a new CRL is due: the first, after a change, at half its life, or if the clock was moved."""
    if crl is None or changed_at > crl.generation:
        return True
    half = crl.this_update + (crl.next_update - crl.this_update) / 2
    return not crl.this_update <= now < half


def next_crl(
    tx: Connection,
    issuer_id: int,
    issuer: Issuer,
    previous: CrlHead | None,
    entries: RevokedEntries,
    *,
    days: int,
    generation: int,
    now: datetime,
) -> CrlRecord:
    """Sign the issuer's next CRL from what the transaction sees, without expired certificates.

    thisUpdate is ``CLOCK_SKEW`` early, but rises with each CRL as long as the clock lets it. It is never in the future:
    a broker given a CRL that is not yet valid refuses every connection.
    """
    now = now.replace(microsecond=0)
    this_update = now - CLOCK_SKEW
    if previous is not None:
        this_update = min(max(this_update, previous.this_update + timedelta(seconds=1)), now)
    next_update = now + timedelta(days=days)
    number = 1 if previous is None else previous.number + 1
    listed = entries.listed(tx, issuer_id, generation=generation, now=now)
    der = sign_crl(issuer, listed, number=number, this_update=this_update, next_update=next_update)
    return CrlRecord(issuer_id, number, this_update, next_update, generation, der)
