"""Which certificates of TLS clients and of manufacturers' CAs are accepted."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from core.errors import ClientCertificateRefused, KeyRefused, ManufacturerInvalid, ProofInvalid
from pki.algorithms import PrivateKey, public_key_fingerprint
from pki.client_certificates import (
    MAX_CERTIFICATE_BYTES,
    MAX_PEM_CHARACTERS,
    check_proof_by_certificate,
    check_proof_by_signature,
    is_issued_by,
    may_identify_a_client,
    pem_bundle,
    read_client,
    read_manufacturer_ca,
)
from pki.encoding import pem

NOW = datetime(2030, 6, 15, tzinfo=UTC)
SECOND = timedelta(seconds=1)
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
ED25519_KEY = ed25519.Ed25519PrivateKey.generate()
NONCE = "a-nonce-of-the-portal"


def name(**attributes: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(getattr(NameOID, oid), value) for oid, value in attributes.items()])


def made(
    *extensions: tuple[x509.ExtensionType, bool],
    subject: x509.Name | None = None,
    key: PrivateKey = KEY,
    issuer: x509.Name | None = None,
    issuer_key: PrivateKey | None = None,
    begin: datetime = NOW - timedelta(days=1),
    end: datetime = NOW + timedelta(days=1),
) -> x509.Certificate:
    subject = subject or name(COMMON_NAME="sensor")
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).serial_number(7)
    builder = builder.public_key(key.public_key()).not_valid_before(begin).not_valid_after(end)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    signer = issuer_key or key
    return builder.sign(signer, None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256())


def der_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def pem_of(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not digital_signature and not key_cert_sign,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


CA = (x509.BasicConstraints(ca=True, path_length=None), True)
END_ENTITY = (x509.BasicConstraints(ca=False, path_length=None), True)


# --- Clients ------------------------------------------------------------------------------------------------------


def test_a_client_is_read_with_its_properties() -> None:
    certificate = made()
    client = read_client(der_of(certificate))
    assert client.certificate.der == der_of(certificate)
    assert client.fingerprint == hashlib.sha256(der_of(certificate)).hexdigest()
    assert client.key_fingerprint == public_key_fingerprint(KEY.public_key())
    assert (client.not_before, client.not_after) == (NOW - timedelta(days=1), NOW + timedelta(days=1))


@pytest.mark.parametrize(
    ("subject", "serial"),
    [
        (name(COMMON_NAME="sensor", SERIAL_NUMBER="SN-7"), "SN-7"),
        (name(COMMON_NAME="sensor"), "sensor"),
        (name(ORGANIZATION_NAME="Somebody"), ""),
    ],
)
def test_a_client_is_known_by_its_serial_number_else_its_common_name(subject: x509.Name, serial: str) -> None:
    assert read_client(der_of(made(subject=subject))).serial == serial


def test_a_client_certificate_has_at_most_16_kib() -> None:
    def filled(size: int) -> bytes:
        filler = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), bytes(size))
        return der_of(made((filler, False), key=ED25519_KEY))  # its signatures have all the same length

    size = 10_000 + MAX_CERTIFICATE_BYTES - len(filled(10_000))
    assert len(filled(size)) == MAX_CERTIFICATE_BYTES
    assert read_client(filled(size))
    with pytest.raises(ClientCertificateRefused, match="longer"):
        read_client(filled(size + 1))


@pytest.mark.parametrize("der", [b"", b"\x30\x00", b"none", der_of(made())[:-1]])
def test_an_unreadable_client_certificate_is_refused(der: bytes) -> None:
    with pytest.raises(ClientCertificateRefused, match="cannot be read"):
        read_client(der)


def test_a_client_with_a_weak_key_is_refused() -> None:
    with pytest.raises(KeyRefused):
        read_client(der_of(made(key=rsa.generate_private_key(65537, 1024))))  # noqa: S505 - to be refused


def test_an_issuer_has_signed_the_certificate_and_has_the_name_that_it_gives() -> None:
    issuer = made(CA, subject=name(COMMON_NAME="CA"), key=OTHER_KEY)
    renamed = made(CA, subject=name(COMMON_NAME="Another"), key=OTHER_KEY)
    impostor = made(CA, subject=name(COMMON_NAME="CA"), key=RSA_KEY)
    client = read_client(der_of(made(issuer=name(COMMON_NAME="CA"), issuer_key=OTHER_KEY)))
    assert is_issued_by(client.certificate, der_of(issuer))
    assert not is_issued_by(client.certificate, der_of(renamed))
    assert not is_issued_by(client.certificate, der_of(impostor))


CLIENT_AUTH, SERVER_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
CLIENTS: dict[str, tuple[bool, Sequence[tuple[x509.ExtensionType, bool]]]] = {
    "no extension": (True, []),
    "an end entity that signs": (True, [END_ENTITY, (usage(digital_signature=True), True)]),
    "for clients": (True, [(x509.ExtendedKeyUsage([CLIENT_AUTH]), False)]),
    "for servers and clients": (True, [(x509.ExtendedKeyUsage([SERVER_AUTH, CLIENT_AUTH]), False)]),
    "for anything": (True, [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), False)]),
    "an unknown extension": (True, [(UNKNOWN, False)]),
    "a CA": (False, [CA]),
    "a key that does not sign": (False, [END_ENTITY, (usage(), True)]),
    "for servers only": (False, [(x509.ExtendedKeyUsage([SERVER_AUTH]), False)]),
    "an unknown critical extension": (False, [(UNKNOWN, True)]),
}


@pytest.mark.parametrize(("accepted", "extensions"), CLIENTS.values(), ids=CLIENTS)
def test_a_certificate_identifies_a_client_unless_it_is_for_something_else(
    accepted: bool, extensions: Sequence[tuple[x509.ExtensionType, bool]]
) -> None:
    assert may_identify_a_client(read_client(der_of(made(*extensions)))) is accepted


def test_a_bundle_holds_the_certificates_in_their_order() -> None:
    certificates = [made(), made(CA, key=OTHER_KEY)]
    assert x509.load_pem_x509_certificates(pem_bundle([der_of(one) for one in certificates])) == certificates


# --- Manufacturers' CAs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [[CA], [CA, (usage(key_cert_sign=True), True)]])
@pytest.mark.parametrize("key", [KEY, RSA_KEY, ED25519_KEY], ids=["ec", "rsa", "ed25519"])
def test_the_certificate_of_a_ca_is_read(
    extensions: Sequence[tuple[x509.ExtensionType, bool]], key: PrivateKey
) -> None:
    certificate = made(*extensions, key=key)
    read = read_manufacturer_ca(pem_of(certificate), now=NOW)
    assert read.der == der_of(certificate)
    assert read.fingerprint == hashlib.sha256(read.der).hexdigest()
    assert read.not_after == certificate.not_valid_after_utc


@pytest.mark.parametrize("extensions", [[], [END_ENTITY], [CA, (usage(digital_signature=True), True)]])
def test_a_certificate_that_is_not_of_a_ca_is_refused(extensions: Sequence[tuple[x509.ExtensionType, bool]]) -> None:
    with pytest.raises(ManufacturerInvalid, match="not that of a CA"):
        read_manufacturer_ca(pem_of(made(*extensions)), now=NOW)


def test_a_ca_must_be_valid_now() -> None:
    certificate = made(CA)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    for now in (begin, end - SECOND):
        assert read_manufacturer_ca(pem_of(certificate), now=now)
    for now in (begin - SECOND, end):
        with pytest.raises(ManufacturerInvalid, match="expired"):
            read_manufacturer_ca(pem_of(certificate), now=now)


def test_a_ca_with_a_weak_key_is_refused() -> None:
    weak = made(CA, key=rsa.generate_private_key(65537, 1024))  # noqa: S505 - to be refused
    with pytest.raises(ManufacturerInvalid, match="1024 bits"):
        read_manufacturer_ca(pem_of(weak), now=NOW)


@pytest.mark.parametrize("kind", ["2a8648ce3d0201", "2a8648ce3d030107"], ids=["algorithm", "curve"])
def test_a_ca_with_a_key_of_an_unknown_kind_is_refused(kind: str) -> None:
    known = bytes.fromhex(kind)
    der = der_of(made(CA)).replace(known, known[:-1] + b"\x63")
    with pytest.raises(ManufacturerInvalid, match="key"):
        read_manufacturer_ca(pem("CERTIFICATE", der), now=NOW)


def test_one_certificate_is_to_be_sent() -> None:
    pem = pem_of(made(CA))
    longest = pem.ljust(MAX_PEM_CHARACTERS, "\n")
    assert read_manufacturer_ca(longest, now=NOW)
    for text in ("", "none", pem + pem, pem[:100], longest + "\n", pem.replace("M", "\uff2d", 1)):
        with pytest.raises(ManufacturerInvalid, match="Send one certificate"):
            read_manufacturer_ca(text, now=NOW)


def test_the_limits_are_the_documented_ones() -> None:
    assert (MAX_CERTIFICATE_BYTES, MAX_PEM_CHARACTERS) == (16_384, 16_384)


def test_a_key_of_a_kind_that_is_not_accepted_gives_no_proof() -> None:
    key = ed448.Ed448PrivateKey.generate()
    builder = x509.CertificateBuilder().subject_name(name(COMMON_NAME="CA")).issuer_name(name(COMMON_NAME="CA"))
    builder = builder.public_key(key.public_key()).serial_number(7).not_valid_before(NOW).not_valid_after(NOW + SECOND)
    der = der_of(builder.sign(key, None))
    with pytest.raises(ProofInvalid, match="kind"):
        check_proof_by_signature(der, NONCE, base64.b64encode(key.sign(NONCE.encode())).decode())


def proof(nonce: str, key: PrivateKey = KEY, issuer: x509.Name | None = None) -> str:
    ca_name = issuer or name(COMMON_NAME="sensor")
    return pem_of(made(subject=name(COMMON_NAME=nonce), key=OTHER_KEY, issuer=ca_name, issuer_key=key))


def test_a_certificate_of_the_ca_whose_common_name_is_the_nonce_is_a_proof() -> None:
    check_proof_by_certificate(der_of(made(CA)), NONCE, proof(NONCE))


@pytest.mark.parametrize(
    ("pem", "says"),
    [
        ("none", "Send one certificate"),
        (proof(NONCE, key=OTHER_KEY), "not a certificate that this CA has signed"),
        (proof(NONCE, issuer=name(COMMON_NAME="Another")), "not a certificate that this CA has signed"),
        (proof("another nonce"), "common name"),
        (pem_of(made(subject=name(ORGANIZATION_NAME="x"), issuer=name(COMMON_NAME="sensor"))), "common name"),
    ],
)
def test_another_certificate_is_no_proof(pem: str, says: str) -> None:
    with pytest.raises(ProofInvalid, match=says):
        check_proof_by_certificate(der_of(made(CA)), NONCE, pem)


def signature_by(key: PrivateKey, text: str) -> str:
    message = text.encode()
    if isinstance(key, ec.EllipticCurvePrivateKey):
        raw = key.sign(message, ec.ECDSA(hashes.SHA256()))
    elif isinstance(key, rsa.RSAPrivateKey):
        raw = key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    else:
        raw = key.sign(message)
    return base64.encodebytes(raw).decode()


@pytest.mark.parametrize("key", [KEY, RSA_KEY, ED25519_KEY], ids=["ec", "rsa", "ed25519"])
def test_a_signature_of_the_nonce_by_the_key_of_the_ca_is_a_proof(key: PrivateKey) -> None:
    der = der_of(made(CA, key=key))
    check_proof_by_signature(der, NONCE, signature_by(key, NONCE))
    other = ed25519.Ed25519PrivateKey.generate()
    for wrong in (signature_by(key, NONCE + "!"), signature_by(other, NONCE), "", "!", "AAAA"):
        with pytest.raises(ProofInvalid, match="not a signature"):
            check_proof_by_signature(der, NONCE, wrong)
