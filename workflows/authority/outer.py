"""Issuing CAs with keys here whose certificates somebody else signs: the request, and the chain that answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

import ca
from config import Settings
from core.errors import CaChainRefused, CaKeyUnavailable, InputInvalid, ProfileRefused, StateConflict
from core.files import replace_file
from core.server_command import server_command
from core.states import IssuerKind
from pki.algorithms import KeyType, PublicKey
from pki.encoding import failing_as
from pki.issuers import COMMON_NAME_LIMIT, Issuer
from pki.keys.stores import KeyStores
from pki.outer_chain import OuterChain, named, read_chain, spki
from store import audit, generations
from store import issuers as store_issuers
from store.audit import Actor
from store.database import Database
from store.issuers import IssuerRecord
from workflows.authority.issuers import Authority, Issuers, RecordedIssuer
from workflows.authority.names import common_name, is_issuing_name, issuing_name, next_number
from workflows.authority.rollover import add_issuing, waiting_issuer

_SUFFIX = ".csr.pem"
_NO_DEVICE = str(UUID(int=0))


@dataclass(frozen=True, slots=True)
class CaRequest:
    """A request (PKCS#10, PEM) for the certificate of the issuing CA ``name``, kept in ``path``."""

    name: str
    path: Path
    pem: str

    @property
    def public_key(self) -> bytes:
        """Return the key that is to be certified, as SubjectPublicKeyInfo."""
        return spki(x509.load_pem_x509_csr(self.pem.encode()).public_key())


def pending_requests(settings: Settings, issuers: Sequence[IssuerRecord], tenant_id: str) -> list[CaRequest]:
    """Return the tenant's requests of which no CA has come yet, the oldest first; raise ``CaKeyUnavailable``."""
    taken = {record.name for record in issuers}
    found = []
    for path in settings.ca_dir.glob(f"*{_SUFFIX}"):
        name = path.name.removesuffix(_SUFFIX)
        if not is_issuing_name(tenant_id, name):
            continue
        with failing_as(CaKeyUnavailable(f"The request {path} cannot be read; remove it and make another one.")):
            request = CaRequest(name, path, path.read_text(encoding="ascii"))
            if name not in taken and request.public_key:
                found.append(request)
    return sorted(found, key=lambda request: (len(request.name), request.name))


def request_issuing(
    database: Database,
    keys: KeyStores,
    settings: Settings,
    actor: Actor,
    *,
    subject: str = "",
    key_type: KeyType | None = None,
    another: bool = False,
    now: datetime,
) -> CaRequest:
    """Make a key for an issuing CA of the actor's tenant with the request for its certificate, or return what waits.

    ``subject`` is a name as RFC 4514 writes it, of which the CA that signs may make another. Raise ``InputInvalid`` for
    a bad one, ``StateConflict`` if a request waits that may be another one than is asked for, unless ``another``.
    """
    with database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
    waiting = pending_requests(settings, issuers, actor.tenant_id)
    if waiting and not another:
        if subject or key_type is not None:
            raise StateConflict(
                f"The request of {waiting[-1].name} waits for its certificate already; use --another to make one more"
                " key."
            )
        return waiting[-1]
    number = next_number(issuers, keys, actor.tenant_id)
    name = issuing_name(actor.tenant_id, number)
    usual = common_name(settings.ca_name, actor.tenant_id, f"Issuing CA {number}")
    wanted = _subject(subject or f"CN={_escaped(usual)}")
    key = keys.create(name, key_type or KeyType(settings.issuing_key_type))
    request = CaRequest(name, settings.ca_dir / f"{name}{_SUFFIX}", ca.request_issuing(key, subject=wanted))
    try:
        replace_file(request.path, request.pem.encode())
    except OSError as error:
        raise CaKeyUnavailable(f"{request.path} cannot be written: {error.strerror}.") from error
    with database.transaction() as tx:
        audit.record(tx, actor, "ca:request", f"issuer:{name}", at=now, subject=wanted.rfc4514_string())
    return request


def _escaped(text: str) -> str:
    return x509.NameAttribute(NameOID.COMMON_NAME, text).rfc4514_string().partition("=")[2]


def _subject(text: str) -> x509.Name:
    refusal = f"{text!r} is not a name as RFC 4514 writes it, such as CN=Devices CA 1,O=Example Ltd,C=GB."
    with failing_as(InputInvalid(refusal)):
        name = x509.Name.from_rfc4514_string(text)
    common_names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(common_names) != 1 or not 1 <= len(str(common_names[0].value)) <= COMMON_NAME_LIMIT:
        raise InputInvalid(f"The name of a CA must have one common name (CN) of 1 to {COMMON_NAME_LIMIT} characters.")
    return name


def add_requested(
    database: Database,
    authority: Authority,
    keys: KeyStores,
    settings: Settings,
    actor: Actor,
    content: bytes,
    *,
    now: datetime,
) -> tuple[str, int]:
    """Record the issuing CA of a chain (PEM) that answers a request of the actor's tenant, trusted but not issuing yet.

    Returns its name, and the generation that the broker must reach before it may issue; for a chain that is recorded
    already and does not issue yet, the same. Raise ``CaChainRefused``, ``CaKeyUnavailable``, ``StateConflict``.
    """
    with database.snapshot() as tx:
        issuers = store_issuers.list_issuers(tx, retired=True)
        generation = generations.get_broker_state(tx).generation
        waiting, current = waiting_issuer(tx, actor.tenant_id), authority.seen_by(tx)
    requested = {request.public_key: request for request in pending_requests(settings, issuers, actor.tenant_id)}
    recorded = _issuing_by_key([one for one in issuers if one.tenant_id == actor.tenant_id])
    names = {key: record.name for key, record in recorded.items()}
    names |= {key: request.name for key, request in requested.items()}
    chain = read_chain(content, names, now=now)
    key = spki(chain.issuing.public_key())
    if key in recorded:
        if chain.name != waiting or chain.issuing.public_bytes(Encoding.DER) != recorded[key].der:
            raise StateConflict(
                f"{chain.name} has its certificate already, and a key gets no second one; ca request makes another key."
            )
        return waiting, generation
    if waiting is not None:
        raise StateConflict(
            f"{waiting} is to issue next; let it by {server_command('ca rollover')}, then install this."
        )
    own_root = _own_root(chain, current, actor.tenant_id)
    issuer = _issuer(chain, keys, [one.issuer for one in current.issuers], by_own_root=own_root is not None)
    _try(issuer, settings, now, signs_servers=actor.tenant_id == current.servers.tenant_id)
    added = add_issuing(database, actor, issuer, own_root, now=now)
    requested[key].path.unlink(missing_ok=True)
    return chain.name, added


def _issuing_by_key(issuers: Iterable[IssuerRecord]) -> dict[bytes, IssuerRecord]:
    return {
        spki(x509.load_der_x509_certificate(record.der).public_key()): record
        for record in issuers
        if record.kind == IssuerKind.ISSUING
    }


def _own_root(chain: OuterChain, current: Issuers, tenant_id: str) -> RecordedIssuer | None:
    """Return the root of the portal's own that has signed the chain's CA, such as where its key is kept elsewhere."""
    roots = [one for one in current.issuers if one.kind == IssuerKind.ROOT]
    own = [one for one in roots if one.id == current.root.id or one.tenant_id == tenant_id]
    return next((one for one in own if chain.above == (one.issuer.certificate,)), None)


def _issuer(chain: OuterChain, keys: KeyStores, known: Sequence[Issuer], *, by_own_root: bool) -> Issuer:
    """Return the issuing CA with its key; raise ``CaChainRefused`` if its name is that of another CA here."""
    for other in known:
        if chain.issuing.subject in [one.subject for one in (other.certificate, *other.above)]:
            raise CaChainRefused(
                f"{other.name} or a CA above it has the name {named(chain.issuing)} already; have the request signed"
                " with another one."
            )
    return Issuer(chain.name, chain.issuing, keys.load(chain.name), () if by_own_root else chain.above)


def _try(issuer: Issuer, settings: Settings, now: datetime, *, signs_servers: bool) -> None:
    """Sign certificates as the portal will, for a key that nobody has; raise ``CaChainRefused`` if the CA may not."""
    key: PublicKey = ca.generate_keypair(KeyType.EC_P256).public_key()
    pki_url = settings.pki_url
    try:
        ca.sign_certificate(issuer, key, device_id=_NO_DEVICE, now=now, days=1, pki_url=pki_url)
        of_others = settings.tls_certificate, settings.broker_certificate
        for names, of_other in zip((settings.server_names, settings.broker_names), of_others, strict=True):
            if of_other is not None or not signs_servers:
                continue
            ca.sign_server_certificate(issuer, key, names=names, now=now, days=1, pki_url=pki_url)
    except ProfileRefused as error:
        raise CaChainRefused(
            "Name constraints in the chain do not permit the names in the certificates of the portal or of devices;"
            " have the CA signed without them, or set PORTAL_SERVER_NAMES and PORTAL_BROKER_NAMES to names within them."
        ) from error
