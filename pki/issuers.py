"""Describe a certificate authority, and the certificates that it signs (RFC 5280)."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache, cached_property, lru_cache

from cryptography import x509
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ExtensionOID, NameOID
from pyasn1.type import univ

from core.errors import CaKeyUnavailable, InputInvalid, IssuerUnusable, SettingInvalid
from pki.algorithms import PrivateKey, SignatureHash, check_public_key, public_key_der, signature_hash
from pki.encoding import BOOLEAN, OCTET_STRING, SEQUENCE, encode, join

# How far behind clients' clocks may be: devices without a battery, or before their first NTP, reject what is dated in
# their future. So all dates that the CA puts into certificates, CRLs and OCSP responses to say when something began are
# this much early: notBefore, thisUpdate, and the time of a revocation too, which must not come after the thisUpdate of
# what lists it. An hour is also the room for CRLs in quick succession: each needs a thisUpdate at least a second
# after the one before, or the broker keeps the older one, and none may be in the future, which the broker rejects.
CLOCK_SKEW = timedelta(hours=1)

COMMON_NAME_LIMIT = 64  # characters: ub-common-name of RFC 5280 appendix A.1
MAX_DNS_NAME = 253  # characters (RFC 1035 section 2.3.4, as text)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DNS_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_URL = re.compile(r"https?://[!-~]+")
SERIAL_BITS = 159  # with the sign bit, 20 bytes: the most that RFC 5280 §4.1.2.2 allows
_ISSUER_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Extension(x509.Extension[x509.ExtensionType]):
    """An extension that is encoded once: most of a certificate's are those of the one before, too."""

    @cached_property
    def der(self) -> bytes:
        """The extension as DER (RFC 5280 §4.1.2.9)."""
        critical = [join(BOOLEAN, b"\xff")] if self.critical else []
        return join(SEQUENCE, _oid(self.oid.dotted_string), *critical, join(OCTET_STRING, self.value.public_bytes()))


def extension(value: x509.ExtensionType, *, critical: bool = False) -> Extension:
    """Return an extension with this value."""
    return Extension(value.oid, critical, value)


@cache
def _oid(dotted: str) -> bytes:
    return encode(univ.ObjectIdentifier(dotted))


# --- The authority ------------------------------------------------------------------------------------------------


class Reason(StrEnum):
    """Why a certificate was revoked (RFC 5280 §5.3.1); removeFromCRL is for delta CRLs only."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "key_compromise"
    CA_COMPROMISE = "ca_compromise"
    AFFILIATION_CHANGED = "affiliation_changed"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessation_of_operation"
    CERTIFICATE_HOLD = "certificate_hold"
    PRIVILEGE_WITHDRAWN = "privilege_withdrawn"
    AA_COMPROMISE = "aa_compromise"

    def is_worse_than(self, other: str) -> bool:
        """Return whether it may take the place of another: any that of none, a compromised key that of any."""
        return self != other and (other == Reason.UNSPECIFIED or self is Reason.KEY_COMPROMISE)


@dataclass(frozen=True)
class Issuer:
    """A CA: ``key`` is None if the private key is not on this machine, or a function that returns it when it signs.

    ``url_name`` identifies it in URLs, ``name`` does if that is empty. ``above`` are the CAs above it up to their root,
    if the portal has signed none of them. What is signed is valid within the time in which all of them are.
    Raises ``IssuerUnusable`` if the certificate is not that of a CA, ``CaKeyUnavailable`` if the key does not belong
    to it.
    """

    name: str
    certificate: x509.Certificate
    key: PrivateKey | Callable[[], PrivateKey] | None = field(default=None, repr=False)
    above: tuple[x509.Certificate, ...] = field(default=(), repr=False)
    url_name: str = ""
    public_key_der: bytes = field(init=False, repr=False, compare=False)
    subject_der: bytes = field(init=False, repr=False, compare=False)
    authority_key_identifier: Extension = field(init=False, repr=False, compare=False)
    signature_hash: SignatureHash = field(init=False, repr=False, compare=False)
    not_before: datetime = field(init=False, compare=False)
    not_after: datetime = field(init=False, compare=False)
    has_name_constraints: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _ISSUER_NAME.fullmatch(self.name):
            raise IssuerUnusable("The name of a CA must have 1 to 63 lower-case letters, digits and inner hyphens.")
        public_key = check_public_key(self.certificate.public_key())
        derived = {
            "url_name": self.url_name or self.name,
            "public_key_der": public_key_der(public_key),
            "subject_der": self.certificate.subject.public_bytes(),
            "authority_key_identifier": _authority_key_identifier(self.name, self.certificate),
            "signature_hash": signature_hash(public_key),
            "not_before": max(one.not_valid_before_utc for one in (self.certificate, *self.above)),
            "not_after": min(one.not_valid_after_utc for one in (self.certificate, *self.above)),
            "has_name_constraints": any(_has_name_constraints(one) for one in (self.certificate, *self.above)),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        if self.key is not None and not callable(self.key) and not self.has_key(self.key):
            raise CaKeyUnavailable(
                f"The private key of CA {self.name} does not belong to its certificate; restore both from one backup."
            )

    def has_key(self, key: PrivateKey) -> bool:
        """Return whether a private key is that of the CA's certificate."""
        return public_key_der(key.public_key()) == self.public_key_der


