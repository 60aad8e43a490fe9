"""Keys in tokens as ``cryptography`` sees them: each signature is verified, and nothing else can be done with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature

from core.errors import CaKeyUnavailable, TokenUnavailable
from pki.algorithms import KeyType, PrivateKey, generate_key
from pki.keys.contract import check_that_it_signs
from pki.keys.token_keys import is_in_token, token_key

KINDS = [KeyType.EC_P256, KeyType.EC_P384, KeyType.ED25519, KeyType.RSA_2048]
CURVE_BYTES = {KeyType.EC_P256: 32, KeyType.EC_P384: 48}
Sign = Callable[[str, bytes, bool], bytes]


def played_token(kind: KeyType, key: PrivateKey, *, wrong: int = 0) -> tuple[Sign, list[bool]]:
    """Signs as a token does, the first ``wrong`` times with another key; also keeps whether it was asked again."""
    asked: list[bool] = []
    other = generate_key(kind)

    def sign(mechanism: str, data: bytes, again: bool) -> bytes:
        asked.append(again)
        signer = other if len(asked) <= wrong else key
        if isinstance(signer, ec.EllipticCurvePrivateKey):
            assert mechanism == "ecdsa"
            length = CURVE_BYTES[kind]
            der = signer.sign(data, ec.ECDSA(Prehashed(hashes.SHA256() if len(data) == 32 else hashes.SHA384())))
            return b"".join(number.to_bytes(length, "big") for number in decode_dss_signature(der))
        if isinstance(signer, rsa.RSAPrivateKey):
            assert mechanism == "rsa"
            return raw_rsa(signer, data)
        assert mechanism == "eddsa"
        return signer.sign(data)

    return sign, asked


def raw_rsa(key: rsa.RSAPrivateKey, info: bytes) -> bytes:
    """CKM_RSA_PKCS: EMSA-PKCS1-v1_5 of what is given, which has the DigestInfo already (RFC 8017 section 9.2)."""
    numbers, length = key.private_numbers(), key.key_size // 8
    padded = b"\0\1" + b"\xff" * (length - len(info) - 3) + b"\0" + info
    return pow(int.from_bytes(padded, "big"), numbers.d, numbers.public_numbers.n).to_bytes(length, "big")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_in_a_token_signs_as_one_in_memory(kind: KeyType) -> None:
    key = generate_key(kind)
    sign, asked = played_token(kind, key)
    kept = token_key(key.public_key(), sign)
    check_that_it_signs(kept)
    assert asked == [False]
    assert is_in_token(kept)
    assert not is_in_token(key)
    assert kept.public_key() == key.public_key()
    assert copy.copy(kept) is copy.deepcopy(kept) is kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_of_another_key_is_thrown_away_and_asked_for_once_more(kind: KeyType) -> None:
    key = generate_key(kind)
    sign, asked = played_token(kind, key, wrong=1)
    check_that_it_signs(token_key(key.public_key(), sign))
    assert asked == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_signs_by_another_key_is_of_no_use(kind: KeyType) -> None:
    key = generate_key(kind)
    sign, asked = played_token(kind, key, wrong=2)
    with pytest.raises(TokenUnavailable, match="signs by another key than the CA's"):
        check_that_it_signs(token_key(key.public_key(), sign))
    assert asked == [False, True]


def never(mechanism: str, data: bytes, again: bool) -> bytes:
    pytest.fail("the token was asked")


def test_an_elliptic_key_does_nothing_but_sign() -> None:
    public_key = ec.generate_private_key(ec.SECP256R1()).public_key()
    key = token_key(public_key, never)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert (key.curve.name, key.key_size) == ("secp256r1", 256)
    for use in (lambda: key.exchange(ec.ECDH(), public_key), key.private_numbers):
        with pytest.raises(CaKeyUnavailable, match="cannot leave"):
            use()
    with pytest.raises(UnsupportedAlgorithm, match="sign data, not digests"):
        key.sign(bytes(32), ec.ECDSA(Prehashed(hashes.SHA256())))


def test_an_rsa_key_does_nothing_but_sign_by_pkcs_1() -> None:
    key = token_key(rsa.generate_private_key(65537, 2048).public_key(), never)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 2048
    with pytest.raises(CaKeyUnavailable, match="cannot leave"):
        key.decrypt(bytes(256), padding.PKCS1v15())
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    for scheme, algorithm in ((pss, hashes.SHA256()), (padding.PKCS1v15(), hashes.SHA1())):  # noqa: S303 - refused
        with pytest.raises(UnsupportedAlgorithm, match=r"by PKCS#1 v1\.5 with SHA-2"):
            key.sign(b"message", scheme, algorithm)


def test_an_ed25519_key_does_not_show_its_seed() -> None:
    key = token_key(ed25519.Ed25519PrivateKey.generate().public_key(), never)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    with pytest.raises(CaKeyUnavailable, match="cannot leave"):
        key.private_bytes_raw()
