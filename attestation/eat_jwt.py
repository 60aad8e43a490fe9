"""Verify an Entity Attestation Token in the form of a JWT (RFC 9711, RFC 7519) in JWS compact serialization."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from attestation.anchors import Algorithm, Anchor, SignedToken
from attestation.eat import ClaimsSet, verified_claims
from attestation.evidence import Challenge, Claims, EvidenceType, check_size, from_base64url, read_object
from attestation.refusals import AlgorithmRefused, EvidenceMalformed, KeyNotBound
from core.errors import KeyRefused
from pki.algorithms import PublicKey, check_public_key
from pki.encoding import failing_as

_BINARY = ("eat_nonce", "ueid", "hwmodel")
_TEXTS = ("hwversion", "dbgstat", "eat_profile", "swname", "swversion")
_READ = ("exp", "nbf", "iat", "oemid", "oemboot", *_TEXTS, *_BINARY)


def verify(
    evidence: bytes, challenge: Challenge, public_key: PublicKey, anchors: Sequence[Anchor], now: datetime
) -> Claims:
    """Verify an EAT that was made for this challenge and key.

    ``eat_nonce`` is the nonce in Base64url without padding, one text, and ``cnf`` has the key as a JWK (RFC 7800 §3.2).
    Raises a kind of ``AttestationRefused``.
    """
    jws = read_jws(evidence)
    token = read_token(jws.payload)
    return verified_claims(EvidenceType.EAT_JWT, jws, token, challenge, public_key, anchors, now)


def read_jws(evidence: bytes) -> SignedToken:
    """Read a JWS (RFC 7515 §7.1): no name twice in its header, one of the accepted algorithms, nothing critical.

    Raises ``EvidenceMalformed`` or one of its kinds, or ``AlgorithmRefused``.
    """
    check_size(evidence)
    try:
        header, payload, signature = evidence.decode("ascii").split(".")
    except ValueError as error:
        raise EvidenceMalformed("The evidence is no JWT of three parts.") from error
    read = read_object(from_base64url(header, "The header of the evidence"), "The header of the evidence")
    if "crit" in read:
        raise EvidenceMalformed("The evidence has critical header parameters, of which none is known.")
    return SignedToken(
        signed=evidence.rpartition(b".")[0],  # header and payload as they came
        payload=from_base64url(payload, "The payload of the evidence"),
        signature=from_base64url(signature, "The signature of the evidence"),
        algorithm=_algorithm(read),
        key_id=_key_id(read),
        chain=tuple(_chain(read)),
    )


def _algorithm(header: Mapping[str, Any]) -> Algorithm:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in set(Algorithm):
        raise AlgorithmRefused("The evidence has to be signed with ES256, ES384 or EdDSA.")
    return Algorithm(algorithm)


def _key_id(header: Mapping[str, Any]) -> bytes:
    key_id = header.get("kid", "")
    if not isinstance(key_id, str):
        raise EvidenceMalformed("The key id of the evidence is no text.")
    return key_id.encode("utf-8", "surrogatepass")


def _chain(header: Mapping[str, Any]) -> list[bytes]:
    """Return the certificates of x5c, in Base64 with padding (RFC 7515 §4.1.6)."""
    chain = header.get("x5c", [])
    if not isinstance(chain, list) or not all(isinstance(one, str) for one in chain):
        raise EvidenceMalformed("The x5c of the evidence is no list of certificates.")
    with failing_as(EvidenceMalformed("A certificate in the x5c of the evidence is not in Base64.")):
        return [base64.b64decode(one, validate=True) for one in chain]


def read_token(payload: bytes) -> ClaimsSet:
    """Read a claims set; claims that are not known here are ignored (RFC 9711 §4). Raises ``EvidenceMalformed``."""
    claims = read_object(payload, "The claims set")
    named = {name: claims[name] for name in _READ if name in claims}
    for name in _BINARY:
        if isinstance(named.get(name), str):
            named[name] = from_base64url(named[name], f"The claim {name}")
    if isinstance(named.get("oemid"), str):
        named["oemid"] = from_base64url(named["oemid"], "The claim oemid")
    return ClaimsSet(named, _confirmed(claims))


def _confirmed(claims: Mapping[str, Any]) -> PublicKey | None:
    if "cnf" not in claims:
        return None
    confirmation = claims["cnf"]
    if not isinstance(confirmation, dict) or set(confirmation) != {"jwk"} or not isinstance(confirmation["jwk"], dict):
        raise KeyNotBound("The claim cnf of the evidence has to hold one key, as a JWK.")
    return _read_jwk(confirmation["jwk"])


def _read_jwk(jwk: Mapping[str, Any]) -> PublicKey:
    """Read a public JWK of a P-256, P-384 or Ed25519 key (RFC 7518 §6, RFC 8037 §2)."""
    names = {"kty": jwk.get("kty"), "crv": jwk.get("crv")}
    coordinates = [name for name in ("x", "y") if name in jwk]
    if "d" in jwk or not all(isinstance(jwk[name], str) for name in coordinates):
        raise EvidenceMalformed("The attested key is no public JWK.")
    values = {name: from_base64url(jwk[name], "A coordinate of the attested key") for name in coordinates}
    unreadable = EvidenceMalformed("The attested JWK cannot be read, or is not of an accepted kind.")
    with failing_as(unreadable):
        if names == {"kty": "OKP", "crv": "Ed25519"}:
            key: object = ed25519.Ed25519PublicKey.from_public_bytes(values["x"])
        else:
            curve = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1}[str(names["crv"])]()
            if names["kty"] != "EC" or {len(values["x"]), len(values["y"])} != {curve.key_size // 8}:
                raise ValueError("not an EC key")
            key = ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + values["x"] + values["y"])
    try:
        return check_public_key(key)
    except KeyRefused as error:
        raise unreadable from error
