"""EAT as JWT and CWT, and the PSA token: what is accepted, and why everything else is refused."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from attestation import refusals
from attestation.anchors import Anchor
from attestation.cose import read_cbor
from attestation.evidence import (
    MAX_EVIDENCE_BYTES,
    Challenge,
    DebugStatus,
    EvidenceType,
    Lifecycle,
    read_object,
    to_base64url,
)
from core.errors import AttestationRefused
from tests.support.attestation import (
    IMPLEMENTATION,
    MEASURED,
    NOW,
    UEID,
    Case,
    Maker,
    anchor_of,
    cose_key,
    jwk,
    signature,
)
from tests.support.pki import Authority, Credentials, key_pem

JWT, CWT, PSA = EvidenceType.EAT_JWT, EvidenceType.EAT_CWT, EvidenceType.PSA
KINDS = [JWT, CWT, PSA]
ROOTS: list[Callable[[], Any]] = [
    lambda: ec.generate_private_key(ec.SECP256R1()),
    lambda: ec.generate_private_key(ec.SECP384R1()),
    ed25519.Ed25519PrivateKey.generate,
]

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


def refused(case: Case, refusal: type[AttestationRefused], evidence: bytes | None = None, **changes: Any) -> None:
    with pytest.raises(AttestationRefused) as caught:
        case.verify(evidence, **changes)
    assert type(caught.value) is refusal, caught.value.detail


# --- What is accepted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS, ids=["p256", "p384", "ed25519"])
@each_kind
def test_evidence_of_each_algorithm_is_verified(kind: EvidenceType, root: Callable[[], Any]) -> None:
    claims = Maker(root_of_trust=root()).case(kind).verify()
    assert (claims.type, claims.attester, claims.implementation) == (kind, UEID.hex(), IMPLEMENTATION.hex())


@pytest.mark.parametrize("kind", [JWT, CWT])
@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()])
def test_the_confirmed_key_may_be_of_each_kind(kind: EvidenceType, key: Any) -> None:
    Maker(key=key).case(kind).verify()


@pytest.mark.parametrize("kind", [JWT, CWT])
def test_the_claims_of_an_eat_are_the_same_in_both_forms(kind: EvidenceType, maker: Maker) -> None:
    claims = maker.case(kind).verify()
    assert claims.debug is DebugStatus.DISABLED_PERMANENTLY
    assert claims.secure_boot is True
    assert [(one.name, one.version) for one in claims.software] == [("firmware", "3.1.4")]
    assert claims.made_at == NOW
    assert claims.anchor == maker.case(kind).anchors[0].fingerprint


def test_the_claims_of_a_psa_token_are_read(maker: Maker) -> None:
    claims = maker.case(PSA).verify()
    assert claims.lifecycle is Lifecycle.SECURED
    [component] = claims.software
    assert (component.name, component.version) == ("PRoT", "1.3.5")
    assert (component.digest, component.signer) == ("11" * 32, "22" * 32)


@each_kind
def test_an_anchor_is_found_by_what_the_evidence_names(kind: EvidenceType, maker: Maker) -> None:
    others = tuple(anchor_of(Maker().root_of_trust, bytes([number])) for number in range(40))
    case = maker.case(kind)
    case.verify(anchors=(*others, anchor_of(maker.root_of_trust, UEID)))
    refused(case, refusals.AnchorUnknown, anchors=others)


@pytest.mark.parametrize("kind", [CWT, PSA])
def test_an_anchor_is_found_by_the_key_id(kind: EvidenceType, maker: Maker) -> None:
    make = maker.cwt if kind is CWT else maker.psa
    maker.case(kind).verify(make(unprotected={4: b"k1"}), anchors=(anchor_of(maker.root_of_trust, b"k1"),))


# --- Freshness -----------------------------------------------------------------------------------------------------


@each_kind
def test_another_nonce_is_refused(kind: EvidenceType, maker: Maker) -> None:
    refused(maker.case(kind), refusals.NonceMismatch, challenge=Challenge(b"\x09" * 32))


def test_one_nonce_among_others_is_not_the_nonce(maker: Maker) -> None:
    nonce = maker.challenge.nonce
    text = to_base64url(nonce)
    refused(maker.case(JWT), refusals.NonceMismatch, maker.jwt(eat_nonce=[text, "other-nonce"]))
    refused(maker.case(CWT), refusals.NonceMismatch, maker.cwt({10: [nonce, b"other-nonce"]}))
    refused(maker.case(JWT), refusals.NonceMismatch, maker.jwt(eat_nonce=None))
    refused(maker.case(CWT), refusals.NonceMismatch, maker.cwt({10: None}))


@pytest.mark.parametrize("kind", [JWT, CWT])
@pytest.mark.parametrize(
    ("claims", "refusal"),
    [
        ({"iat": -365 * 86400}, refusals.EvidenceTooOld),
        ({"iat": -11 * 60}, refusals.EvidenceTooOld),
        ({"iat": 6 * 60}, refusals.EvidenceFromTheFuture),
        ({"nbf": 6 * 60}, refusals.EvidenceFromTheFuture),
        ({"exp": -6 * 60}, refusals.EvidenceTooOld),
    ],
)
def test_evidence_of_another_time_is_refused(
    kind: EvidenceType, claims: dict[str, int], refusal: type[AttestationRefused], maker: Maker
) -> None:
    [(name, offset)] = claims.items()
    at = int(NOW.timestamp()) + offset
    changed: dict[str, Any] = {name: at}
    evidence = maker.jwt(**changed) if kind is JWT else maker.cwt({{"iat": 6, "nbf": 5, "exp": 4}[name]: at})
    refused(maker.case(kind), refusal, evidence)


@pytest.mark.parametrize("value", ["1780315200", 1780315200.0, True, -1, 253_402_300_800, [1780315200]])
def test_a_time_is_a_whole_number(value: Any, maker: Maker) -> None:
    refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt(iat=value))
    refused(maker.case(CWT), refusals.EvidenceMalformed, maker.cwt({6: value}))


def test_a_clock_may_be_off_by_minutes(maker: Maker) -> None:
    for minutes in (-9, 4):
        maker.case(JWT).verify(maker.jwt(iat=int((NOW + timedelta(minutes=minutes)).timestamp())))


# --- The key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JWT, CWT])
def test_evidence_for_another_key_is_refused(kind: EvidenceType, maker: Maker) -> None:
    refused(maker.case(kind), refusals.KeyMismatch, public_key=Maker().key.public_key())


def test_a_psa_token_for_another_key_has_another_nonce(maker: Maker) -> None:
    refused(maker.case(PSA), refusals.NonceMismatch, public_key=Maker().key.public_key())


def test_evidence_without_a_key_is_refused(maker: Maker) -> None:
    key = maker.key.public_key()
    for cnf in (None, {}, {"kid": "k1"}, {"jwk": jwk(key), "kid": "k1"}, {"jwk": "text"}, [jwk(key)]):
        refused(maker.case(JWT), refusals.KeyNotBound, maker.jwt(cnf=cnf))
    for confirmation in (None, {}, {3: b"k1"}, {1: cose_key(key), 3: b"k1"}, [cose_key(key)]):
        refused(maker.case(CWT), refusals.KeyNotBound, maker.cwt({8: confirmation}))


def test_a_private_or_broken_key_is_refused(maker: Maker) -> None:
    public, cose = jwk(maker.key.public_key()), cose_key(maker.key.public_key())
    changes: list[dict[str, Any]] = [
        {"d": "AA"}, {"x": "AA"}, {"y": public["x"]}, {"crv": "P-521"}, {"kty": "oct"}, {"x": 1}, {"crv": []},
    ]  # fmt: skip
    for change in changes:
        refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt(cnf={"jwk": public | change}))
    keys: list[dict[int, Any]] = [
        {-4: b"d"}, {-2: b"x"}, {-3: cose[-2]}, {-1: 3}, {1: 4}, {-2: "x"}, {-1: []}, {-3: True},
    ]  # fmt: skip
    for key in keys:
        refused(maker.case(CWT), refusals.EvidenceMalformed, maker.cwt({8: {1: cose | key}}))
    refused(maker.case(CWT), refusals.EvidenceMalformed, maker.cwt({8: {1: b"key"}}))


@each_kind
def test_evidence_of_another_device_is_refused(kind: EvidenceType, maker: Maker) -> None:
    other = Maker(challenge=maker.challenge)
    refused(maker.case(kind), refusals.SignatureInvalid, other.case(kind).evidence)


# --- Algorithms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["none", "HS256", "RS256", "ES512", "es256", "", None, ["ES256"], 7])
def test_other_algorithms_of_jws_are_refused(algorithm: Any, maker: Maker) -> None:
    refused(maker.case(JWT), refusals.AlgorithmRefused, maker.jwt({"alg": algorithm}))


def test_a_token_without_a_signature_is_refused(maker: Maker) -> None:
    header, payload, _ = maker.jwt({"alg": "none"}).split(b".")
    refused(maker.case(JWT), refusals.AlgorithmRefused, header + b"." + payload + b".")
    header, payload, _ = maker.jwt().split(b".")
    refused(maker.case(JWT), refusals.SignatureInvalid, header + b"." + payload + b".")


@pytest.mark.parametrize("algorithm", [5, -37, -36, -257, "ES256", True, None])
@pytest.mark.parametrize("kind", [CWT, PSA])
def test_other_algorithms_of_cose_are_refused(kind: EvidenceType, algorithm: Any, maker: Maker) -> None:
    make = maker.cwt if kind is CWT else maker.psa
    refused(maker.case(kind), refusals.AlgorithmRefused, make(protected=cbor2.dumps({1: algorithm})))


def test_an_algorithm_for_another_kind_of_key_is_refused(maker: Maker) -> None:
    refused(maker.case(JWT), refusals.AlgorithmRefused, maker.jwt({"alg": "ES384"}))
    refused(maker.case(JWT), refusals.AlgorithmRefused, maker.jwt({"alg": "EdDSA"}))
    refused(maker.case(PSA), refusals.AlgorithmRefused, maker.psa(protected=cbor2.dumps({1: -35})))


def test_an_algorithm_that_is_not_protected_is_refused(maker: Maker) -> None:
    refused(maker.case(PSA), refusals.AlgorithmRefused, maker.psa(protected=b"", unprotected={1: -7}))


# --- Encoding ------------------------------------------------------------------------------------------------------


@each_kind
def test_evidence_over_the_limit_is_refused(kind: EvidenceType, maker: Maker) -> None:
    refused(maker.case(kind), refusals.EvidenceTooLarge, b"\xd2" + bytes(1 << 20))
    refused(maker.case(kind), refusals.EvidenceTooLarge, maker.case(kind).evidence.ljust(MAX_EVIDENCE_BYTES + 3, b"\0"))


def test_a_name_twice_is_refused(maker: Maker) -> None:
    payload = json.dumps(maker.json_claims())
    twice = payload[:-1] + ', "eat_nonce": "other"}'
    refused(maker.case(JWT), refusals.DuplicateKeys, maker.jwt(payload=twice.encode()))
    header = b'{"alg": "ES256", "alg": "ES256"}'
    signed = to_base64url(header).encode() + b"." + maker.jwt().split(b".")[1]
    token = signed + b"." + to_base64url(signature(maker.root_of_trust, signed)).encode()
    refused(maker.case(JWT), refusals.DuplicateKeys, token)


def with_entry(payload: bytes, key: bytes, value: bytes) -> bytes:
    """A map of fewer than 23 entries with one more."""
    return bytes([payload[0] + 1]) + payload[1:] + key + value


@pytest.mark.parametrize("kind", [CWT, PSA])
@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda payload: with_entry(payload, b"\x0a", b"\x40"), refusals.DuplicateKeys),
        (lambda payload: b"\xbf" + payload[1:] + b"\xff", refusals.IndefiniteLength),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x5f\x40\xff"), refusals.IndefiniteLength),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x81" * 17 + b"\x01"), refusals.EvidenceTooDeep),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x81" * 30000), refusals.EvidenceTooDeep),
        (lambda payload: with_entry(payload, b"\x18\x0a", b"\x40"), refusals.EncodingRefused),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x19\x00\x01"), refusals.EncodingRefused),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\xd8\x1d\x00"), refusals.EncodingRefused),
        (lambda payload: with_entry(payload, b"\xf5", b"\x01"), refusals.EncodingRefused),
        (lambda payload: with_entry(payload, b"\x81\x01", b"\x01"), refusals.EncodingRefused),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x61\xff"), refusals.EvidenceMalformed),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x9a\xff\xff\xff\xff"), refusals.EvidenceMalformed),
        (lambda payload: with_entry(payload, b"\x18\x63", b"\x1c"), refusals.EvidenceMalformed),
        (lambda payload: with_entry(payload, b"\x18\x63", b""), refusals.EvidenceMalformed),
        (lambda payload: payload + b"\0", refusals.EvidenceMalformed),
        (lambda payload: payload[:-1], refusals.EvidenceMalformed),
        (lambda payload: b"\x81" + payload, refusals.EvidenceMalformed),
        (lambda payload: b"", refusals.EvidenceMalformed),
    ],
)
def test_odd_encodings_of_cbor_are_refused(
    kind: EvidenceType, change: Callable[[bytes], bytes], refusal: type[AttestationRefused], maker: Maker
) -> None:
    payload = cbor2.dumps(maker.cbor_claims() if kind is CWT else maker.psa_claims())
    refused(maker.case(kind), refusal, maker.sign1(change(payload)))


@pytest.mark.parametrize("kind", [CWT, PSA])
def test_headers_that_are_not_maps_or_say_a_thing_twice_are_refused(kind: EvidenceType, maker: Maker) -> None:
    make, case = maker.cwt if kind is CWT else maker.psa, maker.case(kind)
    others: list[Any] = [b"", [], "text", 1]
    for unprotected in others:
        refused(case, refusals.EvidenceMalformed, make(unprotected=unprotected))
    refused(case, refusals.EvidenceMalformed, make(protected=b"\x80"))
    refused(case, refusals.EvidenceMalformed, make(protected=cbor2.dumps({1: -7, 2: [99], 99: 1})))
    refused(case, refusals.EvidenceMalformed, make(unprotected={4: "text"}))
    refused(case, refusals.EvidenceMalformed, make(unprotected={33: 1}))
    refused(case, refusals.DuplicateKeys, make(unprotected={1: -7}))
    refused(case, refusals.EvidenceMalformed, make(tag=b""))
    refused(case, refusals.EvidenceMalformed, make(tag=b"\xd1"))
    refused(case, refusals.EvidenceMalformed, b"\xd2" + cbor2.dumps([b"", {}, b""]))
    refused(case, refusals.EvidenceMalformed, b"\xd2" + cbor2.dumps([b"", {}, None, b""]))


def test_json_is_read_strictly(maker: Maker) -> None:
    for text in (b"\xff", b"[1]", b"{", b'{"a": NaN}', b'{"a": 1} x', b'{"a": ' + b"9" * 5000 + b"}", b""):
        with pytest.raises(refusals.EvidenceMalformed):
            read_object(text, "It")
    for text in (b'{"a":' * 17 + b"1" + b"}" * 17, b'{"a":' + b"[" * 20000 + b"]" * 20000 + b"}"):
        with pytest.raises(refusals.EvidenceTooDeep):
            read_object(text, "It")
    header, payload, signed = maker.jwt().split(b".")
    for token in (
        b"",
        header,
        header + b"." + payload,
        b"..",
        header + b"=." + payload + b"." + signed,
        maker.jwt() + b".x",
    ):
        refused(maker.case(JWT), refusals.EvidenceMalformed, token)
    refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt({"crit": ["b64"], "b64": False}))
    refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt({"kid": 1}))
    refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt({"x5c": "text"}))


def test_floats_are_read_in_each_size() -> None:
    assert read_cbor(bytes.fromhex("83f93c00fa3f800000fb3ff0000000000000"), "It") == [1.0] * 3


# --- Claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "claims",
    [{"ueid": 1}, {"ueid": "a b"}, {"hwmodel": []}, {"dbgstat": "off"}, {"dbgstat": 3}, {"oemboot": 1}, {"swname": 1},
     {"swversion": [1]}, {"swversion": []}, {"oemid": -1}, {"oemid": True}, {"oemid": "a b"},
     {"swname": "a\ud800"}, {"swversion": "1\x00"}, {"hwversion": "\x1b[2J"}],
)  # fmt: skip
def test_claims_of_a_jwt_with_other_types_are_refused(claims: dict[str, Any], maker: Maker) -> None:
    refused(maker.case(JWT), refusals.EvidenceMalformed, maker.jwt(**claims))


@pytest.mark.parametrize("claims", [{256: "text"}, {259: 1}, {263: 5}, {263: "disabled"}, {262: 0}, {270: b"x"}])
def test_claims_of_a_cwt_with_other_types_are_refused(claims: dict[int, Any], maker: Maker) -> None:
    refused(maker.case(CWT), refusals.EvidenceMalformed, maker.cwt(claims))


def test_the_manufacturer_is_a_number_or_bytes(maker: Maker) -> None:
    assert maker.case(CWT).verify(maker.cwt({258: 76543})).vendor == "76543"
    assert maker.case(JWT).verify(maker.jwt(oemid="iUWt")).vendor == "8945ad"


@pytest.mark.parametrize(
    "claims",
    [{10: b"short"}, {10: None}, {256: b"\x02" + bytes(32)}, {256: bytes(32)}, {256: None}, {2394: 0}, {2394: None},
     {2394: 1 << 31}, {2395: 0x7000}, {2395: -1}, {2395: True}, {2395: None}, {2396: bytes(31)}, {2396: None},
     {2397: b"short"}, {2399: []}, {2399: None}, {2399: [1]}, {2399: [{2: bytes(32)}]}, {2399: [{5: bytes(32)}]},
     {2399: [MEASURED | {4: 1}]}, {2399: [MEASURED | {1: b"PRoT"}]},
     {2399: [MEASURED | {1: "PRoT\x00"}]}, {2399: [MEASURED | {4: "1\n"}]}, {2399: [MEASURED | {2: bytes(20)}]}],
)  # fmt: skip
def test_psa_tokens_that_rfc_9783_does_not_allow_are_refused(claims: dict[int, Any], maker: Maker) -> None:
    refused(maker.case(PSA), refusals.EvidenceMalformed, maker.psa(claims))


@pytest.mark.parametrize("profile", [None, "tag:psacertified.org,2019:psa#legacy", "PSA_IOT_PROFILE_1", 1])
def test_a_psa_token_of_another_profile_is_refused(profile: Any, maker: Maker) -> None:
    refused(maker.case(PSA), refusals.ProfileUnsupported, maker.psa({265: profile}))


def test_claims_that_are_not_known_are_ignored(maker: Maker) -> None:
    expected = maker.case(PSA).verify()
    assert maker.case(PSA).verify(maker.psa({2398: "1234567890123-12345", 99999: {"x": [1.5, None]}})) == expected


# --- Certificates --------------------------------------------------------------------------------------------------


def chained(maker: Maker, *, days: int = 1, usage: x509.KeyUsage | None = None, ca: bool = False) -> tuple[Any, ...]:
    """Root, CA below it, and a certificate of the root of trust by that CA."""
    root = Authority("Root", now=NOW)
    middle = Authority("Middle", issuer=root, now=NOW)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "IAK")]))
        .issuer_name(middle.certificate.subject)
        .public_key(maker.root_of_trust.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=9))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    leaf = builder.sign(middle.key, hashes.SHA256())
    return tuple(one.public_bytes(Encoding.DER) for one in (leaf, middle.certificate, root.certificate))


@each_kind
def test_a_chain_to_a_registered_root_is_followed(kind: EvidenceType, maker: Maker) -> None:
    leaf, middle, root = chained(maker)
    evidence = with_chain(maker, kind, [leaf, middle])
    for anchor in (root, middle, leaf):
        claims = maker.case(kind).verify(evidence, anchors=(Anchor(anchor, True),))
        assert claims.anchor == Anchor(anchor, True).fingerprint


def with_chain(maker: Maker, kind: EvidenceType, chain: list[bytes]) -> bytes:
    if kind is JWT:
        return maker.jwt({"x5c": [base64.b64encode(one).decode() for one in chain]})
    return (maker.cwt if kind is CWT else maker.psa)(unprotected={33: chain})


@each_kind
def test_a_chain_that_leads_nowhere_is_refused(kind: EvidenceType, maker: Maker) -> None:
    leaf, middle, root = chained(maker)
    _, other, other_root = chained(maker)
    case = replace(maker.case(kind), anchors=(Anchor(root, True),))
    refused(case, refusals.AnchorUnknown, with_chain(maker, kind, [leaf]))
    refused(case, refusals.AnchorUnknown, with_chain(maker, kind, [leaf, other]))
    whole = with_chain(maker, kind, [leaf, middle])
    refused(case, refusals.AnchorUnknown, whole, anchors=(Anchor(other_root, True),))
    refused(case, refusals.AnchorUnknown, whole, anchors=())
    # A bare key is no way around the chain, nor a certificate one around a bare key.
    refused(case, refusals.AnchorUnknown, whole, anchors=(anchor_of(Maker().root_of_trust),))
    refused(case, refusals.AnchorUnknown, maker.case(kind).evidence)


@each_kind
def test_expired_certificates_and_anchors_are_refused(kind: EvidenceType, maker: Maker) -> None:
    leaf, middle, root = chained(maker, days=-1)
    case = replace(maker.case(kind), anchors=(Anchor(root, True),))
    refused(case, refusals.SignerCertificateRefused, with_chain(maker, kind, [leaf, middle]))
    expired = Authority("Old", now=NOW - timedelta(days=90))
    old = Anchor(expired.certificate.public_bytes(Encoding.DER), True)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(expired.certificate.subject)
    builder = builder.public_key(maker.root_of_trust.public_key()).serial_number(1)
    signed = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=1))
    der = signed.sign(expired.key, hashes.SHA256()).public_bytes(Encoding.DER)
    refused(case, refusals.AnchorExpired, with_chain(maker, kind, [der]), anchors=(old,))


def test_certificates_for_something_else_are_refused(maker: Maker) -> None:
    not_signing = x509.KeyUsage(False, False, True, False, False, False, False, False, False)
    for chain in (chained(maker, usage=not_signing), chained(maker, ca=True)):
        leaf, middle, root = chain
        case = replace(maker.case(PSA), anchors=(Anchor(root, True),))
        refused(case, refusals.SignerCertificateRefused, with_chain(maker, PSA, [leaf, middle]))
    leaf, middle, root = chained(maker)
    case = replace(maker.case(PSA), anchors=(Anchor(root, True),))
    refused(case, refusals.SignerCertificateRefused, with_chain(maker, PSA, [leaf, middle, *[middle] * 4]))
    refused(case, refusals.SignerCertificateRefused, with_chain(maker, PSA, [b"no certificate"]))
    refused(case, refusals.SignerCertificateRefused, with_chain(maker, PSA, [bytes(20000)]))


def test_a_signature_over_sha_1_vouches_for_nothing(maker: Maker, tmp_path: Path) -> None:
    root = Authority("Root")  # of today, as openssl's certificates are
    anchor = Anchor(root.certificate.public_bytes(Encoding.DER), True)
    for digest, refusal in (("sha256", None), ("sha1", refusals.AnchorUnknown)):
        evidence = with_chain(maker, PSA, [issued_by_openssl(root, maker, digest, tmp_path)])
        case = replace(maker.case(PSA), anchors=(anchor,), now=datetime.now(UTC))
        if refusal is None:
            case.verify(evidence)
        else:
            refused(case, refusal, evidence)


def issued_by_openssl(root: Authority, maker: Maker, digest: str, folder: Path) -> bytes:
    """A certificate that cryptography would not sign."""
    assert isinstance(maker.root_of_trust, ec.EllipticCurvePrivateKey)
    ca, key = Credentials(root.certificate, root.key).write(folder, "root")
    (folder / "iak.key").write_bytes(key_pem(maker.root_of_trust))
    command: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-new",
        "-key",
        folder / "iak.key",
        "-subj",
        "/CN=IAK",
        "-days",
        "1",
    ]
    command += [f"-{digest}", "-CA", ca, "-CAkey", key, "-outform", "DER", "-addext", "basicConstraints=CA:FALSE"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_a_device_does_not_issue_certificates(maker: Maker) -> None:
    """The classic: a genuine certificate that is no CA's signs the next one."""
    leaf, middle, root = chained(maker)
    assert isinstance(maker.root_of_trust, ec.EllipticCurvePrivateKey)
    attacker = Maker(key=maker.key, challenge=maker.challenge)
    builder = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.load_der_x509_certificate(leaf).subject)
    )
    builder = builder.public_key(attacker.root_of_trust.public_key()).serial_number(1)
    forged = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=1))
    der = forged.sign(maker.root_of_trust, hashes.SHA256()).public_bytes(Encoding.DER)
    case = replace(attacker.case(PSA), anchors=(Anchor(root, True),))
    refused(case, refusals.SignerCertificateRefused, with_chain(attacker, PSA, [der, leaf, middle]))
    refused(case, refusals.AnchorUnknown, with_chain(attacker, PSA, [der]), anchors=(Anchor(leaf, True),))
