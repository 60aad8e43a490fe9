#!/usr/bin/env python3
"""Record evidence of two software TPMs into tpm_evidence.json beside this file, for tests/attestation/test_tpm.py.

Needs swtpm and tpm2-pytss, which scripts/test --all installs:

    .venv/bin/python tests/attestation/record_tpm.py

swtpm_setup makes a CA and has it certify each endorsement key. Everything but ``challenge_ek`` runs in the TPM: it
opens the credential, makes attestation key and device key, certifies and quotes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_SE,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_SIG_SCHEME,
    TPMT_SYM_DEF,
)
from tpm2_pytss.utils import NVReadEK, create_ek_template

from attestation.anchors import Anchor
from attestation.evidence import Challenge
from attestation.tpm import challenge_ek
from pki.algorithms import public_key_der
from pki.encoding import encode_sequence, join
from tests.support.swtpm import ISSUER_CERTIFICATE, ROOT_CERTIFICATE, software_tpm

HERE = Path(__file__).parent
# The algorithms of a CSR: object identifier, and what goes with it (RFC 5758 §3.2, RFC 8017 annex C).
ECDSA_WITH_SHA256 = (bytes.fromhex("06082a8648ce3d040302"),)
SHA256_WITH_RSA = (bytes.fromhex("06092a864886f70d01010b"), b"\x05\x00")
SIGNING = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign"


def record(tpm: ESAPI, folder: Path, template: str, key: str, seed: bytes) -> dict[str, object]:
    """Enrol as a device would: challenge, activation, certification, quote."""
    ek_certificate, ek_template = create_ek_template(template, NVReadEK(tpm))
    ek = tpm.create_primary(TPM2B_SENSITIVE_CREATE(), ek_template, ESYS_TR.ENDORSEMENT)[0]
    ak, ak_public = _primary(tpm, f"{key}:{_scheme(key)}:null", f"{SIGNING}|restricted", ESYS_TR.ENDORSEMENT)
    other, unrestricted = _primary(tpm, f"{key}:{_scheme(key)}:null", SIGNING, ESYS_TR.ENDORSEMENT)
    tpm.flush_context(other)  # a TPM has room for three objects
    device, device_public = _primary(tpm, key, SIGNING, ESYS_TR.OWNER)
    root = x509.load_pem_x509_certificate((folder / ROOT_CERTIFICATE).read_bytes())
    issuer = x509.load_pem_x509_certificate((folder / ISSUER_CERTIFICATE).read_bytes())
    der = root.public_bytes(Encoding.DER)
    now = datetime.now(UTC).replace(microsecond=0)
    public = bytes(ak_public.publicArea.marshal())
    intermediates = [issuer.public_bytes(Encoding.DER)]
    credential = challenge_ek(Challenge(seed), ek_certificate, intermediates, public, [Anchor(der, True)], now)
    nonce = _activated(tpm, ek, ak, credential.blob, credential.secret, template)
    certified, signature = tpm.certify(device, ak, nonce, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL))
    quoted, quote_signature = tpm.quote(ak, "sha256:0,1,7", nonce, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL))
    _, _, values = tpm.pcr_read(TPML_PCR_SELECTION.parse("sha256:0,1,7"))
    pcrs = {number: bytes(value).hex() for number, value in zip(("0", "1", "7"), values, strict=True)}
    evidence = {
        "ek_certificate": text(ek_certificate),
        "intermediates": [text(one) for one in intermediates],
        "ak_public": text(public),
        "key_public": text(bytes(device_public.publicArea.marshal())),
        "certify": text(bytes(certified.attestationData)),
        "certify_signature": text(bytes(signature.marshal())),
        "quote": {
            "attested": text(bytes(quoted.attestationData)),
            "signature": text(bytes(quote_signature.marshal())),
            "pcrs": {"sha256": pcrs},
        },
    }
    key_der = public_key_der(load_der_public_key(device_public.to_der()))  # type: ignore[arg-type]
    return {
        "seed": seed.hex(),
        "at": now.isoformat(),
        "root": text(der),
        "public_key": text(key_der),
        "csr": text(request(tpm, device, key_der, key)),
        "unrestricted_ak_public": text(bytes(unrestricted.publicArea.marshal())),
        "evidence": evidence,
    }


def request(tpm: ESAPI, device: ESYS_TR, key_der: bytes, key: str) -> bytes:
    """Return a CSR without names (PKCS#10, DER) that the TPM has signed with the device's key."""
    content = encode_sequence(b"\x02\x01\x00", encode_sequence(), key_der, join(0xA0))
    algorithm = TPM2_ALG.RSASSA if key.startswith("rsa") else TPM2_ALG.ECDSA
    scheme = TPMT_SIG_SCHEME(scheme=algorithm)
    scheme.details.any.hashAlg = TPM2_ALG.SHA256
    signed = tpm.sign(device, hashlib.sha256(content).digest(), scheme)
    named: tuple[bytes, ...] = SHA256_WITH_RSA
    if algorithm is TPM2_ALG.RSASSA:
        signature = bytes(signed.signature.rsassa.sig)
    else:
        r, s = (bytes(part) for part in (signed.signature.ecdsa.signatureR, signed.signature.ecdsa.signatureS))
        signature = encode_dss_signature(int.from_bytes(r, "big"), int.from_bytes(s, "big"))
        named = ECDSA_WITH_SHA256
    return encode_sequence(content, encode_sequence(*named), join(0x03, b"\0" + signature))


def _scheme(key: str) -> str:
    return "rsassa-sha256" if key.startswith("rsa") else "ecdsa-sha256"


def _primary(tpm: ESAPI, algorithm: str, attributes: str, hierarchy: ESYS_TR) -> tuple[ESYS_TR, TPM2B_PUBLIC]:
    template = TPM2B_PUBLIC.parse(algorithm, objectAttributes=attributes)
    template.publicArea.unique.ecc.x = os.urandom(32) if algorithm.startswith("ecc") else b""
    handle, public, *_ = tpm.create_primary(TPM2B_SENSITIVE_CREATE(), template, hierarchy)
    return handle, public


def _activated(tpm: ESAPI, ek: ESYS_TR, ak: ESYS_TR, blob: bytes, secret: bytes, template: str) -> bytes:
    """Open the credential; the EK's policy is that of the owner of the endorsement hierarchy."""
    session = ESYS_TR.PASSWORD
    if "HIGH" not in template:
        symmetric = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        session = tpm.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, symmetric, TPM2_ALG.SHA256)
        tpm.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
    opened = tpm.activate_credential(
        ak,
        ek,
        TPM2B_ID_OBJECT.unmarshal(blob)[0],
        TPM2B_ENCRYPTED_SECRET.unmarshal(secret)[0],
        ESYS_TR.PASSWORD,
        session,
    )
    return bytes(opened)


def text(content: bytes) -> str:
    """Return Base64."""
    return base64.b64encode(content).decode()


def recordings() -> dict[str, dict[str, object]]:
    """Return what a TPM with an RSA endorsement key made, and what one with an ECC key made."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with software_tpm(folder, "rsa") as tcti, ESAPI(tcti) as tpm:
            rsa = record(tpm, folder, "EK-RSA2048", "ecc256", os.urandom(32))
        with software_tpm(folder, "ecc", "--ecc") as tcti, ESAPI(tcti) as tpm:
            ecc = record(tpm, folder, "EK-HIGH-ECC384", "rsa2048", os.urandom(32))
    return {"rsa-ek": rsa, "ecc-ek": ecc}


def main() -> None:
    """Replace the file."""
    (HERE / "tpm_evidence.json").write_text(json.dumps(recordings(), indent=1) + "\n")


if __name__ == "__main__":
    main()
