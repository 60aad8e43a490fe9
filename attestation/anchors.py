"""Trust anchors: the registered certificates and public keys, and the path from one to the evidence's signer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key, load_pem_public_key

from attestation.refusals import (
    AlgorithmRefused,
    AnchorExpired,
    AnchorUnknown,
    SignatureInvalid,
    SignerCertificateRefused,
)
from core.errors import AttestationPolicyInvalid, KeyRefused
from pki import foreign
from pki.algorithms import PublicKey, check_public_key, public_key_der
from pki.client_certificates import MAX_CERTIFICATE_BYTES, is_issued_by, is_permitted_by
from pki.encoding import failing_as
from pki.foreign import ForeignCertificate

MAX_CHAIN = 5  # certificates in the evidence, the signer's included
_MAX_KEYS_TRIED = 32  # public keys, where nothing in the evidence says which


class Algorithm(StrEnum):
    """A signature algorithm of JOSE and COSE that is accepted, by its name in JOSE (RFC 7518 §3.1, RFC 8037 §3.1)."""

    ES256 = "ES256"
    ES384 = "ES384"
    EDDSA = "EdDSA"


class SignerPurpose(StrEnum):
    """What a signer's certificate is for: the extended key usage that it needs (TCG OIDs), or none."""

    SIGNATURES = ""
    ENDORSEMENT = "2.23.133.8.1"  # tcg-kp-EKCertificate
    ATTESTATION_KEY = "2.23.133.8.3"  # tcg-kp-AIKCertificate


