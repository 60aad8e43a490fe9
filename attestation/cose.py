"""Read CBOR strictly (RFC 8949) and verify COSE_Sign1 (RFC 9052 §4.2), which CWTs and PSA tokens consist of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from attestation.anchors import Algorithm, SignedToken
from attestation.evidence import MAX_DEPTH, check_size
from attestation.refusals import (
    AlgorithmRefused,
    DuplicateKeys,
    EncodingRefused,
    EvidenceMalformed,
    EvidenceTooDeep,
    IndefiniteLength,
)
from pki.algorithms import PublicKey
from pki.encoding import failing_as

SIGN1_TAG = b"\xd2"  # 18
CWT_TAG = b"\xd8\x3d"  # 61
_ALG, _CRIT, _KID, _X5CHAIN = 1, 2, 4, 33
# RFC 9053 §2, and the fully specified ones of RFC 9864 §2.
_ALGORITHMS = {-7: Algorithm.ES256, -9: Algorithm.ES256, -35: Algorithm.ES384, -51: Algorithm.ES384,
               -8: Algorithm.EDDSA, -19: Algorithm.EDDSA}  # fmt: skip
_IN_MORE_BYTES = 24  # additional information from here on: the argument follows in 1, 2, 4 or 8 bytes
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_KEY_KINDS = (_UNSIGNED, _NEGATIVE, _BYTES, _TEXT)  # true would be taken for 1 by Python


# --- CBOR ----------------------------------------------------------------------------------------------------------


def read_cbor(content: bytes, what: str) -> Any:
    """Read one item of CBOR: preferred serialization, definite lengths, no tags, no key twice, limited depth.

    cbor2 alone accepts more than one encoding of a value. Raises ``EvidenceMalformed`` or one of its kinds.
    """
    if _end_of_item(content, 0, 0, what) != len(content):
        raise EvidenceMalformed(f"{what} is followed by other bytes.")
    with failing_as(EvidenceMalformed(f"{what} cannot be read as CBOR.")):
        try:
            return cbor2.loads(content, allow_duplicate_keys=False)
        except cbor2.CBORDecodeError as error:
            cbor2.loads(content)  # fails, too, unless it was for a key
            raise DuplicateKeys(f"{what} has a key twice in one map.") from error


def _end_of_item(content: bytes, at: int, depth: int, what: str) -> int:
    """Check the item at ``at`` and what is in it, and return where it ends."""
    if depth > MAX_DEPTH:
        raise EvidenceTooDeep(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    if at >= len(content):
        raise EvidenceMalformed(f"{what} was cut off.")
    kind, argument, end = _header(content, at, what)
    if kind == _TAG:
        raise EncodingRefused(f"{what} has a CBOR tag, which none of its claims has.")
    if kind in (_BYTES, _TEXT):
        end += argument
    inner = {_ARRAY: argument, _MAP: 2 * argument}.get(kind, 0)
    if end + inner > len(content):  # each item inside takes a byte at least
        raise EvidenceMalformed(f"{what} was cut off.")
    for number in range(inner):
        is_key = kind == _MAP and number % 2 == 0
        if is_key and end < len(content) and content[end] >> 5 not in _KEY_KINDS:
            raise EncodingRefused(f"{what} has a map key that is neither a whole number nor a string.")
        end = _end_of_item(content, end, depth + 1, what)
    return end


def _header(content: bytes, at: int, what: str) -> tuple[int, int, int]:
    """Return major type, argument, and where the header ends."""
    kind, argument = content[at] >> 5, content[at] & 0x1F
    if argument < _IN_MORE_BYTES:
        return kind, argument, at + 1
    if argument == 31:
        raise IndefiniteLength(f"{what} has an item of indefinite length.")
    size = 1 << (argument - _IN_MORE_BYTES)
    if size > 8:
        raise EvidenceMalformed(f"{what} is not CBOR.")
    value = int.from_bytes(content[at + 1 : at + 1 + size], "big")
    least = {1: _IN_MORE_BYTES, 2: 1 << 8, 4: 1 << 16, 8: 1 << 32}[size]
    if kind == _SIMPLE:
        least = 32 if size == 1 else 0  # the others are floats, whose bits are their value
    if value < least:
        raise EncodingRefused(f"{what} has a number or length in more bytes than it needs.")
    return kind, value, at + 1 + size


# --- COSE_Sign1 ----------------------------------------------------------------------------------------------------


def read_sign1(content: bytes) -> SignedToken:
    """Read a COSE_Sign1 with its tag 18, whose algorithm is in the protected header (RFC 9052 §3.1, §4.2).

    Raises ``EvidenceMalformed`` or one of its kinds, or ``AlgorithmRefused``.
    """
    check_size(content)
    if content[:1] != SIGN1_TAG:
        raise EvidenceMalformed("The evidence is not a COSE_Sign1 with its tag, 18.")
    parts = read_cbor(content[1:], "The evidence")
    if not isinstance(parts, list | tuple) or len(parts) != 4:
        raise EvidenceMalformed("The evidence is not a COSE_Sign1 of four parts.")
    protected, unprotected, payload, signature = parts
    if not all(isinstance(part, bytes) for part in (protected, payload, signature)):
        raise EvidenceMalformed("The protected header, the payload or the signature of the evidence is no byte string.")
    if not isinstance(unprotected, Mapping):
        raise EvidenceMalformed("The unprotected header of the evidence is no map.")
    headers = _headers(protected, unprotected)
    return SignedToken(
        signed=cbor2.dumps(["Signature1", protected, b"", payload]),  # the Sig_structure of RFC 9052 §4.4
        payload=payload,
        signature=signature,
        algorithm=_algorithm(protected),
        key_id=_key_id(headers),
        chain=_chain(headers),
    )


def _protected(content: bytes) -> Mapping[Any, Any]:
    header = read_cbor(content, "The protected header") if content else {}
    if not isinstance(header, Mapping):
        raise EvidenceMalformed("The protected header of the evidence is no map.")
    return header


def _headers(protected: bytes, unprotected: Mapping[Any, Any]) -> Mapping[Any, Any]:
    header = _protected(protected)
    if header.keys() & unprotected.keys():
        raise DuplicateKeys("The evidence has a header parameter both protected and unprotected.")
    if _CRIT in header or _CRIT in unprotected:
        raise EvidenceMalformed("The evidence has critical header parameters, of which none is known.")
    return {**unprotected, **header}


def _algorithm(protected: bytes) -> Algorithm:
    algorithm = _protected(protected).get(_ALG)
    if type(algorithm) is not int or algorithm not in _ALGORITHMS:
        raise AlgorithmRefused(
            "The evidence has to be signed with ES256, ES384 or EdDSA, named in its protected header."
        )
    return _ALGORITHMS[algorithm]


def _key_id(headers: Mapping[Any, Any]) -> bytes:
    key_id = headers.get(_KID, b"")
    if not isinstance(key_id, bytes):
        raise EvidenceMalformed("The key id of the evidence is no byte string.")
    return key_id


def _chain(headers: Mapping[Any, Any]) -> tuple[bytes, ...]:
    """Return the certificates of x5chain: one byte string or an array of them (RFC 9360 §2)."""
    chain = headers.get(_X5CHAIN, ())
    found = (chain,) if isinstance(chain, bytes) else chain
    if not isinstance(found, list | tuple) or not all(isinstance(one, bytes) for one in found):
        raise EvidenceMalformed("The x5chain of the evidence is no list of certificates.")
    return tuple(found)


# --- COSE_Key ------------------------------------------------------------------------------------------------------

_KTY, _CRV, _X, _Y, _D = 1, -1, -2, -3, -4
_OKP, _EC2 = 1, 2
_CURVES: Mapping[int, ec.EllipticCurve] = {1: ec.SECP256R1(), 2: ec.SECP384R1()}
_ED25519 = 6


def read_cose_key(value: object) -> PublicKey:
    """Read a public COSE_Key (RFC 9053 §7): P-256 or P-384 with both coordinates, or Ed25519.

    Raises ``EvidenceMalformed``.
    """
    if not isinstance(value, Mapping) or _D in value:
        raise EvidenceMalformed("The attested key is no public COSE_Key.")
    with failing_as(EvidenceMalformed("The attested COSE_Key cannot be read, or is not of an accepted kind.")):
        kty, curve, x = value[_KTY], value[_CRV], value[_X]
        if kty == _OKP and curve == _ED25519:
            return ed25519.Ed25519PublicKey.from_public_bytes(x)
        y = value[_Y]
        if kty != _EC2 or not isinstance(x, bytes) or not isinstance(y, bytes):
            raise ValueError("no key with two coordinates")
        kind, size = _CURVES[curve], _CURVES[curve].key_size // 8
        if len(x) != size or len(y) != size:
            raise ValueError("coordinates of another length")
        return ec.EllipticCurvePublicKey.from_encoded_point(kind, b"\x04" + x + y)
