"""Issues the portal's own certificates: those of its servers, and the two that it probes the broker with."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import ca
import db
from broker.capath import FILE_MODE
from broker.folder import SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE, broker_group
from broker.probe import ProbeCertificate, ProbeCertificates
from broker_provisioning import BrokerProvisioning
from config import PORTAL_CA_FILE, Settings
from core.errors import Unavailable
from core.files import replace_file
from operations.outside_certificates import (
    broker_certificate,
    https_certificate,
    keep_until_restart,
    outside_certificates,
    take,
)
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import Issuer
from store import issuers
from store.database import Database
from store.scope import ALL_TENANTS
from workflows.authority.issuers import Authority, RecordedIssuer
from workflows.authority.own import PROBE_DAYS, record_own
from workflows.questioners import Questioners
from workflows.reconciliation import Reconciler

log = logging.getLogger("portal.installation")


def probe_certificates(settings: Settings) -> ProbeCertificates:
    """Return the files of the two client certificates, one good and one revoked, that the broker is probed with."""
    folder = settings.data_dir / "canaries"
    return ProbeCertificates(
        good=ProbeCertificate(folder / "good.pem", folder / "good.key"),
        revoked=ProbeCertificate(folder / "revoked.pem", folder / "revoked.key"),
    )


@dataclass(frozen=True, slots=True)
class OwnCertificates:
    """Renews the certificates that the portal has issued to itself and to the broker."""

    _settings: Settings
    _database: Database
    _authority: Authority
    _broker: BrokerProvisioning
    _reconciler: Reconciler
    _clock: Callable[[], datetime]
    _first_tenant: str
    _questioners: Questioners

    def renew(self, *, served: bool = False) -> list[str]:
        """Issue a new certificate for each that is due; return the names of those renewed.

        Set ``served`` if portal and broker may be running meanwhile. Raise ``Unavailable`` if the running broker does
        not load the CRL that lists the new revoked probe certificate, and ``ServerCertificateRefused`` if one of
        another issuer cannot be used, unless ``served``: then the one before goes on.
        """
        settings = self._settings
        renewed: list[str] = []
        if self._renew_https(served=served):
            renewed.append("portal server certificate")
        if self._renew_agents():
            renewed.append("server certificate for agents")
        renewed.extend(self._renew_rabbitmq())
        if settings.has_broker:
            renewed += self._renew_for_broker(probe_certificates(settings), served=served)
        for name in renewed:
            log.info("issued", extra={"what": name})
        return renewed

    def _renew_for_broker(self, probes: ProbeCertificates, *, served: bool) -> list[str]:
        renewed = ["broker server certificate"] if self._renew_broker(served=served) else []
        if self._is_due(probes.good.certificate, probes.good.key):
            self._issue_probe(probes.good, revoked=False)
            renewed.append("good probe certificate")
        if self._is_due(probes.revoked.certificate, probes.revoked.key):
            # An expired one proves nothing: no probe could succeed before the new one is in its place.
            usable = is_current(probes.revoked.certificate, self._clock())
            self._issue_probe(probes.revoked, revoked=True, served=served and usable)
            renewed.append("revoked probe certificate")
        return renewed

    def take_outside(self) -> None:
        """Take the server certificates of other issuers into use that have been renewed."""
        write = {"portal": self._write_https, "broker": self._broker.files.write_server_certificate}
        for outside in outside_certificates(self._settings):
            if take(outside, self._settings, self._clock, write[outside.server], served=True):
                log.info("taken", extra={"what": f"{outside.server} server certificate"})

    def _write_https(self, chain: bytes, key: bytes) -> None:
        replace_file(self._settings.tls_dir / "server.key", key)
        replace_file(self._settings.tls_dir / "server.pem", chain)

    def _renew_broker(self, *, served: bool) -> bool:
        settings, write = self._settings, self._broker.files.write_server_certificate
        outside = broker_certificate(settings)
        if outside is not None:
            return take(outside, settings, self._clock, write, served=served)
        keep_until_restart(settings)
        settings.broker_ca_file.unlink(missing_ok=True)
        files = settings.broker_file(SERVER_CERTIFICATE_FILE), settings.broker_file(SERVER_KEY_FILE)
        # What the nodes of RabbitMQ have comes first: another portal may have written it for the same nodes.
        of_nodes = [(folder / SERVER_CERTIFICATE_FILE, folder / SERVER_KEY_FILE) for folder in self._folders_of_nodes()]
        for certificate, key in [*of_nodes, files]:
            if not self._is_due(certificate, key, settings.broker_names):
                return bool(of_nodes) and write(certificate.read_bytes(), key.read_bytes())
        return write(*self._issue_server(settings.broker_names))

    def _folders_of_nodes(self) -> Mapping[Path, str]:
        """Return the folders of RabbitMQ's nodes with a node's name each: the first one's, if several share one."""
        settings = self._settings
        return {node.folder or settings.broker_dir: node.name for node in reversed(settings.rabbitmq_nodes)}

    def _renew_https(self, *, served: bool) -> bool:
        settings = self._settings
        outside = https_certificate(settings)
        if outside is not None:
            return take(outside, settings, self._clock, self._write_https, served=served)
        (settings.data_dir / PORTAL_CA_FILE).unlink(missing_ok=True)
        certificate, key = settings.tls_dir / "server.pem", settings.tls_dir / "server.key"
        if not self._is_due(certificate, key, settings.server_names):
            return False
        self._write_https(*self._issue_server(settings.server_names))
        return True

    def _renew_agents(self) -> bool:
        """Renew the certificate of the listener for agents."""
        return self._settings.agents_bind is not None and self._renew_listener("agents", self._settings.agents_url)

    def _renew_rabbitmq(self) -> list[str]:
        """Renew the certificates of the listener for RabbitMQ, and those by which its nodes ask there."""
        settings, renewed = self._settings, list[str]()
        if settings.rabbitmq_bind is not None and self._renew_listener("rabbitmq", settings.rabbitmq_url):
            renewed.append("server certificate for RabbitMQ")
        for folder, node in self._folders_of_nodes().items():
            try:
                if self._renew_node(node, folder):
                    renewed.append(f"certificate of {node}")
            except OSError as error:  # perhaps it is not mounted
                log.error("a node has no certificate", extra={"node": node, "problem": str(error)})
        return renewed

    def _renew_node(self, node: str, folder: Path) -> bool:
        certificate, key = folder / "node.pem", folder / "node.key"
        if not self._is_due(certificate, key) and self._questioners.has(node, certificate):
            return False
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there")
        chain, content = self._questioners.issue(node)
        group = broker_group(self._settings)
        replace_file(key, content, mode=FILE_MODE, group=group)
        replace_file(certificate, chain, mode=FILE_MODE, group=group)
        return True

    def _renew_listener(self, name: str, url: str) -> bool:
        """Renew the certificate of a listener for those who trust no issuer but the portal."""
        certificate, key = (self._settings.tls_dir / f"{name}.{kind}" for kind in ("pem", "key"))
        names = (urlsplit(url).hostname or "",)
        if not self._is_due(certificate, key, names):
            return False
        chain, content = self._issue_server(names)
        replace_file(key, content)
        replace_file(certificate, chain)
        return True

    def _is_due(self, path: Path, key: Path, names: tuple[str, ...] = ()) -> bool:
        signer = self._authority.servers if names else self._authority.first.issuing
        return is_due(path, key, self._clock(), signer.issuer, names)

    def _issue_server(self, names: tuple[str, ...]) -> tuple[bytes, bytes]:
        key, signer = ca.generate_keypair(KeyType.EC_P256), self._authority.servers
        issued = ca.sign_server_certificate(
            signer.issuer,
            key.public_key(),
            names=names,
            now=self._clock(),
            days=self._settings.server_days,
            pki_url=self._settings.pki_url,
        )
        self._record(signer, issued, purpose="server", revoked=False)
        return signer.chain_pem(issued.pem).encode(), private_key_pem(key)

    def _issue_probe(self, probe: ProbeCertificate, *, revoked: bool, served: bool = False) -> None:
        key, signer = ca.generate_keypair(KeyType.EC_P256), self._authority.first.issuing
        issued = ca.sign_certificate(
            signer.issuer,
            key.public_key(),
            device_id=str(uuid.uuid4()),
            now=self._clock(),
            days=PROBE_DAYS,
            pki_url=self._settings.pki_url,
        )
        generation = self._record(signer, issued, purpose="canary", revoked=revoked)
        # A broker whose CRL does not list the certificate yet would accept it, and look as if it ignored revocations.
        listed = not served or self._reconciler.apply(generation).covers(generation)
        if not listed and self._reconciler.broker_answers():
            raise Unavailable(
                "The broker did not load the CRL that lists the new revoked probe certificate; the portal tries again"
                " in a few minutes."
            )
        replace_file(probe.key, private_key_pem(key))
        replace_file(probe.certificate, signer.chain_pem(issued.pem).encode())

    def _record(self, signer: RecordedIssuer, issued: ca.Issued, *, purpose: str, revoked: bool) -> int:
        """Record a certificate; return the generation from which the CRL lists it, 0 if it is not revoked."""
        now, generation = self._clock(), 0
        with self._database.transaction(sees=ALL_TENANTS) as tx:
            if revoked:
                generation = db.next_generation(tx, at=now)
                issuers.touch_issuer(tx, signer.id, generation=generation)
            record_own(tx, self._first_tenant, signer, issued, purpose=purpose, now=now, generation=generation)
        return generation


def is_due(path: Path, key: Path, now: datetime, issuer: Issuer, names: tuple[str, ...] = ()) -> bool:
    """Return whether a certificate must be replaced.

    It must if a file is missing or unreadable, if certificate and key do not belong together (a crash between writing
    the two), if two thirds of its lifetime have passed, if another issuer signed it, or if it lacks one of ``names``.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        if load_pem_private_key(key.read_bytes(), password=None).public_key() != certificate.public_key():
            return True
    except (OSError, ValueError):
        return True
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now < start + (end - start) * 2 / 3:
        return True
    try:
        certificate.verify_directly_issued_by(issuer.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return True  # of another CA, which may have the same name
    if not names:
        return False
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    present = {str(name.value) for name in alternative}
    return not set(names) <= present


def is_current(path: Path, now: datetime) -> bool:
    """Return whether the file holds a certificate that is valid at ``now``."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return False
    return certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc
