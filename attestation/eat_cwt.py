"""Verify an Entity Attestation Token in the form of a CWT (RFC 9711, RFC 8392) signed as COSE_Sign1.

The claims set has the encoding of ``attestation.cose.read_cbor``: each claim once, in the shortest form, without tags.
Claims that are not among ``_NAMES`` are ignored, those of submodules, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from attestation.anchors import Anchor
from attestation.cose import CWT_TAG, read_cbor, read_cose_key, read_sign1
from attestation.eat import ClaimsSet, verified_claims
from attestation.evidence import DEBUG_BY_NUMBER, Challenge, Claims, EvidenceType
from attestation.refusals import EvidenceMalformed, KeyNotBound
from pki.algorithms import PublicKey

_CNF, _COSE_KEY = 8, 1
# Claim keys of IANA's CWT registry, by their names in JSON.
_NAMES: Mapping[int, str] = {
    4: "exp",
    5: "nbf",
    6: "iat",
    10: "eat_nonce",
    256: "ueid",
    258: "oemid",
    259: "hwmodel",
    260: "hwversion",
    262: "oemboot",
    263: "dbgstat",
    265: "eat_profile",
    270: "swname",
    271: "swversion",
}


def verify(
    evidence: bytes, challenge: Challenge, public_key: PublicKey, anchors: Sequence[Anchor], now: datetime
) -> Claims:
    """Verify an EAT, tagged as COSE_Sign1 and optionally as CWT, that was made for this challenge and key.

    The claim ``cnf`` has the key as a COSE_Key (RFC 8747 §3.2). Raises a kind of ``AttestationRefused``.
    """
    sign1 = read_sign1(evidence.removeprefix(CWT_TAG))
    token = read_token(sign1.payload)
    return verified_claims(EvidenceType.EAT_CWT, sign1, token, challenge, public_key, anchors, now)


def read_token(payload: bytes) -> ClaimsSet:
    """Read a claims set; claims that are not known here are ignored (RFC 9711 §4). Raises ``EvidenceMalformed``."""
    claims = read_cbor(payload, "The claims set")
    if not isinstance(claims, Mapping):
        raise EvidenceMalformed("The claims set is no map.")
    named = {_NAMES[key]: value for key, value in claims.items() if key in _NAMES}
    if "dbgstat" in named:
        named["dbgstat"] = _debug(named["dbgstat"])
    return ClaimsSet(named, _confirmed(claims))


def _debug(value: object) -> str:
    status = DEBUG_BY_NUMBER.get(value) if type(value) is int else None
    if status is None:
        raise EvidenceMalformed("The claim dbgstat is not one of RFC 9711.")
    return status.value


def _confirmed(claims: Mapping[Any, Any]) -> PublicKey | None:
    if _CNF not in claims:
        return None
    confirmation = claims[_CNF]
    if not isinstance(confirmation, Mapping) or set(confirmation) != {_COSE_KEY}:
        raise KeyNotBound("The claim cnf of the evidence has to hold one key, as a COSE_Key.")
    return read_cose_key(confirmation[_COSE_KEY])
