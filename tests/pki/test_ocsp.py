"""How OCSP requests are read and answers signed, judged by the classes of cryptography."""

from __future__ import annotations

import dataclasses
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID

import ca
from core.errors import IssuerUnusable, RequestMalformed, SignatureCheckFailed
from pki import ocsp as pki_ocsp
from pki.algorithms import KeyType, private_key_pem
from pki.issuers import Issuer, Reason, signing_key
from pki.keys.token_keys import is_in_token
from pki.ocsp import (
    GOOD,
    MAX_BYTES,
    MAX_CERTIFICATES,
    MAX_EXTENSIONS,
    MAX_LAX_BYTES,
    UNKNOWN,
    CertStatus,
    Failure,
    Status,
)
from tests.support.ca_hierarchy import HeldElsewhere, Hierarchy, MakeKey, make_hierarchy
from tests.support.ocsp import NONCE, SERVICE_LOCATOR, Ocsp, ask, cert_id, extension, integer, nonce, sequence, tlv

NOW = datetime(2030, 6, 15, 12, 30, 45, 678901, tzinfo=UTC)
SECOND = NOW.replace(microsecond=0)
SERIAL_NUMBER = 0x4A5B6C
HASHES = ["sha1", "sha256", "sha384", "sha512"]


@pytest.fixture(scope="module")
def cas(make_ca_key: MakeKey) -> Hierarchy:
    return make_hierarchy(NOW, make_ca_key)


def responder_pem(issuer: Issuer, key_type: KeyType = KeyType.EC_P256) -> tuple[bytes, ca.Issued]:
    key = ca.generate_keypair(key_type)
    issued = ca.sign_responder_certificate(issuer, key.public_key(), now=NOW, days=14)
    return private_key_pem(key) + issued.pem.encode(), issued


@pytest.fixture(scope="module")
def signer(cas: Hierarchy) -> pki_ocsp.Signer:
    return pki_ocsp.open_signer(responder_pem(cas.issuing)[0], cas.issuing)


def answer(signer: pki_ocsp.Signer, der: bytes, *statuses: Status, now: datetime = NOW) -> bytes:
    request = pki_ocsp.read_request(der)
    return pki_ocsp.sign_response(
        signer,
        list(zip(request.questions, statuses, strict=True)),
        nonce=request.nonce,
        now=now,
        next_update=now + timedelta(hours=24),
    )


@pytest.fixture(params=["the machine's time", "another time"])
def now(request: pytest.FixtureRequest) -> datetime:
    """The time of an answer: cryptography encodes only those of the machine's own time."""
    return datetime.now(UTC) if request.param == "the machine's time" else NOW


# --- The responder's certificate ----------------------------------------------------------------------------------


def test_a_responder_certificate_is_for_ocsp_alone_and_not_to_be_checked_itself(cas: Hierarchy) -> None:
    certificate = responder_pem(cas.issuing)[1].certificate
    certificate.verify_directly_issued_by(cas.issuing.certificate)
    extensions = certificate.extensions
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.OCSP_SIGNING]
    assert not extensions.get_extension_for_class(x509.OCSPNoCheck).critical
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    for kind in (x509.AuthorityInformationAccess, x509.CRLDistributionPoints):
        with pytest.raises(x509.ExtensionNotFound):
            extensions.get_extension_for_class(kind)
    assert certificate.not_valid_after_utc == SECOND + timedelta(days=14)


def test_certificates_of_devices_and_servers_name_the_responder_and_an_issuing_cas_the_crl_alone(
    cas: Hierarchy,
) -> None:
    def told(certificate: x509.Certificate) -> list[str]:
        access = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
        return [str(item.access_location.value) for item in access]

    urls = ["http://pki.example.com:8080/ca/issuing-1.cer", "http://pki.example.com:8080/ocsp"]
    assert told(cas.device().certificate) == urls
    assert told(cas.server("localhost").certificate) == urls
    assert told(cas.issuing.certificate) == ["http://pki.example.com:8080/ca/root.cer"]


