"""Makes a device's credentials, with the rows that record them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import ca
import credential_delivery as delivery
import db
from config import Settings
from core.errors import FieldProblem, InputInvalid
from core.topics import Topic, default_topics, expand
from delivery.formats import BundleFormat
from pki import est
from pki.algorithms import KeyType, PrivateKey, PublicKey, private_key_pem
from pki.csr import read_csr
from store import deliveries
from workflows.authority.issuers import Authority


@dataclass(frozen=True, slots=True)
class Wanted:
    """What credentials are asked for: a certificate for the key of a ``csr`` (PEM), or a new key in a bundle.

    ``None`` stands for what the settings say, and for a password of the portal's making.
    """

    csr: str | None = None
    key_type: str | None = None
    validity_days: int | None = None
    bundle_password: str | None = field(default=None, repr=False)
    bundle_format: str | None = None


@dataclass(frozen=True, slots=True)
class BundleMade:
    """An encrypted bundle that waits for one download, with what opens it."""

    delivery_id: str
    content: bytes = field(repr=False)
    password: str = field(repr=False)
    download_url: str = field(repr=False)
    download_expires_at: datetime
    format: BundleFormat


@dataclass(frozen=True, slots=True)
class Made:
    """Credentials that exist nowhere else yet: ``record`` them before they are released.

    ``bundle`` is ``None`` where the device has its own key; ``certificate`` and ``chain`` (PEM) are what it then gets.
    ``key`` (PKCS#8, DER) is one made here that is handed over at once, and kept nowhere.
    """

    issued: ca.Issued
    issuer_id: int
    chain: str = field(repr=False)
    bundle: BundleMade | None
    key: bytes | None = field(default=None, repr=False)

    @property
    def certificate(self) -> str:
        """The certificate as PEM."""
        return self.issued.pem


class CredentialMaker:
    """Whatever gives a device a certificate (registration, renewal, enrolment) has it made here."""

    def __init__(self, settings: Settings, authority: Authority, link_keys: Sequence[str]) -> None:
        self._settings = settings
        self._authority = authority
        self._link_keys = link_keys

    def make(self, device_id: str, wanted: Wanted, topics: Sequence[Topic] | None, *, now: datetime) -> Made:
        """Sign a certificate and, unless a CSR brings the key, make key and bundle; the database is not touched.

        ``topics`` are the device's own or ``None``. Raises ``InputInvalid`` (``CsrInvalid``, ``KeyRefused``),
        ``IssuerUnusable``, ``SignatureCheckFailed``.
        """
        key: PrivateKey | None = None
        if wanted.csr is None:
            key = ca.generate_keypair(KeyType(wanted.key_type or self._settings.key_type))
            public_key = key.public_key()
        elif wanted.key_type or wanted.bundle_password or wanted.bundle_format:
            raise InputInvalid(
                "With a csr the device has its own key: leave out key_type, bundle_password and bundle_format.",
                [FieldProblem("csr", "goes with neither key_type nor bundle_password nor bundle_format")],
            )
        else:
            public_key = read_csr(wanted.csr)
        made = self._certify(device_id, public_key, wanted.validity_days, now)
        if key is None:
            return made
        bundle = self._bundle(device_id, key, made.issued, made.chain, topics, wanted, now)
        return dataclasses.replace(made, bundle=bundle)

    def make_with_key(self, device_id: str, key_type: str, validity_days: int | None, *, now: datetime) -> Made:
        """Make a new key of the kind ``key_type`` with its certificate, for a device that waits for both.

        Raises ``IssuerUnusable``, ``SignatureCheckFailed``.
        """
        key = ca.generate_keypair(KeyType(key_type))
        made = self._certify(device_id, key.public_key(), validity_days, now)
        return dataclasses.replace(made, key=est.pkcs8(key))

    def _certify(self, device_id: str, key: PublicKey, validity_days: int | None, now: datetime) -> Made:
        signer = self._authority.issuing
        issued = ca.sign_certificate(
            signer.issuer,
            key,
            device_id=device_id,
            now=now,
            days=validity_days or self._settings.device_days,
            pki_url=self._settings.pki_url,
        )
        return Made(issued, signer.id, signer.chain_pem(issued.pem), None)

    def _bundle(
        self,
        device_id: str,
        key: PrivateKey,
        issued: ca.Issued,
        chain: str,
        topics: Sequence[Topic] | None,
        wanted: Wanted,
        now: datetime,
    ) -> BundleMade:
        example = (topics or default_topics(self._settings.topic_prefix))[0]
        credentials = delivery.Credentials(
            device_id=device_id,
            key_pem=private_key_pem(key),
            certificate_pem=issued.pem,
            chain_pem=chain,
            ca_pem=self._authority.ca_pem,
            broker_host=self._settings.mqtt_host,
            broker_port=self._settings.mqtt_port,
            example_topic=expand(example, device_id).replace("#", "hello").replace("+", "hello"),
        )
        delivery_id = secrets.token_hex(16)
        password = wanted.bundle_password or delivery.new_bundle_password()
        bundle_format = BundleFormat(wanted.bundle_format or BundleFormat.ZIP)
        return BundleMade(
            delivery_id,
            delivery.package_credentials(credentials, password, now=now, bundle_format=bundle_format),
            password,
            delivery.generate_download_link(
                delivery_id, self._link_keys, public_url=self._settings.public_url, now=now
            ),
            now + timedelta(hours=self._settings.link_hours),
            bundle_format,
        )

    def record(self, tx: Connection, tenant_id: str, device_id: str, made: Made, *, now: datetime) -> int:
        """Insert the certificate and what is to be delivered; returns the certificate's row id."""
        certificate_id = db.add_certificate(
            tx,
            tenant_id=tenant_id,
            issuer_id=made.issuer_id,
            device_id=device_id,
            purpose="device",
            serial_number=made.issued.serial_number,
            fingerprint=made.issued.fingerprint,
            der=made.issued.der,
            not_before=made.issued.not_before,
            not_after=made.issued.not_after,
            issued_at=now,
        )
        if made.bundle is not None:
            deliveries.add_delivery(
                tx,
                tenant_id=tenant_id,
                delivery_id=made.bundle.delivery_id,
                device_id=device_id,
                certificate_id=certificate_id,
                bundle=made.bundle.content,
                bundle_format=made.bundle.format,
                created_at=now,
                expires_at=made.bundle.download_expires_at,
            )
        return certificate_id