@dataclass(frozen=True, slots=True)
class Anchor:
    """A certificate of a CA or of a signer, or else a signer's bare public key (SubjectPublicKeyInfo), in DER.

    ``identifier`` is what the evidence names a bare key by: a key id, a UEID or an instance id. If it is empty, the key
    is tried for all evidence that names none of the others. A CA whose certificates are what devices enrol by vouches
    for nothing, and no signature by one of them counts: each device could make evidence about every other.
    """

    der: bytes
    is_certificate: bool
    identifier: bytes = b""
    is_of_devices: bool = False

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the DER, in hex."""
        return hashlib.sha256(self.der).hexdigest()


@dataclass(frozen=True, slots=True)
class EvidenceSigner:
    """A key that may have signed the evidence, with the anchor that vouches for it and its certificate, if any."""

    key: PublicKey
    anchor: Anchor
    certificate: ForeignCertificate | None = None


def read_anchor(pem: str, identifier: bytes = b"", *, now: datetime | None) -> Anchor:
    """Read a trust anchor that is to be registered: one certificate, or one public key, in PEM.

    Raises ``AttestationPolicyInvalid`` if it cannot be read, its key is not of an accepted kind, or it is not valid
    ``now``; with ``None`` it may have expired.
    """
    unreadable = AttestationPolicyInvalid("An anchor is neither one certificate nor one public key in PEM.")
    try:
        if "BEGIN PUBLIC KEY" in pem:
            with failing_as(unreadable):
                key = load_pem_public_key(pem.encode())
            return Anchor(public_key_der(check_public_key(key)), False, identifier)
        with failing_as(unreadable):
            [loaded] = x509.load_pem_x509_certificates(pem.encode())
            certificate = foreign.read_certificate(loaded.public_bytes(Encoding.DER))
            key = certificate.strict.public_key()
        check_public_key(key)
    except KeyRefused as error:
        raise AttestationPolicyInvalid(f"The key of an anchor is not accepted. {error.detail}") from error
    if identifier:
        raise AttestationPolicyInvalid("An identifier goes with a public key; leave it out for a certificate.")
    if now is not None and not is_valid_at(certificate, now):
        raise AttestationPolicyInvalid("The certificate of an anchor has expired or is not valid yet.")
    return Anchor(certificate.der, True)


def signers(
    anchors: Sequence[Anchor], chain: Sequence[bytes], names: Iterable[bytes], *, purpose: SignerPurpose, now: datetime
) -> list[EvidenceSigner]:
    """Return the keys that may have signed: that of the certificate at the head of ``chain``, else registered keys.

    ``names`` are the identifiers in the evidence. Raises ``AnchorUnknown`` if there is no key, or as ``certified``.
    """
    if chain:
        return [certified(anchors, chain, purpose=purpose, now=now)]
    bare = [anchor for anchor in anchors if not anchor.is_certificate]
    wanted = {name for name in names if name}
    chosen = [anchor for anchor in bare if anchor.identifier in wanted]
    chosen = chosen or [anchor for anchor in bare if not anchor.identifier]
    if not chosen:
        raise AnchorUnknown("No trust anchor is registered for the key that signed the evidence.")
    return [EvidenceSigner(_bare_key(anchor), anchor) for anchor in chosen[:_MAX_KEYS_TRIED]]


def _bare_key(anchor: Anchor) -> PublicKey:
    unreadable = AnchorUnknown("The registered trust anchor has a key that cannot be read, or is not accepted.")
    with failing_as(unreadable):
        key = load_der_public_key(anchor.der)
    try:
        return check_public_key(key)
    except KeyRefused as error:
        raise unreadable from error


def certified(
    anchors: Sequence[Anchor], chain: Sequence[bytes], *, purpose: SignerPurpose, now: datetime
) -> EvidenceSigner:
    """Follow a chain of certificates (DER), the signer's first, to a registered anchor (RFC 5280 §6.1).

    ``purpose`` decides about the usages that the signer's certificate must have. Raises ``SignerCertificateRefused``,
    ``AnchorUnknown`` or ``AnchorExpired``.
    """
    if len(chain) > MAX_CHAIN:
        raise SignerCertificateRefused(f"The evidence has more than {MAX_CHAIN} certificates.")
    first, *others = [_read(der) for der in chain]
    key = _key_of(first)
    _check_signer(first, purpose, now)
    registered = [anchor for anchor in anchors if anchor.is_certificate and not anchor.is_of_devices]
    is_pinned = any(anchor.der == first.der for anchor in registered)
    if not is_pinned and any(anchor.is_of_devices and is_issued_by(first, anchor.der) for anchor in anchors):
        raise SignerCertificateRefused(
            "The signer's certificate is one by which a device enrols or connects: it could vouch for every other one."
        )
    anchor = _anchor_of(first, others, registered, now)
    return EvidenceSigner(key, anchor, first)


def _read(der: bytes) -> ForeignCertificate:
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise SignerCertificateRefused(f"A certificate in the evidence is longer than {MAX_CERTIFICATE_BYTES} bytes.")
    try:
        return foreign.read_certificate(der)
    except ValueError as error:
        raise SignerCertificateRefused(f"A certificate in the evidence cannot be read: it {error}.") from error


def _key_of(certificate: ForeignCertificate) -> PublicKey:
    with failing_as(SignerCertificateRefused("The key in the signer's certificate cannot be read.")):
        key = certificate.strict.public_key()
    try:
        return check_public_key(key)
    except KeyRefused as error:
        raise SignerCertificateRefused(
            f"The key in the signer's certificate is not accepted. {error.detail}"
        ) from error


def _check_signer(certificate: ForeignCertificate, purpose: SignerPurpose, now: datetime) -> None:
    if not is_valid_at(certificate, now):
        raise SignerCertificateRefused("The signer's certificate has expired or is not valid yet.")
    purposes: set[str] = set()
    for extension in certificate.strict.extensions:
        match extension.value:
            case x509.BasicConstraints(ca=True):
                raise SignerCertificateRefused("The signer's certificate is that of a CA.")
            case x509.KeyUsage(digital_signature=False) if purpose is not SignerPurpose.ENDORSEMENT:
                raise SignerCertificateRefused("The key of the signer's certificate is not for signatures.")
            case x509.ExtendedKeyUsage() as usages:
                purposes = {oid.dotted_string for oid in usages}
            case x509.UnrecognizedExtension() if extension.critical:
                raise SignerCertificateRefused("The signer's certificate has a critical extension that is not known.")
    if purpose and purpose not in purposes:
        raise SignerCertificateRefused(f"The signer's certificate is not for this: it lacks the usage {purpose}.")


def _anchor_of(
    certificate: ForeignCertificate, others: list[ForeignCertificate], registered: Sequence[Anchor], now: datetime
) -> Anchor:
    """Climb from certificate to issuer until a registered one is met; at most as often as there are certificates."""
    below = 0  # CA certificates between the signer and the one looked at
    while True:
        found = [anchor for anchor in registered if anchor.der == certificate.der or _vouches(anchor.der, certificate)]
        if found:
            valid = [anchor for anchor in found if is_valid_at(foreign.read_certificate(anchor.der), now)]
            if not valid:
                raise AnchorExpired("The registered trust anchor of this evidence has expired or is not valid yet.")
            return _permitting(valid, certificate, below)
        issuer = next((other for other in others if _vouches(other.der, certificate)), None)
        if issuer is None:
            raise AnchorUnknown("The certificate of the evidence's signer does not lead to a registered trust anchor.")
        _check_authority(issuer, below, now)
        others = [other for other in others if other is not issuer]
        certificate, below = issuer, below + 1


def _vouches(issuer_der: bytes, certificate: ForeignCertificate) -> bool:
    return is_issued_by(certificate, issuer_der) and is_permitted_by(certificate, issuer_der)


def _permitting(anchors: list[Anchor], certificate: ForeignCertificate, below: int) -> Anchor:
    """Return the first anchor that may have issued what is below it; a pinned certificate issues nothing."""
    for anchor in anchors:
        if anchor.der == certificate.der or _is_authority(foreign.read_certificate(anchor.der), below):
            return anchor
    raise AnchorUnknown("The registered trust anchor is not a CA that may issue the certificates in the evidence.")


def _check_authority(certificate: ForeignCertificate, below: int, now: datetime) -> None:
    if not is_valid_at(certificate, now):
        raise SignerCertificateRefused("A CA certificate in the evidence has expired or is not valid yet.")
    if not _is_authority(certificate, below):
        raise SignerCertificateRefused("A certificate in the evidence may not issue the one below it.")


def _is_authority(certificate: ForeignCertificate, below: int) -> bool:
    """Return whether this is a CA's certificate, and its path length permits so many CA certificates below it."""
    is_authority, may_sign = False, True
    for extension in certificate.strict.extensions:
        match extension.value:
            case x509.BasicConstraints(ca=ca, path_length=length):
                is_authority = ca and (length is None or length >= below)
            case x509.KeyUsage(key_cert_sign=key_cert_sign):
                may_sign = key_cert_sign
            case x509.UnrecognizedExtension() if extension.critical:
                return False
    return is_authority and may_sign


