"""How the certificate authority revokes."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import SignatureAlgorithmOID

import ca
from core.errors import SignatureCheckFailed
from pki.algorithms import KeyType
from pki.crl import encode_entries, is_signed_by, sign_crl
from pki.encoding import MAX_ELEMENTS
from pki.issuers import Issuer, Reason, extension
from tests.support.ca_hierarchy import HeldElsewhere, Hierarchy, MakeKey, make_hierarchy

NOW = datetime(2030, 6, 15, 12, 30, 45, 678901, tzinfo=UTC)
SECOND = NOW.replace(microsecond=0)


@pytest.fixture(scope="module")
def cas(make_ca_key: MakeKey) -> Hierarchy:
    return make_hierarchy(NOW, make_ca_key)


def test_a_crl_names_what_was_revoked(cas: Hierarchy) -> None:
    serial_number = cas.device().serial_number
    entry = ca.revoke_certificate(serial_number, NOW, Reason.KEY_COMPROMISE)
    crl = x509.load_der_x509_crl(cas.crl(entry, number=41))

    assert crl.issuer == cas.issuing.certificate.subject
    assert crl.signature_algorithm_oid == SignatureAlgorithmOID.ECDSA_WITH_SHA256
    assert (crl.last_update_utc, crl.next_update_utc) == (SECOND, SECOND + timedelta(days=7))
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 41
    authority = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    issuer_identifier = cas.issuing.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert authority.key_identifier == issuer_identifier.digest
    assert len(crl.extensions) == 2
    found = crl.get_revoked_certificate_by_serial_number(int(serial_number, 16))
    assert found is not None
    assert found.revocation_date_utc == SECOND
    assert found.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.key_compromise


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_of_a_full_crl_can_be_given_but_unspecified_is_left_out(cas: Hierarchy, reason: Reason) -> None:
    [entry] = x509.load_der_x509_crl(cas.crl(ca.revoke_certificate("0a", NOW, reason)))
    codes = [extension.value for extension in entry.extensions]
    expected = [] if reason == "unspecified" else [x509.CRLReason(x509.ReasonFlags[reason.value])]
    assert codes == expected
    assert not any(extension.critical for extension in entry.extensions)  # RFC 5280 §5.3.1


def test_the_reasons_are_all_of_rfc_5280_but_the_one_for_delta_crls() -> None:
    assert {reason.value for reason in Reason} == {flag.name for flag in x509.ReasonFlags} - {"remove_from_crl"}


def test_a_serial_number_goes_into_the_crl_as_it_came_from_the_certificate(cas: Hierarchy) -> None:
    for serial_number in ("1", "0a", "7f", "80", "ff", "8000", f"7{'f' * 39}", cas.device().serial_number):
        [entry] = x509.load_der_x509_crl(cas.crl(ca.revoke_certificate(serial_number, NOW, Reason.SUPERSEDED)))
        assert entry.serial_number == int(serial_number, 16)


@pytest.mark.parametrize(
    ("moment", "encoded"),
    [
        (SECOND, b"\x17\x0d300615123045Z"),
        (datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), b"\x17\x0d491231235959Z"),
        (datetime(2050, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), b"\x18\x0f20500101000000Z"),
    ],
)
def test_a_date_is_encoded_as_utctime_until_2049_and_as_generalizedtime_from_then_on(
    cas: Hierarchy, moment: datetime, encoded: bytes
) -> None:
    der = cas.crl(ca.revoke_certificate("c0ffee", moment, Reason.SUPERSEDED))
    assert b"\x02\x04\x00\xc0\xff\xee" + encoded in der


@pytest.mark.parametrize("key_type", [*KeyType])
def test_any_kind_of_ca_key_signs_a_crl_with_entries(key_type: KeyType) -> None:
    key = ca.generate_keypair(key_type)
    root = Issuer("root", ca.create_root(key, common_name="Any", now=NOW, days=9).certificate, key)
    der = sign_crl(
        root,
        encode_entries([ca.revoke_certificate("aa", NOW, Reason.SUPERSEDED)]),
        number=3,
        this_update=NOW,
        next_update=NOW + timedelta(days=1),
    )
    crl = x509.load_der_x509_crl(der)
    assert crl.is_signature_valid(root.certificate.public_key())  # type: ignore[arg-type]  # one of the five kinds
    assert [entry.serial_number for entry in crl] == [0xAA]


@pytest.mark.parametrize("key_type", [*KeyType])
@pytest.mark.parametrize("revoked", [0, 2, MAX_ELEMENTS + 1])
def test_what_is_signed_is_what_cryptography_encodes(key_type: KeyType, revoked: int) -> None:
    key = ca.generate_keypair(key_type)
    root = Issuer("root", ca.create_root(key, common_name="Any", now=NOW, days=9).certificate, key)
    reasons = itertools.cycle(Reason)
    listed = [ca.revoke_certificate(f"{number:x}", NOW, next(reasons)) for number in range(1, revoked + 1)]
    ends = SECOND + timedelta(days=1)
    signed = sign_crl(root, encode_entries(listed), number=300, this_update=NOW, next_update=ends)
    own = [root.authority_key_identifier, extension(x509.CRLNumber(300))]
    builder = x509.CertificateRevocationListBuilder(root.certificate.subject, SECOND, ends, [*own], listed)
    theirs = builder.sign(key, root.signature_hash)
    assert x509.load_der_x509_crl(signed).tbs_certlist_bytes == theirs.tbs_certlist_bytes
    if key_type is KeyType.RSA_2048 or key_type is KeyType.ED25519:  # whose signatures do not depend on chance
        assert signed == theirs.public_bytes(Encoding.DER)


def test_a_crl_that_does_not_verify_is_thrown_away(cas: Hierarchy) -> None:
    assert isinstance(cas.issuing.key, ec.EllipticCurvePrivateKey)
    damaged = Issuer("issuing-1", cas.issuing.certificate, HeldElsewhere(cas.issuing.key, damage=True))
    for entries in ([], [ca.revoke_certificate("aa", NOW, Reason.SUPERSEDED)]):
        with pytest.raises(SignatureCheckFailed):
            cas.crl(*entries, issuer=damaged)


@pytest.mark.parametrize("copies", [0, 2])
def test_a_crl_with_another_number_of_entries_than_it_was_given_is_never_released(cas: Hierarchy, copies: int) -> None:
    (entry,) = encode_entries([ca.revoke_certificate("aa", NOW, Reason.SUPERSEDED)])
    with pytest.raises(SignatureCheckFailed):
        sign_crl(cas.issuing, [entry * copies], number=3, this_update=NOW, next_update=NOW + timedelta(days=1))


@pytest.mark.parametrize("signer", KeyType)
@pytest.mark.parametrize("other", KeyType)
def test_a_crl_is_signed_by_the_key_of_its_issuer_alone(signer: KeyType, other: KeyType) -> None:
    key = ca.generate_keypair(signer)
    issuer = Issuer("root", ca.create_root(key, common_name="Any", now=NOW, days=9).certificate, key)
    entry = ca.revoke_certificate("aa", NOW, Reason.SUPERSEDED)
    der = sign_crl(issuer, encode_entries([entry]), number=3, this_update=NOW, next_update=NOW + timedelta(days=1))
    crl = x509.load_der_x509_crl(der)
    assert is_signed_by(crl, der, key.public_key())
    assert not is_signed_by(crl, der, ca.generate_keypair(other).public_key())
    altered = der.replace(b"\x02\x02\x00\xaa", b"\x02\x02\x00\xab")
    assert altered != der
    assert not is_signed_by(x509.load_der_x509_crl(altered), altered, key.public_key())


def test_a_crl_whose_two_signature_algorithms_differ_is_refused(cas: Hierarchy) -> None:
    der = cas.crl()
    ecdsa_with_sha256, ecdsa_with_sha384 = bytes.fromhex("2a8648ce3d040302"), bytes.fromhex("2a8648ce3d040303")
    assert der.count(ecdsa_with_sha256) == 2
    at = der.rindex(ecdsa_with_sha256)
    outside = der[:at] + ecdsa_with_sha384 + der[at + 8 :]
    inside = der.replace(ecdsa_with_sha256, ecdsa_with_sha384, 1)
    assert x509.load_der_x509_crl(der).issuer == cas.issuing.certificate.subject
    for changed in (outside, inside):
        with pytest.raises(ValueError, match="do not match"):  # RFC 5280 §5.1.1.2; the broker's check relies on it
            x509.load_der_x509_crl(changed)


def test_a_crl_signed_with_rsassa_pss_cannot_be_checked(cas: Hierarchy) -> None:
    key = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateRevocationListBuilder().issuer_name(cas.root.certificate.subject)
    builder = builder.last_update(NOW).next_update(NOW + timedelta(days=1))
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
    crl = builder.sign(key, hashes.SHA256(), rsa_padding=pss)
    with pytest.raises(UnsupportedAlgorithm):
        is_signed_by(crl, crl.public_bytes(Encoding.DER), key.public_key())


@pytest.mark.parametrize("serial_number", ["", "0", "-1", "0x1", "FF", "a:b", "1_0", " 1", "1\n", "f" * 40, "1" * 41])
def test_a_serial_number_that_is_none_is_not_revoked(serial_number: str) -> None:
    with pytest.raises(ValueError, match="serial number"):
        ca.revoke_certificate(serial_number, NOW, Reason.SUPERSEDED)


def test_an_empty_crl_is_a_crl(cas: Hierarchy) -> None:
    assert len(x509.load_der_x509_crl(cas.crl())) == 0


def test_the_entries_of_a_crl_may_come_from_a_generator(cas: Hierarchy) -> None:
    entries = (ca.revoke_certificate(f"{number:x}", NOW, Reason.SUPERSEDED) for number in itertools.count(1))
    der = sign_crl(
        cas.issuing,
        encode_entries(itertools.islice(entries, 3000)),
        number=1,
        this_update=NOW,
        next_update=NOW + timedelta(days=1),
    )
    assert [entry.serial_number for entry in x509.load_der_x509_crl(der)] == list(range(1, 3001))


@pytest.mark.parametrize("number", [0, -1, 1 << 159])
def test_a_crl_number_is_positive_and_at_most_20_bytes(cas: Hierarchy, number: int) -> None:
    with pytest.raises(ValueError, match="CRL number"):
        cas.crl(number=number)


@pytest.mark.parametrize("life", [timedelta(0), timedelta(milliseconds=100), timedelta(days=-1)])
def test_a_crl_must_live_for_a_while(cas: Hierarchy, life: timedelta) -> None:
    with pytest.raises(ValueError, match="nextUpdate"):
        sign_crl(cas.issuing, [], number=1, this_update=NOW, next_update=NOW + life)


def test_an_issuer_that_is_out_of_date_still_revokes(cas: Hierarchy) -> None:
    after = cas.issuing.not_after + timedelta(days=1)
    der = sign_crl(cas.issuing, [], number=1, this_update=after, next_update=after + timedelta(days=1))
    assert x509.load_der_x509_crl(der).last_update_utc == after
