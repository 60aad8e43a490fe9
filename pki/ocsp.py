"""Read OCSP requests and sign the responses to them (RFC 6960)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, OCSPExtensionOID, SignatureAlgorithmOID
from pyasn1.codec.der import decoder
from pyasn1.type import namedtype, tag, univ, useful
from pyasn1.type.base import Asn1Item
from pyasn1_modules import rfc5280, rfc6960

from core.errors import IssuerUnusable, RequestMalformed, SignatureCheckFailed
from pki.encoding import encode, explicit, failing_as
from pki.issuers import Issuer, Reason, whole_second

MAX_BYTES = 32 * 1024  # of a request
MAX_CERTIFICATES = 100  # in a request
MAX_EXTENSIONS = 8  # in a list; RFC 6960 §4.4 knows three for a whole request, and one for each certificate
# Some clients write what DER leaves out, such as the default version. cryptography refuses that; pyasn1 reads it, but
# takes up to 3 µs for each byte.
MAX_LAX_BYTES = 4096
NONCE_BYTES = range(1, 129)  # RFC 9654 §2.1: shorter and longer ones are to be refused as malformed

# The hashes by which a request may name an issuer, by OID. Most clients use SHA-1, which proves nothing here.
_HASHES: dict[str, hashes.HashAlgorithm] = {
    "1.3.14.3.2.26": hashes.SHA1(),  # noqa: S303
    "2.16.840.1.101.3.4.2.1": hashes.SHA256(),
    "2.16.840.1.101.3.4.2.2": hashes.SHA384(),
    "2.16.840.1.101.3.4.2.3": hashes.SHA512(),
}
_OIDS = {algorithm.name: oid for oid, algorithm in _HASHES.items()}
_NONCE = OCSPExtensionOID.NONCE.dotted_string
_SHA256 = hashes.SHA256()
_ECDSA = ec.ECDSA(_SHA256)
_NULL = encode(univ.Null(""))
# CRLReason (RFC 5280 §5.3.1); "unspecified" is expressed by leaving the reason out.
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

IssuerId = tuple[str, bytes, bytes]  # OID of the hash algorithm, hash of the issuer's name, hash of its key


class Failure(IntEnum):
    """Tell why there is no signed response: an OCSPResponseStatus (RFC 6960 §4.2.1)."""

    MALFORMED_REQUEST = 1
    INTERNAL_ERROR = 2
    TRY_LATER = 3
    UNAUTHORIZED = 6


class CertStatus(StrEnum):
    """The status of a certificate (RFC 6960 §2.2)."""

    GOOD = "good"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a certificate; ``revoked_at`` and ``reason`` count only if it is revoked."""

    cert_status: CertStatus
    revoked_at: datetime | None = None
    reason: Reason = Reason.UNSPECIFIED


UNKNOWN = Status(CertStatus.UNKNOWN)
GOOD = Status(CertStatus.GOOD)
_CERT_STATUSES = {cert_status: ocsp.OCSPCertStatus[cert_status.name] for cert_status in CertStatus}
_REASON_FLAGS = {reason: x509.ReasonFlags[reason.value] for reason in _REASON_NUMBERS}


# --- Requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """One certificate that a request asks about; ``serial_number`` is lower-case hex without leading zeros.

    ``parameters`` are those of the hash algorithm, in DER: NULL, or empty if the request left them out.
    """

    issuer: IssuerId
    serial_number: str
    parameters: bytes = field(default=_NULL, repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was understood; ``nonce`` is the value of that extension, which the response repeats."""

    questions: tuple[Question, ...]
    nonce: bytes | None


def _left_encoded(number: int) -> univ.SequenceOf:
    """Return the schema of an optional part under the explicit tag ``[number]`` that is not decoded.

    An Any with that tag would not do: pyasn1 would take parts with other tags for it.
    """
    context_tag = tag.Tag(tag.tagClassContext, tag.tagFormatConstructed, number)
    return univ.SequenceOf(componentType=univ.Any()).subtype(implicitTag=context_tag)


