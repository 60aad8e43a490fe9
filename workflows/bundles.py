"""Bundles: what is recorded of one when credentials are issued, and how it is made of that when it is fetched.

A bundle under a password of the portal's making is made when it is fetched. Until then its key and its password are
sealed under a secret that stands in the link alone, so that whoever has only the data folder opens neither.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import credential_delivery
from config import Settings
from core.errors import Unavailable
from core.topics import DEVICE_ID, Access, Topic, default_topics
from credential_delivery import DownloadToken, SealedSecrets
from delivery.formats import BundleFormat
from pki import est
from pki.algorithms import PrivateKey
from pki.encoding import pem
from store.deliveries import BundleSource
from workflows.authority.issuers import Authority
from workflows.tenants import TenantTerms


@dataclass(frozen=True, slots=True)
class WaitingBundle:
    """A bundle that waits for one download, or what it will be made of, ``sealed``; with what opens it."""

    delivery_id: str
    content: bytes = field(repr=False)
    sealed: bool
    format: BundleFormat
    password: str = field(repr=False)
    download_url: str = field(repr=False)
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class BundledCertificate:
    """The certificate of a bundle: its device, fingerprint (SHA-256, hex), and itself with its chain, PEM."""

    device_id: str
    fingerprint: str
    pem: str
    chain: str


def broker_trust(settings: Settings, ca_pem: str) -> str:
    """Return what devices trust of the broker, PEM: the portal's CAs, and the root of a certificate of another issuer.

    Raise ``Unavailable`` if that root cannot be read.
    """
    return ca_pem if settings.broker_certificate is None else ca_pem + _read(settings.broker_ca_file)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror}); restart the portal.") from error


class Bundles:
    """Makes bundles; touches no database."""

    def __init__(self, settings: Settings, authority: Authority, link_keys: Sequence[str]) -> None:
        self._settings = settings
        self._authority = authority
        self._link_keys = link_keys

    def read_link(self, token: str, *, now: datetime, max_age: timedelta) -> DownloadToken:
        """Return what a link's token holds; raises ``LinkUnknown``, ``LinkExpired``."""
        return credential_delivery.read_download_token(token, self._link_keys, now=now, max_age=max_age)

    def record(
        self,
        tenant: TenantTerms,
        key: PrivateKey,
        certificate: BundledCertificate,
        topics: Sequence[Topic] | None,
        *,
        password: str | None,
        bundle_format: str | None,
        now: datetime,
    ) -> WaitingBundle:
        """Return what is recorded of a bundle for ``key``, with its link; ``None`` stands for what the portal chooses.

        A ``password`` that a person chose may protect other things, too, so it is kept in no form: the bundle is made
        at once. Raises ``Unavailable`` if it cannot be.
        """
        chosen, delivery_id = BundleFormat(bundle_format or tenant.bundle_format), secrets.token_hex(16)
        if password is not None:
            link = DownloadToken(delivery_id)
            content = self._pack(tenant, _key_pem(est.pkcs8(key)), certificate, topics, password, chosen, now)
        else:
            link = DownloadToken(delivery_id, credential_delivery.new_link_secret())
            own = SealedSecrets(est.pkcs8(key), credential_delivery.new_bundle_password())
            content, password = own.seal(link, self._link_keys, about=_about(certificate)), own.password
        url = credential_delivery.generate_download_link(
            delivery_id, self._link_keys, public_url=self._settings.public_url, now=now, secret=link.secret
        )
        ends = now + timedelta(hours=tenant.link_hours)
        return WaitingBundle(delivery_id, content, bool(link.secret), chosen, password, url, ends)

    def make(
        self,
        tenant: TenantTerms,
        device_id: str,
        source: BundleSource,
        link: DownloadToken,
        topics: Sequence[Topic] | None,
        *,
        bundle_format: BundleFormat,
        now: datetime,
    ) -> bytes:
        """Make the bundle whose secrets the link opens; raises ``LinkUnknown`` if it does not, ``Unavailable``."""
        certificate_pem = pem("CERTIFICATE", source.certificate)
        chain = self._authority.current.by_id[source.issuer_id].chain_pem(certificate_pem)
        certificate = BundledCertificate(device_id, source.fingerprint, certificate_pem, chain)
        own = SealedSecrets.open(source.sealed, link, self._link_keys, about=_about(certificate))
        return self._pack(tenant, _key_pem(own.key), certificate, topics, own.password, bundle_format, now)

    def _pack(
        self,
        tenant: TenantTerms,
        key_pem: bytes,
        certificate: BundledCertificate,
        topics: Sequence[Topic] | None,
        password: str,
        bundle_format: BundleFormat,
        now: datetime,
    ) -> bytes:
        first = (topics or default_topics(tenant.topic_prefix))[0]
        example, reads = first.filter.replace(DEVICE_ID, certificate.device_id), first.access is Access.READ
        broker = self._settings.broker_addresses_of(tenant.id)[0]
        credentials = credential_delivery.Credentials(
            device_id=certificate.device_id,
            key_pem=key_pem,
            certificate_pem=certificate.pem,
            chain_pem=certificate.chain,
            ca_pem=broker_trust(self._settings, self._authority.of(tenant.id).ca_pem),
            portal_ca_pem=self._portal_ca(),
            broker_host=broker.host,
            broker_port=broker.port,
            example_topic=example if reads else example.replace("#", "hello").replace("+", "hello"),
            example_reads=reads,
        )
        return credential_delivery.package_credentials(credentials, password, now=now, bundle_format=bundle_format)

    def _portal_ca(self) -> str:
        """Return what devices trust at the portal's HTTPS address, empty if it is what they trust of the broker."""
        return "" if self._settings.tls_certificate is None else _read(self._settings.https_ca_file)


def _about(certificate: BundledCertificate) -> str:
    """Return what sealed secrets are bound to, so that they go with no other device or certificate."""
    return f"{certificate.device_id}/{certificate.fingerprint}"


def _key_pem(der: bytes) -> bytes:
    return pem("PRIVATE KEY", der).encode()
