"""The portal's CAs as the database knows them, with the keys that sign."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy.engine import Connection

import ca
from core.errors import CaKeyUnavailable, IssuerUnusable, PortalError
from core.states import IssuerKind, IssuerStatus
from pki.algorithms import PrivateKey
from pki.issuers import Issuer
from pki.keys.stores import KeyStores
from pki.outer_chain import decode_above, spki
from store import issuers as store_issuers
from store.database import Database
from store.issuers import IssuerRecord
from store.scope import ALL_TENANTS
from store.tables import DEFAULT_TENANT

log = logging.getLogger("portal.authority")

SECONDS_BETWEEN_LOOKS = 1.0
MAX_REMEMBERED = 1 << 15  # certificates in PEM


@dataclass(frozen=True, slots=True)
class RecordedIssuer:
    """An issuer with its row's id, its tenant and its certificate, DER; a ``retired`` one issues no more certificates.

    A retired root has no CA below it that is trusted, and is not trusted itself.
    """

    id: int
    tenant_id: str
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
class TenantIssuers:
    """The CAs of one tenant: ``issuing`` signs the certificates of its devices.

    ``trusted`` and ``ca_pem`` are what its devices are to trust: its own issuing CAs, those above them, and the roots
    by which they verify the portal and the broker.
    """

    issuing: RecordedIssuer
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


@dataclass(frozen=True, slots=True)
class Issuers:
    """All issuers of all tenants at one moment, with the retired ones, whose CRLs are still published.

    ``root`` is the installation's own, ``servers`` the CA that signs the certificates of portal and broker, one of the
    first tenant. ``broker_ca`` is all that the broker trusts, PEM; ``tenants`` are as in ``broker.crl.Trust``.
    """

    root: RecordedIssuer
    servers: RecordedIssuer
    issuers: tuple[RecordedIssuer, ...]
    by_id: Mapping[int, RecordedIssuer]
    by_url_name: Mapping[str, RecordedIssuer]
    broker_ca: bytes
    tenants: Mapping[str, str]
    _records: Mapping[str, Sequence[IssuerRecord]]  # by tenant
    _issuing: Mapping[str, RecordedIssuer]  # by tenant
    _roots: Mapping[x509.Name, RecordedIssuer]
    _with_crl: tuple[RecordedIssuer, ...]
    _of: dict[str, TenantIssuers] = field(default_factory=dict)

    def issuing_of(self, tenant_id: str) -> RecordedIssuer:
        """Return the CA that signs the certificates of a tenant's devices; raises ``IssuerUnusable`` without one."""
        if tenant_id not in self._issuing:
            raise IssuerUnusable(
                f"The tenant {tenant_id} has no CA that issues certificates yet; ask an operator of the role system."
            )
        return self._issuing[tenant_id]

    def has_issuing(self, tenant_id: str) -> bool:
        """Return whether a tenant has a CA that issues certificates."""
        return tenant_id in self._issuing

    def of(self, tenant_id: str) -> TenantIssuers:
        """Return the CAs of a tenant; raises ``IssuerUnusable`` if none issues."""
        if tenant_id not in self._of:
            issuing, trusted = self.issuing_of(tenant_id), trusted_certificates(self._records[tenant_id])
            if tenant_id != DEFAULT_TENANT:
                trusted = tuple(dict.fromkeys((*trusted, *self.of(DEFAULT_TENANT).anchors)))
            self._of[tenant_id] = TenantIssuers(issuing, trusted, ca.chain_pem(*trusted))
        return self._of[tenant_id]

    def own_root(self, recorded: RecordedIssuer) -> RecordedIssuer | None:
        """Return the root that the portal has above an issuing CA, ``None`` if somebody else's is."""
        return None if recorded.issuer.above else self._roots[recorded.issuer.certificate.issuer]

    @property
    def https_fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the root by which clients verify the certificate that the portal has made."""
        return hashlib.sha256(self.anchor(self.servers).public_bytes(Encoding.DER)).hexdigest()

    def anchor(self, recorded: RecordedIssuer) -> x509.Certificate:
        """Return the certificate of the root above an issuing CA."""
        root = self.own_root(recorded)
        return recorded.issuer.above[-1] if root is None else root.issuer.certificate

    def is_trusted_by_others(self, tenant_id: str) -> bool:
        """Return whether other tenants trust what a tenant's CA signs, since they trust the first one's roots.

        The first tenant itself, which runs the installation, does not count. Raises ``IssuerUnusable``.
        """
        return (
            tenant_id != DEFAULT_TENANT and self.anchor(self.issuing_of(tenant_id)) in self.of(DEFAULT_TENANT).anchors
        )

    def with_crl(self) -> tuple[RecordedIssuer, ...]:
        """Return the issuers whose CRLs the broker needs: those of devices' certificates that are still trusted."""
        return self._with_crl

    def broker_ca_without(self, left_out: Set[int]) -> bytes:
        """Return what the broker is to trust, PEM, but for some issuing CAs of further tenants, by their rows."""
        records = [record for own in self._records.values() for record in own if record.id not in left_out]
        active = [one for one in records if one.kind == IssuerKind.ISSUING and one.status == IssuerStatus.ACTIVE]
        having = {one.tenant_id for one in active} | {DEFAULT_TENANT}
        return _trusted_pem([one for one in records if one.tenant_id in having])

    def tenants_with_older(self) -> list[str]:
        """Return the tenants that have a CA which issues no more, and is trusted."""
        having = [one for one in self._with_crl if self.has_issuing(one.tenant_id)]
        return sorted({one.tenant_id for one in having if one.id < self.issuing_of(one.tenant_id).id})

    def of_tenant(self, tenant_id: str) -> tuple[RecordedIssuer, ...]:
        """Return the CAs of a tenant, with the retired ones."""
        return tuple(self.by_id[record.id] for record in self._records.get(tenant_id, ()))


