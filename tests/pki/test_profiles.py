"""What a certificate profile may say, and what it makes of a device: all else is refused, by profile and rule."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import ca
from core.errors import ProfileInvalid, ProfileRefused
from pki.algorithms import KeyType
from pki.client_certificates import common_name
from pki.issuers import DeviceContents, Issuer, device_profile
from pki.profiles import BUILT_IN, CertificateProfile, CertificateTerms, check_profile
from tests.support.ca_hierarchy import PKI_URL, make_hierarchy

DEVICE_ID = "3fa85f64-5717-4562-b3fc-2c963f66afa6"
OWN = frozenset({"portal.example.com", "*.broker.example.com", "192.0.2.1", "localhost"})
DEVICE = {
    "id": DEVICE_ID,
    "name": "Pump-17",
    "external_id": "line-4/000217",
    "type": "pump",
    "location": "Halle 1",
    "firmware": "1.0",
    "serial": "SN42",
    "metadata": {"ip": "198.51.100.7", "ip6": "2001:db8::0:7", "rack": 7, "flag": True, "list": []},
}


def profile(**rules: Any) -> CertificateProfile:
    made = CertificateProfile("tls-server", **rules)
    check_profile(made)
    return made


def terms(*, device: dict[str, Any] | None = None, **rules: Any) -> CertificateTerms:
    return CertificateTerms(profile(**rules), DEVICE | (device or {}))


def contents(**rules: Any) -> DeviceContents:
    return terms(**rules).contents(OWN)


# --- What it makes of a device ------------------------------------------------------------------------------------


def test_the_default_profile_adds_nothing() -> None:
    check_profile(BUILT_IN)
    made = device_profile(DEVICE_ID, CertificateTerms(BUILT_IN, DEVICE).contents(OWN))
    assert made == device_profile(DEVICE_ID)
    assert made.subject.rfc4514_string() == f"CN={DEVICE_ID}"


def test_names_and_attributes_are_made_of_the_device() -> None:
    made = contents(
        extended_key_usage=("client_auth", "server_auth"),
        dns_names=("{name}.devices.example.com", "{serial}.{type}.example.com", "rack-{metadata.rack}.example.com"),
        ip_addresses=("{metadata.ip}", "{metadata.ip6}"),
        organization="ACME Pumps",
        organizational_unit="{location}",
        serial_number="{external_id}",
    )
    assert made.dns_names == ("pump-17.devices.example.com", "sn42.pump.example.com", "rack-7.example.com")
    assert made.ip_addresses == ("198.51.100.7", "2001:db8::7")
    described = device_profile(DEVICE_ID, made)
    assert described.subject.rfc4514_string() == (
        f"CN={DEVICE_ID},2.5.4.5=line-4/000217,OU=Halle 1,O=ACME Pumps"  # the last comes first (RFC 4514 section 2.1)
    )
    values = [item.value for item in described.extensions]
    assert x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]) in values
    [names] = [value for value in values if isinstance(value, x509.SubjectAlternativeName)]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{DEVICE_ID}"]
    assert names.get_values_for_type(x509.DNSName) == list(made.dns_names)


def test_the_identity_on_the_broker_is_the_uuid_whatever_the_values_are() -> None:
    other = "00000000-0000-4000-8000-000000000000"
    made = contents(device={"location": other, "external_id": other}, organization="{location}", serial_number=other)
    hierarchy = make_hierarchy(datetime.now(UTC))
    key = ca.generate_keypair(KeyType.EC_P256).public_key()
    issued = ca.sign_certificate(
        hierarchy.issuing, key, device_id=DEVICE_ID, now=hierarchy.now, days=9, pki_url=PKI_URL, contents=made
    )
    subject = issued.certificate.subject
    assert common_name(issued.certificate) == DEVICE_ID
    assert [len(rdn) for rdn in subject.rdns] == [1, 1, 1]
    assert [item.oid for item in subject].count(NameOID.COMMON_NAME) == 1


@pytest.mark.parametrize("oid", [NameOID.COMMON_NAME, NameOID.EMAIL_ADDRESS, NameOID.DOMAIN_COMPONENT])
def test_no_other_attribute_gets_into_a_subject(oid: x509.ObjectIdentifier) -> None:
    with pytest.raises(ValueError, match="its CN only"):
        device_profile(DEVICE_ID, DeviceContents(subject=((oid, "x"),)))


@pytest.mark.parametrize(
    ("rules", "device", "said"),
    [
        # DNS names: labels of RFC 1034, in a domain of the profile's
        ({"dns_names": ("{name}.example.com",)}, {"name": "pump 17"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "*"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "a.evil"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "pümp"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "pump_1"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "pump\x001"}, "other characters than letters, digits"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "-a"}, "no DNS name"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "a-"}, "no DNS name"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "a" * 64}, "no DNS name"),
        ({"dns_names": (f"{{name}}.{'a.' * 100}example.com",)}, {"name": "a" * 63}, "no DNS name"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "xn--pmp-hoa"}, "are reserved"),
        ({"dns_names": ("x{name}.example.com",)}, {"name": "n--pmp-hoa"}, "are reserved"),
        ({"dns_names": ("{name}.example.com",)}, {"name": "Portal"}, "of the portal or the broker"),
        ({"dns_names": ("{name}.broker.example.com",)}, {"name": "any"}, "of the portal or the broker"),
        ({"dns_names": ("{name}.localhost",)}, {}, "of the portal or the broker"),
        ({"dns_names": ("{external_id}.example.com",)}, {"external_id": None}, "external_id .* has none"),
        ({"dns_names": ("{metadata.host}.example.com",)}, {}, "metadata.host .* has none"),
        ({"dns_names": ("{metadata.flag}.example.com",)}, {}, "metadata.flag .* has none"),
        ({"dns_names": ("{metadata.list}.example.com",)}, {}, "metadata.list .* has none"),
        ({"dns_names": ("{serial}.example.com",)}, {"serial": ""}, "serial .* has none"),
        # IP addresses: of one device
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "192.0.2.1"}}, "of the portal or the broker"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "::ffff:192.0.2.1"}}, "of one device"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "127.0.0.1"}}, "of one device"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "::"}}, "of one device"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "ff02::1"}}, "of one device"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "fe80::1%eth0"}}, "of one device"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "192.0.2.0/24"}}, "needs an IP address"),
        ({"ip_addresses": ("{metadata.ip}",)}, {"metadata": {"ip": "10.0.0.01"}}, "needs an IP address"),
        # The subject: upper bounds of RFC 5280 appendix A.1, PrintableString, nothing that reads as an attribute
        ({"organization": "{name}"}, {"name": "a" * 65}, "of 65 characters"),
        ({"organizational_unit": "{name}"}, {"name": "x,CN=00000000"}, "equals sign"),
        ({"organizational_unit": "{name}"}, {"name": "x\nCN"}, "not printed"),
        ({"serial_number": "{name}"}, {"name": "Nº 7"}, "PrintableString"),
        ({"serial_number": "{name}"}, {"name": "sn_7"}, "PrintableString"),
    ],
)  # fmt: skip
def test_values_that_fit_nowhere_are_refused(rules: dict[str, Any], device: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileRefused, match=said) as raised:
        contents(device=device, **rules)
    assert raised.value.detail.startswith("The certificate profile tls-server ")
    assert raised.value.errors[0].field == "profile"


def test_terms_are_sent_to_the_processes_of_an_upload() -> None:
    sent = terms(dns_names=("{name}.example.com",))
    assert pickle.loads(pickle.dumps(sent)) == sent  # noqa: S301 - its own


def test_labels_of_the_profile_itself_may_be_punycode() -> None:
    assert contents(dns_names=("{name}.xn--pmp-hoa.example",)).dns_names == ("pump-17.xn--pmp-hoa.example",)


# --- Keys and lifetimes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "wanted", "days"),
    [
        ({}, None, 365), ({}, 9, 9),
        ({"default_days": 90}, None, 90), ({"default_days": 90}, 400, 400),
        ({"max_days": 90}, None, 90), ({"max_days": 400}, None, 365), ({"max_days": 90}, 90, 90),
    ],
)  # fmt: skip
def test_a_certificate_is_valid_as_asked_for_or_as_the_profile_or_the_settings_say(
    rules: dict[str, Any], wanted: int | None, days: int
) -> None:
    assert terms(**rules).days(wanted, 365) == days


def test_a_longer_life_or_another_key_is_refused() -> None:
    strict = terms(max_days=90, key_types=("ec-p384", "ed25519"))
    with pytest.raises(
        ProfileRefused, match=r"^The certificate profile tls-server allows .* at most 90 days, not 91\."
    ):
        strict.days(91, 365)
    with pytest.raises(ProfileRefused, match=r"allows keys of ec-p384, ed25519, not rsa-2048\."):
        strict.check_key("rsa-2048")
    assert (strict.usual_key("ec-p256"), strict.usual_key("ec-p256", "ed25519")) == ("ec-p384", "ed25519")


# --- What a profile may say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "field", "said"),
    [
        ({"extended_key_usage": ("server_auth",), "dns_names": ("{id}.example",)}, "extended_key_usage", "client_auth"),
        ({"extended_key_usage": ("client_auth", "server_auth")}, "extended_key_usage", "needs dns_names"),
        ({"extended_key_usage": ("client_auth", "client_auth")}, "extended_key_usage", "twice"),
        ({"key_types": ("ed25519", "ed25519")}, "key_types", "twice"),
        ({"default_days": 91, "max_days": 90}, "default_days", "more than max_days"),
        ({"dns_names": ("pump.example.com",)}, "dns_names", "needs a field"),
        ({"dns_names": ("*.{name}.example.com",)}, "dns_names", "not a DNS name"),
        ({"dns_names": ("{name}",)}, "dns_names", "fixed domain"),
        ({"dns_names": ("pump.{metadata.domain}",)}, "dns_names", "fixed domain"),
        ({"dns_names": ("{name}.example.{type}",)}, "dns_names", "fixed domain"),
        ({"dns_names": ("{name}.192",)}, "dns_names", "not a DNS name"),
        ({"dns_names": ("{name}..example.com",)}, "dns_names", "not a DNS name"),
        ({"dns_names": ("{name}.püm.example",)}, "dns_names", "not a DNS name"),
        ({"dns_names": ("{status}.example.com",)}, "dns_names", "unknown"),
        ({"dns_names": ("{metadata.}.example.com",)}, "dns_names", "unknown"),
        ({"dns_names": ("{name}}.example.com",)}, "dns_names", "unknown"),
        ({"dns_names": ("{{name}}.example.com",)}, "dns_names", "unknown"),
        ({"ip_addresses": ("198.51.100.7",)}, "ip_addresses", "needs a field"),
        ({"organization": "A" * 65}, "organization", "64 characters"),
        ({"organization": " ACME"}, "organization", "no space"),
        ({"organizational_unit": "a\x00b"}, "organizational_unit", "printable"),
        ({"serial_number": "sn_{name}"}, "serial_number", "PrintableString"),
    ],
)  # fmt: skip
def test_a_profile_by_which_nothing_good_could_be_issued_is_refused(
    rules: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(ProfileInvalid, match=said) as raised:
        profile(**rules)
    assert [problem.field for problem in raised.value.errors] == [field]


# --- Name constraints ---------------------------------------------------------------------------------------------


def test_the_name_constraints_of_the_ca_hold() -> None:
    hierarchy, key = make_hierarchy(datetime.now(UTC)), ec.generate_private_key(ec.SECP256R1())
    within = x509.NameConstraints([x509.DNSName("devices.example.com")], None)
    template = hierarchy.issuing.certificate
    builder = x509.CertificateBuilder(extensions=[*template.extensions, x509.Extension(within.oid, True, within)])
    constrained = (
        builder.subject_name(template.subject).issuer_name(template.issuer).public_key(key.public_key())
        .serial_number(7).not_valid_before(template.not_valid_before_utc).not_valid_after(template.not_valid_after_utc)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    issuer = Issuer("issuing-1", constrained, key)

    def sign(*dns_names: str) -> ca.Issued:
        public_key = ca.generate_keypair(KeyType.EC_P256).public_key()
        return ca.sign_certificate(
            issuer, public_key, device_id=DEVICE_ID, now=hierarchy.now, days=9, pki_url=PKI_URL,
            contents=DeviceContents(dns_names=dns_names),
        )  # fmt: skip

    assert sign().certificate
    assert sign("pump.devices.example.com").certificate
    with pytest.raises(ProfileRefused, match="name constraints"):
        sign("pump.elsewhere.example.com")