# As in RFC 6960 §4.1.1, except that requestor and signature are not decoded, requests and extensions only once they
# are counted: pyasn1 takes 30 to 80 µs for each, so a request of 32 KB could take it 0.1 s.
_SINGLE_REQUEST = univ.Sequence(
    componentType=namedtype.NamedTypes(
        namedtype.NamedType("reqCert", rfc6960.CertID()),
        namedtype.OptionalNamedType("singleRequestExtensions", explicit(0, univ.SequenceOf(componentType=univ.Any()))),
    )
)
_TBS_REQUEST = univ.Sequence(
    componentType=namedtype.NamedTypes(
        namedtype.DefaultedNamedType("version", rfc6960.TBSRequest()["version"]),
        namedtype.OptionalNamedType("requestorName", _left_encoded(1)),
        namedtype.NamedType("requestList", univ.SequenceOf(componentType=univ.Any())),
        namedtype.OptionalNamedType("requestExtensions", explicit(2, univ.SequenceOf(componentType=univ.Any()))),
    )
)
_OCSP_REQUEST = univ.Sequence(
    componentType=namedtype.NamedTypes(
        namedtype.NamedType("tbsRequest", _TBS_REQUEST),
        namedtype.OptionalNamedType("optionalSignature", _left_encoded(0)),
    )
)


def read_request(der: bytes) -> Request:
    """Read an OCSPRequest (RFC 6960 §4.1.1); neither its signature nor its requestor's name is checked.

    Raises ``RequestMalformed`` if it is not DER of that form, asks about no certificate or more than
    ``MAX_CERTIFICATES``, has a nonce that is not 1 to 128 bytes long (RFC 9654 §2.1), an unknown critical extension,
    or in one place the same extension twice or more than ``MAX_EXTENSIONS``.
    An unknown hash algorithm is no error: it names an issuer that is not one of the portal's.
    """
    if len(der) > MAX_BYTES:
        raise RequestMalformed(f"The OCSP request is longer than {MAX_BYTES} bytes; ask about fewer certificates.")
    with failing_as(RequestMalformed("The OCSP request is not DER of the form that RFC 6960 gives it.")):
        try:
            request = ocsp.load_der_ocsp_request(der)
        except NotImplementedError:  # for several certificates
            return _read_any(der)
        except ValueError:
            if len(der) > MAX_LAX_BYTES:
                raise
            return _read_any(der)
        return _read_plain(request, der) or _read_any(der)


def _read_plain(request: ocsp.OCSPRequest, der: bytes) -> Request | None:
    """Take over a request for one certificate with at most a nonce, as nearly all are; None if it has other parts.

    ``cryptography`` reads it in a tenth of the time that pyasn1 takes, but does not give access to some parts. There
    are none of those if the parts that it gives, encoded again, are the same bytes.
    """
    try:
        if request.hash_algorithm.name not in _OIDS:
            return None
        name_hash, key_hash, algorithm = request.issuer_name_hash, request.issuer_key_hash, request.hash_algorithm
        builder = ocsp.OCSPRequestBuilder().add_certificate_by_hash(
            name_hash, key_hash, request.serial_number, algorithm
        )
        nonce = None
        for item in request.extensions:
            if not isinstance(item.value, x509.OCSPNonce) or len(item.value.nonce) not in NONCE_BYTES:
                return None
            builder = builder.add_extension(item.value, item.critical)
            nonce = item.value.public_bytes()
        if builder.build().public_bytes(Encoding.DER) != der:
            return None
    except (ValueError, UnsupportedAlgorithm):  # an unknown hash, or a serial number that cryptography does not write
        return None
    return Request((Question((_OIDS[algorithm.name], name_hash, key_hash), f"{request.serial_number:x}"),), nonce)


def _read_any(der: bytes) -> Request:
    request, rest = decoder.decode(der, asn1Spec=_OCSP_REQUEST)
    tbs = request["tbsRequest"]
    if rest:
        raise ValueError("the request is followed by other bytes")
    if tbs["version"] != 0:
        raise RequestMalformed("The OCSP request is of an unknown version; send version 1.")
    if not 1 <= len(tbs["requestList"]) <= MAX_CERTIFICATES:
        raise RequestMalformed(f"An OCSP request asks about 1 to {MAX_CERTIFICATES} certificates.")
    questions = tuple(_question(bytes(item)) for item in tbs["requestList"])
    return Request(questions, _nonce(_extensions(tbs["requestExtensions"])))


