"""What joserfc does for single sign-on: reads a JWS (RFC 7515), verifies its signature, imports keys (RFC 7517).

joserfc takes a while to load. So the modules that every start imports load this one when there is a token or a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from workflows.oidc.keys import KINDS

PublicKey = RSAKey | ECKey | OKPKey
Signed = jws.CompactSignature
_IMPORT: Mapping[str, Callable[[dict[str, str | list[str]]], PublicKey]] = {
    "RSA": RSAKey.import_key,
    "EC": ECKey.import_key,
    "OKP": OKPKey.import_key,
}


class _Registry(JWSRegistry):
    """The accepted algorithms alone; ``EdDSA`` is Ed25519, of which joserfc warns by its older name."""

    max_header_length = 4096

    def get_alg(self, name: str) -> Any:
        """Return the algorithm, of those that have been checked before."""
        return self.algorithms["Ed25519" if name == "EdDSA" else name]


# Further parameters of a header are ignored (RFC 7515 §4), but those that are critical.
_REGISTRY = _Registry(algorithms=[*KINDS], strict_check_header=False)


def read_signed(text: str) -> Signed | None:
    """Return a JWS in compact form, not verified yet; nothing if the text is not one."""
    try:
        return jws.extract_compact(text.encode(), registry=_REGISTRY)
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def is_valid(token: Signed, key: PublicKey) -> bool:
    """Return whether the signature was made with the key, by the algorithm that the header names."""
    try:
        return jws.validate_compact(token, key, registry=_REGISTRY)
    except (JoseError, ValueError):
        return False


def import_key(kind: str, values: Mapping[str, str]) -> PublicKey | None:
    """Return the public key of a JWK of this ``kty``; nothing if its parameters are not those of a key."""
    try:
        return _IMPORT[kind]({"kty": kind, **values})
    except (JoseError, ValueError, TypeError):
        return None