def is_valid_at(certificate: ForeignCertificate, now: datetime) -> bool:
    """Return whether ``now`` is within the certificate's dates."""
    return certificate.strict.not_valid_before_utc <= now <= certificate.strict.not_valid_after_utc


# --- Signatures of JOSE and COSE ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A JWS or a COSE_Sign1 that was read, and not verified yet."""

    signed: bytes  # what the signature is of
    payload: bytes
    signature: bytes = field(repr=False)
    algorithm: Algorithm
    key_id: bytes
    chain: tuple[bytes, ...]  # of certificates, DER, the signer's first

    def verify(self, anchors: Sequence[Anchor], names: Sequence[bytes], *, now: datetime) -> EvidenceSigner:
        """Return the registered signer under whose key the signature verifies.

        ``names`` are identifiers in the claims by which a bare key may be registered, besides the key id in the header.
        Raises what ``signers`` and ``signed_by`` do.
        """
        candidates = signers(anchors, self.chain, (self.key_id, *names), purpose=SignerPurpose.SIGNATURES, now=now)
        return signed_by(candidates, self.algorithm, self.signature, self.signed)


def signed_by(
    candidates: Sequence[EvidenceSigner], algorithm: Algorithm, signature: bytes, content: bytes
) -> EvidenceSigner:
    """Return the first of the signers under whose key the signature verifies.

    An ECDSA signature is r and s side by side (RFC 7518 §3.4, RFC 9053 §2.1). Raises ``AlgorithmRefused`` if the
    algorithm is for no key of theirs, or ``SignatureInvalid``.
    """
    fitting = [signer for signer in candidates if _fits(signer.key, algorithm)]
    if not fitting:
        raise AlgorithmRefused("The evidence is signed with an algorithm that is not for a key of its signer's kind.")
    for signer in fitting:
        if _is_signed(signer.key, signature, content):
            return signer
    raise SignatureInvalid("The signature of the evidence does not verify under its signer's key.")


def _fits(key: PublicKey, algorithm: Algorithm) -> bool:
    match key:
        case ec.EllipticCurvePublicKey():
            return algorithm is (Algorithm.ES256 if key.curve.key_size == 256 else Algorithm.ES384)
        case ed25519.Ed25519PublicKey():
            return algorithm is Algorithm.EDDSA
    return False


def _is_signed(key: PublicKey, signature: bytes, content: bytes) -> bool:
    try:
        match key:
            case ec.EllipticCurvePublicKey():
                size = key.curve.key_size // 8
                if len(signature) != 2 * size:
                    return False
                r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
                digest = hashes.SHA256() if size == 32 else hashes.SHA384()
                key.verify(encode_dss_signature(r, s), content, ec.ECDSA(digest))
            case ed25519.Ed25519PublicKey():
                key.verify(signature, content)
            case _:
                return False
    except InvalidSignature:
        return False
    return True
