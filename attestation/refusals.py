"""Why evidence is refused: one class, and so one code, for each reason.

All are kinds of ``core.errors.AttestationRefused``, so that a caller needs to know no more than that one.
"""

from __future__ import annotations

from core.errors import AttestationRefused

# --- Encoding ------------------------------------------------------------------------------------------------------


class EvidenceMalformed(AttestationRefused):
    """The evidence cannot be read as what it is said to be, or a claim in it has a type that it cannot have."""

    code = "evidence_malformed"


class EvidenceTooLarge(EvidenceMalformed):
    """The evidence is longer than ``attestation.evidence.MAX_EVIDENCE_BYTES``."""

    code = "evidence_too_large"


class EvidenceTooDeep(EvidenceMalformed):
    """Maps and arrays are nested deeper than ``attestation.evidence.MAX_DEPTH``."""

    code = "evidence_too_deep"


class DuplicateKeys(EvidenceMalformed):
    """A map or object has one key twice, so that two readers could see two different claims."""

    code = "evidence_duplicate_keys"


class IndefiniteLength(EvidenceMalformed):
    """CBOR of indefinite length, which none of the accepted profiles allows (RFC 8949 §3.2)."""

    code = "evidence_indefinite_length"


class EncodingRefused(EvidenceMalformed):
    """CBOR that is not in preferred serialization (RFC 8949 §4.1), or has a tag within the claims."""

    code = "evidence_encoding_refused"


class ProfileUnsupported(AttestationRefused):
    """The evidence names a profile other than the one of its type."""

    code = "evidence_profile_unsupported"


# --- Signature and trust -------------------------------------------------------------------------------------------


class AlgorithmRefused(AttestationRefused):
    """The signature algorithm is none that is accepted, is not protected, or is not for a key of the signer's kind."""

    code = "evidence_algorithm_refused"


class SignatureInvalid(AttestationRefused):
    """The signature does not verify."""

    code = "evidence_signature_invalid"


class AnchorUnknown(AttestationRefused):
    """No registered trust anchor vouches for the key that signed the evidence."""

    code = "attestation_anchor_unknown"


class AnchorExpired(AttestationRefused):
    """A registered trust anchor would vouch for the signer, but it has expired or is not valid yet."""

    code = "attestation_anchor_expired"


class SignerCertificateRefused(AttestationRefused):
    """A certificate in the evidence has expired, is not for this purpose, or cannot be read."""

    code = "attestation_certificate_refused"


class AttestationKeyRefused(AttestationRefused):
    """The TPM's attestation key could sign anything: it is not a restricted signing key that cannot leave its TPM."""

    code = "attestation_key_refused"


# --- Freshness -----------------------------------------------------------------------------------------------------


class NonceMismatch(AttestationRefused):
    """The evidence was not made for this nonce, or, for a TPM, not by the one that was challenged."""

    code = "attestation_nonce_mismatch"


class NonceUnknown(AttestationRefused):
    """The nonce was not given to whoever presents it now, or has expired long ago."""

    code = "attestation_nonce_unknown"


class NonceSpent(AttestationRefused):
    """The nonce was presented before."""

    code = "attestation_nonce_used"


class NonceExpired(AttestationRefused):
    """The nonce has expired."""

    code = "attestation_nonce_expired"


class EvidenceTooOld(AttestationRefused):
    """The evidence says that it was made too long ago, or has expired."""

    code = "evidence_too_old"


class EvidenceFromTheFuture(AttestationRefused):
    """The evidence says that it was made later than now: the device's clock, or this one, is wrong."""

    code = "evidence_from_the_future"


# --- The key that is asked for -------------------------------------------------------------------------------------


class KeyNotBound(AttestationRefused):
    """The evidence does not say for which key it was made."""

    code = "attested_key_missing"


class KeyMismatch(AttestationRefused):
    """The evidence was made for another key than that of the CSR."""

    code = "attested_key_mismatch"


class DeviceKeyRefused(AttestationRefused):
    """The TPM does not vouch that the device's key was made in it, cannot leave it, and signs."""

    code = "attested_key_refused"


# --- The device ----------------------------------------------------------------------------------------------------


class AttesterChanged(AttestationRefused):
    """The evidence is of another root of trust than the device has shown before."""

    code = "attester_changed"


# --- Appraisal -----------------------------------------------------------------------------------------------------


class EvidenceMissing(AttestationRefused):
    """The appraisal policy requires evidence, and none came."""

    code = "attestation_required"


class AppraisalFailed(AttestationRefused):
    """The evidence is genuine, but what it says does not satisfy the appraisal policy."""

    code = "attestation_policy_failed"
