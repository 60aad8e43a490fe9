"""How certificates are encoded: as ``cryptography`` would encode them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import ca
from pki.algorithms import KeyType, public_key_der, signature_hash, signature_identifier
from pki.certificates import tbs_certificate
from pki.issuers import DeviceContents, Issuer, extension
from tests.support.ca_hierarchy import PKI_URL, make_hierarchy

NOW = datetime(2030, 6, 15, 12, 30, 45, tzinfo=UTC)
NO_CHECK = extension(x509.OCSPNoCheck())
MORE = DeviceContents(
    server_auth=True,
    dns_names=("a.example", "*.b.example"),
    ip_addresses=("192.0.2.7", "2001:db8::7"),
    subject=((NameOID.ORGANIZATION_NAME, "Müller & Söhne"), (NameOID.SERIAL_NUMBER, "S-1")),
)


def encoded_by_cryptography(certificate: x509.Certificate, issuer: Issuer) -> bytes:
    """Return the TBSCertificate of the same fields, signed by the same key."""
    assert issuer.key is not None
    assert not callable(issuer.key)
    builder = (
        x509.CertificateBuilder(extensions=list(certificate.extensions))
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(certificate.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
    )
    return builder.sign(issuer.key, issuer.signature_hash).tbs_certificate_bytes


@pytest.mark.parametrize("key_type", KeyType)
def test_certificates_are_those_that_cryptography_would_make(key_type: KeyType) -> None:
    cas = make_hierarchy(NOW, issuing_key_type=key_type)
    public_key = ca.generate_keypair(key_type).public_key()
    signed = [
        (cas.root.certificate, cas.root),
        (cas.issuing.certificate, cas.root),
        (cas.device(public_key).certificate, cas.issuing),
        (cas.device(public_key, contents=MORE).certificate, cas.issuing),
        (cas.server(f"{'long.' * 12}name.example", "192.0.2.7").certificate, cas.issuing),
        (ca.sign_responder_certificate(cas.issuing, public_key, now=NOW, days=9).certificate, cas.issuing),
        (
            ca.sign_agent_certificate(
                cas.issuing, public_key, name="east", now=NOW, days=9, pki_url=PKI_URL
            ).certificate,
            cas.issuing,
        ),
    ]
    for certificate, issuer in signed:
        assert certificate.tbs_certificate_bytes == encoded_by_cryptography(certificate, issuer)


@pytest.mark.parametrize("begin", [datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)])
@pytest.mark.parametrize("seconds", [1, 3600 * 24 * 365 * 150])
@pytest.mark.parametrize("serial_number", [1, 127, 128, 1 << 158, (1 << 159) - 1])
def test_times_and_serial_numbers_are_encoded_as_cryptography_does(
    begin: datetime, seconds: int, serial_number: int
) -> None:
    key, name = ec.generate_private_key(ec.SECP384R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    public_key, end = key.public_key(), begin + timedelta(seconds=seconds)
    algorithm = signature_hash(public_key)
    content = tbs_certificate(
        serial_number=serial_number,
        signature=signature_identifier(key, algorithm),
        issuer=name.public_bytes(),
        validity=(begin, end),
        subject=name.public_bytes(),
        public_key=public_key_der(public_key),
        extensions=[NO_CHECK.der],
    )
    builder = x509.CertificateBuilder(name, name, public_key, serial_number, begin, end, [NO_CHECK])
    assert content == builder.sign(key, algorithm).tbs_certificate_bytes


@pytest.mark.parametrize("serial_number", [0, -1, 1 << 159])
def test_a_serial_number_is_positive_and_of_20_bytes_at_most(serial_number: int) -> None:
    with pytest.raises(ValueError, match="serial number"):
        tbs_certificate(
            serial_number=serial_number,
            signature=b"",
            issuer=b"",
            validity=(NOW, NOW + timedelta(1)),
            subject=b"",
            public_key=b"",
            extensions=[],
        )


def test_a_certificate_ends_after_it_begins() -> None:
    with pytest.raises(ValueError, match="notAfter"):
        tbs_certificate(
            serial_number=1,
            signature=b"",
            issuer=b"",
            validity=(NOW, NOW),
            subject=b"",
            public_key=b"",
            extensions=[],
        )