def _question(der: bytes) -> Question:
    single, _ = decoder.decode(der, asn1Spec=_SINGLE_REQUEST)
    _refuse_critical(_extensions(single["singleRequestExtensions"]))
    cert_id = single["reqCert"]
    algorithm = cert_id["hashAlgorithm"]
    issuer = (str(algorithm["algorithm"]), bytes(cert_id["issuerNameHash"]), bytes(cert_id["issuerKeyHash"]))
    parameters = bytes(algorithm["parameters"]) if algorithm["parameters"].isValue else b""
    if parameters not in (b"", _NULL):
        raise ValueError("a hash algorithm has no parameters but NULL")
    return Question(issuer, f"{int(cert_id['serialNumber']):x}", parameters)


def _extensions(encoded: univ.SequenceOf) -> list[rfc5280.Extension]:
    if len(encoded) > MAX_EXTENSIONS:
        raise RequestMalformed(f"An OCSP request has at most {MAX_EXTENSIONS} extensions in one place.")
    extensions = [decoder.decode(bytes(item), asn1Spec=rfc5280.Extension())[0] for item in encoded]
    if len({str(item["extnID"]) for item in extensions}) < len(extensions):
        raise RequestMalformed("An OCSP request may have an extension only once in one place.")
    return extensions


def _nonce(extensions: Sequence[rfc5280.Extension]) -> bytes | None:
    nonces = [bytes(item["extnValue"]) for item in extensions if str(item["extnID"]) == _NONCE]
    _refuse_critical([item for item in extensions if str(item["extnID"]) != _NONCE])
    if not nonces:
        return None
    value, rest = decoder.decode(nonces[0], asn1Spec=univ.OctetString())
    if rest or len(value) not in NONCE_BYTES:
        raise RequestMalformed("An OCSP request may have one nonce, of 1 to 128 bytes.")
    return nonces[0]


def _refuse_critical(extensions: Sequence[rfc5280.Extension]) -> None:
    if any(item["critical"] for item in extensions):
        raise RequestMalformed("The OCSP request has an unknown critical extension.")


def issuer_ids(issuer: Issuer) -> list[IssuerId]:
    """List the ids that requests may use for a CA: for each hash, those of its subject and of the bits of its key."""
    name = issuer.certificate.subject.public_bytes()
    info, _ = decoder.decode(issuer.public_key_der, asn1Spec=rfc5280.SubjectPublicKeyInfo())
    key = info["subjectPublicKey"].asOctets()

    def digest(algorithm: hashes.HashAlgorithm, content: bytes) -> bytes:
        return hashlib.new(algorithm.name, content, usedforsecurity=False).digest()

    return [(oid, digest(algorithm, name), digest(algorithm, key)) for oid, algorithm in _HASHES.items()]


# --- Responses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signer:
    """Key and certificate that respond for the CA ``issuer_name``.

    ``responder_id`` and ``certificates`` are the parts of a response that tell the responder, in DER; ``builder`` has
    them, too.
    """

    issuer_name: str
    certificate: x509.Certificate = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    responder_id: bytes = field(repr=False)
    certificates: bytes = field(repr=False)
    builder: ocsp.OCSPResponseBuilder = field(repr=False)
    not_before: datetime
    not_after: datetime


def _structure(**parts: Asn1Item) -> univ.Sequence:
    return univ.Sequence(componentType=namedtype.NamedTypes(*map(namedtype.NamedType, parts, parts.values())))


