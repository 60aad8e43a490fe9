"""Verify a PSA attestation token (RFC 9783), which a device's root of trust makes of its state."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from attestation.anchors import Anchor
from attestation.cose import read_cbor, read_sign1
from attestation.evidence import Challenge, Claims, EvidenceType, Lifecycle, SoftwareComponent, is_printable
from attestation.refusals import EvidenceMalformed, NonceMismatch, ProfileUnsupported
from pki.algorithms import PublicKey, public_key_der

PROFILE = "tag:psacertified.org,2023:psa#tfm"  # RFC 9783 §5.2
_NONCE, _INSTANCE, _PROFILE = 10, 256, 265
_CLIENT, _LIFECYCLE, _IMPLEMENTATION, _BOOT_SEED, _SOFTWARE = 2394, 2395, 2396, 2397, 2399
_KIND, _MEASUREMENT, _VERSION, _SIGNER = 1, 2, 4, 5
_HASH_SIZES = (32, 48, 64)
_RANDOM_UEID = 0x01
# The upper byte of the claim (RFC 9783 §4.3.1); the lower one is the implementation's own.
_LIFECYCLES = dict(zip((0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60), Lifecycle, strict=True))


def nonce_for(nonce: bytes, public_key: PublicKey) -> bytes:
    """Return what the device asks its root of trust to sign: SHA-256 of the nonce and its SubjectPublicKeyInfo in DER.

    A PSA token has no claim for a key, so the nonce binds it to that of the CSR.
    """
    return hashlib.sha256(nonce + public_key_der(public_key)).digest()


def verify(
    evidence: bytes, challenge: Challenge, public_key: PublicKey, anchors: Sequence[Anchor], now: datetime
) -> Claims:
    """Verify a token whose nonce is that of ``nonce_for``; raises a kind of ``AttestationRefused``."""
    claims, nonce = read_token(evidence, anchors, now)
    if not hmac.compare_digest(nonce, nonce_for(challenge.nonce, public_key)):
        raise NonceMismatch("The evidence was not made for this nonce and the key of the CSR.")
    return claims


def read_token(evidence: bytes, anchors: Sequence[Anchor], now: datetime) -> tuple[Claims, bytes]:
    """Verify a token's signature and return what it says, with its nonce; raises a kind of ``AttestationRefused``."""
    sign1 = read_sign1(evidence)
    token = read_cbor(sign1.payload, "The token")
    if not isinstance(token, Mapping):
        raise EvidenceMalformed("The token is no map.")
    instance = _binary(token, _INSTANCE, "instance id", (33,))
    signer = sign1.verify(anchors, [instance], now=now)
    if token.get(_PROFILE) != PROFILE:
        raise ProfileUnsupported(f"The token's profile is not {PROFILE}.")
    if instance[0] != _RANDOM_UEID:
        raise EvidenceMalformed("The token's instance id is no UEID of type RAND.")
    _check_others(token)
    read = Claims(
        type=EvidenceType.PSA,
        attester=instance.hex(),
        implementation=_binary(token, _IMPLEMENTATION, "implementation id", (32,)).hex(),
        lifecycle=_lifecycle(token.get(_LIFECYCLE)),
        software=_software(token.get(_SOFTWARE)),
        anchor=signer.anchor.fingerprint,
    )
    return read, _binary(token, _NONCE, "nonce", _HASH_SIZES)


def _binary(claims: Mapping[Any, Any], key: int, what: str, sizes: Sequence[int]) -> bytes:
    value = claims.get(key)
    if not isinstance(value, bytes) or len(value) not in sizes:
        raise EvidenceMalformed(f"The token has no {what} of {' or '.join(map(str, sizes))} bytes.")
    return value


def _check_others(claims: Mapping[int, Any]) -> None:
    """Check the types of the claims that are not looked at otherwise (RFC 9783 §4.1.2, §4.3.2)."""
    client = claims.get(_CLIENT)
    if type(client) is not int or not -(1 << 31) <= client < 1 << 31 or client == 0:
        raise EvidenceMalformed("The token's client id is no number of 32 bits other than zero.")
    if _BOOT_SEED in claims:
        _binary(claims, _BOOT_SEED, "boot seed", range(8, 33))


def _lifecycle(value: object) -> Lifecycle:
    if type(value) is not int or not 0 <= value < 1 << 16 or value >> 8 not in _LIFECYCLES:
        raise EvidenceMalformed("The token's security lifecycle is not one of RFC 9783.")
    return _LIFECYCLES[value >> 8]


def _software(value: object) -> tuple[SoftwareComponent, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise EvidenceMalformed("The token has no list of software components.")
    return tuple(_component(item) for item in value)


def _component(item: object) -> SoftwareComponent:
    if not isinstance(item, Mapping):
        raise EvidenceMalformed("A software component of the token is no map.")
    texts = [item.get(key, "") for key in (_KIND, _VERSION)]
    if not all(map(is_printable, texts)):
        raise EvidenceMalformed("The type or the version of a software component is no printable text.")
    digest = _binary(item, _MEASUREMENT, "measurement value", _HASH_SIZES)
    signer = _binary(item, _SIGNER, "signer id", _HASH_SIZES)
    return SoftwareComponent(name=texts[0], version=texts[1], digest=digest.hex(), signer=signer.hex())
