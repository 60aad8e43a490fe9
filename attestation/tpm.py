"""Verify that a TPM 2.0 holds the key of a CSR: TPM2_Certify by an attestation key of a TPM that an anchor vouches for.

The attestation key (AK) is vouched for by a certificate of its own (IAK), whose issuer has checked it, or else by the
endorsement key (EK): the nonce is then the secret of a credential that only the TPM with that EK could open, and only
while it held an AK of that name, which covers the AK's attributes. With a restricted key a TPM signs no structure of
its own kinds that it has not made itself: that the AK is restricted is what makes them true.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from attestation.anchors import Anchor, EvidenceSigner, SignerPurpose, certified
from attestation.evidence import Challenge, Claims, EvidenceType, PcrBank, check_size, read_object
from attestation.refusals import (
    AttestationKeyRefused,
    DeviceKeyRefused,
    EvidenceMalformed,
    KeyMismatch,
    NonceMismatch,
    SignatureInvalid,
)
from attestation.tpm_credential import Credential, make_credential
from attestation.tpm_structures import (
    CERTIFY,
    HASHES,
    NATIVE,
    QUOTE,
    Attested,
    Attributes,
    Public,
    is_signed,
    read_attested,
    read_public,
)
from core.errors import KeyRefused
from pki.algorithms import PublicKey, check_public_key, public_key_der, public_key_fingerprint
from pki.encoding import split
from pki.foreign import ForeignCertificate, Name, read_alternative_names, read_name, texts_of

_MANUFACTURER, _MODEL = "2.23.133.2.1", "2.23.133.2.2"  # attributes in the subjectAltName of an EK certificate
_ALTERNATIVE_NAMES, _DIRECTORY_NAME = "2.5.29.17", 0xA4
_PCRS = 24
_STRICT = ConfigDict(extra="forbid", frozen=True)


def _from_base64(value: object) -> object:
    if not isinstance(value, str):
        return value  # which is not bytes, then
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError("is not Base64") from error


_Bytes = Annotated[bytes, BeforeValidator(_from_base64)]
_Pcr = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=128)]


class Quote(BaseModel):
    """TPM2_Quote by the AK over PCRs, with their values in hex by bank (``sha256``) and number."""

    model_config = _STRICT
    attested: _Bytes
    signature: _Bytes
    pcrs: dict[str, dict[str, _Pcr]]


class TpmEvidence(BaseModel):
    """Evidence of a TPM: certificates in DER, structures as a TPM marshals them, with no size before; all in Base64.

    One of ``ek_certificate`` and ``ak_certificate`` is there; ``intermediates`` are the CAs above it. ``certify`` is
    the TPMS_ATTEST of TPM2_Certify, ``key_public`` and ``ak_public`` are TPMT_PUBLIC, signatures TPMT_SIGNATURE.
    """

    model_config = _STRICT
    ek_certificate: _Bytes | None = None
    ak_certificate: _Bytes | None = None
    intermediates: list[_Bytes] = Field(default=[], max_length=4)
    ak_public: _Bytes
    key_public: _Bytes
    certify: _Bytes
    certify_signature: _Bytes
    quote: Quote | None = None


def challenge_ek(
    challenge: Challenge, ek_certificate: bytes, intermediates: Sequence[bytes], ak_public: bytes,
    anchors: Sequence[Anchor], now: datetime,
) -> Credential:  # fmt: skip
    """Return the credential by which the TPM with this EK certificate learns the nonce for its AK (TPMT_PUBLIC).

    Raises a kind of ``AttestationRefused`` if no anchor vouches for the EK, or the AK is not restricted.
    """
    signer = certified(anchors, [ek_certificate, *intermediates], purpose=SignerPurpose.ENDORSEMENT, now=now)
    key = _attestation_key(ak_public)
    return make_credential(signer.key, key.name, challenge.credential_secret(public_key_der(signer.key), key.name))


def verify(
    evidence: bytes, challenge: Challenge, public_key: PublicKey, anchors: Sequence[Anchor], now: datetime
) -> Claims:
    """Verify evidence in JSON, as ``TpmEvidence`` says; raises a kind of ``AttestationRefused``."""
    shown = _read(evidence)
    ak = _attestation_key(shown.ak_public)
    signer, nonce = _vouched_for(shown, ak, challenge, anchors, now)
    attested = read_attested(shown.certify, CERTIFY, "The attestation of the key")
    _check_signed(ak, shown.certify_signature, shown.certify)
    _check_nonce(attested, nonce)
    _check_device_key(read_public(shown.key_public, "The device's key"), attested, public_key)
    names = _platform(signer.certificate)
    return Claims(
        type=EvidenceType.TPM,
        attester=public_key_fingerprint(signer.key),
        vendor=" ".join(texts_of(names, _MANUFACTURER)),
        model=" ".join(texts_of(names, _MODEL)),
        pcrs=_pcrs(shown.quote, ak, nonce) if shown.quote else {},
        anchor=signer.anchor.fingerprint,
    )


def _read(evidence: bytes) -> TpmEvidence:
    check_size(evidence)
    content = read_object(evidence, "The evidence")
    try:
        return TpmEvidence.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise EvidenceMalformed(f"The evidence of a TPM has an error in {place or 'it'}: {first['msg']}.") from error


def _attestation_key(content: bytes) -> Public:
    """Read the AK; a TPM signs with it what it made itself, and nothing else."""
    key = read_public(content, "The attestation key")
    wanted = NATIVE | Attributes.RESTRICTED | Attributes.SIGN
    if key.attributes & (wanted | Attributes.DECRYPT) != wanted:
        raise AttestationKeyRefused(
            "The attestation key is not a restricted signing key that was made in its TPM and cannot leave it."
        )
    try:
        check_public_key(key.key)
    except KeyRefused as error:
        raise AttestationKeyRefused(f"The attestation key is not accepted. {error.detail}") from error
    return key


def _vouched_for(
    shown: TpmEvidence, ak: Public, challenge: Challenge, anchors: Sequence[Anchor], now: datetime
) -> tuple[EvidenceSigner, bytes]:
    """Return what vouches for the AK, and the nonce that it has to have signed."""
    if (shown.ek_certificate is None) == (shown.ak_certificate is None):
        raise EvidenceMalformed("The evidence of a TPM needs one of ek_certificate and ak_certificate.")
    if shown.ek_certificate is not None:
        chain = [shown.ek_certificate, *shown.intermediates]
        signer = certified(anchors, chain, purpose=SignerPurpose.ENDORSEMENT, now=now)
        return signer, challenge.credential_secret(public_key_der(signer.key), ak.name)
    signer = certified(
        anchors, [shown.ak_certificate or b"", *shown.intermediates], purpose=SignerPurpose.ATTESTATION_KEY, now=now
    )
    if public_key_der(signer.key) != public_key_der(ak.key):
        raise AttestationKeyRefused("The certificate in the evidence is for another attestation key.")
    return signer, challenge.nonce


def _check_signed(ak: Public, signature: bytes, content: bytes) -> str:
    """Return the name of the hash of the AK's signature; raises ``SignatureInvalid``."""
    digest = is_signed(ak.key, signature, content)
    if digest is None:
        raise SignatureInvalid("A signature in the evidence does not verify under the attestation key.")
    return digest.name