# As in RFC 6960 §4.2.1, with recurring parts encoded already. By these schemas, pyasn1 encodes plain values in a third
# of the time that it takes with the types of pyasn1_modules, which is longer than signing takes.
_CERT_ID = _structure(
    hash_algorithm=univ.Any(),
    issuer_name_hash=univ.OctetString(),
    issuer_key_hash=univ.OctetString(),
    serial_number=univ.Integer(),
)
_HASH_ALGORITHM = _structure(algorithm=univ.ObjectIdentifier(), parameters=univ.Any())
_SINGLE_RESPONSE = _structure(
    cert_id=_CERT_ID, cert_status=univ.Any(), this_update=univ.Any(), next_update=explicit(0, univ.Any())
)
_RESPONSE_DATA = _structure(
    responder_id=univ.Any(),
    produced_at=univ.Any(),
    responses=univ.SequenceOf(componentType=_SINGLE_RESPONSE),
    extensions=univ.Any(),
)
_NONCE_EXTENSIONS = explicit(
    1, univ.SequenceOf(componentType=_structure(oid=univ.ObjectIdentifier(), value=univ.OctetString()))
)
_BASIC_RESPONSE = _structure(
    data=univ.Any(), signature_algorithm=univ.Any(), signature=univ.BitString(), certificates=univ.Any()
)
_RESPONSE = _structure(
    status=univ.Any(),
    response_bytes=explicit(0, _structure(response_type=univ.ObjectIdentifier(), response=univ.OctetString())),
)
_SUCCESSFUL = encode(rfc6960.OCSPResponseStatus("successful"))
_ECDSA_WITH_SHA256 = encode(
    {"algorithm": SignatureAlgorithmOID.ECDSA_WITH_SHA256.dotted_string}, _structure(algorithm=univ.ObjectIdentifier())
)


def open_signer(pem: bytes, issuer: Issuer) -> Signer:
    """Read a responder's key and certificate: unencrypted PEM, in any order.

    Raises ``IssuerUnusable`` if they cannot be read, do not belong together, or are not those of this CA's responder.
    """
    with failing_as(IssuerUnusable(f"The OCSP responder's key and certificate of CA {issuer.name} cannot be used.")):
        certificate = x509.load_pem_x509_certificate(pem)
        key = load_pem_private_key(pem, None)
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError("the key is not of the kind that signs responses here")
        if key.public_key() != certificate.public_key() or ExtendedKeyUsageOID.OCSP_SIGNING not in usage:
            raise ValueError("the certificate is not the key's, or not for OCSP")
        certificate.verify_directly_issued_by(issuer.certificate)
        return Signer(
            issuer_name=issuer.name,
            certificate=certificate,
            key=key,
            # The SHA-1 hash of the key's bits (RFC 6960 §4.2.1), which is also the usual subject key identifier.
            responder_id=encode(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest, explicit(2, univ.OctetString())
            ),
            certificates=encode(
                [certificate.public_bytes(Encoding.DER)], explicit(0, univ.SequenceOf(componentType=univ.Any()))
            ),
            builder=ocsp.OCSPResponseBuilder()
            .responder_id(ocsp.OCSPResponderEncoding.HASH, certificate)
            .certificates([certificate]),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )


def sign_response(
    signer: Signer,
    answers: Sequence[tuple[Question, Status]],
    *,
    nonce: bytes | None,
    now: datetime,
    next_update: datetime,
) -> bytes:
    """Sign an OCSPResponse (RFC 6960 §4.2.1) that answers every question of a request, as DER.

    ``now``, cut to whole seconds, is thisUpdate. producedAt is the same, or what the machine's clock says when the
    response is signed, if that is between thisUpdate and ``next_update``.
    Raises ``SignatureCheckFailed`` if the result does not verify.
    """
    start, end = whole_second(now), whole_second(next_update)
    try:
        response = _sign_one(signer, *answers[0], nonce, start, end) if len(answers) == 1 else None
        if response is None or not start <= response.produced_at_utc <= end:
            return _sign_any(signer, answers, nonce, _time(start), _time(end))
        signer.key.public_key().verify(response.signature, response.tbs_response_bytes, _ECDSA)
    except (InvalidSignature, ValueError) as error:
        raise SignatureCheckFailed(
            "A new OCSP response did not verify and was thrown away; check the machine and the responder's key."
        ) from error
    return response.public_bytes(Encoding.DER)


