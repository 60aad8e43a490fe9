"""Reads OCSP requests and signs the answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier, OCSPExtensionOID, SignatureAlgorithmOID

from core.errors import IssuerUnusable, RequestMalformed, SignatureCheckFailed
from pki.algorithms import public_key_der
from pki.encoding import failing_as
from pki.issuers import Issuer, Reason
from pki.ocsp_asn1 import (
    AlgorithmIdentifier,
    BasicResponse,
    CertId,
    Extension,
    Good,
    OcspRequest,
    OcspResponse,
    ResponseBytes,
    ResponseData,
    Revoked,
    RevokedInfo,
    SingleResponse,
    SubjectPublicKeyInfo,
    Unknown,
)

MOST_BYTES = 32 * 1024  # of a request
MOST_CERTIFICATES = 100  # in a request
NONCE_BYTES = range(1, 129)  # RFC 9654 §2.1: shorter and longer ones are to be refused as malformed

# The hashes by which a request may name an issuer, by their OIDs.
_HASHES: dict[str, hashes.HashAlgorithm] = {
    "1.3.14.3.2.26": hashes.SHA1(),  # noqa: S303 - a name, not a proof; most clients use this one
    "2.16.840.1.101.3.4.2.1": hashes.SHA256(),
    "2.16.840.1.101.3.4.2.2": hashes.SHA384(),
    "2.16.840.1.101.3.4.2.3": hashes.SHA512(),
}
_ECDSA = ec.ECDSA(hashes.SHA256())
_BASIC = ObjectIdentifier("1.3.6.1.5.5.7.48.1.1")
_ECDSA_WITH_SHA256 = AlgorithmIdentifier(algorithm=SignatureAlgorithmOID.ECDSA_WITH_SHA256, parameters=None)
# CRLReason (RFC 5280 §5.3.1); "unspecified" is said by saying nothing.
_REASON_NUMBERS = {
    Reason.KEY_COMPROMISE: 1,
    Reason.CA_COMPROMISE: 2,
    Reason.AFFILIATION_CHANGED: 3,
    Reason.SUPERSEDED: 4,
    Reason.CESSATION_OF_OPERATION: 5,
    Reason.CERTIFICATE_HOLD: 6,
    Reason.PRIVILEGE_WITHDRAWN: 9,
    Reason.AA_COMPROMISE: 10,
}

IssuerId = tuple[str, bytes, bytes]  # hash algorithm's OID, hash of the issuer's name, hash of its key


class Failure(IntEnum):
    """Why there is no answer (OCSPResponseStatus of RFC 6960 §4.2.1); said without a signature."""

    MALFORMED_REQUEST = 1
    INTERNAL_ERROR = 2
    TRY_LATER = 3
    UNAUTHORIZED = 6


class Verdict(StrEnum):
    """What is said of a certificate."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a certificate; ``revoked_at`` with ``reason`` belong to a revoked one alone."""

    verdict: Verdict
    revoked_at: datetime | None = None
    reason: Reason = Reason.UNSPECIFIED


UNKNOWN = Status(Verdict.UNKNOWN)
GOOD = Status(Verdict.GOOD)


# --- Requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """One certificate that a request asks about; ``serial_number`` is lower-case hex without leading zeros."""

    cert_id: CertId = field(repr=False)
    issuer: IssuerId
    serial_number: str


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was understood; ``nonce`` is the extension's value as it came, to be sent back."""

    questions: tuple[Question, ...]
    nonce: bytes | None


def read_request(der: bytes) -> Request:
    """Read an OCSPRequest (RFC 6960 §4.1.1); its signature and its requestor's name are not looked at.

    Raises ``RequestMalformed`` for what is no DER of that form, asks about no certificate or more than
    ``MOST_CERTIFICATES``, has a nonce that is not 1 to 128 bytes long (RFC 9654), or a critical extension that is
    not known here. A hash that is not known here is no fault: it names an issuer that is not one of ours.
    """
    with failing_as(RequestMalformed("The OCSP request is not DER of the form that RFC 6960 gives it.")):
        if len(der) > MOST_BYTES:
            raise RequestMalformed(f"The OCSP request is longer than {MOST_BYTES} bytes; ask about fewer certificates.")
        tbs = asn1.decode_der(OcspRequest, der).tbs
        if tbs.version not in (None, 0):
            raise RequestMalformed("The OCSP request is of a version that is not known; send version 1.")
        if not 1 <= len(tbs.requests) <= MOST_CERTIFICATES:
            raise RequestMalformed(f"An OCSP request asks about 1 to {MOST_CERTIFICATES} certificates.")
        for single in tbs.requests:
            _refuse_critical(single.extensions or [])
        return Request(tuple(_question(single.cert_id) for single in tbs.requests), _nonce(tbs.extensions or []))


def _question(cert_id: CertId) -> Question:
    issuer = (
        cert_id.hash_algorithm.algorithm.dotted_string,
        cert_id.issuer_name_hash,
        cert_id.issuer_key_hash,
    )
    return Question(cert_id, issuer, f"{cert_id.serial_number:x}")


def _nonce(extensions: Sequence[Extension]) -> bytes | None:
    nonces = [item for item in extensions if item.oid == OCSPExtensionOID.NONCE]
    _refuse_critical([item for item in extensions if item.oid != OCSPExtensionOID.NONCE])
    if not nonces:
        return None
    if len(nonces) > 1 or len(asn1.decode_der(bytes, nonces[0].value)) not in NONCE_BYTES:
        raise RequestMalformed("An OCSP request may have one nonce, of 1 to 128 bytes.")
    return nonces[0].value


