"""The certificate authority: makes key pairs, signs certificates and revokes them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from core.errors import IssuerUnusable, KeyRefused, ProfileRefused, SignatureCheckFailed
from pki.algorithms import (
    KeyType,
    PrivateKey,
    PublicKey,
    SignatureHash,
    check_public_key,
    generate_key,
    public_key_der,
    signature_hash,
    signature_identifier,
    signed,
)
from pki.certificates import tbs_certificate
from pki.crl import crl_entry
from pki.encoding import pem
from pki.foreign import read_certificate, read_name
from pki.issuers import (
    CLOCK_SKEW,
    ONLY_UUID,
    SERIAL_BITS,
    DeviceContents,
    Extension,
    Issuer,
    Profile,
    Reason,
    agent_profile,
    device_profile,
    extension,
    issuing_profile,
    locations,
    questioner_profile,
    requested_extensions,
    responder_profile,
    root_profile,
    server_profile,
    signing_key,
    whole_second,
)
from pki.name_constraints import NamesToCertify, violation
from pki.outer_chain import named


@dataclass(frozen=True)
class Issued:
    """A new certificate whose signature was verified; times are in UTC, ``pem`` ends with a newline."""

    certificate: x509.Certificate = field(repr=False)
    der: bytes = field(repr=False)
    pem: str = field(repr=False)
    serial_number: str  # 40 lower-case hex digits
    fingerprint: str  # SHA-256 of the DER, 64 lower-case hex digits
    key_fingerprint: str  # SHA-256 of the SubjectPublicKeyInfo, as the fingerprint
    not_before: datetime
    not_after: datetime


# --- Certificates -------------------------------------------------------------------------------------------------


def generate_keypair(key_type: KeyType) -> PrivateKey:
    """Make a new private key from the operating system's randomness."""
    return generate_key(key_type)


def create_root(key: PrivateKey, *, common_name: str, now: datetime, days: int) -> Issued:
    """Sign the root's own certificate, valid until ``days`` after ``now``."""
    public_key = check_public_key(key.public_key())
    return _signed(
        root_profile(common_name),
        public_key,
        public_key_der(public_key),
        key=key,
        algorithm=signature_hash(public_key),
        validity=(whole_second(now) - CLOCK_SKEW, _end(now, days)),
        issuer=None,
    )


