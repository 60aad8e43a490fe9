"""OCSP requests that are as wanted, made of bytes, since cryptography makes none with a fault; how they are asked."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.ocsp import OCSPResponseStatus
from flask import Flask

from app import portal_of
from tests.support.harness import Api

HASHES = {
    "md5": "2a864886f70d0205",
    "sha1": "2b0e03021a",
    "sha224": "608648016503040204",
    "sha256": "608648016503040201",
    "sha384": "608648016503040202",
    "sha512": "608648016503040203",
}
NONCE, SERVICE_LOCATOR = "2b0601050507300102", "2b0601050507300107"


def tlv(tag: int, *parts: bytes) -> bytes:
    """One DER element."""
    content = b"".join(parts)
    if len(content) < 128:
        return bytes((tag, len(content))) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8)
    return bytes((tag, 128 | len(length))) + length + content


def sequence(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def oid(hexadecimal: str) -> bytes:
    return tlv(6, bytes.fromhex(hexadecimal))


def integer(number: int) -> bytes:
    return tlv(2, number.to_bytes(number.bit_length() // 8 + 1, signed=True))


def extension(kind: str, value: bytes, *, critical: bool = False) -> bytes:
    return sequence(oid(kind), tlv(1, b"\xff") if critical else b"", tlv(4, value))


def nonce(value: bytes) -> bytes:
    return extension(NONCE, tlv(4, value))


def cert_id(
    issuer: x509.Certificate,
    serial_number: int,
    *,
    algorithm: str = "sha1",
    parameters: bytes = b"\x05\x00",
    name_of: x509.Certificate | None = None,
    key_of: x509.Certificate | None = None,
) -> bytes:
    """A CertID; ``name_of`` and ``key_of`` take one of the two hashes from another CA."""

    def digest(content: bytes) -> bytes:
        return tlv(4, hashlib.new(algorithm, content, usedforsecurity=False).digest())

    # The bits of the key: what follows the headers of SubjectPublicKeyInfo, for the EC keys of the portal's CAs.
    info = (key_of or issuer).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    point = (key_of or issuer).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    assert info.endswith(point)
    return sequence(
        sequence(oid(HASHES[algorithm]), parameters),
        digest((name_of or issuer).subject.public_bytes()),
        digest(point),
        integer(serial_number),
    )


@dataclass(frozen=True)
class Ocsp:
    """An OCSPRequest; every part of it is DER that goes in as it is."""

    cert_ids: Sequence[bytes]
    version: bytes = b""
    requestor: bytes = b""
    single_extensions: bytes = b""
    extensions: Sequence[bytes] = field(default=())
    signature: bytes = b""

    def der(self) -> bytes:
        singles = tlv(0xA0, sequence(self.single_extensions)) if self.single_extensions else b""
        extensions = tlv(0xA2, sequence(*self.extensions)) if self.extensions else b""
        requests = sequence(*(sequence(each, singles) for each in self.cert_ids))
        return sequence(sequence(self.version, self.requestor, requests, extensions), self.signature)


def ask(issuer: x509.Certificate, *serial_numbers: int, algorithm: str = "sha1") -> Ocsp:
    """The plain question for certificates of one CA."""
    return Ocsp([cert_id(issuer, number, algorithm=algorithm) for number in serial_numbers])


# --- At a portal --------------------------------------------------------------------------------------------------


def issuing_of(app: Flask) -> x509.Certificate:
    return portal_of(app).authority.first.issuing.issuer.certificate


def post(api: Api, der: bytes, **options: Any) -> Any:
    return api.call("POST", "/ocsp", data=der, content_type="application/ocsp-request", **options)


def get(api: Api, der: bytes, **options: Any) -> Any:
    return api.get("/ocsp/" + quote(base64.b64encode(der).decode(), safe=""), **options)


def read(answer: Any) -> ocsp.OCSPResponse:
    assert (answer.status_code, answer.content_type) == (200, "application/ocsp-response"), answer.text
    return ocsp.load_der_ocsp_response(answer.data)


def said_of(api: Api, request: Ocsp) -> list[str]:
    return [single.certificate_status.name.lower() for single in read(post(api, request.der())).responses]


def failure_of(answer: Any) -> OCSPResponseStatus:
    assert answer.headers["Cache-Control"] == "no-store"
    return read(answer).response_status