def test_a_responder_of_no_use_is_not_opened(cas: Hierarchy) -> None:
    good, issued = responder_pem(cas.issuing)
    of_another, _ = responder_pem(cas.issuing)
    key, other_key = (pem.partition(b"-----BEGIN CERTIFICATE")[0] for pem in (good, of_another))
    device_key = ca.generate_keypair(KeyType.EC_P256)
    device = private_key_pem(device_key) + cas.device(device_key.public_key()).pem.encode()
    ca_key = signing_key(cas.issuing)
    ca_pem = b"" if is_in_token(ca_key) else private_key_pem(ca_key)
    unusable = [b"", key, issued.pem.encode(), other_key + issued.pem.encode(), good[:-100], device]
    unusable += [responder_pem(cas.issuing, kind)[0] for kind in (KeyType.RSA_2048, KeyType.ED25519)]
    unusable += [ca_pem + ca.chain_pem(cas.issuing.certificate).encode(), responder_pem(cas.root)[0]]
    for pem in unusable:
        with pytest.raises(IssuerUnusable, match="issuing-1"):
            pki_ocsp.open_signer(pem, cas.issuing)
    assert pki_ocsp.open_signer(issued.pem.encode() + key, cas.issuing).certificate == issued.certificate


# --- Requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", HASHES)
@pytest.mark.parametrize("parameters", [b"\x05\x00", b""], ids=["NULL", "absent"])
@pytest.mark.parametrize("of", ["root", "issuing"])
def test_a_ca_is_known_by_the_hashes_of_its_name_and_its_key(
    cas: Hierarchy, algorithm: str, parameters: bytes, of: str
) -> None:
    issuer: Issuer = getattr(cas, of)
    der = Ocsp([cert_id(issuer.certificate, SERIAL_NUMBER, algorithm=algorithm, parameters=parameters)]).der()
    [question] = pki_ocsp.read_request(der).questions
    assert question.issuer in pki_ocsp.issuer_ids(issuer)
    assert question.serial_number == "4a5b6c"


@pytest.mark.parametrize("algorithm", ["SHA1", "SHA256", "SHA384", "SHA512"])
def test_requests_of_cryptography_are_read(cas: Hierarchy, algorithm: str) -> None:
    certificate, issuer = cas.device().certificate, cas.issuing.certificate
    builder = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, getattr(hashes, algorithm)())
    builder = builder.add_extension(x509.OCSPNonce(b"n" * 32), critical=False)
    request = pki_ocsp.read_request(builder.build().public_bytes(Encoding.DER))
    assert [question.serial_number for question in request.questions] == [f"{certificate.serial_number:x}"]
    assert request.questions[0].issuer in pki_ocsp.issuer_ids(cas.issuing)
    assert request.nonce == tlv(4, b"n" * 32)


OPENSSL = {
    "one certificate": ["-no_nonce"],
    "a nonce": [],
    "SHA-256": ["-sha256", "-no_nonce"],
    "signed, with the signer's name": ["-signer", "signer.pem", "-signkey", "signer.key"],
}


