"""CSRs and certificates in encodings that DER forbids: only what is used may refuse them."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from core.errors import ClientCertificateRefused, CsrInvalid, KeyRefused, ManufacturerInvalid
from pki import est
from pki.client_certificates import (
    check_proof_by_certificate,
    is_issued_by,
    may_identify_a_client,
    pem_bundle,
    read_client,
    read_manufacturer_ca,
)
from pki.csr import MAX_CSR_CHARACTERS, load_csr, read_csr
from pki.encoding import MAX_ELEMENTS, Element, join, pem, split
from tests.support import foreign
from tests.support.foreign import (
    ALTERNATIVE_NAMES,
    BASIC_CONSTRAINTS,
    BMP,
    CA,
    CHALLENGE_PASSWORD,
    COMMON_NAME,
    ECDSA_WITH_SHA256,
    KEY_USAGE,
    NULL,
    PRINTABLE,
    PURPOSES,
    RSA_ENCRYPTION,
    SERIAL_NUMBER,
    SHA256_WITH_RSA,
    T61,
    UNIVERSAL,
    UTF8,
    ForeignCertificate,
    ForeignCsr,
    algorithm,
    attributes,
    extension_request,
    name,
    public_key,
)
from tests.support.ocsp import extension, integer, oid, sequence, tlv

KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
ED25519_KEY = ed25519.Ed25519PrivateKey.generate()
LABEL = "CERTIFICATE REQUEST"

# --- CSRs that are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", foreign.FILES, ids=[path.stem for path in foreign.FILES])
def test_a_csr_of_another_program_is_read_by_every_reader(path: Path) -> None:
    command = ["openssl", "req", "-in", str(path), "-noout", "-pubkey", "-verify"]
    judged = load_pem_public_key(subprocess.run(command, check=True, capture_output=True).stdout)
    csr = read_csr(path.read_text())
    assert csr.public_key == judged
    request = est.read_enrolment_request(path.read_bytes())
    assert request.csr is not None
    assert request.csr.public_key == judged
    assert est.read_key_request(path.read_bytes()).key_fingerprint == csr.key_fingerprint


NAMES = extension(ALTERNATIVE_NAMES, sequence(tlv(0x82, b"a.example")))
RSA_PARTS = split(split(public_key(RSA_KEY))[0].content)
CSRS = {
    "version 2": ForeignCsr(KEY, version=b"\x02\x01\x01"),
    "version 3": ForeignCsr(KEY, version=b"\x02\x01\x02"),
    "version 300": ForeignCsr(KEY, version=b"\x02\x02\x01\x2c"),
    "no version": ForeignCsr(KEY, version=b""),
    "no attributes": ForeignCsr(KEY, attributes=b""),
    "something else in place of attributes": ForeignCsr(KEY, attributes=b"\xa0\x03abc"),
    "an attribute without a value": ForeignCsr(KEY, attributes=attributes((CHALLENGE_PASSWORD, ()))),
    "an attribute that is none": ForeignCsr(KEY, attributes=tlv(0xA0, NULL, sequence(NULL, NULL))),
    "three challenge passwords": ForeignCsr(
        KEY, attributes=attributes((CHALLENGE_PASSWORD, (tlv(UTF8, b"a"), tlv(PRINTABLE, b"b@"), tlv(BMP, b"\0c"))))
    ),
    "the same attribute twice": ForeignCsr(KEY, attributes=attributes(*[(CHALLENGE_PASSWORD, (tlv(UTF8, b"a"),))] * 2)),
    "the same extension twice": ForeignCsr(KEY, attributes=extension_request(NAMES, NAMES)),
    "two extension requests": ForeignCsr(
        KEY, attributes=attributes(*[(foreign.EXTENSION_REQUEST, (sequence(NAMES),))] * 2)
    ),
    "an extension without a value": ForeignCsr(KEY, attributes=extension_request(sequence(oid(ALTERNATIVE_NAMES)))),
    "an address as text": ForeignCsr(
        KEY, attributes=extension_request(extension(ALTERNATIVE_NAMES, sequence(tlv(0x87, b"10.0.0.1"))))
    ),
    "alternative names that are none": ForeignCsr(
        KEY, attributes=extension_request(extension(ALTERNATIVE_NAMES, b"\xff\xff"))
    ),
    "ECDSA with NULL": ForeignCsr(KEY, signed_with=algorithm(KEY, NULL)),
    "Ed25519 with NULL": ForeignCsr(ED25519_KEY, signed_with=algorithm(ED25519_KEY, NULL)),
    "RSA without NULL": ForeignCsr(RSA_KEY, signed_with=algorithm(RSA_KEY, b"")),
    "RSA's key without NULL": ForeignCsr(RSA_KEY, key_info=sequence(sequence(oid(RSA_ENCRYPTION)), RSA_PARTS[1].der)),
    "an empty subject": ForeignCsr(KEY, subject=sequence()),
    "a subject that is none": ForeignCsr(KEY, subject=sequence(NULL)),
    "an empty RDN": ForeignCsr(KEY, subject=sequence(tlv(0x31))),
    "an empty common name": ForeignCsr(KEY, subject=name((COMMON_NAME, UTF8, b""))),
    "a very long object identifier": ForeignCsr(KEY, subject=name(("55" + "ff" * 5000 + "01", UTF8, b"x"))),
}


@pytest.mark.parametrize("csr", CSRS.values(), ids=CSRS)
def test_what_is_not_used_of_a_csr_does_not_refuse_it(csr: ForeignCsr) -> None:
    text = pem(LABEL, csr.der())
    assert read_csr(text).public_key == csr.key.public_key()
    assert est.read_enrolment_request(csr.der()).key_fingerprint == read_csr(text).key_fingerprint
    assert est.read_key_request(csr.der()).csr is None


@pytest.mark.parametrize("csr", CSRS.values(), ids=CSRS)
def test_the_proof_of_possession_is_over_the_bytes_as_they_came(csr: ForeignCsr) -> None:
    der = csr.der()
    content, *rest = [element.der for element in split(split(der)[0].content)]
    changed = split(content)[0].content
    position = changed.find(b"sensor-1")
    end = (changed[:position] + b"X" + changed[position + 1 :]) if position >= 0 else changed + NULL
    with pytest.raises(CsrInvalid, match="signature is wrong"):
        read_csr(pem(LABEL, join(0x30, join(0x30, end), *rest)))
    with pytest.raises(CsrInvalid, match="signature is wrong"):
        read_csr(pem(LABEL, ForeignCsr(KEY, key_info=public_key(ec.generate_private_key(ec.SECP256R1()))).der()))


def test_a_signature_with_pss_is_read_with_its_parameters() -> None:
    digest = sequence(oid("608648016503040201"), NULL)
    generator = sequence(oid("2a864886f70d010108"), digest)
    parameters = sequence(tlv(0xA0, digest), tlv(0xA1, generator), tlv(0xA2, integer(32)))
    content = sequence(b"\x02\x01\x01", foreign.DEVICE, public_key(RSA_KEY))
    proof = RSA_KEY.sign(content, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    der = sequence(content, sequence(oid("2a864886f70d01010a"), parameters), tlv(3, b"\0", proof))
    assert read_csr(pem(LABEL, der)).public_key == RSA_KEY.public_key()


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (name((COMMON_NAME, PRINTABLE, b"sensor_01@hall")), "sensor_01@hall"),
        (name((COMMON_NAME, T61, "Gerät".encode("latin-1"))), "Gerät"),
        (name((COMMON_NAME, PRINTABLE, "Gerät".encode())), "Gerät"),
        (name((COMMON_NAME, PRINTABLE, "Gerät".encode("latin-1"))), "Gerät"),
        (name((COMMON_NAME, BMP, "Gerät".encode("utf-16-be"))), "Gerät"),
        (name((COMMON_NAME, UNIVERSAL, "Gerät".encode("utf-32-be"))), "Gerät"),
        (name((COMMON_NAME, UTF8, b"c"), (SERIAL_NUMBER, UTF8, b"SN_12")), "SN_12"),
        (name((COMMON_NAME, BMP, b"odd")), "odd"),
        (name((COMMON_NAME, 0x04, b"x")), "#040178"),
    ],
)
def test_a_name_is_read_in_every_kind_of_string(subject: bytes, expected: str) -> None:
    assert est.read_enrolment_request(ForeignCsr(KEY, subject=subject).der()).name == expected


FORMS: dict[str, Callable[[str], str]] = {
    "text before it": lambda text: f"Certificate Request:\n    Data: Ünit\n{text}",
    "a number before it": lambda text: f"0001 of 12\n{text}",
    "text after it": lambda text: f"{text}\nthanks\0",
    "a byte order mark": lambda text: "\ufeff" + text,
    "the label of Netscape": lambda text: text.replace(LABEL, f"NEW {LABEL}"),
    "labels that differ": lambda text: text.replace(f"BEGIN {LABEL}", f"BEGIN NEW {LABEL}"),
    "indented": lambda text: "".join(f"    {line}\r\n" for line in text.splitlines()),
    "Base64 alone": lambda text: "".join(text.splitlines()[1:-1]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_csr_is_read_in_each_form_by_every_reader(form: Callable[[str], str]) -> None:
    text = form(pem(LABEL, ForeignCsr(KEY).der()))
    assert read_csr(text).public_key == KEY.public_key()
    assert est.read_enrolment_request(text.encode()).csr is not None


# --- CSRs that are refused ----------------------------------------------------------------------------------------

GOOD = ForeignCsr(KEY).der()
CERTIFICATE = ForeignCertificate(KEY, KEY, foreign.DEVICE).der()
REFUSED: dict[str, tuple[bytes, str]] = {
    "a certificate": (CERTIFICATE, "is a certificate, not a PKCS#10 request"),
    "bytes after its end": (GOOD + b"\0\0", "has an element|2 bytes after its end"),
    "cut off": (GOOD[:-1], "cut off"),
    "an indefinite length": (b"\x30\x80" * 4000, "indefinite length"),
    "an enormous length": (b"\x30\x84\xff\xff\xff\xff", "cut off"),
    "a length of many bytes": (b"\x30\x85\0\0\0\0\0", "more than 4 bytes"),
    "a tag of several bytes": (b"\x30\x03\x1f\x81\x00", "tag of several bytes"),
    "no public key": (foreign.signed(KEY, sequence(integer(0), foreign.DEVICE)), "no subject .* with a public key"),
    "no signature": (sequence(sequence(), sequence()), "content, signature algorithm and signature"),
    "too many elements": (join(0x30, NULL * (MAX_ELEMENTS + 1)), f"more than {MAX_ELEMENTS} elements"),
    "a key that is none": (ForeignCsr(KEY, key_info=sequence(NULL)).der(), "SubjectPublicKeyInfo"),
    "no algorithm": (ForeignCsr(KEY, signed_with=sequence()).der(), "algorithm without an object identifier"),
}


@pytest.mark.parametrize(("der", "says"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_what_the_csr_is_or_has(der: bytes, says: str) -> None:
    with pytest.raises(CsrInvalid, match=says) as refusal:
        load_csr(der)
    assert "damaged" not in refusal.value.detail


@pytest.mark.parametrize("parameters", [b"", NULL, sequence(integer(1))])
def test_a_curve_that_is_not_named_is_refused(parameters: bytes) -> None:
    key = split(split(public_key(KEY))[0].content)[1].der
    with pytest.raises((CsrInvalid, KeyRefused)):
        read_csr(pem(LABEL, ForeignCsr(KEY, key_info=sequence(sequence(oid("2a8648ce3d0201"), parameters), key)).der()))


def test_the_algorithm_of_another_kind_of_key_is_refused() -> None:
    with pytest.raises(CsrInvalid, match="cannot be checked"):
        read_csr(pem(LABEL, ForeignCsr(KEY, signed_with=sequence(oid(SHA256_WITH_RSA), NULL)).der()))
    with pytest.raises(CsrInvalid, match="cannot be checked"):
        read_csr(pem(LABEL, ForeignCsr(RSA_KEY, signed_with=sequence(oid(ECDSA_WITH_SHA256))).der()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text + text, "2 PEM blocks"),
        (lambda text: pem("EC PRIVATE KEY", b"secret") + text, "never a private key"),
        (lambda text: pem("EC PRIVATE KEY", b"secret"), "never a private key"),
        (lambda text: text[:200], "no END CERTIFICATE REQUEST"),
        (lambda text: text.replace("M", "!", 1), "not valid Base64"),
    ],
)
def test_a_refusal_names_what_the_text_has(change: Callable[[str], str], says: str) -> None:
    text = change(pem(LABEL, GOOD))
    with pytest.raises(CsrInvalid, match=says):
        read_csr(text)
    with pytest.raises(CsrInvalid, match=says):
        est.read_enrolment_request(text.encode())


def test_a_hostile_csr_is_split_into_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    begin = Element.__init__

    def counted(*arguments: object) -> None:
        nonlocal made
        made += 1
        begin(*arguments)  # type: ignore[arg-type]  # whatever they are

    monkeypatch.setattr(Element, "__init__", counted)
    values = NULL * 6
    many = attributes(*[(CHALLENGE_PASSWORD, (values,))] * 500)
    der = ForeignCsr(KEY, attributes=many, subject=name(*[(COMMON_NAME, UTF8, b"x")] * 100)).der()
    assert len(der) <= MAX_CSR_CHARACTERS
    load_csr(der)
    assert made <= len(der)  # linear, whatever is nested in what


# --- Certificates -------------------------------------------------------------------------------------------------

CA_KEY = ec.generate_private_key(ec.SECP256R1())
MAKER = name((COMMON_NAME, PRINTABLE, b"Maker_CA"))
NOW = datetime(2030, 6, 15, tzinfo=UTC)
FALSE, TRUE_AS_01 = tlv(1, b"\0"), tlv(1, b"\x01")
SIGNS = tlv(3, b"\x07\x80")


def spelled_out(kind: str, critical: bytes, value: bytes) -> bytes:
    return sequence(oid(kind), critical, tlv(4, value))


SLIPS: dict[str, dict[str, object]] = {
    "none": {},
    "NULL after ECDSA": {"signed_with": algorithm(CA_KEY, NULL)},
    "critical FALSE spelled out": {"extensions": (spelled_out(KEY_USAGE, FALSE, SIGNS),)},
    "TRUE as 01": {"extensions": (spelled_out(KEY_USAGE, TRUE_AS_01, SIGNS),)},
    "cA FALSE spelled out": {"extensions": (extension(BASIC_CONSTRAINTS, sequence(FALSE), critical=True),)},
    "bits that are not used": {"extensions": (extension(KEY_USAGE, tlv(3, b"\x07\xff"), critical=True),)},
    "an address as text": {"extensions": (extension(ALTERNATIVE_NAMES, sequence(tlv(0x87, b"10.0.0.1"))),)},
    "an unknown extension": {"extensions": (extension("2b0601040163", b"anything"),)},
    "serial number 0": {"serial_number": integer(0)},
    "a negative serial number": {"serial_number": integer(-5)},
    "a serial number of 25 bytes": {"serial_number": integer(1 << 196)},
    "PrintableString with _": {"subject": name((COMMON_NAME, PRINTABLE, b"sensor-1"), ("55040a", PRINTABLE, b"A_B"))},
    "T61String": {"subject": name(("55040a", T61, "Gerät".encode("latin-1")), (COMMON_NAME, UTF8, b"sensor-1"))},
}


def factory_certificate(**slips: object) -> ForeignCertificate:
    return ForeignCertificate(KEY, CA_KEY, MAKER, **slips)  # type: ignore[arg-type]  # as in SLIPS


@pytest.fixture(scope="module")
def maker() -> bytes:
    made = ForeignCertificate(
        CA_KEY, CA_KEY, MAKER, subject=MAKER, extensions=(CA,), signed_with=algorithm(CA_KEY, NULL)
    )
    return made.der()


@pytest.mark.parametrize("slips", SLIPS.values(), ids=SLIPS)
def test_a_factory_certificate_that_cannot_be_made_again_is_read(slips: dict[str, object], maker: bytes) -> None:
    der = factory_certificate(**slips).der()
    client = read_client(der)
    assert (client.serial, client.not_after) == ("sensor-1", foreign.NOT_AFTER)
    assert may_identify_a_client(client)
    assert is_issued_by(client.certificate, maker)
    assert not is_issued_by(read_client(der[:-1] + bytes([der[-1] ^ 1])).certificate, maker)
    changed = der.replace(b"491231235959Z", b"481231235959Z")
    assert not is_issued_by(read_client(changed).certificate, maker)


@pytest.mark.parametrize("slips", SLIPS.values(), ids=SLIPS)
def test_the_certificate_of_a_manufacturer_s_ca_is_read_and_kept_as_it_came(slips: dict[str, object]) -> None:
    usage = extension(KEY_USAGE, tlv(3, b"\x02\x07"))
    der = factory_certificate(**slips | {"extensions": (CA, spelled_out("551d0e", FALSE, tlv(4, b"id")), usage)}).der()
    read = read_manufacturer_ca(f"Data: ü\n{pem('CERTIFICATE', der)}", now=NOW)
    assert (read.der, read.not_after) == (der, foreign.NOT_AFTER)
    assert pem_bundle([der]) == pem("CERTIFICATE", der).encode()


def test_a_proof_may_have_the_same_slips(maker: bytes) -> None:
    proof = factory_certificate(subject=name((COMMON_NAME, PRINTABLE, b"a_nonce")), signed_with=algorithm(CA_KEY, NULL))
    check_proof_by_certificate(maker, "a_nonce", pem("CERTIFICATE", proof.der()))


@pytest.mark.parametrize(
    "found",
    [
        extension(BASIC_CONSTRAINTS, sequence(TRUE_AS_01), critical=True),
        extension(KEY_USAGE, tlv(3, b"\x00\x40")),
        extension(PURPOSES, sequence(oid("2b06010505070301"))),
        spelled_out("2b0601040163", TRUE_AS_01, b"anything"),
    ],
    ids=["of a CA", "no signatures", "servers only", "critical and unknown"],
)
def test_a_slip_does_not_lift_what_limits_a_certificate(found: bytes) -> None:
    assert not may_identify_a_client(read_client(factory_certificate(extensions=(found,)).der()))


CERTIFICATES_REFUSED = {
    "an extension twice": ({"extensions": (extension(KEY_USAGE, SIGNS),) * 2}, "has the extension 2.5.29.15 twice"),
    "two algorithms": ({"inner": sequence(oid(SHA256_WITH_RSA), NULL)}, "two signature algorithms"),
    "an unreadable usage": ({"extensions": (extension(KEY_USAGE, b"x"),)}, "extension that counts"),
    "no extension": ({"extensions": (NULL,)}, "not one of X.509"),
}


@pytest.mark.parametrize(("slips", "says"), CERTIFICATES_REFUSED.values(), ids=CERTIFICATES_REFUSED)
def test_a_refusal_names_what_the_certificate_has(slips: dict[str, object], says: str) -> None:
    der = factory_certificate(**slips).der()
    with pytest.raises(ClientCertificateRefused, match=says):
        read_client(der)
    with pytest.raises(ManufacturerInvalid, match=says):
        read_manufacturer_ca(pem("CERTIFICATE", der), now=NOW)


def test_a_csr_is_not_read_as_a_certificate() -> None:
    with pytest.raises(ClientCertificateRefused, match=r"not an X\.509 certificate"):
        read_client(GOOD)


def test_openssl_and_the_portal_read_the_same_key(maker: bytes) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-noout", "-pubkey"], input=maker, check=True, capture_output=True
    ).stdout
    judged = load_pem_public_key(shown)
    assert judged == CA_KEY.public_key()
    read = read_client(maker)
    assert base64.b16encode(judged.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)) != b""
    assert read.certificate.strict.public_key() == judged
