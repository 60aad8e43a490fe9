"""Evidence as a request brings it, before anything is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from attestation.evidence import EvidenceType, from_base64url
from attestation.refusals import EvidenceMalformed


@dataclass(frozen=True, slots=True)
class ShownEvidence:
    """Evidence as a device sends it: a JWT as it is, all else in Base64url, with the ``nonce`` that it was given."""

    type: EvidenceType
    nonce: str
    evidence: str = field(repr=False)

    def content(self) -> bytes:
        """Return the evidence in its own form; raises ``EvidenceMalformed``."""
        if self.type is not EvidenceType.EAT_JWT:
            return from_base64url(self.evidence, "The evidence")
        try:
            return self.evidence.encode("ascii")
        except UnicodeEncodeError as error:
            raise EvidenceMalformed("The evidence is not a JWT.") from error