class Authority:
    """The current issuers; a change made by another process is seen within a second.

    Read it at the moment of use, and only once if two uses must agree.
    """

    def __init__(self, database: Database, keys: KeyStores) -> None:
        """Load the issuers from a database that has them; raises ``CaKeyUnavailable``.

        The keys of the first tenant are opened at once, those of others when they first sign.
        """
        self._database = database
        self._keys = keys
        self._lock = threading.Lock()
        with database.snapshot(sees=ALL_TENANTS) as tx:
            self._version = store_issuers.issuers_version(tx)
            self._marks = store_issuers.issuer_marks(tx)
            self._records = {record.id: record for record in store_issuers.list_issuers(tx, retired=True)}
        self._current = self._load(tuple(self._records.values()), {})
        self._looked_at = time.monotonic()

    @property
    def current(self) -> Issuers:
        """Return the issuers, at most a second old, or older if the database or a new key cannot be read."""
        if time.monotonic() - self._looked_at >= SECONDS_BETWEEN_LOOKS and self._lock.acquire(blocking=False):
            try:
                self._looked_at = time.monotonic()
                with self._database.snapshot(sees=ALL_TENANTS) as tx:
                    self._refresh(tx)
            except PortalError as error:
                log.error("the issuers cannot be read; the known ones stay in use", extra={"problem": error.detail})
            finally:
                self._lock.release()
        return self._current

    def seen_by(self, tx: Connection) -> Issuers:
        """Return the issuers exactly as a transaction sees them, in the scope of all tenants.

        Raises ``CaKeyUnavailable`` if a key is missing.
        """
        with self._lock:
            return self._refresh(tx)

    def with_root_key(self, root: RecordedIssuer) -> RecordedIssuer | None:
        """Return a root with its key, ``None`` if that is kept elsewhere; it can be moved while the portal runs.

        Raises ``CaKeyUnavailable`` if it cannot be decrypted.
        """
        if not self._keys.exists(root.issuer.name):
            return None
        key = self._keys.load(root.issuer.name)
        return dataclasses.replace(root, issuer=dataclasses.replace(root.issuer, key=key))

    def missing_keys(self) -> list[RecordedIssuer]:
        """Return the CAs of all tenants of which no key is here, although they sign."""
        here = set(self._keys.names())
        return [one for one in self.current.with_crl() if one.issuer.name not in here]

    @property
    def first(self) -> TenantIssuers:
        """Return the CAs of the first tenant."""
        return self.current.of(DEFAULT_TENANT)

    def issuing_of(self, tenant_id: str) -> RecordedIssuer:
        """Return the CA that signs the certificates of a tenant's devices, at most a second old.

        Raises ``IssuerUnusable`` if it has none.
        """
        return self.of(tenant_id).issuing

    def of(self, tenant_id: str) -> TenantIssuers:
        """Return the CAs of a tenant, which may just have been added; raises ``IssuerUnusable`` if none issues."""
        try:
            return self.current.of(tenant_id)
        except IssuerUnusable:
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                return self.seen_by(tx).of(tenant_id)

    @property
    def root(self) -> RecordedIssuer:
        """Return the installation's own root, which may be retired."""
        return self.current.root

    @property
    def servers(self) -> RecordedIssuer:
        """Return the issuer that signs the certificates of portal and broker."""
        return self.current.servers

    @property
    def issuers(self) -> tuple[RecordedIssuer, ...]:
        """Return all issuers of all tenants, with the retired ones."""
        return self.current.issuers

    def with_crl(self) -> tuple[RecordedIssuer, ...]:
        """Return the issuers whose CRLs the broker needs."""
        return self.current.with_crl()

    def _refresh(self, tx: Connection) -> Issuers:
        version = store_issuers.issuers_version(tx)
        if version != self._version:
            marks = store_issuers.issuer_marks(tx)
            if marks != self._marks:
                changed = [row for row, mark in marks.items() if self._marks.get(row) != mark]
                read = {record.id: record for record in store_issuers.read_issuers(tx, changed)}
                records = {row: read.get(row) or self._records[row] for row in marks}
                self._current = self._load(tuple(records.values()), self._current.by_id)
                self._marks, self._records = marks, records
                issuing = self._current.issuing_of(DEFAULT_TENANT).issuer.name
                log.info("the issuers have changed", extra={"issuing": issuing})
            self._version = version
        return self._current

    def _load(self, records: Sequence[IssuerRecord], known: Mapping[int, RecordedIssuer]) -> Issuers:
        loaded = tuple(self._recorded(record, known.get(record.id)) for record in records)
        by_id = {recorded.id: recorded for recorded in loaded}
        by_tenant: dict[str, list[IssuerRecord]] = {}
        for record in records:
            by_tenant.setdefault(record.tenant_id, []).append(record)
        issuing = {tenant_id: by_id[found.id] for tenant_id, own in by_tenant.items() if (found := _issuing_one(own))}
        if DEFAULT_TENANT not in issuing:
            raise CaKeyUnavailable("The database names no CA that issues certificates; restore it from a backup.")
        roots = [recorded for recorded in loaded if recorded.kind == IssuerKind.ROOT]
        serving = _serving_one(by_tenant[DEFAULT_TENANT])
        return Issuers(
            root=next(root for root in roots if root.tenant_id == DEFAULT_TENANT),
            servers=issuing[DEFAULT_TENANT] if serving is None else by_id[serving.id],
            issuers=loaded,
            by_id=by_id,
            by_url_name={recorded.issuer.url_name: recorded for recorded in loaded},
            broker_ca=_trusted_pem(records),
            tenants={one.fingerprint: one.tenant_id for one in records if one.tenant_id != DEFAULT_TENANT},
            _records=by_tenant,
            _issuing=issuing,
            _roots={root.issuer.certificate.subject: root for root in roots},
            _with_crl=tuple(one for one in loaded if one.kind == IssuerKind.ISSUING and not one.retired),
        )

    def _recorded(self, record: IssuerRecord, known: RecordedIssuer | None) -> RecordedIssuer:
        retired = record.status == IssuerStatus.RETIRED
        if known is not None and known.der == record.der:
            return known if known.retired == retired else dataclasses.replace(known, retired=retired)
        certificate = x509.load_der_x509_certificate(record.der)
        key = self._key_of(record)
        if key is not None and not callable(key) and key.public_key() != certificate.public_key():
            raise CaKeyUnavailable(
                f"The key of {record.name} does not belong to its certificate; restore the right key file."
            )
        issuer = Issuer(record.name, certificate, key, decode_above(record.above), url_name(record))
        return RecordedIssuer(record.id, record.tenant_id, record.kind, record.der, issuer, retired)

    def _key_of(self, record: IssuerRecord) -> PrivateKey | Callable[[], PrivateKey] | None:
        """Return the key of an issuer; it may be missing if it is a root's, or that of a CA that has retired."""
        if record.tenant_id != DEFAULT_TENANT:
            return None if record.kind == IssuerKind.ROOT else self._key_when_needed(record.name)
        if record.kind == IssuerKind.ROOT:
            return self._keys.load(record.name) if self._keys.exists(record.name) else None
        try:
            return self._keys.load(record.name)
        except CaKeyUnavailable:
            if record.status == IssuerStatus.RETIRED:  # as after the loss of its token
                return None
            raise

    def _key_when_needed(self, name: str) -> Callable[[], PrivateKey]:
        """Return a function that opens a key once: that takes 0.1 s, and there may be a thousand."""

        @functools.cache
        def load() -> PrivateKey:
            try:
                return self._keys.load(name)
            except CaKeyUnavailable as error:
                raise IssuerUnusable(error.detail) from error

        return load


