"""Checks an ID token: its signature by joserfc, and all that it says ourselves (OpenID Connect Core 1.0 §3.1.3.7).

joserfc accepts a token that is for another client, too, and one whose members are of unexpected types.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from workflows.oidc.keys import KINDS
from workflows.oidc.refusals import IdTokenRefused

if TYPE_CHECKING:
    from workflows.oidc import jose

MAX_TOKEN = 16 * 1024  # characters
MAX_SUBJECT = 255  # OpenID Connect Core 1.0 §2
SKEW_SECONDS = 60  # between the clocks of provider and portal
MAX_AGE_SECONDS = 600  # since the token was issued: a login is not put off
_OF_ACCESS_TOKENS = ("scope", "scp", "client_id")  # RFC 9068 §2.2, and what providers called it before
_OF_LOGOUT_TOKENS = "events"  # OpenID Connect Back-Channel Logout 1.0 §2.4

FindKey = Callable[[str, "str | None"], "jose.PublicKey | None"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What an ID token must say: ``nonce`` is ``None`` if none was sent, as in the device flow."""

    issuer: str
    client_id: str
    nonce: str | None


@dataclass(frozen=True, slots=True)
class IdToken:
    """A verified ID token: ``digest`` is the SHA-256 of what is signed, in hexadecimal."""

    subject: str
    claims: Mapping[str, Any]
    digest: str


def verified(text: str, find_key: FindKey, expected: Expected, now: datetime) -> IdToken:
    """Verify a token, for whose algorithm and key id ``find_key`` returns the key; raises ``IdTokenRefused``.

    Reasons name what is wrong with the token, never what is in it.
    """
    from workflows.oidc import jose

    token = _read(text)
    header = token.headers()
    algorithm, key_id = _algorithm(header), _key_id(header)
    key = find_key(algorithm, key_id)
    if key is None:
        raise IdTokenRefused("The ID token is signed with a key that the identity provider does not list.")
    if not jose.is_valid(token, key):
        raise IdTokenRefused("The signature of the ID token is wrong.")
    claims = _claims(token.payload)
    _check_kind(header, claims, expected)
    _check_parties(claims, expected)
    _check_times(claims, now.timestamp())
    _check_nonce(claims, expected.nonce)
    digest = hashlib.sha256(text.rpartition(".")[0].encode()).hexdigest()
    return IdToken(_subject(claims), claims, digest)


def _read(text: str) -> jose.Signed:
    from workflows.oidc import jose

    token = jose.read_signed(text) if len(text) <= MAX_TOKEN and text.isascii() and text.count(".") == 2 else None
    if token is None:
        raise IdTokenRefused("The ID token is not a signed JWT.")
    return token


def _algorithm(header: Mapping[str, Any]) -> str:
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in KINDS:
        raise IdTokenRefused(f"The ID token must be signed with one of {', '.join(KINDS)}.")
    if "crit" in header:
        raise IdTokenRefused("The ID token has critical header parameters, of which none is known.")
    return algorithm


def _key_id(header: Mapping[str, Any]) -> str | None:
    key_id = header.get("kid")
    if not isinstance(key_id, str | None):
        raise IdTokenRefused("The key id of the ID token is not a text.")
    return key_id


def _claims(payload: bytes | None) -> Mapping[str, Any]:
    try:
        claims = json.loads(payload or b"")
    except (ValueError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        raise IdTokenRefused("The ID token has no claims.")
    return claims


def _check_kind(header: Mapping[str, Any], claims: Mapping[str, Any], expected: Expected) -> None:
    """Refuse access tokens and logout tokens, which the same key may have signed (RFC 8725 §3.12)."""
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.upper() != "JWT":
        raise IdTokenRefused("The token is of another type than an ID token.")
    if claims.get("typ", "ID") != "ID" or claims.get("token_use", "id") != "id":  # Keycloak's and Cognito's own
        raise IdTokenRefused("The token is of another type than an ID token.")
    if any(name in claims for name in _OF_ACCESS_TOKENS):
        raise IdTokenRefused("The token is an access token; send the ID token.")
    if _OF_LOGOUT_TOKENS in claims:
        raise IdTokenRefused("The token is a logout token; send the ID token.")


def _check_parties(claims: Mapping[str, Any], expected: Expected) -> None:
    if claims.get("iss") != expected.issuer:
        raise IdTokenRefused("The ID token is of another issuer.")
    if claims.get("aud") not in (expected.client_id, [expected.client_id]):
        raise IdTokenRefused("The ID token is for another client, or not for this one alone.")
    if claims.get("azp", expected.client_id) != expected.client_id:
        raise IdTokenRefused("The ID token was issued to another client.")


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    expires, issued, begins = (_time(claims, name) for name in ("exp", "iat", "nbf"))
    if expires is None or issued is None:
        raise IdTokenRefused("The ID token does not say when it was issued and when it expires.")
    if now >= expires + SKEW_SECONDS:
        raise IdTokenRefused("The ID token has expired.")
    if max(issued, begins or 0) > now + SKEW_SECONDS:
        raise IdTokenRefused("The ID token is not valid yet; check the clocks.")
    if now - issued > MAX_AGE_SECONDS + SKEW_SECONDS:
        raise IdTokenRefused("The ID token is too old; log in again.")


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 40:
        raise IdTokenRefused(f"The time {name} of the ID token is not one.")
    return float(value)


def _check_nonce(claims: Mapping[str, Any], nonce: str | None) -> None:
    given = claims.get("nonce")
    if nonce is None:
        if given is not None:
            raise IdTokenRefused("The ID token is that of another login.")
    elif not isinstance(given, str) or not hmac.compare_digest(given.encode(), nonce.encode()):
        raise IdTokenRefused("The ID token is that of another login.")


def _subject(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT:
        raise IdTokenRefused("The ID token does not say who has logged in.")
    if not subject.isascii() or not subject.isprintable():
        raise IdTokenRefused("The ID token does not say who has logged in.")
    return subject
