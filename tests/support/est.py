"""A device that speaks EST to an application in this process; openssl judges what it gets."""

from __future__ import annotations

import base64
import email
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.support.harness import Api
from tests.support.pki import PEM

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class ShownCertificate:
    """The socket of a TLS client that has shown a certificate."""

    der: bytes

    def getpeercert(self, binary_form: bool) -> bytes:
        assert binary_form
        return self.der


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def csr_der(
    key: Key | None = None,
    subject: str = "serial-1",
    *,
    names: Sequence[x509.GeneralName] = (),
    attributes: Sequence[tuple[str, bytes]] = (),
) -> bytes:
    """A PKCS#10 request, DER."""
    key = key or new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for oid, value in attributes:
        builder = builder.add_attribute(x509.ObjectIdentifier(oid), value)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def in_base64(der: bytes) -> bytes:
    return base64.encodebytes(der)


@dataclass
class Device:
    """A device with its enrolment credential: an enrolment token, a client certificate (DER), or neither."""

    api: Api
    token: str | None = None
    certificate: bytes | None = None
    path: str = "/.well-known/est/"

    def call(self, method: str, operation: str, body: bytes | None = None, **options: Any) -> Any:
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            credentials = base64.b64encode(f"device:{self.token}".encode()).decode()
            headers.setdefault("Authorization", f"Basic {credentials}")
        environ = {} if self.certificate is None else {"gunicorn.socket": ShownCertificate(self.certificate)}
        if body is not None:
            options.setdefault("content_type", "application/pkcs10")
        path = self.path + operation
        return self.api.client.open(
            path, method=method, data=body, headers=headers, environ_overrides=environ, **options
        )

    def enrol(self, der: bytes | None = None, operation: str = "simpleenroll") -> Any:
        return self.call("POST", operation, in_base64(der or csr_der()))


def certificates_of(answer: Any) -> list[x509.Certificate]:
    """The certificates in a certs-only answer, read by openssl."""
    assert answer.status_code == 200, answer.text
    assert answer.content_type == "application/pkcs7-mime; smime-type=certs-only"
    assert answer.headers["Content-Transfer-Encoding"] == "base64"
    assert max(len(line) for line in answer.data.splitlines()) <= 76
    return read_certs_only(answer.data)


def read_certs_only(text: bytes) -> list[x509.Certificate]:
    der = subprocess.run(["openssl", "base64", "-d"], input=text, check=True, capture_output=True).stdout
    command = ["openssl", "pkcs7", "-inform", "DER", "-print_certs"]
    pem = subprocess.run(command, input=der, check=True, capture_output=True).stdout
    return x509.load_pem_x509_certificates(pem)


def refused(answer: Any, status: int) -> str:
    """The sentence in plain text with which a device is refused; there is none with 401 (BouncyCastle's client)."""
    assert answer.status_code == status, answer.text
    if status == 401:
        assert (answer.data, answer.headers["Content-Length"], answer.content_type) == (b"", "0", None)
        return ""
    assert answer.content_type == "text/plain; charset=utf-8"
    assert answer.text.endswith(".\n")
    return str(answer.text)


def token(api: Api, **fields: Any) -> str:
    """The secret of a new enrolment token."""
    answer = api.post("/enrolment-tokens", {"name": "a batch", "type": "pump"} | fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json["token"])


def device(api: Api, **fields: Any) -> Device:
    """A device with a token of its own."""
    return Device(api, token(api, **fields))


def openssl(*arguments: str, data: bytes) -> bytes:
    return subprocess.run(["openssl", *arguments], input=data, check=True, capture_output=True).stdout


def key_and_certificate(answer: Any) -> tuple[bytes, x509.Certificate]:
    """The private key (DER) and the certificate of an answer, seen by openssl to belong together."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    head = f"Content-Type: {answer.content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    message = email.message_from_bytes(head + answer.data)
    assert message.get_content_type() == "multipart/mixed"
    parts: list[Message] = [part for part in message.walk() if not part.is_multipart()]
    assert [part.get_content_type() for part in parts] == ["application/pkcs8", "application/pkcs7-mime"]
    assert parts[1].get_param("smime-type") == "certs-only"
    assert {part["Content-Transfer-Encoding"] for part in parts} == {"base64"}
    key = parts[0].get_payload(decode=True)
    assert isinstance(key, bytes)
    [certificate] = read_certs_only(str(parts[1].get_payload()).encode())
    public = openssl("pkey", "-inform", "DER", "-pubout", data=key)
    assert openssl("x509", "-noout", "-pubkey", data=certificate.public_bytes(PEM)) == public
    return key, certificate