def _issuing_one(records: Sequence[IssuerRecord]) -> IssuerRecord | None:
    """Return the CA of a tenant that signs the certificates of its devices."""
    begun = [one for one in records if one.status == IssuerStatus.ACTIVE and one.issuing_since is not None]
    return begun[-1] if begun else None


def _serving_one(records: Sequence[IssuerRecord]) -> IssuerRecord | None:
    """Return the CA that was chosen to sign the certificates of portal and broker."""
    chosen = [
        (one.servers_since, one.id, one)
        for one in records
        if one.status == IssuerStatus.ACTIVE and one.kind == IssuerKind.ISSUING and one.servers_since is not None
    ]
    return max(chosen)[-1] if chosen else None


def url_name(record: IssuerRecord) -> str:
    """Return what identifies a CA in URLs: its name, or for a tenant's a hash of its key.

    The names of tenants could be guessed, and rows counted; a key nobody knows who has no certificate of the CA.
    """
    if record.tenant_id == DEFAULT_TENANT:
        return record.name
    return url_name_of_key(x509.load_der_x509_certificate(record.der))


def url_name_of_key(certificate: x509.Certificate) -> str:
    """Return the hash of a CA's key that URLs have for its name."""
    return hashlib.sha256(spki(certificate.public_key())).hexdigest()[:40]


def trusted_certificates(records: Sequence[IssuerRecord]) -> tuple[x509.Certificate, ...]:
    """Return what these rows have to trust: the active issuing CAs, the newest first, the CAs above them, own roots."""
    return tuple(x509.load_der_x509_certificate(der) for der in _trusted(records))


def _trusted_pem(records: Sequence[IssuerRecord]) -> bytes:
    """Return the same, PEM, of thousands of rows that have been read before."""
    return b"".join(_pem(der) for der in _trusted(records))


def _trusted(records: Sequence[IssuerRecord]) -> Iterable[bytes]:
    active = [record for record in records if record.status == IssuerStatus.ACTIVE]
    issuing = [record for record in reversed(active) if record.kind == IssuerKind.ISSUING]
    above = [der for record in issuing if record.above is not None for der in _split(record.above)]
    roots = [record.der for record in active if record.kind == IssuerKind.ROOT]
    return dict.fromkeys((*(record.der for record in issuing), *above, *roots))


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _split(above: bytes) -> tuple[bytes, ...]:
    return tuple(one.public_bytes(Encoding.DER) for one in decode_above(above))
