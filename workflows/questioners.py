"""The certificates by which nodes of a RabbitMQ cluster show who they are when they ask about its clients."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import ca
import db
from config import Settings
from core.errors import ClientCertificateRefused, NotFound, StateConflict
from core.states import CertificateStatus
from pki.algorithms import KeyType, private_key_pem
from pki.client_certificates import common_name
from pki.issuers import Reason, questioner_name
from store import audit, brokers, certificates, issuers
from store.audit import Actor
from store.certificates import CertificateRecord
from store.database import Database
from store.scope import ALL_TENANTS
from workflows.authority.issuers import Authority
from workflows.authority.own import record_own
from workflows.probe_identities import ProbeIdentities

log = logging.getLogger("portal.rabbitmq")

QUESTIONER_DAYS = 90


@dataclass(frozen=True, slots=True)
class Standing:
    """How a portal stands that answers: its journal must have ``least_generation``, which all were seen to enforce.

    ``is_alone``: no other broker counts, so that this one cannot be declared away.
    """

    least_generation: int
    is_alone: bool


@dataclass(frozen=True, slots=True)
class Questioners:
    """Issues certificates to the nodes that the settings name, says whose a certificate is, and revokes them.

    A node makes no difference between its certificates: each counts until it has expired or is revoked, so that
    connections that a node has open outlive a renewal.
    """

    _settings: Settings
    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]
    _first_tenant: str
    _probes: ProbeIdentities
    _broker_id: int  # this portal's own

    def is_probe(self, identity: str) -> bool:
        """Return whether an identity is that of a certificate by which a portal probes the nodes."""
        return self._probes.has(identity)

    def standing(self) -> Standing:
        """Return what the journal must have to be answered by, and whether changes may be enforced without it.

        Raise ``StateConflict`` if the portal's broker does not count: changes are enforced without it.
        """
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            counting = [one for one in brokers.list_brokers(tx) if one.counts]
            least = brokers.announced_generation(tx)
        if not any(one.id == self._broker_id for one in counting):
            raise StateConflict(
                "This portal was removed or declared away, so that it answers no RabbitMQ: stop it, or let it count"
                " again (portal broker back)."
            )
        return Standing(least, len(counting) == 1)

    @property
    def client_cas(self) -> str:
        """The CAs that nodes' certificates are verified by, PEM."""
        return self._authority.first.ca_pem

    def issue(self, node: str) -> tuple[bytes, bytes]:
        """Return a new certificate of a node with its chain, and its key, both PEM."""
        key, signer, now = ca.generate_keypair(KeyType.EC_P256), self._authority.first.issuing, self._clock()
        issued = ca.sign_questioner_certificate(
            signer.issuer,
            key.public_key(),
            node=node,
            now=now,
            days=QUESTIONER_DAYS,
            pki_url=self._settings.pki_url,
        )
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            record_own(tx, self._first_tenant, signer, issued, purpose="server", now=now)
        return signer.chain_pem(issued.pem).encode(), private_key_pem(key)

    def node_of(self, certificate: bytes) -> str:
        """Return the node whose certificate (DER) was shown; raise ``ClientCertificateRefused`` if it does not count.

        It must have been issued here for that, so that no other certificate of the same CA is taken for it.
        """
        fingerprint = hashlib.sha256(certificate).hexdigest()
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            record = certificates.find_own_certificate(tx, fingerprint)
        node = None if record is None else self._names().get(_name_in(record))
        if record is None or node is None:
            raise ClientCertificateRefused("This certificate is not that of a node in PORTAL_RABBITMQ_NODES.")
        if record.status is not CertificateStatus.ACTIVE:
            raise ClientCertificateRefused(f"The certificate of the node {node} is revoked; it has a newer one.")
        if not record.not_before <= self._clock() < record.not_after:
            raise ClientCertificateRefused(f"The certificate of the node {node} has expired; it has a newer one.")
        return node

    def has(self, node: str, path: Path) -> bool:
        """Return whether a file has a certificate of a node that counts, and did so after a restore, too."""
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            return self.node_of(certificate.public_bytes(Encoding.DER)) == node
        except (OSError, ValueError, ClientCertificateRefused):
            return False

    def revoke(self, actor: Actor, node: str) -> int:
        """Revoke all certificates of a node, whose key somebody else may have; return how many there were.

        Raise ``NotFound`` for a node that the settings do not name, unless it still has one.
        """
        now, wanted = self._clock(), questioner_name(node)
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            all_own = certificates.own_certificates(tx, self._first_tenant, now=now)
            revoked = [record for record in all_own if _name_in(record) == wanted]
            if not revoked and wanted not in self._names():
                raise NotFound(f"There is no node {node} in PORTAL_RABBITMQ_NODES.")
            generation = db.next_generation(tx, at=now) if revoked else 0
            for record in revoked:
                certificates.revoke_own_certificate(
                    tx, record, at=now, reason=Reason.KEY_COMPROMISE, generation=generation
                )
                issuers.touch_issuer(tx, record.issuer_id, generation=generation)
                target = f"certificate:{record.serial_number}"
                audit.record(tx, actor, "certificate:revoke", target, at=now, node=node)
        return len(revoked)

    def _names(self) -> dict[str, str]:
        return {questioner_name(node.name): node.name for node in self._settings.rabbitmq_nodes}


def _name_in(record: CertificateRecord) -> str:
    return common_name(x509.load_der_x509_certificate(record.der))
