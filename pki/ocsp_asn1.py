"""The structures of OCSP in ASN.1, after RFC 6960 appendix B."""

from __future__ import annotations

from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.x509 import ObjectIdentifier

# [n] EXPLICIT ANY is encoded as [n] IMPLICIT SEQUENCE OF ANY with one element is; the library has no optional ANY.
OneOfAnyKind = list[asn1.TLV]


@asn1.sequence
class AlgorithmIdentifier:
    """A hash or signature algorithm; those of OCSP have NULL as parameters, or none."""

    algorithm: ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class Extension:
    """An extension of a request, an answer or one of their parts (RFC 5280 §4.1)."""

    oid: ObjectIdentifier
    critical: Annotated[bool, asn1.Default(False)]
    value: bytes


@asn1.sequence
class CertId:
    """Names a certificate by hashes of its issuer's name and key, with its serial number."""

    hash_algorithm: AlgorithmIdentifier
    issuer_name_hash: bytes
    issuer_key_hash: bytes
    serial_number: int


# --- Requests -----------------------------------------------------------------------------------------------------


@asn1.sequence
class SingleRequest:
    """The question for one certificate."""

    cert_id: CertId
    extensions: Annotated[list[Extension] | None, asn1.Explicit(0)]


@asn1.sequence
class TbsRequest:
    """What a request says, whether signed or not."""

    version: Annotated[int | None, asn1.Explicit(0)]
    requestor_name: Annotated[OneOfAnyKind | None, asn1.Implicit(1)]
    requests: list[SingleRequest]
    extensions: Annotated[list[Extension] | None, asn1.Explicit(2)]


@asn1.sequence
class OcspRequest:
    """A request; its signature is not looked at, since everybody may ask (RFC 5019 §2.1.2)."""

    tbs: TbsRequest
    signature: Annotated[list[asn1.TLV] | None, asn1.Explicit(0)]


# --- Responses ----------------------------------------------------------------------------------------------------


@asn1.sequence
class RevokedInfo:
    """Since when a certificate is revoked, with why."""

    revocation_time: asn1.GeneralizedTime
    reason: Annotated[OneOfAnyKind | None, asn1.Implicit(0)]  # [0] EXPLICIT ENUMERATED


Good = asn1.Variant[asn1.Null, Literal["good"]]
Revoked = asn1.Variant[RevokedInfo, Literal["revoked"]]
Unknown = asn1.Variant[asn1.Null, Literal["unknown"]]


@asn1.sequence
class SingleResponse:
    """The answer for one certificate."""

    cert_id: CertId
    status: (
        Annotated[Good, asn1.Implicit(0)] | Annotated[Revoked, asn1.Implicit(1)] | Annotated[Unknown, asn1.Implicit(2)]
    )
    this_update: asn1.GeneralizedTime
    next_update: Annotated[asn1.GeneralizedTime | None, asn1.Explicit(0)]


@asn1.sequence
class ResponseData:
    """What is signed; the responder is named by the SHA-1 hash of its key (``[2] EXPLICIT``)."""

    responder_key_hash: Annotated[bytes, asn1.Explicit(2)]
    produced_at: asn1.GeneralizedTime
    responses: list[SingleResponse]
    extensions: Annotated[list[Extension] | None, asn1.Explicit(1)]


@asn1.sequence
class BasicResponse:
    """A signed answer with the responder's certificate."""

    data: ResponseData
    signature_algorithm: AlgorithmIdentifier
    signature: asn1.BitString
    certificates: Annotated[list[x509.Certificate], asn1.Explicit(0)]


@asn1.sequence
class ResponseBytes:
    """What kind of answer this is, with its encoding."""

    kind: ObjectIdentifier
    content: bytes


@asn1.sequence
class OcspResponse:
    """An answer, or where there are no ``response_bytes``, what kept it from being made."""

    status: asn1.TLV  # ENUMERATED
    response_bytes: Annotated[ResponseBytes | None, asn1.Explicit(0)]


@asn1.sequence
class SubjectPublicKeyInfo:
    """A public key (RFC 5280 §4.1.2.7); its hash in OCSP is that of the bits alone."""

    algorithm: asn1.TLV
    bits: asn1.BitString
