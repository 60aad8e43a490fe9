"""The examples that the specifications publish, with the keys that they publish."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from attestation.anchors import Anchor
from attestation.cose import read_cbor, read_sign1
from attestation.eat_cwt import read_token
from attestation.eat_jwt import read_jws
from attestation.evidence import Lifecycle
from attestation.psa import read_token as read_psa_token
from attestation.refusals import AlgorithmRefused, AnchorUnknown, EvidenceMalformed, SignatureInvalid
from core.errors import AttestationRefused
from pki.algorithms import PublicKey, public_key_der
from tests.support.attestation import Maker

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def number(text: str) -> int:
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), "big")


def point(x: str, y: str, curve: ec.EllipticCurve) -> ec.EllipticCurvePublicKey:
    return ec.EllipticCurvePublicNumbers(number(x), number(y), curve).public_key()


def anchors(key: PublicKey) -> list[Anchor]:
    return [Anchor(public_key_der(key), False)]


# --- RFC 9783, appendix A: PSA token signed with COSE_Sign1, and its key --------------------------------------------

PSA_KEY = point(
    "Tl4iCZ47zrRbRG0TVf0dw7VFlHtv18HInYhnmMNybo8", "gNcLhAslaqw0pi7eEEM2TwRAlfADR0uR4Bggkq-xPy4", ec.SECP256R1()
)
PSA_TOKEN = bytes.fromhex(
    "d28443a10126a058faa8190100582101020202020202020202020202020202020202020202020202020202020202020219095c5820"
    "00000000000000000000000000000000000000000000000000000000000000000a5820010101010101010101010101010101010101"
    "010101010101010101010101010119095a1a7fffffff19095b19300019010978217461673a7073616365727469666965642e6f7267"
    "2c323032333a7073612374666d19095d48000000000000000019095f81a20558200404040404040404040404040404040404040404"
    "0404040404040404040404040258200303030303030303030303030303030303030303030303030303030303030303"
    "58402f4c8152ed1691833eebb6a182d2120e3d19220df85b9ac51109113a423fa024205ceda0815968548de4fbb6dc94b88c916f0d"
    "266e64cea24183a84f977de475"
)


def test_the_example_of_rfc_9783_verifies_and_says_what_is_printed_there() -> None:
    claims, nonce = read_psa_token(PSA_TOKEN, anchors(PSA_KEY), NOW)
    assert nonce == b"\x01" * 32
    assert claims.attester == "01" + "02" * 32
    assert claims.implementation == "00" * 32
    assert claims.lifecycle is Lifecycle.SECURED
    [component] = claims.software
    assert (component.digest, component.signer) == ("03" * 32, "04" * 32)


def test_the_example_of_rfc_9783_is_refused_under_another_key() -> None:
    other = Maker().key.public_key()
    with pytest.raises(SignatureInvalid):
        read_psa_token(PSA_TOKEN, anchors(other), NOW)


# --- RFC 8392, appendices A.2.3 and A.3: a signed CWT ----------------------------------------------------------------

CWT_KEY = ec.EllipticCurvePublicNumbers(
    0x143329CCE7868E416927599CF65A34F3CE2FFDA55A7ECA69ED8919A394D42F0F,
    0x60F7F1A780D8A783BFB7A2DD6B2796E8128DBBCEF9D3D168DB9529971A36E7B9,
    ec.SECP256R1(),
).public_key()
CWT = bytes.fromhex(
    "d28443a10126a104524173796d6d657472696345434453413235365850a70175636f61703a2f2f61732e6578616d706c652e636f6d"
    "02656572696b77037818636f61703a2f2f6c696768742e6578616d706c652e636f6d041a5612aeb0051a5610d9f0061a5610d9f007"
    "420b7158405427c1ff28d23fbad1f29c4c7c6a555e601d6fa29f9179bc3d7438bacaca5acd08c8d4d4f96131680c429a01f85951ec"
    "ee743a52b9b63632c57209120e1c9e30"
)


def test_the_signed_cwt_of_rfc_8392_verifies_and_has_its_dates() -> None:
    sign1 = read_sign1(CWT)
    assert sign1.key_id == b"AsymmetricECDSA256"
    sign1.verify(anchors(CWT_KEY), [], now=NOW)
    dates = {name: value for name, value in read_token(sign1.payload).claims.items() if name in ("exp", "nbf", "iat")}
    assert dates == {"exp": 1444064944, "nbf": 1443944944, "iat": 1443944944}


# --- COSE WG examples (github.com/cose-wg/Examples), sign1-tests and ecdsa-examples -----------------------------------

COSE_KEY = point(
    "usWxHK2PmfnHKwXPS54m0kTcGJ90UiglWiGahtagnv8", "IBOL-C3BttVivg-lSreASjpkttcsz-1rb7btKLv8EX4", ec.SECP256R1()
)
COSE_KEY_384 = point(
    "kTJyP2KSsBBhnb4kjWmMF7WHVsY55xUPgb7k64rDcjatChoZ1nvjKmYmPh5STRKc",
    "mM0weMVU2DKsYDxDJkEP9hZiRZtB8fPfXbzINZj_fF7YQRynNWedHEyzAJOX2e8s",
    ec.SECP384R1(),
)
CONTENT = "54546869732069732074686520636f6e74656e742e"  # "This is the content."
SIGNED = "5840eae868ecc176883766c5dc5ba5b8dca25dab3c2e56a551ce5705b793914348e1"
GOOD = f"{SIGNED}9f43d6c6ba654472da301b645b293c9ba939295b97c4bdb847782bff384c5794"


class Example(NamedTuple):
    name: str
    cbor: str
    refusal: type[AttestationRefused] | None


COSE = [
    Example("ecdsa-sig-01", f"d28443a10126a104423131{CONTENT}{GOOD}", None),
    Example("sign-fail-01: Wrong CBOR Tag", f"d903e68443a10126a10442313154{CONTENT[2:]}{GOOD}", EvidenceMalformed),
    Example("sign-fail-02: Change signature", f"d28443a10126a10442313154{CONTENT[2:-2]}2f{GOOD}", SignatureInvalid),
    Example("sign-fail-03: Change Sign Algorithm", f"d28445a1013903e6a104423131{CONTENT}{GOOD}", AlgorithmRefused),
    Example(
        "sign-fail-04: Change Sign Algorithm", f"d2844aa10167756e6b6e6f776ea104423131{CONTENT}{GOOD}", AlgorithmRefused
    ),
    Example("sign-fail-06: Add protected attribute", f"d28445a201260300a104423131{CONTENT}{GOOD}", SignatureInvalid),
    Example(
        "sign-fail-07: Remove protected attribute",
        f"d28443a10126a104423131{CONTENT}{SIGNED}72727f48461fabbba2e343492ddecac3983686250bc68e9f1a7a07d41225b59f",
        SignatureInvalid,
    ),
    # What COSE allows and no profile of ours: an algorithm that is not protected, external data, no tag.
    Example(
        "sign-pass-01: Redo protected",
        f"d28441a0a201260442313154{CONTENT[2:]}{SIGNED}1a02e5f0344bf2d4ee5c7fd75a68a9f5e0b3cc1f1fc1409c189566586ff9d610",
        AlgorithmRefused,
    ),
    Example(
        "sign-pass-02: External",
        f"d28443a10126a104423131{CONTENT}{SIGNED}55388b10c4f1b59a6733eab416870a945111a4b2fbdbef33a77234b1deff2f9b",
        SignatureInvalid,
    ),
    Example("sign-pass-03: Remove CBOR Tag", f"8443a10126a104423131{CONTENT}{GOOD}", EvidenceMalformed),
]


@pytest.mark.parametrize("example", COSE, ids=lambda example: example.name)
def test_the_examples_of_the_cose_working_group(example: Example) -> None:
    def verify() -> None:
        read_sign1(bytes.fromhex(example.cbor)).verify(anchors(COSE_KEY), [], now=NOW)

    if example.refusal is None:
        verify()
    else:
        with pytest.raises(example.refusal):
            verify()


def test_the_cose_example_with_p384_verifies() -> None:
    cbor = (
        f"d28444a1013822a1044450333834{CONTENT}5860b8f85eff78c88f5351ced2f1887b79b296490795594b62e41e22529bb90208b7d8"
        "cddd4a46d0e9c986464d83d0a5d1edf39b3e2c5750364230d0e8d76460d8808e76c83830fbbd1978cc174066eb437f17887979ecf0"
        "27dcc9d51baf6c4fd8c0"
    )
    read_sign1(bytes.fromhex(cbor)).verify(anchors(COSE_KEY_384), [], now=NOW)


# --- RFC 7515, appendix A.3, and RFC 8037, appendix A.4: JWS with ES256 and EdDSA -------------------------------------

JWS_KEY = point(
    "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0", ec.SECP256R1()
)
JWS = (
    b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVl"
    b"fQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
EDDSA_KEY = ed25519.Ed25519PublicKey.from_public_bytes(
    base64.urlsafe_b64decode("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
)
EDDSA = (
    b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4"
    b"ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
)


@pytest.mark.parametrize(("token", "key"), [(JWS, JWS_KEY), (EDDSA, EDDSA_KEY)], ids=["es256", "eddsa"])
def test_the_examples_of_jws_verify_under_their_keys_and_no_other(token: bytes, key: PublicKey) -> None:
    jws = read_jws(token)
    jws.verify(anchors(key), [], now=NOW)
    other = Maker(root_of_trust=ed25519.Ed25519PrivateKey.generate() if key is EDDSA_KEY else Maker().root_of_trust)
    with pytest.raises(SignatureInvalid):
        jws.verify(anchors(other.root_of_trust.public_key()), [], now=NOW)


def test_a_key_of_small_order_is_no_anchor() -> None:
    key = ed25519.Ed25519PublicKey.from_public_bytes(b"\x01" + bytes(31))
    token = read_sign1(Maker(root_of_trust=ed25519.Ed25519PrivateKey.generate()).cwt()[2:])
    with pytest.raises(AnchorUnknown):
        token.verify(anchors(key), [], now=NOW)


# --- RFC 9711, appendix A: claims sets; it publishes no key for its tokens --------------------------------------------


def test_the_claims_of_a_tee_in_rfc_9711_are_read() -> None:
    nonce = "48df7b172d70b5a18935d0460a73dd71"
    payload = bytes.fromhex(f"a30a50{nonce}190106f519010702")
    assert read_cbor(payload, "It") == {10: bytes.fromhex(nonce), 262: True, 263: 2}
    read = read_token(payload)
    assert read.claims["dbgstat"] == "disabled-since-boot"
    assert read.claims["oemboot"] is True
    assert read.key is None


def test_the_cwt_of_the_eat_working_group_is_read_and_signed_by_no_known_key() -> None:
    """``cddl/Example-Tokens/valid_cwt.diag`` of github.com/ietf-rats-wg/eat, whose signing key is not published."""
    token = bytes.fromhex(
        "d28443a10126a054a20b46024a6b0978de0a490001020304050607085840"
        "9b9b2f5e470000f6a20c8a4157b5763fc45be7599a5334028517768c21affb845a56ab557e0c8973a07417391243a79c478562d285"
        "612e292c622162ab233787"
    )
    sign1 = read_sign1(token)
    assert read_token(sign1.payload).claims == {"eat_nonce": bytes(range(9))}
    with pytest.raises(SignatureInvalid):
        sign1.verify(anchors(COSE_KEY), [], now=NOW)