def _refuse_critical(extensions: Sequence[Extension]) -> None:
    if any(item.critical for item in extensions):
        raise RequestMalformed("The OCSP request has a critical extension that is not known here.")


def issuer_ids(issuer: Issuer) -> list[IssuerId]:
    """The names that requests may have for a CA: for each hash, those of its subject and of the bits of its key."""
    name = issuer.certificate.subject.public_bytes()
    key = _key_bits(issuer.public_key_der)
    return [(oid, _hash(algorithm, name), _hash(algorithm, key)) for oid, algorithm in _HASHES.items()]


def _key_bits(public_key_info: bytes) -> bytes:
    return asn1.decode_der(SubjectPublicKeyInfo, public_key_info).bits.as_bytes()


def _hash(algorithm: hashes.HashAlgorithm, content: bytes) -> bytes:
    digest = hashes.Hash(algorithm)
    digest.update(content)
    return digest.finalize()


# --- Answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signer:
    """Key and certificate that answer for one CA, whose ``name`` it is; ``key_hash`` names it in its answers."""

    issuer_name: str
    certificate: x509.Certificate = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    key_hash: bytes = field(repr=False)
    not_before: datetime
    not_after: datetime


def open_signer(pem: bytes, issuer: Issuer) -> Signer:
    """Read a responder's key and certificate, PEM in the clear, one after the other in any order.

    Raises ``IssuerUnusable`` where they cannot be read, do not belong together, or are not this CA's responder's.
    """
    with failing_as(IssuerUnusable(f"The OCSP responder's key and certificate of CA {issuer.name} cannot be used.")):
        certificate = x509.load_pem_x509_certificate(pem)
        key = load_pem_private_key(pem, None)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("not a key that answers are signed with here")
        if key.public_key() != certificate.public_key() or ExtendedKeyUsageOID.OCSP_SIGNING not in usage:
            raise ValueError("not the key's own certificate, or none for OCSP")
        certificate.verify_directly_issued_by(issuer.certificate)
        key_hash = _hash(hashes.SHA1(), _key_bits(public_key_der(key.public_key())))  # noqa: S303 - RFC 6960 §4.2.1
        return Signer(
            issuer.name, certificate, key, key_hash, certificate.not_valid_before_utc, certificate.not_valid_after_utc
        )


def sign_answer(
    signer: Signer,
    answers: Sequence[tuple[Question, Status]],
    *,
    nonce: bytes | None,
    now: datetime,
    next_update: datetime,
) -> bytes:
    """Sign an OCSPResponse (RFC 6960 §4.2.1) that answers every question of a request, as DER.

    ``now``, cut to whole seconds, is producedAt and thisUpdate. Raises ``SignatureCheckFailed`` where the result does
    not verify.
    """
    this_update = _time(now)
    data = ResponseData(
        responder_key_hash=signer.key_hash,
        produced_at=this_update,
        responses=[_single(*answer, this_update, _time(next_update)) for answer in answers],
        extensions=None if nonce is None else [Extension(oid=OCSPExtensionOID.NONCE, critical=False, value=nonce)],
    )
    signed = asn1.encode_der(data)
    signature = signer.key.sign(signed, _ECDSA)
    try:
        signer.key.public_key().verify(signature, signed, _ECDSA)
    except InvalidSignature as error:
        raise SignatureCheckFailed(
            "A new OCSP answer did not verify and was thrown away; check the machine and the responder's key."
        ) from error
    basic = BasicResponse(
        data=data,
        signature_algorithm=_ECDSA_WITH_SHA256,
        signature=asn1.BitString(signature, 0),
        certificates=[signer.certificate],
    )
    return asn1.encode_der(
        OcspResponse(status=_enumerated(0), response_bytes=ResponseBytes(kind=_BASIC, content=asn1.encode_der(basic)))
    )


def failure(reason: Failure) -> bytes:
    """An OCSPResponse without an answer, as DER; it is not signed (RFC 6960 §2.3)."""
    return asn1.encode_der(OcspResponse(status=_enumerated(reason), response_bytes=None))


def _single(
    question: Question, status: Status, this_update: asn1.GeneralizedTime, next_update: asn1.GeneralizedTime
) -> SingleResponse:
    return SingleResponse(
        cert_id=question.cert_id, status=_status(status), this_update=this_update, next_update=next_update
    )


def _status(status: Status) -> Good | Revoked | Unknown:
    if status.verdict is Verdict.GOOD:
        return Good(asn1.Null(), "good")
    if status.verdict is Verdict.UNKNOWN:
        return Unknown(asn1.Null(), "unknown")
    if status.revoked_at is None:
        raise ValueError("a revoked certificate was revoked at some time")
    number = _REASON_NUMBERS.get(status.reason)
    reason = None if number is None else [_enumerated(number)]
    return Revoked(RevokedInfo(revocation_time=_time(status.revoked_at), reason=reason), "revoked")


def _enumerated(value: int) -> asn1.TLV:
    return asn1.decode_der(asn1.TLV, bytes((10, 1, value)))


def _time(moment: datetime) -> asn1.GeneralizedTime:
    return asn1.GeneralizedTime(moment.astimezone(UTC).replace(microsecond=0))