def _check_nonce(attested: Attested, nonce: bytes) -> None:
    if not hmac.compare_digest(attested.extra_data, nonce):
        raise NonceMismatch("The TPM's evidence was not made for this nonce, or not by the TPM that was challenged.")


def _check_device_key(key: Public, attested: Attested, public_key: PublicKey) -> None:
    if attested.name != key.name or public_key_der(key.key) != public_key_der(public_key):
        raise KeyMismatch("The TPM vouches for another key than that of the CSR.")
    wanted = NATIVE | Attributes.SIGN
    if key.attributes & wanted != wanted:
        raise DeviceKeyRefused("The device's key was not made in its TPM, or could leave it, or does not sign.")


def _pcrs(quote: Quote, ak: Public, nonce: bytes) -> Mapping[str, Mapping[int, str]]:
    """Return the values of the PCRs that the quote selects, whose digest the TPM has signed (part 3, §18.4)."""
    attested = read_attested(quote.attested, QUOTE, "The quote")
    digest = _check_signed(ak, quote.signature, quote.attested)
    _check_nonce(attested, nonce)
    found: dict[str, dict[int, str]] = {}
    concatenated = b""
    for selection in attested.selections:
        values = quote.pcrs.get(selection.bank.name.lower(), {})
        bank = found.setdefault(selection.bank.name.lower(), {})
        for number in selection.numbers:
            bank[number] = _value(values, number, selection.bank)
            concatenated += bytes.fromhex(bank[number])
    selected = {name: set(map(str, bank)) for name, bank in found.items()}
    if selected != {name: set(bank) for name, bank in quote.pcrs.items()}:
        raise EvidenceMalformed("The PCRs in the evidence are not those that its quote selects.")
    if not hmac.compare_digest(hashlib.new(digest, concatenated).digest(), attested.digest):
        raise SignatureInvalid("The values of the PCRs are not those that the TPM has signed.")
    return found


def _value(values: Mapping[str, str], number: int, bank: PcrBank) -> str:
    value = values.get(str(number), "")
    if number >= _PCRS or len(value) != 2 * HASHES[bank].digest_size:
        raise EvidenceMalformed(f"The evidence has no value of PCR {number} that is as long as its hash.")
    return value


def _platform(certificate: ForeignCertificate | None) -> Name:
    """Return the directory name in an EK certificate's subjectAltName, where the TPM's manufacturer and model are."""
    value = certificate.extensions.get(_ALTERNATIVE_NAMES, b"") if certificate else b""
    for der in read_alternative_names(value) if value else ():
        try:
            elements = split(der)
        except ValueError:
            continue
        if elements and elements[0].tag == _DIRECTORY_NAME:
            return read_name(elements[0].content)
    return ()
