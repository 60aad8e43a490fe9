"""Evidence of a TPM 2.0: recorded from software TPMs, and from a TPM in Python that does what no real one would."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from attestation import refusals
from attestation.anchors import Anchor
from attestation.evidence import MAX_EVIDENCE_BYTES, Challenge
from attestation.tpm import challenge_ek
from attestation.tpm_credential import make_credential
from core.errors import AttestationRefused
from tests.support.attestation import (
    NATIVE_SIGNING,
    NOW,
    RECORDED,
    RESTRICTED,
    Case,
    SoftwareTpm,
    attested,
    recorded,
    sized,
    tpm_name,
    tpm_public,
)
from tests.support.pki import Authority

EK = "2.23.133.8.1"
PCRS = {0: b"\x01" * 32, 7: b"\x02" * 32, 23: b"\x03" * 32}

each_recording = pytest.mark.parametrize("name", ["rsa-ek", "ecc-ek"])


@pytest.fixture(scope="module")
def tpm() -> SoftwareTpm:
    return SoftwareTpm()


def refused(case: Case, refusal: type[AttestationRefused], **changes: Any) -> None:
    with pytest.raises(AttestationRefused) as caught:
        case.verify(**changes)
    assert type(caught.value) is refusal, caught.value.detail


# --- Recorded from swtpm ---------------------------------------------------------------------------------------------


@each_recording
def test_evidence_of_a_real_tpm_is_verified(name: str) -> None:
    """It activated a credential of ``challenge_ek`` to learn the nonce that it signed."""
    claims = recorded(name).verify()
    assert (claims.vendor, claims.model) == ("id:00001014", "swtpm")
    assert claims.pcrs == {"sha256": dict.fromkeys((0, 1, 7), "00" * 32)}
    assert claims.anchor == recorded(name).anchors[0].fingerprint


@each_recording
def test_evidence_of_another_tpm_challenge_or_key_is_refused(name: str) -> None:
    case = recorded(name)
    other = recorded("ecc-ek" if name == "rsa-ek" else "rsa-ek")
    refused(case, refusals.NonceMismatch, challenge=Challenge(b"\x01" * 32))
    refused(case, refusals.KeyMismatch, public_key=other.public_key)
    refused(case, refusals.AnchorUnknown, anchors=())
    # The EK certificate of the other TPM, which has the same anchor, with all else of this one.
    mixed = json.loads(case.evidence) | {"ek_certificate": json.loads(other.evidence)["ek_certificate"]}
    both = max(case.now, other.now)
    refused(case, refusals.NonceMismatch, evidence=json.dumps(mixed).encode(), now=both)


@each_recording
def test_an_attestation_key_that_signs_anything_is_not_challenged(name: str) -> None:
    case, shown = recorded(name), RECORDED[name]["evidence"]
    certificates = [base64.b64decode(one) for one in (shown["ek_certificate"], *shown["intermediates"])]
    unrestricted = base64.b64decode(RECORDED[name]["unrestricted_ak_public"])
    with pytest.raises(refusals.AttestationKeyRefused):
        challenge_ek(case.challenge, certificates[0], certificates[1:], unrestricted, case.anchors, case.now)
    good = base64.b64decode(shown["ak_public"])
    challenge_ek(case.challenge, certificates[0], certificates[1:], good, case.anchors, case.now)
    with pytest.raises(refusals.AnchorUnknown):
        challenge_ek(case.challenge, certificates[0], [], good, case.anchors, case.now)


def test_a_credential_is_made_anew_each_time() -> None:
    """What opens it is shown by the recordings: only a TPM does."""
    case = recorded("rsa-ek")
    keys = [case.public_key, ec.generate_private_key(ec.SECP256R1()).public_key()]
    for key in keys:
        one, other = (make_credential(key, b"\x00\x0b" + bytes(32), b"secret") for _ in range(2))
        assert one.blob != other.blob
        assert one.secret != other.secret
    with pytest.raises(refusals.SignerCertificateRefused):
        make_credential(ed25519.Ed25519PrivateKey.generate().public_key(), b"", b"secret")


def test_the_nonce_does_not_tell_the_secret_of_the_credential() -> None:
    challenge = Challenge(b"\x05" * 32)
    secrets = {challenge.credential_secret(ek, name) for ek in (b"one", b"two") for name in (b"one", b"two")}
    assert len(secrets | {challenge.nonce}) == 5
    assert "05" not in repr(challenge)


# --- An attestation key with a certificate ---------------------------------------------------------------------------


def test_a_certified_attestation_key_vouches_for_the_device_key(tpm: SoftwareTpm) -> None:
    claims = tpm.case().verify()
    assert claims.pcrs == {}
    assert claims.anchor == tpm.case().anchors[0].fingerprint


def test_a_quote_tells_the_values_of_the_pcrs(tpm: SoftwareTpm) -> None:
    claims = tpm.case(tpm.evidence(quote=tpm.quote(PCRS))).verify()
    assert claims.pcrs == {"sha256": {number: value.hex() for number, value in PCRS.items()}}


def test_another_nonce_or_key_is_refused(tpm: SoftwareTpm) -> None:
    refused(tpm.case(), refusals.NonceMismatch, challenge=Challenge(b"\x09" * 32))
    refused(tpm.case(), refusals.KeyMismatch, public_key=SoftwareTpm().key.public_key())
    constant = tpm.evidence(nonce=b"\x00\xff\x55\xaa")  # tpm2_certify 5.4 signs this in place of a nonce
    refused(tpm.case(constant), refusals.NonceMismatch)


def test_the_certified_object_is_the_key_that_is_shown(tpm: SoftwareTpm) -> None:
    other = tpm_public(SoftwareTpm().key.public_key(), NATIVE_SIGNING)
    forged = attested(0x8017, tpm.challenge.nonce, sized(tpm_name(other)) + sized(b"qualified"))
    refused(tpm.case(tpm.evidence(attested=forged)), refusals.KeyMismatch)


@pytest.mark.parametrize("missing", [1 << 1, 1 << 4, 1 << 5, 1 << 18])
def test_a_device_key_that_could_be_elsewhere_is_refused(missing: int) -> None:
    tpm = SoftwareTpm(key_attributes=NATIVE_SIGNING & ~missing)
    refused(tpm.case(), refusals.DeviceKeyRefused)


@pytest.mark.parametrize("attributes", [
    NATIVE_SIGNING,
    (NATIVE_SIGNING | RESTRICTED) & ~(1 << 1),
    (NATIVE_SIGNING | RESTRICTED) & ~(1 << 4),
    (NATIVE_SIGNING | RESTRICTED) & ~(1 << 5),
    (NATIVE_SIGNING | RESTRICTED) & ~(1 << 18),
    NATIVE_SIGNING | RESTRICTED | 1 << 17,
])  # fmt: skip
def test_an_attestation_key_that_could_sign_a_forgery_is_refused(attributes: int) -> None:
    refused(SoftwareTpm(ak_attributes=attributes).case(), refusals.AttestationKeyRefused)


def test_a_structure_that_no_tpm_made_is_refused(tpm: SoftwareTpm) -> None:
    key = sized(tpm_name(tpm_public(tpm.key.public_key(), NATIVE_SIGNING))) + sized(b"qualified")
    nonce = tpm.challenge.nonce
    forgeries = [
        attested(0x8017, nonce, key, magic=0xFF544348),
        attested(0x8018, nonce, key),
        attested(0x801A, nonce, key),
        attested(0x8017, nonce, key) + b"\0",
        attested(0x8017, nonce, key)[:-1],
        b"\xffTCG",
    ]
    for forged in forgeries:
        refused(tpm.case(tpm.evidence(attested=forged)), refusals.EvidenceMalformed)


def test_the_certificate_has_to_be_for_this_attestation_key(tpm: SoftwareTpm) -> None:
    other = SoftwareTpm(authority=tpm.authority, key=tpm.key)
    shown = tpm.evidence() | {"ak_certificate": other.evidence()["ak_certificate"]}
    refused(tpm.case(shown), refusals.AttestationKeyRefused)


@pytest.mark.parametrize("purpose", [EK, "1.3.6.1.5.5.7.3.2"])
def test_a_certificate_for_something_else_is_refused(purpose: str) -> None:
    refused(SoftwareTpm(purpose=purpose).case(), refusals.SignerCertificateRefused)


def test_a_device_with_a_factory_certificate_is_no_tpm(tpm: SoftwareTpm) -> None:
    device = tpm.authority.issue("device")
    shown = tpm.evidence() | {
        "ak_certificate": base64.b64encode(device.certificate.public_bytes(Encoding.DER)).decode()
    }
    refused(tpm.case(shown), refusals.SignerCertificateRefused)


def test_the_nonce_in_the_clear_is_none_for_an_endorsement_key() -> None:
    """Who has learned the nonce only has not opened the credential: the AK may be in no TPM at all."""
    tpm = SoftwareTpm(purpose=EK, field_of="ek_certificate")
    refused(tpm.case(), refusals.NonceMismatch)


def test_another_root_an_expired_one_and_another_time_are_refused(tpm: SoftwareTpm) -> None:
    other = Anchor(Authority("TPM maker", now=NOW).certificate.public_bytes(Encoding.DER), True)
    refused(tpm.case(), refusals.AnchorUnknown, anchors=(other,))
    refused(tpm.case(), refusals.SignerCertificateRefused, now=NOW + timedelta(days=2))
    old = SoftwareTpm(authority=Authority("TPM maker", now=NOW - timedelta(days=90)))
    refused(old.case(), refusals.AnchorExpired)


def test_signatures_by_another_key_are_refused(tpm: SoftwareTpm) -> None:
    shown, other = tpm.evidence(), SoftwareTpm()
    forged = base64.b64encode(other.signed(base64.b64decode(shown["certify"]))).decode()
    refused(tpm.case(shown | {"certify_signature": forged}), refusals.SignatureInvalid)
    for scheme in (b"\x00\x14\x00\x0b", b"\x00\x18\x00\x04", b"\x00\x05\x00\x0b", b"\x00\x10\x00\x0b"):
        value = scheme + base64.b64decode(shown["certify_signature"])[4:]
        case = tpm.case(shown | {"certify_signature": base64.b64encode(value).decode()})
        with pytest.raises((refusals.SignatureInvalid, refusals.EvidenceMalformed)):
            case.verify()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda tpm: tpm.quote(PCRS, nonce=b"other"), refusals.NonceMismatch),
        (lambda tpm: tpm.quote(PCRS, digest=bytes(32)), refusals.SignatureInvalid),
        (lambda tpm: tpm.quote(PCRS) | {"pcrs": tpm.quote(PCRS | {0: bytes(32)})["pcrs"]}, refusals.SignatureInvalid),
        (
            lambda tpm: tpm.quote(PCRS) | {"signature": SoftwareTpm().quote(PCRS)["signature"]},
            refusals.SignatureInvalid,
        ),
        (lambda tpm: tpm.quote(PCRS) | {"pcrs": {}}, refusals.EvidenceMalformed),
        (lambda tpm: tpm.quote(PCRS) | {"pcrs": tpm.quote(PCRS | {3: bytes(32)})["pcrs"]}, refusals.EvidenceMalformed),
        (lambda tpm: tpm.quote(PCRS) | {"pcrs": tpm.quote(PCRS)["pcrs"] | {"sha1": {}}}, refusals.EvidenceMalformed),
        (lambda tpm: tpm.quote({0: b"short"}), refusals.EvidenceMalformed),
        (lambda tpm: tpm.quote(PCRS) | {"attested": tpm.evidence()["certify"]}, refusals.EvidenceMalformed),
    ],
)
def test_a_quote_that_does_not_fit_is_refused(
    change: Callable[[SoftwareTpm], Any], refusal: type[AttestationRefused], tpm: SoftwareTpm
) -> None:
    refused(tpm.case(tpm.evidence(quote=change(tpm))), refusal)


@pytest.mark.parametrize(
    "change",
    [
        {"ak_certificate": None},
        {"ek_certificate": "AAAA"},
        {"unknown": 1},
        {"certify": None},
        {"certify": "not Base64"},
        {"certify": ["AAAA"]},
        {"ak_public": ""},
        {"key_public": "AAAA"},
        {"quote": []},
        {"quote": {}},
        {"intermediates": ["AAAA"] * 5},
    ],
)
def test_evidence_of_another_form_is_refused(change: dict[str, Any], tpm: SoftwareTpm) -> None:
    refused(tpm.case(tpm.evidence() | change), refusals.EvidenceMalformed)


def test_evidence_that_is_no_object_or_too_large_is_refused(tpm: SoftwareTpm) -> None:
    for content in (b"", b"[]", b"\xff", b'{"certify": 1'):
        refused(tpm.case(), refusals.EvidenceMalformed, evidence=content)
    refused(tpm.case(), refusals.EvidenceTooLarge, evidence=b" " * (MAX_EVIDENCE_BYTES + 1))
    twice = tpm.case().evidence[:-1] + b', "certify": "AAAA"}'
    refused(tpm.case(), refusals.DuplicateKeys, evidence=twice)


def test_attestation_keys_of_other_kinds_are_refused(tpm: SoftwareTpm) -> None:
    public = base64.b64decode(tpm.evidence()["ak_public"])
    kinds = {0: b"\x00\x08", 2: b"\x00\x04"}  # a keyed hash; named by SHA-1
    for at, value in kinds.items():
        changed = public[:at] + value + public[at + 2 :]
        refused(
            tpm.case(tpm.evidence() | {"ak_public": base64.b64encode(changed).decode()}), refusals.EvidenceMalformed
        )


def test_a_chain_longer_than_any_is_refused() -> None:
    case = recorded("rsa-ek")
    shown = json.loads(case.evidence)
    shown["intermediates"] = shown["intermediates"] * 4
    replace(case, evidence=json.dumps(shown).encode()).verify()