@pytest.fixture(scope="module")
def folder(cas: Hierarchy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the issuer, two devices, and somebody who signs a request, all in PEM."""
    folder = tmp_path_factory.mktemp("openssl")
    key = ca.generate_keypair(KeyType.EC_P256)
    (folder / "signer.key").write_bytes(private_key_pem(key))
    certificates = {"issuer": cas.issuing.certificate, "signer": cas.device(key.public_key()).certificate}
    certificates |= {name: cas.device().certificate for name in ("first", "second")}
    for name, certificate in certificates.items():
        (folder / f"{name}.pem").write_text(ca.chain_pem(certificate))
    return folder


@pytest.mark.parametrize("devices", [["first"], ["first", "second"]], ids=["one", "two"])
@pytest.mark.parametrize("options", OPENSSL.values(), ids=OPENSSL)
def test_requests_of_openssl_are_read(cas: Hierarchy, folder: Path, options: list[str], devices: list[str]) -> None:
    certificates = [f"-cert={name}.pem" for name in devices]
    command = ["openssl", "ocsp", *[part for part in options if part == "-sha256"], "-issuer", "issuer.pem"]
    command += [part for certificate in certificates for part in certificate.split("=")]
    command += [*[part for part in options if part != "-sha256"], "-reqout", "request.der"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    request = pki_ocsp.read_request((folder / "request.der").read_bytes())
    serial_numbers = [
        f"{x509.load_pem_x509_certificate((folder / f'{name}.pem').read_bytes()).serial_number:x}" for name in devices
    ]
    assert [question.serial_number for question in request.questions] == serial_numbers
    assert all(question.issuer in pki_ocsp.issuer_ids(cas.issuing) for question in request.questions)
    assert (request.nonce is None) == ("-no_nonce" in options)


ACCEPTABLE_RESPONSES, PREFERRED_SIGNATURES = "2b0601050507300104", "2b0601050507300108"
BASIC_RESPONSE = sequence(tlv(6, bytes.fromhex("2b0601050507300101")))
ECDSA_WITH_SHA256 = sequence(sequence(sequence(tlv(6, bytes.fromhex("2a8648ce3d040302")))))
EXPLICIT_FALSE = sequence(tlv(6, bytes.fromhex(ACCEPTABLE_RESPONSES)), tlv(1, b"\x00"), tlv(4, BASIC_RESPONSE))
CLIENTS = {
    "Java: a nonce of 16 bytes": {"extensions": [nonce(b"n" * 16)]},
    "Java: a nonce that is critical": {"extensions": [extension(NONCE, tlv(4, b"n" * 32), critical=True)]},
    "GnuTLS: a nonce of 23 bytes": {"extensions": [nonce(b"n" * 23)]},
    "NSS: the acceptable responses": {"extensions": [extension(ACCEPTABLE_RESPONSES, BASIC_RESPONSE)]},
    "Go, BouncyCastle: signatures preferred": {"extensions": [extension(PREFERRED_SIGNATURES, ECDSA_WITH_SHA256)]},
    "nonce and acceptable responses": {"extensions": [nonce(b"n"), extension(ACCEPTABLE_RESPONSES, BASIC_RESPONSE)]},
    "the default version": {"version": tlv(0xA0, integer(0))},
    "the default criticality": {"extensions": [EXPLICIT_FALSE]},
    "the default criticality, of one": {"single_extensions": EXPLICIT_FALSE},
}


@pytest.mark.parametrize("serial_numbers", [[5], [5, 6, 7]], ids=["one", "several"])
@pytest.mark.parametrize("parts", CLIENTS.values(), ids=CLIENTS)
def test_requests_with_the_parts_that_other_clients_write_are_read(
    cas: Hierarchy, parts: dict[str, Any], serial_numbers: list[int]
) -> None:
    plain = ask(cas.issuing.certificate, *serial_numbers)
    request = pki_ocsp.read_request(dataclasses.replace(plain, **parts).der())
    assert [question.serial_number for question in request.questions] == [f"{number:x}" for number in serial_numbers]
    assert (request.nonce is not None) == any(NONCE in each.hex() for each in parts.get("extensions", []))


def test_both_hashes_must_be_those_of_one_ca(cas: Hierarchy) -> None:
    known = pki_ocsp.issuer_ids(cas.issuing)
    issuing, root = cas.issuing.certificate, cas.root.certificate
    for mixed in (cert_id(issuing, 1, name_of=root), cert_id(issuing, 1, key_of=root)):
        assert pki_ocsp.read_request(Ocsp([mixed]).der()).questions[0].issuer not in known


@pytest.mark.parametrize("algorithm", ["md5", "sha224"])
def test_a_hash_that_is_not_known_names_nobody(cas: Hierarchy, algorithm: str) -> None:
    request = pki_ocsp.read_request(ask(cas.issuing.certificate, 1, algorithm=algorithm).der())
    assert request.questions[0].issuer not in pki_ocsp.issuer_ids(cas.issuing)


def test_several_certificates_may_be_asked_about(cas: Hierarchy) -> None:
    request = pki_ocsp.read_request(ask(cas.issuing.certificate, *range(1, MAX_CERTIFICATES + 1)).der())
    assert [question.serial_number for question in request.questions] == [
        f"{number:x}" for number in range(1, MAX_CERTIFICATES + 1)
    ]


@pytest.mark.parametrize("number", [0, -1, 255, 1 << 159, 1 << 4000])
def test_any_serial_number_may_be_asked_about(cas: Hierarchy, number: int) -> None:
    assert pki_ocsp.read_request(ask(cas.issuing.certificate, number).der()).questions[0].serial_number == f"{number:x}"


def test_what_is_of_no_account_is_passed_over(cas: Hierarchy) -> None:
    plain = ask(cas.issuing.certificate, 1)
    name = tlv(0xA1, tlv(0xA4, cas.root.certificate.subject.public_bytes()))
    signature = tlv(0xA0, sequence(sequence(tlv(6, b"\x2a\x03")), tlv(3, b"\x00\x01"), tlv(0xA0, sequence())))
    locator = extension(SERVICE_LOCATOR, sequence(cas.issuing.certificate.subject.public_bytes()))
    for more in (
        {"version": tlv(0xA0, integer(0))},
        {"requestor": name, "signature": signature},
        {"requestor": tlv(0xA1, tlv(0x81, b"somebody@example.com"))},
        {"single_extensions": locator},
        {"extensions": [extension("2a03", b"\x05\x00")]},
    ):
        assert pki_ocsp.read_request(dataclasses.replace(plain, **more).der()).questions


@pytest.mark.parametrize("length", [1, 16, 32, 128])
def test_a_nonce_of_1_to_128_bytes_is_kept_as_it_came(cas: Hierarchy, length: int) -> None:
    request = dataclasses.replace(ask(cas.issuing.certificate, 1), extensions=[nonce(b"n" * length)])
    assert pki_ocsp.read_request(request.der()).nonce == tlv(4, b"n" * length)


def test_a_nonce_is_repeated_even_if_it_is_not_the_only_extension(cas: Hierarchy) -> None:
    extensions = [nonce(b"n" * 20), extension(ACCEPTABLE_RESPONSES, BASIC_RESPONSE)]
    request = dataclasses.replace(ask(cas.issuing.certificate, 1), extensions=extensions)
    assert pki_ocsp.read_request(request.der()).nonce == tlv(4, b"n" * 20)


def unknown_extensions(count: int) -> list[bytes]:
    return [extension(f"2a{number:02x}", b"") for number in range(1, count + 1)]


def lax(plain: Ocsp, size: int) -> bytes:
    """A request of ``size`` bytes that is not quite DER: it has the default version."""
    whole = dataclasses.replace(plain, version=tlv(0xA0, integer(0)), requestor=tlv(0xA1, tlv(0x82, b"x" * 1000)))
    more = size - len(whole.der())
    return dataclasses.replace(whole, requestor=tlv(0xA1, tlv(0x82, b"x" * (1000 + more)))).der()


def test_a_request_that_is_not_quite_der_may_have_4096_bytes(cas: Hierarchy) -> None:
    plain = ask(cas.issuing.certificate, 1)
    assert len(lax(plain, MAX_LAX_BYTES)) == MAX_LAX_BYTES
    assert pki_ocsp.read_request(lax(plain, MAX_LAX_BYTES)).questions
    with pytest.raises(RequestMalformed):
        pki_ocsp.read_request(lax(plain, MAX_LAX_BYTES + 1))


def test_the_limits_of_a_request_are_the_documented_ones() -> None:
    assert (MAX_BYTES, MAX_LAX_BYTES, MAX_CERTIFICATES, MAX_EXTENSIONS) == (32_768, 4096, 100, 8)


def test_a_request_has_at_most_32_kib(cas: Hierarchy) -> None:
    plain = ask(cas.issuing.certificate, 1)
    name = b"x" * (MAX_BYTES - len(dataclasses.replace(plain, requestor=tlv(0xA1, tlv(0x82, b"x" * 30_000))).der()))
    longest = dataclasses.replace(plain, requestor=tlv(0xA1, tlv(0x82, b"x" * 30_000 + name)))
    assert len(longest.der()) == MAX_BYTES
    assert pki_ocsp.read_request(longest.der()).questions
    longer = dataclasses.replace(plain, requestor=tlv(0xA1, tlv(0x82, b"x" * 30_001 + name)))
    with pytest.raises(RequestMalformed, match="longer"):
        pki_ocsp.read_request(longer.der())


@pytest.mark.parametrize("serial_numbers", [[5], [5, 6]], ids=["one", "two"])
def test_as_many_extensions_as_a_list_may_have_are_read(cas: Hierarchy, serial_numbers: list[int]) -> None:
    plain = ask(cas.issuing.certificate, *serial_numbers)
    most = unknown_extensions(MAX_EXTENSIONS)
    request = dataclasses.replace(plain, extensions=most, single_extensions=b"".join(most))
    assert len(pki_ocsp.read_request(request.der()).questions) == len(serial_numbers)


MALFORMED = {
    "a nonce with bytes after it": lambda plain: dataclasses.replace(
        plain, extensions=[extension(NONCE, tlv(4, b"n") + b"\x00")]
    ),
    "an extension twice": lambda plain: dataclasses.replace(plain, extensions=[*unknown_extensions(1)] * 2),
    "an extension of one twice": lambda plain: dataclasses.replace(
        plain, single_extensions=b"".join(unknown_extensions(1) * 2)
    ),
    "nine extensions": lambda plain: dataclasses.replace(plain, extensions=unknown_extensions(MAX_EXTENSIONS + 1)),
    "nine extensions of one": lambda plain: dataclasses.replace(
        plain, single_extensions=b"".join(unknown_extensions(MAX_EXTENSIONS + 1))
    ),
    "a hash with parameters": lambda plain: dataclasses.replace(
        plain, cert_ids=[plain.cert_ids[0].replace(b"\x05\x00", b"\x01\x00", 1)]
    ),
    "no certificate": lambda plain: dataclasses.replace(plain, cert_ids=[]),
    "101 certificates": lambda plain: dataclasses.replace(plain, cert_ids=[*plain.cert_ids] * 101),
    "500 certificates": lambda plain: dataclasses.replace(plain, cert_ids=[*plain.cert_ids] * 500),
    "version 2": lambda plain: dataclasses.replace(plain, version=tlv(0xA0, integer(1))),
    "an empty nonce": lambda plain: dataclasses.replace(plain, extensions=[nonce(b"")]),
    "a nonce of 129 bytes": lambda plain: dataclasses.replace(plain, extensions=[nonce(b"n" * 129)]),
    "two nonces": lambda plain: dataclasses.replace(plain, extensions=[nonce(b"n"), nonce(b"m")]),
    "a nonce that is no OCTET STRING": lambda plain: dataclasses.replace(
        plain, extensions=[extension("2b0601050507300102", b"bare")]
    ),
    "an unknown critical extension": lambda plain: dataclasses.replace(
        plain, extensions=[extension("2a03", b"", critical=True)]
    ),
    "an unknown critical extension of one": lambda plain: dataclasses.replace(
        plain, single_extensions=extension("2a03", b"", critical=True)
    ),
}


@pytest.mark.parametrize("serial_numbers", [[5], [5, 6]], ids=["one", "two"])
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_request_with_a_fault_is_malformed(cas: Hierarchy, fault: str, serial_numbers: list[int]) -> None:
    der = MALFORMED[fault](ask(cas.issuing.certificate, *serial_numbers)).der()
    with pytest.raises(RequestMalformed):
        pki_ocsp.read_request(der)


@pytest.mark.parametrize("der", [b"", b"0", b"\x30\x00", b"\x30\x80\x00\x00", b"hello", b"\x00" * 40000, tlv(4, b"x")])
def test_what_is_no_request_is_malformed(der: bytes) -> None:
    with pytest.raises(RequestMalformed):
        pki_ocsp.read_request(der)


def test_a_request_that_is_cut_short_or_too_long_is_malformed(cas: Hierarchy) -> None:
    der = ask(cas.issuing.certificate, 1).der()
    for length in range(len(der)):
        with pytest.raises(RequestMalformed):
            pki_ocsp.read_request(der[:length])
    with pytest.raises(RequestMalformed):
        pki_ocsp.read_request(der + b"\x00")


# --- Answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", HASHES)
def test_an_answer_says_what_is_known_at_what_time(
    cas: Hierarchy, signer: pki_ocsp.Signer, algorithm: str, now: datetime
) -> None:
    request = ask(cas.issuing.certificate, SERIAL_NUMBER, algorithm=algorithm)
    der = answer(signer, request.der(), GOOD, now=now)
    read = ocsp.load_der_ocsp_response(der)
    assert read.response_status is ocsp.OCSPResponseStatus.SUCCESSFUL
    assert read.certificate_status is ocsp.OCSPCertStatus.GOOD
    assert request.cert_ids[0] in der
    assert (read.serial_number, read.hash_algorithm.name) == (SERIAL_NUMBER, algorithm)
    assert read.this_update_utc == now.replace(microsecond=0)
    assert read.next_update_utc == read.this_update_utc + timedelta(hours=24)
    assert len(read.extensions) == 0


@pytest.mark.parametrize("hours", [-25, -1, 1])
def test_an_answer_is_produced_when_its_status_was_known_or_when_it_was_signed_and_never_before(
    cas: Hierarchy, signer: pki_ocsp.Signer, hours: int
) -> None:
    now = datetime.now(UTC) + timedelta(hours=hours)
    request = ask(cas.issuing.certificate, 1).der()
    read = ocsp.load_der_ocsp_response(answer(signer, request, GOOD, now=now))
    assert read.this_update_utc == now.replace(microsecond=0)
    assert read.next_update_utc is not None
    assert read.this_update_utc <= read.produced_at_utc <= read.next_update_utc
    assert read.produced_at_utc == read.this_update_utc or hours == -1


def test_an_answer_is_signed_by_the_responder_whose_certificate_is_in_it(
    cas: Hierarchy, signer: pki_ocsp.Signer, now: datetime
) -> None:
    read = ocsp.load_der_ocsp_response(answer(signer, ask(cas.issuing.certificate, 1).der(), GOOD, now=now))
    [certificate] = read.certificates
    public_key = certificate.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    public_key.verify(read.signature, read.tbs_response_bytes, ec.ECDSA(hashes.SHA256()))
    assert read.responder_key_hash == x509.SubjectKeyIdentifier.from_public_key(public_key).digest
    certificate.verify_directly_issued_by(cas.issuing.certificate)


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.UNSPECIFIED])
def test_a_revoked_certificate_is_answered_with_time_and_reason(
    cas: Hierarchy, signer: pki_ocsp.Signer, reason: Reason, now: datetime
) -> None:
    at = now - timedelta(days=3)
    der = answer(signer, ask(cas.issuing.certificate, 1).der(), Status(CertStatus.REVOKED, at, reason), now=now)
    read = ocsp.load_der_ocsp_response(der)
    assert read.certificate_status is ocsp.OCSPCertStatus.REVOKED
    assert read.revocation_time_utc == at.replace(microsecond=0)
    assert read.revocation_reason is x509.ReasonFlags[reason.value]


def test_unspecified_is_said_by_saying_nothing(cas: Hierarchy, signer: pki_ocsp.Signer, now: datetime) -> None:
    status = Status(CertStatus.REVOKED, now, Reason.UNSPECIFIED)
    der = answer(signer, ask(cas.issuing.certificate, 1).der(), status, now=now)
    assert ocsp.load_der_ocsp_response(der).revocation_reason is None


@pytest.mark.parametrize("serial_number", [0, -1, 127, 128, 1 << 159, 1 << 4000])
@pytest.mark.parametrize("parameters", [b"\x05\x00", b""], ids=["NULL", "absent"])
def test_an_answer_repeats_the_id_of_the_certificate_as_it_came(
    cas: Hierarchy, signer: pki_ocsp.Signer, serial_number: int, parameters: bytes, now: datetime
) -> None:
    asked = cert_id(cas.issuing.certificate, serial_number, parameters=parameters)
    der = answer(signer, Ocsp([asked]).der(), UNKNOWN, now=now)
    assert asked in der
    assert ocsp.load_der_ocsp_response(der).certificate_status is ocsp.OCSPCertStatus.UNKNOWN


def test_several_are_answered_in_their_order_each_under_its_id(cas: Hierarchy, signer: pki_ocsp.Signer) -> None:
    issuing = cas.issuing.certificate
    ids = [cert_id(issuing, 5), cert_id(issuing, 6, algorithm="sha256", parameters=b""), cert_id(issuing, 7)]
    statuses = [GOOD, Status(CertStatus.REVOKED, NOW, Reason.SUPERSEDED), UNKNOWN]
    der = answer(signer, Ocsp(ids).der(), *statuses)
    said = list(ocsp.load_der_ocsp_response(der).responses)
    assert [(each.serial_number, each.certificate_status.name) for each in said] == [
        (5, "GOOD"),
        (6, "REVOKED"),
        (7, "UNKNOWN"),
    ]
    assert all(each in der for each in ids)


@pytest.mark.parametrize("asked", [nonce(b"once"), extension(NONCE, b"\x04\x81\x04once")], ids=["DER", "BER"])
def test_the_nonce_comes_back_as_it_was(cas: Hierarchy, signer: pki_ocsp.Signer, asked: bytes, now: datetime) -> None:
    request = dataclasses.replace(ask(cas.issuing.certificate, 1), extensions=[asked])
    der = answer(signer, request.der(), GOOD, now=now)
    assert asked in der
    if asked == nonce(b"once"):
        read = ocsp.load_der_ocsp_response(der)
        assert read.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce == b"once"


@pytest.mark.parametrize("reason", Failure)
def test_a_failure_is_answered_without_a_signature(reason: Failure) -> None:
    read = ocsp.load_der_ocsp_response(pki_ocsp.failure(reason))
    assert read.response_status.value == reason
    assert read.response_status.name == reason.name


def test_an_answer_that_does_not_verify_is_thrown_away(cas: Hierarchy, signer: pki_ocsp.Signer, now: datetime) -> None:
    damaged = dataclasses.replace(signer, key=HeldElsewhere(signer.key, damage=True))
    with pytest.raises(SignatureCheckFailed):
        answer(damaged, ask(cas.issuing.certificate, 1).der(), GOOD, now=now)


def test_a_signer_never_shows_its_key(signer: pki_ocsp.Signer) -> None:
    assert "rivate" not in repr(signer)
