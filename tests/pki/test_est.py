"""How EST requests are read and its responses encoded, judged by openssl and cryptography."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from cryptography.x509.oid import NameOID

import ca
from core.errors import CsrInvalid, KeyRefused
from pki import est
from pki.algorithms import KeyType, public_key_fingerprint
from pki.csr import MAX_CSR_CHARACTERS
from tests.support.ca_hierarchy import Hierarchy, make_hierarchy

DECRYPT_KEY_IDENTIFIER, ASYMMETRIC_DECRYPT_KEY_IDENTIFIER = "1.2.840.113549.1.9.16.2.37", "1.2.840.113549.1.9.16.2.54"
CHANGE_SUBJECT_NAME = "1.3.6.1.5.5.7.7.36"
CHALLENGE_PASSWORD = "1.2.840.113549.1.9.7"
KEY = ec.generate_private_key(ec.SECP256R1())
WEAK_KEY = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused


def name(**attributes: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(getattr(NameOID, oid), value) for oid, value in attributes.items()])


def csr_der(
    subject: x509.Name | None = None,
    *,
    names: x509.SubjectAlternativeName | None = None,
    attribute: str | None = None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey = KEY,
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or name(COMMON_NAME="sensor"))
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    if attribute is not None:
        builder = builder.add_attribute(x509.ObjectIdentifier(attribute), b"anything")
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def pem_of(der: bytes) -> bytes:
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def cas() -> Hierarchy:
    return make_hierarchy(datetime(2030, 6, 15, tzinfo=UTC))


# --- Requests -----------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "Base64 with line feeds": base64.encodebytes,
    "Base64 in one line": base64.b64encode,
    "Base64 with every kind of white space": lambda der: b" \t\r\n".join([b"", *base64.encodebytes(der).split(), b""]),
    "DER": lambda der: der,
    "PEM": pem_of,
    "PEM after a blank line": lambda der: b"\n" + pem_of(der),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_request_is_read_in_each_form(form: Callable[[bytes], bytes]) -> None:
    der = csr_der()
    request = est.read_enrolment_request(form(der))
    assert request.csr is not None
    assert request.csr.public_key == KEY.public_key()
    assert x509.load_pem_x509_csr(request.csr.pem.encode()).public_bytes(Encoding.DER) == der
    assert request.key_fingerprint == public_key_fingerprint(KEY.public_key())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"!!!!", "Base64"),
        (b"MIIB", "cut off"),
        (b"\x30\x03\x02\x01\x00", "signature algorithm"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\n\xff", "no END"),
        (b" " * (2 * MAX_CSR_CHARACTERS + 1), "longer"),
        (b"\x30" + bytes(MAX_CSR_CHARACTERS), "longer"),
    ],
)
@pytest.mark.parametrize("read", [est.read_enrolment_request, est.read_key_request])
def test_anything_else_is_refused(read: Callable[[bytes], object], body: bytes, says: str) -> None:
    with pytest.raises(CsrInvalid, match=says):
        read(body)


def test_white_space_up_to_the_limit_is_read() -> None:
    body = base64.b64encode(csr_der())
    assert est.read_enrolment_request(body.ljust(2 * MAX_CSR_CHARACTERS)).csr is not None


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (name(COMMON_NAME="sensor", SERIAL_NUMBER="SN-7"), "SN-7"),
        (name(COMMON_NAME="sensor"), "sensor"),
        (name(ORGANIZATION_NAME="Somebody"), ""),
    ],
)
def test_the_name_is_the_serial_number_else_the_common_name(subject: x509.Name, expected: str) -> None:
    assert est.read_enrolment_request(csr_der(subject)).name == expected


def test_the_key_of_a_request_for_a_certificate_must_be_certifiable_and_its_signature_right() -> None:
    with pytest.raises(KeyRefused):
        est.read_enrolment_request(csr_der(key=WEAK_KEY))
    der = csr_der()
    with pytest.raises(CsrInvalid, match="signature"):
        est.read_enrolment_request(der[:-1] + bytes([der[-1] ^ 1]))


def test_neither_counts_if_the_portal_makes_the_key() -> None:
    request = est.read_key_request(csr_der(key=WEAK_KEY))
    info = WEAK_KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert (request.csr, request.key_fingerprint) == (None, hashlib.sha256(info).hexdigest())
    der = csr_der()
    assert est.read_key_request(der[:-1] + bytes([der[-1] ^ 1])).name == "sensor"


@pytest.mark.parametrize("attribute", [DECRYPT_KEY_IDENTIFIER, ASYMMETRIC_DECRYPT_KEY_IDENTIFIER])
def test_a_key_is_not_encrypted_beyond_tls(attribute: str) -> None:
    with pytest.raises(CsrInvalid, match="TLS"):
        est.read_key_request(csr_der(attribute=attribute))
    assert est.read_enrolment_request(csr_der(attribute=attribute)).attributes == {attribute}
    assert est.read_key_request(csr_der(attribute=CHALLENGE_PASSWORD)).attributes == {CHALLENGE_PASSWORD}


# --- Renewal ------------------------------------------------------------------------------------------------------


def names_of(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_a_renewal_has_the_names_of_the_certificate_or_no_alternative_names(cas: Hierarchy) -> None:
    issued = cas.device()
    subject = issued.certificate.subject
    for names in (None, names_of(issued.certificate)):
        est.check_same_names(est.read_enrolment_request(csr_der(subject, names=names)), issued.der)


def test_a_renewal_under_other_names_is_refused(cas: Hierarchy) -> None:
    issued = cas.device()
    subject = issued.certificate.subject
    other = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{uuid4()}")])
    for der in (
        csr_der(name(COMMON_NAME=str(uuid4()))),
        csr_der(subject, names=other),
        csr_der(subject, attribute=CHANGE_SUBJECT_NAME),
    ):
        with pytest.raises(CsrInvalid, match="same subject"):
            est.check_same_names(est.read_enrolment_request(der), issued.der)


@pytest.mark.parametrize("key_type", KeyType)
def test_the_key_of_a_certificate_is_known_by_its_kind_and_fingerprint(cas: Hierarchy, key_type: KeyType) -> None:
    key = ca.generate_keypair(key_type).public_key()
    der = cas.device(key).der
    assert est.key_type_of_certificate(der) == key_type
    assert est.is_for_key(der, public_key_fingerprint(key))
    assert not est.is_for_key(der, public_key_fingerprint(KEY.public_key()))


# --- Responses ----------------------------------------------------------------------------------------------------


def openssl(*arguments: str, content: bytes) -> str:
    return subprocess.run(["openssl", *arguments], input=content, check=True, capture_output=True).stdout.decode()


def test_certificates_are_a_pkcs7_message_that_openssl_reads(cas: Hierarchy) -> None:
    certificates = [cas.device().der, cas.issuing.certificate.public_bytes(Encoding.DER)]
    text = openssl("pkcs7", "-inform", "DER", "-print_certs", content=est.certs_only(certificates))
    read = [one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(text.encode())]
    assert sorted(read) == sorted(certificates)


def test_a_key_is_unencrypted_pkcs8() -> None:
    read = load_der_private_key(est.pkcs8(KEY), None)
    assert read.public_key() == KEY.public_key()


ATTRIBUTES = {
    "ec-p256": ["id-ecPublicKey", "prime256v1", "ecdsa-with-SHA256"],
    "ec-p384": ["id-ecPublicKey", "secp384r1", "ecdsa-with-SHA384"],
    "ed25519": ["ED25519"],
    "rsa-2048": ["rsaEncryption", "0800", "sha256WithRSAEncryption"],
    "rsa-3072": ["rsaEncryption", "0C00", "sha256WithRSAEncryption"],
    "rsa-4096": ["rsaEncryption", "1000", "sha256WithRSAEncryption"],
}


@pytest.mark.parametrize("key_type", KeyType)
def test_csr_attributes_name_the_first_kind_of_key_with_its_signature(key_type: KeyType) -> None:
    lines = openssl("asn1parse", "-inform", "DER", content=est.csr_attributes([key_type, "ec-p256"])).splitlines()
    assert [line.rpartition(":")[2] for line in lines if "OBJECT" in line or "INTEGER" in line] == ATTRIBUTES[key_type]
    if key_type is not KeyType.ED25519:  # RFC 7030 §4.5.2: an attribute with the curve or the size in a SET
        assert [line.split(":")[1].split()[0] for line in lines[:2]] == ["d=0", "d=1"]
        assert sum("SET" in line for line in lines) == 1
