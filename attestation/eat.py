"""What both forms of an Entity Attestation Token have in common: nonce, age, key and other claims (RFC 9711)."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from attestation.anchors import Anchor, SignedToken
from attestation.evidence import (
    CLOCK_SKEW,
    NONCE_LIFETIME,
    Challenge,
    Claims,
    DebugStatus,
    EvidenceType,
    SoftwareComponent,
    is_printable,
)
from attestation.refusals import (
    EvidenceFromTheFuture,
    EvidenceMalformed,
    EvidenceTooOld,
    KeyMismatch,
    KeyNotBound,
    NonceMismatch,
)
from pki.algorithms import PublicKey, public_key_der

_YEAR_10000 = 253_402_300_800  # seconds after 1970, which datetime cannot hold


@dataclass(frozen=True, slots=True)
class ClaimsSet:
    """The claims of an EAT by their names in JSON; what is binary is bytes, also where the token is JSON."""

    claims: Mapping[str, object]
    key: PublicKey | None  # of cnf


def verified_claims(
    kind: EvidenceType,
    signed: SignedToken,
    token: ClaimsSet,
    challenge: Challenge,
    public_key: PublicKey,
    anchors: Sequence[Anchor],
    now: datetime,
) -> Claims:
    """Verify the signature, nonce, age and key of an EAT, in this order, and return the claims that count.

    Raises a kind of ``AttestationRefused``.
    """
    ueid = token.claims.get("ueid")
    signer = signed.verify(anchors, [ueid] if isinstance(ueid, bytes) else [], now=now)
    _check_nonce(token.claims.get("eat_nonce"), challenge.nonce)
    made_at = _check_age(token.claims, now)
    _check_key(token.key, public_key)
    return _read_claims(kind, token.claims, made_at=made_at, anchor=signer.anchor.fingerprint)


def _check_nonce(found: object, expected: bytes) -> None:
    """Raise ``NonceMismatch`` unless ``found`` is this one nonce; a list that has it among others is not."""
    if not isinstance(found, bytes) or not hmac.compare_digest(found, expected):
        raise NonceMismatch("The evidence was not made for this nonce.")


def _check_key(attested: PublicKey | None, expected: PublicKey) -> None:
    """Raise ``KeyNotBound`` or ``KeyMismatch`` unless the attested key is the one of the CSR."""
    if attested is None:
        raise KeyNotBound("The evidence does not say for which key it was made: it has no claim cnf.")
    if public_key_der(attested) != public_key_der(expected):
        raise KeyMismatch("The evidence was made for another key than that of the CSR.")


def _check_age(claims: Mapping[str, object], now: datetime) -> datetime | None:
    """Check ``iat``, ``nbf`` and ``exp``, if they are there, and return the first (RFC 8392 §3.1, RFC 9711 §4.3.1).

    Whole seconds since 1970. Raises ``EvidenceTooOld`` or ``EvidenceFromTheFuture``.
    """
    made_at, begins, ends = (_time(claims, name) for name in ("iat", "nbf", "exp"))
    for earliest in (made_at, begins):
        if earliest is not None and earliest > now + CLOCK_SKEW:
            raise EvidenceFromTheFuture("The evidence was made later than now; set the device's clock.")
    if ends is not None and ends <= now - CLOCK_SKEW:
        raise EvidenceTooOld("The evidence has expired; make new evidence.")
    if made_at is not None and made_at < now - NONCE_LIFETIME - CLOCK_SKEW:
        raise EvidenceTooOld("The evidence was made before its nonce; set the device's clock, or make new evidence.")
    return made_at


def _time(claims: Mapping[str, object], name: str) -> datetime | None:
    value = claims.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _YEAR_10000:
        raise EvidenceMalformed(f"The claim {name} is no number of whole seconds since 1970.")
    return datetime.fromtimestamp(value, UTC)


def _read_claims(kind: EvidenceType, claims: Mapping[str, object], *, made_at: datetime | None, anchor: str) -> Claims:
    """Return the claims that count; raises ``EvidenceMalformed`` if one has a type that it cannot have."""
    debug = _text(claims, "dbgstat")
    name, version = _text(claims, "swname"), _text(claims, "swversion")
    software = (SoftwareComponent(name=name, version=version),) if name or version else ()
    return Claims(
        type=kind,
        attester=_binary(claims, "ueid").hex(),
        implementation=_binary(claims, "hwmodel").hex(),
        vendor=_manufacturer(claims.get("oemid")),
        model=_text(claims, "hwversion"),
        debug=_debug(debug) if debug else None,
        secure_boot=_truth(claims, "oemboot"),
        software=software,
        made_at=made_at,
        anchor=anchor,
    )


def _text(claims: Mapping[str, object], name: str) -> str:
    """Return a claim that is a text, the first of a list whose other member says what scheme it has, or empty."""
    value = claims.get(name, "")
    if isinstance(value, list | tuple) and 1 <= len(value) <= 2:
        value = value[0]
    if not is_printable(value):
        raise EvidenceMalformed(f"The claim {name} is no printable text.")
    return value


def _binary(claims: Mapping[str, object], name: str) -> bytes:
    """Return a claim that is a byte string, or empty."""
    value = claims.get(name, b"")
    if not isinstance(value, bytes):
        raise EvidenceMalformed(f"The claim {name} is no byte string.")
    return value


def _manufacturer(value: object) -> str:
    """Return the OEM id: the number of an enterprise in decimal, or an IEEE or random one in hex (RFC 9711 §4.2.3)."""
    match value:
        case None:
            return ""
        case bytes():
            return value.hex()
        case int() if not isinstance(value, bool) and value >= 0:
            return str(value)
    raise EvidenceMalformed("The claim oemid is neither a number nor a byte string.")


def _debug(name: str) -> DebugStatus:
    try:
        return DebugStatus(name)
    except ValueError:
        raise EvidenceMalformed("The claim dbgstat is not one of RFC 9711.") from None


def _truth(claims: Mapping[str, object], name: str) -> bool | None:
    value = claims.get(name)
    if value is not None and not isinstance(value, bool):
        raise EvidenceMalformed(f"The claim {name} is neither true nor false.")
    return value
