"""What credentials a device asks for, and how they are made: certificate, and a key whose bundle is recorded."""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import ca
from config import Settings
from core.errors import FieldProblem, InputInvalid, ProfileRefused, Unavailable
from core.states import ClientKind
from core.topics import Topic
from pki import est
from pki.algorithms import KeyType, PublicKey
from pki.csr import Csr
from pki.issuers import ONLY_UUID, DeviceContents, device_profile
from pki.profiles import DEFAULT, CertificateProfile, CertificateTerms, Purpose
from pki.server_chain import names_shown
from workflows.attestation.evidence import ShownEvidence
from workflows.authority.issuers import Authority
from workflows.bundles import BundledCertificate, Bundles, WaitingBundle
from workflows.tenants import TenantTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialRequest:
    """A certificate for the key of a ``csr``, or a new key of ``key_type`` in an encrypted bundle.

    ``None`` stands for the tenant's value, and for a password that the portal makes.
    """

    csr: Csr | None = None
    key_type: str | None = None
    validity_days: int | None = None
    bundle_password: str | None = field(default=None, repr=False)
    bundle_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRequest(CredentialRequest):
    """A device to be added, with the credentials it is to have; ``topics`` are pairs of filter and access.

    ``profile`` is the name of its certificate profile, ``None`` for the default one; ``groups`` are the names of those
    that it is put into, each once, in one order. An application, by its ``kind``,
    has a name and topics only. ``evidence`` for the key of the CSR is appraised by the attestation policy of this id.
    """

    name: str
    type: str = ""
    location: str = ""
    firmware: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    topics: Sequence[tuple[str, str]] | None = None
    external_id: str | None = None
    kind: ClientKind = ClientKind.DEVICE
    profile: str | None = None
    groups: tuple[str, ...] = ()
    evidence: ShownEvidence | None = None
    policy_id: str | None = None


@dataclass(frozen=True, slots=True)
class IssuedCredentials:
    """A certificate with its chain, PEM, and the key that was made for it, if any; it is in no database yet.

    Record it before it is released (``workflows/admission.py``). A new key is in the ``bundle``; ``key`` (PKCS#8, DER)
    is one that is handed over at once and kept nowhere. ``names`` are those that no other device may have, ``profile``
    is what they are from. It can be sent from one process to another.
    """

    device_id: str
    issuer_id: int
    serial_number: str
    fingerprint: str
    key_fingerprint: str  # SHA-256 of the SubjectPublicKeyInfo, in hex
    der: bytes = field(repr=False)
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    certificate: str = field(repr=False)
    chain: str = field(repr=False)
    bundle: WaitingBundle | None = None
    key: bytes | None = field(default=None, repr=False)
    profile: str = DEFAULT
    names: tuple[str, ...] = ()

    @property
    def is_for_csr(self) -> bool:
        """Return whether the device has made its key itself."""
        return self.bundle is None and self.key is None


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialAnswer:
    """The answer to a request for credentials: link and password, or for a CSR the certificate and its chain."""

    device_id: str
    fingerprint: str
    serial_number: str
    expires_at: datetime | None
    download_url: str | None = field(default=None, repr=False)
    download_expires_at: datetime | None = None
    bundle_password: str | None = field(default=None, repr=False)
    certificate: str | None = field(default=None, repr=False)
    chain: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, issued: IssuedCredentials, **more: Any) -> Self:
        """Return the answer about credentials; ``more`` are the fields of a subclass."""
        bundle = issued.bundle
        return cls(
            device_id=issued.device_id,
            fingerprint=issued.fingerprint,
            serial_number=issued.serial_number,
            expires_at=issued.not_after,
            download_url=None if bundle is None else bundle.download_url,
            download_expires_at=None if bundle is None else bundle.expires_at,
            bundle_password=None if bundle is None else bundle.password,
            certificate=issued.certificate if bundle is None else None,
            chain=issued.chain if bundle is None else None,
            **more,
        )

    def to_json(self) -> bytes:
        """Return the answer as it is kept for a repeat; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), default=datetime.isoformat).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read what ``to_json`` has written."""
        values: dict[str, Any] = json.loads(text)
        for name, value in values.items():
            if value is not None and name in _TIMES:
                values[name] = datetime.fromisoformat(value)
        return cls(**values)


_TIMES = frozenset({"issued_at", "expires_at", "download_expires_at", "previous_valid_until"})


def own_names(settings: Settings) -> frozenset[str]:
    """Return the names and addresses of the portal and the broker, in lower case, which no device's certificate has.

    They are those of the settings, and all in the certificates that the two show now, which another CA may have issued;
    a DNS name may have ``*`` as its first label. Raise ``Unavailable`` if such a certificate cannot be read.
    """
    hosts = [urlsplit(settings.pki_url).hostname or "", settings.bind.host, settings.pki_bind.host, settings.mqtt_bind]
    hosts += [address.host for address in settings.probe_addresses]
    shown = [_names_shown(path) for path in (settings.tls_dir / "server.pem", settings.broker_file("server.pem"))]
    names = (*settings.server_names, *settings.broker_names, *hosts, "localhost", *itertools.chain(*shown))
    return frozenset(_in_one_form(name) for name in names if name)


def _names_shown(path: Path) -> tuple[str, ...]:
    try:
        status = path.stat()
        return _names_in(path, (status.st_mtime_ns, status.st_ino, status.st_size))
    except FileNotFoundError:  # before the first start
        return ()
    except (OSError, ValueError) as error:
        raise Unavailable(f"{path} cannot be read as a server's certificate; restart the portal.") from error