def signing_key(issuer: Issuer) -> PrivateKey:
    """Return the issuer's private key; raises ``IssuerUnusable`` if it is not on this machine or cannot be used."""
    if issuer.key is None:
        raise IssuerUnusable(f"The private key of CA {issuer.name} is not on this machine, so it cannot sign.")
    if not callable(issuer.key):
        return issuer.key
    key = issuer.key()
    if not issuer.has_key(key):
        raise IssuerUnusable(f"The private key of CA {issuer.name} does not belong to its certificate; restore it.")
    return key


def _authority_key_identifier(name: str, certificate: x509.Certificate) -> Extension:
    """Make the AKI of the certificates that this CA signs (RFC 5280 §4.2.1.1); checks that it may sign."""
    try:
        extensions = certificate.extensions
        may_sign = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        key_identifier = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IssuerUnusable(f"The certificate of CA {name} is not that of a CA.") from error
    if not (may_sign and usage.key_cert_sign and usage.crl_sign):
        raise IssuerUnusable(f"The certificate of CA {name} does not allow it to sign certificates and CRLs.")
    return extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_identifier))


def _has_name_constraints(certificate: x509.Certificate) -> bool:
    return any(item.oid == ExtensionOID.NAME_CONSTRAINTS for item in certificate.extensions)


def whole_second(moment: datetime) -> datetime:
    """Return a time in UTC cut to whole seconds, as in certificates and CRLs; raises ``ValueError`` for a naive one."""
    if moment.tzinfo is None:
        raise ValueError("times must be aware")
    return moment.astimezone(UTC).replace(microsecond=0)


# --- What its certificates contain ---------------------------------------------------------------------------------


class RevocationInfo(StrEnum):
    """Where a certificate says that its revocation status is published."""

    CRL_AND_OCSP = "crl and ocsp"
    CRL = "crl"
    NONE = "none"


@dataclass(frozen=True)
class Profile:
    """The part of a certificate that depends on its purpose, and not on its key or issuer."""

    subject: x509.Name
    extensions: tuple[Extension, ...]
    revocation: RevocationInfo = RevocationInfo.CRL_AND_OCSP


