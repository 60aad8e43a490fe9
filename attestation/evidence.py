"""What evidence is, and what is concluded from it: the types and limits that all formats share (RFC 9334 §8)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any, Never, TypeGuard

from attestation.refusals import DuplicateKeys, EvidenceMalformed, EvidenceTooDeep, EvidenceTooLarge

MAX_EVIDENCE_BYTES = 32 * 1024
MAX_DEPTH = 16
NONCE_LIFETIME = timedelta(minutes=5)
CLOCK_SKEW = timedelta(minutes=5)  # by which a device's clock may differ from this one
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)


class EvidenceType(StrEnum):
    """A format of evidence."""

    EAT_JWT = "eat-jwt"
    EAT_CWT = "eat-cwt"
    PSA = "psa"
    TPM = "tpm2"


@dataclass(frozen=True, slots=True)
class Challenge:
    """What evidence has to be fresh for: 32 random bytes, which stay here until the evidence has come.

    The device learns only values derived from them: the ``nonce``, or, from a credential that its TPM alone can open,
    ``credential_secret``. The one says nothing about the other.
    """

    seed: bytes = field(repr=False)

    @property
    def nonce(self) -> bytes:
        """Return the nonce that the device is given in the clear, 32 bytes."""
        return hashlib.sha256(b"attestation nonce\0" + self.seed).digest()

    def credential_secret(self, endorsement_key: bytes, name: bytes) -> bytes:
        """Return the secret that only the TPM with this EK (SubjectPublicKeyInfo) and an object of this name learns."""
        context = hashlib.sha256(endorsement_key).digest() + hashlib.sha256(name).digest()
        return hashlib.sha256(b"attestation credential\0" + self.seed + context).digest()


class Lifecycle(StrEnum):
    """The security lifecycle state of a PSA root of trust (RFC 9783 §4.3.1)."""

    UNKNOWN = "unknown"
    ASSEMBLY_AND_TEST = "assembly-and-test"
    PSA_ROT_PROVISIONING = "psa-rot-provisioning"
    SECURED = "secured"
    NON_PSA_ROT_DEBUG = "non-psa-rot-debug"
    RECOVERABLE_PSA_ROT_DEBUG = "recoverable-psa-rot-debug"
    DECOMMISSIONED = "decommissioned"


class DebugStatus(StrEnum):
    """The state of a device's debug facilities (RFC 9711 §4.2.9), in the words of its JSON form."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    DISABLED_SINCE_BOOT = "disabled-since-boot"
    DISABLED_PERMANENTLY = "disabled-permanently"
    DISABLED_FULLY_AND_PERMANENTLY = "disabled-fully-and-permanently"


DEBUG_BY_NUMBER: Mapping[int, DebugStatus] = dict(enumerate(DebugStatus))


class PcrBank(IntEnum):
    """A hash algorithm of TPM 2.0 in which PCRs are kept, by its TPM_ALG_ID."""

    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D


@dataclass(frozen=True, slots=True)
class SoftwareComponent:
    """One measured piece of software: digest and signer in lower-case hex, empty if the evidence does not have it."""

    name: str = ""
    version: str = ""
    digest: str = ""
    signer: str = ""


@dataclass(frozen=True, slots=True)
class Claims:
    """What verified evidence says. A value that the evidence does not have is empty.

    ``attester`` names the device's root of trust: UEID or instance id in hex, for a TPM the SHA-256 of its
    endorsement or attestation key. ``implementation`` is what its kind is known by, in hex: PSA implementation id or
    EAT hardware model; ``vendor`` and ``model`` are texts. ``pcrs`` has values in hex by bank and number.
    """

    type: EvidenceType
    attester: str = ""
    implementation: str = ""
    vendor: str = ""
    model: str = ""
    lifecycle: Lifecycle | None = None
    debug: DebugStatus | None = None
    secure_boot: bool | None = None
    software: tuple[SoftwareComponent, ...] = ()
    pcrs: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    made_at: datetime | None = None
    anchor: str = ""  # SHA-256 of the trust anchor that vouched, in hex


def is_printable(value: object) -> TypeGuard[str]:
    """Return whether a claim is a text that can be kept and shown: JSON can have half of a character (U+D800), too."""
    return isinstance(value, str) and value.isprintable()


def check_size(evidence: bytes) -> None:
    """Raise ``EvidenceTooLarge`` if the evidence is longer than is ever looked into."""
    if len(evidence) > MAX_EVIDENCE_BYTES:
        raise EvidenceTooLarge(f"The evidence is longer than {MAX_EVIDENCE_BYTES} bytes.")


# --- JSON ----------------------------------------------------------------------------------------------------------


def read_object(content: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object strictly: UTF-8, no name twice, no NaN, limited depth. Raises ``EvidenceMalformed``."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique(what), parse_constant=_refuse_constant)
    except RecursionError:
        raise EvidenceTooDeep(f"{what} is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise EvidenceMalformed(f"{what} is not valid JSON in UTF-8.") from error
    check_depth(value, what)
    if not isinstance(value, dict):
        raise EvidenceMalformed(f"{what} is not a JSON object.")
    return value


def _unique(what: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise DuplicateKeys(f"{what} has a name twice in one object.")
        return made

    return make


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def check_depth(value: object, what: str) -> None:
    """Raise ``EvidenceTooDeep`` if lists and dictionaries in ``value`` are nested deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _members(outer)]
        if not level:
            return
    raise EvidenceTooDeep(f"{what} is nested deeper than {MAX_DEPTH} levels.")


def _members(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def from_base64url(text: str, what: str) -> bytes:
    """Decode Base64url without padding (RFC 7515 §2) strictly: one text for one content."""
    if not _BASE64URL.fullmatch(text):
        raise EvidenceMalformed(f"{what} is not Base64url without padding.")
    try:
        content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:
        raise EvidenceMalformed(f"{what} is not Base64url without padding.") from error
    if to_base64url(content) != text:
        raise EvidenceMalformed(f"{what} has bits after its end that should be zero.")
    return content


def to_base64url(content: bytes) -> str:
    """Encode as Base64url without padding, as nonces are written in JSON."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")
