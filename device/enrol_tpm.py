"""What a device does in its TPM 2.0 to enrol: make a key that never leaves it, and have the TPM attest to that key.

``enrol --attest tpm`` uses it, and looks for it in its own folder. Needs tpm2-pytss (Debian: python3-tpm2-pytss).

The key is a child of the ECC storage key of the owner's hierarchy, which TSS2 key files take for granted, and so can be
loaded by every program with such files. The attestation key is made anew in each run, below the endorsement hierarchy.
The hierarchies must have no password. Nothing stays loaded in the TPM.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

os.environ.setdefault("TSS2_LOG", "all+NONE")  # it is read when the library is loaded; errors are raised anyway

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_OBJECT,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
    TSS2_Exception,
)
from tpm2_pytss.tsskey import TSSPrivKey
from tpm2_pytss.utils import NVReadEK, create_ek_template

_KINDS = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-RSA2048", "EK-HIGH-ECC256", "EK-HIGH-ECC384", "EK-HIGH-RSA3072")
_STAYS = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth"
_AS_THE_KEY_SAYS = TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)


class TpmError(Exception):
    """What the TPM cannot do, in one sentence."""


# From EK certificate, the CAs above it (DER) and attestation key (TPMT_PUBLIC) to the parts of a credential for that
# TPM and key: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
Ask = Callable[[bytes, Sequence[bytes], bytes], tuple[bytes, bytes]]


class _Loaded(ExitStack):
    """What is loaded in a TPM, all of which is flushed at the end, whatever happens."""

    def __init__(self, tpm: Any) -> None:
        super().__init__()
        self.tpm = tpm

    def keep(self, handle: Any) -> Any:
        self.callback(self.tpm.flush_context, handle)
        return handle

    def primary(self, template: Any, hierarchy: Any) -> tuple[Any, Any]:
        handle, public, *_ = self.tpm.create_primary(TPM2B_SENSITIVE_CREATE(), template, hierarchy)
        return self.keep(handle), public

    def parent(self) -> Any:
        attributes = f"{_STAYS}|restricted|decrypt|noda"
        template = TPM2B_PUBLIC.parse("ecc256:null:aes128cfb", objectAttributes=attributes)
        return self.primary(template, ESYS_TR.OWNER)[0]


@contextmanager
def _opened(tcti: str | None) -> Iterator[Any]:
    try:
        tpm = ESAPI(tcti or None)
    except TSS2_Exception as error:
        raise TpmError(f"Cannot reach the TPM ({error}): check --tcti, and that this user may use it.") from error
    try:
        yield tpm
    except TSS2_Exception as error:
        advice = "its hierarchies must have no password, and other programs must leave room in it"
        raise TpmError(f"The TPM refused a command ({error}): {advice}.") from error
    finally:
        tpm.close()


def make_key(tcti: str | None) -> bytes:
    """Make a P-256 key for signatures in the TPM; return it as PEM (TSS2 PRIVATE KEY), of use in this TPM only."""
    template = TPM2B_PUBLIC.parse("ecc256", objectAttributes=f"{_STAYS}|sign|noda")
    with _opened(tcti) as tpm, _Loaded(tpm) as loaded:
        private, public, *_ = tpm.create(loaded.parent(), TPM2B_SENSITIVE_CREATE(), template)
        return bytes(TSSPrivKey(private, public).to_pem())


def attest(tcti: str | None, key: bytes, ask: Ask, pcrs: str = "", chain: Sequence[bytes] = ()) -> dict[str, Any]:
    """Return evidence of this TPM for the key (PEM), which ``make_key`` made; ``ask`` has the portal make a credential.

    ``pcrs`` is a selection such as ``sha256:0,1,7`` for a quote; ``chain`` are the CAs above the EK certificate.
    """
    with _opened(tcti) as tpm, _Loaded(tpm) as loaded:
        return _attested(loaded, key, ask, pcrs, chain)


def _attested(loaded: _Loaded, key: bytes, ask: Ask, pcrs: str, chain: Sequence[bytes]) -> dict[str, Any]:
    tpm = loaded.tpm
    certificate, ek_template = _endorsement(tpm)
    ak_template = TPM2B_PUBLIC.parse("ecc256:ecdsa-sha256:null", objectAttributes=f"{_STAYS}|sign|restricted|noda")
    ak, ak_public = loaded.primary(ak_template, ESYS_TR.ENDORSEMENT)
    shown = _bytes(ak_public.publicArea)
    nonce = _activated(tpm, ek_template, ak, *ask(certificate, chain, shown))
    device, device_public = _device_key(loaded, key)
    certified, signature = tpm.certify(device, ak, nonce, _AS_THE_KEY_SAYS)
    evidence: dict[str, Any] = {
        "ek_certificate": _text(certificate),
        "intermediates": [_text(one) for one in chain],
        "ak_public": _text(shown),
        "key_public": _text(_bytes(device_public.publicArea)),
        "certify": _text(bytes(certified.attestationData)),
        "certify_signature": _text(_bytes(signature)),
    }
    if pcrs:
        evidence["quote"] = _quote(tpm, ak, nonce, pcrs)
    return evidence


def _endorsement(tpm: Any) -> tuple[bytes, Any]:
    """Return the first EK certificate that the TPM holds, and the template of its key (TCG EK Credential Profile)."""
    read = NVReadEK(tpm)
    for kind in _KINDS:
        try:
            certificate, template = create_ek_template(kind, read)
        except ValueError:  # there is none of this kind
            continue
        if certificate:
            return _unpadded(bytes(certificate)), template
    raise TpmError("The TPM holds no certificate of its endorsement key, without which no portal can know it.")


def _unpadded(certificate: bytes) -> bytes:
    """Cut off what follows the certificate where its place in the TPM is longer."""
    if certificate[:2] != b"\x30\x82":
        raise TpmError("The certificate of the TPM's endorsement key is not in DER.")
    return certificate[: 4 + int.from_bytes(certificate[2:4], "big")]


def _activated(tpm: Any, template: Any, ak: Any, blob: bytes, secret: bytes) -> bytes:
    """Open the credential; most EKs are used by the owner of the endorsement hierarchy (policy A of the profile)."""
    parts = TPM2B_ID_OBJECT.unmarshal(blob)[0], TPM2B_ENCRYPTED_SECRET.unmarshal(secret)[0]
    with _Loaded(tpm) as loaded:  # a TPM has room for three objects, and the next ones are to come
        ek, _ = loaded.primary(template, ESYS_TR.ENDORSEMENT)
        session = ESYS_TR.PASSWORD
        if not template.publicArea.objectAttributes & TPMA_OBJECT.USERWITHAUTH:
            nothing = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
            session = tpm.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, nothing, TPM2_ALG.SHA256)
            loaded.keep(session)
            tpm.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
        return bytes(tpm.activate_credential(ak, ek, *parts, ESYS_TR.PASSWORD, session))


def _device_key(loaded: _Loaded, key: bytes) -> tuple[Any, Any]:
    made = TSSPrivKey.from_pem(key)
    with _Loaded(loaded.tpm) as above:
        parent = above.parent()
        try:
            handle = loaded.tpm.load(parent, made.private, made.public)
        except TSS2_Exception as error:
            advice = "if it was cleared or replaced, remove next/ and current/ and enrol with a new token"
            raise TpmError(f"The TPM cannot load the device's key ({error}): {advice}.") from error
    return loaded.keep(handle), made.public


def _quote(tpm: Any, ak: Any, nonce: bytes, pcrs: str) -> dict[str, Any]:
    quoted, signature = tpm.quote(ak, pcrs, nonce, _AS_THE_KEY_SAYS)
    bank, _, numbers = pcrs.partition(":")
    values: dict[str, str] = {}
    for number in numbers.split(","):  # one by one: TPM2_PCR_Read returns at most eight at a time
        found = tpm.pcr_read(f"{bank}:{number}")[2]
        if not len(found):
            raise TpmError(f"The TPM has no PCR {number} in the bank {bank}: ask for others with --pcrs.")
        values[number] = bytes(found[0]).hex()
    return {
        "attested": _text(bytes(quoted.attestationData)),
        "signature": _text(_bytes(signature)),
        "pcrs": {bank: values},
    }


def _bytes(structure: Any) -> bytes:
    return bytes(structure.marshal())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