@dataclass(frozen=True, slots=True)
class DeviceContents:
    """What a device's certificate holds beside its UUID: names, and attributes that come before the CN in its subject.

    All of it was checked before (``pki/profiles.py``); ``dns_names`` are in lower case.
    """

    server_auth: bool = False
    dns_names: tuple[str, ...] = ()
    ip_addresses: tuple[str, ...] = ()
    subject: tuple[tuple[x509.ObjectIdentifier, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that no other device has."""
        return self.dns_names + self.ip_addresses


ONLY_UUID = DeviceContents()
_BESIDE_COMMON_NAME = frozenset({NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.SERIAL_NUMBER})


def _key_usage(*, digital_signature: bool = False, ca: bool = False) -> Extension:
    return extension(
        x509.KeyUsage(
            digital_signature=digital_signature,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=ca,
            crl_sign=ca,
            encipher_only=False,
            decipher_only=False,
        ),
        critical=True,
    )


_ROOT = (
    extension(x509.BasicConstraints(ca=True, path_length=1), critical=True),
    _key_usage(ca=True),
)
# digitalSignature lets the CA sign OCSP responses under its own name (RFC 6960 §4.2.2.2, RFC 5280 §4.2.1.3). The
# extended key usages limit the certificates below it to TLS; OCSPSigning counts in the responder's certificate only.
_ISSUING = (
    extension(x509.BasicConstraints(ca=True, path_length=0), critical=True),
    _key_usage(digital_signature=True, ca=True),
    extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])),
)
_END_ENTITY = (
    extension(x509.BasicConstraints(ca=False, path_length=None), critical=True),
    _key_usage(digital_signature=True),  # for RSA, too: in TLS with forward secrecy a key only signs
)
_DEVICE = (*_END_ENTITY, extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])))
_DEVICE_AND_SERVER = (
    *_END_ENTITY,
    extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])),
)
_SERVER = (*_END_ENTITY, extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])))
_RESPONDER = (
    *_END_ENTITY,
    extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])),
    extension(x509.OCSPNoCheck()),
)


def root_profile(common_name: str) -> Profile:
    """Return the profile of a root: it signs issuing CAs, which cannot sign further CAs."""
    return Profile(_ca_subject(common_name), _ROOT)


def requested_extensions() -> tuple[Extension, ...]:
    """Return the extensions that the certificate of an issuing CA should get from whoever signs its request."""
    return _ISSUING


def issuing_profile(common_name: str) -> Profile:
    """Return the profile of a CA that signs end entities only (pathLenConstraint 0).

    Its own revocation is published by the root's CRL only. The root's key is usually kept offline, so an OCSP URL would
    lead to no response, and strict clients would then reject everything below this CA.
    """
    return Profile(_ca_subject(common_name), _ISSUING, RevocationInfo.CRL)


def device_profile(device_id: str, contents: DeviceContents = ONLY_UUID) -> Profile:
    """Return the profile of a TLS client named by its UUID, in lower case, as CN and as urn:uuid (RFC 9562 §4).

    The CN is the one attribute of its kind, whatever ``contents`` has: the broker knows the device by it.
    """
    if not _UUID.fullmatch(device_id):
        raise InputInvalid("The device id must be a UUID in lower-case text.")
    if any(oid not in _BESIDE_COMMON_NAME for oid, _ in contents.subject):
        raise ValueError("a device's subject has O, OU, serialNumber and its CN only")
    attributes = [x509.NameAttribute(oid, value) for oid, value in contents.subject]
    subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, device_id)])
    san = x509.SubjectAlternativeName(
        [
            x509.UniformResourceIdentifier(f"urn:uuid:{device_id}"),
            *map(x509.DNSName, contents.dns_names),
            *(x509.IPAddress(ipaddress.ip_address(address)) for address in contents.ip_addresses),
        ]
    )
    return Profile(subject, (*(_DEVICE_AND_SERVER if contents.server_auth else _DEVICE), extension(san)))


def server_profile(names: Sequence[str]) -> Profile:
    """Return the profile of a TLS server (RFC 9525); raises ``SettingInvalid`` unless names are DNS names or IPs."""
    if not names:
        raise SettingInvalid("A server certificate needs at least one DNS name or IP address.")
    fits = len(names[0]) <= COMMON_NAME_LIMIT
    subject = _subject(names[0]) if fits else x509.Name([])
    san = x509.SubjectAlternativeName([_server_name(name) for name in dict.fromkeys(names)])
    # With an empty subject the alternative names must be critical (RFC 5280 §4.1.2.6).
    return Profile(subject, (*_SERVER, extension(san, critical=not fits)))


def agent_profile(name: str) -> Profile:
    """Return the profile of an agent beside a broker elsewhere: a TLS client that no broker takes for a device.

    Its name has a plus sign, which no identity in a journal has, and by which Mosquitto applies no ACL pattern.
    """
    if not DNS_LABEL.fullmatch(name):
        raise InputInvalid("The name of a broker must be 1 to 63 lower-case letters, digits and inner hyphens.")
    return Profile(_subject(agent_name(name)), _DEVICE)


def agent_name(broker: str) -> str:
    """Return the common name in the certificate of a broker's agent."""
    return _own_name("agent", broker)


def questioner_profile(node: str) -> Profile:
    """Return the profile of a RabbitMQ node that asks about its clients: a TLS client that is none of them itself."""
    return Profile(_subject(questioner_name(node)), _DEVICE)


def questioner_name(node: str) -> str:
    """Return the common name in the certificate of a RabbitMQ node, which no identity in a journal has."""
    return _own_name("rabbitmq", node)


def _own_name(kind: str, name: str) -> str:
    whole = f"{kind}+{name}"
    return whole if len(whole) <= COMMON_NAME_LIMIT else f"{kind}+{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def responder_profile(issuer_name: str) -> Profile:
    """Return the profile of a CA's OCSP responder, whose own revocation is not checked (RFC 6960 §4.2.2.2.1)."""
    return Profile(_subject(f"OCSP responder of {issuer_name}"[:COMMON_NAME_LIMIT]), _RESPONDER, RevocationInfo.NONE)


@lru_cache(maxsize=64)
def locations(pki_url: str, issuer_name: str, revocation: RevocationInfo) -> tuple[Extension, ...]:
    """Return the extensions with the URLs of CRL, issuer and OCSP (RFC 5280 §4.2.1.13, §4.2.2.1), below ``pki_url``."""
    if revocation is RevocationInfo.NONE:
        return ()
    if not _URL.fullmatch(pki_url):
        raise SettingInvalid("The base of the URLs in certificates must be an http:// URL in ASCII.")
    base = pki_url.rstrip("/")
    crl = x509.UniformResourceIdentifier(f"{base}/crl/{issuer_name}.crl")
    certificate = x509.UniformResourceIdentifier(f"{base}/ca/{issuer_name}.cer")
    point = x509.DistributionPoint(full_name=[crl], relative_name=None, reasons=None, crl_issuer=None)
    access = [x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, certificate)]
    if revocation is RevocationInfo.CRL_AND_OCSP:
        ocsp = x509.UniformResourceIdentifier(f"{base}/ocsp")
        access.append(x509.AccessDescription(AuthorityInformationAccessOID.OCSP, ocsp))
    return extension(x509.CRLDistributionPoints([point])), extension(x509.AuthorityInformationAccess(access))


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _ca_subject(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= COMMON_NAME_LIMIT or not common_name.isprintable():
        raise SettingInvalid(f"The name of a CA must have 1 to {COMMON_NAME_LIMIT} printable characters.")
    return _subject(common_name)


def _server_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        if "%" in name:
            raise SettingInvalid(f"{name!r} has a zone; a server certificate can only hold the address without it.")
        return x509.IPAddress(address)
    labels = name.removeprefix("*.").split(".")
    if len(name) > MAX_DNS_NAME or labels[-1].isdigit() or not all(DNS_LABEL.fullmatch(label) for label in labels):
        raise SettingInvalid(f"{name!r} cannot be in a server certificate; it must be a DNS name or an IP address.")
    return x509.DNSName(name)