def _sign_one(
    signer: Signer, question: Question, status: Status, nonce: bytes | None, start: datetime, end: datetime
) -> ocsp.OCSPResponse | None:
    """Sign the response for one certificate by ``cryptography``; None if it cannot repeat the certificate's id.

    It writes the parameters of a hash algorithm as NULL, knows no serial number below zero, and takes producedAt from
    the machine's clock.
    """
    oid, name_hash, key_hash = question.issuer
    serial_number = int(question.serial_number, 16)
    if oid not in _HASHES or question.parameters != _NULL or serial_number < 0:
        return None
    revoked = status.cert_status is CertStatus.REVOKED
    builder = signer.builder.add_response_by_hash(
        name_hash,
        key_hash,
        serial_number,
        _HASHES[oid],
        _CERT_STATUSES[status.cert_status],
        start,
        end,
        whole_second(status.revoked_at) if revoked and status.revoked_at else None,
        _REASON_FLAGS.get(status.reason) if revoked else None,
    )
    if nonce is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(OCSPExtensionOID.NONCE, nonce), critical=False)
    return builder.sign(signer.key, _SHA256)


def _sign_any(
    signer: Signer, answers: Sequence[tuple[Question, Status]], nonce: bytes | None, start: bytes, end: bytes
) -> bytes:
    """Sign a response that repeats whatever ids a request has, also some that ``cryptography`` would not read."""
    content = _response_data(signer, answers, nonce, start, end)
    signature = signer.key.sign(content, _ECDSA)
    signer.key.public_key().verify(signature, content, _ECDSA)
    basic = {
        "data": content,
        "signature_algorithm": _ECDSA_WITH_SHA256,
        "signature": univ.BitString.fromOctetString(signature),
        "certificates": signer.certificates,
    }
    response_bytes = {"response_type": rfc6960.id_pkix_ocsp_basic, "response": encode(basic, _BASIC_RESPONSE)}
    return encode({"status": _SUCCESSFUL, "response_bytes": response_bytes}, _RESPONSE)


def failure(reason: Failure) -> bytes:
    """Make an OCSPResponse without an answer, as DER; it is not signed (RFC 6960 §2.3)."""
    response = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus(reason.value))
    return response.public_bytes(Encoding.DER)


def _response_data(
    signer: Signer, answers: Sequence[tuple[Question, Status]], nonce: bytes | None, now: bytes, next_update: bytes
) -> bytes:
    responses = [
        {
            "cert_id": _cert_id(question),
            "cert_status": _cert_status(status),
            "this_update": now,
            "next_update": next_update,
        }
        for question, status in answers
    ]
    extensions = b"" if nonce is None else encode([{"oid": _NONCE, "value": nonce}], _NONCE_EXTENSIONS)
    return encode(
        {
            "responder_id": signer.responder_id,
            "produced_at": now,
            "responses": responses,
            "extensions": extensions,  # nothing if there is no nonce
        },
        _RESPONSE_DATA,
    )


def _cert_id(question: Question) -> dict[str, object]:
    algorithm, name_hash, key_hash = question.issuer
    return {
        "hash_algorithm": _hash_algorithm(algorithm, question.parameters),
        "issuer_name_hash": name_hash,
        "issuer_key_hash": key_hash,
        "serial_number": int(question.serial_number, 16),
    }


@lru_cache(maxsize=16)
def _hash_algorithm(oid: str, parameters: bytes) -> bytes:
    return encode({"algorithm": oid, "parameters": parameters}, _HASH_ALGORITHM)


def _cert_status(status: Status) -> bytes:
    if status.cert_status is not CertStatus.REVOKED:
        return _NOT_REVOKED[status.cert_status]
    if status.revoked_at is None:
        raise ValueError("a revoked certificate was revoked at some time")
    cert_status = rfc6960.CertStatus()
    cert_status["revoked"]["revocationTime"] = _utc_text(status.revoked_at)
    if status.reason in _REASON_NUMBERS:
        cert_status["revoked"]["revocationReason"] = _REASON_NUMBERS[status.reason]
    return encode(cert_status)


def _not_revoked(cert_status: CertStatus) -> bytes:
    encoded = rfc6960.CertStatus()
    encoded[cert_status.value] = ""
    return encode(encoded)


_NOT_REVOKED = {cert_status: _not_revoked(cert_status) for cert_status in (CertStatus.GOOD, CertStatus.UNKNOWN)}


@lru_cache(maxsize=16)
def _time(moment: datetime) -> bytes:
    return encode(useful.GeneralizedTime(_utc_text(moment)))


def _utc_text(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y%m%d%H%M%SZ}"
