"""What the certificate authority signs."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import TypeVar
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID

import ca
import config
from core.errors import CaKeyUnavailable, InputInvalid, IssuerUnusable, KeyRefused, SettingInvalid, SignatureCheckFailed
from pki.algorithms import KeyType, PrivateKey, private_key_pem, public_key_der, public_key_fingerprint
from pki.issuers import CLOCK_SKEW, Issuer, signing_key
from tests.support.ca_hierarchy import PKI_URL, HeldElsewhere, Hierarchy, MakeKey, make_hierarchy

NOW = datetime(2030, 6, 15, 12, 30, 45, 678901, tzinfo=UTC)
SECOND = NOW.replace(microsecond=0)
DEVICE_ID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"

T = TypeVar("T", bound=x509.ExtensionType)


@pytest.fixture(scope="module")
def cas(make_ca_key: MakeKey) -> Hierarchy:
    return make_hierarchy(NOW, make_ca_key)


@pytest.fixture(scope="module")
def keys() -> dict[KeyType, PrivateKey]:
    return {key_type: ca.generate_keypair(key_type) for key_type in KeyType}


def value(certificate: x509.Certificate, kind: type[T], *, critical: bool) -> T:
    extension = certificate.extensions.get_extension_for_class(kind)
    assert extension.critical is critical
    return extension.value


def usages(certificate: x509.Certificate) -> set[str]:
    usage = value(certificate, x509.KeyUsage, critical=True)
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    return {name for name in [*names, "key_cert_sign", "crl_sign"] if getattr(usage, name)}


def common_names(name: x509.Name) -> list[str | bytes]:
    return [attribute.value for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME)]


def issuer_with_key(issuer: Issuer, *, damage: bool) -> Issuer:
    assert isinstance(issuer.key, ec.EllipticCurvePrivateKey)
    return Issuer(issuer.name, issuer.certificate, HeldElsewhere(issuer.key, damage=damage))


# --- Keys ---------------------------------------------------------------------------------------------------------


def test_the_key_types_are_those_of_the_settings() -> None:
    assert tuple(KeyType) == config.KEY_TYPES


@pytest.mark.parametrize("key_type", KeyType)
def test_a_private_key_is_written_as_pkcs8_that_loads_again(key_type: KeyType, keys: dict[KeyType, PrivateKey]) -> None:
    pem = private_key_pem(keys[key_type])
    loaded = load_pem_private_key(pem, None)
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert loaded.public_key() == keys[key_type].public_key()


def test_a_public_key_fingerprint_is_the_sha256_of_the_spki(keys: dict[KeyType, PrivateKey]) -> None:
    public_key = keys[KeyType.ED25519].public_key()
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_key_der(public_key))
    assert public_key_fingerprint(public_key) == digest.finalize().hex()


# --- CA certificates ----------------------------------------------------------------------------------------------


def test_the_root_signs_itself_with_sha384_to_sign_one_tier_of_cas(cas: Hierarchy) -> None:
    certificate = cas.root.certificate
    certificate.verify_directly_issued_by(certificate)
    assert certificate.version is x509.Version.v3
    assert certificate.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA384
    assert common_names(certificate.subject) == ["Test Root CA"]
    assert value(certificate, x509.BasicConstraints, critical=True) == x509.BasicConstraints(ca=True, path_length=1)
    assert usages(certificate) == {"key_cert_sign", "crl_sign"}
    assert certificate.not_valid_before_utc == SECOND - CLOCK_SKEW
    assert certificate.not_valid_after_utc == SECOND + timedelta(days=7300)


def test_the_issuing_ca_signs_end_entities_of_tls_only(cas: Hierarchy) -> None:
    certificate = cas.issuing.certificate
    certificate.verify_directly_issued_by(cas.root.certificate)
    assert value(certificate, x509.BasicConstraints, critical=True) == x509.BasicConstraints(ca=True, path_length=0)
    assert usages(certificate) == {"digital_signature", "key_cert_sign", "crl_sign"}
    assert set(value(certificate, x509.ExtendedKeyUsage, critical=False)) == {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    }
    assert locations_of(certificate) == (f"{PKI_URL}/crl/root.crl", f"{PKI_URL}/ca/root.cer")
    assert certificate.not_valid_after_utc == SECOND + timedelta(days=1825)


def test_an_issuing_ca_never_outlives_its_root() -> None:
    cas = make_hierarchy(NOW, root_days=100, issuing_days=1000)
    assert cas.issuing.not_after == cas.root.not_after == SECOND + timedelta(days=100)


def test_a_device_never_outlives_its_issuer(cas: Hierarchy) -> None:
    issued = cas.device(now=NOW + timedelta(days=1800))
    assert issued.not_after == cas.issuing.not_after


def test_a_device_certificate_does_not_begin_before_its_issuer(cas: Hierarchy) -> None:
    moment = cas.issuing.not_before + timedelta(seconds=10)
    assert cas.device(now=moment).not_before == cas.issuing.not_before


@pytest.mark.parametrize(
    "moment",
    [NOW - CLOCK_SKEW - timedelta(seconds=1), NOW + timedelta(days=1825), NOW + timedelta(days=5000)],
)
def test_an_issuer_that_is_out_of_date_signs_no_certificate(cas: Hierarchy, moment: datetime) -> None:
    with pytest.raises(IssuerUnusable, match="check the clock"):
        cas.device(now=moment)


@pytest.mark.parametrize(
    "name", ["", "Root", "../root", "a/b", "-root", "root-", "root.crl", "x" * 64, "ro ot", "root\n"]
)
def test_an_issuer_name_must_be_a_slug(cas: Hierarchy, name: str) -> None:
    with pytest.raises(IssuerUnusable):
        Issuer(name, cas.root.certificate)


def test_an_issuer_refuses_a_key_of_another_ca(cas: Hierarchy) -> None:
    with pytest.raises(CaKeyUnavailable, match="does not belong"):
        Issuer("root", cas.root.certificate, cas.issuing.key)


def test_an_end_entity_is_no_issuer(cas: Hierarchy) -> None:
    with pytest.raises(IssuerUnusable):
        Issuer("device", cas.device().certificate)


def test_without_its_private_key_an_issuer_signs_nothing(cas: Hierarchy) -> None:
    away = Issuer("root", cas.root.certificate)
    public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
    with pytest.raises(IssuerUnusable, match="not on this machine"):
        ca.create_issuing(away, public_key, common_name="Issuing 2", now=NOW, days=10, pki_url=PKI_URL)
    with pytest.raises(IssuerUnusable, match="not on this machine"):
        cas.crl(issuer=away)


def test_an_issuer_does_not_show_its_key(cas: Hierarchy) -> None:
    assert "PrivateKey" not in repr(cas.issuing)


@pytest.mark.parametrize("common_name", ["", "x" * 65, "Root\nCA", "Root\x00"])
def test_a_ca_name_must_be_short_printable_text(common_name: str) -> None:
    with pytest.raises(SettingInvalid):
        ca.create_root(ca.generate_keypair(KeyType.EC_P384), common_name=common_name, now=NOW, days=10)


# --- Device certificates ------------------------------------------------------------------------------------------


def locations_of(certificate: x509.Certificate) -> tuple[str, str]:
    (point,) = value(certificate, x509.CRLDistributionPoints, critical=False)
    access = value(certificate, x509.AuthorityInformationAccess, critical=False)[0]
    assert access.access_method == AuthorityInformationAccessOID.CA_ISSUERS
    assert point.full_name is not None
    (name,) = point.full_name
    return name.value, access.access_location.value


@pytest.mark.parametrize("key_type", KeyType)
def test_a_device_certificate_has_the_device_profile(
    cas: Hierarchy, keys: dict[KeyType, PrivateKey], key_type: KeyType
) -> None:
    public_key = keys[key_type].public_key()
    certificate = cas.device(public_key, device_id=DEVICE_ID).certificate

    certificate.verify_directly_issued_by(cas.issuing.certificate)
    assert certificate.version is x509.Version.v3
    assert certificate.public_key() == public_key
    assert certificate.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA256
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE_ID}"
    san = value(certificate, x509.SubjectAlternativeName, critical=False)
    assert list(san) == [x509.UniformResourceIdentifier(f"urn:uuid:{DEVICE_ID}")]
    assert value(certificate, x509.BasicConstraints, critical=True) == x509.BasicConstraints(False, None)
    assert usages(certificate) == {"digital_signature"}
    assert list(value(certificate, x509.ExtendedKeyUsage, critical=False)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    key_identifier = value(certificate, x509.SubjectKeyIdentifier, critical=False)
    assert key_identifier == x509.SubjectKeyIdentifier.from_public_key(public_key)
    issuer_identifier = value(cas.issuing.certificate, x509.SubjectKeyIdentifier, critical=False)
    authority = value(certificate, x509.AuthorityKeyIdentifier, critical=False)
    assert authority.key_identifier == issuer_identifier.digest
    assert locations_of(certificate) == (f"{PKI_URL}/crl/issuing-1.crl", f"{PKI_URL}/ca/issuing-1.cer")
    assert certificate.not_valid_before_utc == SECOND - CLOCK_SKEW
    assert certificate.not_valid_after_utc == SECOND + timedelta(days=365)
    assert len(certificate.extensions) == 8


def test_what_is_issued_says_of_the_certificate_what_the_certificate_says(cas: Hierarchy) -> None:
    issued = cas.device()
    certificate = x509.load_der_x509_certificate(issued.der)
    assert x509.load_pem_x509_certificates(issued.pem.encode()) == [certificate] == [issued.certificate]
    assert issued.serial_number == f"{certificate.serial_number:x}"
    assert issued.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
    assert issued.not_before == certificate.not_valid_before_utc
    assert issued.not_after == certificate.not_valid_after_utc


def test_of_a_second_certificate_only_the_extensions_that_are_its_own_are_encoded(
    cas: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {type(one.value) for one in cas.device().certificate.extensions}
    encoded: list[type[x509.ExtensionType]] = []

    def counted(kind: type[x509.ExtensionType]) -> Callable[[x509.ExtensionType], bytes]:
        encode = kind.public_bytes

        def public_bytes(extension: x509.ExtensionType) -> bytes:
            encoded.append(kind)
            return encode(extension)

        return public_bytes

    for kind in kinds:
        monkeypatch.setattr(kind, "public_bytes", counted(kind))
    cas.device()
    assert len(kinds) == 8
    assert sorted(kind.__name__ for kind in encoded) == ["SubjectAlternativeName", "SubjectKeyIdentifier"]


def test_serial_numbers_are_20_bytes_positive_and_never_the_same(cas: Hierarchy) -> None:
    public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
    serial_numbers = [cas.device(public_key).serial_number for _ in range(100)]
    assert len(set(serial_numbers)) == 100
    assert all(len(number) == 40 and 4 <= int(number[0], 16) <= 7 for number in serial_numbers)
    # Beyond the fixed top bits, each of the 158 others is seen both ways (2^-100 by chance).
    either = [0, 0]
    for number in serial_numbers:
        either = [either[0] | int(number, 16), either[1] | ~int(number, 16)]
    assert all(pattern & (1 << 158) - 1 == (1 << 158) - 1 for pattern in either)


def test_the_moment_may_come_in_any_time_zone(cas: Hierarchy) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5, minutes=45)))
    assert cas.device(now=elsewhere).not_before == SECOND - CLOCK_SKEW


def test_a_moment_without_time_zone_is_refused(cas: Hierarchy) -> None:
    with pytest.raises(ValueError, match="aware"):
        cas.device(now=NOW.replace(tzinfo=None))


def test_a_certificate_may_end_after_2049() -> None:
    cas = make_hierarchy(NOW, root_days=36500, issuing_days=36000)
    issued = cas.device(now=NOW + timedelta(days=20000))
    assert issued.not_after == SECOND + timedelta(days=20365)


@pytest.mark.parametrize(
    "device_id",
    [
        "",
        "device",
        DEVICE_ID.upper(),
        f"{{{DEVICE_ID}}}",
        DEVICE_ID.replace("-", ""),
        f"{DEVICE_ID}\n",
        f"{DEVICE_ID}/#",
    ],
)
def test_a_device_id_must_be_a_uuid(cas: Hierarchy, device_id: str) -> None:
    public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
    with pytest.raises(InputInvalid):
        ca.sign_certificate(cas.issuing, public_key, device_id=device_id, now=NOW, days=1, pki_url=PKI_URL)


def test_nobody_gets_a_certificate_for_the_issuers_own_key(cas: Hierarchy) -> None:
    with pytest.raises(KeyRefused, match="CA's own"):
        cas.device(signing_key(cas.issuing).public_key())


def test_a_weak_key_is_refused_at_the_signature_too(cas: Hierarchy) -> None:
    with pytest.raises(KeyRefused, match="secp256k1"):
        cas.device(ec.generate_private_key(ec.SECP256K1()).public_key())


@pytest.mark.parametrize("pki_url", ["", "pki.example.com", "http://pki.example.com/ä", "http://a b", "file:///etc"])
def test_the_base_of_urls_must_be_plain_http(cas: Hierarchy, pki_url: str) -> None:
    public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
    with pytest.raises(SettingInvalid):
        ca.sign_certificate(cas.issuing, public_key, device_id=DEVICE_ID, now=NOW, days=1, pki_url=pki_url)


def test_a_chain_is_pem_in_the_order_given(cas: Hierarchy) -> None:
    chain = [cas.device().certificate, cas.issuing.certificate, cas.root.certificate]
    pem = ca.chain_pem(*chain)
    assert x509.load_pem_x509_certificates(pem.encode()) == chain
    assert pem.endswith("-----END CERTIFICATE-----\n")


# --- Server certificates ------------------------------------------------------------------------------------------


def test_a_server_certificate_has_the_server_profile(cas: Hierarchy) -> None:
    certificate = cas.server("localhost", "127.0.0.1", "::1", "*.example.com", "localhost").certificate
    assert common_names(certificate.subject) == ["localhost"]
    assert list(value(certificate, x509.SubjectAlternativeName, critical=False)) == [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address("::1")),
        x509.DNSName("*.example.com"),
    ]
    assert list(value(certificate, x509.ExtendedKeyUsage, critical=False)) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert value(certificate, x509.BasicConstraints, critical=True) == x509.BasicConstraints(False, None)
    assert usages(certificate) == {"digital_signature"}
    assert certificate.not_valid_after_utc == SECOND + timedelta(days=90)


def test_a_name_too_long_for_a_common_name_is_in_a_critical_san_alone(cas: Hierarchy) -> None:
    name = f"{'a' * 60}.example.com"
    certificate = cas.server(name).certificate
    assert list(certificate.subject) == []
    assert list(value(certificate, x509.SubjectAlternativeName, critical=True)) == [x509.DNSName(name)]


@pytest.mark.parametrize(
    "name",
    [
        *("", "a b", "my_host", "-a.example", "a..b", "a.example.", "*", "*.*.example", "a.*.example", "host:8443"),
        *("10.0.0.256", "fe80::1%eth0", "10.0.0.0/8", "ä.example", "x" * 64, "a." * 126 + "ab", "host\n", "a\x00.b"),
    ],
)
def test_a_server_name_must_be_a_dns_name_or_an_ip_address(cas: Hierarchy, name: str) -> None:
    with pytest.raises(SettingInvalid):
        cas.server("localhost", name)


def test_a_server_certificate_needs_a_name(cas: Hierarchy) -> None:
    with pytest.raises(SettingInvalid):
        cas.server()


# --- The check of what was signed ---------------------------------------------------------------------------------


def test_a_key_held_elsewhere_can_sign(cas: Hierarchy) -> None:
    issuer = issuer_with_key(cas.issuing, damage=False)
    issued = ca.sign_certificate(
        issuer,
        ca.generate_keypair(KeyType.EC_P256).public_key(),
        device_id=str(uuid4()),
        now=NOW,
        days=1,
        pki_url=PKI_URL,
    )
    issued.certificate.verify_directly_issued_by(cas.issuing.certificate)


def test_a_certificate_with_a_wrong_signature_is_never_released(cas: Hierarchy) -> None:
    issuer = issuer_with_key(cas.issuing, damage=True)
    public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
    with pytest.raises(SignatureCheckFailed):
        ca.sign_certificate(issuer, public_key, device_id=DEVICE_ID, now=NOW, days=1, pki_url=PKI_URL)


def test_a_root_with_a_wrong_signature_is_never_released() -> None:
    key = HeldElsewhere(ec.generate_private_key(ec.SECP384R1()), damage=True)
    with pytest.raises(SignatureCheckFailed):
        ca.create_root(key, common_name="Root", now=NOW, days=1)


def test_a_crl_with_a_wrong_signature_is_never_released(cas: Hierarchy) -> None:
    with pytest.raises(SignatureCheckFailed):
        cas.crl(issuer=issuer_with_key(cas.issuing, damage=True))
