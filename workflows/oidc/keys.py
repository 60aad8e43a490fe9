"""The public keys with which an identity provider signs ID tokens, out of its JWK set (RFC 7517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflows.oidc.jose import PublicKey

# By the algorithm (RFC 7518 §3.1, RFC 8037 §3.1): what the key must be, and the parameters that make it.
KINDS: Mapping[str, tuple[str, str | None, tuple[str, ...]]] = {
    "RS256": ("RSA", None, ("n", "e")),
    "ES256": ("EC", "P-256", ("crv", "x", "y")),
    "EdDSA": ("OKP", "Ed25519", ("crv", "x")),
}
MAX_KEYS = 100
# Of the modulus in Base64url: 2,048 to 8,192 bits; and of the exponent, 32 bits.
MIN_MODULUS, MAX_MODULUS, MAX_EXPONENT = 342, 1366, 6


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key for one algorithm, and its name, if it has one."""

    algorithm: str
    key_id: str | None
    key: PublicKey


def read_keys(jwk_set: Mapping[str, Any]) -> Sequence[VerificationKey]:
    """Return the keys of a set that can verify ID tokens; others, as those for encryption, are left out."""
    listed = jwk_set.get("keys")
    if not isinstance(listed, list):
        return ()
    return [key for jwk in listed[:MAX_KEYS] if isinstance(jwk, dict) and (key := _read(jwk)) is not None]


def choose_key(keys: Sequence[VerificationKey], algorithm: str, key_id: str | None) -> PublicKey | None:
    """Return the key of this name; without a name the only one for the algorithm (OpenID Connect Core 1.0 §10.1)."""
    fitting = [one for one in keys if one.algorithm == algorithm and key_id in (None, one.key_id)]
    return fitting[0].key if len(fitting) == 1 else None


def _read(jwk: Mapping[str, Any]) -> VerificationKey | None:
    from workflows.oidc.jose import import_key

    found = [name for name, (kty, crv, _) in KINDS.items() if jwk.get("kty") == kty and crv in (None, jwk.get("crv"))]
    if not found:
        return None
    algorithm = found[0]
    kind, _, names = KINDS[algorithm]
    values = {name: value for name in names if isinstance(value := jwk.get(name), str)}
    key_id = jwk.get("kid")
    for_signatures = jwk.get("use", "sig") == "sig" and "verify" in _listed(jwk.get("key_ops", ["verify"]))
    if not for_signatures or jwk.get("alg", algorithm) != algorithm or len(values) < len(names):
        return None
    if not isinstance(key_id, str | None) or (kind == "RSA" and not _is_strong(values["n"], values["e"])):
        return None
    key = import_key(kind, values)
    return None if key is None else VerificationKey(algorithm, key_id, key)


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def _is_strong(modulus: str, exponent: str) -> bool:
    return MIN_MODULUS <= len(modulus) <= MAX_MODULUS and 0 < len(exponent) <= MAX_EXPONENT