def create_issuing(
    root: Issuer, public_key: PublicKey, *, common_name: str, now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign the certificate of an issuing CA, for ``days`` or until the root expires.

    ``pki_url`` is the base of the URLs put into certificates. Raises as ``sign_certificate`` does.
    """
    return _sign(root, public_key, issuing_profile(common_name), now=now, days=days, pki_url=pki_url)


def request_issuing(key: PrivateKey, *, subject: x509.Name) -> str:
    """Make the request (PKCS#10, RFC 2986, in PEM) by which another CA can certify the key as that of an issuing CA.

    It asks for the extensions that the portal's own root would give it. Raises ``SignatureCheckFailed``.
    """
    public_key = check_public_key(key.public_key())
    wanted = *requested_extensions(), extension(x509.SubjectKeyIdentifier.from_public_key(public_key))
    request = x509.CertificateSigningRequestBuilder(subject, list(wanted)).sign(key, signature_hash(public_key))
    if not request.is_signature_valid:
        raise SignatureCheckFailed(
            "A new request did not verify under its own key and was thrown away; check the machine and the key."
        )
    return request.public_bytes(Encoding.PEM).decode()


def sign_certificate(
    issuer: Issuer,
    public_key: PublicKey,
    *,
    device_id: str,
    now: datetime,
    days: int,
    pki_url: str,
    contents: DeviceContents = ONLY_UUID,
) -> Issued:
    """Sign a device's certificate: TLS client, named by its UUID (RFC 5280; its profile is in ``pki/issuers.py``).

    ``contents`` adds what the device's certificate profile has (``pki/profiles.py``).

    Valid from ``CLOCK_SKEW`` before ``now`` until ``days`` after it, within the validity of the issuer. Raises
    ``InputInvalid`` for an id that is not a UUID, ``KeyRefused`` for a key that is not certified, ``ProfileRefused``
    for names that the issuer may not certify, ``IssuerUnusable`` if the issuer has expired or its key is not on this
    machine, ``SignatureCheckFailed`` if the result does not verify.
    """
    return _sign(issuer, public_key, device_profile(device_id, contents), now=now, days=days, pki_url=pki_url)


def sign_server_certificate(
    issuer: Issuer, public_key: PublicKey, *, names: Sequence[str], now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign a TLS server's certificate for DNS names and IP addresses; raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, server_profile(names), now=now, days=days, pki_url=pki_url)


def sign_agent_certificate(
    issuer: Issuer, public_key: PublicKey, *, name: str, now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign the certificate by which the agent of a broker shows who it is; raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, agent_profile(name), now=now, days=days, pki_url=pki_url)


def sign_questioner_certificate(
    issuer: Issuer, public_key: PublicKey, *, node: str, now: datetime, days: int, pki_url: str
) -> Issued:
    """Sign the certificate by which a RabbitMQ node asks about its clients; raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, questioner_profile(node), now=now, days=days, pki_url=pki_url)


def sign_responder_certificate(issuer: Issuer, public_key: PublicKey, *, now: datetime, days: int) -> Issued:
    """Sign the certificate of this CA's OCSP responder (RFC 6960 §4.2.2.2); raises as ``sign_certificate`` does."""
    return _sign(issuer, public_key, responder_profile(issuer.name), now=now, days=days, pki_url="")


def revoke_certificate(serial_number: str, revoked_at: datetime, reason: Reason) -> x509.RevokedCertificate:
    """Make the CRL entry of a certificate (RFC 5280 §5.1.2.6, §5.3), which can be kept and put into many CRLs.

    ``serial_number`` is lower-case hex, ``revoked_at`` is cut to whole seconds. Raises ``ValueError`` for a
    serial number of another form.
    """
    return crl_entry(serial_number, revoked_at, reason)


def chain_pem(*certificates: x509.Certificate) -> str:
    """Encode certificates as PEM, one after the other: the leaf first (RFC 8446 §4.4.2)."""
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _sign(issuer: Issuer, public_key: PublicKey, profile: Profile, *, now: datetime, days: int, pki_url: str) -> Issued:
    key = signing_key(issuer)
    moment = whole_second(now)
    if not issuer.not_before <= moment < issuer.not_after:
        raise IssuerUnusable(
            f"The CA {issuer.name} is valid only from {issuer.not_before:%Y-%m-%d %H:%M}"
            f" to {issuer.not_after:%Y-%m-%d %H:%M} UTC; check the clock, or make a new CA."
        )
    public_key = check_public_key(public_key)
    encoded_key = public_key_der(public_key)
    if encoded_key == issuer.public_key_der:
        raise KeyRefused("The public key is the CA's own. Make a new key pair.")
    check_names(issuer, profile)
    return _signed(
        profile,
        public_key,
        encoded_key,
        issuer.authority_key_identifier,
        *locations(pki_url, issuer.url_name, profile.revocation),
        key=key,
        algorithm=issuer.signature_hash,
        validity=(max(moment - CLOCK_SKEW, issuer.not_before), min(_end(now, days), issuer.not_after)),
        issuer=issuer,
    )


def check_names(issuer: Issuer, profile: Profile) -> None:
    """Raise ``ProfileRefused`` if name constraints of the issuer, or of a CA above it, do not permit the names."""
    if not issuer.has_name_constraints:
        return
    extensions = {item.oid.dotted_string: item.value.public_bytes() for item in profile.extensions}
    names = NamesToCertify(read_name(profile.subject.public_bytes()), extensions)
    for one in (issuer.certificate, *issuer.above):
        if (violated := violation(names, read_certificate(_der(one)))) is not None:
            raise ProfileRefused(
                f"The CA {issuer.name} may not certify these names, by the name constraints of the CA {named(one)}:"
                f" {violated}."
            )


def _signed(
    profile: Profile,
    public_key: PublicKey,
    encoded_key: bytes,
    *extensions: Extension,
    key: PrivateKey,
    algorithm: SignatureHash,
    validity: tuple[datetime, datetime],
    issuer: Issuer | None,
) -> Issued:
    """Sign, then read the result back and verify it under the issuer's certificate (or itself, if that is None)."""
    subject = profile.subject.public_bytes()
    key_identifier = extension(x509.SubjectKeyIdentifier.from_public_key(public_key))
    content = tbs_certificate(
        serial_number=_new_serial_number(),
        signature=signature_identifier(key, algorithm),
        issuer=subject if issuer is None else issuer.subject_der,
        validity=validity,
        subject=subject,
        public_key=encoded_key,
        extensions=[one.der for one in (*profile.extensions, key_identifier, *extensions)],
    )
    der = signed(content, key, algorithm)
    certificate = x509.load_der_x509_certificate(der)
    try:
        certificate.verify_directly_issued_by(certificate if issuer is None else issuer.certificate)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise SignatureCheckFailed(
            "A new certificate did not verify under its issuer and was thrown away; check the machine and the CA's key."
        ) from error
    return Issued(
        certificate=certificate,
        der=der,
        pem=pem("CERTIFICATE", der),
        serial_number=f"{certificate.serial_number:x}",
        fingerprint=hashlib.sha256(der).hexdigest(),
        key_fingerprint=hashlib.sha256(encoded_key).hexdigest(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


# --- Shared -------------------------------------------------------------------------------------------------------


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _new_serial_number() -> int:
    """Draw 158 random bits after a leading 1: always 20 bytes, never zero, 40 hex digits in every tool."""
    return 1 << (SERIAL_BITS - 1) | secrets.randbits(SERIAL_BITS - 1)


def _end(now: datetime, days: int) -> datetime:
    if days < 1:
        raise ValueError("a certificate is valid for at least one day")
    return whole_second(now) + timedelta(days=days)