@functools.lru_cache(maxsize=8)
def _names_in(path: Path, _version: tuple[int, int, int]) -> tuple[str, ...]:
    """Read a certificate that is needed for every device, and renewed a few times in a year."""
    return names_shown(path.read_bytes())


def _in_one_form(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def check_servers_of_tenant(authority: Authority, tenant_id: str, profile: CertificateProfile) -> None:
    """Raise ``ProfileRefused`` if clients of other tenants would accept servers of this one under any name it likes."""
    if Purpose.SERVER_AUTH in profile.extended_key_usage and authority.current.is_trusted_by_others(tenant_id):
        rule = "has server_auth, for which a tenant needs a CA below a root of its own"
        raise ProfileRefused(
            f"The certificate profile {profile.name} {rule}: clients of other tenants trust the root of this one.",
            [FieldProblem("extended_key_usage", rule)],
        )


class CredentialIssuer:
    """Issues the credentials of every device, whichever way it comes; touches no database."""

    def __init__(self, settings: Settings, authority: Authority, bundles: Bundles) -> None:
        self._settings = settings
        self._authority = authority
        self._bundles = bundles

    def issue(
        self,
        tenant: TenantTerms,
        device_id: str,
        request: CredentialRequest,
        topics: Sequence[Topic] | None,
        *,
        now: datetime,
        terms: CertificateTerms | None = None,
    ) -> IssuedCredentials:
        """Sign a certificate for the key of the CSR, or for a new key that goes into an encrypted bundle.

        ``topics`` are the device's own, ``None`` the default ones; ``terms`` its certificate profile, ``None`` the
        default one. Raises ``InputInvalid`` (``CsrInvalid``, ``KeyRefused``, ``ProfileRefused``), ``IssuerUnusable``,
        ``SignatureCheckFailed``.
        """
        days, contents = self.check(tenant, request, terms)
        if request.csr is None:
            usual = request.key_type or tenant.key_type
            key = ca.generate_keypair(KeyType(usual if terms is None else terms.usual_key(usual)))
            issued = self._certify(tenant.id, device_id, key.public_key(), days, contents, terms, now)
            bundle = self._bundles.record(
                tenant,
                key,
                BundledCertificate(device_id, issued.fingerprint, issued.certificate, issued.chain),
                topics,
                password=request.bundle_password,
                bundle_format=request.bundle_format,
                now=now,
            )
            return dataclasses.replace(issued, bundle=bundle)
        return self._certify(tenant.id, device_id, request.csr.public_key, days, contents, terms, now)

    def issue_with_key(
        self,
        tenant: TenantTerms,
        device_id: str,
        key_type: str,
        validity_days: int | None,
        *,
        now: datetime,
        terms: CertificateTerms | None = None,
    ) -> IssuedCredentials:
        """Make a new key and sign its certificate, for a device that waits for both.

        The key is of ``key_type``, or of the first kind of the certificate profile that does not allow that. Raises
        ``ProfileRefused``, ``IssuerUnusable``, ``SignatureCheckFailed``.
        """
        days, contents = self.check(tenant, CredentialRequest(validity_days=validity_days), terms)
        key = ca.generate_keypair(KeyType(key_type if terms is None else terms.usual_key(key_type)))
        issued = self._certify(tenant.id, device_id, key.public_key(), days, contents, terms, now)
        return dataclasses.replace(issued, key=est.pkcs8(key))

    def check(
        self, tenant: TenantTerms, request: CredentialRequest, terms: CertificateTerms | None
    ) -> tuple[int, DeviceContents]:
        """Return for how many days a certificate would be valid, and what it would hold; makes nothing.

        Raises ``InputInvalid`` (``ProfileRefused``) if it would not be issued.
        """
        if request.csr is not None and (request.key_type or request.bundle_password or request.bundle_format):
            raise InputInvalid(
                "With a csr the device has its own key: leave out key_type, bundle_password and bundle_format.",
                [FieldProblem("csr", "goes with neither key_type nor bundle_password nor bundle_format")],
            )
        if terms is None:
            return request.validity_days or tenant.device_days, ONLY_UUID
        if request.csr is not None:
            terms.check_key(request.csr.key_type, of_csr=True)
        elif request.key_type is not None:
            terms.check_key(request.key_type)
        days = terms.days(request.validity_days, tenant.device_days)
        contents = terms.contents(own_names(self._settings))
        ca.check_names(self._authority.issuing_of(tenant.id).issuer, device_profile(str(terms.fields["id"]), contents))
        check_servers_of_tenant(self._authority, tenant.id, terms.profile)
        return days, contents

    def _certify(
        self,
        tenant_id: str,
        device_id: str,
        key: PublicKey,
        days: int,
        contents: DeviceContents,
        terms: CertificateTerms | None,
        now: datetime,
    ) -> IssuedCredentials:
        signer = self._authority.issuing_of(tenant_id)
        certificate = ca.sign_certificate(
            signer.issuer,
            key,
            device_id=device_id,
            now=now,
            days=days,
            pki_url=self._settings.pki_url,
            contents=contents,
        )
        return IssuedCredentials(
            device_id=device_id,
            issuer_id=signer.id,
            serial_number=certificate.serial_number,
            fingerprint=certificate.fingerprint,
            key_fingerprint=certificate.key_fingerprint,
            der=certificate.der,
            not_before=certificate.not_before,
            not_after=certificate.not_after,
            issued_at=now,
            certificate=certificate.pem,
            chain=signer.chain_pem(certificate.pem),
            profile=DEFAULT if terms is None else terms.profile.name,
            names=contents.names,
        )
